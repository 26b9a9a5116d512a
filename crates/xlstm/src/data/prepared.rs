//! Prepared data: a folder of token shards that later runs map into memory.
//!
//! - `tokens-00000.safetensors`, …: the shards, in the order of the text (see `shard.rs`);
//! - `tokenizer.json`: the tokenizer;
//! - `index.json`: what there is, with a checksum for every shard.
//!
//! A shard is written beside its place and renamed, and holds where the reading goes on after it;
//! the index comes last. So a preparation that is killed at any moment goes on with the last whole
//! shard and ends with the files that it would have written uninterrupted. Until then `plan.json`
//! says what is being prepared.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::corpus::{Corpus, damaged};
use super::documents::{Cursor, Documents, Skipped, TextOptions};
use super::shard::{Shard, Width, shard_name};
use super::source::Source;
use super::tokenize::{Progress, tokenize};
use crate::files::write_atomically;
use crate::rng::mix;
use crate::text::Tokenizer;
use crate::{Error, Result};

const INDEX: &str = "index.json";
const PLAN: &str = "plan.json";
const TOKENIZER: &str = "tokenizer.json";
const FORMAT: &str = "xlstm-tokens";
const VERSION: u32 = 1;

/// What a folder is prepared from: another plan gives other tokens.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Plan {
    /// Fingerprint of the tokenizer.
    tokenizer: String,
    options: TextOptions,
    /// Names and sizes of the files.
    sources: Vec<(PathBuf, u64)>,
}

/// The index of a folder of prepared data.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Index {
    format: String,
    version: u32,
    /// Fingerprint of the tokenizer.
    pub tokenizer: String,
    /// One more than the highest token id there may be.
    pub vocabulary_size: usize,
    /// The width of a token.
    pub dtype: Width,
    /// Documents.
    pub documents: u64,
    /// Tokens.
    pub tokens: u64,
    /// Bytes of the text.
    pub bytes: u64,
    /// Words of the text.
    pub words: u64,
    /// Lines and rows that were left out.
    pub skipped: Skipped,
    plan: Plan,
    /// The shards in order.
    pub shards: Vec<ShardEntry>,
}

/// A shard in the index.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShardEntry {
    /// The file.
    pub file: PathBuf,
    /// Documents that begin in it.
    pub documents: u64,
    /// Tokens.
    pub tokens: u64,
    /// Hash of its content.
    pub checksum: String,
}

/// A folder of prepared data.
#[derive(Debug)]
pub struct Prepared {
    /// Where it is.
    pub folder: PathBuf,
    /// Its index.
    pub index: Index,
    /// The tokenizer that made it.
    pub tokenizer: Tokenizer,
    /// Its tokens.
    pub corpus: Corpus,
}

impl Prepared {
    /// Whether `path` is a folder of prepared data, whole or not yet.
    pub fn is_at(path: &Path) -> bool {
        path.join(INDEX).is_file() || path.join(PLAN).is_file()
    }

    /// Opens the data in `folder`: its shards are mapped, not read.
    ///
    /// # Errors
    /// A preparation that did not end; a file that is missing, damaged, or of another tokenizer.
    pub fn open(folder: &Path) -> Result<Prepared> {
        if !folder.join(INDEX).is_file() && folder.join(PLAN).is_file() {
            return Err(Error::data(format!("the preparation of {} did not end", folder.display()))
                .hint("give the same `xlstm prepare` again: it goes on where it was"));
        }
        let path = folder.join(INDEX);
        let index: Index = read_json(&path)?;
        if index.format != FORMAT || index.version != VERSION {
            return Err(Error::data(format!(
                "expected version {VERSION} of the format {FORMAT} in {}, found version {} of {}",
                path.display(),
                index.version,
                index.format
            ))
            .hint("prepare the data again with this version"));
        }
        let tokenizer = Tokenizer::from_file(&folder.join(TOKENIZER))?;
        check_tokenizer(&folder.join(TOKENIZER), &tokenizer.fingerprint(), &index.tokenizer)?;
        let mut shards = Vec::with_capacity(index.shards.len());
        for entry in &index.shards {
            let path = folder.join(&entry.file);
            let shard = Shard::open(&path)?;
            check_tokenizer(&path, &shard.header().tokenizer, &index.tokenizer)?;
            if shard.header().checksum != entry.checksum || shard.len() as u64 != entry.tokens {
                return Err(damaged(&path));
            }
            shards.push(Arc::new(shard));
        }
        Ok(Prepared { folder: folder.to_owned(), index, tokenizer, corpus: Corpus::of_shards(shards)? })
    }

