//! Formal languages that a network has to track a state for: trained on short words, tested on
//! long ones. sLSTM blocks alone, mLSTM blocks alone, and one of each.
//!
//! `cargo run --release --example formal_languages [language] [slstm|mlstm|both] [seed]`

use std::sync::Arc;

use xlstm::Result;
use xlstm::data::{Sequence, Targets};
use xlstm::engine::Device;
use xlstm::marks::IGNORE;
use xlstm::model::objective::Carry;
use xlstm::model::{FeatureConfig, FeatureModel, Head, Logits, Model, ModelConfig, Pooling, Runner, SlstmAt};
use xlstm::nn::Parameters;
use xlstm::optim::{Decay, OptimizerOptions, Schedule};
use xlstm::rng::Rng;
use xlstm::train::learner::{Task, learner};

const STEPS: u64 = 6000;
const BATCH: usize = 64;
const TRAINED: [usize; 2] = [3, 40];
const TESTED: [usize; 2] = [40, 256];
const SCHEDULE: Schedule =
    Schedule { max: 3e-3, min: 1e-5, warmup_steps: 100, decay_steps: STEPS, decay: Decay::Cosine };
const OPTIONS: OptimizerOptions = OptimizerOptions { weight_decay: 0.01, ..OptimizerOptions::DEFAULT };

/// Symbols, classes, and what a word comes to after each of its symbols.
type Language = (&'static str, usize, usize, fn(&[usize]) -> Vec<u32>);

const LANGUAGES: [Language; 4] = [
    ("parity", 2, 2, |word| running(word, 0, |ones, symbol| (ones + symbol) % 2)),
    ("even pairs", 2, 2, |word| word.iter().map(|symbol| u32::from(*symbol != word[0])).collect()),
    ("cycle navigation", 3, 5, |word| running(word, 0, |place, step| (place + [0, 1, 4][step]) % 5)),
    ("modular arithmetic", 8, 5, arithmetic),
];

fn running(word: &[usize], mut state: usize, step: fn(usize, usize) -> usize) -> Vec<u32> {
    let mut next = |symbol: &usize| {
        state = step(state, *symbol);
        state as u32
    };
    word.iter().map(&mut next).collect()
}

/// Digits 0 to 4 between signs + (5), - (6) and * (7); a product comes before a sum, modulo 5.
fn arithmetic(word: &[usize]) -> Vec<u32> {
    let (mut sum, mut term, mut sign) = (0, 0, 5);
    let mut value = |symbol: &usize| {
        if *symbol > 4 {
            sign = *symbol;
            return IGNORE;
        }
        if sign != 7 {
            sum = (sum + term) % 5;
        }
        term = [*symbol, 5 - symbol, term * symbol][sign - 5] % 5;
        ((sum + term) % 5) as u32
    };
    word.iter().map(&mut value).collect()
}

/// A random word of a length in the range; an expression is of odd length and ends in a digit.
fn word((name, symbols, ..): Language, [low, high]: [usize; 2], rng: &mut Rng) -> Vec<usize> {
    let mut draw = |n: usize| rng.below(n as u64) as usize;
    let length = low + draw(high - low + 1);
    match name {
        "modular arithmetic" => {
            let place = |t: usize| if t.is_multiple_of(2) { draw(5) } else { 5 + draw(3) };
            (0..length - (length + 1) % 2).map(place).collect()
        }
        _ => (0..length).map(|_| draw(symbols)).collect(),
    }
}

fn one_hot(word: &[usize], symbols: usize) -> Vec<f32> {
    word.iter().flat_map(|symbol| (0..symbols).map(move |s| f32::from(u8::from(s == *symbol)))).collect()
}

/// The share of words whose last output is right.
fn accuracy(runner: &mut Runner<f32, FeatureModel>, language: Language, lengths: [usize; 2]) -> Result<f64> {
    let mut rng = Rng::new(1, 2);
    let words: Vec<Vec<usize>> = (0..1024).map(|_| word(language, lengths, &mut rng)).collect();
    let mut right = 0;
    for words in words.chunks(64) {
        let features: Vec<Vec<f32>> = words.iter().map(|word| one_hot(word, language.1)).collect();
        runner.reset(words.len());
        let rows: Vec<&[f32]> = features.iter().map(Vec::as_slice).collect();
        for (word, logits) in words.iter().zip(runner.read_batch(&rows, Logits::Last)?) {
            let best = (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b]));
            let target = language.3(word).last().map(|target| *target as usize);
            right += usize::from(best == target);
        }
    }
    Ok(right as f64 / words.len() as f64)
}

fn run(language: Language, slstm_at: SlstmAt, seed: u64, device: &Device) -> Result<[f64; 2]> {
    let mut blocks = ModelConfig { embedding_dim: 32, num_blocks: 2, slstm_at, ..ModelConfig::default() };
    (blocks.slstm.num_heads, blocks.mlstm.num_heads) = (2, 2);
    let head = Head::Classification { classes: language.2 };
    let config = FeatureConfig { input_size: language.1, blocks, pooling: Pooling::None, head };
    let model = Arc::new(FeatureModel::new(config)?);
    let shape = [BATCH, TRAINED[1]];
    let task = Task { shape, carry: Carry::Marked, options: OPTIONS, seed, captured: true };
    let mut learner = learner(&model, Parameters::initialize(model.specs(), seed), task, device)?;
    let mut rng = Rng::new(seed, 1);
    for step in 0..STEPS {
        let sequence = |_| {
            let word = word(language, TRAINED, &mut rng);
            Sequence { features: one_hot(&word, language.1), targets: Targets::Classes(language.3(&word)) }
        };
        let batch = model.batch(&(0..BATCH).map(sequence).collect::<Vec<_>>())?;
        let learned = learner.step(&[batch], step, SCHEDULE.rate(step))?;
        if step % 250 == 0 || step + 1 == STEPS {
            eprintln!("{} step {step}: loss {:.4}", language.0, learned.loss);
        }
    }
    let mut runner = Runner::new(model.clone(), learner.weights(), device.clone());
    Ok([accuracy(&mut runner, language, TRAINED)?, accuracy(&mut runner, language, TESTED)?])
}

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let asked = |i: usize, name: &str| arguments.get(i).is_none_or(|argument| argument == name);
    let seed = arguments.get(2).and_then(|seed| seed.parse().ok()).unwrap_or(1);
    let device = Device::cpu(0)?;
    println!(
        "| language | blocks | accuracy at lengths 3 to 40 | at 40 to 256 | chance |\n|---|---|---|---|---|"
    );
    for language in LANGUAGES.into_iter().filter(|language| asked(0, language.0)) {
        for (name, at) in
            [("slstm", SlstmAt::All), ("mlstm", SlstmAt::None), ("both", SlstmAt::Positions(vec![1]))]
        {
            if asked(1, name) {
                let [short, long] = run(language, at, seed, &device)?;
                let chance = 1.0 / language.2 as f64;
                println!("| {} | {name} | {short:.3} | {long:.3} | {chance:.3} |", language.0);
            }
        }
    }
    Ok(())
}
