//! The command line as a user meets it: what works, and bad input, which always ends in an
//! error with a hint and exit code 1 (2 for a command line that makes no sense), never in a
//! panic.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// A folder of this test's own, removed when it passes.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Folder {
        let path = std::env::temp_dir().join(format!("xlstm-cli-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir_all(&path).expect("a temporary folder");
        Folder(path)
    }

    fn write(&self, name: &str, content: impl AsRef<[u8]>) -> String {
        std::fs::write(self.0.join(name), content).expect("written");
        name.to_owned()
    }

    fn xlstm(&self, arguments: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_xlstm"))
            .args(arguments)
            .current_dir(&self.0)
            .output()
            .expect("the program runs")
    }

    /// Runs and expects success; stdout and stderr.
    fn ok(&self, arguments: &[&str]) -> (String, String) {
        let output = self.xlstm(arguments);
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        assert!(output.status.success(), "{arguments:?}: {}", text(&output.stderr));
        (text(&output.stdout), text(&output.stderr))
    }

    /// Runs and expects exit code 1, an error that says all of `wanted`, and a hint.
    fn fails(&self, arguments: &[&str], wanted: &[&str]) {
        let output = self.xlstm(arguments);
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{arguments:?}: {stderr}");
        assert!(!stderr.contains("panicked"), "{arguments:?}: {stderr}");
        for part in wanted.iter().chain(&["error: ", "hint: "]) {
            assert!(stderr.contains(part), "{arguments:?} does not say {part:?}:\n{stderr}");
        }
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }
}

const TINY: &str = "
model: {embedding_dim: 16, num_blocks: 2, slstm_at: [1], mlstm: {num_heads: 2}, slstm: {num_heads: 2}}
data: {train: text.txt, batch_size: 2, length: 16}
schedule: {warmup_steps: 1}
training: {steps: 3, validate_every: 3, log_every: 1}
sample: {tokens: 20}
";

/// A folder with a text, a configuration and a trained model in out/1.
fn trained(name: &str) -> Folder {
    let folder = Folder::new(name);
    folder.write("text.txt", "To be, or not to be, that is the question.\n".repeat(40));
    folder.write("tiny.yaml", TINY);
    folder.ok(&["train", "tiny.yaml"]);
    folder
}

