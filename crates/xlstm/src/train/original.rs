//! The configuration of the Python original: a flat YAML file, translated as it stands.
//!
//! The keys, and what they have where they are left out (the values of the original's example):
//! - `seed` (1);
//! - `train_data`: the text, as `data.train`; always given;
//! - `vocab_file`: a list of words or another tokenizer (that of prepared data, or characters);
//! - `max_length` (20): tokens in a sequence, as `data.length`;
//! - `embedding_size` (128), `hidden_size` (256), `num_layers` (1), `num_blocks` (2), `dropout` (0);
//! - `lstm_type` (`slstm`): `slstm` or `mlstm`, or `sLSTM` or `mLSTM`;
//! - `bidirectional` (false): true is refused;
//! - `lr` or `learning_rate` (1e-4), `batch_size` (64), `num_epochs` (5).
//!
//! Training is the original's: Adam with its defaults at a constant rate, gradients clipped to a
//! norm of 1. All else is as in our own configuration, whose keys `--set` changes.

use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::Value;

use super::config::{DataConfig, OptimizerConfig, RunConfig, ScheduleConfig, TrainingConfig};
use super::load::{file_error, key_of};
use super::sources::{TextSource, TokenizerChoice};
use crate::error::{Error, Result, nearest};
use crate::model::{LstmType, ModelConfig};
use crate::optim::Decay;

/// Keys that only the original's form has at the top level.
const DISTINCTIVE: [&str; 10] = [
    "vocab_file",
    "train_data",
    "max_length",
    "embedding_size",
    "hidden_size",
    "num_layers",
    "bidirectional",
    "lstm_type",
    "lr",
    "num_epochs",
];

/// The keys of our form's top level that the original's does not have.
const SECTIONS: [&str; 9] =
    ["threads", "device", "dtype", "model", "data", "optimizer", "schedule", "training", "sample"];

/// Our name of a key that is checked, and the original's.
const NAMES: [(&str, &str); 9] = [
    ("model.embedding_dim", "embedding_size"),
    ("model.original.hidden_size", "hidden_size"),
    ("model.original.num_layers", "num_layers"),
    ("model.original.bidirectional", "bidirectional"),
    ("model.num_blocks", "num_blocks"),
    ("model.dropout", "dropout"),
    ("data.length", "max_length"),
    ("data.batch_size", "batch_size"),
    ("training.epochs", "num_epochs"),
];

/// The original's configuration.
#[derive(Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Original {
    seed: u64,
    vocab_file: Option<PathBuf>,
    train_data: Option<TextSource>,
    max_length: usize,
    embedding_size: usize,
    hidden_size: usize,
    num_layers: usize,
    num_blocks: usize,
    dropout: f64,
    bidirectional: bool,
    lstm_type: LstmType,
    lr: Option<f64>,
    learning_rate: Option<f64>,
    batch_size: usize,
    num_epochs: f64,
}

impl Default for Original {
    fn default() -> Self {
        Original {
            seed: 1,
            vocab_file: None,
            train_data: None,
            max_length: 20,
            embedding_size: 128,
            hidden_size: 256,
            num_layers: 1,
            num_blocks: 2,
            dropout: 0.0,
            bidirectional: false,
            lstm_type: LstmType::Slstm,
            lr: None,
            learning_rate: None,
            batch_size: 64,
            num_epochs: 5.0,
        }
    }
}

/// Whether `text`, a configuration file that may be broken, is in the original's form.
pub(super) fn is_original(text: &str) -> bool {
    let value: Value = serde_saphyr::from_str(text).unwrap_or_default();
    DISTINCTIVE.iter().any(|key| value.get(key).is_some() || find_line(text, key).is_some())
}

/// The run that `text`, a file of the original's form from `origin`, describes.
///
/// # Errors
/// A configuration error with the line, as of our own form; keys of both forms in one file; no
/// text to train on.
pub(super) fn load(text: &str, origin: &Path) -> Result<RunConfig> {
    let refused =
        |key: &str, message: String| Error::config(format!("{}: {message}", place(text, origin, key)));
    let value: Value = serde_saphyr::from_str(text).unwrap_or_default();
    let has = |key: &&str| value.get(key).is_some();
    if let (Some(ours), Some(theirs)) =
        (SECTIONS.iter().find(|key| has(key)), DISTINCTIVE.iter().find(|key| has(key)))
    {
        let message = format!("`{ours}` is a key of this program's form, `{theirs}` one of the original's");
        return Err(refused(ours, message).hint(format!(
            "a file is in one form: without `{ours}`, `xlstm inspect {}` prints this one in the program's own; \
             --set changes single keys of it",
            origin.display()
        )));
    }
    let original: Original = serde_saphyr::from_str(text).map_err(|e| {
        let error = file_error(&e, text, origin);
        match e.without_snippet() {
            serde_saphyr::Error::SerdeUnknownField { field, expected, .. } => {
                let list = expected.join(", ");
                error.hint(match nearest(field, expected.iter().copied()) {
                    Some(near) => format!("did you mean `{near}`?"),
                    None => format!("the keys of the original's form are: {list}"),
                })
            }
            _ => error,
        }
    })?;
    if let (Some(lr), Some(rate)) = (original.lr, original.learning_rate) {
        return Err(refused(
            "learning_rate",
            format!("lr is {lr} and learning_rate is {rate}: they are one key"),
        )
        .hint("leave out one of the two"));
    }
    if original.train_data.is_none() {
        return Err(Error::config(format!("{}: there is no train_data", origin.display()))
            .hint("train_data names the text: `shakespeare`, a file, a folder, or a list of them"));
    }
    Ok(original.into_run())
}

