//! `xlstm pull`: a model from the Hub into its cache.

use std::path::PathBuf;

use clap::Args;
use xlstm::Result;
use xlstm::folder::download;
use xlstm::folder::hub::{Hub, HubName};

use crate::output;
use crate::progress::Meter;

/// Download a model from the Hub into its cache, where all programs find it.
#[derive(Debug, Args)]
pub struct PullArgs {
    /// ORG/NAME or ORG/NAME@revision
    #[arg(value_name = "NAME")]
    pub name: String,
}

/// Runs the verb.
///
/// # Errors
/// Those of the network and of writing the cache.
pub fn run(args: &PullArgs) -> Result<()> {
    let folder = pull(&Hub::from_environment(), &args.name.parse()?)?;
    output::data(&format!("{}\n", folder.display()))
}

/// Downloads with a live line for each file.
///
/// # Errors
/// Those of the network and of writing the cache.
pub fn pull(hub: &Hub, name: &HubName) -> Result<PathBuf> {
    let mut meter: Option<(usize, Meter)> = None;
    download::pull(hub, name, &mut |progress| {
        if meter.as_ref().is_none_or(|(number, _)| *number != progress.number) {
            output::note(&format!(
                "file {}/{}: {} ({:.1} MB)",
                progress.number,
                progress.files,
                progress.file,
                progress.bytes as f64 / 1e6
            ));
            meter = Some((progress.number, Meter::new("downloading")));
        }
        if let Some((_, meter)) = &mut meter {
            meter.set(progress.done as f64 / progress.bytes.max(1) as f64);
        }
    })
}
