//! Files of reference tensors. Nothing about them is taken for granted.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
};

use anyhow::{Context, anyhow, bail, ensure};
use burn::tensor::{Device, Int, Tensor, TensorData};
use deepburn_model::mmap::MappedFile;
use safetensors::{Dtype, SafeTensors};

/// A file of reference tensors.
pub(super) struct ReferenceFile {
    path: PathBuf,
    name: String,
    tensors: BTreeMap<String, Stored>,
}

struct Stored {
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

impl ReferenceFile {
    /// Reads the file `name` in `dir`.
    ///
    /// # Errors
    /// A file that cannot be read or is no whole safetensors file.
    pub(super) fn read(dir: &Path, name: &str) -> anyhow::Result<Self> {
        let path = dir.join(name);
        let what = || path.display().to_string();
        let file = MappedFile::open(&path).with_context(what)?;
        let parsed = SafeTensors::deserialize(file.bytes()).with_context(what)?;
        let tensors = parsed.iter().map(|(name, view)| {
            let stored = Stored {
                dtype: view.dtype(),
                shape: view.shape().to_vec(),
                bytes: view.data().to_vec(),
            };
            (name.to_owned(), stored)
        });
        let tensors = tensors.collect();
        Ok(Self {
            path,
            name: name.to_owned(),
            tensors,
        })
    }

    /// The file's name.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// The names of its tensors.
    pub(super) fn names(&self) -> BTreeSet<&str> {
        self.tensors.keys().map(String::as_str).collect()
    }

    /// Whether it has a tensor of this name.
    pub(super) fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// The sizes of a tensor that must be there.
    pub(super) fn shape(&self, name: &str) -> anyhow::Result<&[usize]> {
        Ok(&self.stored(name)?.shape)
    }

    /// The elements of a float tensor of this shape.
    pub(super) fn floats(&self, name: &str, shape: &[usize]) -> anyhow::Result<Vec<f32>> {
        let bytes = self.bytes(name, Dtype::F32, shape)?;
        let (words, _) = bytes.as_chunks::<4>();
        Ok(words.iter().map(|word| f32::from_le_bytes(*word)).collect())
    }

    /// The elements of an integer tensor of this shape.
    pub(super) fn ints(&self, name: &str, shape: &[usize]) -> anyhow::Result<Vec<i64>> {
        let bytes = self.bytes(name, Dtype::I64, shape)?;
        let (words, _) = bytes.as_chunks::<8>();
        Ok(words.iter().map(|word| i64::from_le_bytes(*word)).collect())
    }

    /// The bytes of a tensor of this type and shape, one per element.
    pub(super) fn codes(
        &self,
        name: &str,
        dtype: Dtype,
        shape: &[usize],
    ) -> anyhow::Result<Vec<u8>> {
        Ok(self.bytes(name, dtype, shape)?.to_vec())
    }

    /// The error that a tensor is not what it should be.
    pub(super) fn malformed(&self, name: &str, expected: &str) -> anyhow::Error {
        let (path, found) = (self.path.display(), self.tensors.get(name));
        let found = found.map(|stored| format!("{} {:?}", stored.dtype, stored.shape));
        anyhow!(
            "{path}: {name}: expected {expected}, found {}",
            found.as_deref().unwrap_or("none")
        )
    }

    /// Sequences of at least `least` tokens below `vocabulary`, `[B, T]`.
    pub(super) fn tokens(
        &self,
        name: &str,
        vocabulary: usize,
        least: usize,
        device: &Device,
    ) -> anyhow::Result<Tensor<2, Int>> {
        let place = || format!("{}: {name}", self.path.display());
        let shape = self.shape(name)?.to_vec();
        let [batch, length] = shape[..] else {
            bail!(
                "{}: expected I64 [batch, sequence], found {shape:?}",
                place()
            );
        };
        ensure!(
            batch > 0 && length >= least,
            "{}: expected sequences of at least {least} tokens, found {shape:?}",
            place()
        );
        let ids = self.ints(name, &shape)?;
        if let Some(id) = ids.iter().find(|&&id| id < 0 || id as usize >= vocabulary) {
            bail!(
                "{}: token {id} is not below vocab_size = {vocabulary}",
                place()
            );
        }
        Ok(Tensor::from_data(TensorData::new(ids, shape), device))
    }

    fn stored(&self, name: &str) -> anyhow::Result<&Stored> {
        let path = self.path.display();
        self.tensors
            .get(name)
            .with_context(|| format!("{path}: {name}: missing"))
    }

    fn bytes(&self, name: &str, dtype: Dtype, shape: &[usize]) -> anyhow::Result<&[u8]> {
        let stored = self.stored(name)?;
        ensure!(
            stored.dtype == dtype && stored.shape == shape,
            "{}: {name}: expected {dtype} {shape:?}, found {} {:?}",
            self.path.display(),
            stored.dtype,
            stored.shape
        );
        Ok(&stored.bytes)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use safetensors::tensor::{TensorView, serialize};

    use super::*;

    #[test]
    fn what_does_not_fit_is_an_error_with_file_and_tensor() {
        let dir = tempfile::tempdir().unwrap();
        let bytes: Vec<u8> = [3i64, 9].iter().flat_map(|id| id.to_le_bytes()).collect();
        let view = TensorView::new(Dtype::I64, vec![1, 2], &bytes).unwrap();
        let written = serialize([("ids", view)], None).unwrap();
        fs::write(dir.path().join("a.safetensors"), &written).unwrap();
        let device = Device::flex();
        let file = ReferenceFile::read(dir.path(), "a.safetensors").unwrap();
        assert_eq!(file.ints("ids", &[1, 2]).unwrap(), [3, 9]);
        assert_eq!(file.tokens("ids", 10, 2, &device).unwrap().dims(), [1, 2]);
        let message = |error: anyhow::Error| {
            let message = error.to_string();
            message.split_once("a.safetensors: ").unwrap().1.to_owned()
        };
        for (error, expected) in [
            (
                file.floats("ids", &[1, 2]).unwrap_err(),
                "ids: expected F32 [1, 2], found I64 [1, 2]",
            ),
            (
                file.ints("ids", &[2]).unwrap_err(),
                "ids: expected I64 [2], found I64 [1, 2]",
            ),
            (file.ints("other", &[2]).unwrap_err(), "other: missing"),
            (
                file.tokens("ids", 9, 1, &device).unwrap_err(),
                "ids: token 9 is not below vocab_size = 9",
            ),
            (
                file.tokens("ids", 10, 3, &device).unwrap_err(),
                "ids: expected sequences of at least 3 tokens, found [1, 2]",
            ),
        ] {
            assert_eq!(message(error), expected);
        }
    }
}
