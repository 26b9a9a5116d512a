//! Models by name: `ORG/NAME[@revision]` in the Hub's cache, which all programs share.
//!
//! ```text
//! models--ORG--NAME/refs/main               the commit that the revision `main` stands for
//! models--ORG--NAME/snapshots/COMMIT/FILE   links to
//! models--ORG--NAME/blobs/ETAG              the content
//! ```
//! The cache is `HF_HUB_CACHE`, else `hub` in `HF_HOME`, else `~/.cache/huggingface/hub`. Looking
//! a name up reads the disk and nothing else.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use crate::error::{Error, Result};

/// A model's name on the Hub.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HubName {
    /// `ORG/NAME`.
    pub repository: String,
    /// A branch, a tag or a commit; `main` where none is given.
    pub revision: String,
}

impl FromStr for HubName {
    type Err = Error;

    fn from_str(text: &str) -> Result<HubName> {
        let (repository, revision) = text.split_once('@').unwrap_or((text, "main"));
        let plain = |part: &str, extra: &str| {
            part.starts_with(|c: char| c.is_ascii_alphanumeric())
                && !part.contains("..")
                && part.chars().all(|c| c.is_ascii_alphanumeric() || extra.contains(c))
        };
        let parts: Vec<&str> = repository.split('/').collect();
        if parts.len() == 2
            && parts.iter().all(|part| plain(part, "-_."))
            && revision.split('/').all(|part| plain(part, "-_."))
        {
            return Ok(HubName { repository: repository.into(), revision: revision.into() });
        }
        Err(Error::config(format!("{text} is no name of a model on the Hub"))
            .hint("expected ORG/NAME or ORG/NAME@revision, for instance NX-AI/xLSTM-7b@main"))
    }
}

impl fmt::Display for HubName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{}", self.repository, self.revision)
    }
}

/// Where models come from by name.
#[derive(Clone, Debug)]
pub struct Hub {
    /// The folder of the cache.
    pub cache: PathBuf,
    /// The address that downloads come from.
    pub endpoint: String,
    /// Whether nothing may be downloaded.
    pub offline: bool,
    /// What proves who asks, for models that are not public.
    pub token: Option<String>,
}

impl Hub {
    /// The Hub that the environment describes: `HF_HUB_CACHE`, `HF_HOME`, `XDG_CACHE_HOME`,
    /// `HF_ENDPOINT`, `HF_HUB_OFFLINE`, `HF_TOKEN`.
    pub fn from_environment() -> Hub {
        Hub::from_variables(|name| std::env::var(name).ok())
    }

    fn from_variables(variable: impl Fn(&str) -> Option<String>) -> Hub {
        let set = |name: &str| variable(name).filter(|value| !value.trim().is_empty());
        let folder = |name: &str| set(name).map(PathBuf::from);
        let home = || folder("HOME").or_else(|| folder("USERPROFILE")).unwrap_or_default();
        let cache = folder("HF_HUB_CACHE").unwrap_or_else(|| {
            let own = folder("HF_HOME").unwrap_or_else(|| {
                folder("XDG_CACHE_HOME").unwrap_or_else(|| home().join(".cache")).join("huggingface")
            });
            own.join("hub")
        });
        let endpoint = set("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".into());
        let yes = ["1", "on", "yes", "true"];
        Hub {
            cache,
            endpoint: endpoint.trim_end_matches('/').to_owned(),
            offline: set("HF_HUB_OFFLINE").is_some_and(|v| yes.contains(&v.to_lowercase().as_str())),
            token: set("HF_TOKEN").map(|token| token.trim().to_owned()),
        }
    }

    /// The folder of a repository in the cache, there or not.
    pub(crate) fn repository(&self, name: &HubName) -> PathBuf {
        self.cache.join(format!("models--{}", name.repository.replace('/', "--")))
    }

    /// The folder with the model's files, if the cache has it.
    pub fn cached(&self, name: &HubName) -> Option<PathBuf> {
        let repository = self.repository(name);
        let commit = match std::fs::read_to_string(repository.join("refs").join(&name.revision)) {
            Ok(commit) => commit.trim().to_owned(),
            Err(_) => name.revision.clone(),
        };
        // A damaged file of references must not lead out of the cache.
        let plain = !commit.is_empty() && commit.chars().all(|c| c.is_ascii_alphanumeric());
        let snapshot = repository.join("snapshots").join(&commit);
        (plain && snapshot.is_dir()).then_some(snapshot)
    }

