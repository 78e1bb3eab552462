//! Writing a shard.

use std::{
    fs::{self, File},
    io::{BufWriter, Write},
    path::{Path, PathBuf},
};

use super::{Shards, Width, files, index};
use crate::data::error::DataError;

/// Writes documents one after the other. Without [`ShardWriter::finish`] only files with temporary names remain.
#[derive(Debug)]
pub struct ShardWriter {
    bin: PathBuf,
    idx: PathBuf,
    out: BufWriter<File>,
    width: Width,
    lengths: Vec<i32>,
}

impl ShardWriter {
    /// Begins `prefix.bin` and `prefix.idx`.
    ///
    /// # Errors
    /// If the file cannot be created.
    pub fn create(prefix: &Path, vocab_size: usize) -> Result<Self, DataError> {
        let (bin, idx) = files(prefix);
        let part = temporary(&bin);
        let file = File::create(&part).map_err(DataError::io(part, "create the shard"))?;
        let width = Width::of(vocab_size);
        let out = BufWriter::with_capacity(1 << 20, file);
        Ok(Self {
            bin,
            idx,
            out,
            width,
            lengths: Vec::new(),
        })
    }

    /// Appends one document.
    ///
    /// # Errors
    /// If it has too many tokens, a token does not fit, or the disk refuses.
    pub fn push(&mut self, tokens: &[u32]) -> Result<(), DataError> {
        let wrong = |field: String, found: String, expected: &str| DataError::Shard {
            path: self.bin.clone(),
            field,
            found,
            expected: expected.to_owned(),
        };
        let document = self.lengths.len();
        let length = i32::try_from(tokens.len()).map_err(|_| {
            let found = tokens.len().to_string();
            wrong(
                format!("length of document {document}"),
                found,
                "at most 2147483647 tokens",
            )
        })?;
        let mut bytes = Vec::with_capacity(tokens.len() * self.width.bytes());
        for &token in tokens {
            let token_wrong = |expected: &str| {
                wrong(
                    format!("a token of document {document}"),
                    token.to_string(),
                    expected,
                )
            };
            match self.width {
                Width::U16 => {
                    let narrow = u16::try_from(token).map_err(|_| token_wrong("below 65536"))?;
                    bytes.extend(narrow.to_le_bytes());
                }
                Width::I32 => {
                    let wide = i32::try_from(token).map_err(|_| token_wrong("below 2147483648"))?;
                    bytes.extend(wide.to_le_bytes());
                }
            }
        }
        let part = temporary(&self.bin);
        self.out
            .write_all(&bytes)
            .map_err(DataError::io(part, "write the shard"))?;
        self.lengths.push(length);
        Ok(())
    }

    /// Writes the index and gives both files their names.
    ///
    /// # Errors
    /// If the disk refuses.
    pub fn finish(self) -> Result<Shards, DataError> {
        let part = temporary(&self.bin);
        let bin = self
            .out
            .into_inner()
            .map_err(std::io::IntoInnerError::into_error);
        bin.and_then(|file| file.sync_all())
            .and_then(|()| fs::rename(&part, &self.bin))
            .map_err(DataError::io(&self.bin, "write the shard"))?;

        write_durably(&self.idx, &index::encode(self.width, &self.lengths))?;
        Shards::open(&self.bin.with_extension(""))
    }
}

fn temporary(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".part");
    name.into()
}

/// Writes a whole file under a temporary name, and renames it when it is on the disk.
pub(crate) fn write_durably(path: &Path, bytes: &[u8]) -> Result<(), DataError> {
    let part = temporary(path);
    let write = || {
        let mut file = File::create(&part)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&part, path)
    };
    write().map_err(DataError::io(path, "write"))
}
