//! AMX: products of tiles of 16 rows and 16 pairs, of which Intel's server processors since 2023 have eight.

use std::arch::asm;
use std::arch::x86_64::{__cpuid, __cpuid_count};
use std::marker::PhantomData;
use std::sync::LazyLock;

use super::avx512;
use super::packed::{COLUMNS, Kernel, PAIRS, SIDE};

/// The kernel: tiles 0 to 3 hold a square of sums, two by two; 4 and 5 rows of A, 6 and 7 columns of B. Tiles are set
/// up for a thread, which the value does not leave.
pub(super) struct Amx(PhantomData<*const ()>);

/// Whether the processor has AMX with bf16, and AVX512-BF16 to pack for it, and the system lets this process use it.
pub(super) fn has_amx() -> bool {
    static HAS: LazyLock<bool> = LazyLock::new(|| avx512::has_avx512() && is_there() && is_allowed());
    *HAS
}

/// What the processor says of itself: AMX-BF16 and AMX-TILE.
fn is_there() -> bool {
    let leaf = if __cpuid(0).eax >= 7 { __cpuid_count(7, 0).edx } else { 0 };
    leaf >> 22 & 1 == 1 && leaf >> 24 & 1 == 1
}

/// Asks the system to keep the tiles with a thread's other registers, which it does not do unasked: a
/// process that uses them without is ended.
#[cfg(target_os = "linux")]
fn is_allowed() -> bool {
    const ARCH_PRCTL: i64 = 158;
    const ARCH_REQ_XCOMP_PERM: u64 = 0x1023;
    const XTILEDATA: u64 = 18;
    let result: i64;
    // SAFETY: the call reads its two numbers, and changes nothing but what this process may use.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") ARCH_PRCTL => result,
            in("rdi") ARCH_REQ_XCOMP_PERM,
            in("rsi") XTILEDATA,
            out("rcx") _,
            out("r11") _,
            options(nostack),
        );
    }
    result == 0
}

/// How other systems are asked is not known here.
#[cfg(not(target_os = "linux"))]
fn is_allowed() -> bool {
    false
}

/// Of tiles: the first of `palette`, 16 rows of 64 bytes each.
#[repr(C, align(64))]
struct Configuration {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

static CONFIGURATION: Configuration = Configuration {
    palette: 1,
    start_row: 0,
    reserved: [0; 14],
    row_bytes: [64, 64, 64, 64, 64, 64, 64, 64, 0, 0, 0, 0, 0, 0, 0, 0],
    rows: [16, 16, 16, 16, 16, 16, 16, 16, 0, 0, 0, 0, 0, 0, 0, 0],
};

impl Drop for Amx {
    fn drop(&mut self) {
        // SAFETY: the tiles of this thread hold nothing that anybody reads.
        unsafe { asm!("tilerelease", options(nostack, nomem)) };
    }
}

impl Kernel for Amx {
    const ROWS: usize = 2 * SIDE;

    fn vectorize(&self, pack: impl FnOnce()) {
        // SAFETY: the processor has AVX512-BF16 too, or there were no value of this type.
        unsafe { avx512::vectorize(pack) }
    }

    #[inline(always)]
    fn neighbours(&self, numbers: &[f32; 2 * SIDE], pairs: &mut [u32; SIDE]) {
        // SAFETY: as above.
        unsafe { avx512::neighbours(numbers, pairs) }
    }

    #[inline(always)]
    fn across(&self, low: &[f32; SIDE], high: &[f32; SIDE], pairs: &mut [u32; SIDE]) {
        // SAFETY: as above.
        unsafe { avx512::across(low, high, pairs) }
    }

    #[inline(always)]
    fn turn(&self, square: &mut [[u32; SIDE]; SIDE]) {
        // SAFETY: as above.
        unsafe { avx512::turn(square) }
    }

    fn ready() -> Amx {
        assert!(has_amx());
        // SAFETY: the processor has the instruction, the system allows it, and the 64 bytes are as it
        // wants them.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &CONFIGURATION, options(nostack, readonly)) };
        Amx(PhantomData)
    }

