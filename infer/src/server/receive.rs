//! A request's body: within limits, in time, and JSON.

use std::sync::Arc;

use axum::{
    body::Body,
    extract::Request as HttpRequest,
    http::{HeaderMap, StatusCode, header},
};
use futures_util::StreamExt;
use tokio::time::{Instant, timeout_at};

use super::{Server, access::Notes, error::ApiError, fields::Fields};

/// A request that has arrived.
pub(super) struct Received {
    pub(super) fields: Fields,
    /// What the log is to say of it.
    pub(super) notes: Arc<Notes>,
    /// When its answer must be complete.
    pub(super) deadline: Instant,
}

impl Received {
    /// Reads the whole body.
    pub(super) async fn read(server: &Server, request: HttpRequest) -> Result<Self, ApiError> {
        let limits = &server.settings.limits;
        let deadline = Instant::now() + limits.time;
        check_type(request.headers())?;
        let notes = request.extensions().get::<Arc<Notes>>();
        let notes = notes.cloned().unwrap_or_default();
        let body = timeout_at(deadline, whole(request.into_body(), limits.body_bytes));
        let body = body
            .await
            .map_err(|_| ApiError::out_of_time(limits.time.as_secs()))?;
        Ok(Self {
            fields: Fields::parse(&body?)?,
            notes,
            deadline,
        })
    }
}

/// Browsers let any page send other types than JSON to a server without asking it first.
fn check_type(headers: &HeaderMap) -> Result<(), ApiError> {
    let value = headers.get(header::CONTENT_TYPE);
    let value = value.and_then(|value| value.to_str().ok()).unwrap_or("");
    let kind = value.split(';').next().unwrap_or("").trim();
    if kind.eq_ignore_ascii_case("application/json") {
        return Ok(());
    }
    let what = format!("Content-Type is {value:?}: must be application/json");
    Err(ApiError::invalid(what).with_status(StatusCode::UNSUPPORTED_MEDIA_TYPE))
}

async fn whole(body: Body, limit: usize) -> Result<Vec<u8>, ApiError> {
    let mut bytes = Vec::new();
    let mut parts = body.into_data_stream();
    while let Some(part) = parts.next().await {
        let part =
            part.map_err(|error| ApiError::invalid(format!("the body cannot be read: {error}")))?;
        if bytes.len() + part.len() > limit {
            let what = format!("the body is longer than {limit} bytes, the limit of this server");
            return Err(ApiError::invalid(what).with_status(StatusCode::PAYLOAD_TOO_LARGE));
        }
        bytes.extend_from_slice(&part);
    }
    Ok(bytes)
}
