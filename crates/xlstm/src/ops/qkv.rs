//! What the small family's mLSTM is fed with: its queries, keys and values, and both gates'
//! pre-activations of them,
//!
//! ```text
//! q, k = blockdiag(W_q) c + b_q, blockdiag(W_k) c + b_k       v = blockdiag(W_v) a + b_v
//! ~i, ~f = W_i [q; k; v] + b_i, W_f [q; k; v] + b_f
//! ```
//!
//! They are two headwise maps (`ops/headwise.rs`) and the gates (`ops/gates.rs`) one after the other, and
//! on the processor run as these. On a GPU (`ops/qkv/cuda.rs`) they are one pass over memory each way: q, k and
//! v are not read again for the gates, nor are their gradients written with the gates' share.

use rayon::prelude::*;

#[cfg(feature = "cuda")]
use crate::engine::cuda::{CudaBackward, CudaForward};
use crate::engine::operation::{Backward, Forward, Gradient, Kernel, MAX_SLOTS, NodeShapes, Slots, scratch};
use crate::engine::tape::{Tape, Var};
use crate::engine::{Scalar, Shape, Storable};
use crate::error::{Error, Result};
use crate::ops::TILE;
use crate::ops::gates::Gates;
use crate::ops::headwise::Headwise;

/// c, a (…, D), then W (NH, D / NH, D / NH) and optional b (D) of q, k and v, then W (heads, 3 D) and optional b
/// (heads) of ~i and ~f -> q, k, v (…, D), ~i, ~f (…, heads).
#[derive(Debug)]
struct Qkv;

/// What [`qkv`] gives.
#[derive(Clone, Copy, Debug)]
pub struct Fed {
    /// Queries (…, D).
    pub q: Var,
    /// Keys (…, D).
    pub k: Var,
    /// Values (…, D).
    pub v: Var,
    /// The pre-activations ~i and ~f (…, heads).
    pub gates: [Var; 2],
}

/// Records the maps of c to q and k and of a to v, and those of all three to both gates; c and a are
/// different values.
///
/// # Errors
/// As [`headwise`](crate::ops::headwise::headwise) and [`gates`](crate::ops::gates::gates), and when q, k and v
/// differ in shape.
pub fn qkv(
    tape: &mut Tape,
    [c, a]: [Var; 2],
    maps: [(Var, Option<Var>); 3],
    gates: [(Var, Option<Var>); 2],
) -> Result<Fed> {
    let maps = maps.into_iter().chain(gates).flat_map(|(weight, bias)| [Some(weight), bias]);
    let inputs: Vec<Option<Var>> = [Some(c), Some(a)].into_iter().chain(maps).collect();
    let outputs = tape.record(Qkv, &inputs, &[])?;
    Ok(Fed { q: outputs[0], k: outputs[1], v: outputs[2], gates: [outputs[3], outputs[4]] })
}

/// q and k of c.
const OF_C: Headwise = Headwise { maps: 2, full: false };
/// v of a.
const OF_A: Headwise = Headwise { maps: 1, full: false };
/// ~i and ~f of q, k and v.
const GATES: Gates = Gates { parts: 3, cap: None };

/// Our inputs that these three have; the gates' first three are q, k and v.
const SLOTS: [&[usize]; 3] = [&[0, 2, 3, 4, 5], &[1, 6, 7], &[8, 9, 10, 11]];

/// W of q, k, v, ~i and ~f; behind each is its bias.
const WEIGHTS: [usize; 5] = [2, 4, 6, 8, 10];

/// Those of all that are a headwise map's, in its order.
fn of_map<X: Copy>(map: usize, all: &[Option<X>]) -> [Option<X>; MAX_SLOTS] {
    std::array::from_fn(|i| SLOTS[map].get(i).and_then(|&slot| all[slot]))
}

/// Those of all that are the gates', in their order.
fn of_gates<X: Copy>(qkv: [X; 3], all: &[Option<X>]) -> [Option<X>; MAX_SLOTS] {
    let mut inputs = [None; MAX_SLOTS];
    for (to, value) in
        inputs.iter_mut().zip(qkv.map(Some).into_iter().chain(SLOTS[2].iter().map(|&i| all[i])))
    {
        *to = value;
    }
    inputs
}

