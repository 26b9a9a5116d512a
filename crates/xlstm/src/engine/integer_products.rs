//! Products of a few rows of activations with quantised weights, in integers.
//!
//! The activations are put into groups of 8 bits as the weights are, so that a group's part of a
//! sum is exact:
//!
//! ```text
//! y = Σ_groups scale_w scale_x Σ_i code_w,i code_x,i
//! ```
//!
//! Sums of groups are in f32, lane by lane in an order that all instruction sets share. In f64
//! (`projection.rs`) nothing is rounded: weights are widened and multiplied with the activations as
//! they are.

use super::precision::from_bf16;
use super::quantized::{Code, GROUP, Quantized, nearest_integer, signed};
use super::vector::{sum, vectorize};

/// Codes of a product's sum that one 32-bit lane adds up.
const LANE: usize = 4;

/// A row of activations in groups of 8 bits.
#[derive(Clone, Copy, Debug, Default)]
pub struct Activations<'a> {
    codes: &'a [i8],
    /// One a group.
    scales: &'a [f32],
    /// What the sum of each lane starts from: it takes out the offset of the weights' codes.
    start: &'a [i32],
}

/// Numbers of work space, each of 32 bits, for a row of `inner` activations.
pub fn activation_space(inner: usize) -> usize {
    inner / LANE * 2 + inner / GROUP
}

impl<'a> Activations<'a> {
    fn assert_groups(&self, groups: usize) {
        assert_eq!(self.scales.len(), groups);
        assert_eq!(self.codes.len(), groups * GROUP);
        assert_eq!(self.start.len(), groups * GROUP / LANE);
    }

    /// The nearest codes of a row of a whole number of groups, for a product with weights of
    /// `code`.
    pub fn new(x: &[f32], code: Code, space: &'a mut [f32]) -> Activations<'a> {
        let inner = x.len();
        let (scales, rest) = space.split_at_mut(inner / GROUP);
        let (codes, start) = rest.split_at_mut(inner / LANE);
        let codes: &mut [i8] = bytemuck::cast_slice_mut(codes);
        let start: &mut [i32] = bytemuck::cast_slice_mut(&mut start[..inner / LANE]);
        let offset = code.offset();
        vectorize!(|| {
            for (group, x) in x.chunks_exact(GROUP).enumerate() {
                let mut most = [0.0_f32; 16];
                for i in 0..16 {
                    most[i] = larger(x[i].abs(), x[i + 16].abs());
                }
                let mut largest = 0.0;
                for m in most {
                    largest = larger(m, largest);
                }
                let scale = largest / 127.0;
                let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
                scales[group] = scale;
                let codes = &mut codes[group * GROUP..][..GROUP];
                for i in 0..GROUP {
                    codes[i] = nearest_integer(x[i] * inverse) as i8;
                }
                let start = &mut start[group * GROUP / LANE..][..GROUP / LANE];
                for (lane, start) in start.iter_mut().enumerate() {
                    let mut sum = 0;
                    for i in 0..LANE {
                        sum += i32::from(codes[lane * LANE + i]);
                    }
                    *start = -offset * sum;
                }
            }
        });
        Activations { codes, scales, start }
    }
}

/// The larger number, or the one that is none: a group's scale, and so the sum, then shows it.
#[inline(always)]
fn larger(a: f32, b: f32) -> f32 {
    if a > b || a.is_nan() { a } else { b }
}

/// Where the rows of a matrix of quantised weights lie.
#[derive(Clone, Copy, Debug)]
pub struct Rows<'a> {
    /// The matrix.
    pub weights: Quantized<'a>,
    /// Its first weight that counts, and how many from one row to the next: whole groups.
    pub first: usize,
    /// See `first`.
    pub stride: usize,
}

impl<'a> Rows<'a> {
    #[inline(always)]
    fn row(self, n: usize, inner: usize) -> Quantized<'a> {
        self.weights.at(self.first + n * self.stride, inner)
    }
}

/// y_nr = w_n · x_r for R rows of activations and the rows of W that y has room for: row n of y
/// begins at `n * stride`.
pub fn dots<const R: usize>(y: &mut [f32], stride: usize, x: &[Activations<'_>; R], w: Rows<'_>) {
    dots_with(Instructions::of_this_processor(), y, stride, x, w);
}

/// What products are computed with; all give the same bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Instructions {
    Plain,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Vnni,
}

