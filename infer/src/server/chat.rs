//! `/v1/chat/completions`: the next message of a conversation.

use std::sync::Arc;

use axum::{
    extract::{Request as HttpRequest, State},
    response::Response,
};
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
use crate::{
    chat_template::{Message, Role},
    logprobs::TokenInfo,
};

/// Fields that would change the answer in ways that are not built.
const NOT_BUILT: [&str; 9] = [
    "tools",
    "functions",
    "function_call",
    "parallel_tool_calls",
    "audio",
    "prediction",
    "reasoning_effort",
    "verbosity",
    "web_search_options",
];

pub(super) async fn answer(
    State(server): State<Arc<Server>>,
    request: HttpRequest,
) -> Result<Response, ApiError> {
    let Received {
        mut fields,
        notes,
        deadline,
    } = Received::read(&server, request).await?;
    let conversation = Conversation::take(&mut fields)?;
    for name in NOT_BUILT {
        fields.refuse(name, "is not supported")?;
    }
    for (name, neutral) in [
        ("tool_choice", &["none", "auto"][..]),
        ("service_tier", &["auto", "default"]),
    ] {
        only(&mut fields, name, neutral)?;
    }
    if let Some(modalities) = fields.take::<Vec<String>>("modalities")?
        && modalities != ["text"]
    {
        return Err(fields.wrong("modalities", "must be [\"text\"]"));
    }
    let longest = take_longest(
        &mut fields,
        &["max_tokens", "max_completion_tokens"],
        usize::MAX,
        server.settings.limits.new_tokens,
    )?;
    let mut options = Options::take(&mut fields, &server, longest)?;
    let logprobs = take_logprobs(&mut fields)?;
    fields.finish()?;
    options.make_guide(&server).await?;

    let prompt = conversation.prompt(&server)?;
    let requests = options.requests(&[prompt], logprobs);
    let job = Job {
        server,
        format: Chat,
        notes,
        deadline,
    };
    job.answer(&options, requests, "messages").await
}

/// Messages, and what a model's template may want to know beyond them.
pub(super) struct Conversation {
    messages: Vec<Message>,
    variables: Map<String, Value>,
}

impl Conversation {
    pub(super) fn take(fields: &mut Fields) -> Result<Self, ApiError> {
        let Some(list) = fields.objects("messages")? else {
            return Err(fields.wrong("messages", "is missing"));
        };
        if list.is_empty() {
            return Err(fields.wrong("messages", "is empty"));
        }
        let messages = list.into_iter().map(take_message);
        Ok(Self {
            messages: messages.collect::<Result<_, _>>()?,
            variables: fields.take("chat_template_kwargs")?.unwrap_or_default(),
        })
    }

    /// The tokens of the prompt that the model's template makes of it.
    pub(super) fn prompt(&self, server: &Server) -> Result<Vec<u32>, ApiError> {
        let Some(template) = &server.template else {
            let what = "this model has no chat template (chat_template.jinja, or chat_template in \
                        tokenizer_config.json): use /v1/completions";
            return Err(ApiError::field("messages", what).with_code("no_chat_template"));
        };
        let text = template.render(&self.messages, true, &self.variables)?;
        // The template has written the beginning-of-text token if there has to be one.
        server.encode(&text, false, "messages")
    }
}

fn take_message(mut fields: Fields) -> Result<Message, ApiError> {
    let role: String = fields.require("role")?;
    let role = match role.as_str() {
        "system" | "developer" => Role::System,
        "user" => Role::User,
        "assistant" => Role::Assistant,
        other => {
            let what = format!("is {other:?}: must be system, developer, user or assistant");
            return Err(fields.wrong("role", what));
        }
    };
    let name = fields.take("name")?;
    let content = match fields.take::<Value>("content")? {
        Some(Value::String(text)) => text,
        Some(parts @ Value::Array(_)) => take_parts(&fields, parts)?,
        Some(_) => return Err(fields.wrong("content", "must be a string or a list of parts")),
        None if role == Role::Assistant => String::new(),
        None => return Err(fields.wrong("content", "is missing")),
    };
    // What clients send back of an earlier answer, and what it would mean if there were something in it.
    for name in [
        "tool_calls",
        "function_call",
        "audio",
        "refusal",
        "annotations",
        "reasoning_content",
    ] {
        fields.refuse(name, "is not supported")?;
    }
    fields.finish()?;
    Ok(Message {
        role,
        content,
        name,
    })
}

