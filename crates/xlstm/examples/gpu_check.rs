//! Checks every operation and cell on a GPU in f32 and bf16 against the processor in f64, on
//! random inputs and poisoned buffers, and against itself: the same bits twice; so, too, steps of the
//! optimizer; and that what the search of product algorithms finds can be saved. `gpu_check [ordinal]`

use std::sync::Arc;

use xlstm::cell::mlstm::{Form, MlstmConfig, MlstmState, mlstm};
use xlstm::cell::slstm::{CellFunction, SlstmConfig, SlstmState, slstm};
use xlstm::cell::{ForgetGate, InputGate};
use xlstm::engine::cuda::{CudaExecutor, CudaParameters, CudaTensors, Gpu, Layout};
use xlstm::engine::{Executor, Ids, Mode, Precision, Shape, Tape, Var};
use xlstm::marks::{IGNORE, PAD, RESET};
use xlstm::nn::{Builder, Init, Parameters, Role};
use xlstm::ops::activation::{Activation, activated, gated};
use xlstm::ops::add::add;
use xlstm::ops::attention::attention;
use xlstm::ops::causal_conv::causal_conv;
use xlstm::ops::draw::draw;
use xlstm::ops::dropout::dropout;
use xlstm::ops::embedding::embedding;
use xlstm::ops::from_bits::from_bits;
use xlstm::ops::gates::gates;
use xlstm::ops::head_loss::{Head, head_loss};
use xlstm::ops::headwise::{headwise, headwise_full, headwises};
use xlstm::ops::last_token::last_token;
use xlstm::ops::learned_positions::learned_positions;
use xlstm::ops::linear::{linear, linears};
use xlstm::ops::mean_tokens::mean_tokens;
use xlstm::ops::norm::{Norm, NormKind, add_norm, gated_norm, norm};
use xlstm::ops::positions::positions;
use xlstm::ops::qkv::{Fed, qkv};
use xlstm::ops::reverse::reverse;
use xlstm::ops::rotary::{angles, rotary};
use xlstm::ops::skip_norm::skip_norm;
use xlstm::ops::soft_cap::soft_cap;
use xlstm::ops::squared_error::squared_error;
use xlstm::ops::window::window;
use xlstm::optim::cuda::{CudaOptimizer, layout_of};
use xlstm::optim::{MuonOptions, Optimizer, OptimizerOptions, global_norm};

type Outcome<T> = Result<T, Box<dyn std::error::Error>>;
type Record<'a> = &'a dyn Fn(&mut Tape, &[Var], &[Ids]) -> xlstm::Result<Vec<Var>>;

fn noise(seed: u64, n: usize) -> Vec<f64> {
    let mut rng = xlstm::rng::Rng::new(seed, 77);
    (0..n).map(|_| f64::from((2.0 * rng.uniform() - 1.0) as f32)).collect()
}

/// A recording with its inputs, and what backward starts from (noise where not given).
#[derive(Clone, Default)]
struct Case {
    inputs: Vec<(Vec<usize>, Vec<f64>)>,
    /// Shapes of the first parameters, which the recording gets after the inputs.
    weights: Vec<Vec<usize>>,
    ids: Vec<Vec<u32>>,
    parameters: Vec<Vec<f64>>,
    seeds: Option<Vec<Vec<f64>>>,
    /// As in generation: without gradients.
    evaluated: bool,
}

/// A tape, its inputs and ids, and the outputs that count.
type Recorded = (Tape, Vec<Var>, Vec<Ids>, Vec<Var>);

/// Outputs, gradients of the inputs, gradients of the parameters.
type Tensors = [Vec<Vec<f64>>; 3];

impl Case {
    fn input(mut self, shape: &[usize]) -> Case {
        let seed = self.inputs.len() as u64 + 1;
        self.inputs.push((shape.to_vec(), noise(seed, shape.iter().product())));
        self
    }

    /// An input in [low, high).
    fn between(mut self, shape: &[usize], low: f64, high: f64) -> Case {
        self = self.input(shape);
        if let Some((_, values)) = self.inputs.last_mut() {
            values.iter_mut().for_each(|x| *x = f64::from((low + (high - low) * (*x + 1.0) / 2.0) as f32));
        }
        self
    }

    /// A weight matrix: in bf16 it has to be a parameter.
    fn weight(mut self, shape: &[usize]) -> Case {
        let seed = 500 + self.weights.len() as u64;
        self.weights.push(shape.to_vec());
        self.parameters.push(noise(seed, shape.iter().product()));
        self
    }

    /// All numbers as `precision` can store them, so that both sides start from the same.
    fn rounded(&self, precision: Precision) -> Case {
        let mut case = self.clone();
        let inputs = case.inputs.iter_mut().map(|(_, values)| values);
        for values in inputs.chain(&mut case.parameters).chain(case.seeds.iter_mut().flatten()) {
            round(precision, values);
        }
        case
    }

    fn ids(mut self, ids: Vec<u32>) -> Case {
        self.ids.push(ids);
        self
    }

    fn tape(&self, record: Record<'_>) -> xlstm::Result<Recorded> {
        let mut tape = Tape::new(if self.evaluated { Mode::Evaluate } else { Mode::Train });
        let shapes = self.inputs.iter().map(|(shape, _)| Shape::from(&shape[..]));
        let vars: Vec<Var> = if self.evaluated {
            shapes.map(|shape| tape.input(shape)).collect()
        } else {
            shapes.map(|shape| tape.input_with_gradient(shape)).collect()
        };
        let ids: Vec<Ids> = self.ids.iter().map(|ids| tape.ids(ids.len())).collect();
        let weights = self.weights.iter().enumerate();
        let weights = weights.map(|(i, shape)| tape.parameter(i, 0, Shape::from(&shape[..])));
        let given: Vec<Var> = vars.iter().copied().chain(weights.collect::<Vec<_>>()).collect();
        let outputs = record(&mut tape, &given, &ids)?;
        for &y in &outputs {
            tape.keep(y);
            if !self.evaluated {
                tape.seed_gradient(y);
            }
        }
        Ok((tape, vars, ids, outputs))
    }

