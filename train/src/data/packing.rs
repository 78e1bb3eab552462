//! Windows of equal length over the concatenated documents of a split.
//!
//! DeepSeek-V3 (report, 4.1) packs documents without masking attention between them. In every epoch the documents
//! are put into a new order and concatenated; window `i` holds the `sequence_length + 1` tokens from
//! `i * sequence_length` on, so that its last target is the first input of the next one and every token is an
//! input once. What is left at the end of the stream is shorter than a window and not used in that epoch; as
//! the order changes, other documents are at the end in the next.

use std::sync::{Arc, Mutex, PoisonError};

use super::{
    error::DataError,
    hash::{generator, shuffle},
    shards::Shards,
};

/// A split as windows, in an order that depends on the seed and the epoch alone.
#[derive(Debug)]
pub struct PackedDataset {
    shards: Shards,
    sequence_length: usize,
    seed: Option<u64>,
    // Training reads one epoch after the other, so the tables of one are enough.
    epoch: Mutex<Option<Arc<Epoch>>>,
}

/// The order of one epoch.
#[derive(Debug)]
struct Epoch {
    number: u64,
    /// Documents in the order of the stream.
    documents: Vec<usize>,
    /// Where each of them begins in the stream.
    starts: Vec<u64>,
    /// Windows of the stream in the order they are served; in order of the stream if absent.
    windows: Option<Vec<u64>>,
}

impl PackedDataset {
    /// Windows for training, shuffled anew in each epoch.
    ///
    /// # Errors
    /// If the split does not fill one window.
    ///
    /// # Panics
    /// If `sequence_length` is zero.
    pub fn new(shards: Shards, sequence_length: usize, seed: u64) -> Result<Self, DataError> {
        Self::build(shards, sequence_length, Some(seed))
    }

    /// Windows for validation: documents and windows in the order they were written, in every epoch.
    ///
    /// # Errors
    /// If the split does not fill one window.
    ///
    /// # Panics
    /// If `sequence_length` is zero.
    pub fn sequential(shards: Shards, sequence_length: usize) -> Result<Self, DataError> {
        Self::build(shards, sequence_length, None)
    }

    fn build(shards: Shards, sequence_length: usize, seed: Option<u64>) -> Result<Self, DataError> {
        assert!(sequence_length > 0, "a sequence has at least one token");
        let tokens = shards.tokens();
        if tokens <= sequence_length as u64 {
            let path = shards.path().to_owned();
            return Err(DataError::TooShort {
                path,
                tokens,
                sequence_length,
            });
        }
        Ok(Self {
            shards,
            sequence_length,
            seed,
            epoch: Mutex::new(None),
        })
    }

