//! Where text may be cut: into words, and into pieces of bounded size.

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

/// A longer run without a cut is data (a key, a table, base64), not language. Left out of training, it does not slow
/// down every merge.
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

/// The words of a text, as far as they are language.
pub(crate) fn words<'a>(pattern: &SysRegex, text: &'a str) -> tokenizers::Result<Vec<&'a str>> {
    let matches = pattern.find_matches(text)?.into_iter();
    let lengths = 1..=LONGEST_WORD;
    Ok(matches
        .filter(|((start, end), _)| lengths.contains(&(end - start)))
        .map(|((start, end), _)| &text[start..end])
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cut(text: &str) -> Vec<&str> {
        words(&SysRegex::new(PATTERN).unwrap(), text).unwrap()
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
    fn long_runs_are_no_words() {
        let (long, longer) = ("y".repeat(LONGEST_WORD), "x".repeat(LONGEST_WORD + 1));
        assert_eq!(cut(&format!("a {longer}\n{long}")), ["a", "\n", &long]);
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