    /// The folder that `--model` means: one of this path, or the model of this name in the cache.
    ///
    /// # Errors
    /// When there is neither.
    pub fn resolve(&self, path: &Path) -> Result<PathBuf> {
        // What a killed process left beside a folder counts: it becomes the folder again.
        let beside = [".new", ".old"].map(|end| {
            let mut name = path.as_os_str().to_owned();
            name.push(end);
            PathBuf::from(name)
        });
        if path.exists() || beside.iter().any(|path| path.exists()) {
            return Ok(path.to_owned());
        }
        let missing = format!("there is no model folder {}", path.display());
        let Some(Ok(name)) = path.to_str().map(HubName::from_str) else {
            return Err(Error::checkpoint(missing).hint(
                "`xlstm train` writes model folders, for instance out/1/best; a model of the Hub is ORG/NAME",
            ));
        };
        self.cached(&name).ok_or_else(|| {
            Error::checkpoint(format!(
                "{missing}, and no model {name} in the Hub's cache {}",
                self.cache.display()
            ))
            .hint(how_to_get(&name))
        })
    }
}

/// How a model comes into the cache, with this build.
fn how_to_get(name: &HubName) -> String {
    let HubName { repository, revision } = name;
    let other = match revision.as_str() {
        "main" => format!("`hf download {repository}`"),
        _ => format!("`hf download {repository} --revision {revision}`"),
    };
    match cfg!(feature = "download") {
        true => format!("`xlstm pull {name}` downloads it, as does --download; so does {other}"),
        false => format!("{other} downloads it; so does an xlstm built with the Cargo feature `download`"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files::tests::Scratch;

    #[test]
    fn names() {
        let name: HubName = "NX-AI/xLSTM-7b".parse().unwrap();
        assert_eq!((name.repository.as_str(), name.revision.as_str()), ("NX-AI/xLSTM-7b", "main"));
        assert_eq!("a/b@refs/pr/1".parse::<HubName>().unwrap().revision, "refs/pr/1");
        for text in
            ["a", "a/b/c", "../b", "a/..", "/a/b", "a/b@", "a/b@../x", "a/b@x//y", "a b/c", "./a", "a/"]
        {
            assert!(text.parse::<HubName>().unwrap_err().hint_text().is_some(), "{text}");
        }
    }

    #[test]
    fn the_environment_is_honoured() {
        let hub = |pairs: &[(&str, &str)]| {
            Hub::from_variables(|name| pairs.iter().find(|(n, _)| *n == name).map(|(_, v)| (*v).to_owned()))
        };
        let cache = |pairs: &[(&str, &str)]| hub(pairs).cache;
        assert_eq!(cache(&[("HOME", "/h")]), Path::new("/h/.cache/huggingface/hub"));
        assert_eq!(cache(&[("HOME", "/h"), ("XDG_CACHE_HOME", "/x")]), Path::new("/x/huggingface/hub"));
        assert_eq!(cache(&[("HOME", "/h"), ("HF_HOME", "/f")]), Path::new("/f/hub"));
        assert_eq!(cache(&[("HF_HOME", "/f"), ("HF_HUB_CACHE", "/c")]), Path::new("/c"));
        assert!(hub(&[("HF_HUB_OFFLINE", "True")]).offline && !hub(&[("HF_HUB_OFFLINE", "0")]).offline);
        assert_eq!(hub(&[("HF_TOKEN", " t ")]).token.as_deref(), Some("t"));
        assert_eq!(hub(&[("HF_ENDPOINT", "http://e/")]).endpoint, "http://e");
        assert_eq!(hub(&[]).endpoint, "https://huggingface.co");
    }

    #[test]
    fn the_cache_is_looked_up() {
        let scratch = Scratch::new();
        let hub = Hub { cache: scratch.0.join("hub"), ..Hub::from_variables(|_| None) };
        let repository = hub.cache.join("models--org--name");
        std::fs::create_dir_all(repository.join("refs/refs/pr")).unwrap();
        std::fs::create_dir_all(repository.join("snapshots/0abc")).unwrap();
        std::fs::write(repository.join("refs/main"), "0abc\n").unwrap();
        std::fs::write(repository.join("refs/refs/pr/1"), "0abc").unwrap();
        std::fs::write(repository.join("refs/bad"), "../../..").unwrap();
        let find = |name: &str| hub.resolve(Path::new(name));
        for name in ["org/name", "org/name@main", "org/name@refs/pr/1", "org/name@0abc"] {
            assert_eq!(find(name).unwrap(), repository.join("snapshots/0abc"), "{name}");
        }
        for name in ["org/name@other", "org/name@bad", "org/stranger", "nowhere"] {
            let error = find(name).unwrap_err();
            assert!(error.to_string().contains(name) && error.hint_text().is_some(), "{error}");
        }
        assert_eq!(hub.resolve(&scratch.0).unwrap(), scratch.0, "a folder that is there is itself");
    }
}