#[test]
fn from_text_to_text() {
    let folder = trained("whole");
    let (_, stderr) = folder.ok(&["train", "tiny.yaml", "--set", "training.steps=4"]);
    for part in ["out/2", "step 4/4", "validation at step 4", "sample:", "generate --model out/2/best"] {
        assert!(stderr.contains(part), "{part:?} in\n{stderr}");
    }
    for file in ["config.yaml", "metrics.jsonl", "loss.svg", "best/model.safetensors", "last/training.json"] {
        assert!(folder.0.join("out/2").join(file).exists(), "{file}");
    }
    let (stdout, stderr) =
        folder.ok(&["generate", "--model", "out/1", "--prompt", "To be", "-n", "12", "--seed", "1"]);
    assert!(stdout.starts_with("To be") && stdout.chars().count() == "To be".len() + 12 + 1, "{stdout:?}");
    assert!(stderr.contains("prefill") && stderr.contains("decode"), "{stderr}");
    let again =
        folder.ok(&["generate", "--model", "out/1", "--prompt", "To be", "-n", "12", "--seed", "1"]).0;
    assert_eq!(stdout, again, "the same seed");

    let (json, _) =
        folder.ok(&["generate", "--model", "out/1/best", "--prompt-ids", "1,2", "-n", "3", "--json"]);
    let json: serde_json::Value = serde_json::from_str(&json).expect("one JSON object");
    assert_eq!(
        (json["ids"].as_array().map(Vec::len), json["finish_reason"].as_str()),
        (Some(3), Some("length"))
    );
    assert_eq!(json["prompt_ids"], serde_json::json!([1, 2]));

    let (stopped, _) = folder
        .ok(&["generate", "--model", "out/1", "--prompt", "To be", "-n", "40", "--seed", "1", "--stop", " "]);
    let (whole, _) =
        folder.ok(&["generate", "--model", "out/1", "--prompt", "To be", "-n", "40", "--seed", "1"]);
    let first = whole["To be".len()..].split(' ').next().expect("text").trim_end_matches('\n');
    assert_eq!(stopped, format!("To be{first}\n"), "{whole}");

    // A state saved and continued is the text in one go, at temperature 0.
    let greedy = |extra: &[&str]| {
        let base = ["generate", "--model", "out/1", "--temperature", "0"];
        folder.ok(&[&base[..], extra].concat()).0
    };
    let whole = greedy(&["--prompt", "To be", "-n", "10"]);
    let first = greedy(&["--prompt", "To be", "-n", "4", "--state-out", "s.safetensors"]);
    let second = greedy(&["-n", "6", "--state-in", "s.safetensors"]);
    assert_eq!(whole, first.trim_end_matches('\n').to_owned() + &second);

    // Three at once, each as it is alone.
    let drawn = |extra: &[&str]| {
        let base = ["generate", "--model", "out/1", "--prompt", "To be", "-n", "12", "--json"];
        folder.ok(&[&base[..], extra].concat()).0
    };
    let three = drawn(&["--seed", "5", "--samples", "3"]);
    let alone: String = ["5", "6", "7"].iter().map(|seed| drawn(&["--seed", seed])).collect();
    assert_eq!(three, alone);

    let (json, _) = folder.ok(&["eval", "--model", "out/1", "--data", "text.txt", "--json"]);
    let report: serde_json::Value = serde_json::from_str(&json).expect("one JSON object");
    let keys = ["loss", "token_perplexity", "word_perplexity", "bits_per_byte", "tokens", "words", "bytes"];
    assert!(keys.iter().all(|key| report[key].is_number()), "{json}");
    assert_eq!(report["bytes"], 43 * 40);
    assert!(
        folder
            .ok(&["eval", "--model", "out/1", "--data", "text.txt", "--window", "8"])
            .0
            .contains("bits per byte")
    );
    let (json, _) = folder.ok(&["eval", "--model", "out/1", "--data", "text.txt", "--positions", "--json"]);
    let by_position: serde_json::Value = serde_json::from_str(&json).expect("one JSON object");
    let positions = by_position["positions"].as_array().expect("a list");
    let tokens: u64 = positions.iter().filter_map(|bucket| bucket["tokens"].as_u64()).sum();
    assert_eq!((positions.len(), tokens), (11, 43 * 40 - 1), "up to position 1,719: {json}");
    assert!(report["positions"].is_null(), "only where they are asked for");
    // " not" is read and not predicted; it is a word of ten.
    let (json, _) =
        folder.ok(&["eval", "--model", "out/1", "--data", "text.txt", "--unscored", "not", "--json"]);
    let rest: serde_json::Value = serde_json::from_str(&json).expect("one JSON object");
    assert_eq!((&rest["unscored"], &rest["words"]), (&40.into(), &(9 * 40).into()));
    assert_eq!((&rest["tokens"], &rest["bytes"]), (&(39 * 40 - 1).into(), &(40 * 40).into()));
    let nats = |report: &serde_json::Value| {
        report["loss"].as_f64().unwrap_or_default() * report["tokens"].as_f64().unwrap_or_default()
    };
    assert!(nats(&rest) < nats(&report), "{json}");
    folder
        .fails(&["eval", "--model", "out/1", "--data", "text.txt", "--unscored", ""], &["not to be scored"]);
    let table =
        folder.ok(&["eval", "--model", "out/1", "--data", "text.txt", "--positions", "--window", "8"]).0;
    let last = table.lines().last().expect("a line").split_whitespace().collect::<Vec<_>>();
    assert_eq!((last[0], last[1], last.len()), ("8-15", "214", 4), "{table}");
    assert!(folder.ok(&["inspect", "--model", "out/1"]).0.contains("bytes a sequence"));
    assert!(folder.ok(&["inspect", "tiny.yaml"]).0.contains("embedding_dim: 16"));
    let text = folder.ok(&["inspect", "--model", "out/1"]).0;
    let figures = |arguments: &[&str]| -> serde_json::Value {
        let (line, _) = folder.ok(&[&["inspect", "--json"], arguments].concat());
        serde_json::from_str(&line).expect("one JSON object")
    };
    let trained = figures(&["--model", "out/1"]);
    let shown = |name: &str, key: &str| format!("{name:<14}{}", trained[key].as_u64().expect("a number"));
    assert!(
        text.contains(&shown("parameters", "params")) && text.contains(&shown("state", "state_bytes")),
        "{text}"
    );
    let config = ["tiny.yaml", "--set", "model.vocab_size=11"];
    let untrained = figures(&config);
    assert_eq!(untrained["state_bytes"], trained["state_bytes"]);
    assert!(untrained["params"].as_u64() < trained["params"].as_u64(), "{untrained} {trained}");
    folder.fails(&["inspect", "tiny.yaml", "--json"], &["model.vocab_size is 0"]);
    assert!(folder.ok(&["doctor"]).0.contains("threads"));
    folder.ok(&["train", "--resume", "out/1", "--set", "training.steps=5"]);
}

