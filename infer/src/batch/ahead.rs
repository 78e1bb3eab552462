//! Drafting with the prediction modules (report section 2.2), for all texts of a batch together.
//!
//! Row i of module m joins the representation of row i from the module before it, or from the main model for the first,
//! with the embedding of token i + m + 1, and predicts token i + m + 2. Every module has its own latents. A row whose
//! token is known is computed once and stays; one whose token is only drafted is computed anew in the next step. With
//! rows up to p behind it, module m drafts token p + m + 2 in row p. The last module drafts further ones in rows p + 1,
//! p + 2, .. from its own representation in the row before.

use burn::tensor::{Int, Tensor, TensorData};
use deepburn_model::attention::{Layout, Span};

use super::{
    Batch,
    rows::{Row, Rows, indices},
    sequence::Sequence,
};
use crate::engine::EngineError;

/// What the prediction modules have read of a text.
#[derive(Debug, Default)]
pub(super) struct Ahead(Vec<Read>);

#[derive(Debug)]
struct Read {
    /// Rows that are computed for good.
    rows: usize,
    /// Representations for the rows after them, as far as the module before has computed its own for good. `[n, D]`
    waiting: Option<Tensor<2>>,
}

impl Ahead {
    /// The first `rows` rows are there for all `modules`.
    pub(super) fn new(modules: usize, rows: usize) -> Self {
        let read = |_| Read {
            rows,
            waiting: None,
        };
        Self((0..modules).map(read).collect())
    }

    /// Rows that all modules have computed; `None` without modules.
    pub(super) fn rows(&self) -> Option<usize> {
        self.0.iter().map(|read| read.rows).min()
    }

    /// Adds what the main model made of the tokens that are now cached. `[n, D]`
    pub(super) fn read(&mut self, hidden: Tensor<2>) {
        if let Some(first) = self.0.first_mut() {
            first.waiting = Some(joined(first.waiting.take(), hidden));
        }
    }
}

fn joined(first: Option<Tensor<2>>, second: Tensor<2>) -> Tensor<2> {
    match first {
        Some(first) => Tensor::cat(vec![first, second], 0),
        None => second,
    }
}

/// The part of one text in a pass of a module.
struct Part {
    /// Which running text.
    index: usize,
    /// Its first row.
    start: usize,
    /// Representations of its rows from the module before. `[n, D]`
    previous: Tensor<2>,
}

/// What a text's last pass gave: representations from row `start` on.
struct Passed {
    start: usize,
    hidden: Tensor<2>,
}

