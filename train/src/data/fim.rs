//! Fill-in-the-middle: some documents are rearranged so that the model learns to complete a gap.
//!
//! DeepSeek-V3 (report, 4.1) uses the prefix-suffix-middle form at a rate of 0.1, on whole documents before packing:
//! `<|fim_begin|> prefix <|fim_hole|> suffix <|fim_end|> middle <|eos_token|>`.

use rand::RngCore;

use super::hash::{below, generator};

/// The ids of the three infilling tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FimTokens {
    /// Before the prefix.
    pub begin: u32,
    /// In place of the middle, before the suffix.
    pub hole: u32,
    /// Before the middle.
    pub end: u32,
}

/// A document in three parts. Each may be empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parts<T> {
    /// Up to the gap.
    pub prefix: T,
    /// The gap.
    pub middle: T,
    /// After the gap.
    pub suffix: T,
}

/// Splits a document at two random characters, for a share `rate` of all documents.
///
/// The answer depends on the seed, the document's index and its text alone.
pub fn split(text: &str, rate: f64, seed: u64, document: u64) -> Option<Parts<&str>> {
    let mut random = generator("fim", seed, document);
    // 53 bits, so that a rate of 1 takes every document.
    let draw = (random.next_u64() >> 11) as f64 / (1u64 << 53) as f64;
    if draw >= rate {
        return None;
    }
    let mut cut = || {
        let byte = below(&mut random, text.len() as u64 + 1);
        text.floor_char_boundary(byte as usize)
    };
    let (one, other) = (cut(), cut());
    let (first, second) = (one.min(other), one.max(other));
    Some(Parts {
        prefix: &text[..first],
        middle: &text[first..second],
        suffix: &text[second..],
    })
}

/// Puts the tokens of the parts into the prefix-suffix-middle form, up to the end-of-text token.
pub fn arrange(tokens: FimTokens, parts: Parts<&[u32]>) -> Vec<u32> {
    let marks = [[tokens.begin], [tokens.hole], [tokens.end]];
    let [begin, hole, end] = &marks;
    [
        &begin[..],
        parts.prefix,
        hole,
        parts.suffix,
        end,
        parts.middle,
    ]
    .concat()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn parts_in_order_are_the_document(text in "\\PC{0,60}", seed: u64, document: u64) {
            let parts = split(&text, 1.0, seed, document).unwrap();
            prop_assert_eq!([parts.prefix, parts.middle, parts.suffix].concat(), text.clone());
            prop_assert_eq!(split(&text, 1.0, seed, document), Some(parts));
            prop_assert_eq!(split(&text, 0.0, seed, document), None);
        }
    }

    #[test]
    fn the_rate_is_kept_and_cuts_vary() {
        let taken: Vec<_> = (0..20_000)
            .filter_map(|i| split("abcdefghij", 0.1, 7, i))
            .collect();
        // Five standard deviations of a binomial with n = 20000, p = 0.1 are 212.
        assert!(taken.len().abs_diff(2000) < 212, "{}", taken.len());
        for length in 0..=10 {
            assert!(
                taken.iter().any(|parts| parts.middle.len() == length),
                "{length}"
            );
        }
        // Two independent cuts among eleven places coincide once in eleven times: here about 180 times.
        let empty = taken.iter().filter(|parts| parts.middle.is_empty()).count();
        assert!((100..280).contains(&empty), "{empty}");
        let other = (0..20_000).filter_map(|i| split("abcdefghij", 0.1, 8, i));
        assert!(!taken.into_iter().eq(other), "the seed has no effect");
    }

    #[test]
    fn prefix_suffix_middle() {
        let parts = Parts {
            prefix: &[1, 2][..],
            middle: &[3],
            suffix: &[4, 5],
        };
        let tokens = FimTokens {
            begin: 10,
            hole: 11,
            end: 12,
        };
        assert_eq!(arrange(tokens, parts), [10, 1, 2, 11, 4, 5, 12, 3]);
    }
}
