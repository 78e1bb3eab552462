//! One text in progress.

use std::{ops::ControlFlow, time::Instant};

use super::{Event, Listener, Request, ahead::Ahead, rows::Row};
use crate::{
    engine::{Engine, EngineError, Finish, GenerateOptions, Summary},
    logprobs::TokenInfo,
    penalties::Seen,
    rejection::{Verdict, judge},
    sampler::Sampler,
    speculation::Drafts,
    text::TextStream,
};

/// Tokens with their probabilities.
pub(super) type Distribution = Vec<(u32, f32)>;

/// A text that is continued, or waits to be.
pub(super) struct Sequence<'e> {
    /// Prompt and new tokens.
    pub(super) tokens: Vec<u32>,
    /// Leading tokens whose latents are in the cache.
    pub(super) cached: usize,
    /// Where they are.
    pub(super) pages: Vec<u32>,
    /// Leading pages that are kept for others.
    pub(super) kept: usize,
    /// Tokens that may follow, with the distributions they were drawn from.
    pub(super) drafts: Vec<(u32, Distribution)>,
    /// What the prediction modules have read.
    pub(super) ahead: Ahead,
    /// Random choices.
    pub(super) sampler: Sampler,
    options: GenerateOptions,
    logprobs: Option<usize>,
    prompt: usize,
    longest: usize,
    reused: usize,
    seen: Seen,
    stream: TextStream<'e>,
    listener: Box<dyn Listener + 'e>,
    times: Times,
    counts: Drafts,
}

struct Times {
    submitted: Instant,
    started: Option<Instant>,
    first: Option<Instant>,
}

impl<'e> Sequence<'e> {
    /// A text that has not begun. The request was checked.
    pub(super) fn new(
        engine: &'e Engine,
        request: Request,
        longest: usize,
        listener: Box<dyn Listener + 'e>,
    ) -> Result<Self, EngineError> {
        let Request {
            prompt,
            options,
            logprobs,
        } = request;
        Ok(Self {
            cached: 0,
            pages: Vec::new(),
            kept: 0,
            drafts: Vec::new(),
            ahead: Ahead::default(),
            sampler: Sampler::new(options.sampler)?,
            logprobs,
            prompt: prompt.len(),
            longest,
            reused: 0,
            seen: Seen::of_prompt(&prompt),
            stream: TextStream::new(&engine.tokenizer, &options.stop)?,
            listener,
            times: Times {
                submitted: Instant::now(),
                started: None,
                first: None,
            },
            counts: Drafts::default(),
            tokens: prompt,
            options,
        })
    }

    /// Starts over the given pages, which hold the latents of its first tokens.
    pub(super) fn start(&mut self, pages: Vec<u32>, cached: usize, modules: usize) {
        self.kept = pages.len();
        self.pages = pages;
        self.cached = cached;
        self.ahead = Ahead::new(modules, cached);
        if self.times.started.is_none() {
            self.times.started = Some(Instant::now());
            self.reused = cached;
        }
    }

    /// Gives up what is cached until it starts again: the pages it had.
    pub(super) fn interrupt(&mut self) -> Vec<u32> {
        self.drafts.clear();
        std::mem::take(&mut self.pages)
    }

    /// Goes on without prediction modules.
    pub(super) fn forget_ahead(&mut self) {
        self.drafts.clear();
        self.kept = 0;
        self.ahead = Ahead::default();
    }

    /// Counts from the submission on instead of from now.
    pub(super) fn submitted(&mut self, at: Instant) {
        self.times.submitted = at;
    }

    /// Tokens that are not cached: at least one.
    pub(super) fn missing(&self) -> usize {
        self.tokens.len() - self.cached
    }

    /// Whether only the last token is not cached: the next step gives a new one.
    pub(super) fn is_decoding(&self) -> bool {
        self.missing() == 1
    }

    /// Whether the most probable token is all that is asked of a step.
    pub(super) fn is_plain(&self) -> bool {
        self.is_greedy() && !self.changes_logits() && self.logprobs.is_none()
    }

    fn changes_logits(&self) -> bool {
        !self.options.penalties.is_neutral() || self.options.guide.is_some()
    }

    /// Whether the most probable token is taken, whatever changes the logits before.
    pub(super) fn is_greedy(&self) -> bool {
        self.options.sampler.temperature == 0.0
    }

    /// How many tokens can be drafted so that a step does not give more than there is room for.
    pub(super) fn room_for_drafts(&self) -> usize {
        let new = self.tokens.len() - self.prompt;
        let room = self.longest - self.tokens.len();
        room.min(self.options.max_new_tokens - new)
            .saturating_sub(1)
    }

    /// The token at `position` of text and drafts.
    pub(super) fn token(&self, position: usize) -> u32 {
        match self.tokens.get(position) {
            Some(&token) => token,
            None => self.drafts[position - self.tokens.len()].0,
        }
    }

    /// Whether nobody wants the text any more.
    pub(super) fn is_abandoned(&self) -> bool {
        self.listener.is_gone()
    }

