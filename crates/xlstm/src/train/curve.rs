//! The loss curves of a run as an SVG picture.
//!
//! Training loss is drawn raw in a pale tone and smoothed above it, validation loss as dots
//! joined by a line.

use super::chart::{Axis, Frame, HEIGHT, SOFT_INK, Svg, WIDTH, finite};
use super::metrics::Row;

const TRAINING: &str = "#2f6fde";
const TRAINING_PALE: &str = "#bcd2f7";
const VALIDATION: &str = "#d9480f";

/// Raw training points beyond this are averaged in groups: more do not fit the width.
const MOST_POINTS: usize = 1200;

/// Loss curves: points of (step, loss in nats a token).
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Curve {
    /// The heading; any text.
    pub title: String,
    /// Training losses in order of steps; points that are not finite are left out.
    pub training: Vec<(f64, f64)>,
    /// Validation losses in order of steps; points that are not finite are left out.
    pub validation: Vec<(f64, f64)>,
}

impl Curve {
    /// The curves of a run's metrics.
    pub fn of_rows(title: impl Into<String>, rows: &[Row]) -> Self {
        let mut curve = Curve { title: title.into(), ..Curve::default() };
        for row in rows {
            match row {
                Row::Training(row) => curve.training.push((row.step as f64, row.loss)),
                Row::Validation(row) => curve.validation.push((row.step as f64, row.val_loss)),
            }
        }
        curve
    }

    /// The picture, an SVG document.
    pub fn to_svg(&self) -> String {
        let training = thin(&finite(&self.training));
        let validation = finite(&self.validation);
        let smooth = smoothed(&training);
        let x = Axis::between(0.0, training.iter().chain(&validation).map(|p| p.0).fold(0.0, f64::max));
        let y = losses(&training, &smooth, &validation);
        let place = |point: &(f64, f64)| Frame::PLAIN.place(&x, &y, *point);
        let places = |points: &[(f64, f64)]| points.iter().map(place).collect::<Vec<_>>();

        let mut svg = Svg::new(&self.title, Frame::PLAIN);
        svg.axes((&x, "steps"), (&y, "loss, nats a token"));
        svg.open_clip();
        svg.line(&places(&training), TRAINING_PALE, 1.0);
        svg.line(&places(&smooth), TRAINING, 2.0);
        svg.line(&places(&validation), VALIDATION, 1.6);
        if let [point] = smooth[..] {
            svg.dot(place(&point), TRAINING);
        }
        svg.close_clip();
        for point in &validation {
            svg.dot(place(point), VALIDATION);
        }
        let mut entries = Vec::new();
        if let Some((_, loss)) = smooth.last() {
            entries.push((format!("training, smoothed {loss:.3}"), TRAINING, false));
        }
        if let Some((_, loss)) = validation.last() {
            let best = validation.iter().map(|p| p.1).fold(f64::INFINITY, f64::min);
            let note = if best < *loss { format!(" (best {best:.3})") } else { String::new() };
            entries.push((format!("validation {loss:.3}{note}"), VALIDATION, true));
        }
        if entries.is_empty() {
            svg.text(WIDTH / 2.0, HEIGHT / 2.0, 14.0, SOFT_INK, "middle", "no losses yet");
        }
        svg.legend(&entries);
        svg.finish()
    }
}

/// At most [`MOST_POINTS`] points: the means of groups of neighbours.
fn thin(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let group = points.len().div_ceil(MOST_POINTS).max(1);
    let mean = |group: &[(f64, f64)]| {
        let count = group.len() as f64;
        (group.iter().map(|p| p.0).sum::<f64>() / count, group.iter().map(|p| p.1).sum::<f64>() / count)
    };
    points.chunks(group).map(mean).collect()
}

/// An exponential moving average over about a sixtieth of the points. Near the start, where losses
/// fall fast, it reaches back over fewer, or it would lag visibly behind.
fn smoothed(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let most = (points.len() as f64 / 60.0).max(2.0);
    let mut mean = 0.0;
    let average = |(index, &(step, loss)): (usize, &(f64, f64))| {
        let reach = (index as f64 / 5.0).min(most);
        mean += (loss - mean) / (1.0 + reach);
        (step, mean)
    };
    points.iter().enumerate().map(average).collect()
}

/// Around all losses, but a first few that tower over the rest do not squash them: the top is
/// a little above the start of the smooth curve.
fn losses(training: &[(f64, f64)], smooth: &[(f64, f64)], validation: &[(f64, f64)]) -> Axis {
    let low = training.iter().chain(validation).map(|p| p.1).fold(f64::INFINITY, f64::min);
    let top = smooth.iter().chain(validation).map(|p| p.1).fold(f64::NEG_INFINITY, f64::max);
    Axis::around(low, top)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A run that falls from 4.2 to about 1.3, with noise from a small generator.
    fn example() -> Curve {
        let mut seed = 1_u64;
        let mut noise = move || {
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (seed >> 33) as f64 / 2_f64.powi(31) - 0.5
        };
        let fall = |step: f64| 1.25 + 2.9 * (-step / 260.0).exp() + 0.25 * (-step / 2000.0).exp();
        let training =
            (1..=500).map(|i| f64::from(i) * 10.0).map(|s| (s, fall(s) + 0.12 * noise())).collect();
        let validation = (0..=20).map(|i| f64::from(i) * 250.0).map(|s| (s, fall(s) + 0.16)).collect();
        Curve { title: "shakespeare: 4 blocks, D = 128".into(), training, validation }
    }

    fn curve(training: &[(f64, f64)], validation: &[(f64, f64)]) -> String {
        let svg =
            Curve { title: "t".into(), training: training.into(), validation: validation.into() }.to_svg();
        assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
        svg
    }

    #[test]
    fn an_ordinary_run() {
        let svg = example().to_svg();
        assert_eq!(svg.matches("<circle").count(), 21 + 1, "21 validations and the legend's");
        assert!(svg.contains(">5,000</text>"), "the last step is marked");
        assert!(svg.len() < 40_000, "{} bytes", svg.len());
        // XLSTM_CURVE=/tmp/a.svg cargo test an_ordinary_run: to look at it.
        if let Some(path) = std::env::var_os("XLSTM_CURVE") {
            std::fs::write(path, svg).unwrap();
        }
    }

    #[test]
    fn odd_runs() {
        assert!(curve(&[], &[]).contains("no losses yet"));
        assert_eq!(curve(&[(1.0, 4.0)], &[]).matches("<circle").count(), 1);
        assert_eq!(curve(&[], &[(0.0, 4.0)]).matches("<circle").count(), 2);
        assert!(curve(&[(1.0, 2.0), (2.0, 2.0), (3.0, 2.0)], &[(3.0, 2.0)]).contains("<path"));
        curve(&[(1.0, 0.0), (2.0, 0.0)], &[]);
        let gaps = curve(&[(1.0, 3.0), (2.0, f64::NAN), (3.0, 2.0)], &[(2.0, f64::INFINITY)]);
        assert!(!gaps.contains("validation"));
    }

    #[test]
    fn many_points_stay_a_small_file() {
        let points: Vec<_> = (0..1_000_000).map(|i| (f64::from(i), 2.0)).collect();
        assert!(curve(&points, &[]).len() < 60_000);
    }
}
