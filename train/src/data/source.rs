//! One entry of `data.sources`.

use std::path::Path;

use serde::{Deserialize, Serialize};

/// One origin of text and how to read it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "SourceFields", into = "SourceFields")]
pub struct Source {
    /// The files.
    pub origin: Origin,
    /// How documents lie in the files; by each file's extension if absent.
    pub format: Option<Format>,
    /// The JSON key or Parquet column that holds a document's text.
    pub text_field: String,
    /// A bound on the text taken from this source.
    pub max_bytes: Option<u64>,
}

/// The files of a source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// A file, a glob, or a folder with everything below it.
    Path(String),
    /// All Rust files which Cargo has unpacked on this machine.
    CargoRegistry,
}

impl std::fmt::Display for Origin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Path(path) => write!(f, "path = {path:?}"),
            Self::CargoRegistry => write!(f, "cargo_registry = true"),
        }
    }
}

/// How documents lie in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// One file is one document.
    Text,
    /// One line is one JSON object with one document.
    Jsonl,
    /// One row is one document.
    Parquet,
}

impl Format {
    /// The format a file's extension tells: `.jsonl`, `.parquet`, and text for everything else.
    pub fn of(path: &Path) -> Self {
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("jsonl") => Self::Jsonl,
            Some("parquet") => Self::Parquet,
            _ => Self::Text,
        }
    }
}

/// The keys of a source as written.
#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct SourceFields {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    path: Option<String>,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    cargo_registry: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    format: Option<Format>,
    #[serde(default = "default_text_field")]
    text_field: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    max_bytes: Option<u64>,
}

fn default_text_field() -> String {
    "text".to_owned()
}

impl TryFrom<SourceFields> for Source {
    type Error = &'static str;

    fn try_from(fields: SourceFields) -> Result<Self, Self::Error> {
        let origin = match (fields.path, fields.cargo_registry) {
            (Some(path), false) => Origin::Path(path),
            (None, true) => Origin::CargoRegistry,
            (Some(_), true) => return Err("a source has path or cargo_registry, not both"),
            (None, false) => return Err("a source needs path = \"…\" or cargo_registry = true"),
        };
        let (format, text_field, max_bytes) = (fields.format, fields.text_field, fields.max_bytes);
        Ok(Self {
            origin,
            format,
            text_field,
            max_bytes,
        })
    }
}

impl From<Source> for SourceFields {
    fn from(source: Source) -> Self {
        let (path, cargo_registry) = match source.origin {
            Origin::Path(path) => (Some(path), false),
            Origin::CargoRegistry => (None, true),
        };
        let (format, text_field, max_bytes) = (source.format, source.text_field, source.max_bytes);
        Self {
            path,
            cargo_registry,
            format,
            text_field,
            max_bytes,
        }
    }
}
