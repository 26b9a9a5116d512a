//! The training loop: text -> tokens -> batch -> loss -> gradients -> optimizer ->
//! checkpoint -> sample.
//!
//! A run's folder holds `config.yaml` (resolved), `metrics.jsonl`, `loss.svg`, `last/` (the
//! newest checkpoint, to resume from) and `best/` (the model with the lowest validation
//! loss). Everything random is a function of the seed and the step, so a resumed run is bit
//! for bit the run that was never interrupted.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use super::Curve;
use super::config::RunConfig;
use super::learner::{Learned, Learner, Task, learner};
use super::metrics::{MetricsLog, Row, TrainingRow, ValidationRow};
use super::progress::{Observer, Progress, Summary, Validation};
use super::texts::Texts;
use crate::checkpoint::{self, Standing};
use crate::data::{Batch, Batching, Prefetch, sequential, validation_batches};
use crate::engine::Device;
use crate::error::{Error, ErrorKind, Result};
use crate::eval::Scorer;
use crate::files::{partial_folder, recover_folder, replace_folder, write_atomically};
use crate::folder;
use crate::generate::{Sampler, Sampling, Session};
use crate::model::objective::Carry;
use crate::model::{LanguageModel, Runner};
use crate::nn::Parameters;
use crate::optim::Schedule;

/// How a run ended.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    /// Steps done.
    pub steps: u64,
    /// Lowest validation loss, in nats a token.
    pub best: Option<f64>,
    /// The model to use: the best one, or the last where there was no validation.
    pub model: PathBuf,
    /// Why it ended.
    pub end: End,
}

/// Why a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// All steps are done.
    Finished,
    /// The validation loss stopped falling.
    Early,
    /// The stop flag was raised; the run can be resumed.
    Interrupted,
}

/// Trains in `folder`, which is empty or holds a run to go on with, until the end or until
/// `stop` is raised.
///
/// # Errors
/// Those of the configuration, the texts and the file system; a loss that is not finite.
pub fn train(
    config: &RunConfig,
    texts: Texts,
    folder: &Path,
    stop: &AtomicBool,
    observer: &mut dyn Observer,
) -> Result<Outcome> {
    let (device, line) = Device::choose(config.device, config.dtype, config.threads)?;
    observer.on_message(&line);
    let config = &texts.with_steps(config)?;
    let mut run = Run::new(config, texts, folder, &device, observer)?;
    observer.on_start(&run.summary());
    let (steps, every) = (config.training.steps(), &config.training);
    let due = |step: u64, every: u64| every > 0 && step.is_multiple_of(every);
    let mut end = if run.standing.step >= steps { End::Finished } else { End::Interrupted };
    while run.standing.step < steps && !stop.load(Ordering::Relaxed) {
        let progress = run.step()?;
        let (step, last) = (progress.step, progress.step == steps);
        if last || step == 1 || due(step, every.log_every) {
            run.log(&progress)?;
        }
        observer.on_step(&progress);
        let mut early = false;
        if last || due(step, every.validate_every) {
            early = run.validate(observer)? && !last;
        }
        if last || early || due(step, every.checkpoint_every) {
            run.save(observer)?;
        }
        if last || early {
            end = if last { End::Finished } else { End::Early };
            break;
        }
    }
    if end == End::Interrupted {
        run.save(observer)?;
    }
    let best = run.folder.join("best");
    let model = if best.exists() { best } else { run.folder.join("last") };
    Ok(Outcome { steps: run.standing.step, best: run.standing.best, model, end })
}

/// A run in progress.
struct Run<'a> {
    config: &'a RunConfig,
    texts: Texts,
    folder: PathBuf,
    device: Device,
    model: Arc<LanguageModel>,
    learner: Box<dyn Learner>,
    schedule: Schedule,
    batches: Prefetch,
    micro_batches: Vec<Batch>,
    scorer: Option<Scorer<f32>>,
    metrics: MetricsLog,
    standing: Standing,
    /// Tokens and seconds of the steps since the last logged row, and when they began.
    speed: Speed,
}

/// Tokens a second since the last row, and the clock of the run.
struct Speed {
    started: Instant,
    before: f64,
    tokens: u64,
    since: f64,
}

impl Speed {
    fn seconds(&self) -> f64 {
        self.before + self.started.elapsed().as_secs_f64()
    }
}

