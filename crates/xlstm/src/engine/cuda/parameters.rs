//! Parameters, gradients and moments on a GPU: flat f32 buffers of one layout.

use std::sync::Arc;

use super::context::{Buffer, Gpu};
use super::{Precision, to_bf16};
use crate::error::Result;

/// Elements that parameters are aligned to: 256 bytes, which the fastest products ask for.
pub(crate) const ALIGNMENT: usize = 64;

/// Where each parameter lies in a flat buffer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// First element and number of elements of each parameter.
    places: Vec<(usize, usize)>,
    total: usize,
}

impl Layout {
    /// Parameters of these lengths, one after the other, aligned; between them lie zeros.
    pub fn new(lengths: impl IntoIterator<Item = usize>) -> Layout {
        let (mut places, mut total) = (Vec::new(), 0);
        for length in lengths {
            places.push((total, length));
            total += length.next_multiple_of(ALIGNMENT);
        }
        Layout { places, total }
    }

    /// First element and number of elements of each parameter.
    pub(crate) fn places(&self) -> &[(usize, usize)] {
        &self.places
    }

    /// Element `offset` of parameter `index` in the flat buffer.
    fn element(&self, index: usize, offset: usize) -> usize {
        self.places.get(index).map_or(0, |place| place.0) + offset
    }

    /// First elements and numbers of elements of all that parameters have outside of `pieces`, each a
    /// parameter with the first of its elements and their number; neighbours are one.
    pub(super) fn outside(&self, pieces: &[(usize, usize, usize)]) -> Vec<(usize, usize)> {
        let mut taken: Vec<(usize, usize)> =
            pieces.iter().map(|&(index, offset, n)| (self.element(index, offset), n)).collect();
        taken.sort_unstable();
        let mut outside: Vec<(usize, usize)> = Vec::new();
        // Whether the last of them reaches to the end of its parameter.
        let mut reaches = false;
        let mut taken = taken.into_iter().peekable();
        for &(first, count) in &self.places {
            let (mut at, end) = (first, first + count);
            while at < end {
                let next = taken.peek().map_or(end, |&(start, _)| start.clamp(at, end));
                if next > at {
                    match outside.last_mut() {
                        Some((start, n)) if reaches && at == first => *n = next - *start,
                        _ => outside.push((at, next - at)),
                    }
                }
                reaches = next == end && next > at;
                at = match taken.next_if(|&(start, _)| start < end) {
                    Some((start, n)) => start + n,
                    None => end,
                };
            }
        }
        outside
    }

    /// Elements in all.
    pub fn total(&self) -> usize {
        self.total
    }
}

/// One flat buffer of parameters, gradients or moments.
#[derive(Debug)]
pub struct CudaTensors {
    gpu: Arc<Gpu>,
    layout: Layout,
    buffer: Buffer,
}

impl CudaTensors {
    /// All zero.
    ///
    /// # Errors
    /// When memory runs out.
    pub fn zeros(gpu: &Arc<Gpu>, layout: &Layout) -> Result<CudaTensors> {
        let buffer = Buffer::zeros(gpu, layout.total * 4)?;
        Ok(CudaTensors { gpu: gpu.clone(), layout: layout.clone(), buffer })
    }

    /// Copies `values`, one slice a parameter, to the GPU.
    ///
    /// # Errors
    /// When the copy fails.
    pub fn upload(&self, values: &[Vec<f32>]) -> Result<()> {
        self.gpu.enter()?;
        for (values, &(first, count)) in values.iter().zip(&self.layout.places) {
            self.gpu.upload(self.buffer.pointer() + 4 * first as u64, &values[..count])?;
        }
        self.gpu.synchronize()
    }

    /// Copies all from the GPU, one buffer a parameter.
    ///
    /// # Errors
    /// When the copy, or work before it, fails.
    pub fn download(&self) -> Result<Vec<Vec<f32>>> {
        self.gpu.enter()?;
        let mut flat = vec![0.0; self.layout.total];
        self.gpu.download(&mut flat, self.buffer.pointer())?;
        Ok(self.layout.places.iter().map(|&(first, count)| flat[first..first + count].to_vec()).collect())
    }

    /// Sets everything to zero.
    ///
    /// # Errors
    /// When the GPU refuses.
    pub fn clear(&mut self) -> Result<()> {
        self.gpu.enter()?;
        self.gpu.fill(self.buffer.pointer(), 0, self.layout.total * 4)
    }

