//! A training step gives the same bits on any number of threads, and again with the same
//! seed.

use std::sync::Arc;

use xlstm::data::Batch;
use xlstm::engine::Device;
use xlstm::model::objective::Carry;
use xlstm::model::{LanguageModel, ModelConfig, SlstmAt};
use xlstm::nn::Parameters;
use xlstm::optim::{MuonOptions, OptimizerOptions};
use xlstm::rng::Rng;
use xlstm::train::learner::{Learner, Task, learner};

pub const SHAPE: [usize; 2] = [5, 80];

/// A mix of blocks with every kind of dropout; wide enough to be cut into tasks everywhere.
pub fn model() -> Arc<LanguageModel> {
    let mut config = ModelConfig { vocab_size: 211, num_blocks: 3, ..ModelConfig::default() };
    config.slstm_at = SlstmAt::Positions(vec![1]);
    config.embedding_dim = 96;
    (config.dropout, config.add_embedding_dropout, config.bias) = (0.2, true, true);
    config.feedforward.dropout = 0.1;
    LanguageModel::new(&config).expect("a model").into()
}

/// Random tokens, documents and targets.
pub fn batch(seed: u64, vocabulary: usize) -> Batch {
    let mut rng = Rng::new(seed, 77);
    let count = SHAPE[0] * SHAPE[1];
    let mut draw = |n: usize| (rng.next_u64() % n as u64) as u32;
    Batch {
        batch_size: SHAPE[0],
        length: SHAPE[1],
        inputs: (0..count).map(|_| draw(vocabulary)).collect(),
        targets: (0..count).map(|_| draw(vocabulary)).collect(),
        marks: (0..count).map(|_| u32::from(draw(20) == 0)).collect(),
        target_count: count,
    }
}

/// A training run that can be taken a step further.
pub struct Run {
    learner: Box<dyn Learner>,
    steps: u64,
}

impl Run {
    /// Muon updates its matrices, AdamW all else.
    pub fn new(model: &Arc<LanguageModel>, carry: Carry, seed: u64, device: &Device) -> Run {
        let parameters = Parameters::initialize(model.specs(), 1);
        let muon = Some(MuonOptions::DEFAULT);
        let options = OptimizerOptions { clip: Some(0.5), muon, ..OptimizerOptions::DEFAULT };
        let task = Task { shape: SHAPE, carry, options, seed, captured: true };
        Run { learner: learner(model, parameters, task, device).expect("a learner"), steps: 0 }
    }

    /// Loss and gradient norm of the step.
    pub fn step(&mut self, batch: &Batch) -> (f64, f64) {
        let learned = self.learner.step(std::slice::from_ref(batch), self.steps, 1e-2).expect("a step");
        self.steps += 1;
        (learned.loss, learned.norm)
    }
}

/// Every bit that three steps leave behind.
fn bits(threads: usize, seed: u64) -> (Vec<(u64, u64)>, Vec<u32>) {
    let model = model();
    let device = Device::cpu(threads).expect("threads");
    let mut run = Run::new(&model, Carry::Marked, seed, &device);
    let steps = (0..3).map(|step| {
        let batch = batch(step, model.config().vocab_size);
        let (loss, norm) = run.step(&batch);
        assert!(loss.is_finite() && norm > 0.0, "{loss} {norm}");
        (loss.to_bits(), norm.to_bits())
    });
    let steps = steps.collect();
    let snapshot = run.learner.snapshot().expect("a snapshot");
    (steps, snapshot.parameters.values.iter().flatten().map(|w| w.to_bits()).collect())
}

#[test]
fn threads_change_no_bit() {
    let one = bits(1, 3);
    assert!(one == bits(2, 3), "two threads");
    assert!(one == bits(3, 3), "three threads");
}

#[test]
fn the_seed_decides() {
    let first = bits(2, 3);
    assert!(first == bits(2, 3), "the same seed again");
    let other = bits(2, 4);
    assert!(first.0 != other.0 && first.1 != other.1, "another seed");
}
