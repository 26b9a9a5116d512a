//! The cells of a preset model alone, timed on random numbers at its training shape, forward and
//! forward with backward.

use std::time::Instant;

use super::{Measured, Preset, check_repeats, peak_megabytes};
use crate::cell::mlstm::{Form, MlstmConfig, mlstm};
use crate::cell::slstm::{CellFunction, SlstmConfig, slstm};
use crate::cell::{ForgetGate, InputGate};
use crate::engine::{Device, Mode, Program, Tape, Var};
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
}

/// A cell with its width, of queries and keys and of values where these differ.
#[derive(Clone, Debug)]
enum Cell {
    Mlstm { config: MlstmConfig, chunk: usize, widths: [usize; 2] },
    Slstm { config: SlstmConfig, width: usize },
}

/// Times each cell that the blocks of a preset's model hold, `repeats` times each.
///
/// # Errors
/// When there is nothing to time, the model has no such cell, or the device is a GPU.
pub fn cells(preset: &Preset, device: &Device, repeats: usize) -> Result<Vec<CellTimes>> {
    check_repeats(repeats)?;
    let cells = cells_of(&preset.model);
    if cells.is_empty() {
        return Err(Error::config(format!("the model of {} has no recurrent cell", preset.name))
            .hint("use a preset of another family, such as lm-mixed-128"));
    }
    match device {
        Device::Cpu(..) => cells.iter().map(|cell| time(cell, preset, device, repeats)).collect(),
        #[cfg(feature = "cuda")]
        Device::Cuda(..) => {
            Err(Error::config("cells are timed on the processor alone").hint("use --device cpu"))
        }
    }
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

    /// Records the cell over (batch, length) tokens from an empty state; its inputs with where each
    /// is centred, and h.
    fn record(&self, tape: &mut Tape, [batch, length]: [usize; 2]) -> Result<(Vec<(Var, f64)>, Var)> {
        let mut inputs = Vec::new();
        let mut input = |tape: &mut Tape, shape: &[usize], centre: f64| {
            let var = tape.input_with_gradient(shape);
            inputs.push((var, centre));
            var
        };
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
                let recurrent = input(tape, &[config.heads, 4 * size, size], 0.0);
                let bias = input(tape, &[4 * width], 0.0);
                slstm(tape, config, gates, recurrent, bias, None, None)?.0
            }
        };
        Ok((inputs, h))
    }
}

fn time(cell: &Cell, preset: &Preset, device: &Device, repeats: usize) -> Result<CellTimes> {
    let shape = [preset.batch_size, preset.length];
    let measure = |mode: Mode| -> Result<Measured> {
        let mut tape = Tape::new(mode);
        let (inputs, h) = cell.record(&mut tape, shape)?;
        let sizes: Vec<usize> = inputs.iter().map(|(var, _)| tape.shape(*var).len()).collect();
        let size = tape.shape(h).len();
        tape.keep(h);
        if mode == Mode::Train {
            tape.seed_gradient(h);
        }
        let mut program = Program::<f32>::new(tape, device)?;
        let mut rng = Rng::new(1, 0);
        // Sums of many such products stay near 1.
        let mut draw = |size: usize, centre: f64| -> Vec<f32> {
            (0..size).map(|_| (centre + 0.2 * rng.normal()) as f32).collect()
        };
        for ((var, centre), size) in inputs.iter().zip(sizes) {
            program.set_input(*var, &draw(size, *centre))?;
        }
        if mode == Mode::Train {
            program.set_seed(h, &draw(size, 0.0))?;
        }
        let (none, mut seconds): (Vec<Vec<f32>>, _) = (Vec::new(), Vec::with_capacity(repeats));
        // Two do not count: caches and work space are there by then.
        for repeat in 0..2 + repeats {
            let start = Instant::now();
            device.install(|| -> Result<()> {
                program.forward(&none)?;
                match mode {
                    Mode::Train => program.backward(&none, &mut Vec::new()),
                    Mode::Evaluate => Ok(()),
                }
            })?;
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
            seconds,
            peak_megabytes: peak_megabytes(device),
        })
    };
    let (forward, training) = (measure(Mode::Evaluate)?, measure(Mode::Train)?);
    Ok(CellTimes { name: cell.name(), shape: cell.shape(), forward, training })
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
        for CellTimes { forward, training, .. } in &times {
            assert_eq!((forward.seconds.len(), training.seconds.len()), (2, 2));
            assert_eq!(training.operations, 3.0 * forward.operations);
            assert!(forward.median() > 0.0);
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
