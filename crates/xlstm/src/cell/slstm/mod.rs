//! The sLSTM cell, and the LSTM cell in the same frame: four gates that see the token and,
//! through a matrix R of their own head, the hidden state before it.
//!
//! With raw = gates + R h_{t-1} + b, in the order i, f, z, o, the sLSTM is
//! ```text
//! m_t = log i                         where n_{t-1} = 0, else
//!       max(log i, log f + m_{t-1})
//! i'  = exp(log i - m_t)              f' = exp(log f + m_{t-1} - m_t)
//! c_t = f' c_{t-1} + i' tanh(~z)      n_t = f' n_{t-1} + i'
//! h_t = sigmoid(~o) c_t / n_t
//! ```
//! and the LSTM, whose gates are sigmoids, c_t = f c_{t-1} + i tanh(~z) and
//! h_t = o tanh(c_t).
//!
//! The work is cut into tasks of one head and a few sequences; a task runs over time with
//! its state in cache. Tasks do not depend on the number of threads, so neither do results.

mod backward;
#[cfg(feature = "cuda")]
mod cuda;
#[cfg(feature = "cuda")]
mod cuda_wide;
mod forward;
mod pointwise;
#[cfg(test)]
mod tests;

use serde::{Deserialize, Serialize};

use super::{ForgetGate, InputGate};
#[cfg(feature = "cuda")]
use crate::engine::cuda::{CudaBackward, CudaForward};
use crate::engine::operation::NodeShapes;
use crate::engine::{Backward, Forward, Ids, Kernel, Mode, Scalar, Shape, Slots, Tape, Var};
use crate::error::{Error, Result};
use crate::ops::{PAD, RESET};

/// Which cell runs in the frame.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CellFunction {
    /// Exponential gating with a normalizer n and a stabilizer m.
    #[default]
    Slstm,
    /// The classic cell, with c and h alone.
    Lstm,
}

/// What the cell is made of.
#[derive(Clone, Debug, PartialEq)]
pub struct SlstmConfig {
    /// Heads: blocks of the state that do not see each other.
    pub heads: usize,
    /// sLSTM or LSTM.
    pub function: CellFunction,
    /// The sLSTM's input gate; an LSTM's is a sigmoid.
    pub input_gate: InputGate,
    /// The sLSTM's forget gate; an LSTM's is a sigmoid.
    pub forget_gate: ForgetGate,
    /// No gradient flows from a token's gates to the hidden state before it. R still gets
    /// its own.
    pub gradient_cut: bool,
    /// Bound, element by element, on the gradient from a token's gates to the hidden
    /// state before it.
    pub gradient_clip: Option<f64>,
}

/// The state between two tokens, each (B, D).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlstmState {
    /// Hidden state.
    pub h: Var,
    /// Cell state, divided by exp(m).
    pub c: Var,
    /// Normalizer, divided by exp(m); an LSTM has none. Where it is 0, c must be 0 too.
    pub n: Option<Var>,
    /// Stabilizer; an LSTM has none.
    pub m: Option<Var>,
}

/// Inputs: the four gates, R, b, then the state.
const RECURRENT: usize = 4;
const BIAS: usize = 5;
const STATE: usize = 6;
/// Outputs: h, the last state, then the record.
const LAST: usize = 1;