    /// Checks that the shards hold what was written and the index counts what they hold; reads all
    /// of them, in parallel.
    ///
    /// # Errors
    /// The first file that is damaged.
    pub fn verify(&self) -> Result<()> {
        if let Some(number) = self.corpus.damaged_shard() {
            return Err(damaged(&self.folder.join(&self.index.shards[number].file)));
        }
        let (index, corpus) = (&self.index, &self.corpus);
        let counted = [index.documents, index.tokens, index.bytes, index.words];
        let held = [corpus.document_count() as u64, corpus.len() as u64, corpus.bytes(), corpus.words()];
        if counted == held {
            return Ok(());
        }
        Err(Error::data(format!(
            "{} counts [documents, tokens, bytes, words] as {counted:?}, but its shards hold {held:?}",
            self.folder.join(INDEX).display()
        ))
        .hint("remove the folder and prepare the data again"))
    }

    /// Tokenises `sources` into `folder`, or goes on with what was begun there, or opens what is
    /// there already.
    ///
    /// # Errors
    /// Those of reading the sources and of writing; a folder that holds anything else.
    pub fn make(
        folder: &Path,
        sources: Vec<Source>,
        options: &TextOptions,
        tokenizer: &Tokenizer,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Prepared> {
        let plan = Plan::of(&sources, options, tokenizer);
        if folder.join(INDEX).is_file() {
            let prepared = Prepared::open(folder)?;
            plan.check(&prepared.index.plan, folder)?;
            return Ok(prepared);
        }
        if folder.join(PLAN).is_file() {
            plan.check(&read_json(&folder.join(PLAN))?, folder)?;
        } else {
            if fs::read_dir(folder).is_ok_and(|mut entries| entries.next().is_some()) {
                return Err(Error::data(format!(
                    "{} holds files that are no prepared data",
                    folder.display()
                ))
                .hint("choose a folder that is empty or does not exist"));
            }
            fs::create_dir_all(folder).map_err(|e| Error::io("create", folder, &e))?;
            // The plan comes first: what has a plan is ours to go on with.
            write_json(&folder.join(PLAN), &plan)?;
        }
        tokenizer.save(&folder.join(TOKENIZER))?;
        let mut shards = whole_shards(folder, &plan)?;
        let (cursor, skipped) = match shards.last() {
            Some(shard) => (shard.header().cursor, shard.header().skipped.clone()),
            None => (Cursor::default(), Skipped::default()),
        };
        let documents =
            Documents::resume(sources.clone(), options.clone(), Some(tokenizer.clone()), cursor, skipped);
        tokenize(documents, &sources, tokenizer, progress, &mut |bytes| {
            let path = folder.join(shard_name(shards.len()));
            write_atomically(&path, |writer| writer.write_all(&bytes))?;
            shards.push(Shard::open(&path)?);
            Ok(())
        })?;
        let shards: Vec<Arc<Shard>> = shards.into_iter().map(Arc::new).collect();
        let index = Index::of(&shards, plan, tokenizer)?;
        write_json(&folder.join(INDEX), &index)?;
        let plan = folder.join(PLAN);
        fs::remove_file(&plan).map_err(|e| Error::io("remove", &plan, &e))?;
        let corpus = Corpus::of_shards(shards)?;
        Ok(Prepared { folder: folder.to_owned(), index, tokenizer: tokenizer.clone(), corpus })
    }

    /// A name for the folder of these sources' tokens, different for different plans.
    pub fn name_of(sources: &[Source], options: &TextOptions, tokenizer: &Tokenizer) -> String {
        let plan = serde_json::to_string(&Plan::of(sources, options, tokenizer)).unwrap_or_default();
        format!("{:016x}", plan.bytes().fold(0, |hash, byte| mix(hash ^ u64::from(byte))))
    }
}

impl Plan {
    fn of(sources: &[Source], options: &TextOptions, tokenizer: &Tokenizer) -> Plan {
        Plan {
            tokenizer: tokenizer.fingerprint(),
            options: options.clone(),
            sources: sources.iter().map(|source| (source.path.clone(), source.bytes)).collect(),
        }
    }

