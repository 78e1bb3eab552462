//! The `[data]` section of a training configuration.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{byte_level::FIRST_MERGED_ID, error::DataError};

pub use super::source::{Format, Origin, Source};

/// Where text comes from and how it becomes tokens.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataConfig {
    /// Text is taken from all of these.
    pub sources: Vec<Source>,
    /// A tokenizer to load, or the size of one to train.
    pub tokenizer: TokenizerConfig,
    /// The share of documents that is held out, chosen by a hash of their content.
    #[serde(default = "default_validation_fraction")]
    pub validation_fraction: f64,
    /// A bound on the text of all sources together.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_bytes: Option<u64>,
    /// The share of training documents rearranged for infilling (DeepSeek-V3 report, 4.1: 0.1).
    #[serde(default)]
    pub fim_rate: f64,
    /// Whether attention stops at document boundaries. DeepSeek-V3 packs documents without such a
    /// mask (report, 4.1).
    #[serde(default)]
    pub document_mask: bool,
    /// What happens to input that cannot be used.
    #[serde(default)]
    pub on_bad_input: OnBadInput,
    /// Prepared data is kept here, one folder per content.
    #[serde(default = "default_cache_dir")]
    pub cache_dir: PathBuf,
}

fn default_validation_fraction() -> f64 {
    0.02
}

fn default_cache_dir() -> PathBuf {
    PathBuf::from("runs/cache")
}

/// What happens to input that cannot be used: a file that is not UTF-8, a broken line, an empty document.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnBadInput {
    /// It is reported, counted and left out.
    #[default]
    Skip,
    /// The first such input ends the preparation.
    Refuse,
}

/// A tokenizer to load, or the size of one to train.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "TokenizerFields", into = "TokenizerFields")]
pub enum TokenizerConfig {
    /// A `tokenizer.json`.
    File(PathBuf),
    /// A byte-level BPE trained on the training split.
    Train {
        /// Tokens in the vocabulary; fewer come out where no pair of tokens occurs twice.
        vocab_size: usize,
        /// Text to learn from.
        max_train_bytes: u64,
    },
}

/// The keys of a tokenizer as written.
#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct TokenizerFields {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    file: Option<PathBuf>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    vocab_size: Option<usize>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    max_train_bytes: Option<u64>,
}

/// Enough for stable merges at tens of thousands of tokens.
const DEFAULT_TRAIN_BYTES: u64 = 64 << 20;

impl TryFrom<TokenizerFields> for TokenizerConfig {
    type Error = &'static str;

    fn try_from(fields: TokenizerFields) -> Result<Self, Self::Error> {
        match (fields.file, fields.vocab_size, fields.max_train_bytes) {
            (Some(file), None, None) => Ok(Self::File(file)),
            (None, Some(vocab_size), bytes) => {
                let max_train_bytes = bytes.unwrap_or(DEFAULT_TRAIN_BYTES);
                Ok(Self::Train {
                    vocab_size,
                    max_train_bytes,
                })
            }
            _ => Err("a tokenizer has file = \"…\", or vocab_size = … and max_train_bytes = …"),
        }
    }
}

impl From<TokenizerConfig> for TokenizerFields {
    fn from(tokenizer: TokenizerConfig) -> Self {
        match tokenizer {
            TokenizerConfig::File(file) => Self {
                file: Some(file),
                vocab_size: None,
                max_train_bytes: None,
            },
            TokenizerConfig::Train {
                vocab_size,
                max_train_bytes,
            } => Self {
                file: None,
                vocab_size: Some(vocab_size),
                max_train_bytes: Some(max_train_bytes),
            },
        }
    }
}

