//! The tokenizer: a byte-level BPE of our own, or any `tokenizer.json`.

use std::{
    fs,
    path::{Path, PathBuf},
};

use super::{
    byte_level::{self, SPECIAL},
    error::DataError,
    fim::FimTokens,
    words::pieces,
};

const END: [&str; 4] = [SPECIAL[1], "<|endoftext|>", "</s>", "<|end_of_text|>"];
const BEGIN: [&str; 3] = [SPECIAL[0], "<|begin_of_text|>", "<s>"];
/// Begin, hole and end: DeepSeek's names, Qwen's, StarCoder's.
const FIM: [[&str; 3]; 3] = [
    [SPECIAL[3], SPECIAL[4], SPECIAL[5]],
    ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"],
    ["<fim_prefix>", "<fim_suffix>", "<fim_middle>"],
];

/// A tokenizer with the ids the pipeline needs.
#[derive(Clone, Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    path: PathBuf,
    vocab_size: usize,
    eos: u32,
}

impl Tokenizer {
    /// Loads a `tokenizer.json`.
    ///
    /// Byte-level ones return every text exactly. Others may not: some put a space before a text, and so before
    /// each part of a document that is cut (for infilling, or above 256 KiB).
    ///
    /// # Errors
    /// If the file cannot be read or parsed, or has no end-of-text token.
    pub fn load(path: &Path) -> Result<Self, DataError> {
        let bytes = fs::read(path).map_err(DataError::io(path, "read the tokenizer"))?;
        let inner = tokenizers::Tokenizer::from_bytes(bytes).map_err(|e| failed(path, &*e))?;
        Self::new(inner, path)
    }

    /// Trains a byte-level BPE. The same texts give the same tokenizer, byte for byte.
    pub(crate) fn train(texts: &[String], vocab_size: usize) -> Result<Self, DataError> {
        let path = Path::new("(trained)");
        let inner = byte_level::train(texts, vocab_size).map_err(|e| failed(path, &*e))?;
        Self::new(inner, path)
    }

    fn new(mut inner: tokenizers::Tokenizer, path: &Path) -> Result<Self, DataError> {
        // A file may ask for these; both would change documents.
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|e| failed(path, &*e))?;
        // Text that spells a special token is text: only the pipeline itself writes special tokens.
        inner.set_encode_special_tokens(true);
        let eos = END
            .iter()
            .find_map(|name| inner.token_to_id(name))
            .ok_or_else(|| {
                let looked_for = END.join(", ");
                DataError::MissingToken {
                    path: path.into(),
                    role: "end-of-text",
                    looked_for,
                }
            })?;
        // Ids can have gaps, and a model needs a row for the highest one.
        let vocab_size = inner
            .get_vocab(true)
            .into_values()
            .max()
            .map_or(0, |id| id as usize + 1);
        Ok(Self {
            inner,
            path: path.into(),
            vocab_size,
            eos,
        })
    }

    /// One more than the highest token id.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// The token that ends a document.
    pub fn eos_id(&self) -> u32 {
        self.eos
    }

    /// The token that begins a text, where the tokenizer has one.
    pub fn bos_id(&self) -> Option<u32> {
        BEGIN.iter().find_map(|name| self.inner.token_to_id(name))
    }

    /// The three infilling tokens (DeepSeek-V3 report, 4.1).
    ///
    /// # Errors
    /// If the tokenizer lacks one of them.
    pub fn fim_tokens(&self) -> Result<FimTokens, DataError> {
        let id = |name: &str| self.inner.token_to_id(name);
        let found = FIM.iter().find_map(|[begin, hole, end]| {
            Some(FimTokens {
                begin: id(begin)?,
                hole: id(hole)?,
                end: id(end)?,
            })
        });
        found.ok_or_else(|| DataError::MissingToken {
            path: self.path.clone(),
            role: "fill-in-the-middle (data.fim_rate is above 0)",
            looked_for: FIM.map(|names| names.join(" ")).join(", or "),
        })
    }

    /// The tokens of a text, without any special ones.
    ///
    /// # Errors
    /// If the tokenizer fails on the text.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, DataError> {
        Ok(self.encode_batch(&[text])?.pop().unwrap_or_default())
    }

    /// The tokens of several texts, computed on all processors.
    ///
    /// # Errors
    /// If the tokenizer fails on a text.
    pub fn encode_batch(&self, texts: &[&str]) -> Result<Vec<Vec<u32>>, DataError> {
        let mut inputs = Vec::new();
        let mut owners = Vec::new();
        for (owner, text) in texts.iter().enumerate() {
            for piece in pieces(text) {
                inputs.push(piece);
                owners.push(owner);
            }
        }
        let encodings = self
            .inner
            .encode_batch_fast(inputs, false)
            .map_err(|e| failed(&self.path, &*e))?;
        let mut tokens = vec![Vec::new(); texts.len()];
        for (encoding, owner) in encodings.iter().zip(owners) {
            tokens[owner].extend_from_slice(encoding.get_ids());
        }
        Ok(tokens)
    }

    /// The text of some tokens, special ones included by name.
    ///
    /// # Errors
    /// If the tokenizer's decoder fails.
    pub fn decode(&self, tokens: &[u32]) -> Result<String, DataError> {
        self.inner
            .decode(tokens, false)
            .map_err(|e| failed(&self.path, &*e))
    }

    /// The contents of a `tokenizer.json`.
    ///
    /// # Errors
    /// If the tokenizer cannot be serialised.
    pub fn to_json(&self) -> Result<String, DataError> {
        self.inner
            .to_string(true)
            .map_err(|e| failed(&self.path, &*e))
    }
}

