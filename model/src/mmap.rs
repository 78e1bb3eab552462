//! Read-only memory-mapped files: how weights and token shards are read without copying them.

use std::{fs::File, io, path::Path};

/// A whole file mapped into memory for reading.
///
/// Files under the name of a checkpoint or shard are never rewritten in place by Deepburn: new contents come
/// under a temporary name and replace the old ones by a rename, so an open mapping keeps its old contents.
#[derive(Debug)]
pub struct MappedFile {
    // A mapping of length zero is refused by the operating system.
    map: Option<memmap2::Mmap>,
}

impl MappedFile {
    /// Maps the file at `path`.
    ///
    /// # Errors
    /// What opening or mapping the file answers.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        if file.metadata()?.len() == 0 {
            return Ok(Self { map: None });
        }
        // SAFETY: the mapping is read-only and private; as the type says, no process of ours changes a file
        // in place. A foreign process that truncates it can raise SIGBUS, as with every mapped file.
        #[allow(unsafe_code, reason = "mapping a file is unsafe by its nature")]
        let map = unsafe { memmap2::Mmap::map(&file)? };
        Ok(Self { map: Some(map) })
    }

    /// The contents.
    pub fn bytes(&self) -> &[u8] {
        self.map.as_deref().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn maps_contents_and_accepts_an_empty_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x");
        std::fs::write(&path, b"abc").unwrap();
        assert_eq!(MappedFile::open(&path).unwrap().bytes(), b"abc");
        std::fs::write(&path, b"").unwrap();
        assert_eq!(MappedFile::open(&path).unwrap().bytes(), b"");
        assert!(MappedFile::open(&dir.path().join("missing")).is_err());
    }
}