    /// Noise is rounded to bf16, which f32 stores as well.
    fn seed(&self, output: usize, n: usize) -> Vec<f64> {
        if let Some(seeds) = &self.seeds {
            return seeds[output].clone();
        }
        let mut seed = noise(1000 + output as u64, n);
        round(Precision::Bf16, &mut seed);
        seed
    }

    fn cpu(&self, record: Record<'_>) -> xlstm::Result<Tensors> {
        let (tape, vars, ids, outputs) = self.tape(record)?;
        let mut executor = Executor::<f64>::new(tape);
        for ((_, values), &var) in self.inputs.iter().zip(&vars) {
            executor.input_mut(var).copy_from_slice(values);
        }
        for (values, &var) in self.ids.iter().zip(&ids) {
            executor.ids_mut(var).copy_from_slice(values);
        }
        executor.forward(&self.parameters);
        if self.evaluated {
            return Ok([outputs.iter().map(|&y| executor.value(y).to_vec()).collect(), vec![], vec![]]);
        }
        for (i, &y) in outputs.iter().enumerate() {
            let seed = self.seed(i, executor.seed_mut(y).len());
            executor.seed_mut(y).copy_from_slice(&seed);
        }
        let mut gradients: Vec<Vec<f64>> = self.parameters.iter().map(|p| vec![0.0; p.len()]).collect();
        executor.backward(&self.parameters, &mut gradients);
        Ok([
            outputs.iter().map(|&y| executor.value(y).to_vec()).collect(),
            vars.iter().map(|&x| executor.gradient(x).to_vec()).collect(),
            gradients,
        ])
    }

    fn gpu(&self, record: Record<'_>, precision: Precision, gpu: &Arc<Gpu>) -> xlstm::Result<Tensors> {
        let (tape, vars, ids, outputs) = self.tape(record)?;
        let lengths: Vec<usize> = outputs.iter().map(|&y| tape.shape(y).len()).collect();
        let mut executor = CudaExecutor::new(tape, precision, gpu)?;
        let layout = Layout::new(self.parameters.iter().map(Vec::len));
        let parameters = CudaParameters::zeros(gpu, &layout, precision)?;
        let mut gradients = CudaTensors::zeros(gpu, &layout)?;
        parameters.upload(&self.parameters.iter().map(|p| narrow(p)).collect::<Vec<_>>())?;
        for ((_, values), &var) in self.inputs.iter().zip(&vars) {
            executor.set_input(var, &narrow(values))?;
        }
        for (values, &var) in self.ids.iter().zip(&ids) {
            executor.set_ids(var, values)?;
        }
        // Twice, so that work space has its size when it is poisoned.
        for _ in 0..2 {
            executor.poison()?;
            executor.forward(&parameters, &[])?;
            if self.evaluated {
                continue;
            }
            for (i, &y) in outputs.iter().enumerate() {
                executor.set_seed(y, &narrow(&self.seed(i, lengths[i])))?;
            }
            gradients.clear()?;
            executor.backward(&parameters, &mut gradients)?;
        }
        let values = outputs.iter().map(|&y| Ok(wide(&executor.value(y)?)));
        if self.evaluated {
            return Ok([values.collect::<xlstm::Result<_>>()?, vec![], vec![]]);
        }
        let of_inputs = vars.iter().map(|&x| Ok(wide(&executor.gradient(x)?)));
        Ok([
            values.collect::<xlstm::Result<_>>()?,
            of_inputs.collect::<xlstm::Result<_>>()?,
            gradients.download()?.iter().map(|g| wide(g)).collect(),
        ])
    }
}

fn narrow(x: &[f64]) -> Vec<f32> {
    x.iter().map(|x| *x as f32).collect()
}

fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|x| f64::from(*x)).collect()
}

fn round(precision: Precision, values: &mut [f64]) {
    values.iter_mut().for_each(|x| *x = f64::from(precision.round(*x as f32)));
}

/// In f32 the largest difference relative to the largest number, in bf16 the relative norm.
fn error(precision: Precision, got: &[f64], want: &[f64]) -> f64 {
    match precision {
        Precision::F32 => distance(got, want),
        Precision::Bf16 => relative_norm(got, want),
    }
}

/// The Euclidean norm of the difference relative to that of the tensor; NaN never passes.
fn relative_norm(got: &[f64], want: &[f64]) -> f64 {
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

struct Table<'a> {
    gpu: &'a Arc<Gpu>,
    precision: Precision,
    failures: usize,
}

/// The bound on errors of operations in bf16: rounding a result once costs 0.2 %.
const BF16: f64 = 1e-2;

/// The same for what Muon does in bf16: fifteen products, each rounded, of which none corrects another.
const MUON_BF16: f64 = 3e-2;

