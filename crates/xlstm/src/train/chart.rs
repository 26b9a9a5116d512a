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
/// Pixels from a row of a legend to the next.
const LEGEND_ROW: f64 = 20.0;
/// The colours of a chart's lines, in their order; more lines begin again.
const COLOURS: [&str; 8] =
    ["#24292f", "#2f6fde", "#d9480f", "#1a7f37", "#8250df", "#bf8700", "#0a9a9a", "#c2255c"];

/// A named line through points (x, y).
#[derive(Debug, Clone, PartialEq)]
pub struct Line {
    /// What the legend calls it.
    pub name: String,
    /// In the order in which they are joined; those that are not finite are left out.
    pub points: Vec<(f64, f64)>,
}

/// How values lie along an axis.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Scale {
    /// Equal differences are equally far apart.
    #[default]
    Linear,
    /// Equal ratios are equally far apart; values that are not above 0 are left out.
    Logarithmic,
}

impl Scale {
    fn holds(self, value: f64) -> bool {
        value.is_finite() && (self == Scale::Linear || value > 0.0)
    }
}

/// Lines in one plot.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Chart {
    /// The heading; any text.
    pub title: String,
    /// What x and y are.
    pub labels: [String; 2],
    /// How x and y are laid out.
    pub scales: [Scale; 2],
    /// The plot ends at this y, and lines are cut there; None: it holds all of them.
    pub top: Option<f64>,
    /// Whether each point has a dot.
    pub dotted: bool,
    /// The lines, the first at the back; one without points keeps its colour and is not in the legend.
    pub lines: Vec<Line>,
}

impl Chart {
    /// The picture, an SVG document.
    pub fn to_svg(&self) -> String {
        let [across, up] = self.scales;
        let points_of = |line: &Line| -> Vec<(f64, f64)> {
            line.points.iter().copied().filter(|(x, y)| across.holds(*x) && up.holds(*y)).collect()
        };
        let lines: Vec<Vec<(f64, f64)>> = self.lines.iter().map(points_of).collect();
        let range = |of: fn(&(f64, f64)) -> f64| {
            let all = || lines.iter().flatten().map(of);
            (all().fold(f64::INFINITY, f64::min), all().fold(f64::NEG_INFINITY, f64::max))
        };
        let ((first, last), (low, highest)) = (range(|p| p.0), range(|p| p.1));
        let top = highest.min(self.top.unwrap_or(f64::INFINITY));
        let x = match across {
            _ if first > last => Axis::between(0.0, 1.0),
            Scale::Linear => Axis::between(first, last),
            Scale::Logarithmic => Axis::logarithmic(first, last),
        };
        let y = match up {
            Scale::Logarithmic if low <= top => Axis::logarithmic(low / 1.15, top * 1.15),
            _ => Axis::around(low, top),
        };
        let coloured = || lines.iter().zip(COLOURS.into_iter().cycle());
        let entries: Vec<_> = (self.lines.iter().zip(coloured()))
            .filter(|(_, (points, _))| !points.is_empty())
            .map(|(line, (_, colour))| (line.name.clone(), colour, self.dotted))
            .collect();
        let frame = Frame::below(&entries);
        let mut svg = Svg::new(&self.title, frame);
        svg.axes((&x, &self.labels[0]), (&y, &self.labels[1]));
        svg.open_clip();
        let places = |points: &[(f64, f64)]| -> Vec<(f64, f64)> {
            points.iter().map(|point| frame.place(&x, &y, *point)).collect()
        };
        for (points, colour) in coloured() {
            svg.line(&places(points), colour, 1.6);
        }
        svg.close_clip();
        if self.dotted {
            // None is cut in half: above the plot's edge there is none.
            for (points, colour) in coloured() {
                let inside = places(points).into_iter().filter(|(_, at)| *at >= frame.top);
                inside.for_each(|point| svg.dot(point, colour));
            }
        }
        svg.legend(&entries);
        svg.finish()
    }
}

/// An entry of a legend: its text, colour, and whether its line has dots.
pub(super) type Entry<'a> = (String, &'a str, bool);

/// Where the plot lies in the picture: further down, and the picture taller, under a legend of more rows.
#[derive(Clone, Copy)]
pub(super) struct Frame {
    top: f64,
    height: f64,
}

impl Frame {
    /// Below a legend of one row.
    pub(super) const PLAIN: Frame = Frame { top: TOP, height: HEIGHT };

