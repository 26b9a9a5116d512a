//! What an operation gets on a GPU: device pointers, shapes, and a queue to launch on.

use std::sync::Arc;

use super::Precision;
use super::blas::{Combination, Product, WORKSPACE};
use super::compiler::Source;
use super::context::{Argument, Blocks, Buffer, Gpu, NAN, arguments};
use super::event::Event;
use super::few_rows::{Next, Waiting};
use crate::engine::operation::{MAX_SLOTS, NodeShapes};
use crate::error::Result;

/// Where kernels are queued, with the work space that they share.
pub struct Queue {
    gpu: Arc<Gpu>,
    precision: Precision,
    workspace: Buffer,
    scratch: Buffer,
    used: usize,
    /// What products on the side need: their work space, and events where the streams part and meet.
    aside: Option<(Buffer, [Event; 2])>,
    /// Outgrown work spaces: work in flight, and captured graphs, may still use them.
    outgrown: Vec<Buffer>,
    /// Whether a graph may know the work space by address.
    is_known: bool,
    pub(super) waiting: Option<Waiting>,
}

impl std::fmt::Debug for Queue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Queue({:?})", self.gpu)
    }
}

impl Queue {
    pub(crate) fn new(gpu: &Arc<Gpu>, precision: Precision) -> Result<Queue> {
        Ok(Queue {
            gpu: gpu.clone(),
            precision,
            workspace: Buffer::zeros(gpu, WORKSPACE)?,
            scratch: Buffer::zeros(gpu, 1 << 20)?,
            used: 0,
            aside: None,
            outgrown: Vec::new(),
            is_known: false,
            waiting: None,
        })
    }

    pub(crate) fn gpu(&self) -> &Arc<Gpu> {
        &self.gpu
    }

    /// What elements are stored in, and kernels compiled for.
    pub(crate) fn precision(&self) -> Precision {
        self.precision
    }

    /// Bytes of the work space.
    pub(crate) fn bytes(&self) -> usize {
        let aside = self.aside.as_ref().map_or(0, |(workspace, _)| workspace.bytes());
        self.workspace.bytes()
            + aside
            + self.scratch.bytes()
            + self.outgrown.iter().map(Buffer::bytes).sum::<usize>()
    }

    /// Fills the work space with NaN.
    pub(crate) fn poison(&self) -> Result<()> {
        self.gpu.fill(self.scratch.pointer(), NAN, self.scratch.bytes())
    }

    /// Gives the work space back, at the start of an operation, and to the GPU what it has outgrown.
    pub(crate) fn restart(&mut self) -> Result<()> {
        self.used = 0;
        self.is_known |= self.gpu.is_capturing()?;
        if !self.is_known {
            // Each waits for the work in flight.
            self.outgrown.clear();
        }
        Ok(())
    }

    /// Work space for `n` f32 numbers, until the operation ends; its content is arbitrary.
    pub(crate) fn scratch(&mut self, n: usize) -> Result<u64> {
        let bytes = (n * 4).next_multiple_of(256);
        if self.used + bytes > self.scratch.bytes() {
            // With room for what this operation has already, too: a graph is captured the next time, and
            // cannot allocate.
            let larger = Buffer::zeros(&self.gpu, (self.scratch.bytes() * 3 / 2).max(self.used + bytes))?;
            self.outgrown.push(std::mem::replace(&mut self.scratch, larger));
        }
        let pointer = self.scratch.pointer() + self.used as u64;
        self.used += bytes;
        Ok(pointer)
    }

    /// Launches a kernel on a grid of blocks.
    pub(crate) fn launch(
        &self,
        source: &Source,
        name: &'static str,
        grid: [usize; 3],
        block: usize,
        arguments: &[Argument],
    ) -> Result<()> {
        self.launch_square(source, name, grid, [block, 1], arguments)
    }

    /// Launches a kernel that may begin before the one before has ended, and waits for that itself.
    pub(crate) fn launch_early(
        &self,
        source: &Source,
        name: &'static str,
        grid: [usize; 3],
        block: usize,
        arguments: &[Argument],
    ) -> Result<()> {
        let blocks = Blocks { grid, block: [block, 1], shared: 0, early: true };
        self.gpu.launch(source, self.precision, name, &blocks, arguments)
    }

    /// Launches a kernel on a grid of two-dimensional blocks.
    pub(crate) fn launch_square(
        &self,
        source: &Source,
        name: &'static str,
        grid: [usize; 3],
        block: [usize; 2],
        arguments: &[Argument],
    ) -> Result<()> {
        let blocks = Blocks { grid, block, shared: 0, early: false };
        self.gpu.launch(source, self.precision, name, &blocks, arguments)
    }

