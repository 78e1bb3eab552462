//! Text from a checkpoint: a model with its tokenizer, and what can be asked of it. How it is done is in [`batch`].

use std::{
    ops::ControlFlow,
    path::{Path, PathBuf},
    time::Duration,
};

use burn::tensor::{Device, ExecutionError};
use deepburn_kernels::compact::CompactFormat;
use deepburn_model::{
    checkpoint::{self, CheckpointError},
    config::ModelConfig,
    transformer::Transformer,
};
use serde::Deserialize;
use tokenizers::Tokenizer;

use crate::{
    batch::{self, BatchConfig, Request},
    grammar::{GrammarError, Grammars, Guide},
    penalties::Penalties,
    sampler::{SamplerConfig, SamplerError},
    speculation::{Drafts, SpeculationState},
    text::TextError,
};

/// A model with its tokenizer, ready to continue texts.
#[derive(Debug)]
pub struct Engine {
    /// The model's shape.
    pub config: ModelConfig,
    /// The model.
    pub model: Transformer,
    /// From text to tokens and back.
    pub tokenizer: Tokenizer,
    /// Where the model is.
    pub device: Device,
    pub(crate) bos: Option<u32>,
    pub(crate) eos: Vec<u32>,
}

/// How a text is continued. The default is greedy, without a limit but the context.
#[derive(Clone, Debug)]
pub struct GenerateOptions {
    /// How tokens are chosen.
    pub sampler: SamplerConfig,
    /// How logits are changed before that.
    pub penalties: Penalties,
    /// At most this many new tokens.
    pub max_new_tokens: usize,
    /// Strings that end the text where they begin; none of them empty.
    pub stop: Vec<String>,
    /// Puts the beginning-of-text token before the prompt.
    pub add_bos: bool,
    /// Goes on after an end-of-text token.
    pub ignore_eos: bool,
    /// What the text keeps to, if anything: see [`Engine::grammars`].
    pub guide: Option<Guide>,
}

impl Default for GenerateOptions {
    fn default() -> Self {
        Self {
            sampler: SamplerConfig::default(),
            penalties: Penalties::default(),
            max_new_tokens: usize::MAX,
            stop: Vec::new(),
            add_bos: false,
            ignore_eos: false,
            guide: None,
        }
    }
}

impl GenerateOptions {
    /// Checks the options that do not depend on a model.
    ///
    /// # Errors
    /// The first that breaks its rule.
    pub fn validate(&self) -> Result<(), EngineError> {
        self.sampler.validate()?;
        self.penalties.validate()?;
        match self.stop.iter().position(String::is_empty) {
            Some(index) => Err(TextError::EmptyStop { index }.into()),
            None => Ok(()),
        }
    }
}

/// Why a text ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// The model chose an end-of-text token, or the text is complete by its grammar.
    EndOfText,
    /// A stop string was complete: its index.
    StopString(usize),
    /// `max_new_tokens` were chosen.
    MaxNewTokens,
    /// Prompt and new tokens fill `max_position_embeddings`.
    ContextFull,
    /// The receiver of the text wanted no more.
    Cancelled,
}

/// A finished text.
#[derive(Clone, Debug)]
pub struct Generated {
    /// The new text, without what a stop string cut off.
    pub text: String,
    /// All tokens that were chosen, an end-of-text token and those of a stop string included.
    pub tokens: Vec<u32>,
    /// Counts and times.
    pub summary: Summary,
    /// Whether tokens were drafted at the end.
    pub speculation: SpeculationState,
}

/// How a text was made.
#[derive(Clone, Copy, Debug)]
pub struct Summary {
    /// Why the text ended.
    pub finish: Finish,
    /// Tokens of the prompt, a beginning-of-text token included.
    pub prompt_tokens: usize,
    /// Of those, the ones whose latents were cached already.
    pub reused_tokens: usize,
    /// Tokens that were chosen, an end-of-text token and those of a stop string included.
    pub new_tokens: usize,
    /// Before the prompt's first step.
    pub waited: Duration,
    /// From the prompt's tokens to the first new token.
    pub prefill: Duration,
    /// The rest.
    pub decode: Duration,
    /// Steps of decoding, and drafted tokens.
    pub drafts: Drafts,
}

