//! How far training has come in its data: all that a checkpoint needs to go on with the very next window.

use serde::{Deserialize, Serialize};

use super::{error::DataError, packing::PackedDataset};

/// The number of windows consumed since the beginning of training.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cursor {
    /// Windows consumed, over all epochs.
    pub consumed: u64,
}

impl Cursor {
    /// The epoch and the window within it that come next.
    pub fn position(self, data: &PackedDataset) -> (u64, u64) {
        (self.consumed / data.len(), self.consumed % data.len())
    }

    /// The next `n` windows, across the end of an epoch where one lies between. On an error nothing is consumed.
    ///
    /// # Errors
    /// If the split holds a negative token.
    pub fn next(&mut self, data: &PackedDataset, n: usize) -> Result<Vec<Vec<u32>>, DataError> {
        let windows: Result<Vec<_>, _> = (self.consumed..)
            .take(n)
            .map(|consumed| {
                let (epoch, index) = Self { consumed }.position(data);
                data.window(epoch, index)
            })
            .collect();
        self.consumed += windows.as_ref().map_or(0, |windows| windows.len() as u64);
        windows
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::packing::tests::split;

    #[test]
    fn a_saved_cursor_goes_on_where_it_was_across_epochs() {
        let (_dir, shards) = split(&[5, 30, 2, 40, 9]);
        let data = PackedDataset::new(shards.clone(), 8, 4).unwrap();
        let mut whole = Cursor::default();
        let expected = whole.next(&data, 40).unwrap();
        assert!(data.len() < 20, "the test is to cross epochs");

        for stop in [0, 1, 9, 10, 11, 39] {
            let mut first = Cursor::default();
            let mut found = first.next(&data, stop).unwrap();
            let saved = serde_json::to_string(&first).unwrap();
            let again = PackedDataset::new(shards.clone(), 8, 4).unwrap();
            let mut resumed: Cursor = serde_json::from_str(&saved).unwrap();
            for _ in stop..40 {
                found.extend(resumed.next(&again, 1).unwrap());
            }
            assert_eq!(found, expected, "stopped at {stop}");
            assert_eq!(resumed, whole);
        }
    }

    #[test]
    fn positions() {
        let (_dir, shards) = split(&[21]);
        let data = PackedDataset::sequential(shards, 5).unwrap();
        let at = |consumed| Cursor { consumed }.position(&data);
        assert_eq!(
            [at(0), at(3), at(4), at(9)],
            [(0, 0), (0, 3), (1, 0), (2, 1)]
        );
    }
}
