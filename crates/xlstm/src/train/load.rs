//! Reading a run's configuration: YAML, in our form or the Python original's (`original.rs`), then
//! `--set` overrides, then the checks.
//!
//! An override is typed by parsing it as a configuration file of one key; its value then
//! replaces that key, and nothing else, in the configuration of the file.

use std::path::Path;

use serde_json::Value;

use super::config::RunConfig;
use super::original;
use crate::error::{Error, Result, nearest};

impl RunConfig {
    /// The configuration in `text`, a YAML file from `origin` in our form or in that of the Python
    /// original, with `sets` (`a.b=value`, the value in YAML) applied in order, checked.
    ///
    /// # Errors
    /// A configuration error that says where (file, line and column, or which `--set`), which key,
    /// what was expected and what was found; for an unknown key the nearest known one.
    pub fn load(text: &str, origin: &Path, sets: &[String]) -> Result<Self> {
        let every_key = "`xlstm inspect shakespeare` prints every key with a value";
        let original = original::is_original(text);
        let parsed = match original {
            true => original::load(text, origin),
            false => serde_saphyr::from_str(text).map_err(|e| file_error(&e, text, origin)),
        };
        let mut config: RunConfig = parsed.map_err(|e| e.or_hint(every_key))?;
        // A number that JSON cannot hold (NaN, infinity) is refused here, where its place is known.
        serde_saphyr::from_str::<Value>(text).map_err(|e| file_error(&e, text, origin))?;
        for set in sets {
            config = config.with_set(set).map_err(|e| e.or_hint(every_key))?;
        }
        config.validate().map_err(|e| {
            if original {
                return original::in_its_words(&e, text, origin);
            }
            let located = Error::config(format!("{}: {e}", origin.display()));
            match e.hint_text() {
                Some(hint) => located.hint(hint),
                None => located,
            }
        })?;
        Ok(config)
    }

    /// The configuration as YAML with every key; `load` reads it back unchanged.
    ///
    /// # Errors
    /// A configuration error if a path is not valid Unicode, which YAML cannot hold.
    pub fn to_yaml(&self) -> Result<String> {
        let options = serde_saphyr::ser_options! { prefer_block_scalars: false };
        serde_saphyr::to_string_with_options(self, options)
            .map_err(|e| Error::config(format!("the configuration cannot be written as YAML: {e}")))
    }

    /// The configuration with one `a.b=value` applied; not yet checked as a whole.
    fn with_set(&self, set: &str) -> Result<Self> {
        let (path, text) = set.split_once('=').ok_or_else(|| {
            Error::config(format!("--set {set}: expected key=value"))
                .hint("for instance --set optimizer.learning_rate=3e-4")
        })?;
        let keys: Vec<&str> = path.trim().split('.').collect();
        let internal = |e: serde_json::Error| Error::config(format!("--set {set}: {e}"));
        let mut resolved = serde_json::to_value(self).map_err(internal)?;
        let current = find_mut(&mut resolved, &keys, set)?;

        let refused = |e: serde_saphyr::Error| {
            let trouble = Trouble::of(&e, text);
            trouble.into_error(&format!("--set {set}"), keys.last().copied(), &e, text.trim())
        };
        let mut given: Value = serde_saphyr::from_str(text).map_err(refused)?;
        // Where text is wanted, `007` is those three characters and not the number 7.
        if current.is_string() && (given.is_number() || given.is_boolean()) {
            given = Value::String(text.trim().into());
        }
        let document = keys.iter().rev().fold(given.clone(), |value, key| {
            Value::Object(serde_json::Map::from_iter([((*key).to_owned(), value)]))
        });
        // JSON is YAML, and this way the same reader with the same messages does the typing.
        let typed: RunConfig = serde_saphyr::from_str(&document.to_string()).map_err(refused)?;
        let mut typed = serde_json::to_value(typed).map_err(internal)?;
        overlay(current, &given, find_mut(&mut typed, &keys, set)?);
        // A length in the one unit replaces one in the other.
        let other = match keys[..] {
            ["training", "steps"] => "epochs",
            ["training", "epochs"] => "steps",
            _ => "",
        };
        if !other.is_empty() && !given.is_null() {
            resolved["training"][other] = Value::Null;
        }
        serde_json::from_value(resolved).map_err(internal)
    }
}

