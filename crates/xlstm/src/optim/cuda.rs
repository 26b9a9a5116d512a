//! The optimizer on a GPU: the norm, Muon for matrices where that is asked for, AdamW for all else.

use std::sync::Arc;

use super::cuda_muon::{CudaMuon, Step};
use super::{AdamWOptions, OptimizerOptions};
use crate::engine::Precision;
use crate::engine::cuda::context::{Buffer, arguments};
use crate::engine::cuda::launch::Queue;
use crate::engine::cuda::parameters::ALIGNMENT;
use crate::engine::cuda::{CudaParameters, CudaTensors, Gpu, Layout, Source};
use crate::error::Result;
use crate::nn::{ParameterSpec, Role};

/// The layout of a model's parameters.
pub fn layout_of(specs: &[ParameterSpec]) -> Layout {
    Layout::new(specs.iter().map(|spec| spec.shape.iter().product()))
}

const ADAMW: Source = Source::new("adamw", include_str!("adamw.cu"));

/// Elements that a partial sum of the norm covers.
const NORM_TILE: usize = 8192;

/// Numbers in `rates`.
const RATES: usize = 6;

/// What a block of elements is: DECAY, BORDER and MATRICES of adamw.cu.
const DECAY: u32 = 1;
const BORDER: u32 = 2;
const MATRICES: u32 = 4;

/// The optimizer on the GPU: the twin of [`Optimizer`](super::Optimizer), with the norm. What changes
/// between steps lies in device memory: `rates` are learning rates, with Adam's corrections, `outcome` the
/// norm, the clipping factor and whether the norm was finite; the update is skipped where not.
#[derive(Debug)]
pub struct CudaOptimizer {
    options: OptimizerOptions,
    muon: Option<CudaMuon>,
    first: CudaTensors,
    second: CudaTensors,
    /// What each block of 64 elements is.
    kinds: Buffer,
    partials: Buffer,
    rates: Buffer,
    outcome: Buffer,
    /// Steps taken.
    pub steps: u64,
}

impl CudaOptimizer {
    /// No step taken yet. Muon multiplies in `precision`, that of the parameters.
    ///
    /// # Errors
    /// When memory runs out.
    pub fn new(
        gpu: &Arc<Gpu>,
        specs: &[ParameterSpec],
        options: OptimizerOptions,
        precision: Precision,
    ) -> Result<CudaOptimizer> {
        let layout = layout_of(specs);
        let mut kinds = vec![0u32; layout.total() / ALIGNMENT];
        for (spec, &(first, count)) in specs.iter().zip(layout.places()) {
            let blocks = first / ALIGNMENT..(first + count).div_ceil(ALIGNMENT);
            let kind = match &spec.role {
                Role::Border => BORDER,
                Role::Matrices(_) if options.muon.is_some() => MATRICES,
                Role::Matrices(_) | Role::Elements => 0,
            };
            kinds[blocks].fill(kind | if spec.decay { DECAY } else { 0 });
        }
        let optimizer = CudaOptimizer {
            options,
            muon: (options.muon)
                .map(|muon| CudaMuon::new(gpu, specs, &layout, muon, precision))
                .transpose()?,
            first: CudaTensors::zeros(gpu, &layout)?,
            second: CudaTensors::zeros(gpu, &layout)?,
            kinds: Buffer::zeros(gpu, kinds.len() * 4)?,
            partials: Buffer::zeros(gpu, layout.total().div_ceil(NORM_TILE) * 8)?,
            rates: Buffer::zeros(gpu, 4 * RATES)?,
            outcome: Buffer::zeros(gpu, 16)?,
            steps: 0,
        };
        gpu.upload(optimizer.kinds.pointer(), &kinds)?;
        gpu.synchronize()?;
        Ok(optimizer)
    }

    /// Sets the learning rate of the next step and counts it.
    ///
    /// # Errors
    /// When the copy fails.
    pub fn prepare(&mut self, rate: f64) -> Result<()> {
        self.steps += 1;
        let [b1, b2] = self.options.adamw.betas;
        let step = self.steps as f64;
        let of = |role| self.options.rate_and_rest(&role, true, rate);
        let ([usual, keep], [border, border_keep]) = (of(Role::Elements), of(Role::Border));
        let rest_1 = 1.0 - b1.powf(step);
        let root_2 = 1.0 / (1.0 - b2.powf(step)).sqrt();
        let rates: [f64; RATES] = [usual / rest_1, root_2, keep, usual, border / rest_1, border_keep];
        let rates = rates.map(|x| x as f32);
        let gpu = self.first.gpu();
        gpu.enter()?;
        gpu.upload(self.rates.pointer(), &rates)
    }

    /// Queues the norm and the update.
    pub(crate) fn queue(
        &self,
        queue: &Queue,
        parameters: &CudaParameters,
        gradients: &CudaTensors,
    ) -> Result<()> {
        let total = gradients.layout().total();
        let tiles = total.div_ceil(NORM_TILE);
        let OptimizerOptions { adamw: AdamWOptions { betas: [b1, b2], eps }, clip, .. } = self.options;
        let (g, partials) = (gradients.pointer(), self.partials.pointer());
        let outcome = self.outcome.pointer();
        queue.launch(&ADAMW, "square_parts", [tiles, 1, 1], 256, arguments![g, partials, total])?;
        // No clipping is a bound that nothing reaches.
        let clip = clip.unwrap_or(f64::from(f32::MAX));
        queue.launch(&ADAMW, "global_norm", [1, 1, 1], 32, arguments![partials, outcome, tiles, clip])?;
        if let Some(muon) = &self.muon {
            let (first, rates) = (self.first.pointer(), self.rates.pointer());
            muon.queue(queue, Step { parameters, gradients: g, first, rates, outcome })?;
        }
        queue.launch_each(
            &ADAMW,
            "adamw",
            total,
            arguments![
                parameters.masters(),
                parameters.copies(),
                g,
                self.first.pointer(),
                self.second.pointer(),
                self.kinds.pointer(),
                self.rates.pointer(),
                outcome,
                total,
                b1,
                b2,
                1.0 - b1,
                1.0 - b2,
                eps
            ],
        )
    }

    /// One step at learning rate `rate`, by itself.
    ///
    /// # Errors
    /// When a kernel cannot be compiled or launched.
    pub fn update(&mut self, parameters: &CudaParameters, gradients: &CudaTensors, rate: f64) -> Result<()> {
        let queue = Queue::new(parameters.gpu(), parameters.precision())?;
        self.prepare(rate)?;
        self.queue(&queue, parameters, gradients)?;
        parameters.gpu().synchronize()
    }

    /// The global norm of the last step's gradients; where it is not finite, the step has
    /// changed nothing.
    ///
    /// # Errors
    /// When work before fails.
    pub fn norm(&self) -> Result<f64> {
        let mut outcome = [0.0f32; 4];
        self.first.gpu().enter()?;
        self.first.gpu().download(&mut outcome, self.outcome.pointer())?;
        Ok(f64::from(outcome[0]))
    }

    /// The moments.
    pub fn moments(&self) -> (&CudaTensors, &CudaTensors) {
        (&self.first, &self.second)
    }

    /// Sets the moments and the number of steps taken, to go on with a run.
    ///
    /// # Errors
    /// When the copy fails.
    pub fn restore(&mut self, first: &[Vec<f32>], second: &[Vec<f32>], steps: u64) -> Result<()> {
        self.first.upload(first)?;
        self.second.upload(second)?;
        self.steps = steps;
        Ok(())
    }
}