    /// Why the text ends before anything is computed for it.
    pub(super) fn ends_at_once(&self) -> Option<Finish> {
        (self.options.max_new_tokens == 0).then_some(Finish::MaxNewTokens)
    }

    /// Takes a step's results: of the last known token, and of every drafted one. New tokens go to the listener; what
    /// is returned, if anything, ends the text.
    pub(super) fn advance(
        &mut self,
        rows: &[Row<'_>],
        eos: &[u32],
    ) -> Result<Option<Finish>, EngineError> {
        let drafts = std::mem::take(&mut self.drafts);
        let decoding = self.times.first.is_some();
        let (mut infos, mut text) = (Vec::new(), String::new());
        let mut accepted = 0;
        let mut finish = None;
        for (at, row) in rows.iter().enumerate() {
            let (token, stands) = self.choose(row, drafts.get(at))?;
            infos.push(match (row, self.logprobs) {
                (Row::Logits(logits), Some(top)) => TokenInfo::new(token, logits, top),
                _ => TokenInfo::plain(token),
            });
            accepted += u64::from(stands);
            finish = self.push(token, eos, &mut text)?;
            if finish.is_some() || !stands {
                break;
            }
        }
        self.cached += infos.len();
        if decoding {
            self.counts += Drafts {
                steps: 1,
                tokens: infos.len() as u64,
                drafted: drafts.len() as u64,
                accepted,
            };
        } else {
            self.times.first = Some(Instant::now());
        }
        let piece = Event::Piece {
            text,
            tokens: infos,
        };
        if self.listener.tell(piece).is_break() {
            finish = Some(Finish::Cancelled);
        }
        Ok(finish)
    }

    /// A token from the results of one position, and whether it is the drafted one.
    fn choose(
        &mut self,
        row: &Row<'_>,
        drafted: Option<&(u32, Distribution)>,
    ) -> Result<(u32, bool), EngineError> {
        let target = match *row {
            Row::Best(token) => vec![(token, 1.0)],
            Row::Logits(logits) if !self.changes_logits() => self.sampler.candidates(logits)?,
            Row::Logits(logits) => {
                let mut logits = logits.to_vec();
                self.options.penalties.apply(&mut logits, &self.seen);
                if let Some(guide) = &mut self.options.guide {
                    guide.rule_out(&mut logits)?;
                }
                self.sampler.candidates(&logits)?
            }
        };
        let Some((token, draft)) = drafted else {
            return Ok((self.sampler.draw(&target), false));
        };
        let random = [self.sampler.random(), self.sampler.random()];
        Ok(match judge(&target, draft, *token, random) {
            Verdict::Accepted => (*token, true),
            Verdict::Replaced(token) => (token, false),
        })
    }

    fn push(
        &mut self,
        token: u32,
        eos: &[u32],
        text: &mut String,
    ) -> Result<Option<Finish>, EngineError> {
        self.tokens.push(token);
        self.seen.push(token);
        if !self.options.ignore_eos && eos.contains(&token) {
            return Ok(Some(Finish::EndOfText));
        }
        let complete = match &mut self.options.guide {
            Some(guide) => guide.push(token)?,
            None => false,
        };
        let piece = self.stream.push(token)?;
        text.push_str(&piece.text);
        let new = self.tokens.len() - self.prompt;
        Ok(match piece.stopped {
            Some(index) => Some(Finish::StopString(index)),
            None if complete => Some(Finish::EndOfText),
            None if new == self.options.max_new_tokens => Some(Finish::MaxNewTokens),
            None if self.tokens.len() == self.longest => Some(Finish::ContextFull),
            None => None,
        })
    }

    /// Tells the listener how the text ended.
    pub(super) fn finish(mut self, result: Result<Finish, EngineError>) -> Summary {
        let now = Instant::now();
        let started = self.times.started.unwrap_or(now);
        let first = self.times.first.unwrap_or(now);
        let mut summary = Summary {
            finish: Finish::Cancelled,
            prompt_tokens: self.prompt,
            reused_tokens: self.reused,
            new_tokens: self.tokens.len() - self.prompt,
            waited: started.duration_since(self.times.submitted),
            prefill: first.duration_since(started),
            decode: now.duration_since(first),
            drafts: self.counts,
        };
        let rest = match (&result, self.stream.finish()) {
            (Ok(Finish::Cancelled), _) => Ok(String::new()),
            (_, rest) => rest.map_err(EngineError::from),
        };
        let last = match (result, rest) {
            (Err(error), _) | (Ok(_), Err(error)) => Event::Failed(error),
            (Ok(finish), Ok(rest)) => {
                summary.finish = finish;
                if !rest.is_empty() {
                    // The text is over: whether the listener wants more makes no difference.
                    let _: ControlFlow<()> = self.listener.tell(Event::Piece {
                        text: rest,
                        tokens: Vec::new(),
                    });
                }
                Event::Finished(summary)
            }
        };
        let _: ControlFlow<()> = self.listener.tell(last);
        summary
    }
}
