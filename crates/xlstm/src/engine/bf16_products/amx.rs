//! AMX: products of tiles of 16 rows by 16 pairs. The language has no functions for these
//! instructions yet, so they are written out.

use std::arch::asm;
use std::arch::x86_64::__cpuid_count;

use super::packed::{COLUMNS, Kernel, pack_in_rows};
use crate::engine::matrix::MatRef;

/// Two tiles of A by two of B: four of sums.
pub(super) struct Amx;

/// Rows of a tile, pairs of a row of A, and columns of B.
const TILE: usize = 16;

/// What `ldtilecfg` reads: eight tiles of 16 rows of 64 bytes.
#[repr(C, align(64))]
struct Configuration {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    bytes: [u16; 16],
    rows: [u8; 16],
}

/// Whether the processor has AMX for bf16 and the system lets this process use it.
pub(super) fn is_usable() -> bool {
    const BF16: u32 = 1 << 22;
    const TILES: u32 = 1 << 24;
    if !is_x86_feature_detected!("avx512f") || __cpuid_count(7, 0).edx & (BF16 | TILES) != BF16 | TILES {
        return false;
    }
    // The state of tiles is large: Linux wants to be asked, once a process. Asking again is free.
    const ARCH_PRCTL: usize = 158;
    const REQUEST_PERMISSION: usize = 0x1023;
    const TILE_DATA: usize = 18;
    let mut result = ARCH_PRCTL;
    // SAFETY: a system call with two numbers, which touches no memory of ours.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") result,
            in("rdi") REQUEST_PERMISSION,
            in("rsi") TILE_DATA,
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack)
        );
    }
    result == 0
}

impl Kernel for Amx {
    const ROWS: usize = 2 * TILE;
    const PAIRS: usize = TILE;

    #[inline(always)]
    fn pack(a: MatRef<'_, f32>, first: usize, inner: [usize; 2], panel: &mut [u32]) {
        pack_in_rows::<{ Amx::ROWS }>(a, first, inner, panel);
    }

    fn begin() {
        let mut bytes = [0; 16];
        let mut rows = [0; 16];
        bytes[..8].fill(4 * TILE as u16);
        rows[..8].fill(TILE as u8);
        let configuration = Configuration { palette: 1, start_row: 0, reserved: [0; 14], bytes, rows };
        // SAFETY: kernels run only where `is_usable`, and the configuration is one that it has.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const configuration, options(nostack, readonly)) };
    }

    fn end() {
        // SAFETY: as above.
        unsafe { asm!("tilerelease", options(nostack, nomem)) };
    }

    unsafe fn product(a: &[u32], b: &[u32], sums: &mut [f32]) {
        let pairs = b.len() / COLUMNS;
        let steps = pairs / TILE;
        assert!(steps > 0 && a.len() == Self::ROWS * pairs && sums.len() == Self::ROWS * COLUMNS);
        let (row, below) = (4 * pairs, a[TILE * pairs..].as_ptr());
        let to = sums.as_mut_ptr();
        // SAFETY: tiles are as `begin` says; the loop reads `steps` tiles of 16 rows of 64 bytes from
        // each half of a, `row` bytes apart, and from b, 128 bytes apart, which is all of both; four
        // tiles of sums are all of `sums`.
        unsafe {
            asm!(
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                "2:",
                "tileloadd tmm4, [{a} + {row}*1]",
                "tileloadd tmm6, [{b} + {wide}*1]",
                "tileloadd tmm7, [{b} + {wide}*1 + 64]",
                "tileloadd tmm5, [{below} + {row}*1]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "add {a}, 64",
                "add {below}, 64",
                "add {b}, 2048",
                "dec {steps}",
                "jnz 2b",
                "tilestored [{to} + {wide}*1], tmm0",
                "tilestored [{to} + {wide}*1 + 64], tmm1",
                "tilestored [{to} + {wide}*1 + 2048], tmm2",
                "tilestored [{to} + {wide}*1 + 2112], tmm3",
                a = inout(reg) a.as_ptr() => _,
                below = inout(reg) below => _,
                b = inout(reg) b.as_ptr() => _,
                steps = inout(reg) steps => _,
                row = in(reg) row,
                wide = in(reg) 4 * COLUMNS,
                to = in(reg) to,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack)
            );
        }
    }
}
