//! Training runs: they learn, resume bit for bit, stop when asked, and say where they broke.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use xlstm::ErrorKind;
use xlstm::engine::Device;
use xlstm::folder::ModelFolder;
use xlstm::generate::{Sampler, Sampling, Session};
use xlstm::model::Runner;
use xlstm::train::{End, MetricsLog, Observer, Outcome, Progress, Row, RunConfig, Silent, Texts, train};

use crate::pass::on_gpu;

const TEXT: &str = include_str!("training.rs");

/// A folder of this test's own, removed when it passes.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Folder {
        let path = std::env::temp_dir().join(format!("xlstm-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir_all(&path).expect("a temporary folder");
        Folder(path)
    }

    fn run(&self, name: &str) -> PathBuf {
        let path = self.0.join(name);
        std::fs::create_dir_all(&path).expect("a run's folder");
        path
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }
}

fn config(sets: &[&str]) -> RunConfig {
    let yaml = "
model: {embedding_dim: 16, num_blocks: 2, slstm_at: [1], dropout: 0.1, mlstm: {num_heads: 2, chunk_size: 8}, slstm: {num_heads: 2}}
data: {batch_size: 4, length: 24, validation_fraction: 0.1}
optimizer: {learning_rate: 0.01}
schedule: {warmup_steps: 2}
training: {steps: 12, accumulation: 2, validate_every: 4, checkpoint_every: 3, log_every: 1}
sample: {tokens: 8}
";
    let sets: Vec<String> = sets.iter().map(|set| (*set).to_owned()).collect();
    RunConfig::load(yaml, Path::new("test.yaml"), &sets).expect("a configuration")
}

fn run(config: &RunConfig, folder: &Path, stop_after: Option<u64>) -> xlstm::Result<Outcome> {
    struct StopAfter<'a>(Option<u64>, &'a AtomicBool);
    impl Observer for StopAfter<'_> {
        fn on_step(&mut self, progress: &Progress) {
            if self.0 == Some(progress.step) {
                self.1.store(true, Ordering::Relaxed);
            }
        }
    }
    let texts = Texts::load(&config.data, TEXT, &mut |_| {})?;
    let stop = AtomicBool::new(false);
    train(config, texts, folder, &stop, &mut StopAfter(stop_after, &stop))
}

/// The rows of the log without its clock, and the files of parameters and moments.
type Record = (Vec<(u64, u64, String)>, Vec<u8>, Vec<u8>);

/// Everything of a run but its clock.
fn record(folder: &Path) -> Record {
    let rows = MetricsLog::read(&folder.join("metrics.jsonl")).expect("metrics");
    let rows = rows
        .iter()
        .map(|row| match row {
            Row::Training(r) => (r.step, r.tokens, format!("{:?} {:?} {:?}", r.loss, r.grad_norm, r.lr)),
            Row::Validation(r) => (r.step, r.tokens, format!("{:?}", r.val_loss)),
        })
        .collect();
    let read = |name: &str| std::fs::read(folder.join("last").join(name)).expect("a checkpoint");
    (rows, read("model.safetensors"), read("training.safetensors"))
}

/// Copies a folder and all below it.
fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).expect("a folder");
    for entry in std::fs::read_dir(from).expect("a folder") {
        let entry = entry.expect("an entry");
        let (from, to) = (entry.path(), to.join(entry.file_name()));
        if from.is_dir() {
            copy(&from, &to);
        } else {
            std::fs::copy(&from, &to).expect("a copy");
        }
    }
}

#[test]
fn an_interrupted_run_goes_on_bit_for_bit() {
    let folder = Folder::new("resume");
    let stages =
        "data.stages=[{from_step: 3, batch_size: 4, length: 12}, {from_step: 7, batch_size: 2, length: 24}]";
    for (batching, stages) in [
        ("windows", None),
        ("documents", None),
        ("stream", None),
        ("windows", Some(stages)),
        ("stream", Some(stages)),
    ] {
        let sets = [format!("data.batching={batching}")];
        let config = config(&sets.iter().map(String::as_str).chain(stages).collect::<Vec<_>>());
        let batching = format!("{batching}{}", if stages.is_some() { "-stages" } else { "" });
        let (whole, parts) =
            (folder.run(&format!("{batching}-whole")), folder.run(&format!("{batching}-parts")));
        assert_eq!(run(&config, &parts, Some(1)).expect("a run").steps, 1);
        if on_gpu() {
            // A run times the algorithms of its products and keeps them: another would take others.
            copy(&parts, &whole);
        }
        for (stop, steps) in [(Some(7), 7), (None, 12)] {
            assert_eq!(run(&config, &parts, stop).expect("a run").steps, steps);
        }
        if on_gpu() {
            let algorithms = Path::new("last").join("algorithms.json");
            std::fs::copy(parts.join(&algorithms), whole.join(&algorithms)).expect("algorithms");
        }
        let outcome = run(&config, &whole, None).expect("a run");
        assert_eq!((outcome.end, outcome.steps), (End::Finished, 12));
        assert!(record(&whole) == record(&parts), "{batching}: the resumed run differs");
    }
}

