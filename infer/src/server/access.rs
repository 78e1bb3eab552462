//! Around every request: who may ask, and one line in the log when its answer has left or nobody waits for it.

use std::{
    pin::Pin,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll},
    time::Instant,
};

use axum::{
    body::{Body, Bytes, HttpBody},
    extract::{Request, State},
    http::{Method, StatusCode, header},
    middleware::Next,
    response::{IntoResponse, Response},
};
use hyper::body::{Frame, SizeHint};
use sha2::{Digest, Sha256};

use super::{Server, error::ApiError};
use crate::engine::Summary;

/// What anyone may see.
const OPEN: [&str; 2] = ["/", "/health"];

/// A key that clients have to know, kept as its hash: comparing hashes tells nothing about the key by the time it takes.
#[derive(Clone, PartialEq, Eq)]
pub struct ApiKey([u8; 32]);

impl ApiKey {
    /// The key that is written so.
    pub fn new(text: &str) -> Self {
        Self(Sha256::digest(text).into())
    }
}

impl std::fmt::Debug for ApiKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ApiKey(..)")
    }
}

/// Lets those through that have the key, if there is one.
pub(super) async fn check_key(
    State(server): State<Arc<Server>>,
    request: Request,
    next: Next,
) -> Response {
    let Some(key) = &server.settings.api_key else {
        return next.run(request).await;
    };
    let given = request.headers().get(header::AUTHORIZATION);
    let given = given.and_then(|value| value.to_str().ok()?.strip_prefix("Bearer "));
    let known = given.is_some_and(|given| ApiKey::new(given.trim()) == *key);
    if known || OPEN.contains(&request.uri().path()) {
        return next.run(request).await;
    }
    let what = match given {
        Some(_) => "the API key is wrong",
        None => "an API key is needed: Authorization: Bearer KEY",
    };
    ApiError::invalid(what)
        .with_status(StatusCode::UNAUTHORIZED)
        .with_code("invalid_api_key")
        .into_response()
}

/// What a handler tells the log.
#[derive(Debug, Default)]
pub(super) struct Notes {
    prompt_tokens: AtomicUsize,
    new_tokens: AtomicUsize,
    failure: OnceLock<String>,
}

impl Notes {
    pub(super) fn add(&self, summary: &Summary) {
        self.prompt_tokens
            .fetch_add(summary.prompt_tokens, Ordering::Relaxed);
        self.new_tokens
            .fetch_add(summary.new_tokens, Ordering::Relaxed);
    }

    /// Keeps what went wrong, as the status of a streamed answer has already been sent.
    pub(super) fn failed(&self, error: ApiError) -> ApiError {
        // The first failure ends the answer: there is no second.
        let _ = self.failure.set(error.message().to_owned());
        error
    }
}

/// Watches a request to the end of its answer.
pub(super) async fn observe(
    State(server): State<Arc<Server>>,
    mut request: Request,
    next: Next,
) -> Response {
    let notes = Arc::new(Notes::default());
    request.extensions_mut().insert(Arc::clone(&notes));
    let mut entry = Entry {
        server,
        method: request.method().clone(),
        path: request.uri().path().to_owned(),
        start: Instant::now(),
        status: None,
        whole: false,
        notes,
    };
    let response = next.run(request).await;
    entry.status = Some(response.status());
    response.map(|body| Body::new(Watched { body, entry }))
}

/// Writes its line when it is dropped.
struct Entry {
    server: Arc<Server>,
    method: Method,
    path: String,
    start: Instant,
    /// `None` until the handler has answered.
    status: Option<StatusCode>,
    /// Whether all of the answer was taken.
    whole: bool,
    notes: Arc<Notes>,
}

impl Drop for Entry {
    fn drop(&mut self) {
        let took = self.start.elapsed();
        let status = match self.status {
            Some(status) if self.whole => status.as_u16(),
            // Nginx's number for a client that has gone.
            _ => 499,
        };
        let endpoint = super::endpoint(&self.path);
        self.server.metrics.record(endpoint, status, took);
        let failure = match self.notes.failure.get() {
            Some(failure) => format!(" failed: {failure}"),
            None if status == 499 => " the client has gone".to_owned(),
            None => String::new(),
        };
        tracing::info!(
            "{} {} {status} {} ms, {} prompt and {} new tokens{failure}",
            self.method,
            self.path,
            took.as_millis(),
            self.notes.prompt_tokens.load(Ordering::Relaxed),
            self.notes.new_tokens.load(Ordering::Relaxed),
        );
    }
}

/// A body that knows when it has been sent.
struct Watched {
    body: Body,
    entry: Entry,
}

impl HttpBody for Watched {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let polled = Pin::new(&mut self.body).poll_frame(context);
        // The server does not ask again when it knows that nothing follows.
        self.entry.whole = matches!(polled, Poll::Ready(None)) || self.body.is_end_stream();
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
