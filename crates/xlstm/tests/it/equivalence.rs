//! The state is all that a model knows of the past: however a batch is cut into pieces,
//! padded, filled with documents or shared by sequences, it computes what each document
//! computes alone, in losses, logits, states and every gradient.

use proptest::prelude::*;
use xlstm::cell::slstm::CellFunction;
use xlstm::cell::{ForgetGate, InputGate};
use xlstm::data::Batch;
use xlstm::engine::{Mode, Tape, Var};
use xlstm::marks::{IGNORE, PAD, RESET};
use xlstm::model::objective::Carry;
use xlstm::model::{
    BlockForm, Family, LanguageModel, Logits, LstmType, Model, ModelConfig, Objective, Runner, SlstmAt,
};
use xlstm::nn::large::WeightMode;
use xlstm::nn::lstm::LstmConfig;
use xlstm::nn::transformer::{PositionKind, TransformerConfig};
use xlstm::nn::{Context, Parameters, Weights};
use xlstm::rng::Rng;

use crate::pass::{Pass, device, on_gpu};

const TOLERANCE: f64 = 1e-10;
/// A GPU computes in f32, in which the processor too loses up to 2.3e-2 of a gradient in the worst
/// of 1,500 random models (5e-7 in the median): some are ill-conditioned. A mistake is of order one.
const TOLERANCE_ON_GPU: f64 = 5e-2;
/// What numbers of order one lose in some dozens of sums: a gradient of a state, all of which were
/// below 1e-5, has been off by 2.5e-15.
const ROUNDING: f64 = 1e-14;
const ROUNDING_ON_GPU: f64 = 5e-7;
/// Gradients of the loss are this times those of the sum of the token losses.
const SCALE: f64 = 0.7;
const VOCABULARY: usize = 7;

/// One place in a row.
#[derive(Clone, Copy, Debug)]
struct Place {
    token: u32,
    target: u32,
    mark: u32,
}

type Row = Vec<Place>;
/// A state, or its gradient, part by part.
type Parts = Vec<Vec<f64>>;

/// What a batch came to; pads are left out.
#[derive(Debug)]
struct Outcome {
    /// (row, token).
    losses: Vec<Vec<f64>>,
    /// (row, token x vocabulary).
    logits: Vec<Vec<f64>>,
    /// The state after the last token.
    last: Parts,
    gradients: Parts,
    /// The gradient of the state before the first token; empty where none was given.
    initial: Parts,
}

struct Case {
    model: LanguageModel,
    parameters: Parameters<f64>,
    rng: Rng,
    rows: Vec<Row>,
    start: Option<Parts>,
    /// The gradient of the state after the last token.
    seeds: Parts,
}

pub fn below(rng: &mut Rng, n: usize) -> usize {
    (rng.next_u64() % n as u64) as usize
}

fn chance(rng: &mut Rng, probability: f64) -> bool {
    rng.uniform() < probability
}

/// A random configuration of a random family.
pub fn config(rng: &mut Rng) -> ModelConfig {
    match below(rng, 9) {
        0 => lstm(rng),
        1 | 2 => transformer(rng),
        3 => large(rng),
        4 | 5 => original(rng),
        _ => small(rng),
    }
}

fn large(rng: &mut Rng) -> ModelConfig {
    let heads = 1 + below(rng, 3);
    let mut config = ModelConfig { family: Family::Large, vocab_size: VOCABULARY, ..ModelConfig::default() };
    (config.embedding_dim, config.num_blocks) = (2 * heads * (1 + below(rng, 4)), 2);
    let large = &mut config.large;
    (large.num_heads, large.chunk_size) = (heads, 1 + below(rng, 6));
    large.qk_dim_factor = [0.5, 1.0][below(rng, 2)];
    large.ffn_round_up_to_multiple_of = 1 + below(rng, 5);
    (large.use_bias, large.add_out_norm) = (chance(rng, 0.5), chance(rng, 0.5));
    large.weight_mode = [WeightMode::Single, WeightMode::Fused][below(rng, 2)];
    large.gate_soft_cap = [None, Some(5.0)][below(rng, 2)];
    large.output_logit_soft_cap = [None, Some(3.0)][below(rng, 2)];
    large.eps = [1e-6, 1e-2][below(rng, 2)];
    config
}