/// The error for a `name` that is none of the `known`: names the nearest and lists them all.
pub fn unknown_name(what: &str, name: &str, known: &[&str]) -> Error {
    let list = known.join(", ");
    Error::config(format!("there is no {what} `{name}`")).hint(match nearest(name, known.iter().copied()) {
        Some(near) => format!("did you mean `{near}`? There are: {list}"),
        None => format!("there are: {list}"),
    })
}

/// The value at `keys`, all of which must exist.
fn find_mut<'a>(root: &'a mut Value, keys: &[&str], set: &str) -> Result<&'a mut Value> {
    let mut here = root;
    for (depth, key) in keys.iter().enumerate() {
        let Value::Object(map) = here else {
            return Err(Error::config(format!(
                "--set {set}: `{}` is a value, not a section",
                keys[..depth].join(".")
            ))
            .hint(format!("use --set {}=…", keys[..depth].join("."))));
        };
        if !map.contains_key(*key) {
            let known: Vec<&str> = map.keys().map(String::as_str).collect();
            let section = keys[..depth].join(".");
            let place = if section.is_empty() { String::new() } else { format!(" in `{section}`") };
            return Err(Error::config(format!("--set {set}: there is no key `{key}`{place}"))
                .hint(key_hint(key, &section, &known)));
        }
        here = &mut map[*key];
    }
    Ok(here)
}

/// Puts the keys that `given` names from `typed` into `target`; other keys of a section stay.
fn overlay(target: &mut Value, given: &Value, typed: &Value) {
    match (target, given) {
        (Value::Object(target), Value::Object(given)) => {
            for (key, given) in given {
                if let (Some(target), Some(typed)) = (target.get_mut(key), typed.get(key)) {
                    overlay(target, given, typed);
                }
            }
        }
        (target, _) => *target = typed.clone(),
    }
}

/// Where an unknown `key` belongs: the nearest key beside it, or the section that has this key.
fn key_hint(key: &str, section: &str, known: &[&str]) -> String {
    let defaults = serde_json::to_value(RunConfig::default()).unwrap_or_default();
    let mut homes = Vec::new();
    sections_with(&defaults, key, "", &mut homes);
    let near = nearest(key, known.iter().copied());
    match (homes.as_slice(), near) {
        ([home, ..], _) if home != section => {
            let home = if home.is_empty() { "the top level".into() } else { format!("`{home}`") };
            format!("`{key}` belongs to {home}")
        }
        (_, Some(near)) => format!("did you mean `{near}`?"),
        _ => format!("the keys here are: {}", known.join(", ")),
    }
}

/// Collects the dotted paths of the sections that hold `key`.
fn sections_with(value: &Value, key: &str, path: &str, found: &mut Vec<String>) {
    let Value::Object(map) = value else { return };
    if map.contains_key(key) {
        found.push(path.to_owned());
    }
    for (name, child) in map {
        let child_path = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
        sections_with(child, key, &child_path, found);
    }
}

/// The error for a file that is not a configuration, with its place.
pub(super) fn file_error(error: &serde_saphyr::Error, text: &str, origin: &Path) -> Error {
    let trouble = Trouble::of(error, text);
    let place = match (trouble.line, trouble.column) {
        (0, _) => origin.display().to_string(),
        (line, column) => format!("{}:{line}:{column}", origin.display()),
    };
    let keys = key_path_at(text, trouble.line, trouble.column);
    let key = (!keys.is_empty()).then(|| keys.join("."));
    let found = value_at(text, trouble.line, trouble.column);
    trouble.into_error(&place, key.as_deref(), error, &found)
}

/// What a YAML error is about, without the reader's own wording.
struct Trouble {
    line: usize,
    column: usize,
    kind: TroubleKind,
}

