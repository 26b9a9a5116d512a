//! Lines over numbers as an SVG picture.
//!
//! The picture carries its own background and needs no fonts or scripts, so it looks the same in
//! a browser, on GitHub and in a dark page.

use std::fmt::Write;

/// Size of the picture and of the margins around the plot, in pixels.
pub(super) const WIDTH: f64 = 880.0;
pub(super) const HEIGHT: f64 = 460.0;
pub(super) const LEFT: f64 = 72.0;
pub(super) const RIGHT: f64 = 28.0;
pub(super) const TOP: f64 = 76.0;
pub(super) const BOTTOM: f64 = 58.0;

pub(super) const BACKGROUND: &str = "#ffffff";
pub(super) const INK: &str = "#24292f";
pub(super) const SOFT_INK: &str = "#656d76";
pub(super) const GRID: &str = "#e7eaee";
pub(super) const AXIS: &str = "#afb8c1";
/// The colours of a chart's lines, in their order; more lines begin again.
const COLOURS: [&str; 4] = ["#24292f", "#2f6fde", "#d9480f", "#1a7f37"];

/// A named line through points (x, y).
#[derive(Debug, Clone, PartialEq)]
pub struct Line {
    /// What the legend calls it.
    pub name: String,
    /// In the order in which they are joined; those that are not finite are left out.
    pub points: Vec<(f64, f64)>,
}

/// Lines in one plot.
#[derive(Debug, Clone, PartialEq)]
pub struct Chart {
    /// The heading; any text.
    pub title: String,
    /// What x and y are.
    pub labels: [String; 2],
    /// The lines, the first at the back.
    pub lines: Vec<Line>,
}

impl Chart {
    /// The picture, an SVG document.
    pub fn to_svg(&self) -> String {
        let lines: Vec<Vec<(f64, f64)>> = self.lines.iter().map(|line| finite(&line.points)).collect();
        let range = |of: fn(&(f64, f64)) -> f64| {
            let all = || lines.iter().flatten().map(of);
            (all().fold(f64::INFINITY, f64::min), all().fold(f64::NEG_INFINITY, f64::max))
        };
        let ((first, last), (low, top)) = (range(|p| p.0), range(|p| p.1));
        let x = if first > last { Axis::between(0.0, 1.0) } else { Axis::between(first, last) };
        let y = Axis::around(low, top);
        let mut svg = Svg::new(&self.title);
        svg.axes((&x, &self.labels[0]), (&y, &self.labels[1]));
        svg.open_clip();
        let colours = || COLOURS.into_iter().cycle();
        for (points, colour) in lines.iter().zip(colours()) {
            let points: Vec<(f64, f64)> = points.iter().map(|point| place(&x, &y, *point)).collect();
            svg.line(&points, colour, 1.6);
        }
        svg.close_clip();
        let entries =
            self.lines.iter().zip(colours()).map(|(line, colour)| (line.name.clone(), colour, false));
        svg.legend(&entries.collect::<Vec<_>>());
        svg.finish()
    }
}

/// Where a point lies in the picture.
pub(super) fn place(x: &Axis, y: &Axis, point: (f64, f64)) -> (f64, f64) {
    (
        LEFT + x.part(point.0) * (WIDTH - LEFT - RIGHT),
        HEIGHT - BOTTOM - y.part(point.1) * (HEIGHT - TOP - BOTTOM),
    )
}

/// The points that are numbers.
pub(super) fn finite(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    points.iter().copied().filter(|(x, y)| x.is_finite() && y.is_finite()).collect()
}

/// A range of values with the marks on it.
pub(super) struct Axis {
    low: f64,
    high: f64,
    ticks: Vec<f64>,
    step: f64,
}

impl Axis {
    /// From one whole number to another, both at the edges of the plot.
    pub(super) fn between(low: f64, high: f64) -> Self {
        let high = high.max(low + 1.0);
        let step = nice_step((high - low) / 8.0).max(1.0);
        Axis { low, high, ticks: ticks(low, high, step), step }
    }