/// Epochs become steps before anything is written, stages and accumulation counted.
#[test]
fn a_run_by_epochs_ends_with_them_and_goes_on() {
    let folder = Folder::new("epochs");
    let sets = ["data.validation_fraction=0", "training.epochs=0.6", "sample.tokens=0"];
    let stage = "data.stages=[{from_step: 5, batch_size: 8, length: 24}]";
    let staged = [&sets[..], &[stage]].concat();
    for (name, sets) in [("plain", &sets[..]), ("stages", &staged[..])] {
        let config = config(sets);
        let tokens = Texts::load(&config.data, TEXT, &mut |_| {}).expect("texts").training.len();
        // Windows in an epoch; a step has two batches of four, and of eight from step 5 on.
        let windows = 0.6 * ((tokens - 24) / 24) as f64;
        let steps = match name {
            "plain" => ((windows / 4.0).ceil() / 2.0).ceil(),
            _ => ((10.0 + (windows - 40.0) / 8.0).ceil() / 2.0).ceil(),
        };
        assert!(steps > 6.0, "{steps}");
        let folder = folder.run(name);
        run(&config, &folder, Some(2)).expect("a run");
        let path = folder.join("config.yaml");
        let written = std::fs::read_to_string(&path).expect("a configuration");
        let resolved = RunConfig::load(&written, &path, &[]).expect("what a run wrote loads");
        assert_eq!((resolved.training.steps, resolved.training.epochs), (Some(steps as u64), None));
        let outcome = run(&resolved, &folder, None).expect("a run");
        assert_eq!((outcome.end, outcome.steps), (End::Finished, steps as u64), "{name}");
    }
}

#[test]
fn a_kill_after_a_checkpoint_loses_only_the_steps_since() {
    let folder = Folder::new("kill");
    let (whole, killed) = (folder.run("whole"), folder.run("killed"));
    run(&config(&[]), &whole, None).expect("a run");
    run(&config(&[]), &killed, Some(5)).expect("a run");
    // As if it had been killed at step 5 with its last checkpoint from step 3, in the middle
    // of a line of metrics and of replacing the checkpoint.
    let again = folder.run("again");
    run(&config(&[]), &again, Some(3)).expect("a run");
    std::fs::remove_dir_all(killed.join("last")).expect("removed");
    std::fs::rename(again.join("last"), killed.join("last.old")).expect("renamed");
    std::fs::create_dir_all(killed.join("last.partial")).expect("created");
    let metrics = killed.join("metrics.jsonl");
    let mut text = std::fs::read(&metrics).expect("metrics");
    text.extend_from_slice(b"{\"step\": 6, \"tok");
    std::fs::write(&metrics, text).expect("written");
    run(&config(&[]), &killed, None).expect("a run");
    assert!(record(&whole) == record(&killed), "the run after a kill differs");
}

#[test]
fn a_small_model_learns_a_small_text() {
    let folder = Folder::new("learn");
    let config = config(&["training.steps=60", "training.validate_every=60", "training.checkpoint_every=0"]);
    let outcome = run(&config, &folder.0, None).expect("a run");
    let best = outcome.best.expect("a validation loss");
    assert!(best < 3.2, "validation loss {best} nats a character");
    assert_eq!(outcome.model, folder.0.join("best"));
    for name in ["config.yaml", "loss.svg", "metrics.jsonl"] {
        assert!(folder.0.join(name).exists(), "{name}");
    }
}

#[test]
fn training_stops_early_when_it_no_longer_improves() {
    let folder = Folder::new("early");
    let config = config(&[
        "training.steps=400",
        "training.validate_every=1",
        "training.early_stopping=2",
        "optimizer.learning_rate=0.3",
        "schedule.min_learning_rate=0.1",
        "sample.tokens=0",
    ]);
    let outcome = run(&config, &folder.0, None).expect("a run");
    assert_eq!(outcome.end, End::Early);
    assert!(outcome.steps < 400);
}

