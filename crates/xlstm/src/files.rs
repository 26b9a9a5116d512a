//! Files and folders that are either old and whole or new and whole, whenever the process dies.
//!
//! A file is written beside its target, synced and renamed over it. A folder cannot be renamed
//! over a folder that holds something, so replacing one takes five steps:
//! ```text
//! 0  target                          the new content is written to target.partial and synced
//! 1  target  target.new              target.partial is renamed: .new is whole by construction
//! 2          target.new  target.old  target is renamed
//! 3  target              target.old  target.new is renamed
//! 4  target                          target.old is removed
//! ```
//! After a kill anywhere, [`recover_folder`] goes on from what it finds. One process at a time
//! writes a target; readers need no care, as they see one whole version or none.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// Writes the file `path` through `write`: afterwards it holds all that was written, or, after an
/// error or a kill, what it held before. The data is on the disk when this returns.
///
/// # Errors
/// An input/output error of `write` or of the operating system; no temporary file is left.
pub fn write_atomically(
    path: &Path,
    write: impl FnOnce(&mut BufWriter<File>) -> io::Result<()>,
) -> Result<()> {
    let temporary = with_suffix(path, ".partial");
    let written = write_and_sync(&temporary, write)
        .and_then(|()| fs::rename(&temporary, path))
        .and_then(|()| sync_folder(parent_of(path)));
    written.map_err(|error| {
        // The first error is the one to report; the file may not even exist.
        let _ = fs::remove_file(&temporary);
        Error::io("write", path, &error)
    })
}

fn write_and_sync(path: &Path, write: impl FnOnce(&mut BufWriter<File>) -> io::Result<()>) -> io::Result<()> {
    let mut writer = BufWriter::new(File::create(path)?);
    write(&mut writer)?;
    writer.flush()?;
    writer.get_ref().sync_all()
}

/// Creates the next of the folders `parent/1`, `parent/2`, … and returns its path. A number is
/// never used twice while its folder or a later one exists, and two processes never get the same.
///
/// # Errors
/// An input/output error if `parent` cannot be created, listed or written.
pub fn next_numbered_folder(parent: &Path) -> Result<PathBuf> {
    fs::create_dir_all(parent).map_err(|e| Error::io("create", parent, &e))?;
    let mut number = 0_u64;
    for entry in fs::read_dir(parent).map_err(|e| Error::io("list", parent, &e))? {
        let entry = entry.map_err(|e| Error::io("list", parent, &e))?;
        let taken = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok());
        number = number.max(taken.unwrap_or(0).into());
    }
    loop {
        number += 1;
        let folder = parent.join(number.to_string());
        match fs::create_dir(&folder) {
            Ok(()) => return Ok(folder),
            // Another process was faster: the number after it is ours to try.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(Error::io("create", &folder, &error)),
        }
    }
}

/// An empty folder beside `target` to write its next version into, for [`replace_folder`].
/// What a killed process left there is removed.
///
/// # Errors
/// An input/output error if the folder cannot be removed or created.
pub fn partial_folder(target: &Path) -> Result<PathBuf> {
    let partial = with_suffix(target, ".partial");
    remove_folder(&partial)?;
    fs::create_dir_all(&partial).map_err(|e| Error::io("create", &partial, &e))?;
    Ok(partial)
}

/// Puts the folder `temporary`, which lies beside `target` and is fully written, in the place of
/// `target`, which may not exist yet. Its files are synced first.
///
/// # Errors
/// An input/output error; [`recover_folder`] then finds a whole `target`.
pub fn replace_folder(temporary: &Path, target: &Path) -> Result<()> {
    finish_interrupted(target)?;
    replace_steps(temporary, target, usize::MAX)
}

/// Makes `target` whole again after a kill within [`replace_folder`], and removes what the kill
/// left beside it. Returns whether there is a `target` now.
///
/// # Errors
/// An input/output error of a rename or a removal.
pub fn recover_folder(target: &Path) -> Result<bool> {
    remove_folder(&with_suffix(target, ".partial"))?;
    finish_interrupted(target)?;
    Ok(target.exists())
}

/// The first `steps` steps of a replacement; fewer than all of them only in tests.
fn replace_steps(temporary: &Path, target: &Path, steps: usize) -> Result<()> {
    if steps >= 1 {
        sync_tree(temporary).map_err(|e| Error::io("sync", temporary, &e))?;
        rename(temporary, &with_suffix(target, ".new"))?;
    }
    install_new(target, steps.saturating_sub(1))
}

