//! Documents within one file: text and JSON lines; Parquet is in [`parquet_file`].

use std::{
    fs::{self, File},
    io::{BufRead, BufReader},
    ops::ControlFlow,
    path::Path,
    str,
};

use super::{config::Format, error::DataError, parquet_file};

/// What a file yields, in order.
pub(crate) enum Record {
    /// A document's text; never empty.
    Text(String),
    /// Something that is not a document, and its line or row, counted from 1.
    Problem(Option<usize>, String),
    /// Bytes of the file that have been dealt with.
    Read(u64),
}

/// Receives records; may end the reading.
pub(crate) type Sink<'a> = dyn FnMut(Record) -> Result<ControlFlow<()>, DataError> + 'a;

/// Hands on a record, and returns from the caller when it was the last one wanted.
macro_rules! give {
    ($sink:expr, $record:expr) => {
        if $sink($record)?.is_break() {
            return Ok(ControlFlow::Break(()));
        }
    };
}

pub(crate) use give;

/// Reads all documents of a file. What cannot be read becomes a [`Record::Problem`].
pub(crate) fn read(
    path: &Path,
    format: Format,
    text_field: &str,
    sink: &mut Sink<'_>,
) -> Result<ControlFlow<()>, DataError> {
    match format {
        Format::Text => read_text(path, sink),
        Format::Jsonl => read_lines(path, text_field, sink),
        Format::Parquet => parquet_file::read(path, text_field, sink),
    }
}

fn read_text(path: &Path, sink: &mut Sink<'_>) -> Result<ControlFlow<()>, DataError> {
    let bytes = match fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) => return sink(Record::Problem(None, format!("cannot be read: {error}"))),
    };
    let length = bytes.len() as u64;
    let record = match String::from_utf8(bytes) {
        Ok(text) if text.is_empty() => Record::Problem(None, "the file is empty".to_owned()),
        Ok(text) => Record::Text(text),
        Err(error) => {
            let good = error.utf8_error().valid_up_to();
            let line = 1 + error.as_bytes()[..good]
                .iter()
                .filter(|&&b| b == b'\n')
                .count();
            Record::Problem(Some(line), format!("not UTF-8 from byte {good} on"))
        }
    };
    give!(sink, record);
    sink(Record::Read(length))
}

fn read_lines(
    path: &Path,
    text_field: &str,
    sink: &mut Sink<'_>,
) -> Result<ControlFlow<()>, DataError> {
    let mut reader = match File::open(path) {
        Ok(file) => BufReader::with_capacity(1 << 20, file),
        Err(error) => return sink(Record::Problem(None, format!("cannot be read: {error}"))),
    };
    let mut line = Vec::new();
    for number in 1.. {
        line.clear();
        match reader.read_until(b'\n', &mut line) {
            Ok(0) if number == 1 => {
                return sink(Record::Problem(None, "the file is empty".to_owned()));
            }
            Ok(0) => break,
            Ok(length) => {
                give!(
                    sink,
                    match json_text(&line, text_field) {
                        Ok(text) => Record::Text(text),
                        Err(what) => Record::Problem(Some(number), what),
                    }
                );
                give!(sink, Record::Read(length as u64));
            }
            Err(error) => {
                let what = format!("the rest cannot be read: {error}");
                return sink(Record::Problem(Some(number), what));
            }
        }
    }
    Ok(ControlFlow::Continue(()))
}

fn json_text(line: &[u8], text_field: &str) -> Result<String, String> {
    let line =
        str::from_utf8(line).map_err(|e| format!("not UTF-8 from byte {} on", e.valid_up_to()))?;
    if line.trim().is_empty() {
        return Err("the line is blank".to_owned());
    }
    let value: serde_json::Value =
        serde_json::from_str(line).map_err(|error| format!("not JSON: {error}"))?;
    match value {
        serde_json::Value::Object(mut object) => match object.remove(text_field) {
            Some(serde_json::Value::String(text)) => non_empty(text),
            Some(_) => Err(format!("{text_field:?} is not a string")),
            None => Err(format!("no field {text_field:?}")),
        },
        _ => Err("not a JSON object".to_owned()),
    }
}

pub(crate) fn non_empty(text: String) -> Result<String, String> {
    if text.is_empty() {
        Err("the document is empty".to_owned())
    } else {
        Ok(text)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Texts, problems by line, and bytes dealt with.
    pub(crate) type Found = (Vec<String>, Vec<(Option<usize>, String)>, u64);

    pub(crate) fn read_all(path: &Path, format: Format) -> Found {
        let (mut texts, mut problems, mut bytes) = (Vec::new(), Vec::new(), 0);
        let mut sink = |record| {
            match record {
                Record::Text(text) => texts.push(text),
                Record::Problem(line, what) => problems.push((line, what)),
                Record::Read(n) => bytes += n,
            }
            Ok(ControlFlow::Continue(()))
        };
        assert!(read(path, format, "text", &mut sink).unwrap().is_continue());
        (texts, problems, bytes)
    }

    #[test]
    fn text_is_one_document_or_one_problem() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x");
        fs::write(&path, "a\r\nb").unwrap();
        assert_eq!(
            read_all(&path, Format::Text),
            (vec!["a\r\nb".to_owned()], vec![], 4)
        );
        fs::write(&path, b"a\nb\n\xff").unwrap();
        let (_, problems, _) = read_all(&path, Format::Text);
        assert_eq!(problems, [(Some(3), "not UTF-8 from byte 4 on".into())]);
        fs::write(&path, b"").unwrap();
        assert_eq!(
            read_all(&path, Format::Text).1,
            [(None, "the file is empty".into())]
        );
        let missing = read_all(&dir.path().join("missing"), Format::Text).1;
        assert!(missing[0].1.starts_with("cannot be read"), "{missing:?}");
    }

    #[test]
    fn json_lines_report_the_line_of_every_problem() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.jsonl");
        let lines: [&[u8]; 9] = [
            br#"{"text": "one\ntwo", "id": 1}"#,
            br#"{"text": "#,
            b"",
            br#"{"body": "x"}"#,
            br#"{"text": 3}"#,
            br#"[1]"#,
            b"{\"text\": \"\xff\"}",
            br#"{"text": ""}"#,
            br#"{"text": "last"}"#,
        ];
        let bytes = lines.join(&b'\n');
        fs::write(&path, &bytes).unwrap();
        let (texts, problems, read) = read_all(&path, Format::Jsonl);
        assert_eq!(texts, ["one\ntwo", "last"]);
        let expected = [
            (2, "not JSON"),
            (3, "the line is blank"),
            (4, "no field \"text\""),
            (5, "\"text\" is not a string"),
            (6, "not a JSON object"),
            (7, "not UTF-8 from byte 10 on"),
            (8, "the document is empty"),
        ];
        assert_eq!(problems.len(), expected.len());
        for ((line, what), (expected_line, expected_what)) in problems.iter().zip(expected) {
            assert_eq!(*line, Some(expected_line));
            assert!(what.starts_with(expected_what), "{what}");
        }
        assert_eq!(read, bytes.len() as u64);
    }
}
