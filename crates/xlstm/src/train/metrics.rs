//! The numbers of a run over time, one JSON object a line in `metrics.jsonl`.
//!
//! Rows are appended as they arise, so a killed run keeps all but perhaps a torn last line.
//! Losses are in nats a token. A loss that is not finite is written as `null` and read as NaN.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Deserializer, Serialize};

use crate::error::{Error, Result};
use crate::files::write_atomically;

/// A row about training steps.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct TrainingRow {
    /// Steps done.
    pub step: u64,
    /// Tokens learnt from so far.
    pub tokens: u64,
    /// Time spent training so far, in seconds.
    pub seconds: f64,
    /// Training loss in nats a token.
    #[serde(deserialize_with = "null_as_nan")]
    pub loss: f64,
    /// Learning rate of the step.
    pub lr: f64,
    /// Global norm of the gradients before clipping.
    #[serde(deserialize_with = "null_as_nan")]
    pub grad_norm: f64,
    /// Training speed.
    #[serde(deserialize_with = "null_as_nan")]
    pub tokens_per_s: f64,
}

/// A row about a validation.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct ValidationRow {
    /// Steps done.
    pub step: u64,
    /// Tokens learnt from so far.
    pub tokens: u64,
    /// Time spent training so far, in seconds.
    pub seconds: f64,
    /// Validation loss in nats a token.
    #[serde(deserialize_with = "null_as_nan")]
    pub val_loss: f64,
    /// The same loss in bits a byte of text.
    #[serde(deserialize_with = "null_as_nan")]
    pub val_bits_per_byte: f64,
}

/// A row of `metrics.jsonl`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Row {
    /// About training steps.
    Training(TrainingRow),
    /// About a validation.
    Validation(ValidationRow),
}

impl Row {
    /// Steps done when the row was written.
    pub fn step(&self) -> u64 {
        match self {
            Row::Training(row) => row.step,
            Row::Validation(row) => row.step,
        }
    }
}

/// `metrics.jsonl`, open for appending, with its rows in memory.
#[derive(Debug)]
pub struct MetricsLog {
    path: PathBuf,
    file: File,
    rows: Vec<Row>,
}

impl MetricsLog {
    /// A new, empty log at `path`.
    ///
    /// # Errors
    /// An input/output error if the file exists already or cannot be created.
    pub fn create(path: &Path) -> Result<Self> {
        let file = OpenOptions::new().append(true).create_new(true).open(path);
        let file = file.map_err(|e| Error::io("create", path, &e))?;
        Ok(MetricsLog { path: path.into(), file, rows: Vec::new() })
    }

    /// The log of a run that goes on from `step`: rows after it and a torn last line are dropped
    /// from the file. A missing file starts empty.
    ///
    /// # Errors
    /// Those of [`MetricsLog::read`], and an input/output error if the file cannot be rewritten.
    pub fn resume_at(path: &Path, step: u64) -> Result<Self> {
        if !path.exists() {
            return MetricsLog::create(path);
        }
        let mut rows = MetricsLog::read(path)?;
        rows.retain(|row| row.step() <= step);
        write_atomically(path, |writer| {
            rows.iter().try_for_each(|row| writer.write_all(line(row)?.as_bytes()))
        })?;
        let file = OpenOptions::new().append(true).open(path).map_err(|e| Error::io("open", path, &e))?;
        Ok(MetricsLog { path: path.into(), file, rows })
    }

    /// The rows of the log at `path`, without a torn last line.
    ///
    /// # Errors
    /// An input/output error if the file cannot be read; a checkpoint error that names the line if
    /// one before the last is damaged.
    pub fn read(path: &Path) -> Result<Vec<Row>> {
        let bytes = fs::read(path).map_err(|e| Error::io("read", path, &e))?;
        let mut rows = Vec::new();
        let mut lines = bytes.split_inclusive(|&byte| byte == b'\n').enumerate().peekable();
        while let Some((index, text)) = lines.next() {
            match serde_json::from_slice(text) {
                Ok(row) if text.ends_with(b"\n") => rows.push(row),
                // The line break is written last: without it the line is torn even if it parses.
                Ok(_) => {}
                Err(_) if lines.peek().is_none() => {}
                Err(_) if text.trim_ascii().is_empty() => {}
                Err(error) => {
                    return Err(Error::checkpoint(format!(
                        "{}, line {}: not a row of metrics: {error}",
                        path.display(),
                        index + 1
                    ))
                    .hint("remove the damaged line and try again"));
                }
            }
        }
        Ok(rows)
    }

