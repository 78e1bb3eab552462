//! Token shards on disk: Megatron-LM's indexed dataset, a `.bin` of tokens and an `.idx` of where documents lie.
//!
//! The index, little-endian: the magic `MMIDIDX\0\0`, a version (`u64`, 1), a token type (`u8`: 8 for `u16`, 4 for
//! `i32`), the number of sequences and of document boundaries (`u64` each), then per sequence its length (`i32`)
//! and byte offset (`i64`), and the document boundaries as sequence indices (`i64`, from 0 on). Here one sequence
//! is one document.

mod index;
mod read;
mod write;

use std::path::{Path, PathBuf};

pub use read::Shards;
pub use write::ShardWriter;
pub(crate) use write::write_durably;

/// Megatron-LM stores tokens of a smaller vocabulary in 16 bits.
const WIDE_VOCABULARY: usize = 65500;

/// How a token is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Width {
    U16,
    I32,
}

impl Width {
    fn of(vocab_size: usize) -> Self {
        if vocab_size < WIDE_VOCABULARY {
            Self::U16
        } else {
            Self::I32
        }
    }

    fn code(self) -> u8 {
        match self {
            Self::U16 => 8,
            Self::I32 => 4,
        }
    }

    fn bytes(self) -> usize {
        match self {
            Self::U16 => 2,
            Self::I32 => 4,
        }
    }
}

