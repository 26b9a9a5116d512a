//! The forms agree, in value and gradient, for random shapes, chunk sizes and gates.

use proptest::prelude::*;

use super::{Form, MlstmConfig, MlstmState, mlstm};
use crate::cell::{ForgetGate, InputGate};
use crate::engine::operation::Element;
use crate::engine::tape::{Mode, Tape, Var};
use crate::engine::{Executor, Shape};
use crate::ops::check::{Check, noise};
use crate::ops::{PAD, RESET};

fn config(heads: usize, form: Form) -> MlstmConfig {
    MlstmConfig {
        heads,
        input_gate: InputGate::Exponential,
        forget_gate: ForgetGate::Sigmoid,
        normalize: true,
        eps: 1e-6,
        form,
    }
}

/// Inputs in the order of the operation: q, k, v, ~i, ~f, then C, n, m.
#[derive(Clone, Debug)]
struct Problem {
    sizes: [usize; 5],
    inputs: Vec<(Shape, Vec<f64>)>,
    marks: Vec<u32>,
}

impl Problem {
    /// (batch, length, heads, dqk, dhv), gates scaled by `spread`, with or without a state.
    fn new(sizes: [usize; 5], spread: f64, state: bool, seed: u64) -> Problem {
        let [b, s, nh, dqk, dhv] = sizes;
        let shapes = [
            Shape::from([b, s, nh * dqk]),
            Shape::from([b, s, nh * dqk]),
            Shape::from([b, s, nh * dhv]),
            Shape::from([b, s, nh]),
            Shape::from([b, s, nh]),
            Shape::from([b, nh, dqk, dhv]),
            Shape::from([b, nh, dqk]),
            Shape::from([b, nh]),
        ];
        let count = if state { 8 } else { 5 };
        let scale = |i: usize| if i == 3 || i == 4 { spread } else { 1.0 };
        let inputs = (0..count)
            .map(|i| {
                let values = noise(seed * 31 + i as u64 + 1, shapes[i].len());
                (shapes[i], values.iter().map(|x| 2.0 * x * scale(i)).collect())
            })
            .collect();
        Problem { sizes, inputs, marks: vec![0; b * s] }
    }

    /// h, C, n, m and the gradients of all inputs, for weights (one set an output; empty
    /// where that output does not count).
    fn run<T: Element>(&self, config: &MlstmConfig, weights: &[Vec<f64>]) -> (Vec<Vec<f64>>, Vec<Vec<f64>>) {
        let mut tape = Tape::new(Mode::Train);
        let vars: Vec<Var> = self.inputs.iter().map(|(s, _)| tape.input_with_gradient(s.dims())).collect();
        let marks = self.marks.iter().any(|m| *m != 0).then(|| tape.ids(self.marks.len()));
        let state = (vars.len() > 5).then(|| MlstmState { c: vars[5], n: vars[6], m: vars[7] });
        let (h, last) = mlstm(&mut tape, config, vars[0], vars[1], vars[2], (vars[3], vars[4]), state, marks)
            .expect("shapes fit");
        let outputs = [h, last.c, last.n, last.m];
        for (&y, w) in outputs.iter().zip(weights) {
            tape.keep(y);
            if !w.is_empty() {
                tape.seed_gradient(y);
            }
        }
        let mut executor = Executor::<T>::new(tape);
        for ((_, values), &var) in self.inputs.iter().zip(&vars) {
            for (to, from) in executor.input_mut(var).iter_mut().zip(values) {
                *to = T::from_f64(*from);
            }
        }
        if let Some(ids) = marks {
            executor.ids_mut(ids).copy_from_slice(&self.marks);
        }
        executor.poison();
        executor.forward(&[]);
        for (&y, w) in outputs.iter().zip(weights).filter(|(_, w)| !w.is_empty()) {
            for (to, from) in executor.seed_mut(y).iter_mut().zip(w) {
                *to = T::from_f64(*from);
            }
        }
        executor.backward(&[], &mut []);
        let wide = |x: &[T]| x.iter().map(|x| x.to_f64()).collect::<Vec<f64>>();
        (
            outputs.iter().map(|&y| wide(executor.value(y))).collect(),
            vars.iter().map(|&x| wide(executor.gradient(x))).collect(),
        )
    }

    /// Random weights for h and, where asked for, the last state.
    fn weights(&self, last_state: bool) -> Vec<Vec<f64>> {
        let [b, s, nh, dqk, dhv] = self.sizes;
        let sizes = [b * s * nh * dhv, b * nh * dqk * dhv, b * nh * dqk, b * nh];
        (0..4).map(|i| if i == 0 || last_state { noise(77 + i as u64, sizes[i]) } else { vec![] }).collect()
    }
}

/// Largest difference, relative to the largest value of the tensor.
fn assert_close(what: &str, a: &[Vec<f64>], b: &[Vec<f64>], tolerance: f64) {
    assert_eq!(a.len(), b.len());
    for (i, (a, b)) in a.iter().zip(b).enumerate() {
        let scale = a.iter().chain(b).fold(1e-3, |m: f64, x| m.max(x.abs()));
        for (j, (x, y)) in a.iter().zip(b).enumerate() {
            let error = (x - y).abs() / scale;
            assert!(
                error <= tolerance,
                "{what}, tensor {i}[{j}]: {x} and {y}, error {error:.1e} of {scale:.1e}"
            );
        }
    }
}

