//! Multi-query associative recall: keys with their values, then the keys again in another order,
//! each to be answered with its value. A small mLSTM learns it; the table says how well, by the
//! number of pairs.
//!
//! `cargo run --release --example recall [mlstm|slstm] [seed]`

use std::sync::Arc;

use xlstm::Result;
use xlstm::data::Batch;
use xlstm::engine::Device;
use xlstm::marks::{IGNORE, PAD};
use xlstm::model::objective::Carry;
use xlstm::model::{LanguageModel, Logits, ModelConfig, Runner, SlstmAt};
use xlstm::nn::Parameters;
use xlstm::optim::{Decay, OptimizerOptions, Schedule};
use xlstm::rng::Rng;
use xlstm::train::learner::{Task, learner};

const STEPS: u64 = 2000;
const BATCH: usize = 32;
/// Keys are the ids below this, values the others.
const KEYS: usize = 64;
const VOCABULARY: usize = 2 * KEYS;
const PAIRS: usize = 32;
const SCHEDULE: Schedule =
    Schedule { max: 3e-3, min: 1e-5, warmup_steps: 100, decay_steps: STEPS, decay: Decay::Cosine };
const OPTIONS: OptimizerOptions = OptimizerOptions::DEFAULT;

/// k v k v … then the keys again, and the value that each of these asks for.
fn episode(pairs: usize, rng: &mut Rng) -> (Vec<u32>, Vec<u32>) {
    let mut shuffled = |mut of: Vec<u32>| {
        (1..of.len()).rev().for_each(|i| of.swap(i, rng.below(i as u64 + 1) as usize));
        of
    };
    let keys = &shuffled((0..KEYS as u32).collect())[..pairs];
    let values = shuffled((KEYS as u32..VOCABULARY as u32).collect());
    let order = shuffled((0..pairs as u32).collect());
    let order = || order.iter().map(|&i| i as usize);
    let told = keys.iter().zip(&values).flat_map(|(key, value)| [*key, *value]);
    let tokens = told.chain(order().map(|i| keys[i])).collect();
    let targets = (0..2 * pairs).map(|_| IGNORE).chain(order().map(|i| values[i])).collect();
    (tokens, targets)
}

/// Episodes of 2 to 32 pairs, padded to the longest possible.
fn batch(rng: &mut Rng) -> Batch {
    let length = 3 * PAIRS;
    let mut batch = Batch { batch_size: BATCH, length, ..Batch::default() };
    for row in 1..=BATCH {
        let pairs = 2 + rng.below(PAIRS as u64 - 1) as usize;
        let (tokens, targets) = episode(pairs, rng);
        batch.marks.resize(batch.inputs.len() + tokens.len(), 0);
        batch.inputs.extend(tokens);
        batch.targets.extend(targets);
        batch.marks.resize(row * length, PAD);
        batch.inputs.resize(row * length, 0);
        batch.targets.resize(row * length, IGNORE);
        batch.target_count += pairs;
    }
    batch
}

/// The share of queries that are answered with the right value.
fn accuracy(runner: &mut Runner<f32>, pairs: usize) -> Result<f64> {
    let (mut rng, mut right, mut asked) = (Rng::new(1, 2), 0, 0);
    for _ in 0..8 {
        let episodes: Vec<_> = (0..32).map(|_| episode(pairs, &mut rng)).collect();
        runner.reset(episodes.len());
        let rows: Vec<&[u32]> = episodes.iter().map(|(tokens, _)| tokens.as_slice()).collect();
        for ((_, targets), logits) in episodes.iter().zip(runner.read_batch(&rows, Logits::All)?) {
            let answers =
                targets.iter().zip(logits.chunks(VOCABULARY)).filter(|(target, _)| **target != IGNORE);
            for (target, logits) in answers {
                let best = (0..VOCABULARY).max_by(|&a, &b| logits[a].total_cmp(&logits[b]));
                right += usize::from(best == Some(*target as usize));
                asked += 1;
            }
        }
    }
    Ok(f64::from(right as u32) / f64::from(asked))
}

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let only = arguments.first().map(String::as_str);
    let seed = arguments.get(1).and_then(|seed| seed.parse().ok()).unwrap_or(1);
    let device = Device::cpu(0)?;
    println!("| blocks | 4 pairs | 8 | 16 | 32 | 48 | chance |\n|---|---|---|---|---|---|---|");
    for (name, slstm_at) in [("mlstm", SlstmAt::None), ("slstm", SlstmAt::All)] {
        if only.is_some_and(|only| only != name) {
            continue;
        }
        let mut config =
            ModelConfig { vocab_size: VOCABULARY, num_blocks: 2, slstm_at, ..ModelConfig::default() };
        (config.embedding_dim, config.mlstm.num_heads) = (64, 2);
        let model = Arc::new(LanguageModel::new(&config)?);
        let shape = [BATCH, 3 * PAIRS];
        let task = Task { shape, carry: Carry::Marked, options: OPTIONS, seed, captured: true };
        let mut learner = learner(&model, Parameters::initialize(model.specs(), seed), task, &device)?;
        let mut rng = Rng::new(seed, 1);
        for step in 0..STEPS {
            let learned = learner.step(&[batch(&mut rng)], step, SCHEDULE.rate(step))?;
            if step % 250 == 0 || step + 1 == STEPS {
                eprintln!("{name} step {step}: loss {:.4}", learned.loss);
            }
        }
        let mut runner = Runner::new(model.clone(), learner.weights(), device.clone());
        print!("| {name} |");
        for pairs in [4, 8, 16, 32, 48] {
            print!(" {:.3} |", accuracy(&mut runner, pairs)?);
        }
        println!(" {:.3} |", 1.0 / KEYS as f64);
    }
    Ok(())
}
