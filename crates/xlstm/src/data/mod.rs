//! Corpora and the batches cut from them.
//!
//! The chain is: text files, read with care ([`read_text`]); tokens with document
//! starts ([`Corpus`]); then either training batches ([`Batches`]) or a fixed walk for
//! evaluation ([`Evaluation`]). A batch is a pure function of the corpus, the seed and
//! its index. Nothing needs to be replayed to resume in the middle of an epoch, and no
//! iterator state has to be saved.

mod batch;
mod batches;
mod corpus;
mod evaluation;

pub use crate::marks::{IGNORE, PAD, RESET};
pub use batch::Batch;
pub use batches::{Batches, Batching};
pub use corpus::{Corpus, read_text, split_text};
pub use evaluation::{Evaluation, sequential, validation_batches};
