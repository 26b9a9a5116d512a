//! Muon on a GPU. Matrices of one shape, or of its transpose, form batches, whose products are one call
//! each: fifteen and three kernels a batch. With bf16 the products' operands are bf16, and their sums f32.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::muon::{COEFFICIENTS, EPS, ITERATIONS, MuonOptions, scale_of};
use crate::engine::Precision;
use crate::engine::cuda::blas::{Combination, Operand, Product};
use crate::engine::cuda::context::{Buffer, arguments};
use crate::engine::cuda::launch::Queue;
use crate::engine::cuda::{CudaParameters, Gpu, Layout, Source};
use crate::error::Result;
use crate::nn::{ParameterSpec, Role};

const MUON: Source = Source::new("muon", include_str!("muon.cu"));

/// Elements that a partial sum of a norm covers: TILE of muon.cu.
const TILE: usize = 8192;

/// Rows and columns that a block of threads gathers or updates: SIDE of muon.cu, and its threads.
const SIDE: usize = 64;
const THREADS: [usize; 2] = [SIDE, 4];

/// Flags of a matrix, as muon.cu has them.
const TRANSPOSED: u32 = 1;
const DECAY: u32 = 2;

/// The most elements of a batch, where it has more than one matrix: what bounds the work space.
const MOST: usize = 1 << 25;

/// The most matrices of a batch: a grid's.
const MOST_MATRICES: usize = 65_535;

/// Matrices of (low, high) or (high, low), low <= high.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Batch {
    /// Matrices before it in the table.
    first: usize,
    count: usize,
    low: usize,
    high: usize,
}

/// Elements from one row to the next of what is multiplied: 16 bytes of bf16 are a unit, where products
/// are fast.
fn step(columns: usize) -> usize {
    columns.next_multiple_of(8)
}

/// The batches of a model's matrices, and the table of these: of each the first element and its flags.
fn batches(specs: &[ParameterSpec], layout: &Layout) -> (Vec<Batch>, Vec<[u32; 2]>) {
    let mut shapes: BTreeMap<[usize; 2], Vec<[u32; 2]>> = BTreeMap::new();
    for (spec, &(mut first, _)) in specs.iter().zip(layout.places()) {
        let Role::Matrices(sizes) = &spec.role else { continue };
        for &[rows, columns] in sizes {
            let transposed = if rows > columns { TRANSPOSED } else { 0 };
            let decay = if spec.decay { DECAY } else { 0 };
            let shape = [rows.min(columns), rows.max(columns)];
            shapes.entry(shape).or_default().push([first as u32, transposed | decay]);
            first += rows * columns;
        }
    }
    let (mut batches, mut table) = (Vec::new(), Vec::new());
    for ([low, high], matrices) in shapes {
        let most = (MOST / (low * high)).clamp(1, MOST_MATRICES);
        // As equal as can be.
        let each = matrices.len().div_ceil(matrices.len().div_ceil(most));
        for part in matrices.chunks(each) {
            batches.push(Batch { first: table.len(), count: part.len(), low, high });
            table.extend_from_slice(part);
        }
    }
    (batches, table)
}

/// What a step reads and writes, by address.
#[derive(Clone, Copy)]
pub(super) struct Step<'a> {
    pub(super) parameters: &'a CudaParameters,
    pub(super) gradients: u64,
    /// The momentum.
    pub(super) first: u64,
    pub(super) rates: u64,
    pub(super) outcome: u64,
}

/// Muon's batches and their work space, which all of them share.
#[derive(Debug)]
pub(super) struct CudaMuon {
    options: MuonOptions,
    batches: Vec<Batch>,
    matrices: Buffer,
    parts: Buffer,
    /// X before and after an iteration, in turns.
    x: [Buffer; 2],
    /// X X^T, and the polynomial in it that multiplies X.
    grams: [Buffer; 2],
}

impl CudaMuon {
    pub(super) fn new(
        gpu: &Arc<Gpu>,
        specs: &[ParameterSpec],
        layout: &Layout,
        options: MuonOptions,
        precision: Precision,
    ) -> Result<CudaMuon> {
        let (batches, table) = batches(specs, layout);
        let largest = |size: fn(&Batch) -> usize| batches.iter().map(size).max().unwrap_or(0);
        let x = largest(|b| b.count * b.low * step(b.high)) * precision.bytes();
        let gram = largest(|b| b.count * b.low * step(b.low)) * precision.bytes();
        let parts = largest(|b| b.count * (b.low * b.high).div_ceil(TILE)) * 8;
        let muon = CudaMuon {
            options,
            matrices: Buffer::zeros(gpu, table.len() * 8)?,
            parts: Buffer::zeros(gpu, parts)?,
            x: [Buffer::zeros(gpu, x)?, Buffer::zeros(gpu, x)?],
            grams: [Buffer::zeros(gpu, gram)?, Buffer::zeros(gpu, gram)?],
            batches,
        };
        gpu.upload(muon.matrices.pointer(), &table)?;
        gpu.synchronize()?;
        Ok(muon)
    }

