//! The report: the table in Markdown and in JSON.

use std::collections::BTreeSet;
use std::fmt::Write;

use serde::Serialize;

use super::Outcome;
use super::rows::{Row, shown};

/// Characters of a sample that are shown.
const SAMPLE: usize = 600;

/// What is not known.
const MISSING: &str = "-";

/// A row as JSON: null where something is missing.
#[derive(Serialize)]
struct Record<'a> {
    row: &'a str,
    model: &'a str,
    params: Option<u64>,
    seed: u64,
    budget_minutes: f64,
    minutes: Option<f64>,
    tokens: Option<u64>,
    test_token_perplexity: Option<f64>,
    test_bits_per_byte: Option<f64>,
    wikitext103_word_perplexity: Option<f64>,
    wikitext103_word_perplexity_with_unk: Option<f64>,
    tokens_per_s: Option<f64>,
    peak_memory_mb: Option<f64>,
    card: Option<&'a str>,
    commit: Option<&'a str>,
    date: Option<&'a str>,
    folder: &'a str,
    train_command: Option<&'a str>,
    failure: Option<&'a str>,
}

#[derive(Serialize)]
struct Table<'a> {
    rows: Vec<Record<'a>>,
}

impl Record<'_> {
    fn of(row: &Row) -> Record<'_> {
        let Row { folder, facts, params, test, wikitext, peak_memory_mb, failure, .. } = row;
        Record {
            row: &facts.row,
            model: &facts.title,
            params: *params,
            seed: facts.seed,
            budget_minutes: facts.budget_minutes,
            minutes: row.minutes(),
            tokens: row.tokens(),
            test_token_perplexity: test.token_perplexity,
            test_bits_per_byte: test.bits_per_byte,
            wikitext103_word_perplexity: wikitext[0].word_perplexity,
            wikitext103_word_perplexity_with_unk: wikitext[1].word_perplexity,
            tokens_per_s: row.tokens_per_s(),
            peak_memory_mb: *peak_memory_mb,
            card: facts.card.as_deref(),
            commit: facts.commit.as_deref(),
            date: facts.date.as_deref(),
            folder,
            train_command: facts.train_command.as_deref(),
            failure: failure.as_deref(),
        }
    }
}

/// All rows.
pub fn json(rows: &[Row]) -> Outcome<String> {
    Ok(serde_json::to_string_pretty(&Table { rows: rows.iter().map(Record::of).collect() })? + "\n")
}

/// The report; its pictures' names begin with `name`.
pub fn markdown(rows: &[Row], protocol: Option<&str>, name: &str) -> String {
    let shown = shown(rows);
    let mut text = String::from("# The table: models trained for the same minutes\n\n");
    if let Some(protocol) = protocol {
        text += &format!("{}\n\n", protocol.trim());
    }
    text += &main_table(&shown);
    text += &format!(
        "\n## Curves\n\n![Validation loss by tokens]({name}-tokens.svg)\n\n\
         ![Validation loss by minutes]({name}-minutes.svg)\n"
    );
    text += &format!(
        "\n## By position\n\nToken perplexity of the positions in a window.\n\n{}",
        positions(&shown)
    );
    text += &format!("\n![Perplexity by position]({name}-positions.svg)\n");
    text += &format!(
        "\n## Generation by position\n\nMilliseconds a generated token, and the memory of its session's state.\n\n{}",
        generation(&shown)
    );
    text += &format!("\n![Time of a generated token by position]({name}-generation.svg)\n");
    text += &seeds(rows);
    text += "\n## Samples\n";
    for row in &shown {
        text += &match &row.sample {
            Some(sample) => format!("\n**{}**\n\n{}", escaped(&row.facts.title), quoted(sample)),
            None => format!("\n**{}**: {MISSING}\n", escaped(&row.facts.title)),
        };
    }
    text += "\n## Commands\n\nEach row's folder, and how it was trained.\n\n```console\n";
    for row in rows {
        let Row { folder, facts, .. } = row;
        let note = if facts.note.is_empty() { String::new() } else { format!(": {}", facts.note) };
        let command = facts.train_command.as_deref().unwrap_or(MISSING);
        let _ = writeln!(text, "# {folder}{note}\n{command}");
    }
    text + "```\n\n## Where the figures come from\n\n\
            Minutes and tokens: the last training row of the folder's `run/1/metrics.jsonl`; tokens/s: the median of \
            its training rows; losses of the curves: its validation rows. Test perplexity and bits a byte: \
            `test.json`; words of WikiText-103: `wikitext.json`, with `<unk>` `wikitext-all.json`; positions: `positions.json`, all printed by \
            `xlstm eval --json`. Generation: `generation.jsonl`; parameters and memory: `pace.json`. \
            Of each model the row of the largest budget is shown, of several seeds the lowest; all rows are in the \
            JSON file beside this one. `-` is what was not measured.\n"
}

