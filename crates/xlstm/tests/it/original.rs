//! The original's model: the names and shapes of its parameters, its configuration, and encoders
//! that read from both ends: what they depend on, and all gradients against differences.

use std::sync::Arc;

use xlstm::engine::{Ids, Mode, Tape, Var};
use xlstm::marks::{PAD, RESET};
use xlstm::model::{
    Backbone, BlockForm, FeatureConfig, FeatureModel, Head, LanguageModel, Logits, LstmType, Model,
    ModelConfig, OriginalStack, Pooling, Runner,
};
use xlstm::nn::{Builder, Context, Parameters, Weights};
use xlstm::rng::Rng;

use crate::pass::{Pass, device, on_gpu};

const KINDS: [(LstmType, BlockForm); 4] = [
    (LstmType::Slstm, BlockForm::Pre),
    (LstmType::Slstm, BlockForm::Post),
    (LstmType::Mlstm, BlockForm::Pre),
    (LstmType::Mlstm, BlockForm::Post),
];

fn config(cell: LstmType, form: BlockForm, bidirectional: bool) -> ModelConfig {
    let mut config = ModelConfig::original(11, 6, 8, 2, 1, 0.0, bidirectional, cell);
    (config.original.block, config.original.num_heads) = (Some(form), 2);
    config
}

fn shapes(config: &ModelConfig) -> Vec<(String, Vec<usize>)> {
    let model = LanguageModel::new(config).expect("a model");
    let specs = model.specs().iter();
    specs.map(|spec| (spec.name.clone(), spec.shape.clone())).collect()
}

#[test]
fn parameters_have_the_originals_names() {
    let check = |cell, form, block: &[(&str, &[usize])]| {
        let mut want: Vec<(String, Vec<usize>)> = vec![("embedding.weight".into(), vec![11, 6])];
        want.extend(block.iter().map(|(name, shape)| (format!("blocks.0.{name}"), shape.to_vec())));
        want.extend([("output_layer.weight".into(), vec![11, 6]), ("output_layer.bias".into(), vec![11])]);
        assert_eq!(shapes(&config(cell, form, false)), want);
    };
    check(
        LstmType::Slstm,
        BlockForm::Post,
        &[
            ("lstm.layers.0.weight_ih", &[32, 6]),
            ("lstm.layers.0.weight_hh", &[2, 16, 4]),
            ("lstm.layers.0.bias", &[32]),
            ("lstm.layers.1.weight_ih", &[32, 8]),
            ("lstm.layers.1.weight_hh", &[2, 16, 4]),
            ("lstm.layers.1.bias", &[32]),
            ("norm.weight", &[8]),
            ("norm.bias", &[8]),
            ("proj_up.weight", &[16, 8]),
            ("proj_up.bias", &[16]),
            ("proj.weight", &[6, 16]),
            ("proj.bias", &[6]),
        ],
    );
    let mut pre: Vec<(String, Vec<usize>)> = Vec::new();
    for l in 0..2 {
        pre.push((format!("lstm.layers.{l}.weight_ih"), vec![12, 8]));
        pre.push((format!("lstm.layers.{l}.bias"), vec![12]));
        for name in ["W_q", "W_k", "W_v"] {
            pre.push((format!("lstm.layers.{l}.{name}.weight"), vec![8, 8]));
            pre.push((format!("lstm.layers.{l}.{name}.bias"), vec![8]));
        }
    }
    for (name, shape) in [("norm.weight", vec![8]), ("norm.bias", vec![8])] {
        pre.push((name.into(), shape));
    }
    for (name, shape) in [("proj_up", [8, 6]), ("proj", [6, 8])] {
        pre.push((format!("{name}.weight"), shape.to_vec()));
        pre.push((format!("{name}.bias"), shape[..1].to_vec()));
    }
    let pre: Vec<(&str, &[usize])> = pre.iter().map(|(name, shape)| (&name[..], &shape[..])).collect();
    check(LstmType::Mlstm, BlockForm::Pre, &pre);
}

