//! Checkpoints in the layout of Hugging Face: `config.json`, `model.safetensors` or shards with an index.

mod atomic;
mod elements;
mod files;
pub mod hf_config;
pub mod hf_names;
mod hf_quantization;
mod hf_rope;
mod load;
mod save;

use std::path::{Path, PathBuf};

use deepburn_kernels::compact::NotCompact;

pub use atomic::{remove_leftover, write_directory, write_file};
pub use load::{load, load_held, load_parts, read_config};
pub use save::{SaveOptions, Shard, save, save_shard, shard_name, write_index};

/// The type that weights are written in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum StoredType {
    /// Single precision, in which models are held: nothing is lost.
    #[default]
    F32,
    /// Rounded to the nearest bfloat16, or the even one of two; selection biases stay in single precision.
    Bf16,
    /// E4M3 with a scale per block for the weights that DeepSeek publishes so, see [`hf_names::is_quantized`]; the others
    /// as with [`StoredType::Bf16`].
    Fp8,
}

/// Why a checkpoint cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// The file system refused.
    #[error("{path}: {source}")]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// `config.json` cannot be used.
    #[error("{path}: {source}")]
    Config {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: hf_config::HfConfigError,
    },
    /// A file of weights, or its index, is not what it should be.
    #[error("{path}: {what}")]
    Format {
        /// The file.
        path: PathBuf,
        /// What was found.
        what: String,
    },
    /// Tensors do not fit the model that `config.json` describes.
    #[error("{path}: {} tensors do not fit config.json:\n  {}", problems.len(), problems.join("\n  "))]
    Tensors {
        /// The checkpoint.
        path: PathBuf,
        /// One line per tensor: its name, what was expected and what was found.
        problems: Vec<String>,
    },
    /// Weights cannot be held as asked for.
    #[error(transparent)]
    NotCompact(#[from] NotCompact),
}

impl CheckpointError {
    fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { path, source }
    }

    fn format(path: &Path, what: impl Into<String>) -> Self {
        Self::Format {
            path: path.to_owned(),
            what: what.into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use burn::{module::Module, tensor::Device};

    use super::*;
    use crate::{
        config::{ModelConfig, tests::tiny},
        parameters,
        transformer::Transformer,
    };

    fn values(model: &Transformer) -> Vec<(String, Vec<f32>)> {
        let mut paths = parameters::list(model).into_iter();
        struct Values(Vec<Vec<f32>>);
        impl burn::module::ModuleVisitor for Values {
            fn visit_float<const D: usize>(
                &mut self,
                param: &burn::module::Param<burn::tensor::Tensor<D>>,
            ) {
                self.0.push(param.val().into_data().try_to_vec().unwrap());
            }
        }
        let mut found = Values(Vec::new());
        model.visit(&mut found);
        found
            .0
            .into_iter()
            .map(|values| (paths.next().unwrap().path, values))
            .collect()
    }

    #[test]
    fn saved_models_load_the_same_whole_and_in_shards() {
        let device = Device::flex();
        for (tied, max_shard_bytes) in [(false, u64::MAX), (true, u64::MAX), (false, 20_000)] {
            let config = ModelConfig {
                tie_word_embeddings: tied,
                ..tiny()
            };
            let model = Transformer::new(&config, 5, &device);
            let dir = tempfile::tempdir().unwrap();
            save(
                &model,
                &config,
                dir.path(),
                &SaveOptions {
                    max_shard_bytes,
                    ..SaveOptions::default()
                },
            )
            .unwrap();
            assert_eq!(
                dir.path().join("model.safetensors.index.json").exists(),
                max_shard_bytes == 20_000
            );
            let (read, loaded) = load(dir.path(), &device).unwrap();
            assert_eq!(read, config);
            assert_eq!(values(&loaded), values(&model));
        }
    }

    #[test]
    fn tensors_that_do_not_fit_are_all_listed() {
        let device = Device::flex();
        let dir = tempfile::tempdir().unwrap();
        let config = tiny();
        let options = SaveOptions::default();
        save(
            &Transformer::new(&config, 5, &device),
            &config,
            dir.path(),
            &options,
        )
        .unwrap();
        let other = ModelConfig {
            vocab_size: 65,
            q_lora_rank: None,
            ..config
        };
        std::fs::write(
            dir.path().join("config.json"),
            hf_config::render(&other, StoredType::F32),
        )
        .unwrap();
        let message = load(dir.path(), &device).unwrap_err().to_string();
        for line in [
            "model.embed_tokens.weight: expected [65, 32], found [64, 32]",
            "model.layers.0.self_attn.q_proj.weight: missing, expected [24, 32]",
            "model.layers.2.self_attn.q_b_proj.weight: not a tensor of this model",
        ] {
            assert!(message.contains(line), "{message}");
        }
    }

    #[test]
    fn broken_files_are_errors_that_name_them() {
        let device = Device::flex();
        let config = tiny();
        let model = Transformer::new(&config, 5, &device);
        let dir = tempfile::tempdir().unwrap();
        save(&model, &config, dir.path(), &SaveOptions::default()).unwrap();
        let path = dir.path().join("model.safetensors");
        let whole = std::fs::read(&path).unwrap();
        for broken in [&whole[..whole.len() - 1], &whole[..4], &[0xff; 16], b""] {
            std::fs::write(&path, broken).unwrap();
            let message = load(dir.path(), &device).unwrap_err().to_string();
            assert!(message.contains("model.safetensors: "), "{message}");
        }
        std::fs::remove_file(&path).unwrap();
        let message = load(dir.path(), &device).unwrap_err().to_string();
        assert!(
            message.contains("neither model.safetensors nor model.safetensors.index.json"),
            "{message}"
        );
        std::fs::write(dir.path().join("config.json"), "{").unwrap();
        assert!(
            load(dir.path(), &device)
                .unwrap_err()
                .to_string()
                .contains("config.json: EOF")
        );
    }
}
