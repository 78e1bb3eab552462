//! What counting alone achieves on a token stream: the losses a model has to beat.

use std::collections::HashMap;

use super::{error::DataError, shards::Shards};

/// Entropies of a token stream under its own counts, in nats per token.
///
/// They are losses of models fitted to this very stream, so on a small one they are lower than what any model
/// reaches on unseen text.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Entropy {
    /// Of a token by itself: the loss of always predicting the frequencies.
    pub unigram: f64,
    /// Of a token after the one before it: the loss of a table of pairs.
    pub bigram: f64,
}

/// Both entropies of a stream of tokens. An empty stream has none to predict: zero.
pub fn entropy(tokens: impl IntoIterator<Item = u32>) -> Entropy {
    let mut counter = Counter::default();
    tokens.into_iter().for_each(|token| counter.push(token));
    counter.entropy()
}

/// Both entropies of a split, its documents in order.
///
/// # Errors
/// If the split holds a negative token.
pub fn split_entropy(shards: &Shards) -> Result<Entropy, DataError> {
    let mut counter = Counter::default();
    for document in 0..shards.len() {
        shards
            .document(document)?
            .into_iter()
            .for_each(|token| counter.push(token));
    }
    Ok(counter.entropy())
}

/// Bits per byte of text, for a loss in nats per token. Unlike the latter it compares across tokenizers.
pub fn bits_per_byte(nats_per_token: f64, tokens: u64, bytes: u64) -> f64 {
    nats_per_token * tokens as f64 / bytes as f64 / std::f64::consts::LN_2
}

#[derive(Default)]
struct Counter {
    tokens: HashMap<u32, u64>,
    pairs: HashMap<(u32, u32), u64>,
    last: Option<u32>,
}

impl Counter {
    fn push(&mut self, token: u32) {
        *self.tokens.entry(token).or_default() += 1;
        if let Some(last) = self.last.replace(token) {
            *self.pairs.entry((last, token)).or_default() += 1;
        }
    }

    fn entropy(&self) -> Entropy {
        // The last token begins no pair.
        let mut first = self.tokens.clone();
        if let Some(count) = self.last.and_then(|last| first.get_mut(&last)) {
            *count -= 1;
        }
        // H(b|a) = H(a, b) - H(a)
        let joint = from_counts(self.pairs.values());
        Entropy {
            unigram: from_counts(self.tokens.values()),
            bigram: (joint - from_counts(first.values())).max(0.0),
        }
    }
}

/// H = ln n - (1/n) sum of c ln c.
fn from_counts<'a>(counts: impl Iterator<Item = &'a u64>) -> f64 {
    // Sorted, as the order of a hash map would show in the last digits.
    let mut counts: Vec<u64> = counts.copied().filter(|&count| count > 0).collect();
    counts.sort_unstable();
    let total: u64 = counts.iter().sum();
    if total == 0 {
        return 0.0;
    }
    let weighted: f64 = counts
        .iter()
        .map(|&count| count as f64 * (count as f64).ln())
        .sum();
    (total as f64).ln() - weighted / total as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::hash::{below, generator};

    fn close(a: f64, b: f64) -> bool {
        (a - b).abs() < 1e-12
    }

    #[test]
    fn known_streams() {
        assert_eq!(entropy([]), Entropy::default());
        assert_eq!(entropy([5; 9]), Entropy::default());
        let alternating = entropy((0..1001).map(|i| i % 2));
        assert!((alternating.unigram - 2f64.ln()).abs() < 1e-6 && close(alternating.bigram, 0.0));
        // aab aab aab: tokens 6 a, 3 b; pairs aa 3, ab 3, ba 2: after a an even choice, after b none.
        let stream = entropy([0, 0, 1, 0, 0, 1, 0, 0, 1]);
        let third = 1.0 / 3.0f64;
        assert!(close(
            stream.unigram,
            -third * third.ln() - 2.0 * third * (2.0 * third).ln()
        ));
        assert!(close(stream.bigram, 0.75 * 2f64.ln()));
    }

    #[test]
    fn independent_tokens_have_equal_entropies_up_to_counting_noise() {
        let mut random = generator("test", 0, 0);
        let stream = entropy((0..200_000).map(|_| below(&mut random, 16) as u32));
        // Counting biases downwards by (cells - 1) / 2n: 4e-5 for tokens, 6e-4 for pairs.
        assert!((stream.unigram - 16f64.ln()).abs() < 2e-4, "{stream:?}");
        assert!((stream.bigram - 16f64.ln()).abs() < 2e-3, "{stream:?}");
    }

    #[test]
    fn bits_per_byte_of_a_uniform_byte_model_are_eight() {
        assert!(close(bits_per_byte(256f64.ln(), 1000, 1000), 8.0));
        assert!(close(bits_per_byte(256f64.ln(), 500, 1000), 4.0));
    }
}
