//! A folder of rows, whole, in pieces and failed, and the report of it.

use std::fs;
use std::path::{Path, PathBuf};

use super::{insert, write};

/// A folder that is removed at the end.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Folder {
        let path = std::env::temp_dir().join(format!("xlstm-table-{}-{name}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Folder(path)
    }

    fn write(&self, path: &str, text: &str) {
        let path = self.0.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    fn text(&self, path: &str) -> String {
        let path = self.0.join(path);
        fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
    }

    /// A row with nothing but what was run.
    fn row(&self, [row, title]: [&str; 2], seed: u64, minutes: f64) -> String {
        let folder = format!("runs/{row}-s{seed}-{minutes}min");
        let facts = format!(
            r#"{{"row": "{row}", "title": "{title}", "seed": {seed}, "budget_minutes": {minutes},
            "card": "a card", "date": "2026-11-27", "commit": "abc1234", "train_command": "xlstm train {row}.yaml"}}"#
        );
        self.write(&format!("{folder}/row.json"), &facts);
        folder
    }

    /// A row with everything.
    fn whole(&self, names: [&str; 2], seed: u64, minutes: f64, [perplexity, bits]: [f64; 2]) {
        let folder = self.row(names, seed, minutes);
        let training = |tokens: u64, seconds: f64, speed: f64| {
            format!(
                r#"{{"step":1,"tokens":{tokens},"seconds":{seconds},"loss":4.0,"lr":0.1,"grad_norm":1.0,"tokens_per_s":{speed}}}"#
            )
        };
        let validation = |tokens: u64, seconds: f64, loss: f64| {
            format!(
                r#"{{"step":1,"tokens":{tokens},"seconds":{seconds},"val_loss":{loss},"val_bits_per_byte":1.5}}"#
            )
        };
        let metrics = [
            training(4_000_000, 30.0, 150_000.0),
            validation(4_000_000, 30.0, 5.5),
            training(12_500_000, 90.0, 1_250_000.0),
            training(25_250_000, 291.0, 100.0),
            validation(25_250_000, 291.0, perplexity.ln()),
        ];
        self.write(&format!("{folder}/run/1/metrics.jsonl"), &(metrics.join("\n") + "\n"));
        let score = |token: f64, word: f64| {
            format!(
                r#"{{"loss":1.0,"token_perplexity":{token},"word_perplexity":{word},"bits_per_byte":{bits},"tokens":9,"words":9,"bytes":9,
                "positions":[{{"first":1,"last":1,"tokens":30,"loss":1.0,"token_perplexity":900.25}},
                {{"first":8192,"last":16383,"tokens":31,"loss":1.0,"token_perplexity":{token}}},
                {{"first":16384,"last":32767,"tokens":29,"loss":1.0,"token_perplexity":666.5}}]}}"#
            )
        };
        self.write(&format!("{folder}/test.json"), &score(perplexity, 7777.0));
        self.write(&format!("{folder}/wikitext.json"), &score(8888.0, 2.0 * perplexity));
        self.write(&format!("{folder}/wikitext-all.json"), &score(9999.0, 3.0 * perplexity));
        self.write(&format!("{folder}/positions.json"), &score(1234.5, 1.0));
        self.write(
            &format!("{folder}/sample.txt"),
            &format!("= {} <unk> =\n{}", names[1], "word ".repeat(300)),
        );
        self.write(
            &format!("{folder}/pace.json"),
            r#"{"preset": "x.yaml", "params": 46900000, "peak_memory_mb": 12345.6}"#,
        );
        let lines = r#"{"position":1024,"ms":0.9,"state_mb":12.3}"#.to_owned()
            + "\n"
            + r#"{"position":16384,"ms":1.8,"state_mb":null}"#
            + "\n";
        self.write(&format!("{folder}/generation.jsonl"), &lines);
    }

    fn report(&self) -> (String, serde_json::Value) {
        write(&self.0.join("runs"), &self.0.join("table")).unwrap();
        (self.text("table.md"), serde_json::from_str(&self.text("table.json")).unwrap())
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).unwrap();
    }
}

/// The cells of the only line of the first table that begins with `title`.
fn cells<'a>(text: &'a str, title: &str) -> Vec<&'a str> {
    let table = text.split("\n## ").next().unwrap();
    let start = format!("| {title} |");
    let lines: Vec<&str> = table.lines().filter(|line| line.starts_with(&start)).collect();
    assert_eq!(lines.len(), 1, "{title}: {text}");
    lines[0].trim_matches('|').split('|').map(str::trim).collect()
}

