//! Products of few rows with weight matrices, as the steps of generation have them: bound by the
//! reading of the weights, and by the gaps between kernels.
//!
//! So a product makes its rows itself. A norm, or the gate of a feed-forward layer, whose result the next
//! operation multiplies ([`Next`]) does not launch a kernel: it leaves what is to be done with the
//! queue ([`Queue::prepare`]), and that operation's kernel does it; and so are maps of rows that the
//! next operation multiplies as well. A library's product takes rows that are there.

use super::Precision;
use super::compiler::Source;
use super::context::{Argument, Blocks};
use super::launch::Queue;
use crate::error::Result;

const SOURCE: Source = Source::new("few_rows", include_str!("few_rows.cu"));

// As in few_rows.cu.
const WARPS: usize = 8;
const TILE: usize = 16;
/// Fewer tiles than this leave multiprocessors idle: they are halved.
const ENOUGH: usize = 132;
const STEP: usize = 32;
const MAX_MAPS: usize = 7;
/// Rows of x in a tile of a product.
const ROWS: usize = 8;

/// The most rows that are prepared by every block of a product anew.
const PREPARED: usize = 8;
/// Shared memory that a block may take for its rows.
const MOST_SHARED: usize = 100 << 10;

/// What follows an operation in generation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Products of its output 0.
    MultipliesOutput,
    /// Products of its own input 0.
    MultipliesInput,
    /// Something else, or a tape for training, whose values backward reads.
    Other,
}

/// How rows are made of what there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// x = in.
    Plain = 0,
    /// Root-mean-square norm.
    MeanSquare = 1,
    /// Layer norm.
    Layer = 2,
    /// x = SiLU(gate) ∘ in.
    Swiglu = 3,
}

/// Rows (rows, width) of elements and how to make them, as few_rows.cu says; pointers.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Preparation {
    pub(crate) kind: Kind,
    pub(crate) input: u64,
    pub(crate) added: Option<u64>,
    pub(crate) gate: Option<u64>,
    pub(crate) weight: Option<u64>,
    pub(crate) bias: Option<u64>,
    /// Where the sum and the rows go for whoever reads them later.
    pub(crate) sum: Option<u64>,
    pub(crate) rows_out: Option<u64>,
    pub(crate) groups: usize,
    pub(crate) offset: f64,
    pub(crate) eps: f64,
    /// Number of rows, and features of each.
    pub(crate) size: [usize; 2],
}

impl Preparation {
    /// The rows at `x` as they are.
    pub(crate) fn plain(x: u64, size: [usize; 2]) -> Preparation {
        Preparation {
            kind: Kind::Plain,
            input: x,
            added: None,
            gate: None,
            weight: None,
            bias: None,
            sum: None,
            rows_out: None,
            groups: 1,
            offset: 0.0,
            eps: 0.0,
            size,
        }
    }

    fn words(&self) -> [u64; 11] {
        let float = |x: f64| u64::from((x as f32).to_bits());
        let pointer = |p: Option<u64>| p.unwrap_or(0);
        [
            self.input,
            pointer(self.added),
            pointer(self.gate),
            pointer(self.weight),
            pointer(self.bias),
            pointer(self.sum),
            pointer(self.rows_out),
            self.kind as u64,
            self.groups as u64,
            float(self.offset),
            float(self.eps),
        ]
    }
}

/// One weight matrix (outer, width) of elements, and where its products with the rows go.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Map {
    pub(crate) weight: u64,
    pub(crate) bias: Option<u64>,
    /// (rows, outer): f32 where `full`.
    pub(crate) y: u64,
    pub(crate) outer: usize,
    pub(crate) full: bool,
    /// Within ±cap, by cap tanh(y / cap).
    pub(crate) cap: Option<f64>,
}

impl Map {
    fn words(&self) -> [u64; 6] {
        let cap = u64::from((self.cap.unwrap_or(0.0) as f32).to_bits());
        [self.weight, self.bias.unwrap_or(0), self.y, self.outer as u64, u64::from(self.full), cap]
    }
}

/// Rows that wait for the product that makes them, and maps that wait with them.
#[derive(Debug)]
pub(super) struct Waiting {
    rows: Preparation,
    maps: Vec<Map>,
}

/// Tiles of eight rows that a kernel is compiled for; None where there are too many rows.
fn tiles(rows: usize, precision: Precision) -> Option<usize> {
    match (rows.div_ceil(ROWS), precision) {
        (0 | 1, _) => Some(1),
        (2, Precision::Bf16) => Some(2),
        (3 | 4, Precision::Bf16) => Some(4),
        _ => None,
    }
}