/// Records the cell over a whole sequence; returns h (B, S, D) and the state after it.
///
/// `gates` are pre-activations without recurrence and bias in the order i, f, z, o, each
/// (B, S, D); `recurrent` is (NH, 4 DH, DH), where row g DH + d of a head multiplies that
/// head's h_{t-1}; `bias` is (4 D), gate-major. An absent state is zero. `marks` (B S)
/// holds [`RESET`] where the state before a token is zero and [`PAD`] where a position is
/// no token: the state passes it unchanged and its h is 0.
///
/// # Errors
/// When shapes do not fit together, or the state is not one of this cell.
pub fn slstm(
    tape: &mut Tape,
    config: &SlstmConfig,
    gates: [Var; 4],
    recurrent: Var,
    bias: Var,
    state: Option<SlstmState>,
    marks: Option<Ids>,
) -> Result<(Var, SlstmState)> {
    let operation = Slstm { config: config.clone(), train: tape.mode() == Mode::Train };
    let parts = operation.state_parts();
    let mut inputs: Vec<Option<Var>> = gates.into_iter().chain([recurrent, bias]).map(Some).collect();
    if let Some(state) = state {
        let given = [Some(state.h), Some(state.c), state.n, state.m];
        if given.iter().flatten().count() != parts {
            return Err(Error::shape(match config.function {
                CellFunction::Slstm => "an sLSTM state consists of h, c, n and m",
                CellFunction::Lstm => "an LSTM state consists of h and c alone",
            }));
        }
        inputs.extend(&given[..parts]);
    } else {
        inputs.extend(std::iter::repeat_n(None, parts));
    }
    let marks: Vec<Ids> = marks.into_iter().collect();
    let outputs = tape.record(operation, &inputs, &marks)?;
    let last = |part| (part < parts).then(|| outputs[LAST + part]);
    let state = SlstmState { h: outputs[LAST], c: outputs[LAST + 1], n: last(2), m: last(3) };
    Ok((outputs[0], state))
}

/// The operation: inputs i, f, z, o, R, b and the state's parts (h, c, n, m or h, c);
/// outputs h, the last state's parts and, in training, the record of all steps.
#[derive(Debug)]
struct Slstm {
    config: SlstmConfig,
    train: bool,
}

impl Slstm {
    /// Tensors of a state.
    fn state_parts(&self) -> usize {
        match self.config.function {
            CellFunction::Slstm => 4,
            CellFunction::Lstm => 2,
        }
    }

    /// Numbers an element leaves behind at each step for backward.
    fn record_parts(&self) -> usize {
        match (self.config.function, self.config.input_gate) {
            (CellFunction::Lstm, _) => pointwise::LSTM_RECORD,
            (CellFunction::Slstm, InputGate::Exponential) => pointwise::SLSTM_RECORD,
            (CellFunction::Slstm, InputGate::Sigmoid) => pointwise::SLSTM_RECORD + 1,
        }
    }
}

impl Kernel for Slstm {
    fn name(&self) -> &'static str {
        match self.config.function {
            CellFunction::Slstm => "slstm",
            CellFunction::Lstm => "lstm",
        }
    }

    fn outputs(&self, inputs: &[Option<Shape>]) -> Result<Vec<Shape>> {
        let heads = self.config.heads;
        let Some(gate) = inputs[0] else { return Err(Error::shape("four gates are needed")) };
        let &[batch, steps, width] = gate.dims() else {
            return Err(Error::shape(format!("a gate is (B, S, D), not {gate:?}")));
        };
        if heads == 0 || width == 0 || width % heads != 0 {
            return Err(Error::shape(format!("{heads} heads do not divide a width of {width}")));
        }
        if batch == 0 || steps == 0 {
            return Err(Error::shape(format!("there is no token in gates of {gate:?}")));
        }
        let dim = width / heads;
        let part = Shape::from([batch, width]);
        let wanted = [gate, gate, gate, gate, [heads, 4 * dim, dim].into(), [4 * width].into()];
        for (i, shape) in inputs.iter().enumerate() {
            let want = wanted.get(i).copied().unwrap_or(part);
            if shape.is_some_and(|shape| shape != want) {
                return Err(Error::shape(format!("input {i} is {shape:?}, not {want:?}")));
            }
        }
        let mut outputs = vec![gate];
        outputs.resize(LAST + self.state_parts(), part);
        if self.train {
            let layout = Layout::new(gate, heads);
            outputs.push([layout.tasks(), steps * layout.rows, self.record_parts() * dim].into());
        }
        Ok(outputs)
    }

    fn reads(&self) -> Slots {
        let record = LAST + self.state_parts();
        let mut reads = match self.config.function {
            CellFunction::Slstm => {
                Slots::of(&[RECURRENT, STATE + 1, STATE + 2], &[LAST + 1, LAST + 2, record])
            }
            CellFunction::Lstm => Slots::of(&[RECURRENT], &[record]),
        };
        // On a GPU the h before each token is not part of the record.
        if cfg!(feature = "cuda") {
            reads.inputs |= 1 << STATE;
            reads.outputs |= 1;
        }
        reads
    }

    /// All but h and the record: the gates feed back, and states are sums over all tokens.
    fn full_precision(&self) -> Slots {
        Slots { inputs: u32::MAX, outputs: !(1 | 1 << (LAST + self.state_parts())) }
    }

    #[cfg(feature = "cuda")]
    fn overwrites(&self) -> Slots {
        Slots::of(&[0, 1, 2, 3], &[])
    }

    fn forward<T: Scalar>(&self, io: &mut Forward<'_, T>) {
        forward::forward(self, io);
    }

    fn backward<T: Scalar>(&self, io: &mut Backward<'_, T>) {
        backward::backward(self, io);
    }

    #[cfg(feature = "cuda")]
    fn forward_cuda(&self, io: &mut CudaForward<'_>) -> Result<()> {
        cuda::forward(self, io)
    }

    #[cfg(feature = "cuda")]
    fn backward_cuda(&self, io: &mut CudaBackward<'_>) -> Result<()> {
        cuda::backward(self, io)
    }
}

