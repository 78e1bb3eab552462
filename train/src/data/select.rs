//! Which files are read: the same ones on every machine, spread over the whole of each source.

use std::{collections::HashSet, path::PathBuf};

use super::{
    config::{DataConfig, Format},
    corpus::Problem,
    error::DataError,
    hash::{Sha, sha256, sha256_file},
    listing,
};

/// A file that is read.
#[derive(Clone, Debug)]
pub struct SelectedFile {
    /// Where it lies.
    pub path: PathBuf,
    /// Its path below the source's root, with `/` between parts.
    pub relative: String,
    /// The index of its source.
    pub source: usize,
    /// How documents lie in it.
    pub format: Format,
    /// Its length in bytes.
    pub size: u64,
    /// The SHA-256 of its contents.
    pub sha256: [u8; 32],
}

/// The files of all sources, in the order they are read.
#[derive(Debug, Default)]
pub struct Selection {
    /// The files.
    pub files: Vec<SelectedFile>,
    /// Files left out because another one has the same contents.
    pub duplicates: u64,
    /// Files of the registry left out for their size.
    pub oversized: u64,
    /// Files and folders that could not be read.
    pub problems: Vec<Problem>,
}

/// A file before its contents are known.
struct Candidate {
    key: Sha,
    path: PathBuf,
    relative: String,
    source: usize,
}

/// Selects files until the bounds of the configuration are reached.
///
/// All files are ordered by a hash of the seed and of their path below the source's root, then taken from the start:
/// a bound gives a sample of everything rather than the first letters of the alphabet. The bounds count bytes on disk
/// here, and the file that crosses a bound still belongs to the selection; [`corpus`](super::corpus) counts the text.
///
/// # Errors
/// If a source matches no file.
pub fn select(
    config: &DataConfig,
    seed: u64,
    on_read: &mut dyn FnMut(u64),
) -> Result<Selection, DataError> {
    let mut selection = Selection::default();
    let mut candidates = Vec::new();
    for (index, source) in config.sources.iter().enumerate() {
        let found = listing::list(source, &mut selection)?;
        candidates.extend(found.into_iter().map(|(relative, path)| {
            let key = sha256(&[&seed.to_le_bytes(), relative.as_bytes()].concat());
            Candidate {
                key,
                path,
                relative,
                source: index,
            }
        }));
    }
    candidates.sort_by_key(|candidate| (candidate.key, candidate.source));

    let mut seen: HashSet<Sha> = HashSet::new();
    let mut left: Vec<u64> = config
        .sources
        .iter()
        .map(|source| source.max_bytes.unwrap_or(u64::MAX))
        .collect();
    let mut left_in_all = config.max_bytes.unwrap_or(u64::MAX);
    for Candidate {
        path,
        relative,
        source,
        ..
    } in candidates
    {
        if left_in_all == 0 {
            break;
        }
        if left[source] == 0 {
            continue;
        }
        let (sha256, size) = match sha256_file(&path, on_read) {
            Ok(read) => read,
            Err(error) => {
                let what = format!("cannot be read: {error}");
                selection.problems.push(Problem {
                    file: path,
                    line: None,
                    what,
                });
                continue;
            }
        };
        // Every empty file has the same contents; each is a problem of its own.
        if size > 0 && !seen.insert(sha256) {
            selection.duplicates += 1;
            continue;
        }
        left[source] = left[source].saturating_sub(size);
        left_in_all = left_in_all.saturating_sub(size);
        let format = config.sources[source]
            .format
            .unwrap_or_else(|| Format::of(&path));
        selection.files.push(SelectedFile {
            path,
            relative,
            source,
            format,
            size,
            sha256,
        });
    }
    Ok(selection)
}

#[cfg(test)]
pub(crate) mod tests {
    use std::{fs, path::Path};

    use super::*;

    fn config(root: &Path, source: &str, rest: &str) -> DataConfig {
        let source = source.replace("ROOT", &root.display().to_string());
        let text = format!("sources = [{source}]\ntokenizer = {{ vocab_size = 300 }}\n{rest}");
        toml::from_str(&text).unwrap()
    }

    fn names(config: &DataConfig, seed: u64) -> Vec<String> {
        let selection = select(config, seed, &mut |_| ()).unwrap();
        selection
            .files
            .into_iter()
            .map(|file| file.relative)
            .collect()
    }

    pub(crate) fn tree(names: &[&str]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for name in names {
            let path = dir.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, name.repeat(10)).unwrap();
        }
        dir
    }

    #[test]
    fn globs_folders_and_files_name_paths_from_their_root() {
        let dir = tree(&["x/a.rs", "x/y/b.rs", "x/c.txt", ".git/d.rs"]);
        for (source, expected) in [
            (
                "{ path = \"ROOT/**/*.rs\" }",
                vec![".git/d.rs", "x/a.rs", "x/y/b.rs"],
            ),
            ("{ path = \"ROOT\" }", vec!["x/a.rs", "x/c.txt", "x/y/b.rs"]),
            ("{ path = \"ROOT/x/c.txt\" }", vec!["c.txt"]),
        ] {
            let mut found = names(&config(dir.path(), source, ""), 0);
            found.sort();
            assert_eq!(found, expected, "{source}");
        }
    }

    #[test]
    fn a_source_without_files_is_an_error() {
        let dir = tree(&["x/a.rs"]);
        fs::create_dir(dir.path().join("empty")).unwrap();
        for source in ["{ path = \"ROOT/**/*.py\" }", "{ path = \"ROOT/empty\" }"] {
            let error = select(&config(dir.path(), source, ""), 0, &mut |_| ()).unwrap_err();
            assert!(matches!(&error, DataError::NoMatch { .. }), "{error}");
            assert!(error.to_string().contains("matches no file"), "{error}");
        }
        let error = select(
            &config(dir.path(), "{ path = \"ROOT/***\" }", ""),
            0,
            &mut |_| (),
        );
        assert!(matches!(error, Err(DataError::Config { .. })));
    }

    #[test]
    fn a_bound_takes_a_stable_sample_that_depends_on_the_seed_not_on_the_place() {
        let all: Vec<String> = (0..100).map(|i| format!("d{}/f{i:03}", i / 10)).collect();
        let all: Vec<&str> = all.iter().map(String::as_str).collect();
        let (here, there) = (tree(&all), tree(&all));
        // Each file has 70 bytes: ten do not reach 701, the eleventh crosses it.
        let source = "{ path = \"ROOT\", max_bytes = 701 }";
        let taken = names(&config(here.path(), source, ""), 1);
        assert_eq!(taken.len(), 11);
        assert_eq!(taken, names(&config(there.path(), source, ""), 1));
        assert_ne!(taken, names(&config(here.path(), source, ""), 2));
        let folders: HashSet<&str> = taken.iter().map(|name| &name[..2]).collect();
        assert!(folders.len() > 4, "{taken:?}");
        let whole = "{ path = \"ROOT\" }";
        assert_eq!(
            names(&config(here.path(), whole, "max_bytes = 701"), 1),
            taken
        );
    }

    #[test]
    fn two_files_with_the_same_contents_are_read_once() {
        let dir = tree(&["a", "b"]);
        fs::write(dir.path().join("b"), "a".repeat(10)).unwrap();
        let selection = select(
            &config(dir.path(), "{ path = \"ROOT\" }", ""),
            0,
            &mut |_| (),
        )
        .unwrap();
        assert_eq!((selection.files.len(), selection.duplicates), (1, 1));
    }
}
