//! Layers, blocks, the stack and whole language models against the official small family:
//! outputs, losses, all gradients, and the same token by token with the state carried.

use std::sync::Arc;

use serde_json::{Value, json};
use xlstm::data::Batch;
use xlstm::engine::operation::Element;
use xlstm::engine::{Mode, Shape, Tape, Var};
use xlstm::model::objective::Carry;
use xlstm::model::{Backbone, BlockKind, LanguageModel, Logits, ModelConfig, Objective, Runner, Stack};
use xlstm::nn::mlstm_layer::MlstmLayer;
use xlstm::nn::slstm_layer::SlstmLayer;
use xlstm::nn::{Block, Builder, Context, Parameters, Weights};

use crate::golden::{Golden, assert_close};
use crate::pass::{Held, Pass, device, on_gpu};

/// The configuration of a golden model, in our keys.
pub fn config(args: &Value) -> ModelConfig {
    let mut config = json!({ "slstm": {}, "mlstm": {}, "feedforward": {} });
    let heads = &args["heads"];
    let keys: [(&str, &str, &str); 12] = [
        ("dim", "", "embedding_dim"),
        ("blocks", "", "num_blocks"),
        ("slstm_at", "", "slstm_at"),
        ("vocab", "", "vocab_size"),
        ("bias", "", "bias"),
        ("tie", "", "tie_weights"),
        ("conv", "mlstm", "conv1d_kernel_size"),
        ("conv", "slstm", "conv1d_kernel_size"),
        ("blk", "mlstm", "qkv_proj_blocksize"),
        ("proj", "mlstm", "proj_factor"),
        ("ffn", "feedforward", "proj_factor"),
        ("act", "feedforward", "act_fn"),
    ];
    for (theirs, section, ours) in keys {
        if args[theirs].is_null() || (section == "mlstm" && args[theirs] == json!(0)) {
            continue;
        }
        let place = if section.is_empty() { &mut config } else { &mut config[section] };
        place[ours] = args[theirs].clone();
    }
    config["mlstm"]["num_heads"] = heads.clone();
    config["slstm"]["num_heads"] = heads.clone();
    serde_json::from_value(config).expect("a model configuration")
}

pub fn load<T: Element>(golden: &Golden, parameters: &mut Parameters<T>, prefix: &str) {
    let specs = parameters.specs().clone();
    for spec in specs.iter() {
        let (shape, values) = golden.tensor(&format!("{prefix}{}", spec.name));
        parameters
            .set(&spec.name, &shape, values.into_iter().map(T::from_f64))
            .expect("a parameter of this model");
    }
}

pub fn wide<T: Element>(x: &[T]) -> Vec<f64> {
    x.iter().map(|x| x.to_f64()).collect()
}

/// f64 is good to what storing in f32 loses; f32 to four times what PyTorch loses.
pub fn tolerance<T: Element>(golden: &Golden) -> f64 {
    if size_of::<T>() == 8 { 1e-6 } else { (4.0 * golden.f32_error()).max(4e-6) }
}

fn check_gradients<T: Element>(golden: &Golden, parameters: &Parameters<T>, gradients: &[Vec<f64>]) {
    // From a zero state the gradient of an sLSTM's input-gate bias is exactly 0: noise in
    // f32, so that it is held to the scale of the whole bias, which assert_close does.
    for (spec, gradient) in parameters.specs().iter().zip(gradients) {
        let what = format!("{} gradp.{} {}", golden.name, spec.name, std::any::type_name::<T>());
        assert_close(
            &what,
            gradient,
            &golden.values(&format!("gradp.{}", spec.name)),
            tolerance::<T>(golden),
        );
    }
}

/// Something with parameters that maps features to features.
trait Part {
    fn layout(&self, batch: usize) -> Vec<(String, Shape)>;
    fn forward(&self, tape: &mut Tape, x: Var, state: Option<&[Var]>) -> (Var, Vec<Var>);
}

