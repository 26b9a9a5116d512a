//! The cell backward: tasks back over time, then the gradients that sum over tokens.

use rayon::prelude::*;

use super::pointwise::{lstm_backward, slstm_backward};
use super::{
    BIAS, CellFunction, LAST, Layout, PARALLEL_FROM, RECURRENT, STATE, Slstm, is_pad, is_reset, mark,
};
use crate::engine::matrix::{MatMut, MatRef, Threads, product};
use crate::engine::operation::scratch;
use crate::engine::vector::{add_to, vectorize};
use crate::engine::{Backward, Gradient, Scalar};
use crate::ops::TILE;

/// What all tasks read.
struct Inputs<'a, T> {
    operation: &'a Slstm,
    layout: Layout,
    /// R (NH, 4 DH, DH).
    recurrent: &'a [T],
    record: &'a [T],
    dh: Option<&'a [T]>,
    /// Gradients of the last state, and its values, as far as they are needed.
    last_gradients: [Option<&'a [T]>; 4],
    last: [Option<&'a [T]>; 4],
    marks: &'a [u32],
}

/// Where a task's parts lie in its work space: gate gradients of each (step, row), carried
/// gradients of each row (dh, dc, dn, g), the bias's gradient and its current tile.
fn space_len(layout: &Layout) -> usize {
    4 * layout.dim * (layout.rows * (layout.steps + 1) + 2)
}

/// The gate gradients and the carried gradients of a task, and its bias's gradient.
fn parts_of<'a, T>(layout: &Layout, space: &'a [T], task: usize) -> (&'a [T], &'a [T], &'a [T]) {
    let space = &space[task * space_len(layout)..][..space_len(layout)];
    let (gates, rest) = space.split_at(4 * layout.dim * layout.rows * layout.steps);
    let (carry, bias) = rest.split_at(4 * layout.dim * layout.rows);
    (gates, carry, &bias[..4 * layout.dim])
}

pub(super) fn backward<T: Scalar>(operation: &Slstm, io: &mut Backward<'_, T>) {
    let layout = Layout::of(io.shapes, operation.config.heads);
    let (dim, tasks) = (layout.dim, layout.tasks());
    let parts = operation.state_parts();
    let recurrent = io.input(RECURRENT);
    let last_gradients =
        [0, 1, 2, 3].map(|part| if part < parts { io.output_gradients[LAST + part] } else { None });
    let last = [0, 1, 2, 3].map(|part| if part < parts { io.outputs[LAST + part] } else { None });
    let initial = [0, 1, 2, 3].map(|part| io.inputs[STATE + part]);
    let record = io.output(LAST + parts);
    let (dh, marks) = (io.output_gradients[0], io.ids[0]);

    let mut gradients = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9].map(|i| io.input_gradient(i).map(Gradient::cleared));
    let space = scratch(io.scratch, tasks * space_len(&layout));
    let inputs = Inputs { operation, layout, recurrent, record, dh, last_gradients, last, marks };
    let parallel = layout.work() >= PARALLEL_FROM;
    let work = |(task, space): (usize, &mut [T])| inputs.run(task, space);
    if parallel {
        space.par_chunks_exact_mut(space_len(&layout)).enumerate().for_each(work);
    } else {
        space.chunks_exact_mut(space_len(&layout)).enumerate().for_each(work);
    }

    let space = &*space;
    for (gate, gradient) in gradients[..4].iter_mut().enumerate() {
        if let Some(gradient) = gradient {
            add_gate(&layout, space, gate, gradient, parallel);
        }
    }
    if let Some(gradient) = gradients[RECURRENT].take() {
        recurrent_gradient(operation, &layout, space, record, gradient);
    }
    if let Some(gradient) = gradients[BIAS].take() {
        for task in 0..tasks {
            let (_, _, sums) = parts_of(&layout, space, task);
            for (gate, sums) in sums.chunks_exact(dim).enumerate() {
                add_to(sums, &mut gradient[gate * layout.width() + layout.column(task)..][..dim]);
            }
        }
    }
    for (part, gradient) in gradients[STATE..].iter_mut().enumerate() {
        let Some(gradient) = gradient else { continue };
        for task in 0..tasks {
            let (_, carry, _) = parts_of(&layout, space, task);
            for row in 0..layout.rows_of(task) {
                let at = layout.state_at(task, row);
                let (dh, carry) = carry.split_at(layout.rows * dim);
                let carry = &carry[row * 3 * dim..][..3 * dim];
                let to = &mut gradient[at.clone()];
                match part {
                    0 => add_to(&dh[row * dim..][..dim], to),
                    _ => add_to(&carry[(part - 1) * dim..][..dim], to),
                }
                // dm0 = g + c0 dc0 + n0 dn0: what a scale of the whole state would change.
                if part == 3 {
                    for value in [1, 2] {
                        let Some(initial) = initial[value] else { continue };
                        let carry = &carry[(value - 1) * dim..][..dim];
                        for ((to, x), dx) in to.iter_mut().zip(&initial[at.clone()]).zip(carry) {
                            *to += *x * *dx;
                        }
                    }
                }
            }
        }
    }
}

