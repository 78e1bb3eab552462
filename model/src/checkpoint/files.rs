//! The files of a checkpoint and the tensors in them, before anything is known of the model.

use std::{
    collections::BTreeMap,
    io::ErrorKind,
    path::{Path, PathBuf},
};

use safetensors::{SafeTensors, tensor::TensorView};
use serde::Deserialize;

use super::CheckpointError;
use crate::mmap::MappedFile;

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// From the names of tensors to the files that an index says they are in.
pub(super) type WeightMap = BTreeMap<String, String>;

/// The mapped files of a checkpoint.
pub(super) struct WeightFiles {
    files: Vec<(PathBuf, MappedFile)>,
    /// `None` for a checkpoint in one file.
    weight_map: Option<WeightMap>,
}

/// The tensors of a checkpoint by name.
pub(super) struct StoredTensors<'a> {
    pub(super) by_name: BTreeMap<String, TensorView<'a>>,
    /// Where the index contradicts the files, a line per tensor.
    pub(super) problems: Vec<String>,
}

impl WeightFiles {
    pub(super) fn open(dir: &Path) -> Result<Self, CheckpointError> {
        #[derive(Deserialize)]
        struct Index {
            weight_map: WeightMap,
        }
        let (single, index) = (dir.join(SINGLE), dir.join(INDEX));
        if single.exists() {
            let file = MappedFile::open(&single).map_err(CheckpointError::io(&single))?;
            return Ok(Self {
                files: vec![(single, file)],
                weight_map: None,
            });
        }
        if !index.exists() {
            let what = format!("neither {SINGLE} nor {INDEX} is there");
            return Err(CheckpointError::format(dir, what));
        }
        let text = std::fs::read_to_string(&index).map_err(CheckpointError::io(&index))?;
        let parsed: Index = serde_json::from_str(&text)
            .map_err(|error| CheckpointError::format(&index, error.to_string()))?;
        let mut names: Vec<&String> = parsed.weight_map.values().collect();
        names.sort();
        names.dedup();
        let files = names
            .into_iter()
            .map(|name| open_shard(&index, name))
            .collect::<Result<_, _>>()?;
        Ok(Self {
            files,
            weight_map: Some(parsed.weight_map),
        })
    }

    /// Gives the memory of a tensor's elements back.
    pub(super) fn release(&self, data: &[u8]) {
        for (_, file) in &self.files {
            file.release(data);
        }
    }

    pub(super) fn tensors(&self) -> Result<StoredTensors<'_>, CheckpointError> {
        let files = self.files.iter();
        let files: Vec<(&Path, &[u8])> = files
            .map(|(path, file)| (path.as_path(), file.bytes()))
            .collect();
        tensors(&files, self.weight_map.as_ref())
    }
}

fn open_shard(index: &Path, name: &str) -> Result<(PathBuf, MappedFile), CheckpointError> {
    // An index is input: it may only name files beside it.
    if Path::new(name).file_name() != Some(name.as_ref()) {
        let what = format!("{name:?} is not the name of a file beside the index");
        return Err(CheckpointError::format(index, what));
    }
    let path = index.with_file_name(name);
    match MappedFile::open(&path) {
        Ok(file) => Ok((path, file)),
        Err(error) if error.kind() == ErrorKind::NotFound => {
            let what = format!("names the file {name:?}, which is not there");
            Err(CheckpointError::format(index, what))
        }
        Err(error) => Err(CheckpointError::io(&path)(error)),
    }
}