    /// Launches a kernel with bytes of dynamic shared memory.
    pub(crate) fn launch_shared(
        &self,
        source: &Source,
        name: &'static str,
        grid: [usize; 3],
        block: usize,
        shared: usize,
        arguments: &[Argument],
    ) -> Result<()> {
        let blocks = Blocks { grid, block: [block, 1], shared, early: false };
        self.gpu.launch(source, self.precision, name, &blocks, arguments)
    }

    /// Launches a kernel whose threads take [`WIDE`] elements each, 256 threads a block.
    pub(crate) fn launch_wide(
        &self,
        source: &Source,
        name: &'static str,
        n: usize,
        arguments: &[Argument],
    ) -> Result<()> {
        self.launch_each(source, name, n.div_ceil(WIDE), arguments)
    }

    /// Launches a kernel whose threads take [`WIDE`] columns each and go over `each` rows.
    pub(crate) fn launch_columns(
        &self,
        source: &Source,
        name: &'static str,
        [rows, width]: [usize; 2],
        each: usize,
        arguments: &[Argument],
    ) -> Result<()> {
        let threads = width.div_ceil(WIDE);
        let block = threads.next_multiple_of(32).min(256);
        self.launch(source, name, [rows.div_ceil(each), threads.div_ceil(block), 1], block, arguments)
    }

    /// Launches a kernel with a thread an element, 256 a block.
    pub(crate) fn launch_each(
        &self,
        source: &Source,
        name: &'static str,
        n: usize,
        arguments: &[Argument],
    ) -> Result<()> {
        self.launch(source, name, [n.div_ceil(256), 1, 1], 256, arguments)
    }

    /// Queues a matrix product.
    pub(crate) fn product(&self, product: &Product) -> Result<()> {
        let stream = self.gpu.raw_stream();
        self.gpu.blas.product(&self.gpu, stream, &self.workspace, self.precision, product, None)
    }

    /// Queues a matrix product that accumulates: scaled, and added to something else than C.
    pub(crate) fn combine(&self, product: &Product, combined: Combination) -> Result<()> {
        let stream = self.gpu.raw_stream();
        self.gpu.blas.product(&self.gpu, stream, &self.workspace, self.precision, product, Some(combined))
    }

    /// From here to [`join`](Self::join), products may be queued on the side: they run beside what is
    /// queued otherwise, and fill the multiprocessors that it leaves idle at its end. Neither may read
    /// what the other writes.
    pub(crate) fn fork(&mut self) -> Result<()> {
        if self.aside.is_none() {
            let events = [Event::new()?, Event::new()?];
            self.aside = Some((Buffer::zeros(&self.gpu, WORKSPACE)?, events));
        }
        let Some((_, [parted, _])) = &self.aside else { return Ok(()) };
        parted.record(&self.gpu)?;
        parted.hold(self.gpu.raw_side())
    }

    /// Queues a matrix product on the side, after [`fork`](Self::fork).
    pub(crate) fn product_aside(&self, product: &Product) -> Result<()> {
        let Some((workspace, _)) = &self.aside else { return self.product(product) };
        self.gpu.blas.product(&self.gpu, self.gpu.raw_side(), workspace, self.precision, product, None)
    }

    /// Lets what is queued from now on wait for the products on the side.
    pub(crate) fn join(&self) -> Result<()> {
        let Some((_, [_, met])) = &self.aside else { return Ok(()) };
        met.record_on(self.gpu.raw_side())?;
        met.hold(self.gpu.raw_stream())
    }

    /// Sets `n` f32 numbers to zero.
    pub(crate) fn zero(&self, pointer: u64, n: usize) -> Result<()> {
        self.gpu.fill(pointer, 0, n * 4)
    }

    /// y (rows, width) = bias in every row; y holds elements, or f32 where `full`.
    pub(crate) fn fill_rows(&self, bias: u64, y: u64, full: bool, rows: usize, width: usize) -> Result<()> {
        let name = if full { "fill_rows_full" } else { "fill_rows" };
        self.launch_columns(&REDUCE, name, [rows, width], FILLED, arguments![bias, y, rows, width])
    }

