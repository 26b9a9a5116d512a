//! The cells against differences, against themselves cut in pieces, and at extremes.

use super::*;
use crate::engine::operation::Element;
use crate::engine::{Device, Executor};
use crate::ops::check::{Check, noise};

fn config(heads: usize, function: CellFunction) -> SlstmConfig {
    SlstmConfig {
        heads,
        function,
        input_gate: InputGate::Exponential,
        forget_gate: ForgetGate::Sigmoid,
        gradient_cut: false,
        gradient_clip: None,
    }
}

const BOTH: [CellFunction; 2] = [CellFunction::Slstm, CellFunction::Lstm];

/// Records the cell over inputs i, f, z, o, R, b and, if there are more, a state.
fn record(config: &SlstmConfig, tape: &mut Tape, v: &[Var], ids: &[Ids]) -> Result<Vec<Var>> {
    let state =
        (v.len() > 6).then(|| SlstmState { h: v[6], c: v[7], n: v.get(8).copied(), m: v.get(9).copied() });
    let gates = [v[0], v[1], v[2], v[3]];
    let (h, last) = slstm(tape, config, gates, v[4], v[5], state, ids.first().copied())?;
    Ok([Some(h), Some(last.h), Some(last.c), last.n, last.m].into_iter().flatten().collect())
}

/// Values of all inputs for one size, and how to run them.
#[derive(Clone)]
struct Problem {
    config: SlstmConfig,
    size: [usize; 3],
    /// i, f, z, o, R, b, then the state, if any.
    values: Vec<Vec<f64>>,
    marks: Option<Vec<u32>>,
}

/// Outputs (h and the last state) and gradients of all inputs.
struct Answer {
    outputs: Vec<Vec<f64>>,
    gradients: Vec<Vec<f64>>,
}

impl Problem {
    /// Noise for (B, S, D), gates scaled by `scale`.
    fn new(config: SlstmConfig, size: [usize; 3], scale: f64, state: bool) -> Problem {
        let [batch, steps, width] = size;
        let dim = width / config.heads;
        let mut lens = vec![batch * steps * width; 4];
        lens.extend([4 * width * dim, 4 * width]);
        if state {
            lens.extend(vec![batch * width; if config.function == CellFunction::Slstm { 4 } else { 2 }]);
        }
        let mut values: Vec<Vec<f64>> = lens.iter().enumerate().map(|(i, &n)| noise(i as u64, n)).collect();
        values[..4].iter_mut().flatten().for_each(|x| *x *= scale);
        if let Some(n) = values.get_mut(8) {
            n.iter_mut().for_each(|n| *n += 1.5);
        }
        Problem { config, size, values, marks: None }
    }

    fn shape(&self, input: usize) -> Shape {
        let [batch, _, width] = self.size;
        let dim = width / self.config.heads;
        match input {
            0..4 => self.size.into(),
            4 => [self.config.heads, 4 * dim, dim].into(),
            5 => [4 * width].into(),
            _ => [batch, width].into(),
        }
    }

    /// Tokens `range` of every sequence alone, from `state`.
    fn part(&self, range: std::ops::Range<usize>, state: &[Vec<f64>]) -> Problem {
        let mut part = self.clone();
        part.size[1] = range.len();
        for gate in &mut part.values[..4] {
            *gate = tokens(gate, self.size, range.clone());
        }
        part.values.truncate(6);
        part.values.extend_from_slice(state);
        part.marks = self.marks.as_ref().map(|marks| tokens(marks, [self.size[0], self.size[1], 1], range));
        part
    }

    fn check(&self) {
        let mut check = Check::new();
        for (i, values) in self.values.iter().enumerate() {
            check = match *self.shape(i).dims() {
                [a] => check.input_of([a], values.clone()),
                [a, b] => check.input_of([a, b], values.clone()),
                [a, b, c] => check.input_of([a, b, c], values.clone()),
                _ => unreachable!(),
            };
        }
        if let Some(marks) = &self.marks {
            check = check.ids(marks);
        }
        check.run(|tape, v, ids| record(&self.config, tape, v, ids));
    }

