//! Training a byte-level BPE with the `tokenizers` crate.

use tokenizers::{
    AddedToken, SplitDelimiterBehavior, Tokenizer, Trainer,
    decoders::byte_level::ByteLevel,
    models::bpe::{BPE, BpeTrainer},
    pre_tokenizers::{
        PreTokenizerWrapper,
        sequence::Sequence,
        split::{Split, SplitPattern},
    },
    utils::SysRegex,
};

use super::words::{PATTERN, pieces, words};

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

/// Trains a tokenizer on some texts: special tokens first, then the bytes, then merges until `vocab_size` tokens
/// exist or no pair of tokens occurs twice.
///
/// The same texts give the same tokenizer in any order: the most frequent pair is merged first, and of equally
/// frequent ones the one with the smallest ids. (A pair stands once in the trainer's queue, with all its places: its
/// neighbours appear together, in the merge that makes the younger of the two.)
pub(crate) fn train(texts: &[String], vocab_size: usize) -> tokenizers::Result<Tokenizer> {
    let special = SPECIAL.map(|name| AddedToken::from(name, true));
    let printable = printable_bytes();
    let mut trainer = BpeTrainer::builder()
        .vocab_size(vocab_size)
        .min_frequency(2)
        .show_progress(false)
        .special_tokens(special.to_vec())
        .initial_alphabet(printable.into_iter().collect())
        .build();
    let pattern = SysRegex::new(PATTERN)?;
    let spell = |word: &str| word.bytes().map(|byte| printable[byte as usize]).collect();
    trainer.feed(texts.iter().flat_map(|text| pieces(text)), |piece| {
        Ok(words(&pattern, piece)?.into_iter().map(spell).collect())
    })?;
    let mut model = BPE::default();
    trainer.train(&mut model)?;

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
    tokenizer.add_special_tokens(special)?;
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
