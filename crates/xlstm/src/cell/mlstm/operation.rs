//! The mLSTM on a tape: heads and sequences spread over the threads, one task each.

use rayon::prelude::*;

use super::{
    Form, HeadGradients, HeadInput, HeadOutput, HeadSaved, MlstmConfig, chunkwise, chunkwise_backward, inner,
    parallel, recurrent,
};
use crate::cell::InputGate;
#[cfg(feature = "cuda")]
use crate::engine::cuda::{CudaBackward, CudaForward};
use crate::engine::matrix::{MatMut, MatRef};
use crate::engine::operation::{Backward, Forward, Kernel, Slots, scratch};
use crate::engine::tape::{Ids, Tape, Var};
use crate::engine::vector::vectorize;
use crate::engine::{Gradient, Scalar, Shape};
use crate::error::{Error, Result};
use crate::ops::{PAD, RESET};

/// C (B, NH, dqk, dhv), n (B, NH, dqk) and m (B, NH); k is stored unscaled.
#[derive(Clone, Copy, Debug)]
pub struct MlstmState {
    /// Matrix memory.
    pub c: Var,
    /// Normaliser.
    pub n: Var,
    /// Stabiliser.
    pub m: Var,
}

#[derive(Debug)]
struct Mlstm {
    config: MlstmConfig,
    marked: bool,
}

/// Inputs: q, k, v, ~i, ~f, C, n, m.
const C0: usize = 5;
/// Outputs: h, C, n, m, then m and d of every token (B, NH, S).
const C1: usize = 1;
const STABILIZERS: usize = 4;
const DENOMINATORS: usize = 5;

/// Records the cell: q, k (B, S, NH dqk), v (B, S, NH dhv), ~i, ~f (B, S, NH) and, where
/// given, the state before the first token and the marks (B S) -> h (B, S, NH dhv) and the
/// state after the last token.
///
/// # Errors
/// When shapes or options do not fit together.
#[allow(clippy::too_many_arguments)]
pub fn mlstm(
    tape: &mut Tape,
    config: &MlstmConfig,
    q: Var,
    k: Var,
    v: Var,
    gates: (Var, Var),
    state: Option<MlstmState>,
    marks: Option<Ids>,
) -> Result<(Var, MlstmState)> {
    let operation = Mlstm { config: *config, marked: marks.is_some() };
    let inputs = [
        Some(q),
        Some(k),
        Some(v),
        Some(gates.0),
        Some(gates.1),
        state.map(|s| s.c),
        state.map(|s| s.n),
        state.map(|s| s.m),
    ];
    let out = tape.record(operation, &inputs, marks.as_slice())?;
    Ok((out[0], MlstmState { c: out[1], n: out[2], m: out[3] }))
}

#[derive(Clone, Copy)]
pub(super) struct Sizes {
    pub(super) batch: usize,
    pub(super) length: usize,
    pub(super) heads: usize,
    pub(super) dqk: usize,
    pub(super) dhv: usize,
}

impl Mlstm {
    fn sizes(&self, inputs: &[Option<Shape>]) -> Result<Sizes> {
        let heads = self.config.heads;
        let dims = |i: usize| inputs[i].as_ref().map_or(&[][..], Shape::dims).to_vec();
        let [batch, length, q_width] = dims(0)[..] else {
            return Err(Error::shape(format!("q must be (batch, length, features), not {:?}", dims(0))));
        };
        let v_width = dims(2).last().copied().unwrap_or(0);
        let fits = q_width % heads == 0
            && v_width % heads == 0
            && dims(1) == dims(0)
            && dims(2) == [batch, length, v_width]
            && dims(3) == [batch, length, heads]
            && dims(4) == dims(3);
        let (dqk, dhv) = (q_width / heads, v_width / heads);
        let state_fits = inputs[C0].is_none()
            || (dims(C0) == [batch, heads, dqk, dhv]
                && dims(C0 + 1) == [batch, heads, dqk]
                && dims(C0 + 2) == [batch, heads]);
        if !fits || !state_fits || length == 0 {
            let found: Vec<_> = inputs.iter().flatten().collect();
            return Err(Error::shape(format!(
                "{heads} heads with q, k, v, ~i, ~f, C, n, m of shapes {found:?}"
            )));
        }
        if self.config.form == Form::Parallel && inputs[C0].is_some() {
            return Err(Error::shape("the parallel form takes no state").hint("use the chunkwise form"));
        }
        if !self.config.normalize && self.config.input_gate == InputGate::Exponential {
            return Err(Error::config("an exponential input gate needs the normaliser"));
        }
        Ok(Sizes { batch, length, heads, dqk, dhv })
    }

