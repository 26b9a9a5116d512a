//! The documents of a list of sources, one after another, long ones in pieces.
//!
//! Nothing here grows with a file: plain text is read in pieces of about [`PIECE`] bytes, the
//! other formats a document at a time. A [`Cursor`] says how far the reading is, so that it can
//! go on from there in another process.

use std::fmt::Write;

use serde::{Deserialize, Serialize};

use super::plain::PlainReader;
use super::source::{Format, Source};
use super::{jsonl::JsonLinesReader, wikitext::WikiTextReader};
use crate::text::Tokenizer;
use crate::{Error, Result};

/// Bytes from which on a document is cut into pieces, and the length of these, about. Small in
/// tests, so that small texts have many pieces, blocks and shards.
pub(super) const PIECE: usize = if cfg!(test) { 4 << 10 } else { 256 << 10 };
/// Bytes of text in a block, at least: what is tokenised at a time.
const BLOCK: usize = if cfg!(test) { 16 << 10 } else { 4 << 20 };

/// How text is taken from sources.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TextOptions {
    /// The field of a JSON object and the column of a Parquet file that hold the text.
    pub field: String,
    /// Whether lines and rows that cannot be used are left out and counted, not an error.
    pub skip_bad: bool,
    /// Whether WikiText is freed of its tokenisation (` @-@ `, spaces before punctuation).
    pub detokenize: bool,
    /// Text that is appended to every document, for instance `<|endoftext|>`.
    pub document_end: String,
}

impl Default for TextOptions {
    /// The field `text`, nothing skipped, changed or appended.
    fn default() -> Self {
        TextOptions { field: "text".into(), skip_bad: false, detokenize: false, document_end: String::new() }
    }
}

/// A document, or a part of a long one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Piece {
    pub text: String,
    /// Whether a document begins with it.
    pub begins: bool,
    /// Bytes and words of what the text was made from, where it was changed.
    pub counts: Option<(u64, u64)>,
    /// The source, and the byte (plain text), line or row in it from 1.
    pub origin: (usize, u64),
}

/// How far the reading of a list of sources is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Cursor {
    /// The source that is being read.
    pub source: usize,
    /// Where in it.
    pub place: Place,
}

/// Where the next piece of a source begins.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Place {
    /// Bytes, or rows of a Parquet file, before it.
    pub position: u64,
    /// Lines before it.
    pub lines: u64,
    /// Whether it goes on with a document.
    pub within: bool,
}

/// Lines and rows that were left out because they could not be used.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Skipped {
    /// How many.
    pub count: u64,
    /// What was wrong with the first of them.
    pub first: Option<String>,
}

impl Skipped {
    /// Counts `error`, or returns it where nothing may be skipped.
    pub(super) fn bad(&mut self, error: Error, options: &TextOptions) -> Result<()> {
        if !options.skip_bad {
            return Err(error.or_hint("leave such lines out with --skip-bad (data.skip_bad: true)"));
        }
        self.count += 1;
        self.first.get_or_insert_with(|| error.to_string());
        Ok(())
    }
}

/// Reads one source.
pub(super) trait Reader: Send {
    /// Appends the next piece, or all pieces of the next document; false at the end.
    fn read(&mut self, pieces: &mut Vec<Piece>, skipped: &mut Skipped) -> Result<bool>;
    /// Where the next call goes on.
    fn place(&self) -> Place;
    /// The share of the source that has been read, from 0 to 1.
    fn share(&self) -> f64;
}

/// What a reader needs to know.
pub(super) struct Opening<'a> {
    pub source: &'a Source,
    pub number: usize,
    pub options: &'a TextOptions,
    pub cutter: &'a Cutter,
    pub place: Place,
}

/// Text that is tokenised at a time, and how far the reading is after it.
pub(super) struct Block {
    pub pieces: Vec<Piece>,
    pub cursor: Cursor,
    pub skipped: Skipped,
    /// Bytes of files before the cursor.
    pub bytes_done: u64,
}

/// The documents of a list of sources.
pub(super) struct Documents {
    sources: Vec<Source>,
    options: TextOptions,
    cutter: Cutter,
    cursor: Cursor,
    skipped: Skipped,
    reader: Option<Box<dyn Reader>>,
}

impl Documents {
    /// The documents of `sources`, in pieces with the tokens of the whole by this tokenizer; any
    /// pieces where there is none.
    pub fn new(sources: Vec<Source>, options: TextOptions, tokenizer: Option<Tokenizer>) -> Documents {
        Documents::resume(sources, options, tokenizer, Cursor::default(), Skipped::default())
    }

    /// The documents of `sources` from `cursor` on, with what was skipped before.
    pub fn resume(
        sources: Vec<Source>,
        options: TextOptions,
        tokenizer: Option<Tokenizer>,
        cursor: Cursor,
        skipped: Skipped,
    ) -> Documents {
        Documents { sources, options, cutter: Cutter(tokenizer), cursor, skipped, reader: None }
    }

