//! Read-only memory-mapped files: how weights and token shards are read without copying them.

use std::{fs::File, io, path::Path};

/// Linux maps so much around what is read.
const MAPPED_AROUND: usize = 64 << 10;

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

    /// Gives the memory of a part of the contents back, which will be read from the file again if it is needed again.
    /// Does nothing if `part` is no part of them. So is what the system has mapped with it on both sides.
    pub fn release(&self, part: &[u8]) {
        let contents = self.bytes().as_ptr_range();
        let (bounds, map) = (part.as_ptr_range(), self.map.as_ref());
        if let Some(map) = map
            && contents.start <= bounds.start
            && bounds.end <= contents.end
        {
            let offset = bounds.start.addr() - contents.start.addr();
            let end = (offset + part.len() + MAPPED_AROUND).min(map.len());
            let offset = offset.saturating_sub(MAPPED_AROUND);
            let advice = memmap2::UncheckedAdvice::DontNeed;
            #[allow(unsafe_code, reason = "the advice loses what was written to a mapping")]
            // SAFETY: nothing is written to this mapping, so that pages come back with the same contents.
            let released = unsafe { map.unchecked_advise_range(advice, offset, end - offset) };
            // Advice that is not taken costs memory and nothing else.
            let _ = released;
        }
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
        let file = MappedFile::open(&path).unwrap();
        file.release(&file.bytes()[1..]);
        file.release(b"elsewhere");
        assert_eq!(file.bytes(), b"abc");
        std::fs::write(&path, b"").unwrap();
        assert_eq!(MappedFile::open(&path).unwrap().bytes(), b"");
        assert!(MappedFile::open(&dir.path().join("missing")).is_err());
    }
}
