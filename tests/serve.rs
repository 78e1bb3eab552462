//! `deepburn serve` and `deepburn chat` as processes: what they print, and how they end.

use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    net::TcpStream,
    path::Path,
    process::{Child, Command, Output, Stdio},
    time::Duration,
};

use serde_json::{Value, json};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The reference model with a template for conversations.
fn model() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let fixtures = root().join("tests/fixtures");
    for name in [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ] {
        fs::copy(fixtures.join("tiny-yarn").join(name), dir.path().join(name)).unwrap();
    }
    let template = fixtures.join("chat-templates/deepseek.jinja");
    fs::copy(template, dir.path().join("chat_template.jinja")).unwrap();
    dir
}

fn deepburn(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_deepburn"));
    command
        .args(args)
        .env_remove("DEEPBURN_API_KEY")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

fn chat(args: &[&str], input: &str) -> Output {
    let model = model();
    let mut all = vec!["chat", "--model", model.path().to_str().unwrap()];
    all.extend(args);
    let mut child = deepburn(&all).spawn().unwrap();
    // A chat that ends early closes its input.
    let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
    child.wait_with_output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

const GREEDY: [&str; 4] = ["--temperature", "0", "--max-new-tokens", "12"];

#[test]
fn a_conversation_through_a_pipe_is_kept_and_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("talk.json");
    let file = file.to_str().unwrap();
    let input =
        format!("/system Be brief.\nHello\n\n//and more\n/save {file}\n/quit\nnever said\n");
    let output = chat(&GREEDY, &input);
    let errors = text(&output.stderr);
    assert!(output.status.success(), "{errors}");
    let saved: Vec<Value> = serde_json::from_str(&fs::read_to_string(file).unwrap()).unwrap();
    let contents: Vec<&str> = saved
        .iter()
        .map(|message| message["content"].as_str().unwrap())
        .collect();
    let roles: Vec<&str> = saved
        .iter()
        .map(|message| message["role"].as_str().unwrap())
        .collect();
    assert_eq!(roles, ["system", "user", "assistant", "user", "assistant"]);
    assert_eq!(
        [contents[0], contents[1], contents[3]],
        ["Be brief.", "Hello", "/and more"]
    );
    assert_eq!(
        text(&output.stdout),
        format!("{}\n{}\n", contents[2], contents[4])
    );
    assert!(errors.contains("; prompt "), "no statistics in {errors}");
    assert!(errors.contains(" tokens/s, first after "), "{errors}");

    // What was loaded is what the next answer follows: the same as in one conversation.
    let next = |input: &str| {
        let output = chat(&GREEDY, input);
        assert!(output.status.success(), "{}", text(&output.stderr));
        text(&output.stdout)
    };
    let loaded = next(&format!("/load {file}\nNow?\n"));
    let whole = next("/system Be brief.\nHello\n//and more\nNow?\n");
    assert_eq!(whole, text(&output.stdout) + &loaded);
    // Forgetting makes the first answer come again, a file that is no conversation changes nothing.
    let again = next(&format!(
        "Hello\n/reset\n/load {file}.gone\n/set temperature x\n/nothing\nHello\n"
    ));
    let answer = next("Hello\n");
    assert_eq!(again, answer.clone() + &answer);
}

#[test]
fn what_chat_cannot_do_is_said() {
    let model = root().join("tests/fixtures/tiny-yarn");
    let output = deepburn(&["chat", "--model", model.to_str().unwrap()])
        .output()
        .unwrap();
    let errors = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1));
    assert!(
        errors.contains("the model has no chat template"),
        "{errors}"
    );
    assert!(errors.contains("deepburn generate"), "{errors}");

    let output = chat(&GREEDY, "/set volume 11\n/save\n/help\n/set\n");
    let errors = text(&output.stderr);
    assert!(output.status.success() && output.stdout.is_empty());
    for part in [
        "\"volume\" is no setting",
        "/save needs a file",
        "/load FILE",
        "max_new_tokens     12",
    ] {
        assert!(errors.contains(part), "{part:?} is not in {errors}");
    }
    let output = chat(&["--temperature", "-1"], "");
    assert_eq!(output.status.code(), Some(2));
    let output = chat(&["--speculate", "maybe"], "");
    assert_eq!(output.status.code(), Some(2));
    assert!(text(&output.stderr).contains("must be off, auto or 1 to 64"));
}

