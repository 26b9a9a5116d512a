//! The cell forward: tasks over time, then their results into place.

use rayon::prelude::*;

use super::pointwise::{lstm_forward, slstm_forward};
use super::{
    BIAS, CellFunction, LAST, Layout, PARALLEL_FROM, RECURRENT, STATE, Slstm, is_pad, is_reset, mark,
};
use crate::engine::matrix::{MatMut, MatRef, Threads, product};
use crate::engine::operation::scratch;
use crate::engine::vector::vectorize;
use crate::engine::{Forward, Scalar};
use crate::ops::TILE;

/// Steps from which R is transposed first. A product of 8 rows with R as it lies takes
/// 1.98, 7.1 and 27.7 us for DH = 32, 64 and 128, with R transposed 0.72, 2.5 and 10.7 us,
/// and transposing takes 2.3, 9.1 and 36 us (one thread with AVX-512). Loops of our own
/// in place of the product, which the compiler left scalar, took 10, 41 and 163 us.
const TRANSPOSE_FROM: usize = 4;

/// What all tasks read.
struct Inputs<'a, T> {
    operation: &'a Slstm,
    layout: Layout,
    gates: [&'a [T]; 4],
    /// (NH, 4 DH, DH) as it came, and (NH, DH, 4 DH); the latter empty for a few steps.
    recurrent: &'a [T],
    transposed: &'a [T],
    bias: &'a [T],
    state: [Option<&'a [T]>; 4],
    marks: &'a [u32],
}

/// Where a task's parts lie in its work space: h of each (step, row), the state of each
/// row (h, c, n, m), the four raw gates of each row.
fn space_len(layout: &Layout) -> usize {
    layout.rows * layout.dim * (layout.steps + 4 + 4)
}

pub(super) fn forward<T: Scalar>(operation: &Slstm, io: &mut Forward<'_, T>) {
    let layout = Layout::of(io.shapes, operation.config.heads);
    let (dim, tasks) = (layout.dim, layout.tasks());
    let parts = operation.state_parts();
    let gates = [0, 1, 2, 3].map(|i| io.input(i));
    let (recurrent, bias) = (io.input(RECURRENT), io.input(BIAS));
    let state = [0, 1, 2, 3].map(|part| io.inputs[STATE + part]);
    let marks = io.ids[0];
    let h = io.output(0);
    let last = [0, 1, 2, 3].map(|part| (part < parts).then(|| io.output(LAST + part)));
    let record = operation.train.then(|| io.output(LAST + parts));

    // Without a backward pass one step's record, overwritten by the next, is enough.
    let record_len = layout.rows * operation.record_parts() * dim;
    let (kept, record_len) = match record {
        Some(_) => (0, record_len * layout.steps),
        None => (tasks * record_len, record_len),
    };
    let matrices = if layout.steps < TRANSPOSE_FROM { 0 } else { recurrent.len() };
    let space = scratch(io.scratch, matrices + tasks * space_len(&layout) + kept);
    let (transposed, space) = space.split_at_mut(matrices);
    let (space, own_record) = space.split_at_mut(tasks * space_len(&layout));
    let record = record.unwrap_or(own_record);
    let size = 4 * dim * dim;
    for (to, from) in transposed.chunks_exact_mut(size).zip(recurrent.chunks_exact(size)) {
        transpose(from, dim, to);
    }
    let inputs = Inputs { operation, layout, gates, recurrent, transposed, bias, state, marks };
    let parallel = layout.work() >= PARALLEL_FROM;
    let work = |(task, (space, record)): (usize, (&mut [T], &mut [T]))| inputs.run(task, space, record);
    if parallel {
        let spaces = space.par_chunks_exact_mut(space_len(&layout));
        spaces.zip(record.par_chunks_exact_mut(record_len)).enumerate().for_each(work);
    } else {
        let spaces = space.chunks_exact_mut(space_len(&layout));
        spaces.zip(record.chunks_exact_mut(record_len)).enumerate().for_each(work);
    }

    let space = &*space;
    let place = |(tile, tokens): (usize, &mut [T])| {
        for (i, token) in tokens.chunks_exact_mut(layout.width()).enumerate() {
            let (sequence, t) = ((tile * TILE + i) / layout.steps, (tile * TILE + i) % layout.steps);
            for (head, to) in token.chunks_exact_mut(dim).enumerate() {
                let (task, line) = layout.line_of(sequence, t, head);
                to.copy_from_slice(&space[task * space_len(&layout) + line * dim..][..dim]);
            }
        }
    };
    if parallel {
        h.par_chunks_mut(layout.width() * TILE).enumerate().for_each(place);
    } else {
        h.chunks_mut(layout.width() * TILE).enumerate().for_each(place);
    }
    for (part, last) in last.into_iter().enumerate() {
        let Some(last) = last else { continue };
        for task in 0..tasks {
            let states = &space[task * space_len(&layout) + layout.rows * layout.steps * dim..];
            for row in 0..layout.rows_of(task) {
                last[layout.state_at(task, row)].copy_from_slice(&states[(row * 4 + part) * dim..][..dim]);
            }
        }
    }
}

/// R of one head (4 DH, DH) -> (DH, 4 DH).
fn transpose<T: Scalar>(from: &[T], dim: usize, to: &mut [T]) {
    for (k, line) in to.chunks_exact_mut(4 * dim).enumerate() {
        for (to, from) in line.iter_mut().zip(from[k..].iter().step_by(dim)) {
            *to = *from;
        }
    }
}

impl<T: Scalar> Inputs<'_, T> {
    /// One head of a few sequences, from the first token to the last.
    fn run(&self, task: usize, space: &mut [T], record: &mut [T]) {
        let Layout { steps, dim, rows, .. } = self.layout;
        let (out, space) = space.split_at_mut(rows * steps * dim);
        let (states, raw) = space.split_at_mut(rows * 4 * dim);
        let rows = self.layout.rows_of(task);
        for (row, state) in states.chunks_exact_mut(4 * dim).enumerate().take(rows) {
            for (to, from) in state.chunks_exact_mut(dim).zip(self.state) {
                match from {
                    Some(from) => to.copy_from_slice(&from[self.layout.state_at(task, row)]),
                    None => to.fill(T::ZERO),
                }
            }
        }
        let record_step = rows * self.operation.record_parts() * dim;
        vectorize!(|| {
            for t in 0..steps {
                let at = if self.operation.train { t * record_step } else { 0 };
                let record = &mut record[at..][..record_step];
                self.step(task, t, states, raw, &mut out[t * rows * dim..][..rows * dim], record);
            }
        });
        // A tile with fewer rows than the others leaves the rest of its record unused.
        if self.operation.train {
            record[steps * record_step..].fill(T::ZERO);
        }
    }

    #[inline(always)]
    fn step(&self, task: usize, t: usize, states: &mut [T], raw: &mut [T], out: &mut [T], record: &mut [T]) {
        let layout = &self.layout;
        let (dim, rows) = (layout.dim, layout.rows_of(task));
        let head = task % layout.heads;
        for row in 0..rows {
            if is_reset(mark(self.marks, layout, task, row, t)) {
                states[row * 4 * dim..][..4 * dim].fill(T::ZERO);
            }
            let parts = raw[row * 4 * dim..][..4 * dim].chunks_exact_mut(dim);
            for ((to, gate), bias) in parts.zip(self.gates).zip(self.bias.chunks_exact(layout.width())) {
                let gate = &gate[layout.token_at(task, row, t)];
                let bias = &bias[layout.column(task)..][..dim];
                for ((to, gate), bias) in to.iter_mut().zip(gate).zip(bias) {
                    *to = *gate + *bias;
                }
            }
        }
        let h = MatRef::strided(states, rows, dim, 4 * dim);
        let matrix = if self.transposed.is_empty() {
            MatRef::new(&self.recurrent[head * 4 * dim * dim..], 4 * dim, dim).t()
        } else {
            MatRef::new(&self.transposed[head * 4 * dim * dim..], dim, 4 * dim)
        };
        product(MatMut::new(raw, rows, 4 * dim), T::ONE, h, matrix, true, Threads::One);
        let parts = self.operation.record_parts() * dim;
        for row in 0..rows {
            let raw = &raw[row * 4 * dim..][..4 * dim];
            let state = &mut states[row * 4 * dim..][..4 * dim];
            let out = &mut out[row * dim..][..dim];
            let record = &mut record[row * parts..][..parts];
            if is_pad(mark(self.marks, layout, task, row, t)) {
                out.fill(T::ZERO);
                record.fill(T::ZERO);
                continue;
            }
            match self.operation.config.function {
                CellFunction::Slstm => slstm_forward(&self.operation.config, raw, state, out, record),
                CellFunction::Lstm => lstm_forward(raw, state, out, record),
            }
        }
    }
}
