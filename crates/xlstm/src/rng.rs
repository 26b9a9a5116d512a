//! Random numbers as a pure function of (seed, stream, counter).
//!
//! Own and tiny on purpose. A run must give the same bits in every version of this
//! crate, so that no dependency may change its stream under us; and it must resume
//! in the middle of anything at no cost, so that the state is one counter and any
//! element can be computed without the ones before it. The mixing is that of
//! splitmix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number
//! generators", 2014), applied twice so that streams are unrelated. Logarithm and
//! cosine come from `libm` and not from the system, whose last bits differ between
//! platforms. Not for cryptography.

/// The odd number closest to 2^64 divided by the golden ratio.
const GAMMA: u64 = 0x9E37_79B9_7F4A_7C15;

/// The finalizer of splitmix64: a bijection of 64 bits that spreads every input bit
/// over all output bits.
pub const fn mix(mut value: u64) -> u64 {
    value = (value ^ (value >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    value = (value ^ (value >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    value ^ (value >> 31)
}

/// A key for the pair (`seed`, `stream`); neighbouring pairs give unrelated keys.
const fn key_of(seed: u64, stream: u64) -> u64 {
    mix(mix(seed.wrapping_add(GAMMA)).wrapping_add(stream.wrapping_mul(GAMMA)).wrapping_add(1))
}

/// A generator whose whole state is a counter.
///
/// Two generators with the same seed and different streams are independent, so that
/// every use (initialisation, sampling, ...) takes a stream of its own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rng {
    key: u64,
    counter: u64,
}

impl Rng {
    /// The generator of `stream` under `seed`, at its beginning.
    pub const fn new(seed: u64, stream: u64) -> Self {
        Rng { key: key_of(seed, stream), counter: 0 }
    }

    /// How many 64-bit numbers have been drawn: the state to save.
    pub const fn counter(&self) -> u64 {
        self.counter
    }

    /// Goes to the place where `counter` numbers have been drawn.
    pub const fn set_counter(&mut self, counter: u64) {
        self.counter = counter;
    }

    /// The number at place `counter` of this stream, whatever the state.
    pub const fn at(&self, counter: u64) -> u64 {
        mix(mix(self.key ^ counter.wrapping_mul(GAMMA)).wrapping_add(self.key))
    }

    /// The next 64 random bits; draws one number.
    pub const fn next_u64(&mut self) -> u64 {
        let value = self.at(self.counter);
        self.counter = self.counter.wrapping_add(1);
        value
    }

    /// Uniform in [0, 1), a multiple of 2^-53; draws one number.
    pub const fn uniform(&mut self) -> f64 {
        unit_interval(self.next_u64())
    }

    /// Standard normal by the transform of Box and Muller; draws two numbers, and
    /// drops the second normal so that the counter remains the whole state.
    pub fn normal(&mut self) -> f64 {
        // 1 - u lies in (0, 1], where the logarithm is finite.
        let radius = libm::sqrt(-2.0 * libm::log(1.0 - self.uniform()));
        radius * libm::cos(std::f64::consts::TAU * self.uniform())
    }

    /// Uniform in 0..`n` without bias (Lemire, 2019); zero when `n` is zero. Draws one
    /// number, or with a chance below n / 2^64 some more.
    pub const fn below(&mut self, n: u64) -> u64 {
        if n == 0 {
            return 0;
        }
        let rejected = n.wrapping_neg() % n;
        loop {
            let product = self.next_u64() as u128 * n as u128;
            if product as u64 >= rejected {
                return (product >> 64) as u64;
            }
        }
    }
}

/// The upper 53 bits as a number in [0, 1).
const fn unit_interval(bits: u64) -> f64 {
    (bits >> 11) as f64 / (1u64 << 53) as f64
}

/// A shuffle of 0..n that is evaluated one index at a time, in constant memory.
///
/// A Feistel network of four rounds is a bijection on the smallest range of 4^k
/// numbers that holds 0..n; an image outside 0..n is sent through again until it
/// falls inside ("cycle walking", Black and Rogaway, 2002), less than four times on
/// average.
#[derive(Debug, Clone)]
pub struct Permutation {
    n: u64,
    half_bits: u32,
    keys: [u64; 4],
}

impl Permutation {
    /// The permutation of 0..`n` for `epoch` under `seed`.
    pub const fn new(seed: u64, epoch: u64, n: u64) -> Self {
        // A stream number that no small integer meets keeps shuffles apart from Rng.
        let key = key_of(seed, epoch ^ 0x5045_524D_5554_4521);
        let bits = 64 - n.saturating_sub(1).leading_zeros();
        Permutation {
            n,
            half_bits: bits.div_ceil(2),
            keys: [mix(key), mix(key ^ 1), mix(key ^ 2), mix(key ^ 3)],
        }
    }

    /// The image of `index`, which must be below n; an index that is not maps to itself.
    pub const fn at(&self, index: u64) -> u64 {
        if index >= self.n || self.half_bits == 0 {
            return index;
        }
        let mut value = self.network(index);
        while value >= self.n {
            value = self.network(value);
        }
        value
    }

    /// One pass of the Feistel network over 2 * half_bits bits.
    const fn network(&self, value: u64) -> u64 {
        let mask = (1u64 << self.half_bits) - 1;
        let (mut left, mut right) = (value >> self.half_bits, value & mask);
        let mut round = 0;
        while round < self.keys.len() {
            (left, right) = (right, left ^ (mix(right.wrapping_add(self.keys[round])) & mask));
            round += 1;
        }
        (left << self.half_bits) | right
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_stream_never_changes() {
        // Saved runs depend on these very numbers; they were computed apart, in Python.
        let mut rng = Rng::new(42, 7);
        let drawn = [rng.next_u64(), rng.next_u64(), rng.next_u64()];
        assert_eq!(drawn, [17410043020259415209, 1270880764759818820, 10355102773519743779]);
        let shuffled: Vec<u64> = (0..10).map(|i| Permutation::new(42, 0, 10).at(i)).collect();
        assert_eq!(shuffled, [9, 1, 2, 5, 6, 4, 7, 3, 0, 8]);
    }

    #[test]
    fn state_is_the_counter() {
        let mut rng = Rng::new(1, 2);
        for _ in 0..10 {
            rng.normal();
        }
        assert_eq!(rng.counter(), 20);
        let next = rng.next_u64();
        let mut resumed = Rng::new(1, 2);
        resumed.set_counter(20);
        assert_eq!(resumed.next_u64(), next);
        assert_ne!(Rng::new(1, 3).at(20), next);
        assert_ne!(Rng::new(2, 2).at(20), next);
    }

    #[test]
    fn moments() {
        let draws = 200_000;
        let mean = |f: &mut dyn FnMut() -> f64| (0..draws).map(|_| f()).sum::<f64>() / draws as f64;
        let mut rng = Rng::new(3, 0);
        assert!((mean(&mut || rng.uniform()) - 0.5).abs() < 0.003);
        assert!((mean(&mut || rng.uniform().powi(2)) - 1.0 / 3.0).abs() < 0.003);
        assert!(mean(&mut || rng.normal()).abs() < 0.01);
        assert!((mean(&mut || rng.normal().powi(2)) - 1.0).abs() < 0.02);
        assert!(mean(&mut || rng.normal().powi(3)).abs() < 0.06);
        assert!((mean(&mut || rng.normal().powi(4)) - 3.0).abs() < 0.15);
        // Neighbouring streams are uncorrelated.
        let (mut a, mut b) = (Rng::new(3, 1), Rng::new(3, 2));
        assert!(mean(&mut || a.normal() * b.normal()).abs() < 0.01);
    }

    #[test]
    fn below_is_even() {
        let mut rng = Rng::new(5, 0);
        let mut counts = [0u32; 7];
        for _ in 0..70_000 {
            counts[rng.below(7) as usize] += 1;
        }
        assert!(counts.iter().all(|&c| (9_600..10_400).contains(&c)), "{counts:?}");
        assert_eq!((rng.below(0), rng.below(1)), (0, 0));
    }

    #[test]
    fn a_permutation_is_a_bijection() {
        for n in [1u64, 2, 3, 4, 5, 7, 16, 17, 1000, 4096, 4097] {
            for epoch in 0..3 {
                let permutation = Permutation::new(9, epoch, n);
                let mut seen = vec![false; n as usize];
                for index in 0..n {
                    let image = permutation.at(index) as usize;
                    assert!(!std::mem::replace(&mut seen[image], true), "n {n} epoch {epoch}: {image} twice");
                }
            }
        }
    }

    #[test]
    fn a_permutation_shuffles_and_differs_between_epochs() {
        let n = 4097;
        let order = |epoch| {
            let permutation = Permutation::new(9, epoch, n);
            (0..n).map(|i| permutation.at(i)).collect::<Vec<u64>>()
        };
        let (first, second) = (order(0), order(1));
        let fixed = |a: &[u64]| a.iter().zip(0..).filter(|&(&x, i)| x == i).count();
        assert!(fixed(&first) < 10);
        assert!(first.iter().zip(&second).filter(|(a, b)| a == b).count() < 10);
        // The mean step between neighbours of a random order is n / 3.
        let steps: u64 = first.windows(2).map(|w| w[0].abs_diff(w[1])).sum();
        let mean = steps as f64 / (n - 1) as f64;
        assert!((mean / (n as f64 / 3.0) - 1.0).abs() < 0.05, "{mean}");
        // Every order of three is reached.
        let orders: std::collections::HashSet<Vec<u64>> =
            (0..200).map(|e| Permutation::new(1, e, 3)).map(|p| (0..3).map(|i| p.at(i)).collect()).collect();
        assert_eq!(orders.len(), 6);
        // The largest range works too.
        assert!(Permutation::new(1, 0, u64::MAX).at(u64::MAX - 1) < u64::MAX);
    }
}
