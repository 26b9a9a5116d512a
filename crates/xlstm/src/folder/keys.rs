//! The keys of a configuration that another program wrote, taken one by one.
//!
//! Errors name the file, the key, what was expected and what was found. What nobody took in the
//! end becomes a warning: a key that we do not know may change what the model computes.

use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use crate::error::{Error, Result, nearest};

/// A section of a configuration.
#[derive(Debug)]
pub(crate) struct Keys {
    file: PathBuf,
    /// The sections around it, each with a dot: `mlstm_block.mlstm.`.
    place: String,
    map: Map<String, Value>,
    /// All keys that were asked for.
    known: Vec<String>,
}

impl Keys {
    /// The keys of a JSON or YAML file.
    ///
    /// # Errors
    /// When it cannot be read or holds no keys.
    pub(crate) fn read(file: &Path) -> Result<Keys> {
        let text = std::fs::read_to_string(file).map_err(|e| Error::io("read", file, &e))?;
        let foreign = |what: String| {
            Error::checkpoint(format!("{}: expected a configuration, found {what}", file.display()))
                .hint("expected the configuration of a model, as keys and values")
        };
        let json = file.extension().is_some_and(|ending| ending == "json");
        let value: Value = match json {
            true => serde_json::from_str(&text).map_err(|e| foreign(e.to_string()))?,
            false => serde_saphyr::from_str(&text).map_err(|e| foreign(e.to_string()))?,
        };
        let Value::Object(map) = value else {
            return Err(foreign(format!("{value}")));
        };
        Ok(Keys { file: file.to_owned(), place: String::new(), map, known: Vec::new() })
    }

    /// Whether a key is there.
    pub(crate) fn has(&self, key: &str) -> bool {
        self.map.contains_key(key)
    }

    /// Whether a key is there and null.
    pub(crate) fn is_null(&self, key: &str) -> bool {
        self.map.get(key).is_some_and(Value::is_null)
    }

    /// The text at a key that stays where it is.
    pub(crate) fn text(&self, key: &str) -> Option<&str> {
        self.map.get(key).and_then(Value::as_str)
    }

    /// All keys and values.
    pub(crate) fn whole(self) -> Value {
        Value::Object(self.map)
    }

    /// The value of a key; None where it is absent or null.
    ///
    /// # Errors
    /// When it is not what is `expected`.
    pub(crate) fn take<T: DeserializeOwned>(&mut self, key: &str, expected: &str) -> Result<Option<T>> {
        Ok(self.take_nullable(key, expected)?.flatten())
    }

    /// The same, telling null (`Some(None)`) from absent (`None`).
    ///
    /// # Errors
    /// When it is not what is `expected`.
    pub(crate) fn take_nullable<T: DeserializeOwned>(
        &mut self,
        key: &str,
        expected: &str,
    ) -> Result<Option<Option<T>>> {
        self.known.push(key.to_owned());
        let Some(value) = self.map.remove(key) else { return Ok(None) };
        serde_json::from_value(value.clone()).map(Some).map_err(|_| self.unfit(key, expected, &value))
    }

    /// Puts the value of a key, where there is one, into `place`.
    ///
    /// # Errors
    /// When it is not what is `expected`.
    pub(crate) fn set<T: DeserializeOwned>(
        &mut self,
        key: &str,
        expected: &str,
        place: &mut T,
    ) -> Result<()> {
        if let Some(value) = self.take(key, expected)? {
            *place = value;
        }
        Ok(())
    }

    /// A whole number, from `place` where it is absent.
    ///
    /// # Errors
    /// When it is none.
    pub(crate) fn count(&mut self, key: &str, place: &mut usize) -> Result<()> {
        self.set(key, "a whole number, 0 or greater", place)
    }

    /// A number, from `place` where it is absent.
    ///
    /// # Errors
    /// When it is none.
    pub(crate) fn number(&mut self, key: &str, place: &mut f64) -> Result<()> {
        self.set(key, "a number", place)
    }

    /// True or false, from `place` where it is absent.
    ///
    /// # Errors
    /// When it is neither.
    pub(crate) fn flag(&mut self, key: &str, place: &mut bool) -> Result<()> {
        self.set(key, "true or false", place)
    }

    /// A limit, null for none, from `place` where it is absent.
    ///
    /// # Errors
    /// When it is no number.
    pub(crate) fn limit(&mut self, key: &str, place: &mut Option<f64>) -> Result<()> {
        if let Some(value) = self.take_nullable(key, "a number or null")? {
            *place = value;
        }
        Ok(())
    }

    /// The section at a key; None where it is absent or null.
    ///
    /// # Errors
    /// When it is none.
    pub(crate) fn section(&mut self, key: &str) -> Result<Option<Keys>> {
        let map = self.take(key, "a section of keys")?;
        let place = format!("{}{key}.", self.place);
        Ok(map.map(|map| Keys { file: self.file.clone(), place, map, known: Vec::new() }))
    }