/// Columns of the main table before those of WikiText-103.
const WIKITEXT: usize = 6;

fn main_table(rows: &[&Row]) -> String {
    let perplexity = |row: &&&Row| row.test.token_perplexity.filter(|_| row.model().xlstm);
    let best = rows.iter().filter(|row| perplexity(row).is_some());
    let best =
        best.min_by(|a, b| perplexity(a).unwrap_or(f64::NAN).total_cmp(&perplexity(b).unwrap_or(f64::NAN)));
    // The article's figures are of WikiText-103: where nothing was scored on it they say nothing.
    let scored = rows.iter().any(|row| row.wikitext.iter().any(|score| score.word_perplexity.is_some()));
    let mut heads = vec![
        "model",
        "parameters, M",
        "minutes",
        "tokens, M",
        "test token perplexity",
        "bits a byte",
        "tokens/s",
        "peak memory, MB",
        "card",
        "commit",
    ];
    if scored {
        heads.splice(WIKITEXT..WIKITEXT, ["WikiText-103 word perplexity", "with `<unk>`", "the article's"]);
    }
    let mut text = table_head(&heads);
    for row in rows {
        let Row { facts, params, test, wikitext, peak_memory_mb, failure, .. } = row;
        let shown = failure.as_deref().map_or_else(|| number(test.token_perplexity, 2), escaped);
        let mut cells = vec![
            escaped(&facts.title),
            number(params.map(|count| count as f64 / 1e6), 1),
            number(row.minutes(), 2),
            number(row.tokens().map(|count| count as f64 / 1e6), 1),
            shown,
            number(test.bits_per_byte, 4),
            number(row.tokens_per_s(), 0),
            number(*peak_memory_mb, 0),
            facts.card.as_deref().map_or_else(|| MISSING.into(), escaped),
            facts.commit.as_deref().map_or_else(|| MISSING.into(), escaped),
        ];
        if scored {
            let [without, whole] = wikitext.each_ref().map(|score| number(score.word_perplexity, 2));
            cells.splice(WIKITEXT..WIKITEXT, [without, whole, number(row.model().article, 1)]);
        }
        if best.is_some_and(|best| std::ptr::eq(*best, *row)) {
            cells.iter_mut().filter(|cell| *cell != MISSING).for_each(|cell| *cell = format!("**{cell}**"));
        }
        text += &line(&cells);
    }
    text
}