impl Summary {
    /// Speed at which the prompt was read.
    pub fn prefill_tokens_per_second(&self) -> f64 {
        (self.prompt_tokens - self.reused_tokens) as f64 / self.prefill.as_secs_f64()
    }

    /// Speed of decoding; `None` if there was no step. The first token comes from the prompt's pass and needs none.
    pub fn decode_tokens_per_second(&self) -> Option<f64> {
        let steps = self.new_tokens.checked_sub(1).filter(|&steps| steps > 0)?;
        Some(steps as f64 / self.decode.as_secs_f64())
    }
}

/// What a prompt has to fit.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Tokens that a text may have, its prompt included: `max_position_embeddings`, or what the cache can hold.
    pub longest: usize,
    /// Tokens in the vocabulary.
    pub vocab_size: usize,
}

impl Limits {
    /// The same with a cache of so many tokens.
    #[must_use]
    pub fn within(self, cached_tokens: usize) -> Self {
        Self {
            longest: self.longest.min(cached_tokens),
            ..self
        }
    }

    /// Checks the tokens of a prompt.
    ///
    /// # Errors
    /// No token, too many, or one that the model does not have.
    pub fn check(&self, prompt: &[u32]) -> Result<(), EngineError> {
        let Self {
            longest,
            vocab_size,
        } = *self;
        if prompt.is_empty() {
            return Err(EngineError::EmptyPrompt);
        }
        if prompt.len() >= longest {
            return Err(EngineError::PromptTooLong {
                prompt_tokens: prompt.len(),
                longest,
            });
        }
        match prompt.iter().find(|&&id| id as usize >= vocab_size) {
            Some(&id) => Err(EngineError::UnknownToken { id, vocab_size }),
            None => Ok(()),
        }
    }
}

