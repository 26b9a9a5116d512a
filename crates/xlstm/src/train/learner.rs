//! What learns: a model with its optimizer on one device, a step at a time.

use std::borrow::Cow;
use std::sync::Arc;

use crate::checkpoint::Snapshot;
use crate::data::Batch;
use crate::engine::executor::Culprit;
use crate::engine::{Device, Mode, OperationTime};
use crate::error::Result;
use crate::model::objective::Carry;
use crate::model::{Model, Objective};
use crate::nn::{Parameters, Weights};
use crate::optim::{Optimizer, OptimizerOptions, global_norm};

/// What a step came to. Where one of the two is not finite, it has changed nothing.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Learned {
    /// The mean loss of its targets: of classes and tokens in nats, of numbers the squared error.
    pub loss: f64,
    /// The global norm of the gradients before clipping.
    pub norm: f64,
}

impl Learned {
    /// Whether the step counts.
    pub fn is_finite(&self) -> bool {
        self.loss.is_finite() && self.norm.is_finite()
    }
}

/// What a learner is made for.
#[derive(Clone, Copy, Debug)]
pub struct Task {
    /// Sequences and tokens of the first micro-batches.
    pub shape: [usize; 2],
    /// What the state does between batches.
    pub carry: Carry,
    /// The optimizer's constants.
    pub options: OptimizerOptions,
    /// Seed of dropout.
    pub seed: u64,
    /// On a GPU: replay a step as one graph, not kernel by kernel.
    pub captured: bool,
}

/// A model that learns.
pub trait Learner {
    /// Step number `step`, counted from 0, on these micro-batches at learning rate `rate`:
    /// their gradients, divided by all their targets, are added, clipped and followed. All are
    /// of one shape; where it is not that of the step before, the pass is recorded anew.
    ///
    /// # Errors
    /// When the model cannot read an input, or a GPU fails.
    fn step(&mut self, batches: &[Batch], step: u64, rate: f64) -> Result<Learned>;

    /// The parameters as they are, for evaluation.
    fn weights(&self) -> Weights<f32>;

    /// All that a run goes on from.
    ///
    /// # Errors
    /// When a GPU fails.
    fn snapshot(&self) -> Result<Snapshot<'_>>;

    /// Goes on from a snapshot that was taken after `steps` steps; returns why that may not be
    /// bit for bit, where it may not: on another card, or with another version of its libraries.
    ///
    /// # Errors
    /// When it belongs to another model or batch size, or a GPU fails.
    fn restore(&mut self, snapshot: Snapshot<'_>, steps: u64) -> Result<Option<String>>;

    /// Takes the last batch forward and backward again, operation by operation; returns the
    /// time of each, the most expensive first.
    ///
    /// # Errors
    /// When a GPU fails.
    fn profile(&mut self) -> Result<Vec<OperationTime>>;

    /// After a step that was not finite: the first operation to blame, as far as it is found.
    ///
    /// # Errors
    /// When a GPU fails.
    fn find_non_finite(&mut self) -> Result<Option<Culprit>>;
}

/// A learner of `model` on `device`, starting from `parameters`.
///
/// # Errors
/// When shapes do not fit, or a GPU's memory runs out.
pub fn learner(
    model: &Arc<impl Model + 'static>,
    parameters: Parameters<f32>,
    task: Task,
    device: &Device,
) -> Result<Box<dyn Learner>> {
    let model: Arc<dyn Model> = model.clone();
    match device {
        Device::Cpu(..) => Ok(Box::new(CpuLearner::new(model, parameters, task, device)?)),
        #[cfg(feature = "cuda")]
        Device::Cuda(gpu, precision) => {
            Ok(Box::new(super::cuda::CudaLearner::new(model, &parameters, task, gpu, *precision)?))
        }
    }
}

/// What a mean over the targets of all micro-batches multiplies by.
pub(super) fn scale_of(batches: &[Batch]) -> f64 {
    let targets: usize = batches.iter().map(|batch| batch.target_count).sum();
    1.0 / targets.max(1) as f64
}

/// Records the pass anew where these batches are not of its shape; returns whether it was.
pub(super) fn fit(
    objective: &mut Objective<f32>,
    model: &dyn Model,
    batches: &[Batch],
    device: &Device,
) -> Result<bool> {
    let shape = batches.first().map_or(objective.shape(), |batch| [batch.batch_size, batch.length]);
    let differs = shape != objective.shape();
    if differs {
        objective.reshape(model, shape, device)?;
    }
    Ok(differs)
}

/// A learner on the processor.
struct CpuLearner {
    device: Device,
    model: Arc<dyn Model>,
    parameters: Arc<Parameters<f32>>,
    gradients: Vec<Vec<f32>>,
    optimizer: Optimizer<f32>,
    objective: Objective<f32>,
    seed: u64,
}

impl CpuLearner {
    fn new(
        model: Arc<dyn Model>,
        parameters: Parameters<f32>,
        task: Task,
        device: &Device,
    ) -> Result<CpuLearner> {
        Ok(CpuLearner {
            device: device.clone(),
            gradients: parameters.zeros_like(),
            optimizer: Optimizer::new(task.options, &parameters),
            objective: Objective::new(&*model, Mode::Train, task.shape, task.carry, device)?,
            parameters: Arc::new(parameters),
            model,
            seed: task.seed,
        })
    }

