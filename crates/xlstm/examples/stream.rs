//! A model read token by token: the state after a prompt is a value, which two
//! continuations start from.
//!
//! `cargo run --release --example stream`

use std::sync::Arc;

use xlstm::Result;
use xlstm::engine::Device;
use xlstm::generate::{Sampler, Sampling};
use xlstm::model::{LanguageModel, Logits, ModelConfig, Runner, SlstmAt};
use xlstm::nn::Parameters;
use xlstm::state::State;
use xlstm::text::Tokenizer;

/// `count` bytes after `state`, whose logits for the next byte are `logits`.
fn continuation(
    runner: &mut Runner<f32>,
    mut state: State<f32>,
    mut logits: Vec<f32>,
    seed: u64,
    count: usize,
) -> Result<Vec<u32>> {
    let mut sampler = Sampler::new(Sampling::default(), 256, seed);
    let mut ids = Vec::new();
    for _ in 0..count {
        let id = sampler.draw(&logits)?;
        runner.step(id, &mut state, &mut logits)?;
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
    let mut runner = Runner::new(model, parameters, Device::cpu(0)?);

    let prompt = Tokenizer::bytes().encode("Now is the winter of our discontent")?;
    let (logits, state) = runner.forward(&prompt, &runner.empty_state(1), Logits::Last)?;
    println!("{} tokens read; the state has {} bytes", state.tokens(), state.bytes());

    // A fork is a clone; nothing is read again.
    for seed in [1, 2] {
        let ids = continuation(&mut runner, state.clone(), logits.clone(), seed, 12)?;
        println!("continuation {seed}: {ids:?}");
    }

    // Token by token or all at once, the state is the same up to rounding.
    let (mut stepped, mut last) = (runner.empty_state(1), Vec::new());
    for &id in &prompt {
        runner.step(id, &mut stepped, &mut last)?;
    }
    let distance = last.iter().zip(&logits).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    println!("stepped and whole logits are at most {distance:.0e} apart");
    Ok(())
}
