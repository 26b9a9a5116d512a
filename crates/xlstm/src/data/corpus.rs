//! A corpus: the tokens of all documents, one after another, and where each begins.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use rayon::prelude::*;

use super::documents::{Documents, Skipped, TextOptions};
use super::shard::{Builder, Shard, Width};
use super::source::Source;
use super::tokenize::{Progress, tokenize};
use crate::rng::mix;
use crate::text::Tokenizer;
use crate::{Error, Result};

/// A corpus: the tokens of all documents, one after another, and where each begins.
///
/// Tokens lie in shards, in memory or in mapped files, two or four bytes each; a corpus is a view
/// of a range of them, cheap to clone. Also counts the bytes and words of the text, since losses
/// of different tokenizers compare only per byte or per word.
#[derive(Debug, Clone)]
pub struct Corpus {
    shards: Vec<Arc<Shard>>,
    /// The place of the first token of each shard, and the end of the last.
    starts: Vec<usize>,
    /// What of the shards belongs to the corpus.
    range: Range<usize>,
    documents: usize,
    bytes: u64,
    words: u64,
    skipped: Skipped,
}

impl Corpus {
    /// Reads and tokenises `sources` into memory, in parallel. No end-of-text token is added: one
    /// that should be there stands in the text. A text without tokens is left out.
    ///
    /// # Errors
    /// A file that cannot be read or a text that cannot be encoded, with its place; no tokens at
    /// all.
    pub fn read(
        sources: &[Source],
        options: &TextOptions,
        tokenizer: &Tokenizer,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Corpus> {
        let documents = Documents::new(sources.to_vec(), options.clone(), Some(tokenizer.clone()));
        let mut shards = Vec::new();
        tokenize(documents, sources, tokenizer, progress, &mut |bytes| {
            shards.push(Arc::new(Shard::of_bytes(bytes)?));
            Ok(())
        })?;
        Corpus::of_shards(shards)
    }

    /// Tokenises `texts`, each of which is one document; a text without tokens is left out.
    ///
    /// # Errors
    /// A text that the tokenizer cannot encode, named by its number from 1 when there are several;
    /// no tokens at all.
    pub fn from_texts<T: AsRef<str>>(texts: &[T], tokenizer: &Tokenizer) -> Result<Self> {
        let name = |index: usize| match texts.len() {
            1 => "the text".to_owned(),
            count => format!("document {} of {count}", index + 1),
        };
        let texts = texts.iter().map(AsRef::as_ref).enumerate();
        let filled = texts.filter(|(_, text)| !text.trim().is_empty());
        let sources: Vec<Source> = filled.map(|(index, text)| Source::of_text(name(index), text)).collect();
        Corpus::read(&sources, &TextOptions::default(), tokenizer, &mut |_| {})
    }

    /// A corpus of tokens made elsewhere. `documents` holds the place of the first token
    /// of each document, the first 0 and each above the one before; `bytes` and `words`
    /// are those of the text that the tokens stand for.
    ///
    /// # Errors
    /// No tokens; starts that are out of order or range; a token equal to
    /// [`IGNORE`](super::IGNORE).
    pub fn from_tokens(tokens: &[u32], documents: &[usize], bytes: u64, words: u64) -> Result<Self> {
        if tokens.is_empty() {
            return Err(no_tokens());
        }
        let ascending = documents.windows(2).all(|pair| pair[0] < pair[1]);
        let inside = documents.last().is_some_and(|&last| last < tokens.len());
        if documents.first() != Some(&0) || !ascending || !inside {
            return Err(Error::data(format!(
                "expected document starts from 0 upwards and below {}, found {} starts that are not",
                tokens.len(),
                documents.len()
            )));
        }
        if let Some(place) = tokens.iter().position(|&token| token == super::IGNORE) {
            return Err(Error::data(format!(
                "token {place} of the corpus is {}, the value that marks a target to ignore",
                super::IGNORE
            )));
        }
        let largest = tokens.iter().max().copied().unwrap_or_default();
        let mut builder = Builder::new(Width::of(largest as usize + 1));
        let ends = documents[1..].iter().copied().chain([tokens.len()]);
        for (index, (&start, end)) in documents.iter().zip(ends).enumerate() {
            // Counts of the whole are known, not those of each document.
            let (bytes, words) = if index == 0 { (bytes, words) } else { (0, 0) };
            builder.push(&tokens[start..end], bytes, words, true)?;
        }
        let bytes = builder.finish("", Default::default(), Skipped::default())?;
        Corpus::of_shards(vec![Arc::new(Shard::of_bytes(bytes)?)])
    }

    /// The corpus in these shards, one after another.
    pub(super) fn of_shards(shards: Vec<Arc<Shard>>) -> Result<Corpus> {
        let mut starts = vec![0];
        for shard in &shards {
            starts.push(starts[starts.len() - 1] + shard.len());
        }
        let end = starts[starts.len() - 1];
        if end == 0 {
            return Err(no_tokens());
        }
        let skipped = shards.last().map(|shard| shard.header().skipped.clone()).unwrap_or_default();
        let documents = shards.iter().map(|shard| shard.documents()).sum();
        let bytes = shards.iter().map(|shard| shard.bytes()).sum();
        let words = shards.iter().map(|shard| shard.words()).sum();
        Ok(Corpus { shards, starts, range: 0..end, documents, bytes, words, skipped })
    }

    /// All documents of `corpora`, which are whole, in this order.
    pub(crate) fn concatenate(corpora: &[Corpus]) -> Result<Corpus> {
        let shards = corpora.iter().flat_map(|corpus| corpus.shards.iter().cloned()).collect();
        Corpus::of_shards(shards)
    }

    /// The corpus without its last `fraction` of tokens, and that part. The cut is at
    /// floor(tokens * (1 - fraction)), what nanoGPT does with characters, or at the beginning of
    /// the next document, if there is one. A `fraction` outside 0..=1 counts as its nearer end.
    ///
    /// Bytes and words of the parts of a document that is cut are found by decoding.
    ///
    /// # Errors
    /// A tokenizer that does not know the tokens.
    pub fn split(self, fraction: f64, tokenizer: &Tokenizer) -> Result<(Option<Corpus>, Option<Corpus>)> {
        let exact = (self.len() as f64 * (1.0 - fraction.clamp(0.0, 1.0))) as usize;
        let next = if exact < self.len() { self.starts_within(exact..=self.len() - 1).next() } else { None };
        let cut = next.unwrap_or(exact);
        if cut == 0 {
            return Ok((None, Some(self)));
        }
        if cut == self.len() {
            return Ok((Some(self), None));
        }
        let held_out = self.view(cut..self.len(), tokenizer)?;
        let mut kept = self.clone();
        kept.range = 0..cut;
        (kept.bytes, kept.words) = (self.bytes - held_out.bytes, self.words - held_out.words);
        kept.documents = kept.starts_within(0..=cut - 1).count();
        Ok((Some(kept), Some(held_out)))
    }

    /// The tokens of `range`, which reaches to the end of a piece, as a corpus.
    fn view(&self, range: Range<usize>, tokenizer: &Tokenizer) -> Result<Corpus> {
        let mut view = Corpus { range: range.clone(), bytes: 0, words: 0, ..self.clone() };
        view.documents = view.starts_within(0..=range.len() - 1).count();
        for (shard, start) in self.shards.iter().zip(&self.starts) {
            let from = range.start.saturating_sub(*start);
            if from >= shard.len() {
                continue;
            }
            let first = shard.first_piece_from(from);
            for piece in (first..shard.piece_count()).map(|index| shard.piece(index)) {
                (view.bytes, view.words) = (view.bytes + piece.bytes, view.words + piece.words);
            }
            let end = if first < shard.piece_count() { shard.piece(first).start } else { shard.len() };
            if from < end {
                // The rest of a piece that began before.
                let whole = shard.piece(first - 1);
                let mut ids = Vec::new();
                shard.read(from..end, &mut ids);
                let text = tokenizer.decode(&ids)?;
                view.bytes += (text.len() as u64).min(whole.bytes);
                view.words += (text.split_whitespace().count() as u64).min(whole.words);
            }
        }
        Ok(view)
    }

    /// Appends the tokens in `range` to `ids`.
    pub fn tokens(&self, range: Range<usize>, ids: &mut Vec<u32>) {
        let (mut place, end) = (self.range.start + range.start, self.range.start + range.end);
        let mut shard = self.starts.partition_point(|&start| start <= place).saturating_sub(1);
        while place < end {
            let start = self.starts[shard];
            let stop = end.min(self.starts[shard + 1]);
            self.shards[shard].read(place - start..stop - start, ids);
            (place, shard) = (stop, shard + 1);
        }
    }

    /// The number of tokens; at least 1.
    pub fn len(&self) -> usize {
        self.range.len()
    }

    /// Whether there are no tokens, which is never so.
    pub fn is_empty(&self) -> bool {
        self.range.is_empty()
    }

    /// The number of documents. A corpus that was split off within a document begins with one.
    pub fn document_count(&self) -> usize {
        self.documents
    }

    /// The number of tokens that have another before them in their document: what a
    /// model can be asked to predict.
    pub fn target_count(&self) -> usize {
        self.len() - self.documents
    }

    /// Bytes of the text in UTF-8.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Words of the text: what white space separates, and in WikiText the ends of lines too.
    pub fn words(&self) -> u64 {
        self.words
    }

    /// What was left out because it could not be used.
    pub fn skipped(&self) -> &Skipped {
        &self.skipped
    }

    /// A number that tells corpora apart, from the checksums of the shards.
    pub fn fingerprint(&self) -> String {
        let hash = self.shards.iter().flat_map(|shard| shard.header().checksum.bytes());
        let hash = hash.fold(0, |hash, byte| mix(hash ^ u64::from(byte)));
        format!("{:016x}", mix(mix(hash ^ self.range.start as u64) ^ self.range.end as u64))
    }

    /// The number of the first shard whose content is not what was written; reads all of them.
    pub(super) fn damaged_shard(&self) -> Option<usize> {
        self.shards.par_iter().position_first(|shard| !shard.is_sound())
    }

    /// The places within `range` at which documents begin, ascending.
    pub fn starts_within(&self, range: std::ops::RangeInclusive<usize>) -> impl Iterator<Item = usize> + '_ {
        let offset = self.range.start;
        let (first, last) = (offset + range.start(), offset + range.end());
        // The corpus begins with a document, even where it was cut off within one.
        let cut = *range.start() == 0 && range.contains(&0);
        let skip = self.starts.partition_point(|&start| start <= first).saturating_sub(1);
        let shards = self.shards.iter().zip(&self.starts).skip(skip);
        let starts = shards.take_while(move |(_, start)| **start <= last).flat_map(move |(shard, start)| {
            (shard.first_piece_from(first.saturating_sub(*start))..shard.piece_count())
                .map(|index| shard.piece(index))
                .take_while(move |piece| start + piece.start <= last)
                .filter(|piece| piece.begins)
                .map(move |piece| start + piece.start - offset)
                .filter(|start| *start > 0)
        });
        cut.then_some(0).into_iter().chain(starts)
    }
}

