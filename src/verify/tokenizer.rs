//! `tokenizer_cases.json`: texts with their tokens, and these turned back into text.

use std::fs;

use anyhow::{Context, anyhow};
use deepburn_infer::engine::Engine;
use serde_json::Value;

use super::{Subject, report::Report};

/// The name of the file.
pub(super) const FILE: &str = "tokenizer_cases.json";
/// What is known of a case.
const KEYS: [&str; 4] = [
    "text",
    "ids",
    "decoded_keep_special",
    "decoded_skip_special",
];

struct Case {
    text: String,
    ids: Vec<u32>,
    /// With special tokens by name, and without them; where the file has them.
    decoded: [Option<String>; 2],
}

/// Recomputes what is in the file.
pub(super) fn verify(subject: &Subject, report: &mut Report) -> anyhow::Result<()> {
    let path = subject.dir.join(FILE);
    let what = || path.display().to_string();
    let text = fs::read_to_string(&path).with_context(what)?;
    let parsed: Value = serde_json::from_str(&text).with_context(what)?;
    let (cases, unknown) = read(&parsed).map_err(|problem| anyhow!("{}: {problem}", what()))?;
    // The tokenizer as `generate` opens it.
    let engine = Engine::open(subject.dir, &subject.device)?;
    let tokenizer = &engine.tokenizer;
    let failed = |name: &str, error: &dyn std::fmt::Display| anyhow!("{}: {name}: {error}", what());

    if let Some(expected) = parsed.get("vocab_size").and_then(Value::as_i64) {
        let found = tokenizer.get_vocab(true).len() as i64;
        report.differences((FILE, "vocab_size"), &[], usize::from(found != expected));
        report.keep_ints((FILE, "vocab_size"), &[], &[found]);
    }
    for (index, case) in cases.iter().enumerate() {
        let name = format!("cases.{index}.ids");
        let encoded = tokenizer
            .encode(case.text.as_str(), false)
            .map_err(|error| failed(&name, &error))?;
        let found = encoded.get_ids();
        let differ = differences(found, &case.ids);
        report.differences((FILE, &name), &[case.ids.len()], differ);
        let ids: Vec<i64> = found.iter().map(|&id| id.into()).collect();
        report.keep_ints((FILE, &name), &[ids.len()], &ids);

        let [keep, skip] = &case.decoded;
        for (key, expected, skips) in [(KEYS[2], keep, false), (KEYS[3], skip, true)] {
            let Some(expected) = expected else {
                continue;
            };
            let name = format!("cases.{index}.{key}");
            let found = tokenizer
                .decode(&case.ids, skips)
                .map_err(|error| failed(&name, &error))?;
            let expected: Vec<char> = expected.chars().collect();
            let found: Vec<char> = found.chars().collect();
            let differ = differences(&found, &expected);
            report.differences((FILE, &name), &[expected.len()], differ);
        }
    }
    if !unknown.is_empty() {
        report.skip(FILE, unknown, "not known");
    }
    Ok(())
}

/// The cases, and the names of entries that are not known.
fn read(parsed: &Value) -> Result<(Vec<Case>, Vec<String>), String> {
    let top = parsed.as_object().ok_or("expected an object")?;
    let mut unknown: Vec<String> = top
        .keys()
        .filter(|key| !["vocab_size", "cases"].contains(&key.as_str()))
        .cloned()
        .collect();
    if top
        .get("vocab_size")
        .is_some_and(|size| size.as_i64().is_none())
    {
        return Err("vocab_size: expected an integer".to_owned());
    }
    let entries = top.get("cases").and_then(Value::as_array);
    let mut cases = Vec::new();
    for (index, entry) in entries
        .ok_or("cases: expected an array")?
        .iter()
        .enumerate()
    {
        let place = |key: &str| format!("cases.{index}.{key}");
        let entry = entry
            .as_object()
            .ok_or(format!("cases.{index}: expected an object"))?;
        let keys = entry.keys().filter(|key| !KEYS.contains(&key.as_str()));
        unknown.extend(keys.map(|key| place(key)));
        let text = |key: &str| match entry.get(key) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text.clone())),
            Some(_) => Err(format!("{}: expected a string", place(key))),
        };
        let id = |id: &Value| id.as_u64().and_then(|id| u32::try_from(id).ok());
        let ids = entry.get("ids").and_then(Value::as_array);
        let ids = ids.and_then(|ids| ids.iter().map(id).collect());
        cases.push(Case {
            text: text("text")?.ok_or(format!("{}: missing", place("text")))?,
            ids: ids.ok_or(format!("{}: expected an array of token ids", place("ids")))?,
            decoded: [text(KEYS[2])?, text(KEYS[3])?],
        });
    }
    Ok((cases, unknown))
}

/// Places at which two lists differ, those that only one of them has included.
fn differences<T: PartialEq>(found: &[T], expected: &[T]) -> usize {
    let differ = found.iter().zip(expected).filter(|(a, b)| a != b).count();
    differ + found.len().abs_diff(expected.len())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn cases_are_read_with_care() {
        let case = json!({ "text": "a", "ids": [1, 2], "decoded_keep_special": "a", "more": 1 });
        let (cases, unknown) = read(&json!({ "cases": [case], "note": "" })).unwrap();
        assert_eq!(
            (cases[0].text.as_str(), &cases[0].ids[..]),
            ("a", &[1, 2][..])
        );
        assert_eq!(cases[0].decoded, [Some("a".to_owned()), None]);
        assert_eq!(unknown, ["note", "cases.0.more"]);
        for (value, problem) in [
            (json!([]), "expected an object"),
            (json!({}), "cases: expected an array"),
            (json!({ "cases": [1] }), "cases.0: expected an object"),
            (json!({ "cases": [{ "ids": [] }] }), "cases.0.text: missing"),
            (
                json!({ "cases": [{ "text": "", "ids": [-1] }] }),
                "cases.0.ids: expected an array of token ids",
            ),
            (
                json!({ "cases": [], "vocab_size": "" }),
                "vocab_size: expected an integer",
            ),
        ] {
            assert_eq!(read(&value).err().unwrap(), problem);
        }
    }

    #[test]
    fn lists_differ_in_elements_and_length() {
        assert_eq!(differences(&[1, 2, 3], &[1, 2, 3]), 0);
        assert_eq!(differences(&[1, 5], &[1, 2, 3]), 2);
        assert_eq!(differences(&[], &[1, 2, 3]), 3);
    }
}
