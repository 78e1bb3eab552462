//! Byte-pair merges from word counts: which two tokens become the next one.
//!
//! Not the trainer of the `tokenizers` crate: there (0.23) one pair can stand in the queue twice with different
//! words, and which of them is served first depends on the order of a randomly seeded hash map, so two runs over
//! one corpus can differ; its counts are 32-bit besides. Here every choice is by (count, pair) alone.

use std::{
    cmp::Reverse,
    collections::{BTreeSet, BinaryHeap, HashMap},
};

/// Two neighbouring tokens.
pub(crate) type Pair = (u32, u32);

/// Merges in the order they apply. Ids below 256 are bytes; each merge that makes a new string takes the next id.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Learned {
    /// The pairs, first to apply first.
    pub(crate) merges: Vec<Pair>,
    /// The bytes of every token, by id.
    pub(crate) tokens: Vec<Vec<u8>>,
}

/// A distinct word as its present tokens, and how often it occurs.
struct Word {
    tokens: Vec<u32>,
    count: u64,
}

/// Where a pair occurs. `words` may list words in which it has been merged away since.
#[derive(Default)]
struct Occurrences {
    count: u64,
    words: Vec<usize>,
}

/// Learns merges until `vocabulary` tokens exist (256 bytes included) or no pair occurs twice.
///
/// The most frequent pair comes first, and of equally frequent ones the one with the smallest ids.
pub(crate) fn learn<'a>(
    counts: impl IntoIterator<Item = (&'a [u8], u64)>,
    vocabulary: usize,
    on_token: &mut dyn FnMut(),
) -> Learned {
    let mut words: Vec<Word> = counts
        .into_iter()
        .map(|(bytes, count)| Word {
            tokens: bytes.iter().map(|&b| b.into()).collect(),
            count,
        })
        .collect();
    let mut learned = Learned {
        merges: Vec::new(),
        tokens: (0..=u8::MAX).map(|b| vec![b]).collect(),
    };
    let mut ids: HashMap<Vec<u8>, u32> = learned.tokens.iter().cloned().zip(0..).collect();
    let mut ranked: BTreeSet<Pair> = BTreeSet::new();

    let mut pairs: HashMap<Pair, Occurrences> = HashMap::new();
    for (index, word) in words.iter().enumerate() {
        for pair in neighbours(&word.tokens) {
            let occurrences = pairs.entry(pair).or_default();
            occurrences.count += word.count;
            occurrences.note(index);
        }
    }
    // Every pair has an entry at least as high as its present count: a count that rises pushes a new entry,
    // one that falls leaves a stale one, corrected when it surfaces.
    let mut queue: BinaryHeap<(u64, Reverse<Pair>)> = pairs
        .iter()
        .map(|(&pair, o)| (o.count, Reverse(pair)))
        .collect();

    while learned.tokens.len() < vocabulary {
        let Some((count, Reverse(pair))) = queue.pop() else {
            break;
        };
        let Some(present) = pairs.get(&pair).map(|o| o.count) else {
            continue;
        };
        if present < 2 {
            continue;
        }
        if present != count {
            queue.push((present, Reverse(pair)));
            continue;
        }

        let bytes = [
            learned.tokens[pair.0 as usize].as_slice(),
            &learned.tokens[pair.1 as usize],
        ]
        .concat();
        // Two different merges can spell one string ("a"+"bc", "ab"+"c"): they share its token.
        let merged = *ids.entry(bytes).or_insert_with_key(|bytes| {
            learned.tokens.push(bytes.clone());
            on_token();
            learned.tokens.len() as u32 - 1
        });
        // A shared token can bring back a pair whose merge is already in the list, where it keeps its rank.
        if ranked.insert(pair) {
            learned.merges.push(pair);
        }

        let mut within = pairs.remove(&pair).map(|o| o.words).unwrap_or_default();
        within.sort_unstable();
        within.dedup();
        let mut raised = BTreeSet::new();
        for index in within {
            let word = &mut words[index];
            if !neighbours(&word.tokens).any(|p| p == pair) {
                continue;
            }
            for p in neighbours(&word.tokens) {
                if let Some(occurrences) = pairs.get_mut(&p) {
                    occurrences.count -= word.count;
                }
            }
            replace(&mut word.tokens, pair, merged);
            for p in neighbours(&word.tokens) {
                let occurrences = pairs.entry(p).or_default();
                occurrences.count += word.count;
                if p.0 == merged || p.1 == merged {
                    occurrences.note(index);
                    raised.insert(p);
                }
            }
        }
        queue.extend(raised.into_iter().map(|p| (pairs[&p].count, Reverse(p))));
    }
    learned
}

