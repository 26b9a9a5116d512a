//! AVX512-BF16: sums of two products a lane.

use std::arch::x86_64::{
    __cpuid, __m256bh, __m256i, __m512bh, __m512i, _mm512_cvtepu16_epi32, _mm512_cvtne2ps_pbh,
    _mm512_cvtneps_pbh, _mm512_dpbf16_ps, _mm512_loadu_ps, _mm512_loadu_si512, _mm512_or_si512,
    _mm512_permutex2var_epi32, _mm512_set1_epi32, _mm512_setr_epi32, _mm512_setzero_ps, _mm512_setzero_si512,
    _mm512_slli_epi32, _mm512_storeu_ps, _mm512_storeu_si512,
};
use std::mem::transmute;

use super::packed::{COLUMNS, Kernel, SIDE};

/// The kernel.
pub(super) struct Avx512;

/// Whether the processor has the instructions.
pub(super) fn has_avx512() -> bool {
    is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bf16")
}

/// Whether they are faster than the same product in f32: Intel's processors take twice as long.
pub(super) fn is_gain() -> bool {
    let leaf = __cpuid(0);
    [leaf.ebx, leaf.edx, leaf.ecx].map(u32::to_le_bytes).as_flattened() == b"AuthenticAMD"
}

/// With so many, sums of 32 columns fill 24 of AVX-512's 32 registers.
const ROWS: usize = 12;

impl Kernel for Avx512 {
    const ROWS: usize = ROWS;

    fn vectorize(&self, pack: impl FnOnce()) {
        // SAFETY: the processor has the instructions, or there were no value of this type.
        unsafe { vectorize(pack) }
    }

    #[inline(always)]
    fn neighbours(&self, numbers: &[f32; 2 * SIDE], pairs: &mut [u32; SIDE]) {
        // SAFETY: as above.
        unsafe { neighbours(numbers, pairs) }
    }

    #[inline(always)]
    fn across(&self, low: &[f32; SIDE], high: &[f32; SIDE], pairs: &mut [u32; SIDE]) {
        // SAFETY: as above.
        unsafe { across(low, high, pairs) }
    }

    #[inline(always)]
    fn turn(&self, square: &mut [[u32; SIDE]; SIDE]) {
        // SAFETY: as above.
        unsafe { turn(square) }
    }

    fn ready() -> Avx512 {
        assert!(has_avx512());
        Avx512
    }

    fn multiply(&self, a: &[u32], b: &[u32], sums: &mut [f32]) {
        // SAFETY: the processor has the instructions, or there were no value of this type.
        unsafe { product(a, b, sums) }
    }
}

/// See [`Kernel::multiply`].
///
/// # Safety
/// The processor has the instructions.
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn product(a: &[u32], b: &[u32], sums: &mut [f32]) {
    let mut lanes = [[_mm512_setzero_ps(); COLUMNS / 16]; ROWS];
    let steps = a.as_chunks::<{ ROWS * SIDE }>().0.iter().zip(b.as_chunks::<{ SIDE * COLUMNS }>().0);
    for (a, b) in steps {
        for (p, b) in b.as_chunks::<COLUMNS>().0.iter().enumerate() {
            // SAFETY: b has COLUMNS numbers; a vector of bf16 is 512 bits like any other.
            let b: [__m512bh; COLUMNS / 16] = unsafe {
                [
                    transmute::<__m512i, __m512bh>(_mm512_loadu_si512(b.as_ptr().cast())),
                    transmute::<__m512i, __m512bh>(_mm512_loadu_si512(b.as_ptr().add(16).cast())),
                ]
            };
            for (r, lanes) in lanes.iter_mut().enumerate() {
                // SAFETY: as above.
                let a: __m512bh = unsafe { transmute(_mm512_set1_epi32(a[r * SIDE + p] as i32)) };
                for (lanes, b) in lanes.iter_mut().zip(b) {
                    *lanes = _mm512_dpbf16_ps(*lanes, a, b);
                }
            }
        }
    }
    for (lanes, sums) in lanes.as_flattened().iter().zip(sums.chunks_exact_mut(16)) {
        // SAFETY: 16 numbers.
        unsafe { _mm512_storeu_ps(sums.as_mut_ptr(), *lanes) };
    }
}

/// See [`Kernel::vectorize`].
///
/// # Safety
/// The processor has the instructions, as for all that follows.
#[target_feature(enable = "avx512f,avx512bf16")]
pub(super) unsafe fn vectorize(pack: impl FnOnce()) {
    pack();
}

/// See [`Kernel::neighbours`].
#[target_feature(enable = "avx512f,avx512bf16")]
#[inline]
pub(super) unsafe fn neighbours(numbers: &[f32; 2 * SIDE], pairs: &mut [u32; SIDE]) {
    // SAFETY: there are 32 numbers and 16 pairs; a vector of bf16 is 512 bits like any other.
    unsafe {
        let low = _mm512_loadu_ps(numbers.as_ptr());
        let high = _mm512_loadu_ps(numbers.as_ptr().add(SIDE));
        _mm512_storeu_si512(
            pairs.as_mut_ptr().cast(),
            transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low)),
        );
    }
}

/// See [`Kernel::across`].
#[target_feature(enable = "avx512f,avx512bf16")]
#[inline]
pub(super) unsafe fn across(low: &[f32; SIDE], high: &[f32; SIDE], pairs: &mut [u32; SIDE]) {
    // SAFETY: there are 16 numbers each and 16 pairs; 16 bf16 numbers are 256 bits.
    unsafe {
        let low = _mm512_cvtepu16_epi32(transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(_mm512_loadu_ps(
            low.as_ptr(),
        ))));
        let high = _mm512_cvtepu16_epi32(transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(
            _mm512_loadu_ps(high.as_ptr()),
        )));
        let both = _mm512_or_si512(_mm512_slli_epi32::<16>(high), low);
        _mm512_storeu_si512(pairs.as_mut_ptr().cast(), both);
    }
}

/// See [`Kernel::turn`]. Four times over, rows i and i + 8 become rows 2 i and 2 i + 1, their numbers in turns.
#[target_feature(enable = "avx512f,avx512bf16")]
#[inline]
pub(super) unsafe fn turn(square: &mut [[u32; SIDE]; SIDE]) {
    const HALF: usize = SIDE / 2;
    let mut rows = [_mm512_setzero_si512(); SIDE];
    for (row, square) in rows.iter_mut().zip(&*square) {
        // SAFETY: a row is 512 bits.
        *row = unsafe { _mm512_loadu_si512(square.as_ptr().cast()) };
    }
    let first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    let second = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    for _ in 0..SIDE.ilog2() {
        let before = rows;
        for i in 0..HALF {
            rows[2 * i] = _mm512_permutex2var_epi32(before[i], first, before[i + HALF]);
            rows[2 * i + 1] = _mm512_permutex2var_epi32(before[i], second, before[i + HALF]);
        }
    }
    for (row, square) in rows.iter().zip(square) {
        // SAFETY: as above.
        unsafe { _mm512_storeu_si512(square.as_mut_ptr().cast(), *row) };
    }
}
