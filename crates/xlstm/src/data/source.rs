//! Where text comes from: files, folders and patterns, resolved to files of known format.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::error::nearest;
use crate::{Error, Result};

/// How the text of a file is laid out; told by its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// One document: `.txt` and names without an extension of their own.
    Text,
    /// A JSON object a line, each a document: `.jsonl`, `.ndjson`, `.json`.
    JsonLines,
    /// A row a document, or WikiText's rows, which are lines: `.parquet`.
    Parquet,
    /// Lines of tokenised text in which headings begin articles: `wiki.*.tokens`.
    WikiText,
}

/// Which files of a folder are meant, where their names say what they are for: `train-*`,
/// `validation*` (or `valid*`, `val*`, `dev*`) and `test*`, with or without WikiText's `wiki.`
/// before. Files that are named themselves, or by a pattern, are taken whatever they are called.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Split {
    /// To learn from.
    #[default]
    Train,
    /// To choose by.
    Validation,
    /// To report.
    Test,
}

impl Split {
    /// `train`, `validation` or `test`.
    pub fn name(self) -> &'static str {
        match self {
            Split::Train => "train",
            Split::Validation => "validation",
            Split::Test => "test",
        }
    }

    /// The split that a file's name speaks of.
    fn of(path: &Path) -> Option<Split> {
        let name = path.file_name()?.to_str()?.to_ascii_lowercase();
        let name = name.strip_prefix("wiki.").unwrap_or(&name);
        let word = name.split(|c: char| !c.is_ascii_alphabetic()).next()?;
        match word {
            "train" | "training" => Some(Split::Train),
            "validation" | "valid" | "val" | "dev" => Some(Split::Validation),
            "test" => Some(Split::Test),
            _ => None,
        }
    }
}

/// One file of text, or a text in memory.
#[derive(Debug, Clone)]
pub struct Source {
    /// The file, or what to call the text in errors.
    pub path: PathBuf,
    /// Its layout.
    pub format: Format,
    /// Its size in bytes.
    pub bytes: u64,
    /// The text, where it is in memory.
    pub(super) content: Option<Arc<[u8]>>,
}

impl Source {
    /// A text in memory, called `name` in errors.
    pub fn of_text(name: impl Into<PathBuf>, text: &str) -> Source {
        Source {
            path: name.into(),
            format: Format::Text,
            bytes: text.len() as u64,
            content: Some(text.as_bytes().into()),
        }
    }

    /// The files that `paths` mean, in order: each a file, a folder (its files of text and those
    /// of the folders in it, by name; only those of `split` where names speak of splits), or a
    /// pattern with `*`, `?`, `[…]` or `**`.
    ///
    /// # Errors
    /// A path that does not exist, a pattern or folder without files of text, or a folder without
    /// the split; says what there is.
    pub fn find(paths: &[PathBuf], split: Split) -> Result<Vec<Source>> {
        let mut sources = Vec::new();
        for path in paths {
            let files = match path {
                folder if folder.is_dir() => in_folder(folder, split)?,
                file if file.exists() => vec![file.clone()],
                other => matching(other)?,
            };
            for file in files {
                sources.push(Source::of_file(file)?);
            }
        }
        Ok(sources)
    }

    fn of_file(path: PathBuf) -> Result<Source> {
        let bytes = fs::metadata(&path).map_err(|e| Error::io("read", &path, &e))?.len();
        let format = format_of(&path).unwrap_or(Format::Text);
        Ok(Source { path, format, bytes, content: None })
    }
}

/// The format that a file's name promises.
fn format_of(path: &Path) -> Option<Format> {
    let name = path.file_name()?.to_str()?.to_ascii_lowercase();
    match name.rsplit_once('.')?.1 {
        "txt" => Some(Format::Text),
        "jsonl" | "ndjson" | "json" => Some(Format::JsonLines),
        "parquet" => Some(Format::Parquet),
        "tokens" if name.starts_with("wiki.") => Some(Format::WikiText),
        _ => None,
    }
}

/// The files of text below `folder`, of `split` where there are splits.
fn in_folder(folder: &Path, split: Split) -> Result<Vec<PathBuf>> {
    let mut all = Vec::new();
    list(folder, &mut all)?;
    all.sort();
    let (files, others): (Vec<_>, Vec<_>) = all.into_iter().partition(|path| format_of(path).is_some());
    if files.is_empty() {
        let names: Vec<String> = others.iter().take(8).map(|path| path.display().to_string()).collect();
        let found = if names.is_empty() { "no files at all".into() } else { names.join(", ") };
        return Err(Error::data(format!(
            "expected .txt, .jsonl, .parquet or wiki.*.tokens files in {}, found {found}",
            folder.display()
        ))
        .hint("a file of another name is read as plain text when it is named itself"));
    }
    let marked = |wanted: Split| files.iter().any(|path| Split::of(path) == Some(wanted));
    let there: Vec<&str> = [Split::Train, Split::Validation, Split::Test]
        .into_iter()
        .filter(|split| marked(*split))
        .map(Split::name)
        .collect();
    if there.is_empty() {
        return Ok(files);
    }
    if !marked(split) {
        return Err(Error::data(format!(
            "expected {} files in {}, found those of {}",
            split.name(),
            folder.display(),
            there.join(", ")
        ))
        .hint("name the files themselves, or take another split"));
    }
    Ok(files.into_iter().filter(|path| Split::of(path) == Some(split)).collect())
}