#[test]
fn the_short_form_stands_between_its_marks() {
    let folder = Folder::new("short");
    folder.whole(["mlstm", "mLSTM"], 1, 5.0, [40.5, 1.25]);
    folder.row(["slstm", "sLSTM"], 1, 5.0);
    let failed = folder.row(["pyxlstm", "PyxLSTM's cells"], 1, 5.0);
    folder.write(&format!("{failed}/failure.txt"), "not finite\n");
    folder.write("text.md", "before\n<!-- TABLE -->\nold\n<!-- /TABLE -->\nafter\n");
    for _ in 0..2 {
        insert(&folder.0.join("runs"), &folder.0.join("text.md")).unwrap();
        let text = folder.text("text.md");
        assert!(text.starts_with("before\n<!-- TABLE -->\n| model |"), "{text}");
        assert!(text.ends_with("|\n<!-- /TABLE -->\nafter\n") && !text.contains("old"), "{text}");
        assert!(
            text.contains("at positions 8,192 to 16,383 |") && text.contains("ms a token at 16,384 |"),
            "{text}"
        );
        let want = ["mLSTM", "25", "40.5", "1,234.5", "81.0", "121.5", "82.7", "1.80"];
        assert_eq!(cells(&text, "mLSTM"), want);
        assert_eq!(cells(&text, "sLSTM"), ["sLSTM", "-", "-", "-", "-", "-", "89.4", "-"]);
        assert!(!text.contains("PyxLSTM"), "{text}");
    }
    folder.write("text.md", "no marks\n");
    let error = insert(&folder.0.join("runs"), &folder.0.join("text.md")).unwrap_err().to_string();
    assert!(error.contains("<!-- TABLE -->"), "{error}");
}