/// Steps 2 to 4: a whole `target.new` becomes `target`.
fn install_new(target: &Path, steps: usize) -> Result<()> {
    let (new, old) = (with_suffix(target, ".new"), with_suffix(target, ".old"));
    if steps >= 1 && target.exists() {
        // A leftover of an earlier replacement; there is a whole target beside it.
        remove_folder(&old)?;
        rename(target, &old)?;
    }
    if steps >= 2 {
        rename(&new, target)?;
    }
    if steps >= 3 {
        remove_folder(&old)?;
    }
    Ok(())
}

/// Brings a replacement that was interrupted after its first step to its end.
fn finish_interrupted(target: &Path) -> Result<()> {
    let (new, old) = (with_suffix(target, ".new"), with_suffix(target, ".old"));
    if new.exists() {
        return install_new(target, usize::MAX);
    }
    if target.exists() {
        return remove_folder(&old);
    }
    if old.exists() {
        return rename(&old, target);
    }
    Ok(())
}

/// A rename that is on the disk when it returns.
fn rename(from: &Path, to: &Path) -> Result<()> {
    fs::rename(from, to).and_then(|()| sync_folder(parent_of(to))).map_err(|e| Error::io("rename", from, &e))
}

fn remove_folder(folder: &Path) -> Result<()> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(Error::io("remove", folder, &error)),
        _ => Ok(()),
    }
}

/// Syncs every file and folder below `folder`, and itself.
fn sync_tree(folder: &Path) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        match entry.file_type()? {
            kind if kind.is_dir() => sync_tree(&entry.path())?,
            kind if kind.is_file() => File::open(entry.path())?.sync_all()?,
            _ => {}
        }
    }
    sync_folder(folder)
}

/// Puts the names in a folder on the disk.
#[cfg(unix)]
fn sync_folder(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}

/// Elsewhere a folder cannot be opened as a file; the system orders renames itself.
#[cfg(not(unix))]
fn sync_folder(_folder: &Path) -> io::Result<()> {
    Ok(())
}