impl<'a> Run<'a> {
    fn new(
        config: &'a RunConfig,
        texts: Texts,
        folder: &Path,
        device: &Device,
        observer: &mut dyn Observer,
    ) -> Result<Run<'a>> {
        let mut model_config = config.model.clone();
        model_config.vocab_size = texts.vocabulary(model_config.vocab_size)?;
        let model = Arc::new(LanguageModel::new(&model_config)?);
        let data = &config.data;
        let batches = texts.batches(config)?;
        let carry = match data.batching {
            Batching::Stream => Carry::Carried,
            Batching::Documents => Carry::Marked,
            Batching::Windows if texts.training.document_count() > 1 => Carry::Marked,
            Batching::Windows => Carry::Fresh,
        };
        let scorer = match &texts.validation {
            None => None,
            Some(corpus) => {
                let batches = match data.batching {
                    Batching::Windows | Batching::Documents => {
                        validation_batches(corpus.clone(), data.batch_size, data.length)?
                    }
                    Batching::Stream => sequential(corpus.clone(), data.length)?,
                };
                Some(Scorer::new(&model, batches, config.training.validation_batches as u64, device)?)
            }
        };
        let parameters = Parameters::initialize(model.specs(), config.seed);
        let mut run_standing = Standing::start(texts.fingerprint());
        let last = folder.join("last");
        let mut resumed = None;
        recover_folder(&folder.join("best"))?;
        if recover_folder(&last)? {
            let (standing, snapshot) = checkpoint::load(&last, &model)?;
            if standing.corpus != run_standing.corpus {
                return Err(Error::checkpoint(format!("{} was trained on another text", folder.display()))
                    .hint("resume with the text as it was, or start a new run"));
            }
            (run_standing, resumed) = (standing, Some(snapshot));
        }
        let count = config.training.accumulation;
        let first = run_standing.step * count as u64;
        // That of the batch before: the state in a checkpoint has its rows.
        let shape = batches.shape(first.saturating_sub(1));
        let options = config.optimizer.options();
        let task = Task { shape, carry, options, seed: config.seed, captured: true };
        let mut learner = learner(&model, parameters, task, device)?;
        if let Some(snapshot) = resumed
            && let Some(reason) = learner.restore(snapshot, run_standing.step)?
        {
            observer.on_message(&format!("going on, but not bit for bit: {reason}"));
        }
        let batches = Prefetch::new(batches, first, 2 * count)?;
        // With the device by name, so that going on does not depend on what is chosen then.
        let resolved =
            RunConfig { device: device.choice(), dtype: Some(device.precision()), ..config.clone() };
        write_atomically(&folder.join("config.yaml"), |writer| {
            let yaml = resolved.to_yaml().map_err(std::io::Error::other)?;
            std::io::Write::write_all(writer, yaml.as_bytes())
        })?;
        let metrics = MetricsLog::resume_at(&folder.join("metrics.jsonl"), run_standing.step)?;
        let seconds = run_standing.seconds;
        Ok(Run {
            config,
            folder: folder.to_owned(),
            device: device.clone(),
            schedule: config.learning_rates(),
            micro_batches: vec![Batch::default(); config.training.accumulation],
            texts,
            model,
            learner,
            batches,
            scorer,
            metrics,
            standing: run_standing,
            speed: Speed { started: Instant::now(), before: seconds, tokens: 0, since: seconds },
        })
    }

    fn summary(&self) -> Summary {
        let data = &self.config.data;
        Summary {
            folder: self.folder.clone(),
            parameters: self.model.parameter_count() as u64,
            blocks: self.model.config().blocks_in_words(),
            vocab_size: self.model.config().vocab_size,
            training_tokens: self.texts.training.len() as u64,
            validation_tokens: self.texts.validation.as_ref().map_or(0, |corpus| corpus.len() as u64),
            tokens_per_step: (data.batch_size * data.length * self.config.training.accumulation) as u64,
            start_step: self.standing.step,
            steps: self.config.training.steps(),
        }
    }

    /// One optimizer step.
    fn step(&mut self) -> Result<Progress> {
        let step = self.standing.step;
        let rate = self.schedule.rate(step);
        for batch in &mut self.micro_batches {
            self.batches.next(batch)?;
        }
        let learned = self.learner.step(&self.micro_batches, step, rate)?;
        if !learned.is_finite() {
            return Err(self.diverged(learned.loss));
        }
        let Learned { loss, norm } = learned;
        let targets = self.micro_batches.iter().map(|batch| batch.target_count as u64).sum::<u64>();
        self.standing.tokens += targets;
        self.speed.tokens += targets;
        self.standing.step += 1;
        let now = self.speed.seconds();
        let rate_of = self.speed.tokens as f64 / (now - self.speed.since).max(1e-9);
        self.standing.seconds = now;
        let (done, steps) = (self.standing.step, self.config.training.steps());
        let left = (steps - done) as f64 * self.targets_per_step() / rate_of.max(1e-9);
        Ok(Progress {
            step: done,
            steps,
            loss,
            bits_per_byte: self.bits_per_byte(loss, &self.texts.training),
            learning_rate: rate,
            gradient_norm: norm,
            tokens_per_second: rate_of,
            seconds_left: left,
        })
    }

    fn targets_per_step(&self) -> f64 {
        self.micro_batches.iter().map(|batch| batch.target_count).sum::<usize>() as f64
    }

    /// Nats a token as bits a byte of this text.
    fn bits_per_byte(&self, loss: f64, corpus: &crate::data::Corpus) -> f64 {
        loss / std::f64::consts::LN_2 * corpus.len() as f64 / corpus.bytes() as f64
    }

    fn log(&mut self, progress: &Progress) -> Result<()> {
        self.metrics.push(Row::Training(TrainingRow {
            step: progress.step,
            tokens: self.standing.tokens,
            seconds: self.standing.seconds,
            loss: progress.loss,
            lr: progress.learning_rate,
            grad_norm: progress.gradient_norm,
            tokens_per_s: progress.tokens_per_second,
        }))?;
        (self.speed.tokens, self.speed.since) = (0, self.speed.seconds());
        Ok(())
    }

    /// Measures, keeps the model if it is the best, draws a sample; returns whether to stop.
    fn validate(&mut self, observer: &mut dyn Observer) -> Result<bool> {
        let started = Instant::now();
        let mut early = false;
        if let (Some(scorer), Some(corpus)) = (&mut self.scorer, &self.texts.validation) {
            let corpus = corpus.clone();
            let (nats, targets) = scorer.score(&self.learner.weights(), &self.device, &mut |_| {})?;
            let loss = nats / targets as f64;
            let best = self.standing.best.is_none_or(|best| loss < best);
            let bits_per_byte = self.bits_per_byte(loss, &corpus);
            self.metrics.push(Row::Validation(ValidationRow {
                step: self.standing.step,
                tokens: self.standing.tokens,
                seconds: self.standing.seconds,
                val_loss: loss,
                val_bits_per_byte: bits_per_byte,
            }))?;
            observer.on_validation(&Validation {
                step: self.standing.step,
                steps: self.config.training.steps(),
                loss,
                bits_per_byte,
                best,
                seconds: started.elapsed().as_secs_f64(),
            });
            if best {
                self.standing.best = Some(loss);
                self.standing.validations_since_best = 0;
                self.save_best()?;
            } else {
                self.standing.validations_since_best += 1;
                let patience = self.config.training.early_stopping;
                early = patience > 0 && self.standing.validations_since_best >= patience;
            }
        }
        if self.config.sample.tokens > 0 {
            observer.on_sample(&self.sample()?);
        }
        self.draw_curve()?;
        // Measuring is not training: its time counts for neither speed nor time left.
        self.speed.before -= started.elapsed().as_secs_f64();
        Ok(early)
    }

    fn sample(&self) -> Result<String> {
        let config = &self.config.sample;
        let prompt = self.texts.tokenizer.encode(&config.prompt)?;
        let runner = Runner::new(self.model.clone(), self.learner.weights(), self.device.clone());
        let mut session = Session::new(runner);
        session.read(&prompt)?;
        let sampling = Sampling {
            temperature: config.temperature,
            top_k: config.top_k,
            top_p: config.top_p,
            min_p: config.min_p,
            repetition_penalty: config.repetition_penalty,
        };
        let mut sampler = Sampler::new(sampling, self.texts.tokenizer.vocabulary_size(), self.config.seed);
        sampler.observe(&prompt);
        let mut ids = prompt;
        let ends = self.texts.tokenizer.end_of_text();
        session.generate(config.tokens, &mut sampler, ends.as_slice(), |id| {
            ids.push(id);
            Ok(true)
        })?;
        self.texts.tokenizer.decode(&ids)
    }

    fn save_best(&self) -> Result<()> {
        let target = self.folder.join("best");
        let partial = partial_folder(&target)?;
        let snapshot = self.learner.snapshot()?;
        folder::write(&partial, &self.model, &snapshot.parameters, Some(&self.texts.tokenizer))?;
        replace_folder(&partial, &target)
    }

    fn save(&mut self, observer: &mut dyn Observer) -> Result<()> {
        let target = self.folder.join("last");
        self.standing.seconds = self.speed.seconds();
        let snapshot = self.learner.snapshot()?;
        checkpoint::save(&target, &self.model, &self.texts.tokenizer, &snapshot, &self.standing)?;
        self.draw_curve()?;
        observer.on_checkpoint(&target);
        Ok(())
    }

    fn draw_curve(&self) -> Result<()> {
        let svg = Curve::of_rows("Loss", self.metrics.rows()).to_svg();
        write_atomically(&self.folder.join("loss.svg"), |w| std::io::Write::write_all(w, svg.as_bytes()))
    }

    /// The error of a step whose loss or gradients are not finite: replays it to name the
    /// block where the first such number arises.
    fn diverged(&mut self, loss: f64) -> Error {
        let culprit = match self.learner.find_non_finite() {
            Ok(culprit) => culprit,
            Err(error) => return error,
        };
        let place = match culprit {
            Some(c) => {
                let what = if c.backward { "the gradients of " } else { "" };
                let operation = c.operation.map_or_else(String::new, |name| format!(", {name}"));
                format!("the first number that is not finite is in {what}{}{operation}", c.scope)
            }
            None => "the gradients are finite one by one but not their norm".to_owned(),
        };
        let step = self.standing.step + 1;
        Error::new(ErrorKind::NonFinite, format!("training diverged at step {step} (loss {loss}): {place}"))
            .hint("lower optimizer.learning_rate or optimizer.clip, or lengthen schedule.warmup_steps")
    }
}
