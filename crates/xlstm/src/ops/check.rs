//! The test that every operation passes: analytic gradients against central differences
//! in f64, f32 against f64, poisoned buffers, and one thread against three.

use crate::engine::operation::Element;
use crate::engine::tape::{Ids, Mode, Tape, Var};
use crate::engine::{Device, Executor, Shape};
use crate::error::Result;

/// Numbers from a fixed sequence, uniform in [-1, 1).
pub(crate) fn noise(seed: u64, n: usize) -> Vec<f64> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x1234_5678_9abc_def0;
    (0..n)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 11) as f64 / (1u64 << 52) as f64 - 1.0
        })
        .collect()
}

/// What records the operation under test: inputs and ids to the outputs that count.
pub(crate) trait Recording: Fn(&mut Tape, &[Var], &[Ids]) -> Result<Vec<Var>> + Sync {}
impl<F: Fn(&mut Tape, &[Var], &[Ids]) -> Result<Vec<Var>> + Sync> Recording for F {}

/// One operation (or a few) under test.
pub(crate) struct Check {
    inputs: Vec<(Shape, Vec<f64>)>,
    ids: Vec<Vec<u32>>,
    tolerance_f32: f64,
}

impl Check {
    pub(crate) fn new() -> Check {
        Check { inputs: Vec::new(), ids: Vec::new(), tolerance_f32: 2e-5 }
    }

    /// A differentiable input with noise in it.
    pub(crate) fn input<const N: usize>(self, shape: [usize; N]) -> Check {
        let seed = self.inputs.len() as u64 + 1;
        let values = noise(seed, Shape::from(shape).len());
        self.input_of(shape, values)
    }

    /// A differentiable input with given values.
    pub(crate) fn input_of<const N: usize>(mut self, shape: [usize; N], values: Vec<f64>) -> Check {
        self.inputs.push((shape.into(), values));
        self
    }

    /// An integer input.
    pub(crate) fn ids(mut self, ids: &[u32]) -> Check {
        self.ids.push(ids.to_vec());
        self
    }

    /// Largest error of f32 against f64, relative to the largest value of the tensor.
    pub(crate) fn tolerance_f32(mut self, tolerance: f64) -> Check {
        self.tolerance_f32 = tolerance;
        self
    }

    /// Records with `record` (inputs, ids -> outputs that count) and checks everything.
    pub(crate) fn run(&self, record: impl Recording) {
        let single = Device::cpu(1).expect("one thread");
        let triple = Device::cpu(3).expect("three threads");
        let (outputs, gradients) = single.install(|| self.evaluate::<f64>(&record, &self.inputs));
        self.compare_with_differences(&record, &gradients, &single);
        let many = triple.install(|| self.evaluate::<f64>(&record, &self.inputs));
        assert!((&outputs, &gradients) == (&many.0, &many.1), "one thread and three differ");
        let (outputs_f32, gradients_f32) = single.install(|| self.evaluate::<f32>(&record, &self.inputs));
        let pairs = outputs.iter().zip(&outputs_f32).chain(gradients.iter().zip(&gradients_f32));
        for (i, (truth, fast)) in pairs.enumerate() {
            let scale = truth.iter().fold(1e-3, |m: f64, x| m.max(x.abs()));
            for (t, f) in truth.iter().zip(fast) {
                let error = (t - f).abs() / scale;
                assert!(error <= self.tolerance_f32, "tensor {i}: f64 {t}, f32 {f}, error {error:.1e}");
            }
        }
    }

    fn compare_with_differences(&self, record: &impl Recording, gradients: &[Vec<f64>], device: &Device) {
        let loss = |inputs: &[(Shape, Vec<f64>)]| {
            let outputs = device.install(|| self.evaluate::<f64>(record, inputs).0);
            outputs.iter().enumerate().map(|(i, y)| weighted(i, y)).sum::<f64>()
        };
        let step = 1e-5;
        for (i, (_, values)) in self.inputs.iter().enumerate() {
            let scale = gradients[i].iter().fold(1e-2, |m: f64, g| m.max(g.abs()));
            let stride = (values.len() / 40).max(1);
            for j in (0..values.len()).step_by(stride) {
                let mut moved = self.inputs.clone();
                moved[i].1[j] = values[j] + step;
                let above = loss(&moved);
                moved[i].1[j] = values[j] - step;
                let below = loss(&moved);
                let numeric = (above - below) / (2.0 * step);
                let error = (numeric - gradients[i][j]).abs() / scale;
                assert!(error < 1e-6, "input {i}[{j}]: numeric {numeric}, analytic {}", gradients[i][j]);
            }
        }
    }

    /// Outputs, and the gradients of the sum of weighted outputs, in element type T.
    fn evaluate<T: Element>(
        &self,
        record: &impl Recording,
        inputs: &[(Shape, Vec<f64>)],
    ) -> (Vec<Vec<f64>>, Vec<Vec<f64>>) {
        let mut tape = Tape::new(Mode::Train);
        let vars: Vec<Var> = inputs.iter().map(|(shape, _)| tape.input_with_gradient(shape.dims())).collect();
        let ids: Vec<Ids> = self.ids.iter().map(|ids| tape.ids(ids.len())).collect();
        let outputs = record(&mut tape, &vars, &ids).expect("shapes fit");
        for &y in &outputs {
            tape.keep(y);
            tape.seed_gradient(y);
        }
        let mut executor = Executor::<T>::new(tape);
        for ((_, values), &var) in inputs.iter().zip(&vars) {
            for (to, from) in executor.input_mut(var).iter_mut().zip(values) {
                *to = T::from_f64(*from);
            }
        }
        for (values, &var) in self.ids.iter().zip(&ids) {
            executor.ids_mut(var).copy_from_slice(values);
        }
        executor.poison();
        executor.forward(&[]);
        for (i, &y) in outputs.iter().enumerate() {
            let weights = noise(1000 + i as u64, executor.seed_mut(y).len());
            for (to, from) in executor.seed_mut(y).iter_mut().zip(weights) {
                *to = T::from_f64(from);
            }
        }
        executor.backward(&[], &mut []);
        let wide = |x: &[T]| x.iter().map(|x| x.to_f64()).collect::<Vec<f64>>();
        (
            outputs.iter().map(|&y| wide(executor.value(y))).collect(),
            vars.iter().map(|&x| wide(executor.gradient(x))).collect(),
        )
    }
}

fn weighted(output: usize, y: &[f64]) -> f64 {
    noise(1000 + output as u64, y.len()).iter().zip(y).map(|(w, y)| w * y).sum()
}