fn lstm(rng: &mut Rng) -> ModelConfig {
    let (embedding_dim, num_blocks) = (1 + below(rng, 8), 1 + below(rng, 3));
    let tie_weights = chance(rng, 0.3);
    let hidden_dim = if tie_weights { 0 } else { below(rng, 9) };
    let lstm = LstmConfig { hidden_dim, forget_bias: chance(rng, 0.5).then_some(1.0) };
    let base = ModelConfig { family: Family::Lstm, vocab_size: VOCABULARY, ..ModelConfig::default() };
    ModelConfig { embedding_dim, num_blocks, tie_weights, lstm, ..base }
}

/// With windows shorter and longer than the sequences; learned positions need longer ones.
fn transformer(rng: &mut Rng) -> ModelConfig {
    let learned = chance(rng, 0.3);
    let num_heads = 1 + below(rng, 3);
    let transformer = TransformerConfig {
        num_heads,
        context_length: if learned { 21 } else { 1 + below(rng, 24) },
        positions: if learned { PositionKind::Learned } else { PositionKind::Rotary },
        rotary_base: [10.0, 10_000.0][below(rng, 2)],
        ffn_factor: 1 + below(rng, 3),
        bias: chance(rng, 0.5),
    };
    let (embedding_dim, tie_weights) = (num_heads * 2 * (1 + below(rng, 3)), chance(rng, 0.5));
    let base = ModelConfig { family: Family::Transformer, vocab_size: VOCABULARY, ..ModelConfig::default() };
    ModelConfig { embedding_dim, num_blocks: 1 + below(rng, 2), tie_weights, transformer, ..base }
}

fn original(rng: &mut Rng) -> ModelConfig {
    let heads = 1 + below(rng, 3);
    let (embedding, hidden) = (2 + below(rng, 9), heads * (1 + below(rng, 5)));
    let cell = if chance(rng, 0.5) { LstmType::Slstm } else { LstmType::Mlstm };
    let (layers, blocks) = (1 + below(rng, 2), 1 + below(rng, 2));
    let mut config = ModelConfig::original(VOCABULARY, embedding, hidden, layers, blocks, 0.0, false, cell);
    let original = &mut config.original;
    original.block = [None, Some(BlockForm::Pre), Some(BlockForm::Post)][below(rng, 3)];
    (original.num_heads, original.chunk_size) = (heads, 1 + below(rng, 6));
    config
}

fn small(rng: &mut Rng) -> ModelConfig {
    let mut config = ModelConfig { vocab_size: VOCABULARY, num_blocks: 3, ..ModelConfig::default() };
    let heads = 1 + below(rng, 3);
    config.embedding_dim = heads * (2 + below(rng, 5));
    config.slstm_at = match below(rng, 4) {
        0 => SlstmAt::None,
        1 => SlstmAt::All,
        _ => SlstmAt::Positions(vec![below(rng, 3)]),
    };
    (config.bias, config.tie_weights) = (chance(rng, 0.5), chance(rng, 0.5));
    let mlstm = &mut config.mlstm;
    (mlstm.num_heads, mlstm.qkv_proj_blocksize) = (heads, 1 + below(rng, 3));
    mlstm.round_proj_up_to_multiple_of = heads * mlstm.qkv_proj_blocksize;
    (mlstm.chunk_size, mlstm.conv1d_kernel_size) = (1 + below(rng, 6), 1 + below(rng, 5));
    mlstm.input_gate = if chance(rng, 0.7) { InputGate::Exponential } else { InputGate::Sigmoid };
    mlstm.eps = [1e-6, 1e-2][below(rng, 2)];
    let slstm = &mut config.slstm;
    (slstm.num_heads, slstm.conv1d_kernel_size) = (heads, below(rng, 5));
    slstm.function = if chance(rng, 0.6) { CellFunction::Slstm } else { CellFunction::Lstm };
    slstm.forget_gate = if chance(rng, 0.7) { ForgetGate::Sigmoid } else { ForgetGate::Exponential };
    slstm.gradient_recurrent_cut = chance(rng, 0.2);
    slstm.gradient_recurrent_clipval = chance(rng, 0.2).then_some(1e-2);
    config.feedforward.round_proj_up_to_multiple_of = 1;
    config
}

