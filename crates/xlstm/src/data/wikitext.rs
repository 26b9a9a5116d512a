//! WikiText: lines of tokenised text, in which headings begin articles.
//!
//! Its files are read as they come from the authors (`wiki.train.tokens`) and as the Hub keeps
//! them (Parquet, a row a line). Each article is a document. Words are counted as the literature
//! does: what white space separates in the file, and an end of line for every line (245,569 in
//! the test file). `<unk>` stays in the text in this spelling and is predicted as such.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{BufRead, BufReader, Seek, SeekFrom};
use std::path::PathBuf;

use super::documents::{Cutter, Opening, Piece, Place, Reader, Skipped, TextOptions};
use crate::{Error, Result};

/// Lines of a file, or rows that stand for lines.
pub(super) trait Lines: Send {
    /// The next line with its line break: an error in place of it can be skipped.
    fn next(&mut self) -> Result<Option<Result<String>>>;
    /// Where the next line begins.
    fn position(&self) -> u64;
    /// The share that has been read, from 0 to 1.
    fn share(&self) -> f64;
}

/// The lines of a file.
struct FileLines {
    path: PathBuf,
    size: u64,
    file: BufReader<File>,
    position: u64,
}

impl Lines for FileLines {
    fn next(&mut self) -> Result<Option<Result<String>>> {
        let mut line = Vec::new();
        let length = self.file.read_until(b'\n', &mut line).map_err(|e| Error::io("read", &self.path, &e))?;
        let start = self.position;
        self.position += length as u64;
        let text = String::from_utf8(line).map_err(|e| {
            let offset = start + e.utf8_error().valid_up_to() as u64;
            Error::data(format!(
                "expected UTF-8 in {}, found another byte at offset {offset}",
                self.path.display()
            ))
        });
        Ok((length > 0).then_some(text))
    }

    fn position(&self) -> u64 {
        self.position
    }

    fn share(&self) -> f64 {
        self.position as f64 / self.size.max(1) as f64
    }
}

/// A line and where it begins.
struct Line {
    text: String,
    place: Place,
}

/// Reads an article at a time.
pub(super) struct WikiTextReader {
    number: usize,
    options: TextOptions,
    cutter: Cutter,
    lines: Box<dyn Lines>,
    /// Lines that are read but have not left.
    held: VecDeque<Line>,
    /// Where the line after those begins.
    next: Place,
}

impl WikiTextReader {
    pub fn open(opening: Opening) -> Result<WikiTextReader> {
        let path = &opening.source.path;
        let mut file = File::open(path).map_err(|e| Error::io("read", path, &e))?;
        let position = opening.place.position;
        file.seek(SeekFrom::Start(position)).map_err(|e| Error::io("read", path, &e))?;
        let size = opening.source.bytes;
        let file = BufReader::with_capacity(1 << 18, file);
        Ok(WikiTextReader::of(Box::new(FileLines { path: path.clone(), size, file, position }), &opening))
    }

    /// The articles in `lines`, which are at the place of `opening`.
    pub fn of(lines: Box<dyn Lines>, opening: &Opening) -> WikiTextReader {
        WikiTextReader {
            number: opening.number,
            options: opening.options.clone(),
            cutter: opening.cutter.clone(),
            lines,
            held: VecDeque::new(),
            next: opening.place,
        }
    }

    /// Holds one more line; false at the end.
    fn hold(&mut self, skipped: &mut Skipped) -> Result<bool> {
        loop {
            let place = self.next;
            let Some(line) = self.lines.next()? else { return Ok(false) };
            self.next = Place { position: self.lines.position(), lines: place.lines + 1, within: false };
            match line {
                Ok(text) => self.held.push_back(Line { text, place }),
                Err(error) => {
                    skipped.bad(error, &self.options)?;
                    continue;
                }
            }
            return Ok(true);
        }
    }

    /// Whether an article begins with held line `index`: a heading between blank lines. The line
    /// after it must be held, if there is one.
    fn begins(&self, index: usize) -> bool {
        let blank = |line: Option<&Line>| line.is_none_or(|line| line.text.trim().is_empty());
        let before = index.checked_sub(1).and_then(|before| self.held.get(before));
        self.held.get(index).is_some_and(|line| is_title(&line.text))
            && blank(before)
            && blank(self.held.get(index + 1))
    }
}

impl Reader for WikiTextReader {
    fn read(&mut self, pieces: &mut Vec<Piece>, skipped: &mut Skipped) -> Result<bool> {
        // Up to the next heading that has text before it.
        let mut end = 0;
        let mut text_before = false;
        loop {
            while self.held.len() < end + 2 && self.hold(skipped)? {}
            if end >= self.held.len() || (text_before && self.begins(end)) {
                break;
            }
            text_before |= !self.held[end].text.trim().is_empty();
            end += 1;
        }
        if end == 0 {
            return Ok(false);
        }
        let first = self.held.iter().position(|line| !line.text.trim().is_empty()).unwrap_or(0);
        // What stands before the first heading of a later file is the rest of the file before.
        let at_start = self.number == 0 && self.held[0].place.position == 0;
        let begins = at_start || self.begins(first);
        let line = self.held[0].place.lines + 1;
        let raw: String = self.held.drain(..end).map(|line| line.text).collect();
        let words = raw.split_whitespace().count() + raw.matches('\n').count();
        let counts = Some((raw.len() as u64, words as u64));
        let text = if self.options.detokenize { detokenize(&raw) } else { raw };
        let piece = Piece { text, begins, counts, origin: (self.number, line) };
        self.cutter.push(piece, &self.options.document_end, pieces);
        Ok(true)
    }

