//! Counting words: the text side of training a tokenizer.

use std::{collections::HashMap, thread};

use tokenizers::{pattern::Pattern, utils::SysRegex};

/// Where text may be cut before byte pairs are merged. No token crosses such a cut.
///
/// In the style of DeepSeek-V3's and GPT-4's tokenizers: letters with at most one leading sign (` word`, `.len`,
/// `'static`), digits by threes, punctuation with the line ends after it, runs of spaces that leave the last one
/// to the next word. Contractions are not cut off: in Rust `'s` begins a lifetime.
pub(crate) const PATTERN: &str = concat!(
    r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+",
    r"|\p{N}{1,3}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*",
    r"|\s*[\r\n]+",
    r"|\s+(?!\S)",
    r"|\s+",
);

/// A longer run without a cut is data (a key, a table, base64), not language; leaving it out also bounds the cost
/// of a merge.
const LONGEST_WORD: usize = 256;

/// Longer texts are handled in pieces: `tokenizers` needs tens of bytes of memory per byte of a text.
const PIECE: usize = 256 << 10;

/// Cuts a long text where [`PATTERN`] cuts it anyway: after a line end which no white space follows.
///
/// A line that is longer than a piece is cut between two characters.
pub(crate) fn pieces(text: &str) -> impl Iterator<Item = &str> {
    let mut rest = text;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let (piece, remaining) = rest.split_at(piece_end(rest, PIECE));
        rest = remaining;
        Some(piece)
    })
}

fn piece_end(text: &str, longest: usize) -> usize {
    if text.len() <= longest {
        return text.len();
    }
    let limit = text.floor_char_boundary(longest);
    let clean = |&(at, _): &(usize, &str)| {
        text[at + 1..]
            .chars()
            .next()
            .is_some_and(|next| !next.is_whitespace())
    };
    match text[..limit].rmatch_indices('\n').find(clean) {
        Some((at, _)) => at + 1,
        None => limit,
    }
}

/// How often each word occurs.
#[derive(Default)]
pub(crate) struct WordCounts {
    counts: HashMap<String, u64>,
}

impl WordCounts {
    /// Counts the words of some texts, on all processors.
    pub(crate) fn add(&mut self, texts: &[String]) -> Result<(), String> {
        let pieces: Vec<&str> = texts.iter().flat_map(|text| pieces(text)).collect();
        let threads = thread::available_parallelism().map_or(1, usize::from);
        let share = pieces.len().div_ceil(threads).max(1);
        let parts: Vec<Result<HashMap<&str, u64>, String>> = thread::scope(|scope| {
            let workers: Vec<_> = pieces
                .chunks(share)
                .map(|part| scope.spawn(move || count(part)))
                .collect();
            let join = |worker: thread::ScopedJoinHandle<'_, _>| match worker.join() {
                Ok(part) => part,
                Err(panic) => std::panic::resume_unwind(panic),
            };
            workers.into_iter().map(join).collect()
        });
        for part in parts {
            for (word, n) in part? {
                match self.counts.get_mut(word) {
                    Some(count) => *count += n,
                    None => drop(self.counts.insert(word.to_owned(), n)),
                }
            }
        }
        Ok(())
    }

    /// The words and their counts, in no order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&[u8], u64)> {
        self.counts
            .iter()
            .map(|(word, &count)| (word.as_bytes(), count))
    }
}

fn count<'a>(texts: &[&'a str]) -> Result<HashMap<&'a str, u64>, String> {
    // One per thread: the regex keeps its scratch space behind a lock.
    let pattern = SysRegex::new(PATTERN).map_err(|error| error.to_string())?;
    let mut counts = HashMap::new();
    for text in texts {
        let matches = (&pattern)
            .find_matches(text)
            .map_err(|error| error.to_string())?;
        for ((start, end), _) in matches {
            if (1..=LONGEST_WORD).contains(&(end - start)) {
                *counts.entry(&text[start..end]).or_default() += 1;
            }
        }
    }
    Ok(counts)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cut(text: &str) -> Vec<&str> {
        let pattern = SysRegex::new(PATTERN).unwrap();
        let matches = (&pattern).find_matches(text).unwrap();
        let parts = matches
            .into_iter()
            .map(|((start, end), _)| &text[start..end]);
        parts.filter(|part| !part.is_empty()).collect()
    }

    #[test]
    fn code_is_cut_at_words_numbers_and_indentation() {
        assert_eq!(
            cut("fn f<'static>(x_1: u32) {\n        x.len() + 12345;\r\n}"),
            [
                "fn", " f", "<'", "static", ">(", "x", "_", "1", ":", " u", "32", ")", " {\n",
                "       ", " x", ".len", "()", " +", " ", "123", "45", ";\r\n", "}"
            ]
        );
    }

    #[test]
    fn words_are_counted_over_all_texts_and_long_runs_are_left_out() {
        let mut words = WordCounts::default();
        words
            .add(&["a b a".to_owned(), "x".repeat(LONGEST_WORD + 1)])
            .unwrap();
        words
            .add(&["a".to_owned(), "y".repeat(LONGEST_WORD)])
            .unwrap();
        let mut counts: Vec<_> = words.iter().map(|(w, n)| (w.to_vec(), n)).collect();
        counts.sort();
        let long = vec![b'y'; LONGEST_WORD];
        let expected = [(&b" a"[..], 1), (b" b", 1), (b"a", 2), (&long, 1)];
        assert_eq!(counts, expected.map(|(w, n)| (w.to_vec(), n)));
    }

    #[test]
    fn pieces_end_where_the_pattern_cuts_anyway() {
        let text = "fn a() {\n    b;\n\n}\nfn c() {}\n";
        for longest in 1..=text.len() {
            let end = piece_end(text, longest);
            assert!(end <= longest && end > 0);
            let clean = text[..longest].contains("\n}") || text[..longest].contains("\nfn");
            if clean {
                assert_eq!([cut(&text[..end]), cut(&text[end..])].concat(), cut(text));
            }
        }
        let long = "é\n".repeat(PIECE);
        assert_eq!(pieces(&long).collect::<String>(), long);
        assert!(pieces(&long).all(|piece| piece.len() <= PIECE && piece.ends_with('\n')));
        let line = "é".repeat(PIECE);
        assert_eq!(pieces(&line).collect::<String>(), line);
    }
}
