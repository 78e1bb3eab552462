//! A server on a port of this machine, and the least that a client has to know about HTTP.

use std::{
    fs,
    io::{self, BufRead, BufReader, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use burn::tensor::Device;
use deepburn_infer::{
    chat_template::ChatTemplate,
    engine::Engine,
    server::{self, Server, Settings},
    service::{Service, ServiceConfig, Statistics},
};
use serde_json::Value;
use tokio::sync::watch;

pub(crate) fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures")
}

/// A server that runs in threads of the test.
pub(crate) struct Running {
    pub(crate) address: SocketAddr,
    pub(crate) service: Service,
    stop: watch::Sender<bool>,
    thread: Option<JoinHandle<io::Result<()>>>,
}

/// How [`start`] begins; `template` is the name of one of the templates in tests/fixtures/chat-templates.
pub(crate) struct Start {
    pub(crate) service: ServiceConfig,
    pub(crate) settings: Settings,
    pub(crate) template: Option<&'static str>,
}

impl Default for Start {
    fn default() -> Self {
        Self {
            service: ServiceConfig::default(),
            settings: Settings {
                model: "tiny".to_owned(),
                api_key: None,
                add_bos: false,
                bos: Some(0),
                limits: server::Limits::default(),
            },
            template: Some("deepseek"),
        }
    }
}

pub(crate) fn start(start: Start) -> Running {
    let dir = fixtures().join("tiny-yarn");
    let template = start.template.map(|name| {
        let copy = tempfile::tempdir().unwrap();
        let source = fixtures().join(format!("chat-templates/{name}.jinja"));
        fs::copy(source, copy.path().join("chat_template.jinja")).unwrap();
        let config = "tokenizer_config.json";
        fs::copy(dir.join(config), copy.path().join(config)).unwrap();
        ChatTemplate::read(copy.path()).unwrap().unwrap()
    });
    let engine = Engine::open(&dir, &Device::flex()).unwrap();
    let service = Service::start(engine, start.service);
    let server = Server::new(service.clone(), template, start.settings);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let (stop, mut stopped) = watch::channel(false);
    let thread = thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()?;
        runtime.block_on(server::serve(server, listener, async move {
            // A test that is over stops it too.
            let _ = stopped.wait_for(|stop| *stop).await;
        }))
    });
    Running {
        address,
        service,
        stop,
        thread: Some(thread),
    }
}

impl Running {
    /// Asks the server to end.
    pub(crate) fn stop(&self) {
        self.stop.send(true).unwrap();
    }

    /// Waits until it has ended.
    pub(crate) fn join(mut self) {
        self.thread.take().unwrap().join().unwrap().unwrap();
    }

    pub(crate) fn get(&self, path: &str) -> Answer {
        self.send("GET", path, &[], "")
    }

    pub(crate) fn post(&self, path: &str, body: &Value) -> Answer {
        self.send("POST", path, &[JSON], &body.to_string())
    }

    /// The events of a streamed answer, without the closing mark, which must be there.
    #[track_caller]
    pub(crate) fn stream(&self, path: &str, body: &Value) -> Vec<Value> {
        let answer = self.post(path, body);
        assert_eq!(answer.status, 200, "{}", answer.body);
        assert_eq!(answer.header("content-type"), Some("text/event-stream"));
        events(&answer.body)
    }

    pub(crate) fn send(&self, method: &str, path: &str, headers: &[&str], body: &str) -> Answer {
        let mut stream = self.open(method, path, headers, body);
        read(&mut stream).unwrap()
    }

    /// A request whose answer has not been read.
    pub(crate) fn open(
        &self,
        method: &str,
        path: &str,
        headers: &[&str],
        body: &str,
    ) -> BufReader<TcpStream> {
        let mut stream = self.connect();
        let headers: String = headers
            .iter()
            .map(|header| format!("{header}\r\n"))
            .collect();
        let request = format!(
            "{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {}\r\n{headers}\r\n{body}",
            body.len()
        );
        stream.write_all(request.as_bytes()).unwrap();
        BufReader::new(stream)
    }

