//! Forecasts of ETTh1, seven series of hourly measurements at a transformer station: from 336
//! rows the next 96 of all seven, trained and tested on the months that the literature takes.
//! ETTh1.csv is part of the public ETT dataset (github.com/zhouhaoyi/ETDataset, CC BY-ND).
//!
//! `cargo run --release --example forecast PATH/ETTh1.csv [steps]` writes forecast.svg.

use std::sync::Arc;

use xlstm::data::{Sequence, Targets};
use xlstm::engine::Device;
use xlstm::model::objective::Carry;
use xlstm::model::{FeatureConfig, FeatureModel, Head, Logits, Model, ModelConfig, Pooling, Runner, SlstmAt};
use xlstm::nn::{Parameters, Weights};
use xlstm::optim::{Decay, OptimizerOptions, Schedule};
use xlstm::rng::Rng;
use xlstm::train::learner::{Task, learner};
use xlstm::train::{Chart, Line};

type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

/// Series, rows that are read, rows that are forecast.
const SERIES: usize = 7;
const INPUT: usize = 336;
const HORIZON: usize = 96;
/// 12, 4 and 4 months of 30 days: where training and validation end, and the test.
const ENDS: [usize; 3] = [8640, 11520, 14400];
const BATCH: usize = 16;
const OPTIONS: OptimizerOptions = OptimizerOptions::DEFAULT;

/// The table's rows, standardised by the mean and deviation of the training months.
fn read(path: &str) -> Outcome<Vec<f32>> {
    let text = std::fs::read_to_string(path).map_err(|e| format!("cannot read {path}: {e}"))?;
    let mut rows = Vec::new();
    for (i, line) in text.lines().enumerate().skip(1) {
        let numbers: Result<Vec<f32>, _> = line.split(',').skip(1).map(str::parse).collect();
        let numbers = numbers.map_err(|e| format!("{path}, line {}: {e}", i + 1))?;
        if numbers.len() != SERIES {
            return Err(
                format!("{path}, line {}: {} numbers after the date, not 7", i + 1, numbers.len()).into()
            );
        }
        rows.extend(numbers);
    }
    if rows.len() < ENDS[2] * SERIES {
        return Err(format!("{path} has {} rows, expected at least {}", rows.len() / SERIES, ENDS[2]).into());
    }
    for series in 0..SERIES {
        let known = || rows[..ENDS[0] * SERIES].iter().skip(series).step_by(SERIES).map(|x| f64::from(*x));
        let mean = known().sum::<f64>() / ENDS[0] as f64;
        let deviation = (known().map(|x| (x - mean).powi(2)).sum::<f64>() / ENDS[0] as f64).sqrt();
        let of_series = rows.iter_mut().skip(series).step_by(SERIES);
        of_series.for_each(|x| *x = ((f64::from(*x) - mean) / deviation) as f32);
    }
    Ok(rows)
}

/// Rows `at - INPUT` to before `at`; each learns how much the next [`HORIZON`] rows differ from it.
fn window(rows: &[f32], at: usize) -> Sequence {
    let row = |t: usize| &rows[t * SERIES..(t + 1) * SERIES];
    let targets = (at - INPUT..at).flat_map(|t| {
        (t + 1..=t + HORIZON).flat_map(move |then| row(then).iter().zip(row(t)).map(|(then, now)| then - now))
    });
    Sequence {
        features: rows[(at - INPUT) * SERIES..at * SERIES].into(),
        targets: Targets::Values(targets.collect()),
    }
}

/// The forecasts at `times`: the last row read and what the model adds to it.
fn forecasts(
    runner: &mut Runner<f32, FeatureModel>,
    rows: &[f32],
    times: &[usize],
) -> Outcome<Vec<Vec<f32>>> {
    runner.reset(times.len());
    let windows: Vec<&[f32]> = times.iter().map(|at| &rows[(at - INPUT) * SERIES..at * SERIES]).collect();
    let add = |(window, mut change): (&&[f32], Vec<f32>)| {
        let last = &window[(INPUT - 1) * SERIES..];
        change.iter_mut().zip(last.iter().cycle()).for_each(|(change, last)| *change += last);
        change
    };
    Ok(windows.iter().zip(runner.read_batch(&windows, Logits::Last)?).map(add).collect())
}

/// Mean squared and mean absolute error of the model, and of the last row repeated, over the
/// forecasts from `start` that end by `end`, every `stride` rows.
fn errors(
    runner: &mut Runner<f32, FeatureModel>,
    rows: &[f32],
    [start, end, stride]: [usize; 3],
) -> Outcome<[[f64; 2]; 2]> {
    let times: Vec<usize> = (start..=end - HORIZON).step_by(stride).collect();
    let mut sums = [[0.0; 2]; 2];
    for times in times.chunks(BATCH) {
        for (&at, forecast) in times.iter().zip(forecasts(runner, rows, times)?) {
            let last = rows[(at - 1) * SERIES..at * SERIES].iter().cycle();
            for ((truth, forecast), last) in rows[at * SERIES..].iter().zip(&forecast).zip(last) {
                for (sums, guess) in sums.iter_mut().zip([forecast, last]) {
                    let error = f64::from(guess - truth);
                    (sums[0], sums[1]) = (sums[0] + error * error, sums[1] + error.abs());
                }
            }
        }
    }
    Ok(sums.map(|sums| sums.map(|sum| sum / (times.len() * HORIZON * SERIES) as f64)))
}

