//! Reference tensors and the tolerances that they are compared at.
#![allow(dead_code, reason = "each test target uses its own part")]

use std::{collections::BTreeMap, path::PathBuf};

use burn::tensor::{Device, Int, Tensor, TensorData};
use deepburn_model::{checkpoint, config::ModelConfig, transformer::Transformer};
use safetensors::{Dtype, SafeTensors};

/// Absolute tolerances on f32 against transformers' f32. Each case's `meta.json` has the distance of that f32 from
/// float64: at most 7e-6 for plain cases and 1.7e-5 with YaRN; ours may be as far on the other side. A wrong
/// epsilon of the norms moves logits by 5.5e-5.
pub(crate) mod tolerance {
    pub(crate) const LOGITS: f32 = 2e-5;
    pub(crate) const LOGITS_YARN: f32 = 5e-5;
    pub(crate) const WEIGHTS: f32 = 1e-5;
    pub(crate) const LOSS: f32 = 1e-5;
    pub(crate) const GRADIENT: f32 = 1e-5;
    pub(crate) const BIAS: f32 = 1e-6;
    /// Mean absolute difference of parameters after training; wrong optimisers move it by 9e-6 and more.
    pub(crate) const PARAMETERS_MEAN: f32 = 1e-6;
    pub(crate) const PARAMETERS_MAX: f32 = 1e-3;
}

/// A tensor of a reference file.
#[derive(Clone, Debug)]
pub(crate) struct Reference {
    pub(crate) shape: Vec<usize>,
    pub(crate) values: Vec<f32>,
}

impl Reference {
    pub(crate) fn ints(&self) -> Vec<i64> {
        self.values.iter().map(|&value| value as i64).collect()
    }

    pub(crate) fn tokens(&self, device: &Device) -> Tensor<2, Int> {
        Tensor::from_data(TensorData::new(self.ints(), self.shape.clone()), device)
    }
}

pub(crate) fn fixture(case: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures")
        .join(case)
}

/// All tensors of a file of a case, as f32 (the integers in them are small).
pub(crate) fn references(case: &str, file: &str) -> BTreeMap<String, Reference> {
    let path = fixture(case).join(file);
    let bytes = std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let parsed = SafeTensors::deserialize(&bytes).unwrap();
    parsed
        .tensors()
        .into_iter()
        .map(|(name, view)| {
            let data = view.data();
            let values = match view.dtype() {
                Dtype::F32 => data
                    .chunks_exact(4)
                    .map(|b| f32::from_le_bytes(b.try_into().unwrap()))
                    .collect(),
                Dtype::I64 => data
                    .chunks_exact(8)
                    .map(|b| i64::from_le_bytes(b.try_into().unwrap()) as f32)
                    .collect(),
                other => panic!("{name}: {other:?}"),
            };
            (
                name,
                Reference {
                    shape: view.shape().to_vec(),
                    values,
                },
            )
        })
        .collect()
}

pub(crate) fn load(case: &str, device: &Device) -> (ModelConfig, Transformer) {
    checkpoint::load(&fixture(case), device).unwrap()
}

pub(crate) fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().iter::<f32>().collect()
}

/// Asserts that the largest difference is within `tolerance`; says where it is.
#[track_caller]
pub(crate) fn assert_close(name: &str, found: &[f32], expected: &Reference, tolerance: f32) {
    assert_eq!(
        found.len(),
        expected.values.len(),
        "{name}: number of elements"
    );
    let (at, worst) = found
        .iter()
        .zip(&expected.values)
        .map(|(a, b)| (a - b).abs())
        .enumerate()
        .fold((0, 0f32), |worst, (at, d)| {
            if d > worst.1 || d.is_nan() {
                (at, d)
            } else {
                worst
            }
        });
    assert!(
        worst <= tolerance,
        "{name}: off by {worst:e} at {at} of {:?} (found {}, expected {}), tolerance {tolerance:e}",
        expected.shape,
        found[at],
        expected.values[at],
    );
}
