//! All files of a source: a file, a folder, a glob, or the Cargo registry.

use std::{
    collections::BTreeSet,
    env, fs, io,
    path::{Path, PathBuf},
};

use super::{
    config::{Origin, Source},
    corpus::Problem,
    error::DataError,
    select::Selection,
};

/// Larger files among packages' sources are nearly always generated tables and bindings.
const LARGEST_REGISTRY_FILE: u64 = 1 << 20;

/// All files of a source as (path below the source's root, path).
pub(crate) fn list(
    source: &Source,
    selection: &mut Selection,
) -> Result<BTreeSet<(String, PathBuf)>, DataError> {
    let mut files = BTreeSet::new();
    match &source.origin {
        Origin::CargoRegistry => {
            let home = cargo_home().unwrap_or_default();
            registry(&home.join("registry/src"), selection, &mut files);
        }
        Origin::Path(path) if Path::new(path).is_dir() => {
            let root = Path::new(path);
            walk(root, root, selection, &mut files);
        }
        Origin::Path(path) if Path::new(path).exists() => {
            let name = Path::new(path).file_name().unwrap_or_default();
            files.insert((name.to_string_lossy().into_owned(), path.into()));
        }
        Origin::Path(pattern) => matching(pattern, selection, &mut files)?,
    }
    if files.is_empty() {
        let source_name = source.origin.to_string();
        return Err(DataError::NoMatch { source_name });
    }
    Ok(files)
}

/// `$CARGO_HOME`, by default `~/.cargo`.
fn cargo_home() -> Option<PathBuf> {
    env::var_os("CARGO_HOME")
        .map(PathBuf::from)
        .or_else(|| Some(env::home_dir()?.join(".cargo")))
}

/// The Rust files of every package below every registry, named from the package on.
fn registry(root: &Path, selection: &mut Selection, files: &mut BTreeSet<(String, PathBuf)>) {
    let Ok(registries) = fs::read_dir(root) else {
        return;
    };
    for registry in registries.flatten() {
        let mut found = BTreeSet::new();
        walk(&registry.path(), &registry.path(), selection, &mut found);
        for (relative, path) in found {
            if path.extension().is_none_or(|extension| extension != "rs") {
                continue;
            }
            // A file that vanished since is reported when its contents are read.
            if fs::metadata(&path).is_ok_and(|data| data.len() > LARGEST_REGISTRY_FILE) {
                selection.oversized += 1;
                continue;
            }
            files.insert((relative, path));
        }
    }
}

/// Every file below a folder, except in hidden folders (`.git`) and hidden ones. Links to folders are not followed.
fn walk(
    root: &Path,
    folder: &Path,
    selection: &mut Selection,
    files: &mut BTreeSet<(String, PathBuf)>,
) {
    let mut visit = |entry: io::Result<fs::DirEntry>| -> io::Result<()> {
        let entry = entry?;
        if entry.file_name().as_encoded_bytes().starts_with(b".") {
            return Ok(());
        }
        let (kind, path) = (entry.file_type()?, entry.path());
        if kind.is_dir() {
            walk(root, &path, selection, files);
        } else if kind.is_file() || path.is_file() {
            files.insert((below(root, &path), path));
        }
        Ok(())
    };
    let outcome = fs::read_dir(folder).and_then(|mut entries| entries.try_for_each(&mut visit));
    if let Err(error) = outcome {
        let what = format!("folder cannot be read: {error}");
        selection.problems.push(Problem {
            file: folder.into(),
            line: None,
            what,
        });
    }
}

/// The files a glob matches, named from its first part with a wildcard on.
fn matching(
    pattern: &str,
    selection: &mut Selection,
    files: &mut BTreeSet<(String, PathBuf)>,
) -> Result<(), DataError> {
    let paths = glob::glob(pattern).map_err(|error| DataError::Config {
        key: "sources.path".to_owned(),
        value: format!("{pattern:?} (character {}: {})", error.pos, error.msg),
        rule: "a valid glob",
    })?;
    let fixed = |part: &std::path::Component<'_>| {
        !part
            .as_os_str()
            .as_encoded_bytes()
            .iter()
            .any(|byte| b"*?[".contains(byte))
    };
    let root: PathBuf = Path::new(pattern).components().take_while(fixed).collect();
    for path in paths {
        match path {
            Ok(path) if path.is_file() => drop(files.insert((below(&root, &path), path))),
            Ok(_) => {}
            Err(error) => {
                let what = format!("cannot be read: {}", error.error());
                let file = error.path().to_owned();
                selection.problems.push(Problem {
                    file,
                    line: None,
                    what,
                });
            }
        }
    }
    Ok(())
}

fn below(root: &Path, path: &Path) -> String {
    let relative = path.strip_prefix(root).unwrap_or(path);
    let parts: Vec<_> = relative.iter().map(|part| part.to_string_lossy()).collect();
    parts.join("/")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::select::tests::tree;

    #[test]
    fn the_registry_gives_rust_files_of_moderate_size() {
        let dir = tree(&[
            "index/p-1.0/src/lib.rs",
            "index/p-1.0/README.md",
            "index/p-1.0/big.rs",
        ]);
        let big = vec![b'x'; LARGEST_REGISTRY_FILE as usize + 1];
        fs::write(dir.path().join("index/p-1.0/big.rs"), big).unwrap();
        let (mut selection, mut files) = (Selection::default(), BTreeSet::new());
        registry(dir.path(), &mut selection, &mut files);
        let names: Vec<_> = files.into_iter().map(|(relative, _)| relative).collect();
        assert_eq!(names, ["p-1.0/src/lib.rs"]);
        assert_eq!(selection.oversized, 1);
    }
}
