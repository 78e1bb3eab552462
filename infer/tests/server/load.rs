//! Too much, too long, gone, ended, and nonsense.

use std::{
    io::{BufRead, BufReader, Write},
    net::{Shutdown, TcpStream},
    thread,
    time::{Duration, Instant},
};

use deepburn_infer::{server::Limits, service::ServiceConfig};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};

use crate::{
    http::{JSON, Running, Start, events, read, read_chunk, start},
    with,
};

/// A request that takes seconds.
fn long() -> Value {
    json!({ "prompt": "a", "max_tokens": 2500, "ignore_eos": true, "stream": true })
}

fn one_at_a_time() -> Start {
    let service = ServiceConfig {
        max_batch: 1,
        max_waiting: 1,
        ..ServiceConfig::default()
    };
    Start {
        service,
        ..Start::default()
    }
}

#[test]
fn too_many_requests_are_refused_at_once() {
    let server = start(one_at_a_time());
    let body = long().to_string();
    let running = server.open("POST", "/v1/completions", &[JSON], &body);
    server.wait_for("running", |now| now.running == 1);
    let waiting = server.open("POST", "/v1/completions", &[JSON], &body);
    server.wait_for("waiting", |now| now.waiting == 1);
    let start = Instant::now();
    let answer = server.post("/v1/completions", &json!({ "prompt": "a" }));
    assert!(start.elapsed() < Duration::from_secs(1));
    assert!(answer.error(429).contains("at most 1 may"));
    assert_eq!(answer.header("retry-after"), Some("1"));
    assert_eq!(answer.json()["error"]["code"], json!("queue_full"));
    drop((running, waiting));
    server.wait_for("idle", |now| now.running + now.waiting == 0);

    // Two answers for one prompt need two places; what was accepted of them is not worked on.
    let running = server.open("POST", "/v1/completions", &[JSON], &body);
    server.wait_for("running", |now| now.running == 1);
    let chat = json!({ "messages": [{ "role": "user", "content": "a" }], "n": 2 });
    let answer = server.post("/v1/chat/completions", &chat);
    assert!(answer.error(429).contains("at most 1 may"));
    drop(running);
    server.wait_for("idle", |now| now.running + now.waiting == 0);
    let answer = server.post("/v1/completions", &json!({ "prompt": "a" }));
    assert_eq!(answer.status, 200);
}

#[test]
fn nobody_works_for_clients_that_have_gone() {
    let server = start(one_at_a_time());
    for stream in [true, false] {
        let before = server.service.statistics().new_tokens;
        let body = with(&long(), json!({ "stream": stream })).to_string();
        let connection = server.open("POST", "/v1/completions", &[JSON], &body);
        server.wait_for("running", |now| now.running == 1);
        connection.get_ref().shutdown(Shutdown::Both).unwrap();
        server.wait_for("cancelled", |now| now.running == 0);
        let new = server.service.statistics().new_tokens - before;
        assert!(new < 2000, "{new} new tokens for nobody, stream = {stream}");
    }
    let metrics = server.get("/metrics").body;
    let line = "deepburn_requests_total{endpoint=\"/v1/completions\",status=\"499\"} 2";
    assert!(metrics.contains(line), "{metrics}");
}

#[test]
fn an_answer_that_takes_too_long_ends_as_an_error() {
    let mut begin = Start::default();
    begin.settings.limits.time = Duration::from_millis(300);
    let server = start(begin);
    let answer = server.post(
        "/v1/completions",
        &with(&long(), json!({ "stream": false })),
    );
    assert!(answer.error(504).contains("no complete answer within"));
    let parts = server.stream("/v1/completions", &long());
    let (last, parts) = parts.split_last().unwrap();
    assert_eq!(last["error"]["code"], json!("timeout"));
    assert!(!parts.is_empty());
    server.wait_for("idle", |now| now.running == 0);
    // A body that never comes.
    let mut stream = server.connect();
    let head = "POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 9";
    write!(stream, "{head}\r\n{JSON}\r\n\r\n{{").unwrap();
    let answer = read(&mut BufReader::new(stream)).unwrap();
    assert_eq!(answer.status, 504);
}

#[test]
fn an_end_lets_answers_be_finished() {
    let server = start(Start::default());
    let body = with(&long(), json!({ "max_tokens": 2000 })).to_string();
    let mut running = server.open("POST", "/v1/completions", &[JSON], &body);
    let mut idle = BufReader::new(server.connect());
    server.wait_for("running", |now| now.running == 1);
    let mut line = String::new();
    while line != "\r\n" {
        line.clear();
        running.read_line(&mut line).unwrap();
    }
    let mut text = read_chunk(&mut running).unwrap().unwrap();
    server.stop();
    while let Some(chunk) = read_chunk(&mut running).unwrap() {
        text.extend(chunk);
    }
    let parts = events(std::str::from_utf8(&text).unwrap());
    let ending = &parts.last().unwrap()["choices"][0];
    assert_eq!(ending["finish_reason"], json!("length"));
    // Connections without a request are closed.
    assert_eq!(idle.read_line(&mut line).unwrap(), 0);
    let address = server.address;
    server.join();
    assert!(TcpStream::connect(address).is_err());
}

