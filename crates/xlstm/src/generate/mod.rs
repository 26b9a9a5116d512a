//! Generation: a session holds a model's state and continues it token by token.

pub mod sampler;
pub mod stop;

pub use sampler::{Sampler, Sampling};
pub use stop::StopStrings;

use std::path::Path;

use crate::error::{Error, Result};
use crate::model::{Draw, Logits, Runner};
use crate::state::State;

/// Why a generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// As many tokens as were asked for.
    Length,
    /// The model ended the text.
    EndOfText,
    /// Whoever listened had enough.
    Stopped,
}

impl Finish {
    /// `length`, `end_of_text` or `stopped`.
    pub fn name(self) -> &'static str {
        match self {
            Finish::Length => "length",
            Finish::EndOfText => "end_of_text",
            Finish::Stopped => "stopped",
        }
    }
}

/// How each sampler draws where the logits are, if all of them can.
fn draws_of(samplers: &mut [Sampler]) -> Option<Vec<Draw>> {
    samplers.iter_mut().map(Sampler::elsewhere).collect()
}

/// One sequence in progress: a runner, and the logits after its last token.
#[derive(Debug)]
pub struct Session {
    runner: Runner<f32>,
    logits: Vec<f32>,
}

impl Session {
    /// A session that has not begun.
    pub fn new(runner: Runner<f32>) -> Session {
        Session { runner, logits: Vec::new() }
    }

    /// The session saved in a file, by the model with this fingerprint.
    ///
    /// # Errors
    /// When the file is missing, damaged, or of another model.
    pub fn load(mut runner: Runner<f32>, path: &Path, fingerprint: &str) -> Result<Session> {
        let (state, logits) = State::load(path, &runner.model().state_layout(1), fingerprint)?;
        runner.set_state(&state)?;
        Ok(Session { runner, logits })
    }

    /// Saves the session to a file.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn save(&self, path: &Path, fingerprint: &str) -> Result<()> {
        self.state()?.save(path, fingerprint, &self.logits)
    }

    /// The state after the last token.
    ///
    /// # Errors
    /// When a GPU fails.
    pub fn state(&self) -> Result<State<f32>> {
        self.runner.state()
    }

    /// Reads tokens.
    ///
    /// # Errors
    /// When one lies outside the vocabulary.
    pub fn read(&mut self, tokens: &[u32]) -> Result<()> {
        if !tokens.is_empty() {
            self.logits = self.runner.read(tokens, Logits::Last)?;
        }
        Ok(())
    }

    /// Draws up to `count` tokens, each read in turn and given to `listen`, which returns
    /// whether to go on. Stops at one of `ends`, which is read and given too.
    ///
    /// # Errors
    /// When nothing was read yet.
    pub fn generate(
        &mut self,
        count: usize,
        sampler: &mut Sampler,
        ends: &[u32],
        mut listen: impl FnMut(u32) -> Result<bool> + Send,
    ) -> Result<Finish> {
        let finished =
            self.generate_samples(count, std::slice::from_mut(sampler), ends, |_, token| listen(token))?;
        Ok(finished[0])
    }

    /// Continues the sequence once for every sampler, all at once as one batch; `listen` hears
    /// the number of the sampler and its token, and returns whether that sample goes on. Several
    /// samples end the session: it stands at the end of one sequence only.
    ///
    /// # Errors
    /// When nothing was read yet, or there is no sampler.
    pub fn generate_samples(
        &mut self,
        count: usize,
        samplers: &mut [Sampler],
        ends: &[u32],
        listen: impl FnMut(usize, u32) -> Result<bool> + Send,
    ) -> Result<Vec<Finish>> {
        if self.logits.is_empty() || samplers.is_empty() {
            return Err(Error::data("there is nothing to continue: the prompt has no tokens")
                .hint("give a prompt of at least one token"));
        }
        // Once for all tokens: a small model reads one in little more than entering takes.
        let device = self.runner.device().clone();
        device.install(|| self.generate_in_pool(count, samplers, ends, listen))
    }

    /// See [`generate_samples`](Session::generate_samples).
    fn generate_in_pool(
        &mut self,
        count: usize,
        samplers: &mut [Sampler],
        ends: &[u32],
        mut listen: impl FnMut(usize, u32) -> Result<bool>,
    ) -> Result<Vec<Finish>> {
        let (vocabulary, rows) = (self.logits.len(), samplers.len());
        if rows > 1 {
            let state = self.runner.state()?;
            let state = State::stack(&vec![&state; rows])?;
            self.runner.set_state(&state)?;
            self.logits = self.logits.repeat(rows);
        }
        let mut finished = vec![None; rows];
        let mut tokens = vec![0; rows];
        // The next tokens, where they have been drawn already.
        let mut drawn: Option<Vec<u32>> = None;
        for _ in 0..count {
            // A sample that has ended reads on, and nobody hears of it.
            for (i, sampler) in samplers.iter_mut().enumerate().filter(|(i, _)| finished[*i].is_none()) {
                tokens[i] = match &drawn {
                    Some(drawn) => drawn[i],
                    None => sampler.draw(&self.logits[i * vocabulary..][..vocabulary])?,
                };
            }
            let draws = if self.runner.draws() { draws_of(samplers) } else { None };
            drawn = match draws {
                Some(draws) => Some(self.runner.read_and_draw(&tokens, &draws)?),
                None => {
                    self.read(&tokens)?;
                    None
                }
            };
            for (i, finish) in finished.iter_mut().enumerate().filter(|(_, finish)| finish.is_none()) {
                if !listen(i, tokens[i])? {
                    *finish = Some(Finish::Stopped);
                } else if ends.contains(&tokens[i]) {
                    *finish = Some(Finish::EndOfText);
                }
            }
            if finished.iter().all(Option::is_some) {
                break;
            }
        }
        if rows > 1 {
            self.logits.clear();
        } else if drawn.is_some() {
            self.logits = self.runner.logits()?;
        }
        Ok(finished.into_iter().map(|finish| finish.unwrap_or(Finish::Length)).collect())
    }
}