#[test]
fn a_forget_gate_starts_open() {
    for (cell, form) in KINDS {
        let model = LanguageModel::new(&config(cell, form, false)).expect("a model");
        let parameters = Parameters::<f64>::initialize(model.specs(), 1);
        let named = |name: &str| model.specs().iter().position(|spec| spec.name == name).expect("a name");
        let bias = &parameters.values[named("blocks.0.lstm.layers.0.bias")];
        let forget = if cell == LstmType::Slstm { &bias[8..16] } else { &bias[2..4] };
        assert_eq!(forget.first().zip(forget.last()), Some((&3.0, &6.0)), "{cell:?}");
        assert_eq!(bias.iter().filter(|b| **b != 0.0).count(), forget.len());
    }
}

#[test]
fn the_block_follows_the_cell() {
    let original = |cell| ModelConfig::original(11, 6, 8, 1, 1, 0.0, false, cell).original;
    assert_eq!(original(LstmType::Slstm).block_form(), BlockForm::Post);
    assert_eq!(original(LstmType::Mlstm).block_form(), BlockForm::Pre);
    let parse = |yaml: &str| serde_saphyr::from_str::<ModelConfig>(yaml).expect("a configuration");
    for (word, cell) in [
        ("slstm", LstmType::Slstm),
        ("sLSTM", LstmType::Slstm),
        ("mlstm", LstmType::Mlstm),
        ("mLSTM", LstmType::Mlstm),
    ] {
        let yaml = format!("{{family: original, original: {{lstm_type: {word}, block: post}}}}");
        let original = parse(&yaml).original;
        assert_eq!((original.lstm_type, original.block), (cell, Some(BlockForm::Post)));
    }
}

#[test]
fn errors_name_the_key() {
    let base = || config(LstmType::Slstm, BlockForm::Post, false);
    let refused = |change: &dyn Fn(&mut ModelConfig), message: &str, hint: &str| {
        let mut config = base();
        change(&mut config);
        let error = LanguageModel::new(&config).expect_err(message);
        assert!(error.to_string().contains(message), "{error}");
        assert!(error.hint_text().unwrap_or_default().contains(hint), "{:?}", error.hint_text());
    };
    refused(
        &|c| c.original.bidirectional = true,
        "model.original.bidirectional is true, but a language model predicts each token from those before it",
        "bidirectional: false",
    );
    refused(&|c| c.original.num_heads = 3, "model.original.num_heads is 3", "1, 2, 4, 8");
    refused(&|c| c.original.num_layers = 0, "model.original.num_layers is 0", "at least 1");
    refused(&|c| c.original.hidden_size = 0, "model.original.hidden_size is 0", "at least 1");
    refused(&|c| c.original.proj_factor = 0.01, "leaves no width", "at least 0.125");
    refused(&|c| c.dropout = 1.0, "model.dropout is 1", "less than 1");
    refused(&|c| c.tie_weights = true, "model.tie_weights is set, but model.family is original", "original");
}

/// An encoder over features as given: tape, x, the marks, y and the parameters.
struct Encoder {
    stack: OriginalStack,
    parameters: Parameters<f64>,
    shape: [usize; 3],
}

impl Encoder {
    fn new(cell: LstmType, form: BlockForm, shape: [usize; 3]) -> Encoder {
        let mut builder = Builder::new();
        let stack = OriginalStack::new(&config(cell, form, true), &mut builder);
        let mut parameters = Parameters::initialize(&builder.finish(), 7);
        let mut rng = Rng::new(7, 1000);
        // Gates that start without weights would hide what they do.
        parameters.values.iter_mut().flatten().for_each(|w| *w += 0.3 * rng.normal());
        Encoder { stack, parameters, shape }
    }

    fn input(&self) -> Vec<f64> {
        let mut rng = Rng::new(9, 0);
        (0..self.shape.iter().product()).map(|_| rng.normal()).collect()
    }

