//! Many texts at once: one thread owns the engine and serves what is submitted.

use std::{
    collections::VecDeque,
    ops::ControlFlow,
    sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError},
    task::{Context, Poll},
    thread,
    time::{Duration, Instant},
};

use deepburn_model::config::ModelConfig;
use rayon::ThreadPoolBuilder;
use tokenizers::Tokenizer;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

use crate::{
    batch::{Batch, BatchConfig, Listener},
    engine::{Engine, EngineError, Limits},
    grammar::{Grammar, GrammarError, Grammars, Guide},
    speculation::Drafts,
};
pub use crate::{
    batch::{Event, Request},
    speculation::{Speculation, SpeculationState},
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

impl ServiceConfig {
    fn batch(&self) -> BatchConfig {
        BatchConfig {
            max_batch: self.max_batch,
            cached_tokens: self.cached_tokens,
            prefill_chunk: self.prefill_chunk,
            speculate: self.speculate,
            ..BatchConfig::default()
        }
    }
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
    eos: Vec<u32>,
    /// Made when first asked for.
    grammars: OnceLock<Result<Grammars, GrammarError>>,
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
            limits: engine.limits().within(config.cached_tokens),
            eos: engine.eos.clone(),
            grammars: OnceLock::new(),
            inbox: Mutex::default(),
            wake: Condvar::new(),
            statistics: Mutex::default(),
        });
        let serving = Arc::clone(&shared);
        // With threads of its own, of which it is one: a thread beside them would wait for them at every operation.
        let threads = ThreadPoolBuilder::new().build().expect("threads start");
        thread::spawn(move || threads.install(|| serve(&engine, &serving)));
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

    /// A guide for a text that keeps to a grammar.
    ///
    /// # Errors
    /// As [`Grammars::new`] and [`Grammars::guide`].
    pub fn guide(&self, grammar: &Grammar) -> Result<Guide, GrammarError> {
        let shared = self.shared();
        let grammars = shared
            .grammars
            .get_or_init(|| Grammars::new(&shared.tokenizer, shared.model.vocab_size, &shared.eos));
        grammars.as_ref().map_err(Clone::clone)?.guide(grammar)
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
}

/// Data behind these locks is whole between any two statements, so a panic elsewhere does not spoil it.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Refuses everything once the thread ends, for whatever reason: tickets without a last event end, and none is added.
struct Closing<'a>(&'a Shared);

impl Drop for Closing<'_> {
    fn drop(&mut self) {
        let mut inbox = lock(&self.0.inbox);
        inbox.stopped = true;
        inbox.waiting.clear();
    }
}

struct Mail(UnboundedSender<Event>);

impl Listener for Mail {
    fn tell(&mut self, event: Event) -> ControlFlow<()> {
        match self.0.send(event) {
            Ok(()) => ControlFlow::Continue(()),
            Err(_) => ControlFlow::Break(()),
        }
    }

    fn is_gone(&self) -> bool {
        self.0.is_closed()
    }
}

fn serve(engine: &Engine, shared: &Shared) {
    /// How often statistics are renewed: expert loads are read from the device.
    const OFTEN: Duration = Duration::from_millis(250);
    let _closing = Closing(shared);
    let mut batch = Batch::new(engine, shared.config.batch());
    let mut speed = Speed::default();
    let mut published = Instant::now();
    loop {
        if !admit(&mut batch, shared, &mut speed) {
            return;
        }
        batch.step();
        if published.elapsed() >= OFTEN || batch.is_idle() {
            published = Instant::now();
            publish(&mut batch, shared, &mut speed);
        }
    }
}

/// Hands waiting requests to the batch; sleeps while there is nothing to do. `false` when stopped and idle.
fn admit<'e>(batch: &mut Batch<'e>, shared: &Shared, speed: &mut Speed) -> bool {
    let mut inbox = lock(&shared.inbox);
    loop {
        inbox.waiting.retain(|s| !s.events.is_closed());
        while batch.has_place() {
            let Some(Submission {
                request,
                events,
                at,
            }) = inbox.waiting.pop_front()
            else {
                break;
            };
            let mail = Box::new(Mail(events.clone()));
            if let Err(error) = batch.add_submitted(request, mail, at) {
                // Nobody may be listening any more.
                let _ = events.send(Event::Failed(error));
            }
        }
        if !batch.is_idle() {
            return true;
        }
        if inbox.stopped {
            return false;
        }
        speed.pause();
        inbox = (shared.wake.wait(inbox)).unwrap_or_else(PoisonError::into_inner);
    }
}

fn publish(batch: &mut Batch<'_>, shared: &Shared, speed: &mut Speed) {
    let Ok(totals) = batch.totals() else {
        // The texts in progress are told of a device that fails.
        return;
    };
    let (cached_tokens, cache_capacity) = batch.cached_tokens();
    *lock(&shared.statistics) = Statistics {
        running: batch.running(),
        waiting: 0,
        finished: totals.finished,
        prompt_tokens: totals.prompt_tokens,
        reused_tokens: totals.reused_tokens,
        new_tokens: totals.new_tokens,
        tokens_per_second: speed.of(totals.new_tokens),
        cached_tokens,
        cache_capacity,
        cache_bytes_per_token: shared.model.cache_bytes_per_token(),
        prefix_hits: totals.prefix_hits,
        expert_loads: totals.expert_loads,
        drafts: totals.drafts,
        speculation: batch.speculation(),
    };
}

/// Counts of the last seconds.
#[derive(Default)]
struct Speed(VecDeque<(Instant, u64)>);

impl Speed {
    /// The rate at which a count that is now `total` grew over the last seconds.
    fn of(&mut self, total: u64) -> f64 {
        const SECONDS: Duration = Duration::from_secs(5);
        let now = Instant::now();
        self.0.push_back((now, total));
        while self.0.len() > 2 && now.duration_since(self.0[0].0) > SECONDS {
            self.0.pop_front();
        }
        let (first, before) = self.0[0];
        let seconds = now.duration_since(first).as_secs_f64();
        if seconds > 0.0 {
            (total - before) as f64 / seconds
        } else {
            0.0
        }
    }

    /// Nothing happens for a while: what was before says nothing of what comes.
    fn pause(&mut self) {
        if let Some((_, total)) = self.0.pop_back() {
            self.0.clear();
            self.0.push_back((Instant::now(), total));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use burn::tensor::Device;

    use super::*;
    use crate::engine::{Finish, GenerateOptions, Summary};

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
        let statistics = loop {
            match service.statistics() {
                statistics if statistics.finished == 4 => break statistics,
                _ => thread::yield_now(),
            }
        };
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