/// Why no text could be generated.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// A text cannot be kept to its grammar.
    #[error(transparent)]
    Grammar(#[from] GrammarError),
    /// The model cannot be read.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// `tokenizer.json` cannot be read.
    #[error("{path}: {source}")]
    Tokenizer {
        /// The file.
        path: PathBuf,
        /// What the tokenizer's library said.
        source: tokenizers::Error,
    },
    /// The tokenizer has tokens that the model has no embedding for.
    #[error("{path}: has token ids up to {largest}, but vocab_size is {vocab_size}")]
    TokenizerTooLarge {
        /// The file.
        path: PathBuf,
        /// Its largest token id.
        largest: u32,
        /// Rows of the model's embedding.
        vocab_size: usize,
    },
    /// `generation_config.json` cannot be used.
    #[error("{path}: {what}")]
    GenerationConfig {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// The tokenizer refused the prompt.
    #[error("the tokenizer cannot encode the prompt: {0}")]
    Encode(tokenizers::Error),
    /// Nothing to start from.
    #[error("the prompt is empty, and the model has no bos_token_id to start from")]
    EmptyPrompt,
    /// A beginning-of-text token was asked for.
    #[error("add_bos = true: the model has no bos_token_id")]
    NoBos,
    /// The prompt and one new token are longer than the longest sequence.
    #[error(
        "the prompt has {prompt_tokens} tokens: it must be shorter than {longest}, the least of max_position_embeddings and \
         the cached tokens"
    )]
    PromptTooLong {
        /// Its tokens.
        prompt_tokens: usize,
        /// What it has to be shorter than.
        longest: usize,
    },
    /// A prompt's token is not of this model.
    #[error("prompt token {id}: must be below vocab_size = {vocab_size}")]
    UnknownToken {
        /// The token.
        id: u32,
        /// Rows of the model's embedding.
        vocab_size: usize,
    },
    /// No token could be chosen.
    #[error(transparent)]
    Sampler(#[from] SamplerError),
    /// Tokens could not be turned into text.
    #[error(transparent)]
    Text(#[from] TextError),
    /// The device failed.
    #[error("the device failed: {0}")]
    Device(ExecutionError),
    /// A context that the model does not have.
    #[error("a context of {context} tokens: must be 1 to max_position_embeddings = {longest}")]
    Context {
        /// What was asked for.
        context: usize,
        /// `max_position_embeddings`
        longest: usize,
    },
    /// Nothing to predict.
    #[error("the text must have at least two tokens, so that one can be predicted")]
    TooShort,
    /// A pass of the model failed, for this text and those that were computed with it.
    #[error("a step of the model failed: {0}")]
    Step(String),
}

impl Engine {
    /// Opens a checkpoint in the layout of Hugging Face.
    ///
    /// What `generation_config.json` says of `bos_token_id` and `eos_token_id` comes before `config.json`, as in
    /// transformers.
    ///
    /// # Errors
    /// Files that are missing, malformed or do not fit each other.
    pub fn open(dir: &Path, device: &Device) -> Result<Self, EngineError> {
        Self::open_held(dir, device, None)
    }

    /// As [`open`](Self::open), with weights held in a compact format if one is given: see [`Transformer::hold`].
    ///
    /// # Errors
    /// As there, and a format on another device than the CPU.
    pub fn open_held(
        dir: &Path,
        device: &Device,
        format: Option<CompactFormat>,
    ) -> Result<Self, EngineError> {
        let config = checkpoint::read_config(dir)?;
        // Small files first: what is wrong with them shows before gigabytes are read.
        let tokenizer = read_tokenizer(dir, config.vocab_size)?;
        let special = SpecialTokens::read(dir, &config)?;
        let device = device.clone().without_autodiff();
        let (config, model) = match format {
            None => checkpoint::load(dir, &device)?,
            Some(format) => checkpoint::load_held(dir, &device, format)?,
        };
        Ok(Self {
            config,
            model,
            tokenizer,
            device,
            bos: special.bos,
            eos: special.eos,
        })
    }

    /// What makes guides for texts that keep to a grammar.
    ///
    /// # Errors
    /// As [`Grammars::new`].
    pub fn grammars(&self) -> Result<Grammars, GrammarError> {
        Grammars::new(&self.tokenizer, self.config.vocab_size, &self.eos)
    }

    /// Continues `prompt` and hands the new text to `on_text` piece by piece, each as soon as it is decided.
    ///
    /// The prompt is encoded as it is: special tokens are added by [`GenerateOptions::add_bos`] alone. An empty prompt
    /// starts from the beginning-of-text token.
    ///
    /// # Errors
    /// A prompt or options that do not fit the model, or a failure on the way.
    pub fn generate(
        &self,
        prompt: &str,
        options: &GenerateOptions,
        on_text: &mut dyn FnMut(&str) -> ControlFlow<()>,
    ) -> Result<Generated, EngineError> {
        let tokens = self.encode(prompt, options.add_bos)?;
        self.generate_from(&tokens, options, on_text)
    }

    /// The tokens of a prompt as it is, after the beginning-of-text token if that is asked for or there is nothing else.
    ///
    /// # Errors
    /// Text that the tokenizer refuses, or a beginning-of-text token that the model does not have.
    pub fn encode(&self, prompt: &str, add_bos: bool) -> Result<Vec<u32>, EngineError> {
        let encoding = self
            .tokenizer
            .encode(prompt, false)
            .map_err(EngineError::Encode)?;
        let mut tokens = Vec::new();
        if add_bos {
            tokens.push(self.bos.ok_or(EngineError::NoBos)?);
        }
        tokens.extend(encoding.get_ids());
        if tokens.is_empty() {
            tokens.push(self.bos.ok_or(EngineError::EmptyPrompt)?);
        }
        Ok(tokens)
    }

    /// The token that begins a text, if the model has one.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// What a prompt has to fit.
    pub fn limits(&self) -> Limits {
        Limits {
            longest: self.config.max_position_embeddings,
            vocab_size: self.config.vocab_size,
        }
    }

    /// As [`Engine::generate`], from the tokens of a prompt, which are at least one. `add_bos` plays no part.
    ///
    /// # Errors
    /// As [`Engine::generate`].
    pub fn generate_from(
        &self,
        prompt: &[u32],
        options: &GenerateOptions,
        on_text: &mut dyn FnMut(&str) -> ControlFlow<()>,
    ) -> Result<Generated, EngineError> {
        let config = BatchConfig {
            max_batch: 1,
            cached_tokens: self.config.max_position_embeddings,
            ..BatchConfig::default()
        };
        let request = Request {
            prompt: prompt.to_vec(),
            options: options.clone(),
            logprobs: None,
        };
        batch::generate(self, config, request, on_text)
    }
}

fn read_tokenizer(dir: &Path, vocab_size: usize) -> Result<Tokenizer, EngineError> {
    let path = dir.join("tokenizer.json");
    let tokenizer = match Tokenizer::from_file(&path) {
        Ok(tokenizer) => tokenizer,
        Err(source) => return Err(EngineError::Tokenizer { path, source }),
    };
    // By the largest id: there may be gaps, and a model may have more rows than there are tokens.
    let largest = tokenizer.get_vocab(true).into_values().max();
    match largest.filter(|&id| id as usize >= vocab_size) {
        Some(largest) => Err(EngineError::TokenizerTooLarge {
            path,
            largest,
            vocab_size,
        }),
        None => Ok(tokenizer),
    }
}

/// Where texts begin and end.
struct SpecialTokens {
    bos: Option<u32>,
    eos: Vec<u32>,
}

impl SpecialTokens {
    fn read(dir: &Path, config: &ModelConfig) -> Result<Self, EngineError> {
        #[derive(Default, Deserialize)]
        struct File {
            bos_token_id: Option<u32>,
            eos_token_id: Option<OneOrMore>,
        }
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum OneOrMore {
            One(u32),
            More(Vec<u32>),
        }
        let path = dir.join("generation_config.json");
        let wrong = |what: String| EngineError::GenerationConfig {
            path: path.clone(),
            what,
        };
        let file: File = match std::fs::read_to_string(&path) {
            Ok(text) => serde_json::from_str(&text).map_err(|error| wrong(error.to_string()))?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => File::default(),
            Err(error) => return Err(wrong(error.to_string())),
        };
        let special = Self {
            bos: file.bos_token_id.or(config.bos_token_id),
            eos: match file.eos_token_id {
                Some(OneOrMore::One(id)) => vec![id],
                Some(OneOrMore::More(ids)) => ids,
                None => config.eos_token_id.into_iter().collect(),
            },
        };
        let keys = special.bos.iter().map(|id| ("bos_token_id", id));
        let eos = special.eos.iter().map(|id| ("eos_token_id", id));
        match keys
            .chain(eos)
            .find(|(_, id)| **id as usize >= config.vocab_size)
        {
            Some((key, id)) => Err(wrong(format!(
                "{key} = {id}: must be below vocab_size = {}",
                config.vocab_size
            ))),
            None => Ok(special),
        }
    }
}

#[cfg(test)]
mod tests {
    use safetensors::SafeTensors;
    use serde_json::{Value, json};

    use super::*;

    fn fixture() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/tiny-yarn")
    }

    /// The checkpoint with changes to `config.json`, and a `generation_config.json` unless that is null.
    fn changed(config: Value, generation: Value) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for name in ["model.safetensors", "tokenizer.json"] {
            std::fs::copy(fixture().join(name), dir.path().join(name)).unwrap();
        }
        let text = std::fs::read_to_string(fixture().join("config.json")).unwrap();
        let mut file: serde_json::Map<String, Value> = serde_json::from_str(&text).unwrap();
        file.extend(config.as_object().unwrap().clone());
        let write = |name: &str, value: Value| {
            std::fs::write(dir.path().join(name), value.to_string()).unwrap();
        };
        write("config.json", file.into());
        if !generation.is_null() {
            write("generation_config.json", generation);
        }
        dir
    }

    fn open(dir: &Path) -> Engine {
        Engine::open(dir, &Device::flex()).unwrap()
    }

    fn refused(config: Value, generation: Value) -> String {
        let dir = changed(config, generation);
        let error = Engine::open(dir.path(), &Device::flex()).unwrap_err();
        error.to_string()
    }

    /// 48 tokens of a prompt, and the 32 that transformers 5.23.0 continues them with greedily (its end-of-text
    /// token switched off). The two best logits are never closer than 0.018: `meta.json` of the case.
    fn reference() -> (Vec<u32>, Vec<u32>) {
        let bytes = std::fs::read(fixture().join("reference_generate.safetensors")).unwrap();
        let parsed = SafeTensors::deserialize(&bytes).unwrap();
        let ids = |name: &str| -> Vec<u32> {
            let view = parsed.tensor(name).unwrap();
            let words = view.data().chunks_exact(8);
            words
                .map(|word| i64::from_le_bytes(word.try_into().unwrap()) as u32)
                .collect()
        };
        let (prompt, output) = (ids("prompt_ids"), ids("output_ids"));
        let (repeated, new) = output.split_at(prompt.len());
        assert_eq!(repeated, prompt);
        (prompt, new.to_vec())
    }

    fn run(engine: &Engine, prompt: &[u32], options: &GenerateOptions) -> Generated {
        let mut shown = String::new();
        let generated = engine
            .generate_from(prompt, options, &mut |piece| {
                shown.push_str(piece);
                ControlFlow::Continue(())
            })
            .unwrap();
        assert_eq!(generated.text, shown);
        assert_eq!(generated.summary.prompt_tokens, prompt.len());
        generated
    }

    fn at_most(max_new_tokens: usize) -> GenerateOptions {
        GenerateOptions {
            max_new_tokens,
            ..GenerateOptions::default()
        }
    }

    #[test]
    fn greedy_tokens_are_those_of_transformers() {
        let (prompt, expected) = reference();
        let engine = open(&fixture());
        let options = GenerateOptions {
            ignore_eos: true,
            ..at_most(32)
        };
        let generated = run(&engine, &prompt, &options);
        assert_eq!(generated.tokens, expected);
        assert_eq!(generated.summary.finish, Finish::MaxNewTokens);
        assert_eq!(
            generated.text,
            engine.tokenizer.decode(&expected, true).unwrap()
        );
        assert!(generated.summary.decode_tokens_per_second().is_some());
        assert!(
            run(&engine, &prompt, &at_most(1))
                .summary
                .decode_tokens_per_second()
                .is_none()
        );
        assert!(run(&engine, &prompt, &at_most(0)).tokens.is_empty());
    }

    #[test]
    fn texts_end_for_the_first_reason_there_is() {
        let (prompt, expected) = reference();
        // Any of several end-of-text tokens counts, and generation_config.json before config.json.
        let dir = changed(
            json!({ "eos_token_id": expected[1] }),
            json!({ "eos_token_id": [500, expected[5]] }),
        );
        let engine = open(dir.path());
        let ended = run(&engine, &prompt, &at_most(32));
        assert_eq!(ended.summary.finish, Finish::EndOfText);
        assert_eq!(ended.tokens, expected[..6]);

        let dir = changed(json!({ "eos_token_id": expected[5] }), json!(null));
        let engine = open(dir.path());
        assert_eq!(run(&engine, &prompt, &at_most(32)).tokens, expected[..6]);
        let ignoring = GenerateOptions {
            ignore_eos: true,
            ..at_most(9)
        };
        assert_eq!(run(&engine, &prompt, &ignoring).tokens, expected[..9]);

        // The last two of the twelve tokens for which there is room are " prin" and "Lat".
        let dir = changed(json!({ "max_position_embeddings": 60 }), json!(null));
        let engine = open(dir.path());
        let full = run(&engine, &prompt, &GenerateOptions::default());
        assert_eq!(full.summary.finish, Finish::ContextFull);
        assert_eq!(full.tokens, expected[..12]);
        let stopping = GenerateOptions {
            stop: vec!["never".into(), "inL".into()],
            ..GenerateOptions::default()
        };
        let stopped = run(&engine, &prompt, &stopping);
        assert_eq!(stopped.summary.finish, Finish::StopString(1));
        assert_eq!(stopped.text, full.text.split_once("inL").unwrap().0);

        let mut pieces = 0;
        let cancelled = engine
            .generate_from(&prompt, &at_most(32), &mut |_| {
                pieces += 1;
                ControlFlow::Break(())
            })
            .unwrap();
        assert_eq!((cancelled.summary.finish, pieces), (Finish::Cancelled, 1));
    }

    #[test]
    fn the_beginning_of_text_token_is_added_on_request_and_to_an_empty_prompt() {
        let engine = open(&fixture());
        let mut ignore = |_: &str| ControlFlow::Continue(());
        let mut tokens = |prompt: &str, add_bos| {
            let options = GenerateOptions {
                add_bos,
                ..at_most(1)
            };
            let generated = engine.generate(prompt, &options, &mut ignore).unwrap();
            generated.summary.prompt_tokens
        };
        // `tokenizer_cases.json` has the twelve tokens.
        assert_eq!(tokens("Hello, world!", false), 12);
        assert_eq!(tokens("Hello, world!", true), 13);
        assert_eq!(tokens("", false), 1);
        assert_eq!(tokens("", true), 1);

        let dir = changed(json!({ "bos_token_id": null }), json!(null));
        let engine = open(dir.path());
        let mut refused = |prompt: &str, add_bos| {
            let options = GenerateOptions {
                add_bos,
                ..at_most(1)
            };
            let error = engine.generate(prompt, &options, &mut ignore).unwrap_err();
            error.to_string()
        };
        assert!(refused("", false).starts_with("the prompt is empty"));
        assert!(refused("a", true).contains("no bos_token_id"));

        for config in [json!({}), json!({ "bos_token_id": null })] {
            let dir = changed(config, json!({ "bos_token_id": 3 }));
            assert_eq!(open(dir.path()).bos, Some(3));
        }
    }

    #[test]
    fn what_does_not_fit_is_refused_with_both_numbers() {
        let mut ignore = |_: &str| ControlFlow::Continue(());
        let dir = changed(json!({ "max_position_embeddings": 12 }), json!(null));
        let engine = open(dir.path());
        let mut refused_prompt = |prompt: &[u32]| {
            let error = engine.generate_from(prompt, &at_most(1), &mut ignore);
            error.unwrap_err().to_string()
        };
        assert_eq!(
            refused_prompt(&[5; 12]),
            "the prompt has 12 tokens: it must be shorter than 12, the least of max_position_embeddings and the cached tokens"
        );
        assert_eq!(
            refused_prompt(&[5, 512]),
            "prompt token 512: must be below vocab_size = 512"
        );
        assert!(
            engine
                .generate_from(&[5; 11], &at_most(1), &mut ignore)
                .is_ok()
        );

        let message = refused(json!({ "vocab_size": 500 }), json!(null));
        let end = "tokenizer.json: has token ids up to 511, but vocab_size is 500";
        assert!(message.ends_with(end), "{message}");
        let message = refused(json!({}), json!({ "eos_token_id": [1, 512] }));
        let end = "generation_config.json: eos_token_id = 512: must be below vocab_size = 512";
        assert!(message.ends_with(end), "{message}");
        let message = refused(json!({}), json!({ "eos_token_id": "end" }));
        assert!(message.contains("generation_config.json: "), "{message}");

        let dir = changed(json!({}), json!(null));
        std::fs::remove_file(dir.path().join("tokenizer.json")).unwrap();
        let error = Engine::open(dir.path(), &Device::flex()).unwrap_err();
        assert!(error.to_string().contains("tokenizer.json: "), "{error}");
    }
}
