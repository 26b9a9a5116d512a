//! The mLSTM cell: a matrix memory a head, written by outer products and read by queries.
//!
//! With s = dqk^-1/2, per head and token (all gates already through their activations):
//!
//! ```text
//! m_t = max(log f_t + m_{t-1}, log i_t)                       stabiliser
//! C_t = exp(log f_t + m_{t-1} - m_t) C_{t-1} + exp(log i_t - m_t) k_t v_t^T
//! n_t = exp(log f_t + m_{t-1} - m_t) n_{t-1} + exp(log i_t - m_t) k_t
//! d_t = s q_t . n_t
//! h_t = s q_t^T C_t / (max(|d_t|, exp(-m_t)) + eps)
//! ```
//!
//! from C = n = 0, m = 0. With a sigmoid input gate eps is relative to the unstabilised
//! normaliser, eps exp(-m_t), and the normaliser may be left out, h_t = exp(m_t) s q_t^T C_t.
//!
//! Three forms of the same function: `recurrent` (the equations above, a token at a time;
//! also the decode step), `parallel` (all pairs of tokens at once) and `chunkwise`
//! (pairs within a chunk, states between chunks), which training and prefill use.
//! Each has its own gradient; the recurrent one is the chain rule taken literally and is
//! what the others are tested against.

mod chunkwise;
mod chunkwise_backward;
#[cfg(feature = "cuda")]
mod cuda;
#[cfg(feature = "cuda")]
mod cuda_wide;
mod operation;
mod parallel;
mod recurrent;
#[cfg(test)]
mod tests;

pub use operation::{MlstmState, mlstm};

use super::{ForgetGate, InputGate};
use crate::engine::matrix::{MatMut, MatRef};
use crate::engine::{Scalar, vector};
use crate::ops::{PAD, RESET};

/// How the cell is computed. The result is the same, up to rounding (the parallel form has
/// no m_0, so that eps enters it a little differently).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// A token at a time.
    Recurrent,
    /// All pairs of tokens: quadratic in length, takes and gives no state.
    Parallel,
    /// Pairs within chunks of this many tokens, states between them.
    Chunkwise(usize),
}

/// The cell's options.
#[derive(Clone, Copy, Debug)]
pub struct MlstmConfig {
    /// Number of heads.
    pub heads: usize,
    /// Input gate activation.
    pub input_gate: InputGate,
    /// Forget gate activation.
    pub forget_gate: ForgetGate,
    /// Divide by the normaliser; may be false with a sigmoid input gate only.
    pub normalize: bool,
    /// Added to the normaliser.
    pub eps: f64,
    /// How to compute it.
    pub form: Form,
}

impl MlstmConfig {
    /// m of an empty state. The paper's is 0, which eps and the floor of the normaliser see.
    /// With a sigmoid input gate nothing sees it, and a value that loses every maximum keeps
    /// a wide open exponential forget gate from drowning the first tokens.
    fn empty_stabilizer<T: Scalar>(&self) -> T {
        match self.input_gate {
            InputGate::Exponential => T::ZERO,
            InputGate::Sigmoid => T::from_f64(-1e30),
        }
    }

    /// m of a given state: that of an empty one where it is empty.
    fn initial_stabilizer<T: Scalar>(&self, n: &[T], m: T) -> T {
        let empty = self.input_gate == InputGate::Sigmoid && n.iter().all(|n| *n == T::ZERO);
        if empty { self.empty_stabilizer() } else { m }
    }

    /// What divides the stabilised numerator: max(|d|, exp(-m)) + eps, or exp(-m) alone
    /// where h is not normalised.
    #[inline(always)]
    fn normalizer<T: Scalar>(&self, d: T, m: T) -> T {
        let floor = (-m).exp();
        let eps = T::from_f64(self.eps);
        match (self.normalize, self.input_gate) {
            (false, _) => floor,
            (true, InputGate::Exponential) => d.abs().max(floor) + eps,
            (true, InputGate::Sigmoid) => d.abs().max(floor) + eps * floor,
        }
    }

    /// From dh . h, d, m and the normaliser N: the gradients of d and (through eps, the
    /// only place where the stabiliser does not cancel) of m.
    #[inline(always)]
    fn normalizer_gradients<T: Scalar>(&self, dh_h: T, d: T, m: T, normalizer: T) -> (T, T) {
        if !self.normalize {
            return (T::ZERO, T::ZERO);
        }
        let slope = -dh_h / normalizer;
        let dd = if d.abs() > (-m).exp() { if d > T::ZERO { slope } else { -slope } } else { T::ZERO };
        let dm = match self.input_gate {
            InputGate::Exponential => slope * T::from_f64(self.eps),
            InputGate::Sigmoid => T::ZERO,
        };
        (dd, dm)
    }
}