#[test]
fn bad_configurations() {
    let folder = Folder::new("config");
    folder.write("text.txt", "some text, long enough for a window or two of training\n".repeat(9));
    let case = |name: &str, yaml: &str, wanted: &[&str]| {
        let file = folder.write(name, yaml);
        folder.fails(&["train", &file], wanted);
    };
    folder.fails(&["train", "none.yaml"], &["none.yaml", "cannot read"]);
    folder.fails(&["train", "shakespeer"], &["shakespeer", "shakespeare"]);
    case("malformed.yaml", "model: [1, 2\ndata: }", &["malformed.yaml"]);
    case("unknown.yaml", "data: {train: text.txt, batchsize: 3}", &["batchsize", "batch_size"]);
    case("type.yaml", "data: {train: text.txt, batch_size: many}", &["batch_size", "many"]);
    case("range.yaml", "data: {train: text.txt}\ntraining: {steps: 0}", &["training.steps is 0"]);
    case("heads.yaml", "data: {train: text.txt}\nmodel: {mlstm: {num_heads: 7}}", &["num_heads is 7"]);
    folder.fails(&["train", "shakespeare", "--set", "training.stepz=3"], &["stepz", "steps"]);
    folder.fails(&["train", "shakespeare", "--set", "nonsense"], &["nonsense"]);
}

#[test]
fn bad_texts() {
    let folder = Folder::new("texts");
    folder.write("tiny.yaml", TINY);
    let case = |content: &[u8], wanted: &[&str]| {
        folder.write("text.txt", content);
        folder.fails(&["train", "tiny.yaml"], wanted);
    };
    folder.fails(&["train", "tiny.yaml"], &["text.txt"]);
    case(b"", &["text.txt", "empty"]);
    case(b"caf\xe9 au lait, encoded as latin-1, for a page or so", &["text.txt", "UTF-8", "offset 3"]);
    case(b"short", &["tokens"]);
    folder.write("text.txt", "text enough for a window or two of training, or three\n".repeat(9));
    folder.write("tokenizer.json", "{\"version\": \"1.0\", \"model\": {}}");
    folder.fails(&["train", "tiny.yaml", "--set", "data.tokenizer=tokenizer.json"], &["tokenizer.json"]);
    folder.fails(&["train", "tiny.yaml", "--set", "model.vocab_size=3"], &["vocab_size", "tokens"]);
    assert!(!folder.0.join("out").exists(), "a run that cannot start leaves no folder");
}