    /// y, and where it is `weighted` the gradients of its weighted sum: of x and the parameters.
    fn run(
        &self,
        parameters: &Parameters<f64>,
        x: &[f64],
        marks: Option<&[u32]>,
        weights: Option<&[f64]>,
    ) -> (Vec<f64>, Vec<Vec<f64>>) {
        let mut tape = Tape::new(Mode::Train);
        let input = tape.input_with_gradient(self.shape);
        let ids: Option<Ids> = marks.map(|marks| tape.ids(marks.len()));
        let mut context = Context::new(ids, None);
        let (y, state): (Var, Vec<Var>) =
            self.stack.forward(&mut tape, input, None, &mut context).expect("features");
        assert!(state.is_empty() && self.stack.state_layout(2).is_empty());
        tape.keep(y);
        tape.seed_gradient(y);
        let mut pass = Pass::new(tape, parameters);
        pass.set(input, x);
        ids.into_iter().zip(marks).for_each(|(ids, marks)| pass.ids(ids, marks));
        pass.forward();
        let value = pass.value(y);
        let Some(weights) = weights else { return (value, Vec::new()) };
        pass.seed(y, weights);
        pass.backward();
        let mut gradients = pass.gradients();
        gradients.push(pass.gradient(input));
        (value, gradients)
    }
}

fn distance(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
}

#[test]
fn an_encoder_reads_from_both_ends() {
    let [batch, length, width] = [1, 7, 6];
    for (cell, form) in KINDS {
        let encoder = Encoder::new(cell, form, [batch, length, width]);
        let x = encoder.input();
        let (y, _) = encoder.run(&encoder.parameters, &x, None, None);
        for moved in 0..length {
            let mut other = x.clone();
            other[moved * width..][..width].iter_mut().for_each(|x| *x += 0.5);
            let (z, _) = encoder.run(&encoder.parameters, &other, None, None);
            for t in 0..length {
                let at = t * width..(t + 1) * width;
                assert!(distance(&y[at.clone()], &z[at]) > 1e-6, "{cell:?} {form:?}: {t} from {moved}");
            }
        }
    }
}

/// Two documents and pads in a row come to what the documents come to alone.
#[test]
fn documents_and_pads_do_not_mix() {
    let (length, width) = (9, 6);
    let (r, p) = (RESET, PAD);
    let marks = [p, 0, 0, p | r, 0, r, 0, 0, p];
    let documents = [vec![1, 2, 4], vec![5, 6, 7]];
    for (cell, form) in KINDS {
        let whole = Encoder::new(cell, form, [1, length, width]);
        let x = whole.input();
        let (y, _) = whole.run(&whole.parameters, &x, Some(&marks), None);
        for places in &documents {
            let alone =
                Encoder { shape: [1, places.len(), width], ..Encoder::new(cell, form, [1, 1, width]) };
            let rows = |of: &[f64]| -> Vec<f64> {
                places.iter().flat_map(|&t| of[t * width..(t + 1) * width].to_vec()).collect()
            };
            let (z, _) = alone.run(&alone.parameters, &rows(&x), None, None);
            let bound = if on_gpu() { 1e-4 } else { 1e-12 };
            assert!(distance(&rows(&y), &z) < bound, "{cell:?} {form:?}");
        }
    }
}

