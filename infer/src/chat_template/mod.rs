//! From the messages of a conversation to the prompt that the model was trained to answer.
//!
//! A checkpoint brings a Jinja template for it, in `chat_template.jinja` or in `tokenizer_config.json`. It is rendered
//! as transformers renders it: the same whitespace rules, functions and filters, and Python's methods on strings,
//! lists and maps.

mod json;
mod methods;

use std::{
    fmt::Write as _,
    fs,
    io::ErrorKind as FileError,
    path::{Path, PathBuf},
};

use chrono::format::{Item, StrftimeItems};
use minijinja::{Environment, Error, ErrorKind, Value, syntax::SyntaxConfig, value::Serde};
use serde::{Deserialize, Serialize};

/// What a template may do for one prompt: instructions, and 64 bytes of text for each.
const FUEL: u64 = 10_000_000;

const CONFIG: &str = "tokenizer_config.json";

const NAME: &str = "chat template";

/// Who wrote a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Instructions that stand above the conversation.
    System,
    /// The one who asks.
    User,
    /// The model.
    Assistant,
}

/// A part of a conversation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Message {
    /// Who wrote it.
    pub role: Role,
    /// What they wrote.
    pub content: String,
    /// Tells apart writers of the same role; few templates show it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
}

impl Message {
    /// A message without a name.
    pub fn new(role: Role, content: impl Into<String>) -> Self {
        Self {
            role,
            content: content.into(),
            name: None,
        }
    }
}

/// Why a conversation has no prompt.
#[derive(Debug, thiserror::Error)]
pub enum ChatTemplateError {
    /// A file that the template or its tokens should come from.
    #[error("{path}: {what}")]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// The template itself refuses these messages, with `raise_exception`.
    #[error("{0}")]
    Refused(String),
    /// The template fails on these messages.
    #[error("the model's chat template fails: {0}")]
    Render(#[source] Error),
}

/// A model's template with the tokens that it may use.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
}

/// What of `tokenizer_config.json` matters here; it has many more keys.
#[derive(Default, Deserialize)]
struct TokenizerConfig {
    chat_template: Option<OneOrNamed>,
    #[serde(default)]
    add_bos_token: bool,
    #[serde(flatten)]
    tokens: serde_json::Map<String, serde_json::Value>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrNamed {
    One(String),
    Named(Vec<Named>),
}

#[derive(Deserialize)]
struct Named {
    name: String,
    template: String,
}

impl ChatTemplate {
    /// The template of a checkpoint, `None` if it has none. Of several it is the one named `default`.
    ///
    /// # Errors
    /// Files that cannot be read, or a template that is not well-formed.
    pub fn read(dir: &Path) -> Result<Option<Self>, ChatTemplateError> {
        let config_path = dir.join(CONFIG);
        let config = read_config(&config_path)?;
        let path = dir.join("chat_template.jinja");
        let (path, source) = match (read(&path)?, config.chat_template) {
            (Some(source), _) => (path, source),
            (None, Some(OneOrNamed::One(source))) => (config_path, source),
            (None, Some(OneOrNamed::Named(named))) => {
                let default = named.into_iter().find(|named| named.name == "default");
                let named = default
                    .ok_or_else(|| wrong(&config_path, &"chat_template: none named default"))?;
                (config_path, named.template)
            }
            (None, None) => return Ok(None),
        };
        let template = Self::new(source, special_tokens(&config.tokens));
        template.map(Some).map_err(|error| wrong(&path, &error))
    }

    fn new(source: String, tokens: Vec<(String, String)>) -> Result<Self, Error> {
        let mut environment = Environment::new();
        environment.set_syntax(
            SyntaxConfig::builder()
                .trim_blocks(true)
                .lstrip_blocks(true)
                .build()?,
        );
        environment.set_fuel(Some(FUEL));
        environment.set_unknown_method_callback(methods::call);
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", strftime_now);
        environment.add_filter("tojson", json::dumps);
        for (name, text) in tokens {
            environment.add_global(name, text);
        }
        environment.add_template_owned(NAME, without_generation_marks(&source))?;
        Ok(Self { environment })
    }