    /// Queues the update of all matrices.
    pub(super) fn queue(&self, queue: &Queue, step: Step<'_>) -> Result<()> {
        self.batches.iter().try_for_each(|batch| self.queue_batch(queue, step, batch))
    }

    fn queue_batch(&self, queue: &Queue, to: Step<'_>, batch: &Batch) -> Result<()> {
        let Batch { first, count, low, high } = *batch;
        let n = low * high;
        let (tiles, row) = (n.div_ceil(TILE), step(high));
        let matrices = self.matrices.pointer() + 8 * first as u64;
        let (parts, mu) = (self.parts.pointer(), self.options.momentum);
        let (g, m, outcome) = (to.gradients, to.first, to.outcome);
        let grid = [high.div_ceil(SIDE), low.div_ceil(SIDE), count];
        queue.launch(
            &MUON,
            "muon_momentum",
            [tiles, count, 1],
            256,
            arguments![g, m, matrices, parts, outcome, n, mu],
        )?;
        let x = self.x[0].pointer();
        queue.launch_square(
            &MUON,
            "muon_gather",
            grid,
            THREADS,
            arguments![g, m, matrices, parts, x, outcome, low, high, row, tiles, mu, EPS],
        )?;
        for iteration in 0..ITERATIONS {
            let turn = iteration % 2;
            self.queue_iteration(queue, batch, [&self.x[turn], &self.x[1 - turn]].map(Buffer::pointer))?;
        }
        let x = self.x[ITERATIONS % 2].pointer();
        let (w, copies) = (to.parameters.masters(), to.parameters.copies());
        let scale = scale_of([low, high]);
        queue.launch_square(
            &MUON,
            "muon_update",
            grid,
            THREADS,
            arguments![w, copies, matrices, x, to.rates, outcome, low, high, row, scale],
        )
    }

    /// X <- a X + (b A + c A A) X with A = X X^T, from one place to the other.
    fn queue_iteration(&self, queue: &Queue, batch: &Batch, [x, next]: [u64; 2]) -> Result<()> {
        let Batch { count, low, high, .. } = *batch;
        let [a, b, c] = COEFFICIENTS.map(|x| x as f32);
        let [gram, polynomial] = [0, 1].map(|i: usize| self.grams[i].pointer());
        let wide = |pointer| Operand::new(pointer, step(high)).batched(low * step(high));
        let square = |pointer| Operand::new(pointer, step(low)).batched(low * step(low));
        queue.product(&Product {
            size: [low, low, high],
            a: wide(x),
            b: wide(x).t(),
            c: square(gram),
            batch: count,
            accumulate: false,
        })?;
        queue.combine(
            &Product {
                size: [low, low, low],
                a: square(gram),
                b: square(gram),
                c: square(polynomial),
                batch: count,
                accumulate: true,
            },
            Combination { alpha: c, beta: b, addend: gram },
        )?;
        queue.combine(
            &Product {
                size: [low, high, low],
                a: square(polynomial),
                b: wide(x),
                c: wide(next),
                batch: count,
                accumulate: true,
            },
            Combination { alpha: 1.0, beta: a, addend: x },
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::{Builder, Init};
    use crate::optim::cuda::layout_of;

    #[test]
    fn matrices_of_one_shape_are_a_batch() {
        let mut builder = Builder::new();
        let zero = || Init::Constant(0.0);
        builder.parameter("norm", &[70], zero());
        builder.matrices("up.weight", &[2 * 40, 24], zero(), [40; 2]);
        builder.matrices("few.weight", &[6, 4, 4], zero(), [4; 6]);
        builder.matrices("down.weight", &[24, 40], zero(), [24]);
        builder.matrices("recurrent", &[3, 4 * 16, 16], zero(), [16; 12]);
        let specs = builder.finish();
        let (batches, table) = batches(&specs, &layout_of(&specs));
        assert_eq!(
            batches,
            [
                Batch { first: 0, count: 12, low: 16, high: 16 },
                Batch { first: 12, count: 3, low: 24, high: 40 },
            ]
        );
        // The norm takes 128 elements, up 1920, few 128, down 960.
        let recurrent = (0..12).map(|i| [3136 + i * 256, 0]);
        let wanted = [[128, TRANSPOSED | DECAY], [128 + 960, TRANSPOSED | DECAY], [2176, DECAY]];
        assert_eq!(table, recurrent.chain(wanted).collect::<Vec<_>>());
    }

    #[test]
    fn large_batches_are_cut_evenly() {
        let mut builder = Builder::new();
        for i in 0..9 {
            builder.matrices(&format!("{i}"), &[2048, 2048], Init::Constant(0.0), [2048]);
        }
        builder.matrices("one", &[8192, 8192], Init::Constant(0.0), [8192]);
        let specs = builder.finish();
        let (batches, _) = batches(&specs, &layout_of(&specs));
        let counts: Vec<usize> = batches.iter().map(|batch| batch.count).collect();
        assert_eq!(counts, [5, 4, 1]);
    }
}