    /// Sets everything outside of `pieces` to zero, as [`Layout::outside`] has them.
    pub(super) fn clear_outside(&mut self, pieces: &[(usize, usize, usize)]) -> Result<()> {
        for (first, count) in self.layout.outside(pieces) {
            self.gpu.fill(self.buffer.pointer() + 4 * first as u64, 0, 4 * count)?;
        }
        Ok(())
    }

    /// The layout.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    pub(crate) fn gpu(&self) -> &Arc<Gpu> {
        &self.gpu
    }

    pub(crate) fn pointer(&self) -> u64 {
        self.buffer.pointer()
    }

    /// Element `offset` of parameter `index`.
    pub(super) fn at(&self, index: usize, offset: usize) -> u64 {
        self.buffer.pointer() + 4 * self.layout.element(index, offset) as u64
    }
}

/// A model's parameters: f32 masters, which the optimizer updates, and in bf16 a copy of the same
/// layout, which matrix products read.
#[derive(Debug)]
pub struct CudaParameters {
    masters: CudaTensors,
    copies: Option<Buffer>,
}

impl CudaParameters {
    /// All zero.
    ///
    /// # Errors
    /// When memory runs out.
    pub fn zeros(gpu: &Arc<Gpu>, layout: &Layout, precision: Precision) -> Result<CudaParameters> {
        let copies = match precision {
            Precision::F32 => None,
            Precision::Bf16 => Some(Buffer::zeros(gpu, layout.total * precision.bytes())?),
        };
        Ok(CudaParameters { masters: CudaTensors::zeros(gpu, layout)?, copies })
    }

    /// Copies `values`, one slice a parameter, to the GPU.
    ///
    /// # Errors
    /// When the copy fails.
    pub fn upload(&self, values: &[Vec<f32>]) -> Result<()> {
        if let Some(copies) = &self.copies {
            self.gpu().enter()?;
            for (values, &(first, count)) in values.iter().zip(&self.layout().places) {
                let rounded: Vec<u16> = values[..count].iter().map(|x| to_bf16(*x)).collect();
                self.gpu().upload(copies.pointer() + 2 * first as u64, &rounded)?;
            }
        }
        self.masters.upload(values)
    }

    /// Copies the masters from the GPU, one buffer a parameter.
    ///
    /// # Errors
    /// When the copy, or work before it, fails.
    pub fn download(&self) -> Result<Vec<Vec<f32>>> {
        self.masters.download()
    }

    /// Zeros in the same places: gradients and moments.
    ///
    /// # Errors
    /// When memory runs out.
    pub fn zeros_like(&self) -> Result<CudaTensors> {
        CudaTensors::zeros(self.gpu(), self.layout())
    }

    /// What matrix products read.
    pub fn precision(&self) -> Precision {
        if self.copies.is_some() { Precision::Bf16 } else { Precision::F32 }
    }

    /// The layout.
    pub fn layout(&self) -> &Layout {
        self.masters.layout()
    }

    pub(crate) fn gpu(&self) -> &Arc<Gpu> {
        self.masters.gpu()
    }

    /// The masters, flat.
    pub(crate) fn masters(&self) -> u64 {
        self.masters.pointer()
    }

    /// The copy, flat; None where products read the masters.
    pub(crate) fn copies(&self) -> Option<u64> {
        self.copies.as_ref().map(Buffer::pointer)
    }

    /// Element `offset` of parameter `index`: of the masters where it is read in full precision.
    pub(super) fn at(&self, index: usize, offset: usize, full: bool) -> u64 {
        match &self.copies {
            Some(copies) if !full => copies.pointer() + 2 * self.layout().element(index, offset) as u64,
            _ => self.masters.at(index, offset),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_lies_outside_of_pieces() {
        // At 0, 128 and 192, the first with a gap behind it.
        let layout = Layout::new([100, 64, 70]);
        assert_eq!(layout.outside(&[]), [(0, 262)]);
        assert_eq!(layout.outside(&[(0, 0, 100), (1, 0, 64), (2, 0, 70)]), []);
        assert_eq!(layout.outside(&[(2, 10, 20), (0, 0, 40)]), [(40, 162), (222, 40)]);
        assert_eq!(layout.outside(&[(1, 0, 64)]), [(0, 100), (192, 70)]);
    }
}