#[test]
fn differences_with_state_marks_and_every_gate() {
    for input_gate in [InputGate::Exponential, InputGate::Sigmoid] {
        for forget_gate in [ForgetGate::Sigmoid, ForgetGate::Exponential] {
            for form in [Form::Recurrent, Form::Chunkwise(3)] {
                let config = MlstmConfig { input_gate, forget_gate, eps: 1e-3, ..config(2, form) };
                Check::new()
                    .input([2, 7, 6])
                    .input([2, 7, 6])
                    .input([2, 7, 4])
                    .input([2, 7, 2])
                    .input([2, 7, 2])
                    .input([2, 2, 3, 2])
                    .input([2, 2, 3])
                    .input([2, 2])
                    .ids(&[0, 0, RESET, 0, PAD, 0, 0, RESET, 0, 0, 0, RESET, PAD, PAD])
                    .run(|tape, v, ids| {
                        let state = Some(MlstmState { c: v[5], n: v[6], m: v[7] });
                        let gates = (v[3], v[4]);
                        let (h, s) = mlstm(tape, &config, v[0], v[1], v[2], gates, state, Some(ids[0]))?;
                        Ok(vec![h, s.c, s.n, s.m])
                    });
            }
        }
    }
}

#[test]
fn differences_of_the_parallel_form_and_without_normalizer() {
    for (form, normalize) in [(Form::Parallel, true), (Form::Parallel, false), (Form::Chunkwise(4), false)] {
        let input_gate = if normalize { InputGate::Exponential } else { InputGate::Sigmoid };
        let config = MlstmConfig { normalize, input_gate, eps: 1e-3, ..config(1, form) };
        Check::new()
            .input([2, 6, 3])
            .input([2, 6, 3])
            .input([2, 6, 4])
            .input([2, 6, 1])
            .input([2, 6, 1])
            .run(|tape, v, _| Ok(vec![mlstm(tape, &config, v[0], v[1], v[2], (v[3], v[4]), None, None)?.0]));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn chunkwise_is_recurrent(
        b in 1usize..3, s in 1usize..40, nh in 1usize..3, dqk in 1usize..7, dhv in 1usize..7,
        chunk in 1usize..20, spread in prop::sample::select(vec![0.5, 5.0, 50.0]),
        state: bool, last: bool, sigmoid: bool, exponential: bool, mark in prop::collection::vec(0u32..12, 80), seed in 0u64..1000,
    ) {
        let mut problem = Problem::new([b, s, nh, dqk, dhv], spread, state, seed);
        for (to, from) in problem.marks.iter_mut().zip(&mark) {
            *to = match from { 0 => RESET, 1 => PAD, 2 => RESET | PAD, _ => 0 };
        }
        let gates = |form| MlstmConfig {
            input_gate: if sigmoid { InputGate::Sigmoid } else { InputGate::Exponential },
            forget_gate: if exponential { ForgetGate::Exponential } else { ForgetGate::Sigmoid },
            ..config(nh, form)
        };
        let weights = problem.weights(last);
        let truth = problem.run::<f64>(&gates(Form::Recurrent), &weights);
        let fast = problem.run::<f64>(&gates(Form::Chunkwise(chunk)), &weights);
        assert_close("output", &truth.0, &fast.0, 1e-9);
        assert_close("gradient", &truth.1, &fast.1, 1e-7);
        let single = problem.run::<f32>(&gates(Form::Chunkwise(chunk)), &weights);
        prop_assert!(single.0.iter().chain(&single.1).flatten().all(|x| x.is_finite()), "f32 is not finite");
        // A large h is a normaliser that nearly cancelled: f32 loses as much there.
        let largest = truth.0[0].iter().fold(1.0, |m: f64, h| m.max(h.abs()));
        if spread < 10.0 {
            assert_close("output in f32", &truth.0, &single.0, 2e-5 * largest);
        }
    }

    #[test]
    fn parallel_is_recurrent(
        s in 1usize..30, nh in 1usize..3, spread in prop::sample::select(vec![0.5, 5.0, 50.0]),
        mark in prop::collection::vec(0u32..8, 60), seed in 0u64..1000,
    ) {
        let mut problem = Problem::new([2, s, nh, 4, 5], spread, false, seed);
        for (to, from) in problem.marks.iter_mut().zip(&mark) {
            *to = match from { 0 => RESET, 1 => PAD, _ => 0 };
        }
        // Without m_0 eps is seen in another scale, so leave it out.
        let free = |form| MlstmConfig { eps: 0.0, ..config(nh, form) };
        let weights = problem.weights(false);
        let truth = problem.run::<f64>(&free(Form::Recurrent), &weights);
        let fast = problem.run::<f64>(&free(Form::Parallel), &weights);
        assert_close("output", &truth.0[..1], &fast.0[..1], 1e-9);
        assert_close("gradient", &truth.1, &fast.1, 1e-6);
    }
}

#[test]
fn gates_of_a_hundred_stay_finite_in_f32() {
    for (i, f) in [(100.0, 100.0), (-100.0, 100.0), (100.0, -100.0), (-100.0, -100.0)] {
        for forget_gate in [ForgetGate::Sigmoid, ForgetGate::Exponential] {
            let mut problem = Problem::new([1, 70, 1, 8, 8], 0.0, true, 5);
            problem.inputs[3].1.fill(i);
            problem.inputs[4].1.fill(f);
            let config = MlstmConfig { forget_gate, ..config(1, Form::Chunkwise(16)) };
            let (outputs, gradients) = problem.run::<f32>(&config, &problem.weights(true));
            assert!(outputs.iter().chain(&gradients).flatten().all(|x| x.is_finite()), "i {i}, f {f}");
        }
    }
}
