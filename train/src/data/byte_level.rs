//! Learned merges as a byte-level BPE of the `tokenizers` crate.

use tokenizers::{
    AddedToken, SplitDelimiterBehavior, Tokenizer,
    decoders::byte_level::ByteLevel,
    models::bpe::{BPE, Vocab},
    pre_tokenizers::{
        PreTokenizerWrapper,
        sequence::Sequence,
        split::{Split, SplitPattern},
    },
};

use super::{bpe::Learned, words::PATTERN};

/// DeepSeek's names, in the order of their ids.
pub(crate) const SPECIAL: [&str; 6] = [
    "<｜begin▁of▁sentence｜>",
    "<｜end▁of▁sentence｜>",
    "<｜▁pad▁｜>",
    "<｜fim▁begin｜>",
    "<｜fim▁hole｜>",
    "<｜fim▁end｜>",
];

/// The first id after the special tokens and the 256 bytes.
pub(crate) const FIRST_MERGED_ID: u32 = SPECIAL.len() as u32 + 256;

/// Special tokens first, then the bytes, then the merges in their order.
pub(crate) fn tokenizer(learned: Learned) -> tokenizers::Result<Tokenizer> {
    let printable = printable_bytes();
    let spell = |bytes: &[u8]| {
        bytes
            .iter()
            .map(|&b| printable[b as usize])
            .collect::<String>()
    };
    let names: Vec<String> = learned.tokens.iter().map(|bytes| spell(bytes)).collect();
    let vocabulary: Vocab = SPECIAL
        .iter()
        .map(|s| (*s).to_owned())
        .chain(names.iter().cloned())
        .zip(0..)
        .collect();
    let merges = learned.merges.iter();
    let merges = merges
        .map(|&(a, b)| (names[a as usize].clone(), names[b as usize].clone()))
        .collect();
    let model = BPE::builder()
        .vocab_and_merges(vocabulary, merges)
        .build()?;

    let pattern = SplitPattern::Regex(PATTERN.to_owned());
    let split = Split::new(pattern, SplitDelimiterBehavior::Isolated, false)?;
    let bytes = ByteLevel::new(false, false, false);
    let steps = vec![
        PreTokenizerWrapper::Split(split),
        PreTokenizerWrapper::ByteLevel(bytes),
    ];
    let mut tokenizer = Tokenizer::new(model);
    tokenizer
        .with_pre_tokenizer(Some(Sequence::new(steps)))
        .with_decoder(Some(bytes));
    tokenizer.add_special_tokens(SPECIAL.map(|name| AddedToken::from(name, true)))?;
    Ok(tokenizer)
}

/// The visible character by which GPT-2's byte-level scheme, and so `tokenizer.json`, spells each byte.
fn printable_bytes() -> [char; 256] {
    let mut next = 256;
    std::array::from_fn(|byte| {
        let byte = byte as u8;
        match byte {
            b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF => char::from(byte),
            _ => {
                next += 1;
                char::from_u32(next - 1).expect("256 to 323 are letters of Latin Extended-A")
            }
        }
    })
}
