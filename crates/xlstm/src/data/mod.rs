//! Corpora and batches.
