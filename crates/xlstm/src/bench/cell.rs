//! The cells of a preset model alone, timed on random numbers at its training shape, forward and
//! forward with backward, and how far they are from their f64 form.

use std::time::Instant;

use super::{Measured, Preset, check_repeats, forget_peak, peak_megabytes};
use crate::cell::mlstm::{Form, MlstmConfig, mlstm};
use crate::cell::slstm::{CellFunction, SlstmConfig, slstm};
use crate::cell::{ForgetGate, InputGate};
#[cfg(feature = "cuda")]
use crate::engine::cuda::{CudaParameters, CudaTensors, Layout};
use crate::engine::operation::Element;
use crate::engine::{Device, Mode, Precision, Program, Tape, Var};
use crate::error::{Error, Result};
use crate::model::{BlockKind, Family, LstmType, ModelConfig};
use crate::rng::Rng;

/// How long one cell takes.
#[derive(Clone, Debug, PartialEq)]
pub struct CellTimes {
    /// `mLSTM`, `sLSTM` or `LSTM`.
    pub name: &'static str,
    /// Its shape, for people.
    pub shape: String,
    /// Forward, as evaluation has it.
    pub forward: Measured,
    /// Forward and backward, as training has them.
    pub training: Measured,
    /// The largest error of its output and of all gradients of a short batch, each relative to the norm of
    /// what f64 gives for the same numbers.
    pub error: f64,
}

/// An input, where its random numbers are centred and how far they spread.
type Input = (Var, [f64; 2]);

/// A cell with its width, of queries and keys and of values where these differ.
#[derive(Clone, Debug)]
enum Cell {
    Mlstm { config: MlstmConfig, chunk: usize, widths: [usize; 2] },
    Slstm { config: SlstmConfig, width: usize },
}

/// Times each cell that the blocks of a preset's model hold, `repeats` times each.
///
/// # Errors
/// When there is nothing to time, the model has no such cell, or a GPU fails.
pub fn cells(preset: &Preset, device: &Device, repeats: usize) -> Result<Vec<CellTimes>> {
    check_repeats(repeats)?;
    let cells = cells_of(&preset.model);
    if cells.is_empty() {
        return Err(Error::config(format!("the model of {} has no recurrent cell", preset.name))
            .hint("use a preset of another family, such as lm-mixed-128"));
    }
    cells.iter().map(|cell| time(cell, preset, device, repeats)).collect()
}

/// The cells of a model's blocks, each once.
fn cells_of(model: &ModelConfig) -> Vec<Cell> {
    let memory = |heads: usize, chunk: usize, eps: f64, widths: [usize; 2]| {
        let (input_gate, forget_gate) = (InputGate::Exponential, ForgetGate::Sigmoid);
        let form = Form::Chunkwise(chunk);
        let config = MlstmConfig { heads, input_gate, forget_gate, normalize: true, eps, form };
        Cell::Mlstm { config, chunk, widths }
    };
    let recurrent = |heads: usize, function: CellFunction, width: usize| {
        let config = SlstmConfig {
            heads,
            function,
            input_gate: InputGate::Exponential,
            forget_gate: ForgetGate::Sigmoid,
            gradient_cut: false,
            gradient_clip: None,
        };
        Cell::Slstm { config, width }
    };
    match model.family {
        Family::Small => {
            let (kinds, options, inner) = (model.block_kinds(), &model.mlstm, model.inner_dim());
            let mlstm = memory(options.num_heads, options.chunk_size, options.eps, [inner; 2]);
            let slstm = recurrent(model.slstm.num_heads, model.slstm.function, model.embedding_dim);
            let both = [(BlockKind::Mlstm, mlstm), (BlockKind::Slstm, slstm)].into_iter();
            both.filter(|(kind, _)| kinds.contains(kind)).map(|(_, cell)| cell).collect()
        }
        Family::Large => {
            let options = &model.large;
            let widths = options.head_dims(model.embedding_dim);
            vec![memory(options.num_heads, options.chunk_size, options.eps, widths)]
        }
        Family::Lstm => vec![recurrent(1, CellFunction::Lstm, model.lstm.hidden_dim(model.embedding_dim))],
        Family::Original => {
            let options = &model.original;
            vec![match options.lstm_type {
                LstmType::Mlstm => {
                    memory(options.num_heads, options.chunk_size, 1e-6, [options.hidden_size; 2])
                }
                LstmType::Slstm => recurrent(options.num_heads, CellFunction::Slstm, options.hidden_size),
            }]
        }
        Family::Transformer => Vec::new(),
    }
}