    /// Refuses a folder that was begun by another plan.
    fn check(&self, there: &Plan, folder: &Path) -> Result<()> {
        let difference = match () {
            () if self.tokenizer != there.tokenizer => "by another tokenizer",
            () if self.sources != there.sources => "from other files",
            () if self.options != there.options => "with other options",
            () => return Ok(()),
        };
        Err(Error::data(format!("{} was prepared {difference}", folder.display()))
            .hint("choose another folder with --out, or remove this one"))
    }
}

impl Index {
    fn of(shards: &[Arc<Shard>], plan: Plan, tokenizer: &Tokenizer) -> Result<Index> {
        let corpus = Corpus::of_shards(shards.to_vec())?;
        let entry = |(number, shard): (usize, &Arc<Shard>)| ShardEntry {
            file: shard_name(number),
            documents: shard.documents() as u64,
            tokens: shard.len() as u64,
            checksum: shard.header().checksum.clone(),
        };
        Ok(Index {
            format: FORMAT.into(),
            version: VERSION,
            tokenizer: plan.tokenizer.clone(),
            vocabulary_size: tokenizer.vocabulary_size(),
            dtype: shards.first().map_or(Width::U16, |shard| shard.width()),
            documents: corpus.document_count() as u64,
            tokens: corpus.len() as u64,
            bytes: corpus.bytes(),
            words: corpus.words(),
            skipped: corpus.skipped().clone(),
            plan,
            shards: shards.iter().enumerate().map(entry).collect(),
        })
    }
}

/// The shards that a killed preparation left whole, from the first on; others are removed.
fn whole_shards(folder: &Path, plan: &Plan) -> Result<Vec<Shard>> {
    let mut shards = Vec::new();
    loop {
        let path = folder.join(shard_name(shards.len()));
        match Shard::open(&path) {
            Ok(shard) if shard.is_sound() && shard.header().tokenizer == plan.tokenizer => shards.push(shard),
            _ => break,
        }
    }
    let kept: Vec<PathBuf> = (0..shards.len()).map(|number| folder.join(shard_name(number))).collect();
    for entry in fs::read_dir(folder).map_err(|e| Error::io("list", folder, &e))? {
        let path = entry.map_err(|e| Error::io("list", folder, &e))?.path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        if name.starts_with("tokens-") && !kept.contains(&path) {
            fs::remove_file(&path).map_err(|e| Error::io("remove", &path, &e))?;
        }
    }
    Ok(shards)
}

/// Refuses a file that another tokenizer made.
fn check_tokenizer(path: &Path, found: &str, expected: &str) -> Result<()> {
    if found == expected {
        return Ok(());
    }
    Err(Error::data(format!(
        "{} is of the tokenizer {found}, but the index of its folder names {expected}",
        path.display()
    ))
    .hint("tokens of two tokenizers do not mix; prepare the data again"))
}

fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let text = fs::read_to_string(path).map_err(|e| Error::io("read", path, &e))?;
    serde_json::from_str(&text).map_err(|e| {
        Error::data(format!("{} is damaged: {e}", path.display())).hint("prepare the data again")
    })
}

