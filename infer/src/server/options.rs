//! What completions and chat completions have in common: how the text is chosen, and how the answer is sent.

use std::{
    collections::BTreeMap,
    hash::{BuildHasher, RandomState},
};

use axum::http::StatusCode;
use serde::Deserialize;

use super::{Server, error::ApiError, fields::Fields};
use crate::{
    engine::GenerateOptions, grammar::Grammar, penalties::Penalties, sampler::SamplerConfig,
    service::Request,
};

/// Most alternatives that a token's probability can be given with.
pub(super) const MOST_LOGPROBS: usize = 20;

const MOST_STOPS: usize = 16;

/// Labels for a client's own use, which change nothing.
const LABELS: [&str; 4] = ["user", "metadata", "safety_identifier", "prompt_cache_key"];

/// How an answer is made and sent.
#[derive(Debug)]
pub(super) struct Options {
    generate: GenerateOptions,
    grammar: Option<Grammar>,
    /// Answers for each prompt.
    choices: usize,
    pub(super) stream: bool,
    /// Whether a stream ends with counts.
    pub(super) include_usage: bool,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMore {
    One(String),
    More(Vec<String>),
}

impl Options {
    /// Takes the common fields of a request. `longest` is how many tokens it asks for.
    pub(super) fn take(
        fields: &mut Fields,
        server: &Server,
        longest: usize,
    ) -> Result<Self, ApiError> {
        check_model(fields, server)?;
        for label in LABELS {
            fields.take::<serde_json::Value>(label)?;
        }
        fields.refuse("store", "this server stores nothing")?;
        let limits = &server.settings.limits;
        let choices = fields.within("n", 1..=limits.choices)?.unwrap_or(1);
        let seed: Option<i64> = fields.take("seed")?;
        let sampler = SamplerConfig {
            temperature: fields.within("temperature", 0.0..=2.0)?.unwrap_or(1.0),
            top_k: fields.within("top_k", 1..=usize::MAX)?,
            top_p: fields.take("top_p")?,
            min_p: fields.take("min_p")?,
            seed: seed.map_or_else(random_seed, i64::cast_unsigned),
        };
        let defaults = Penalties::default();
        let penalties = Penalties {
            repetition: fields
                .take("repetition_penalty")?
                .unwrap_or(defaults.repetition),
            frequency: fields
                .within("frequency_penalty", -2.0..=2.0)?
                .unwrap_or(defaults.frequency),
            presence: fields
                .within("presence_penalty", -2.0..=2.0)?
                .unwrap_or(defaults.presence),
            bias: take_bias(fields, server.service.model().vocab_size)?,
        };
        let stop = match fields.take("stop")?.map(serde_json::from_value) {
            None => Vec::new(),
            Some(Ok(OneOrMore::One(text))) => vec![text],
            Some(Ok(OneOrMore::More(texts))) => texts,
            Some(Err(_)) => {
                return Err(fields.wrong("stop", "must be a string or a list of strings"));
            }
        };
        if stop.len() > MOST_STOPS {
            let what = format!(
                "has {} strings: at most {MOST_STOPS} may be given",
                stop.len()
            );
            return Err(fields.wrong("stop", what));
        }
        let ignore_eos = fields.take("ignore_eos")?.unwrap_or(false);
        let stream = fields.take("stream")?.unwrap_or(false);
        let include_usage = take_stream_options(fields, stream)?;
        Ok(Self {
            generate: GenerateOptions {
                sampler,
                penalties,
                max_new_tokens: longest,
                stop,
                add_bos: false,
                ignore_eos,
                guide: None,
            },
            grammar: take_grammar(fields)?,
            choices,
            stream,
            include_usage,
        })
    }

    /// Makes what keeps the answers to the grammar that was asked for; others go on meanwhile.
    pub(super) async fn make_guide(&mut self, server: &Server) -> Result<(), ApiError> {
        let Some(grammar) = self.grammar.take() else {
            return Ok(());
        };
        let service = server.service.clone();
        let made = tokio::task::spawn_blocking(move || service.guide(&grammar)).await;
        let guide = made.map_err(|_| ApiError::field("response_format", "is too much"))?;
        let guide = guide.map_err(|error| ApiError::field("response_format", error))?;
        self.generate.guide = Some(guide);
        Ok(())
    }

