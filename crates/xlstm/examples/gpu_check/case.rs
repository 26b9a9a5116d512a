//! A recording with its inputs, and what it gives on the processor and on a GPU.

use std::sync::Arc;

use xlstm::engine::cuda::{CudaExecutor, CudaParameters, CudaTensors, Gpu, Layout};
use xlstm::engine::{Executor, Ids, Mode, Precision, Shape, Tape, Var};
use xlstm::marks::{PAD, RESET};

/// What is put on a tape: of its inputs and ids the outputs.
pub type Record<'a> = &'a dyn Fn(&mut Tape, &[Var], &[Ids]) -> xlstm::Result<Vec<Var>>;

/// Numbers in [-1, 1) that f32 can hold.
pub fn noise(seed: u64, n: usize) -> Vec<f64> {
    let mut rng = xlstm::rng::Rng::new(seed, 77);
    (0..n).map(|_| f64::from((2.0 * rng.uniform() - 1.0) as f32)).collect()
}

/// Marks of some tokens: resets, pads and both.
pub fn marks(n: usize) -> Vec<u32> {
    (0..n).map(|i| [0, 0, RESET, 0, 0, PAD, 0, PAD | RESET, 0, 0, 0, 0, PAD][i * 7 % 13]).collect()
}

/// A recording with its inputs, and what backward starts from (noise where not given).
#[derive(Clone, Default)]
pub struct Case {
    pub inputs: Vec<(Vec<usize>, Vec<f64>)>,
    /// Shapes of the first parameters, which the recording gets after the inputs.
    pub weights: Vec<Vec<usize>>,
    pub ids: Vec<Vec<u32>>,
    pub parameters: Vec<Vec<f64>>,
    pub seeds: Option<Vec<Vec<f64>>>,
    /// As in generation: without gradients.
    pub evaluated: bool,
}

/// A tape, its inputs and ids, and the outputs that count.
pub type Recorded = (Tape, Vec<Var>, Vec<Ids>, Vec<Var>);

/// Outputs, gradients of the inputs, gradients of the parameters.
pub type Tensors = [Vec<Vec<f64>>; 3];

impl Case {
    pub fn input(mut self, shape: &[usize]) -> Case {
        let seed = self.inputs.len() as u64 + 1;
        self.inputs.push((shape.to_vec(), noise(seed, shape.iter().product())));
        self
    }

    /// An input in [low, high).
    pub fn between(mut self, shape: &[usize], low: f64, high: f64) -> Case {
        self = self.input(shape);
        if let Some((_, values)) = self.inputs.last_mut() {
            values.iter_mut().for_each(|x| *x = f64::from((low + (high - low) * (*x + 1.0) / 2.0) as f32));
        }
        self
    }

    /// A weight matrix: in bf16 it has to be a parameter.
    pub fn weight(mut self, shape: &[usize]) -> Case {
        let seed = 500 + self.weights.len() as u64;
        self.weights.push(shape.to_vec());
        self.parameters.push(noise(seed, shape.iter().product()));
        self
    }

    /// All numbers as `precision` can store them, so that both sides start from the same.
    pub fn rounded(&self, precision: Precision) -> Case {
        let mut case = self.clone();
        let inputs = case.inputs.iter_mut().map(|(_, values)| values);
        for values in inputs.chain(&mut case.parameters).chain(case.seeds.iter_mut().flatten()) {
            round(precision, values);
        }
        case
    }

    pub fn ids(mut self, ids: Vec<u32>) -> Case {
        self.ids.push(ids);
        self
    }

    pub fn tape(&self, record: Record<'_>) -> xlstm::Result<Recorded> {
        let mut tape = Tape::new(if self.evaluated { Mode::Evaluate } else { Mode::Train });
        let shapes = self.inputs.iter().map(|(shape, _)| Shape::from(&shape[..]));
        let vars: Vec<Var> = if self.evaluated {
            shapes.map(|shape| tape.input(shape)).collect()
        } else {
            shapes.map(|shape| tape.input_with_gradient(shape)).collect()
        };
        let ids: Vec<Ids> = self.ids.iter().map(|ids| tape.ids(ids.len())).collect();
        let weights = self.weights.iter().enumerate();
        let weights = weights.map(|(i, shape)| tape.parameter(i, 0, Shape::from(&shape[..])));
        let given: Vec<Var> = vars.iter().copied().chain(weights.collect::<Vec<_>>()).collect();
        let outputs = record(&mut tape, &given, &ids)?;
        for &y in &outputs {
            tape.keep(y);
            if !self.evaluated {
                tape.seed_gradient(y);
            }
        }
        Ok((tape, vars, ids, outputs))
    }