fn write_json<T: Serialize>(path: &Path, value: &T) -> Result<()> {
    let text = serde_json::to_string_pretty(value).map_err(|e| Error::data(e.to_string()))?;
    write_atomically(path, |writer| writeln!(writer, "{text}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::Split;
    use crate::files::tests::Scratch;

    /// Sources of each kind, of several shards in tests, and a folder for tokens.
    fn sources(scratch: &Scratch) -> (Vec<Source>, PathBuf) {
        let text = scratch.0.join("text");
        fs::create_dir(&text).unwrap();
        let lines: String = (0..9_000).map(|line| format!("line {line} of a longer text\n")).collect();
        fs::write(text.join("a.txt"), lines).unwrap();
        let lines: String = (0..3_000).map(|line| format!("{{\"text\": \"document {line}\"}}\n")).collect();
        fs::write(text.join("b.jsonl"), lines + "not JSON\n{\"text\": \"the last\"}\n").unwrap();
        let article = " A word . \n".repeat(60);
        let articles: String = (0..300).map(|n| format!(" \n = Title {n} = \n \n{article}")).collect();
        fs::write(text.join("wiki.x.tokens"), articles).unwrap();
        (Source::find(&[text], Split::Train).unwrap(), scratch.0.join("tokens"))
    }

    fn options() -> TextOptions {
        TextOptions { skip_bad: true, document_end: "$".into(), ..TextOptions::default() }
    }

    fn make(folder: &Path, sources: &[Source], tokenizer: &Tokenizer) -> Result<Prepared> {
        Prepared::make(folder, sources.to_vec(), &options(), tokenizer, &mut |_| {})
    }

    fn files(folder: &Path) -> Vec<(String, Vec<u8>)> {
        let mut files: Vec<(String, Vec<u8>)> = fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap())
            .map(|entry| (entry.file_name().into_string().unwrap(), fs::read(entry.path()).unwrap()))
            .collect();
        files.sort();
        files
    }

    #[test]
    fn prepared_is_read() {
        let scratch = Scratch::new();
        let (sources, folder) = sources(&scratch);
        let tokenizer = Tokenizer::bytes();
        let made = make(&folder, &sources, &tokenizer).unwrap();
        let read = Corpus::read(&sources, &options(), &tokenizer, &mut |_| {}).unwrap();
        let opened = Prepared::open(&folder).unwrap();
        for corpus in [&made.corpus, &opened.corpus] {
            let ids = |corpus: &Corpus| {
                let mut ids = Vec::new();
                corpus.tokens(0..corpus.len(), &mut ids);
                ids
            };
            assert!(ids(corpus) == ids(&read));
            let starts = |corpus: &Corpus| corpus.starts_within(0..=corpus.len() - 1).collect::<Vec<_>>();
            assert_eq!(starts(corpus), starts(&read));
            assert_eq!(corpus.fingerprint(), read.fingerprint());
            assert_eq!((corpus.words(), corpus.bytes()), (read.words(), read.bytes()));
        }
        assert!(opened.index.shards.len() > 5, "{:?}", opened.index.shards);
        assert_eq!(opened.index.documents, 1 + 3_001 + 300);
        assert_eq!((opened.index.skipped.count, opened.index.dtype), (1, Width::U16));
        assert_eq!(opened.index.tokens, read.len() as u64);
        // Reading across the borders of shards, from anywhere.
        for start in (0..read.len() - 100).step_by(997) {
            let (mut a, mut b) = (Vec::new(), Vec::new());
            read.tokens(start..start + 100, &mut a);
            opened.corpus.tokens(start..start + 100, &mut b);
            assert_eq!(a, b);
        }
        opened.verify().unwrap();
    }

    #[test]
    fn a_killed_preparation_goes_on() {
        let scratch = Scratch::new();
        let (sources, folder) = sources(&scratch);
        let tokenizer = Tokenizer::bytes();
        make(&folder, &sources, &tokenizer).unwrap();
        let whole = files(&folder);
        let plan = Plan::of(&sources, &options(), &tokenizer);
        let shards = whole.iter().filter(|(name, _)| name.starts_with("tokens-")).count();
        for kept in 0..=shards {
            // What a kill after `kept` shards leaves: a torn file beside them, and no index.
            fs::remove_file(folder.join(INDEX)).unwrap();
            write_json(&folder.join(PLAN), &plan).unwrap();
            for number in kept..shards {
                fs::remove_file(folder.join(shard_name(number))).unwrap();
            }
            fs::write(folder.join(format!("{}.partial", shard_name(kept).display())), "torn").unwrap();
            assert!(Prepared::open(&folder).unwrap_err().to_string().contains("did not end"));
            make(&folder, &sources, &tokenizer).unwrap();
            assert!(files(&folder) == whole, "after {kept} shards");
        }
        // A shard that was damaged, and all after it, are made again.
        fs::remove_file(folder.join(INDEX)).unwrap();
        write_json(&folder.join(PLAN), &plan).unwrap();
        let path = folder.join(shard_name(1));
        let mut bytes = fs::read(&path).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        fs::write(&path, bytes).unwrap();
        make(&folder, &sources, &tokenizer).unwrap();
        assert!(files(&folder) == whole);
    }

    #[test]
    fn foreign_and_damaged_folders_are_refused() {
        let scratch = Scratch::new();
        let (sources, folder) = sources(&scratch);
        make(&folder, &sources, &Tokenizer::bytes()).unwrap();
        make(&folder, &sources, &Tokenizer::bytes()).unwrap();
        let other = Tokenizer::characters_of(&(' '..='~').collect::<String>());
        let error = make(&folder, &sources, &other).unwrap_err();
        assert!(error.to_string().contains("prepared by another tokenizer"), "{error}");
        let error = make(&folder, &sources[..1], &Tokenizer::bytes()).unwrap_err();
        assert!(error.to_string().contains("prepared from other files"), "{error}");
        let error = make(&scratch.0, &sources, &Tokenizer::bytes()).unwrap_err();
        assert!(error.to_string().contains("holds files that are no prepared data"), "{error}");

        let foreign = scratch.0.join("foreign");
        Prepared::make(&foreign, sources[1..2].to_vec(), &options(), &other, &mut |_| {}).unwrap();
        let shard = fs::read(foreign.join(shard_name(0))).unwrap();
        let path = folder.join(shard_name(0));
        let original = fs::read(&path).unwrap();
        // A file that is mapped is never written in place, not even here.
        let put = |bytes: &[u8]| write_atomically(&path, |writer| writer.write_all(bytes)).unwrap();
        put(&shard);
        let error = Prepared::open(&folder).unwrap_err().to_string();
        assert!(error.contains("tokens-00000.safetensors is of the tokenizer"), "{error}");
        put(&original[..original.len() / 2]);
        let error = Prepared::open(&folder).unwrap_err().to_string();
        assert!(error.contains("expected a token shard at"), "{error}");
        let mut damaged = original.clone();
        *damaged.last_mut().unwrap() ^= 1;
        put(&damaged);
        let error = Prepared::open(&folder).unwrap().verify().unwrap_err().to_string();
        assert!(error.contains("tokens/tokens-00000.safetensors is damaged"), "{error}");
        put(&original);
        let mut miscounted = Prepared::open(&folder).unwrap();
        miscounted.verify().unwrap();
        miscounted.index.words += 1;
        let error = miscounted.verify().unwrap_err().to_string();
        assert!(error.contains("index.json counts"), "{error}");
        Tokenizer::characters_of("ab").save(&folder.join(TOKENIZER)).unwrap();
        assert!(
            Prepared::open(&folder).unwrap_err().to_string().contains("tokenizer.json is of the tokenizer")
        );
    }
}