    /// The prompt of a conversation; with `add_generation_prompt` it ends where the model's answer begins.
    ///
    /// `variables` are further names that the template may ask for, such as `thinking`.
    ///
    /// # Errors
    /// Messages that the template refuses or fails on.
    pub fn render(
        &self,
        messages: &[Message],
        add_generation_prompt: bool,
        variables: &serde_json::Map<String, serde_json::Value>,
    ) -> Result<String, ChatTemplateError> {
        // Not as one JSON object, in which a message's fields would lose their order.
        let more = variables.iter();
        let more = more.map(|(name, value)| (name.as_str(), Value::from(Serde(value))));
        let own = [
            ("messages", Value::from(Serde(messages))),
            ("add_generation_prompt", Value::from(add_generation_prompt)),
        ];
        let context = Value::from_pairs(more.chain(own));
        let template = self.environment.get_template(NAME);
        let rendered = template.and_then(|template| template.render(context));
        rendered.map_err(|error| match error.kind() {
            ErrorKind::InvalidOperation => match refusal(&error) {
                Some(message) => ChatTemplateError::Refused(message),
                None => ChatTemplateError::Render(error),
            },
            _ => ChatTemplateError::Render(error),
        })
    }
}

/// Whether the tokenizer of a checkpoint puts the beginning-of-text token before a text.
///
/// # Errors
/// A `tokenizer_config.json` that cannot be read.
pub fn adds_bos_token(dir: &Path) -> Result<bool, ChatTemplateError> {
    read_config(&dir.join(CONFIG)).map(|config| config.add_bos_token)
}

fn read_config(path: &Path) -> Result<TokenizerConfig, ChatTemplateError> {
    match read(path)? {
        None => Ok(TokenizerConfig::default()),
        Some(text) => serde_json::from_str(&text).map_err(|error| wrong(path, &error)),
    }
}

fn read(path: &Path) -> Result<Option<String>, ChatTemplateError> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == FileError::NotFound => Ok(None),
        Err(error) => Err(wrong(path, &error)),
    }
}

fn wrong(path: &Path, what: &dyn std::fmt::Display) -> ChatTemplateError {
    ChatTemplateError::File {
        path: path.to_owned(),
        what: what.to_string(),
    }
}

/// Those keys that end in `_token`: a string, or an object with the string as `content`.
fn special_tokens(keys: &serde_json::Map<String, serde_json::Value>) -> Vec<(String, String)> {
    let tokens = keys.iter().filter(|(key, _)| key.ends_with("_token"));
    let text = |value: &serde_json::Value| Some(value.as_str()?.to_owned());
    tokens
        .filter_map(|(key, value)| {
            Some((
                key.clone(),
                text(value).or_else(|| text(&value["content"]))?,
            ))
        })
        .collect()
}

/// `{% generation %}` marks the model's part for training and is no tag of Jinja. A condition that holds leaves the
/// same whitespace.
fn without_generation_marks(source: &str) -> String {
    let mut result = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let (before, tag) = rest.split_at(start);
        let end = tag.find("%}").unwrap_or(tag.len());
        let (tag, after) = tag.split_at(end);
        let word = tag[2..].trim_matches(|c: char| c.is_whitespace() || "-+".contains(c));
        result += before;
        match word {
            "generation" => result += &tag.replacen(word, "if true", 1),
            "endgeneration" => result += &tag.replacen(word, "endif", 1),
            _ => result += tag,
        }
        rest = after;
    }
    result + rest
}

/// What a template says when it refuses its messages.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Raised(String);

fn raise_exception(message: String) -> Result<Value, Error> {
    let error = Error::new(ErrorKind::InvalidOperation, message.clone());
    Err(error.with_source(Raised(message)))
}