/// The files of a shard: `prefix` with `.bin` and with `.idx` after it.
fn files(prefix: &Path) -> (PathBuf, PathBuf) {
    let with = |end| {
        let mut name = prefix.as_os_str().to_owned();
        name.push(end);
        PathBuf::from(name)
    };
    (with(".bin"), with(".idx"))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::data::error::DataError;

    fn write(prefix: &Path, vocab_size: usize, documents: &[Vec<u32>]) -> Shards {
        let mut writer = ShardWriter::create(prefix, vocab_size).unwrap();
        documents
            .iter()
            .for_each(|document| writer.push(document).unwrap());
        writer.finish().unwrap()
    }

    #[test]
    fn documents_come_back_in_both_widths() {
        let dir = tempfile::tempdir().unwrap();
        let documents = [vec![1, 2, 3], vec![], vec![65_499], vec![0; 1000]];
        for (vocab_size, width) in [(65_499, 2), (65_500, 4)] {
            let prefix = dir.path().join(format!("a.b{width}"));
            let shards = write(&prefix, vocab_size, &documents);
            assert_eq!((shards.len(), shards.tokens()), (4, 1004));
            assert_eq!(fs::metadata(shards.path()).unwrap().len(), 1004 * width);
            for (i, document) in documents.iter().enumerate() {
                assert_eq!(shards.document(i).unwrap(), *document);
            }
            let mut part = vec![7];
            shards.append(0, 1..2, &mut part).unwrap();
            assert_eq!(part, [7, 2]);
        }
        assert_eq!(
            fs::read_dir(dir.path()).unwrap().count(),
            4,
            "a temporary file was left"
        );
    }

    #[test]
    fn the_index_is_megatrons() {
        let dir = tempfile::tempdir().unwrap();
        let prefix = dir.path().join("x");
        write(&prefix, 1000, &[vec![258], vec![3, 4]]);
        assert_eq!(
            fs::read(dir.path().join("x.bin")).unwrap(),
            [2, 1, 3, 0, 4, 0]
        );
        let mut expected = b"MMIDIDX\0\0".to_vec();
        expected.extend([1, 0, 0, 0, 0, 0, 0, 0, 8]);
        for number in [2u64, 3] {
            expected.extend(number.to_le_bytes());
        }
        expected.extend([1, 0, 0, 0, 2, 0, 0, 0]);
        for number in [0u64, 2, 0, 1, 2] {
            expected.extend(number.to_le_bytes());
        }
        assert_eq!(fs::read(dir.path().join("x.idx")).unwrap(), expected);
    }

    #[test]
    fn no_document_is_a_shard_too() {
        let dir = tempfile::tempdir().unwrap();
        let shards = write(&dir.path().join("x"), 1000, &[]);
        assert!(shards.is_empty());
        assert_eq!(shards.tokens(), 0);
    }

    #[test]
    fn every_changed_byte_of_an_index_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let prefix = dir.path().join("x");
        write(&prefix, 1000, &[vec![1, 2, 3], vec![], vec![4; 9]]);
        let path = dir.path().join("x.idx");
        let good = fs::read(&path).unwrap();
        for at in 0..good.len() {
            for change in [1, 12, 0x80, 0xff] {
                let mut bad = good.clone();
                bad[at] ^= change;
                fs::write(&path, bad).unwrap();
                let error = Shards::open(&prefix).expect_err("byte {at} ^ {change}");
                assert!(matches!(error, DataError::Shard { .. }), "{at}: {error}");
            }
        }
    }

    #[test]
    fn errors_name_the_field() {
        let dir = tempfile::tempdir().unwrap();
        let prefix = dir.path().join("x");
        write(&prefix, 1000, &[vec![1, 2, 3]]);
        let (bin, idx) = files(&prefix);
        let good = fs::read(&idx).unwrap();
        let patched = |at: usize, bytes: &[u8]| {
            let mut bad = good.clone();
            bad[at..at + bytes.len()].copy_from_slice(bytes);
            bad
        };
        for (bad, field) in [
            (Vec::new(), "size is 0 bytes"),
            (good[..33].to_vec(), "size is 33 bytes"),
            (
                good[..good.len() - 1].to_vec(),
                "size is 61 bytes, expected 62",
            ),
            (
                [good.clone(), vec![0]].concat(),
                "size is 63 bytes, expected 62",
            ),
            (patched(0, b"N"), "magic is NMIDIDX"),
            (patched(9, &[2]), "version is 2, expected 1"),
            (patched(17, &[6]), "token type is 6, expected 8 or 4"),
            (
                patched(17, &[4]),
                "size of the .bin is 6 bytes, expected 12",
            ),
            (patched(18, &[0xff; 16]), "number of document boundaries"),
            (
                patched(18, &[0xfe, 255, 255, 255, 255, 255, 255, 255].repeat(2)),
                "boundaries",
            ),
            (
                patched(26, &[1]),
                "number of document boundaries is 1, expected 2",
            ),
            (patched(34, &[0xff; 4]), "length of document 0 is -1"),
            (patched(34, &[4]), "size of the .bin is 6 bytes, expected 8"),
            (patched(38, &[2]), "offset of document 0 is 2, expected 0"),
            (patched(54, &[5]), "document boundary 1 is 5, expected 1"),
        ] {
            fs::write(&idx, bad).unwrap();
            let error = Shards::open(&prefix).unwrap_err().to_string();
            assert!(
                error.contains(field) && error.contains("x.idx"),
                "{field}: {error}"
            );
        }
        fs::write(&idx, &good).unwrap();
        fs::write(&bin, [0; 5]).unwrap();
        let error = Shards::open(&prefix).unwrap_err().to_string();
        assert!(
            error.contains("size of the .bin is 5 bytes, expected 6"),
            "{error}"
        );
        fs::remove_file(&bin).unwrap();
        let error = Shards::open(&prefix).unwrap_err().to_string();
        assert!(error.contains("x.bin"), "{error}");
    }

    #[test]
    fn tokens_that_do_not_fit_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let prefix = dir.path().join("x");
        let mut writer = ShardWriter::create(&prefix, 1000).unwrap();
        assert!(
            writer
                .push(&[65_536])
                .unwrap_err()
                .to_string()
                .contains("65536")
        );
        let shards = write(&prefix, 70_000, &[vec![1, 2]]);
        drop(shards);
        fs::write(dir.path().join("x.bin"), [1, 0, 0, 0, 255, 255, 255, 255]).unwrap();
        let error = Shards::open(&prefix)
            .unwrap()
            .document(0)
            .unwrap_err()
            .to_string();
        assert!(error.contains("a token of document 0 is -1"), "{error}");
    }
}
