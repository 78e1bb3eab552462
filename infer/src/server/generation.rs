//! Answers on their way: from the service's events to one response, or to a stream of them.

use std::{convert::Infallible, future::poll_fn, sync::Arc, task::Poll};

use axum::{
    body::Body,
    http::{StatusCode, header},
    response::{IntoResponse, Response},
};
use futures_util::stream;
use serde_json::{Value, json};
use tokio::time::{Instant, timeout_at};

use super::{Server, access::Notes, error::ApiError, options::Options};
use crate::{
    engine::{Finish, Summary},
    logprobs::TokenInfo,
    service::{Event, Request, Ticket},
};

/// What distinguishes the two interfaces: the names of things, and how a choice looks.
pub(super) trait Format: Send + 'static {
    /// The first part of an answer's id.
    const ID: &'static str;
    /// What a whole answer is called.
    const WHOLE: &'static str;
    /// What a part of a streamed answer is called.
    const PART: &'static str;

    /// A complete answer.
    fn whole(&self, server: &Server, answer: &Answer) -> Value;
    /// What a streamed answer begins with, if with anything.
    fn opening(&self) -> Option<Value>;
    /// A part of a streamed answer; `None` if there is nothing to tell.
    fn part(&self, server: &Server, piece: &Piece) -> Option<Value>;
    /// What a streamed answer ends with, apart from the reason.
    fn ending(&self) -> Value;
}

/// New text with its tokens.
#[derive(Debug)]
pub(super) struct Piece {
    pub(super) text: String,
    pub(super) tokens: Vec<TokenInfo>,
    /// Characters of the answer before it.
    pub(super) offset: usize,
}

/// A complete answer.
#[derive(Debug, Default)]
pub(super) struct Answer {
    pub(super) text: String,
    pub(super) tokens: Vec<TokenInfo>,
    /// For each token, the characters of the answer before it.
    pub(super) offsets: Vec<usize>,
}

impl Answer {
    fn push(&mut self, piece: Piece) {
        self.text += &piece.text;
        self.offsets
            .extend(piece.tokens.iter().map(|_| piece.offset));
        self.tokens.extend(piece.tokens);
    }
}

/// What a request needs to be answered.
pub(super) struct Job<F> {
    pub(super) server: Arc<Server>,
    pub(super) format: F,
    pub(super) notes: Arc<Notes>,
    pub(super) deadline: Instant,
}

impl<F: Format> Job<F> {
    /// Submits the requests and answers with all of their texts, or as they come. `field` is where the prompts are.
    ///
    /// # Errors
    /// Requests that are refused, and for whole answers also what goes wrong on the way.
    pub(super) async fn answer(
        self,
        options: &Options,
        requests: Vec<Request>,
        field: &str,
    ) -> Result<Response, ApiError> {
        let mut tickets = Vec::with_capacity(requests.len());
        for request in requests {
            let ticket = self.server.service.submit(request);
            let ticket = ticket.map_err(|error| ApiError::submit(&error, field))?;
            tickets.push(ticket);
        }
        let head = Head {
            id: format!("{}-{}-{}", F::ID, self.server.launch, tickets[0].id),
            created: super::unix_seconds(),
        };
        let running = Running {
            job: self,
            head,
            turn: 0,
            progress: vec![Progress::default(); tickets.len()],
            tickets: tickets.into_iter().map(Some).collect(),
            choices: options.choices(),
        };
        if options.stream {
            Ok(running.stream(options.include_usage))
        } else {
            running.whole().await
        }
    }
}

struct Head {
    id: String,
    created: u64,
}

/// Submitted requests. Dropping it ends the work for them.
struct Running<F> {
    job: Job<F>,
    head: Head,
    tickets: Vec<Option<Ticket>>,
    /// The ticket that is asked first, each in its turn.
    turn: usize,
    progress: Vec<Progress>,
    /// Answers for each prompt.
    choices: usize,
}

/// How far an answer is.
#[derive(Clone, Default)]
struct Progress {
    characters: usize,
    summary: Option<Summary>,
}

/// What happened to one of the answers.
enum News {
    Piece(Piece),
    Finished(Finish),
}

impl<F: Format> Running<F> {
    /// The next news of any answer; `None` after the last of all.
    async fn next(&mut self) -> Result<Option<(usize, News)>, ApiError> {
        let deadline = self.job.deadline;
        let waiting = poll_fn(|context| {
            let (first, count) = (self.turn, self.tickets.len());
            let mut open = false;
            for at in (0..count).map(|step| (first + step) % count) {
                let Some(ticket) = &mut self.tickets[at] else {
                    continue;
                };
                open = true;
                if let Poll::Ready(event) = ticket.poll_next(context) {
                    self.turn = at + 1;
                    return Poll::Ready(Some((at, event)));
                }
            }
            if open {
                Poll::Pending
            } else {
                Poll::Ready(None)
            }
        });
        let limit = self.job.server.settings.limits.time;
        let Ok(next) = timeout_at(deadline, waiting).await else {
            return Err(self
                .job
                .notes
                .failed(ApiError::out_of_time(limit.as_secs())));
        };
        let Some((at, event)) = next else {
            return Ok(None);
        };
        let failed = |message: String| {
            let error = ApiError::failure(StatusCode::INTERNAL_SERVER_ERROR, message);
            self.job.notes.failed(error)
        };
        let progress = &mut self.progress[at];
        let news = match event {
            Some(Event::Piece { text, tokens }) => {
                let offset = progress.characters;
                progress.characters += text.chars().count();
                News::Piece(Piece {
                    text,
                    tokens,
                    offset,
                })
            }
            Some(Event::Finished(summary)) => {
                self.tickets[at] = None;
                progress.summary = Some(summary);
                let first_token = (summary.waited + summary.prefill).as_secs_f64();
                self.job.server.metrics.first_token.observe(first_token);
                self.job.notes.add(&summary);
                News::Finished(summary.finish)
            }
            Some(Event::Failed(error)) => return Err(failed(error.to_string())),
            None => return Err(failed("the engine has stopped".to_owned())),
        };
        Ok(Some((at, news)))
    }

