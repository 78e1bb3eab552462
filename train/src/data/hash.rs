//! SHA-256 of contents, and random numbers that stay the same across versions of `rand`.

use std::{fs::File, io, io::Read, path::Path};

use rand::{RngCore, SeedableRng};
use rand_chacha::ChaCha8Rng;
use sha2::{Digest, Sha256};

/// A SHA-256 digest.
pub(crate) type Sha = [u8; 32];

/// The digest of bytes in memory.
pub(crate) fn sha256(bytes: &[u8]) -> Sha {
    Sha256::digest(bytes).into()
}

/// The digest and length of a file, read in pieces; `on_read` hears of every piece.
pub(crate) fn sha256_file(path: &Path, on_read: &mut dyn FnMut(u64)) -> io::Result<(Sha, u64)> {
    let mut file = File::open(path)?;
    let mut digest = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    let mut length = 0;
    loop {
        let n = file.read(&mut buffer)?;
        if n == 0 {
            return Ok((digest.finalize().into(), length));
        }
        digest.update(&buffer[..n]);
        length += n as u64;
        on_read(n as u64);
    }
}

/// Lower-case hexadecimal.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The first eight bytes of a digest as a number in [0, 1).
pub(crate) fn unit_interval(sha: &Sha) -> f64 {
    let mut first = [0; 8];
    first.copy_from_slice(&sha[..8]);
    // 53 bits: every such number is exact in an f64, and 1.0 cannot come out.
    (u64::from_le_bytes(first) >> 11) as f64 / (1u64 << 53) as f64
}

/// A generator of its own for each purpose and index, so that no two draws share a stream.
pub(crate) fn generator(purpose: &str, seed: u64, index: u64) -> ChaCha8Rng {
    let mut digest = Sha256::new();
    digest.update(purpose.as_bytes());
    digest.update(seed.to_le_bytes());
    digest.update(index.to_le_bytes());
    ChaCha8Rng::from_seed(digest.finalize().into())
}

/// A uniform number below `bound`, by Lemire's multiplication with rejection.
///
/// Written out, as `rand` may change its own algorithm in any minor version, and with it the order of a
/// training run that is resumed.
pub(crate) fn below(random: &mut impl RngCore, bound: u64) -> u64 {
    let threshold = bound.wrapping_neg() % bound;
    loop {
        let product = u128::from(random.next_u64()) * u128::from(bound);
        if product as u64 >= threshold {
            return (product >> 64) as u64;
        }
    }
}

/// Fisher and Yates' shuffle.
pub(crate) fn shuffle<T>(items: &mut [T], random: &mut impl RngCore) {
    for i in (1..items.len()).rev() {
        items.swap(i, below(random, i as u64 + 1) as usize);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sha256_of_a_file_is_that_of_its_bytes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x");
        std::fs::write(&path, b"abc").unwrap();
        let mut read = 0;
        let (sha, length) = sha256_file(&path, &mut |n| read += n).unwrap();
        assert_eq!((sha, length, read), (sha256(b"abc"), 3, 3));
        // FIPS 180-2, appendix B.1.
        assert!(hex(&sha).starts_with("ba7816bf8f01cfea"));
    }

    #[test]
    fn draws_are_uniform_and_separate_per_purpose() {
        let mut counts = [0u32; 7];
        let mut random = generator("test", 1, 2);
        for _ in 0..70_000 {
            counts[below(&mut random, 7) as usize] += 1;
        }
        // Six standard deviations of a binomial with n = 70000, p = 1/7 are 555.
        assert!(
            counts.iter().all(|&n| n.abs_diff(10_000) < 555),
            "{counts:?}"
        );
        let first = |purpose, seed, index| generator(purpose, seed, index).next_u64();
        assert_ne!(first("a", 0, 0), first("b", 0, 0));
        assert_ne!(first("a", 0, 1), first("a", 1, 0));
    }

    #[test]
    fn every_order_and_every_remainder_is_equally_likely() {
        let mut orders = std::collections::HashMap::new();
        let mut remainders = [0u32; 3];
        // A bound of three quarters of all numbers: without rejection every third result comes twice as often.
        let bound = 3u64 << 62;
        for seed in 0..6000 {
            let mut random = generator("test", seed, 0);
            let mut items = [0, 1, 2];
            shuffle(&mut items, &mut random);
            *orders.entry(items).or_insert(0u32) += 1;
            remainders[(below(&mut random, bound) % 3) as usize] += 1;
        }
        // Five standard deviations: 145 of a sixth, 183 of a third.
        assert!(
            orders.len() == 6 && orders.values().all(|n| n.abs_diff(1000) < 145),
            "{orders:?}"
        );
        assert!(
            remainders.iter().all(|n| n.abs_diff(2000) < 183),
            "{remainders:?}"
        );
    }

    #[test]
    fn shuffles_are_pinned() {
        let mut items: Vec<u32> = (0..8).collect();
        shuffle(&mut items, &mut generator("test", 3, 0));
        let mut sorted = items.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, (0..8).collect::<Vec<_>>());
        // From a ChaCha8 and a shuffle written independently in Python. A change here reorders every training run
        // that is resumed.
        assert_eq!(items, [3, 1, 6, 4, 0, 7, 5, 2]);
    }

    #[test]
    fn unit_interval_excludes_one() {
        assert_eq!(unit_interval(&[0; 32]), 0.0);
        assert!(unit_interval(&[255; 32]) < 1.0);
    }
}
