//! `/v1/completions`: texts that go on where prompts end.

use std::sync::Arc;

use axum::{
    extract::{Request as HttpRequest, State},
    response::Response,
};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::{
    Server,
    error::ApiError,
    fields::Fields,
    generation::{Answer, Format, Job, Piece},
    options::{MOST_LOGPROBS, Options, take_longest},
    receive::Received,
    token_text,
};
use crate::logprobs::TokenInfo;

/// OpenAI's default.
const DEFAULT_LONGEST: usize = 16;

pub(super) async fn answer(
    State(server): State<Arc<Server>>,
    request: HttpRequest,
) -> Result<Response, ApiError> {
    let Received {
        mut fields,
        notes,
        deadline,
    } = Received::read(&server, request).await?;
    fields.refuse("echo", "is not supported: the answer holds new text only")?;
    fields.refuse(
        "suffix",
        "is not supported: a text is only continued at its end",
    )?;
    let limits = &server.settings.limits;
    let longest = take_longest(
        &mut fields,
        &["max_tokens"],
        DEFAULT_LONGEST,
        limits.new_tokens,
    )?;
    let mut options = Options::take(&mut fields, &server, longest)?;
    if let Some(best_of) = fields.take::<usize>("best_of")?
        && best_of != options.choices()
    {
        return Err(fields.wrong("best_of", "must be the same as `n`: no answer is left out"));
    }
    let logprobs = fields.within("logprobs", 0..=MOST_LOGPROBS)?;
    let prompts = take_prompts(&mut fields, &server)?;
    fields.finish()?;
    options.make_guide(&server).await?;
    let answers = prompts.len() * options.choices();
    if answers > limits.choices {
        let what = format!(
            "asks for {answers} answers: at most {} may be",
            limits.choices
        );
        return Err(ApiError::field("prompt", what));
    }

    let requests = options.requests(&prompts, logprobs);
    let job = Job {
        server,
        format: Completion,
        notes,
        deadline,
    };
    job.answer(&options, requests, "prompt").await
}

/// A prompt or several, each as text or as tokens.
#[derive(Deserialize)]
#[serde(untagged)]
enum Prompts {
    Text(String),
    Tokens(Vec<u32>),
    Texts(Vec<String>),
    TokenLists(Vec<Vec<u32>>),
}

/// Takes the prompts' tokens. The beginning-of-text token is put before text if the checkpoint's tokenizer does so.
fn take_prompts(fields: &mut Fields, server: &Server) -> Result<Vec<Vec<u32>>, ApiError> {
    let add = fields.take("add_special_tokens")?;
    let add = add.unwrap_or(server.settings.add_bos);
    let given: Value = fields.require("prompt")?;
    let lists = match serde_json::from_value(given) {
        Ok(Prompts::Text(text)) => return Ok(vec![server.encode(&text, add, "prompt")?]),
        Ok(Prompts::Texts(texts)) => {
            let encode = |text: String| server.encode(&text, add, "prompt");
            return texts.into_iter().map(encode).collect();
        }
        Ok(Prompts::Tokens(tokens)) => vec![tokens],
        Ok(Prompts::TokenLists(lists)) => lists,
        Err(_) => {
            let what =
                "must be a string, a list of strings, a list of tokens, or a list of such lists";
            return Err(fields.wrong("prompt", what));
        }
    };
    for list in &lists {
        server.check_length(list, "prompt")?;
    }
    Ok(lists)
}

/// The names and shapes of completions.
struct Completion;

impl Format for Completion {
    const ID: &'static str = "cmpl";
    const WHOLE: &'static str = "text_completion";
    const PART: &'static str = "text_completion";

    fn whole(&self, server: &Server, answer: &Answer) -> Value {
        let places = answer.offsets.iter().copied();
        choice(
            &answer.text,
            logprobs(server, answer.tokens.iter().zip(places)),
        )
    }

    fn opening(&self) -> Option<Value> {
        None
    }

    fn part(&self, server: &Server, piece: &Piece) -> Option<Value> {
        let places = std::iter::repeat(piece.offset);
        let logprobs = logprobs(server, piece.tokens.iter().zip(places));
        let told = !piece.text.is_empty() || !logprobs.is_null();
        told.then(|| choice(&piece.text, logprobs))
    }

    fn ending(&self) -> Value {
        choice("", Value::Null)
    }
}

fn choice(text: &str, logprobs: Value) -> Value {
    json!({ "text": text, "logprobs": logprobs })
}

/// The probabilities of tokens and where they are in the text, null if they were not asked for.
fn logprobs<'a>(server: &Server, tokens: impl Iterator<Item = (&'a TokenInfo, usize)>) -> Value {
    let text = |id| token_text::text(server.service.tokenizer(), id);
    let known: Vec<(&TokenInfo, usize, f32)> = tokens
        .filter_map(|(token, place)| Some((token, place, token.logprob?)))
        .collect();
    if known.is_empty() {
        return Value::Null;
    }
    let top = |token: &TokenInfo| {
        let likeliest = token.top.iter();
        likeliest
            .map(|&(id, logprob)| (text(id), json!(logprob)))
            .collect::<Map<_, _>>()
    };
    json!({
        "tokens": known.iter().map(|(token, ..)| text(token.id)).collect::<Vec<_>>(),
        "token_logprobs": known.iter().map(|&(_, _, logprob)| logprob).collect::<Vec<_>>(),
        "top_logprobs": known.iter().map(|(token, ..)| top(token)).collect::<Vec<_>>(),
        "text_offset": known.iter().map(|&(_, place, _)| place).collect::<Vec<_>>(),
    })
}
