//! `/tokenize` and `/detokenize`.

use std::sync::Arc;

use axum::{
    extract::{Request as HttpRequest, State},
    http::StatusCode,
    response::Response,
};
use serde_json::json;

use super::{Server, chat::Conversation, error::ApiError, options::check_model, receive::Received};

/// The tokens of a text, or of the prompt that a conversation becomes.
pub(super) async fn tokenize(
    State(server): State<Arc<Server>>,
    request: HttpRequest,
) -> Result<Response, ApiError> {
    let Received { mut fields, .. } = Received::read(&server, request).await?;
    check_model(&mut fields, &server)?;
    let tokens = match fields.take::<String>("prompt")? {
        Some(text) => {
            let add = fields.take("add_special_tokens")?;
            let add = add.unwrap_or(server.settings.add_bos);
            fields.finish()?;
            server.tokens(&text, add, "prompt")?
        }
        None if !fields.has("messages") => {
            let what = "is missing, and so is `messages`";
            return Err(fields.wrong("prompt", what));
        }
        None => {
            let conversation = Conversation::take(&mut fields)?;
            fields.finish()?;
            conversation.prompt(&server)?
        }
    };
    let body = json!({
        "count": tokens.len(),
        "max_model_len": server.service.limits().longest,
        "tokens": tokens,
    });
    Ok(super::json(StatusCode::OK, &body))
}

/// The text of tokens, special ones included.
pub(super) async fn detokenize(
    State(server): State<Arc<Server>>,
    request: HttpRequest,
) -> Result<Response, ApiError> {
    let Received { mut fields, .. } = Received::read(&server, request).await?;
    check_model(&mut fields, &server)?;
    let tokens: Vec<u32> = fields.require("tokens")?;
    fields.finish()?;
    let vocab_size = server.service.limits().vocab_size;
    if let Some(id) = tokens.iter().find(|&&id| id as usize >= vocab_size) {
        let what = format!("token {id}: must be below the {vocab_size} of the vocabulary");
        return Err(ApiError::field("tokens", what));
    }
    match server.service.tokenizer().decode(&tokens, false) {
        Ok(text) => Ok(super::json(StatusCode::OK, &json!({ "prompt": text }))),
        Err(error) => Err(ApiError::field("tokens", error)),
    }
}
