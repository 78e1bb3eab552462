//! Checkpoints of a run: a Hugging Face folder each, with what training needs to go on exactly in `training/`.
//!
//! ```text
//! checkpoints/step-00000500/  config.json model.safetensors tokenizer.json tokenizer_config.json generation_config.json
//!                             training/{state.json, optimizer.bpk, config.toml}
//!                             training/ema/{config.json, model.safetensors}    where an average is kept
//! checkpoints/latest          -> step-00000500
//! ```

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use burn::{optim::OptimizerRecord, store::RecordError};
use deepburn_model::{
    checkpoint::{
        self, CheckpointError, SaveOptions, remove_leftover, write_directory, write_file,
    },
    config::ModelConfig,
    transformer::Transformer,
};
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::{
    config::{BatchConfig, EmaConfig, TrainConfig},
    data::Cursor,
    precision::{Fp8Ablation, Precision},
    spike::SpikeWatch,
};

/// Where a checkpoint has the average of the weights, if the run keeps one.
pub const AVERAGE: &str = "training/ema";
/// The moments, where one process writes them.
pub(crate) const OPTIMIZER: &str = "training/optimizer.bpk";

/// Changes whenever `training/` is read differently.
const FORMAT: u32 = 1;

/// Why a run cannot be saved or resumed.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// The folder of weights cannot be read or written.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The file system refused.
    #[error("{path}: {source}")]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The optimizer's file cannot be read or written.
    #[error("{path}: {source}")]
    Optimizer {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: RecordError,
    },
    /// `state.json` cannot be used.
    #[error("{path}: {what}")]
    State {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// The configuration differs where a resumed run must not.
    #[error("{path}: {key} was {found} and is now {expected}: a resumed run goes on with the same")]
    Changed {
        /// The checkpoint.
        path: PathBuf,
        /// What differs.
        key: &'static str,
        /// Its value in the checkpoint.
        found: String,
        /// Its value now.
        expected: String,
    },
    /// Nothing to resume from.
    #[error("{path}: no checkpoint to resume from")]
    None {
        /// Where it was looked for.
        path: PathBuf,
    },
}

/// What a run needs to go on, besides weights and moments.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct RunState {
    /// Version of this layout.
    pub format: u32,
    /// Version of Deepburn that wrote it.
    pub deepburn_version: String,
    /// Optimizer steps done; with the seed, all that learning rate and other schedules depend on.
    pub step: u64,
    /// Position in the data.
    pub cursor: Cursor,
    /// Seed of data order.
    pub seed: u64,
    /// SHA-256 of the tokenizer.
    pub tokenizer_sha256: String,
    /// Tokens of the training split.
    pub train_tokens: u64,
    /// Windows per step.
    pub batch: BatchConfig,
    /// What was computed and kept in which type.
    #[serde(default)]
    pub precision: Precision,
    /// What was done worse, for an experiment.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ablation: Option<Fp8Ablation>,
    /// How the average of the weights was made, if one was kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ema: Option<EmaConfig>,
    /// What happened on the way.
    #[serde(default)]
    pub history: History,
}

/// What happened to a run that its next steps depend on, or go on counting.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct History {
    /// Losses, as far as the next one is compared with them.
    pub spikes: SpikeWatch,
    /// Optimizer steps left out because gradients were not finite.
    pub skipped_steps: u64,
}

impl RunState {
    /// The state after `step` steps.
    pub fn new(step: u64, config: &TrainConfig, data: &crate::data::Prepared) -> Self {
        let windows = (config.batch.sequences * config.batch.accumulation) as u64;
        Self {
            format: FORMAT,
            deepburn_version: env!("CARGO_PKG_VERSION").into(),
            step,
            cursor: Cursor {
                consumed: step * windows,
            },
            seed: config.run.seed,
            tokenizer_sha256: data.report.tokenizer_sha256.clone(),
            train_tokens: data.report.train.tokens,
            batch: config.batch,
            precision: config.precision,
            ablation: config.ablation.fp8,
            ema: config.ema,
            history: History::default(),
        }
    }
}

/// The checkpoints of a run.
#[derive(Clone, Debug)]
pub struct Checkpoints {
    folder: PathBuf,
    keep: usize,
}

