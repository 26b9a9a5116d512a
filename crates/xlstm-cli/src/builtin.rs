//! What is built into the binary: configurations and a text to train on.

use std::fs;
use std::path::{Path, PathBuf};

use xlstm::train::{RunConfig, unknown_name};
use xlstm::{Error, Result};

/// Shakespeare's plays, the text that `data.train: shakespeare` means.
pub const SHAKESPEARE: &str = include_str!("../data/tinyshakespeare.txt");

/// The built-in configurations: name and YAML.
const CONFIGS: [(&str, &str); 1] = [("shakespeare", include_str!("../configs/shakespeare.yaml"))];

/// The configuration that `name_or_path` means, a built-in name or a YAML file, with the `--set`
/// overrides applied.
///
/// # Errors
/// A configuration error for an unknown name, which lists the known, and those of
/// [`RunConfig::load`]; an input/output error for a file that cannot be read.
pub fn load_config(name_or_path: &str, sets: &[String]) -> Result<RunConfig> {
    if let Some((_, yaml)) = CONFIGS.iter().find(|(name, _)| *name == name_or_path) {
        let origin = PathBuf::from(format!("built-in {name_or_path}.yaml"));
        return RunConfig::load(yaml, &origin, sets);
    }
    let path = Path::new(name_or_path);
    // A word without a separator or an extension that is no file can only be meant as a name.
    if !path.exists() && path.extension().is_none() && path.components().count() == 1 {
        let known: Vec<&str> = CONFIGS.iter().map(|(name, _)| *name).collect();
        let error = unknown_name("built-in configuration", name_or_path, &known);
        let list = error.hint_text().unwrap_or_default().to_owned();
        return Err(error.hint(format!("{list}; or give the path of a YAML file")));
    }
    let text = fs::read_to_string(path).map_err(|e| Error::io("read", path, &e))?;
    RunConfig::load(&text, path, sets)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_built_in_configuration_loads() {
        for (name, _) in CONFIGS {
            load_config(name, &[]).unwrap_or_else(|e| panic!("{name}: {e}"));
        }
    }

    #[test]
    fn unknown_names_are_told_from_missing_files() {
        let error = load_config("shakespear", &[]).unwrap_err();
        assert_eq!(error.to_string(), "there is no built-in configuration `shakespear`");
        assert!(error.hint_text().unwrap().starts_with("did you mean `shakespeare`?"));
        let error = load_config("configs/none.yaml", &[]).unwrap_err();
        assert_eq!(error.kind(), xlstm::ErrorKind::Io);
    }

    #[test]
    fn the_text_is_whole() {
        assert_eq!(SHAKESPEARE.len(), 1_115_394);
        assert!(SHAKESPEARE.starts_with("First Citizen:"));
    }
}