    /// A request for each answer: all of the first prompt, then all of the second.
    pub(super) fn requests(&self, prompts: &[Vec<u32>], logprobs: Option<usize>) -> Vec<Request> {
        let prompts = prompts
            .iter()
            .flat_map(|prompt| std::iter::repeat_n(prompt, self.choices));
        let request = |(choice, prompt): (u64, &Vec<u32>)| {
            let mut options = self.generate.clone();
            // The same seed would give the same answer again.
            options.sampler.seed = options.sampler.seed.wrapping_add(choice);
            Request {
                prompt: prompt.clone(),
                options,
                logprobs,
            }
        };
        (0..).zip(prompts).map(request).collect()
    }

    /// Answers for each prompt.
    pub(super) fn choices(&self) -> usize {
        self.choices
    }
}

/// What answers have to be, if anything.
fn take_grammar(fields: &mut Fields) -> Result<Option<Grammar>, ApiError> {
    let Some(mut format) = fields.object("response_format")? else {
        return Ok(None);
    };
    let kind: String = format.require("type")?;
    let grammar = match kind.as_str() {
        "text" => None,
        "json_object" => Some(Grammar::JsonObject),
        "json_schema" => {
            let Some(mut schema) = format.object("json_schema")? else {
                return Err(format.wrong("json_schema", "is missing"));
            };
            // What they name is for models that are told; this server is always strict.
            for label in ["name", "description", "strict"] {
                schema.take::<serde_json::Value>(label)?;
            }
            let grammar = Grammar::JsonSchema(schema.require("schema")?);
            schema.finish()?;
            Some(grammar)
        }
        other => {
            let what = format!("is {other:?}: must be text, json_object or json_schema");
            return Err(format.wrong("type", what));
        }
    };
    format.finish()?;
    Ok(grammar)
}

/// How many tokens a request asks for under any of these names, or `default`.
pub(super) fn take_longest(
    fields: &mut Fields,
    names: &[&str],
    default: usize,
    limit: usize,
) -> Result<usize, ApiError> {
    let mut longest = None;
    for name in names {
        longest = fields.within(name, 1..=limit)?.or(longest);
    }
    Ok(longest.unwrap_or(default.min(limit)))
}

/// A server has one model: a request that names another is for another server.
pub(super) fn check_model(fields: &mut Fields, server: &Server) -> Result<(), ApiError> {
    let known = &server.settings.model;
    match fields.take::<String>("model")? {
        Some(model) if model != *known => {
            let what = format!("{model:?} is not served here: this server has {known:?}");
            let error = fields.wrong("model", what);
            Err(error
                .with_status(StatusCode::NOT_FOUND)
                .with_code("model_not_found"))
        }
        _ => Ok(()),
    }
}

fn take_bias(fields: &mut Fields, vocab_size: usize) -> Result<BTreeMap<u32, f32>, ApiError> {
    let bias: BTreeMap<u32, f32> = fields.take("logit_bias")?.unwrap_or_default();
    for (&id, value) in &bias {
        if id as usize >= vocab_size {
            let what = format!("token {id}: must be below the {vocab_size} of the vocabulary");
            return Err(fields.wrong("logit_bias", what));
        }
        if !(-100.0..=100.0).contains(value) {
            let what = format!("{value} for token {id}: must be between -100 and 100");
            return Err(fields.wrong("logit_bias", what));
        }
    }
    Ok(bias)
}

/// Whether usage ends the stream.
fn take_stream_options(fields: &mut Fields, stream: bool) -> Result<bool, ApiError> {
    let Some(mut options) = fields.object("stream_options")? else {
        return Ok(false);
    };
    if !stream {
        return Err(fields.wrong("stream_options", "needs `stream`: true"));
    }
    let include_usage = options.take("include_usage")?.unwrap_or(false);
    // Padding against eavesdroppers of encrypted streams; this server does not encrypt.
    options.refuse("include_obfuscation", "is not supported")?;
    options.finish()?;
    Ok(include_usage)
}

/// The standard library's hasher is keyed at random.
fn random_seed() -> u64 {
    RandomState::new().hash_one(())
}
