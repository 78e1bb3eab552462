//! Batches of windows in the run's order, as a data loader of Burn.

use std::sync::Arc;

use burn::{
    data::{
        dataloader::{DataLoader, DataLoaderIterator, Progress},
        dataset::DatasetError,
    },
    tensor::Device,
};

use crate::{
    data::{Cursor, PackedDataset},
    learner::Batch,
};

/// Batches from window `start` to window `end` of the run.
#[derive(Clone)]
pub struct WindowLoader {
    data: Arc<PackedDataset>,
    sequences: usize,
    start: u64,
    end: u64,
    stride: u64,
    /// Which part of each batch is read, of how many.
    share: (usize, usize),
    document_end: Option<u32>,
}

impl WindowLoader {
    /// Batches of `sequences` windows. `document_end` is the token that ends documents, where attention is to stay
    /// within them.
    pub fn new(
        data: Arc<PackedDataset>,
        sequences: usize,
        windows: std::ops::Range<u64>,
        document_end: Option<u32>,
    ) -> Self {
        Self {
            data,
            sequences,
            start: windows.start,
            end: windows.end,
            stride: 1,
            share: (0, 1),
            document_end,
        }
    }

    /// Every `count` batches as one, of which part `which` of `of` equal parts is read.
    pub fn grouped(self, count: usize, which: usize, of: usize) -> Self {
        Self {
            sequences: self.sequences * count,
            share: (which, of),
            ..self
        }
    }

    /// At most `count` windows, evenly spread over the data.
    pub fn spread(self, count: u64) -> Self {
        let count = count.clamp(1, self.data.len());
        Self {
            start: 0,
            end: count,
            stride: self.data.len() / count,
            ..self
        }
    }
}

impl DataLoader<Batch> for WindowLoader {
    fn iter<'a>(&'a self) -> Box<dyn DataLoaderIterator<Batch> + 'a> {
        Box::new(Windows {
            loader: self,
            cursor: Cursor {
                consumed: self.start,
            },
        })
    }

    fn num_items(&self) -> usize {
        (self.end - self.start) as usize
    }

    /// Batches are made of numbers; the step puts them on its model's device.
    fn to_device(&self, _: &Device) -> Arc<dyn DataLoader<Batch>> {
        Arc::new(self.clone())
    }

    fn slice(&self, start: usize, end: usize) -> Arc<dyn DataLoader<Batch>> {
        let (start, end) = (self.start + start as u64, self.start + end as u64);
        Arc::new(Self {
            start,
            end: end.min(self.end),
            ..self.clone()
        })
    }
}

struct Windows<'a> {
    loader: &'a WindowLoader,
    cursor: Cursor,
}

impl Iterator for Windows<'_> {
    type Item = Result<Batch, DatasetError>;

    fn next(&mut self) -> Option<Self::Item> {
        let left = self.loader.end - self.cursor.consumed;
        let count = left.min(self.loader.sequences as u64) as usize;
        if count == 0 {
            return None;
        }
        let (which, of) = self.loader.share;
        let part = count / of;
        let windows: Result<Vec<_>, _> = (self.cursor.consumed + (which * part) as u64..)
            .take(part)
            .map(|window| Cursor {
                consumed: window * self.loader.stride,
            })
            .map(|mut cursor| {
                cursor
                    .next(&self.loader.data, 1)
                    .map(|mut windows| windows.remove(0))
            })
            .collect();
        self.cursor.consumed += count as u64;
        let document_end = self.loader.document_end;
        Some(match windows {
            Ok(windows) => Ok(Batch {
                windows,
                document_end,
            }),
            Err(error) => Err(DatasetError::new(error)),
        })
    }
}

impl DataLoaderIterator<Batch> for Windows<'_> {
    fn progress(&self) -> Progress {
        let done = (self.cursor.consumed - self.loader.start) as usize;
        Progress::new(done, self.loader.num_items(), Some("windows".into()))
    }
}
