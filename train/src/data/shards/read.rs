//! Reading a shard.

use std::{
    ops::Range,
    path::{Path, PathBuf},
    sync::Arc,
};

use deepburn_model::mmap::MappedFile;

use super::{
    Width, files,
    index::{self, Wrong, array},
};
use crate::data::error::DataError;

/// Documents of tokens, mapped into memory. Cloning shares the mapping.
#[derive(Clone, Debug)]
pub struct Shards {
    bin_path: PathBuf,
    bin: Arc<MappedFile>,
    idx: Arc<MappedFile>,
    width: Width,
    len: usize,
    tokens: u64,
}

impl Shards {
    /// Opens `prefix.bin` and `prefix.idx`, and checks every entry of the index.
    ///
    /// # Errors
    /// With the field of the format that is not as it must be.
    pub fn open(prefix: &Path) -> Result<Self, DataError> {
        let (bin_path, idx_path) = files(prefix);
        let map =
            |path: &Path| MappedFile::open(path).map_err(DataError::io(path, "open the shard"));
        let (bin, idx) = (Arc::new(map(&bin_path)?), Arc::new(map(&idx_path)?));
        let (width, len) = index::check(idx.bytes(), bin.bytes().len() as u64).map_err(
            |Wrong {
                 field,
                 found,
                 expected,
             }| DataError::Shard {
                path: idx_path,
                field,
                found,
                expected,
            },
        )?;
        let tokens = (bin.bytes().len() / width.bytes()) as u64;
        Ok(Self {
            bin_path,
            bin,
            idx,
            width,
            len,
            tokens,
        })
    }

    /// The number of documents.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is no document.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The number of tokens in all documents.
    pub fn tokens(&self) -> u64 {
        self.tokens
    }

    /// The `.bin` file.
    pub fn path(&self) -> &Path {
        &self.bin_path
    }

    /// The number of tokens of a document.
    ///
    /// # Panics
    /// If there is no such document.
    pub fn document_len(&self, document: usize) -> usize {
        assert!(document < self.len, "document {document} of {}", self.len);
        index::length(self.idx.bytes(), document)
    }

    /// All tokens of a document.
    ///
    /// # Errors
    /// If the file holds a negative token.
    ///
    /// # Panics
    /// If there is no such document.
    pub fn document(&self, document: usize) -> Result<Vec<u32>, DataError> {
        let mut tokens = Vec::new();
        self.append(document, 0..self.document_len(document), &mut tokens)?;
        Ok(tokens)
    }

    /// Appends some tokens of a document to `out`.
    ///
    /// # Errors
    /// If the file holds a negative token.
    ///
    /// # Panics
    /// If there is no such document, or the range ends beyond it.
    pub fn append(
        &self,
        document: usize,
        range: Range<usize>,
        out: &mut Vec<u32>,
    ) -> Result<(), DataError> {
        let length = self.document_len(document);
        assert!(range.end <= length, "token {} of {length}", range.end);
        let offset = index::offset(self.idx.bytes(), self.len, document);
        let width = self.width.bytes();
        let bytes = &self.bin.bytes()[offset + range.start * width..offset + range.end * width];
        match self.width {
            Width::U16 => {
                out.extend(
                    bytes
                        .chunks_exact(2)
                        .map(|b| u32::from(u16::from_le_bytes(array(b, 0)))),
                );
            }
            Width::I32 => {
                for chunk in bytes.chunks_exact(4) {
                    let token = i32::from_le_bytes(array(chunk, 0));
                    out.push(u32::try_from(token).map_err(|_| DataError::Shard {
                        path: self.bin_path.clone(),
                        field: format!("a token of document {document}"),
                        found: token.to_string(),
                        expected: "not negative".to_owned(),
                    })?);
                }
            }
        }
        Ok(())
    }
}