fn row(rng: &mut Rng, length: usize) -> Row {
    let place = |rng: &mut Rng| Place {
        token: below(rng, VOCABULARY) as u32,
        target: if chance(rng, 0.1) { IGNORE } else { below(rng, VOCABULARY) as u32 },
        mark: 0,
    };
    (0..length).map(|_| place(rng)).collect()
}

impl Case {
    /// A random model, half the time with a state of a few tokens to start from.
    fn new(seed: u64, batch: usize) -> Case {
        let mut rng = Rng::new(seed, 0);
        let model = LanguageModel::new(&config(&mut rng)).expect("a model");
        let mut parameters = Parameters::initialize(model.specs(), seed);
        // Gates and recurrent weights that start at zero would hide what they do.
        parameters.values.iter_mut().flatten().for_each(|w| *w += 0.4 * rng.normal());
        let layout = model.state_layout(batch);
        let noise = |rng: &mut Rng, n: usize| (0..n).map(|_| rng.normal()).collect();
        let seeds = layout.iter().map(|(_, shape)| noise(&mut rng, shape.len())).collect();
        let length = 1 + below(&mut rng, 16);
        let rows = (0..batch).map(|_| row(&mut rng, length)).collect();
        let mut case = Case { model, parameters, rng, rows, start: None, seeds };
        if chance(&mut case.rng, 0.5) {
            let before: Vec<Row> = (0..batch).map(|_| row(&mut case.rng, 5)).collect();
            case.start = Some(case.run(&before, &[], false, None, None).last);
        }
        case
    }

    fn reset_anywhere(&mut self) {
        for place in self.rows.iter_mut().flatten() {
            place.mark |= if chance(&mut self.rng, 0.2) { RESET } else { 0 };
        }
    }

    /// The same number of pads anywhere in every row, with tokens and resets that nobody sees.
    fn padded(&mut self) -> Vec<Row> {
        let count = 1 + below(&mut self.rng, 8);
        let mut rows = self.rows.clone();
        for row in &mut rows {
            for _ in 0..count {
                let mark = PAD | if chance(&mut self.rng, 0.2) { RESET } else { 0 };
                let token = below(&mut self.rng, VOCABULARY) as u32;
                let at = below(&mut self.rng, row.len() + 1);
                row.insert(at, Place { token, target: IGNORE, mark });
            }
        }
        rows
    }

    /// Up to four places to cut at.
    fn cuts(&mut self, length: usize) -> Vec<usize> {
        let mut cuts: Vec<usize> =
            (0..below(&mut self.rng, 5)).map(|_| below(&mut self.rng, length)).filter(|&c| c > 0).collect();
        cuts.sort_unstable();
        cuts.dedup();
        cuts
    }

    /// Runs `rows` forward piece by piece, then backward from the last piece to the first,
    /// `seeds` being the gradient of the last state.
    fn run(
        &self,
        rows: &[Row],
        cuts: &[usize],
        marked: bool,
        start: Option<&Parts>,
        seeds: Option<&Parts>,
    ) -> Outcome {
        let bounds: Vec<usize> = [0].iter().chain(cuts).chain([&rows[0].len()]).copied().collect();
        let mut state = start.cloned();
        let mut pieces = Vec::new();
        for bound in bounds.windows(2) {
            let piece: Vec<Row> = rows.iter().map(|row| row[bound[0]..bound[1]].to_vec()).collect();
            let piece = Piece::forward(self, &piece, marked, state.as_ref());
            state = Some(piece.after.iter().map(|&var| piece.pass.value(var)).collect());
            pieces.push(piece);
        }
        let last = state.unwrap_or_default();
        let mut gradients = self.parameters.zeros_like();
        let mut carried = seeds.cloned();
        for piece in pieces.iter_mut().rev() {
            carried = Some(piece.backward(carried.as_ref(), &mut gradients));
        }
        let mut outcome = Outcome {
            losses: vec![Vec::new(); rows.len()],
            logits: vec![Vec::new(); rows.len()],
            last,
            gradients,
            initial: carried.unwrap_or_default(),
        };
        for (piece, bound) in pieces.iter().zip(bounds.windows(2)) {
            let (losses, logits) = (piece.pass.value(piece.losses), piece.pass.value(piece.logits));
            let length = bound[1] - bound[0];
            for (b, row) in rows.iter().enumerate() {
                for t in (0..length).filter(|t| row[bound[0] + t].mark & PAD == 0) {
                    let at = b * length + t;
                    outcome.losses[b].push(losses[at]);
                    outcome.logits[b].extend(&logits[at * VOCABULARY..][..VOCABULARY]);
                }
            }
        }
        outcome
    }