    /// Forward and backward from `seeds`, one an output.
    fn answer<T: Element>(&self, seeds: &[Vec<f64>]) -> Answer {
        let mut tape = Tape::new(Mode::Train);
        let vars: Vec<Var> =
            (0..self.values.len()).map(|i| tape.input_with_gradient(self.shape(i).dims())).collect();
        let ids: Vec<Ids> = self.marks.iter().map(|marks| tape.ids(marks.len())).collect();
        let outputs = record(&self.config, &mut tape, &vars, &ids).expect("shapes fit");
        for &y in &outputs {
            tape.keep(y);
            tape.seed_gradient(y);
        }
        let mut executor = Executor::<T>::new(tape);
        let write = |to: &mut [T], from: &[f64]| {
            to.iter_mut().zip(from).for_each(|(to, from)| *to = T::from_f64(*from));
        };
        for (&var, values) in vars.iter().zip(&self.values) {
            write(executor.input_mut(var), values);
        }
        for (&ids, marks) in ids.iter().zip(&self.marks) {
            executor.ids_mut(ids).copy_from_slice(marks);
        }
        for (&y, seed) in outputs.iter().zip(seeds) {
            write(executor.seed_mut(y), seed);
        }
        executor.poison();
        executor.forward(&[]);
        executor.backward(&[], &mut []);
        let wide = |x: &[T]| x.iter().map(|x| x.to_f64()).collect::<Vec<f64>>();
        Answer {
            outputs: outputs.iter().map(|&y| wide(executor.value(y))).collect(),
            gradients: vars.iter().map(|&x| wide(executor.gradient(x))).collect(),
        }
    }

    fn seeds(&self) -> Vec<Vec<f64>> {
        let [batch, steps, width] = self.size;
        let parts = if self.config.function == CellFunction::Slstm { 4 } else { 2 };
        (0..=parts).map(|i| noise(50 + i, batch * width * if i == 0 { steps } else { 1 })).collect()
    }

    /// The same through pieces of the sequence, the state and its gradients handed over;
    /// the gradient of h is clamped to `clip` where it is handed over.
    fn in_pieces(&self, cuts: &[usize], clip: f64) -> Answer {
        let seeds = self.seeds();
        let mut pieces = Vec::new();
        let mut state = self.values[6..].to_vec();
        let mut h = vec![0.0; seeds[0].len()];
        for ends in cuts.windows(2) {
            let range = ends[0]..ends[1];
            let piece = self.part(range.clone(), &state);
            let outputs = piece.answer::<f64>(&[]).outputs;
            put_tokens(&mut h, self.size, range.clone(), &outputs[0]);
            state = outputs[1..].to_vec();
            pieces.push((piece, range));
        }
        let mut outputs = vec![h];
        outputs.append(&mut state);
        let mut gradients: Vec<Vec<f64>> = self.values.iter().map(|x| vec![0.0; x.len()]).collect();
        let mut carried = seeds[1..].to_vec();
        for (piece, range) in pieces.iter().rev() {
            let mut seed = vec![tokens(&seeds[0], self.size, range.clone())];
            seed.append(&mut carried);
            let mut part = piece.answer::<f64>(&seed).gradients;
            carried = part.split_off(6);
            carried[0].iter_mut().for_each(|dh| *dh = dh.clamp(-clip, clip));
            for (whole, part) in gradients[..4].iter_mut().zip(&part) {
                put_tokens(whole, self.size, range.clone(), part);
            }
            for (whole, part) in gradients[4..6].iter_mut().zip(&part[4..]) {
                whole.iter_mut().zip(part).for_each(|(whole, part)| *whole += part);
            }
        }
        gradients.truncate(6);
        gradients.append(&mut carried);
        Answer { outputs, gradients }
    }
}

fn tokens<T: Copy>(x: &[T], [_, steps, width]: [usize; 3], range: std::ops::Range<usize>) -> Vec<T> {
    x.chunks(steps * width).flat_map(|x| x[range.start * width..range.end * width].to_vec()).collect()
}

fn put_tokens(x: &mut [f64], [_, steps, width]: [usize; 3], range: std::ops::Range<usize>, part: &[f64]) {
    for (x, part) in x.chunks_mut(steps * width).zip(part.chunks(range.len() * width)) {
        x[range.start * width..range.end * width].copy_from_slice(part);
    }
}

fn assert_same(a: &[Vec<f64>], b: &[Vec<f64>]) {
    assert_eq!(a.len(), b.len());
    for (i, (a, b)) in a.iter().zip(b).enumerate() {
        let scale = a.iter().fold(1e-3, |m: f64, x| m.max(x.abs()));
        assert_eq!(a.len(), b.len());
        for (j, (x, y)) in a.iter().zip(b).enumerate() {
            assert!((x - y).abs() <= 1e-11 * scale, "tensor {i}[{j}]: {x} and {y}");
        }
    }
}

/// Resets and pads, several together, first and last tokens included.
fn some_marks(n: usize) -> Vec<u32> {
    let kinds = [0, PAD, 0, RESET, 0, 0, PAD | RESET, PAD, 0, 0, RESET];
    (0..n).map(|i| kinds[(i * 7 + i / 5) % kinds.len()]).collect()
}