/// Of every parameter and of the features, against central differences.
#[test]
fn gradients_of_an_encoder() {
    if on_gpu() {
        return; // f32 has no digits left for differences; the operations are checked one by one.
    }
    let marks = [0, 0, PAD, 0, RESET, 0, PAD, RESET, 0, 0];
    for (cell, form) in KINDS {
        let encoder = Encoder::new(cell, form, [2, 5, 6]);
        let x = encoder.input();
        let mut rng = Rng::new(11, 0);
        // What pads come to means nothing, and nothing is asked of it.
        let weights: Vec<f64> =
            (0..60).map(|i| if marks[i / 6] & PAD == 0 { rng.normal() } else { 0.0 }).collect();
        let (_, gradients) = encoder.run(&encoder.parameters, &x, Some(&marks), Some(&weights));
        let loss = |parameters: &Parameters<f64>, x: &[f64]| {
            let (y, _) = encoder.run(parameters, x, Some(&marks), None);
            y.iter().zip(&weights).map(|(y, w)| y * w).sum::<f64>()
        };
        let step = 1e-5;
        for (i, gradient) in gradients.iter().enumerate() {
            let scale = gradient.iter().fold(1e-2, |m: f64, g| m.max(g.abs()));
            for j in (0..gradient.len()).step_by((gradient.len() / 6).max(1)) {
                let moved = |by: f64| {
                    let (mut parameters, mut x) = (encoder.parameters.clone(), x.clone());
                    match parameters.values.get_mut(i) {
                        Some(values) => values[j] += by,
                        None => x[j] += by,
                    }
                    loss(&parameters, &x)
                };
                let numeric = (moved(step) - moved(-step)) / (2.0 * step);
                let error = (numeric - gradient[j]).abs() / scale;
                let name = encoder.parameters.specs().get(i).map_or("x", |spec| &spec.name);
                assert!(
                    error < 1e-6,
                    "{cell:?} {form:?} {name}[{j}]: numeric {numeric}, analytic {}",
                    gradient[j]
                );
            }
        }
    }
}

/// A state cannot go on from one piece to the next, and is refused.
#[test]
fn an_encoder_takes_no_state() {
    let encoder = Encoder::new(LstmType::Slstm, BlockForm::Post, [1, 3, 6]);
    let mut tape = Tape::new(Mode::Evaluate);
    let x = tape.input([1, 3, 6]);
    let error = encoder.stack.forward(&mut tape, x, Some(&[]), &mut Context::default()).unwrap_err();
    assert!(error.to_string().contains("bidirectional"), "{error}");
    assert!(error.hint_text().unwrap_or_default().contains("whole sequences"));
}

/// A classifier that reads both ways runs on whole sequences, of unequal lengths too.
#[test]
fn an_encoder_classifies_whole_sequences() {
    let device = device();
    for (cell, form) in KINDS {
        for pooling in [Pooling::Last, Pooling::Mean, Pooling::None] {
            let blocks = config(cell, form, true);
            let head = Head::Classification { classes: 3 };
            let model =
                FeatureModel::new(FeatureConfig { input_size: 4, blocks, pooling, head }).expect("a model");
            let parameters = Arc::new(Parameters::<f32>::initialize(model.specs(), 5));
            let weights = Weights::new(parameters, &device).expect("weights");
            let mut runner = Runner::new(Arc::new(model), weights, device.clone());
            let mut rng = Rng::new(3, 0);
            // Longer than the pieces that other models are read in.
            let sequences: Vec<Vec<f32>> =
                [520, 1, 33].iter().map(|n| (0..4 * n).map(|_| rng.normal() as f32).collect()).collect();
            let rows: Vec<&[f32]> = sequences.iter().map(Vec::as_slice).collect();
            runner.reset(3);
            let together = runner.read_batch(&rows, Logits::All).expect("outputs");
            let error = runner.read_batch(&rows, Logits::All).expect_err("begun already");
            assert!(error.to_string().contains("both ends"), "{error}");
            for (sequence, together) in sequences.iter().zip(&together) {
                runner.reset(1);
                let alone = runner.read(sequence, Logits::All).expect("outputs");
                assert_eq!(alone.len(), if pooling == Pooling::None { 3 * sequence.len() / 4 } else { 3 });
                for (a, b) in alone.iter().zip(together) {
                    // On a GPU other shapes take other products: 5e-5 of a value was seen.
                    let bound = 1e-4 * b.abs().max(1.0);
                    assert!((a - b).abs() < bound, "{cell:?} {form:?} {pooling:?}: {a} and {b}");
                }
            }
            // The first output hears of the last row.
            let mut other = sequences[2].clone();
            other[4 * 32] += 1.0;
            runner.reset(1);
            let moved = runner.read(&other, Logits::All).expect("outputs");
            assert!((moved[0] - together[2][0]).abs() > 1e-7, "{cell:?} {form:?} {pooling:?}");
        }
    }
}