    /// Every document of every row alone, whole and without marks: the truth.
    fn documents(&self) -> Outcome {
        let batch = self.rows.len();
        let own = |parts: &Parts, b: usize| -> Parts {
            let row = |part: &Vec<f64>| part[b * part.len() / batch..(b + 1) * part.len() / batch].to_vec();
            parts.iter().map(row).collect()
        };
        let join = |to: &mut Parts, from: Parts| {
            to.resize(from.len().max(to.len()), Vec::new());
            to.iter_mut().zip(from).for_each(|(to, from)| to.extend(from));
        };
        let mut outcome = Outcome {
            losses: Vec::new(),
            logits: Vec::new(),
            last: Vec::new(),
            gradients: self.parameters.zeros_like(),
            initial: Vec::new(),
        };
        for (b, row) in self.rows.iter().enumerate() {
            let starts = (0..row.len()).filter(|&t| t == 0 || row[t].mark & RESET != 0);
            let bounds: Vec<usize> = starts.chain([row.len()]).collect();
            let (mut losses, mut logits, mut last) = (Vec::new(), Vec::new(), Vec::new());
            let mut initial: Parts =
                self.start.iter().flat_map(|start| own(start, b)).map(|part| vec![0.0; part.len()]).collect();
            for bound in bounds.windows(2) {
                let first = bound[0] == 0 && row[0].mark & RESET == 0;
                let start = self.start.as_ref().filter(|_| first).map(|start| own(start, b));
                let seeds = (bound[1] == row.len()).then(|| own(&self.seeds, b));
                let document = [row[bound[0]..bound[1]].to_vec()];
                let alone = self.run(&document, &[], false, start.as_ref(), seeds.as_ref());
                losses.extend(alone.losses.concat());
                logits.extend(alone.logits.concat());
                last = alone.last;
                if start.is_some() {
                    initial = alone.initial;
                }
                for (sum, gradient) in outcome.gradients.iter_mut().zip(alone.gradients) {
                    sum.iter_mut().zip(gradient).for_each(|(sum, g)| *sum += g);
                }
            }
            outcome.losses.push(losses);
            outcome.logits.push(logits);
            join(&mut outcome.last, last);
            join(&mut outcome.initial, initial);
        }
        outcome
    }

    /// Asserts that `rows`, cut at `cuts`, come to what the documents come to alone.
    fn check(&self, rows: &[Row], cuts: &[usize], marked: bool) {
        let got = self.run(rows, cuts, marked, self.start.as_ref(), Some(&self.seeds));
        let want = self.documents();
        close("losses", &got.losses, &want.losses);
        close("logits", &got.logits, &want.logits);
        close("last state", &got.last, &want.last);
        close("gradients", &got.gradients, &want.gradients);
        close("gradient of the initial state", &got.initial, &want.initial);
    }
}

/// Every element within [`TOLERANCE`] of the largest of its own list, or of a thousandth of
/// the largest of all, or within the rounding of numbers of order one, which losses and
/// seeds are: some gradients are nothing but that.
#[track_caller]
pub fn close(what: &str, got: &Parts, want: &Parts) {
    let largest = |x: &[f64]| x.iter().fold(0.0, |m: f64, x| m.max(x.abs()));
    let all = want.iter().map(|x| largest(x)).fold(0.0, f64::max);
    assert_eq!(got.len(), want.len(), "{what}");
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        assert_eq!(got.len(), want.len(), "{what} {i}");
        let (tolerance, rounding) =
            if on_gpu() { (TOLERANCE_ON_GPU, ROUNDING_ON_GPU) } else { (TOLERANCE, ROUNDING) };
        let bound = tolerance * largest(want).max(1e-3 * all) + rounding;
        for (j, (got, want)) in got.iter().zip(want).enumerate() {
            assert!((got - want).abs() <= bound, "{what} [{i}][{j}]: {got} and {want}");
        }
    }
}

