//! y = the row of the weight that each token id names.

use rayon::prelude::*;

#[cfg(feature = "cuda")]
use crate::engine::cuda::{CudaBackward, CudaForward, Source, context::arguments};
use crate::engine::matrix::MatMut;
use crate::engine::operation::{Backward, Forward, Kernel, Slots};
use crate::engine::tape::{Ids, Tape, Var};
use crate::engine::vector::{add_to, vectorize};
use crate::engine::{Scalar, Shape, Storable};
use crate::error::{Error, Result};
use crate::ops::TILE;

/// ids (batch, length), weight (vocabulary, features) -> y (batch, length, features).
#[derive(Debug)]
struct Embedding {
    batch: usize,
    length: usize,
}

/// Records the look-up of `shape` = [batch, length] token ids in `weight`.
///
/// The ids are the caller's to validate: one outside the vocabulary panics.
///
/// # Errors
/// When the weight is not a matrix.
pub fn embedding(tape: &mut Tape, ids: Ids, weight: Var, shape: [usize; 2]) -> Result<Var> {
    let [batch, length] = shape;
    Ok(tape.record(Embedding { batch, length }, &[Some(weight)], &[ids])?[0])
}

#[cfg(feature = "cuda")]
const SOURCE: Source = Source::new("embedding", include_str!("embedding.cu"));

impl Kernel for Embedding {
    fn name(&self) -> &'static str {
        "embedding"
    }

    fn outputs(&self, inputs: &[Option<Shape>]) -> Result<Vec<Shape>> {
        let Some(weight) = inputs[0].filter(|w| w.dims().len() == 2) else {
            return Err(Error::shape(format!(
                "the weight is (vocabulary, features), not {:?}",
                inputs[0].unwrap_or_else(|| Shape::from([]))
            )));
        };
        Ok(vec![[self.batch, self.length, weight.last()].into()])
    }

    fn reads(&self) -> Slots {
        Slots::of(&[], &[])
    }

    fn weights(&self) -> u32 {
        1
    }

    fn storable(&self, _slot: usize) -> Storable {
        Storable::Quantized
    }

    fn forward<T: Scalar>(&self, io: &mut Forward<'_, T>) {
        let y = io.output(0);
        let width = io.shapes.input(0).last();
        let ids = &io.ids[0][..self.batch * self.length];
        if let Some(weight) = io.narrow[0] {
            return y.chunks_exact_mut(width).zip(ids).for_each(|(row, &id)| {
                weight.at(id as usize * width, width).widen(row);
            });
        }
        let weight = io.input(0);
        y.par_chunks_mut(width * TILE).zip(ids.par_chunks(TILE)).for_each(|(y, ids)| {
            for (row, &id) in y.chunks_exact_mut(width).zip(ids) {
                row.copy_from_slice(&weight[id as usize * width..][..width]);
            }
        });
    }

    /// dW[id] += dy, tokens in order, one task a block of columns.
    fn backward<T: Scalar>(&self, io: &mut Backward<'_, T>) {
        let Some(dw) = io.input_gradient(0) else { return };
        let dw = dw.cleared();
        let (vocabulary, width) = (io.shapes.input(0).rows(), io.shapes.input(0).last());
        let ids = &io.ids[0][..self.batch * self.length];
        let dy = io.gradient();
        let block = column_block(width, 64);
        let blocks = MatMut::new(dw, vocabulary, width).blocks(vocabulary, block);
        blocks.into_par_iter().enumerate().for_each(|(i, mut dw)| {
            vectorize!(|| {
                for (dy, &id) in dy.chunks_exact(width).zip(ids) {
                    add_to(&dy[i * block..][..block], dw.row(id as usize));
                }
            });
        });
    }

    #[cfg(feature = "cuda")]
    fn forward_cuda(&self, io: &mut CudaForward<'_>) -> Result<()> {
        let (tokens, width) = (self.batch * self.length, io.shapes.outputs[0].last());
        let arguments = arguments![io.input(0), io.ids[0], io.outputs[0], tokens, width];
        io.queue.launch(&SOURCE, "embedding_forward", [tokens.div_ceil(8), 1, 1], 256, arguments)
    }

    #[cfg(feature = "cuda")]
    fn backward_cuda(&self, io: &mut CudaBackward<'_>) -> Result<()> {
        let Some(dw) = io.input_gradients[0] else { return Ok(()) };
        let (tokens, width) = (self.batch * self.length, io.shapes.input(0).last());
        let arguments = arguments![io.gradient(), io.ids[0], dw, tokens, width];
        let grid = [tokens, width.div_ceil(1024), 1];
        io.queue.launch(&SOURCE, "embedding_backward", grid, 256, arguments)
    }
}

/// The width of the column blocks that work over `width` columns is cut into: a power of
/// two up to `most`, or everything where that would leave slivers.
pub(crate) fn column_block(width: usize, most: usize) -> usize {
    let block = (1 << width.trailing_zeros()).min(most);
    if block < 16 { width } else { block }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::check::Check;

    #[test]
    fn gradients() {
        for width in [5, 96] {
            Check::new()
                .input([7, width])
                .ids(&[3, 0, 3, 6, 1, 3])
                .run(|tape, v, ids| Ok(vec![embedding(tape, ids[0], v[0], [2, 3])?]));
        }
    }

    #[test]
    fn blocks_of_columns_tile_the_width() {
        for width in [1, 5, 16, 48, 64, 100, 768] {
            assert_eq!(width % column_block(width, 64), 0);
        }
        assert_eq!(column_block(768, 64), 64);
        assert_eq!(column_block(100, 64), 100);
    }
}
