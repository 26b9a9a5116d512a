//! Sequences of features and of unequal lengths: each comes to what it comes to alone, whole or
//! in pieces, in outputs, states and gradients. And where the gradients of a stream end.

use std::sync::Arc;

use xlstm::data::{Batch, Sequence, Targets};
use xlstm::engine::{Device, Mode};
use xlstm::marks::IGNORE;
use xlstm::model::objective::Carry;
use xlstm::model::{
    Draw, Family, FeatureConfig, FeatureModel, Head, LanguageModel, Logits, Model, ModelConfig, Objective,
    Pooling, Runner,
};
use xlstm::nn::transformer::PositionKind;
use xlstm::nn::{Parameters, Weights};
use xlstm::rng::Rng;
use xlstm::state::State;

use crate::equivalence::{below, close, config};
use crate::pass::{Held, device};

const POOLINGS: [Pooling; 3] = [Pooling::None, Pooling::Last, Pooling::Mean];

/// A random configuration that reads sequences of any length.
fn endless(rng: &mut Rng) -> ModelConfig {
    loop {
        let config = config(rng);
        let rotary = config.transformer.positions == PositionKind::Rotary;
        if config.family != Family::Transformer || rotary {
            return config;
        }
    }
}

/// Gates and recurrent weights that start at zero would hide what they do.
fn parameters(model: &dyn Model, rng: &mut Rng) -> Parameters<f64> {
    let mut parameters = Parameters::initialize(model.specs(), 1);
    parameters.values.iter_mut().flatten().for_each(|w| *w += 0.4 * rng.normal());
    parameters
}

fn runner<M: Model>(model: &Arc<M>, parameters: &Parameters<f64>) -> Runner<f64, M> {
    let weights = Weights::new(Arc::new(parameters.clone()), &device()).expect("weights");
    Runner::new(model.clone(), weights, device())
}

fn parts(state: &State<f64>) -> Vec<Vec<f64>> {
    state.parts().map(<[f64]>::to_vec).collect()
}

/// A random model of features; the seed decides how it pools and what its head is.
fn feature_model(seed: u64) -> (Arc<FeatureModel>, Parameters<f64>, Rng) {
    let mut rng = Rng::new(seed, 5);
    let blocks = endless(&mut rng);
    // Sometimes as wide as the blocks, so that there is no input projection.
    let input_size = if seed.is_multiple_of(4) { blocks.embedding_dim } else { 1 + below(&mut rng, 6) };
    let size = 1 + below(&mut rng, 4);
    let head = match seed % 2 {
        0 => Head::Classification { classes: 1 + size },
        _ => Head::Regression { outputs: size },
    };
    let pooling = POOLINGS[(seed % 3) as usize];
    let model = FeatureModel::new(FeatureConfig { input_size, blocks, pooling, head }).expect("a model");
    let parameters = parameters(&model, &mut rng);
    (Arc::new(model), parameters, rng)
}

/// Features with targets, some of which are not asked for.
fn sequence(model: &FeatureModel, rows: usize, rng: &mut Rng) -> Sequence {
    let FeatureConfig { input_size, pooling, head, .. } = *model.config();
    let outputs = if pooling == Pooling::None { rows } else { 1 };
    let features = (0..rows * input_size).map(|_| rng.normal() as f32).collect();
    let mut ignored = |i: usize| i > 0 && rng.uniform() < 0.2;
    let ignored: Vec<bool> = (0..outputs * head.targets()).map(&mut ignored).collect();
    let targets = match head {
        Head::Classification { classes } => Targets::Classes(
            ignored.iter().map(|&no| if no { IGNORE } else { below(rng, classes) as u32 }).collect(),
        ),
        Head::Regression { .. } => Targets::Values(
            ignored.iter().map(|&no| if no { f32::from_bits(IGNORE) } else { rng.normal() as f32 }).collect(),
        ),
    };
    Sequence { features, targets }
}