/// Text of several kinds becomes tokens, a run on them, and a score.
#[test]
fn from_files_to_tokens_to_a_model() {
    let folder = Folder::new("prepare");
    let lines: String =
        (0..200).map(|n| format!("{{\"body\": \"Document {n}, of a few words.\"}}\n")).collect();
    folder.write("a.jsonl", lines + "not JSON\n");
    folder.write("b.txt", "And a text of its own.\n".repeat(20));
    let prepare = ["prepare", "--data", "a.jsonl", "b.txt", "--field", "body"];
    let with = |out: &'static str, extra: &[&'static str]| [&prepare[..], &["--out", out], extra].concat();
    folder.fails(&with("tokens", &["--tokenizer", "bytes"]), &["a.jsonl, line 201", "JSON", "--skip-bad"]);
    let (stdout, stderr) = folder.ok(&with("bytes", &["--tokenizer", "bytes", "--skip-bad"]));
    assert!(stdout.contains("documents  201") && stdout.contains("skipped    1"), "{stdout}");
    assert!(stderr.contains("left out 1 lines or rows; the first: a.jsonl, line 201"), "{stderr}");

    let bpe = ["--tokenizer", "bpe.json", "--train-tokenizer", "300", "--skip-bad", "--json"];
    folder.fails(&with("tokens", &bpe), &["tokens was prepared by another tokenizer"]);
    std::fs::remove_dir_all(folder.0.join("tokens")).expect("removed");
    let (json, _) = folder.ok(&with("tokens", &bpe));
    let index: serde_json::Value = serde_json::from_str(&json).expect("one JSON object");
    assert_eq!((index["documents"].as_u64(), index["skipped"]["count"].as_u64()), (Some(201), Some(1)));
    assert_eq!(index["vocabulary_size"], 300);

    let (stdout, _) = folder.ok(&["inspect", "--data", "bytes", "tokens"]);
    assert_eq!(stdout.matches("documents  201").count(), 2, "{stdout}");
    assert_eq!(stdout.matches("checksums  match").count(), 2, "{stdout}");
    folder.fails(&["inspect", "--data", "b.txt"], &["b.txt holds no prepared data"]);
    let shard = folder.0.join("bytes/tokens-00000.safetensors");
    let mut content = std::fs::read(&shard).expect("a shard");
    *content.last_mut().expect("bytes") ^= 1;
    std::fs::write(&shard, content).expect("damaged");
    folder.fails(&["inspect", "--data", "bytes"], &["bytes/tokens-00000.safetensors is damaged"]);

    folder.write("tiny.yaml", TINY.replace("text.txt", "tokens"));
    folder.ok(&["train", "tiny.yaml"]);
    let (json, _) = folder.ok(&["eval", "--model", "out/1", "--data", "tokens", "--json"]);
    let report: serde_json::Value = serde_json::from_str(&json).expect("one JSON object");
    assert_eq!(report["words"], index["words"]);
    folder.fails(&["eval", "--model", "out/1", "--data", "bytes"], &["another tokenizer"]);
    folder.fails(&["train", "tiny.yaml", "--set", "data.tokenizer=bytes"], &["another tokenizer"]);
    folder.fails(&["train", "tiny.yaml", "--set", "data.train=[tokens, b.txt]"], &["b.txt is not"]);

    // The same files directly, their tokens kept for the next run.
    let raw = ["data.train=[a.jsonl, b.txt]", "data.field=body", "data.skip_bad=true", "data.cache=kept"];
    let raw: Vec<&str> = raw.iter().flat_map(|set| ["--set", set]).collect();
    let (_, first) = folder.ok(&[&["train", "tiny.yaml"], &raw[..]].concat());
    let (_, second) = folder.ok(&[&["train", "tiny.yaml"], &raw[..]].concat());
    let losses = |stderr: &str| stderr.lines().filter(|line| line.contains("validation at")).count();
    assert_eq!((losses(&first), losses(&second)), (1, 1));
    assert_eq!(std::fs::read_dir(folder.0.join("kept")).expect("kept").count(), 1);
    #[cfg(not(feature = "parquet"))]
    {
        folder.write("c.parquet", "PAR1");
        folder.fails(
            &["eval", "--model", "out/1", "--data", "c.parquet"],
            &["c.parquet is a Parquet file", "feature `parquet`"],
        );
    }
}