    /// Around values from `low` to `top`, with a margin; low above top for none.
    pub(super) fn around(low: f64, top: f64) -> Self {
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
    pub(super) fn part(&self, value: f64) -> f64 {
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
pub(super) fn nice_step(step: f64) -> f64 {
    let power = 10_f64.powf(step.log10().floor());
    let factor = [1.0, 2.0, 5.0, 10.0].into_iter().find(|f| f * power >= step * (1.0 - 1e-9)).unwrap_or(10.0);
    factor * power
}

fn ticks(low: f64, high: f64, step: f64) -> Vec<f64> {
    let (first, last) = ((low / step - 1e-6).ceil() as i64, (high / step + 1e-6).floor() as i64);
    (first..=last).map(|k| k as f64 * step).collect()
}

/// `12345` as `12,345`.
pub(super) fn thousands(digits: &str) -> String {
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
pub(super) struct Svg(String);

impl Svg {
    pub(super) fn new(title: &str) -> Self {
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

    /// Both axes with their marks and what they are of.
    pub(super) fn axes(&mut self, x: (&Axis, &str), y: (&Axis, &str)) {
        let ((x, x_label), (y, y_label)) = (x, y);
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
        self.text((LEFT + right) / 2.0, HEIGHT - 14.0, 12.5, SOFT_INK, "middle", x_label);
        let middle = (TOP + bottom) / 2.0;
        let _ = writeln!(
            self.0,
            "<text transform=\"translate(20 {middle:.1}) rotate(-90)\" font-size=\"12.5\" text-anchor=\"middle\" \
             fill=\"{SOFT_INK}\">{}</text>",
            escaped(y_label)
        );
    }

    /// What follows, up to `close_clip`, is cut at the plot's edges.
    pub(super) fn open_clip(&mut self) {
        let (width, height) = (WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM);
        let _ = writeln!(
            self.0,
            "<clipPath id=\"plot\"><rect x=\"{LEFT}\" y=\"{TOP}\" width=\"{width}\" height=\"{height}\"/></clipPath>\n\
             <g clip-path=\"url(#plot)\">"
        );
    }

    pub(super) fn close_clip(&mut self) {
        self.0.push_str("</g>\n");
    }

    pub(super) fn line(&mut self, points: &[(f64, f64)], colour: &str, width: f64) {
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

    pub(super) fn dot(&mut self, (x, y): (f64, f64), colour: &str) {
        let _ = writeln!(
            self.0,
            "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3.6\" fill=\"{colour}\" stroke=\"{BACKGROUND}\" \
             stroke-width=\"1.4\"/>"
        );
    }

    /// One row below the title: a sample of each line with its name and last value.
    pub(super) fn legend(&mut self, entries: &[(String, &str, bool)]) {
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

    pub(super) fn text(&mut self, x: f64, y: f64, size: f64, colour: &str, anchor: &str, text: &str) {
        let text = escaped(text);
        let _ = writeln!(
            self.0,
            "<text x=\"{x:.1}\" y=\"{y:.1}\" font-size=\"{size}\" text-anchor=\"{anchor}\" fill=\"{colour}\">{text}</text>"
        );
    }

    pub(super) fn finish(mut self) -> String {
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

    #[test]
    fn lines_are_drawn_and_named() {
        let line = |name: &str, points: &[(f64, f64)]| Line { name: name.into(), points: points.into() };
        let truth = line("truth", &[(-3.0, 1.0), (0.0, 2.0), (4.0, -1.0)]);
        let gap = line("a < b", &[(0.0, 2.0), (1.0, f64::NAN), (2.0, 1.0)]);
        let labels = ["hours".into(), "degrees".into()];
        let svg = Chart { title: "t".into(), labels: labels.clone(), lines: vec![truth, gap] }.to_svg();
        assert!(!svg.contains("NaN") && svg.contains(">a &lt; b</text>") && svg.contains(">degrees</text>"));
        for colour in &COLOURS[..2] {
            assert_eq!(svg.matches(&format!("stroke=\"{colour}\"")).count(), 2, "a line and its legend");
        }
        let empty = Chart { title: "t".into(), labels, lines: Vec::new() }.to_svg();
        assert!(!empty.contains("NaN") && !empty.contains("inf"));
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
        let svg = Svg::new("<a & \"b\">\u{1}").finish();
        assert!(svg.contains("&lt;a &amp; &quot;b&quot;&gt; </text>"));
    }
}