#[test]
fn a_diverging_run_names_the_step_and_the_block() {
    let folder = Folder::new("diverge");
    let config = config(&["optimizer.learning_rate=1e30", "optimizer.clip=0", "schedule.warmup_steps=0"]);
    let error = run(&config, &folder.0, None).expect_err("diverges");
    assert_eq!(error.kind(), ErrorKind::NonFinite);
    let message = error.to_string();
    assert!(message.contains("diverged at step 2") && message.contains("in blocks."), "{message}");
}

#[test]
fn another_text_or_model_is_not_resumed() {
    let folder = Folder::new("other");
    run(&config(&[]), &folder.0, Some(3)).expect("a run");
    let texts = Texts::load(&config(&[]).data, &TEXT.to_uppercase(), &mut |_| {}).expect("texts");
    let other =
        train(&config(&[]), texts, &folder.0, &AtomicBool::new(false), &mut Silent).expect_err("refused");
    assert!(other.hint_text().is_some(), "{other}");
    let error = run(&config(&["model.embedding_dim=32"]), &folder.0, None).expect_err("refused");
    assert!(error.to_string().contains("another configuration"), "{error}");
}

#[test]
fn sessions_fork_save_and_load() {
    let folder = Folder::new("session");
    run(&config(&[]), &folder.0, Some(2)).expect("a run");
    let model = ModelFolder::load(&folder.0).expect("a model");
    let device = Device::cpu(1).expect("a thread");
    let weights = model.weights(&device).expect("weights");
    let runner = || Runner::new(model.model.clone(), weights.clone(), device.clone());
    let sampling = Sampling::default();
    let draw = |session: &mut Session, count: usize| {
        let mut ids = Vec::new();
        let mut sampler = Sampler::new(sampling, model.model.config().vocab_size, 7);
        let listen = |id| {
            ids.push(id);
            Ok(true)
        };
        session.generate(count, &mut sampler, &[], listen).expect("tokens");
        ids
    };
    let mut session = Session::new(runner());
    assert!(
        session.generate(1, &mut Sampler::new(sampling, 3, 1), &[], |_| Ok(true)).is_err(),
        "nothing read"
    );
    session.read(&[1, 2, 3, 4, 5]).expect("a prompt");
    let file = folder.0.join("state.safetensors");
    session.save(&file, &model.fingerprint()).expect("saved");
    let mut restored = Session::load(runner(), &file, &model.fingerprint()).expect("loaded");
    let state = session.state().expect("a state");
    assert_eq!(restored.state().expect("a state"), state);
    let mut cleared = state;
    cleared.reset();
    assert_eq!(cleared, runner().state().expect("a state"), "a state that is reset is an empty one");
    assert_eq!(draw(&mut session, 20), draw(&mut restored, 20));
    assert!(Session::load(runner(), &file, "0000").is_err(), "another model's fingerprint");
    let bytes = std::fs::read(&file).expect("a file");
    std::fs::write(&file, &bytes[..bytes.len() / 2]).expect("cut short");
    assert!(Session::load(runner(), &file, &model.fingerprint()).is_err(), "a truncated state");
}

#[test]
fn damaged_model_folders_are_refused() {
    let folder = Folder::new("damaged");
    run(&config(&[]), &folder.0, Some(1)).expect("a run");
    let last = folder.0.join("last");
    let check = |name: &str, content: &[u8], want: &str| {
        let path = last.join(name);
        let before = std::fs::read(&path).expect("a file");
        std::fs::write(&path, content).expect("written");
        let error = ModelFolder::load(&last).expect_err(want);
        assert!(error.to_string().contains(want), "{error}");
        assert!(error.hint_text().is_some(), "{error}");
        std::fs::write(&path, before).expect("restored");
    };
    let weights = std::fs::read(last.join("model.safetensors")).expect("weights");
    check("model.safetensors", &weights[..weights.len() - 9], "no sound safetensors file");
    check("model.safetensors", b"not weights", "no sound safetensors file");
    check("config.json", b"{\"model_type\": \"gpt2\"}", "expected \"xlstm\", found \"gpt2\"");
    check("config.json", b"{\"format\": \"other\"}", "does not describe a model that we know");
    check("config.json", b"{", "expected a configuration");
    ModelFolder::load(&last).expect("whole again");
    assert!(ModelFolder::load(&folder.0.join("nowhere")).expect_err("missing").hint_text().is_some());
}