enum TroubleKind {
    UnknownKey { key: String, section: String, known: Vec<&'static str> },
    UnknownWord { word: String, known: Vec<&'static str> },
    WrongType { expected: String },
    Other(String),
}

impl Trouble {
    fn of(error: &serde_saphyr::Error, text: &str) -> Self {
        use serde_saphyr::Error as Yaml;
        let error = error.without_snippet();
        let (line, column) = error
            .location()
            .map_or((0, 0), |l| (l.line().try_into().unwrap_or(0), l.column().try_into().unwrap_or(0)));
        let kind = match error {
            Yaml::SerdeUnknownField { field, expected, .. } => {
                let mut keys = key_path_at(text, line, column);
                keys.pop();
                TroubleKind::UnknownKey {
                    key: field.clone(),
                    section: keys.join("."),
                    known: expected.clone(),
                }
            }
            Yaml::SerdeUnknownVariant { variant, expected, .. } => {
                TroubleKind::UnknownWord { word: variant.clone(), known: expected.clone() }
            }
            Yaml::InvalidScalar { ty, .. } => TroubleKind::WrongType { expected: plain_type(ty).into() },
            Yaml::SerdeInvalidType { expected, .. } | Yaml::SerdeInvalidValue { expected, .. } => {
                TroubleKind::WrongType { expected: plain_type(expected).into() }
            }
            Yaml::SerdeInvalidLength { expected, .. } => {
                TroubleKind::WrongType { expected: expected.clone() }
            }
            Yaml::Unexpected { expected, .. } => {
                TroubleKind::WrongType { expected: plain_type(expected).into() }
            }
            Yaml::NullIntoString { .. } => TroubleKind::WrongType { expected: "text".into() },
            Yaml::InvalidBooleanStrict { .. } => TroubleKind::WrongType { expected: "true or false".into() },
            Yaml::NonFiniteFloat { .. } => TroubleKind::WrongType { expected: "a finite number".into() },
            Yaml::Message { msg, .. } => TroubleKind::Other(msg.clone()),
            Yaml::DuplicateMappingKey { .. } => TroubleKind::Other("the key is there twice".into()),
            other => {
                // The place is said once, in front, in our own form.
                let message = other.to_string();
                let end = message.rfind(" at line ").unwrap_or(message.len());
                TroubleKind::Other(message[..end].to_owned())
            }
        };
        Trouble { line, column, kind }
    }

    fn into_error(self, place: &str, key: Option<&str>, error: &serde_saphyr::Error, found: &str) -> Error {
        let at_key = key.map(|key| format!("{key}: ")).unwrap_or_default();
        match self.kind {
            TroubleKind::UnknownKey { key, section, known } => {
                let inside = if section.is_empty() { String::new() } else { format!(" in `{section}`") };
                Error::config(format!("{place}: unknown key `{key}`{inside}"))
                    .hint(key_hint(&key, &section, &known))
            }
            TroubleKind::UnknownWord { word, known } => {
                let list = known.join(", ");
                let e = Error::config(format!("{place}: {at_key}expected one of {list}; found `{word}`"));
                match nearest(&word, known.iter().copied()) {
                    Some(near) => e.hint(format!("did you mean `{near}`?")),
                    None => e,
                }
            }
            TroubleKind::WrongType { expected } if found.is_empty() => {
                Error::config(format!("{place}: {at_key}expected {expected}; found nothing"))
            }
            TroubleKind::WrongType { expected } => {
                Error::config(format!("{place}: {at_key}expected {expected}; found `{found}`"))
            }
            TroubleKind::Other(message) => {
                let e = Error::config(format!("{place}: {at_key}{message}"));
                if matches!(error.without_snippet(), serde_saphyr::Error::Message { .. }) {
                    return e;
                }
                e.hint("the file is YAML: `key: value` lines, sections indented by spaces")
            }
        }
    }
}

/// A serde type in words.
fn plain_type(name: &str) -> &str {
    match name {
        "u8" | "u16" | "u32" | "u64" | "usize" => "a whole number, 0 or greater",
        "f32" | "f64" | "floating point" => "a number",
        "bool" | "boolean" | "a boolean" => "true or false",
        "string" | "a string" | "string scalar" | "path string" => "text",
        "mapping start" => "a section with keys",
        "sequence start" => "a list",
        other => other,
    }
}

/// The dotted key of the value or key at a place: the last key of its line up to there, and the
/// keys of the less indented lines above.
fn key_path_at(text: &str, line: usize, column: usize) -> Vec<String> {
    let lines: Vec<&str> = text.lines().take(line).collect();
    let Some(current) = lines.last() else { return Vec::new() };
    let mut keys = inline_keys(current, column);
    keys.reverse();
    let mut limit = usize::MAX;
    for line in lines.iter().rev() {
        let indent = line.len() - line.trim_start().len();
        if line.trim().is_empty() || indent >= limit {
            continue;
        }
        if let Some(key) = key_of(line) {
            keys.push(key);
            limit = indent;
        }
        if limit == 0 {
            break;
        }
    }
    keys.reverse();
    keys
}

/// The keys of the inline sections that are open at `column`, without the line's own key:
/// `a: {b: {c: x}}` has `b` and `c` at `x`.
fn inline_keys(line: &str, column: usize) -> Vec<String> {
    let split = line.char_indices().nth(column.saturating_sub(1)).map_or(line.len(), |(at, _)| at);
    let (head, tail) = line.split_at(split);
    let (mut open, mut start) = (Vec::new(), 0);
    for (at, c) in head.char_indices() {
        match c {
            '{' => open.push(key_of(&head[start..at])),
            '}' => drop(open.pop()),
            ',' => {}
            _ => continue,
        }
        start = at + 1;
    }
    if open.is_empty() {
        return Vec::new();
    }
    open.push(key_of(&head[start..]).or_else(|| key_of(tail)));
    open.into_iter().skip(1).flatten().collect()
}

/// The key that starts `text`, if it reads `key:`.
pub(super) fn key_of(text: &str) -> Option<String> {
    let (key, _) = text.trim_start().split_once(':')?;
    let key = key.trim().trim_matches(['"', '\'']);
    let word = !key.is_empty() && key.chars().all(|c| c.is_alphanumeric() || c == '_');
    word.then(|| key.to_owned())
}

/// The value that starts at a place, without what follows it on the line, shortened.
fn value_at(text: &str, line: usize, column: usize) -> String {
    let rest: String = text
        .lines()
        .nth(line.saturating_sub(1))
        .map(|l| l.chars().skip(column.saturating_sub(1)).collect())
        .unwrap_or_default();
    let rest = rest.split(" #").next().unwrap_or_default();
    let end = if rest.starts_with(['[', '{']) {
        rest.len()
    } else {
        rest.find([',', '}', ']']).unwrap_or(rest.len())
    };
    let value = rest[..end].trim();
    if value.chars().count() > 40 {
        value.chars().take(39).chain(['…']).collect()
    } else {
        value.to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::SlstmAt;
    use crate::optim::Decay;
    use crate::train::{Paths, TextSource};

    fn load(text: &str, sets: &[&str]) -> Result<RunConfig> {
        let sets: Vec<String> = sets.iter().map(|s| (*s).to_owned()).collect();
        RunConfig::load(text, Path::new("run.yaml"), &sets)
    }

    #[track_caller]
    fn refused(text: &str, sets: &[&str], message: &str, hint: &str) {
        let error = load(text, sets).expect_err(message);
        let found_hint = error.hint_text().unwrap_or_default();
        assert!(error.to_string().contains(message), "message: {error}\nwanted:  {message}");
        assert!(found_hint.contains(hint), "message: {error}\nhint: {found_hint}\nwanted: {hint}");
    }

    #[test]
    fn nothing_is_the_default() {
        assert_eq!(load("", &[]).unwrap(), RunConfig::default());
        assert_eq!(load("# only a comment\n", &[]).unwrap(), RunConfig::default());
    }

    #[test]
    fn a_file_changes_what_it_names() {
        let config = load("seed: 7\nmodel:\n  slstm_at: [1]\noptimizer:\n  clip: null\n", &[]).unwrap();
        let mut expected = RunConfig { seed: 7, ..Default::default() };
        expected.model.slstm_at = SlstmAt::Positions(vec![1]);
        expected.optimizer.clip = None;
        assert_eq!(config, expected);
    }

    #[test]
    fn unknown_keys_name_the_nearest() {
        refused("sead: 3\n", &[], "run.yaml:1:1: unknown key `sead`", "did you mean `seed`?");
        refused(
            "seed: 1\nmodel:\n  slstm:\n    num_head: 4\n",
            &[],
            "run.yaml:4:5: unknown key `num_head` in `model.slstm`",
            "did you mean `num_heads`?",
        );
        refused("learning_rate: 1\n", &[], "unknown key `learning_rate`", "belongs to `optimizer`");
        refused("model: {embeding_dim: 64}\n", &[], "`embeding_dim` in `model`", "`embedding_dim`?");
        refused(
            "zzzzzzzzzzzz: 1\n",
            &[],
            "unknown key",
            "the keys here are: seed, threads, device, dtype, model",
        );
    }

    #[test]
    fn wrong_types_say_key_expected_and_found() {
        refused(
            "seed: hello # no\n",
            &[],
            "run.yaml:1:7: seed: expected a whole number, 0 or greater; found `hello`",
            "",
        );
        refused("data:\n  length: 1.5\n", &[], "run.yaml:2:11: data.length: expected a whole number", "");
        refused(
            "data:\n  length: -4\n",
            &[],
            "data.length: expected a whole number, 0 or greater; found `-4`",
            "",
        );
        refused(
            "optimizer:\n\n  # rate\n  learning_rate: fast\n",
            &[],
            "4:18: optimizer.learning_rate: expected a number; found `fast`",
            "",
        );
        refused(
            "optimizer: {eps: 1e-8, weight_decay: big}",
            &[],
            "optimizer.weight_decay: expected a number; found `big`",
            "",
        );
        refused("model: {slstm: {eps: 1, num_heads: x}}", &[], "unknown key `eps` in `model.slstm`", "");
        refused("model:\n  bias: maybe\n", &[], "model.bias: expected true or false; found `maybe`", "");
        refused("optimizer: 3\n", &[], "optimizer: expected a section with keys; found `3`", "");
        refused(
            "schedule:\n  decay: cosin\n",
            &[],
            "schedule.decay: expected one of cosine, linear, constant; found `cosin`",
            "`cosine`?",
        );
        refused(
            "model:\n  slstm_at: {a: 1}\n",
            &[],
            "model.slstm_at: expected a list of block positions",
            "",
        );
        refused("model:\n  slstm_at: some\n", &[], "run.yaml:2:13: model.slstm_at: `some` is not a list", "");
        refused("optimizer:\n  betas: [0.9]\n", &[], "optimizer.betas: ", "");
        refused(
            "optimizer:\n  eps: .nan\n",
            &[],
            "optimizer.eps: expected a finite number; found `.nan`",
            "",
        );
        refused("data:\n  tokenizer: charakters\n", &[], "data.tokenizer: `charakters` is neither", "");
    }

    #[test]
    fn broken_yaml_has_a_place() {
        refused("seed: 1\nseed: 2\n", &[], "run.yaml:2:1: seed: the key is there twice", "");
        refused("data:\n  length: 1\n\tbatch_size: 2\n", &[], "run.yaml:", "YAML");
        refused("- 1\n", &[], "run.yaml:1:1: expected a section with keys", "");
    }

    #[test]
    fn the_whole_is_checked() {
        refused("data:\n  batch_size: 0\n", &[], "run.yaml: data.batch_size is 0", "at least 1");
        // What is wrong in the file can be put right by an override.
        load("data:\n  batch_size: 0\n", &["data.batch_size=2"]).unwrap();
    }

    #[test]
    fn sets_replace_one_value_each() {
        let config = load(
            "optimizer:\n  weight_decay: 0.3\n",
            &[
                "optimizer.learning_rate=3e-4",
                "model.slstm_at=[7:1]",
                "schedule.decay=linear",
                "data.train=[a.txt, b.txt]",
                "sample.prompt=007",
                "sample.top_k=5",
                "optimizer.clip=null",
                "training={steps: 50, log_every: 5}",
                "seed = 3",
            ],
        )
        .unwrap();
        let mut expected = RunConfig { seed: 3, ..Default::default() };
        expected.optimizer.weight_decay = 0.3;
        expected.optimizer.learning_rate = 3e-4;
        expected.optimizer.clip = None;
        expected.model.slstm_at = SlstmAt::Ratio { mlstm: 7, slstm: 1 };
        expected.schedule.decay = Decay::Linear;
        expected.data.train = TextSource::Files(Paths(vec!["a.txt".into(), "b.txt".into()]));
        expected.sample.prompt = "007".into();
        expected.sample.top_k = Some(5);
        expected.training.steps = Some(50);
        expected.training.log_every = 5;
        assert_eq!(config, expected);
    }

    #[test]
    fn a_run_has_one_length() {
        let both = "training:\n  steps: 5\n  epochs: 2\n";
        refused(both, &[], "run.yaml: training.steps is 5 and training.epochs is 2", "one of the two");
        refused("", &["training={steps: 5, epochs: 2}"], "training.steps is 5 and", "one of the two");
        let length = |text: &str, sets: &[&str]| {
            let training = load(text, sets).unwrap().training;
            (training.steps, training.epochs)
        };
        assert_eq!(length("training: {steps: 5}", &["training.epochs=0.5"]), (None, Some(0.5)));
        assert_eq!(length("training: {epochs: 3}", &["training.steps=7"]), (Some(7), None));
        assert_eq!(length("training: {epochs: 3}", &["training.steps=null"]), (None, Some(3.0)));
        assert_eq!(length("", &[]), (None, None));
    }

    #[test]
    fn bad_sets_say_which() {
        refused("", &["seed"], "--set seed: expected key=value", "--set optimizer.learning_rate");
        refused(
            "",
            &["optimiser.eps=1"],
            "--set optimiser.eps=1: there is no key `optimiser`",
            "`optimizer`?",
        );
        refused(
            "",
            &["optimizer.learnin_rate=1"],
            "no key `learnin_rate` in `optimizer`",
            "`learning_rate`?",
        );
        refused("", &["length=1"], "there is no key `length`", "belongs to `data`");
        refused("", &["seed.a=1"], "`seed` is a value, not a section", "--set seed=");
        refused(
            "",
            &["data.length=long"],
            "--set data.length=long: length: expected a whole number, 0 or greater; found `long`",
            "",
        );
        refused(
            "",
            &["schedule.decay=cosin"],
            "--set schedule.decay=cosin: decay: expected one of cosine",
            "`cosine`?",
        );
        refused("", &["optimizer={esp: 1}"], "unknown key `esp`", "`eps`?");
        refused("", &["training.steps=.inf"], "--set training.steps=.inf", "");
        refused("", &["data.length=["], "--set data.length=[", "");
    }

    #[test]
    fn the_resolved_configuration_reads_back_unchanged() {
        let default = RunConfig::default();
        let changed = load(
            "",
            &[
                "model.slstm_at=7:1",
                "model.feedforward.act_fn=relu^2",
                "sample.prompt=\"  odd: \\\"text\\\"\\n\\t# no comment\\n\\n\"",
                "data.validation=[shakespeare]",
                "data.tokenizer='./t: x.json'",
                "optimizer.eps=1.2345678901234567e-9",
                "seed=18446744073709551615",
            ],
        )
        .unwrap();
        assert_eq!(changed.seed, u64::MAX);
        for config in [default, changed] {
            let yaml = config.to_yaml().unwrap();
            assert_eq!(load(&yaml, &[]).unwrap(), config, "{yaml}");
        }
    }

    #[test]
    fn unknown_names_list_the_known() {
        let error = unknown_name("built-in configuration", "shakespear", &["shakespeare", "wikitext"]);
        assert_eq!(error.to_string(), "there is no built-in configuration `shakespear`");
        assert_eq!(error.hint_text(), Some("did you mean `shakespeare`? There are: shakespeare, wikitext"));
    }
}