    async fn whole(mut self) -> Result<Response, ApiError> {
        let mut answers: Vec<Answer> = self.progress.iter().map(|_| Answer::default()).collect();
        while let Some((at, news)) = self.next().await? {
            if let News::Piece(piece) = news {
                answers[at].push(piece);
            }
        }
        let choice = |(index, answer): (usize, &Answer)| {
            let mut choice = self.job.format.whole(&self.job.server, answer);
            let summary = self.progress[index].summary;
            choice["index"] = json!(index);
            choice["finish_reason"] = json!(summary.map(|summary| reason(summary.finish)));
            choice
        };
        let choices = answers.iter().enumerate().map(choice).collect();
        let mut body = self.envelope(F::WHOLE, choices);
        body["usage"] = self.usage();
        Ok(super::json(StatusCode::OK, &body))
    }

    fn stream(self, include_usage: bool) -> Response {
        let opening = self.job.format.opening().map(|opening| {
            let part = |index| self.part(index, opening.clone(), None, include_usage);
            (0..self.progress.len()).map(part).collect::<String>()
        });
        let state = (Some(self), opening);
        let parts = stream::unfold(state, move |(running, opening)| async move {
            let mut running = running?;
            if let Some(text) = opening {
                return Some((Ok::<_, Infallible>(text), (Some(running), None)));
            }
            loop {
                let (at, news) = match running.next().await {
                    Ok(Some(news)) => news,
                    Ok(None) => {
                        let usage = if include_usage {
                            running.last()
                        } else {
                            String::new()
                        };
                        return Some((Ok(usage + DONE), (None, None)));
                    }
                    Err(error) => return Some((Ok(sent(&error.body()) + DONE), (None, None))),
                };
                let part = match news {
                    News::Piece(piece) => running
                        .job
                        .format
                        .part(&running.job.server, &piece)
                        .map(|part| (part, None)),
                    News::Finished(finish) => Some((running.job.format.ending(), Some(finish))),
                };
                if let Some((part, finish)) = part {
                    let text = running.part(at, part, finish, include_usage);
                    return Some((Ok(text), (Some(running), None)));
                }
            }
        });
        let headers = [
            (header::CONTENT_TYPE, "text/event-stream"),
            (header::CACHE_CONTROL, "no-cache"),
        ];
        (headers, Body::from_stream(parts)).into_response()
    }

    fn part(
        &self,
        index: usize,
        mut choice: Value,
        finish: Option<Finish>,
        include_usage: bool,
    ) -> String {
        choice["index"] = json!(index);
        choice["finish_reason"] = json!(finish.map(reason));
        let mut body = self.envelope(F::PART, vec![choice]);
        if include_usage {
            body["usage"] = Value::Null;
        }
        sent(&body)
    }

    /// The part of a stream that has the counts and no choice.
    fn last(&self) -> String {
        let mut body = self.envelope(F::PART, Vec::new());
        body["usage"] = self.usage();
        sent(&body)
    }

    fn envelope(&self, object: &str, choices: Vec<Value>) -> Value {
        json!({
            "id": self.head.id,
            "object": object,
            "created": self.head.created,
            "model": self.job.server.settings.model,
            "choices": choices,
        })
    }

    /// A prompt with several answers counts once, as it is read once.
    fn usage(&self) -> Value {
        let summaries = || self.progress.iter().filter_map(|answer| answer.summary);
        let prompts = || summaries().step_by(self.choices);
        let prompt: usize = prompts().map(|summary| summary.prompt_tokens).sum();
        let cached: usize = prompts().map(|summary| summary.reused_tokens).sum();
        let new: usize = summaries().map(|summary| summary.new_tokens).sum();
        json!({
            "prompt_tokens": prompt,
            "completion_tokens": new,
            "total_tokens": prompt + new,
            "prompt_tokens_details": { "cached_tokens": cached },
        })
    }
}

const DONE: &str = "data: [DONE]\n\n";

/// A server-sent event.
fn sent(body: &Value) -> String {
    format!("data: {body}\n\n")
}

/// OpenAI's word for the end of a text.
fn reason(finish: Finish) -> &'static str {
    match finish {
        Finish::EndOfText | Finish::StopString(_) => "stop",
        Finish::MaxNewTokens | Finish::ContextFull => "length",
        Finish::Cancelled => "cancelled",
    }
}