/// What a reader in a hurry wants of it: the scores, and what stays flat as a text grows. Failed rows have neither.
pub fn summary(rows: &[Row]) -> String {
    let shown: Vec<&Row> = shown(rows).into_iter().filter(|row| row.failure.is_none()).collect();
    let far = shown.iter().flat_map(|row| &row.positions).max_by_key(|bucket| bucket.first);
    let late = shown.iter().flat_map(|row| &row.generation).map(|line| line.position).max();
    let place = |place: Option<u64>| number(place.map(|place| place as f64), 0);
    let [first, last] = [far.map(|bucket| bucket.first), far.map(|bucket| bucket.last)];
    let mut text = table_head(&[
        "model",
        "tokens seen, M",
        "test token perplexity",
        &format!("at positions {} to {}", place(first), place(last)),
        "WikiText-103 word perplexity",
        "with `<unk>`",
        "the article's, after hours",
        &format!("ms a token at {}", place(late)),
    ]);
    for row in shown {
        let at = row.positions.iter().find(|bucket| Some(bucket.first) == first);
        let time = row.generation.iter().find(|line| Some(line.position) == late);
        let [without, whole] = row.wikitext.each_ref().map(|score| number(score.word_perplexity, 1));
        text += &line(&[
            escaped(&row.facts.title),
            number(row.tokens().map(|count| count as f64 / 1e6), 0),
            number(row.test.token_perplexity, 1),
            number(at.and_then(|bucket| bucket.token_perplexity), 1),
            without,
            whole,
            number(row.model().article, 1),
            number(time.and_then(|line| line.ms), 2),
        ]);
    }
    text
}

fn positions(rows: &[&Row]) -> String {
    let firsts: BTreeSet<(u64, u64)> =
        rows.iter().flat_map(|row| row.positions.iter().map(|bucket| (bucket.first, bucket.last))).collect();
    by_position("positions", rows, firsts, |row, place| {
        let bucket = row.positions.iter().find(|bucket| (bucket.first, bucket.last) == place);
        let perplexity = bucket.and_then(|bucket| bucket.token_perplexity);
        number(perplexity, if perplexity.is_some_and(|value| value >= 1000.0) { 0 } else { 1 })
    })
}

fn generation(rows: &[&Row]) -> String {
    let places = rows.iter().flat_map(|row| row.generation.iter().map(|line| (line.position, line.position)));
    by_position("position", rows, places.collect(), |row, (position, _)| {
        let Some(line) = row.generation.iter().find(|line| line.position == position) else {
            return MISSING.into();
        };
        format!("{} ms, {} MB", number(line.ms, 3), number(line.state_mb, 2))
    })
}

/// A line for each range of positions, a column for each row.
fn by_position(
    title: &str,
    rows: &[&Row],
    places: BTreeSet<(u64, u64)>,
    cell: impl Fn(&Row, (u64, u64)) -> String,
) -> String {
    if places.is_empty() {
        return format!("{MISSING}\n");
    }
    let heads: Vec<String> =
        [title.to_owned()].into_iter().chain(rows.iter().map(|row| escaped(&row.facts.title))).collect();
    let mut text = table_head(&heads);
    for (first, last) in places {
        let [low, high] = [first, last].map(|place| number(Some(place as f64), 0));
        let range = if first == last { low } else { format!("{low} to {high}") };
        let cells: Vec<String> =
            [range].into_iter().chain(rows.iter().map(|row| cell(row, (first, last)))).collect();
        text += &line(&cells);
    }
    text
}

/// Rows of a model and a budget, of several seeds.
struct Seeds<'a> {
    title: &'a str,
    perplexity: Spread,
    bits: Spread,
}

/// Mean, lowest, highest and deviation (of the sample) of some numbers.
struct Spread {
    count: usize,
    mean: f64,
    low: f64,
    high: f64,
    deviation: f64,
}

impl Spread {
    fn of(numbers: &[f64]) -> Spread {
        let count = numbers.len();
        let mean = numbers.iter().sum::<f64>() / count as f64;
        let squares: f64 = numbers.iter().map(|number| (number - mean).powi(2)).sum();
        Spread {
            count,
            mean,
            low: numbers.iter().copied().fold(f64::INFINITY, f64::min),
            high: numbers.iter().copied().fold(f64::NEG_INFINITY, f64::max),
            deviation: (squares / (count as f64 - 1.0)).sqrt(),
        }
    }
}

