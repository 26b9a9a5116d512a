//! A learner on a GPU. A step, all micro-batches, clipping and update included, is one CUDA
//! graph; what changes between steps is uploaded before it.

use std::borrow::Cow;
use std::sync::Arc;

use super::learner::{Learned, Learner, Task, fit, scale_of};
use crate::checkpoint::Snapshot;
use crate::data::Batch;
use crate::engine::cuda::context::Buffer;
use crate::engine::cuda::graph::Graph;
use crate::engine::cuda::{CudaParameters, CudaTensors, Gpu};
use crate::engine::executor::Culprit;
use crate::engine::{Device, Mode, OperationTime, Precision};
use crate::error::Result;
use crate::model::{Model, Objective};
use crate::nn::{Parameters, Weights};
use crate::optim::cuda::{CudaOptimizer, layout_of};

/// See [`learner`](super::learner::learner).
pub(super) struct CudaLearner {
    gpu: Arc<Gpu>,
    device: Device,
    model: Arc<dyn Model>,
    parameters: Arc<CudaParameters>,
    gradients: CudaTensors,
    optimizer: CudaOptimizer,
    objective: Objective<f32>,
    seed: u64,
    captured: bool,
    queued: Option<Queued>,
}

/// The recorded work of a step of so many micro-batches.
struct Queued {
    micro_batches: usize,
    /// The integers of all of them, one after the other.
    ids: Buffer,
    /// The loss of each.
    losses: Buffer,
    graph: Graph,
}

impl CudaLearner {
    pub(super) fn new(
        model: Arc<dyn Model>,
        parameters: &Parameters<f32>,
        task: Task,
        gpu: &Arc<Gpu>,
        precision: Precision,
    ) -> Result<CudaLearner> {
        let layout = layout_of(model.specs());
        let placed = CudaParameters::zeros(gpu, &layout, precision)?;
        placed.upload(&parameters.values)?;
        gpu.search(true);
        let device = Device::Cuda(gpu.clone(), precision);
        Ok(CudaLearner {
            gpu: gpu.clone(),
            parameters: Arc::new(placed),
            gradients: CudaTensors::zeros(gpu, &layout)?,
            optimizer: CudaOptimizer::new(gpu, model.specs(), task.options, precision)?,
            objective: Objective::new(&*model, Mode::Train, task.shape, task.carry, &device)?,
            device,
            model,
            seed: task.seed,
            captured: task.captured,
            queued: None,
        })
    }
}

impl Learner for CudaLearner {
    fn step(&mut self, batches: &[Batch], step: u64, rate: f64) -> Result<Learned> {
        if fit(&mut self.objective, &*self.model, batches, &self.device)? {
            self.queued = None;
        }
        let mut ids = Vec::new();
        for (index, batch) in (0..).zip(batches) {
            self.objective.set_seed(self.seed, step, index)?;
            self.objective.set_batch(batch)?;
            ids.extend_from_slice(self.objective.staged_ids()?);
        }
        let mut queued = match self.queued.take() {
            Some(queued) if queued.micro_batches == batches.len() => queued,
            _ => Queued {
                micro_batches: batches.len(),
                ids: Buffer::zeros(&self.gpu, ids.len() * 4)?,
                losses: Buffer::zeros(&self.gpu, batches.len() * 4)?,
                graph: Graph::default(),
            },
        };
        self.gpu.enter()?;
        self.gpu.upload(queued.ids.pointer(), &ids)?;
        self.objective.set_scale(scale_of(batches))?;
        self.optimizer.prepare(rate)?;
        let bytes = (ids.len() / batches.len().max(1) * 4) as u64;
        let (first_ids, first_loss) = (queued.ids.pointer(), queued.losses.pointer());
        let gpu = self.gpu.clone();
        let captured = self.captured;
        let mut work = || -> Result<()> {
            self.objective.forget_non_finite()?;
            for index in 0..batches.len() as u64 {
                let (ids, loss) = (first_ids + index * bytes, first_loss + 4 * index);
                self.objective.queue(&self.parameters, &mut self.gradients, (ids, loss), index == 0)?;
            }
            self.optimizer.queue(self.objective.work_queue()?, &self.parameters, &self.gradients)
        };
        if captured {
            queued.graph.run(&gpu, work)?
        } else {
            work()?
        }
        let mut losses = vec![0.0f32; batches.len()];
        self.gpu.download(&mut losses, queued.losses.pointer())?;
        self.queued = Some(queued);
        let loss = losses.iter().map(|loss| f64::from(*loss)).sum();
        Ok(Learned { loss, norm: self.optimizer.norm()? })
    }

    fn weights(&self) -> Weights<f32> {
        Weights::Cuda(self.parameters.clone())
    }

    fn snapshot(&self) -> Result<Snapshot<'_>> {
        let mut parameters = Parameters::zeros(self.model.specs());
        parameters.values = self.parameters.download()?;
        let (first, second) = self.optimizer.moments();
        Ok(Snapshot {
            parameters: Cow::Owned(parameters),
            first: Cow::Owned(first.download()?),
            second: Cow::Owned(second.download()?),
            carried: self.objective.state()?,
            algorithms: Some(self.gpu.export_algorithms()?),
        })
    }

    fn restore(&mut self, snapshot: Snapshot<'_>, steps: u64) -> Result<Option<String>> {
        self.parameters.upload(&snapshot.parameters.values)?;
        self.optimizer.restore(&snapshot.first, &snapshot.second, steps)?;
        self.objective.set_state(&snapshot.carried)?;
        match &snapshot.algorithms {
            Some(algorithms) => self.gpu.import_algorithms(algorithms),
            None => Ok(Some(String::from("the run was on the processor before"))),
        }
    }

    fn profile(&mut self) -> Result<Vec<OperationTime>> {
        self.objective.profile(&*self.parameters, &mut self.gradients)
    }

    fn find_non_finite(&mut self) -> Result<Option<Culprit>> {
        self.objective.find_non_finite(&*self.parameters, &mut self.gradients)
    }
}
