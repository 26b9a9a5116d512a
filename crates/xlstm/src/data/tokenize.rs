//! From documents to shards: one thread reads ahead, all others tokenise.
//!
//! Where blocks and shards end is a function of the text alone, so shards are the same on any
//! number of threads and wherever the work was interrupted.

use std::sync::mpsc::sync_channel;

use rayon::prelude::*;

use super::documents::{Block, Documents, Piece};
use super::shard::{Builder, Width};
use super::source::Source;
use crate::text::Tokenizer;
use crate::{Error, Result};

/// Bytes of text in a shard, about: what a kill can cost, and half of what memory is needed.
const SHARD: u64 = if cfg!(test) { 64 << 10 } else { 32 << 20 };

/// How far a preparation is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Progress {
    /// Bytes of files that are done.
    pub bytes_done: u64,
    /// Bytes of all files.
    pub bytes: u64,
    /// Tokens so far in this process.
    pub tokens: u64,
}

/// Tokenises `documents` of `sources` and hands the shards, as bytes and in order, to `emit`.
///
/// # Errors
/// Those of reading and of `emit`; text that the tokenizer cannot encode, with its file and place.
pub(super) fn tokenize(
    mut documents: Documents,
    sources: &[Source],
    tokenizer: &Tokenizer,
    progress: &mut dyn FnMut(Progress),
    emit: &mut dyn FnMut(Vec<u8>) -> Result<()>,
) -> Result<()> {
    let fingerprint = tokenizer.fingerprint();
    let mut builder = Builder::new(Width::of(tokenizer.vocabulary_size()));
    let mut done = Progress { bytes: sources.iter().map(|source| source.bytes).sum(), ..Progress::default() };
    std::thread::scope(|scope| {
        let (sender, blocks) = sync_channel::<Result<Block>>(1);
        scope.spawn(move || {
            // Ends with the text, with an error, or when nobody listens any more.
            while let Some(block) = documents.next_block().transpose() {
                let failed = block.is_err();
                if sender.send(block).is_err() || failed {
                    break;
                }
            }
        });
        let mut last = None;
        for block in blocks {
            let Block { pieces, cursor, skipped, bytes_done } = block?;
            let encoded: Vec<Result<Encoded>> =
                pieces.par_iter().map(|piece| Encoded::of(piece, tokenizer, sources)).collect();
            // In order, so that the first error is always the same one.
            for piece in encoded {
                let Encoded { ids, bytes, words, begins } = piece?;
                builder.push(&ids, bytes, words, begins)?;
                done.tokens += ids.len() as u64;
            }
            done.bytes_done = bytes_done;
            progress(done);
            if builder.text_bytes >= SHARD {
                emit(builder.finish(&fingerprint, cursor, skipped)?)?;
                last = None;
            } else {
                last = Some((cursor, skipped));
            }
        }
        match last {
            Some((cursor, skipped)) if !builder.is_empty() => {
                emit(builder.finish(&fingerprint, cursor, skipped)?)
            }
            _ => Ok(()),
        }
    })
}

/// A piece in tokens.
struct Encoded {
    ids: Vec<u32>,
    bytes: u64,
    words: u64,
    begins: bool,
}

impl Encoded {
    fn of(piece: &Piece, tokenizer: &Tokenizer, sources: &[Source]) -> Result<Encoded> {
        let ids = tokenizer.encode(&piece.text).map_err(|e| Documents::in_piece(&e, piece, sources))?;
        if ids.contains(&super::IGNORE) {
            let ignore = super::IGNORE;
            return Err(Error::data(format!(
                "the tokenizer gives the token {ignore}, which marks what to ignore"
            )));
        }
        let (bytes, words) = piece
            .counts
            .unwrap_or_else(|| (piece.text.len() as u64, piece.text.split_whitespace().count() as u64));
        Ok(Encoded { ids, bytes, words, begins: piece.begins })
    }
}
