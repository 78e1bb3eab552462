//! Texts that are continued together (continuous batching).
//!
//! A step is one pass of the model over rows of all running texts: the last token of those that are being continued, with
//! the tokens drafted after it, and a piece of the prompt of those that have just begun. Rows of different texts meet
//! only in products with weights; what a text attends to is in its own pages of the cache.

mod ahead;
mod drafting;
mod rows;
mod sequence;
mod single;
#[cfg(test)]
pub(crate) mod tests;

use std::{collections::VecDeque, ops::ControlFlow, time::Instant};

use burn::tensor::{Int, Tensor, TensorData};
use deepburn_kernels::awake::awake;
use deepburn_model::{
    attention::{Layout, PagedCache, Span},
    moe::MoeOutput,
};

use crate::{
    engine::{Engine, EngineError, Finish, GenerateOptions, Summary},
    logprobs::TokenInfo,
    pages::Pages,
    speculation::{Drafts, Speculation},
};
use drafting::Drafting;
use rows::{Rows, indices};
use sequence::Sequence;
pub use single::generate;

/// How texts are continued together.
#[derive(Clone, Copy, Debug)]
pub struct BatchConfig {
    /// Texts that are continued at once.
    pub max_batch: usize,
    /// Tokens whose latents are held, of running texts and of kept prefixes together; whole pages of them.
    pub cached_tokens: usize,
    /// Prompt tokens per step: more read prompts faster, fewer delay the running texts less.
    pub prefill_chunk: usize,
    /// Tokens per page: prompts that begin alike share whole pages.
    pub page: usize,
    /// Whether tokens are drafted ahead of the model.
    pub speculate: Speculation,
}

impl Default for BatchConfig {
    fn default() -> Self {
        Self {
            max_batch: 8,
            cached_tokens: 32768,
            prefill_chunk: 512,
            page: 64,
            speculate: Speculation::Off,
        }
    }
}

/// A text to continue.
#[derive(Clone, Debug)]
pub struct Request {
    /// Its tokens, at least one; see [`Engine::encode`]. `add_bos` of the options plays no part.
    pub prompt: Vec<u32>,
    /// How it is continued.
    pub options: GenerateOptions,
    /// Whether pieces tell the probability of their tokens, and of how many others.
    pub logprobs: Option<usize>,
}

/// What happens to a text, in order; [`Event::Finished`] or [`Event::Failed`] is the last.
#[derive(Debug)]
pub enum Event {
    /// New tokens, and the text that they decide: it may be empty, as a token may end inside a character.
    Piece {
        /// New text.
        text: String,
        /// New tokens.
        tokens: Vec<TokenInfo>,
    },
    /// The text ended.
    Finished(Summary),
    /// It could not go on.
    Failed(EngineError),
}

/// Who wants a text.
pub trait Listener {
    /// Takes an event; `Break` ends the text.
    fn tell(&mut self, event: Event) -> ControlFlow<()>;

    /// Whether the text is not wanted any more.
    fn is_gone(&self) -> bool {
        false
    }
}

impl<F: FnMut(Event) -> ControlFlow<()>> Listener for F {
    fn tell(&mut self, event: Event) -> ControlFlow<()> {
        self(event)
    }
}

/// What a batch has done.
#[derive(Clone, Debug, Default)]
pub struct Totals {
    /// Texts that ended.
    pub finished: u64,
    /// Tokens of prompts, those from kept prefixes included.
    pub prompt_tokens: u64,
    /// Of those, the ones whose latents were there already.
    pub reused_tokens: u64,
    /// Prompts of which a part was there already.
    pub prefix_hits: u64,
    /// New tokens.
    pub new_tokens: u64,
    /// Texts that had to give up their room to others and were computed again.
    pub interrupted: u64,
    /// Passes of the model.
    pub steps: u64,
    /// What became of drafted tokens.
    pub drafts: Drafts,
    /// Tokens that each routed expert received, for every mixture-of-experts layer of the main model.
    pub expert_loads: Vec<Vec<u64>>,
}

