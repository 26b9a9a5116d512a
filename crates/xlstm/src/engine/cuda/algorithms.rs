//! Which algorithm multiplies matrices of a shape: timed instead of guessed, where asked for, and
//! kept with a run, which could not be resumed bit for bit without.
//!
//! cuBLASLt's first guess is at times a third slower than the best. The search takes another only
//! if it wins clearly: times differ by a few percent for reasons that have nothing to do with it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use cudarc::cublaslt::sys as lt;
use serde::{Deserialize, Serialize};

use super::blas::{Blas, Combination, Key, Plan};
use super::context::{Buffer, Gpu, lock};
use super::event::milliseconds;
use crate::error::{Error, Result};

/// cuBLASLt's opaque description of an algorithm.
pub(super) type Algorithm = [u64; 8];

/// Algorithms that race.
pub(super) const CANDIDATES: usize = 8;

/// Rounds of a race, in each of which every algorithm multiplies [`REPEATS`] times.
const ROUNDS: usize = 5;
const REPEATS: usize = 4;

/// Another algorithm than the first has to take less than this part of its time.
const CLEARLY: f32 = 0.97;

/// A pattern that is about 1 as one f32 and as two bf16: zeros would multiply with less power than
/// a run will.
const ONES: u32 = 0x3f80_3f80;

/// The algorithms of products as they are saved.
#[derive(Serialize, Deserialize)]
struct Saved {
    cublaslt: usize,
    card: String,
    /// By the shape's name, the bytes in hexadecimal.
    algorithms: BTreeMap<String, String>,
}

fn version() -> usize {
    // SAFETY: a Gpu exists only where the library was found.
    unsafe { lt::cublasLtGetVersion() }
}

impl Gpu {
    /// Whether the first product of each shape tries several algorithms and keeps the fastest: some
    /// ten milliseconds a shape, and buffers as large as its matrices for so long. Off at first.
    pub fn search(&self, on: bool) {
        self.blas.search.store(on, Ordering::Relaxed);
    }

    /// The algorithms of all products so far, as JSON.
    ///
    /// # Errors
    /// When they cannot be written as JSON.
    pub fn export_algorithms(&self) -> Result<String> {
        let known = lock(&self.blas.known);
        let algorithms = known.iter().map(|(name, algorithm)| (name.clone(), to_hex(algorithm)));
        let saved =
            Saved { cublaslt: version(), card: self.name().to_owned(), algorithms: algorithms.collect() };
        serde_json::to_string_pretty(&saved)
            .map_err(|e| Error::checkpoint(format!("cannot write the algorithms of products: {e}")))
    }

    /// Uses algorithms that [`export_algorithms`](Self::export_algorithms) gave, for shapes that have
    /// not been multiplied yet. Those of another card or cuBLASLt are left alone, and the reason is
    /// returned.
    ///
    /// # Errors
    /// When the text is no such export.
    pub fn import_algorithms(&self, text: &str) -> Result<Option<String>> {
        let failed = |e: &dyn std::fmt::Display| {
            Error::checkpoint(format!("cannot read the algorithms of products: {e}"))
        };
        let saved: Saved = serde_json::from_str(text).map_err(|e| failed(&e))?;
        if let Some(reason) = saved.differs(version(), self.name()) {
            return Ok(Some(reason));
        }
        let mut algorithms = BTreeMap::new();
        for (name, text) in saved.algorithms {
            let algorithm = from_hex(&text).ok_or_else(|| failed(&format!("{name} has {text}")))?;
            algorithms.insert(name, algorithm);
        }
        // Those in use stay.
        algorithms.append(&mut lock(&self.blas.known));
        *lock(&self.blas.known) = algorithms;
        Ok(None)
    }
}

impl Saved {
    /// Why algorithms of this origin do not serve here.
    fn differs(&self, cublaslt: usize, card: &str) -> Option<String> {
        if self.card != card {
            return Some(format!("the algorithms of products are for {}, not {card}", self.card));
        }
        (self.cublaslt != cublaslt).then(|| {
            format!("the algorithms of products are of cuBLASLt {}, this is {cublaslt}", self.cublaslt)
        })
    }
}

fn to_hex(algorithm: &Algorithm) -> String {
    algorithm.iter().flat_map(|word| word.to_le_bytes()).map(|byte| format!("{byte:02x}")).collect()
}

fn from_hex(text: &str) -> Option<Algorithm> {
    let mut algorithm = Algorithm::default();
    if text.len() != 128 || !text.is_ascii() {
        return None;
    }
    for (i, word) in algorithm.iter_mut().enumerate() {
        *word = u64::from_str_radix(&text[16 * i..][..16], 16).ok()?.swap_bytes();
    }
    Some(algorithm)
}

/// The fastest of the candidates, of which the first is the one to beat.
pub(super) fn fastest(
    blas: &Blas,
    gpu: &Arc<Gpu>,
    workspace: &Buffer,
    key: &Key,
    plan: &Plan,
    candidates: &[Algorithm],
) -> Result<Algorithm> {
    let [first, _, ..] = candidates else { return Ok(candidates[0]) };
    // Buffers of its own: C may hold what is to be added to.
    let mut buffers = Vec::new();
    for bytes in key.bytes() {
        let buffer = Buffer::zeros(gpu, bytes)?;
        gpu.fill(buffer.pointer(), ONES, buffer.bytes())?;
        buffers.push(buffer);
    }
    let pointers = [0, 1, 2].map(|i: usize| buffers[i].pointer());
    let combined = Combination::plain(key.accumulate, pointers[2]);
    let stream = gpu.raw_stream();
    let mut times = vec![f32::INFINITY; candidates.len()];
    // The first round warms up. One after the other in every round, so that all see the same clock
    // rates.
    for round in 0..=ROUNDS {
        for (time, algorithm) in times.iter_mut().zip(candidates) {
            let spent = milliseconds(gpu, || {
                (0..REPEATS)
                    .try_for_each(|_| blas.multiply(stream, workspace, plan, algorithm, pointers, combined))
            })?;
            if round > 0 {
                *time = time.min(spent);
            }
        }
    }
    let best = (0..candidates.len()).min_by(|&a, &b| times[a].total_cmp(&times[b])).unwrap_or(0);
    Ok(if times[best] < CLEARLY * times[0] { candidates[best] } else { *first })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hexadecimal_is_the_bytes_in_order() {
        let algorithm = std::array::from_fn(|i| 0x0102_0304_0506_0708 << i);
        let text = to_hex(&algorithm);
        assert!(text.starts_with("0807060504030201"), "{text}");
        assert_eq!(from_hex(&text), Some(algorithm));
        assert_eq!(from_hex(&text[1..]), None);
        assert_eq!(from_hex(&text.replace('8', "x")), None);
    }

    #[test]
    fn another_card_or_version_is_named() {
        let saved = Saved { cublaslt: 130_100, card: String::from("A"), algorithms: BTreeMap::new() };
        assert_eq!(saved.differs(130_100, "A"), None);
        assert!(saved.differs(130_100, "B").is_some_and(|reason| reason.contains("not B")));
        assert!(saved.differs(130_200, "A").is_some_and(|reason| reason.contains("130200")));
    }
}