impl Occurrences {
    fn note(&mut self, word: usize) {
        if self.words.last() != Some(&word) {
            self.words.push(word);
        }
    }
}

fn neighbours(tokens: &[u32]) -> impl Iterator<Item = Pair> {
    tokens.windows(2).map(|two| (two[0], two[1]))
}

/// Replaces a pair from left to right, in place.
fn replace(tokens: &mut Vec<u32>, pair: Pair, merged: u32) {
    let (mut read, mut write) = (0, 0);
    while read < tokens.len() {
        let here = tokens[read] == pair.0 && tokens.get(read + 1) == Some(&pair.1);
        tokens[write] = if here { merged } else { tokens[read] };
        read += if here { 2 } else { 1 };
        write += 1;
    }
    tokens.truncate(write);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The definition, with everything counted anew for every merge.
    fn oracle(counts: &[(Vec<u8>, u64)], vocabulary: usize) -> Learned {
        let mut words: Vec<(Vec<u32>, u64)> = counts
            .iter()
            .map(|(b, n)| (b.iter().map(|&b| b.into()).collect(), *n))
            .collect();
        let mut tokens: Vec<Vec<u8>> = (0..=255u8).map(|b| vec![b]).collect();
        let mut merges = Vec::new();
        while tokens.len() < vocabulary {
            let mut pairs: HashMap<Pair, u64> = HashMap::new();
            for (word, n) in &words {
                neighbours(word).for_each(|p| *pairs.entry(p).or_default() += n);
            }
            let best = pairs
                .into_iter()
                .max_by_key(|&(pair, n)| (n, Reverse(pair)));
            let Some((pair, 2..)) = best else { break };
            let bytes = [
                tokens[pair.0 as usize].clone(),
                tokens[pair.1 as usize].clone(),
            ]
            .concat();
            let merged = tokens
                .iter()
                .position(|t| *t == bytes)
                .unwrap_or(tokens.len());
            if merged == tokens.len() {
                tokens.push(bytes);
            }
            if !merges.contains(&pair) {
                merges.push(pair);
            }
            words
                .iter_mut()
                .for_each(|(word, _)| replace(word, pair, merged as u32));
        }
        Learned { merges, tokens }
    }

    fn run(counts: &[(Vec<u8>, u64)], vocabulary: usize) -> Learned {
        learn(
            counts.iter().map(|(b, n)| (b.as_slice(), *n)),
            vocabulary,
            &mut || (),
        )
    }

    #[test]
    fn ties_go_to_the_smallest_pair_and_single_pairs_are_left() {
        let counts = [
            (b"cd".to_vec(), 3),
            (b"ab".to_vec(), 3),
            (b"xy".to_vec(), 1),
        ];
        let learned = run(&counts, 300);
        assert_eq!(learned.merges, [(97, 98), (99, 100)]);
        assert_eq!(learned.tokens[256..], [b"ab".to_vec(), b"cd".to_vec()]);
    }

    #[test]
    fn overlapping_runs_merge_from_the_left() {
        let mut tokens = vec![1, 1, 1, 2, 1, 1];
        replace(&mut tokens, (1, 1), 9);
        assert_eq!(tokens, [9, 1, 2, 9]);
    }

    proptest! {
        // Three letters and short words make runs, overlaps, ties and shared strings frequent.
        #[test]
        fn equals_the_definition(
            words in prop::collection::vec(("[abc]{1,12}", 1u64..9), 1..40), extra in 0usize..60,
        ) {
            let mut counts: Vec<(Vec<u8>, u64)> =
                words.into_iter().map(|(w, n)| (w.into_bytes(), n)).collect();
            let learned = run(&counts, 256 + extra);
            prop_assert_eq!(&learned, &oracle(&counts, 256 + extra));
            counts.reverse();
            prop_assert_eq!(&learned, &run(&counts, 256 + extra));
        }
    }
}
