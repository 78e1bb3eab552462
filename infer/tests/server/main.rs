//! The server as its clients meet it: every endpoint over a real connection.

mod answers;
mod http;
mod load;
mod refusals;

use std::{fs, process::Command};

use http::{Running, Start, fixtures, start};
use safetensors::SafeTensors;
use serde_json::{Value, json};

/// The reference case: 48 tokens of a prompt, and the 32 that transformers continues them with.
fn reference() -> (Vec<u32>, Vec<u32>) {
    let bytes = fs::read(fixtures().join("tiny-yarn/reference_generate.safetensors")).unwrap();
    let parsed = SafeTensors::deserialize(&bytes).unwrap();
    let ids = |name: &str| -> Vec<u32> {
        let tensor = parsed.tensor(name).unwrap();
        let words = tensor.data().chunks_exact(8);
        words
            .map(|word| i64::from_le_bytes(word.try_into().unwrap()) as u32)
            .collect()
    };
    let (prompt, output) = (ids("prompt_ids"), ids("output_ids"));
    let new = output[prompt.len()..].to_vec();
    (prompt, new)
}

/// The reference as a request, and its answer.
fn known(server: &Running) -> (Value, String) {
    let (prompt, new) = reference();
    let text = server.service.tokenizer().decode(&new, true).unwrap();
    let body = json!({ "prompt": prompt, "max_tokens": 32, "temperature": 0, "ignore_eos": true });
    (body, text)
}

fn with(body: &Value, more: Value) -> Value {
    let mut body = body.clone();
    let fields = more.as_object().unwrap().clone();
    body.as_object_mut().unwrap().extend(fields);
    body
}

/// Runs a program that is told where the server is, if the environment names what runs it.
fn outside(variable: &str, script: &str, arguments: &[&str]) {
    let Some(program) = std::env::var_os(variable) else {
        println!("skipped: {variable} is not set");
        return;
    };
    let server = start(Start::default());
    let script = fixtures().join("../server").join(script);
    let status = Command::new(program)
        .arg(script)
        .arg(format!("http://{}", server.address))
        .args(arguments)
        .status()
        .unwrap();
    assert!(status.success());
}

#[test]
fn the_official_client_understands_the_answers() {
    let (prompt, _) = reference();
    let prompt = json!(prompt).to_string();
    outside("DEEPBURN_OPENAI_PYTHON", "openai_client.py", &[&prompt]);
}

#[test]
fn the_page_works_in_a_browser() {
    outside("DEEPBURN_BROWSER_NODE", "page.cjs", &[]);
}
