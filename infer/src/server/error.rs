//! What a client is told when there is no answer, in the shape of OpenAI's interface.

use axum::{
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use serde_json::{Value, json};

use crate::{
    chat_template::ChatTemplateError, engine::EngineError, sampler::SamplerError,
    service::SubmitError, text::TextError,
};

/// A refusal or a failure.
#[derive(Debug)]
pub(super) struct ApiError {
    pub(super) status: StatusCode,
    kind: &'static str,
    code: Option<&'static str>,
    /// The field of the request that is to blame.
    param: Option<String>,
    message: String,
}

impl ApiError {
    /// A request that cannot be served as it is.
    pub(super) fn invalid(message: impl Into<String>) -> Self {
        Self {
            status: StatusCode::BAD_REQUEST,
            kind: "invalid_request_error",
            code: None,
            param: None,
            message: message.into(),
        }
    }

    /// A field that cannot be served as it is.
    pub(super) fn field(name: impl Into<String>, what: impl std::fmt::Display) -> Self {
        let name = name.into();
        Self {
            message: format!("`{name}`: {what}"),
            param: Some(name),
            ..Self::invalid("")
        }
    }

    /// The same refusal under another status.
    pub(super) fn with_status(self, status: StatusCode) -> Self {
        Self { status, ..self }
    }

    /// The same refusal with a word that programs can recognise.
    pub(super) fn with_code(self, code: &'static str) -> Self {
        Self {
            code: Some(code),
            ..self
        }
    }

    /// A refusal that has its cause here.
    pub(super) fn failure(status: StatusCode, message: impl Into<String>) -> Self {
        Self {
            status,
            kind: "server_error",
            ..Self::invalid(message)
        }
    }

    /// No answer within the time that a request has.
    pub(super) fn out_of_time(seconds: u64) -> Self {
        let message =
            format!("no complete answer within {seconds} seconds, the limit of this server");
        Self::failure(StatusCode::GATEWAY_TIMEOUT, message).with_code("timeout")
    }

    /// What the engine says of a request whose prompt is in the field `prompt`.
    pub(super) fn engine(error: &EngineError, prompt: &str) -> Self {
        match error {
            EngineError::PromptTooLong { .. } => {
                Self::field(prompt, error).with_code("context_length_exceeded")
            }
            EngineError::EmptyPrompt
            | EngineError::UnknownToken { .. }
            | EngineError::Encode(_)
            | EngineError::NoBos => Self::field(prompt, error),
            EngineError::Sampler(SamplerError::Config { field, .. }) => Self::field(*field, error),
            EngineError::Text(TextError::EmptyStop { .. }) => Self::field("stop", error),
            _ => Self::failure(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()),
        }
    }

    /// Why a request was not accepted.
    pub(super) fn submit(error: &SubmitError, prompt: &str) -> Self {
        match error {
            SubmitError::Prompt(error) => Self::engine(error, prompt),
            SubmitError::QueueFull { .. } => Self {
                kind: "rate_limit_error",
                ..Self::failure(StatusCode::TOO_MANY_REQUESTS, error.to_string())
            }
            .with_code("queue_full"),
            SubmitError::Stopped => {
                Self::failure(StatusCode::SERVICE_UNAVAILABLE, error.to_string())
            }
        }
    }

    pub(super) fn message(&self) -> &str {
        &self.message
    }

    pub(super) fn body(&self) -> Value {
        let Self {
            kind,
            code,
            param,
            message,
            ..
        } = self;
        json!({ "error": { "message": message, "type": kind, "param": param, "code": code } })
    }
}

impl From<ChatTemplateError> for ApiError {
    fn from(error: ChatTemplateError) -> Self {
        Self::field("messages", error)
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = super::json(self.status, &self.body());
        let headers = response.headers_mut();
        if self.status == StatusCode::TOO_MANY_REQUESTS {
            headers.insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}
