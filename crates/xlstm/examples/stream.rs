//! A model read token by token: the state after a prompt is a value, which two
//! continuations start from.
//!
//! `cargo run --release --example stream`

use std::sync::Arc;

use xlstm::Result;
use xlstm::engine::Device;
use xlstm::generate::{Sampler, Sampling};
use xlstm::model::{LanguageModel, Logits, ModelConfig, Runner, SlstmAt};
use xlstm::nn::{Parameters, Weights};
use xlstm::state::State;
use xlstm::text::Tokenizer;

/// `count` bytes after `state`, whose logits for the next byte are `logits`.
fn continuation(
    runner: &mut Runner<f32>,
    state: &State<f32>,
    mut logits: Vec<f32>,
    seed: u64,
    count: usize,
) -> Result<Vec<u32>> {
    let mut sampler = Sampler::new(Sampling::default(), 256, seed);
    let mut ids = Vec::new();
    runner.set_state(state)?;
    for _ in 0..count {
        let id = sampler.draw(&logits)?;
        logits = runner.read(&[id], Logits::Last)?;
        ids.push(id);
    }
    Ok(ids)
}

fn main() -> Result<()> {
    // An untrained model of bytes: three mLSTM blocks and an sLSTM block. A trained one comes
    // from `xlstm::folder::ModelFolder::load`.
    let config =
        ModelConfig { vocab_size: 256, slstm_at: SlstmAt::Positions(vec![1]), ..ModelConfig::default() };
    let model = Arc::new(LanguageModel::new(&config)?);
    let parameters = Arc::new(Parameters::initialize(model.specs(), 1));
    let device = Device::cpu(0)?;
    let mut runner = Runner::new(model, Weights::new(parameters, &device)?, device);

    let prompt = Tokenizer::bytes().encode("Now is the winter of our discontent")?;
    let logits = runner.read(&prompt, Logits::Last)?;
    let state = runner.state()?;
    println!("{} tokens read; the state has {} bytes", state.tokens()[0], state.bytes());

    // A fork is a clone; nothing is read again.
    for seed in [1, 2] {
        let ids = continuation(&mut runner, &state, logits.clone(), seed, 12)?;
        println!("continuation {seed}: {ids:?}");
    }

    // Token by token or all at once, the state is the same up to rounding.
    let mut last = Vec::new();
    runner.reset(1);
    for &id in &prompt {
        last = runner.read(&[id], Logits::Last)?;
    }
    let distance = last.iter().zip(&logits).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    println!("stepped and whole logits are at most {distance:.0e} apart");
    Ok(())
}
