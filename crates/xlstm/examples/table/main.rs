//! The table of models trained for the same minutes: reads what `scripts/table.sh` left of each row and
//! writes the report with its pictures. A row may be in pieces; what it lacks is shown as `-`.
//!
//! `cargo run --release --example table -- RUNS OUT` reads the folders in RUNS and writes OUT.md, OUT.json,
//! OUT-tokens.svg, OUT-minutes.svg, OUT-positions.svg and OUT-generation.svg.

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

fn main() -> Outcome<()> {
    let arguments: Vec<PathBuf> = std::env::args_os().skip(1).map(PathBuf::from).collect();
    let [runs, out] = &arguments[..] else {
        return Err("give the folder of the rows and the path of the report without its ending".into());
    };
    write(runs, out)
}