    /// Windows per epoch; at least one.
    #[expect(
        clippy::len_without_is_empty,
        reason = "a dataset has at least one window"
    )]
    pub fn len(&self) -> u64 {
        (self.shards.tokens() - 1) / self.sequence_length as u64
    }

    /// Tokens at the end of each epoch's stream that no window reaches; fewer than the sequence length.
    pub fn remainder(&self) -> u64 {
        (self.shards.tokens() - 1) % self.sequence_length as u64
    }

    /// Inputs per window; a window has one token more.
    pub fn sequence_length(&self) -> usize {
        self.sequence_length
    }

    /// The split.
    pub fn shards(&self) -> &Shards {
        &self.shards
    }

    /// The `index`-th window of an epoch: `sequence_length + 1` tokens.
    ///
    /// # Errors
    /// If the epoch has no such window, or the split holds a negative token.
    pub fn window(&self, epoch: u64, index: u64) -> Result<Vec<u32>, DataError> {
        if index >= self.len() {
            return Err(DataError::NoSuchWindow {
                index,
                len: self.len(),
            });
        }
        let epoch = self.epoch(epoch);
        let window = epoch
            .windows
            .as_ref()
            .map_or(index, |order| order[index as usize]);
        let length = self.sequence_length + 1;
        let start = window * self.sequence_length as u64;

        // The last document that begins at or before the window's first token; an empty one ends there too.
        let mut place = epoch.starts.partition_point(|&begin| begin <= start) - 1;
        let mut from = (start - epoch.starts[place]) as usize;
        let mut tokens = Vec::with_capacity(length);
        while tokens.len() < length {
            let document = epoch.documents[place];
            let until = self
                .shards
                .document_len(document)
                .min(from + length - tokens.len());
            self.shards.append(document, from..until, &mut tokens)?;
            (place, from) = (place + 1, 0);
        }
        Ok(tokens)
    }

    fn epoch(&self, number: u64) -> Arc<Epoch> {
        // A table is built completely before it is stored, so a panic elsewhere leaves nothing half done.
        let mut current = self.epoch.lock().unwrap_or_else(PoisonError::into_inner);
        let wanted = if self.seed.is_some() { number } else { 0 };
        match &*current {
            Some(epoch) if epoch.number == wanted => epoch.clone(),
            _ => current.insert(Arc::new(self.build_epoch(wanted))).clone(),
        }
    }

    fn build_epoch(&self, number: u64) -> Epoch {
        let mut documents: Vec<usize> = (0..self.shards.len()).collect();
        let windows = self.seed.map(|seed| {
            shuffle(&mut documents, &mut generator("documents", seed, number));
            let mut windows: Vec<u64> = (0..self.len()).collect();
            shuffle(&mut windows, &mut generator("windows", seed, number));
            windows
        });
        let mut end = 0;
        let starts = documents.iter().map(|&document| {
            let start = end;
            end += self.shards.document_len(document) as u64;
            start
        });
        let starts = starts.collect();
        Epoch {
            number,
            documents,
            starts,
            windows,
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::data::shards::ShardWriter;
    use proptest::prelude::*;

    /// A split whose tokens are all different, so that each can be followed.
    pub(crate) fn split(lengths: &[usize]) -> (tempfile::TempDir, Shards) {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = ShardWriter::create(&dir.path().join("x"), 70_000).unwrap();
        let mut next = 0;
        for &length in lengths {
            let document: Vec<u32> = (next..next + length as u32).collect();
            writer.push(&document).unwrap();
            next += length as u32;
        }
        let shards = writer.finish().unwrap();
        (dir, shards)
    }

    fn windows(data: &PackedDataset, epoch: u64) -> Vec<Vec<u32>> {
        (0..data.len())
            .map(|i| data.window(epoch, i).unwrap())
            .collect()
    }

    proptest! {
        #[test]
        fn every_token_is_an_input_once_up_to_the_remainder(
            lengths in prop::collection::vec(0usize..40, 1..30),
            sequence_length in 1usize..20,
            seed: u64,
            epoch in 0u64..5,
        ) {
            let total: usize = lengths.iter().sum();
            prop_assume!(total > sequence_length);
            let (_dir, shards) = split(&lengths);
            let data = PackedDataset::new(shards.clone(), sequence_length, seed).unwrap();
            let windows = windows(&data, epoch);
            prop_assert_eq!(windows.len() as u64, data.len());
            let mut inputs: Vec<u32> = Vec::new();
            let mut targets: Vec<u32> = Vec::new();
            for window in &windows {
                prop_assert_eq!(window.len(), sequence_length + 1);
                inputs.extend(&window[..sequence_length]);
                targets.extend(&window[1..]);
            }
            for mut tokens in [inputs, targets] {
                let count = tokens.len();
                tokens.sort_unstable();
                tokens.dedup();
                prop_assert_eq!(tokens.len(), count, "a token occurs twice");
                prop_assert_eq!(count as u64 + data.remainder() + 1, total as u64);
            }
            prop_assert!(data.remainder() < sequence_length as u64);
        }

        #[test]
        fn windows_follow_the_order_of_the_documents(
            lengths in prop::collection::vec(0usize..9, 1..20), sequence_length in 1usize..9,
        ) {
            let total: usize = lengths.iter().sum();
            prop_assume!(total > sequence_length);
            let (_dir, shards) = split(&lengths);
            let data = PackedDataset::sequential(shards, sequence_length).unwrap();
            for (i, window) in windows(&data, 3).into_iter().enumerate() {
                let start = (i * sequence_length) as u32;
                prop_assert_eq!(window, (start..=start + sequence_length as u32).collect::<Vec<_>>());
            }
        }
    }

    #[test]
    fn a_shuffled_window_is_a_run_of_whole_documents() {
        let (_dir, shards) = split(&[7; 50]);
        let data = PackedDataset::new(shards, 21, 5).unwrap();
        for window in windows(&data, 0) {
            // Stride 21 is three documents of 7: each begins at a multiple of 7 and runs to its end.
            for document in window[..21].chunks(7) {
                assert_eq!(document[0] % 7, 0);
                assert!(document.windows(2).all(|two| two[1] == two[0] + 1));
            }
            assert_eq!(window[21] % 7, 0);
        }
    }

    #[test]
    fn order_depends_on_seed_and_epoch_alone() {
        let sorted = |mut windows: Vec<Vec<u32>>| {
            windows.sort();
            windows
        };
        // Of one document, only the windows can change places; of many, the windows' contents change too.
        let (_one, one) = split(&[660]);
        let (_many, many) = split(&[11; 60]);
        for (shards, same_contents) in [(one, true), (many, false)] {
            let make = |seed| PackedDataset::new(shards.clone(), 16, seed).unwrap();
            let data = make(1);
            let first = windows(&data, 0);
            for other in [windows(&data, 1), windows(&make(2), 0)] {
                assert_ne!(other, first);
                assert_eq!(sorted(other) == sorted(first.clone()), same_contents);
            }
            // Going back to an earlier epoch, in another process or the same, gives it again.
            assert_eq!(windows(&data, 0), first);
            assert_eq!(windows(&make(1), 1), windows(&data, 1));
        }
    }

    #[test]
    fn too_short_and_out_of_range_are_errors() {
        let (_dir, shards) = split(&[8]);
        assert_eq!(PackedDataset::new(shards.clone(), 7, 0).unwrap().len(), 1);
        let error = PackedDataset::new(shards.clone(), 8, 0).unwrap_err();
        assert!(error.to_string().contains("8 tokens"), "{error}");
        assert!(error.to_string().contains("needs 9"), "{error}");
        let error = PackedDataset::sequential(shards, 7)
            .unwrap()
            .window(0, 1)
            .unwrap_err();
        assert!(matches!(
            error,
            DataError::NoSuchWindow { index: 1, len: 1 }
        ));
    }
}