impl Original {
    fn into_run(self) -> RunConfig {
        let learning_rate = self.lr.or(self.learning_rate).unwrap_or(1e-4);
        RunConfig {
            seed: self.seed,
            // The vocabulary's size is the tokenizer's.
            model: ModelConfig::original(
                0,
                self.embedding_size,
                self.hidden_size,
                self.num_layers,
                self.num_blocks,
                self.dropout,
                self.bidirectional,
                self.lstm_type,
            ),
            data: DataConfig {
                train: self.train_data.unwrap_or_default(),
                tokenizer: self.vocab_file.map(|path| TokenizerChoice::File(as_path(path))),
                batch_size: self.batch_size,
                length: self.max_length,
                ..DataConfig::default()
            },
            optimizer: OptimizerConfig {
                learning_rate,
                betas: [0.9, 0.999],
                eps: 1e-8,
                weight_decay: 0.0,
                clip: Some(1.0),
                ..OptimizerConfig::default()
            },
            schedule: ScheduleConfig {
                warmup_steps: 0,
                decay: Decay::Constant,
                min_learning_rate: learning_rate,
                decay_steps: None,
            },
            training: TrainingConfig {
                steps: None,
                epochs: Some(self.num_epochs),
                ..TrainingConfig::default()
            },
            ..RunConfig::default()
        }
    }
}

/// A path that reads as one: a bare name could be a word for a tokenizer.
fn as_path(path: PathBuf) -> PathBuf {
    match path.to_str() {
        Some(name) if !name.contains(['/', '\\', '.']) => Path::new(".").join(name),
        _ => path,
    }
}

/// The error of checking what [`load`] made of a file, with the key's name and line in the file.
pub(super) fn in_its_words(error: &Error, text: &str, origin: &Path) -> Error {
    let (message, hint) = (error.to_string(), error.hint_text().unwrap_or_default());
    let rate = if find_line(text, "lr").is_some() { "lr" } else { "learning_rate" };
    let mut names = NAMES.into_iter().chain([("optimizer.learning_rate", rate)]);
    match names.find(|(ours, _)| message.starts_with(ours)) {
        Some((ours, theirs)) => {
            let place = place(text, origin, theirs);
            Error::config(format!("{place}: {}", message.replace(ours, theirs)))
                .hint(hint.replace(ours, theirs))
        }
        None => Error::config(format!("{}: {message}", origin.display())).hint(hint),
    }
}

/// Where `key` is: the file, and its line where it is found.
fn place(text: &str, origin: &Path, key: &str) -> String {
    match find_line(text, key) {
        Some(line) => format!("{}:{line}", origin.display()),
        None => origin.display().to_string(),
    }
}