fn failed(path: &Path, error: &(dyn std::error::Error + Send + Sync)) -> DataError {
    DataError::Tokenizer {
        path: path.into(),
        what: error.to_string(),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::data::byte_level::FIRST_MERGED_ID;

    pub(crate) const CODE: &str =
        "fn main() {\n\tlet x = 12345;\r\n    println!(\"héllo 🦀 {x}\");\n}\n\n// 漢字\n";

    fn trained(text: &str, vocab_size: usize) -> Tokenizer {
        Tokenizer::train(&[text.to_owned()], vocab_size).unwrap()
    }

    #[test]
    fn special_tokens_come_first_and_bytes_follow() {
        let tokenizer = trained(&CODE.repeat(4), 300);
        for (id, name) in SPECIAL.iter().enumerate() {
            assert_eq!(tokenizer.inner.token_to_id(name), Some(id as u32));
        }
        assert_eq!(tokenizer.vocab_size(), 300);
        assert_eq!((tokenizer.eos_id(), tokenizer.bos_id()), (1, Some(0)));
        assert_eq!(
            tokenizer.fim_tokens().unwrap(),
            FimTokens {
                begin: 3,
                hole: 4,
                end: 5
            }
        );
        // Without merges every byte is a token.
        let bytes: String = (0..128).map(char::from).chain(['é', '漢', '🦀']).collect();
        let tokens = trained("", 300).encode(&bytes).unwrap();
        assert_eq!(tokens.len(), bytes.len());
        assert!(
            tokens
                .iter()
                .all(|token| (6..FIRST_MERGED_ID).contains(token))
        );
    }

    #[test]
    fn every_text_comes_back() {
        let tokenizer = trained(&CODE.repeat(4), 320);
        let odd = "\u{0}\u{7f}\u{a0}\u{ad}\u{2028} \t \r\n\r\n   e\u{301} \u{10ffff}";
        for text in [
            CODE,
            odd,
            "",
            " ",
            "\n",
            &CODE.repeat(9000),
            &"🦀".repeat(99_999),
        ] {
            let tokens = tokenizer.encode(text).unwrap();
            assert!(tokens.iter().all(|&t| t >= SPECIAL.len() as u32));
            assert_eq!(tokenizer.decode(&tokens).unwrap(), text);
        }
        assert!(
            tokenizer.encode(CODE).unwrap().len() < CODE.len() / 2,
            "nothing was merged"
        );
    }

    #[test]
    fn text_that_spells_a_special_token_stays_text() {
        let tokenizer = trained(CODE, 262);
        let text = format!("a{}b", SPECIAL[1]);
        let tokens = tokenizer.encode(&text).unwrap();
        assert!(!tokens.contains(&tokenizer.eos_id()));
        assert_eq!(tokenizer.decode(&tokens).unwrap(), text);
    }

    #[test]
    fn training_is_reproducible_and_the_file_encodes_alike() {
        let text = include_str!("tokenizer.rs");
        let mut parts: Vec<String> = text.split_inclusive("\n\n").map(str::to_owned).collect();
        let tokenizer = Tokenizer::train(&parts, 600).unwrap();
        let json = tokenizer.to_json().unwrap();
        for _ in 0..4 {
            parts.rotate_left(7);
            assert_eq!(
                Tokenizer::train(&parts, 600).unwrap().to_json().unwrap(),
                json
            );
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tokenizer.json");
        fs::write(&path, &json).unwrap();
        let loaded = Tokenizer::load(&path).unwrap();
        assert_eq!(
            loaded.encode(text).unwrap(),
            tokenizer.encode(text).unwrap()
        );
        assert_eq!(loaded.vocab_size(), 600);
    }

    #[test]
    fn missing_tokens_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tokenizer.json");
        let write = |eos: &str| {
            let json = trained(CODE, 262)
                .to_json()
                .unwrap()
                .replace("fim▁hole", "fim▁gone");
            fs::write(&path, json.replace(SPECIAL[1], eos)).unwrap();
        };
        write("<|end|>");
        let error = Tokenizer::load(&path).unwrap_err().to_string();
        assert!(
            error.contains("end-of-text") && error.contains("</s>"),
            "{error}"
        );
        write("</s>");
        let error = Tokenizer::load(&path)
            .unwrap()
            .fim_tokens()
            .unwrap_err()
            .to_string();
        assert!(error.contains("fim▁hole"), "{error}");
        fs::write(&path, "{").unwrap();
        let error = Tokenizer::load(&path).unwrap_err().to_string();
        assert!(error.contains("tokenizer.json"), "{error}");
    }
}