#[test]
fn bad_models_and_prompts() {
    let folder = trained("models");
    folder.fails(&["generate", "--model", "nowhere", "--prompt", "a"], &["nowhere"]);
    folder.fails(&["generate", "--model", ".", "--prompt", "a"], &["no model folder"]);
    folder.fails(&["generate", "--model", "out/1", "--prompt", "ü"], &["U+00FC"]);
    folder.fails(&["generate", "--model", "out/1", "--prompt-ids", "1,99999"], &["99999", "vocabulary"]);
    folder.fails(&["generate", "--model", "out/1", "--prompt", ""], &["no tokens"]);
    folder.write("state.safetensors", "not a state");
    folder
        .fails(&["generate", "--model", "out/1", "--state-in", "state.safetensors"], &["state.safetensors"]);
    folder.fails(&["eval", "--model", "out/1", "--data", "none.txt"], &["none.txt"]);
    folder.fails(&["train", "--resume", "nowhere"], &["nowhere"]);
    let weights = folder.0.join("out/1/best/model.safetensors");
    let bytes = std::fs::read(&weights).expect("weights");
    std::fs::write(&weights, &bytes[..bytes.len() / 2]).expect("cut short");
    folder.fails(&["eval", "--model", "out/1", "--data", "text.txt"], &["model.safetensors", "damaged"]);
    std::fs::write(folder.0.join("out/1/best/config.json"), "{}").expect("foreign");
    folder.fails(&["inspect", "--model", "out/1/best"], &["config.json"]);
}

/// Whole numbers of a golden file, in rows.
fn golden_rows(file: &str, tensor: &str) -> Vec<Vec<u64>> {
    let folder = match std::env::var_os("XLSTM_GOLDEN") {
        Some(folder) => PathBuf::from(folder),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("../xlstm/tests/golden"),
    };
    let file = xlstm::folder::tensors::TensorFile::open(&folder.join(file)).expect("a golden file");
    let view = file.get(tensor).expect("a tensor");
    let numbers: Vec<u64> = view.bytes().as_chunks::<8>().0.iter().map(|b| u64::from_le_bytes(*b)).collect();
    numbers.chunks(view.shape[1]).map(<[u64]>::to_vec).collect()
}

/// A Hugging Face folder gives the tokens that `transformers` gave; so does what it is converted to,
/// and so does its name in the Hub's cache.
#[test]
fn models_of_other_programs() {
    let folder = Folder::new("folders");
    let golden = match std::env::var_os("XLSTM_GOLDEN") {
        Some(golden) => PathBuf::from(golden),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("../xlstm/tests/golden"),
    };
    let tiny = golden.canonicalize().expect("golden files").join("hf_tiny");
    let tiny = tiny.to_str().expect("a path");
    let (prompts, wanted) = (
        golden_rows("hf_tiny_io.safetensors", "in.prompt"),
        golden_rows("hf_tiny_io.safetensors", "out.greedy32"),
    );
    let generates = |model: &str, extra: &[&str]| {
        for (prompt, wanted) in prompts.iter().zip(&wanted) {
            let ids = prompt.iter().map(u64::to_string).collect::<Vec<_>>().join(",");
            let base = [
                "generate",
                "--model",
                model,
                "--prompt-ids",
                &ids,
                "-n",
                "32",
                "--temperature",
                "0",
                "--json",
            ];
            let (json, notes) = folder.ok(&[&base[..], extra].concat());
            let got: serde_json::Value = serde_json::from_str(&json).expect("one JSON object");
            assert_eq!(got["ids"], serde_json::json!(wanted), "{model}: {notes}");
        }
    };
    generates(tiny, &[]);
    folder.ok(&["convert", "--model", tiny, "--to", "ours", "--weights", "fused", "--out", "ours"]);
    folder.ok(&["convert", "--model", "ours", "--to", "nx-ai", "--out", "nx"]);
    folder.ok(&["convert", "--model", "nx", "--to", "hugging-face", "--out", "hf"]);
    for name in ["ours", "nx", "hf"] {
        generates(name, &[]);
    }
    let (text, _) = folder.ok(&["inspect", "--model", "hf"]);
    assert!(text.contains("Hugging Face") && text.contains("\"family\": \"large\""), "{text}");
    folder.fails(&["convert", "--model", "hf", "--to", "ours", "--out", "nx"], &["nx is there already"]);
    folder.fails(
        &["convert", "--model", "hf", "--to", "ours", "--set", "x", "--out", "o"],
        &["--set x has no ="],
    );

    let commit = "0123abc";
    let cache = folder.0.join("cache");
    let repository = cache.join("models--org--tiny");
    std::fs::create_dir_all(repository.join("refs")).expect("a cache");
    std::fs::create_dir_all(repository.join("snapshots")).expect("a cache");
    std::fs::write(repository.join("refs/main"), commit).expect("written");
    std::fs::rename(folder.0.join("hf"), repository.join("snapshots").join(commit)).expect("moved");
    let named = |model: &str| {
        Command::new(env!("CARGO_BIN_EXE_xlstm"))
            .args(["inspect", "--model", model])
            .env("HF_HUB_CACHE", &cache)
            .current_dir(&folder.0)
            .output()
            .expect("the program runs")
    };
    for name in ["org/tiny", "org/tiny@main", "org/tiny@0123abc"] {
        assert!(named(name).status.success(), "{name}");
    }
    let missing = named("org/other@v2");
    let stderr = String::from_utf8_lossy(&missing.stderr).into_owned();
    assert_eq!(missing.status.code(), Some(1));
    for part in ["no model org/other@v2 in the Hub's cache", "hf download org/other --revision v2"] {
        assert!(stderr.contains(part), "{stderr}");
    }
}