/// A server in a process, and where it listens.
struct Served {
    child: Child,
    address: String,
    _model: tempfile::TempDir,
}

fn serve(args: &[&str]) -> Served {
    let model = model();
    let mut all = vec![
        "serve",
        "--port",
        "0",
        "--name",
        "tiny",
        "--model",
        model.path().to_str().unwrap(),
    ];
    all.extend(args);
    let mut child = deepburn(&all).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.as_mut().unwrap())
        .read_line(&mut line)
        .unwrap();
    let address = line
        .strip_prefix("serving tiny at http://")
        .unwrap_or_else(|| panic!("{line:?}"));
    let (address, rest) = address.split_once(' ').unwrap();
    assert_eq!(rest, "(chat and completions)\n");
    Served {
        child,
        address: address.to_owned(),
        _model: model,
    }
}

impl Served {
    fn open(&self, key: &str, body: &Value) -> TcpStream {
        let mut stream = TcpStream::connect(&self.address).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(60)))
            .unwrap();
        let body = body.to_string();
        write!(
            stream,
            "POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nConnection: close\r\n\
             Authorization: Bearer {key}\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        )
        .unwrap();
        stream
    }

    fn post(&self, key: &str, body: &Value) -> String {
        let mut answer = String::new();
        self.open(key, body).read_to_string(&mut answer).unwrap();
        answer
    }

    #[cfg(unix)]
    fn signal(&self, name: &str) {
        let pid = self.child.id().to_string();
        let status = Command::new("kill")
            .args(["-s", name, &pid])
            .status()
            .unwrap();
        assert!(status.success());
    }
}

#[cfg(unix)]
#[test]
fn a_served_model_answers_logs_and_ends_after_its_answers() {
    for signal in ["INT", "TERM"] {
        let server = serve(&["--api-key", "secret", "--max-new-tokens", "500"]);
        let body = json!({ "prompt": "a", "max_tokens": 3, "ignore_eos": true });
        assert!(server.post("secret", &body).starts_with("HTTP/1.1 200 "));
        assert!(server.post("other", &body).starts_with("HTTP/1.1 401 "));
        let long = json!({ "prompt": "a", "max_tokens": 400, "ignore_eos": true, "stream": true });
        let mut running = server.open("secret", &long);
        let mut begin = [0; 500];
        running.read_exact(&mut begin).unwrap();
        server.signal(signal);
        // As `timeout` does.
        server.signal(signal);
        let mut rest = String::new();
        running.read_to_string(&mut rest).unwrap();
        assert!(rest.contains("data: [DONE]"), "{rest}");
        let Served { child, .. } = server;
        let output = child.wait_with_output().unwrap();
        let log = text(&output.stderr);
        assert!(output.status.success(), "{log}");
        for part in [
            "POST /v1/completions 200 ",
            " 2 prompt and 3 new tokens\n",
            "POST /v1/completions 401 ",
            "stopping after the answers under way",
            " 2 prompt and 400 new tokens\n",
        ] {
            assert!(log.contains(part), "{part:?} is not in {log}");
        }
        assert!(!log.contains("secret"), "the key is in the log: {log}");
    }
}

#[test]
fn a_port_that_is_taken_is_an_error() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let model = root().join("tests/fixtures/tiny-yarn");
    let arguments = ["serve", "--port", &port, "--model", model.to_str().unwrap()];
    let output = deepburn(&arguments).output().unwrap();
    let errors = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1));
    assert!(
        errors.starts_with(&format!("error: cannot listen at 127.0.0.1:{port}")),
        "{errors}"
    );
}