    fn multiply(&self, a: &[u32], b: &[u32], sums: &mut [f32]) {
        let steps = b.len() / COLUMNS / SIDE;
        assert!(a.len() == Self::ROWS * PAIRS && steps * SIDE <= PAIRS && sums.len() == Self::ROWS * COLUMNS);
        if steps == 0 {
            return sums.fill(0.0);
        }
        // SAFETY: a step reads two squares of A, one after the other, and 16 rows of B, COLUMNS apart; there
        // are as many, by the assertion, as sums that are written. A prefetch, of A two steps ahead, may have any
        // address. The tiles were set up by `ready`, on this thread, as the value cannot be sent to another.
        unsafe {
            asm!(
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                "2:",
                "tileloadd tmm6, [{b} + {b_stride}]",
                "tileloadd tmm4, [{a} + {a_stride}]",
                "tileloadd tmm7, [{b} + {b_stride} + 64]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "prefetcht0 [{a} + {ahead} + 0]",
                "prefetcht0 [{a} + {ahead} + 64]",
                "prefetcht0 [{a} + {ahead} + 128]",
                "prefetcht0 [{a} + {ahead} + 192]",
                "prefetcht0 [{a} + {ahead} + 256]",
                "prefetcht0 [{a} + {ahead} + 320]",
                "prefetcht0 [{a} + {ahead} + 384]",
                "prefetcht0 [{a} + {ahead} + 448]",
                "prefetcht0 [{a} + {ahead} + 512]",
                "prefetcht0 [{a} + {ahead} + 576]",
                "prefetcht0 [{a} + {ahead} + 640]",
                "tileloadd tmm5, [{low} + {a_stride}]",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "prefetcht0 [{a} + {ahead} + 704]",
                "prefetcht0 [{a} + {ahead} + 768]",
                "prefetcht0 [{a} + {ahead} + 832]",
                "prefetcht0 [{a} + {ahead} + 896]",
                "prefetcht0 [{a} + {ahead} + 960]",
                "prefetcht0 [{a} + {ahead} + 1024]",
                "prefetcht0 [{a} + {ahead} + 1088]",
                "prefetcht0 [{a} + {ahead} + 1152]",
                "prefetcht0 [{a} + {ahead} + 1216]",
                "prefetcht0 [{a} + {ahead} + 1280]",
                "prefetcht0 [{a} + {ahead} + 1344]",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "prefetcht0 [{a} + {ahead} + 1408]",
                "prefetcht0 [{a} + {ahead} + 1472]",
                "prefetcht0 [{a} + {ahead} + 1536]",
                "prefetcht0 [{a} + {ahead} + 1600]",
                "prefetcht0 [{a} + {ahead} + 1664]",
                "prefetcht0 [{a} + {ahead} + 1728]",
                "prefetcht0 [{a} + {ahead} + 1792]",
                "prefetcht0 [{a} + {ahead} + 1856]",
                "prefetcht0 [{a} + {ahead} + 1920]",
                "prefetcht0 [{a} + {ahead} + 1984]",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "add {a}, {a_step}",
                "add {low}, {a_step}",
                "add {b}, {b_step}",
                "dec {steps}",
                "jnz 2b",
                "tilestored [{sums} + {b_stride}], tmm0",
                "tilestored [{sums} + {b_stride} + 64], tmm1",
                "tilestored [{sums} + {b_stride} + {half}], tmm2",
                "tilestored [{sums} + {b_stride} + {half} + 64], tmm3",
                a = inout(reg) a.as_ptr() => _,
                low = inout(reg) a.as_ptr().add(SIDE * SIDE) => _,
                b = inout(reg) b.as_ptr() => _,
                steps = inout(reg) steps => _,
                sums = in(reg) sums.as_mut_ptr(),
                a_stride = in(reg) 4 * SIDE,
                b_stride = in(reg) 4 * COLUMNS,
                ahead = const 2 * 4 * Self::ROWS * SIDE,
                a_step = const 4 * Self::ROWS * SIDE,
                b_step = const 4 * COLUMNS * SIDE,
                half = const 4 * COLUMNS * SIDE,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            );
        }
    }
}