/// What a checkpoint consists of.
#[derive(Clone, Copy, Debug)]
pub struct Contents<'a> {
    /// The model's shape.
    pub shape: &'a ModelConfig,
    /// How the run goes on.
    pub state: &'a RunState,
    /// The run's configuration, for the record.
    pub config: &'a TrainConfig,
    /// `tokenizer.json`.
    pub tokenizer: &'a Path,
}

impl Checkpoints {
    /// The checkpoints below a run's folder, of which the newest `keep` are kept.
    pub fn new(run: &Path, keep: usize) -> Self {
        Self {
            folder: run.join("checkpoints"),
            keep,
        }
    }

    /// The newest complete checkpoint.
    pub fn latest(&self) -> Option<PathBuf> {
        self.all().pop()
    }

    /// Complete checkpoints, oldest first. A folder under its final name is complete.
    fn all(&self) -> Vec<PathBuf> {
        let Ok(entries) = fs::read_dir(&self.folder) else {
            return Vec::new();
        };
        let named = |path: &PathBuf| {
            path.file_name()
                .and_then(|name| name.to_str())
                .is_some_and(|name| name.starts_with("step-"))
        };
        let mut found: Vec<_> = entries
            .flatten()
            .map(|entry| entry.path())
            .filter(named)
            .collect();
        found.sort();
        found
    }

    /// Writes a checkpoint, with the average of the weights if one is kept, as a whole or not at all, then removes those beyond the newest.
    ///
    /// # Errors
    /// What the file system answers.
    pub fn write(
        &self,
        model: &Transformer,
        contents: Contents<'_>,
        average: Option<&Transformer>,
        record: OptimizerRecord,
    ) -> Result<PathBuf, StateError> {
        self.commit(contents.state.step, |staging| {
            let save = |model, folder: &Path| {
                checkpoint::save(model, contents.shape, folder, &SaveOptions::default())
            };
            save(model, staging)?;
            write_run(staging, contents)?;
            if let Some(average) = average {
                let folder = staging.join(AVERAGE);
                fs::create_dir(&folder).map_err(io_error(&folder))?;
                save(average, &folder)?;
            }
            let path = staging.join(OPTIMIZER);
            record
                .save(&path)
                .map_err(|source| StateError::Optimizer { path, source })
        })
    }

    /// As [`Checkpoints::write`], with contents that `fill` writes into the folder that it is given.
    pub(crate) fn commit<E: From<CheckpointError> + From<StateError>>(
        &self,
        step: u64,
        fill: impl FnOnce(&Path) -> Result<(), E>,
    ) -> Result<PathBuf, E> {
        let path = self.folder.join(format!("step-{step:08}"));
        write_directory(&path, fill)?;
        Ok(self.tidy_up(path)?)
    }

    /// Points to the newest checkpoint and removes those that are no longer kept.
    fn tidy_up(&self, path: PathBuf) -> Result<PathBuf, StateError> {
        self.point_latest_to(&path)?;
        let all = self.all();
        let aside = path.with_file_name(".removed.tmp");
        for old in &all[..all.len().saturating_sub(self.keep)] {
            // Renamed first: a removal that is cut short must not leave half a checkpoint under its name.
            remove_leftover(&aside)?;
            fs::rename(old, &aside).map_err(io_error(old))?;
        }
        remove_leftover(&aside)?;
        Ok(path)
    }

    #[cfg(unix)]
    fn point_latest_to(&self, path: &Path) -> Result<(), StateError> {
        let (link, staging) = (self.folder.join("latest"), self.folder.join(".latest.tmp"));
        if staging.is_symlink() {
            fs::remove_file(&staging).map_err(io_error(&staging))?;
        }
        let target = path.file_name().expect("a checkpoint has a name");
        std::os::unix::fs::symlink(target, &staging).map_err(io_error(&staging))?;
        fs::rename(&staging, &link).map_err(io_error(&link))
    }

    /// Symbolic links need privileges elsewhere; the newest folder is found by its name.
    #[cfg(not(unix))]
    fn point_latest_to(&self, _: &Path) -> Result<(), StateError> {
        Ok(())
    }
}

/// Writes what a checkpoint has besides weights and moments.
pub(crate) fn write_run(folder: &Path, contents: Contents<'_>) -> Result<(), StateError> {
    write_tokenizer(folder, contents.tokenizer, contents.shape)?;
    let training = folder.join("training");
    fs::create_dir_all(&training).map_err(io_error(&training))?;
    let state = serde_json::to_vec_pretty(contents.state).expect("numbers and strings");
    write_file(&training.join("state.json"), &state)?;
    let config = toml::to_string(contents.config).expect("read from such a file");
    Ok(write_file(
        &training.join("config.toml"),
        config.as_bytes(),
    )?)
}