/// One head of one sequence: S tokens.
struct HeadInput<'a, T> {
    /// (S, dqk), not scaled.
    q: MatRef<'a, T>,
    /// (S, dqk).
    k: MatRef<'a, T>,
    /// (S, dhv).
    v: MatRef<'a, T>,
    /// log i a token; -inf at pads.
    log_i: &'a [T],
    /// log f a token; 0 at pads.
    log_f: &'a [T],
    /// Resets and pads of the sequence.
    marks: Option<&'a [u32]>,
    /// dqk and dhv.
    sizes: (usize, usize),
}

impl<T: Scalar> HeadInput<'_, T> {
    fn len(&self) -> usize {
        self.log_i.len()
    }

    fn scale(&self) -> T {
        T::ONE / T::from_f64(self.sizes.0 as f64).sqrt()
    }

    fn is_reset(&self, t: usize) -> bool {
        self.marks.is_some_and(|marks| marks[t] & (RESET | PAD) == RESET)
    }

    fn is_pad(&self, t: usize) -> bool {
        self.marks.is_some_and(|marks| marks[t] & PAD != 0)
    }
}

/// What forward writes for one head: outputs, the state (holding the initial one on entry,
/// the last one on return), and what backward reads.
struct HeadOutput<'a, T> {
    h: MatMut<'a, T>,
    c: &'a mut [T],
    n: &'a mut [T],
    m: &'a mut T,
    /// m_t of every token.
    stabilizers: &'a mut [T],
    /// d_t of every token.
    denominators: &'a mut [T],
}

/// What backward reads of forward for one head.
struct HeadSaved<'a, T> {
    h: MatRef<'a, T>,
    stabilizers: &'a [T],
    denominators: &'a [T],
    /// C, n, m before the first token; None is zero.
    initial: Option<(&'a [T], &'a [T], T)>,
}

/// Gradients of one head: dh in, everything else out. `dc`, `dn` and `dm` hold those of the
/// last state on entry and those of the initial state on return.
struct HeadGradients<'a, T> {
    dh: MatRef<'a, T>,
    dq: MatMut<'a, T>,
    dk: MatMut<'a, T>,
    dv: MatMut<'a, T>,
    /// d log i, written.
    di: &'a mut [T],
    /// d log f, written.
    df: &'a mut [T],
    dc: &'a mut [T],
    dn: &'a mut [T],
    dm: &'a mut T,
}

/// The stabilised exponents of a run of tokens, from the state before it: `decay` is
/// log f + m_{t-1} - m_t and `entry` is log i - m_t, both at most 0.
///
/// All weights are sums of these: no difference of long prefix sums, hence no cancellation.
#[inline(always)]
fn stabilize<T: Scalar>(log_i: &[T], log_f: &[T], m0: T, m: &mut [T], decay: &mut [T], entry: &mut [T]) {
    let mut previous = m0;
    for t in 0..log_i.len() {
        let kept = log_f[t] + previous;
        m[t] = kept.max(log_i[t]);
        decay[t] = kept - m[t];
        entry[t] = log_i[t] - m[t];
        previous = m[t];
    }
}

/// The end of the chunk that starts at `start`: at most `size` tokens, cut before a reset.
fn chunk_end<T: Scalar>(input: &HeadInput<'_, T>, start: usize, size: usize) -> usize {
    let limit = (start + size).min(input.len());
    if input.marks.is_none() {
        return limit;
    }
    (start + 1..limit).find(|&t| input.is_reset(t)).unwrap_or(limit)
}

/// The gradient of m walks back along the maxima that made it: to log i where the token set
/// a new maximum, else to log f and the stabiliser before. `dm` holds the gradients that
/// each m_t gets of its own; returns what reaches m before the first token.
#[inline(always)]
fn unwind_stabilizer<T: Scalar>(
    entry: &[T],
    decay: &[T],
    dm: &[T],
    last: T,
    di: &mut [T],
    df: &mut [T],
) -> T {
    let mut carried = last;
    for t in (0..entry.len()).rev() {
        carried += dm[t];
        // The winner of the maximum is the one whose exponent is exactly 0.
        if decay[t] >= entry[t] {
            df[t] += carried;
        } else {
            di[t] += carried;
            carried = T::ZERO;
        }
    }
    carried
}

/// x . y over two slices: the products of states with their gradients.
fn inner<T: Scalar>(x: &[T], y: &[T]) -> T {
    vector::vectorize!(|| vector::dot(x, y))
}
