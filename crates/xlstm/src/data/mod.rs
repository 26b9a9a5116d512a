//! Corpora and the batches cut from them.
//!
//! The chain is: files of text in several formats ([`Source`]); their documents, in pieces
//! (`documents.rs`); tokens in shards, in memory or on the disk ([`Prepared`]), which together are
//! a [`Corpus`]; then either training batches ([`Batches`], ready ahead of use by [`Prefetch`]) or a fixed walk for evaluation
//! ([`Evaluation`]). A batch is a pure function of the corpus, the seed and its index. Nothing
//! needs to be replayed to resume in the middle of an epoch, and no iterator state has to be saved.

mod batch;
mod batches;
mod corpus;
mod documents;
mod evaluation;
mod jsonl;
mod origin;
#[cfg(feature = "parquet")]
mod parquet;
mod plain;
mod prefetch;
mod prepared;
mod sequence;
mod shard;
mod source;
mod stages;
mod tokenize;
mod unscored;
mod vocabulary;
mod wikitext;

pub use crate::marks::{IGNORE, PAD, RESET};
pub use batch::Batch;
pub use batches::{Batches, Batching};
pub use corpus::Corpus;
pub use documents::{Skipped, TextOptions};
pub use evaluation::{Evaluation, sequential, strided_batches, validation_batches};
pub use origin::Origin;
pub use prefetch::Prefetch;
pub use prepared::{Index, Prepared, ShardEntry};
pub use sequence::{Sequence, Targets};
pub use shard::Width;
pub use source::{Format, Source, Split};
pub use stages::{Stage, Stages};
pub use tokenize::Progress;
pub use unscored::Unscored;
pub use vocabulary::{distinct_characters, train_bpe};
pub use wikitext::detokenize;