impl Cell {
    fn name(&self) -> &'static str {
        match self {
            Cell::Mlstm { .. } => "mLSTM",
            Cell::Slstm { config, .. } => match config.function {
                CellFunction::Slstm => "sLSTM",
                CellFunction::Lstm => "LSTM",
            },
        }
    }

    fn shape(&self) -> String {
        let heads = |count: usize| if count == 1 { "1 head".into() } else { format!("{count} heads") };
        match self {
            Cell::Mlstm { config, chunk, widths } => {
                let [qk, v] = widths.map(|width| width / config.heads);
                format!("{}, queries of {qk}, values of {v}, chunks of {chunk}", heads(config.heads))
            }
            Cell::Slstm { config, width } => format!("{} of {}", heads(config.heads), width / config.heads),
        }
    }

    /// Numbers of its recurrent matrix and biases.
    fn parameters(&self) -> usize {
        match self {
            Cell::Mlstm { .. } => 0,
            Cell::Slstm { config, width } => 4 * width * (width / config.heads) + 4 * width,
        }
    }

    /// Multiplications of a token, forward.
    fn products(&self) -> usize {
        match self {
            // C k v^T and q C, and half a chunk of scores and their sums.
            Cell::Mlstm { config, chunk, widths: [qk, v] } => {
                2 * qk * v / config.heads + (qk + v) * chunk / 2
            }
            Cell::Slstm { config, width } => 4 * width * (width / config.heads),
        }
    }

    /// Records the cell over (batch, length) tokens from an empty state; its inputs, and h.
    fn record(&self, tape: &mut Tape, [batch, length]: [usize; 2]) -> Result<(Vec<Input>, Var)> {
        let mut inputs = Vec::new();
        let mut spread = |tape: &mut Tape, shape: &[usize], of: [f64; 2]| {
            let var = tape.input_with_gradient(shape);
            inputs.push((var, of));
            var
        };
        // Sums of many such products stay near 1.
        let mut input = |tape: &mut Tape, shape: &[usize], centre: f64| spread(tape, shape, [centre, 0.2]);
        let h = match self {
            Cell::Mlstm { config, widths: [qk, v], .. } => {
                let [q, k] = [(); 2].map(|()| input(tape, &[batch, length, *qk], 0.0));
                let v = input(tape, &[batch, length, *v], 0.0);
                // Forget gates start about as open.
                let gates = [0.0, 4.5].map(|centre| input(tape, &[batch, length, config.heads], centre));
                mlstm(tape, config, q, k, v, gates.into(), None, None)?.0
            }
            Cell::Slstm { config, width } => {
                let gates = [0.0, 4.5, 0.0, 0.0].map(|centre| input(tape, &[batch, length, *width], centre));
                let size = width / config.heads;
                let bias = input(tape, &[4 * width], 0.0);
                let recurrent =
                    spread(tape, &[config.heads, 4 * size, size], [0.0, (size as f64).sqrt().recip()]);
                slstm(tape, config, gates, recurrent, bias, None, None)?.0
            }
        };
        Ok((inputs, h))
    }
}

/// Random numbers that an input has at most before they begin anew; no width divides it.
const DRAWN: usize = 1_000_003;

/// A recorded cell with its inputs set, and what it is replayed over.
struct Recorded<'a, T> {
    device: &'a Device,
    program: Program<T>,
    inputs: Vec<Var>,
    h: Var,
    mode: Mode,
    /// No parameters: R is an input.
    #[cfg(feature = "cuda")]
    none: Option<(CudaParameters, CudaTensors)>,
}

impl<'a, T: Element> Recorded<'a, T> {
    /// With random numbers as `precision` stores them.
    fn new(
        cell: &Cell,
        shape: [usize; 2],
        mode: Mode,
        device: &'a Device,
        precision: Precision,
    ) -> Result<Self> {
        let mut tape = Tape::new(mode);
        let (inputs, h) = cell.record(&mut tape, shape)?;
        let sizes: Vec<usize> = inputs.iter().map(|(var, _)| tape.shape(*var).len()).collect();
        let size = tape.shape(h).len();
        tape.keep(h);
        if mode == Mode::Train {
            tape.seed_gradient(h);
        }
        let mut program = Program::<T>::new(tape, device)?;
        let mut rng = Rng::new(1, 0);
        let mut draw = |size: usize, [centre, spread]: [f64; 2]| -> Vec<T> {
            let mut number = || precision.round((centre + spread * rng.normal()) as f32);
            let drawn: Vec<T> = (0..size.min(DRAWN)).map(|_| T::from_f64(f64::from(number()))).collect();
            drawn.iter().copied().cycle().take(size).collect()
        };
        for ((var, of), size) in inputs.iter().zip(sizes) {
            program.set_input(*var, &draw(size, *of))?;
        }
        if mode == Mode::Train {
            program.set_seed(h, &draw(size, [0.0, 0.2]))?;
        }
        Ok(Recorded {
            device,
            program,
            inputs: inputs.into_iter().map(|(var, _)| var).collect(),
            h,
            mode,
            #[cfg(feature = "cuda")]
            none: match device {
                Device::Cpu(..) => None,
                Device::Cuda(gpu, precision) => {
                    let layout = Layout::new([]);
                    let parameters = CudaParameters::zeros(gpu, &layout, *precision)?;
                    Some((parameters, CudaTensors::zeros(gpu, &layout)?))
                }
            },
        })
    }

