//! Single tokens as text and as bytes, for the lists of probabilities.

use tokenizers::{DecoderWrapper, Tokenizer};

/// The text of a token by itself; parts of a character become U+FFFD.
pub(super) fn text(tokenizer: &Tokenizer, id: u32) -> String {
    tokenizer.decode(&[id], false).unwrap_or_default()
}

/// The bytes of a token, which may be a part of a character; `None` if the tokenizer does not say.
pub(super) fn bytes(tokenizer: &Tokenizer, id: u32) -> Option<Vec<u8>> {
    let text = text(tokenizer, id);
    if !text.contains(char::REPLACEMENT_CHARACTER) {
        return Some(text.into_bytes());
    }
    match tokenizer.get_decoder() {
        Some(DecoderWrapper::ByteLevel(_)) => {
            let written = tokenizer.id_to_token(id)?;
            written.chars().map(byte).collect()
        }
        _ => None,
    }
}

/// The byte that a byte-level tokenizer writes as this character: printable ones stand for themselves, the others, in
/// order, for the characters from U+0100 on.
fn byte(character: char) -> Option<u8> {
    let printable = |byte: &u8| matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    match u32::from(character) {
        code @ 0..=0xFF => u8::try_from(code).ok().filter(printable),
        code => {
            let place = usize::try_from(code - 0x100).ok()?;
            (0..=u8::MAX).filter(|byte| !printable(byte)).nth(place)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_is_written_as_one_character() {
        // The alphabet of the tokenizers crate, which does not say which character is which byte.
        let alphabet = tokenizers::pre_tokenizers::byte_level::ByteLevel::alphabet();
        let mut bytes: Vec<u8> = alphabet
            .iter()
            .filter_map(|&written| byte(written))
            .collect();
        bytes.sort_unstable();
        assert_eq!(bytes, (0..=u8::MAX).collect::<Vec<_>>());
        // From GPT-2's published vocabulary: a space is written as U+0120, a line feed as U+010A.
        assert_eq!(
            [byte('\u{120}'), byte('\u{10a}'), byte('a'), byte('é')],
            [Some(b' '), Some(b'\n'), Some(b'a'), Some(0xE9)]
        );
        assert_eq!([byte(' '), byte('漢')], [None, None]);
    }
}