/// The text of a message that came in parts, one a line.
fn take_parts(message: &Fields, parts: Value) -> Result<String, ApiError> {
    let mut texts = Vec::new();
    for mut part in message.nested("content", parts)? {
        let kind: String = part.require("type")?;
        if kind != "text" {
            return Err(part.wrong("type", format!("is {kind:?}: only text is supported")));
        }
        texts.push(part.require::<String>("text")?);
        part.finish()?;
    }
    Ok(texts.join("\n"))
}

/// Takes a field that may have none but these values, all of which change nothing.
fn only(fields: &mut Fields, name: &str, neutral: &[&str]) -> Result<(), ApiError> {
    match fields.take::<Value>(name)? {
        None => Ok(()),
        Some(Value::String(text)) if neutral.contains(&text.as_str()) => Ok(()),
        Some(other) => {
            let what = format!("is {other}: only {} is supported", neutral.join(" or "));
            Err(fields.wrong(name, what))
        }
    }
}

fn take_logprobs(fields: &mut Fields) -> Result<Option<usize>, ApiError> {
    let wanted = fields.take("logprobs")?.unwrap_or(false);
    match fields.within("top_logprobs", 0..=MOST_LOGPROBS)? {
        Some(_) if !wanted => Err(fields.wrong("top_logprobs", "needs `logprobs`: true")),
        top => Ok(wanted.then(|| top.unwrap_or(0))),
    }
}

/// Chat's names and shapes.
struct Chat;

impl Format for Chat {
    const ID: &'static str = "chatcmpl";
    const WHOLE: &'static str = "chat.completion";
    const PART: &'static str = "chat.completion.chunk";

    fn whole(&self, server: &Server, answer: &Answer) -> Value {
        json!({
            "message": { "role": "assistant", "content": answer.text, "refusal": null },
            "logprobs": logprobs(server, &answer.tokens),
        })
    }

    fn opening(&self) -> Option<Value> {
        let delta = json!({ "role": "assistant", "content": "" });
        Some(json!({ "delta": delta, "logprobs": null }))
    }

    fn part(&self, server: &Server, piece: &Piece) -> Option<Value> {
        let logprobs = logprobs(server, &piece.tokens);
        if piece.text.is_empty() && logprobs.is_null() {
            return None;
        }
        Some(json!({ "delta": { "content": piece.text }, "logprobs": logprobs }))
    }

    fn ending(&self) -> Value {
        json!({ "delta": {}, "logprobs": null })
    }
}

/// The probabilities of an answer's tokens, null if they were not asked for.
fn logprobs(server: &Server, tokens: &[TokenInfo]) -> Value {
    let entry = |id: u32, logprob: f32| {
        json!({
            "token": token_text::text(server.service.tokenizer(), id),
            "logprob": logprob,
            "bytes": token_text::bytes(server.service.tokenizer(), id),
        })
    };
    let known = tokens
        .iter()
        .filter_map(|token| Some((token, token.logprob?)));
    let content: Vec<Value> = known
        .map(|(token, logprob)| {
            let top = token.top.iter().map(|&(id, logprob)| entry(id, logprob));
            let mut value = entry(token.id, logprob);
            value["top_logprobs"] = top.collect();
            value
        })
        .collect();
    match content.as_slice() {
        [] => Value::Null,
        _ => json!({ "content": content, "refusal": null }),
    }
}
