//! Downloads into the Hub's cache (Cargo feature `download`), only when asked for.
//!
//! A file arrives in `blobs/ETAG.incomplete`, where the next attempt goes on after a kill, and is
//! renamed when it has its announced size; then the snapshot links to it. The reference to the
//! commit is written last, so a revision that is found in the cache is whole.

use std::fs::{self, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;
use ureq::http::Response;
use ureq::tls::{RootCerts, TlsConfig};
use ureq::{Agent, Body};

use super::hub::{Hub, HubName};
use crate::error::{Error, ErrorKind, Result};
use crate::files::write_atomically;

/// How far a download is.
#[derive(Clone, Debug)]
pub struct Progress<'a> {
    /// The file that is coming in.
    pub file: &'a str,
    /// Its number, from 1.
    pub number: usize,
    /// Files in all.
    pub files: usize,
    /// Bytes of it that are here.
    pub done: u64,
    /// Its size in bytes.
    pub bytes: u64,
}

/// What the Hub says about a revision.
#[derive(Deserialize)]
struct Revision {
    sha: String,
    #[serde(default)]
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
struct Sibling {
    rfilename: String,
}

/// Downloads a model's configuration, weights and tokenizer into the cache, unless they are
/// there; returns their folder.
///
/// # Errors
/// When the Hub cannot be reached, does not have the model or refuses it, when downloads are
/// switched off, or when the cache cannot be written.
pub fn pull(hub: &Hub, name: &HubName, report: &mut dyn FnMut(Progress<'_>)) -> Result<PathBuf> {
    if hub.offline {
        return Err(Error::config(format!("{name} is not downloaded: HF_HUB_OFFLINE is set"))
            .hint("unset HF_HUB_OFFLINE to download"));
    }
    let client = Client::new(hub, name);
    let url = format!("{}/api/models/{}/revision/{}", hub.endpoint, name.repository, encoded(&name.revision));
    let mut response = client.get(&url, 0)?;
    let text = response.body_mut().read_to_string().map_err(|e| client.failed(&url, &e))?;
    let revision: Revision = serde_json::from_str(&text).map_err(|e| client.failed(&url, &e))?;
    if revision.sha.is_empty() || !revision.sha.chars().all(|c| c.is_ascii_hexdigit()) {
        return Err(client.failed(&url, &format!("{:?} is no commit", revision.sha)));
    }
    let wanted: Vec<&str> =
        revision.siblings.iter().map(|file| file.rfilename.as_str()).filter(|name| is_wanted(name)).collect();
    if !wanted.iter().any(|name| name.ends_with(".safetensors")) {
        return Err(Error::checkpoint(format!("{name} has no weights in safetensors files"))
            .hint("only safetensors files are read; look for another revision of the model"));
    }
    let repository = hub.repository(name);
    let snapshot = repository.join("snapshots").join(&revision.sha);
    for folder in [&snapshot, &repository.join("blobs")] {
        fs::create_dir_all(folder).map_err(|e| Error::io("create", folder, &e))?;
    }
    for (i, file) in wanted.iter().enumerate() {
        let place = snapshot.join(file);
        if place.exists() {
            continue;
        }
        let mut tell = |done: u64, bytes: u64| {
            report(Progress { file, number: i + 1, files: wanted.len(), done, bytes });
        };
        let url = format!("{}/{}/resolve/{}/{file}", hub.endpoint, name.repository, revision.sha);
        let blob = client.fetch(&url, &repository.join("blobs"), &mut tell)?;
        link(&blob, &place)?;
    }
    if name.revision != revision.sha {
        let reference = repository.join("refs").join(&name.revision);
        let folder = reference.parent().unwrap_or(&repository);
        fs::create_dir_all(folder).map_err(|e| Error::io("create", folder, &e))?;
        write_atomically(&reference, |w| w.write_all(revision.sha.as_bytes()))?;
    }
    Ok(snapshot)
}

/// Whether a file is part of a model: configurations, tokenizer and weights, in the folder itself.
fn is_wanted(name: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    name.chars().all(plain)
        && !name.starts_with('.')
        && [".json", ".yaml", ".safetensors"].iter().any(|ending| name.ends_with(ending))
}

/// A revision as one segment of an address.
fn encoded(revision: &str) -> String {
    revision.replace('/', "%2F")
}

struct Client<'a> {
    hub: &'a Hub,
    name: &'a HubName,
    agent: Agent,
}

/// What a file is, before it comes.
struct Announced {
    etag: String,
    bytes: u64,
}

impl<'a> Client<'a> {
    fn new(hub: &'a Hub, name: &'a HubName) -> Client<'a> {
        let config = Agent::config_builder()
            .tls_config(TlsConfig::builder().root_certs(RootCerts::PlatformVerifier).build())
            .timeout_connect(Some(Duration::from_secs(30)))
            .timeout_recv_response(Some(Duration::from_secs(60)))
            .user_agent(concat!("xlstm/", env!("CARGO_PKG_VERSION")))
            .http_status_as_error(false)
            .build();
        Client { hub, name, agent: config.new_agent() }
    }

    fn bearer(&self) -> Option<String> {
        self.hub.token.as_ref().map(|token| format!("Bearer {token}"))
    }

    /// The content at an address from byte `first` on, redirects followed. The token goes to the
    /// Hub alone, not to where it redirects.
    fn get(&self, url: &str, first: u64) -> Result<Response<Body>> {
        let mut request = self.agent.get(url);
        if let Some(bearer) = self.bearer() {
            request = request.header("authorization", bearer);
        }
        if first > 0 {
            request = request.header("range", format!("bytes={first}-"));
        }
        let response = request.call().map_err(|e| self.failed(url, &e))?;
        self.check(url, response)
    }