    /// Noise is rounded to bf16, which f32 stores as well.
    pub fn seed(&self, output: usize, n: usize) -> Vec<f64> {
        if let Some(seeds) = &self.seeds {
            return seeds[output].clone();
        }
        let mut seed = noise(1000 + output as u64, n);
        round(Precision::Bf16, &mut seed);
        seed
    }

    pub fn cpu(&self, record: Record<'_>) -> xlstm::Result<Tensors> {
        let (tape, vars, ids, outputs) = self.tape(record)?;
        let mut executor = Executor::<f64>::new(tape);
        for ((_, values), &var) in self.inputs.iter().zip(&vars) {
            executor.input_mut(var).copy_from_slice(values);
        }
        for (values, &var) in self.ids.iter().zip(&ids) {
            executor.ids_mut(var).copy_from_slice(values);
        }
        executor.forward(&self.parameters);
        if self.evaluated {
            return Ok([outputs.iter().map(|&y| executor.value(y).to_vec()).collect(), vec![], vec![]]);
        }
        for (i, &y) in outputs.iter().enumerate() {
            let seed = self.seed(i, executor.seed_mut(y).len());
            executor.seed_mut(y).copy_from_slice(&seed);
        }
        let mut gradients: Vec<Vec<f64>> = self.parameters.iter().map(|p| vec![0.0; p.len()]).collect();
        executor.backward(&self.parameters, &mut gradients);
        Ok([
            outputs.iter().map(|&y| executor.value(y).to_vec()).collect(),
            vars.iter().map(|&x| executor.gradient(x).to_vec()).collect(),
            gradients,
        ])
    }

    pub fn gpu(&self, record: Record<'_>, precision: Precision, gpu: &Arc<Gpu>) -> xlstm::Result<Tensors> {
        let (tape, vars, ids, outputs) = self.tape(record)?;
        let lengths: Vec<usize> = outputs.iter().map(|&y| tape.shape(y).len()).collect();
        let mut executor = CudaExecutor::new(tape, precision, gpu)?;
        let layout = Layout::new(self.parameters.iter().map(Vec::len));
        let parameters = CudaParameters::zeros(gpu, &layout, precision)?;
        let mut gradients = CudaTensors::zeros(gpu, &layout)?;
        parameters.upload(&self.parameters.iter().map(|p| narrow(p)).collect::<Vec<_>>())?;
        for ((_, values), &var) in self.inputs.iter().zip(&vars) {
            executor.set_input(var, &narrow(values))?;
        }
        for (values, &var) in self.ids.iter().zip(&ids) {
            executor.set_ids(var, values)?;
        }
        // Twice, so that work space has its size when it is poisoned.
        for _ in 0..2 {
            executor.poison()?;
            executor.forward(&parameters, &[])?;
            if self.evaluated {
                continue;
            }
            for (i, &y) in outputs.iter().enumerate() {
                executor.set_seed(y, &narrow(&self.seed(i, lengths[i])))?;
            }
            gradients.clear()?;
            executor.backward(&parameters, &mut gradients)?;
        }
        let values = outputs.iter().map(|&y| Ok(wide(&executor.value(y)?)));
        if self.evaluated {
            return Ok([values.collect::<xlstm::Result<_>>()?, vec![], vec![]]);
        }
        let of_inputs = vars.iter().map(|&x| Ok(wide(&executor.gradient(x)?)));
        Ok([
            values.collect::<xlstm::Result<_>>()?,
            of_inputs.collect::<xlstm::Result<_>>()?,
            gradients.download()?.iter().map(|g| wide(g)).collect(),
        ])
    }
}

pub fn narrow(x: &[f64]) -> Vec<f32> {
    x.iter().map(|x| *x as f32).collect()
}

pub fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|x| f64::from(*x)).collect()
}

pub fn round(precision: Precision, values: &mut [f64]) {
    values.iter_mut().for_each(|x| *x = f64::from(precision.round(*x as f32)));
}
