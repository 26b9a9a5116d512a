//! Plain text: a file is a document.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::PathBuf;

use super::documents::{Cutter, Opening, PIECE, Piece, Place, Reader, Skipped, TextOptions};
use crate::{Error, Result};

/// A file or a text in memory.
trait Bytes: Read + Seek + Send {}
impl<T: Read + Seek + Send> Bytes for T {}

/// Reads a text piece by piece.
pub(super) struct PlainReader {
    path: PathBuf,
    number: usize,
    size: u64,
    options: TextOptions,
    cutter: Cutter,
    file: Box<dyn Bytes>,
    /// Bytes that are read but not yet looked at.
    raw: Vec<u8>,
    /// Text that is read but has not left yet.
    text: String,
    /// Where `text` begins.
    place: Place,
    /// Whether the file has no more bytes.
    at_end: bool,
    /// Whether all so far is white space.
    blank: bool,
    /// The first bytes tell UTF-16.
    utf16: bool,
}

impl PlainReader {
    pub fn open(opening: Opening) -> Result<PlainReader> {
        let path = &opening.source.path;
        let mut file: Box<dyn Bytes> = match &opening.source.content {
            Some(content) => Box::new(io::Cursor::new(content.clone())),
            None => Box::new(File::open(path).map_err(|e| Error::io("read", path, &e))?),
        };
        file.seek(SeekFrom::Start(opening.place.position)).map_err(|e| Error::io("read", path, &e))?;
        let mut reader = PlainReader {
            path: path.clone(),
            number: opening.number,
            size: opening.source.bytes,
            options: opening.options.clone(),
            cutter: opening.cutter.clone(),
            file,
            raw: Vec::new(),
            text: String::new(),
            place: opening.place,
            at_end: false,
            blank: opening.place.position == 0,
            utf16: false,
        };
        if opening.place == Place::default() {
            reader.fill()?;
            reader.utf16 = reader.raw.starts_with(&[0xFF, 0xFE]) || reader.raw.starts_with(&[0xFE, 0xFF]);
            if reader.raw.starts_with("\u{FEFF}".as_bytes()) {
                reader.raw.drain(..3);
                reader.place.position = 3;
            }
        }
        Ok(reader)
    }

    /// Reads more bytes.
    fn fill(&mut self) -> Result<()> {
        let more = (&mut self.file)
            .take(PIECE as u64)
            .read_to_end(&mut self.raw)
            .map_err(|e| Error::io("read", &self.path, &e))?;
        self.at_end = more == 0;
        Ok(())
    }

    /// Moves valid bytes to the text. Some error: of the bytes that now come first.
    fn decode(&mut self) -> Option<Error> {
        let (valid, broken) = match std::str::from_utf8(&self.raw) {
            Ok(_) => (self.raw.len(), false),
            // Bytes that may only be cut short are broken when nothing more comes.
            Err(e) => (e.valid_up_to(), e.error_len().is_some() || self.at_end),
        };
        self.text.push_str(std::str::from_utf8(&self.raw[..valid]).unwrap_or_default());
        self.raw.drain(..valid);
        broken.then(|| self.not_utf8())
    }

    fn not_utf8(&self) -> Error {
        let offset = self.place.position + self.text.len() as u64;
        let line = 1 + self.place.lines + lines(&self.text);
        let byte = self.raw.first().copied().unwrap_or_default();
        let encoding = if self.utf16 { "UTF-16" } else { "LATIN1" };
        Error::data(format!(
            "expected UTF-8 in {}, found the byte 0x{byte:02X} at offset {offset} (line {line})",
            self.path.display()
        ))
        .hint(format!(
            "re-encode the file: iconv -f {encoding} -t UTF-8 OLD > NEW; or leave such lines out with --skip-bad"
        ))
    }

    /// Drops the bytes up to the end of a line; returns how many.
    fn skip_line(&mut self) -> Result<u64> {
        let mut dropped = 0;
        loop {
            if let Some(end) = self.raw.iter().position(|&byte| byte == b'\n') {
                self.raw.drain(..=end);
                return Ok(dropped + end as u64 + 1);
            }
            dropped += self.raw.len() as u64;
            self.raw.clear();
            self.fill()?;
            if self.at_end {
                return Ok(dropped);
            }
        }
    }

    /// Lets the first `length` bytes of the text leave; with them the end of the document, if that
    /// is where they reach.
    fn emit(&mut self, length: usize, pieces: &mut Vec<Piece>) {
        let rest = self.text.split_off(length);
        let mut text = std::mem::replace(&mut self.text, rest);
        self.blank &= text.trim().is_empty();
        let origin = (self.number, self.place.position + 1);
        self.place.position += text.len() as u64;
        self.place.lines += lines(&text);
        if self.at_end && self.text.is_empty() && self.raw.is_empty() {
            text.push_str(&self.options.document_end);
        }
        if !text.is_empty() {
            pieces.push(Piece { text, begins: !self.place.within, counts: None, origin });
            self.place.within = true;
        }
    }
}

impl Reader for PlainReader {
    fn read(&mut self, pieces: &mut Vec<Piece>, skipped: &mut Skipped) -> Result<bool> {
        let mut limit = PIECE;
        loop {
            if let Some(error) = self.decode() {
                skipped.bad(error, &self.options)?;
                // What stands before the bad line leaves now: behind it places no longer add up.
                let kept = self.text.rfind('\n').map_or(0, |end| end + 1);
                let cut = self.text.len() - kept;
                self.emit(kept, pieces);
                self.text.clear();
                self.place.position += cut as u64 + self.skip_line()?;
                self.place.lines += 1;
                return Ok(true);
            }
            if self.text.len() > limit {
                if let Some(place) = self.cutter.cut(&self.text, limit) {
                    self.emit(place, pieces);
                    return Ok(true);
                }
                limit *= 2;
            } else if self.at_end {
                let length = self.text.len();
                if length > 0 || self.place.within && !self.options.document_end.is_empty() {
                    self.emit(length, pieces);
                    // Whoever goes on from here has nothing to end.
                    self.place.within = false;
                    return Ok(true);
                }
                if self.blank && skipped.count == 0 {
                    let empty = self.place.position == 0;
                    let found = if empty { "an empty file" } else { "nothing but whitespace" };
                    return Err(Error::data(format!(
                        "expected text in {}, found {found}",
                        self.path.display()
                    ))
                    .hint("check that the download or export of the file was complete"));
                }
                return Ok(false);
            } else {
                self.fill()?;
            }
        }
    }

    fn place(&self) -> Place {
        self.place
    }

    fn share(&self) -> f64 {
        self.place.position as f64 / self.size.max(1) as f64
    }
}

fn lines(text: &str) -> u64 {
    text.bytes().filter(|&byte| byte == b'\n').count() as u64
}