    /// The next block; None at the end. Blocks are the same wherever the reading was resumed.
    pub fn next_block(&mut self) -> Result<Option<Block>> {
        let mut pieces = Vec::new();
        let (mut size, mut counted) = (0, 0);
        while size < BLOCK {
            if self.reader.is_none() {
                let Some(source) = self.sources.get(self.cursor.source) else { break };
                self.reader = Some(open(Opening {
                    source,
                    number: self.cursor.source,
                    options: &self.options,
                    cutter: &self.cutter,
                    place: self.cursor.place,
                })?);
            }
            let Some(reader) = &mut self.reader else { break };
            if reader.read(&mut pieces, &mut self.skipped)? {
                self.cursor.place = reader.place();
                size += pieces[counted..].iter().map(|piece| piece.text.len()).sum::<usize>();
                counted = pieces.len();
            } else {
                self.reader = None;
                self.cursor = Cursor { source: self.cursor.source + 1, place: Place::default() };
            }
        }
        if pieces.is_empty() {
            return Ok(None);
        }
        let skipped = self.skipped.clone();
        Ok(Some(Block { pieces, cursor: self.cursor, skipped, bytes_done: self.bytes_done() }))
    }

    /// Bytes of files that have been read, about.
    fn bytes_done(&self) -> u64 {
        let before: u64 = self.sources.iter().take(self.cursor.source).map(|source| source.bytes).sum();
        let current = self.sources.get(self.cursor.source).zip(self.reader.as_ref());
        before + current.map_or(0, |(source, reader)| (source.bytes as f64 * reader.share()) as u64)
    }

    /// `error` of `piece`, with the file and the place in it.
    pub fn in_piece(error: &Error, piece: &Piece, sources: &[Source]) -> Error {
        let (source, place) = piece.origin;
        let mut message = String::new();
        if let Some(source) = sources.get(source) {
            let unit = match source.format {
                Format::Text if place == 1 => None,
                Format::Text => Some("after byte"),
                Format::Parquet => Some("row"),
                Format::JsonLines | Format::WikiText => Some("line"),
            };
            message = source.path.display().to_string();
            if let Some(unit) = unit {
                let number = if source.format == Format::Text { place - 1 } else { place };
                // Writing to a string cannot fail.
                let _ = write!(message, ", {unit} {number}");
            }
            message += ": ";
        }
        let named = Error::new(error.kind(), format!("{message}{error}"));
        match error.hint_text() {
            Some(hint) => named.hint(hint),
            None => named,
        }
    }
}

fn open(opening: Opening) -> Result<Box<dyn Reader>> {
    match opening.source.format {
        Format::Text => Ok(Box::new(PlainReader::open(opening)?)),
        Format::JsonLines => Ok(Box::new(JsonLinesReader::open(opening)?)),
        Format::WikiText => Ok(Box::new(WikiTextReader::open(opening)?)),
        #[cfg(feature = "parquet")]
        Format::Parquet => super::parquet::open(opening),
        #[cfg(not(feature = "parquet"))]
        Format::Parquet => Err(Error::data(format!(
            "{} is a Parquet file, which this build of xlstm cannot read",
            opening.source.path.display()
        ))
        .hint("build with the feature `parquet`: cargo install --path crates/xlstm-cli --features parquet")),
    }
}

/// Cuts long documents where their parts have the tokens of the whole.
///
/// Where that is depends on a tokenizer's normalizer and pattern, and nobody tells. A cut is
/// therefore tried: before white space, and only where the text around it has the same tokens cut
/// and whole. A document that can be cut nowhere stays whole.
#[derive(Debug, Clone)]
pub(super) struct Cutter(Option<Tokenizer>);

/// Bytes on either side of a cut that are compared. Tokenizers look no further than a word.
const AROUND: usize = 256;
/// Places that are tried for one cut.
const TRIES: usize = 64;

impl Cutter {
    /// The last place up to `limit` where `text` may be cut.
    pub fn cut(&self, text: &str, limit: usize) -> Option<usize> {
        let bytes = text.as_bytes();
        let candidates = (1..=limit.min(bytes.len().saturating_sub(1))).rev().filter(|&place| {
            bytes[place].is_ascii_whitespace()
                && text[..place].chars().next_back().is_some_and(|before| !before.is_whitespace())
        });
        candidates.take(TRIES).find(|&place| self.is_clean(text, place))
    }

    fn is_clean(&self, text: &str, place: usize) -> bool {
        let Some(tokenizer) = &self.0 else { return true };
        let before = &text[text.floor_char_boundary(place.saturating_sub(AROUND))..place];
        let after = &text[place..text.floor_char_boundary((place + AROUND).min(text.len()))];
        tokenizer.is_clean_cut(before, after)
    }

    /// Appends a document, with its end, in pieces.
    pub fn push(&self, mut piece: Piece, end: &str, pieces: &mut Vec<Piece>) {
        piece.text.push_str(end);
        // What was changed has counts of the whole only.
        if piece.text.len() <= PIECE || piece.counts.is_some() {
            pieces.push(piece);
            return;
        }
        let (mut rest, mut begins, mut limit) = (piece.text.as_str(), piece.begins, PIECE);
        while rest.len() > limit {
            match self.cut(rest, limit) {
                Some(place) => {
                    let (head, tail) = rest.split_at(place);
                    pieces.push(Piece { text: head.into(), begins, counts: None, origin: piece.origin });
                    (rest, begins, limit) = (tail, false, PIECE);
                }
                None => limit *= 2,
            }
        }
        pieces.push(Piece { text: rest.into(), begins, counts: None, origin: piece.origin });
    }
}
