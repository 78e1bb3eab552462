//! Texts that keep to a grammar: JSON, or JSON that a schema describes.
//!
//! llguidance knows which tokens may follow; a [`Guide`] rules the others out before one is chosen.

use std::fmt;

use llguidance::{
    JsonCompileOptions, Matcher, ParserFactory,
    api::TopLevelGrammar,
    token_bytes_from_tokenizer_json,
    toktrie::{ApproximateTokEnv, TokEnv, TokRxInfo, TokTrie},
};
use serde_json::{Value, json};
use tokenizers::Tokenizer;

/// Between two parts of JSON. Bounded: a model that finds nothing but spaces likely would write them for ever.
const WHITESPACE: &str = r"[\x20\x0A\x0D\x09]{1,40}";

/// What a text has to be.
#[derive(Clone, Debug, PartialEq)]
pub enum Grammar {
    /// A JSON object.
    JsonObject,
    /// JSON that this schema describes.
    JsonSchema(Value),
}

/// Why there is no text of a grammar.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GrammarError {
    /// A model whose tokens are not known to the byte, or that cannot end a text.
    #[error("this model's texts cannot be kept to a grammar: {0}")]
    Model(String),
    /// A schema that is malformed, or has what is not supported.
    #[error("{0}")]
    Schema(String),
    /// A text that cannot go on.
    #[error("the text cannot go on as its grammar says: {0}")]
    Text(String),
}

/// The tokens of a model, as grammars see them. Takes a while to make; serves all texts.
pub struct Grammars(ParserFactory);

impl Grammars {
    /// Of a tokenizer and the model's tokens that end a text.
    ///
    /// # Errors
    /// A tokenizer that is not byte-level and without a fallback to bytes; no token that ends a text.
    pub fn new(
        tokenizer: &Tokenizer,
        vocab_size: usize,
        eos: &[u32],
    ) -> Result<Self, GrammarError> {
        let wrong = |what: &dyn fmt::Display| GrammarError::Model(what.to_string());
        let text = tokenizer.to_string(false).map_err(|error| wrong(&error))?;
        let text: Value = serde_json::from_str(&text).map_err(|error| wrong(&error))?;
        let mut bytes = token_bytes_from_tokenizer_json(&text).map_err(|error| wrong(&error))?;
        bytes.resize(vocab_size, Vec::new());
        let Some(&first) = eos.first() else {
            return Err(wrong(&"it has no end-of-text token"));
        };
        let info = TokRxInfo::new(vocab_size as u32, first);
        let trie = TokTrie::from(&info, &bytes).with_eos_tokens(eos);
        let tokens: TokEnv = std::sync::Arc::new(ApproximateTokEnv::new(trie));
        let mut factory = ParserFactory::new_simple(&tokens).map_err(|error| wrong(&error))?;
        factory.quiet();
        Ok(Self(factory))
    }

    /// A guide for a text that begins.
    ///
    /// # Errors
    /// A schema that is malformed, or has what is not supported.
    pub fn guide(&self, grammar: &Grammar) -> Result<Guide, GrammarError> {
        let mut schema = match grammar {
            Grammar::JsonObject => json!({ "type": "object" }),
            Grammar::JsonSchema(schema) => schema.clone(),
        };
        let Some(map) = schema.as_object() else {
            let what = format!("a schema must be an object, found {schema}");
            return Err(GrammarError::Schema(what));
        };
        if !map.contains_key("x-guidance") {
            let options = JsonCompileOptions {
                whitespace_pattern: Some(WHITESPACE.to_owned()),
                ..JsonCompileOptions::default()
            };
            options.apply_to(&mut schema);
        }
        let parser = self
            .0
            .create_parser(TopLevelGrammar::from_json_schema(schema));
        let matcher = Matcher::new(parser);
        match matcher.get_error() {
            Some(error) => Err(GrammarError::Schema(error)),
            None => Ok(Guide(matcher)),
        }
    }
}

impl fmt::Debug for Grammars {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Grammars")
    }
}

/// How far a text has come in its grammar.
#[derive(Clone)]
pub struct Guide(Matcher);

impl Guide {
    /// Makes what may not follow impossible.
    ///
    /// # Shapes
    /// - `logits`: `[W]`
    ///
    /// # Errors
    /// A grammar that takes more work than a token may.
    pub fn rule_out(&mut self, logits: &mut [f32]) -> Result<(), GrammarError> {
        let allowed = self.0.compute_mask_or_eos().map_err(text_error)?;
        for (token, logit) in logits.iter_mut().enumerate() {
            if token >= allowed.len() || !allowed.get(token) {
                *logit = f32::NEG_INFINITY;
            }
        }
        Ok(())
    }

    /// Takes the next token, and tells whether nothing can follow it.
    ///
    /// # Errors
    /// A token that was ruled out.
    pub fn push(&mut self, token: u32) -> Result<bool, GrammarError> {
        self.0.consume_token(token).map_err(text_error)?;
        Ok(self.0.is_stopped())
    }
}

