//! Writing weights, tensor by tensor.

use std::{borrow::Cow, collections::BTreeMap, path::Path};

use burn::{
    module::{Module, ModuleVisitor, Param},
    tensor::Tensor,
};
use safetensors::{Dtype, View, serialize_to_file};
use serde_json::json;

use super::{
    CheckpointError, hf_config,
    hf_names::{Stored, mtp_copies, stored},
    load::transpose,
    write_file,
};
use crate::{config::ModelConfig, parameters::ModulePath, transformer::Transformer};

/// How weights are written.
#[derive(Clone, Copy, Debug)]
pub struct SaveOptions {
    /// Weights are split into files of at most this size, unless one tensor is larger.
    pub max_shard_bytes: u64,
}

impl Default for SaveOptions {
    /// Files of at most 5 GB, as transformers writes them.
    fn default() -> Self {
        Self {
            max_shard_bytes: 5_000_000_000,
        }
    }
}

/// Writes `config.json` and the weights in single precision into the existing folder `dir`.
///
/// # Errors
/// What the file system answers.
pub fn save(
    model: &Transformer,
    config: &ModelConfig,
    dir: &Path,
    options: &SaveOptions,
) -> Result<(), CheckpointError> {
    write_file(
        &dir.join("config.json"),
        hf_config::render(config, "float32").as_bytes(),
    )?;
    let mut collector = Collector {
        path: ModulePath::default(),
        layers: config.num_hidden_layers,
        tensors: BTreeMap::new(),
    };
    model.visit(&mut collector);
    let mut tensors = collector.tensors;
    for depth in 0..config.num_nextn_predict_layers {
        for (copy, original) in
            mtp_copies(config.num_hidden_layers, depth, config.tie_word_embeddings)
        {
            let original = tensors[&original].clone();
            tensors.insert(copy, original);
        }
    }
    write_shards(tensors, dir, options.max_shard_bytes)
}

fn write_shards(
    tensors: BTreeMap<String, StoredTensor>,
    dir: &Path,
    max_shard_bytes: u64,
) -> Result<(), CheckpointError> {
    let mut shards: Vec<Vec<(String, StoredTensor)>> = vec![Vec::new()];
    let (mut filled, mut total) = (0, 0);
    for (name, tensor) in tensors {
        let bytes = tensor.data_len() as u64;
        if filled > 0 && filled + bytes > max_shard_bytes {
            shards.push(Vec::new());
            filled = 0;
        }
        filled += bytes;
        total += bytes;
        shards
            .last_mut()
            .expect("starts with one shard")
            .push((name, tensor));
    }
    let count = shards.len();
    let mut weight_map = BTreeMap::new();
    for (number, shard) in shards.into_iter().enumerate() {
        let file = match count {
            1 => "model.safetensors".to_owned(),
            _ => format!("model-{:05}-of-{count:05}.safetensors", number + 1),
        };
        weight_map.extend(shard.iter().map(|(name, _)| (name.clone(), file.clone())));
        let path = dir.join(file);
        // transformers asks for this entry.
        let metadata = [("format".to_owned(), "pt".to_owned())].into();
        serialize_to_file(shard, Some(metadata), &path)
            .map_err(|error| CheckpointError::format(&path, error.to_string()))?;
    }
    if count == 1 {
        return Ok(());
    }
    let index = json!({ "metadata": { "total_size": total }, "weight_map": weight_map });
    let text = serde_json::to_string_pretty(&index).expect("a map with string keys");
    write_file(&dir.join("model.safetensors.index.json"), text.as_bytes())
}

struct Collector {
    path: ModulePath,
    layers: usize,
    tensors: BTreeMap<String, StoredTensor>,
}

impl ModuleVisitor for Collector {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.path.enter(name, container);
    }

    fn exit_module(&mut self, _: &str, container: &str) {
        self.path.exit(container);
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let tensor = param.val();
        let shape = tensor.dims().to_vec();
        match stored(&self.path.join(), self.layers) {
            Stored::AsIs(name) => {
                let values = tensor.reshape([shape.iter().product::<usize>()]);
                self.tensors.insert(
                    name,
                    StoredTensor {
                        values,
                        shape,
                        turned: false,
                    },
                );
            }
            Stored::Transposed(name) => {
                let values = tensor.reshape([shape[0] * shape[1]]);
                let shape = vec![shape[1], shape[0]];
                self.tensors.insert(
                    name,
                    StoredTensor {
                        values,
                        shape,
                        turned: true,
                    },
                );
            }
            Stored::Experts { prefix, suffix } => {
                let [experts, rows, columns] = [shape[0], shape[1], shape[2]];
                let size = rows * columns;
                let values = tensor.reshape([experts * size]);
                for expert in 0..experts {
                    let values = values.clone().narrow(0, expert * size, size);
                    let tensor = StoredTensor {
                        values,
                        shape: vec![columns, rows],
                        turned: true,
                    };
                    self.tensors
                        .insert(format!("{prefix}{expert}{suffix}"), tensor);
                }
            }
        }
    }
}

/// A tensor to be written: read from the device, and turned, only when its turn comes.
#[derive(Clone)]
struct StoredTensor {
    values: Tensor<1>,
    shape: Vec<usize>, // as stored
    turned: bool,
}

impl View for StoredTensor {
    fn dtype(&self) -> Dtype {
        Dtype::F32
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        let values: Vec<f32> = self.values.to_data().iter().collect();
        let values = if self.turned {
            transpose(&values, self.shape[1])
        } else {
            values
        };
        values
            .iter()
            .flat_map(|value| value.to_le_bytes())
            .collect::<Vec<u8>>()
            .into()
    }

    fn data_len(&self) -> usize {
        4 * self.shape.iter().product::<usize>()
    }
}
