//! How fast a model reads prompts and writes texts, many at once, with drafts and without.

use std::{ops::ControlFlow, time::Instant};

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::{
    batch::{Batch, BatchConfig, Event, Request},
    engine::{Engine, EngineError, GenerateOptions},
    speculation::{Drafts, Speculation},
};

/// What is measured.
#[derive(Clone, Copy, Debug)]
pub struct Workload {
    /// Texts at once.
    pub batch: usize,
    /// Tokens of every prompt.
    pub prompt_tokens: usize,
    /// New tokens of every text.
    pub new_tokens: usize,
    /// Whether tokens are drafted.
    pub speculate: Speculation,
}

/// One measurement.
#[derive(Clone, Copy, Debug)]
pub struct Measurement {
    /// What was measured.
    pub workload: Workload,
    /// Prompt tokens per second, all texts together.
    pub prompt_speed: f64,
    /// New tokens per second, all texts together, without the first of every text, which comes from its prompt.
    pub decode_speed: f64,
    /// What became of drafted tokens.
    pub drafts: Drafts,
}

impl Measurement {
    /// The better speed of each kind.
    #[must_use]
    pub fn faster_of_both(self, other: Self) -> Self {
        Self {
            prompt_speed: self.prompt_speed.max(other.prompt_speed),
            decode_speed: self.decode_speed.max(other.decode_speed),
            ..self
        }
    }
}

/// Measures greedy decoding after prompts cut from `text`, one after another from its beginning, or of random tokens if
/// there is none.
///
/// # Errors
/// A workload that does not fit the model, or a failure on the way.
pub fn measure(
    engine: &Engine,
    workload: Workload,
    text: Option<&[u32]>,
) -> Result<Measurement, EngineError> {
    let Workload {
        batch: count,
        prompt_tokens,
        new_tokens,
        speculate,
    } = workload;
    let page = BatchConfig::default().page;
    let config = BatchConfig {
        max_batch: count,
        cached_tokens: count * (prompt_tokens + new_tokens).next_multiple_of(page),
        speculate,
        ..BatchConfig::default()
    };
    let mut failed = None;
    let (prompt, decode, new, drafts) = {
        let mut batch = Batch::new(engine, config);
        let failed = std::rc::Rc::new(std::cell::RefCell::new(&mut failed));
        let mut random = ChaCha8Rng::seed_from_u64(1);
        for number in 0..count {
            let mut at = number * prompt_tokens;
            let prompt = (0..prompt_tokens).map(|_| match text {
                Some(text) => {
                    at += 1;
                    text[(at - 1) % text.len()]
                }
                None => random.random_range(0..engine.config.vocab_size as u32),
            });
            let request = Request {
                prompt: prompt.collect(),
                options: GenerateOptions {
                    max_new_tokens: new_tokens,
                    ignore_eos: true,
                    ..GenerateOptions::default()
                },
                logprobs: None,
            };
            let failed = std::rc::Rc::clone(&failed);
            let listener = move |event| {
                if let Event::Failed(error) = event {
                    **failed.borrow_mut() = Some(error);
                }
                ControlFlow::Continue(())
            };
            batch.add(request, Box::new(listener))?;
        }
        let start = Instant::now();
        batch.step();
        while batch.is_reading() {
            batch.step();
        }
        let prompt = start.elapsed();
        let first = batch.totals()?.new_tokens;
        let start = Instant::now();
        while !batch.is_idle() {
            batch.step();
        }
        let totals = batch.totals()?;
        (
            prompt,
            start.elapsed(),
            totals.new_tokens - first,
            totals.drafts,
        )
    };
    match failed {
        Some(error) => Err(error),
        None => Ok(Measurement {
            workload,
            prompt_speed: (count * prompt_tokens) as f64 / prompt.as_secs_f64(),
            decode_speed: new as f64 / decode.as_secs_f64(),
            drafts,
        }),
    }
}