impl Batch<'_> {
    /// Brings the modules up to date; drafts tokens for every running text with only one token to compute, at most
    /// `depth` and as many as `room` says.
    pub(super) fn draft(&mut self, depth: usize, room: &[usize]) -> Result<(), EngineError> {
        let modules = self.modules();
        let deepest = room.iter().copied().max().unwrap_or(0).min(depth);
        let mut passed: Vec<Option<Passed>> = self.running.iter().map(|_| None).collect();
        for step in 0..modules.max(deepest) {
            let module = step.min(modules - 1);
            let mut parts = Vec::new();
            for (index, sequence) in self.running.iter_mut().enumerate() {
                let drafts = step < depth.min(room[index]);
                let before = passed[index].take();
                let part = match step < modules {
                    true => sequence.next_rows(module, before, drafts),
                    // The row after the last, from the module's own representation.
                    false => before.filter(|_| drafts).map(Passed::last),
                };
                parts.extend(part.map(|(start, previous)| Part {
                    index,
                    start,
                    previous,
                }));
            }
            if parts.is_empty() {
                continue;
            }
            let hidden = self.pass(module, &parts);
            let mut row = 0;
            let mut ends = Vec::new();
            for part in parts {
                let [rows, _] = part.previous.dims();
                let mine = hidden.clone().narrow(0, row, rows);
                row += rows;
                if step < depth.min(room[part.index]) {
                    ends.push((part.index, row - 1));
                }
                passed[part.index] = Some(Passed {
                    start: part.start,
                    hidden: mine,
                });
            }
            self.choose_drafts(&hidden, &ends)?;
        }
        Ok(())
    }

    /// Runs a module over rows of several texts. `[rows, D]`
    fn pass(&mut self, module: usize, parts: &[Part]) -> Tensor<2> {
        let (mut tokens, mut spans) = (Vec::new(), Vec::new());
        for part in parts {
            let sequence = &self.running[part.index];
            let [length, _] = part.previous.dims();
            let rows = part.start..part.start + length;
            tokens.extend(rows.map(|row| sequence.token(row + module + 1) as i32));
            spans.push(Span {
                pages: sequence.pages.clone(),
                start: part.start,
                length,
            });
        }
        let previous = parts.iter().map(|part| part.previous.clone()).collect();
        let previous = Tensor::cat(previous, 0).unsqueeze_dim::<3>(0);
        let shape = [1, tokens.len()];
        let tokens: Tensor<2, Int> =
            Tensor::from_data(TensorData::new(tokens, shape), &self.engine.device);
        let layout = Layout {
            page: self.pages.size(),
            spans,
        };
        let model = &self.engine.model;
        let output =
            model.predict_further_paged(module, (previous, tokens), &mut self.cache, &layout);
        output.hidden.squeeze_dim(0)
    }

    /// One more drafted token for the texts `ends` names, from the rows it names.
    fn choose_drafts(
        &mut self,
        hidden: &Tensor<2>,
        ends: &[(usize, usize)],
    ) -> Result<(), EngineError> {
        if ends.is_empty() {
            return Ok(());
        }
        let rows: Vec<usize> = ends.iter().map(|&(_, row)| row).collect();
        let plain: Vec<bool> = ends
            .iter()
            .map(|&(index, _)| self.running[index].is_greedy())
            .collect();
        let hidden = hidden.clone().select(0, indices(&rows, hidden));
        let results = Rows::new(&self.engine.model, hidden, &plain)?;
        for (at, &(index, _)) in ends.iter().enumerate() {
            let sequence = &mut self.running[index];
            let distribution = match results.row(at) {
                Row::Best(token) => vec![(token, 1.0)],
                Row::Logits(logits) => sequence.sampler.candidates(logits)?,
            };
            let token = sequence.sampler.draw(&distribution);
            sequence.drafts.push((token, distribution));
        }
        Ok(())
    }
}

impl Passed {
    /// The row after the last, and the representation of the last.
    fn last(self) -> (usize, Tensor<2>) {
        let [rows, _] = self.hidden.dims();
        let last = self.hidden.narrow(0, rows - 1, 1);
        (self.start + rows, last)
    }
}

impl Sequence<'_> {
    /// The rows that a module can compute now, with what goes into them; `None` if there is none. To draft, it needs all
    /// rows up to the last that is cached, even if their tokens are drafted themselves.
    fn next_rows(
        &mut self,
        module: usize,
        before: Option<Passed>,
        drafts: bool,
    ) -> Option<(usize, Tensor<2>)> {
        // What the module before has for good, and with it the rows that wait.
        let complete = match module.checked_sub(1) {
            Some(before) => self.ahead.0[before].rows,
            None => self.cached,
        };
        let read = &mut self.ahead.0[module];
        let waiting = read.waiting.take();
        let previous = match before {
            Some(passed) => joined(waiting, passed.hidden),
            None => waiting?,
        };
        let start = read.rows;
        let known = self.tokens.len().saturating_sub(module + 1);
        let end = if drafts { self.cached } else { known };
        let rows = end.saturating_sub(start).min(previous.dims()[0]);
        read.rows = known.min(start + rows).max(start);
        let behind = complete.saturating_sub(read.rows);
        read.waiting = (behind > 0).then(|| previous.clone().narrow(0, read.rows - start, behind));
        (rows > 0).then(|| (start, previous.narrow(0, 0, rows)))
    }
}