/// A recorded pass over one piece of a batch.
struct Piece {
    pass: Pass<f64>,
    before: Vec<Var>,
    after: Vec<Var>,
    /// Which parts of the state have a gradient; a count of tokens has none.
    smooth: Vec<bool>,
    logits: Var,
    loss: Var,
    losses: Var,
}

impl Piece {
    fn forward(case: &Case, rows: &[Row], marked: bool, state: Option<&Parts>) -> Piece {
        let shape = [rows.len(), rows[0].len()];
        let count = shape[0] * shape[1];
        let mut tape = Tape::new(Mode::Train);
        let (tokens, targets, scale) = (tape.ids(count), tape.ids(count), tape.input([1]));
        let marks = marked.then(|| tape.ids(count));
        let layout = case.model.state_layout(shape[0]);
        let smooth: Vec<bool> = layout.iter().map(|(name, _)| name != "position").collect();
        let given = layout.iter().zip(&smooth).filter(|_| state.is_some());
        let before: Vec<Var> = given
            .map(|((_, s), smooth)| match smooth {
                true => tape.input_with_gradient(s.dims()),
                false => tape.input(s.dims()),
            })
            .collect();
        let mut context = Context::new(marks, None);
        let features = case.model.features(
            &mut tape,
            tokens,
            shape,
            Logits::All,
            state.map(|_| &before[..]),
            &mut context,
        );
        let (features, after) = features.expect("features");
        let logits = case.model.outputs(&mut tape, features).expect("logits");
        let (loss, losses) = case.model.loss(&mut tape, features, targets, scale).expect("a loss");
        for (&var, smooth) in after.iter().zip(&smooth).chain([(&loss, &true)]) {
            tape.keep(var);
            if *smooth {
                tape.seed_gradient(var);
            }
        }
        tape.keep(logits);
        tape.keep(losses);
        let mut pass = Pass::new(tape, &case.parameters);
        let of = |of: fn(&Place) -> u32| rows.iter().flatten().map(of).collect::<Vec<u32>>();
        pass.ids(tokens, &of(|place| place.token));
        pass.ids(targets, &of(|place| place.target));
        marks.into_iter().for_each(|marks| pass.ids(marks, &of(|place| place.mark)));
        pass.set(scale, &[SCALE]);
        for (&var, part) in before.iter().zip(state.into_iter().flatten()) {
            pass.set(var, part);
        }
        pass.forward();
        Piece { pass, before, after, smooth, logits, loss, losses }
    }