#[test]
fn figures_are_those_of_the_files() {
    let folder = Folder::new("figures");
    folder.whole(["mlstm", "mLSTM"], 1, 5.0, [40.5, 1.25]);
    folder.whole(["transformer", "Transformer"], 1, 5.0, [39.0, 1.2]);
    folder.row(["slstm", "sLSTM"], 1, 5.0);
    let failed = folder.row(["pyxlstm", "PyxLSTM's cells"], 1, 5.0);
    folder.write(&format!("{failed}/failure.txt"), "not finite at step 7\nmore of it\n");
    folder.write(&format!("{failed}/test.json"), r#"{"token_perplexity": 3.0, "bits_per_byte": 0.5}"#);
    folder.write("runs/protocol.md", "All rows *alike*.\n");
    let (text, json) = folder.report();
    assert!(text.contains("\n\nAll rows *alike*.\n\n"), "{text}");
    let article = |mut cells: Vec<String>, figure: &str| {
        cells[8] = figure.into();
        cells
    };
    let whole = [
        "46.9", "4.85", "25.2", "39.00", "1.2000", "78.00", "117.00", "78.3", "150,000", "12,346", "a card",
        "abc1234",
    ];
    assert_eq!(cells(&text, "Transformer")[1..], whole);
    let bold: Vec<String> = [
        "mLSTM", "46.9", "4.85", "25.2", "40.50", "1.2500", "81.00", "121.50", "", "150,000", "12,346",
        "a card", "abc1234",
    ]
    .map(|cell| format!("**{cell}**"))
    .into();
    assert_eq!(cells(&text, "**mLSTM**"), article(bold, "**82.7**"), "the best xLSTM is bold");
    assert_eq!(
        cells(&text, "sLSTM")[1..],
        ["-", "-", "-", "-", "-", "-", "-", "89.4", "-", "-", "a card", "abc1234"]
    );
    let failed = cells(&text, "PyxLSTM's cells");
    assert_eq!(
        failed[1..],
        ["-", "-", "-", "not finite at step 7", "-", "-", "-", "-", "-", "-", "a card", "abc1234"]
    );
    assert!(!text.contains("more of it"));
    let place = |title: &str| text.find(title).unwrap();
    assert!(place("| Transformer |") < place("| sLSTM |") && place("| sLSTM |") < place("| **mLSTM** |"));
    // Columns: Transformer, sLSTM, mLSTM, PyxLSTM's.
    assert!(text.contains("| 1 | 900.2 | - | 900.2 | - |"), "{text}");
    assert!(text.contains("| 8,192 to 16,383 | 1,234 | - | 1,234 | - |"), "{text}");
    assert!(text.contains("| 1,024 | 0.900 ms, 12.30 MB | - | 0.900 ms, 12.30 MB | - |"), "{text}");
    assert!(text.contains("| 16,384 | 1.800 ms, - MB | - |"), "{text}");
    assert!(text.contains("# mlstm-s1-5min\nxlstm train mlstm.yaml\n"));
    let sample: Vec<&str> = text.lines().filter(|line| line.starts_with("> ")).collect();
    assert_eq!(sample.len(), 4, "two lines of each of two samples");
    assert_eq!(sample[0], "> = Transformer \\<unk\\> =");
    assert!(sample[1].ends_with("word …") && sample[1].chars().count() < 600);

    let rows = json["rows"].as_array().unwrap();
    let names: Vec<_> = rows.iter().map(|row| row["model"].as_str().unwrap()).collect();
    assert_eq!(names, ["Transformer", "sLSTM", "mLSTM", "PyxLSTM's cells"]);
    assert_eq!(rows[2]["tokens"], 25_250_000);
    assert_eq!(rows[2]["params"], 46_900_000);
    for (key, value) in [
        ("minutes", 4.85),
        ("test_token_perplexity", 40.5),
        ("test_bits_per_byte", 1.25),
        ("wikitext103_word_perplexity", 81.0),
        ("wikitext103_word_perplexity_with_unk", 121.5),
        ("tokens_per_s", 150_000.0),
        ("peak_memory_mb", 12345.6),
    ] {
        assert_eq!(rows[2][key], value, "{key}");
        assert!(rows[1][key].is_null() && rows[1].as_object().unwrap().contains_key(key), "{key}");
        assert!(rows[3][key].is_null(), "a row that failed has no {key}");
    }
    assert_eq!((&rows[3]["failure"], &rows[2]["card"]), (&"not finite at step 7".into(), &"a card".into()));
    for (picture, circles) in [("tokens", 6), ("minutes", 6), ("positions", 6), ("generation", 6)] {
        let svg = folder.text(&format!("table-{picture}.svg"));
        assert_eq!(svg.matches("<circle").count(), circles, "{picture}: of two lines and the legend");
        assert!(text.contains(&format!("(table-{picture}.svg)")) && svg.contains(">Transformer</text>"));
    }
}

#[test]
fn seeds_have_a_spread() {
    let folder = Folder::new("seeds");
    let (lstm, large) = (["lstm", "LSTM"], ["xlstm-large", "xLSTMLarge"]);
    for (seed, perplexity) in [(1, 60.0), (2, 63.0), (3, 66.0)] {
        folder.whole(lstm, seed, 1.0, [perplexity, 1.5]);
        folder.whole(large, seed, 1.0, [perplexity - 10.0, 1.4]);
    }
    folder.whole(lstm, 1, 5.0, [50.0, 1.3]);
    let (text, json) = folder.report();
    assert_eq!(cells(&text, "LSTM")[8], "103.2");
    let shown = folder.0.join("runs/lstm-s1-5min");
    fs::remove_file(shown.join("wikitext.json")).unwrap();
    fs::remove_file(shown.join("wikitext-all.json")).unwrap();
    for seed in 1..=3 {
        for file in ["wikitext.json", "wikitext-all.json"] {
            fs::remove_file(folder.0.join(format!("runs/xlstm-large-s{seed}-1min/{file}"))).unwrap();
        }
    }
    let without = folder.report().0;
    assert_eq!(cells(&without, "LSTM")[6], "150,000", "no column of what nobody was scored on");
    assert_eq!(json["rows"].as_array().unwrap().len(), 7);
    assert_eq!(cells(&text, "LSTM")[4], "50.00", "the largest budget is in the table");
    let seeds = text.split("\n## Seeds\n").nth(1).unwrap();
    let first = "| xLSTMLarge | 3 | 53.00 | 50.00 | 56.00 | 3.00 | 1.4000 | 1.4000 | 1.4000 | 0.0000 |\n";
    let second = "| LSTM | 3 | 63.00 | 60.00 | 66.00 | 3.00 | 1.5000 | 1.5000 | 1.5000 | 0.0000 |\n";
    assert!(seeds.contains(&format!("{first}{second}")), "in the order of the means: {seeds}");
    assert!(seeds.contains("### 1 minute\n") && !seeds.contains("### 5 minutes"));
}

#[test]
fn what_cannot_be_read_is_named() {
    let folder = Folder::new("errors");
    let fails = |part: &str| {
        let error = write(&folder.0.join("runs"), &folder.0.join("table")).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    };
    fails("runs");
    fs::create_dir(folder.0.join("runs")).unwrap();
    fails("row.json");
    let row = folder.row(["lstm", "LSTM"], 1, 1.0);
    folder.write(&format!("{row}/generation.jsonl"), "{\"position\": 1, \"ms\": 1}\nno\n");
    fails("generation.jsonl, line 2");
    folder.write(&format!("{row}/generation.jsonl"), "");
    assert!(write(&folder.0.join("runs"), Path::new("/")).is_err());
    folder.row(["gru", "GRU"], 1, 1.0);
    fails("there is no row \"gru\"");
}