macro_rules! part {
    ($type:ty) => {
        impl Part for $type {
            fn layout(&self, batch: usize) -> Vec<(String, Shape)> {
                self.state_layout(batch).into_iter().map(|(name, shape)| (name.to_string(), shape)).collect()
            }
            fn forward(&self, tape: &mut Tape, x: Var, state: Option<&[Var]>) -> (Var, Vec<Var>) {
                self.forward(tape, x, state, &mut Context::default()).expect("shapes fit")
            }
        }
    };
}
part!(MlstmLayer);
part!(SlstmLayer);

impl Part for Block {
    fn layout(&self, batch: usize) -> Vec<(String, Shape)> {
        self.state_layout(batch).into_iter().map(|(name, shape)| (name.to_string(), shape)).collect()
    }
    fn forward(&self, tape: &mut Tape, x: Var, state: Option<&[Var]>) -> (Var, Vec<Var>) {
        let (y, after) = self.forward(tape, x.into(), state, &mut Context::default()).expect("shapes fit");
        (y.value(tape).expect("shapes fit"), after)
    }
}

impl Part for Stack {
    fn layout(&self, batch: usize) -> Vec<(String, Shape)> {
        self.state_layout(batch)
    }
    fn forward(&self, tape: &mut Tape, x: Var, state: Option<&[Var]>) -> (Var, Vec<Var>) {
        Backbone::forward(self, tape, x, state, &mut Context::default()).expect("shapes fit")
    }
}

fn check_part<T: Element>(golden: &Golden, part: &dyn Part, builder: Builder) {
    let mut parameters = Parameters::<T>::initialize(&builder.finish(), 1);
    load(golden, &mut parameters, "param.");
    let (shape, x) = golden.tensor("in.x");

    let mut tape = Tape::new(Mode::Train);
    let input = tape.input_with_gradient(Shape::from(&shape[..]));
    let (y, _) = part.forward(&mut tape, input, None);
    tape.keep(y);
    tape.seed_gradient(y);
    let mut pass = Pass::<T>::new(tape, &parameters);
    pass.set(input, &x);
    pass.forward();
    pass.seed(y, &golden.values("gw.y"));
    pass.backward();
    let name = |tensor: &str| format!("{} {tensor} {}", golden.name, std::any::type_name::<T>());
    assert_close(&name("out.y"), &pass.value(y), &golden.values("out.y"), tolerance::<T>(golden));
    assert_close(&name("grad.x"), &pass.gradient(input), &golden.values("grad.x"), tolerance::<T>(golden));
    check_gradients::<T>(golden, &parameters, &pass.gradients());
    if golden.has("x.step.y") {
        check_steps::<T>(golden, part, &parameters, (&shape, &x));
    }
}

/// Token by token, the state carried.
fn check_steps<T: Element>(
    golden: &Golden,
    part: &dyn Part,
    parameters: &Parameters<T>,
    (shape, x): (&[usize], &[f64]),
) {
    let (batch, length, dim) = (shape[0], shape[1], shape[2]);
    let mut tape = Tape::new(Mode::Evaluate);
    let input = tape.input([batch, 1, dim]);
    let before: Vec<Var> = part.layout(batch).iter().map(|(_, shape)| tape.input(shape.dims())).collect();
    let (y, after) = part.forward(&mut tape, input, Some(&before));
    after.iter().chain([&y]).for_each(|&var| tape.keep(var));
    let mut pass = Pass::<T>::new(tape, parameters);
    // A state of zeros is where a sequence starts.
    for (&var, (_, shape)) in before.iter().zip(part.layout(batch)) {
        pass.set(var, &vec![0.0; shape.len()]);
    }
    let mut got = vec![0.0; x.len()];
    for t in 0..length {
        let row = |b: usize| (b * length + t) * dim..(b * length + t + 1) * dim;
        let rows: Vec<f64> = (0..batch).flat_map(|b| x[row(b)].to_vec()).collect();
        pass.set(input, &rows);
        pass.forward();
        let y = pass.value(y);
        for b in 0..batch {
            got[row(b)].copy_from_slice(&y[b * dim..(b + 1) * dim]);
        }
        for (&value, &input) in after.iter().zip(&before) {
            pass.program.feed_back(value, input).expect("a state");
        }
    }
    assert_close(
        &format!("{} x.step.y", golden.name),
        &got,
        &golden.values("x.step.y"),
        tolerance::<T>(golden),
    );
    for ((name, _), &var) in part.layout(batch).iter().zip(&before) {
        check_state_part::<T>(golden, name, &pass.value(var), batch);
    }
}