    fn known_sizes(&self, inputs: &[Option<Shape>]) -> Sizes {
        self.sizes(inputs).unwrap_or(Sizes { batch: 0, length: 0, heads: self.config.heads, dqk: 0, dhv: 0 })
    }

    /// log i and log f of every (sequence, head, token): -inf and 0 at pads.
    fn log_gates<T: Scalar>(
        &self,
        sizes: Sizes,
        (i, f): (&[T], &[T]),
        marks: Option<&[u32]>,
        (log_i, log_f): (&mut [T], &mut [T]),
    ) {
        let Sizes { length, heads, .. } = sizes;
        let (input_gate, forget_gate) = (self.config.input_gate, self.config.forget_gate);
        log_i.par_chunks_mut(length).zip(log_f.par_chunks_mut(length)).enumerate().for_each(
            |(task, (log_i, log_f))| {
                let (b, head) = (task / heads, task % heads);
                vectorize!(|| {
                    for t in 0..length {
                        let at = (b * length + t) * heads + head;
                        (log_i[t], log_f[t]) = (i[at], f[at]);
                    }
                    for (i, f) in log_i.iter_mut().zip(log_f.iter_mut()) {
                        (*i, *f) = (input_gate.log(*i), forget_gate.log(*f));
                    }
                });
                if let Some(marks) = marks {
                    for t in 0..length {
                        if marks[b * length + t] & PAD != 0 {
                            (log_i[t], log_f[t]) = (T::NEG_INFINITY, T::ZERO);
                        }
                    }
                }
            },
        );
    }

    fn head_input<'a, T: Scalar>(
        &self,
        sizes: Sizes,
        task: usize,
        qkv: [&'a [T]; 3],
        (log_i, log_f): (&'a [T], &'a [T]),
        marks: Option<&'a [u32]>,
    ) -> HeadInput<'a, T> {
        let Sizes { length, heads, dqk, dhv, .. } = sizes;
        let (b, head) = (task / heads, task % heads);
        let view = |x: &'a [T], size: usize| {
            let from = b * length * heads * size + head * size;
            MatRef::strided(&x[from..], length, size, heads * size)
        };
        HeadInput {
            q: view(qkv[0], dqk),
            k: view(qkv[1], dqk),
            v: view(qkv[2], dhv),
            log_i: &log_i[task * length..][..length],
            log_f: &log_f[task * length..][..length],
            marks: marks.map(|m| &m[b * length..][..length]),
            sizes: (dqk, dhv),
        }
    }
}