impl fmt::Debug for Guide {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Guide")
    }
}

fn text_error(error: impl fmt::Display) -> GrammarError {
    GrammarError::Text(error.to_string())
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use deepburn_model::checkpoint;
    use proptest::prelude::*;

    use super::*;
    use crate::sampler::{Sampler, SamplerConfig};

    const EOS: u32 = 1;

    /// The fixture's tokenizer.
    fn tokenizer() -> (Tokenizer, usize) {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
        let dir = root.join("tests/fixtures/tiny-yarn");
        let shape = checkpoint::read_config(&dir).unwrap();
        let tokenizer = Tokenizer::from_file(dir.join("tokenizer.json")).unwrap();
        (tokenizer, shape.vocab_size)
    }

    /// Tokens that a model without any sense draws, and the text that they are.
    fn drawn(guide: &mut Guide, (tokenizer, vocabulary): &(Tokenizer, usize), seed: u64) -> String {
        let config = SamplerConfig {
            temperature: 1.0,
            seed,
            ..SamplerConfig::default()
        };
        let mut sampler = Sampler::new(config).unwrap();
        let mut tokens = Vec::new();
        // Ends are likely, so that texts are short.
        let end = |token: usize| {
            tokenizer
                .decode(&[token as u32], false)
                .is_ok_and(|text| text.contains(['"', '}', ']']))
        };
        loop {
            let mut logits: Vec<f32> = (0..*vocabulary)
                .map(|token| if end(token) { 6.0 } else { 0.0 })
                .collect();
            guide.rule_out(&mut logits).unwrap();
            let token = sampler.sample(&logits).unwrap();
            let over = guide.push(token).unwrap();
            if token != EOS {
                tokens.push(token);
            }
            if over || tokens.len() > 2000 {
                return tokenizer.decode(&tokens, false).unwrap();
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        #[test]
        fn whatever_is_drawn_is_json_of_the_schema(seed in any::<u64>()) {
            let tokens = tokenizer();
            let grammars = Grammars::new(&tokens.0, tokens.1, &[EOS]).unwrap();
            let schema = json!({
                "type": "object",
                "properties": {
                    "name": { "type": "string", "maxLength": 12 },
                    "kind": { "enum": ["dense", "sparse"] },
                    "experts": { "type": "array", "items": { "type": "integer", "minimum": 0, "maximum": 255 }, "maxItems": 4 },
                },
                "required": ["name", "kind", "experts"],
                "additionalProperties": false,
            });
            let text = drawn(&mut grammars.guide(&Grammar::JsonSchema(schema)).unwrap(), &tokens, seed);
            let value: Value = serde_json::from_str(&text).map_err(|error| TestCaseError::fail(format!("{error}: {text:?}")))?;
            let map = value.as_object().unwrap();
            prop_assert_eq!(map.len(), 3);
            prop_assert!(map["name"].as_str().unwrap().chars().count() <= 12);
            prop_assert!(["dense", "sparse"].contains(&map["kind"].as_str().unwrap()));
            let experts = map["experts"].as_array().unwrap();
            prop_assert!(experts.len() <= 4 && experts.iter().all(|expert| expert.as_u64().unwrap() <= 255));
        }
    }

    #[test]
    fn what_is_no_schema_or_not_supported_is_said() {
        let (tokenizer, vocabulary) = tokenizer();
        let grammars = Grammars::new(&tokenizer, vocabulary, &[EOS]).unwrap();
        for (schema, said) in [
            (json!(true), "must be an object, found true"),
            (json!({ "type": "strin" }), "strin"),
            (json!({ "$ref": "#/$defs/missing" }), "missing"),
        ] {
            let error = grammars.guide(&Grammar::JsonSchema(schema)).unwrap_err();
            assert!(error.to_string().contains(said), "{error}");
        }
        let error = Grammars::new(&tokenizer, vocabulary, &[]).unwrap_err();
        assert!(error.to_string().ends_with("it has no end-of-text token"));
    }

    #[test]
    fn a_token_that_was_ruled_out_is_an_error_and_no_panic() {
        let (tokenizer, vocabulary) = tokenizer();
        let grammars = Grammars::new(&tokenizer, vocabulary, &[EOS]).unwrap();
        let mut guide = grammars.guide(&Grammar::JsonObject).unwrap();
        let mut logits = vec![0.0; vocabulary + 3];
        guide.rule_out(&mut logits).unwrap();
        let out: Vec<usize> = (0..vocabulary + 3)
            .filter(|&token| logits[token] != 0.0)
            .collect();
        assert!(
            out.contains(&(EOS as usize))
                && out.ends_with(&[vocabulary, vocabulary + 1, vocabulary + 2])
        );
        assert!(guide.push(out[0] as u32).is_err());
    }
}