#[test]
fn gradients() {
    let sizes =
        [(1, [1, 1, 3]), (2, [2, 5, 8]), (1, [3, 7, 5]), (2, [9, 6, 6]), (2, [2, 3, 36]), (1, [1, 37, 2])];
    for function in BOTH {
        for (i, (heads, size)) in sizes.into_iter().enumerate() {
            for state in [false, true] {
                let mut problem = Problem::new(config(heads, function), size, 2.0, state);
                problem.check();
                if i % 2 == usize::from(state) {
                    problem.marks = Some(some_marks(size[0] * size[1]));
                    problem.check();
                }
            }
        }
        // Large enough for the parallel way.
        Problem::new(config(2, function), [17, 8, 32], 0.3, true).check();
    }
    for input_gate in [InputGate::Exponential, InputGate::Sigmoid] {
        for forget_gate in [ForgetGate::Sigmoid, ForgetGate::Exponential] {
            let config = SlstmConfig { input_gate, forget_gate, ..config(2, CellFunction::Slstm) };
            Problem::new(config.clone(), [2, 6, 6], 2.0, true).check();
            Problem::new(config, [2, 6, 6], 2.0, false).check();
        }
    }
}

#[test]
fn a_cut_sequence_is_the_whole_one() {
    for function in BOTH {
        let mut problem = Problem::new(config(2, function), [3, 9, 12], 3.0, true);
        for marks in [None, Some(some_marks(27))] {
            problem.marks = marks;
            let whole = problem.answer::<f64>(&problem.seeds());
            for cuts in [&[0, 1, 9][..], &[0, 4, 9], &[0, 8, 9], &[0, 1, 2, 3, 4, 5, 6, 7, 8, 9]] {
                let pieces = problem.in_pieces(cuts, f64::INFINITY);
                assert_same(&whole.outputs, &pieces.outputs);
                assert_same(&whole.gradients, &pieces.gradients);
            }
        }
    }
}

#[test]
fn a_clipped_gradient_is_clamped_between_tokens() {
    for function in BOTH {
        let mut problem = Problem::new(config(2, function), [2, 7, 8], 1.0, true);
        let reference = problem.in_pieces(&[0, 1, 2, 3, 4, 5, 6, 7], 0.1);
        let free = problem.answer::<f64>(&problem.seeds());
        problem.config.gradient_clip = Some(0.1);
        let clipped = problem.answer::<f64>(&problem.seeds());
        assert_same(&reference.outputs, &clipped.outputs);
        assert_same(&reference.gradients, &clipped.gradients);
        assert_ne!(free.gradients[0], clipped.gradients[0]);
    }
}

/// With the gradient cut, h before a token is a constant: the same as gates that already
/// hold its contribution, and no R.
#[test]
fn a_cut_gradient_takes_the_hidden_state_as_constant() {
    for function in BOTH {
        let size @ [batch, steps, width] = [2, 6, 8];
        let (heads, dim) = (2, 4);
        let mut problem = Problem::new(config(heads, function), size, 1.0, true);
        problem.config.gradient_cut = true;
        let cut = problem.answer::<f64>(&problem.seeds());
        let mut constant = problem.clone();
        constant.config.gradient_cut = false;
        constant.values[4].fill(0.0);
        let before = |b: usize, t: usize, k: usize| match t {
            0 => problem.values[6][b * width + k],
            _ => cut.outputs[0][(b * steps + t - 1) * width + k],
        };
        let r = |head: usize, gate: usize, d: usize, k: usize| ((head * 4 + gate) * dim + d) * dim + k;
        let mut each = Vec::new();
        for (gate, head, d, k) in
            (0..4 * width * dim).map(|i| (i / (width * dim), i / (dim * dim) % heads, i / dim % dim, i % dim))
        {
            for (b, t) in (0..batch * steps).map(|i| (i / steps, i % steps)) {
                each.push((
                    gate,
                    (b * steps + t) * width + head * dim + d,
                    r(head, gate, d, k),
                    before(b, t, head * dim + k),
                ));
            }
        }
        for &(gate, at, r, h) in &each {
            constant.values[gate][at] += problem.values[4][r] * h;
        }
        let mut reference = constant.answer::<f64>(&problem.seeds());
        reference.gradients[4].fill(0.0);
        for &(gate, at, r, h) in &each {
            reference.gradients[4][r] += reference.gradients[gate][at] * h;
        }
        reference.gradients[6].fill(0.0);
        assert_same(&reference.outputs, &cut.outputs);
        assert_same(&reference.gradients, &cut.gradients);
    }
}

#[test]
fn a_reset_is_a_fresh_start() {
    for function in BOTH {
        let size = [2, 8, 6];
        let mut problem = Problem::new(config(2, function), size, 2.0, true);
        problem.marks = Some((0..16).map(|i| if i % 8 == 3 { RESET } else { 0 }).collect());
        let whole = problem.answer::<f64>(&problem.seeds());
        problem.marks = None;
        let fresh = problem.part(3..8, &[]);
        let mut seeds = problem.seeds();
        seeds[0] = tokens(&seeds[0], size, 3..8);
        let fresh = fresh.answer::<f64>(&seeds);
        assert_same(&fresh.outputs[..1], &[tokens(&whole.outputs[0], size, 3..8)]);
        assert_same(&fresh.outputs[1..], &whole.outputs[1..]);
        let after: Vec<_> = whole.gradients[..4].iter().map(|g| tokens(g, size, 3..8)).collect();
        assert_same(&fresh.gradients[..4], &after);
    }
}

