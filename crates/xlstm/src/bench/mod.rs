//! How fast this machine is: models of known shapes timed on random tokens, beside the machine's
//! own floor, the time that their products or their reads alone would take it.
//!
//! What counts as work, for the floor and for GFLOP/s:
//!
//! - A product with a matrix of N weights is 2 N operations a token. Embedding and learned
//!   positions, of which rows are read, count nothing; the head counts where logits are asked for.
//! - An mLSTM's products with its states and within its chunks count at its chunk size, attention's
//!   over half a context. All else (gates, norms, activations, the loss, the optimizer) counts
//!   nothing: it is what a perfect program would hide.
//! - Training is three times forward: backward has two products for each.
//! - A decode step reads every weight once, as it is stored, and reads and writes the state of each
//!   session. The cells' products with their states are left out of its operations.

pub mod cell;
pub mod floor;
pub mod inference;
pub mod presets;
pub mod training;

pub use cell::{CellTimes, cells};
pub use floor::Floor;
pub use inference::{Storage, decode, prefill};
pub use presets::{PRESETS, Preset};
pub use training::{Trained, train_steps};

use crate::engine::Device;
use crate::error::{Error, Result};

/// Work that is done again and again, and how long it took.
#[derive(Clone, Debug, PartialEq)]
pub struct Measured {
    /// Parameters of what ran.
    pub parameters: usize,
    /// Tokens of one repetition.
    pub tokens: usize,
    /// Floating-point operations of one repetition: see the head of this module.
    pub operations: f64,
    /// Bytes of weights and states that one repetition reads and writes; 0 where they are not what
    /// limits it, and are not counted.
    pub bytes: f64,
    /// Of decoding: bytes of a session's state after the prompt; elsewhere 0.
    pub state_bytes: f64,
    /// Seconds of each repetition that counts.
    pub seconds: Vec<f64>,
    /// 10^6 bytes of memory: the most that this process has held, where the system tells; on a
    /// GPU the most that its buffers have taken since the repetitions that count began.
    pub peak_megabytes: Option<f64>,
}

impl Measured {
    /// The median of the seconds.
    pub fn median(&self) -> f64 {
        median(&self.seconds)
    }

    /// Tokens a second, at the median.
    pub fn tokens_per_second(&self) -> f64 {
        self.tokens as f64 / self.median()
    }

    /// 10^9 operations a second, at the median.
    pub fn gigaflops(&self) -> f64 {
        self.operations / self.median() / 1e9
    }

    /// The time that the machine needs at the least over the time that was needed: for the
    /// operations at its rate of products, or for the bytes at its bandwidth, whichever is longer.
    pub fn floor_share(&self, floor: &Floor) -> f64 {
        let products = self.operations / (floor.product_gigaflops * 1e9);
        let reads = self.bytes / (floor.bandwidth_gigabytes * 1e9);
        products.max(reads) / self.median()
    }
}

/// At least one repetition is needed.
fn check_repeats(repeats: usize) -> Result<()> {
    match repeats {
        0 => Err(Error::config("0 repetitions cannot be timed").hint("at least 1 is needed, 5 are better")),
        _ => Ok(()),
    }
}

/// The middle of `values`.
fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    if sorted.len() % 2 == 1 { sorted[middle] } else { (sorted[middle - 1] + sorted[middle]) / 2.0 }
}

/// See [`Measured::peak_megabytes`].
fn peak_megabytes(device: &Device) -> Option<f64> {
    match device {
        Device::Cpu(..) => {
            // Linux keeps the high-water mark of a process's resident memory.
            let status = std::fs::read_to_string("/proc/self/status").ok()?;
            let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
            let kibibytes: f64 = line.trim().trim_end_matches("kB").trim().parse().ok()?;
            Some(kibibytes * 1024.0 / 1e6)
        }
        #[cfg(feature = "cuda")]
        Device::Cuda(gpu, _) => Some(gpu.peak_bytes() as f64 / 1e6),
    }
}

/// Lets [`peak_megabytes`] begin anew on a GPU, where the search of products takes more memory for a
/// moment than all that follows.
fn forget_peak(device: &Device) {
    match device {
        Device::Cpu(..) => (),
        #[cfg(feature = "cuda")]
        Device::Cuda(gpu, _) => gpu.forget_peak(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
    }

    #[test]
    fn the_longer_of_two_floors_counts() {
        let floor = Floor { product_gigaflops: 100.0, bandwidth_gigabytes: 10.0 };
        let measured = |operations, bytes| Measured {
            parameters: 0,
            tokens: 6,
            operations,
            bytes,
            state_bytes: 0.0,
            seconds: vec![9.0, 2.0, 1.0],
            peak_megabytes: None,
        };
        let products = measured(1e11, 1e9);
        assert_eq!((products.tokens_per_second(), products.gigaflops()), (3.0, 50.0));
        assert_eq!(products.floor_share(&floor), 0.5);
        assert_eq!(measured(1e11, 1.5e10).floor_share(&floor), 0.75);
    }
}