/// The tensors in files of these contents.
pub(super) fn tensors<'a>(
    files: &[(&Path, &'a [u8])],
    weight_map: Option<&WeightMap>,
) -> Result<StoredTensors<'a>, CheckpointError> {
    let mut by_name = BTreeMap::new();
    let mut problems = Vec::new();
    for &(path, bytes) in files {
        let file = path.file_name().unwrap_or_default().to_string_lossy();
        let parsed = SafeTensors::deserialize(bytes)
            .map_err(|error| CheckpointError::format(path, error.to_string()))?;
        for (name, view) in parsed.tensors() {
            if weight_map.is_some_and(|map| !map.contains_key(&name)) {
                problems.push(format!("{name}: in {file}, but not in {INDEX}"));
            }
            if by_name.contains_key(&name) {
                let what = format!("{name} is in two files");
                return Err(CheckpointError::format(path, what));
            }
            by_name.insert(name, (view, file.clone().into_owned()));
        }
    }
    for (name, file) in weight_map.into_iter().flatten() {
        if by_name.get(name).is_none_or(|(_, found)| found != file) {
            problems.push(format!("{name}: not in {file}, where {INDEX} says it is"));
        }
    }
    let by_name = by_name.into_iter();
    Ok(StoredTensors {
        by_name: by_name.map(|(name, (view, _))| (name, view)).collect(),
        problems,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shards() -> tempfile::TempDir {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let from = root.join("../tests/fixtures/tiny-dense-moe-sharded");
        let dir = tempfile::tempdir().unwrap();
        for number in 1..=3 {
            let name = format!("model-{number:05}-of-000003.safetensors");
            std::fs::copy(from.join(&name), dir.path().join(&name)).unwrap();
        }
        std::fs::copy(from.join(INDEX), dir.path().join(INDEX)).unwrap();
        dir
    }

    /// Loads after a change to the entries of the index.
    fn problems(dir: &Path, change: impl FnOnce(&mut WeightMap)) -> Result<Vec<String>, String> {
        let text = std::fs::read_to_string(dir.join(INDEX)).unwrap();
        let mut index: serde_json::Value = serde_json::from_str(&text).unwrap();
        let mut map: WeightMap = serde_json::from_value(index["weight_map"].take()).unwrap();
        change(&mut map);
        index["weight_map"] = serde_json::to_value(map).unwrap();
        std::fs::remove_file(dir.join(INDEX)).unwrap();
        std::fs::write(dir.join(INDEX), index.to_string()).unwrap();
        let files = WeightFiles::open(dir).map_err(|error| error.to_string())?;
        let tensors = files.tensors().map_err(|error| error.to_string())?;
        Ok(tensors.problems)
    }

    #[test]
    fn an_index_that_contradicts_its_files_is_a_problem_per_tensor() {
        let dir = shards();
        let dir = dir.path();
        assert_eq!(problems(dir, |_| ()), Ok(vec![]));
        let found = problems(dir, |map| {
            map.remove("model.norm.weight").unwrap();
            map.insert("more".into(), "model-00001-of-000003.safetensors".into());
            let moved = map.get_mut("lm_head.weight").unwrap();
            assert_eq!(moved, "model-00001-of-000003.safetensors");
            *moved = "model-00002-of-000003.safetensors".into();
        })
        .unwrap();
        assert_eq!(found.len(), 3, "{found:?}");
        for (line, start) in found.iter().zip([
            "model.norm.weight: in model-0000",
            "lm_head.weight: not in model-00002-of-000003.safetensors, where model.safetensors.index.json says it is",
            "more: not in model-00001-of-000003.safetensors, where model.safetensors.index.json says it is",
        ]) {
            assert!(line.starts_with(start), "{line}");
        }
    }

    #[test]
    fn shards_are_files_that_are_there_beside_the_index() {
        let dir = shards();
        let message = problems(dir.path(), |map| {
            map.insert("more".into(), "model-00004-of-000003.safetensors".into());
        })
        .unwrap_err();
        let expected = "model.safetensors.index.json: names the file \"model-00004-of-000003.safetensors\", \
                        which is not there";
        assert!(message.ends_with(expected), "{message}");
        for outside in ["../x", "/x", "a/b", "..", ""] {
            let message = problems(dir.path(), |map| {
                map.insert("more".into(), outside.into());
            })
            .unwrap_err();
            assert!(message.contains("not the name of a file"), "{message}");
        }
    }
}