impl Instructions {
    fn of_this_processor() -> Instructions {
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("avx512vnni")
            {
                return Instructions::Vnni;
            }
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                return Instructions::Avx2;
            }
        }
        Instructions::Plain
    }
}

/// See [`dots`]; the instructions are such as the processor has.
fn dots_with<const R: usize>(
    instructions: Instructions,
    y: &mut [f32],
    stride: usize,
    x: &[Activations<'_>; R],
    w: Rows<'_>,
) {
    let inner = x[0].codes.len();
    x.iter().for_each(|x| x.assert_groups(inner / GROUP));
    match instructions {
        Instructions::Plain => {
            for (n, y) in y.chunks_mut(stride).enumerate() {
                plain(y, x, w.row(n, inner));
            }
        }
        // SAFETY: the processor has the instructions, and every x has the groups of a row.
        #[cfg(target_arch = "x86_64")]
        Instructions::Avx2 => unsafe { avx2::rows(y, stride, x, w) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Instructions::Vnni => unsafe { vnni::rows(y, stride, x, w) },
    }
}

/// The loop over the rows of W around a `row` of the same instructions: in a function of its own
/// it would call that row by row, which short rows feel.
#[cfg(target_arch = "x86_64")]
macro_rules! all_rows {
    ($features:literal) => {
        /// All rows that y has room for.
        ///
        /// # Safety
        /// Every `x` has as many groups as a row of `w`.
        #[target_feature(enable = $features)]
        pub unsafe fn rows<const R: usize>(
            y: &mut [f32],
            stride: usize,
            x: &[Activations<'_>; R],
            w: Rows<'_>,
        ) {
            let inner = x[0].codes.len();
            for (n, y) in y.chunks_mut(stride).enumerate() {
                let w = w.row(n, inner);
                // SAFETY: by the contract.
                match w.code {
                    Code::Int8 => unsafe { row::<R, true>(y, x, w) },
                    Code::Int4 => unsafe { row::<R, false>(y, x, w) },
                }
            }
        }
    };
}

/// Partial sums of a row: lanes of 16, and of two groups each, in turn.
const PARTS: usize = 2;

/// A row of W without special instructions.
fn plain<const R: usize>(y: &mut [f32], x: &[Activations<'_>; R], w: Quantized<'_>) {
    const LANES: usize = GROUP / LANE;
    vectorize!(|| for r in 0..R {
        let mut sums = [[0.0_f32; 2 * LANES]; PARTS];
        let groups = w.codes.chunks_exact(w.code.group_bytes()).zip(w.scales);
        for (group, (codes, &scale)) in groups.enumerate() {
            let codes = signed(w.code, codes);
            let own = &x[r].codes[group * GROUP..][..GROUP];
            let scale = from_bf16(scale) * x[r].scales[group];
            let sums = &mut sums[group / 2 % PARTS][group % 2 * LANES..][..LANES];
            for (lane, sum) in sums.iter_mut().enumerate() {
                let mut product = 0;
                for i in lane * LANE..(lane + 1) * LANE {
                    product += i32::from(codes[i]) * i32::from(own[i]);
                }
                *sum = (product as f32).mul_add(scale, *sum);
            }
        }
        let mut all = sums[0];
        for lane in 0..2 * LANES {
            all[lane] += sums[1][lane];
        }
        y[r] = sum(&all);
    });
}

/// With the byte products of AVX2.
#[cfg(target_arch = "x86_64")]
mod avx2 {
    use std::arch::x86_64::*;

    use super::{Activations, Code, GROUP, LANE, PARTS, Quantized, Rows, from_bf16, sum};

    /// Sums of groups.
    const SUMS: usize = 2 * PARTS;

    /// Groups whose scales are multiplied together.
    const SCALES: usize = 8;

    all_rows!("avx2,fma");

    /// A row of W, a group at a time.
    ///
    /// # Safety
    /// Every `x` has as many groups as `w`.
    #[inline]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn row<const R: usize, const EIGHT: bool>(
        y: &mut [f32],
        x: &[Activations<'_>; R],
        w: Quantized<'_>,
    ) {
        let groups = w.scales.len();
        // What the loads below rest on, with the contract.
        assert_eq!(w.codes.len(), groups * w.code.group_bytes());
        let mut sums = [[_mm256_setzero_ps(); SUMS]; R];
        let whole = groups / SCALES * SCALES;
        let mut scales = [[0.0_f32; SCALES]; R];
        // SAFETY: all groups are there by the assertions.
        unsafe {
            for first in (0..whole).step_by(SCALES) {
                let own = _mm256_cvtepu16_epi32(_mm_loadu_si128(w.scales.as_ptr().add(first).cast()));
                let own = _mm256_castsi256_ps(_mm256_slli_epi32(own, 16));
                for r in 0..R {
                    let both = _mm256_mul_ps(own, _mm256_loadu_ps(x[r].scales.as_ptr().add(first)));
                    _mm256_storeu_ps(scales[r].as_mut_ptr(), both);
                }
                // Written out by the compiler, so that the sums stay in registers.
                for i in 0..SCALES {
                    add_group::<R, EIGHT>(&mut sums, i, x, w, &scales, first + i);
                }
            }
            for (scales, x) in scales.iter_mut().zip(x) {
                let own = w.scales[whole..].iter().zip(&x.scales[whole..]);
                scales.iter_mut().zip(own).for_each(|(to, (w, x))| *to = from_bf16(*w) * x);
            }
            for i in 0..groups - whole {
                add_group::<R, EIGHT>(&mut sums, i, x, w, &scales, whole + i);
            }
        }
        for r in 0..R {
            let mut lanes = [0.0_f32; 16];
            for half in 0..2 {
                let all = _mm256_add_ps(sums[r][half], sums[r][2 + half]);
                // SAFETY: 8 numbers have room behind the first 8 of each half.
                unsafe { _mm256_storeu_ps(lanes[8 * half..].as_mut_ptr(), all) };
            }
            y[r] = sum(&lanes);
        }
    }

    /// Adds a group, 32 codes in 8 lanes, to its sum; its scales are those of place `i`.
    ///
    /// # Safety
    /// The group is there in `w` and in every `x`.
    #[inline]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn add_group<const R: usize, const EIGHT: bool>(
        sums: &mut [[__m256; SUMS]; R],
        i: usize,
        x: &[Activations<'_>; R],
        w: Quantized<'_>,
        scales: &[[f32; SCALES]; R],
        group: usize,
    ) {
        // SAFETY: what is read is the group's, by the contract.
        unsafe {
            let codes = match EIGHT {
                true => _mm256_loadu_si256(w.codes.as_ptr().add(group * GROUP).cast()),
                // From 0.
                false => {
                    let halves = _mm_loadu_si128(w.codes.as_ptr().add(group * GROUP / 2).cast());
                    let both = _mm256_set_m128i(_mm_srli_epi16(halves, 4), halves);
                    _mm256_and_si256(both, _mm256_set1_epi8(15))
                }
            };
            for r in 0..R {
                let x_codes = _mm256_loadu_si256(x[r].codes.as_ptr().add(group * GROUP).cast());
                let products = match EIGHT {
                    // Neither pair of products, each of at most 127 squared, leaves 16 bits.
                    true => {
                        let signed = _mm256_sign_epi8(x_codes, codes);
                        let pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(codes), signed);
                        _mm256_madd_epi16(pairs, _mm256_set1_epi16(1))
                    }
                    false => {
                        let start = x[r].start.as_ptr().add(group * GROUP / LANE);
                        let pairs = _mm256_maddubs_epi16(codes, x_codes);
                        let products = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
                        _mm256_add_epi32(_mm256_loadu_si256(start.cast()), products)
                    }
                };
                let sum = &mut sums[r][i % SUMS];
                *sum = _mm256_fmadd_ps(_mm256_cvtepi32_ps(products), _mm256_set1_ps(scales[r][i]), *sum);
            }
        }
    }
}

/// With the byte products of AVX-512.
#[cfg(target_arch = "x86_64")]
mod vnni {
    use std::arch::x86_64::*;

    use super::{Activations, Code, GROUP, LANE, PARTS, Quantized, Rows, sum};

    /// Groups whose scales are read together.
    const BLOCK: usize = 16;

    all_rows!("avx512f,avx512bw,avx512vl,avx512vnni");

    /// A row of W, two groups at a time: 64 codes in 16 lanes.
    ///
    /// # Safety
    /// Every `x` has as many groups as `w`.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
    unsafe fn row<const R: usize, const EIGHT: bool>(
        y: &mut [f32],
        x: &[Activations<'_>; R],
        w: Quantized<'_>,
    ) {
        let groups = w.scales.len();
        // What the loads below rest on, with the contract.
        assert_eq!(w.codes.len(), groups * w.code.group_bytes());
        let mut sums = [[_mm512_setzero_ps(); PARTS]; R];
        for first in (0..groups).step_by(BLOCK) {
            let count = BLOCK.min(groups - first);
            let mask = (1_u32 << count).wrapping_sub(1) as u16;
            // SAFETY: lanes beyond the last group are masked out.
            let scales = unsafe { _mm256_maskz_loadu_epi16(mask, w.scales[first..].as_ptr().cast()) };
            let scales = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(scales), 16));
            let mut own = [_mm512_setzero_ps(); R];
            for r in 0..R {
                // SAFETY: as above.
                let x = unsafe { _mm512_maskz_loadu_ps(mask, x[r].scales[first..].as_ptr()) };
                own[r] = _mm512_mul_ps(scales, x);
            }
            let pairs = count.div_ceil(2);
            let whole = pairs / PARTS * PARTS;
            // SAFETY: all groups are there by the assertions.
            unsafe {
                for pair in (0..whole).step_by(PARTS) {
                    // Written out by the compiler, so that the sums stay in registers.
                    for i in 0..PARTS {
                        add_pair::<R, EIGHT>(&mut sums, i, x, w, &own, [first, pair + i]);
                    }
                }
                for pair in whole..pairs {
                    add_pair::<R, EIGHT>(&mut sums, pair - whole, x, w, &own, [first, pair]);
                }
            }
        }
        for r in 0..R {
            let mut lanes = [0.0_f32; 16];
            let all = _mm512_add_ps(sums[r][0], sums[r][1]);
            // SAFETY: 16 numbers have room.
            unsafe { _mm512_storeu_ps(lanes.as_mut_ptr(), all) };
            y[r] = sum(&lanes);
        }
    }

    /// Adds pair `pair` of the groups from `first` on, 64 codes in 16 lanes, to the sums of place
    /// `i`; `scales` are those groups' scales, of both factors.
    ///
    /// # Safety
    /// The pair, or its first group where that is the last, is there in `w` and in every `x`.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
    unsafe fn add_pair<const R: usize, const EIGHT: bool>(
        sums: &mut [[__m512; PARTS]; R],
        i: usize,
        x: &[Activations<'_>; R],
        w: Quantized<'_>,
        scales: &[__m512; R],
        [first, pair]: [usize; 2],
    ) {
        let group = first + 2 * pair;
        // The first group's scale in the lower lanes, the second's in the upper.
        let index = _mm512_add_epi32(
            _mm512_set1_epi32(2 * pair as i32),
            _mm512_set_epi32(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0),
        );
        let (bytes, halves, lanes) = match group + 1 == w.scales.len() {
            true => (0xffff_ffff, 0xffff, 0xff),
            false => (u64::MAX, u32::MAX, u16::MAX),
        };
        // SAFETY: both groups are there by the contract; of one alone, the rest is masked out.
        unsafe {
            let codes = match EIGHT {
                true => {
                    let codes = _mm512_maskz_loadu_epi8(bytes, w.codes.as_ptr().add(group * GROUP).cast());
                    _mm512_xor_si512(codes, _mm512_set1_epi8(-128))
                }
                false => {
                    let from = w.codes.as_ptr().add(group * GROUP / 2);
                    let halves = _mm256_maskz_loadu_epi8(halves, from.cast());
                    let twice = _mm512_permutexvar_epi64(
                        _mm512_set_epi64(3, 2, 3, 2, 1, 0, 1, 0),
                        _mm512_castsi256_si512(halves),
                    );
                    let codes = _mm512_srlv_epi64(twice, _mm512_set_epi64(4, 4, 0, 0, 4, 4, 0, 0));
                    _mm512_and_si512(codes, _mm512_set1_epi8(15))
                }
            };
            for r in 0..R {
                let x_codes = _mm512_maskz_loadu_epi8(bytes, x[r].codes.as_ptr().add(group * GROUP));
                let start = _mm512_maskz_loadu_epi32(lanes, x[r].start.as_ptr().add(group * GROUP / LANE));
                let products = _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(start, codes, x_codes));
                let scale = _mm512_permutexvar_ps(index, scales[r]);
                sums[r][i] = _mm512_fmadd_ps(products, scale, sums[r][i]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::quantized::quantize;
    use crate::rng::Rng;

    const CODES: [Code; 2] = [Code::Int8, Code::Int4];

    fn numbers(count: usize, seed: u64) -> Vec<f32> {
        let mut rng = Rng::new(seed, 0);
        (0..count).map(|_| rng.normal() as f32).collect()
    }

    fn quantized(code: Code, weights: &[f32]) -> (Vec<u8>, Vec<u16>) {
        let (mut codes, mut scales) = (Vec::new(), Vec::new());
        quantize(code, weights, &mut codes, &mut scales);
        (codes, scales)
    }

    #[test]
    fn products_are_those_of_the_codes() {
        for code in CODES {
            for groups in [1, 2, 3, 4, 15, 16, 17, 20, 33, 64] {
                let inner = groups * GROUP;
                let weights = numbers(3 * (inner + GROUP), 2);
                let (codes, scales) = quantized(code, &weights);
                let weights = Quantized { code, codes: &codes, scales: &scales };
                let w = Rows { weights, first: GROUP, stride: inner + GROUP };
                let x = numbers(4 * inner, 3);
                let mut spaces = vec![vec![0.0; activation_space(inner)]; 4];
                let mut rows = spaces.iter_mut().zip(x.chunks(inner));
                let x: [Activations; 4] = std::array::from_fn(|_| {
                    let (space, x) = rows.next().unwrap();
                    Activations::new(x, code, space)
                });
                // (3, 5), the last of each row not written to.
                let mut y = [f32::NAN; 14];
                dots(&mut y, 5, &x, w);
                let bits = |y: &[f32]| y.iter().map(|y| y.to_bits()).collect::<Vec<_>>();
                let best = Instructions::of_this_processor();
                let mut others = vec![Instructions::Plain];
                // All processors with AVX-512 have AVX2.
                #[cfg(target_arch = "x86_64")]
                if best != Instructions::Plain {
                    others.push(Instructions::Avx2);
                }
                for other in others {
                    let mut again = [f32::NAN; 14];
                    dots_with(other, &mut again, 5, &x, w);
                    assert_eq!(bits(&again), bits(&y), "{code:?}, {groups} groups: {other:?} and {best:?}");
                }
                for (n, y) in y.chunks(5).enumerate() {
                    let mut wide = vec![0.0_f64; inner];
                    w.row(n, inner).widen(&mut wide);
                    for r in 0..4 {
                        let x = |i: usize| f64::from(x[r].codes[i]) * f64::from(x[r].scales[i / GROUP]);
                        let want: f64 = (0..inner).map(|i| wide[i] * x(i)).sum();
                        let error = (f64::from(y[r]) - want).abs();
                        assert!(error < 1e-6 * inner as f64, "{code:?} {groups}: {} and {want}", y[r]);
                    }
                    let mut one = [0.0];
                    dots(&mut one, 1, &[x[2]], Rows { first: w.first + n * w.stride, ..w });
                    assert_eq!(one[0], y[2], "one row and several");
                }
            }
        }
    }

    #[test]
    fn activations_are_rounded_to_the_nearest_code() {
        let mut x = numbers(GROUP * 3, 5);
        x[GROUP..2 * GROUP].fill(0.0);
        let mut space = vec![f32::NAN; activation_space(x.len())];
        let rounded = Activations::new(&x, Code::Int8, &mut space);
        for (i, x) in x.iter().enumerate() {
            let scale = rounded.scales[i / GROUP];
            assert!((f32::from(rounded.codes[i]) * scale - x).abs() <= scale * 0.5001, "{i}");
        }
        assert!(rounded.codes.iter().any(|code| code.abs() == 127));
    }

    #[test]
    fn a_sum_of_what_is_no_number_is_none() {
        for code in CODES {
            for (at, bad) in [(3, f32::NAN), (20, f32::NAN), (31, f32::INFINITY)] {
                let (codes, scales) = quantized(code, &numbers(2 * GROUP, 2));
                let weights = Quantized { code, codes: &codes, scales: &scales };
                let mut x = numbers(2 * GROUP, 3);
                x[GROUP + at] = bad;
                let mut space = vec![0.0; activation_space(x.len())];
                let mut y = [0.0];
                let w = Rows { weights, first: 0, stride: 2 * GROUP };
                dots(&mut y, 1, &[Activations::new(&x, code, &mut space)], w);
                assert!(!y[0].is_finite(), "{code:?}, {bad} at {at}: {}", y[0]);
            }
        }
    }
}
