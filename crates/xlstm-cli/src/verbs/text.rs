//! The arguments that say which text is meant, shared by the verbs that read text.

use std::path::PathBuf;

use clap::Args;
use xlstm::data::{Skipped, Split, TextOptions};

use crate::output;

/// Which text, and how it is taken from its files.
#[derive(Debug, Args)]
pub struct TextArgs {
    /// Files (.txt, .jsonl, .parquet, wiki.*.tokens), folders, patterns such as 'data/*.parquet',
    /// or folders of prepared tokens
    #[arg(long, value_name = "PATH", num_args = 1.., required = true)]
    pub data: Vec<PathBuf>,
    /// The field of JSON lines and the column of Parquet files that hold the text
    #[arg(long, value_name = "NAME", default_value = "text")]
    pub field: String,
    /// Of folders whose files are named so: train, validation or test
    #[arg(long, value_name = "NAME", value_parser = split)]
    pub split: Option<Split>,
    /// Leave out lines and rows that cannot be used, and count them
    #[arg(long)]
    pub skip_bad: bool,
    /// Undo the tokenisation of WikiText (`@-@`, spaces before punctuation)
    #[arg(long)]
    pub detokenize: bool,
    /// Text to append to every document, `\n` for a line break; for instance '<|endoftext|>'
    #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    pub document_end: String,
}

impl TextArgs {
    /// How text is taken from files.
    pub fn options(&self) -> TextOptions {
        TextOptions {
            field: self.field.clone(),
            skip_bad: self.skip_bad,
            detokenize: self.detokenize,
            document_end: self.document_end.replace("\\n", "\n"),
        }
    }
}

/// Says what was left out, if anything was.
pub fn note_skipped(skipped: &Skipped) {
    if let Some(first) = &skipped.first {
        output::note(&format!("left out {} lines or rows; the first: {first}", skipped.count));
    }
}

fn split(word: &str) -> Result<Split, String> {
    let all = [Split::Train, Split::Validation, Split::Test];
    let found = all.into_iter().find(|split| split.name() == word);
    found.ok_or_else(|| "expected train, validation or test".into())
}
