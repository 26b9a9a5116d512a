//! The pictures: a line a model.

use xlstm::train::{Chart, Line, Scale};

use super::rows::Row;

/// Nats above the lowest validation loss at which the pictures of losses end.
const NATS_SHOWN: f64 = 2.0;

/// Each picture with the end of its name.
pub fn all(rows: &[&Row]) -> Vec<(&'static str, Chart)> {
    let losses = |title: &str, x: &str, x_of: fn(&xlstm::train::ValidationRow) -> f64| {
        let lines = lines(rows, |row| row.validation.iter().map(|row| (x_of(row), row.val_loss)).collect());
        let lowest = lines.iter().flat_map(|line| &line.points).map(|point| point.1).fold(f64::NAN, f64::min);
        let top = lowest.is_finite().then_some(lowest + NATS_SHOWN);
        let labels = [x.into(), "validation loss, nats a token".into()];
        Chart { title: title.into(), labels, top, dotted: true, lines, ..Chart::default() }
    };
    let by_position = |title: &str, y: &str, lines: Vec<Line>| Chart {
        title: title.into(),
        labels: ["position, tokens".into(), y.into()],
        scales: [Scale::Logarithmic; 2],
        dotted: true,
        lines,
        ..Chart::default()
    };
    let positions = lines(rows, |row| {
        // In the middle of its positions, as the axis has it.
        let middle = |first: u64, last: u64| (first as f64 * last as f64).sqrt();
        let perplexities = row.positions.iter().map(|b| (middle(b.first, b.last), b.token_perplexity));
        perplexities.filter_map(|(x, y)| Some((x, y?))).collect()
    });
    let generation = lines(rows, |row| {
        row.generation.iter().filter_map(|line| Some((line.position as f64, line.ms?))).collect()
    });
    vec![
        ("tokens", losses("Validation loss by tokens", "tokens, millions", |row| row.tokens as f64 / 1e6)),
        ("minutes", losses("Validation loss by minutes", "minutes of training", |row| row.seconds / 60.0)),
        ("positions", by_position("Perplexity by position", "token perplexity", positions)),
        (
            "generation",
            by_position("Time of a generated token by position", "milliseconds a token", generation),
        ),
    ]
}

/// A line of each row: a row without points has one, too, so that a model's colour is that of all pictures.
fn lines(rows: &[&Row], points: impl Fn(&Row) -> Vec<(f64, f64)>) -> Vec<Line> {
    rows.iter().map(|row| Line { name: row.facts.title.clone(), points: points(row) }).collect()
}