/// Texts in progress and the cache they share.
pub struct Batch<'e> {
    engine: &'e Engine,
    config: BatchConfig,
    cache: PagedCache,
    pages: Pages,
    waiting: VecDeque<Sequence<'e>>,
    running: Vec<Sequence<'e>>,
    drafting: Drafting,
    totals: Totals,
    /// Expert loads that are not in the totals yet.
    loads: Vec<Tensor<1, Int>>,
}

impl<'e> Batch<'e> {
    /// A batch without texts.
    pub fn new(engine: &'e Engine, config: BatchConfig) -> Self {
        let pages = config.cached_tokens.div_ceil(config.page).max(1);
        Self {
            engine,
            config,
            cache: engine.model.new_paged_cache(pages),
            pages: Pages::new(pages, config.page),
            waiting: VecDeque::new(),
            running: Vec::new(),
            drafting: Drafting::new(config.speculate, engine.model.mtp.len()),
            totals: Totals::default(),
            loads: Vec::new(),
        }
    }

    /// Adds a text; it starts when there is room.
    ///
    /// # Errors
    /// A prompt or options that do not fit the model or the cache.
    pub fn add(
        &mut self,
        request: Request,
        listener: Box<dyn Listener + 'e>,
    ) -> Result<(), EngineError> {
        self.add_submitted(request, listener, Instant::now())
    }

    /// As [`Batch::add`] for a text that has waited since `submitted`.
    pub(crate) fn add_submitted(
        &mut self,
        request: Request,
        listener: Box<dyn Listener + 'e>,
        submitted: Instant,
    ) -> Result<(), EngineError> {
        let limits = self.engine.limits().within(self.config.cached_tokens);
        limits.check(&request.prompt)?;
        request.options.validate()?;
        let mut sequence = Sequence::new(self.engine, request, limits.longest, listener)?;
        sequence.submitted(submitted);
        self.waiting.push_back(sequence);
        Ok(())
    }

    /// Whether another text could start, as far as their number goes.
    pub fn has_place(&self) -> bool {
        self.running() + self.waiting.len() < self.config.max_batch
    }

    /// Texts that are continued now.
    pub fn running(&self) -> usize {
        self.running.len()
    }

    /// Whether a prompt is not read to its end.
    pub fn is_reading(&self) -> bool {
        !self.waiting.is_empty() || !self.running.iter().all(Sequence::is_decoding)
    }

    /// Whether there is nothing to do.
    pub fn is_idle(&self) -> bool {
        self.running.is_empty() && self.waiting.is_empty()
    }

    /// Tokens whose latents are held, in whole pages, and the most that may be.
    pub fn cached_tokens(&self) -> (usize, usize) {
        let size = self.pages.size();
        let all = self.config.cached_tokens.div_ceil(size).max(1);
        (self.pages.used() * size, all * size)
    }

    /// What was done so far, with expert loads as they were when [`Batch::totals`] last read them from the device.
    pub fn counts(&self) -> &Totals {
        &self.totals
    }

    /// What was done so far.
    ///
    /// # Errors
    /// A device that fails.
    pub fn totals(&mut self) -> Result<Totals, EngineError> {
        for (layer, load) in std::mem::take(&mut self.loads).into_iter().enumerate() {
            let data = load.try_into_data().map_err(EngineError::Device)?;
            let load = data.iter::<i64>().map(|count| count as u64);
            match self.totals.expert_loads.get_mut(layer) {
                Some(total) => total.iter_mut().zip(load).for_each(|(sum, n)| *sum += n),
                None => self.totals.expert_loads.push(load.collect()),
            }
        }
        Ok(self.totals.clone())
    }

    /// One pass of the model, and what follows from it. What fails is told to the texts that it concerns.
    pub fn step(&mut self) {
        self.drop_abandoned();
        self.admit();
        if self.running.is_empty() {
            return;
        }
        let _awake = awake(&self.engine.device);
        if let Err(error) = self.try_step() {
            let message = error.to_string();
            for sequence in std::mem::take(&mut self.running) {
                self.end(sequence, Err(EngineError::Step(message.clone())));
            }
        }
    }

