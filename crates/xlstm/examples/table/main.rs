//! The table of models trained for the same minutes: reads what `scripts/table.sh` left of each row and
//! writes the report with its pictures. A row may be in pieces; what it lacks is shown as `-`.
//!
//! `cargo run --release --example table -- RUNS OUT` reads the folders in RUNS and writes OUT.md, OUT.json,
//! OUT-tokens.svg, OUT-minutes.svg, OUT-positions.svg and OUT-generation.svg. With a third path, of a text
//! with the marks `<!-- TABLE -->` and `<!-- /TABLE -->`, it puts the short form of the table between them.

mod pictures;
mod report;
mod rows;
#[cfg(test)]
mod tests;

use std::fs;
use std::path::{Path, PathBuf};

/// What can fail, with a message that names the file.
type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

/// Writes the report of the rows in `runs` to files whose names begin with `out`.
fn write(runs: &Path, out: &Path) -> Outcome<()> {
    let rows = rows::read(runs)?;
    let protocol = rows::text(&runs.join("protocol.md"))?;
    let file = |ending: &str| {
        let mut name = out.as_os_str().to_owned();
        name.push(ending);
        PathBuf::from(name)
    };
    let save = |ending: &str, text: String| {
        let path = file(ending);
        fs::write(&path, text).map_err(|e| format!("cannot write {}: {e}", path.display()))
    };
    let name =
        out.file_name().ok_or("OUT has to end in a name, such as docs/results/table")?.to_string_lossy();
    let shown = rows::shown(&rows);
    for (ending, chart) in pictures::all(&shown) {
        save(&format!("-{ending}.svg"), chart.to_svg())?;
    }
    save(".json", report::json(&rows)?)?;
    save(".md", report::markdown(&rows, protocol.as_deref(), &name))?;
    Ok(())
}

/// What the short form of the table stands between.
const MARKS: [&str; 2] = ["<!-- TABLE -->", "<!-- /TABLE -->"];

/// Puts the short form of the table of `runs` between the marks of `text`.
fn insert(runs: &Path, text: &Path) -> Outcome<()> {
    let found = rows::text(text)?.ok_or_else(|| format!("{} is missing", text.display()))?;
    let [before, after] = MARKS.map(|mark| found.find(mark));
    let (Some(start), Some(end)) = (before.map(|place| place + MARKS[0].len()), after) else {
        return Err(format!("{}: expected the marks {} and {}", text.display(), MARKS[0], MARKS[1]).into());
    };
    let summary = report::summary(&rows::read(runs)?);
    let head = found.get(..start).unwrap_or_default();
    let tail = found.get(end.max(start)..).unwrap_or_default();
    fs::write(text, format!("{head}\n{summary}{tail}"))
        .map_err(|e| format!("cannot write {}: {e}", text.display()).into())
}

fn main() -> Outcome<()> {
    let arguments: Vec<PathBuf> = std::env::args_os().skip(1).map(PathBuf::from).collect();
    let (runs, out, text) = match &arguments[..] {
        [runs, out] => (runs, out, None),
        [runs, out, text] => (runs, out, Some(text)),
        _ => {
            return Err(
                "give the folder of the rows, the path of the report without its ending and, if wanted, \
                        a text for its short form"
                    .into(),
            );
        }
    };
    write(runs, out)?;
    text.map_or(Ok(()), |text| insert(runs, text))
}
