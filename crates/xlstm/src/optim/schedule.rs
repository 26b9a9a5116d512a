//! The learning rate of each step: a linear warm-up from zero, then a decay to a floor.
//!
//! With `w` warm-up steps, the floor reached at step `d` and `t = (step - w) / (d - w)`:
//! ```text
//! step < w         max * step / w
//! w <= step < d    cosine:  min + (max - min) * (1 + cos(pi t)) / 2
//!                  linear:  max + (min - max) * t
//! step >= d        min
//! constant         max from step w on
//! ```
//! The first step of a warm-up has rate 0: it fills AdamW's moments and moves nothing.

use serde::{Deserialize, Serialize};

/// The shape of the decay after the warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Decay {
    /// Half a cosine wave from the highest rate to the lowest.
    #[default]
    Cosine,
    /// A straight line from the highest rate to the lowest.
    Linear,
    /// No decay: the highest rate to the end.
    Constant,
}

/// A learning-rate schedule; see the module for its equation.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Schedule {
    /// The rate at the end of the warm-up.
    pub max: f64,
    /// The rate from `decay_steps` on.
    pub min: f64,
    /// Steps of linear warm-up; 0 starts at `max`.
    pub warmup_steps: u64,
    /// The step, counted from the start of training (warm-up included), at which `min` is reached.
    pub decay_steps: u64,
    /// The shape of the decay.
    pub decay: Decay,
}

impl Schedule {
    /// The learning rate of step `step`, counted from 0.
    pub fn rate(&self, step: u64) -> f64 {
        if step < self.warmup_steps {
            return self.max * step as f64 / self.warmup_steps as f64;
        }
        if self.decay == Decay::Constant {
            return self.max;
        }
        // From here on `step >= warmup_steps`, so a decay that would end within the
        // warm-up falls to the floor at once and the division below is never by zero.
        if step >= self.decay_steps {
            return self.min;
        }
        let t = (step - self.warmup_steps) as f64 / (self.decay_steps - self.warmup_steps) as f64;
        match self.decay {
            Decay::Cosine => {
                self.min + (self.max - self.min) * 0.5 * (1.0 + (std::f64::consts::PI * t).cos())
            }
            Decay::Linear => self.max + (self.min - self.max) * t,
            Decay::Constant => self.max,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const COSINE: Schedule =
        Schedule { max: 0.01, min: 1e-4, warmup_steps: 4, decay_steps: 20, decay: Decay::Cosine };

    /// The rates of the original's LinearWarmupCosineAnnealing in a run of 20 steps.
    #[test]
    fn cosine_agrees_with_the_original() {
        #[rustfmt::skip]
        let truth = [
            0.0, 0.0025, 0.005, 0.0075, 0.01, 0.00990488713799599, 0.00962320368593087,
            0.009165774580897599, 0.00855017856687341, 0.007800072653447032, 0.006944282990207195,
            0.0060156970939798365, 0.005050000000000001, 0.004084302906020166, 0.003155717009792806,
            0.00229992734655297, 0.0015498214331265902, 0.0009342254191024007, 0.00047679631406913065,
            0.00019511286200400938,
        ];
        for (step, truth) in truth.into_iter().enumerate() {
            let rate = COSINE.rate(step as u64);
            assert!((rate - truth).abs() < 1e-16, "step {step}: {rate} instead of {truth}");
        }
        assert_eq!(COSINE.rate(20), 1e-4);
        assert_eq!(COSINE.rate(u64::MAX), 1e-4);
    }

    #[test]
    fn linear_meets_its_ends_and_its_middle() {
        let schedule = Schedule { decay: Decay::Linear, ..COSINE };
        assert_eq!(schedule.rate(2), 0.005);
        assert_eq!(schedule.rate(4), 0.01);
        assert!((schedule.rate(12) - 0.00505).abs() < 1e-15);
        assert_eq!(schedule.rate(20), 1e-4);
    }

    #[test]
    fn constant_stays_at_its_highest() {
        let schedule = Schedule { decay: Decay::Constant, ..COSINE };
        assert_eq!(schedule.rate(0), 0.0);
        assert_eq!(schedule.rate(4), 0.01);
        assert_eq!(schedule.rate(1000), 0.01);
    }

    #[test]
    fn no_warmup_and_no_room_to_decay_are_fine() {
        let schedule = Schedule { warmup_steps: 0, ..COSINE };
        assert_eq!(schedule.rate(0), 0.01);
        let schedule = Schedule { warmup_steps: 30, ..COSINE };
        assert!((schedule.rate(29) - 0.01 * 29.0 / 30.0).abs() < 1e-15);
        assert_eq!(schedule.rate(30), 1e-4);
    }
}
