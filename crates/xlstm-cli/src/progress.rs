//! Training's progress on stderr: one live line on a terminal, plain lines elsewhere.

use std::io::{self, IsTerminal};
use std::path::Path;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use xlstm::train::{Observer, Progress, Summary, Validation};

use crate::output;

/// Reports a run to a person.
pub struct Reporter {
    /// The live line, on a terminal.
    bar: Option<ProgressBar>,
    /// Steps between plain lines, elsewhere.
    log_every: u64,
}

impl Reporter {
    /// A reporter for stderr as it is; `log_every` is the run's `training.log_every`.
    pub fn new(log_every: u64) -> Self {
        let bar = io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
            // The template is a constant; should indicatif dislike it, its default serves as well.
            if let Ok(style) = ProgressStyle::with_template("{bar:16.cyan/black.bright} {pos}/{len}  {msg}") {
                bar.set_style(style.progress_chars("━╸━"));
            }
            bar
        });
        Reporter { bar, log_every: log_every.max(1) }
    }

    /// A line that stays, above the live one if there is one.
    fn print(&self, line: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| output::note(line)),
            None => output::note(line),
        }
    }
}

impl Observer for Reporter {
    fn on_start(&mut self, summary: &Summary) {
        if let Some(bar) = &self.bar {
            bar.set_length(summary.steps);
            bar.set_position(summary.start_step);
        }
        self.print(&format!(
            "{}: {} parameters, vocabulary {}, blocks {}",
            summary.folder.display(),
            compact(summary.parameters as f64),
            summary.vocab_size,
            summary.blocks
        ));
        self.print(&format!(
            "{} tokens to train on, {} to validate on; {} a step",
            compact(summary.training_tokens as f64),
            compact(summary.validation_tokens as f64),
            compact(summary.tokens_per_step as f64)
        ));
        if summary.start_step > 0 {
            self.print(&format!("resuming at step {} of {}", summary.start_step, summary.steps));
        }
    }

    fn on_step(&mut self, progress: &Progress) {
        let numbers = numbers(progress);
        match &self.bar {
            Some(bar) => {
                bar.set_length(progress.steps);
                bar.set_position(progress.step);
                bar.set_message(numbers);
            }
            None if progress.step.is_multiple_of(self.log_every) || progress.step == progress.steps => {
                output::note(&format!("step {}/{}  {numbers}", progress.step, progress.steps));
            }
            None => {}
        }
    }

    fn on_validation(&mut self, validation: &Validation) {
        self.print(&format!(
            "validation at step {}: loss {:.4}, {:.4} bits a byte{}  ({})",
            validation.step,
            validation.loss,
            validation.bits_per_byte,
            if validation.best { ", the best so far" } else { "" },
            duration(validation.seconds)
        ));
    }

    fn on_sample(&mut self, text: &str) {
        let lines: Vec<String> =
            text.trim_matches('\n').lines().map(|line| format!("  | {}", printable(line))).collect();
        self.print(&format!("sample:\n{}", lines.join("\n")));
    }

    fn on_checkpoint(&mut self, folder: &Path) {
        self.print(&format!("saved {}", folder.display()));
    }

    fn on_message(&mut self, message: &str) {
        self.print(message);
    }
}

impl Drop for Reporter {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.abandon();
        }
    }
}

/// The share done of something that takes a while: a live line on a terminal, nothing elsewhere.
pub struct Meter(Option<ProgressBar>);

impl Meter {
    /// A meter at 0 that says what is being done.
    pub fn new(what: &'static str) -> Self {
        Meter(io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::with_draw_target(Some(1000), ProgressDrawTarget::stderr());
            if let Ok(style) =
                ProgressStyle::with_template("{bar:16.cyan/black.bright} {percent}%  {msg}  {eta} left")
            {
                bar.set_style(style.progress_chars("━╸━"));
            }
            bar.with_message(what)
        }))
    }

    /// Sets the share done, from 0 to 1.
    pub fn set(&mut self, share: f64) {
        if let Some(bar) = &self.0 {
            bar.set_position((share * 1000.0) as u64);
        }
    }
}