#[test]
fn a_stream_of_features_may_be_cut_anywhere() {
    for seed in 0..12 {
        let (model, parameters, mut rng) = feature_model(seed);
        let width = model.config().input_size;
        let rows = 3 + below(&mut rng, 20);
        let features = sequence(&model, rows, &mut rng).features;
        let mut whole = runner(&model, &parameters);
        let truth = whole.read(&features, Logits::All).expect("outputs");
        for piece in [1, 1 + below(&mut rng, rows)] {
            let mut pieces = runner(&model, &parameters);
            let outputs: Vec<Vec<f64>> = features
                .chunks(piece * width)
                .map(|rows| pieces.read(rows, Logits::All).expect("outputs"))
                .collect();
            let outputs = match model.config().pooling {
                Pooling::None => outputs.concat(),
                // Of all that was read.
                Pooling::Last | Pooling::Mean => outputs.last().expect("a piece").clone(),
            };
            close("outputs", &vec![outputs], &vec![truth.clone()]);
            close(
                "state",
                &parts(&pieces.state().expect("a state")),
                &parts(&whole.state().expect("a state")),
            );
        }
    }
}

/// Lengths of sequences, one of them longer than a recorded piece, and what follows them.
const LENGTHS: [usize; 4] = [3, 1, 530, 17];
const FOLLOWING: [usize; 4] = [2, 5, 0, 1];

#[test]
fn unequal_sequences_of_features_are_read_as_if_alone() {
    for seed in 0..6 {
        let (model, parameters, mut rng) = feature_model(seed);
        let mut rows = |lengths: [usize; 4]| lengths.map(|n| sequence(&model, n, &mut rng).features);
        let (first, second) = (rows(LENGTHS), rows(FOLLOWING));
        let mut together = runner(&model, &parameters);
        together.reset(4);
        for (logits, inputs) in [(Logits::All, &first), (Logits::Last, &second)] {
            let before = together.state().expect("a state");
            let rows: Vec<&[f32]> = inputs.iter().map(Vec::as_slice).collect();
            let outputs = together.read_batch(&rows, logits).expect("outputs");
            let after = together.state().expect("a state");
            for (i, output) in outputs.into_iter().enumerate() {
                let mut alone = runner(&model, &parameters);
                alone.set_state(&before.row(i).expect("a row")).expect("a state");
                let truth = if rows[i].is_empty() {
                    Vec::new()
                } else {
                    alone.read(rows[i], logits).expect("outputs")
                };
                close("outputs", &vec![output], &vec![truth]);
                let (own, truth) = (after.row(i).expect("a row"), alone.state().expect("a state"));
                assert_eq!(own.tokens(), truth.tokens());
                close("state", &parts(&own), &parts(&truth));
            }
        }
    }
}

#[test]
fn unequal_sequences_of_tokens_are_read_as_if_alone() {
    for seed in 0..4 {
        let mut rng = Rng::new(seed, 6);
        let model = Arc::new(LanguageModel::new(&endless(&mut rng)).expect("a model"));
        let parameters = parameters(&*model, &mut rng);
        let vocabulary = model.config().vocab_size;
        let mut rows = |lengths: [usize; 4]| {
            lengths.map(|n| (0..n).map(|_| below(&mut rng, vocabulary) as u32).collect::<Vec<u32>>())
        };
        let (first, second) = (rows(LENGTHS), rows(FOLLOWING));
        // The states of sequences that were read alone, put together, and read on.
        let states: Vec<State<f64>> = first
            .iter()
            .map(|tokens| {
                let mut alone = runner(&model, &parameters);
                alone.read(tokens, Logits::Last).expect("logits");
                alone.state().expect("a state")
            })
            .collect();
        let mut together = runner(&model, &parameters);
        together.reset(4);
        together.read_batch(&slices(&first), Logits::Last).expect("logits");
        let stacked = State::stack(&states.iter().collect::<Vec<_>>()).expect("one model's");
        let read = together.state().expect("a state");
        assert_eq!(read.tokens(), LENGTHS.map(|n| n as u64));
        assert_eq!(stacked.tokens(), read.tokens());
        close("state", &parts(&read), &parts(&stacked));
        together.set_state(&stacked).expect("a state");
        let logits = together.read_batch(&slices(&second), Logits::Last).expect("logits");
        for (i, (state, logits)) in states.iter().zip(logits).enumerate() {
            assert_eq!(stacked.row(i).expect("a row"), *state);
            let mut alone = runner(&model, &parameters);
            alone.set_state(state).expect("a state");
            let truth = match second[i].as_slice() {
                [] => Vec::new(),
                tokens => alone.read(tokens, Logits::Last).expect("logits"),
            };
            close("logits", &vec![logits], &vec![truth]);
        }
    }
}

