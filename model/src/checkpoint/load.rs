//! Reading weights: files are mapped, and each parameter is converted on its own.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
};

use burn::{
    module::{Module, ModuleMapper, Param},
    tensor::{DType, Device, Tensor, TensorData, bf16, f16},
};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde::Deserialize;

use super::{
    CheckpointError, hf_config,
    hf_names::{Stored, mtp_copies, stored},
};
use crate::{
    config::ModelConfig, mmap::MappedFile, parameters::ModulePath, transformer::Transformer,
};

/// Reads `config.json` of the checkpoint in `dir`, or `dir` itself if it is such a file.
///
/// # Errors
/// An unreadable file or one that describes no model of this architecture.
pub fn read_config(dir: &Path) -> Result<ModelConfig, CheckpointError> {
    let path = if dir.is_file() {
        dir.to_owned()
    } else {
        dir.join("config.json")
    };
    let text = std::fs::read_to_string(&path).map_err(CheckpointError::io(&path))?;
    hf_config::parse(&text).map_err(|source| CheckpointError::Config { path, source })
}

/// Reads the checkpoint in `dir`. Weights stored as f32, f16 or bf16 are held as f32.
///
/// # Errors
/// Unreadable or malformed files; tensors that are missing, unexpected or of another shape or type, all of them listed.
pub fn load(dir: &Path, device: &Device) -> Result<(ModelConfig, Transformer), CheckpointError> {
    let config = read_config(dir)?;
    let files = open(dir)?;
    let tensors = index(&files)?;
    let mut loader = Loader {
        path: ModulePath::default(),
        layers: config.num_hidden_layers,
        device,
        unread: tensors.keys().map(String::as_str).collect(),
        tensors: &tensors,
        problems: Vec::new(),
    };
    let model = Transformer::new(&config, 0, device).map(&mut loader);
    for depth in 0..config.num_nextn_predict_layers {
        loader.check_copies(depth, config.tie_word_embeddings);
    }
    if config.tie_word_embeddings {
        loader.check_copy("lm_head.weight", "model.embed_tokens.weight");
    }
    let Loader {
        unread,
        mut problems,
        ..
    } = loader;
    problems.extend(
        unread
            .iter()
            .map(|name| format!("{name}: not a tensor of this model")),
    );
    if problems.is_empty() {
        Ok((config, model))
    } else {
        Err(CheckpointError::Tensors {
            path: dir.to_owned(),
            problems,
        })
    }
}

fn open(dir: &Path) -> Result<Vec<(PathBuf, MappedFile)>, CheckpointError> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let (single, index) = (
        dir.join("model.safetensors"),
        dir.join("model.safetensors.index.json"),
    );
    let names: BTreeSet<String> = if single.exists() {
        ["model.safetensors".to_owned()].into()
    } else if index.exists() {
        let text = std::fs::read_to_string(&index).map_err(CheckpointError::io(&index))?;
        let parsed: Index = serde_json::from_str(&text)
            .map_err(|error| CheckpointError::format(&index, error.to_string()))?;
        parsed.weight_map.into_values().collect()
    } else {
        let what = "neither model.safetensors nor model.safetensors.index.json is there";
        return Err(CheckpointError::format(dir, what));
    };
    names
        .into_iter()
        .map(|name| {
            // An index is input: it may only name files beside it.
            if Path::new(&name).file_name() != Some(name.as_ref()) {
                let what = format!("{name:?} is not the name of a file beside the index");
                return Err(CheckpointError::format(&index, what));
            }
            let path = dir.join(name);
            let file = MappedFile::open(&path).map_err(CheckpointError::io(&path))?;
            Ok((path, file))
        })
        .collect()
}

fn index(
    files: &[(PathBuf, MappedFile)],
) -> Result<BTreeMap<String, TensorView<'_>>, CheckpointError> {
    let mut tensors = BTreeMap::new();
    for (path, file) in files {
        let parsed = SafeTensors::deserialize(file.bytes())
            .map_err(|error| CheckpointError::format(path, error.to_string()))?;
        for (name, view) in parsed.tensors() {
            if tensors.insert(name.clone(), view).is_some() {
                return Err(CheckpointError::format(
                    path,
                    format!("{name} is in two files"),
                ));
            }
        }
    }
    Ok(tensors)
}