    pub(crate) fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.address).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(60)))
            .unwrap();
        stream
    }

    /// Waits for something to become true of the service.
    #[track_caller]
    pub(crate) fn wait_for(&self, what: &str, condition: impl Fn(&Statistics) -> bool) {
        let start = Instant::now();
        loop {
            let now = self.service.statistics();
            if condition(&now) {
                return;
            }
            assert!(start.elapsed().as_secs() < 30, "not {what}: {now:?}");
            thread::sleep(Duration::from_millis(5));
        }
    }
}

pub(crate) const JSON: &str = "Content-Type: application/json";

pub(crate) struct Answer {
    pub(crate) status: u16,
    headers: Vec<(String, String)>,
    pub(crate) body: String,
}

impl Answer {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        let found = self.headers.iter().find(|(key, _)| key == name);
        found.map(|(_, value)| value.as_str())
    }

    #[track_caller]
    pub(crate) fn json(&self) -> Value {
        assert_eq!(self.header("content-type"), Some("application/json"));
        serde_json::from_str(&self.body).unwrap()
    }

    /// The message of an error, after a look at its shape.
    #[track_caller]
    pub(crate) fn error(&self, status: u16) -> String {
        assert_eq!(self.status, status, "{}", self.body);
        let error = &self.json()["error"];
        let kind = error["type"].as_str().unwrap();
        assert!(!kind.is_empty());
        for key in ["param", "code"] {
            assert!(error.get(key).is_some(), "no {key} in {error}");
        }
        error["message"].as_str().unwrap().to_owned()
    }
}

#[track_caller]
pub(crate) fn events(body: &str) -> Vec<Value> {
    let parts: Vec<&str> = body.split_terminator("\n\n").collect();
    let (last, parts) = parts.split_last().unwrap();
    assert_eq!(*last, "data: [DONE]");
    let parse = |part: &&str| serde_json::from_str(part.strip_prefix("data: ").unwrap()).unwrap();
    parts.iter().map(parse).collect()
}

/// One answer with its length given or in chunks.
pub(crate) fn read(stream: &mut impl BufRead) -> io::Result<Answer> {
    let mut line = || -> io::Result<String> {
        let mut line = String::new();
        match stream.read_line(&mut line)? {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            _ => Ok(line.trim_end().to_owned()),
        }
    };
    let status = line()?;
    let status = status.split(' ').nth(1).and_then(|code| code.parse().ok());
    let status = status.ok_or(io::ErrorKind::InvalidData)?;
    let mut headers = Vec::new();
    loop {
        let header = line()?;
        match header.split_once(": ") {
            Some((name, value)) => headers.push((name.to_lowercase(), value.to_owned())),
            None => break,
        }
    }
    let mut answer = Answer {
        status,
        headers,
        body: String::new(),
    };
    let mut body = Vec::new();
    if let Some(length) = answer.header("content-length") {
        body.resize(length.parse().map_err(|_| io::ErrorKind::InvalidData)?, 0);
        stream.read_exact(&mut body)?;
    } else if answer.header("transfer-encoding") == Some("chunked") {
        while let Some(chunk) = read_chunk(stream)? {
            body.extend(chunk);
        }
    }
    answer.body = String::from_utf8(body).map_err(|_| io::ErrorKind::InvalidData)?;
    Ok(answer)
}

/// The next chunk of a body; `None` at its end.
pub(crate) fn read_chunk(stream: &mut impl BufRead) -> io::Result<Option<Vec<u8>>> {
    let mut line = String::new();
    stream.read_line(&mut line)?;
    let size = usize::from_str_radix(line.trim(), 16).map_err(|_| io::ErrorKind::InvalidData)?;
    let mut chunk = vec![0; size + 2];
    stream.read_exact(&mut chunk)?;
    chunk.truncate(size);
    Ok((size > 0).then_some(chunk))
}