impl Table<'_> {
    fn row(&mut self, name: &str, error: f64, tolerance: f64, note: &str) {
        let passed = error <= tolerance;
        self.failures += usize::from(!passed);
        let precision = format!("{:?}", self.precision).to_lowercase();
        println!(
            "{name:<38} {precision:<5} {error:>9.1e} {tolerance:>9.1e}  {}  {note}",
            if passed { "ok  " } else { "FAIL" }
        );
    }

    /// The GPU against the CPU in f64, and against itself.
    fn compare(&mut self, name: &str, case: &Case, tolerance: f64, record: Record<'_>) {
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

fn marks(n: usize) -> Vec<u32> {
    (0..n).map(|i| [0, 0, RESET, 0, 0, PAD, 0, PAD | RESET, 0, 0, 0, 0, PAD][i * 7 % 13]).collect()
}

/// What the steps of generation have: few rows, and norms and gates whose work is left to the products
/// after them.
fn generation(table: &mut Table<'_>) {
    for (rows, width, groups, kind) in [
        (1, 1024, 1, NormKind::RootMeanSquare),
        (1, 96, 4, NormKind::Layer),
        (3, 128, 2, NormKind::Layer),
        (8, 2752, 1, NormKind::RootMeanSquare),
        (9, 256, 4, NormKind::Layer),
        (17, 768, 1, NormKind::RootMeanSquare),
        (32, 512, 4, NormKind::Layer),
        (33, 64, 1, NormKind::Layer),
        (2, 72, 1, NormKind::Layer),
    ] {
        let mut case = Case::default().input(&[rows, 1, width]).input(&[rows, 1, width]);
        case = case.input(&[width]).input(&[width]).input(&[40]).input(&[4]);
        case = case.weight(&[4, width]).weight(&[4, width]).weight(&[40, width]);
        case = case.weight(&[width, width]).weight(&[width, width]);
        case.evaluated = true;
        let options = Norm { kind, groups, eps: 1e-5, unit_offset: groups == 1 };
        let name = format!("generation {rows} of {width}, {kind:?} {groups}");
        table.compare(&name, &case, 1e-4, &|t, v, _| {
            let (sum, u) = add_norm(t, [v[0], v[1]], v[2], Some(v[3]), options)?;
            let [i, f] = gates(t, u, [(v[6], Some(v[5])), (v[7], None)], Some(15.0))?;
            let [few, gate, up] = linears(t, u, [(v[8], Some(v[4])), (v[9], None), (v[10], None)])?;
            let product = gated(t, gate, up, Activation::Swish)?;
            let y = linear(t, product, v[10], None)?;
            let h = gated_norm(t, sum, gate, v[2], None, options)?;
            Ok(vec![sum, i, f, few, gate, y, linear(t, h, v[9], None)?])
        });
    }
}

fn operations(table: &mut Table<'_>) {
    const T: f64 = 2e-5;
    let new = Case::default;
    table.compare("add", &new().input(&[3, 37, 50]).input(&[3, 37, 50]), T, &|t, v, _| {
        Ok(vec![add(t, v[0], v[1])?])
    });
    for (rows, inner, outer) in [(130, 96, 64), (7, 5, 3), (512, 256, 384), (1, 33, 65)] {
        let case = new().input(&[2, rows, inner]).input(&[outer]).weight(&[outer, inner]);
        let name = format!("linear {rows}x{inner}x{outer}");
        table.compare(&name, &case, T, &|t, v, _| Ok(vec![linear(t, v[0], v[2], Some(v[1]))?]));
    }
    let case = new().input(&[2, 31, 48]).weight(&[20, 48]);
    table.compare("linear without bias", &case, T, &|t, v, _| Ok(vec![linear(t, v[0], v[1], None)?]));
    for (heads, outer, inner) in [(24, 4, 4), (5, 4, 4), (4, 32, 32), (3, 7, 5), (2, 17, 18)] {
        let width = heads * outer;
        let case = new().input(&[2, 70, heads * inner]).input(&[width]).weight(&[heads, outer, inner]);
        let name = format!("headwise {heads}x{outer}x{inner}");
        if outer == inner {
            // The gradients of one are added to those of the other.
            table.compare(&format!("{name} twice"), &case, T, &|t, v, _| {
                let other = headwise(t, v[0], v[2], None)?;
                Ok(vec![headwise(t, v[0], v[2], Some(v[1]))?, other])
            });
        }
        table.compare(&name, &case, T, &|t, v, _| Ok(vec![headwise(t, v[0], v[2], Some(v[1]))?]));
        table.compare(&format!("{name} full"), &case, T, &|t, v, _| {
            Ok(vec![headwise_full(t, v[0], v[2], Some(v[1]))?])
        });
    }
    for (heads, outer, inner) in [(24, 4, 4), (2, 17, 16), (3, 7, 5)] {
        let shape = [heads, outer, inner];
        let case = new().input(&[2, 70, heads * inner]).input(&[heads * outer]);
        let case = [(); 3].iter().fold(case, |case, ()| case.weight(&shape));
        table.compare(&format!("headwises of three {heads}x{outer}x{inner}"), &case, T, &|t, v, _| {
            let maps = [(v[2], None), (v[3], Some(v[1])), (v[4], None)];
            Ok(headwises(t, v[0], maps)?.to_vec())
        });
    }
    for (width, outer) in [(96, 4), (88, 12), (600, 8), (6, 1)] {
        let shape = [outer, width];
        let case = new().input(&[2, 70, width]).input(&[outer]).input(&[outer]).weight(&shape).weight(&shape);
        for cap in [None, Some(5.0)] {
            let capped = if cap.is_some() { " capped" } else { "" };
            table.compare(&format!("gates {width} {outer}{capped}"), &case, T, &|t, v, _| {
                let maps = [0, 1].map(|gate| (v[3 + gate], Some(v[1 + gate])));
                Ok(gates(t, v[0], maps, cap)?.to_vec())
            });
        }
    }
    // Blocks, their size, heads and rows; the last ones leave the kernels for blocks of 4 x 4.
    for (blocks, size, heads, rows) in [
        (256, 4, 4, 130),
        (384, 4, 4, 67),
        (256, 4, 8, 1500),
        (384, 4, 7, 33),
        (21, 4, 3, 65),
        (22, 4, 5, 1),
        (6, 4, 9, 70),
        (10, 4, 16, 5),
        (6, 4, 20, 70),
        (5, 32, 4, 70),
        (7, 5, 2, 9),
    ] {
        let width = blocks * size;
        let x = [2, rows, width];
        let mut case = new().input(&x).input(&x).input(&[width]).input(&[width]).input(&[width]);
        case = case.input(&[heads]).input(&[heads]);
        case = [(); 3].iter().fold(case, |case, ()| case.weight(&[blocks, size, size]));
        case = [(); 2].iter().fold(case, |case, ()| case.weight(&[heads, 3 * width]));
        let record = |t: &mut Tape, v: &[Var], biased: bool| {
            let map = |i: usize| (v[7 + i], biased.then_some(v[2 + i]));
            let Fed { q, k, v, gates: [i, f] } = qkv(t, [v[0], v[1]], [0, 1, 2].map(map), [3, 4].map(map))?;
            Ok(vec![q, k, v, i, f])
        };
        let name = format!("qkv {rows} of {blocks}x{size}, {heads} heads");
        table.compare(&name, &case, T, &|t, v, _| record(t, v, true));
        table.compare(&format!("{name}, no biases"), &case, T, &|t, v, _| record(t, v, false));
        // The gradients of one are added to those of the other, of which some are not there.
        table.compare(&format!("{name}, twice"), &case, T, &|t, v, _| {
            let mut first = record(t, v, true)?;
            let second = record(t, v, false)?;
            first.extend([second[1], second[4]]);
            Ok(first)
        });
        let mut evaluated = case.clone();
        evaluated.evaluated = true;
        table.compare(&format!("{name}, evaluated"), &evaluated, T, &|t, v, _| record(t, v, true));
    }
    generation(table);
    for (kind, groups, width) in [
        (NormKind::Layer, 1, 96),
        (NormKind::Layer, 4, 256),
        (NormKind::RootMeanSquare, 1, 640),
        (NormKind::Layer, 6, 768),
        (NormKind::Layer, 2, 1024),
        (NormKind::RootMeanSquare, 3, 33),
        (NormKind::RootMeanSquare, 1, 1536),
    ] {
        let options = Norm { kind, groups, eps: 1e-5, unit_offset: groups != 3 };
        let case = new().between(&[3, 67, width], -1.0, 3.0).input(&[width]).input(&[width]);
        table.compare(&format!("norm {kind:?} {groups} of {width}"), &case, T, &|t, v, _| {
            Ok(vec![norm(t, v[0], v[1], None, options)?, norm(t, v[0], v[1], Some(v[2]), options)?])
        });
        let shape = [3, 67, width];
        let case = new().between(&shape, -1.0, 3.0).input(&shape).input(&[width]).input(&[width]);
        table.compare(&format!("add_norm {kind:?} {groups} of {width}"), &case, T, &|t, v, _| {
            let (s, y) = add_norm(t, [v[0], v[1]], v[2], Some(v[3]), options)?;
            let (sum, z) = add_norm(t, [s, v[1]], v[2], None, options)?;
            Ok(vec![y, sum, z])
        });
        table.compare(&format!("gated_norm {kind:?} {groups} of {width}"), &case, T, &|t, v, _| {
            let y = gated_norm(t, v[0], v[1], v[2], Some(v[3]), options)?;
            Ok(vec![y, gated_norm(t, v[0], v[1], v[2], None, options)?])
        });
    }
    for (rows, vocabulary) in [(5, 50_304), (3, 8_193), (2, 7)] {
        let mut case = new().between(&[rows, 1, vocabulary], -8.0, 8.0).between(&[rows, 3], 0.0, 1.0);
        let settings = case.inputs[1].1.chunks_exact_mut(3).enumerate();
        for (i, settings) in settings {
            settings[0] = f64::from((i as f32 + 0.5) / 8.0);
            settings[1] = [1.0, 0.0, 0.5][i % 3];
            settings[2] = if i == 1 { 5.0 } else { vocabulary as f64 };
        }
        case.evaluated = true;
        table.compare(&format!("draw {rows} of {vocabulary}"), &case, 1e-3, &|t, v, _| {
            Ok(vec![draw(t, v[0], v[1])?])
        });
    }
    for cap in [15.0, 0.5] {
        let case = new().between(&[999], -40.0, 40.0);
        table.compare(&format!("soft_cap {cap}"), &case, T, &|t, v, _| Ok(vec![soft_cap(t, v[0], cap)?]));
    }
    // Rows enough for a block to take several, heads that fill their lanes, that do not, and that have none.
    for (rows, groups, width) in [
        (67, 8, 512),
        (67, 8, 1024),
        (601, 4, 1024),
        (301, 4, 1536),
        (50, 2, 1024),
        (67, 3, 300),
        (9, 5, 60),
        (67, 3, 99),
        (50, 1, 1536),
        (3, 2, 2100),
    ] {
        let shape = [2, rows, width];
        let case =
            new().between(&shape, -1.0, 3.0).input(&[width]).input(&[width]).input(&shape).input(&shape);
        for kind in [NormKind::Layer, NormKind::RootMeanSquare] {
            let options = Norm { kind, groups, eps: 1e-5, unit_offset: kind == NormKind::Layer };
            let name = format!("skip_norm {kind:?} {rows} of {groups} in {width}");
            table.compare(&name, &case, T, &|t, v, _| {
                Ok(vec![skip_norm(t, v[0], v[1], v[2], [v[3], v[4]], options)?])
            });
            // The gradients of one are added to those of the other.
            table.compare(&format!("{name} twice"), &case, T, &|t, v, _| {
                let other = skip_norm(t, v[3], v[2], v[1], [v[4], v[0]], options)?;
                Ok(vec![skip_norm(t, v[0], v[1], v[2], [v[3], v[4]], options)?, other])
            });
        }
    }
    use Activation::{Gelu, Relu, ReluSquared, Selu, Sigmoid, Swish};
    let case = new().between(&[3, 17, 60], -3.0, 3.0);
    for activation in [Gelu, Relu, ReluSquared, Selu, Sigmoid, Swish] {
        let name = format!("activated {activation:?}");
        table.compare(&name, &case, T, &|t, v, _| Ok(vec![activated(t, v[0], activation)?]));
    }
    for act in [Gelu, Relu, ReluSquared, Sigmoid, Swish, Selu] {
        let case = new().between(&[999], -5.0, 5.0).input(&[999]);
        table.compare(&format!("gated {act:?}"), &case, T, &|t, v, _| Ok(vec![gated(t, v[0], v[1], act)?]));
    }
    let case = new().input(&[3000]).ids(vec![5, 6, 7, 8]);
    table.compare("dropout", &case, T, &|t, v, i| Ok(vec![dropout(t, v[0], 0.3, i[0], 9)?]));
    for width in [300, 1200, 7] {
        let case = new().weight(&[41, width]).ids((0..700).map(|i| i * i % 40).collect());
        table.compare(&format!("embedding {width}"), &case, T, &|t, v, i| {
            Ok(vec![embedding(t, i[0], v[0], [7, 100])?])
        });
    }
    let case = new().input(&[3, 4, 50]);
    table.compare("last_token", &case, T, &|t, v, _| Ok(vec![last_token(t, v[0], None)?]));
    let case = new().input(&[9, 13, 50]).ids(marks(9 * 13));
    table.compare("last_token marked", &case, T, &|t, v, i| Ok(vec![last_token(t, v[0], Some(i[0]))?]));
    let case = new().input(&[3, 40, 200]);
    table.compare("mean_tokens", &case, T, &|t, v, _| Ok(vec![mean_tokens(t, v[0], None, None)?.mean]));
    let case = new().input(&[9, 13, 200]).input(&[9, 200]).between(&[9, 1], 1.0, 5.0).ids(marks(9 * 13));
    table.compare("mean_tokens marked", &case, T, &|t, v, i| {
        let mean = mean_tokens(t, v[0], Some([v[1], v[2]]), Some(i[0]))?;
        Ok(vec![mean.mean, mean.state[0], mean.state[1]])
    });
    let bits = |n: usize| noise(9, n).iter().map(|x| (*x as f32).to_bits()).collect::<Vec<u32>>();
    let case = new().input(&[3, 70, 50]).ids(bits(3 * 70 * 50));
    table.compare("from_bits", &case, T, &|t, v, i| {
        let x = from_bits(t, i[0], [3, 70, 50])?;
        Ok(vec![add(t, v[0], x)?])
    });
    for width in [1, 7, 96] {
        let mut targets = bits(39 * width);
        targets.iter_mut().step_by(5).for_each(|target| *target = IGNORE);
        let case = new().input(&[3, 13, width]).input(&[1]).ids(targets);
        table.compare(&format!("squared_error {width}"), &case, T, &|t, v, i| {
            let (loss, errors) = squared_error(t, v[0], i[0], v[1])?;
            Ok(vec![loss, errors])
        });
    }
    for length in [5, 70, 300] {
        let case = new().input(&[2, length, 50]);
        table.compare(&format!("reverse {length}"), &case, T, &|t, v, _| Ok(vec![reverse(t, v[0], None)?]));
        let case = case.ids(marks(2 * length));
        table.compare(&format!("reverse {length} marks"), &case, T, &|t, v, i| {
            Ok(vec![reverse(t, v[0], Some(i[0]))?])
        });
    }
    // The last has more rows than a slice.
    for (rows, vocabulary, cap) in [
        (39, 70, None),
        (39, 5000, Some(5.0)),
        (39, 5000, None),
        (39, 5003, None),
        (20, 50_304, Some(30.0)),
        (1100, 270_000, None),
    ] {
        let targets = (0..rows as u32).map(|i| if i % 5 == 2 { IGNORE } else { i * 7 % 70 }).collect();
        let case = new().between(&[rows, 8], -2.0, 2.0).input(&[vocabulary]).input(&[1]);
        let case = case.weight(&[vocabulary, 8]).ids(targets);
        table.compare(&format!("head_loss {rows}x{vocabulary}"), &case, T, &|t, v, i| {
            let head = Head { weight: v[3], bias: Some(v[1]), cap };
            Ok(vec![head_loss(t, v[0], head, i[0], v[2])?.0])
        });
    }
    for (length, taps, width, silu) in [
        (70, 4, 40, true),
        (3, 4, 40, false),
        (200, 4, 520, true),
        (70, 4, 37, true),
        (33, 1, 40, true),
        (70, 3, 40, true),
    ] {
        let case = new().input(&[2, length, width]).input(&[width, 1, taps]).input(&[width]);
        let case = case.input(&[2, taps - 1, width]).ids(marks(2 * length));
        table.compare(&format!("causal_conv {length} {taps} {width} marks"), &case, T, &|t, v, i| {
            let (y, window) = causal_conv(t, v[0], v[1], Some(v[2]), Some(v[3]), Some(i[0]), silu)?;
            Ok(if taps > 1 { vec![y, window] } else { vec![y] })
        });
    }
    let case = new().input(&[2, 150, 40]).input(&[40, 1, 4]);
    table.compare("causal_conv plain", &case, T, &|t, v, _| {
        Ok(vec![causal_conv(t, v[0], v[1], None, None, None, true)?.0])
    });
    table.compare("causal_conv twice, its window alone", &case, T, &|t, v, _| {
        let (y, _) = causal_conv(t, v[0], v[1], None, None, None, true)?;
        let (_, window) = causal_conv(t, v[0], v[1], None, None, None, false)?;
        Ok(vec![y, window])
    });
    attentions(table);
}

/// Attention and what goes with it: places, caches, rotary and learned positions.
fn attentions(table: &mut Table<'_>) {
    const T: f64 = 2e-5;
    for (length, size, heads, width, marked) in [
        (1, 70, 2, 16, false),
        (70, 33, 3, 20, true),
        (200, 64, 4, 32, true),
        (130, 300, 2, 128, false),
        (70, 33, 3, 24, true),
        (300, 64, 2, 64, true),
        (140, 500, 2, 64, false),
        (257, 40, 2, 80, true),
        (16, 16, 1, 120, true),
        (193, 140, 1, 96, true),
    ] {
        let [tokens, cache] = [length, size].map(|rows| [2, rows, heads * width]);
        let case = Case::default().input(&tokens).input(&tokens).input(&tokens);
        let case = case.input(&cache).input(&cache).between(&[2], 40.0, 40.2).ids(marks(2 * length));
        let name = format!("attention {length} {size} {heads}x{width}{}", if marked { " marks" } else { "" });
        table.compare(&name, &case, T, &|t, v, i| {
            let marks = if marked { Some(i[0]) } else { None };
            let places = positions(t, [2, length], size, Some(v[5]), marks)?;
            let y = attention(t, heads, [v[0], v[1], v[2]], Some([v[3], v[4]]), places)?;
            let (k, v) = (window(t, size, v[1], Some(v[3]), places)?, window(t, size, v[2], None, places)?);
            Ok(vec![y, k, v, places.position, places.first, places.after])
        });
    }
    // Without a cache: whole sequences, windows of them, documents and pads.
    for (length, size, heads, width, marked) in [
        (17, 8, 2, 64, false),
        (64, 64, 3, 64, false),
        (333, 333, 2, 64, false),
        (333, 333, 2, 64, true),
        (400, 70, 2, 64, false),
        (400, 150, 2, 32, true),
        (129, 129, 2, 16, false),
        (260, 260, 1, 96, true),
        (260, 90, 1, 128, true),
    ] {
        let tokens = [2, length, heads * width];
        let case = Case::default().input(&tokens).input(&tokens).input(&tokens).ids(marks(2 * length));
        let name =
            format!("attention {length} {size} {heads}x{width} alone{}", if marked { " marks" } else { "" });
        table.compare(&name, &case, T, &|t, v, i| {
            let places = positions(t, [2, length], size, None, marked.then_some(i[0]))?;
            // The gradients of one are added to those of the other.
            let others = attention(t, heads, [v[1], v[0], v[2]], None, places)?;
            Ok(vec![attention(t, heads, [v[0], v[1], v[2]], None, places)?, others])
        });
    }
    let tokens = [2, 70, 48];
    let case = Case::default().input(&tokens).input(&tokens).input(&tokens);
    table.compare("attention plain", &case, T, &|t, v, _| {
        let places = positions(t, [2, 70], 70, None, None)?;
        Ok(vec![attention(t, 3, [v[0], v[1], v[2]], None, places)?])
    });
    let case = Case::default().input(&tokens).input(&[100, 48]).between(&[2], 900.0, 901.0);
    table.compare("rotary", &case, T, &|t, v, _| {
        let places = positions(t, [2, 70], 70, Some(v[2]), None)?;
        let table = angles(t, places.position, 12, 10_000.0)?;
        Ok(vec![rotary(t, v[0], table)?])
    });
    table.compare("learned_positions", &case, T, &|t, v, _| {
        let places = positions(t, [2, 70], 70, None, None)?;
        Ok(vec![learned_positions(t, v[0], v[1], places.position)?])
    });
}

fn cells(table: &mut Table<'_>) {
    use ForgetGate::{Exponential as ExponentialForget, Sigmoid as SigmoidForget};
    use InputGate::{Exponential, Sigmoid};
    for (length, dqk, dhv, marked, input_gate, forget_gate, normalize) in [
        (1, 16, 16, false, Exponential, SigmoidForget, true),
        (70, 16, 24, true, Exponential, SigmoidForget, true),
        (200, 64, 64, false, Exponential, SigmoidForget, true),
        (130, 80, 96, true, Exponential, SigmoidForget, true),
        (300, 128, 256, true, Exponential, SigmoidForget, true),
        (130, 36, 20, true, Exponential, SigmoidForget, true),
        (1, 16, 16, false, Sigmoid, SigmoidForget, true),
        (130, 32, 32, true, Sigmoid, SigmoidForget, true),
        (130, 32, 32, true, Exponential, ExponentialForget, true),
        (130, 32, 32, true, Sigmoid, SigmoidForget, false),
        (130, 32, 32, true, Sigmoid, ExponentialForget, false),
    ] {
        let (batch, heads) = (2, 3);
        // An exponential gate that lets the state grow would make all else small.
        let forget = if forget_gate == ExponentialForget { (-2.0, 0.2) } else { (0.0, 5.0) };
        let mut case = Case::default()
            .input(&[batch, length, heads * dqk])
            .input(&[batch, length, heads * dqk])
            .input(&[batch, length, heads * dhv])
            .between(&[batch, length, heads], -2.0, 2.0)
            .between(&[batch, length, heads], forget.0, forget.1)
            .input(&[batch, heads, dqk, dhv])
            .input(&[batch, heads, dqk])
            .input(&[batch, heads]);
        if marked {
            case = case.ids(marks(batch * length));
        }
        let form = Form::Chunkwise(64);
        let config = MlstmConfig { heads, input_gate, forget_gate, normalize, eps: 1e-6, form };
        let mut name = format!("mlstm {length} {dqk} {dhv}{}", if marked { " marks" } else { "" });
        for (differs, option) in [
            (input_gate == Sigmoid, " sigmoid i"),
            (forget_gate == ExponentialForget, " exp f"),
            (!normalize, " no norm"),
        ] {
            name += if differs { option } else { "" };
        }
        table.compare(&name, &case, 2e-4, &|t, v, i| {
            let state = Some(MlstmState { c: v[5], n: v[6], m: v[7] });
            let (h, s) = mlstm(t, &config, v[0], v[1], v[2], (v[3], v[4]), state, i.first().copied())?;
            Ok(vec![h, s.c, s.n, s.m])
        });
    }
    let usual = SlstmConfig {
        heads: 2,
        function: CellFunction::Slstm,
        input_gate: Exponential,
        forget_gate: SigmoidForget,
        gradient_cut: false,
        gradient_clip: None,
    };
    let lstm = SlstmConfig { function: CellFunction::Lstm, ..usual.clone() };
    let siging = SlstmConfig { input_gate: Sigmoid, ..usual.clone() };
    let expf = SlstmConfig { forget_gate: ExponentialForget, ..usual.clone() };
    let cut = SlstmConfig { gradient_cut: true, ..usual.clone() };
    let clip = SlstmConfig { gradient_clip: Some(0.1), ..usual.clone() };
    let lstm_clip = SlstmConfig { gradient_clip: Some(0.1), ..lstm.clone() };
    for (batch, length, dim, marked, option, config) in [
        (5, 1, 16, false, "", usual.clone()),
        (5, 60, 16, true, "", usual.clone()),
        (5, 40, 64, false, "", usual.clone()),
        (5, 20, 192, false, "", usual.clone()),
        (5, 60, 16, true, " sigmoid i", siging.clone()),
        (5, 60, 16, true, " exp f", expf.clone()),
        (5, 60, 16, true, " cut", cut.clone()),
        (5, 60, 16, true, " clip", clip.clone()),
        (5, 60, 20, true, "", lstm.clone()),
        (5, 60, 20, true, " clip", lstm_clip.clone()),
        (5, 60, 20, false, " cut", SlstmConfig { gradient_cut: true, ..lstm.clone() }),
        // Every kernel for bf16, whole and in part; two tiles of sequences, the second not full.
        (5, 60, 18, true, "", usual.clone()),
        (11, 60, 40, true, " exp f", expf),
        (11, 60, 72, true, " sigmoid i", siging.clone()),
        (11, 60, 128, true, "", usual.clone()),
        (11, 60, 128, true, " clip", clip.clone()),
        (600, 12, 128, true, "", usual.clone()),
        (11, 60, 128, true, " empty state", usual.clone()),
        (11, 40, 144, false, " sigmoid i", siging),
        (11, 60, 192, true, " clip", clip.clone()),
        (11, 40, 208, true, " cut", cut),
        (11, 60, 256, true, "", usual),
        (11, 60, 256, true, " clip", clip),
        (11, 60, 64, true, "", lstm.clone()),
        (11, 60, 128, true, " clip", lstm_clip),
        (11, 40, 176, true, "", lstm.clone()),
        (11, 40, 240, true, "", lstm),
    ] {
        let (heads, function) = (config.heads, config.function);
        let width = heads * dim;
        let mut case = Case::default();
        for _ in 0..4 {
            case = case.input(&[batch, length, width]);
        }
        case = case.between(&[heads, 4 * dim, dim], -0.1, 0.1).input(&[4 * width]);
        case = case.input(&[batch, width]).input(&[batch, width]);
        if function == CellFunction::Slstm {
            case = case.between(&[batch, width], 0.5, 1.5).input(&[batch, width]);
        }
        if option == " empty state" {
            for part in [7, 8] {
                case.inputs[part].1.fill(0.0);
            }
        }
        if marked {
            case = case.ids(marks(batch * length));
        }
        let name =
            format!("{function:?} {batch} {length} {dim}{}{option}", if marked { " marks" } else { "" });
        let record: Record<'_> = &|t, v, i| {
            let state = SlstmState { h: v[6], c: v[7], n: v.get(8).copied(), m: v.get(9).copied() };
            let gates = [v[0], v[1], v[2], v[3]];
            let (h, s) = slstm(t, &config, gates, v[4], v[5], Some(state), i.first().copied())?;
            Ok([Some(h), Some(s.h), Some(s.c), s.n, s.m].into_iter().flatten().collect())
        };
        if table.precision == Precision::Bf16
            && function == CellFunction::Slstm
            && let Err(e) = blind_to_ties(&mut case, record)
        {
            table.row(&name, f64::INFINITY, 0.0, &format!("{e}"));
            continue;
        }
        table.compare(&name, &case, 5e-5, record);
    }
}