/// The line, from 1, of a key at the top level.
fn find_line(text: &str, key: &str) -> Option<usize> {
    let at = |line: &str| !line.starts_with(char::is_whitespace) && key_of(line).as_deref() == Some(key);
    text.lines().position(at).map(|index| index + 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::Batching;
    use crate::model::Family;
    use crate::train::Paths;

    const WHOLE: &str = "\
# As in the original's documentation.
seed: 42
vocab_file: vocab
train_data: train.txt
max_length: 100
embedding_size: 32
hidden_size: 64
num_layers: 2
num_blocks: 3
dropout: 0.1
bidirectional: false
lstm_type: mLSTM
lr: 0.002
batch_size: 8
num_epochs: 10
";

    fn run(text: &str) -> Result<RunConfig> {
        RunConfig::load(text, Path::new("run.yaml"), &[])
    }

    #[test]
    fn every_key_is_translated() {
        let run = |text: &str| run(text).unwrap();
        let config = run(WHOLE);
        assert_eq!((config.seed, config.data.batch_size, config.data.length), (42, 8, 100));
        assert_eq!(config.data.train, TextSource::Files(Paths(vec!["train.txt".into()])));
        assert_eq!(config.data.tokenizer, Some(TokenizerChoice::File("./vocab".into())));
        assert_eq!(config.data.batching, Batching::Windows);
        assert_eq!((config.training.steps, config.training.epochs), (None, Some(10.0)));
        let mut model = ModelConfig {
            family: Family::Original,
            embedding_dim: 32,
            num_blocks: 3,
            dropout: 0.1,
            ..ModelConfig::default()
        };
        (model.original.hidden_size, model.original.num_layers) = (64, 2);
        model.original.lstm_type = LstmType::Mlstm;
        assert_eq!(config.model, model);
        let adam = OptimizerConfig {
            learning_rate: 0.002,
            betas: [0.9, 0.999],
            eps: 1e-8,
            weight_decay: 0.0,
            clip: Some(1.0),
            ..OptimizerConfig::default()
        };
        assert_eq!(config.optimizer, adam);
        let rates = config.learning_rates();
        assert_eq!([0, 1, 999, 5000].map(|step| rates.rate(step)), [0.002; 4]);
        assert_eq!(run(&WHOLE.replace("lr:", "learning_rate:")), config, "either spelling of the rate");
        assert_eq!(run(&WHOLE.replace("mLSTM", "mlstm")), config, "either spelling of the cell");
        let json = serde_json::json!({"train_data": ["a.txt", "b.txt"], "lr": 1e-5});
        let config = run(&json.to_string());
        assert_eq!(config.data.train, TextSource::Files(Paths(vec!["a.txt".into(), "b.txt".into()])));
        assert_eq!(config.optimizer.learning_rate, 1e-5);
    }

    #[test]
    fn what_is_left_out_is_the_originals_example() {
        let config = run("train_data: shakespeare\n").unwrap();
        assert_eq!((config.seed, config.data.batch_size, config.data.length), (1, 64, 20));
        assert_eq!((config.training.epochs, config.optimizer.learning_rate), (Some(5.0), 1e-4));
        let (model, original) = (&config.model, &config.model.original);
        assert_eq!((model.embedding_dim, model.num_blocks, model.dropout), (128, 2, 0.0));
        assert_eq!((original.hidden_size, original.num_layers), (256, 1));
        assert_eq!((original.lstm_type, original.bidirectional), (LstmType::Slstm, false));
        assert_eq!(
            (config.data.train.clone(), config.data.tokenizer.clone()),
            (TextSource::Shakespeare, None)
        );
    }

    #[test]
    fn a_run_of_it_is_in_our_form() {
        let config = run(WHOLE).unwrap();
        assert_eq!(run(&config.to_yaml().unwrap()).unwrap(), config);
        let sets = ["training.steps=7".to_owned(), "model.dropout=0".to_owned()];
        let config = RunConfig::load(WHOLE, Path::new("run.yaml"), &sets).unwrap();
        assert_eq!(
            (config.training.steps, config.training.epochs, config.model.dropout),
            (Some(7), None, 0.0)
        );
    }

    #[test]
    fn errors_say_where() {
        let cases = [
            ("num_epochs: 10", "num_epoch: 10", "run.yaml:15:1: unknown key `num_epoch`", "`num_epochs`?"),
            (
                "dropout",
                "weight_decay",
                "run.yaml:10:1: unknown key `weight_decay`",
                "keys of the original's",
            ),
            ("100", "long", "run.yaml:5:13: max_length: expected a whole number", ""),
            (
                "mLSTM",
                "gru",
                "run.yaml:12:12: lstm_type: expected one of sLSTM, slstm, mLSTM, mlstm; found `gru`",
                "",
            ),
            ("false", "true", "run.yaml:11: bidirectional is true", "bidirectional: false"),
            ("batch_size: 8", "batch_size: 0", "run.yaml:14: batch_size is 0", "batch_size is at least 1"),
            ("0.002", "-1", "run.yaml:13: lr is -1", "lr is a finite number"),
            ("0.1", ".nan", "dropout: expected a finite number", ""),
            (
                "batch_size: 8",
                "learning_rate: 8",
                "run.yaml:14: lr is 0.002 and learning_rate is 8",
                "of the two",
            ),
            (
                "seed: 42",
                "model: {bias: true}",
                "run.yaml:2: `model` is a key of this program's form",
                "--set",
            ),
            ("train_data: train.txt", "", "run.yaml: there is no train_data", "names the text"),
        ];
        for (here, there, message, hint) in cases {
            let text = WHOLE.replacen(here, there, 1);
            let error = run(&text).expect_err(message);
            let found = error.hint_text().unwrap_or_default();
            assert!(error.to_string().contains(message), "{error}\nwanted: {message}");
            assert!(found.contains(hint), "{error}\nhint: {found}\nwanted: {hint}");
        }
        // A key of ours at the wrong place alone does not make a file the original's.
        let error = run("learning_rate: 1\n").unwrap_err();
        assert_eq!(error.hint_text(), Some("`learning_rate` belongs to `optimizer`"));
    }
}