impl Kernel for Mlstm {
    fn name(&self) -> &'static str {
        "mLSTM cell"
    }

    fn outputs(&self, inputs: &[Option<Shape>]) -> Result<Vec<Shape>> {
        let Sizes { batch, length, heads, dqk, dhv } = self.sizes(inputs)?;
        Ok(vec![
            [batch, length, heads * dhv].into(),
            [batch, heads, dqk, dhv].into(),
            [batch, heads, dqk].into(),
            [batch, heads].into(),
            [batch, heads, length].into(),
            [batch, heads, length].into(),
        ])
    }

    fn reads(&self) -> Slots {
        Slots::of(&[0, 1, 2, 3, 4, 5, 6, 7], &[0, 1, 2, 3, STABILIZERS, DENOMINATORS])
    }

    fn full_precision(&self) -> Slots {
        Slots::of(&[3, 4, 5, 6, 7], &[1, 2, 3, STABILIZERS, DENOMINATORS])
    }

    fn forward<T: Scalar>(&self, io: &mut Forward<'_, T>) {
        let sizes = self.known_sizes(&io.shapes.inputs);
        let Sizes { batch, length, heads, dqk, dhv } = sizes;
        let tasks = batch * heads;
        let marks = self.marked.then_some(io.ids[0]);
        let qkv = [io.input(0), io.input(1), io.input(2)];
        let gates = (io.input(3), io.input(4));
        let state = (io.inputs[C0], io.inputs[C0 + 1], io.inputs[C0 + 2]);
        let outputs: [&mut [T]; 6] = std::array::from_fn(|i| io.output(i));
        let [h, c, n, m, stabilizers, denominators] = outputs;
        let start = |to: &mut [T], from: Option<&[T]>| match from {
            Some(from) => to.copy_from_slice(from),
            None => to.fill(T::ZERO),
        };
        start(n, state.1);
        start(m, state.2);
        for (m, n) in m.iter_mut().zip(n.chunks_exact(dqk)) {
            *m = self.config.initial_stabilizer(n, *m);
        }
        let work_size = match self.config.form {
            Form::Recurrent => 1,
            Form::Parallel => 2 * length,
            Form::Chunkwise(chunk) => chunkwise::Work::<T>::size(chunk.min(length), dqk),
        };
        let space = scratch(io.scratch, tasks * (2 * length + work_size));
        let (log_i, rest) = space.split_at_mut(tasks * length);
        let (log_f, work) = rest.split_at_mut(tasks * length);
        self.log_gates(sizes, gates, marks, (&mut *log_i, &mut *log_f));
        let (log_i, log_f) = (&*log_i, &*log_f);
        MatMut::new(h, batch * length, heads * dhv)
            .blocks(length, dhv)
            .into_par_iter()
            .zip(c.par_chunks_mut(dqk * dhv))
            .zip(n.par_chunks_mut(dqk))
            .zip(m)
            .zip(stabilizers.par_chunks_mut(length).zip(denominators.par_chunks_mut(length)))
            .zip(work.par_chunks_mut(work_size))
            .enumerate()
            .for_each(|(task, (((((h, c), n), m), (stabilizers, denominators)), work))| {
                let input = self.head_input(sizes, task, qkv, (log_i, log_f), marks);
                // By the thread that reads it next.
                start(c, state.0.map(|from| &from[task * dqk * dhv..][..dqk * dhv]));
                let mut out = HeadOutput { h, c, n, m, stabilizers, denominators };
                match self.config.form {
                    Form::Parallel => parallel::forward(&self.config, &input, &mut out, work),
                    Form::Chunkwise(chunk) if length > 1 => {
                        chunkwise::forward(&self.config, chunk.min(length), &input, &mut out, work);
                    }
                    Form::Chunkwise(_) | Form::Recurrent => {
                        recurrent::forward(&self.config, &input, &mut out)
                    }
                }
            });
    }

    fn backward<T: Scalar>(&self, io: &mut Backward<'_, T>) {
        let sizes = self.known_sizes(&io.shapes.inputs);
        let Sizes { batch, length, heads, dqk, dhv } = sizes;
        let tasks = batch * heads;
        let marks = self.marked.then_some(io.ids[0]);
        let qkv = [io.input(0), io.input(1), io.input(2)];
        let gates = (io.input(3), io.input(4));
        let initial = (io.inputs[C0], io.inputs[C0 + 1], io.inputs[C0 + 2]);
        let last = (io.output(C1), io.output(C1 + 1));
        let (h, stabilizers, denominators) = (io.output(0), io.output(STABILIZERS), io.output(DENOMINATORS));
        let last_gradients = [1, 2, 3].map(|i| io.output_gradients[i]);

        let resets = marks.map_or(0, |marks| {
            marks.chunks(length).map(|row| row.iter().filter(|m| **m & RESET != 0).count()).max().unwrap_or(0)
        });
        let work_size = match self.config.form {
            Form::Recurrent => 1,
            Form::Parallel => 2 * length + dhv.max(length),
            Form::Chunkwise(chunk) => {
                chunkwise_backward::work_size::<T>(length, resets, chunk.min(length), (dqk, dhv))
            }
        };
        // Gradients that nobody asks for land in scratch: q, k, v, dh where it is zero.
        let token_sizes = [dqk, dqk, dhv].map(|size| tasks * length * size);
        let state_size = dqk * dhv + dqk + 1;
        let total = tasks * (4 * length + state_size + work_size)
            + token_sizes.iter().sum::<usize>()
            + token_sizes[2];
        let space = scratch(io.scratch, total);
        let (log_i, rest) = space.split_at_mut(tasks * length);
        let (log_f, rest) = rest.split_at_mut(tasks * length);
        let (di, rest) = rest.split_at_mut(tasks * length);
        let (df, rest) = rest.split_at_mut(tasks * length);
        let (dc, rest) = rest.split_at_mut(tasks * dqk * dhv);
        let (dn, rest) = rest.split_at_mut(tasks * dqk);
        let (dm, rest) = rest.split_at_mut(tasks);
        let (spare_q, rest) = rest.split_at_mut(token_sizes[0]);
        let (spare_k, rest) = rest.split_at_mut(token_sizes[1]);
        let (spare_v, rest) = rest.split_at_mut(token_sizes[2]);
        let (zeros, work) = rest.split_at_mut(token_sizes[2]);
        self.log_gates(sizes, gates, marks, (&mut *log_i, &mut *log_f));
        let (log_i, log_f) = (&*log_i, &*log_f);
        for (to, from) in
            [(&mut *dc, last_gradients[0]), (&mut *dn, last_gradients[1]), (&mut *dm, last_gradients[2])]
        {
            match from {
                Some(from) => to.copy_from_slice(from),
                None => to.fill(T::ZERO),
            }
        }
        let dh = io.output_gradients[0].unwrap_or_else(|| {
            zeros.fill(T::ZERO);
            zeros
        });
        let blocks = |data, size| MatMut::new(data, batch * length, heads * size).blocks(length, size);
        let [dq, dk, dv] = [0, 1, 2].map(|i| io.input_gradients[i].take().map(Gradient::into_parts));
        let (dq, keep_q) = dq.unwrap_or((spare_q, true));
        let (dk, keep_k) = dk.unwrap_or((spare_k, true));
        let (dv, keep_v) = dv.unwrap_or((spare_v, true));
        let (dq, dk, dv) = (blocks(dq, dqk), blocks(dk, dqk), blocks(dv, dhv));
        dq.into_par_iter()
            .zip(dk)
            .zip(dv)
            .zip(di.par_chunks_mut(length).zip(df.par_chunks_mut(length)))
            .zip(dc.par_chunks_mut(dqk * dhv).zip(dn.par_chunks_mut(dqk)).zip(&mut *dm))
            .zip(work.par_chunks_mut(work_size))
            .enumerate()
            .for_each(|(task, (((((mut dq, mut dk), mut dv), (di, df)), ((dc, dn), dm)), work))| {
                for (block, keep) in [(&mut dq, keep_q), (&mut dk, keep_k), (&mut dv, keep_v)] {
                    if !keep {
                        block.fill(T::ZERO);
                    }
                }
                let input = self.head_input(sizes, task, qkv, (log_i, log_f), marks);
                let from = (task / heads) * length * heads * dhv + (task % heads) * dhv;
                let saved = HeadSaved {
                    h: MatRef::strided(&h[from..], length, dhv, heads * dhv),
                    stabilizers: &stabilizers[task * length..][..length],
                    denominators: &denominators[task * length..][..length],
                    initial: match initial {
                        (Some(c), Some(n), Some(m)) => {
                            let (c, n) = (&c[task * dqk * dhv..][..dqk * dhv], &n[task * dqk..][..dqk]);
                            Some((c, n, self.config.initial_stabilizer(n, m[task])))
                        }
                        _ => None,
                    },
                };
                let mut grads = HeadGradients {
                    dh: MatRef::strided(&dh[from..], length, dhv, heads * dhv),
                    dq,
                    dk,
                    dv,
                    di,
                    df,
                    dc,
                    dn,
                    dm,
                };
                match self.config.form {
                    Form::Recurrent => recurrent::backward(&self.config, &input, &saved, &mut grads),
                    Form::Parallel => parallel::backward(&self.config, &input, &saved, &mut grads, work),
                    Form::Chunkwise(chunk) => {
                        // The last state is scaled by its m: what C and n carry of it.
                        let (c, n) = (&last.0[task * dqk * dhv..][..dqk * dhv], &last.1[task * dqk..][..dqk]);
                        *grads.dm -= inner(c, grads.dc) + inner(n, grads.dn);
                        let chunk = chunk.min(length);
                        chunkwise_backward::backward(&self.config, chunk, &input, &saved, &mut grads, work);
                    }
                }
            });
        let [i, f] = [3, 4].map(|i| io.input_gradients[i].take().map(Gradient::cleared));
        let asked = (i, f);
        self.add_gate_gradients(sizes, gates, marks, (di, df), asked);
        for (i, from) in [(C0, &*dc), (C0 + 1, &*dn), (C0 + 2, &*dm)] {
            if let Some(to) = io.input_gradients[i].take() {
                for (to, from) in to.cleared().iter_mut().zip(from) {
                    *to += *from;
                }
            }
        }
    }

    #[cfg(feature = "cuda")]
    fn overwrites(&self) -> Slots {
        Slots::of(&[0, 1, 2, 3, 4], &[])
    }

    #[cfg(feature = "cuda")]
    fn forward_cuda(&self, io: &mut CudaForward<'_>) -> Result<()> {
        super::cuda::forward(&self.config, self.marked, self.sizes(&io.shapes.inputs)?, io)
    }

    #[cfg(feature = "cuda")]
    fn backward_cuda(&self, io: &mut CudaBackward<'_>) -> Result<()> {
        super::cuda::backward(&self.config, self.marked, self.sizes(&io.shapes.inputs)?, io)
    }
}

impl Mlstm {
    /// From d log i and d log f (B, NH, S) to the pre-activations (B, S, NH).
    fn add_gate_gradients<T: Scalar>(
        &self,
        sizes: Sizes,
        (i, f): (&[T], &[T]),
        marks: Option<&[u32]>,
        (di, df): (&[T], &[T]),
        asked: (Option<&mut [T]>, Option<&mut [T]>),
    ) {
        let Sizes { length, heads, .. } = sizes;
        let at = |b: usize, t: usize, head: usize| (b * heads + head) * length + t;
        for (to, values, from, is_input) in [(asked.0, i, di, true), (asked.1, f, df, false)] {
            let Some(to) = to else { continue };
            for (row, (to, x)) in to.chunks_exact_mut(heads).zip(values.chunks_exact(heads)).enumerate() {
                if marks.is_some_and(|marks| marks[row] & PAD != 0) {
                    continue;
                }
                for head in 0..heads {
                    let slope = if is_input {
                        self.config.input_gate.log_derivative(x[head])
                    } else {
                        self.config.forget_gate.log_derivative(x[head])
                    };
                    to[head] += slope * from[at(row / length, row % length, head)];
                }
            }
        }
    }
}