/// Collects the files below `folder`, but for hidden ones.
fn list(folder: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(folder).map_err(|e| Error::io("list", folder, &e))? {
        let path = entry.map_err(|e| Error::io("list", folder, &e))?.path();
        let hidden =
            path.file_name().and_then(|name| name.to_str()).is_some_and(|name| name.starts_with('.'));
        match path.is_dir() {
            _ if hidden => {}
            true => list(&path, files)?,
            false => files.push(path),
        }
    }
    Ok(())
}

/// The files that match a pattern, by name; for a path that is none, the error of its absence.
fn matching(pattern: &Path) -> Result<Vec<PathBuf>> {
    let text = pattern.to_string_lossy();
    if !text.contains(['*', '?', '[']) {
        return Err(missing(pattern));
    }
    let options = glob::MatchOptions { require_literal_leading_dot: true, ..Default::default() };
    let paths = glob::glob_with(&text, options).map_err(|e| {
        Error::data(format!("`{text}` is not a pattern: {e}")).hint("for instance data/*.parquet")
    })?;
    let mut files = Vec::new();
    for path in paths {
        let path = path.map_err(|e| Error::io("list", e.path(), e.error()))?;
        if path.is_file() {
            files.push(path);
        }
    }
    if files.is_empty() {
        return Err(Error::data(format!("no file matches `{text}`"))
            .hint("relative patterns start at the current folder"));
    }
    Ok(files)
}

/// The error of a path that does not exist, with the nearest name beside it.
fn missing(path: &Path) -> Error {
    let not_found = std::io::Error::from(std::io::ErrorKind::NotFound);
    let error = Error::io("read", path, &not_found);
    let folder = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let names: Vec<String> = entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    match nearest(name, names.iter().map(String::as_str)) {
        Some(near) => error.hint(format!("did you mean {}?", path.with_file_name(near).display())),
        None => error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files::tests::Scratch;

    fn names(sources: &[Source]) -> Vec<&str> {
        sources.iter().filter_map(|source| source.path.file_name()?.to_str()).collect()
    }

    #[test]
    fn files_folders_and_patterns() {
        let scratch = Scratch::new();
        let folder = &scratch.0;
        fs::create_dir(folder.join("more")).unwrap();
        for name in ["b.txt", "a.jsonl", "more/c.parquet", "notes.md", ".hidden.txt"] {
            fs::write(folder.join(name), "text").unwrap();
        }
        let find = |paths: &[&str]| {
            let paths: Vec<PathBuf> = paths.iter().map(|path| folder.join(path)).collect();
            Source::find(&paths, Split::Train)
        };
        let all = find(&[""]).unwrap();
        assert_eq!(names(&all), ["a.jsonl", "b.txt", "c.parquet"]);
        assert_eq!((all[0].format, all[2].format, all[1].bytes), (Format::JsonLines, Format::Parquet, 4));
        assert_eq!(names(&find(&["*.txt", "notes.md"]).unwrap()), ["b.txt", "notes.md"]);
        assert_eq!(names(&find(&["**/*.parquet"]).unwrap()), ["c.parquet"]);
        assert!(find(&["*.csv"]).unwrap_err().to_string().contains("no file matches"));
        let error = find(&["bb.txt"]).unwrap_err();
        assert!(error.hint_text().unwrap().contains("b.txt"), "{error:?}");
        fs::create_dir(folder.join("none")).unwrap();
        fs::write(folder.join("none/x.csv"), "").unwrap();
        assert!(find(&["none"]).unwrap_err().to_string().contains("x.csv"));
    }

    #[test]
    fn splits_are_told_by_name() {
        let scratch = Scratch::new();
        for name in
            ["wiki.train.tokens", "wiki.valid.tokens", "train-00000-of-00002.parquet", "testimony.txt"]
        {
            fs::write(scratch.0.join(name), "text").unwrap();
        }
        let find = |split| Source::find(std::slice::from_ref(&scratch.0), split);
        assert_eq!(
            names(&find(Split::Train).unwrap()),
            ["train-00000-of-00002.parquet", "wiki.train.tokens"]
        );
        let validation = find(Split::Validation).unwrap();
        assert_eq!((names(&validation), validation[0].format), (vec!["wiki.valid.tokens"], Format::WikiText));
        let error = find(Split::Test).unwrap_err().to_string();
        assert!(error.contains("found those of train, validation"), "{error}");
    }
}
