//! Whole training steps on random tokens, timed. A step is what training does for a batch: forward,
//! backward, the gradients' global norm, clipping and the optimizer.

use std::sync::Arc;
use std::time::Instant;

use super::{Measured, Preset, check_repeats, forget_peak, peak_megabytes};
use crate::data::Batch;
use crate::engine::{Device, OperationTime};
use crate::error::Result;
use crate::model::LanguageModel;
use crate::nn::Parameters;
use crate::rng::Rng;
use crate::train::learner::{Task, learner};

/// What timing training gives.
#[derive(Clone, Debug, PartialEq)]
pub struct Trained {
    /// The steps.
    pub measured: Measured,
    /// On a GPU, the seconds of steps launched kernel by kernel instead of as one graph.
    pub plain: Option<Measured>,
    /// The loss of the last step, in nats a token.
    pub loss: f64,
    /// Where the time of a step goes, the most expensive operation first.
    pub operations: Vec<OperationTime>,
}

/// Steps before the clock starts: caches, work space, pages and graphs are there by then.
const WARM_UP: usize = 3;

/// Times `steps` training steps of a preset.
///
/// # Errors
/// When there is no step to time, the model does not fit together, or a GPU fails.
pub fn train_steps(preset: &Preset, device: &Device, steps: usize) -> Result<Trained> {
    check_repeats(steps)?;
    let model = Arc::new(LanguageModel::new(&preset.model)?);
    let trained = time(preset, &model, device, steps, true)?;
    let plain = match device {
        Device::Cpu(..) => None,
        #[cfg(feature = "cuda")]
        Device::Cuda(..) => Some(time(preset, &model, device, steps, false)?.measured),
    };
    Ok(Trained { plain, ..trained })
}

fn time(
    preset: &Preset,
    model: &Arc<LanguageModel>,
    device: &Device,
    steps: usize,
    captured: bool,
) -> Result<Trained> {
    let parameters = Parameters::<f32>::initialize(model.specs(), 1);
    let shape = [preset.batch_size, preset.length];
    let task = Task { shape, carry: preset.carry, options: preset.options, seed: 1, captured };
    let mut learner = learner(model, parameters, task, device)?;
    let batches = vec![random_batch(preset); preset.accumulation];
    let (mut seconds, mut loss) = (Vec::with_capacity(steps), f64::NAN);
    for step in 0..WARM_UP + steps {
        if step == WARM_UP {
            forget_peak(device);
        }
        let start = Instant::now();
        loss = learner.step(&batches, step as u64, 1e-4)?.loss;
        if step >= WARM_UP {
            seconds.push(start.elapsed().as_secs_f64());
        }
    }
    let tokens = preset.batch_size * preset.length * preset.accumulation;
    let measured = Measured {
        parameters: model.parameter_count(),
        tokens,
        operations: 3.0 * (tokens as u64 * model.flops_per_token()) as f64,
        bytes: 0.0,
        state_bytes: 0.0,
        seconds,
        peak_megabytes: peak_megabytes(device),
    };
    Ok(Trained { measured, plain: None, loss, operations: learner.profile()? })
}

fn random_batch(preset: &Preset) -> Batch {
    let count = preset.batch_size * preset.length;
    let mut rng = Rng::new(1, 0);
    let mut draw =
        || (0..count).map(|_| rng.below(preset.model.vocab_size as u64) as u32).collect::<Vec<u32>>();
    Batch {
        batch_size: preset.batch_size,
        length: preset.length,
        inputs: draw(),
        targets: draw(),
        marks: vec![0; count],
        target_count: count,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::presets::tests::tiny;
    use crate::model::objective::Carry;
    use crate::optim::{MuonOptions, OptimizerOptions};

    #[test]
    fn steps_are_timed() {
        let steps = |preset: &Preset, n| train_steps(preset, &Device::cpu(1).unwrap(), n);
        let muon = OptimizerOptions { muon: Some(MuonOptions::DEFAULT), ..OptimizerOptions::DEFAULT };
        let carried = Preset { options: muon, carry: Carry::Carried, accumulation: 3, ..tiny() };
        for preset in [tiny(), carried] {
            let trained = steps(&preset, 3).unwrap();
            assert_eq!(
                (trained.measured.seconds.len(), trained.measured.tokens),
                (3, 18 * preset.accumulation)
            );
            assert!(trained.measured.tokens_per_second() > 0.0 && trained.measured.gigaflops() > 0.0);
            assert!(trained.loss.is_finite() && !trained.operations.is_empty());
        }
        assert!(steps(&tiny(), 0).is_err());
    }
}