/// Elements from one row in shared memory to the next: lanes that read at once meet in no bank.
fn pitch(width: usize) -> usize {
    width + if width.is_multiple_of(2 * STEP) { STEP } else { 0 }
}

fn shared(tiles: usize, width: usize, precision: Precision) -> usize {
    tiles * ROWS * (pitch(width) * precision.bytes() + WARPS * TILE * 4)
}

impl Queue {
    /// Whether there are kernels for this many rows of this width.
    fn takes_few(&self, [rows, width]: [usize; 2]) -> bool {
        let fits = |tiles| shared(tiles, width, self.precision()) <= MOST_SHARED;
        width.is_multiple_of(STEP) && rows > 0 && tiles(rows, self.precision()).is_some_and(fits)
    }

    /// Leaves rows to the products that come next; false where those cannot make them, and the caller has
    /// to.
    pub(crate) fn prepare(&mut self, rows: Preparation) -> bool {
        let can = rows.size[0] <= PREPARED
            && self.takes_few(rows.size)
            && rows.size[1].is_multiple_of(rows.groups * 8);
        if can {
            self.waiting = Some(Waiting { rows, maps: Vec::new() });
        }
        can
    }

    /// Products of the rows at `x` (rows, width), with what waits for them; or leaves them to the next
    /// operation, if that multiplies the same rows. False where there are no kernels for them: what has
    /// waited is done then.
    ///
    /// # Errors
    /// When a kernel cannot be compiled or launched.
    pub(crate) fn few_rows(&mut self, next: Next, x: u64, size: [usize; 2], maps: &[Map]) -> Result<bool> {
        if !self.takes_few(size) || maps.iter().any(|map| !map.weight.is_multiple_of(16)) {
            self.settle()?;
            return Ok(false);
        }
        let nothing = || Waiting { rows: Preparation::plain(x, size), maps: Vec::new() };
        let mut waiting = self.waiting.take().unwrap_or_else(nothing);
        waiting.maps.extend_from_slice(maps);
        if next == Next::MultipliesInput {
            self.waiting = Some(waiting);
            return Ok(true);
        }
        self.launch_few(&waiting.rows, &waiting.maps)?;
        Ok(true)
    }

    /// Does what waits for products, where they will not do it.
    ///
    /// # Errors
    /// When a kernel cannot be compiled or launched.
    pub(crate) fn settle(&mut self) -> Result<()> {
        match self.waiting.take() {
            Some(waiting) => self.launch_few(&waiting.rows, &waiting.maps),
            None => Ok(()),
        }
    }

    /// Forgets what waits since a pass that failed.
    pub(super) fn forget_waiting(&mut self) {
        self.waiting = None;
    }

    fn launch_few(&self, rows: &Preparation, maps: &[Map]) -> Result<()> {
        let [count, width] = rows.size;
        let tiles = tiles(count, self.precision()).unwrap_or(1);
        let mut rest = maps;
        loop {
            // More maps than a kernel takes: the next makes the same rows again.
            let (now, later) = rest.split_at(rest.len().min(MAX_MAPS));
            let mut words: Vec<Argument> = Vec::with_capacity(64);
            let mut give = |structure: &[u64]| {
                for (i, &word) in structure.iter().enumerate() {
                    words.push(if i == 0 { Argument::Pointer(word) } else { Argument::More(word) });
                }
            };
            give(&rows.words());
            let mut table = [0; 6 * MAX_MAPS];
            for (entry, map) in table.chunks_exact_mut(6).zip(now) {
                entry.copy_from_slice(&map.words());
            }
            give(&table);
            words.extend([now.len(), count, width, pitch(width)].map(Argument::from));
            let blocks = |tile: usize| now.iter().map(|map| map.outer.div_ceil(tile)).sum::<usize>().max(1);
            let (name, count) = match (tiles, blocks(TILE)) {
                (1, count) if count < ENOUGH => ("few_rows_1_half", blocks(TILE / 2)),
                (1, count) => ("few_rows_1", count),
                (2, count) => ("few_rows_2", count),
                (_, count) => ("few_rows_4", count),
            };
            let blocks = Blocks {
                grid: [count, 1, 1],
                block: [32 * WARPS, 1],
                shared: shared(tiles, width, self.precision()),
                early: true,
            };
            self.gpu().launch(&SOURCE, self.precision(), name, &blocks, &words)?;
            if later.is_empty() {
                return Ok(());
            }
            rest = later;
        }
    }
}
