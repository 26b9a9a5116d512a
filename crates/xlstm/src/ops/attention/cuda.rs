//! Attention on a GPU: in bf16 the kernels of attention_tiles.cuh, else, and for a token or two, those of
//! attention.cu.

use super::{CACHE, Sizes};
use crate::engine::Precision;
use crate::engine::cuda::{CudaBackward, CudaForward, Source, context::arguments, launch::Queue};
use crate::engine::operation::NodeShapes;
use crate::error::{Error, Result};

/// The largest head: MAX_SIZE of attention.cu, and the widest of [`TILES`].
const SIZE: usize = 128;

/// Queries, and keys, that a block works on: TILE of attention.cu.
const TILE: usize = 32;

const SOURCE: Source = Source::new("attention", include_str!("../attention.cu"));

/// Bytes of `tiles` tiles of attention.cu in shared memory.
fn shared(tiles: usize, size: usize) -> usize {
    4 * tiles * TILE * (size | 1)
}

/// Kernels on tensor cores, one program a width.
struct Tiles {
    /// Features that a head is filled up to.
    width: usize,
    /// Queries, or keys, of a block.
    rows: usize,
    forward: (Source, &'static str),
    backward: Source,
    queries: &'static str,
    keys: &'static str,
}

macro_rules! tiles {
    ($width:literal, $rows:literal) => {
        Tiles {
            width: $width,
            rows: $rows,
            forward: (source!("attention_forward", $width), concat!("attention_forward_", $width)),
            backward: source!("attention_backward", $width),
            queries: concat!("attention_queries_", $width),
            keys: concat!("attention_keys_", $width),
        }
    };
}
macro_rules! source {
    ($name:literal, $width:literal) => {
        Source::new(
            concat!($name, "_", $width),
            concat!(
                "#define WIDTH ",
                $width,
                "\n",
                include_str!("attention_tiles.cuh"),
                include_str!(concat!($name, ".cu"))
            ),
        )
    };
}

/// As at the ends of attention_forward.cu and attention_backward.cu.
const TILES: [Tiles; 4] = [tiles!(32, 128), tiles!(64, 128), tiles!(96, 64), tiles!(128, 64)];

/// Tokens of a tile of the other side: OTHERS of attention_tiles.cuh.
const OTHERS: usize = 64;

/// Queries from which on tiles are of use, and what divides the size of their heads.
const FEWEST: usize = 16;
const PIECE: usize = 8;

impl Tiles {
    /// The ones that fit, if any.
    fn of(precision: Precision, Sizes { length, size, .. }: Sizes) -> Option<&'static Tiles> {
        let fits = precision == Precision::Bf16 && length >= FEWEST && size.is_multiple_of(PIECE);
        TILES.iter().find(|tiles| fits && size <= tiles.width)
    }

    /// Bytes of `own` tiles of a block's rows and two times two tiles of the other side, with `numbers` f32
    /// for each of its tokens.
    fn shared(&self, own: usize, numbers: usize) -> usize {
        2 * self.width * (own * self.rows + 4 * OTHERS) + 2 * numbers * 4 * OTHERS
    }
}

fn check_size(size: usize) -> Result<()> {
    if size > SIZE {
        return Err(Error::config(format!("attention heads of {size} features do not fit on the GPU"))
            .hint(format!("use more heads: a head has at most {SIZE} features there")));
    }
    Ok(())
}

/// Keys and values of the cache in bf16, where there is one.
fn rounded_cache(
    queue: &mut Queue,
    shapes: &NodeShapes,
    cache: [Option<u64>; 2],
) -> Result<[Option<u64>; 2]> {
    let mut rounded = [None; 2];
    for (slot, (to, cache)) in rounded.iter_mut().zip(cache).enumerate() {
        if let Some(cache) = cache {
            *to = Some(queue.rounded(cache, shapes.input(CACHE + slot).len())?);
        }
    }
    Ok(rounded)
}