    /// Takes keys that change no result: names of kernels, notes of other programs.
    pub(crate) fn ignore(&mut self, keys: &[&str]) {
        for key in keys {
            self.known.push((*key).to_owned());
            self.map.remove(*key);
        }
    }

    /// Refuses a key whose value asks for what we do not have.
    ///
    /// # Errors
    /// When the key is there and is not `only`.
    pub(crate) fn require(&mut self, key: &str, only: &Value) -> Result<()> {
        match self.take::<Value>(key, "a value")? {
            Some(value) if value != *only => {
                Err(self.unfit(key, &format!("{only}, all that is supported"), &value))
            }
            _ => Ok(()),
        }
    }

    /// An error about the value of a key.
    pub(crate) fn unfit(&self, key: &str, expected: &str, found: &Value) -> Error {
        Error::checkpoint(format!(
            "{}: {}{key}: expected {expected}, found {found}",
            self.file.display(),
            self.place
        ))
        .hint("the file is damaged, or of a program that we do not know")
    }

    /// Sets a key by its path, such as `mlstm_block.mlstm.num_heads`; the value is YAML.
    ///
    /// # Errors
    /// When the value is no YAML, or a part of the path is no section.
    pub(crate) fn override_with(&mut self, path: &str, value: &str) -> Result<()> {
        let value: Value = serde_saphyr::from_str(value)
            .map_err(|e| Error::config(format!("{path}={value}: {e}")).hint("expected KEY=VALUE"))?;
        let mut map = &mut self.map;
        let mut parts = path.split('.').peekable();
        while let Some(part) = parts.next() {
            if parts.peek().is_none() {
                map.insert(part.to_owned(), value);
                return Ok(());
            }
            let inner = map.entry(part).or_insert_with(|| Value::Object(Map::new()));
            let Value::Object(inner) = inner else {
                return Err(Error::config(format!("{path}: {part} is no section"))
                    .hint("a key of a section is SECTION.KEY"));
            };
            map = inner;
        }
        Ok(())
    }

    /// Warnings about the keys that nobody took.
    pub(crate) fn finish(self) -> Vec<String> {
        let Keys { file, place, map, known } = self;
        let warning = |key: &String| {
            let near = nearest(key, known.iter().map(String::as_str));
            let near = near.map_or_else(String::new, |near| format!(" (did you mean {near}?)"));
            format!("{}: unknown key {place}{key} is ignored{near}", file.display())
        };
        map.keys().filter(|key| !key.starts_with('_')).map(warning).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files::tests::Scratch;

    #[test]
    fn keys_are_taken_and_the_rest_is_named() {
        let scratch = Scratch::new();
        let file = scratch.0.join("config.yaml");
        std::fs::write(&file, "heads: 4\neps: 1.0e-06\ncap: null\ninner: {size: x}\nsise: 3\n_note: 1\n")
            .unwrap();
        let mut keys = Keys::read(&file).unwrap();
        let (mut heads, mut eps, mut cap, mut size) = (0, 0.0, Some(1.0), 0);
        keys.count("heads", &mut heads).unwrap();
        keys.number("eps", &mut eps).unwrap();
        keys.limit("cap", &mut cap).unwrap();
        keys.count("size", &mut size).unwrap();
        assert_eq!((heads, eps, cap, size), (4, 1e-6, None, 0));
        let mut inner = keys.section("inner").unwrap().unwrap();
        let error = inner.count("size", &mut size).unwrap_err().to_string();
        assert!(
            error.ends_with("config.yaml: inner.size: expected a whole number, 0 or greater, found \"x\""),
            "{error}"
        );
        let warnings = keys.finish();
        assert_eq!(warnings.len(), 1);
        assert!(warnings[0].contains("unknown key sise is ignored (did you mean size?)"), "{warnings:?}");
    }

    #[test]
    fn keys_are_overridden() {
        let scratch = Scratch::new();
        let file = scratch.0.join("config.json");
        std::fs::write(&file, r#"{"a": {"b": 1}, "c": 2}"#).unwrap();
        let mut keys = Keys::read(&file).unwrap();
        keys.override_with("a.b", "[1, 2]").unwrap();
        keys.override_with("d.e", "x").unwrap();
        assert!(keys.override_with("c.b", "1").is_err());
        assert_eq!(keys.take::<Value>("a", "").unwrap().unwrap(), serde_json::json!({"b": [1, 2]}));
        assert_eq!(keys.take::<Value>("d", "").unwrap().unwrap(), serde_json::json!({"e": "x"}));
        std::fs::write(&file, "[1]").unwrap();
        assert!(Keys::read(&file).unwrap_err().to_string().contains("found [1]"));
    }
}
