//! From generated token ids to pieces of text that can be shown at once.
//!
//! Two things stand between a token and its text: a byte-level token may end inside a character,
//! and a stop string may begin in one token and end in another. [`TextStream`] holds back what is
//! not decided yet, and no more. The pieces put together are the tokenizer's decode of all ids with
//! special tokens skipped, up to the first stop string.

use tokenizers::Tokenizer;

/// What a token added to the text.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Piece {
    /// Text that is now decided; often empty.
    pub text: String,
    /// The index of the stop string that ended the text.
    pub stopped: Option<usize>,
}

/// Why a stream could not be made or continued.
#[derive(Debug, thiserror::Error)]
pub enum TextError {
    /// An empty stop string would stop before the first token.
    #[error("stop string {index} is empty: it must have at least one character")]
    EmptyStop {
        /// Its place in the list.
        index: usize,
    },
    /// The tokenizer could not decode.
    #[error("the tokenizer cannot decode tokens {ids:?}: {source}")]
    Decode {
        /// The tokens handed to the tokenizer.
        ids: Vec<u32>,
        /// What it said.
        source: tokenizers::Error,
    },
    /// The decoder changed text that later tokens should only have extended, so what was shown
    /// would be wrong. Byte-level decoders do not do this.
    #[error("tokens {ids:?} decode to {found:?}: it must begin with {shown:?}, already shown")]
    Rewritten {
        /// The tokens handed to the tokenizer.
        ids: Vec<u32>,
        /// Their text before the last token.
        shown: String,
        /// Their text now.
        found: String,
    },
}

/// Turns token ids into text while they are generated.
///
/// The first stop string to be complete ends the text, the longest of those that end together, and
/// the text before it is all that is given out. How the text was cut into tokens has no influence.
#[derive(Debug, Clone)]
pub struct TextStream<'a> {
    detokenizer: Detokenizer<'a>,
    stop: Vec<String>,
    /// Text that may be the beginning of a stop string.
    held: String,
    stopped: Option<usize>,
}

impl<'a> TextStream<'a> {
    /// A stream at the beginning of a text; `stop` may be empty, its strings may not.
    pub fn new(tokenizer: &'a Tokenizer, stop: &[String]) -> Result<Self, TextError> {
        if let Some(index) = stop.iter().position(String::is_empty) {
            return Err(TextError::EmptyStop { index });
        }
        Ok(Self {
            detokenizer: Detokenizer::new(tokenizer),
            stop: stop.to_vec(),
            held: String::new(),
            stopped: None,
        })
    }

    /// Takes the next token and returns the text that it decides.
    ///
    /// Special tokens and ids that the tokenizer does not know have no text. Once stopped, the
    /// stream ignores further tokens and keeps reporting the same stop string.
    pub fn push(&mut self, id: u32) -> Result<Piece, TextError> {
        if self.stopped.is_some() {
            return Ok(Piece {
                text: String::new(),
                stopped: self.stopped,
            });
        }
        let text = self.detokenizer.push(id)?;
        Ok(self.release(&text))
    }

    /// Ends the text and returns what was held back; a character cut short becomes U+FFFD.
    pub fn finish(mut self) -> Result<String, TextError> {
        if self.stopped.is_some() {
            return Ok(String::new());
        }
        let rest = self.detokenizer.finish()?;
        let decided = self.release(&rest).text;
        Ok(decided + &self.held)
    }

    /// Adds `text` to what is held and takes out what cannot belong to a stop string any more.
    fn release(&mut self, text: &str) -> Piece {
        self.held.push_str(text);
        if let Some((start, index)) = first_complete(&self.held, &self.stop) {
            self.held.truncate(start);
            self.stopped = Some(index);
            return Piece {
                text: std::mem::take(&mut self.held),
                stopped: self.stopped,
            };
        }
        let undecided = self.held.split_off(possible_start(&self.held, &self.stop));
        let text = std::mem::replace(&mut self.held, undecided);
        Piece {
            text,
            stopped: None,
        }
    }
}

/// The start and the index of the stop string in `text` that ends first; the longest of those that
/// end together, and the first in the list of equal ones.
fn first_complete(text: &str, stop: &[String]) -> Option<(usize, usize)> {
    let found = stop.iter().enumerate().filter_map(|(index, s)| {
        let start = text.find(s.as_str())?;
        Some((start + s.len(), start, index))
    });
    found.min().map(|(_, start, index)| (start, index))
}