/// The error of a shard whose content is not what was written.
pub(super) fn damaged(path: &Path) -> Error {
    Error::data(format!("the token shard {} is damaged: its checksum is another", path.display()))
        .hint("remove it and prepare the data again; whole shards are kept")
}

fn no_tokens() -> Error {
    Error::data("expected a corpus with text, found no tokens")
        .hint("check that the files name the right text")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ErrorKind;

    fn all(corpus: &Corpus) -> Vec<u32> {
        let mut ids = Vec::new();
        corpus.tokens(0..corpus.len(), &mut ids);
        ids
    }

    /// What reading a file of these bytes gives.
    fn read(name: &str, bytes: &[u8], skip_bad: bool) -> Result<Corpus> {
        let path = std::env::temp_dir().join(format!("xlstm-corpus-{}-{name}.txt", std::process::id()));
        std::fs::write(&path, bytes).unwrap();
        let sources = Source::find(std::slice::from_ref(&path), Default::default()).unwrap();
        let options = TextOptions { skip_bad, ..TextOptions::default() };
        let corpus = Corpus::read(&sources, &options, &Tokenizer::bytes(), &mut |_| {});
        std::fs::remove_file(&path).unwrap();
        corpus
    }

    fn text(corpus: &Corpus) -> String {
        Tokenizer::bytes().decode(&all(corpus)).unwrap()
    }

    #[test]
    fn reading_text() {
        assert_eq!(text(&read("good", "é\r\nb".as_bytes(), false).unwrap()), "é\r\nb");
        assert_eq!(text(&read("mark", "\u{FEFF}text".as_bytes(), false).unwrap()), "text");
        for (name, bytes, expected, hint) in [
            ("empty", &b""[..], "an empty file", "complete"),
            ("blank", b" \n\t", "nothing but whitespace", "complete"),
            ("latin", b"a\nb\nnaXve \xE9t\xE9", "the byte 0xE9 at offset 10 (line 3)", "LATIN1"),
            ("cut", b"a\n\xE2\x82", "the byte 0xE2 at offset 2 (line 2)", "iconv"),
            ("utf16", b"\xFF\xFEa\0", "the byte 0xFF at offset 0 (line 1)", "UTF-16"),
        ] {
            let error = read(name, bytes, false).unwrap_err();
            assert!(error.to_string().contains(expected), "{error}");
            assert!(error.to_string().contains(".txt"), "{error}");
            assert!(error.hint_text().unwrap().contains(hint), "{error:?}");
            assert_eq!(error.kind(), ErrorKind::Data);
        }
    }

    #[test]
    fn bad_lines_of_a_text_are_skipped_by_choice() {
        let corpus = read("skip", b"good\nb\xE9d\nfine \xC3\xA9\n\xFF\xFF\nend\xE2", true).unwrap();
        assert_eq!(text(&corpus), "good\nfine é\n");
        assert_eq!((corpus.document_count(), corpus.words(), corpus.skipped().count), (1, 3, 3));
        assert!(corpus.skipped().first.as_ref().unwrap().contains("line 2"), "{:?}", corpus.skipped());
    }

    #[test]
    fn a_long_text_is_cut_and_is_one_document() {
        let line = "words, words and wörds\r\n";
        let text_of = line.repeat(100_000);
        let tokenizer = Tokenizer::bytes();
        let corpus = Corpus::from_texts(&[&text_of], &tokenizer).unwrap();
        assert!(corpus.shards[0].piece_count() > 3, "{:?}", corpus.shards);
        assert_eq!(text(&corpus), text_of);
        assert_eq!((corpus.document_count(), corpus.words()), (1, 400_000));
        assert_eq!(corpus.bytes(), text_of.len() as u64);
    }

    #[test]
    fn documents_and_counts() {
        let tokenizer = Tokenizer::bytes();
        let corpus = Corpus::from_texts(&["ab c", "", "é  d\n"], &tokenizer).unwrap();
        assert_eq!(all(&corpus), tokenizer.encode("ab cé  d\n").unwrap());
        let starts = |range| corpus.starts_within(range).collect::<Vec<_>>();
        assert_eq!(starts(0..=9), [0, 4]);
        assert_eq!((corpus.len(), corpus.bytes(), corpus.words(), corpus.target_count()), (10, 10, 4, 8));
        assert_eq!(starts(0..=3), [0]);
        assert_eq!(starts(1..=4), [4]);
        assert!(starts(5..=9).is_empty());
    }

    #[test]
    fn splitting() {
        let tokenizer = Tokenizer::bytes();
        let split = |texts: &[&str], fraction| {
            let corpus = Corpus::from_texts(texts, &tokenizer).unwrap();
            let (kept, held_out) = corpus.split(fraction, &tokenizer).unwrap();
            let show = |corpus: Option<Corpus>| {
                corpus.map(|corpus| (text(&corpus), corpus.document_count(), corpus.words()))
            };
            (show(kept), show(held_out))
        };
        let one = "one two three four";
        assert_eq!(
            split(&[one], 0.3),
            (Some(("one two thre".into(), 1, 2)), Some(("e four".into(), 1, 2))),
            "within a document"
        );
        let some = |text: &str, documents, words| Some((text.to_owned(), documents, words));
        assert_eq!(split(&["abc d", "efg", "hij"], 0.7), (some("abc d", 1, 2), some("efghij", 2, 2)));
        assert_eq!(split(&["abc"], 0.0), (some("abc", 1, 1), None));
        assert_eq!(split(&["abc"], 7.0), (None, some("abc", 1, 1)));
        let corpus = Corpus::from_texts(&[&"x".repeat(1_115_394)], &tokenizer).unwrap();
        let fingerprint = corpus.fingerprint();
        let (kept, held_out) = corpus.split(0.1, &tokenizer).unwrap();
        let (kept, held_out) = (kept.unwrap(), held_out.unwrap());
        assert_eq!((kept.len(), held_out.len()), (1_003_854, 111_540));
        assert_eq!(held_out.starts_within(0..=111_539).collect::<Vec<_>>(), [0]);
        assert_ne!(kept.fingerprint(), fingerprint);
    }

    #[test]
    fn unusable_corpora() {
        let tokenizer = Tokenizer::characters_of("ab");
        let error = Corpus::from_texts(&["ab", "axb"], &tokenizer).unwrap_err();
        assert!(error.to_string().starts_with("document 2 of 2: the character 'x'"), "{error}");
        assert!(error.hint_text().is_some());
        assert!(Corpus::from_texts(&["", ""], &tokenizer).unwrap_err().to_string().contains("no tokens"));
        assert!(Corpus::from_texts::<&str>(&[], &tokenizer).is_err());
        for starts in [vec![], vec![1], vec![0, 2, 2], vec![0, 3]] {
            assert!(Corpus::from_tokens(&[1, 2, 3], &starts, 3, 1).is_err());
        }
        assert!(Corpus::from_tokens(&[1, super::super::IGNORE], &[0], 2, 1).is_err());
    }
}
