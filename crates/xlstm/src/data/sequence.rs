//! Sequences of features, of any lengths, and the batch of several.

use super::batch::Batch;
use crate::marks::{IGNORE, PAD};
use crate::{Error, Result};

/// What is to be learned from a sequence: one output's targets after the other's.
#[derive(Clone, Debug, PartialEq)]
pub enum Targets {
    /// A class an output, or [`IGNORE`].
    Classes(Vec<u32>),
    /// Numbers; one whose bits are [`IGNORE`] is not asked for.
    Values(Vec<f32>),
}

/// Rows of features with targets.
#[derive(Clone, Debug, PartialEq)]
pub struct Sequence {
    /// (rows, features), row by row.
    pub features: Vec<f32>,
    /// What is to be learned.
    pub targets: Targets,
}

impl Batch {
    /// The batch of `sequences` of `width` features a row, padded at their ends to the longest.
    /// Each has `targets` targets, or with `per_row` as many for every row.
    ///
    /// # Errors
    /// When a sequence has no row, or its features or targets are not as many as they have to be.
    pub fn of_sequences(
        sequences: &[Sequence],
        width: usize,
        targets: usize,
        per_row: bool,
    ) -> Result<Batch> {
        let mut batch = Batch { batch_size: sequences.len(), ..Batch::default() };
        for (i, sequence) in sequences.iter().enumerate() {
            let count = sequence.features.len();
            if count == 0 || !count.is_multiple_of(width) {
                return Err(Error::data(format!(
                    "sequence {i} has {count} features, which are not rows of {width}"
                )));
            }
            let rows = count / width;
            let expected = if per_row { rows * targets } else { targets };
            let found = match &sequence.targets {
                Targets::Classes(classes) => classes.len(),
                Targets::Values(values) => values.len(),
            };
            if found != expected {
                return Err(Error::data(format!(
                    "sequence {i} of {rows} rows has {found} targets, expected {expected}"
                )));
            }
            batch.length = batch.length.max(rows);
        }
        for sequence in sequences {
            let rows = sequence.features.len() / width;
            let pads = batch.length - rows;
            batch.inputs.extend(sequence.features.iter().map(|x| x.to_bits()));
            batch.inputs.resize(batch.inputs.len() + pads * width, 0);
            batch.marks.resize(batch.marks.len() + rows, 0);
            batch.marks.resize(batch.marks.len() + pads, PAD);
            match &sequence.targets {
                Targets::Classes(classes) => batch.targets.extend(classes),
                Targets::Values(values) => batch.targets.extend(values.iter().map(|x| x.to_bits())),
            }
            let padded = if per_row { pads * targets } else { 0 };
            batch.targets.resize(batch.targets.len() + padded, IGNORE);
        }
        batch.target_count = batch.targets.iter().filter(|target| **target != IGNORE).count();
        Ok(batch)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_sequences_are_padded() {
        let sequence = |features: &[f32], targets| Sequence { features: features.to_vec(), targets };
        let one = f32::to_bits(1.0);
        let long = sequence(&[1.0; 6], Targets::Classes(vec![3, IGNORE, 5]));
        let short = sequence(&[1.0; 2], Targets::Classes(vec![7]));
        let batch = Batch::of_sequences(&[short, long.clone()], 2, 1, true).unwrap();
        assert_eq!((batch.batch_size, batch.length, batch.target_count), (2, 3, 3));
        assert_eq!(batch.inputs, [[one; 2].to_vec(), vec![0; 4], vec![one; 6]].concat());
        assert_eq!(batch.targets, [7, IGNORE, IGNORE, 3, IGNORE, 5]);
        assert_eq!(batch.marks, [0, PAD, PAD, 0, 0, 0]);

        let values = sequence(&[2.0], Targets::Values(vec![1.0, f32::from_bits(IGNORE)]));
        let batch = Batch::of_sequences(&[values], 1, 2, false).unwrap();
        assert_eq!((batch.targets, batch.target_count), (vec![one, IGNORE], 1));

        let error = Batch::of_sequences(&[long], 2, 1, false).unwrap_err().to_string();
        assert!(error.contains("sequence 0 of 3 rows has 3 targets, expected 1"), "{error}");
        let error = Batch::of_sequences(&[sequence(&[], Targets::Classes(vec![0]))], 2, 1, false);
        assert!(error.unwrap_err().to_string().contains("0 features"));
    }
}