fn refusal(error: &(dyn std::error::Error + 'static)) -> Option<String> {
    match error.downcast_ref::<Raised>() {
        Some(Raised(message)) => Some(message.clone()),
        None => refusal(error.source()?),
    }
}

fn strftime_now(format: &str) -> Result<String, Error> {
    let items: Vec<Item<'_>> = StrftimeItems::new(format).collect();
    if items.contains(&Item::Error) {
        let what = format!("strftime_now: {format:?} is not a format");
        return Err(Error::new(ErrorKind::InvalidOperation, what));
    }
    let mut text = String::new();
    let now = chrono::Local::now().format_with_items(items.into_iter());
    write!(text, "{now}").map_err(|error| {
        Error::new(ErrorKind::InvalidOperation, "strftime_now fails").with_source(error)
    })?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn fixtures() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures")
    }

    fn deepseek_tokens() -> Vec<(String, String)> {
        let text = fs::read_to_string(fixtures().join("tiny-yarn/tokenizer_config.json")).unwrap();
        let config: TokenizerConfig = serde_json::from_str(&text).unwrap();
        special_tokens(&config.tokens)
    }

    fn template(source: &str) -> ChatTemplate {
        ChatTemplate::new(source.to_owned(), deepseek_tokens()).unwrap()
    }

    fn render(source: &str) -> Result<String, ChatTemplateError> {
        let messages = [Message::new(Role::User, "Hello")];
        template(source).render(&messages, true, &serde_json::Map::new())
    }

    /// `cases.json` is what transformers renders: tests/oracle/render_chat_templates.py.
    #[test]
    fn prompts_are_those_of_transformers() {
        #[derive(Deserialize)]
        struct Case {
            template: String,
            messages: Vec<Message>,
            add_generation_prompt: bool,
            variables: serde_json::Map<String, serde_json::Value>,
            expected: Option<String>,
            error: Option<String>,
        }
        let dir = fixtures().join("chat-templates");
        let text = fs::read_to_string(dir.join("cases.json")).unwrap();
        let file: serde_json::Value = serde_json::from_str(&text).unwrap();
        let cases: Vec<Case> = serde_json::from_value(file["cases"].clone()).unwrap();
        assert_eq!(cases.len(), 15);
        for case in cases {
            let source = fs::read_to_string(dir.join(format!("{}.jinja", case.template))).unwrap();
            let rendered = template(&source).render(
                &case.messages,
                case.add_generation_prompt,
                &case.variables,
            );
            let what = format!("{}: {:?}", case.template, case.messages);
            match (rendered, case.expected, case.error) {
                (Ok(text), Some(expected), None) => assert_eq!(text, expected, "{what}"),
                (Err(ChatTemplateError::Refused(text)), None, Some(expected)) => {
                    assert_eq!(text, expected, "{what}");
                }
                (rendered, ..) => panic!("{what}: {rendered:?}"),
            }
        }
    }

    #[test]
    fn the_template_is_found_where_checkpoints_have_it() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        let config = |value: serde_json::Value| {
            fs::write(dir.join("tokenizer_config.json"), value.to_string()).unwrap();
        };
        let prompt = || {
            let template = ChatTemplate::read(dir).unwrap()?;
            let messages = [Message::new(Role::User, "Hello")];
            Some(
                template
                    .render(&messages, true, &serde_json::Map::new())
                    .unwrap(),
            )
        };
        let refused = || ChatTemplate::read(dir).unwrap_err().to_string();

        assert_eq!(prompt(), None);
        config(json!({ "bos_token": "<s>" }));
        assert_eq!(prompt(), None);
        let source = "{{ bos_token }}{{ eos_token }}{{ messages[0].content }}";
        let tokens = json!({ "content": "</s>", "special": true });
        config(json!({ "bos_token": "<s>", "eos_token": tokens, "chat_template": source }));
        assert_eq!(prompt().unwrap(), "<s></s>Hello");
        let named =
            |name: &str| json!({ "chat_template": [{ "name": name, "template": "named" }] });
        config(named("default"));
        assert_eq!(prompt().unwrap(), "named");
        config(named("tools"));
        assert!(refused().ends_with("tokenizer_config.json: chat_template: none named default"));

        // The file of its own comes first.
        fs::write(dir.join("chat_template.jinja"), "file").unwrap();
        assert_eq!(prompt().unwrap(), "file");
        fs::write(dir.join("chat_template.jinja"), "a\n{% if %}").unwrap();
        let message = refused();
        assert!(
            message.contains("chat_template.jinja: syntax error"),
            "{message}"
        );
        assert!(message.contains(":2"), "no line in {message}");
        config(json!([]));
        assert!(refused().contains("tokenizer_config.json: "));
    }

    #[test]
    fn times_are_formatted_and_bad_formats_are_errors() {
        let year = render("{{ strftime_now('%d %b %Y') }}").unwrap();
        let parsed = chrono::NaiveDate::parse_from_str(&year, "%d %b %Y").unwrap();
        let today = chrono::Local::now().date_naive();
        assert!((today - parsed).num_days() <= 1, "{year}");
        let error = render("{{ strftime_now('%Q!') }}").unwrap_err().to_string();
        assert!(error.contains("\"%Q!\" is not a format"), "{error}");
    }

    #[test]
    fn templates_cannot_run_for_ever() {
        let error =
            render("{% for i in range(9999) %}{% for j in range(9999) %}x{% endfor %}{% endfor %}");
        let error = error.unwrap_err();
        assert!(matches!(error, ChatTemplateError::Render(_)), "{error}");
        let error = render("{{ messages.nothing.at_all }}").unwrap_err();
        assert!(
            error
                .to_string()
                .starts_with("the model's chat template fails: undefined"),
            "{error}"
        );
    }
}
