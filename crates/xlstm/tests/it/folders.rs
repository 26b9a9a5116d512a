//! Folders of other programs: read as those programs read them, written so that nothing is lost,
//! and refused with an error that says what was expected where.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use serde_json::{Value, json};
use xlstm::engine::{Device, Format};
use xlstm::folder::convert::{Conversion, Target, convert};
use xlstm::folder::tensors::TensorFiles;
use xlstm::folder::writer::{Entry, Part, write_tensors};
use xlstm::folder::{Kind, ModelFolder, OpenOptions, write};
use xlstm::generate::{Sampler, Sampling};
use xlstm::model::{LanguageModel, Logits, ModelConfig, Runner};
use xlstm::nn::Parameters;
use xlstm::nn::large::WeightMode;

use crate::golden::{Golden, assert_close, folder as golden_folder};

/// A folder of a test's own, removed with it.
pub struct Scratch(pub PathBuf);

impl Scratch {
    pub fn new() -> Scratch {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("xlstm-folders-{}-{count}", std::process::id()));
        std::fs::create_dir_all(&path).expect("a temporary folder");
        Scratch(path)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Logits, states after a prefill of odd length, and 32 greedy tokens of `transformers`. Both
/// sides compute in f32, so each is off by what f32 loses; 3e-5 of the maximum is some times that.
#[test]
fn a_hugging_face_folder_computes_what_transformers_does() {
    const TOLERANCE: f64 = 3e-5;
    let folder = ModelFolder::load(&golden_folder().join("hf_tiny")).expect("a model");
    assert_eq!((folder.kind, folder.warnings.len()), (Kind::HuggingFace, 0), "{:?}", folder.warnings);
    assert!(folder.end_tokens().is_empty() && folder.tokenizer.is_none());
    let golden = Golden::load("hf_tiny_io");
    let device = Device::cpu(2).expect("threads");
    let weights = folder.weights(&device).expect("weights");
    let mut runner = Runner::new(folder.model.clone(), weights, device);
    let (shape, prompt) = golden.tensor("in.prompt");
    let prompt: Vec<u32> = prompt.iter().map(|id| *id as u32).collect();
    runner.reset(shape[0]);
    let wide = |values: &[f32]| -> Vec<f64> { values.iter().map(|x| f64::from(*x)).collect() };
    let logits = runner.read(&prompt, Logits::All).expect("logits");
    assert_close("logits", &wide(&logits), &golden.values("out.logits"), TOLERANCE);
    let state = runner.state().expect("a state");
    for ((name, _), part) in folder.model.state_layout(shape[0]).iter().zip(state.parts()) {
        let (block, part_name) =
            name.strip_prefix("blocks.").and_then(|rest| rest.split_once(".mlstm.")).expect("a part");
        let key = format!("out.cache.{block}.{}", part_name.replace('c', "C"));
        assert_close(&key, &wide(part), &golden.values(&key), TOLERANCE);
    }
    let vocabulary = folder.model.config().vocab_size;
    let mut logits: Vec<f32> = logits
        .chunks(shape[1] * vocabulary)
        .flat_map(|row| row[(shape[1] - 1) * vocabulary..].to_vec())
        .collect();
    let mut sampler = Sampler::new(Sampling { temperature: 0.0, ..Sampling::default() }, vocabulary, 0);
    let (shape, want) = golden.tensor("out.generate32");
    for t in 0..shape[1] {
        let tokens: Vec<u32> =
            logits.chunks(vocabulary).map(|row| sampler.draw(row).expect("a token")).collect();
        let expected: Vec<u32> = want.chunks(shape[1]).map(|row| row[t] as u32).collect();
        assert_eq!(tokens, expected, "token {t}");
        logits = runner.read(&tokens, Logits::Last).expect("logits");
    }
}

/// A model of twelve blocks, so that block 1 is the beginning of the names of 10 and 11.
fn large(change: impl Fn(&mut Value)) -> ModelConfig {
    let mut config = json!({
        "family": "large", "vocab_size": 5, "embedding_dim": 8, "num_blocks": 12,
        "large": {"num_heads": 2, "ffn_proj_factor": 1.5, "ffn_round_up_to_multiple_of": 4}
    });
    change(&mut config);
    serde_json::from_value(config).expect("a configuration")
}

/// Parameters of which no two are alike.
fn numbered(model: &LanguageModel) -> Parameters<f32> {
    let mut parameters = Parameters::zeros(model.specs());
    parameters.values.iter_mut().flatten().enumerate().for_each(|(i, x)| *x = (i as f32 + 1.0) * 0.37);
    parameters
}

fn save(config: &ModelConfig, path: &Path) -> Parameters<f32> {
    let model = LanguageModel::new(config).expect("a model");
    let parameters = numbered(&model);
    std::fs::create_dir_all(path).expect("a folder");
    write(path, &model, &parameters, None).expect("written");
    parameters
}

fn to(from: &Path, options: &OpenOptions, conversion: &Conversion, out: &Path) -> Vec<String> {
    let source = ModelFolder::open(from, options).expect("a model");
    convert(&source, conversion, out, &mut |_| {}).expect("converted")
}

fn same(folder: &Path, want: &Parameters<f32>) {
    let got = ModelFolder::load(folder).expect("a model").parameters();
    assert_eq!(got.specs(), want.specs());
    assert_eq!(got.values, want.values, "{}", folder.display());
}

#[test]
fn nothing_is_lost_between_kinds_and_modes() {
    let scratch = Scratch::new();
    let parameters = save(&large(|_| ()), &scratch.path("ours"));
    let several = |target: Target| Conversion { file_bytes: 4000, ..Conversion::to(target) };
    let plain = OpenOptions::default();
    let mode = |mode: WeightMode| OpenOptions { weight_mode: Some(mode), ..OpenOptions::default() };
    let steps = [
        ("hf", "ours", &plain, Conversion::to(Target::HuggingFace), Kind::HuggingFace, 1),
        ("hf_fused", "hf", &mode(WeightMode::Fused), several(Target::HuggingFace), Kind::HuggingFace, 9),
        ("fused", "hf_fused", &plain, several(Target::Ours), Kind::Ours, 9),
        ("nx", "fused", &mode(WeightMode::Single), several(Target::NxAi), Kind::NxAi, 9),
        ("back", "nx", &plain, Conversion::to(Target::Ours), Kind::Ours, 1),
    ];
    for (out, from, options, conversion, kind, files) in steps {
        let warnings = to(&scratch.path(from), options, &conversion, &scratch.path(out));
        let folder = ModelFolder::load(&scratch.path(out)).expect("a model");
        assert_eq!(folder.kind, kind);
        let found = TensorFiles::open(&scratch.path(out)).expect("weights").files().len();
        assert_eq!(found > 1, files > 1, "{out}: {found} files");
        // Queries and values are no multiples of 64 wide, which Hugging Face's cache needs, and its
        // program opens no fused weights.
        let expected = match out {
            "hf" => 2,
            "hf_fused" => 3,
            _ => 0,
        };
        assert_eq!(warnings.len(), expected, "{warnings:?}");
    }
    same(&scratch.path("back"), &parameters);
    same(&scratch.path("hf"), &parameters);
    let fused = ModelFolder::load(&scratch.path("fused")).expect("a model");
    assert_eq!(fused.model.config().large.weight_mode, WeightMode::Fused);
    let name = |name: &str| fused.model.specs().iter().position(|s| s.name == name).expect("a parameter");
    let single = |name: &str| {
        let index = parameters.specs().iter().position(|s| s.name == name).expect("a parameter");
        parameters.values[index].clone()
    };
    for block in [1, 10, 11] {
        let layer = format!("backbone.blocks.{block}.mlstm_layer");
        let rows = ["q", "k", "v", "ogate_preact"].map(|part| single(&format!("{layer}.{part}.weight")));
        assert_eq!(fused.files.values(name(&format!("{layer}.qkv_opreact.weight"))), rows.concat());
    }
}

#[test]
fn formats_are_kept_or_rounded_once() {
    let scratch = Scratch::new();
    let parameters = save(&large(|_| ()), &scratch.path("ours"));
    let plain = OpenOptions::default();
    for format in [Format::Bf16, Format::F16] {
        let path = |name: &str| scratch.path(&format!("{name}-{}", format.name()));
        let narrow = Conversion { format: Some(format), ..Conversion::to(Target::HuggingFace) };
        to(&scratch.path("ours"), &plain, &narrow, &path("hf"));
        let config = std::fs::read_to_string(path("hf").join("config.json")).expect("a configuration");
        let dtype = if format == Format::Bf16 { "bfloat16" } else { "float16" };
        assert!(config.contains(&format!("\"dtype\": \"{dtype}\"")), "{config}");
        to(&path("hf"), &plain, &Conversion::to(Target::Ours), &path("ours"));
        let [first, second] = ["hf", "ours"].map(|name| ModelFolder::load(&path(name)).expect("a model"));
        assert_eq!(second.files.format(), format);
        let (first, second) = (first.parameters(), second.parameters());
        assert_eq!(first.values, second.values);
        for (got, want) in first.values.iter().flatten().zip(parameters.values.iter().flatten()) {
            assert!((got - want).abs() <= want.abs() / 256.0, "{got} and {want}");
        }
    }
}

#[test]
fn a_shared_head_is_written_out() {
    let scratch = Scratch::new();
    let parameters = save(&large(|c| c["tie_weights"] = json!(true)), &scratch.path("ours"));
    for (target, name) in [(Target::HuggingFace, "hf"), (Target::NxAi, "nx")] {
        to(&scratch.path("ours"), &OpenOptions::default(), &Conversion::to(target), &scratch.path(name));
        let folder = ModelFolder::load(&scratch.path(name)).expect("a model");
        assert!(!folder.model.config().tie_weights);
        let values = folder.parameters();
        let of = |name: &str| values.specs().iter().position(|s| s.name == name).expect("a parameter");
        assert_eq!(values.values[of("lm_head.weight")], parameters.values[0]);
        assert_eq!(values.values[of("embedding.weight")], parameters.values[0]);
    }
}

#[test]
fn tokens_that_end_a_text() {
    let scratch = Scratch::new();
    save(&large(|_| ()), &scratch.path("ours"));
    to(
        &scratch.path("ours"),
        &OpenOptions::default(),
        &Conversion::to(Target::HuggingFace),
        &scratch.path("hf"),
    );
    let hf = scratch.path("hf");
    let ends = || ModelFolder::load(&hf).expect("a model").end_tokens();
    let change = |file: &str, eos: Option<Value>| {
        let path = hf.join(file);
        let text = std::fs::read_to_string(&path).unwrap_or_else(|_| "{}".into());
        let mut config: Value = serde_json::from_str(&text).expect("JSON");
        match eos {
            Some(eos) => config["eos_token_id"] = eos,
            None => drop(config.as_object_mut().expect("keys").remove("eos_token_id")),
        }
        std::fs::write(path, config.to_string()).expect("written");
    };
    assert!(ends().is_empty());
    change("config.json", Some(json!(3)));
    assert!(ends().is_empty(), "generation_config.json is heard, config.json is not");
    change("generation_config.json", Some(json!([4, 1])));
    assert_eq!(ends(), [4, 1]);
    to(&hf, &OpenOptions::default(), &Conversion::to(Target::Ours), &scratch.path("again"));
    assert_eq!(ModelFolder::load(&scratch.path("again")).expect("a model").end_tokens(), [4, 1]);
    std::fs::remove_file(hf.join("generation_config.json")).expect("removed");
    assert_eq!(ends(), [3]);
    change("config.json", None);
    assert_eq!(ends(), [2], "the default of that implementation");
    change("config.json", Some(json!("end")));
    let error = ModelFolder::load(&hf).expect_err("no token").to_string();
    assert!(error.contains("eos_token_id: expected a token id"), "{error}");
}

/// The official configuration of a small model with both kinds of blocks.
const SMALL: &str = "
vocab_size: 7
embedding_dim: 16
num_blocks: 3
context_length: 64
slstm_at: [1]
bias: true
mlstm_block: {mlstm: {num_heads: 2, conv1d_kernel_size: 3, qkv_proj_blocksize: 4, proj_factor: 2.0}}
slstm_block:
  slstm: {num_heads: 4, backend: vanilla, bias_init: powerlaw_blockdependent, conv1d_kernel_size: 4}
  feedforward: {proj_factor: 1.3, act_fn: gelu}
";

/// Writes the tensors that `theirs` makes of our small model's, and the official configuration.
fn write_small(
    path: &Path,
    yaml: &str,
    theirs: impl Fn(&str, &[usize], Vec<f32>) -> (Vec<usize>, Vec<f32>),
) -> Parameters<f32> {
    let config: ModelConfig = serde_json::from_value(json!({
        "vocab_size": 7, "embedding_dim": 16, "num_blocks": 3, "slstm_at": [1], "bias": true,
        "mlstm": {"num_heads": 2, "conv1d_kernel_size": 3}, "slstm": {"num_heads": 4}
    }))
    .expect("a configuration");
    let model = LanguageModel::new(&config).expect("a model");
    let parameters = numbered(&model);
    let (mut entries, mut all) = (Vec::new(), Vec::new());
    for (spec, values) in model.specs().iter().zip(&parameters.values) {
        let (shape, values) = theirs(&spec.name, &spec.shape, values.clone());
        entries.push(Entry { name: spec.name.clone(), shape, part: Part::Dense(Format::F32) });
        all.push(values);
    }
    std::fs::create_dir_all(path).expect("a folder");
    write_tensors(&path.join("model.safetensors"), &entries, &[], |i| Ok(all[i].as_slice().into()))
        .expect("written");
    std::fs::write(path.join("config.yaml"), yaml).expect("written");
    parameters
}

#[test]
fn the_small_familys_state_dict_in_both_layouts() {
    let scratch = Scratch::new();
    let vanilla = write_small(&scratch.path("vanilla"), SMALL, |_, shape, values| (shape.to_vec(), values));
    let folder = ModelFolder::load(&scratch.path("vanilla")).expect("a model");
    assert_eq!((folder.kind, folder.warnings.len()), (Kind::Small, 0), "{:?}", folder.warnings);
    same(&scratch.path("vanilla"), &vanilla);
    // (head, gate, out, in) -> (head, in, gate, out), and (gate, head, unit) -> (head, gate, unit).
    let (heads, size) = (4, 4);
    let cuda = write_small(&scratch.path("cuda"), SMALL, |name, shape, values| {
        if name.ends_with("_recurrent_kernel_") {
            let mut theirs = vec![0.0; values.len()];
            for head in 0..heads {
                for row in 0..4 * size {
                    for column in 0..size {
                        theirs[(head * size + column) * 4 * size + row] =
                            values[(head * 4 * size + row) * size + column];
                    }
                }
            }
            return (vec![heads, size, 4 * size], theirs);
        }
        if name.ends_with("_bias_") {
            let mut theirs = vec![0.0; values.len()];
            for gate in 0..4 {
                for head in 0..heads {
                    for unit in 0..size {
                        theirs[(head * 4 + gate) * size + unit] = values[(gate * heads + head) * size + unit];
                    }
                }
            }
            return (shape.to_vec(), theirs);
        }
        (shape.to_vec(), values)
    });
    same(&scratch.path("cuda"), &cuda);
    // The same from a configuration that lies elsewhere and is wrong in one key, and under `model`.
    let indented = SMALL.replace("slstm: {num_heads: 4", "slstm: {num_heads: 2").replace('\n', "\n  ");
    let elsewhere = scratch.path("official.yaml");
    std::fs::write(&elsewhere, format!("training: {{lr: 1}}\nmodel:{indented}\n")).expect("written");
    std::fs::remove_file(scratch.path("cuda").join("config.yaml")).expect("removed");
    let options = OpenOptions {
        config: Some(elsewhere),
        sets: vec![("model.slstm_block.slstm.num_heads".into(), "4".into())],
        weight_mode: None,
    };
    to(&scratch.path("cuda"), &options, &Conversion::to(Target::Ours), &scratch.path("ours"));
    same(&scratch.path("ours"), &cuda);
}

/// Folders that are wrong in one place each: an error that says where, what and what instead.
#[test]
fn foreign_folders_that_do_not_fit() {
    let scratch = Scratch::new();
    let tiny = golden_folder().join("hf_tiny");
    let text = std::fs::read_to_string(tiny.join("config.json")).expect("a configuration");
    let config: Value = serde_json::from_str(&text).expect("JSON");
    let size = |key: &str| config[key].as_u64().expect("a size");
    let (dim, blocks, heads) = (size("hidden_size"), size("num_hidden_layers"), size("num_heads"));
    let odd = (heads + 1..).find(|n| dim / 2 % n != 0).expect("a number of heads");
    let path = scratch.path("attack");
    std::fs::create_dir_all(&path).expect("a folder");
    std::fs::copy(tiny.join("model.safetensors"), path.join("model.safetensors")).expect("copied");
    let fails = |content: &str, wanted: &[&str]| {
        std::fs::write(path.join("config.json"), content).expect("written");
        let error = ModelFolder::load(&path).expect_err(content);
        for part in wanted.iter().chain(&[&*path.display().to_string()]) {
            assert!(error.to_string().contains(part), "{error} does not say {part:?}");
        }
        assert!(error.hint_text().is_some(), "{error}");
    };
    let with = |changes: Value, wanted: &[&str]| {
        let mut config = config.clone();
        for (key, value) in changes.as_object().expect("changes") {
            config[key] = value.clone();
        }
        fails(&config.to_string(), wanted);
    };
    let both = |first: &str, second: &str, value: u64| json!({first: value, second: value});
    with(json!({"num_heads": 0}), &["config.json", "num_heads is 0"]);
    with(json!({"num_heads": odd}), &["config.json", &format!("num_heads is {odd}")]);
    with(
        json!({"num_heads": "four"}),
        &["config.json: num_heads: expected a whole number", "found \"four\""],
    );
    with(json!({"num_heads": -1}), &["num_heads: expected a whole number", "found -1"]);
    with(json!({"ffn_round_up_to_multiple_of": 0}), &["ffn_round_up_to_multiple_of is 0"]);
    with(json!({"qk_dim_factor": 0.0}), &["qk_dim_factor is 0"]);
    with(json!({"norm_eps": "small"}), &["norm_eps: expected a number, found \"small\""]);
    with(json!({"weight_mode": "molten"}), &["weight_mode: expected single or fused, found \"molten\""]);
    with(json!({"model_type": "llama"}), &["model_type: expected \"xlstm\", found \"llama\""]);
    with(
        json!({"num_blocks": blocks + 1}),
        &[&format!("num_blocks: expected {blocks}, as num_hidden_layers")],
    );
    with(both("num_hidden_layers", "num_blocks", 0), &["num_blocks is 0"]);
    let beyond = format!("backbone.blocks.{blocks}.");
    with(
        both("num_hidden_layers", "num_blocks", blocks + 1),
        &["model.safetensors lacks the tensor", &beyond],
    );
    let last = format!("holds the tensor backbone.blocks.{}.", blocks - 1);
    with(both("num_hidden_layers", "num_blocks", blocks - 1), &[&last]);
    with(
        both("hidden_size", "embedding_dim", 2 * dim),
        &["model.safetensors: expected [", "found backbone."],
    );
    with(json!({"vocab_size": 1_u64 << 60}), &["vocab_size is 1152921504606846976"]);
    with(both("hidden_size", "embedding_dim", 1 << 50), &["hidden_size is"]);
    with(json!({"ffn_proj_factor": 1e300}), &["a factor of hidden_size is"]);
    fails("{\"vocab_size\": 3", &["config.json: expected a configuration"]);
    fails("[]", &["config.json: expected a configuration, found []"]);
    fails("{}", &["config.json does not describe a model that we know", "model_type", "slstm_at"]);

    std::fs::write(path.join("config.json"), config.to_string()).expect("written");
    std::fs::remove_file(path.join("model.safetensors")).expect("removed");
    fails(&config.to_string(), &["holds no weights", "model.safetensors.index.json"]);
    let index = json!({"weight_map": {"lm_head.weight": "../model.safetensors"}});
    std::fs::copy(tiny.join("model.safetensors"), scratch.path("model.safetensors")).expect("copied");
    std::fs::write(path.join("model.safetensors.index.json"), index.to_string()).expect("written");
    fails(&config.to_string(), &["\"../model.safetensors\""]);
    std::fs::remove_file(path.join("config.json")).expect("removed");
    let error = ModelFolder::load(&path).expect_err("no configuration").to_string();
    assert!(error.contains("no model folder") && error.contains("config.yaml"), "{error}");

    let small = |from: &str, with: &str, wanted: &str| {
        assert!(SMALL.contains(from));
        write_small(&path.join("small"), &SMALL.replace(from, with), |_, shape, values| {
            (shape.to_vec(), values)
        });
        let error = ModelFolder::load(&path.join("small")).expect_err(with);
        assert!(error.to_string().contains(wanted) && error.hint_text().is_some(), "{error}");
    };
    small("slstm: {num_heads: 4", "slstm: {num_heads: 3", "config.yaml: slstm_block.slstm.num_heads is 3");
    small("{num_heads: 2", "{num_heads: 0", "mlstm_block.mlstm.num_heads is 0");
    small("act_fn: gelu", "act_fn: tanh", "feedforward.act_fn: expected gelu, relu");
    small(
        "proj_factor: 1.3",
        "ff_type: moe",
        "feedforward.ff_type: expected \"ffn_gated\", all that is supported",
    );
    small("slstm_at: [1]", "slstm_at: [9]", "slstm_at holds 9");
    small("slstm_at: [1]", "slstm_at: [0]", "tensor");
    small("num_blocks: 3", "num_blocks: 2", "holds the tensor xlstm_block_stack.blocks.2.");
}

#[test]
fn unknown_keys_warn_and_keys_of_kernels_do_not() {
    let scratch = Scratch::new();
    save(&large(|_| ()), &scratch.path("ours"));
    to(&scratch.path("ours"), &OpenOptions::default(), &Conversion::to(Target::NxAi), &scratch.path("nx"));
    let path = scratch.path("nx").join("config.yaml");
    let text = std::fs::read_to_string(&path).expect("a configuration");
    let more = "chunkwise_kernel: chunkwise--triton_xl_chunk\nstep_kernel: triton\nnum_head: 3\n";
    std::fs::write(&path, text + more).expect("written");
    let folder = ModelFolder::load(&scratch.path("nx")).expect("a model");
    assert_eq!(folder.warnings.len(), 1, "{:?}", folder.warnings);
    assert!(folder.warnings[0].contains("num_head is ignored (did you mean num_heads?)"));
}

#[test]
fn conversions_that_cannot_be() {
    let scratch = Scratch::new();
    save(&large(|c| c["large"]["use_bias"] = json!(true)), &scratch.path("biases"));
    save(&large(|c| c["large"]["weight_mode"] = json!("fused")), &scratch.path("fused"));
    let fails = |from: &str, target: Target, wanted: &str| {
        let source = ModelFolder::load(&scratch.path(from)).expect("a model");
        let out = scratch.path("out");
        let error = convert(&source, &Conversion::to(target), &out, &mut |_| {}).expect_err(wanted);
        assert!(error.to_string().contains(wanted) && error.hint_text().is_some(), "{error}");
        assert!(!out.exists());
    };
    fails("biases", Target::HuggingFace, "use_bias");
    fails("fused", Target::NxAi, "single");
    let source = ModelFolder::load(&scratch.path("fused")).expect("a model");
    let error = convert(&source, &Conversion::to(Target::Ours), &scratch.0, &mut |_| {}).expect_err("there");
    assert!(error.to_string().contains("is there already"));
    // Biases pass through NX-AI's folders.
    to(&scratch.path("biases"), &OpenOptions::default(), &Conversion::to(Target::NxAi), &scratch.path("nx"));
    same(&scratch.path("nx"), &ModelFolder::load(&scratch.path("biases")).expect("a model").parameters());
}
