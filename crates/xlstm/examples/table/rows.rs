//! The rows: what their folders hold.

use std::fs;
use std::path::Path;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use xlstm::train::{MetricsLog, TrainingRow, ValidationRow};

use super::Outcome;

/// A kind of model in the table.
pub struct Model {
    /// As `row.json` calls it.
    pub row: &'static str,
    /// Perplexity on WikiText-103 that the article gives for it, if any.
    pub article: Option<f64>,
    /// Whether it is one of this library's xLSTMs.
    pub xlstm: bool,
}

/// All kinds, in the table's order.
pub const MODELS: [Model; 7] = [
    Model { row: "lstm", article: Some(103.2), xlstm: false },
    Model { row: "transformer", article: Some(78.3), xlstm: false },
    Model { row: "slstm", article: Some(89.4), xlstm: true },
    Model { row: "mlstm", article: Some(82.7), xlstm: true },
    Model { row: "xlstm-7-1", article: None, xlstm: true },
    Model { row: "xlstm-large", article: None, xlstm: true },
    Model { row: "pyxlstm", article: None, xlstm: false },
];

/// `row.json`: what was run.
#[derive(Debug, Deserialize)]
pub struct Facts {
    pub row: String,
    pub title: String,
    pub seed: u64,
    pub budget_minutes: f64,
    pub card: Option<String>,
    pub date: Option<String>,
    pub commit: Option<String>,
    pub train_command: Option<String>,
    #[serde(default)]
    pub note: String,
}

/// What `xlstm eval --json` printed; a number that is none is null.
#[derive(Debug, Default, Deserialize)]
pub struct Score {
    pub token_perplexity: Option<f64>,
    pub word_perplexity: Option<f64>,
    pub bits_per_byte: Option<f64>,
    #[serde(default)]
    pub positions: Vec<Bucket>,
}

/// The score at positions `first` to `last`.
#[derive(Debug, Deserialize)]
pub struct Bucket {
    pub first: u64,
    pub last: u64,
    pub tokens: u64,
    pub token_perplexity: Option<f64>,
}

/// What a handful of tokens come to says nothing: positions with fewer are left out.
const FEWEST_TOKENS: u64 = 30;

/// A line of `generation.jsonl`: what drawing a token takes after so many.
#[derive(Debug, Deserialize)]
pub struct Generated {
    pub position: u64,
    pub ms: Option<f64>,
    pub state_mb: Option<f64>,
}

/// `pace.json`: what `xlstm bench train --json` printed of a trial.
#[derive(Debug, Default, Deserialize)]
struct Pace {
    params: Option<u64>,
    peak_memory_mb: Option<f64>,
}

/// A model trained for a budget from a seed.
#[derive(Debug)]
pub struct Row {
    /// The name of its folder.
    pub folder: String,
    pub facts: Facts,
    pub params: Option<u64>,
    pub training: Vec<TrainingRow>,
    pub validation: Vec<ValidationRow>,
    /// On its own test text.
    pub test: Score,
    /// On WikiText-103's without `<unk>`, and on all of it.
    pub wikitext: [Score; 2],
    pub positions: Vec<Bucket>,
    pub generation: Vec<Generated>,
    pub sample: Option<String>,
    pub peak_memory_mb: Option<f64>,
    /// The first line of what ended it.
    pub failure: Option<String>,
    order: usize,
}

