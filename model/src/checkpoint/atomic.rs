//! Files and folders that are there whole or not at all.

use std::{
    ffi::OsString,
    fs::{self, File},
    io::Write,
    path::{Path, PathBuf},
};

use super::CheckpointError;

/// Writes a file under a temporary name, synced, then renamed over `path`.
///
/// # Errors
/// What the file system answers; the temporary file is removed.
pub fn write_file(path: &Path, contents: &[u8]) -> Result<(), CheckpointError> {
    let staging = temporary(path);
    let written = File::create(&staging).and_then(|mut file| {
        file.write_all(contents)?;
        file.sync_all()
    });
    let renamed = written.and_then(|()| fs::rename(&staging, path));
    renamed.map_err(|source| {
        // Best effort: the error to report is the one above.
        let _ = fs::remove_file(&staging);
        CheckpointError::Io {
            path: path.to_owned(),
            source,
        }
    })?;
    sync(parent(path))
}

/// Fills a folder under a temporary name, synced, then renamed to `path`, replacing what is there.
///
/// # Errors
/// What `fill` or the file system answers; the temporary folder is removed.
pub fn write_directory<E: From<CheckpointError>>(
    path: &Path,
    fill: impl FnOnce(&Path) -> Result<(), E>,
) -> Result<(), E> {
    let staging = temporary(path);
    fs::create_dir_all(parent(path)).map_err(CheckpointError::io(parent(path)))?;
    remove_leftover(&staging)?;
    fs::create_dir(&staging).map_err(CheckpointError::io(&staging))?;
    let written = fill(&staging).and_then(|()| Ok(commit(&staging, path)?));
    if written.is_err() {
        // Best effort: the error to report is the one above.
        let _ = fs::remove_dir_all(&staging);
    }
    written
}

/// Removes a folder, if it is there, that an interruption may have left under a temporary name.
///
/// # Errors
/// What the file system answers.
pub fn remove_leftover(folder: &Path) -> Result<(), CheckpointError> {
    match folder.exists() {
        true => fs::remove_dir_all(folder).map_err(CheckpointError::io(folder)),
        false => Ok(()),
    }
}

fn commit(staging: &Path, path: &Path) -> Result<(), CheckpointError> {
    sync_tree(staging)?;
    if path.exists() {
        // A folder cannot be renamed over another that is not empty: the old one steps aside first.
        let mut aside = temporary(path).into_os_string();
        aside.push("-old");
        let aside = PathBuf::from(aside);
        remove_leftover(&aside)?;
        fs::rename(path, &aside).map_err(CheckpointError::io(path))?;
        fs::rename(staging, path).map_err(CheckpointError::io(path))?;
        fs::remove_dir_all(&aside).map_err(CheckpointError::io(&aside))?;
    } else {
        fs::rename(staging, path).map_err(CheckpointError::io(path))?;
    }
    sync(parent(path))
}

fn sync_tree(folder: &Path) -> Result<(), CheckpointError> {
    for entry in fs::read_dir(folder).map_err(CheckpointError::io(folder))? {
        let path = entry.map_err(CheckpointError::io(folder))?.path();
        if path.is_dir() {
            sync_tree(&path)?
        } else {
            sync(&path)?
        }
    }
    sync(folder)
}

fn sync(path: &Path) -> Result<(), CheckpointError> {
    File::open(path)
        .and_then(|file| file.sync_all())
        .map_err(CheckpointError::io(path))
}

fn parent(path: &Path) -> &Path {
    path.parent()
        .filter(|parent| !parent.as_os_str().is_empty())
        .unwrap_or(Path::new("."))
}

/// `.name.tmp` beside `path`.
fn temporary(path: &Path) -> PathBuf {
    let mut name = OsString::from(".");
    name.push(path.file_name().unwrap_or_default());
    name.push(".tmp");
    path.with_file_name(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_fill_leaves_the_old_folder_and_no_other() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("set");
        let write = |text: &'static str, fail: bool| {
            write_directory(&path, |staging| {
                write_file(&staging.join("a"), text.as_bytes())?;
                let refused = CheckpointError::format(staging, "refused");
                if fail { Err(refused) } else { Ok(()) }
            })
        };
        write("one", false).unwrap();
        write("two", true).unwrap_err();
        assert_eq!(fs::read_to_string(path.join("a")).unwrap(), "one");
        write("three", false).unwrap();
        assert_eq!(fs::read_to_string(path.join("a")).unwrap(), "three");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
