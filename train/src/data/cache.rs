//! Folders of prepared data: named by what decides on their contents, complete or absent.

use std::{
    fs,
    path::{Path, PathBuf},
    process,
};

use serde::Serialize;

use super::{
    config::{DataConfig, Format, OnBadInput, TokenizerConfig},
    error::DataError,
    hash::{hex, sha256},
    report::{PrepareReport, SplitReport},
    select::Selection,
    shards::Shards,
};

/// Changes whenever the same input would be prepared differently.
pub(crate) const FORMAT_VERSION: u32 = 1;
pub(crate) const TOKENIZER: &str = "tokenizer.json";
/// Written last: a folder with it is complete.
pub(crate) const REPORT: &str = "prepared.json";

/// Data ready for training.
#[derive(Clone, Debug)]
pub struct Prepared {
    /// The tokenizer.
    pub tokenizer_path: PathBuf,
    /// One more than the highest token id.
    pub vocab_size: usize,
    /// The token that ends every document.
    pub eos_id: u32,
    /// The token that begins a text, where the tokenizer has one.
    pub bos_id: Option<u32>,
    /// The training split.
    pub train: Shards,
    /// The validation split.
    pub valid: Shards,
    /// How it came about.
    pub report: PrepareReport,
}

impl Prepared {
    /// Opens a folder that [`prepare`](super::prepare()) made.
    ///
    /// # Errors
    /// If it is incomplete or damaged.
    pub fn open(folder: &Path) -> Result<Self, DataError> {
        let damaged = |what: String| DataError::Cache {
            path: folder.to_owned(),
            what,
        };
        let read = |name: &str| {
            let path = folder.join(name);
            fs::read(&path).map_err(DataError::io(path, "read"))
        };
        let report: PrepareReport = serde_json::from_slice(&read(REPORT)?)
            .map_err(|error| damaged(format!("{REPORT}: {error}")))?;
        let (found, expected) = (report.format_version, FORMAT_VERSION);
        if found != expected {
            return Err(damaged(format!(
                "format_version is {found}, expected {expected}"
            )));
        }
        let (found, expected) = (hex(&sha256(&read(TOKENIZER)?)), &report.tokenizer_sha256);
        if found != *expected {
            return Err(damaged(format!(
                "{TOKENIZER} has SHA-256 {found}, expected {expected}"
            )));
        }
        let open = |name: &str, split: &SplitReport| {
            let shards = Shards::open(&folder.join(name))?;
            let found = (shards.len() as u64, shards.tokens());
            let expected = (split.documents, split.tokens);
            if found == expected {
                return Ok(shards);
            }
            let what = "(documents, tokens)";
            Err(damaged(format!(
                "{name}: {what} is {found:?}, expected {expected:?}"
            )))
        };
        Ok(Self {
            tokenizer_path: folder.join(TOKENIZER),
            vocab_size: report.vocab_size,
            eos_id: report.eos_id,
            bos_id: report.bos_id,
            train: open("train", &report.train)?,
            valid: open("valid", &report.valid)?,
            report,
        })
    }
}

/// The name of a folder of prepared data.
pub(crate) fn key(
    config: &DataConfig,
    seed: u64,
    selection: &Selection,
) -> Result<String, DataError> {
    #[derive(Serialize)]
    struct Key<'a> {
        format_version: u32,
        seed: u64,
        sources: Vec<(Option<Format>, &'a str, Option<u64>)>,
        tokenizer: Result<String, (usize, u64)>,
        validation_fraction: f64,
        max_bytes: Option<u64>,
        fim_rate: f64,
        on_bad_input: OnBadInput,
        files: Vec<(usize, &'a str, u64, String)>,
    }
    let tokenizer = match &config.tokenizer {
        TokenizerConfig::File(path) => {
            let bytes = fs::read(path).map_err(DataError::io(path, "read the tokenizer"))?;
            Ok(hex(&sha256(&bytes)))
        }
        TokenizerConfig::Train {
            vocab_size,
            max_train_bytes,
        } => Err((*vocab_size, *max_train_bytes)),
    };
    let sources = config.sources.iter();
    let files = selection.files.iter();
    let key = Key {
        format_version: FORMAT_VERSION,
        seed,
        sources: sources
            .map(|s| (s.format, s.text_field.as_str(), s.max_bytes))
            .collect(),
        tokenizer,
        validation_fraction: config.validation_fraction,
        max_bytes: config.max_bytes,
        fim_rate: config.fim_rate,
        on_bad_input: config.on_bad_input,
        files: files
            .map(|f| (f.source, f.relative.as_str(), f.size, hex(&f.sha256)))
            .collect(),
    };
    let bytes = serde_json::to_vec(&key).expect("a key has string keys only");
    // 128 bits: short enough to read, and no two contents will ever share them.
    Ok(hex(&sha256(&bytes)[..16]))
}

/// A folder that becomes the prepared one, or disappears.
pub(crate) struct Staging {
    pub(crate) path: PathBuf,
}

impl Staging {
    pub(crate) fn create(folder: &Path) -> Result<Self, DataError> {
        let path = folder.with_extension(format!("staging-{}", process::id()));
        fs::create_dir_all(&path).map_err(DataError::io(&path, "create the folder"))?;
        Ok(Self { path })
    }

    pub(crate) fn publish(self, folder: &Path) -> Result<(), DataError> {
        let published = fs::rename(&self.path, folder);
        if published.is_ok() || folder.join(REPORT).exists() {
            // Where another process was faster, its folder has the same contents.
            return Ok(());
        }
        // A folder without a report is left over from something that was interrupted.
        fs::remove_dir_all(folder)
            .and_then(|()| fs::rename(&self.path, folder))
            .map_err(DataError::io(folder, "put the prepared data in place"))
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        // After publishing there is nothing left; after an error, leftovers harm nobody.
        let _ = fs::remove_dir_all(&self.path);
    }
}
