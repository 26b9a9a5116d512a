//! The training example of the Python original's article, line by line, on its own form of a
//! configuration (`configs/language_model.yaml`; another one may be named).
//!
//! `cargo run --release --example language_model`, in the repository

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use xlstm::data::Batch;
use xlstm::engine::Device;
use xlstm::model::objective::Carry;
use xlstm::model::{LanguageModel, ModelConfig};
use xlstm::nn::Parameters;
use xlstm::train::learner::{Task, learner};
use xlstm::train::{RunConfig, Texts};
use xlstm::{Error, Result};

fn main() -> Result<()> {
    // Load the configuration.
    let name = std::env::args().nth(1).unwrap_or_else(|| "configs/language_model.yaml".into());
    let path = Path::new(&name);
    let text = std::fs::read_to_string(path).map_err(|e| Error::io("read", path, &e))?;
    let config = RunConfig::load(&text, path, &[])?;

    // Set the seed: first weights, order of the data and dropout are functions of it.
    let seed = config.seed;

    // Choose the device: a GPU where this build can use one.
    let (device, line) = Device::choose(config.device, config.dtype, config.threads)?;
    println!("{line}");

    // The tokenizer and the dataset, cut into batches that are shuffled anew in each epoch.
    let texts = Texts::load(&config.data, "", &mut |_| {})?;
    let config = texts.with_steps(&config)?;
    let batches = texts.batches(&config)?;

    // The model.
    let vocab_size = texts.tokenizer.vocabulary_size();
    let model = Arc::new(LanguageModel::new(&ModelConfig { vocab_size, ..config.model.clone() })?);
    let parameters = Parameters::initialize(model.specs(), seed);
    println!("{} parameters, {vocab_size} token ids", model.parameter_count());

    // The optimizer, and the cross entropy as its objective: targets marked IGNORE, as those of padding
    // are, count for nothing.
    let options = config.optimizer.options();
    let task = Task { shape: batches.shape(0), carry: Carry::Marked, options, seed, captured: true };
    let mut learner = learner(&model, parameters, task, &device)?;

    // Train.
    let (steps, started) = (config.training.steps(), Instant::now());
    let (mut batch, mut sum) = (Batch::default(), 0.0);
    for step in 0..steps {
        batches.fill(step, &mut batch);
        let rate = config.learning_rates().rate(step);
        sum += learner.step(std::slice::from_ref(&batch), step, rate)?.loss;
        if (step + 1) % 50 == 0 || step + 1 == steps {
            let (loss, seconds) = (sum / (step % 50 + 1) as f64, started.elapsed().as_secs());
            println!("step {:>5} of {steps}: loss {loss:.4}, {seconds} s", step + 1);
            sum = 0.0;
        }
    }
    Ok(())
}
