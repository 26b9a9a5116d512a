//! A token drawn from the logits of every sequence: where generation needs no more than that, they never
//! leave the GPU.
//!
//! With weights w_v = e^((l_v - max l) / temperature) over the ids v below a limit, the token is the first
//! whose running sum exceeds u times their sum, u being uniform in [0, 1); at temperature 0 it is the
//! likeliest, the lowest id among equals.

#[cfg(feature = "cuda")]
use crate::engine::cuda::{CudaBackward, CudaForward, Source, context::arguments};
use crate::engine::operation::{Backward, Forward, Kernel, Slots};
use crate::engine::tape::{Tape, Var};
use crate::engine::{Scalar, Shape};
use crate::error::{Error, Result};

/// Logits (B, 1, V), settings (B, 3): u, temperature, limit -> token (B): NaN where a logit is.
#[derive(Debug)]
struct Draw;

/// Records the drawing of a token for every sequence, a number below 2^24.
///
/// # Errors
/// When the settings are not three numbers a sequence, or the vocabulary has more than 2^24 tokens.
pub fn draw(tape: &mut Tape, logits: Var, settings: Var) -> Result<Var> {
    Ok(tape.record(Draw, &[Some(logits), Some(settings)], &[])?[0])
}

/// Whole numbers up to here are exact in f32.
const MOST: usize = 1 << 24;

#[cfg(feature = "cuda")]
const SOURCE: Source = Source::new("draw", include_str!("draw.cu"));

impl Kernel for Draw {
    fn name(&self) -> &'static str {
        "draw"
    }

    fn outputs(&self, inputs: &[Option<Shape>]) -> Result<Vec<Shape>> {
        let (Some(logits), Some(settings)) = (inputs[0], inputs[1]) else {
            return Err(Error::shape("logits and settings are needed"));
        };
        let rows = logits.rows();
        if settings.len() != 3 * rows || logits.last() > MOST || logits.last() == 0 {
            return Err(Error::shape(format!(
                "settings {settings:?} are not three numbers for each row of logits {logits:?} of at most {MOST}"
            )));
        }
        Ok(vec![[rows].into()])
    }

    fn reads(&self) -> Slots {
        Slots::of(&[], &[])
    }

    fn full_precision(&self) -> Slots {
        Slots::of(&[1], &[0])
    }

    fn forward<T: Scalar>(&self, io: &mut Forward<'_, T>) {
        let (logits, settings) = (io.input(0), io.input(1));
        let rows = logits.chunks_exact(io.shapes.input(0).last()).zip(settings.chunks_exact(3));
        for (token, (logits, settings)) in io.output(0).iter_mut().zip(rows) {
            *token = token_of(logits, settings);
        }
    }

    fn backward<T: Scalar>(&self, _: &mut Backward<'_, T>) {
        // A token has no gradient.
    }

    #[cfg(feature = "cuda")]
    fn forward_cuda(&self, io: &mut CudaForward<'_>) -> Result<()> {
        let logits = io.shapes.input(0);
        let arguments = arguments![io.input(0), io.input(1), io.outputs[0], logits.last()];
        io.queue.launch(&SOURCE, "draw_token", [logits.rows(), 1, 1], 1024, arguments)
    }

    #[cfg(feature = "cuda")]
    fn backward_cuda(&self, _: &mut CudaBackward<'_>) -> Result<()> {
        Ok(())
    }
}

fn token_of<T: Scalar>(logits: &[T], settings: &[T]) -> T {
    let [u, temperature, limit] = [settings[0], settings[1], settings[2]].map(Scalar::to_f64);
    let logits: Vec<f64> = logits[..logits.len().min(limit as usize)].iter().map(|l| l.to_f64()).collect();
    if logits.iter().any(|l| l.is_nan()) {
        return T::NAN;
    }
    let largest = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    if temperature == 0.0 {
        let first = logits.iter().position(|l| *l == largest).unwrap_or_default();
        return T::from_f64(first as f64);
    }
    let weight = |l: &f64| ((l - largest) / temperature).exp();
    let mut left = u * logits.iter().map(weight).sum::<f64>();
    let first = logits.iter().position(|l| {
        left -= weight(l);
        left < 0.0
    });
    T::from_f64(first.unwrap_or(logits.len().saturating_sub(1)) as f64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::{Executor, Mode};

    fn tokens(logits: &[f64], settings: &[f64]) -> Vec<f64> {
        let (rows, mut tape) = (settings.len() / 3, Tape::new(Mode::Evaluate));
        let [x, how] = [[rows, 1, logits.len() / rows].into(), Shape::from([rows, 3])].map(|s| tape.input(s));
        let token = draw(&mut tape, x, how).unwrap();
        tape.keep(token);
        let mut executor = Executor::<f64>::new(tape);
        executor.input_mut(x).copy_from_slice(logits);
        executor.input_mut(how).copy_from_slice(settings);
        executor.forward(&[]);
        executor.value(token).to_vec()
    }

    #[test]
    fn tokens_follow_u_the_temperature_and_the_limit() {
        let logits = [0.0, 3.0, 2.0, 3.0];
        let one = |settings: &[f64]| tokens(&logits, settings)[0];
        assert_eq!(one(&[0.9, 0.0, 4.0]), 1.0, "the lowest id of the likeliest");
        assert_eq!(tokens(&[0.0, 1.0, 9.0], &[0.0, 0.0, 2.0]), [1.0], "a padded id");
        // Running sums of e^l: 1, 21.1, 28.5, 48.6.
        for (u, token) in
            [(0.0, 0.0), (0.02, 0.0), (0.021, 1.0), (0.43, 1.0), (0.5, 2.0), (0.6, 3.0), (1.0, 3.0)]
        {
            assert_eq!(one(&[u, 1.0, 4.0]), token, "{u}");
        }
        // A high temperature makes all alike.
        assert_eq!(one(&[0.26, 1e6, 4.0]), 1.0);
        let two =
            tokens(&[1.0, 0.0, 0.0, 1.0, f64::NAN, 0.0], &[0.0, 0.0, 2.0, 0.0, 0.0, 2.0, 0.0, 0.0, 2.0]);
        assert_eq!(two[..2], [0.0, 1.0]);
        assert!(two[2].is_nan());
    }

    #[test]
    fn settings_are_three_numbers_a_row() {
        let mut tape = Tape::new(Mode::Evaluate);
        let (x, how) = (tape.input([2, 1, 5]), tape.input([2, 2]));
        assert!(draw(&mut tape, x, how).is_err());
    }
}