/// One part of our state against the official step's, which stores k scaled and one row
/// too many in the convolution's window.
fn check_state_part<T: Element>(golden: &Golden, name: &str, got: &[f64], batch: usize) {
    let (block, part) = match name.strip_prefix("blocks.") {
        Some(rest) => {
            let (index, part) = rest.split_once('.').expect("blocks.i.part");
            (format!("block_{index}."), part)
        }
        None => (String::new(), name),
    };
    let key = |key: &str| format!("x.step.state.{block}{key}");
    let tolerance = tolerance::<T>(golden);
    match part {
        "mlstm.c" | "mlstm.n" | "mlstm.m" => {
            let index = ["mlstm.c", "mlstm.n", "mlstm.m"].iter().position(|p| *p == part).expect("a part");
            let (shape, want) = golden.tensor(&key(&format!("mlstm_state.{index}")));
            let scale = if part == "mlstm.m" { 1.0 } else { (shape[2] as f64).sqrt() };
            let want: Vec<f64> = want.iter().map(|x| x * scale).collect();
            assert_close(&format!("{} {name}", golden.name), got, &want, tolerance);
        }
        "conv.window" => {
            let (shape, want) = golden.tensor(&key("conv_state.0"));
            let row = shape[2];
            let want: Vec<f64> = want.chunks(shape[1] * row).flat_map(|rows| rows[row..].to_vec()).collect();
            assert_close(&format!("{} {name}", golden.name), got, &want, tolerance);
        }
        _ => {
            let index =
                ["slstm.h", "slstm.c", "slstm.n", "slstm.m"].iter().position(|p| *p == part).expect("a part");
            let (shape, want) = golden.tensor(&key("slstm_state"));
            let size = batch * shape[2];
            assert_close(
                &format!("{} {name}", golden.name),
                got,
                &want[index * size..(index + 1) * size],
                tolerance,
            );
        }
    }
}

#[test]
fn layers_blocks_and_stack() {
    for name in [
        "mlstm_layer",
        "mlstm_layer_bias",
        "slstm_layer",
        "slstm_layer_noconv",
        "mlstm_block",
        "slstm_block",
        "stack",
    ] {
        let golden = Golden::load(name);
        let config = config(&golden.json["config"]["args"]);
        let make = || -> (Box<dyn Part>, Builder) {
            let mut builder = Builder::new();
            let part: Box<dyn Part> = match golden.json["config"]["build"].as_str().expect("build") {
                "mlstm_layer" => Box::new(MlstmLayer::new(&config, &mut builder)),
                "slstm_layer" => Box::new(SlstmLayer::new(&config, 0, &mut builder)),
                "mlstm_block" => Box::new(Block::new(&config, BlockKind::Mlstm, 0, &mut builder)),
                "slstm_block" => Box::new(Block::new(&config, BlockKind::Slstm, 0, &mut builder)),
                _ => Box::new(Stack::new(&config, &mut builder)),
            };
            (part, builder)
        };
        if !on_gpu() {
            let (part, builder) = make();
            check_part::<f64>(&golden, &*part, builder);
        }
        let (part, builder) = make();
        check_part::<f32>(&golden, &*part, builder);
    }
}