fn slices(of: &[Vec<u32>; 4]) -> Vec<&[u32]> {
    of.iter().map(Vec::as_slice).collect()
}

/// The loss of a batch and its gradients, with the library's own recorded pass.
fn learned(model: &FeatureModel, parameters: &Parameters<f64>, batch: &Batch) -> (f64, Vec<Vec<f64>>) {
    let shape = [batch.batch_size, batch.length];
    let mut objective =
        Objective::<f64>::new(model, Mode::Train, shape, Carry::Marked, &device()).expect("a pass");
    let mut held = Held::new(parameters);
    let loss = objective.forward(held.values(), batch, 0.7).expect("a loss");
    held.add(|values, gradients| objective.backward(values, gradients));
    (loss, held.gradients())
}

#[test]
fn a_padded_batch_learns_what_its_sequences_teach() {
    for seed in 0..12 {
        let (model, parameters, mut rng) = feature_model(seed);
        let sequences: Vec<Sequence> = [4, 1, 9].iter().map(|&n| sequence(&model, n, &mut rng)).collect();
        let batch = model.batch(&sequences).expect("a batch");
        let (loss, gradients) = learned(&model, &parameters, &batch);
        let (mut total, mut sums) = (0.0, parameters.zeros_like());
        for sequence in &sequences {
            let batch = model.batch(std::slice::from_ref(sequence)).expect("a batch");
            let (loss, gradients) = learned(&model, &parameters, &batch);
            total += loss;
            for (sum, own) in sums.iter_mut().zip(gradients) {
                sum.iter_mut().zip(own).for_each(|(sum, own)| *sum += own);
            }
        }
        close("loss", &vec![vec![loss]], &vec![vec![total]]);
        close("gradients", &gradients, &sums);
    }
}