/// Gradients of the last state of an sLSTM that come from a loss of c / n and of log n + m alone. One that sees
/// m itself has a gradient that jumps from one token to another where both set m equally: rounding to bf16 is
/// enough for it.
fn blind_to_ties(case: &mut Case, record: Record<'_>) -> xlstm::Result<()> {
    let [values, ..] = case.rounded(Precision::Bf16).cpu(record)?;
    let [h, last, c, n, m] = &values[..] else { return Ok(()) };
    let mut seeds: Vec<Vec<f64>> =
        [h, last, c, n, m].iter().enumerate().map(|(i, x)| case.seed(i, x.len())).collect();
    for (i, (c, n)) in c.iter().zip(n).enumerate() {
        let (ratio, log) = (seeds[2][i], seeds[4][i]);
        seeds[2][i] = ratio / n;
        seeds[3][i] = (log - ratio * c / n) / n;
    }
    case.seeds = Some(seeds);
    Ok(())
}

/// Steps of the optimizer with Muon: how far parameters have moved, and the first moments. Matrices are high,
/// wide and square, stacked and of odd sides; shapes come more than once, in either direction.
fn optimizer(table: &mut Table<'_>) {
    const STEPS: u64 = 4;
    const OPTIONS: OptimizerOptions =
        OptimizerOptions { muon: Some(MuonOptions::DEFAULT), border_rate: 0.5, ..OptimizerOptions::DEFAULT };
    let (mut builder, start) = (Builder::new(), || Init::Normal(0.1));
    let embedding = builder.parameter("embedding", &[300, 256], start());
    builder.at_border(embedding);
    builder.matrices("up", &[2 * 704, 256], start(), [704; 2]);
    builder.matrices("down", &[256, 704], start(), [256]);
    builder.matrices("square", &[4 * 256, 256], start(), [256; 4]);
    builder.matrices("odd", &[131, 77], start(), [131]);
    builder.matrices("recurrent", &[3, 4 * 36, 36], start(), [36; 12]);
    builder.parameter("norm", &[517], start());
    let (specs, precision) = (builder.finish(), table.precision);
    let first = Parameters::<f32>::initialize(&specs, 3);
    let gradients = |step: u64| -> Vec<Vec<f64>> {
        let seeds = 10_000 * (step + 1)..;
        specs.iter().zip(seeds).map(|(spec, seed)| noise(seed, spec.count())).collect()
    };
    let truth = || {
        let mut parameters = Parameters::<f64>::zeros(&specs);
        parameters.values = first.values.iter().map(|w| wide(w)).collect();
        let mut optimizer = Optimizer::new(OPTIONS, &parameters);
        for step in 0..STEPS {
            let gradients = gradients(step);
            optimizer.update(&mut parameters, &gradients, global_norm(&gradients), 0.02);
        }
        (parameters.values, optimizer.first)
    };
    let gpu = || -> xlstm::Result<_> {
        let layout = layout_of(&specs);
        let parameters = CudaParameters::zeros(table.gpu, &layout, precision)?;
        parameters.upload(&first.values)?;
        let sums = CudaTensors::zeros(table.gpu, &layout)?;
        let mut optimizer = CudaOptimizer::new(table.gpu, &specs, OPTIONS, precision)?;
        for step in 0..STEPS {
            sums.upload(&gradients(step).iter().map(|g| narrow(g)).collect::<Vec<_>>())?;
            optimizer.update(&parameters, &sums, 0.02)?;
        }
        Ok([parameters.download()?, optimizer.moments().0.download()?])
    };
    let ([values, moments], again) = match (gpu(), gpu()) {
        (Ok(once), Ok(again)) => (once.clone(), once == again),
        (Err(e), _) | (_, Err(e)) => return table.row("muon", f64::INFINITY, 0.0, &format!("{e}")),
    };
    let (true_values, true_moments) = truth();
    table.row("muon: same bits", f64::from(u8::from(!again)), 0.0, "");
    for (i, spec) in specs.iter().enumerate() {
        let moved = |x: &[f64]| -> Vec<f64> {
            x.iter().zip(&first.values[i]).map(|(x, start)| x - f64::from(*start)).collect()
        };
        // What AdamW does is f32 in either precision; what Muon multiplies is not.
        let is_matrix = matches!(spec.role, Role::Matrices(_));
        let bound = if is_matrix && precision == Precision::Bf16 { MUON_BF16 } else { 1e-4 };
        let error = relative_norm(&moved(&wide(&values[i])), &moved(&true_values[i]));
        let momentum = relative_norm(&wide(&moments[i]), &true_moments[i]);
        table.row(&format!("muon {}", spec.name), error, bound, "the way of four steps");
        table.row(&format!("muon {}, moment", spec.name), momentum, 1e-5, "");
    }
}

