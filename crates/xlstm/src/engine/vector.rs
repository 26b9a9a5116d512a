//! Plain loops as SIMD code: run-time dispatch, and the few loops that everything shares.

use super::scalar::Scalar;

/// Runs a closure without arguments, compiled for the widest instruction set of this
/// processor: `vectorize!(|| …)`.
///
/// A macro, because a large closure becomes SIMD code only if it is `#[inline(always)]`
/// itself; otherwise it silently stays baseline code, several times slower. What it calls
/// must be `#[inline(always)]` too.
macro_rules! vectorize {
    (|| $body:expr) => {
        $crate::engine::vector::dispatch(
            #[inline(always)]
            || $body,
        )
    };
}
pub(crate) use vectorize;

/// What [`vectorize!`] does with its closure.
#[inline(always)]
pub(crate) fn dispatch<R>(loops: impl FnOnce() -> R) -> R {
    struct Loops<F>(F);
    impl<R, F: FnOnce() -> R> pulp::NullaryFnOnce for Loops<F> {
        type Output = R;
        #[inline(always)]
        fn call(self) -> R {
            (self.0)()
        }
    }
    pulp::Arch::new().dispatch(Loops(loops))
}

/// Independent partial sums of a reduction: fixed, so that its rounding is the same on
/// every instruction set.
const LANES: usize = 16;

/// Sum of f(i) over 0..n in `LANES` interleaved partial sums.
#[inline(always)]
pub fn sum_of<T: Scalar>(n: usize, f: impl Fn(usize) -> T) -> T {
    let mut lanes = [T::ZERO; LANES];
    let whole = n / LANES * LANES;
    let mut i = 0;
    while i < whole {
        for (lane, sum) in lanes.iter_mut().enumerate() {
            *sum += f(i + lane);
        }
        i += LANES;
    }
    for (lane, sum) in lanes.iter_mut().enumerate().take(n - whole) {
        *sum += f(whole + lane);
    }
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            let other = lanes[lane + width];
            lanes[lane] += other;
        }
        width /= 2;
    }
    lanes[0]
}

/// Sum of a slice.
#[inline(always)]
pub fn sum<T: Scalar>(x: &[T]) -> T {
    sum_of(x.len(), |i| x[i])
}

/// Inner product of two slices of one length.
#[inline(always)]
pub fn dot<T: Scalar>(x: &[T], y: &[T]) -> T {
    let y = &y[..x.len()];
    let mut lanes = [T::ZERO; LANES];
    let mut xs = x.chunks_exact(LANES);
    let mut ys = y.chunks_exact(LANES);
    for (a, b) in (&mut xs).zip(&mut ys) {
        for lane in 0..LANES {
            lanes[lane] = a[lane].mul_add(b[lane], lanes[lane]);
        }
    }
    let mut total = T::ZERO;
    for (a, b) in xs.remainder().iter().zip(ys.remainder()) {
        total = a.mul_add(*b, total);
    }
    total + sum(&lanes)
}

/// y += a x.
#[inline(always)]
pub fn axpy<T: Scalar>(a: T, x: &[T], y: &mut [T]) {
    for (y, x) in y.iter_mut().zip(x) {
        *y = a.mul_add(*x, *y);
    }
}

/// y += x.
#[inline(always)]
pub fn add_to<T: Scalar>(x: &[T], y: &mut [T]) {
    for (y, x) in y.iter_mut().zip(x) {
        *y += *x;
    }
}