/// The tokenizer with the files by which transformers knows its special tokens.
fn write_tokenizer(folder: &Path, tokenizer: &Path, shape: &ModelConfig) -> Result<(), StateError> {
    let text = fs::read(tokenizer).map_err(io_error(tokenizer))?;
    write_file(&folder.join("tokenizer.json"), &text)?;
    let parsed = tokenizers::Tokenizer::from_bytes(&text).map_err(|error| StateError::State {
        path: tokenizer.to_owned(),
        what: error.to_string(),
    })?;
    let token = |id: Option<u32>| id.and_then(|id| parsed.id_to_token(id));
    let config = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": false,
        "bos_token": token(shape.bos_token_id),
        "eos_token": token(shape.eos_token_id),
        "clean_up_tokenization_spaces": false,
        "model_max_length": shape.max_position_embeddings,
    });
    let generation = json!({
        "_from_model_config": true,
        "bos_token_id": shape.bos_token_id,
        "eos_token_id": shape.eos_token_id,
    });
    for (name, value) in [
        ("tokenizer_config.json", config),
        ("generation_config.json", generation),
    ] {
        let text = serde_json::to_string_pretty(&value).expect("a map with string keys") + "\n";
        write_file(&folder.join(name), text.as_bytes())?;
    }
    Ok(())
}

/// Reads what a checkpoint says about its run.
///
/// # Errors
/// A file that is missing, malformed or of another layout.
pub fn read(checkpoint: &Path) -> Result<RunState, StateError> {
    let path = checkpoint.join("training/state.json");
    let text = fs::read_to_string(&path).map_err(io_error(&path))?;
    let state: RunState = serde_json::from_str(&text).map_err(|error| StateError::State {
        path: path.clone(),
        what: error.to_string(),
    })?;
    if state.format != FORMAT {
        let what = format!("format is {}, expected {FORMAT}", state.format);
        return Err(StateError::State { path, what });
    }
    Ok(state)
}

/// Refuses to resume a run whose next step would not be the one that an uninterrupted run had taken.
///
/// # Errors
/// The first difference.
pub fn check_unchanged(
    checkpoint: &Path,
    found: &RunState,
    expected: &RunState,
) -> Result<(), StateError> {
    let differ = |key, found: String, expected: String| {
        if found == expected {
            return Ok(());
        }
        Err(StateError::Changed {
            path: checkpoint.to_owned(),
            key,
            found,
            expected,
        })
    };
    differ(
        "run.seed",
        found.seed.to_string(),
        expected.seed.to_string(),
    )?;
    differ(
        "batch",
        format!("{:?}", found.batch),
        format!("{:?}", expected.batch),
    )?;
    differ(
        "precision",
        format!("{:?}", found.precision).to_lowercase(),
        format!("{:?}", expected.precision).to_lowercase(),
    )?;
    differ(
        "ablation.fp8",
        json!(found.ablation).to_string(),
        json!(expected.ablation).to_string(),
    )?;
    let decay = |state: &RunState| json!(state.ema.map(|ema| ema.decay)).to_string();
    differ("ema.decay", decay(found), decay(expected))?;
    differ(
        "the tokenizer",
        found.tokenizer_sha256.clone(),
        expected.tokenizer_sha256.clone(),
    )?;
    let tokens = |state: &RunState| format!("{} tokens", state.train_tokens);
    differ("the training split", tokens(found), tokens(expected))
}

pub(crate) fn io_error(path: &Path) -> impl FnOnce(io::Error) -> StateError {
    let path = path.to_owned();
    move |source| StateError::Io { path, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As a kill amid the removal of an old checkpoint leaves it.
    #[test]
    fn what_an_interrupted_removal_left_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let checkpoints = Checkpoints::new(dir.path(), 1);
        let left = dir.path().join("checkpoints/.removed.tmp");
        fs::create_dir_all(left.join("training")).unwrap();
        for step in 1..=2 {
            checkpoints.commit::<StateError>(step, |_| Ok(())).unwrap();
        }
        assert!(checkpoints.latest().unwrap().ends_with("step-00000002"));
        assert_eq!(checkpoints.all().len(), 1);
        assert!(!left.exists());
    }
}