/// The shapes of the three operations, of ours.
fn shapes_of(shapes: &NodeShapes) -> [NodeShapes; 3] {
    let (inputs, outputs) = (&shapes.inputs, &shapes.outputs);
    let qkv = [outputs[0], outputs[1], outputs[2]];
    let of = |inputs: [Option<Shape>; MAX_SLOTS], outputs: &[Shape]| NodeShapes {
        inputs: inputs.to_vec(),
        outputs: outputs.to_vec(),
    };
    [
        of(of_map(0, inputs), &outputs[..2]),
        of(of_map(1, inputs), &outputs[2..3]),
        of(of_gates(qkv, inputs), &outputs[3..]),
    ]
}

impl Kernel for Qkv {
    fn name(&self) -> &'static str {
        "qkv"
    }

    fn outputs(&self, inputs: &[Option<Shape>]) -> Result<Vec<Shape>> {
        let qk = OF_C.outputs(&of_map(0, inputs))?;
        let v = OF_A.outputs(&of_map(1, inputs))?;
        let qkv = [qk[0], qk[1], v[0]];
        if qk[0] != qk[1] || qk[0] != v[0] {
            return Err(Error::shape(format!("q, k and v {qkv:?} differ")));
        }
        let gates = GATES.outputs(&of_gates(qkv, inputs)[..7])?;
        Ok(qkv.into_iter().chain(gates).collect())
    }

    /// On a GPU q, k and v are worked out again, biases included.
    fn reads(&self) -> Slots {
        Slots { inputs: 0b11 | self.weights() | Slots::of(&[3, 5, 7], &[]).inputs, outputs: 0b111 }
    }

    fn full_precision(&self) -> Slots {
        Slots::of(&WEIGHTS.map(|weight| weight + 1), &[3, 4])
    }

    fn weights(&self) -> u32 {
        Slots::of(&WEIGHTS, &[]).inputs
    }

    fn storable(&self, slot: usize) -> Storable {
        SLOTS[2].iter().position(|&of| of == slot).map_or(Storable::Wide, |at| GATES.storable(3 + at))
    }

    #[cfg(feature = "cuda")]
    fn overwrites(&self) -> Slots {
        Slots { inputs: (1 << MAX_SLOTS) - 1, outputs: 0 }
    }

    fn forward<T: Scalar>(&self, io: &mut Forward<'_, T>) {
        let shapes = shapes_of(io.shapes);
        let [q, k, v, i, f] = [0, 1, 2, 3, 4].map(|output| io.output(output));
        let (precision, ids, scratch) = (io.precision, io.ids, &mut *io.scratch);
        for (map, outputs) in [[Some(&mut *q), Some(&mut *k)], [Some(&mut *v), None]].into_iter().enumerate()
        {
            let inputs = of_map(map, &io.inputs);
            let (narrow, shapes, outputs) = ([None; MAX_SLOTS], &shapes[map], padded(outputs));
            let mut io = Forward { inputs, narrow, outputs, ids, shapes, precision, scratch: &mut *scratch };
            if map == 0 { OF_C.forward(&mut io) } else { OF_A.forward(&mut io) }
        }
        let inputs = of_gates([&*q, &*k, &*v], &io.inputs);
        let mut narrow = [None; MAX_SLOTS];
        for (to, &slot) in narrow[3..].iter_mut().zip(SLOTS[2]) {
            *to = io.narrow[slot];
        }
        let (shapes, outputs) = (&shapes[2], padded([Some(i), Some(f)]));
        GATES.forward(&mut Forward { inputs, narrow, outputs, ids, shapes, precision, scratch });
    }

    /// With the gates' share dQ = dq + d~i W_iq + d~f W_fq, and dK, dV alike: dc += blockdiag(W_q)^T dQ +
    /// blockdiag(W_k)^T dK, da += blockdiag(W_v)^T dV, and the gradients of the weights as of each map.
    fn backward<T: Scalar>(&self, io: &mut Backward<'_, T>) {
        let [of_c, of_a, of_gates_shapes] = shapes_of(io.shapes);
        let (n, width) = (io.shapes.outputs[0].len(), io.shapes.outputs[0].last());
        let (precision, ids, outputs) = (io.precision, io.ids, [None; MAX_SLOTS]);
        let mut space = std::mem::take(io.scratch);
        // What the three need beside the totals.
        let scratch = &mut Vec::new();
        let (q, rest) = self::scratch(&mut space, 3 * n).split_at_mut(n);
        let (k, v) = rest.split_at_mut(n);

        let mut input_gradients = [const { None }; MAX_SLOTS];
        for (slot, (total, given)) in
            [&mut *q, &mut *k, &mut *v].into_iter().zip(io.output_gradients).enumerate()
        {
            if let Some(given) = given {
                let tiles = total.par_chunks_mut(width * TILE).zip(given.par_chunks(width * TILE));
                tiles.for_each(|(to, from)| to.copy_from_slice(from));
            }
            input_gradients[slot] = Some(Gradient::new(total, given.is_none()));
        }
        for (to, &slot) in input_gradients[3..].iter_mut().zip(SLOTS[2]) {
            *to = io.input_gradient(slot);
        }
        let inputs = of_gates([0, 1, 2].map(|output| io.output(output)), &io.inputs);
        let [.., i, f] = [0, 1, 2, 3, 4].map(|output| io.output_gradients[output]);
        GATES.backward(&mut Backward {
            inputs,
            outputs,
            output_gradients: padded([i, f]),
            input_gradients,
            ids,
            shapes: &of_gates_shapes,
            precision,
            scratch: &mut *scratch,
        });

        let maps = [(&of_c, [Some(&*q), Some(&*k)]), (&of_a, [Some(&*v), None])];
        for (map, (shapes, totals)) in maps.into_iter().enumerate() {
            let mut input_gradients = [const { None }; MAX_SLOTS];
            for (to, &slot) in input_gradients.iter_mut().zip(SLOTS[map]) {
                *to = io.input_gradient(slot);
            }
            let mut part = Backward {
                inputs: of_map(map, &io.inputs),
                outputs,
                output_gradients: padded(totals),
                input_gradients,
                ids,
                shapes,
                precision,
                scratch: &mut *scratch,
            };
            if map == 0 { OF_C.backward(&mut part) } else { OF_A.backward(&mut part) }
        }
        *io.scratch = space;
    }

    #[cfg(feature = "cuda")]
    fn forward_cuda(&self, io: &mut CudaForward<'_>) -> Result<()> {
        cuda::forward(io)
    }

    #[cfg(feature = "cuda")]
    fn backward_cuda(&self, io: &mut CudaBackward<'_>) -> Result<()> {
        cuda::backward(io)
    }
}