fn parent_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// `path` with `suffix` after its whole name: `last` becomes `last.new`.
fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = OsString::from(path.as_os_str());
    name.push(suffix);
    name.into()
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering};

    /// A folder of its own for one test, removed with it.
    pub(crate) struct Scratch(pub PathBuf);

    impl Scratch {
        pub(crate) fn new() -> Self {
            static COUNT: AtomicU32 = AtomicU32::new(0);
            let count = COUNT.fetch_add(1, Ordering::Relaxed);
            let folder = std::env::temp_dir().join(format!("xlstm-test-{}-{count}", std::process::id()));
            fs::create_dir_all(&folder).unwrap();
            Scratch(folder)
        }

        fn names(&self) -> Vec<String> {
            let mut names: Vec<String> = fs::read_dir(&self.0)
                .unwrap()
                .map(|e| e.unwrap().file_name().into_string().unwrap())
                .collect();
            names.sort();
            names
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn a_file_is_replaced_or_left_alone() {
        let scratch = Scratch::new();
        let path = scratch.0.join("a.txt");
        write_atomically(&path, |w| w.write_all(b"one")).unwrap();
        write_atomically(&path, |w| w.write_all(b"two")).unwrap();
        let error = write_atomically(&path, |w| {
            w.write_all(b"thr")?;
            Err(io::Error::other("the disk is tired"))
        })
        .unwrap_err();
        assert!(error.to_string().contains("a.txt: the disk is tired"), "{error}");
        assert_eq!(fs::read(&path).unwrap(), b"two");
        assert_eq!(scratch.names(), ["a.txt"]);
    }

    #[test]
    fn a_file_in_a_missing_folder_is_an_error() {
        let scratch = Scratch::new();
        assert!(write_atomically(&scratch.0.join("no/a.txt"), |_| Ok(())).is_err());
        assert!(scratch.names().is_empty());
    }

    #[test]
    fn numbers_go_up_and_are_not_reused() {
        let scratch = Scratch::new();
        let runs = scratch.0.join("runs");
        let name = || next_numbered_folder(&runs).unwrap().file_name().unwrap().to_owned();
        assert_eq!((name(), name()), ("1".into(), "2".into()));
        fs::remove_dir(runs.join("1")).unwrap();
        fs::create_dir(runs.join("notes")).unwrap();
        fs::create_dir(runs.join("9")).unwrap();
        assert_eq!(name(), "10");
    }

    #[test]
    fn processes_in_a_race_get_different_numbers() {
        let scratch = Scratch::new();
        let runs = &scratch.0;
        let mut folders: Vec<PathBuf> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..8)
                .map(|_| {
                    scope.spawn(|| (0..5).map(|_| next_numbered_folder(runs).unwrap()).collect::<Vec<_>>())
                })
                .collect();
            threads.into_iter().flat_map(|t| t.join().unwrap()).collect()
        });
        folders.sort();
        folders.dedup();
        assert_eq!(folders.len(), 40);
    }

    fn write_version(folder: &Path, version: &str) {
        fs::create_dir_all(folder.join("inner")).unwrap();
        fs::write(folder.join("model"), version).unwrap();
        fs::write(folder.join("inner/state"), version).unwrap();
    }

    fn version(folder: &Path) -> String {
        let (a, b) =
            (fs::read_to_string(folder.join("model")), fs::read_to_string(folder.join("inner/state")));
        let (a, b) = (a.unwrap(), b.unwrap());
        assert_eq!(a, b);
        a
    }

    /// A kill after each step of the second, third, … replacement leaves one whole version.
    #[test]
    fn every_interruption_recovers() {
        for (steps, expected) in [(0, "1"), (1, "2"), (2, "2"), (3, "2"), (4, "2")] {
            for recover in [true, false] {
                let scratch = Scratch::new();
                let target = scratch.0.join("last");
                let partial = partial_folder(&target).unwrap();
                write_version(&partial, "1");
                replace_folder(&partial, &target).unwrap();
                assert_eq!(version(&target), "1");

                let partial = partial_folder(&target).unwrap();
                write_version(&partial, "2");
                replace_steps(&partial, &target, steps).unwrap();
                if recover {
                    assert!(recover_folder(&target).unwrap());
                    assert_eq!(version(&target), expected, "after {steps} steps");
                    assert_eq!(scratch.names(), ["last"], "after {steps} steps");
                }
                // A replacement right after the kill works as well as one after a recovery.
                let partial = partial_folder(&target).unwrap();
                write_version(&partial, "3");
                replace_folder(&partial, &target).unwrap();
                assert_eq!(version(&target), "3");
                assert_eq!(scratch.names(), ["last"], "after {steps} steps");
            }
        }
    }

    /// The first replacement has no old version to fall back to.
    #[test]
    fn interruptions_of_the_first_version() {
        for (steps, expected) in [(0, false), (1, true), (2, true), (3, true), (4, true)] {
            let scratch = Scratch::new();
            let target = scratch.0.join("last");
            let partial = partial_folder(&target).unwrap();
            write_version(&partial, "1");
            replace_steps(&partial, &target, steps).unwrap();
            assert_eq!(recover_folder(&target).unwrap(), expected, "after {steps} steps");
            assert_eq!(scratch.names().len(), usize::from(expected));
        }
    }

    /// States that only two kills in a row can leave, and a removal that was cut short.
    #[test]
    fn leftovers_of_several_kills_recover() {
        for (present, expected) in [
            (&["last", "last.new", "last.old"][..], "new"),
            (&["last", "last.old"], "last"),
            (&["last.old"], "old"),
            (&["last.old", "last.partial"], "old"),
            (&["last.new", "last.old", "last.partial"], "new"),
        ] {
            let scratch = Scratch::new();
            for name in present {
                write_version(&scratch.0.join(name), name.rsplit('.').next().unwrap());
            }
            if present.len() == 2 && present[0] == "last" {
                fs::remove_file(scratch.0.join("last.old/model")).unwrap();
            }
            let target = scratch.0.join("last");
            assert!(recover_folder(&target).unwrap());
            assert_eq!(version(&target), expected, "{present:?}");
            assert_eq!(scratch.names(), ["last"], "{present:?}");
        }
    }

    #[test]
    fn nothing_recovers_to_nothing() {
        let scratch = Scratch::new();
        assert!(!recover_folder(&scratch.0.join("last")).unwrap());
        assert!(scratch.names().is_empty());
    }
}
