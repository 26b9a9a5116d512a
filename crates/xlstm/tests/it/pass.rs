//! A recorded pass on the device under test: the processor, or with `XLSTM_DEVICE=cuda:0` (and
//! the feature `cuda`, and `--test-threads=1`, since a GPU has one queue) a GPU in f32.

use std::sync::{Arc, OnceLock};

use xlstm::engine::operation::Element;
use xlstm::engine::{Device, DeviceChoice, Gradients, Ids, Precision, Program, Tape, Values, Var};
use xlstm::nn::{Parameters, Weights};

/// The device under test.
pub fn device() -> Device {
    static DEVICE: OnceLock<Device> = OnceLock::new();
    let choose = || {
        let name = std::env::var("XLSTM_DEVICE").unwrap_or_else(|_| "cpu".into());
        let choice: DeviceChoice = name.parse().expect("XLSTM_DEVICE is a device");
        Device::choose(choice, Some(Precision::F32), 2).expect("the device under test").0
    };
    DEVICE.get_or_init(choose).clone()
}

/// Whether the device computes in f32 whatever the type asked for.
pub fn on_gpu() -> bool {
    !matches!(device(), Device::Cpu(..))
}

/// Parameters and their gradients on the device.
pub struct Held<T> {
    weights: Weights<T>,
    gradients: Sums<T>,
}

enum Sums<T> {
    Cpu(Vec<Vec<T>>),
    #[cfg(feature = "cuda")]
    Cuda(xlstm::engine::cuda::CudaTensors),
}

impl<T: Element> Held<T> {
    /// A copy of `parameters`, and gradients of zero.
    pub fn new(parameters: &Parameters<T>) -> Held<T> {
        let weights = Weights::new(Arc::new(parameters.clone()), &device()).expect("weights");
        let gradients = match &weights {
            Weights::Cpu(_) | Weights::Stored(_) => Sums::Cpu(parameters.zeros_like()),
            #[cfg(feature = "cuda")]
            Weights::Cuda(weights) => Sums::Cuda(weights.zeros_like().expect("gradients")),
        };
        Held { weights, gradients }
    }

    pub fn values(&self) -> Values<'_, T> {
        self.weights.values()
    }

    /// Lets `backward` add to the gradients.
    pub fn add(&mut self, backward: impl FnOnce(Values<'_, T>, Gradients<'_, T>) -> xlstm::Result<()>) {
        let gradients = match &mut self.gradients {
            Sums::Cpu(gradients) => gradients.into(),
            #[cfg(feature = "cuda")]
            Sums::Cuda(gradients) => gradients.into(),
        };
        backward(self.weights.values(), gradients).expect("backward");
    }

    pub fn gradients(&self) -> Vec<Vec<f64>> {
        match &self.gradients {
            Sums::Cpu(gradients) => gradients.iter().map(|g| wide(g)).collect(),
            #[cfg(feature = "cuda")]
            Sums::Cuda(gradients) => {
                gradients.download().expect("gradients").iter().map(|g| wide(g)).collect()
            }
        }
    }
}

/// A program with its parameters and gradients; numbers go in and out as f64.
pub struct Pass<T> {
    pub program: Program<T>,
    held: Held<T>,
}

fn narrow<T: Element>(values: &[f64]) -> Vec<T> {
    values.iter().map(|x| T::from_f64(*x)).collect()
}

fn wide<T: Element>(values: &[T]) -> Vec<f64> {
    values.iter().map(|x| x.to_f64()).collect()
}

impl<T: Element> Pass<T> {
    /// `tape` over `parameters`, every buffer poisoned.
    pub fn new(tape: Tape, parameters: &Parameters<T>) -> Pass<T> {
        let mut program = Program::new(tape, &device()).expect("a program");
        program.poison().expect("poisoned");
        Pass { program, held: Held::new(parameters) }
    }

    /// `tape` without parameters.
    pub fn bare(tape: Tape) -> Pass<T> {
        Pass::new(tape, &Parameters::zeros(&[].into()))
    }

    pub fn set(&mut self, var: Var, values: &[f64]) {
        self.program.set_input(var, &narrow(values)).expect("an input");
    }

    pub fn seed(&mut self, var: Var, values: &[f64]) {
        self.program.set_seed(var, &narrow(values)).expect("a seed");
    }

    pub fn ids(&mut self, ids: Ids, values: &[u32]) {
        self.program.set_ids(ids, values).expect("ids");
    }

    pub fn forward(&mut self) {
        self.program.forward(self.held.values()).expect("forward");
    }

    pub fn backward(&mut self) {
        self.held.add(|values, gradients| self.program.backward(values, gradients));
    }

    pub fn value(&self, var: Var) -> Vec<f64> {
        wide(&self.program.value(var).expect("a value"))
    }

    /// The gradient of an input.
    pub fn gradient(&self, var: Var) -> Vec<f64> {
        wide(&self.program.gradient(var).expect("a gradient"))
    }

    /// The gradients of the parameters.
    pub fn gradients(&self) -> Vec<Vec<f64>> {
        self.held.gradients()
    }
}