struct Loader<'a> {
    path: ModulePath,
    layers: usize,
    device: &'a Device,
    tensors: &'a BTreeMap<String, TensorView<'a>>,
    unread: BTreeSet<&'a str>,
    problems: Vec<String>,
}

impl Loader<'_> {
    /// The elements of a stored tensor if it is there with the expected sizes.
    fn take(&mut self, name: &str, expected: &[usize]) -> Option<Vec<f32>> {
        let Some(view) = self.tensors.get(name) else {
            self.problems
                .push(format!("{name}: missing, expected {expected:?}"));
            return None;
        };
        self.unread.remove(name);
        if view.shape() != expected {
            let found = view.shape();
            self.problems
                .push(format!("{name}: expected {expected:?}, found {found:?}"));
            return None;
        }
        let values = widen(view);
        if values.is_none() {
            let found = view.dtype();
            self.problems.push(format!(
                "{name}: expected F32, F16 or BF16, found {found:?}"
            ));
        }
        values
    }

    fn read(&mut self, shape: &[usize]) -> Option<Vec<f32>> {
        match stored(&self.path.join(), self.layers) {
            Stored::AsIs(name) => self.take(&name, shape),
            Stored::Transposed(name) => {
                let [rows, columns] = [shape[0], shape[1]];
                self.take(&name, &[columns, rows])
                    .map(|values| transpose(&values, columns))
            }
            Stored::Experts { prefix, suffix } => {
                let [experts, rows, columns] = [shape[0], shape[1], shape[2]];
                let mut all = Some(Vec::new());
                for expert in 0..experts {
                    let name = format!("{prefix}{expert}{suffix}");
                    let one = self.take(&name, &[columns, rows]);
                    // Go on after a failure, so that every expert's problem is listed.
                    all = all.zip(one).map(|(mut all, one)| {
                        all.reserve_exact(if all.is_empty() {
                            experts * one.len()
                        } else {
                            0
                        });
                        all.extend(transpose(&one, columns));
                        all
                    });
                }
                all
            }
        }
    }

    fn check_copies(&mut self, depth: usize, tied: bool) {
        for (copy, original) in mtp_copies(self.layers, depth, tied) {
            self.check_copy(&copy, &original);
        }
    }

    /// A stored copy of a shared matrix may be absent, but must not differ.
    fn check_copy(&mut self, copy: &str, original: &str) {
        let (Some(found), Some(expected)) = (self.tensors.get(copy), self.tensors.get(original))
        else {
            return;
        };
        self.unread.remove(copy);
        if found.dtype() != expected.dtype() || found.data() != expected.data() {
            self.problems.push(format!(
                "{copy}: differs from {original}, which it should repeat"
            ));
        }
    }
}

impl ModuleMapper for Loader<'_> {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.path.enter(name, container);
    }

    fn exit_module(&mut self, _: &str, container: &str) {
        self.path.exit(container);
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let shape = param.lazy_shape();
        let Some(values) = self.read(&shape.to_vec()) else {
            return param;
        };
        let tensor = Tensor::from_data(TensorData::new(values, shape), (self.device, DType::F32));
        // A lazy parameter takes the tensor without making its initial values first.
        let id = param.id;
        param.transform_for_load(tensor, id)
    }
}

/// The elements of a stored float tensor in single precision; `None` for other types.
fn widen(view: &TensorView<'_>) -> Option<Vec<f32>> {
    let bytes = view.data();
    let words = || bytes.chunks_exact(2).map(|pair| [pair[0], pair[1]]);
    Some(match view.dtype() {
        Dtype::F32 => bytes
            .chunks_exact(4)
            .map(|word| f32::from_le_bytes([word[0], word[1], word[2], word[3]]))
            .collect(),
        Dtype::BF16 => words()
            .map(|pair| bf16::from_le_bytes(pair).to_f32())
            .collect(),
        Dtype::F16 => words()
            .map(|pair| f16::from_le_bytes(pair).to_f32())
            .collect(),
        _ => return None,
    })
}

/// Transposes a row-major matrix of `rows` rows.
pub(super) fn transpose(values: &[f32], rows: usize) -> Vec<f32> {
    let columns = values.len() / rows;
    let mut turned = Vec::with_capacity(values.len());
    for column in 0..columns {
        turned.extend(values.iter().skip(column).step_by(columns));
    }
    turned
}
