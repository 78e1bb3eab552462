//! What the server tells about itself: to Prometheus, to its page, and to whoever asks whether it lives.

use std::{
    fmt::Error,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use axum::{
    extract::State,
    http::{StatusCode, header},
    response::{IntoResponse, Response},
};
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric, text},
    metrics::{
        counter::{ConstCounter, Counter},
        family::Family,
        gauge::ConstGauge,
        histogram::{Histogram, exponential_buckets},
    },
    registry::{Registry, Unit},
};
use serde_json::{Value, json};

use super::{Server, error::ApiError};
use crate::service::Service;

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Answered {
    endpoint: &'static str,
    status: u16,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Endpoint {
    endpoint: &'static str,
}

/// Counters of one server.
#[derive(Debug)]
pub(super) struct Metrics {
    registry: Registry,
    requests: Family<Answered, Counter>,
    duration: Family<Endpoint, Histogram, fn() -> Histogram>,
    /// Seconds from a request to its first token.
    pub(super) first_token: Histogram,
}

impl Metrics {
    pub(super) fn new(service: Service) -> Self {
        // From 5 ms to 160 s.
        let seconds: fn() -> Histogram = || Histogram::new(exponential_buckets(0.005, 2.0, 16));
        let requests = Family::default();
        let duration = Family::new_with_constructor(seconds);
        let first_token = seconds();
        let mut registry = Registry::with_prefix("deepburn");
        registry.register(
            "requests",
            "Requests by endpoint and status; 499 if the client had gone",
            Family::clone(&requests),
        );
        registry.register_with_unit(
            "request_duration",
            "Time from a request to the end of its answer",
            Unit::Seconds,
            Family::clone(&duration),
        );
        registry.register_with_unit(
            "time_to_first_token",
            "Time from a request to its first token, waiting included",
            Unit::Seconds,
            Histogram::clone(&first_token),
        );
        registry.register_collector(Box::new(OfService(service)));
        Self {
            registry,
            requests,
            duration,
            first_token,
        }
    }

    pub(super) fn record(&self, endpoint: &'static str, status: u16, took: Duration) {
        let labels = Answered { endpoint, status };
        self.requests.get_or_create(&labels).inc();
        let duration = self.duration.get_or_create(&Endpoint { endpoint });
        duration.observe(took.as_secs_f64());
    }
}

/// The service counts by itself.
#[derive(Debug)]
struct OfService(Service);

impl Collector for OfService {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), Error> {
        let now = self.0.statistics();
        let gauges = [
            ("running", "Texts that are continued now", now.running),
            ("waiting", "Requests that wait", now.waiting),
            (
                "cached_tokens",
                "Tokens whose latents are held",
                now.cached_tokens,
            ),
            (
                "cache_capacity",
                "Tokens whose latents may be held",
                now.cache_capacity,
            ),
        ];
        for (name, help, value) in gauges {
            let gauge = ConstGauge::new(value as u64);
            let metric = encoder.encode_descriptor(name, help, None, gauge.metric_type())?;
            gauge.encode(metric)?;
        }
        let counters = [
            ("answers", "Texts that ended", now.finished),
            ("prompt_tokens", "Tokens of prompts", now.prompt_tokens),
            (
                "reused_tokens",
                "Tokens of prompts whose latents were there",
                now.reused_tokens,
            ),
            ("new_tokens", "New tokens", now.new_tokens),
            (
                "drafted_tokens",
                "Tokens drafted ahead of the model",
                now.drafts.drafted,
            ),
            (
                "accepted_tokens",
                "Drafted tokens that the model confirmed",
                now.drafts.accepted,
            ),
        ];
        for (name, help, value) in counters {
            let counter = ConstCounter::new(value);
            let metric = encoder.encode_descriptor(name, help, None, counter.metric_type())?;
            counter.encode(metric)?;
        }
        Ok(())
    }
}

/// `/metrics`
pub(super) async fn metrics(State(server): State<Arc<Server>>) -> Response {
    let mut body = String::new();
    if text::encode(&mut body, &server.metrics.registry).is_err() {
        let what = "the metrics cannot be written";
        return ApiError::failure(StatusCode::INTERNAL_SERVER_ERROR, what).into_response();
    }
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    ([(header::CONTENT_TYPE, kind)], body).into_response()
}

/// `/stats`: what the page shows.
pub(super) async fn stats(State(server): State<Arc<Server>>) -> Response {
    let now = server.service.statistics();
    let config = server.service.config();
    let body = json!({
        "model": server.settings.model,
        "chat": server.template.is_some(),
        "uptime_seconds": server.started.elapsed().as_secs(),
        "running": now.running,
        "waiting": now.waiting,
        "max_batch": config.max_batch,
        "max_waiting": config.max_waiting,
        "finished": now.finished,
        "prompt_tokens": now.prompt_tokens,
        "reused_tokens": now.reused_tokens,
        "new_tokens": now.new_tokens,
        "tokens_per_second": now.tokens_per_second,
        "cached_tokens": now.cached_tokens,
        "cache_capacity": now.cache_capacity,
        "speculation": now.speculation.to_string(),
        "draft_acceptance": now.drafts.acceptance(),
        "expert_loads": now.expert_loads.iter().map(|layer| relative(layer)).collect::<Vec<_>>(),
    });
    super::json(StatusCode::OK, &body)
}

/// Loads over their mean; all zero as long as there were no tokens.
fn relative(loads: &[u64]) -> Vec<f64> {
    let mean = loads.iter().sum::<u64>() as f64 / loads.len().max(1) as f64;
    let over = |&load: &u64| if mean > 0.0 { load as f64 / mean } else { 0.0 };
    loads.iter().map(over).collect()
}

/// `/health`
pub(super) async fn health(State(server): State<Arc<Server>>) -> Response {
    let (status, word) = match server.stopping.load(Ordering::Relaxed) {
        false => (StatusCode::OK, "ok"),
        true => (StatusCode::SERVICE_UNAVAILABLE, "stopping"),
    };
    super::json(status, &json!({ "status": word }))
}

/// `/v1/models`
pub(super) async fn models(State(server): State<Arc<Server>>) -> Response {
    let body = json!({ "object": "list", "data": [card(&server)] });
    super::json(StatusCode::OK, &body)
}

/// `/v1/models/{model}`
pub(super) async fn model(
    State(server): State<Arc<Server>>,
    axum::extract::Path(name): axum::extract::Path<String>,
) -> Response {
    if name == server.settings.model {
        return super::json(StatusCode::OK, &card(&server));
    }
    ApiError::field("model", format!("{name:?} is not served here"))
        .with_status(StatusCode::NOT_FOUND)
        .with_code("model_not_found")
        .into_response()
}

fn card(server: &Server) -> Value {
    json!({
        "id": server.settings.model,
        "object": "model",
        "created": server.created,
        "owned_by": "deepburn",
        "max_model_len": server.service.limits().longest,
    })
}
