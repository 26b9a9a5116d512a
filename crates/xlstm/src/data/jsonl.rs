//! JSON lines: a JSON object a line, one of its fields a document.

use std::fs::File;
use std::io::{BufRead, BufReader, Seek, SeekFrom};
use std::path::PathBuf;

use serde_json::Value;

use super::documents::{Cutter, Opening, Piece, Place, Reader, Skipped, TextOptions};
use crate::error::nearest;
use crate::{Error, Result};

/// Reads a line at a time.
pub(super) struct JsonLinesReader {
    path: PathBuf,
    number: usize,
    size: u64,
    options: TextOptions,
    cutter: Cutter,
    file: BufReader<File>,
    place: Place,
    line: Vec<u8>,
}

impl JsonLinesReader {
    pub fn open(opening: Opening) -> Result<JsonLinesReader> {
        let path = &opening.source.path;
        let mut file = File::open(path).map_err(|e| Error::io("read", path, &e))?;
        file.seek(SeekFrom::Start(opening.place.position)).map_err(|e| Error::io("read", path, &e))?;
        Ok(JsonLinesReader {
            path: path.clone(),
            number: opening.number,
            size: opening.source.bytes,
            options: opening.options.clone(),
            cutter: opening.cutter.clone(),
            file: BufReader::with_capacity(1 << 18, file),
            place: opening.place,
            line: Vec::new(),
        })
    }

    /// The text of the line that was read last; None for a blank line and for null.
    fn text(&self) -> Result<Option<String>> {
        let here = format!("{}, line {}", self.path.display(), self.place.lines);
        let line = std::str::from_utf8(&self.line).map_err(|e| {
            let offset = self.place.position - self.line.len() as u64 + e.valid_up_to() as u64;
            let byte = self.line.get(e.valid_up_to()).copied().unwrap_or_default();
            Error::data(format!("{here}: expected UTF-8, found the byte 0x{byte:02X} at offset {offset}"))
        })?;
        let line = line.trim_start_matches('\u{FEFF}').trim();
        if line.is_empty() {
            return Ok(None);
        }
        let value: Value = serde_json::from_str(line).map_err(|e| {
            // The reader counts lines within what it was given, which is one.
            let message = e.to_string();
            let message = message.replace(" at line 1 column ", " at column ");
            Error::data(format!("{here}: expected a JSON object, found: {message}"))
        })?;
        let Value::Object(mut fields) = value else {
            return Err(Error::data(format!("{here}: expected a JSON object, found {}", kind(&value)))
                .hint("every line is an object of its own, for instance {\"text\": \"…\"}"));
        };
        match fields.remove(&self.options.field) {
            Some(Value::String(text)) => Ok(Some(text)),
            Some(Value::Null) => Ok(None),
            Some(other) => Err(Error::data(format!(
                "{here}: expected text in the field \"{}\", found {}",
                self.options.field,
                kind(&other)
            ))),
            None => {
                let there: Vec<&str> = fields.keys().map(String::as_str).collect();
                Err(no_field("field", &here, &self.options.field, &there))
            }
        }
    }
}

/// The error of a field or column that is not among those that are there.
pub(super) fn no_field(what: &str, here: &str, field: &str, there: &[&str]) -> Error {
    let list = there.join(", ");
    let near = nearest(field, there.iter().copied()).or(there.first().copied()).unwrap_or_default();
    Error::data(format!("{here}: there is no {what} \"{field}\"; there are: {list}"))
        .hint(format!("name the one that holds the text, for instance --field {near} (data.field: {near})"))
}

/// What a JSON value is, for people.
fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

impl Reader for JsonLinesReader {
    fn read(&mut self, pieces: &mut Vec<Piece>, skipped: &mut Skipped) -> Result<bool> {
        self.line.clear();
        let length =
            self.file.read_until(b'\n', &mut self.line).map_err(|e| Error::io("read", &self.path, &e))?;
        if length == 0 {
            return Ok(false);
        }
        self.place.position += length as u64;
        self.place.lines += 1;
        match self.text() {
            Ok(Some(text)) => {
                let origin = (self.number, self.place.lines);
                let piece = Piece { text, begins: true, counts: None, origin };
                self.cutter.push(piece, &self.options.document_end, pieces);
            }
            Ok(None) => {}
            Err(error) => skipped.bad(error, &self.options)?,
        }
        Ok(true)
    }

    fn place(&self) -> Place {
        self.place
    }

    fn share(&self) -> f64 {
        self.place.position as f64 / self.size.max(1) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Corpus, Source, Split, TextOptions};
    use crate::files::tests::Scratch;
    use crate::text::Tokenizer;

    fn read(lines: &[u8], options: &TextOptions) -> crate::Result<(String, Corpus)> {
        let scratch = Scratch::new();
        let path = scratch.0.join("a.jsonl");
        std::fs::write(&path, lines).unwrap();
        let sources = Source::find(&[path], Split::Train)?;
        let corpus = Corpus::read(&sources, options, &Tokenizer::bytes(), &mut |_| {})?;
        let mut ids = Vec::new();
        corpus.tokens(0..corpus.len(), &mut ids);
        Ok((Tokenizer::bytes().decode(&ids)?, corpus))
    }

    #[test]
    fn a_line_is_a_document() {
        let lines = concat!(
            r#"{"text": "one\ntwo", "id": 1}"#,
            "\n\n{\"text\": null}\n{\"text\": \"\"}\r\n",
            r#"{"id": 2, "text": "\u00e9"}"#
        );
        let (text, corpus) = read(lines.as_bytes(), &TextOptions::default()).unwrap();
        assert_eq!((text.as_str(), corpus.document_count(), corpus.words()), ("one\ntwoé", 2, 3));
        let ended = TextOptions { document_end: "|".into(), ..TextOptions::default() };
        assert_eq!(read(b"{\"text\": \"a\"}\n{\"text\": \"b\"}", &ended).unwrap().0, "a|b|");
    }

    #[test]
    fn bad_lines_are_named_or_skipped() {
        for (bad, wanted) in [
            (&br#"{"text": "cut"#[..], "a.jsonl, line 2: expected a JSON object, found: EOF"),
            (b"[1]", "line 2: expected a JSON object, found a list"),
            (br#"{"text": 3}"#, "line 2: expected text in the field \"text\", found a number"),
            (br#"{"txt": "a", "id": 1}"#, "there is no field \"text\"; there are: id, txt"),
            (b"{\"text\": \"caf\xE9\"}", "line 2: expected UTF-8, found the byte 0xE9 at offset 30"),
        ] {
            let lines = [b"{\"text\": \"good\"}\n", bad, b"\n{\"text\": \" end\"}\n"].concat();
            let error = read(&lines, &TextOptions::default()).unwrap_err();
            assert!(error.to_string().contains(wanted), "{error}");
            assert!(error.hint_text().is_some(), "{error}");
            let skipping = TextOptions { skip_bad: true, ..TextOptions::default() };
            let (text, corpus) = read(&lines, &skipping).unwrap();
            assert_eq!((text.as_str(), corpus.skipped().count), ("good end", 1));
            assert!(corpus.skipped().first.as_ref().unwrap().contains(wanted));
        }
    }
}
