//! The table: the errors of cases, and whether they are within their bounds.

use std::sync::Arc;

use xlstm::engine::Precision;
use xlstm::engine::cuda::Gpu;

use super::case::{Case, Record, Tensors};

/// In f32 the largest difference relative to the largest number, in bf16 the relative norm.
pub fn error(precision: Precision, got: &[f64], want: &[f64]) -> f64 {
    match precision {
        Precision::F32 => distance(got, want),
        Precision::Bf16 => relative_norm(got, want),
    }
}

/// The Euclidean norm of the difference relative to that of the tensor; NaN never passes.
pub fn relative_norm(got: &[f64], want: &[f64]) -> f64 {
    if got.len() != want.len() {
        return f64::INFINITY;
    }
    let square = |sum: f64, x: f64| sum + x * x;
    let scale = want.iter().copied().fold(1e-6 * want.len().max(1) as f64, square).sqrt();
    let error = got.iter().zip(want).map(|(a, b)| a - b).fold(0.0, square).sqrt() / scale;
    if error.is_nan() { f64::INFINITY } else { error }
}

/// The largest difference relative to the largest number of the tensor; NaN never passes.
fn distance(got: &[f64], want: &[f64]) -> f64 {
    if got.len() != want.len() {
        return f64::INFINITY;
    }
    let scale = want.iter().fold(1e-3, |m: f64, x| m.max(x.abs()));
    got.iter().zip(want).fold(0.0, |worst: f64, (a, b)| {
        let error = (a - b).abs() / scale;
        if error.is_nan() { f64::INFINITY } else { worst.max(error) }
    })
}

/// Where errors are shown and failures counted.
pub struct Table<'a> {
    pub gpu: &'a Arc<Gpu>,
    pub precision: Precision,
    /// What names of compared recordings have to hold.
    pub only: String,
    pub failures: usize,
}

/// The bound on errors of operations in bf16: rounding a result once costs 0.2 %.
pub const BF16: f64 = 1e-2;

/// The same for what Muon does in bf16: fifteen products, each rounded, of which none corrects another.
pub const MUON_BF16: f64 = 3e-2;

impl Table<'_> {
    pub fn row(&mut self, name: &str, error: f64, tolerance: f64, note: &str) {
        let passed = error <= tolerance;
        self.failures += usize::from(!passed);
        let precision = format!("{:?}", self.precision).to_lowercase();
        println!(
            "{name:<38} {precision:<5} {error:>9.1e} {tolerance:>9.1e}  {}  {note}",
            if passed { "ok  " } else { "FAIL" }
        );
    }

    /// The GPU against the CPU in f64, and against itself.
    pub fn compare(&mut self, name: &str, case: &Case, tolerance: f64, record: Record<'_>) {
        if !name.contains(&self.only) {
            return;
        }
        let precision = self.precision;
        let tolerance = if precision == Precision::F32 { tolerance } else { BF16 };
        let case = case.rounded(precision);
        let gpu = || case.gpu(record, precision, self.gpu);
        let run =
            || -> xlstm::Result<(Tensors, Tensors, Tensors)> { Ok((case.cpu(record)?, gpu()?, gpu()?)) };
        match run() {
            Ok((truth, first, second)) => {
                let parts = |i: usize| {
                    truth[i].iter().zip(&first[i]).map(|(t, g)| error(precision, g, t)).fold(0.0, f64::max)
                };
                let same = if first == second { "same bits" } else { "DIFFERENT BITS" };
                self.failures += usize::from(first != second);
                let note =
                    format!("forward {:.0e}, backward {:.0e}, {same}", parts(0), parts(1).max(parts(2)));
                if parts(0).max(parts(1)).max(parts(2)) > tolerance {
                    for (i, kind) in ["output", "input gradient", "parameter gradient"].iter().enumerate() {
                        for (j, (t, g)) in truth[i].iter().zip(&first[i]).enumerate() {
                            println!("    {kind} {j}: {:.1e}", error(precision, g, t));
                        }
                    }
                }
                self.row(name, parts(0).max(parts(1)).max(parts(2)), tolerance, &note);
            }
            Err(e) => self.row(name, f64::INFINITY, tolerance, &format!("{e}")),
        }
    }
}