/// Ten thousand requests that are wrong in some way, over four connections at a time.
#[test]
fn nothing_that_is_sent_stops_the_server() {
    let mut begin = Start::default();
    begin.settings.limits = Limits {
        body_bytes: 4096,
        new_tokens: 2,
        choices: 2,
        ..Limits::default()
    };
    let server = start(begin);
    let answered: usize = thread::scope(|scope| {
        let clients = [1, 2, 3, 4].map(|seed| {
            let server = &server;
            scope.spawn(move || malformed(server, seed, 2500))
        });
        clients.map(|client| client.join().unwrap()).iter().sum()
    });
    // The others were no HTTP, and the server hung up.
    assert!(answered > 8000, "only {answered} of 10000 were answered");
    assert_eq!(server.get("/health").status, 200);
    let body = json!({ "prompt": "a", "max_tokens": 2, "ignore_eos": true });
    let answer = server.post("/v1/completions", &body).json();
    assert_eq!(answer["usage"]["completion_tokens"], json!(2));
    server.wait_for("idle", |now| now.running == 0);
}

/// Sends mutated requests; how many had an answer. None may be a failure of the server.
fn malformed(server: &Running, seed: u64, count: usize) -> usize {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let message = json!({ "role": "user", "content": "Hello" });
    let valid = [
        (
            "/v1/completions",
            json!({ "prompt": "a", "max_tokens": 1, "stop": ["x"], "logit_bias": { "5": 1 } }),
        ),
        (
            "/v1/completions",
            json!({ "prompt": [1, 2], "stream": true, "max_tokens": 1, "stream_options": {} }),
        ),
        (
            "/v1/chat/completions",
            json!({ "messages": [message], "max_tokens": 1, "n": 1, "seed": 7 }),
        ),
        ("/detokenize", json!({ "tokens": [1, 2, 3] })),
    ];
    let mut answered = 0;
    for _ in 0..count {
        let (path, body) = &valid[rng.random_range(0..valid.len())];
        let mut body = body.to_string().into_bytes();
        for _ in 0..rng.random_range(1..4) {
            mutate(&mut body, &mut rng);
        }
        let length = match rng.random_range(0..20) {
            0 => rng.random_range(0..5000),
            _ => body.len(),
        };
        // A server may wait for the rest of a request, until it knows that nothing follows.
        let mut incomplete = length > body.len();
        let head = format!(
            "POST {path} HTTP/1.1\r\nHost: a\r\n{JSON}\r\nConnection: close\r\n\
             Content-Length: {length}\r\n\r\n"
        );
        let mut request = head.into_bytes();
        if rng.random_range(0..10) == 0 {
            mutate(&mut request, &mut rng);
            incomplete = true;
        }
        request.extend(body);
        let mut stream = server.connect();
        // The server may have hung up already.
        let _ = stream.write_all(&request);
        if incomplete {
            let _ = stream.shutdown(Shutdown::Write);
        }
        if let Ok(answer) = read(&mut BufReader::new(stream)) {
            let request = String::from_utf8_lossy(&request);
            let (status, text) = (answer.status, answer.body);
            assert!(status < 500, "{status}: {text}\nfor {request}");
            answered += 1;
        }
    }
    answered
}

fn mutate(bytes: &mut Vec<u8>, rng: &mut ChaCha8Rng) {
    const VALUES: [&[u8]; 9] = [
        b"null",
        b"-1",
        b"1e999",
        b"\"\"",
        b"[[",
        b"{}",
        b"99999999999",
        b"\xff\xfe",
        b"true",
    ];
    if bytes.is_empty() {
        bytes.push(b'{');
    }
    let at = rng.random_range(0..bytes.len());
    match rng.random_range(0..5) {
        0 => bytes[at] = rng.random(),
        1 => bytes.truncate(at),
        2 => drop(bytes.remove(at)),
        3 => {
            let value = VALUES[rng.random_range(0..VALUES.len())];
            let end = (at + rng.random_range(0..6)).min(bytes.len());
            drop(bytes.splice(at..end, value.iter().copied()));
        }
        _ => {
            let copy = bytes[at..].to_vec();
            bytes.extend(copy);
        }
    }
}