    fn drop_abandoned(&mut self) {
        let gone = |sequence: &mut Sequence<'e>| sequence.is_abandoned();
        let mut gone_now: Vec<Sequence<'e>> = self.running.extract_if(.., gone).collect();
        let (gone, waiting) = std::mem::take(&mut self.waiting)
            .into_iter()
            .partition::<Vec<_>, _>(Sequence::is_abandoned);
        self.waiting = waiting.into();
        gone_now.extend(gone);
        for sequence in gone_now {
            self.end(sequence, Ok(Finish::Cancelled));
        }
    }

    /// Starts waiting texts while there is room for them.
    fn admit(&mut self) {
        while self.running.len() < self.config.max_batch {
            let Some(mut sequence) = self.waiting.pop_front() else {
                return;
            };
            if let Some(finish) = sequence.ends_at_once() {
                self.end(sequence, Ok(finish));
                continue;
            }
            let modules = self.modules();
            let found = self.pages.find(&sequence.tokens, modules);
            let needed = (sequence.tokens.len() + 1).div_ceil(self.pages.size());
            if !self.running.is_empty() && self.pages.available() + found.len() < needed {
                self.pages.release(&found);
                self.waiting.push_front(sequence);
                return;
            }
            let cached = found.len() * self.pages.size();
            self.totals.prefix_hits += u64::from(cached > 0);
            self.totals.reused_tokens += cached as u64;
            let positions = sequence.tokens.len() + 1;
            sequence.start(found, cached, modules);
            self.running.push(sequence);
            self.reserve(self.running.len() - 1, positions);
        }
    }

    fn try_step(&mut self) -> Result<(), EngineError> {
        let began = Instant::now();
        let lengths = self.choose_rows();
        if lengths.is_empty() {
            return Ok(());
        }
        let drafted = self.running.iter().any(|s| !s.drafts.is_empty());
        let decoding_only = self.running.iter().all(Sequence::is_decoding);
        let hidden = self.forward(&lengths)?;

        // The rows whose results are looked at: all of a text that is continued, the last of a finished prompt.
        let (mut asked, mut plain, mut results) = (Vec::new(), Vec::new(), Vec::new());
        let mut row = 0;
        for (sequence, &length) in self.running.iter().zip(&lengths) {
            let wanted = match sequence.is_decoding() {
                true => length,
                false => usize::from(length == sequence.missing()),
            };
            results.push(asked.len()..asked.len() + wanted);
            asked.extend(row + length - wanted..row + length);
            plain.extend(vec![sequence.is_plain(); wanted]);
            row += length;
        }
        let rows = match asked.len() {
            0 => None,
            all if all == row => Some(hidden.clone()),
            _ => Some(hidden.clone().select(0, indices(&asked, &hidden))),
        };
        let rows = rows.map(|rows| Rows::new(&self.engine.model, rows, &plain));
        let rows = rows.transpose()?;

        let (mut row, mut new) = (0, 0);
        let mut ended: Vec<(usize, Result<Finish, EngineError>)> = Vec::new();
        for (index, (sequence, &length)) in self.running.iter_mut().zip(&lengths).enumerate() {
            let (before, was) = (sequence.cached, sequence.tokens.len());
            let prompt_ends = length == sequence.missing() && !sequence.is_decoding();
            if results[index].is_empty() {
                sequence.cached += length;
            } else {
                // All of a prompt but its last token, of which `advance` counts the one result.
                sequence.cached += if prompt_ends { length - 1 } else { 0 };
                let rows = rows.as_ref().expect("rows were asked for");
                let rows: Vec<_> = results[index].clone().map(|at| rows.row(at)).collect();
                match sequence.advance(&rows, &self.engine.eos) {
                    Ok(None) => {}
                    Ok(Some(finish)) => ended.push((index, Ok(finish))),
                    Err(error) => ended.push((index, Err(error))),
                }
            }
            if sequence.cached > before {
                let read = sequence.cached - before;
                sequence.ahead.read(hidden.clone().narrow(0, row, read));
            }
            new += (sequence.tokens.len() - was) as u64;
            row += length;
        }
        self.totals.new_tokens += new;
        for (index, result) in ended.into_iter().rev() {
            self.keep_prefix(index);
            let sequence = self.running.remove(index);
            self.end(sequence, result);
        }
        let drafting = self.draft_next()?;
        (0..self.running.len()).for_each(|index| self.keep_prefix(index));
        if decoding_only {
            let kind = (drafted == drafting).then_some(drafting);
            self.measure(kind, began.elapsed().as_secs_f64(), new);
        }
        Ok(())
    }