impl Row {
    fn read(path: &Path) -> Outcome<Row> {
        let facts_path = path.join("row.json");
        let facts: Facts =
            json(&facts_path)?.ok_or_else(|| format!("{} is missing", facts_path.display()))?;
        let order = MODELS.iter().position(|model| model.row == facts.row).ok_or_else(|| {
            let known = MODELS.map(|model| model.row).join(", ");
            format!("{}: there is no row {:?}; there are {known}", facts_path.display(), facts.row)
        })?;
        let metrics = path.join("run/1/metrics.jsonl");
        let (mut training, mut validation) = (Vec::new(), Vec::new());
        if metrics.exists() {
            for row in MetricsLog::read(&metrics)? {
                match row {
                    xlstm::train::Row::Training(row) => training.push(row),
                    xlstm::train::Row::Validation(row) => validation.push(row),
                }
            }
        }
        let failure = text(&path.join("failure.txt"))?;
        let failure = failure.map(|text| text.trim().lines().next().unwrap_or("it failed").to_owned());
        // Of weights that came to nothing there is no score.
        let score = |name: &str| -> Outcome<Score> {
            Ok(if failure.is_some() { None } else { json(&path.join(name))? }.unwrap_or_default())
        };
        let pace: Pace = json(&path.join("pace.json"))?.unwrap_or_default();
        Ok(Row {
            folder: path.file_name().unwrap_or_default().to_string_lossy().into_owned(),
            order,
            params: pace.params,
            training,
            validation,
            test: score("test.json")?,
            wikitext: [score("wikitext.json")?, score("wikitext-all.json")?],
            positions: score("positions.json")?
                .positions
                .into_iter()
                .filter(|bucket| bucket.tokens >= FEWEST_TOKENS)
                .collect(),
            generation: json_lines(&path.join("generation.jsonl"))?,
            sample: text(&path.join("sample.txt"))?.filter(|sample| !sample.trim().is_empty()),
            peak_memory_mb: pace.peak_memory_mb,
            failure,
            facts,
        })
    }

    /// What kind of model it is.
    pub fn model(&self) -> &'static Model {
        &MODELS[self.order]
    }

    /// Minutes of training, as its last row of metrics has them.
    pub fn minutes(&self) -> Option<f64> {
        self.training.last().map(|row| row.seconds / 60.0)
    }

    /// Tokens learnt from.
    pub fn tokens(&self) -> Option<u64> {
        self.training.last().map(|row| row.tokens)
    }

    /// The median speed of its rows of metrics.
    pub fn tokens_per_s(&self) -> Option<f64> {
        let mut speeds: Vec<f64> =
            self.training.iter().map(|row| row.tokens_per_s).filter(|speed| speed.is_finite()).collect();
        speeds.sort_by(f64::total_cmp);
        let middle = speeds.len() / 2;
        match speeds.len() {
            0 => None,
            count if count % 2 == 1 => Some(speeds[middle]),
            _ => Some((speeds[middle - 1] + speeds[middle]) / 2.0),
        }
    }
}

/// The rows of all folders in `runs` that hold a `row.json`, in the table's order, by budget and seed.
pub fn read(runs: &Path) -> Outcome<Vec<Row>> {
    let entries = fs::read_dir(runs).map_err(|e| format!("cannot read {}: {e}", runs.display()))?;
    let mut rows = Vec::new();
    for entry in entries {
        let path = entry.map_err(|e| format!("cannot read {}: {e}", runs.display()))?.path();
        if path.join("row.json").exists() {
            rows.push(Row::read(&path)?);
        }
    }
    if rows.is_empty() {
        return Err(format!("{} holds no folder with a row.json", runs.display()).into());
    }
    rows.sort_by(|a, b| {
        let budget = a.facts.budget_minutes.total_cmp(&b.facts.budget_minutes);
        a.order.cmp(&b.order).then(budget).then(a.facts.seed.cmp(&b.facts.seed)).then(a.folder.cmp(&b.folder))
    });
    Ok(rows)
}

/// One row of each model: that of its largest budget, of several seeds the lowest.
pub fn shown(rows: &[Row]) -> Vec<&Row> {
    let mut shown: Vec<&Row> = Vec::new();
    for row in rows {
        match shown.last_mut() {
            Some(last) if last.order == row.order => {
                if row.facts.budget_minutes > last.facts.budget_minutes {
                    *last = row;
                }
            }
            _ => shown.push(row),
        }
    }
    shown
}

/// A file's text, if it is there.
pub fn text(path: &Path) -> Outcome<Option<String>> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(String::from_utf8_lossy(&bytes).into_owned())),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(format!("cannot read {}: {error}", path.display()).into()),
    }
}

fn json<T: DeserializeOwned>(path: &Path) -> Outcome<Option<T>> {
    let parse =
        |text: String| serde_json::from_str(&text).map_err(|e| format!("{}: {e}", path.display()).into());
    text(path)?.map(parse).transpose()
}

fn json_lines<T: DeserializeOwned>(path: &Path) -> Outcome<Vec<T>> {
    let text = text(path)?.unwrap_or_default();
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    let parse = |(index, line): (usize, &str)| {
        serde_json::from_str(line).map_err(|e| format!("{}, line {}: {e}", path.display(), index + 1).into())
    };
    lines.map(parse).collect()
}