    /// Name of the content and size of a file. Large files lie elsewhere, and the answer that
    /// redirects there says what they are.
    fn announced(&self, url: &str) -> Result<Announced> {
        let mut url = url.to_owned();
        for _ in 0..4 {
            let request = self.agent.head(&url).config().max_redirects(0).max_redirects_will_error(false);
            let mut request = request.build();
            if let Some(bearer) = self.bearer() {
                request = request.header("authorization", bearer);
            }
            let response = request.call().map_err(|e| self.failed(&url, &e))?;
            let response = self.check(&url, response)?;
            let header = |name: &str| response.headers().get(name).and_then(|value| value.to_str().ok());
            // A renamed repository redirects within the Hub.
            if let (true, None, Some(to)) =
                (response.status().is_redirection(), header("x-linked-etag"), header("location"))
                && to.starts_with('/')
            {
                url = format!("{}{to}", self.hub.endpoint);
                continue;
            }
            let etag = header("x-linked-etag").or_else(|| header("etag")).unwrap_or_default();
            let etag = etag.trim_start_matches("W/").trim_matches('"');
            let plain = |c: char| c.is_ascii_alphanumeric() || c == '-';
            let size = header("x-linked-size").or_else(|| header("content-length"));
            let Some(bytes) = size.and_then(|size| size.parse().ok()) else {
                return Err(self.failed(&url, &"the answer does not say the file's size"));
            };
            if etag.is_empty() || !etag.chars().all(plain) {
                return Err(self.failed(&url, &"the answer does not name the file's content (ETag)"));
            }
            return Ok(Announced { etag: etag.to_owned(), bytes });
        }
        Err(self.failed(&url, &"too many redirects"))
    }

    /// Downloads a file to `blobs`, or the part of it that is not there yet.
    fn fetch(&self, url: &str, blobs: &Path, tell: &mut dyn FnMut(u64, u64)) -> Result<PathBuf> {
        let Announced { etag, bytes } = self.announced(url)?;
        let blob = blobs.join(&etag);
        if fs::metadata(&blob).is_ok_and(|found| found.len() == bytes) {
            return Ok(blob);
        }
        let partial = blobs.join(format!("{etag}.incomplete"));
        let io = |e: std::io::Error| Error::io("write", &partial, &e);
        let mut file = OpenOptions::new().create(true).append(true).open(&partial).map_err(io)?;
        file.try_lock().map_err(|e| {
            Error::new(ErrorKind::Io, format!("cannot lock {}: {e}", partial.display()))
                .hint("another process may be downloading the same file")
        })?;
        let mut done = file.seek(SeekFrom::End(0)).map_err(io)?;
        if done > bytes {
            file.set_len(0).map_err(io)?;
            done = 0;
        }
        if done < bytes {
            let response = self.get(url, done)?;
            if response.status().as_u16() != 206 {
                // The whole file comes, whatever was asked for.
                file.set_len(0).map_err(io)?;
                done = 0;
            }
            tell(done, bytes);
            let mut body = response.into_body().into_reader();
            let mut buffer = vec![0; 1 << 18];
            loop {
                let count = body.read(&mut buffer).map_err(|e| self.failed(url, &e))?;
                if count == 0 {
                    break;
                }
                file.write_all(&buffer[..count]).map_err(io)?;
                done += count as u64;
                tell(done, bytes);
            }
        }
        if done != bytes {
            return Err(self.failed(url, &format!("{done} of {bytes} bytes came")));
        }
        file.sync_all().map_err(io)?;
        fs::rename(&partial, &blob).map_err(|e| Error::io("rename", &partial, &e))?;
        Ok(blob)
    }

    /// An answer that is none, as an error.
    fn check(&self, url: &str, response: Response<Body>) -> Result<Response<Body>> {
        let status = response.status();
        if status.is_success() || status.is_redirection() {
            return Ok(response);
        }
        let error =
            Error::new(ErrorKind::Io, format!("cannot download {}: {url} answers {status}", self.name));
        Err(error.hint(match status.as_u16() {
            401 | 403 if self.hub.token.is_none() => {
                "the model may not exist or not be public; for one that is not, set HF_TOKEN"
            }
            401 | 403 => "the token in HF_TOKEN does not give access to it",
            404 => "check the name and the revision",
            _ => "try again later; what has arrived is kept",
        }))
    }

    fn failed(&self, url: &str, why: &dyn std::fmt::Display) -> Error {
        Error::new(ErrorKind::Io, format!("cannot download {} from {url}: {why}", self.name))
            .hint("try again: what has arrived is kept, and the next attempt goes on from there")
    }
}

/// Makes the file `place` of a snapshot: a link to its content, as the cache has it.
#[cfg(unix)]
fn link(blob: &Path, place: &Path) -> Result<()> {
    let target = Path::new("../../blobs").join(blob.file_name().unwrap_or_default());
    // A link whose content was removed is in the way.
    if place.is_symlink() {
        fs::remove_file(place).map_err(|e| Error::io("remove", place, &e))?;
    }
    std::os::unix::fs::symlink(target, place).map_err(|e| Error::io("link", place, &e))
}

/// Links need rights elsewhere: the content moves to its place, as other programs do it there.
#[cfg(not(unix))]
fn link(blob: &Path, place: &Path) -> Result<()> {
    fs::rename(blob, place).map_err(|e| Error::io("rename", blob, &e))
}
