//! Language models of the 7B's family against the official ones: loss, all gradients, logits,
//! states after a prefill of odd length, single steps, and greedy generation token for token.

use serde_json::{Value, json};
use xlstm::engine::operation::Element;
use xlstm::generate::{Sampler, Sampling};
use xlstm::model::{Logits, ModelConfig, Runner};

use crate::golden::{Golden, assert_close};
use crate::golden_models::{check_language_model, tolerance, wide};
use crate::pass::on_gpu;

/// The configuration of a golden model, in our keys.
fn config(args: &Value) -> ModelConfig {
    let mut large = args.as_object().expect("arguments").clone();
    // How the reference computes, not what.
    large.remove("mode");
    let mut config = json!({ "family": "large" });
    for key in ["embedding_dim", "num_blocks", "vocab_size"] {
        config[key] = large.remove(key).expect("a size");
    }
    config["large"] = large.into();
    serde_json::from_value(config).expect("a model configuration")
}

#[test]
fn large_models() {
    for name in ["large_single", "large_fused", "large_bias_noout"] {
        let golden = Golden::load(name);
        let config = config(&golden.json["config"]["args"]);
        if !on_gpu() {
            let runner = check_language_model::<f64>(&golden, &config);
            check_inference(&golden, runner);
        }
        let runner = check_language_model::<f32>(&golden, &config);
        check_inference(&golden, runner);
    }
}

/// A prefill, steps, and greedy generation.
fn check_inference<T: Element>(golden: &Golden, mut runner: Runner<T>) {
    let (shape, inputs) = golden.tensor("in.idx");
    let prefill = golden.tensor("x.infer.prefill_logits").0[1];
    let rows: Vec<Vec<u32>> =
        inputs.chunks(shape[1]).map(|row| row.iter().map(|id| *id as u32).collect()).collect();
    let columns = |first: usize, end: usize| -> Vec<u32> {
        rows.iter().flat_map(|row| row[first..end].to_vec()).collect()
    };
    let close = |what: &str, got: &[f64], want: &[f64]| {
        assert_close(&format!("{} {what}", golden.name), got, want, tolerance::<T>(golden));
    };
    runner.reset(shape[0]);
    let logits = runner.read(&columns(0, prefill), Logits::All).expect("logits");
    close("prefill logits", &wide(&logits), &golden.values("x.infer.prefill_logits"));
    let after_prefill = runner.state().expect("a state");
    let layout = runner.model().state_layout(shape[0]);
    for ((name, _), part) in layout.iter().zip(after_prefill.parts()) {
        let (block, part_name) =
            name.strip_prefix("blocks.").and_then(|rest| rest.split_once(".mlstm.")).expect("a part");
        let key = format!("x.infer.prefill_state.{block}.{}", part_name.replace('c', "C"));
        close(&key, &wide(part), &golden.values(&key));
    }
    let (steps, want) = golden.tensor("x.infer.step_logits");
    for t in 0..steps[1] {
        let logits = runner.read(&columns(prefill + t, prefill + t + 1), Logits::Last).expect("logits");
        let want: Vec<f64> = want
            .chunks(steps[1] * steps[2])
            .flat_map(|row| row[t * steps[2]..][..steps[2]].to_vec())
            .collect();
        close(&format!("step {t}"), &wide(&logits), &want);
    }
    check_greedy(golden, runner, prefill, &columns(0, prefill));
}

/// The likeliest token again and again, from an empty state, through the prompt.
fn check_greedy<T: Element>(golden: &Golden, mut runner: Runner<T>, prefill: usize, prompt: &[u32]) {
    let (shape, want) = golden.tensor("x.infer.generated");
    let batch = shape[0];
    assert_eq!(prompt.len(), batch * prefill);
    runner.reset(batch);
    let mut logits = runner.read(prompt, Logits::Last).expect("logits");
    let greedy = Sampling { temperature: 0.0, ..Sampling::default() };
    let vocabulary = logits.len() / batch;
    let mut sampler = Sampler::new(greedy, vocabulary, 0);
    for t in 0..shape[1] {
        let narrow: Vec<f32> = logits.iter().map(|x| x.to_f64() as f32).collect();
        let tokens: Vec<u32> =
            narrow.chunks(vocabulary).map(|row| sampler.draw(row).expect("a token")).collect();
        let expected: Vec<u32> = want.chunks(shape[1]).map(|row| row[t] as u32).collect();
        assert_eq!(tokens, expected, "{} token {t}", golden.name);
        logits = runner.read(&tokens, Logits::Last).expect("logits");
    }
}