    /// Appends a row.
    ///
    /// # Errors
    /// An input/output error if it cannot be written.
    pub fn push(&mut self, row: Row) -> Result<()> {
        let written = line(&row).and_then(|line| self.file.write_all(line.as_bytes()));
        written.map_err(|e| Error::io("write", &self.path, &e))?;
        self.rows.push(row);
        Ok(())
    }

    /// All rows, oldest first.
    pub fn rows(&self) -> &[Row] {
        &self.rows
    }
}

/// A row as its line of the file.
fn line(row: &Row) -> io::Result<String> {
    Ok(serde_json::to_string(row)? + "\n")
}

/// JSON has no NaN: `serde_json` writes it as null.
fn null_as_nan<'de, D: Deserializer<'de>>(deserializer: D) -> std::result::Result<f64, D::Error> {
    Ok(Option::<f64>::deserialize(deserializer)?.unwrap_or(f64::NAN))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files::tests::Scratch;

    fn training(step: u64) -> Row {
        let loss = 4.0 - step as f64 / 100.0;
        Row::Training(TrainingRow {
            step,
            tokens: step * 4096,
            seconds: step as f64 * 0.25,
            loss,
            lr: 1e-3,
            grad_norm: 0.5,
            tokens_per_s: 16384.0,
        })
    }

    fn validation(step: u64) -> Row {
        Row::Validation(ValidationRow {
            step,
            tokens: step * 4096,
            seconds: step as f64 * 0.25,
            val_loss: 1.5,
            val_bits_per_byte: 2.16,
        })
    }

    #[test]
    fn rows_are_read_back() {
        let scratch = Scratch::new();
        let path = scratch.0.join("metrics.jsonl");
        let mut log = MetricsLog::create(&path).unwrap();
        for row in [training(10), validation(10), training(20)] {
            log.push(row).unwrap();
        }
        assert_eq!(MetricsLog::read(&path).unwrap(), log.rows());
        let text = fs::read_to_string(&path).unwrap();
        assert_eq!(
            text.lines().next().unwrap(),
            r#"{"step":10,"tokens":40960,"seconds":2.5,"loss":3.9,"lr":0.001,"grad_norm":0.5,"tokens_per_s":16384.0}"#
        );
        assert!(MetricsLog::create(&path).is_err(), "an existing log is not overwritten");
    }

    #[test]
    fn resuming_drops_later_rows_and_a_torn_line() {
        let scratch = Scratch::new();
        let path = scratch.0.join("metrics.jsonl");
        let mut log = MetricsLog::create(&path).unwrap();
        for row in [training(10), training(20), validation(20), training(30)] {
            log.push(row).unwrap();
        }
        drop(log);
        let torn = &line(&training(40)).unwrap();
        for end in [1, 20, torn.len() - 1] {
            let mut file = OpenOptions::new().append(true).open(&path).unwrap();
            file.write_all(&torn.as_bytes()[..end]).unwrap();
            let log = MetricsLog::resume_at(&path, 30).unwrap();
            assert_eq!(log.rows().len(), 4);
        }
        let mut log = MetricsLog::resume_at(&path, 20).unwrap();
        assert_eq!(log.rows(), [training(10), training(20), validation(20)]);
        log.push(training(30)).unwrap();
        assert_eq!(MetricsLog::read(&path).unwrap(), log.rows());
    }

    #[test]
    fn a_missing_log_starts_empty() {
        let scratch = Scratch::new();
        let log = MetricsLog::resume_at(&scratch.0.join("metrics.jsonl"), 5).unwrap();
        assert!(log.rows().is_empty());
    }

    #[test]
    fn a_damaged_line_in_the_middle_is_an_error() {
        let scratch = Scratch::new();
        let path = scratch.0.join("metrics.jsonl");
        fs::write(
            &path,
            format!("{}{{\"step\": 1\n{}", line(&training(1)).unwrap(), line(&training(2)).unwrap()),
        )
        .unwrap();
        let error = MetricsLog::read(&path).unwrap_err();
        assert!(error.to_string().contains("line 2"), "{error}");
    }

    #[test]
    fn a_loss_that_is_not_a_number_is_kept() {
        let scratch = Scratch::new();
        let path = scratch.0.join("metrics.jsonl");
        let mut log = MetricsLog::create(&path).unwrap();
        let Row::Training(row) = training(10) else { unreachable!() };
        log.push(Row::Training(TrainingRow { loss: f64::NAN, ..row })).unwrap();
        let rows = MetricsLog::read(&path).unwrap();
        assert!(matches!(rows[..], [Row::Training(row)] if row.loss.is_nan()));
    }
}
