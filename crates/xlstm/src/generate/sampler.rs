//! From logits to a token: repetition penalty, temperature, top-k, min-p and top-p, in this order.

use crate::error::{Error, ErrorKind, Result};
use crate::rng::Rng;

/// How tokens are drawn.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// Divides the logits; 0 takes the likeliest token.
    pub temperature: f64,
    /// Only the k likeliest tokens.
    pub top_k: Option<usize>,
    /// Only the likeliest tokens that hold this much probability together (at least one).
    pub top_p: Option<f64>,
    /// Only tokens at least this share as likely as the likeliest one.
    pub min_p: Option<f64>,
    /// Divides the logits above 0 of tokens that occurred, and multiplies those below
    /// ([Keskar et al. 2019](https://arxiv.org/abs/1909.05858)); 1 changes nothing.
    pub repetition_penalty: f64,
}

impl Default for Sampling {
    /// Every token with its probability.
    fn default() -> Self {
        Sampling { temperature: 1.0, top_k: None, top_p: None, min_p: None, repetition_penalty: 1.0 }
    }
}

/// Draws tokens with a random sequence of its own.
#[derive(Clone, Debug)]
pub struct Sampler {
    sampling: Sampling,
    vocabulary: usize,
    rng: Rng,
    candidates: Vec<(f64, u32)>,
    /// Whether each token occurred.
    seen: Vec<bool>,
}

impl Sampler {
    /// A sampler of ids below `vocabulary` (a model may have more: its embedding padded).
    pub fn new(sampling: Sampling, vocabulary: usize, seed: u64) -> Sampler {
        Sampler {
            sampling,
            vocabulary,
            rng: Rng::new(seed, 0x7361_6d70),
            candidates: Vec::new(),
            seen: vec![false; vocabulary],
        }
    }

    /// Tells of tokens that were not drawn here, such as a prompt's, for the repetition penalty.
    pub fn observe(&mut self, tokens: &[u32]) {
        for &token in tokens {
            if let Some(seen) = self.seen.get_mut(token as usize) {
                *seen = true;
            }
        }
    }

    /// Draws from logits (V).
    ///
    /// # Errors
    /// When a logit is not a number.
    pub fn draw(&mut self, logits: &[f32]) -> Result<u32> {
        let token = self.choose(logits)?;
        self.observe(&[token]);
        Ok(token)
    }

