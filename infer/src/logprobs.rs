//! How probable a token was, and which others were.

/// A token that was chosen.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenInfo {
    /// The token.
    pub id: u32,
    /// Natural logarithm of its probability: the softmax of the model's logits, before temperature, filters, bias and
    /// penalties. `None` unless asked for.
    pub logprob: Option<f32>,
    /// The most probable tokens with theirs, most probable first, the lowest id among equals.
    pub top: Vec<(u32, f32)>,
}

impl TokenInfo {
    /// A token of which nothing more is asked.
    pub fn plain(id: u32) -> Self {
        Self {
            id,
            logprob: None,
            top: Vec::new(),
        }
    }

    /// A token with its logarithm of probability and those of the `top` most probable tokens.
    ///
    /// # Shapes
    /// - `logits`: `[W]`
    pub fn new(id: u32, logits: &[f32], top: usize) -> Self {
        let normaliser = log_sum_exp(logits);
        let logprob = |token: u32| (f64::from(logits[token as usize]) - normaliser) as f32;
        let mut order: Vec<u32> = (0..logits.len() as u32).collect();
        let by_logit = |a: &u32, b: &u32| {
            let [x, y] = [a, b].map(|&token| logits[token as usize]);
            y.total_cmp(&x).then(a.cmp(b))
        };
        let top = top.min(order.len());
        if top < order.len() {
            order.select_nth_unstable_by(top, by_logit);
        }
        order.truncate(top);
        order.sort_unstable_by(by_logit);
        Self {
            id,
            logprob: Some(logprob(id)),
            top: order
                .into_iter()
                .map(|token| (token, logprob(token)))
                .collect(),
        }
    }
}

/// The logarithm of the sum of exponentials.
pub(crate) fn log_sum_exp(logits: &[f32]) -> f64 {
    let max = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let sum: f64 = logits
        .iter()
        .map(|&logit| (f64::from(logit) - max).exp())
        .sum();
    max + sum.ln()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn equal_tokens_keep_their_order() {
        let info = TokenInfo::new(2, &[0.0, 1.0, 0.0, 1.0, f32::NEG_INFINITY], 3);
        let ids: Vec<u32> = info.top.iter().map(|&(id, _)| id).collect();
        assert_eq!(ids, [1, 3, 0]);
        assert_eq!(info.logprob, Some(info.top[2].1));
    }

    proptest! {
        #[test]
        fn agrees_with_a_sorted_softmax(
            logits in proptest::collection::vec(-30.0_f32..30.0, 1..60), top in 0_usize..70, at: prop::sample::Index,
        ) {
            let id = at.index(logits.len()) as u32;
            let sum: f64 = logits.iter().map(|&x| f64::from(x).exp()).sum();
            let expected = |token: u32| (f64::from(logits[token as usize]).exp() / sum).ln();
            let mut order: Vec<u32> = (0..logits.len() as u32).collect();
            order.sort_by(|&a, &b| logits[b as usize].partial_cmp(&logits[a as usize]).unwrap());
            order.truncate(top);
            let found = TokenInfo::new(id, &logits, top);
            prop_assert_eq!(found.top.iter().map(|&(id, _)| id).collect::<Vec<_>>(), order);
            // Rounded to f32 once; logarithms of up to 60.
            for (token, logprob) in found.top.into_iter().chain([(id, found.logprob.unwrap())]) {
                prop_assert!((f64::from(logprob) - expected(token)).abs() < 4e-6);
            }
        }
    }
}
