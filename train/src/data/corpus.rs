//! All documents of a selection, one after the other, in an order that never changes.

use std::{collections::HashSet, fmt, ops::ControlFlow, path::PathBuf};

use serde::{Deserialize, Serialize};

use super::{
    config::{DataConfig, OnBadInput},
    error::DataError,
    formats::{self, Record},
    hash::{Sha, sha256, unit_interval},
    select::Selection,
};

/// Input that cannot be used, and why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// The file or folder.
    pub file: PathBuf,
    /// The line or Parquet row, counted from 1, where there is one.
    pub line: Option<usize>,
    /// What is wrong.
    pub what: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:", self.file.display())?;
        if let Some(line) = self.line {
            write!(f, "{line}:")?;
        }
        write!(f, " {}", self.what)
    }
}

/// A text that ends with an end-of-text token.
#[derive(Clone, Debug)]
pub struct Document {
    /// The text; never empty.
    pub text: String,
    sha256: Sha,
}

impl Document {
    /// Whether it belongs to the validation split. Content alone decides, so a document stays in its split
    /// whatever else is added to the corpus.
    pub fn is_validation(&self, fraction: f64) -> bool {
        unit_interval(&self.sha256) < fraction
    }
}

/// What reading a corpus yields.
#[derive(Clone, Debug)]
pub enum Item {
    /// The next document.
    Document(Document),
    /// A document that was there before, left out.
    Duplicate,
    /// Something unusable, left out.
    Problem(Problem),
    /// Bytes of files that have been dealt with.
    Read(u64),
}

/// Receives items; may end the reading.
pub type Sink<'a> = dyn FnMut(Item) -> Result<ControlFlow<()>, DataError> + 'a;

/// Reads the documents of a selection until `sink` breaks off or the bounds are reached.
///
/// The bounds count text here. The document that would cross a bound is left out, and with it everything after it.
///
/// # Errors
/// What `sink` answers, and with [`OnBadInput::Refuse`] the first problem.
pub fn read(
    config: &DataConfig,
    selection: &Selection,
    sink: &mut Sink<'_>,
) -> Result<(), DataError> {
    let bound = |max_bytes: Option<u64>| max_bytes.unwrap_or(u64::MAX);
    let mut reading = Reading {
        on_bad_input: config.on_bad_input,
        seen: HashSet::new(),
        left: bound(config.max_bytes),
        left_in_source: config
            .sources
            .iter()
            .map(|source| bound(source.max_bytes))
            .collect(),
        ended: false,
        sink,
    };
    for problem in &selection.problems {
        if reading.problem(problem.clone())?.is_break() {
            break;
        }
    }
    for file in &selection.files {
        if reading.ended {
            break;
        }
        let text_field = &config.sources[file.source].text_field;
        // Breaking off ends the file; whether it ends everything stands in `ended`.
        let _ = formats::read(
            &file.path,
            file.format,
            text_field,
            &mut |record| match record {
                Record::Text(text) => reading.text(file.source, text),
                Record::Read(bytes) => reading.give(Item::Read(bytes)),
                Record::Problem(line, what) => reading.problem(Problem {
                    file: file.path.clone(),
                    line,
                    what,
                }),
            },
        )?;
    }
    Ok(())
}

/// What has been read so far.
struct Reading<'a, 'b> {
    on_bad_input: OnBadInput,
    seen: HashSet<Sha>,
    left: u64,
    left_in_source: Vec<u64>,
    ended: bool,
    sink: &'a mut Sink<'b>,
}

impl Reading<'_, '_> {
    fn give(&mut self, item: Item) -> Result<ControlFlow<()>, DataError> {
        if self.ended {
            return Ok(ControlFlow::Break(()));
        }
        let flow = (self.sink)(item)?;
        self.ended = flow.is_break();
        Ok(flow)
    }

    fn problem(&mut self, problem: Problem) -> Result<ControlFlow<()>, DataError> {
        match self.on_bad_input {
            OnBadInput::Refuse => Err(DataError::BadInput(problem)),
            OnBadInput::Skip => self.give(Item::Problem(problem)),
        }
    }

