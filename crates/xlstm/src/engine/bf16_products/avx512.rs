//! AVX512-BF16: sums of two products a lane.

use std::arch::x86_64::{
    __m512bh, __m512i, _mm512_dpbf16_ps, _mm512_loadu_si512, _mm512_set1_epi32, _mm512_setzero_ps,
    _mm512_storeu_ps,
};
use std::mem::transmute;

use super::packed::{COLUMNS, Kernel, pack_side_by_side};
use crate::engine::matrix::MatRef;

/// With 12 rows, sums fill 24 of the 32 registers.
pub(super) struct Avx512;

impl Kernel for Avx512 {
    const ROWS: usize = 12;
    const PAIRS: usize = 1;

    #[inline(always)]
    fn pack(a: MatRef<'_, f32>, first: usize, inner: [usize; 2], panel: &mut [u32]) {
        pack_side_by_side::<{ Avx512::ROWS }>(a, first, inner, panel);
    }

    unsafe fn product(a: &[u32], b: &[u32], sums: &mut [f32]) {
        // SAFETY: by the contract.
        unsafe { product(a, b, sums) }
    }
}

/// # Safety
/// The processor has the instructions.
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn product(a: &[u32], b: &[u32], sums: &mut [f32]) {
    let mut lanes = [[_mm512_setzero_ps(); COLUMNS / 16]; Avx512::ROWS];
    for (a, b) in a.chunks_exact(Avx512::ROWS).zip(b.chunks_exact(COLUMNS)) {
        // SAFETY: b has COLUMNS numbers; a vector of bf16 is 512 bits like any other.
        let b: [__m512bh; COLUMNS / 16] = unsafe {
            [
                transmute::<__m512i, __m512bh>(_mm512_loadu_si512(b.as_ptr().cast())),
                transmute::<__m512i, __m512bh>(_mm512_loadu_si512(b.as_ptr().add(16).cast())),
            ]
        };
        for (lanes, a) in lanes.iter_mut().zip(a) {
            // SAFETY: as above.
            let a: __m512bh = unsafe { transmute(_mm512_set1_epi32(*a as i32)) };
            for (lanes, b) in lanes.iter_mut().zip(b) {
                *lanes = _mm512_dpbf16_ps(*lanes, a, b);
            }
        }
    }
    for (lanes, sums) in lanes.as_flattened().iter().zip(sums.chunks_exact_mut(16)) {
        // SAFETY: 16 numbers.
        unsafe { _mm512_storeu_ps(sums.as_mut_ptr(), *lanes) };
    }
}