/// GPU 99 is nowhere: with or without support for GPUs, with or without one, that is an error.
#[test]
fn devices_that_are_not_there() {
    let folder = trained("devices");
    let text = ["--data", "text.txt"];
    for verb in [&["train", "tiny.yaml"][..], &[&["eval", "--model", "out/1"], &text[..]].concat()] {
        folder.fails(&[verb, &["--device", "cuda:99"]].concat(), &["GPU", "--device cpu"]);
    }
    folder.fails(&["train", "tiny.yaml", "--set", "device=gpu"], &["device", "gpu"]);
    assert!(!folder.0.join("out/2").exists(), "a run that cannot start leaves no folder");
    let (_, notes) = folder.ok(&["eval", "--model", "out/1", "--data", "text.txt", "--device", "cpu"]);
    assert!(notes.contains("device: cpu"), "{notes}");
    let (_, notes) = folder.ok(&["train", "tiny.yaml", "--device", "cpu", "--dtype", "bf16"]);
    assert!(notes.contains("bf16") && notes.contains("done after 3 steps"), "{notes}");
}

/// A file system that is always full, where the system has one.
#[test]
fn a_full_disk_is_an_error() {
    let full = Path::new("/dev/full");
    if !full.exists() {
        return;
    }
    let folder = trained("full");
    let output = Command::new(env!("CARGO_BIN_EXE_xlstm"))
        .args(["eval", "--model", "out/1", "--data", "text.txt"])
        .current_dir(&folder.0)
        .stdout(std::fs::OpenOptions::new().write(true).open(full).expect("/dev/full"))
        .output()
        .expect("the program runs");
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("cannot write to stdout") && !stderr.contains("panicked"), "{stderr}");
}