/// The gradients of the second batch of a stream are those with the state before it as a
/// constant, which differences confirm; with that state a function of the parameters they differ.
#[test]
fn gradients_end_at_the_border_of_a_batch() {
    let device = Device::cpu(1).expect("a thread");
    for seed in [1, 2, 4] {
        let (model, parameters, mut rng) = feature_model(seed);
        let mut batch = || {
            let sequences: Vec<Sequence> = (0..2).map(|_| sequence(&model, 5, &mut rng)).collect();
            model.batch(&sequences).expect("a batch")
        };
        let (first, second) = (batch(), batch());
        let objective =
            |mode| Objective::<f64>::new(&*model, mode, [2, 5], Carry::Carried, &device).expect("a pass");
        let mut stream = objective(Mode::Train);
        stream.forward(&parameters.values, &first, 1.0).expect("a loss");
        stream.carry_state().expect("a state");
        let state = stream.state().expect("a state");
        stream.forward(&parameters.values, &second, 1.0).expect("a loss");
        let mut gradients = parameters.zeros_like();
        stream.backward(&parameters.values, &mut gradients).expect("gradients");

        let mut pass = objective(Mode::Evaluate);
        let mut loss = |parameters: &Parameters<f64>, constant: bool| {
            if constant {
                pass.set_state(&state).expect("a state");
            } else {
                pass.clear_state().expect("a state");
                pass.forward(&parameters.values, &first, 1.0).expect("a loss");
                pass.carry_state().expect("a state");
            }
            pass.forward(&parameters.values, &second, 1.0).expect("a loss")
        };
        let (mut worst, mut through) = (0.0f64, 0.0f64);
        let scale = gradients.iter().flatten().fold(1e-2, |m: f64, g| m.max(g.abs()));
        for (i, own) in gradients.iter().enumerate() {
            for j in (0..own.len()).step_by((own.len() / 6).max(1)) {
                let mut difference = |constant| {
                    let mut at = |step: f64| {
                        let mut moved = parameters.clone();
                        moved.values[i][j] += step;
                        loss(&moved, constant)
                    };
                    (at(1e-5) - at(-1e-5)) / 2e-5
                };
                worst = worst.max((difference(true) - own[j]).abs() / scale);
                through = through.max((difference(false) - own[j]).abs() / scale);
            }
        }
        assert!(worst < 1e-6, "seed {seed}: {worst:.1e} from the differences with a constant state");
        assert!(through > 1e-3, "seed {seed}: the state before the batch does not matter: {through:.1e}");
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let (model, parameters, mut rng) = feature_model(1);
    let width = model.config().input_size;
    let mut runner = runner(&model, &parameters);
    let message = |result: xlstm::Result<Vec<f64>>| result.expect_err("refused").to_string();
    let bad = vec![f32::NAN; width];
    assert!(message(runner.read(&bad, Logits::Last)).contains("feature 0 of row 0 is NaN"));
    assert!(message(runner.read(&[], Logits::Last)).contains("0 features in rows of"));
    let row = vec![0.0; width];
    let error = runner.read_batch(&[&row, &row], Logits::Last).expect_err("refused").to_string();
    assert!(error.contains("2 sequences for a batch of 1"), "{error}");
    let state = runner.state().expect("a state");
    assert!(state.row(1).expect_err("refused").to_string().contains("no sequence 1 in a state of 1"));
    let other = State::<f64>::empty(&feature_model(2).0.state_layout(1));
    assert!(State::stack(&[&state, &other]).is_err() && State::<f64>::stack(&[]).is_err());
    let mut wrong = sequence(&model, 2, &mut rng);
    wrong.features.push(0.0);
    assert!(width == 1 || model.batch(&[wrong]).is_err());
    let (classifier, ..) = feature_model(0);
    let mut wrong = sequence(&classifier, 2, &mut rng);
    if let Targets::Classes(classes) = &mut wrong.targets {
        classes[0] = 1000;
    }
    let error = classifier.batch(&[wrong]).expect_err("refused").to_string();
    assert!(error.contains("a target is 1000"), "{error}");
}

/// Tokens that are drawn where the logits are follow those logits, and the state goes on as without.
#[test]
fn tokens_are_drawn_where_the_logits_are() {
    for seed in 0..6 {
        let mut rng = Rng::new(seed, 9);
        let model = LanguageModel::new(&endless(&mut rng)).expect("a model");
        let parameters = parameters(&model, &mut rng);
        let vocabulary = model.config().vocab_size;
        let model = Arc::new(model);
        let [mut plain, mut drawing] = [0; 2].map(|_| runner(&model, &parameters));
        let mut tokens: Vec<u32> = (0..2).map(|_| below(&mut rng, vocabulary) as u32).collect();
        for runner in [&mut plain, &mut drawing] {
            runner.reset(2);
        }
        for step in 0..6 {
            let temperature = [0.0, 0.7, 1.9][step % 3];
            let draws = [0; 2].map(|_| Draw { uniform: rng.uniform(), temperature, vocabulary });
            let logits = plain.read(&tokens, Logits::Last).expect("logits");
            let drawn = drawing.read_and_draw(&tokens, &draws).expect("tokens");
            for (i, (token, logits)) in drawn.iter().zip(logits.chunks(vocabulary)).enumerate() {
                let largest = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let token = *token as usize;
                if temperature == 0.0 {
                    assert!(largest - logits[token] < 1e-4, "seed {seed}, sequence {i}");
                    continue;
                }
                let weights: Vec<f64> = logits.iter().map(|l| ((l - largest) / temperature).exp()).collect();
                let sum = |count: usize| weights[..count].iter().sum::<f64>();
                let (mark, slack) = (draws[i].uniform * sum(vocabulary), 1e-4 * sum(vocabulary));
                let bounds = (sum(token) - slack, sum(token + 1) + slack);
                assert!(bounds.0 <= mark && mark <= bounds.1, "seed {seed}: {mark} is not within {bounds:?}");
            }
            let kept = drawing.logits().expect("logits");
            close(&format!("seed {seed}, logits"), &vec![kept], &vec![logits]);
            tokens = drawn;
        }
        let [after, same] = [&plain, &drawing].map(|runner| parts(&runner.state().expect("a state")));
        close(&format!("seed {seed}, state"), &same, &after);
        assert!(drawing.read_and_draw(&tokens[..1], &[]).is_err());
    }
}
