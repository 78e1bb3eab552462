//! An HTTP server with OpenAI's interface over a [`Service`].
//!
//! `chat` and `completions` read a request and make prompts of it, `options` has what they share, `generation` sends
//! the answer. Every field is taken by its name (`fields`), so none is ignored in silence.

mod access;
mod chat;
mod completions;
mod error;
mod fields;
mod generation;
mod listen;
mod metrics;
mod options;
mod receive;
mod token_text;
mod tokens;

use std::{
    sync::{Arc, atomic::AtomicBool},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use axum::{
    Router,
    body::Body,
    http::{HeaderValue, StatusCode, Uri, header},
    middleware,
    response::{IntoResponse, Response},
    routing::{get, post},
};
use serde_json::Value;

pub use self::{access::ApiKey, listen::serve};
use self::{error::ApiError, metrics::Metrics};
use crate::{chat_template::ChatTemplate, service::Service};

/// What a server is told when it starts.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The model's name for clients.
    pub model: String,
    /// The key that clients have to know, if any.
    pub api_key: Option<ApiKey>,
    /// Puts the beginning-of-text token before the prompts of completions, unless a request says otherwise.
    pub add_bos: bool,
    /// The model's beginning-of-text token.
    pub bos: Option<u32>,
    /// What a request may cost.
    pub limits: Limits,
}

/// What a request may cost.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Bytes of its body.
    pub body_bytes: usize,
    /// Tokens of each prompt, if fewer than the model can take.
    pub prompt_tokens: usize,
    /// New tokens of each answer.
    pub new_tokens: usize,
    /// Answers.
    pub choices: usize,
    /// From its head to the end of its answer.
    pub time: Duration,
    /// Connections at a time; more wait to be accepted.
    pub connections: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            body_bytes: 4 << 20,
            prompt_tokens: usize::MAX,
            new_tokens: 32768,
            choices: 16,
            time: Duration::from_secs(600),
            connections: 1024,
        }
    }
}

/// The state behind every request.
#[derive(Debug)]
pub struct Server {
    service: Service,
    template: Option<ChatTemplate>,
    settings: Settings,
    metrics: Metrics,
    started: Instant,
    created: u64,
    /// Tells the answers of this process from those of others.
    launch: String,
    stopping: AtomicBool,
}

/// Every path there is, for the metrics: clients could invent any number of others.
const ENDPOINTS: [&str; 10] = [
    "/",
    "/health",
    "/metrics",
    "/stats",
    "/tokenize",
    "/detokenize",
    "/v1/models",
    "/v1/embeddings",
    "/v1/completions",
    "/v1/chat/completions",
];

impl Server {
    /// A server for what the service generates; `template` makes prompts of conversations.
    pub fn new(service: Service, template: Option<ChatTemplate>, settings: Settings) -> Arc<Self> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let now = now.unwrap_or_default();
        Arc::new(Self {
            metrics: Metrics::new(service.clone()),
            service,
            template,
            settings,
            started: Instant::now(),
            created: now.as_secs(),
            launch: format!("{:x}", now.as_nanos()),
            stopping: AtomicBool::new(false),
        })
    }

    fn router(self: &Arc<Self>) -> Router {
        let observed = middleware::from_fn_with_state(Arc::clone(self), access::observe);
        let guarded = middleware::from_fn_with_state(Arc::clone(self), access::check_key);
        Router::new()
            .route("/", get(page))
            .route("/health", get(metrics::health))
            .route("/metrics", get(metrics::metrics))
            .route("/stats", get(metrics::stats))
            .route("/tokenize", post(tokens::tokenize))
            .route("/detokenize", post(tokens::detokenize))
            .route("/v1/models", get(metrics::models))
            .route("/v1/models/{model}", get(metrics::model))
            .route("/v1/embeddings", post(no_embeddings))
            .route("/v1/completions", post(completions::answer))
            .route("/v1/chat/completions", post(chat::answer))
            .fallback(not_found)
            .method_not_allowed_fallback(wrong_method)
            .layer(guarded)
            .layer(observed)
            .with_state(Arc::clone(self))
    }

    /// The tokens of a text in the field `field`.
    fn tokens(&self, text: &str, bos: bool, field: &str) -> Result<Vec<u32>, ApiError> {
        let encoding = self.service.tokenizer().encode(text, false);
        let encoding = encoding.map_err(|error| ApiError::field(field, error))?;
        let bos = self.settings.bos.filter(|_| bos);
        Ok(bos
            .into_iter()
            .chain(encoding.get_ids().iter().copied())
            .collect())
    }

    /// The tokens of a prompt in the field `field`: at least the beginning-of-text token, and not too many.
    fn encode(&self, text: &str, bos: bool, field: &str) -> Result<Vec<u32>, ApiError> {
        let tokens = self.tokens(text, bos || text.is_empty(), field)?;
        self.check_length(&tokens, field)?;
        Ok(tokens)
    }

    fn check_length(&self, prompt: &[u32], field: &str) -> Result<(), ApiError> {
        let (found, most) = (prompt.len(), self.settings.limits.prompt_tokens);
        if found <= most {
            return Ok(());
        }
        let what = format!("has {found} tokens: this server takes {most}");
        Err(ApiError::field(field, what).with_code("context_length_exceeded"))
    }
}

/// The page has no part that comes from elsewhere, and is not allowed to fetch any.
async fn page() -> Response {
    let policy = "default-src 'none'; connect-src 'self'; img-src data:; script-src 'unsafe-inline'; \
                  style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";
    let headers = [
        (header::CONTENT_TYPE, "text/html; charset=utf-8"),
        (header::CONTENT_SECURITY_POLICY, policy),
    ];
    (headers, include_str!("page.html")).into_response()
}

async fn no_embeddings() -> ApiError {
    ApiError::invalid("this server generates text: it has no embeddings").with_code("unsupported")
}

async fn not_found(uri: Uri) -> ApiError {
    ApiError::invalid(format!("{}: there is nothing here", uri.path()))
        .with_status(StatusCode::NOT_FOUND)
        .with_code("unknown_url")
}

async fn wrong_method(uri: Uri) -> ApiError {
    ApiError::invalid(format!("{}: wrong method", uri.path()))
        .with_status(StatusCode::METHOD_NOT_ALLOWED)
        .with_code("method_not_allowed")
}

fn endpoint(path: &str) -> &'static str {
    let known = ENDPOINTS.into_iter().find(|endpoint| *endpoint == path);
    let model = path.starts_with("/v1/models/");
    known.unwrap_or(if model { "/v1/models" } else { "other" })
}

fn json(status: StatusCode, body: &Value) -> Response {
    let mut response = Response::new(Body::from(body.to_string()));
    *response.status_mut() = status;
    let kind = HeaderValue::from_static("application/json");
    response.headers_mut().insert(header::CONTENT_TYPE, kind);
    response
}

fn unix_seconds() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.map_or(0, |now| now.as_secs())
}
