//! The loss curves of a run as an SVG picture.
//!
//! Training loss is drawn raw in a pale tone and smoothed above it, validation loss as dots
//! joined by a line. The picture carries its own background and needs no fonts or scripts, so
//! it looks the same in a browser, on GitHub and in a dark page.

use std::fmt::Write;

use super::metrics::Row;

/// Size of the picture and of the margins around the plot, in pixels.
const WIDTH: f64 = 880.0;
const HEIGHT: f64 = 460.0;
const LEFT: f64 = 72.0;
const RIGHT: f64 = 28.0;
const TOP: f64 = 76.0;
const BOTTOM: f64 = 58.0;

const BACKGROUND: &str = "#ffffff";
const INK: &str = "#24292f";
const SOFT_INK: &str = "#656d76";
const GRID: &str = "#e7eaee";
const AXIS: &str = "#afb8c1";
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
        let x = Axis::steps(training.iter().chain(&validation).map(|p| p.0));
        let y = Axis::losses(&training, &smooth, &validation);
        let place = |&(step, loss): &(f64, f64)| {
            (
                LEFT + x.part(step) * (WIDTH - LEFT - RIGHT),
                HEIGHT - BOTTOM - y.part(loss) * (HEIGHT - TOP - BOTTOM),
            )
        };
        let places = |points: &[(f64, f64)]| points.iter().map(place).collect::<Vec<_>>();

        let mut svg = Svg::new(&self.title);
        svg.axes(&x, &y);
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