    /// Below a legend of these entries.
    fn below(entries: &[Entry<'_>]) -> Frame {
        let row = legend_places(entries).last().map_or(0.0, |(_, row)| *row);
        Frame { top: TOP + row, height: HEIGHT + row }
    }

    /// Where a point lies in the picture.
    pub(super) fn place(&self, x: &Axis, y: &Axis, point: (f64, f64)) -> (f64, f64) {
        (
            LEFT + x.part(point.0) * (WIDTH - LEFT - RIGHT),
            self.height - BOTTOM - y.part(point.1) * (self.height - self.top - BOTTOM),
        )
    }
}

/// Where the entries of a legend begin, and how far below its first row; an entry that does not fit begins
/// a new row.
fn legend_places(entries: &[Entry<'_>]) -> Vec<(f64, f64)> {
    let (mut x, mut row) = (LEFT, 0.0);
    let place = |(text, ..): &Entry<'_>| {
        // Fonts differ; 7 pixels a character leave a gap with all the usual ones.
        let width = 30.0 + 7.0 * text.chars().count() as f64;
        if x > LEFT && x + width > WIDTH - RIGHT {
            (x, row) = (LEFT, row + LEGEND_ROW);
        }
        let at = (x, row);
        x += width + 20.0;
        at
    };
    entries.iter().map(place).collect()
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
    scale: Scale,
}

impl Axis {
    /// From one whole number to another, both at the edges of the plot.
    pub(super) fn between(low: f64, high: f64) -> Self {
        let high = high.max(low + 1.0);
        let step = nice_step((high - low) / 8.0).max(1.0);
        Axis { low, high, ticks: ticks(low, high, step), step, scale: Scale::Linear }
    }

    /// Around values from `low` to `top`, with a margin; low above top for none.
    pub(super) fn around(low: f64, top: f64) -> Self {
        if low > top {
            return Axis {
                low: 0.0,
                high: 1.0,
                ticks: ticks(0.0, 1.0, 0.2),
                step: 0.2,
                scale: Scale::Linear,
            };
        }
        // Equal values get a range of their own size to lie in the middle of.
        let span = if top - low > 1e-9 * top.abs() { top - low } else { (top.abs() * 0.2).max(1e-3) };
        let step = nice_step(span * 1.1 / 6.0);
        let low = ((low - 0.04 * span) / step).floor() * step;
        let high = ((top + 0.04 * span) / step).ceil() * step;
        Axis { low, high, ticks: ticks(low, high, step), step, scale: Scale::Linear }
    }

    /// From one value above 0 to another by ratios: marks at powers of ten, or where there are fewer than
    /// three of these at 1, 2 and 5 times them.
    fn logarithmic(low: f64, high: f64) -> Self {
        let high = high.max(low * 1.01);
        let within = |factors: &[f64]| -> Vec<f64> {
            let powers = low.log10().floor() as i32..=high.log10().ceil() as i32;
            let all = powers.flat_map(|power| factors.iter().map(move |factor| factor * 10_f64.powi(power)));
            all.filter(|tick| (low * (1.0 - 1e-9)..=high * (1.0 + 1e-9)).contains(tick)).collect()
        };
        let powers = within(&[1.0]);
        let ticks = if powers.len() < 3 { within(&[1.0, 2.0, 5.0]) } else { powers };
        Axis { low, high, ticks, step: 1.0, scale: Scale::Logarithmic }
    }

    /// Where `value` lies between the ends, 0 to 1.
    pub(super) fn part(&self, value: f64) -> f64 {
        if self.scale == Scale::Logarithmic {
            return (value / self.low).ln() / (self.high / self.low).ln();
        }
        (value - self.low) / (self.high - self.low)
    }