/// Adds the gradients of one gate, which lie by task, to their tokens.
fn add_gate<T: Scalar>(layout: &Layout, space: &[T], gate: usize, gradient: &mut [T], parallel: bool) {
    let dim = layout.dim;
    let place = |(tile, tokens): (usize, &mut [T])| {
        for (i, token) in tokens.chunks_exact_mut(layout.width()).enumerate() {
            let (sequence, t) = ((tile * TILE + i) / layout.steps, (tile * TILE + i) % layout.steps);
            for (head, to) in token.chunks_exact_mut(dim).enumerate() {
                let (task, line) = layout.line_of(sequence, t, head);
                add_to(&space[task * space_len(layout) + (line * 4 + gate) * dim..][..dim], to);
            }
        }
    };
    if parallel {
        gradient.par_chunks_mut(layout.width() * TILE).enumerate().for_each(place);
    } else {
        gradient.chunks_mut(layout.width() * TILE).enumerate().for_each(place);
    }
}

/// dR += draw^T h_{t-1} over all steps and rows: one product a task, in order.
fn recurrent_gradient<T: Scalar>(
    operation: &Slstm,
    layout: &Layout,
    space: &[T],
    record: &[T],
    gradient: &mut [T],
) {
    let dim = layout.dim;
    let parts = operation.record_parts() * dim;
    gradient.par_chunks_exact_mut(4 * dim * dim).enumerate().for_each(|(head, gradient)| {
        for task in (head..layout.tasks()).step_by(layout.heads) {
            let lines = layout.steps * layout.rows_of(task);
            let (gates, _, _) = parts_of(layout, space, task);
            let record = &record[task * layout.steps * layout.rows * parts..];
            let draw = MatRef::new(gates, lines, 4 * dim);
            let before = MatRef::strided(record, lines, dim, parts);
            let gradient = MatMut::new(gradient, 4 * dim, dim);
            product(gradient, T::ONE, draw.t(), before, true, Threads::All);
        }
    });
}