    fn text(&mut self, source: usize, text: String) -> Result<ControlFlow<()>, DataError> {
        let sha256 = sha256(text.as_bytes());
        if self.seen.contains(&sha256) {
            return self.give(Item::Duplicate);
        }
        let length = text.len() as u64;
        if length > self.left {
            self.ended = true;
            return Ok(ControlFlow::Break(()));
        }
        if length > self.left_in_source[source] {
            // Nothing more of this source, so that a bound cuts off the end rather than the long documents.
            self.left_in_source[source] = 0;
            return Ok(ControlFlow::Break(()));
        }
        self.left -= length;
        self.left_in_source[source] -= length;
        self.seen.insert(sha256);
        self.give(Item::Document(Document { text, sha256 }))
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, path::Path};

    use super::*;
    use crate::data::select::select;

    fn read_all(folder: &Path, rest: &str) -> Result<(Vec<String>, Vec<Problem>, u64), DataError> {
        let text = format!(
            "sources = [{{ path = \"{}\" }}]\ntokenizer = {{ vocab_size = 300 }}\n{rest}",
            folder.display()
        );
        let config: DataConfig = toml::from_str(&text).unwrap();
        let selection = select(&config, 0, &mut |_| ())?;
        let (mut texts, mut problems, mut duplicates) = (Vec::new(), Vec::new(), 0);
        read(&config, &selection, &mut |item| {
            match item {
                Item::Document(document) => texts.push(document.text),
                Item::Problem(problem) => problems.push(problem),
                Item::Duplicate => duplicates += 1,
                Item::Read(_) => {}
            }
            Ok(ControlFlow::Continue(()))
        })?;
        Ok((texts, problems, duplicates))
    }

    fn folder(files: &[(&str, &[u8])]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (name, bytes) in files {
            fs::write(dir.path().join(name), bytes).unwrap();
        }
        dir
    }

    #[test]
    fn bad_input_is_skipped_or_refused_and_always_named() {
        let dir = folder(&[
            ("a.txt", b"good"),
            ("b.txt", b"x\n\xff"),
            ("c.jsonl", b"{\"text\": \"fine\"}\n{\n"),
            ("d.txt", b""),
            ("e.txt", b""),
        ]);
        let (mut texts, problems, _) = read_all(dir.path(), "").unwrap();
        texts.sort();
        assert_eq!(texts, ["fine", "good"]);
        let mut lines: Vec<_> = problems
            .iter()
            .map(|p| (p.file.file_name().unwrap().to_str().unwrap(), p.line))
            .collect();
        lines.sort();
        let expected = [
            ("b.txt", Some(2)),
            ("c.jsonl", Some(2)),
            ("d.txt", None),
            ("e.txt", None),
        ];
        assert_eq!(lines, expected);
        assert!(
            problems
                .iter()
                .any(|p| p.to_string().contains("b.txt:2: not UTF-8"))
        );

        let error = read_all(dir.path(), "on_bad_input = \"refuse\"").unwrap_err();
        assert!(
            matches!(&error, DataError::BadInput(p) if problems.contains(p)),
            "{error}"
        );
    }

    #[test]
    fn documents_occur_once() {
        let lines = b"{\"text\": \"same\"}\n{\"text\": \"same\"}\n{\"text\": \"other\"}\n";
        let dir = folder(&[("a.jsonl", lines), ("b.txt", b"same")]);
        let (mut texts, problems, duplicates) = read_all(dir.path(), "").unwrap();
        texts.sort();
        assert_eq!(texts, ["other", "same"]);
        assert_eq!((problems.len(), duplicates), (0, 2));
    }

    #[test]
    fn a_bound_cuts_off_the_end_of_the_text() {
        let lines: String = (0..100)
            .map(|i| format!("{{\"text\": \"document {i:03}\"}}\n"))
            .collect();
        let dir = folder(&[("a.jsonl", lines.as_bytes())]);
        // Twelve bytes each: eight fit into 100, and the ninth ends it.
        let (texts, ..) = read_all(dir.path(), "max_bytes = 100").unwrap();
        assert_eq!(texts.len(), 8);
        assert_eq!(texts[7], "document 007");
    }

    #[test]
    fn content_decides_on_the_split() {
        let document = |text: String| Document {
            sha256: sha256(text.as_bytes()),
            text,
        };
        let documents: Vec<_> = (0..10_000).map(|i| document(format!("{i}"))).collect();
        let held_out = documents.iter().filter(|d| d.is_validation(0.02)).count();
        // Five standard deviations of a binomial with n = 10000, p = 0.02 are 70.
        assert!(held_out.abs_diff(200) < 70, "{held_out}");
        assert!(documents.iter().all(|d| !d.is_validation(0.0)));
    }
}