/// Sequences a task holds at most: one pass over R serves so many rows. Of a single head fewer,
/// so that a batch of 8 is work for two threads.
const TILE_ROWS: [usize; 2] = [4, 8];

/// Multiplications below which threads cost more than they save.
const PARALLEL_FROM: usize = 1 << 18;

/// How (B, S, NH DH) data is cut into tasks of `rows` sequences and one head.
#[derive(Clone, Copy, Debug)]
struct Layout {
    batch: usize,
    steps: usize,
    heads: usize,
    dim: usize,
    tiles: usize,
    rows: usize,
}

impl Layout {
    fn new(gate: Shape, heads: usize) -> Layout {
        let (batch, steps) = (gate.dims()[0], gate.dims()[1]);
        let tiles = batch.div_ceil(TILE_ROWS[usize::from(heads > 1)]);
        Layout { batch, steps, heads, dim: gate.last() / heads, tiles, rows: batch.div_ceil(tiles) }
    }

    fn of(shapes: &NodeShapes, heads: usize) -> Layout {
        Layout::new(shapes.input(0), heads)
    }

    fn width(&self) -> usize {
        self.heads * self.dim
    }

    /// Heads of 8 sequences.
    #[cfg(feature = "cuda")]
    fn units(&self) -> usize {
        self.batch.div_ceil(8) * self.heads
    }

    fn tasks(&self) -> usize {
        self.tiles * self.heads
    }

    /// Multiplications of all products with R.
    fn work(&self) -> usize {
        self.batch * self.steps * self.width() * 4 * self.dim
    }

    /// Sequences of a task; the last tile may hold fewer.
    fn rows_of(&self, task: usize) -> usize {
        self.rows.min(self.batch - self.first_row(task))
    }

    fn first_row(&self, task: usize) -> usize {
        task / self.heads * self.rows
    }

    /// First column of a task's head.
    fn column(&self, task: usize) -> usize {
        task % self.heads * self.dim
    }

    /// Where row `row` of a task lies in (B, D) data.
    fn state_at(&self, task: usize, row: usize) -> std::ops::Range<usize> {
        let at = (self.first_row(task) + row) * self.width() + self.column(task);
        at..at + self.dim
    }

    /// Where row `row` of a task lies at step `t` in (B, S, D) data.
    fn token_at(&self, task: usize, row: usize, t: usize) -> std::ops::Range<usize> {
        let at = ((self.first_row(task) + row) * self.steps + t) * self.width() + self.column(task);
        at..at + self.dim
    }

    /// The task, and the line inside its (step, row) data, of a sequence, step and head.
    fn line_of(&self, sequence: usize, t: usize, head: usize) -> (usize, usize) {
        let task = sequence / self.rows * self.heads + head;
        (task, t * self.rows_of(task) + sequence % self.rows)
    }
}

/// The mark of row `row` of a task at step `t`; no marks, no mark.
fn mark(marks: &[u32], layout: &Layout, task: usize, row: usize, t: usize) -> u32 {
    marks.get((layout.first_row(task) + row) * layout.steps + t).copied().unwrap_or(0)
}

/// A pad is no token, so that it starts no document either.
fn is_reset(mark: u32) -> bool {
    mark & (RESET | PAD) == RESET
}

fn is_pad(mark: u32) -> bool {
    mark & PAD != 0
}