impl Drop for Meter {
    fn drop(&mut self) {
        if let Some(bar) = &self.0 {
            bar.finish_and_clear();
        }
    }
}

/// The numbers of a step, the same in both kinds of line.
fn numbers(progress: &Progress) -> String {
    format!(
        "loss {:.4}  {:.3} bits/byte  lr {:.2e}  grad {:.2}  {} tokens/s  {} left",
        progress.loss,
        progress.bits_per_byte,
        progress.learning_rate,
        progress.gradient_norm,
        compact(progress.tokens_per_second),
        duration(progress.seconds_left)
    )
}

/// A model may write escape sequences; a terminal should show them, not obey them.
fn printable(line: &str) -> String {
    line.chars().map(|c| if c.is_control() && c != '\t' { '\u{fffd}' } else { c }).collect()
}

/// A count with three digits: `950`, `12.3k`, `1.20M`.
fn compact(count: f64) -> String {
    let (scaled, unit) = match count {
        c if c.is_nan() => return "?".into(),
        c if c < 999.5 => return format!("{c:.0}"),
        c if c < 999.5e3 => (c / 1e3, "k"),
        c if c < 999.5e6 => (c / 1e6, "M"),
        c => (c / 1e9, "G"),
    };
    let digits = if scaled < 9.995 {
        2
    } else if scaled < 99.95 {
        1
    } else {
        0
    };
    format!("{scaled:.digits$}{unit}")
}

/// A time in its two largest units: `0.4s`, `42s`, `3m05s`, `2h07m`, `1d03h`.
fn duration(seconds: f64) -> String {
    if !seconds.is_finite() || seconds < 0.0 {
        return "?".into();
    }
    if seconds < 9.95 {
        return format!("{seconds:.1}s");
    }
    let whole = seconds.round() as u64;
    match whole {
        0..60 => format!("{whole}s"),
        60..3600 => format!("{}m{:02}s", whole / 60, whole % 60),
        3600..86_400 => format!("{}h{:02}m", whole / 3600, whole / 60 % 60),
        _ => format!("{}d{:02}h", whole / 86_400, whole / 3600 % 24),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_have_three_digits() {
        let text = |count| compact(count);
        assert_eq!([text(0.0), text(950.4), text(999.6)], ["0", "950", "1.00k"]);
        assert_eq!([text(12_345.0), text(123_456.0), text(1.2e6)], ["12.3k", "123k", "1.20M"]);
        assert_eq!([text(9.996e3), text(7e9), text(f64::NAN)], ["10.0k", "7.00G", "?"]);
    }

    #[test]
    fn durations_have_two_units() {
        assert_eq!([duration(0.42), duration(9.96), duration(59.4)], ["0.4s", "10s", "59s"]);
        assert_eq!([duration(185.0), duration(7620.0), duration(97_200.0)], ["3m05s", "2h07m", "1d03h"]);
        assert_eq!([duration(f64::INFINITY), duration(-1.0)], ["?", "?"]);
    }

    #[test]
    fn a_line_of_numbers() {
        let progress = Progress {
            step: 10,
            steps: 1000,
            loss: 2.34567,
            bits_per_byte: 3.384,
            learning_rate: 1e-4,
            gradient_norm: 0.987,
            tokens_per_second: 23_456.0,
            seconds_left: 171.0,
        };
        assert_eq!(
            numbers(&progress),
            "loss 2.3457  3.384 bits/byte  lr 1.00e-4  grad 0.99  23.5k tokens/s  2m51s left"
        );
    }

    #[test]
    fn samples_cannot_drive_the_terminal() {
        assert_eq!(printable("a\u{1b}[2Jb\tc"), "a\u{fffd}[2Jb\tc");
    }
}
