//! New model folders of random weights, written as they are drawn.

use std::borrow::Cow;
use std::collections::VecDeque;
use std::path::Path;

use rayon::prelude::*;

use super::write_with;
use crate::engine::{Device, Format};
use crate::error::{Error, Result};
use crate::files::{partial_folder, replace_folder};
use crate::model::LanguageModel;

/// Writes the model folder `target` with the first values of `model` that `seed` draws: the same
/// numbers as a training run starts from, rounded to `format`. Memory holds one parameter a thread.
///
/// # Errors
/// When `target` exists or cannot be written.
pub fn initialize(
    target: &Path,
    model: &LanguageModel,
    format: Format,
    seed: u64,
    device: &Device,
) -> Result<()> {
    if target.exists() {
        return Err(Error::config(format!("{} exists already", target.display()))
            .hint("choose another folder, or remove this one"));
    }
    let partial = partial_folder(target)?;
    let specs = model.specs();
    let mut drawn = VecDeque::new();
    write_with(&partial, model, None, format, |index, _| {
        if drawn.is_empty() {
            let end = specs.len().min(index + device.threads());
            let draw = |index: usize| specs[index].draw(seed, index);
            drawn
                .extend(device.install(|| (index..end).into_par_iter().map(draw).collect::<Vec<Vec<f32>>>()));
        }
        Cow::Owned(drawn.pop_front().unwrap_or_default())
    })?;
    replace_folder(&partial, target)
}
