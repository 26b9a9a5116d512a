//! AdamW on a GPU.

use std::sync::Arc;

use super::AdamWOptions;
use crate::engine::cuda::context::{Buffer, arguments};
use crate::engine::cuda::launch::Queue;
use crate::engine::cuda::parameters::ALIGNMENT;
use crate::engine::cuda::{CudaParameters, CudaTensors, Gpu, Layout, Source};
use crate::error::Result;
use crate::nn::ParameterSpec;

/// The layout of a model's parameters.
pub fn layout_of(specs: &[ParameterSpec]) -> Layout {
    Layout::new(specs.iter().map(|spec| spec.shape.iter().product()))
}

const ADAMW: Source = Source::new("adamw", include_str!("adamw.cu"));

/// Elements that a partial sum of the norm covers.
const NORM_TILE: usize = 8192;

/// AdamW with clipping by the global norm, on the GPU. What changes between steps lies in
/// device memory: `rates` are the learning rate and Adam's two corrections, `outcome` the
/// norm, the clipping factor and whether the norm was finite; the update is skipped where not.
#[derive(Debug)]
pub struct CudaOptimizer {
    options: AdamWOptions,
    first: CudaTensors,
    second: CudaTensors,
    /// 1 a block of 64 elements that weight decay reaches.
    decay: Buffer,
    partials: Buffer,
    rates: Buffer,
    outcome: Buffer,
    /// Steps taken.
    pub steps: u64,
}

impl CudaOptimizer {
    /// No step taken yet.
    ///
    /// # Errors
    /// When memory runs out.
    pub fn new(gpu: &Arc<Gpu>, specs: &[ParameterSpec], options: AdamWOptions) -> Result<CudaOptimizer> {
        let layout = layout_of(specs);
        let mut decay = vec![0.0f32; layout.total() / ALIGNMENT];
        for (spec, &(first, count)) in specs.iter().zip(layout.places()) {
            let blocks = first / ALIGNMENT..(first + count).div_ceil(ALIGNMENT);
            decay[blocks].fill(f32::from(u8::from(spec.decay)));
        }
        let optimizer = CudaOptimizer {
            options,
            first: CudaTensors::zeros(gpu, &layout)?,
            second: CudaTensors::zeros(gpu, &layout)?,
            decay: Buffer::zeros(gpu, decay.len() * 4)?,
            partials: Buffer::zeros(gpu, layout.total().div_ceil(NORM_TILE) * 8)?,
            rates: Buffer::zeros(gpu, 16)?,
            outcome: Buffer::zeros(gpu, 16)?,
            steps: 0,
        };
        gpu.upload(optimizer.decay.pointer(), &decay)?;
        gpu.synchronize()?;
        Ok(optimizer)
    }

    /// Sets the learning rate of the next step and counts it.
    ///
    /// # Errors
    /// When the copy fails.
    pub fn prepare(&mut self, rate: f64) -> Result<()> {
        self.steps += 1;
        let [b1, b2] = self.options.betas;
        let step = self.steps as f64;
        let rates = [
            (rate / (1.0 - b1.powf(step))) as f32,
            (1.0 / (1.0 - b2.powf(step)).sqrt()) as f32,
            (1.0 - rate * self.options.weight_decay) as f32,
            0.0,
        ];
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
        let AdamWOptions { betas: [b1, b2], eps, clip, .. } = self.options;
        let (g, partials) = (gradients.pointer(), self.partials.pointer());
        let outcome = self.outcome.pointer();
        queue.launch(&ADAMW, "square_parts", [tiles, 1, 1], 256, arguments![g, partials, total])?;
        // No clipping is a bound that nothing reaches.
        let clip = clip.unwrap_or(f64::from(f32::MAX));
        queue.launch(&ADAMW, "global_norm", [1, 1, 1], 32, arguments![partials, outcome, tiles, clip])?;
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
                self.decay.pointer(),
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