#[test]
fn pads_are_as_if_absent() {
    for function in BOTH {
        let size = [1, 9, 6];
        let mut padded = Problem::new(config(2, function), size, 2.0, true);
        let pads = [0, 3, 4, 8];
        padded.marks = Some((0..9).map(|t| if pads.contains(&t) { PAD } else { 0 }).collect());
        // What stands at a pad may be anything.
        for t in pads {
            padded.values[1][t * 6..][..6].fill(f64::NAN);
        }
        let compact = |x: &[f64]| -> Vec<f64> {
            x.chunks(6).enumerate().filter(|(t, _)| !pads.contains(t)).flat_map(|(_, x)| x.to_vec()).collect()
        };
        let mut dense = padded.clone();
        dense.marks = None;
        dense.size[1] = 5;
        dense.values[..4].iter_mut().for_each(|gate| *gate = compact(gate));
        let mut seeds = padded.seeds();
        let with = padded.answer::<f64>(&seeds);
        seeds[0] = compact(&seeds[0]);
        let without = dense.answer::<f64>(&seeds);
        assert_same(&without.outputs[..1], &[compact(&with.outputs[0])]);
        assert_same(&without.outputs[1..], &with.outputs[1..]);
        let kept: Vec<_> = with.gradients[..4].iter().map(|g| compact(g)).collect();
        assert_same(&without.gradients[..4], &kept);
        assert_same(&without.gradients[4..], &with.gradients[4..]);
        for t in pads {
            assert_eq!(with.outputs[0][t * 6..][..6], [0.0; 6]);
            assert!(with.gradients[..4].iter().all(|g| g[t * 6..][..6] == [0.0; 6]));
        }
    }
}

#[test]
fn extreme_gates_stay_finite() {
    for input_gate in [InputGate::Exponential, InputGate::Sigmoid] {
        for forget_gate in [ForgetGate::Sigmoid, ForgetGate::Exponential] {
            for (function, state) in [(BOTH[0], false), (BOTH[0], true), (BOTH[1], true)] {
                let config = SlstmConfig { input_gate, forget_gate, ..config(2, function) };
                let problem = Problem::new(config, [2, 40, 8], 100.0, state);
                let answer = problem.answer::<f32>(&problem.seeds());
                let mut all = answer.outputs.iter().chain(&answer.gradients).flatten();
                assert!(all.all(|x| x.is_finite()));
            }
        }
    }
}

#[test]
fn evaluation_gives_the_outputs_of_training() {
    let device = Device::cpu(2).expect("two threads");
    for function in BOTH {
        let problem = Problem::new(config(2, function), [3, 9, 12], 2.0, false);
        let trained = device.install(|| problem.answer::<f32>(&problem.seeds())).outputs;
        let mut tape = Tape::new(Mode::Evaluate);
        let vars: Vec<Var> = (0..6).map(|i| tape.input(problem.shape(i))).collect();
        let outputs = record(&problem.config, &mut tape, &vars, &[]).expect("shapes fit");
        outputs.iter().for_each(|&y| tape.keep(y));
        let mut executor = Executor::<f32>::new(tape);
        for (&var, values) in vars.iter().zip(&problem.values) {
            executor.input_mut(var).iter_mut().zip(values).for_each(|(to, from)| *to = *from as f32);
        }
        executor.forward(&[]);
        for (&y, want) in outputs.iter().zip(&trained) {
            assert!(executor.value(y).iter().zip(want).all(|(y, want)| f64::from(*y) == *want));
        }
    }
}

#[test]
fn states_of_the_other_cell_are_refused() {
    let mut tape = Tape::new(Mode::Evaluate);
    let gates = [(); 4].map(|()| tape.input([1, 2, 4]));
    let (r, b) = (tape.input([2, 8, 2]), tape.input([16]));
    let state = SlstmState { h: tape.input([1, 4]), c: tape.input([1, 4]), n: None, m: None };
    let mut run =
        |heads, function, state| slstm(&mut tape, &config(heads, function), gates, r, b, state, None);
    assert!(run(2, CellFunction::Slstm, Some(state)).is_err());
    assert!(run(2, CellFunction::Lstm, Some(state)).is_ok());
    assert!(run(3, CellFunction::Slstm, None).is_err());
    assert!(run(1, CellFunction::Slstm, None).is_err());
}