/// Where the longest end of `text` starts that is the beginning of a stop string; else its length.
fn possible_start(text: &str, stop: &[String]) -> usize {
    text.char_indices()
        .map(|(start, _)| start)
        .find(|&start| stop.iter().any(|s| s.starts_with(&text[start..])))
        .unwrap_or(text.len())
}

/// Decodes token by token, holding back a character that is not complete.
///
/// Decoding the whole history for every token is quadratic in the length of the text. Decoding each
/// token alone is wrong: bytes of one character lie in several tokens, and some decoders treat the
/// first token differently (they strip its leading space). So a window is decoded: the new tokens
/// behind those of the last complete piece of text, which give them their left context.
#[derive(Debug, Clone)]
struct Detokenizer<'a> {
    tokenizer: &'a Tokenizer,
    window: Vec<u32>,
    /// How many tokens of the window are there for context only, from the last place where the text
    /// ended with a complete character.
    context: usize,
    /// What the window decodes to without an undecided end. It has been given out.
    shown: String,
}

/// While the text ends with U+FFFD no complete character says where to cut the window. That can go
/// on for ever, since an untrained model writes bytes at random, so beyond this length
/// [`Detokenizer::cut_invalid`] looks for a place.
const LONG_WINDOW: usize = 16;

impl<'a> Detokenizer<'a> {
    fn new(tokenizer: &'a Tokenizer) -> Self {
        Self {
            tokenizer,
            window: Vec::new(),
            context: 0,
            shown: String::new(),
        }
    }

    fn push(&mut self, id: u32) -> Result<String, TextError> {
        if !self.has_text(id) {
            return Ok(String::new());
        }
        self.window.push(id);
        let text = self.decode(&self.window)?;
        // A trailing U+FFFD may be a character cut short; one character is at most one of them.
        let decided = text
            .strip_suffix(char::REPLACEMENT_CHARACTER)
            .unwrap_or(&text);
        let new = self.after_shown(decided)?.to_owned();
        self.shown = decided.to_owned();
        if decided.len() < text.len() {
            if self.window.len() > LONG_WINDOW {
                self.cut_invalid(&text)?;
            }
        } else {
            self.window.drain(..self.context);
            self.context = self.window.len();
            self.shown = self.decode(&self.window)?;
        }
        Ok(new)
    }

    fn finish(&self) -> Result<String, TextError> {
        let text = self.decode(&self.window)?;
        self.after_shown(&text).map(str::to_owned)
    }

    /// Drops the front of a window whose `text` ends with U+FFFD.
    ///
    /// A place between two tokens is inside a character, or inside bytes which become one U+FFFD
    /// together, exactly if decoding the two sides apart gives another text: both sides have a
    /// U+FFFD then where the whole has one character. What cannot be separated has at most four
    /// bytes, so one of the last four places will do.
    fn cut_invalid(&mut self, text: &str) -> Result<(), TextError> {
        for at in (1..self.window.len()).rev() {
            let right = self.decode(&self.window[at..])?;
            let Some(left) = text.strip_suffix(right.as_str()) else {
                continue;
            };
            if left.len() <= self.shown.len() && left == self.decode(&self.window[..at])? {
                self.window.drain(..at);
                self.context = 0;
                self.shown = self.shown.split_off(left.len());
                return Ok(());
            }
        }
        Ok(())
    }

    /// Tokens without text stay out of the window: they would fill it, or be all of its context.
    fn has_text(&self, id: u32) -> bool {
        let special = |token: String| {
            self.tokenizer
                .get_added_vocabulary()
                .is_special_token(&token)
        };
        self.tokenizer
            .id_to_token(id)
            .is_some_and(|token| !special(token))
    }

    fn decode(&self, ids: &[u32]) -> Result<String, TextError> {
        let failed = |source| TextError::Decode {
            ids: ids.to_vec(),
            source,
        };
        self.tokenizer.decode(ids, true).map_err(failed)
    }