    fn choose(&mut self, logits: &[f32]) -> Result<u32> {
        let logits = &logits[..self.vocabulary.min(logits.len())];
        // A look at all of them, which takes many at a time.
        if logits.iter().fold(false, |found, l| found | l.is_nan()) {
            return Err(Error::new(ErrorKind::NonFinite, "the model's logits are not numbers")
                .hint("the model is damaged, or its training diverged"));
        }
        let Sampling { temperature, top_k, top_p, min_p, repetition_penalty } = self.sampling;
        if temperature == 0.0 && repetition_penalty == 1.0 {
            let largest = logits.iter().fold(f32::NEG_INFINITY, |m, &l| if l > m { l } else { m });
            let first = logits.iter().position(|&l| l == largest);
            return first.map(|id| id as u32).ok_or_else(|| Error::shape("no logits to draw from"));
        }
        self.candidates.clear();
        self.candidates.extend(logits.iter().zip(0..).map(|(l, id)| (f64::from(*l), id)));
        if repetition_penalty != 1.0 {
            for ((logit, _), _) in self.candidates.iter_mut().zip(&self.seen).filter(|(_, seen)| **seen) {
                *logit = if *logit > 0.0 { *logit / repetition_penalty } else { *logit * repetition_penalty };
            }
        }
        // The likeliest first, the lower id first among equals.
        let order = |a: &(f64, u32), b: &(f64, u32)| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1));
        if temperature == 0.0 {
            let best = self.candidates.iter().min_by(|a, b| order(a, b));
            return best.map(|(_, id)| *id).ok_or_else(|| Error::shape("no logits to draw from"));
        }
        if let Some(k) = top_k.filter(|&k| k < self.candidates.len()) {
            self.candidates.select_nth_unstable_by(k.max(1) - 1, order);
            self.candidates.truncate(k.max(1));
        }
        let largest = self.candidates.iter().fold(f64::NEG_INFINITY, |m, (l, _)| m.max(*l));
        for (weight, _) in &mut self.candidates {
            *weight = ((*weight - largest) / temperature).exp();
        }
        if let Some(share) = min_p {
            // The likeliest token has the weight 1.
            self.candidates.retain(|(weight, _)| *weight >= share.min(1.0));
        }
        if top_k.is_some() || top_p.is_some() {
            self.candidates.sort_unstable_by(order);
        }
        let mut total: f64 = self.candidates.iter().map(|(w, _)| w).sum();
        if let Some(p) = top_p {
            let mut held = 0.0;
            let enough = self.candidates.iter().position(|(w, _)| {
                held += w;
                held >= p * total
            });
            self.candidates.truncate(enough.map_or(self.candidates.len(), |i| i + 1));
            total = self.candidates.iter().map(|(w, _)| w).sum();
        }
        let mut left = self.rng.uniform() * total;
        for (weight, id) in &self.candidates {
            left -= weight;
            if left < 0.0 {
                return Ok(*id);
            }
        }
        self.candidates.last().map(|(_, id)| *id).ok_or_else(|| Error::shape("no logits to draw from"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOGITS: [f32; 4] = [1.0, 3.0, 2.0, 3.0];

    fn shares(sampling: Sampling) -> [f64; 4] {
        let mut sampler = Sampler::new(sampling, 4, 1);
        let mut counts = [0.0; 4];
        for _ in 0..20_000 {
            counts[sampler.draw(&LOGITS).expect("a token") as usize] += 1.0 / 20_000.0;
        }
        counts
    }

    #[test]
    fn draws_follow_the_probabilities() {
        let all = Sampling::default();
        let weights = LOGITS.map(|l| f64::from(l).exp());
        let total: f64 = weights.iter().sum();
        for (share, weight) in shares(all).iter().zip(weights) {
            assert!((share - weight / total).abs() < 0.015);
        }
        let greedy = Sampling { temperature: 0.0, ..all };
        assert_eq!(shares(greedy)[1].round(), 1.0);
        let top_k = shares(Sampling { top_k: Some(2), ..all });
        assert!(top_k[0] == 0.0 && top_k[2] == 0.0 && (top_k[1] - 0.5).abs() < 0.02);
        // 3.0 and 3.0 hold 0.85 of the probability, so 0.9 needs the next one too.
        let top_p = shares(Sampling { top_p: Some(0.9), ..all });
        assert!(top_p[0] == 0.0 && top_p[2] > 0.1);
        // 2.0 is e^-1 = 0.37 times as likely as 3.0, and 1.0 is 0.14 times.
        let min_p = shares(Sampling { min_p: Some(0.2), ..all });
        assert!(min_p[0] == 0.0 && min_p[2] > 0.1);
        assert_eq!(shares(Sampling { min_p: Some(1.0), ..all })[2], 0.0);
        let narrow = shares(Sampling { top_p: Some(1e-9), ..all });
        assert_eq!(narrow[1].round(), 1.0);
    }

    #[test]
    fn repetition_is_penalised() {
        let sampling = Sampling { temperature: 0.0, repetition_penalty: 2.0, ..Sampling::default() };
        let mut sampler = Sampler::new(sampling, 3, 1);
        sampler.observe(&[1, 9]);
        let drawn: Vec<u32> = (0..3).map(|_| sampler.draw(&[1.1, 2.0, -0.1]).expect("a token")).collect();
        assert_eq!(drawn, [0, 1, 1], "1.1 against 1.0, then 0.55 against 1.0");
    }

    #[test]
    fn padded_ids_are_never_drawn_and_nan_is_an_error() {
        let sampling = Sampling { temperature: 0.0, ..Sampling::default() };
        let mut sampler = Sampler::new(sampling, 2, 1);
        assert_eq!(sampler.draw(&[0.0, 1.0, 9.0]).expect("a token"), 1);
        assert!(sampler.draw(&[f32::NAN, 1.0]).is_err());
    }
}