/// What the search of algorithms finds can be saved, and gives the same bits again.
fn search(table: &mut Table<'_>, ordinal: usize) -> Outcome<()> {
    let case = Case::default().input(&[2, 512, 256]).weight(&[384, 256]).rounded(table.precision);
    let record: Record<'_> = &|t, v, _| Ok(vec![linear(t, v[0], v[1], None)?]);
    let [found, again] = [Gpu::new(ordinal)?, Gpu::new(ordinal)?];
    found.search(true);
    let first = case.gpu(record, table.precision, &found)?;
    let text = found.export_algorithms()?;
    let refused = again.import_algorithms(&text.replace(found.name(), "another card"))?.is_none();
    let taken = again.import_algorithms(&text)?.is_none();
    let second = case.gpu(record, table.precision, &again)?;
    let same = taken && first == second && again.export_algorithms()? == text;
    table.row("algorithms saved: same bits", f64::from(u8::from(!same)), 0.0, "");
    table.row("algorithms of another card", f64::from(u8::from(refused)), 0.0, "are not taken");
    Ok(())
}

fn main() -> Outcome<()> {
    let ordinal = std::env::args().nth(1).map_or(Ok(0), |x| x.parse())?;
    let gpu = Gpu::new(ordinal)?;
    println!("{} ({}, {} multiprocessors)", gpu.name(), gpu.architecture(), gpu.multiprocessors()?);
    println!("{:<38} {:<5} {:>9} {:>9}", "what", "", "error", "bound");
    let mut table = Table { gpu: &gpu, precision: Precision::F32, failures: 0 };
    for precision in [Precision::F32, Precision::Bf16] {
        table.precision = precision;
        operations(&mut table);
        cells(&mut table);
        optimizer(&mut table);
        search(&mut table, ordinal)?;
    }
    println!("{} failures", table.failures);
    if table.failures > 0 { Err("the GPU and the truth differ".into()) } else { Ok(()) }
}