/// See [`Kernel::forward_cuda`](crate::engine::Kernel::forward_cuda).
pub(super) fn forward(sizes: Sizes, io: &mut CudaForward<'_>) -> Result<()> {
    let Sizes { length, cached, heads, size } = sizes;
    check_size(size)?;
    let tasks = io.shapes.input(0).dims()[0] * heads;
    let [q, k, v, ck, cv, first, ..] = io.inputs;
    let [y, logs, ..] = io.outputs;
    if let Some(tiles) = Tiles::of(io.queue.precision(), sizes) {
        let [ck, cv] = rounded_cache(io.queue, io.shapes, [ck, cv])?;
        let arguments = arguments![q, k, v, ck, cv, first, y, logs, length, cached, heads, size];
        let grid = [tasks, length.div_ceil(tiles.rows), 1];
        let (source, name) = &tiles.forward;
        return io.queue.launch_shared(source, name, grid, 128, tiles.shared(1, 1), arguments);
    }
    let arguments = arguments![q, k, v, ck, cv, first, y, logs, length, cached, heads, size];
    let grid = [length.div_ceil(TILE), tasks, 1];
    io.queue.launch_shared(&SOURCE, "attention_forward", grid, 256, shared(2, size), arguments)
}

/// See [`Kernel::backward_cuda`](crate::engine::Kernel::backward_cuda).
pub(super) fn backward(sizes: Sizes, io: &mut CudaBackward<'_>) -> Result<()> {
    let Sizes { length, cached, heads, size } = sizes;
    check_size(size)?;
    let tasks = io.shapes.input(0).dims()[0] * heads;
    let [q, k, v, ck, cv, first, ..] = io.inputs;
    let [y, logs, ..] = io.outputs;
    let [dq, dk, dv, dck, dcv, ..] = io.input_gradients;
    let fresh = (0..CACHE + 2).fold(0, |bits, slot| bits | u32::from(io.is_fresh(slot)) << slot);
    let (dy, shares) = (io.gradient(), io.queue.scratch(tasks * length)?);
    if let Some(tiles) = Tiles::of(io.queue.precision(), sizes) {
        let [ck, cv] = rounded_cache(io.queue, io.shapes, [ck, cv])?;
        let arguments =
            arguments![q, k, v, ck, cv, first, y, logs, dy, shares, dq, length, cached, heads, size, fresh];
        let (blocks, space) = (length.div_ceil(tiles.rows), tiles.shared(2, 3));
        let grid = [tasks, blocks, 1];
        io.queue.launch_shared(&tiles.backward, tiles.queries, grid, 128, space, arguments)?;
        let arguments = arguments![
            q, k, v, ck, cv, first, logs, dy, shares, dk, dv, dck, dcv, length, cached, heads, size, fresh
        ];
        let grid = [tasks, blocks + cached.div_ceil(tiles.rows), 1];
        return io.queue.launch_shared(&tiles.backward, tiles.keys, grid, 128, space, arguments);
    }
    let (tiles, n) = (length.div_ceil(TILE), tasks * length);
    let arguments = arguments![y, dy, shares, n as u64, length, heads, size];
    io.queue.launch(&SOURCE, "attention_shares", [n.div_ceil(8), 1, 1], 256, arguments)?;
    if dq.is_some() {
        let arguments =
            arguments![q, k, v, ck, cv, first, logs, shares, dy, dq, length, cached, heads, size, fresh];
        let grid = [tiles, tasks, 1];
        io.queue.launch_shared(&SOURCE, "attention_queries", grid, 256, shared(4, size), arguments)?;
    }
    let arguments = arguments![
        q, k, v, ck, cv, first, logs, shares, dy, dk, dv, dck, dcv, length, cached, heads, size, fresh
    ];
    let grid = [tiles + cached.div_ceil(TILE), tasks, 1];
    io.queue.launch_shared(&SOURCE, "attention_keys", grid, 256, shared(4, size), arguments)
}