#[test]
fn language_models() {
    for name in ["lm", "lm_slstm_only", "lm_tied_mlstm_only"] {
        let golden = Golden::load(name);
        let config = config(&golden.json["config"]["args"]);
        if !on_gpu() {
            check_language_model::<f64>(&golden, &config);
        }
        check_language_model::<f32>(&golden, &config);
    }
}

/// Loss, all gradients, logits, and the same in pieces; returns a runner of the model.
pub fn check_language_model<T: Element>(golden: &Golden, config: &ModelConfig) -> Runner<T> {
    let model = Arc::new(LanguageModel::new(config).expect("a model"));
    let mut parameters = Parameters::<T>::initialize(model.specs(), 1);
    load(golden, &mut parameters, "param.");
    let (shape, inputs) = golden.tensor("in.idx");
    let ids =
        |x: Vec<f64>| x.into_iter().map(|x| if x < 0.0 { u32::MAX } else { x as u32 }).collect::<Vec<u32>>();
    let inputs = ids(inputs);
    let batch = Batch {
        batch_size: shape[0],
        length: shape[1],
        target_count: inputs.len(),
        marks: vec![0; inputs.len()],
        targets: ids(golden.values("in.targets")),
        inputs: inputs.clone(),
    };
    let (shape, device) = ([shape[0], shape[1]], device());
    let mut objective =
        Objective::<T>::new(&*model, Mode::Train, shape, Carry::Fresh, &device).expect("a pass");
    let mut held = Held::new(&parameters);
    let loss = objective.forward(held.values(), &batch, 1.0 / inputs.len() as f64).expect("a loss");
    assert_close(
        &format!("{} loss", golden.name),
        &[loss],
        &golden.values("out.loss"),
        tolerance::<T>(golden),
    );
    held.add(|values, gradients| objective.backward(values, gradients));
    check_gradients::<T>(golden, &parameters, &held.gradients());

    let layout = model.state_layout(shape[0]);
    let weights = Weights::new(Arc::new(parameters), &device).expect("weights");
    let mut runner = Runner::new(model, weights, device);
    runner.reset(shape[0]);
    let logits = runner.read(&inputs, Logits::All).expect("logits");
    let whole = runner.state().expect("a state");
    assert_close(
        &format!("{} logits", golden.name),
        &wide(&logits),
        &golden.values("out.logits"),
        tolerance::<T>(golden),
    );

    // The same in three pieces, the last token by token.
    runner.reset(shape[0]);
    let mut last = Vec::new();
    let cuts = [0, 11, 27];
    for (i, &start) in cuts.iter().enumerate() {
        let end = cuts.get(i + 1).copied().unwrap_or(shape[1]);
        let step = if i == 2 { 1 } else { end - start };
        for start in (start..end).step_by(step) {
            let piece: Vec<u32> =
                inputs.chunks(shape[1]).flat_map(|row| row[start..start + step].to_vec()).collect();
            last = runner.read(&piece, Logits::Last).expect("logits");
        }
    }
    let state = runner.state().expect("a state");
    let vocabulary = last.len() / shape[0];
    let want: Vec<f64> = golden
        .values("out.logits")
        .chunks(shape[1] * vocabulary)
        .flat_map(|l| l[l.len() - vocabulary..].to_vec())
        .collect();
    assert_close(&format!("{} pieces", golden.name), &wide(&last), &want, tolerance::<T>(golden));
    for (((name, _), got), whole) in layout.iter().zip(state.parts()).zip(whole.parts()) {
        assert_close(
            &format!("{} {name} in pieces", golden.name),
            &wide(got),
            &wide(whole),
            tolerance::<T>(golden),
        );
        if golden.has("x.step.y") {
            check_state_part::<T>(golden, name, &wide(got), shape[0]);
        }
    }
    runner
}