fn finite(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    points.iter().copied().filter(|(step, loss)| step.is_finite() && loss.is_finite()).collect()
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

/// A range of values with the marks on it.
struct Axis {
    low: f64,
    high: f64,
    ticks: Vec<f64>,
    step: f64,
}

impl Axis {
    /// From 0 to the last step.
    fn steps(steps: impl Iterator<Item = f64>) -> Self {
        let last = steps.fold(0.0, f64::max).max(1.0);
        let step = nice_step(last / 8.0).max(1.0);
        Axis { low: 0.0, high: last, ticks: ticks(0.0, last, step), step }
    }

    /// Around all losses, but a first few that tower over the rest do not squash them: the top is
    /// a little above the start of the smooth curve.
    fn losses(training: &[(f64, f64)], smooth: &[(f64, f64)], validation: &[(f64, f64)]) -> Self {
        let low = training.iter().chain(validation).map(|p| p.1).fold(f64::INFINITY, f64::min);
        let top = smooth.iter().chain(validation).map(|p| p.1).fold(f64::NEG_INFINITY, f64::max);
        if low > top {
            return Axis { low: 0.0, high: 1.0, ticks: ticks(0.0, 1.0, 0.2), step: 0.2 };
        }
        // Equal values get a range of their own size to lie in the middle of.
        let span = if top - low > 1e-9 * top.abs() { top - low } else { (top.abs() * 0.2).max(1e-3) };
        let step = nice_step(span * 1.1 / 6.0);
        let low = ((low - 0.04 * span) / step).floor() * step;
        let high = ((top + 0.04 * span) / step).ceil() * step;
        Axis { low, high, ticks: ticks(low, high, step), step }
    }

    /// Where `value` lies between the ends, 0 to 1.
    fn part(&self, value: f64) -> f64 {
        (value - self.low) / (self.high - self.low)
    }

    /// A mark's label, with the digits that tell it from its neighbours.
    fn label(&self, tick: f64) -> String {
        let digits = (-self.step.log10().floor()).clamp(0.0, 12.0) as usize;
        let text = format!("{tick:.digits$}");
        if digits == 0 { thousands(&text) } else { text }
    }
}

/// The smallest of 1, 2 and 5 times a power of ten that is at least `step`.
fn nice_step(step: f64) -> f64 {
    let power = 10_f64.powf(step.log10().floor());
    let factor = [1.0, 2.0, 5.0, 10.0].into_iter().find(|f| f * power >= step * (1.0 - 1e-9)).unwrap_or(10.0);
    factor * power
}

fn ticks(low: f64, high: f64, step: f64) -> Vec<f64> {
    let (first, last) = ((low / step - 1e-6).ceil() as i64, (high / step + 1e-6).floor() as i64);
    (first..=last).map(|k| k as f64 * step).collect()
}

/// `12345` as `12,345`.
fn thousands(digits: &str) -> String {
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) && digit.is_ascii_digit() {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// An SVG document in the making. Writing to a `String` cannot fail, hence the ignored results.
struct Svg(String);

impl Svg {
    fn new(title: &str) -> Self {
        let title = escaped(title);
        let mut svg = Svg(String::new());
        let _ = write!(
            svg.0,
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" width=\"{WIDTH}\" \
             height=\"{HEIGHT}\" role=\"img\" font-family=\"-apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', \
             'DejaVu Sans', Arial, sans-serif\">\n<title>{title}</title>\n<rect width=\"{WIDTH}\" height=\"{HEIGHT}\" \
             rx=\"8\" fill=\"{BACKGROUND}\"/>\n<text x=\"{LEFT}\" y=\"34\" font-size=\"17\" font-weight=\"600\" \
             fill=\"{INK}\">{title}</text>\n"
        );
        svg
    }

    fn axes(&mut self, x: &Axis, y: &Axis) {
        let (right, bottom) = (WIDTH - RIGHT, HEIGHT - BOTTOM);
        for &tick in &y.ticks {
            let at = bottom - y.part(tick) * (bottom - TOP);
            let _ = writeln!(
                self.0,
                "<path d=\"M{LEFT} {at:.1}H{right}\" stroke=\"{GRID}\" stroke-width=\"1\" fill=\"none\"/>"
            );
            self.text(LEFT - 10.0, at + 4.0, 12.0, SOFT_INK, "end", &y.label(tick));
        }
        let _ = writeln!(
            self.0,
            "<path d=\"M{LEFT} {bottom}H{right}\" stroke=\"{AXIS}\" stroke-width=\"1\" fill=\"none\"/>"
        );
        for &tick in &x.ticks {
            let at = LEFT + x.part(tick) * (right - LEFT);
            let _ = writeln!(
                self.0,
                "<path d=\"M{at:.1} {bottom}v5\" stroke=\"{AXIS}\" stroke-width=\"1\" fill=\"none\"/>"
            );
            self.text(at, bottom + 20.0, 12.0, SOFT_INK, "middle", &x.label(tick));
        }
        self.text((LEFT + right) / 2.0, HEIGHT - 14.0, 12.5, SOFT_INK, "middle", "steps");
        let middle = (TOP + bottom) / 2.0;
        let _ = writeln!(
            self.0,
            "<text transform=\"translate(20 {middle:.1}) rotate(-90)\" font-size=\"12.5\" text-anchor=\"middle\" \
             fill=\"{SOFT_INK}\">loss, nats a token</text>"
        );
    }

    /// What follows, up to `close_clip`, is cut at the plot's edges.
    fn open_clip(&mut self) {
        let (width, height) = (WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM);
        let _ = writeln!(
            self.0,
            "<clipPath id=\"plot\"><rect x=\"{LEFT}\" y=\"{TOP}\" width=\"{width}\" height=\"{height}\"/></clipPath>\n\
             <g clip-path=\"url(#plot)\">"
        );
    }

    fn close_clip(&mut self) {
        self.0.push_str("</g>\n");
    }

    fn line(&mut self, points: &[(f64, f64)], colour: &str, width: f64) {
        if points.len() < 2 {
            return;
        }
        self.0.push_str("<path d=\"");
        for (index, (x, y)) in points.iter().enumerate() {
            let _ = write!(self.0, "{}{x:.1} {y:.1}", if index == 0 { "M" } else { "L" });
        }
        let _ = writeln!(
            self.0,
            "\" stroke=\"{colour}\" stroke-width=\"{width}\" stroke-linejoin=\"round\" stroke-linecap=\"round\" \
             fill=\"none\"/>"
        );
    }

    fn dot(&mut self, (x, y): (f64, f64), colour: &str) {
        let _ = writeln!(
            self.0,
            "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3.6\" fill=\"{colour}\" stroke=\"{BACKGROUND}\" \
             stroke-width=\"1.4\"/>"
        );
    }

    /// One row below the title: a sample of each line with its name and last value.
    fn legend(&mut self, entries: &[(String, &str, bool)]) {
        let mut x = LEFT;
        for (text, colour, dotted) in entries {
            self.line(&[(x, 54.0), (x + 22.0, 54.0)], colour, 2.0);
            if *dotted {
                self.dot((x + 11.0, 54.0), colour);
            }
            self.text(x + 30.0, 58.0, 12.5, INK, "start", text);
            // Fonts differ; 7 pixels a character leave a gap with all the usual ones.
            x += 30.0 + 7.0 * text.chars().count() as f64 + 20.0;
        }
    }

    fn text(&mut self, x: f64, y: f64, size: f64, colour: &str, anchor: &str, text: &str) {
        let text = escaped(text);
        let _ = writeln!(
            self.0,
            "<text x=\"{x:.1}\" y=\"{y:.1}\" font-size=\"{size}\" text-anchor=\"{anchor}\" fill=\"{colour}\">{text}</text>"
        );
    }

    fn finish(mut self) -> String {
        self.0.push_str("</svg>\n");
        self.0
    }
}

/// `text` with what XML reserves, and control characters XML cannot hold, replaced.
fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            c if c.is_control() => out.push(' '),
            c => out.push(c),
        }
    }
    out
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

    #[test]
    fn steps_are_nice() {
        assert_eq!(
            (nice_step(0.13), nice_step(0.2), nice_step(3.1), nice_step(700.0)),
            (0.2, 0.2, 5.0, 1000.0)
        );
        assert_eq!(ticks(0.0, 1.0, 0.25).len(), 5);
        let axis = Axis { low: 0.0, high: 20000.0, ticks: vec![], step: 5000.0 };
        assert_eq!(axis.label(15000.0), "15,000");
        assert_eq!(thousands("100"), "100");
    }

    #[test]
    fn titles_are_escaped() {
        let svg = Curve { title: "<a & \"b\">\u{1}".into(), ..Curve::default() }.to_svg();
        assert!(svg.contains("&lt;a &amp; &quot;b&quot;&gt; </text>"));
    }
}