    fn place(&self) -> Place {
        self.held.front().map_or(self.next, |line| line.place)
    }

    fn share(&self) -> f64 {
        self.lines.share()
    }
}

/// ` = Title = `, with one sign on either side.
fn is_title(line: &str) -> bool {
    let inner = line.trim().strip_prefix("= ").and_then(|rest| rest.strip_suffix(" ="));
    inner.is_some_and(|title| !title.starts_with('=') && !title.ends_with('='))
}

/// Whether these first rows of a column are the lines of WikiText.
#[cfg_attr(not(feature = "parquet"), allow(dead_code))]
pub(super) fn are_lines<'a>(rows: impl IntoIterator<Item = &'a str>) -> bool {
    let mut any = false;
    let all = rows.into_iter().all(|row| {
        any |= !row.is_empty();
        row.is_empty() || row.starts_with(' ') && row.ends_with(" \n")
    });
    any && all
}

/// `text` without the marks of its tokenisation, by the rules that papers share: those of
/// Megatron-LM's and of the evaluation harness's `wikitext_detokenizer`.
pub fn detokenize(text: &str) -> String {
    let mut text = text.replace("s '", "s'");
    for (from, to) in [(" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", ".")] {
        text = text.replace(from, to);
    }
    for mark in [":", ";", ".", "!", "?", ","] {
        text = text.replace(&format!(" {mark} "), &format!("{mark} "));
    }
    for (open, close) in [('(', ')'), ('[', ']'), ('{', '}'), ('"', '"'), ('\'', '\'')] {
        text = close_up(&text, open, close);
    }
    for (from, to) in [
        ("= = = =", "===="),
        ("= = =", "==="),
        ("= =", "=="),
        (" \u{B0} ", "\u{B0}"),
        (" \n", "\n"),
        ("\n ", "\n"),
        (" N ", " 1 "),
        (" 's", "'s"),
    ] {
        text = text.replace(from, to);
    }
    text
}

/// `text` without white space directly inside of `open` … `close`.
fn close_up(text: &str, open: char, close: char) -> String {
    let mut closed = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(start) = rest.find(open) {
        let (before, inside) = (&rest[..start], &rest[start + open.len_utf8()..]);
        let Some(end) = inside.find(close) else { break };
        closed.push_str(before);
        closed.push(open);
        closed.push_str(inside[..end].trim());
        closed.push(close);
        rest = &inside[end + close.len_utf8()..];
    }
    closed + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn titles_are_told_from_sections() {
        assert!(is_title(" = Robert <unk> = \n") && is_title(" = 2010 = \n"));
        assert!(!is_title(" = = Career = = \n") && !is_title(" Text . \n") && !is_title(" = \n"));
    }

    #[test]
    fn the_marks_of_tokenisation_go() {
        let text = " = = Du Fu = = \n \n He ( as \" the poet \" ) wrote 1 @,@ 400 well @-@ known poems , of 3 @.@ 5 \
                    lines ; Du 's own and the poets ' .\n";
        assert_eq!(
            detokenize(text),
            " == Du Fu ==\n\nHe (as \"the poet\") wrote 1,400 well-known poems, of 3.5 lines; Du's own and the \
             poets' .\n"
        );
    }

    #[test]
    fn lines_are_told_from_documents() {
        assert!(are_lines(["", " = A = \n", "", " Text . \n"]));
        assert!(!are_lines(["", ""]) && !are_lines(["An article.\nOf two lines.\n"]));
    }

    #[test]
    fn articles_are_documents() {
        use super::super::{Corpus, Source, Split};
        use crate::files::tests::Scratch;
        use crate::text::Tokenizer;

        let text =
            " \n = A = \n \n One @,@ two . \n = 1 x = \n y \n \n = = S = = \n \n z \n \n = B = \n \n w \n";
        let scratch = Scratch::new();
        std::fs::write(scratch.0.join("wiki.train.tokens"), text).unwrap();
        let sources = Source::find(std::slice::from_ref(&scratch.0), Split::Train).unwrap();
        let read = |detokenize| {
            let options = TextOptions { detokenize, ..TextOptions::default() };
            Corpus::read(&sources, &options, &Tokenizer::bytes(), &mut |_| {}).unwrap()
        };
        let corpus = read(false);
        let starts: Vec<usize> = corpus.starts_within(0..=corpus.len() - 1).collect();
        assert_eq!(starts, [0, text.find(" = B").unwrap()]);
        let words = (text.split_whitespace().count() + text.matches('\n').count()) as u64;
        assert_eq!((corpus.words(), corpus.bytes()), (words, text.len() as u64));
        let plain = read(true);
        assert_eq!((plain.words(), plain.bytes(), plain.document_count()), (words, text.len() as u64, 2));
        assert!(plain.len() < corpus.len());
    }
}