    fn after_shown<'t>(&self, text: &'t str) -> Result<&'t str, TextError> {
        text.strip_prefix(self.shown.as_str())
            .ok_or_else(|| TextError::Rewritten {
                ids: self.window.clone(),
                shown: self.shown.clone(),
                found: text.to_owned(),
            })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tokenizers::decoders::byte_fallback::ByteFallback;
    use tokenizers::decoders::metaspace::{Metaspace, PrependScheme};
    use tokenizers::models::bpe::BPE;
    use tokenizers::pre_tokenizers::byte_level::ByteLevel;
    use tokenizers::{AddedToken, DecoderWrapper, PreTokenizerWrapper};

    use super::*;

    /// Every byte, a few merges that end inside characters (of "日" and of emoji), a special token.
    fn byte_level() -> Tokenizer {
        let merges: Vec<(String, String)> = [
            ("t", "h"),
            ("th", "e"),
            ("Ġ", "the"),
            ("æ", "Ĺ"),
            ("Ġ", "æ"),
            ("ð", "Ł"),
            ("e", "ð"),
        ]
        .map(|(a, b)| (a.to_owned(), b.to_owned()))
        .to_vec();
        let mut alphabet: Vec<char> = ByteLevel::alphabet().into_iter().collect();
        alphabet.sort_unstable();
        let tokens = alphabet.iter().map(char::to_string);
        let tokens = tokens.chain(merges.iter().map(|(a, b)| format!("{a}{b}")));
        let model = BPE::new(tokens.zip(0..).collect(), merges);
        let pieces = ByteLevel::new(false, false, false);
        let mut tokenizer = Tokenizer::new(model);
        tokenizer.with_pre_tokenizer(Some(PreTokenizerWrapper::ByteLevel(pieces)));
        tokenizer.with_decoder(Some(DecoderWrapper::ByteLevel(pieces)));
        tokenizer
            .add_special_tokens([AddedToken::from("<|end|>", true)])
            .unwrap();
        tokenizer
    }

    /// The bytes as one token each, in the order of [`byte_level`]'s first 256 tokens.
    fn byte_ids(tokenizer: &Tokenizer, bytes: &[u8]) -> Vec<u32> {
        // Printable Latin-1 stands for itself, the other bytes for U+0100 and up in their order.
        let own = |b: u8| matches!(b, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
        let others: Vec<u8> = (0..=255).filter(|&b| !own(b)).collect();
        let symbol = |b: u8| match others.iter().position(|&o| o == b) {
            Some(place) => char::from_u32(256 + u32::try_from(place).unwrap()).unwrap(),
            None => char::from(b),
        };
        bytes
            .iter()
            .map(|&b| tokenizer.token_to_id(&symbol(b).to_string()).unwrap())
            .collect()
    }

    fn ids(tokenizer: &Tokenizer, text: &str) -> Vec<u32> {
        tokenizer
            .encode_fast(text, false)
            .unwrap()
            .get_ids()
            .to_vec()
    }

    fn owned(stop: &[&str]) -> Vec<String> {
        stop.iter().map(|s| (*s).to_owned()).collect()
    }

    /// The pieces, the last one from `finish`, and the stop string that was reported.
    fn stream(tokenizer: &Tokenizer, ids: &[u32], stop: &[&str]) -> (Vec<String>, Option<usize>) {
        let mut stream = TextStream::new(tokenizer, &owned(stop)).unwrap();
        let mut pieces = Vec::new();
        let mut stopped = None;
        for &id in ids {
            let piece = stream.push(id).unwrap();
            pieces.push(piece.text);
            stopped = piece.stopped;
        }
        pieces.push(stream.finish().unwrap());
        (pieces, stopped)
    }

    /// Reads the text character by character until a stop string is complete.
    fn cut(text: &str, stop: &[&str]) -> (String, Option<usize>) {
        for end in (1..=text.len()).filter(|&end| text.is_char_boundary(end)) {
            let here = (0..stop.len()).filter(|&i| text[..end].ends_with(stop[i]));
            let longest = here.max_by_key(|&i| (stop[i].len(), std::cmp::Reverse(i)));
            if let Some(index) = longest {
                return (text[..end - stop[index].len()].to_owned(), Some(index));
            }
        }
        (text.to_owned(), None)
    }

    #[test]
    fn characters_come_out_whole_and_at_once() {
        let tokenizer = byte_level();
        let ids = ids(&tokenizer, "the 日🙂x");
        let tokens: Vec<String> = ids
            .iter()
            .map(|&id| tokenizer.id_to_token(id).unwrap())
            .collect();
        assert_eq!(tokens, ["the", "Ġ", "æĹ", "¥", "ðŁ", "Ļ", "Ĥ", "x"]);
        let (pieces, _) = stream(&tokenizer, &ids, &[]);
        assert_eq!(pieces, ["the", " ", "", "日", "", "", "🙂", "x", ""]);
    }

    #[test]
    fn a_character_cut_short_becomes_a_replacement() {
        let tokenizer = byte_level();
        let (pieces, _) = stream(&tokenizer, &byte_ids(&tokenizer, b"a\xF0\x9F\x99"), &[]);
        assert_eq!(pieces, ["a", "", "", "", "\u{FFFD}"]);
        let (pieces, _) = stream(
            &tokenizer,
            &byte_ids(&tokenizer, b"\xF0\x9Fb\xFF\xFFc"),
            &[],
        );
        assert_eq!(
            pieces,
            ["", "", "\u{FFFD}b", "", "\u{FFFD}", "\u{FFFD}c", ""]
        );
    }

    #[test]
    fn a_real_replacement_character_is_kept() {
        let tokenizer = byte_level();
        let text = "a\u{FFFD}b\u{FFFD}";
        assert_eq!(
            stream(&tokenizer, &ids(&tokenizer, text), &[]).0.concat(),
            text
        );
        let (pieces, _) = stream(&tokenizer, &ids(&tokenizer, text), &["b\u{FFFD}"]);
        assert_eq!(pieces.concat(), "a\u{FFFD}");
    }

    #[test]
    fn special_and_unknown_tokens_have_no_text() {
        let tokenizer = byte_level();
        let end = tokenizer.token_to_id("<|end|>").unwrap();
        let mut ids = byte_ids(&tokenizer, "é日".as_bytes());
        for at in (0..=ids.len()).rev() {
            ids.splice(at..at, [end, 1_000_000]);
        }
        assert_eq!(stream(&tokenizer, &ids, &[]).0.concat(), "é日");
    }

    /// Neither a long text, nor invalid bytes without end, nor special tokens fill the window.
    #[test]
    fn the_window_stays_small() {
        let tokenizer = byte_level();
        let end = tokenizer.token_to_id("<|end|>").unwrap();
        let texts = [
            "the 日🙂x".as_bytes(),
            b"\xFF",
            b"\xE6\x97",
            b"\xF0\x9F\x99\xF0",
            "\u{FFFD}".as_bytes(),
        ];
        let mut inputs: Vec<Vec<u32>> = texts.map(|t| byte_ids(&tokenizer, &t.repeat(50))).to_vec();
        inputs.push(vec![end; 200]);
        for ids in inputs {
            let mut detokenizer = Detokenizer::new(&tokenizer);
            let mut text = String::new();
            for &id in &ids {
                text += &detokenizer.push(id).unwrap();
                assert!(
                    detokenizer.window.len() <= LONG_WINDOW,
                    "{:?}",
                    detokenizer.window
                );
            }
            text += &detokenizer.finish().unwrap();
            assert_eq!(text, tokenizer.decode(&ids, true).unwrap());
        }
    }

    #[test]
    fn decoders_that_strip_the_first_space_keep_the_others() {
        let tokens = ["▁a", "▁b", "▁"].map(str::to_owned);
        let mut tokenizer = Tokenizer::new(BPE::new(tokens.into_iter().zip(0..).collect(), vec![]));
        let metaspace = Metaspace::new('▁', PrependScheme::Always, true);
        tokenizer.with_decoder(Some(DecoderWrapper::Metaspace(metaspace)));
        for ids in [[0, 1, 1, 2, 2, 0], [2, 2, 0, 2, 1, 2]] {
            let (pieces, _) = stream(&tokenizer, &ids, &[]);
            assert_eq!(pieces.concat(), tokenizer.decode(&ids, true).unwrap());
        }
    }

    #[test]
    fn a_decoder_that_rewrites_is_refused() {
        let tokens = ["<0xE5>", "<0x8F>", "<0xAB>"].map(str::to_owned);
        let mut tokenizer = Tokenizer::new(BPE::new(tokens.into_iter().zip(0..).collect(), vec![]));
        tokenizer.with_decoder(Some(DecoderWrapper::ByteFallback(ByteFallback::new())));
        let mut stream = TextStream::new(&tokenizer, &[]).unwrap();
        let results = [0, 1, 2].map(|id| stream.push(id));
        assert!(matches!(&results[2], Err(TextError::Rewritten { found, .. }) if found == "叫"));
    }

    #[test]
    fn empty_stop_strings_are_refused() {
        let error = TextStream::new(&byte_level(), &owned(&["x", ""])).unwrap_err();
        assert_eq!(
            error.to_string(),
            "stop string 1 is empty: it must have at least one character"
        );
    }

    #[test]
    fn a_possible_beginning_is_held_until_decided() {
        let tokenizer = byte_level();
        let ids = byte_ids(&tokenizer, b"aaab<x<e><end>tail");
        let (pieces, stopped) = stream(&tokenizer, &ids, &["<end>"]);
        let text: Vec<&str> = pieces.iter().map(String::as_str).collect();
        let expected = [
            "a", "a", "a", "b", "", "<x", "", "", "<e>", "", "", "", "", "",
        ];
        assert_eq!(text[..14], expected);
        assert!(text[14..].iter().all(|t| t.is_empty()));
        assert_eq!(stopped, Some(0));
        // Held text comes out at the end if it was no stop string.
        let ids = byte_ids(&tokenizer, b"a<en");
        assert_eq!(
            stream(&tokenizer, &ids, &["<end>"]).0,
            ["a", "", "", "", "<en"]
        );
        // A beginning inside a beginning: the second "ab" must not be lost.
        let ids = byte_ids(&tokenizer, b"xababc");
        let (pieces, stopped) = stream(&tokenizer, &ids, &["abc"]);
        assert_eq!((pieces.concat().as_str(), stopped), ("xab", Some(0)));
    }

    #[test]
    fn the_stop_string_complete_first_wins_and_then_the_longest() {
        let tokenizer = byte_level();
        let run = |text: &str, stop: &[&str]| {
            let (pieces, stopped) = stream(&tokenizer, &ids(&tokenizer, text), stop);
            (pieces.concat(), stopped)
        };
        assert_eq!(run("the end", &["he e", "e"]), ("th".to_owned(), Some(1)));
        // Both are complete within the token "the".
        assert_eq!(run("the end", &["the", "h"]), ("t".to_owned(), Some(1)));
        assert_eq!(run("the end", &["e", "the"]), (String::new(), Some(1)));
        assert_eq!(run("the end", &["nd", "nd"]), ("the e".to_owned(), Some(0)));
        assert_eq!(run("x日y", &["日"]), ("x".to_owned(), Some(0)));
    }

    #[test]
    fn a_stopped_stream_stays_stopped() {
        let tokenizer = byte_level();
        let mut stream = TextStream::new(&tokenizer, &owned(&["b"])).unwrap();
        let pushed = byte_ids(&tokenizer, b"abc")
            .into_iter()
            .map(|id| stream.push(id).unwrap());
        let pushed: Vec<(String, Option<usize>)> = pushed.map(|p| (p.text, p.stopped)).collect();
        let empty = String::new();
        assert_eq!(
            pushed,
            [
                ("a".to_owned(), None),
                (empty.clone(), Some(0)),
                (empty, Some(0))
            ]
        );
        assert_eq!(stream.finish().unwrap(), "");
    }

    proptest! {
        #[test]
        fn pieces_make_up_the_text(text in "(\\PC|the |日|🙂|\u{FFFD}){0,40}") {
            let tokenizer = byte_level();
            let (pieces, _) = stream(&tokenizer, &ids(&tokenizer, &text), &[]);
            prop_assert_eq!(pieces.concat(), text.as_str());
            let (pieces, _) = stream(&tokenizer, &byte_ids(&tokenizer, text.as_bytes()), &[]);
            prop_assert_eq!(pieces.concat(), text);
        }

        #[test]
        fn pieces_make_up_the_decode_of_any_ids(
            ids in proptest::collection::vec(
                prop_oneof![0_u32..270, 128_u32..264, Just(187), Just(113)], 0..120),
        ) {
            let tokenizer = byte_level();
            let (pieces, _) = stream(&tokenizer, &ids, &[]);
            prop_assert_eq!(pieces.concat(), tokenizer.decode(&ids, true).unwrap());
        }

        #[test]
        fn stop_strings_cut_at_their_first_occurrence(
            text in "[ab日é\u{FFFD}]{0,40}",
            stop in proptest::collection::vec("[ab日é\u{FFFD}]{1,4}", 1..4),
            bytes in any::<bool>(),
        ) {
            let tokenizer = byte_level();
            let stop: Vec<&str> = stop.iter().map(String::as_str).collect();
            let ids = if bytes {
                byte_ids(&tokenizer, text.as_bytes())
            } else {
                ids(&tokenizer, &text)
            };
            let (pieces, stopped) = stream(&tokenizer, &ids, &stop);
            let (expected, index) = cut(&text, &stop);
            prop_assert_eq!(pieces.concat(), expected);
            // A final U+FFFD is decided by `finish`, which returns text only.
            if !text.ends_with('\u{FFFD}') {
                prop_assert_eq!(stopped, index);
            }
        }

        #[test]
        fn a_stop_string_put_anywhere_is_found(
            before in "[a-e日🙂 ]{0,20}", after in "\\PC{0,20}", stop in "[STOP日]{1,5}#",
        ) {
            let tokenizer = byte_level();
            let text = format!("{before}{stop}{after}");
            let (pieces, stopped) = stream(&tokenizer, &ids(&tokenizer, &text), &[&stop]);
            prop_assert_eq!(pieces.concat(), before);
            prop_assert_eq!(stopped, Some(0));
        }
    }
}