fn main() -> Outcome<()> {
    let mut arguments = std::env::args().skip(1);
    let path = arguments.next().ok_or("give the path of ETTh1.csv, from github.com/zhouhaoyi/ETDataset")?;
    let steps: u64 = arguments.next().map_or(Ok(400), |steps| steps.parse())?;
    let rows = read(&path)?;
    let slstm_at = SlstmAt::Positions(vec![1]);
    let blocks =
        ModelConfig { embedding_dim: 32, num_blocks: 2, slstm_at, dropout: 0.3, ..ModelConfig::default() };
    let head = Head::Regression { outputs: HORIZON * SERIES };
    let config = FeatureConfig { input_size: SERIES, blocks, pooling: Pooling::None, head };
    let (model, device) = (Arc::new(FeatureModel::new(config)?), Device::cpu(0)?);
    let schedule =
        Schedule { max: 2e-3, min: 1e-5, warmup_steps: 50, decay_steps: steps, decay: Decay::Cosine };
    let task = Task { shape: [BATCH, INPUT], carry: Carry::Fresh, options: OPTIONS, seed: 1, captured: true };
    let mut best = (f64::INFINITY, Parameters::initialize(model.specs(), 1));
    let mut learner = learner(&model, best.1.clone(), task, &device)?;
    let mut rng = Rng::new(1, 1);
    for step in 0..steps {
        let mut draw = || INPUT + rng.below((ENDS[0] - HORIZON - INPUT + 1) as u64) as usize;
        let batch = model.batch(&(0..BATCH).map(|_| window(&rows, draw())).collect::<Vec<_>>())?;
        let learned = learner.step(&[batch], step, schedule.rate(step))?;
        if (step + 1) % 50 == 0 {
            let mut runner = Runner::new(model.clone(), learner.weights(), device.clone());
            let [[validation, _], _] = errors(&mut runner, &rows, [ENDS[0], ENDS[1], 8])?;
            eprintln!("step {}: training {:.4}, validation {validation:.4}", step + 1, learned.loss);
            if validation < best.0 {
                best = (validation, learner.snapshot()?.parameters.into_owned());
            }
        }
    }
    let mut runner = Runner::new(model, Weights::new(Arc::new(best.1), &device)?, device);
    let [ours, naive] = errors(&mut runner, &rows, [ENDS[1], ENDS[2], 1])?;
    println!("| test, {HORIZON} rows ahead | MSE | MAE |\n|---|---|---|");
    println!("| the model | {:.4} | {:.4} |", ours[0], ours[1]);
    println!("| the last row repeated | {:.4} | {:.4} |", naive[0], naive[1]);

    // The same forecast from a stream, a row at a time.
    let at = (ENDS[1] + ENDS[2]) / 2;
    let forecast = forecasts(&mut runner, &rows, &[at])?.concat();
    runner.reset(1);
    let mut change = Vec::new();
    for row in rows[(at - INPUT) * SERIES..at * SERIES].chunks(SERIES) {
        change = runner.read(row, Logits::Last)?;
    }
    let last = rows[(at - 1) * SERIES..at * SERIES].iter().cycle();
    let apart =
        forecast.iter().zip(change.iter().zip(last)).map(|(a, (change, last))| (a - (change + last)).abs());
    println!("\nstreamed row by row, a forecast differs by at most {:.0e}", apart.fold(0.0, f32::max));

    // The last series is the oil's temperature.
    let series = |values: &[f32], first: usize| -> Vec<(f64, f64)> {
        let oil = values.iter().skip(SERIES - 1).step_by(SERIES).enumerate();
        oil.map(|(i, x)| ((first + i) as f64 - INPUT as f64, f64::from(*x))).collect()
    };
    let truth = &rows[(at - INPUT) * SERIES..(at + HORIZON) * SERIES];
    let repeated = rows[(at - 1) * SERIES..at * SERIES].repeat(HORIZON);
    let line = |name: &str, points| Line { name: name.into(), points };
    let lines = vec![
        line("measured", series(truth, 0)),
        line("forecast", series(&forecast, INPUT)),
        line("last value repeated", series(&repeated, INPUT)),
    ];
    let labels = ["hours".into(), "oil temperature, standardised".into()];
    let chart = Chart { title: "ETTh1: a forecast of 96 hours".into(), labels, lines, ..Chart::default() };
    std::fs::write("forecast.svg", chart.to_svg())?;
    Ok(())
}