/// For each budget with several seeds of a model, how far these are apart.
fn seeds(rows: &[Row]) -> String {
    let mut budgets: Vec<f64> = rows.iter().map(|row| row.facts.budget_minutes).collect();
    budgets.sort_by(f64::total_cmp);
    budgets.dedup();
    let mut text = String::new();
    for budget in budgets {
        let of_budget: Vec<&Row> = rows.iter().filter(|row| row.facts.budget_minutes == budget).collect();
        let mut all: Vec<Seeds> = of_budget
            .chunk_by(|a, b| a.facts.row == b.facts.row)
            .filter_map(|rows| {
                let scores = rows.iter().map(|row| row.test.token_perplexity.zip(row.test.bits_per_byte));
                let (perplexities, bits): (Vec<f64>, Vec<f64>) = scores.flatten().unzip();
                (perplexities.len() > 1).then(|| Seeds {
                    title: &rows[0].facts.title,
                    perplexity: Spread::of(&perplexities),
                    bits: Spread::of(&bits),
                })
            })
            .collect();
        if all.is_empty() {
            continue;
        }
        all.sort_by(|a, b| a.perplexity.mean.total_cmp(&b.perplexity.mean));
        let unit = if budget == 1.0 { "minute" } else { "minutes" };
        text += &format!("\n### {budget} {unit}\n\n");
        text += &table_head(&[
            "model",
            "seeds",
            "test token perplexity, mean",
            "lowest",
            "highest",
            "deviation",
            "bits a byte, mean",
            "lowest",
            "highest",
            "deviation",
        ]);
        for Seeds { title, perplexity, bits } in all {
            let mut cells = vec![escaped(title), perplexity.count.to_string()];
            for (spread, digits) in [(perplexity, 2), (bits, 4)] {
                let Spread { mean, low, high, deviation, .. } = spread;
                cells.extend([mean, low, high, deviation].map(|value| number(Some(value), digits)));
            }
            text += &line(&cells);
        }
    }
    let none = if text.is_empty() { format!("\n{MISSING}\n") } else { text };
    format!("\n## Seeds\n\nModels of several seeds at one budget, in the order of their means.\n{none}")
}

/// The names of columns; all but the first are of numbers.
fn table_head(heads: &[impl AsRef<str>]) -> String {
    let heads: Vec<String> = heads.iter().map(|head| head.as_ref().to_owned()).collect();
    line(&heads) + "|---|" + &"--:|".repeat(heads.len() - 1) + "\n"
}

fn line(cells: &[String]) -> String {
    format!("| {} |\n", cells.join(" | "))
}

/// With so many digits, and commas between thousands.
fn number(value: Option<f64>, digits: usize) -> String {
    let Some(value) = value.filter(|value| value.is_finite()) else { return MISSING.into() };
    let text = format!("{value:.digits$}");
    let (whole, rest) = text.split_at(text.find('.').unwrap_or(text.len()));
    let mut grouped = String::new();
    for (index, digit) in whole.chars().enumerate() {
        if index > 0
            && digit.is_ascii_digit()
            && (whole.len() - index).is_multiple_of(3)
            && !grouped.ends_with('-')
        {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    grouped + rest
}

/// A sample's beginning, cut at a word, as a quoted block.
fn quoted(sample: &str) -> String {
    let sample = sample.trim();
    let mut shown: String = sample.chars().take(SAMPLE).collect();
    if shown.len() < sample.len() {
        let end = shown.rfind(char::is_whitespace).unwrap_or(shown.len());
        shown.truncate(end);
        shown = shown.trim_end().to_owned() + " …";
    }
    let lines = shown.lines().map(|line| format!("> {}", escaped(line)).trim_end().to_owned() + "\n");
    lines.collect()
}

/// Text as Markdown shows it, whatever it holds.
fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if "\\`*_{}[]<>#|&".contains(c) {
            out.push('\\');
        }
        out.push(c);
    }
    out
}
