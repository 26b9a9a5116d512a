//! AVX512-BF16: sums of two products a lane.

use std::arch::x86_64::{
    __cpuid, __m512bh, __m512i, _mm512_dpbf16_ps, _mm512_loadu_si512, _mm512_set1_epi32, _mm512_setzero_ps,
    _mm512_storeu_ps,
};
use std::mem::transmute;

use super::packed::{COLUMNS, Kernel, ROWS};

/// The kernel, where the processor has the instructions.
pub(super) fn kernel() -> Option<Kernel> {
    let has = is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bf16");
    // SAFETY: the processor has them.
    has.then_some(|a, b, sums| unsafe { product(a, b, sums) })
}

/// Whether they are faster than the same product in f32: Intel's processors take twice as long.
pub(super) fn is_gain() -> bool {
    let leaf = __cpuid(0);
    [leaf.ebx, leaf.edx, leaf.ecx].map(u32::to_le_bytes).as_flattened() == b"AuthenticAMD"
}

/// See [`Kernel`].
///
/// # Safety
/// The processor has the instructions.
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn product(a: &[u32], b: &[u32], sums: &mut [f32; ROWS * COLUMNS]) {
    let mut lanes = [[_mm512_setzero_ps(); COLUMNS / 16]; ROWS];
    for (a, b) in a.chunks_exact(ROWS).zip(b.chunks_exact(COLUMNS)) {
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
