//! The arguments that say which model is meant, shared by the verbs that read one.

use std::path::{Path, PathBuf};

use clap::Args;
use xlstm::Result;
use xlstm::folder::hub::Hub;
use xlstm::folder::{ModelFolder, OpenOptions};
use xlstm::state::State;

use crate::output;

/// Which model.
#[derive(Debug, Args)]
pub struct ModelArgs {
    /// A folder of a model (ours, Hugging Face's or NX-AI's) or of a run; or ORG/NAME[@revision] of
    /// the Hub's cache
    #[arg(long, value_name = "MODEL")]
    pub model: PathBuf,
    /// Download the model ORG/NAME first if the cache does not have it
    #[cfg(feature = "download")]
    #[arg(long)]
    pub download: bool,
}

impl ModelArgs {
    /// Opens the model, after a line on stderr for all that was not understood.
    ///
    /// # Errors
    /// When there is no such model, or it is damaged.
    pub fn open(&self) -> Result<ModelFolder> {
        self.open_with(&OpenOptions::default())
    }

    /// The same with options.
    ///
    /// # Errors
    /// As [`open`](ModelArgs::open).
    pub fn open_with(&self, options: &OpenOptions) -> Result<ModelFolder> {
        let folder = ModelFolder::open(&self.find()?, options)?;
        warn(&folder.warnings);
        Ok(folder)
    }

    #[cfg(not(feature = "download"))]
    fn find(&self) -> Result<PathBuf> {
        Hub::from_environment().resolve(&self.model)
    }

    #[cfg(feature = "download")]
    fn find(&self) -> Result<PathBuf> {
        let hub = Hub::from_environment();
        match (hub.resolve(&self.model), self.model.to_str().map(str::parse)) {
            (Err(_), Some(Ok(name))) if self.download => super::pull::pull(&hub, &name),
            (found, _) => found,
        }
    }
}

/// Opens the model of this name, as [`ModelArgs`] without a download.
///
/// # Errors
/// When there is no such model, or it is damaged.
pub fn open(name: &Path) -> Result<ModelFolder> {
    let folder = ModelFolder::load(&Hub::from_environment().resolve(name)?)?;
    warn(&folder.warnings);
    Ok(folder)
}

/// A line on stderr of the memory that the model will take, before a weight is read.
pub fn announce(folder: &ModelFolder) {
    let state = State::<f32>::empty(&folder.model.state_layout(1));
    output::note(&format!(
        "model: {}, {} parameters; memory: {} of weights in {}, {} of state a sequence",
        folder.model.config().family.name(),
        folder.model.parameter_count(),
        size(folder.files.bytes()),
        formats(folder),
        size(state.bytes()),
    ));
}

/// The number formats of the weights.
pub fn formats(folder: &ModelFolder) -> String {
    let dense = folder.files.format().name();
    folder.files.code().map_or_else(|| dense.into(), |code| format!("{} and {dense}", code.name()))
}

fn size(bytes: usize) -> String {
    match bytes as f64 {
        bytes if bytes >= 1e9 => format!("{:.2} GB", bytes / 1e9),
        bytes if bytes >= 1e6 => format!("{:.1} MB", bytes / 1e6),
        bytes => format!("{:.1} kB", bytes / 1e3),
    }
}

/// A line on stderr for each warning.
pub fn warn(warnings: &[String]) {
    warnings.iter().for_each(|warning| output::note(&format!("warning: {warning}")));
}
