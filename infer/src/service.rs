//! Many texts at once: one thread owns the engine and serves what is submitted.

use std::{
    collections::VecDeque,
    ops::ControlFlow,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll},
    thread,
    time::{Duration, Instant},
};

use deepburn_model::config::ModelConfig;
use tokenizers::Tokenizer;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

use crate::{
    engine::{Engine, EngineError, GenerateOptions, Limits, Summary},
    logprobs::TokenInfo,
    speculation::{Drafts, Speculation},
};

/// How texts are served.
#[derive(Clone, Copy, Debug)]
pub struct ServiceConfig {
    /// Requests that may wait; more are refused.
    pub max_waiting: usize,
    /// Texts that are continued together.
    pub max_batch: usize,
    /// Tokens whose latents are held, of all texts and of kept prefixes together. Requests wait for room.
    pub cached_tokens: usize,
    /// Prompt tokens per step: more read prompts faster, fewer delay the running texts less.
    pub prefill_chunk: usize,
    /// Whether tokens are drafted ahead of the model.
    pub speculate: Speculation,
}

impl Default for ServiceConfig {
    fn default() -> Self {
        Self {
            max_waiting: 64,
            max_batch: 8,
            cached_tokens: 32768,
            prefill_chunk: 512,
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

/// Why a request is not accepted.
#[derive(Debug, thiserror::Error)]
pub enum SubmitError {
    /// Too many wait already.
    #[error("{waiting} requests are waiting: at most {limit} may")]
    QueueFull {
        /// Those that wait.
        waiting: usize,
        /// `max_waiting`
        limit: usize,
    },
    /// The prompt or the options do not fit the model.
    #[error(transparent)]
    Prompt(#[from] EngineError),
    /// The service was shut down.
    #[error("the service was shut down")]
    Stopped,
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

/// A submitted request's events. Dropping it ends the work for it.
#[derive(Debug)]
pub struct Ticket {
    /// The request's number, unique in its service.
    pub id: u64,
    events: UnboundedReceiver<Event>,
}

impl Ticket {
    /// Waits for the next event; `None` after the last. Not for asynchronous code.
    pub fn recv(&mut self) -> Option<Event> {
        self.events.blocking_recv()
    }

    /// As [`Ticket::recv`] for asynchronous code.
    pub async fn next(&mut self) -> Option<Event> {
        self.events.recv().await
    }

    /// As [`Ticket::next`], for streams.
    pub fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Option<Event>> {
        self.events.poll_recv(context)
    }
}

/// What a service has done and is doing.
#[derive(Clone, Debug, Default)]
pub struct Statistics {
    /// Texts that are continued now.
    pub running: usize,
    /// Requests that wait.
    pub waiting: usize,
    /// Texts that ended.
    pub finished: u64,
    /// Tokens of prompts, those from kept prefixes included.
    pub prompt_tokens: u64,
    /// Of those, the ones whose latents were there already.
    pub reused_tokens: u64,
    /// New tokens.
    pub new_tokens: u64,
    /// New tokens per second of the last seconds.
    pub tokens_per_second: f64,
    /// Tokens whose latents are held now, of running texts and of kept prefixes.
    pub cached_tokens: usize,
    /// The most that may be held.
    pub cache_capacity: usize,
    /// Bytes of one cached token.
    pub cache_bytes_per_token: usize,
    /// Prompts of which a part was there already.
    pub prefix_hits: u64,
    /// Tokens that each routed expert received, for every mixture-of-experts layer of the main model.
    pub expert_loads: Vec<Vec<u64>>,
    /// What became of drafted tokens.
    pub drafts: Drafts,
    /// Whether tokens are drafted now, and why.
    pub speculation: SpeculationState,
}

/// Whether tokens are drafted.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum SpeculationState {
    /// It was not asked for.
    #[default]
    Off,
    /// The model has no prediction modules.
    NoModules,
    /// So many tokens per step.
    On {
        /// Drafted tokens per step.
        depth: usize,
    },
    /// It is being measured whether it pays.
    Measuring,
    /// Measured, in seconds per new token.
    Measured {
        /// Whether it goes on.
        kept: bool,
        /// With drafts.
        with: f64,
        /// Without.
        without: f64,
    },
}

/// A handle on the thread that serves. The last one dropped shuts it down.
#[derive(Clone, Debug)]
pub struct Service(Arc<Handle>);

#[derive(Debug)]
struct Handle(Arc<Shared>);

impl Drop for Handle {
    fn drop(&mut self) {
        self.0.stop();
    }
}

#[derive(Debug)]
struct Shared {
    config: ServiceConfig,
    model: ModelConfig,
    tokenizer: Tokenizer,
    limits: Limits,
    inbox: Mutex<Inbox>,
    wake: Condvar,
    statistics: Mutex<Statistics>,
}

#[derive(Debug, Default)]
struct Inbox {
    waiting: VecDeque<Submission>,
    submitted: u64,
    stopped: bool,
}

/// An accepted request.
#[derive(Debug)]
struct Submission {
    request: Request,
    events: UnboundedSender<Event>,
    at: Instant,
}

impl Service {
    /// Starts the thread.
    pub fn start(engine: Engine, config: ServiceConfig) -> Self {
        let shared = Arc::new(Shared {
            config,
            model: engine.config.clone(),
            tokenizer: engine.tokenizer.clone(),
            limits: engine.limits(),
            inbox: Mutex::default(),
            wake: Condvar::new(),
            statistics: Mutex::default(),
        });
        let serving = Arc::clone(&shared);
        thread::spawn(move || serve(&engine, &serving));
        Self(Arc::new(Handle(shared)))
    }

    /// Puts a request in the queue.
    ///
    /// # Errors
    /// A full queue, a request that cannot be served, or a service that was shut down.
    pub fn submit(&self, request: Request) -> Result<Ticket, SubmitError> {
        let shared = self.shared();
        shared.limits.check(&request.prompt)?;
        request.options.validate()?;
        let (sender, events) = unbounded_channel();
        let mut inbox = lock(&shared.inbox);
        if inbox.stopped {
            return Err(SubmitError::Stopped);
        }
        let (waiting, limit) = (inbox.waiting.len(), shared.config.max_waiting);
        if waiting >= limit {
            return Err(SubmitError::QueueFull { waiting, limit });
        }
        inbox.submitted += 1;
        inbox.waiting.push_back(Submission {
            request,
            events: sender,
            at: Instant::now(),
        });
        shared.wake.notify_all();
        Ok(Ticket {
            id: inbox.submitted,
            events,
        })
    }

    /// What the service has done and is doing.
    pub fn statistics(&self) -> Statistics {
        let shared = self.shared();
        let mut statistics = lock(&shared.statistics).clone();
        statistics.waiting = lock(&shared.inbox).waiting.len();
        statistics
    }

    /// How it serves.
    pub fn config(&self) -> &ServiceConfig {
        &self.shared().config
    }

    /// The model's shape.
    pub fn model(&self) -> &ModelConfig {
        &self.shared().model
    }

    /// From text to tokens and back.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.shared().tokenizer
    }

    /// What a prompt has to fit.
    pub fn limits(&self) -> &Limits {
        &self.shared().limits
    }

    /// Refuses new requests; those that were accepted are served to their end.
    pub fn shut_down(&self) {
        self.shared().stop();
    }

    fn shared(&self) -> &Shared {
        &self.0.0
    }
}

impl Shared {
    fn stop(&self) {
        lock(&self.inbox).stopped = true;
        self.wake.notify_all();
    }

    /// The next request; waits for one. `None` when stopped.
    fn next(&self) -> Option<Submission> {
        let mut inbox = lock(&self.inbox);
        loop {
            if let Some(submission) = inbox.waiting.pop_front() {
                return Some(submission);
            }
            if inbox.stopped {
                return None;
            }
            inbox = self
                .wake
                .wait(inbox)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// Data behind these locks is whole between any two statements, so a panic elsewhere does not spoil it.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn serve(engine: &Engine, shared: &Shared) {
    while let Some(submission) = shared.next() {
        if submission.events.is_closed() {
            continue;
        }
        lock(&shared.statistics).running = 1;
        let waited = submission.at.elapsed();
        let start = Instant::now();
        let Request {
            prompt,
            options,
            logprobs,
        } = submission.request;
        let result = engine.stream(&prompt, &options, logprobs, &mut |text, tokens| {
            let piece = Event::Piece {
                text: text.to_owned(),
                tokens,
            };
            match submission.events.send(piece) {
                Ok(()) => ControlFlow::Continue(()),
                Err(_) => ControlFlow::Break(()),
            }
        });
        let last = match result {
            Ok(generated) => {
                record(shared, &generated.summary, start.elapsed());
                Event::Finished(Summary {
                    waited,
                    ..generated.summary
                })
            }
            Err(error) => Event::Failed(error),
        };
        // Nobody may be listening any more.
        let _ = submission.events.send(last);
        lock(&shared.statistics).running = 0;
    }
}

fn record(shared: &Shared, summary: &Summary, took: Duration) {
    let mut statistics = lock(&shared.statistics);
    statistics.finished += 1;
    statistics.prompt_tokens += summary.prompt_tokens as u64;
    statistics.new_tokens += summary.new_tokens as u64;
    statistics.tokens_per_second = summary.new_tokens as f64 / took.as_secs_f64().max(1e-9);
    statistics.drafts += summary.drafts;
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use burn::tensor::Device;

    use super::*;
    use crate::engine::Finish;

    fn service(config: ServiceConfig) -> Service {
        let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures");
        let engine = Engine::open(&fixtures.join("tiny-yarn"), &Device::flex()).unwrap();
        Service::start(engine, config)
    }

    fn request(prompt: &[u32], max_new_tokens: usize) -> Request {
        Request {
            prompt: prompt.to_vec(),
            options: GenerateOptions {
                max_new_tokens,
                ignore_eos: true,
                ..GenerateOptions::default()
            },
            logprobs: None,
        }
    }

    /// All tokens and the last event.
    fn finished(mut ticket: Ticket) -> (Vec<u32>, Summary) {
        let mut tokens = Vec::new();
        loop {
            match ticket.recv().unwrap() {
                Event::Piece { tokens: new, .. } => tokens.extend(new.iter().map(|t| t.id)),
                Event::Finished(summary) => {
                    assert!(ticket.recv().is_none());
                    return (tokens, summary);
                }
                Event::Failed(error) => panic!("{error}"),
            }
        }
    }

    #[test]
    fn requests_are_served_and_counted() {
        let service = service(ServiceConfig::default());
        let tickets: Vec<Ticket> = (1..5)
            .map(|n| service.submit(request(&[5, 6, 7], n)).unwrap())
            .collect();
        assert_eq!(tickets[2].id, 3);
        let texts: Vec<_> = tickets.into_iter().map(finished).collect();
        for (n, (tokens, summary)) in (1..5).zip(&texts) {
            assert_eq!(tokens[..], texts[3].0[..n]);
            assert_eq!((summary.new_tokens, summary.prompt_tokens), (n, 3));
            assert_eq!(summary.finish, Finish::MaxNewTokens);
        }
        let statistics = service.statistics();
        assert_eq!((statistics.finished, statistics.new_tokens), (4, 10));
        assert_eq!((statistics.prompt_tokens, statistics.waiting), (12, 0));
    }

    #[test]
    fn what_cannot_be_served_is_refused() {
        let service = service(ServiceConfig {
            max_waiting: 0,
            ..ServiceConfig::default()
        });
        let refused = |request| service.submit(request).unwrap_err().to_string();
        assert_eq!(
            refused(request(&[512], 1)),
            "prompt token 512: must be below vocab_size = 512"
        );
        assert_eq!(
            refused(request(&[5], 1)),
            "0 requests are waiting: at most 0 may"
        );
        let mut wrong = request(&[5], 1);
        wrong.options.stop = vec![String::new()];
        assert!(refused(wrong).contains("stop string 0 is empty"));
        service.shut_down();
        assert_eq!(refused(request(&[5], 1)), "the service was shut down");
    }

    #[test]
    fn accepted_requests_outlive_the_handle_and_dropped_tickets_end_theirs() {
        let service = service(ServiceConfig::default());
        let endless = service.submit(request(&[5], usize::MAX)).unwrap();
        let last = service.submit(request(&[6], 2)).unwrap();
        drop(service);
        drop(endless);
        assert_eq!(finished(last).0.len(), 2);
    }
}