    /// From the gradient of the state after the piece to that of the state before it.
    fn backward(&mut self, after: Option<&Parts>, gradients: &mut Parts) -> Parts {
        self.pass.seed(self.loss, &[1.0]);
        for (i, &var) in self.after.iter().enumerate().filter(|(i, _)| self.smooth[*i]) {
            match after {
                Some(parts) => self.pass.seed(var, &parts[i]),
                None => self.pass.seed(var, &vec![0.0; self.pass.value(var).len()]),
            }
        }
        self.pass.backward();
        for (sum, own) in gradients.iter_mut().zip(self.pass.gradients()) {
            sum.iter_mut().zip(own).for_each(|(sum, own)| *sum += own);
        }
        let parts = self.before.iter().zip(&self.smooth);
        let gradient = |(&var, smooth): (&Var, &bool)| match smooth {
            true => self.pass.gradient(var),
            false => vec![0.0; self.pass.value(var).len()],
        };
        parts.map(gradient).collect()
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 80, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_sequence_may_be_cut_anywhere(seed: u64) {
        let mut case = Case::new(seed, 1);
        let length = case.rows[0].len();
        let cuts = if seed % 4 == 0 { (1..length).collect() } else { case.cuts(length) };
        case.check(&case.rows, &cuts, false);
    }

    #[test]
    fn a_reset_is_a_fresh_start(seed: u64) {
        let mut case = Case::new(seed, 1);
        case.reset_anywhere();
        case.check(&case.rows, &[], true);
    }

    #[test]
    fn padding_changes_nothing(seed: u64) {
        let mut case = Case::new(seed, 1);
        let rows = case.padded();
        case.check(&rows, &[], true);
    }

    #[test]
    fn rows_do_not_see_each_other(seed: u64) {
        let case = Case::new(seed, 3);
        case.check(&case.rows, &[], false);
    }

    #[test]
    fn all_at_once(seed: u64) {
        let mut case = Case::new(seed, 3);
        case.reset_anywhere();
        let rows = case.padded();
        let cuts = case.cuts(rows[0].len());
        case.check(&rows, &cuts, true);
    }

    /// The passes that the library itself records: one objective that carries its state, and
    /// a runner that is stepped from a fork.
    #[test]
    fn recorded_passes_agree(seed: u64) {
        let Case { model, parameters, mut rng, .. } = Case::new(seed, 1);
        // A state that ends is not carried.
        prop_assume!(model.most_tokens().is_none());
        let row = row(&mut rng, 12);
        let batch = |places: &[Place]| Batch {
            batch_size: 1,
            length: places.len(),
            inputs: places.iter().map(|p| p.token).collect(),
            targets: places.iter().map(|p| p.target).collect(),
            marks: vec![0; places.len()],
            target_count: 1,
        };
        let device = device();
        let values = Weights::new(parameters.into(), &device).expect("weights");
        let objective =
            |length, carry| Objective::<f64>::new(&model, Mode::Evaluate, [1, length], carry, &device);
        let mut whole = objective(12, Carry::Fresh).expect("a pass");
        whole.forward(values.values(), &batch(&row), SCALE).expect("a loss");
        let mut pieces = objective(4, Carry::Carried).expect("a pass");
        let mut losses = Vec::new();
        for piece in row.chunks(4) {
            pieces.forward(values.values(), &batch(piece), SCALE).expect("a loss");
            losses.extend_from_slice(&pieces.losses().expect("losses"));
            pieces.carry_state().expect("a state");
        }
        close("losses", &vec![losses], &vec![whole.losses().expect("losses")]);

        let mut runner = Runner::new(model.into(), values, device);
        let tokens: Vec<u32> = row.iter().map(|p| p.token).collect();
        let all = runner.read(&tokens, Logits::All).expect("logits");
        let after = runner.state().expect("a state");
        runner.reset(1);
        runner.read(&tokens[..5], Logits::Last).expect("logits");
        let prompt = runner.state().expect("a state");
        for _ in 0..2 {
            runner.set_state(&prompt).expect("a state");
            for (&token, want) in tokens.iter().zip(all.chunks(VOCABULARY)).skip(5) {
                let logits = runner.read(&[token], Logits::Last).expect("logits");
                close("logits", &vec![logits], &vec![want.to_vec()]);
            }
            let fork = runner.state().expect("a state");
            let parts = |state: &xlstm::state::State<f64>| state.parts().map(<[f64]>::to_vec).collect();
            close("state", &parts(&fork), &parts(&after));
            prop_assert_eq!(fork.tokens(), [12]);
        }
    }
}

/// Learned positions end: whoever goes on is told so.
#[test]
fn learned_positions_end() {
    let transformer = TransformerConfig {
        context_length: 6,
        positions: PositionKind::Learned,
        ..TransformerConfig::default()
    };
    let base = ModelConfig { family: Family::Transformer, vocab_size: VOCABULARY, ..ModelConfig::default() };
    let model = LanguageModel::new(&ModelConfig { embedding_dim: 8, transformer, ..base }).expect("a model");
    let device = device();
    let record = |length, carry| Objective::<f64>::new(&model, Mode::Train, [1, length], carry, &device);
    assert!(record(6, Carry::Fresh).is_ok() && record(6, Carry::Marked).is_ok());
    for (length, carry, word) in [(7, Carry::Fresh, "7 tokens"), (6, Carry::Carried, "carried")] {
        let error = record(length, carry).expect_err("an end");
        assert!(error.to_string().contains(word), "{error}");
        assert!(error.hint_text().is_some_and(|hint| hint.contains("rotary")), "{error}");
    }
    let parameters = Parameters::<f64>::initialize(model.specs(), 1);
    let values = Weights::new(parameters.into(), &device).expect("weights");
    let mut runner = Runner::new(model.into(), values, device);
    runner.read(&[1, 2, 3, 4], Logits::Last).expect("logits");
    runner.read(&[5, 6], Logits::Last).expect("logits");
    let error = runner.read(&[1], Logits::Last).expect_err("an end").to_string();
    assert!(error.contains("7 tokens") && error.contains("context of 6"), "{error}");
}