    /// Forward and, in training, backward, until all is done.
    fn replay(&mut self) -> Result<()> {
        let (program, mode) = (&mut self.program, self.mode);
        #[cfg(feature = "cuda")]
        if let (Device::Cuda(gpu, _), Some((parameters, gradients))) = (self.device, &mut self.none) {
            program.forward(&*parameters)?;
            if mode == Mode::Train {
                program.backward(&*parameters, gradients)?;
            }
            return gpu.synchronize();
        }
        self.device.install(|| {
            let none: Vec<Vec<T>> = Vec::new();
            program.forward(&none)?;
            match mode {
                Mode::Train => program.backward(&none, &mut Vec::new()),
                Mode::Evaluate => Ok(()),
            }
        })
    }

    /// h and the gradients of all inputs.
    fn numbers(&mut self) -> Result<Vec<Vec<T>>> {
        self.replay()?;
        let mut all = vec![self.program.value(self.h)?];
        for &var in &self.inputs {
            all.push(self.program.gradient(var)?);
        }
        Ok(all)
    }
}

/// Sequences and tokens of the batch that errors are measured on.
const ERROR_SHAPE: [usize; 2] = [9, 96];

/// See [`CellTimes::error`].
fn error(cell: &Cell, device: &Device) -> Result<f64> {
    let (cpu, precision) = (Device::cpu(device.threads())?, device.precision());
    let truth = Recorded::<f64>::new(cell, ERROR_SHAPE, Mode::Train, &cpu, precision)?.numbers()?;
    let found = Recorded::<f32>::new(cell, ERROR_SHAPE, Mode::Train, device, precision)?.numbers()?;
    let norm = |numbers: &mut dyn Iterator<Item = f64>| numbers.map(|x| x * x).sum::<f64>().sqrt();
    let errors = truth.iter().zip(&found).map(|(truth, found)| {
        let difference = norm(&mut truth.iter().zip(found).map(|(a, b)| a - f64::from(*b)));
        difference / norm(&mut truth.iter().copied())
    });
    // A NaN is the worst.
    Ok(errors.fold(0.0, |worst, error| if error <= worst { worst } else { error }))
}

fn time(cell: &Cell, preset: &Preset, device: &Device, repeats: usize) -> Result<CellTimes> {
    let shape = [preset.batch_size, preset.length];
    let measure = |mode: Mode| -> Result<Measured> {
        let mut recorded = Recorded::<f32>::new(cell, shape, mode, device, Precision::F32)?;
        let mut seconds = Vec::with_capacity(repeats);
        // Two do not count: caches, work space and graphs are there by then.
        for repeat in 0..2 + repeats {
            if repeat == 2 {
                forget_peak(device);
            }
            let start = Instant::now();
            recorded.replay()?;
            if repeat >= 2 {
                seconds.push(start.elapsed().as_secs_f64());
            }
        }
        let (tokens, times) = (shape[0] * shape[1], if mode == Mode::Train { 3 } else { 1 });
        Ok(Measured {
            parameters: cell.parameters(),
            tokens,
            operations: (2 * times * tokens * cell.products()) as f64,
            bytes: 0.0,
            state_bytes: 0.0,
            seconds,
            peak_megabytes: peak_megabytes(device),
        })
    };
    let (forward, training) = (measure(Mode::Evaluate)?, measure(Mode::Train)?);
    Ok(CellTimes { name: cell.name(), shape: cell.shape(), forward, training, error: error(cell, device)? })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::PRESETS;
    use crate::bench::presets::tests::tiny;

    #[test]
    fn both_cells_of_a_mix_are_timed() {
        let times = cells(&tiny(), &Device::cpu(1).unwrap(), 2).unwrap();
        assert_eq!(times.iter().map(|times| times.name).collect::<Vec<_>>(), ["mLSTM", "sLSTM"]);
        for CellTimes { forward, training, error, .. } in &times {
            assert_eq!((forward.seconds.len(), training.seconds.len()), (2, 2));
            assert_eq!(training.operations, 3.0 * forward.operations);
            assert!(forward.median() > 0.0);
            assert!(*error > 0.0 && *error < 1e-5, "{error}");
        }
    }

    /// What cells count of their products is what the models count of them.
    #[test]
    fn products_are_those_of_the_models() {
        for name in PRESETS {
            let model = Preset::named(name).unwrap().model;
            let language_model = crate::model::LanguageModel::new(&model).unwrap();
            let in_states = language_model.flops_per_token() / 2 - language_model.weight_products();
            let layers = match model.family {
                Family::Original => model.num_blocks * model.original.num_layers,
                Family::Small => model.block_kinds().iter().filter(|kind| **kind == BlockKind::Mlstm).count(),
                Family::Transformer => continue,
                Family::Large | Family::Lstm => model.num_blocks,
            };
            let cells = cells_of(&model);
            let memory = cells.iter().find(|cell| matches!(cell, Cell::Mlstm { .. }));
            assert_eq!(in_states as usize, layers * memory.map_or(0, Cell::products), "{name}");
        }
    }
}