    /// `n` f32 numbers as elements, until the operation ends: what products take.
    pub(crate) fn rounded(&mut self, x: u64, n: usize) -> Result<u64> {
        if self.precision == Precision::F32 {
            return Ok(x);
        }
        let y = self.scratch(n)?;
        self.launch_wide(&REDUCE, "to_elements", n, arguments![x, y, n as u64])?;
        Ok(y)
    }

    /// sums (width) += the sum of `parts` rows (parts, width), in order; written whole where the sums are
    /// fresh.
    pub(crate) fn give_parts(
        &self,
        parts: u64,
        count: usize,
        width: usize,
        (sums, fresh): (u64, bool),
    ) -> Result<()> {
        let arguments = arguments![parts, sums, count, width, u32::from(fresh)];
        self.launch_square(&REDUCE, "add_parts", [width.div_ceil(32), 1, 1], [32, 32], arguments)
    }

    /// sums (width) += the sum over the rows of x (rows, width), in fixed tiles; x holds elements,
    /// or f32 where `full`.
    pub(crate) fn add_rows(
        &mut self,
        x: u64,
        full: bool,
        rows: usize,
        width: usize,
        sums: u64,
    ) -> Result<()> {
        self.give_rows(x, full, [rows, width], (sums, false))
    }

    /// As [`add_rows`](Self::add_rows), but written whole where the sums are fresh.
    pub(crate) fn give_rows(
        &mut self,
        x: u64,
        full: bool,
        [rows, width]: [usize; 2],
        sums: (u64, bool),
    ) -> Result<()> {
        let name = if full { "row_parts_full" } else { "row_parts" };
        let tiles = rows.div_ceil(ROWS);
        let parts = self.scratch(tiles * width)?;
        self.launch_columns(&REDUCE, name, [rows, width], ROWS, arguments![x, parts, rows, width])?;
        self.give_parts(parts, tiles, width, sums)
    }
}

/// Elements that a thread of a kernel on whole tensors takes: 16 bytes in bf16.
pub(crate) const WIDE: usize = 8;

/// Rows that one partial sum covers, in every kernel that sums over rows.
pub(crate) const ROWS: usize = 64;

/// Rows that a thread fills: FILLED of reduce.cu.
const FILLED: usize = 16;

/// Sums over rows.
pub(crate) const REDUCE: Source = Source::new("reduce", include_str!("reduce.cu"));

/// What forward gets.
pub struct CudaForward<'a> {
    /// Input values; None where an optional one is absent.
    pub inputs: [Option<u64>; MAX_SLOTS],
    /// Where results go.
    pub outputs: [u64; MAX_SLOTS],
    /// Integer inputs.
    pub ids: [u64; 3],
    /// Shapes of all of them.
    pub shapes: &'a NodeShapes,
    /// What the next operation is, for those that may leave work to it.
    pub next: Next,
    /// Where to launch.
    pub queue: &'a mut Queue,
}

impl CudaForward<'_> {
    /// Input `i`, which is always there.
    pub fn input(&self, i: usize) -> u64 {
        self.inputs[i].unwrap_or(0)
    }
}

/// What backward gets. As on the CPU, gradients are added, but for those that are fresh.
pub struct CudaBackward<'a> {
    /// Input values, as far as declared.
    pub inputs: [Option<u64>; MAX_SLOTS],
    /// Output values, as far as declared; else 0.
    pub outputs: [u64; MAX_SLOTS],
    /// Gradients of the outputs; None is a gradient of zero.
    pub output_gradients: [Option<u64>; MAX_SLOTS],
    /// Gradients of the inputs; None where nobody asks.
    pub input_gradients: [Option<u64>; MAX_SLOTS],
    /// See [`is_fresh`](Self::is_fresh).
    pub(crate) fresh: u32,
    /// Integer inputs.
    pub ids: [u64; 3],
    /// Shapes of all of them.
    pub shapes: &'a NodeShapes,
    /// Where to launch.
    pub queue: &'a mut Queue,
}

impl CudaBackward<'_> {
    /// The value of input `i`, which is always there and declared as read.
    pub fn input(&self, i: usize) -> u64 {
        self.inputs[i].unwrap_or(0)
    }

    /// Whether the gradient of input `i`, one that the operation
    /// [overwrites](crate::engine::operation::Kernel::overwrites), is to be written whole: what it holds is
    /// arbitrary.
    pub fn is_fresh(&self, i: usize) -> bool {
        self.fresh >> i & 1 == 1
    }

    /// The gradient of output 0 of an operation that has no other with a gradient.
    pub fn gradient(&self) -> u64 {
        self.output_gradients[0].unwrap_or(0)
    }
}