    fn step_in_pool(&mut self, batches: &[Batch], step: u64, rate: f64) -> Result<Learned> {
        fit(&mut self.objective, &*self.model, batches, &self.device)?;
        self.gradients.iter_mut().for_each(|g| g.fill(0.0));
        let scale = scale_of(batches);
        let mut loss = 0.0;
        for (index, batch) in (0..).zip(batches) {
            self.objective.set_seed(self.seed, step, index)?;
            let part = self.objective.forward(&self.parameters.values, batch, scale)?;
            if !part.is_finite() {
                return Ok(Learned { loss: part, norm: f64::NAN });
            }
            loss += part;
            self.objective.backward(&self.parameters.values, &mut self.gradients)?;
            self.objective.carry_state()?;
        }
        let norm = global_norm(&self.gradients);
        if norm.is_finite() {
            // Nobody else holds the parameters while a step is made.
            let parameters = Arc::make_mut(&mut self.parameters);
            self.optimizer.update(parameters, &self.gradients, norm, rate);
        }
        Ok(Learned { loss, norm })
    }
}

impl Learner for CpuLearner {
    fn step(&mut self, batches: &[Batch], step: u64, rate: f64) -> Result<Learned> {
        let device = self.device.clone();
        device.install(|| self.step_in_pool(batches, step, rate))
    }

    fn weights(&self) -> Weights<f32> {
        Weights::Cpu(self.parameters.clone())
    }

    fn snapshot(&self) -> Result<Snapshot<'_>> {
        Ok(Snapshot {
            parameters: Cow::Borrowed(&self.parameters),
            first: Cow::Borrowed(&self.optimizer.first),
            second: Cow::Borrowed(&self.optimizer.second),
            carried: self.objective.state()?,
            algorithms: None,
        })
    }

    fn restore(&mut self, snapshot: Snapshot<'_>, steps: u64) -> Result<Option<String>> {
        self.parameters = Arc::new(snapshot.parameters.into_owned());
        self.optimizer.first = snapshot.first.into_owned();
        self.optimizer.second = snapshot.second.into_owned();
        self.optimizer.steps = steps;
        self.objective.set_state(&snapshot.carried)?;
        Ok(snapshot.algorithms.map(|_| String::from("the run was on a GPU before")))
    }

    fn profile(&mut self) -> Result<Vec<OperationTime>> {
        let (objective, values, gradients) =
            (&mut self.objective, &self.parameters.values, &mut self.gradients);
        self.device.install(|| objective.profile(values, gradients))
    }

    fn find_non_finite(&mut self) -> Result<Option<Culprit>> {
        self.gradients.iter_mut().for_each(|g| g.fill(0.0));
        let (objective, values, gradients) =
            (&mut self.objective, &self.parameters.values, &mut self.gradients);
        self.device.install(|| objective.find_non_finite(values, gradients))
    }
}