#[cfg(feature = "cuda")]
mod cuda;

/// Two and nothing else.
fn padded<X>(two: [Option<X>; 2]) -> [Option<X>; MAX_SLOTS] {
    let mut two = two.into_iter();
    std::array::from_fn(|_| two.next().flatten())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::{Executor, Mode};
    use crate::ops::check::{Check, noise};

    /// Inputs: c and a of (2, rows, heads size), the weights, then the biases.
    fn inputs(rows: usize, [blocks, size]: [usize; 2], heads: usize) -> Check {
        let width = blocks * size;
        let check = Check::new().input([2, rows, width]).input([2, rows, width]);
        let check = [(); 3].iter().fold(check, |check, ()| check.input([blocks, size, size]));
        let check = [(); 2].iter().fold(check, |check, ()| check.input([heads, 3 * width]));
        let check = [(); 3].iter().fold(check, |check, ()| check.input([width]));
        [(); 2].iter().fold(check, |check, ()| check.input([heads]))
    }

    fn record(tape: &mut Tape, v: &[Var], biased: bool) -> Result<Fed> {
        let map = |i: usize| (v[2 + i], biased.then_some(v[7 + i]));
        qkv(tape, [v[0], v[1]], [0, 1, 2].map(map), [3, 4].map(map))
    }

    #[test]
    fn gradients() {
        for (rows, blocks, heads) in [(35, [5, 4], 4), (3, [2, 17], 1), (9, [3, 4], 9), (1, [2, 3], 7)] {
            inputs(rows, blocks, heads).run(|tape, v, _| {
                let Fed { q, k, v, gates: [i, f] } = record(tape, v, true)?;
                Ok(vec![q, k, v, i, f])
            });
        }
    }

    #[test]
    fn gradients_of_some_outputs() {
        let check = inputs(7, [3, 4], 2);
        check.run(|tape, v, _| Ok(record(tape, v, true)?.gates.to_vec()));
        check.run(|tape, v, _| {
            let fed = record(tape, v, true)?;
            Ok(vec![fed.k, fed.gates[1]])
        });
    }

    /// Against the equations, term by term.
    #[test]
    fn values() -> Result<()> {
        let ([rows, blocks, size, heads], mut tape) = ([5, 3, 4, 2], Tape::new(Mode::Evaluate));
        let width = blocks * size;
        let shapes: [Shape; 12] = [
            [rows, width].into(),
            [rows, width].into(),
            [blocks, size, size].into(),
            [blocks, size, size].into(),
            [blocks, size, size].into(),
            [heads, 3 * width].into(),
            [heads, 3 * width].into(),
            [width].into(),
            [width].into(),
            [width].into(),
            [heads].into(),
            [heads].into(),
        ];
        let vars = shapes.map(|shape| tape.input(shape));
        let values: Vec<Vec<f64>> = (1..).zip(shapes).map(|(seed, shape)| noise(seed, shape.len())).collect();
        let Fed { q, k, v, gates: [i, f] } = record(&mut tape, &vars, true)?;
        let outputs = [q, k, v, i, f];
        outputs.iter().for_each(|&output| tape.keep(output));
        let mut executor = Executor::<f64>::new(tape);
        for (&var, values) in vars.iter().zip(&values) {
            executor.input_mut(var).copy_from_slice(values);
        }
        executor.poison();
        executor.forward(&[]);
        let found = outputs.map(|output| executor.value(output));
        let near = |x: f64, y: f64| assert!((x - y).abs() < 1e-12, "{x} is not {y}");
        for row in 0..rows {
            for (map, x) in [(0, &values[0]), (1, &values[0]), (2, &values[1])] {
                for column in 0..width {
                    let block = column / size * size;
                    let term = |j: usize| values[2 + map][column * size + j] * x[row * width + block + j];
                    let sum = values[7 + map][column] + (0..size).map(term).sum::<f64>();
                    near(found[map][row * width + column], sum);
                }
            }
            for gate in 0..2 {
                for head in 0..heads {
                    let term = |j: usize| {
                        values[5 + gate][head * 3 * width + j] * found[j / width][row * width + j % width]
                    };
                    let sum = values[10 + gate][head] + (0..3 * width).map(term).sum::<f64>();
                    near(found[3 + gate][row * heads + head], sum);
                }
            }
        }
        Ok(())
    }

    #[test]
    fn shapes_that_do_not_fit_are_named() {
        let mut tape = Tape::new(Mode::Train);
        let (c, a, short) = (tape.input([2, 8]), tape.input([2, 8]), tape.input([3, 8]));
        let (map, gate, narrow) = (tape.input([2, 4, 4]), tape.input([2, 24]), tape.input([2, 16]));
        let mut message = |of: [Var; 2], gate: Var| {
            let maps = [(map, None); 3];
            qkv(&mut tape, of, maps, [(gate, None); 2]).expect_err("no fit").to_string()
        };
        let rows = message([c, short], gate);
        assert!(rows.contains("[2, 8]") && rows.contains("[3, 8]"), "{rows}");
        let columns = message([c, a], narrow);
        assert!(columns.contains("[2, 16]") && columns.contains("24 columns"), "{columns}");
    }
}