    /// How many rows of each running text are computed now. Texts give up their room, the youngest first, if there is
    /// too little for all.
    fn choose_rows(&mut self) -> Vec<usize> {
        let mut budget = self.config.prefill_chunk.max(1);
        let mut lengths = Vec::new();
        while let Some(sequence) = self.running.get(lengths.len()) {
            let length = match sequence.is_decoding() {
                true => 1 + sequence.drafts.len(),
                false => sequence.missing().min(budget),
            };
            let end = sequence.cached + length;
            if !self.reserve(lengths.len(), end) {
                let mut youngest = self.running.pop().expect("one is running");
                self.pages.release(&youngest.interrupt());
                self.totals.interrupted += 1;
                self.waiting.push_front(youngest);
                continue;
            }
            if !self.running[lengths.len()].is_decoding() {
                budget -= length;
            }
            lengths.push(length);
        }
        lengths
    }

    /// Gives a running text pages for its first `positions`, as far as there are any.
    fn reserve(&mut self, index: usize, positions: usize) -> bool {
        let sequence = &mut self.running[index];
        while sequence.pages.len() * self.pages.size() < positions {
            match self.pages.take() {
                Some(page) => sequence.pages.push(page),
                None => return false,
            }
        }
        true
    }

    /// Runs the model over the next rows of all running texts. `[rows, D]`
    fn forward(&mut self, lengths: &[usize]) -> Result<Tensor<2>, EngineError> {
        let (mut tokens, mut spans) = (Vec::new(), Vec::new());
        for (sequence, &length) in self.running.iter().zip(lengths) {
            if length == 0 {
                continue;
            }
            let positions = sequence.cached..sequence.cached + length;
            tokens.extend(positions.map(|position| sequence.token(position) as i32));
            spans.push(Span {
                pages: sequence.pages.clone(),
                start: sequence.cached,
                length,
            });
        }
        let shape = [1, tokens.len()];
        let tokens = TensorData::new(tokens, shape);
        let tokens: Tensor<2, Int> = Tensor::from_data(tokens, &self.engine.device);
        let layout = Layout {
            page: self.pages.size(),
            spans,
        };
        let output = (self.engine.model).forward_paged(tokens, &mut self.cache, &layout);
        self.add_loads(output.moe)?;
        self.totals.steps += 1;
        Ok(output.hidden.squeeze_dim(0))
    }

    fn add_loads(&mut self, moe: Vec<MoeOutput>) -> Result<(), EngineError> {
        /// Steps after which sums are read from the device, long before they could overflow.
        const OFTEN: u64 = 1 << 12;
        let loads = moe.into_iter().map(|layer| layer.load);
        self.loads = match self.loads.is_empty() {
            true => loads.collect(),
            false => {
                let sums = std::mem::take(&mut self.loads).into_iter().zip(loads);
                sums.map(|(sum, load)| sum + load).collect()
            }
        };
        if self.totals.steps % OFTEN == OFTEN - 1 {
            self.totals()?;
        }
        Ok(())
    }

    /// Keeps the full pages of a running text for prompts that begin alike.
    fn keep_prefix(&mut self, index: usize) {
        let (size, ahead) = (self.pages.size(), self.modules());
        let sequence = &mut self.running[index];
        let complete = sequence
            .ahead
            .rows()
            .unwrap_or(usize::MAX)
            .min(sequence.cached);
        let full = |kept: usize| (kept + 1) * size;
        while full(sequence.kept) <= complete
            && full(sequence.kept) + ahead <= sequence.tokens.len()
        {
            let (held, kept) = (&mut sequence.pages, sequence.kept);
            self.pages.keep(held, kept, &sequence.tokens, ahead);
            sequence.kept += 1;
        }
    }

    fn end(&mut self, mut sequence: Sequence<'e>, result: Result<Finish, EngineError>) {
        let pages = sequence.interrupt();
        self.pages.release(&pages);
        let summary = sequence.finish(result);
        self.totals.finished += 1;
        self.totals.prompt_tokens += summary.prompt_tokens as u64;
        self.totals.drafts += summary.drafts;
    }
}
