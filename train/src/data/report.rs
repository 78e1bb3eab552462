//! What a preparation tells while it runs, and when it is done.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::corpus::Problem;

/// Problems beyond these are counted only.
pub(crate) const PROBLEMS_KEPT: usize = 1000;

/// Something that happened during a preparation.
#[derive(Clone, Debug)]
pub enum PrepareEvent {
    /// A stage begins.
    Stage {
        /// What is done.
        name: &'static str,
        /// How many bytes of files it takes; 0 if that is unknown. Reading can end earlier, at a bound.
        total: u64,
    },
    /// So many more bytes of the present stage are done.
    Advance(u64),
    /// Something could not be used and is left out.
    Problem(Problem),
    /// Nothing to do: the data lies prepared in this folder.
    Cached(PathBuf),
    /// The data is ready.
    Finished(PrepareReport),
}

/// What was prepared, from what. Stored as `prepared.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PrepareReport {
    /// The version of the prepared folder's layout.
    pub format_version: u32,
    /// The version of Deepburn that wrote it.
    pub deepburn_version: String,
    /// The seed of selection and infilling.
    pub seed: u64,
    /// The SHA-256 of `tokenizer.json`.
    pub tokenizer_sha256: String,
    /// One more than the highest token id.
    pub vocab_size: usize,
    /// The token that ends every document.
    pub eos_id: u32,
    /// The token that begins a text, where the tokenizer has one; documents do not begin with it.
    pub bos_id: Option<u32>,
    /// Files selected.
    pub files: u64,
    /// Files and documents left out because their content was there before.
    pub duplicates: u64,
    /// Files of the Cargo registry left out for their size.
    pub oversized_files: u64,
    /// Training documents rearranged for infilling.
    pub fim_documents: u64,
    /// The training split.
    pub train: SplitReport,
    /// The validation split.
    pub valid: SplitReport,
    /// Everything that could not be used.
    pub problem_count: u64,
    /// The first thousand of it.
    pub problems: Vec<Problem>,
}

/// The size of a split.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SplitReport {
    /// Documents.
    pub documents: u64,
    /// Bytes of their text.
    pub bytes: u64,
    /// Tokens, those that end documents and mark infilling included.
    pub tokens: u64,
}