impl<T: Scalar> Inputs<'_, T> {
    /// One head of a few sequences, from the last token to the first.
    fn run(&self, task: usize, space: &mut [T]) {
        let Layout { steps, dim, rows, .. } = self.layout;
        let (draw, space) = space.split_at_mut(4 * dim * rows * steps);
        let (carry, bias) = space.split_at_mut(4 * dim * rows);
        let (bias, tile) = bias.split_at_mut(4 * dim);
        let parts = self.operation.record_parts() * dim;
        let record = &self.record[task * steps * rows * parts..];
        let rows = self.layout.rows_of(task);
        self.start(task, carry);
        bias.fill(T::ZERO);
        tile.fill(T::ZERO);
        vectorize!(|| {
            for t in (0..steps).rev() {
                let draw = &mut draw[t * rows * 4 * dim..][..rows * 4 * dim];
                self.step(task, t, &record[t * rows * parts..][..rows * parts], carry, draw);
                // Sums of sums: f32 keeps its digits over long sequences.
                for row in draw.chunks_exact(4 * dim) {
                    add_to(row, tile);
                }
                if t % TILE == 0 {
                    add_to(tile, bias);
                    tile.fill(T::ZERO);
                }
            }
        });
    }

    /// The gradients of the last state: dh, dc, dn, and g = dm - c dc - n dn.
    fn start(&self, task: usize, carry: &mut [T]) {
        let dim = self.layout.dim;
        let (dh, carry) = carry.split_at_mut(self.layout.rows * dim);
        let rows = dh.chunks_exact_mut(dim).zip(carry.chunks_exact_mut(3 * dim));
        for (row, (dh, carry)) in rows.enumerate().take(self.layout.rows_of(task)) {
            let at = self.layout.state_at(task, row);
            let parts = std::iter::once(dh).chain(carry.chunks_exact_mut(dim));
            for (to, from) in parts.zip(self.last_gradients) {
                match from {
                    Some(from) => to.copy_from_slice(&from[at.clone()]),
                    None => to.fill(T::ZERO),
                }
            }
            let (carry, g) = carry.split_at_mut(2 * dim);
            for part in [1, 2] {
                let Some(value) = self.last[part] else { continue };
                for ((g, x), dx) in g.iter_mut().zip(&value[at.clone()]).zip(&carry[(part - 1) * dim..]) {
                    *g -= *x * *dx;
                }
            }
        }
    }

    /// One step back: `record` of the step and `carry` of the state after it -> `draw`, and
    /// `carry` of the state before it.
    #[inline(always)]
    fn step(&self, task: usize, t: usize, record: &[T], carry: &mut [T], draw: &mut [T]) {
        let (layout, config) = (&self.layout, &self.operation.config);
        let (dim, rows) = (layout.dim, layout.rows_of(task));
        let parts = self.operation.record_parts() * dim;
        let (carried_h, carry) = carry.split_at_mut(layout.rows * dim);
        for row in 0..rows {
            let draw = &mut draw[row * 4 * dim..][..4 * dim];
            if is_pad(mark(self.marks, layout, task, row, t)) {
                draw.fill(T::ZERO);
                continue;
            }
            let dh = self.dh.map(|dh| &dh[layout.token_at(task, row, t)]);
            let record = &record[row * parts..][..parts];
            let carried_h = &mut carried_h[row * dim..][..dim];
            let carry = &mut carry[row * 3 * dim..][..3 * dim];
            match config.function {
                CellFunction::Slstm => slstm_backward(record, dh, carried_h, carry, draw),
                CellFunction::Lstm => lstm_backward(record, dh, carried_h, carry, draw),
            }
        }
        // What is left of dh is zero, except at a pad, whose draw is zero.
        if !config.gradient_cut {
            let matrix = &self.recurrent[task % layout.heads * 4 * dim * dim..];
            let matrix = MatRef::new(matrix, 4 * dim, dim);
            let draw = MatRef::new(draw, rows, 4 * dim);
            product(MatMut::new(carried_h, rows, dim), T::ONE, draw, matrix, true, Threads::One);
        }
        for row in 0..rows {
            let mark = mark(self.marks, layout, task, row, t);
            let carried_h = &mut carried_h[row * dim..][..dim];
            if is_reset(mark) {
                carried_h.fill(T::ZERO);
                carry[row * 3 * dim..][..3 * dim].fill(T::ZERO);
            } else if let Some(clip) = config.gradient_clip
                && !is_pad(mark)
            {
                let clip = T::from_f64(clip);
                for dh in carried_h {
                    *dh = clip.min((-clip).max(*dh));
                }
            }
        }
    }
}