/// Every kind of bench with as few repetitions as there can be: one JSON object for each thing
/// measured, and lines for people.
#[test]
fn benches() {
    let folder = Folder::new("bench");
    let preset = ["--preset", "lm-mixed-128"];
    let cases: [(&[&str], usize); 4] = [
        (&["train", "--steps", "1", "--device", "cpu"], 1),
        (&["prefill", "--repeats", "1", "--device", "cpu", "--prompt", "9"], 1),
        (&["decode", "--repeats", "1", "--device", "cpu", "--dtype", "bf16", "--sessions", "2"], 1),
        (&["cell", "--repeats", "1"], 2),
    ];
    for (case, objects) in cases {
        let (lines, _) = folder.ok(&[&["bench"], case, &preset, &["--threads", "1", "--json"]].concat());
        assert_eq!(lines.lines().count(), objects, "{case:?}: {lines}");
        for line in lines.lines() {
            let report: serde_json::Value = serde_json::from_str(line).expect("JSON");
            assert_eq!(report["preset"], "lm-mixed-128");
            assert!(report["params"].is_u64(), "{line}");
            let rates = ["product_gflops", "bandwidth_gb_s"];
            for key in ["tokens_per_s", "ms", "gflops", "floor_share"].iter().chain(&rates) {
                assert!(report[key].as_f64().is_some_and(|x| x > 0.0 && x.is_finite()), "{key}: {line}");
            }
        }
    }
    let (text, _) = folder.ok(&["bench", "cell", "--preset", "lstm-128", "--repeats", "1"]);
    assert!(text.contains("LSTM cell, 1 head of 160") && text.contains("floor "), "{text}");
    folder.fails(&["bench", "cell", "--preset", "gpt-128"], &["gpt-128", "no recurrent cell"]);
    // A training configuration in place of a preset.
    let config =
        ["--config", "shakespeare", "--set", "data.length=16", "--threads", "1", "--device", "cpu", "--json"];
    folder.fails(&[&["bench", "train", "--steps", "1"], &config[..]].concat(), &["model.vocab_size is 0"]);
    let sized = [&config[..], &["--set", "model.vocab_size=65"]].concat();
    let (line, _) = folder.ok(&[&["bench", "train", "--steps", "1"], &sized[..]].concat());
    let report: serde_json::Value = serde_json::from_str(&line).expect("JSON");
    assert_eq!(report["preset"], "shakespeare");
    assert!(report["state_mb"].is_null(), "{line}");
    let (line, _) = folder.ok(&[&["bench", "decode", "--repeats", "1"], &sized[..]].concat());
    let report: serde_json::Value = serde_json::from_str(&line).expect("JSON");
    assert!(report["prompt"] == 16 && report["state_mb"].as_f64().is_some_and(|mb| mb > 0.0), "{line}");
    // Both of them, or neither, is wrong usage.
    for (arguments, wanted) in
        [(&["--config", "shakespeare", "--preset", "lstm-128"][..], "cannot be used"), (&[], "--preset")]
    {
        let output = folder.xlstm(&[&["bench", "train"], arguments].concat());
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.code() == Some(2) && stderr.contains(wanted), "{stderr}");
    }
}

/// The Python original's configuration, as it stands.
#[test]
fn a_configuration_of_the_original() {
    let folder = Folder::new("original");
    folder.write("train.txt", "to be or not to be that is the question\n".repeat(60));
    folder.write("vocab.txt", "<pad>\n<unk>\n<eos>\nto\nbe\nor\nnot\nthat\nis\nthe\n");
    let yaml = "
seed: 42
vocab_file: vocab.txt
train_data: train.txt
max_length: 12
embedding_size: 16
hidden_size: 24
num_layers: 1
num_blocks: 2
dropout: 0.1
bidirectional: false
lstm_type: sLSTM
lr: 0.001
batch_size: 4
num_epochs: 2
";
    folder.write("original.yaml", yaml);
    folder.ok(&["train", "original.yaml", "--set", "sample.tokens=4"]);
    let resolved = std::fs::read_to_string(folder.0.join("out/1/config.yaml")).expect("a configuration");
    // 11 tokens a line, 54 lines without the tenth that is held out: 48 windows, 12 batches, twice.
    for line in ["family: original", "steps: 24", "epochs: null", "tokenizer: vocab.txt"] {
        assert!(resolved.contains(line), "{line:?} in\n{resolved}");
    }
    folder.ok(&["train", "--resume", "out/1", "--set", "training.steps=26"]);
    let (json, _) = folder.ok(&["eval", "--model", "out/1", "--data", "train.txt", "--json"]);
    let report: serde_json::Value = serde_json::from_str(&json).expect("one JSON object");
    assert_eq!(report["tokens"], 60 * 11 - 1);
    folder.write("both.yaml", yaml.replace("bidirectional: false", "bidirectional: true"));
    folder.fails(&["train", "both.yaml"], &["both.yaml:11", "bidirectional"]);
    folder.write("mixed.yaml", yaml.to_owned() + "training: {steps: 3}\n");
    folder.fails(&["train", "mixed.yaml"], &["mixed.yaml:16", "`training`", "one of the original's"]);
}