impl DataConfig {
    /// Checks what types alone cannot.
    ///
    /// # Errors
    /// [`DataError::Config`] with the first key whose value breaks its rule.
    pub fn validate(&self) -> Result<(), DataError> {
        let check = |holds: bool, key: &str, value: &dyn std::fmt::Debug, rule| match holds {
            true => Ok(()),
            false => Err(DataError::Config {
                key: key.into(),
                value: format!("{value:?}"),
                rule,
            }),
        };
        check(
            !self.sources.is_empty(),
            "sources",
            &self.sources,
            "at least one source is needed",
        )?;
        for (i, source) in self.sources.iter().enumerate() {
            let key = |name: &str| format!("sources[{i}].{name}");
            if let Origin::Path(path) = &source.origin {
                check(!path.is_empty(), &key("path"), path, "a path is not empty")?;
            }
            let field = &source.text_field;
            check(
                !field.is_empty(),
                &key("text_field"),
                field,
                "a name is not empty",
            )?;
            let bound = source.max_bytes;
            check(
                bound != Some(0),
                &key("max_bytes"),
                &bound,
                "a bound is above 0",
            )?;
        }
        check(
            self.max_bytes != Some(0),
            "max_bytes",
            &self.max_bytes,
            "a bound is above 0",
        )?;
        if let TokenizerConfig::Train {
            vocab_size,
            max_train_bytes,
        } = &self.tokenizer
        {
            let smallest = FIRST_MERGED_ID as usize;
            let rule = "at least 262: 6 special tokens and 256 bytes";
            check(
                *vocab_size >= smallest,
                "tokenizer.vocab_size",
                vocab_size,
                rule,
            )?;
            // Token ids are stored as 32-bit signed integers.
            let rule = "at most 2147483647";
            check(
                i32::try_from(*vocab_size).is_ok(),
                "tokenizer.vocab_size",
                vocab_size,
                rule,
            )?;
            // The trainer holds this text in memory, and counts in 32 bits.
            let (key, bytes) = ("tokenizer.max_train_bytes", max_train_bytes);
            check(
                (1..=1 << 31).contains(bytes),
                key,
                bytes,
                "from 1 to 2147483648",
            )?;
        }
        let fraction = self.validation_fraction;
        let rule = "from 0 to 0.5";
        check(
            (0.0..=0.5).contains(&fraction),
            "validation_fraction",
            &fraction,
            rule,
        )?;
        check(
            (0.0..=1.0).contains(&self.fim_rate),
            "fim_rate",
            &self.fim_rate,
            "from 0 to 1",
        )?;
        let folder = &self.cache_dir;
        check(
            !folder.as_os_str().is_empty(),
            "cache_dir",
            folder,
            "a path is not empty",
        )
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    const SMALL: &str = "sources = [{ path = \"a/*.rs\" }]\ntokenizer = { vocab_size = 300 }\n";

    #[test]
    fn defaults_and_round_trip() {
        let config: DataConfig = toml::from_str(SMALL).unwrap();
        config.validate().unwrap();
        assert_eq!(config.validation_fraction, 0.02);
        assert_eq!(config.cache_dir, Path::new("runs/cache"));
        assert_eq!(config.sources[0].text_field, "text");
        let written = toml::to_string(&config).unwrap();
        assert_eq!(toml::from_str::<DataConfig>(&written).unwrap(), config);
    }

    #[test]
    fn unknown_keys_and_contradictions_are_refused() {
        for (text, message) in [
            (format!("{SMALL}fim_rat = 0.1"), "fim_rat"),
            (SMALL.replace("{ path", "{ fmt = 1, path"), "fmt"),
            (
                SMALL.replace("{ path", "{ cargo_registry = true, path"),
                "not both",
            ),
            (SMALL.replace("path = \"a/*.rs\"", ""), "needs path"),
            (
                SMALL.replace("vocab_size", "file = \"x\", vocab_size"),
                "a tokenizer has",
            ),
            (SMALL.replace("path", "format = \"csv\", path"), "csv"),
        ] {
            let error = toml::from_str::<DataConfig>(&text).unwrap_err().to_string();
            assert!(error.contains(message), "{text} -> {error}");
        }
    }

    #[test]
    fn broken_rules_name_key_and_value() {
        for (text, key, value) in [
            (
                format!("{SMALL}validation_fraction = 0.9"),
                "validation_fraction",
                "0.9",
            ),
            (format!("{SMALL}fim_rate = -0.1"), "fim_rate", "-0.1"),
            (format!("{SMALL}fim_rate = nan"), "fim_rate", "NaN"),
            (format!("{SMALL}max_bytes = 0"), "max_bytes", "0"),
            (SMALL.replace("300", "261"), "tokenizer.vocab_size", "261"),
            (SMALL.replace("a/*.rs", ""), "sources[0].path", "\"\""),
            (
                SMALL.replace("{ path", "{ max_bytes = 0, path"),
                "sources[0].max_bytes",
                "0",
            ),
        ] {
            let error = toml::from_str::<DataConfig>(&text)
                .unwrap()
                .validate()
                .unwrap_err();
            let DataError::Config {
                key: found,
                value: shown,
                ..
            } = &error
            else {
                panic!("{error}")
            };
            assert_eq!(found, key);
            assert!(shown.contains(value), "{error}");
        }
    }
}