    /// A mark's label, with the digits that tell it from its neighbours.
    fn label(&self, tick: f64) -> String {
        let step = if self.scale == Scale::Logarithmic { tick } else { self.step };
        let digits = (-step.log10().floor()).clamp(0.0, 12.0) as usize;
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
pub(super) struct Svg {
    text: String,
    frame: Frame,
}

impl Svg {
    pub(super) fn new(title: &str, frame: Frame) -> Self {
        let (title, height) = (escaped(title), frame.height);
        let mut svg = Svg { text: String::new(), frame };
        let _ = write!(
            svg.text,
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" width=\"{WIDTH}\" \
             height=\"{height}\" role=\"img\" font-family=\"-apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', \
             'DejaVu Sans', Arial, sans-serif\">\n<title>{title}</title>\n<rect width=\"{WIDTH}\" height=\"{height}\" \
             rx=\"8\" fill=\"{BACKGROUND}\"/>\n<text x=\"{LEFT}\" y=\"34\" font-size=\"17\" font-weight=\"600\" \
             fill=\"{INK}\">{title}</text>\n"
        );
        svg
    }

    /// Both axes with their marks and what they are of.
    pub(super) fn axes(&mut self, x: (&Axis, &str), y: (&Axis, &str)) {
        let ((x, x_label), (y, y_label)) = (x, y);
        let Frame { top, height } = self.frame;
        let (right, bottom) = (WIDTH - RIGHT, height - BOTTOM);
        for &tick in &y.ticks {
            let at = bottom - y.part(tick) * (bottom - top);
            let _ = writeln!(
                self.text,
                "<path d=\"M{LEFT} {at:.1}H{right}\" stroke=\"{GRID}\" stroke-width=\"1\" fill=\"none\"/>"
            );
            self.text(LEFT - 10.0, at + 4.0, 12.0, SOFT_INK, "end", &y.label(tick));
        }
        let _ = writeln!(
            self.text,
            "<path d=\"M{LEFT} {bottom}H{right}\" stroke=\"{AXIS}\" stroke-width=\"1\" fill=\"none\"/>"
        );
        for &tick in &x.ticks {
            let at = LEFT + x.part(tick) * (right - LEFT);
            let _ = writeln!(
                self.text,
                "<path d=\"M{at:.1} {bottom}v5\" stroke=\"{AXIS}\" stroke-width=\"1\" fill=\"none\"/>"
            );
            self.text(at, bottom + 20.0, 12.0, SOFT_INK, "middle", &x.label(tick));
        }
        self.text((LEFT + right) / 2.0, height - 14.0, 12.5, SOFT_INK, "middle", x_label);
        let middle = (top + bottom) / 2.0;
        let _ = writeln!(
            self.text,
            "<text transform=\"translate(20 {middle:.1}) rotate(-90)\" font-size=\"12.5\" text-anchor=\"middle\" \
             fill=\"{SOFT_INK}\">{}</text>",
            escaped(y_label)
        );
    }

    /// What follows, up to `close_clip`, is cut at the plot's edges.
    pub(super) fn open_clip(&mut self) {
        let Frame { top, height } = self.frame;
        let (width, height) = (WIDTH - LEFT - RIGHT, height - top - BOTTOM);
        let _ = writeln!(
            self.text,
            "<clipPath id=\"plot\"><rect x=\"{LEFT}\" y=\"{top}\" width=\"{width}\" height=\"{height}\"/></clipPath>\n\
             <g clip-path=\"url(#plot)\">"
        );
    }

    pub(super) fn close_clip(&mut self) {
        self.text.push_str("</g>\n");
    }

    pub(super) fn line(&mut self, points: &[(f64, f64)], colour: &str, width: f64) {
        if points.len() < 2 {
            return;
        }
        self.text.push_str("<path d=\"");
        for (index, (x, y)) in points.iter().enumerate() {
            let _ = write!(self.text, "{}{x:.1} {y:.1}", if index == 0 { "M" } else { "L" });
        }
        let _ = writeln!(
            self.text,
            "\" stroke=\"{colour}\" stroke-width=\"{width}\" stroke-linejoin=\"round\" stroke-linecap=\"round\" \
             fill=\"none\"/>"
        );
    }

    pub(super) fn dot(&mut self, (x, y): (f64, f64), colour: &str) {
        let _ = writeln!(
            self.text,
            "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3.6\" fill=\"{colour}\" stroke=\"{BACKGROUND}\" \
             stroke-width=\"1.4\"/>"
        );
    }

    /// Rows below the title: a sample of each line with its text.
    pub(super) fn legend(&mut self, entries: &[Entry<'_>]) {
        for ((text, colour, dotted), (x, row)) in entries.iter().zip(legend_places(entries)) {
            let y = 54.0 + row;
            self.line(&[(x, y), (x + 22.0, y)], colour, 2.0);
            if *dotted {
                self.dot((x + 11.0, y), colour);
            }
            self.text(x + 30.0, y + 4.0, 12.5, INK, "start", text);
        }
    }

    pub(super) fn text(&mut self, x: f64, y: f64, size: f64, colour: &str, anchor: &str, text: &str) {
        let text = escaped(text);
        let _ = writeln!(
            self.text,
            "<text x=\"{x:.1}\" y=\"{y:.1}\" font-size=\"{size}\" text-anchor=\"{anchor}\" fill=\"{colour}\">{text}</text>"
        );
    }

    pub(super) fn finish(mut self) -> String {
        self.text.push_str("</svg>\n");
        self.text
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
        let svg =
            Chart { title: "t".into(), labels: labels.clone(), lines: vec![truth, gap], ..Chart::default() }
                .to_svg();
        assert!(!svg.contains("NaN") && svg.contains(">a &lt; b</text>") && svg.contains(">degrees</text>"));
        for colour in &COLOURS[..2] {
            assert_eq!(svg.matches(&format!("stroke=\"{colour}\"")).count(), 2, "a line and its legend");
        }
        let none = Line { name: "nothing".into(), points: Vec::new() };
        let empty = Chart { title: "t".into(), labels, lines: vec![none], ..Chart::default() }.to_svg();
        assert!(!empty.contains("NaN") && !empty.contains("inf") && !empty.contains("nothing"));
    }

    #[test]
    fn ratios_are_laid_out() {
        let axis = Axis::logarithmic(1.0, 16384.0);
        assert_eq!(
            axis.ticks.iter().map(|tick| axis.label(*tick)).collect::<Vec<_>>().join(" "),
            "1 10 100 1,000 10,000"
        );
        assert!((axis.part(128.0) - 0.5).abs() < 1e-12 && axis.part(1.0) == 0.0);
        let short = Axis::logarithmic(0.04, 0.3);
        assert_eq!(
            short.ticks.iter().map(|tick| short.label(*tick)).collect::<Vec<_>>().join(" "),
            "0.05 0.1 0.2"
        );
        let line = Line { name: "a".into(), points: vec![(0.0, 1.0), (1.0, 1.0), (100.0, 50.0)] };
        let chart =
            Chart { scales: [Scale::Logarithmic; 2], dotted: true, lines: vec![line], ..Chart::default() };
        let svg = chart.to_svg();
        assert!(!svg.contains("NaN") && !svg.contains("inf"));
        assert_eq!(svg.matches("<circle").count(), 3, "two points above 0 and the legend's");
    }

    #[test]
    fn what_is_above_the_top_is_cut() {
        let line = Line { name: "a".into(), points: vec![(0.0, 1000.0), (1.0, 2.0), (2.0, 1.0)] };
        let whole = Chart { lines: vec![line], dotted: true, ..Chart::default() };
        let cut = Chart { top: Some(3.0), ..whole.clone() };
        assert_eq!(whole.to_svg().matches("<circle").count(), 4);
        assert_eq!(cut.to_svg().matches("<circle").count(), 3);
        assert!(cut.to_svg().contains(">2.0</text>") && !cut.to_svg().contains(">1,000</text>"));
    }

    /// Seven names of models may need two rows, and no entry leaves the picture.
    #[test]
    fn long_legends_wrap() {
        let entry = |text: &str| (String::from(text), COLOURS[0], true);
        let entries: Vec<Entry<'_>> = [
            "LSTM",
            "Transformer",
            "sLSTM",
            "mLSTM",
            "xLSTM[7:1]",
            "xLSTMLarge",
            "PyxLSTM's cells as they are",
        ]
        .map(entry)
        .into();
        let places = legend_places(&entries);
        assert_eq!((places[0], places[6].1), ((LEFT, 0.0), LEGEND_ROW));
        for (at, (text, ..)) in places.iter().zip(&entries) {
            assert!(at.0 + 30.0 + 7.0 * text.len() as f64 <= WIDTH - RIGHT, "{text}");
        }
        assert_eq!(Frame::below(&entries).height, HEIGHT + LEGEND_ROW);
        assert_eq!(Frame::below(&entries[..2]).top, TOP);
    }

    #[test]
    fn steps_are_nice() {
        assert_eq!(
            (nice_step(0.13), nice_step(0.2), nice_step(3.1), nice_step(700.0)),
            (0.2, 0.2, 5.0, 1000.0)
        );
        assert_eq!(ticks(0.0, 1.0, 0.25).len(), 5);
        let axis = Axis { low: 0.0, high: 20000.0, ticks: vec![], step: 5000.0, scale: Scale::Linear };
        assert_eq!(axis.label(15000.0), "15,000");
        assert_eq!(thousands("100"), "100");
    }

    #[test]
    fn titles_are_escaped() {
        let svg = Svg::new("<a & \"b\">\u{1}", Frame::PLAIN).finish();
        assert!(svg.contains("&lt;a &amp; &quot;b&quot;&gt; </text>"));
    }
}
