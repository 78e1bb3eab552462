//! What comes back when something is wrong with a request.

use deepburn_infer::server::{ApiKey, Limits};
use serde_json::{Value, json};

use crate::{
    http::{JSON, Start, start},
    with,
};

#[test]
fn a_template_may_refuse_and_a_model_may_have_none() {
    let messages = json!([{ "role": "assistant", "content": "Hello" }]);
    let chat = json!({ "messages": messages });
    let server = start(Start {
        template: Some("blocks"),
        ..Start::default()
    });
    let message = server.post("/v1/chat/completions", &chat).error(400);
    assert_eq!(
        message,
        "`messages`: roles must alternate, found assistant at 0"
    );

    let server = start(Start {
        template: None,
        ..Start::default()
    });
    let message = server.post("/v1/chat/completions", &chat).error(400);
    assert!(message.contains("no chat template"), "{message}");
    assert!(message.contains("/v1/completions"), "{message}");
    assert_eq!(server.get("/stats").json()["chat"], json!(false));
    let completion = json!({ "prompt": "a", "max_tokens": 1 });
    assert_eq!(server.post("/v1/completions", &completion).status, 200);
}

#[test]
fn complaints_name_the_field() {
    let server = start(Start::default());
    let chat = json!({ "messages": [{ "role": "user", "content": "Hello" }], "max_tokens": 1 });
    let completion = json!({ "prompt": "a", "max_tokens": 1 });
    for (name, value, message) in [
        (
            "temperature",
            json!("hot"),
            "`temperature`: invalid type: string \"hot\", expected f32",
        ),
        (
            "temperature",
            json!(2.5),
            "`temperature`: is 2.5: must be between 0 and 2",
        ),
        (
            "top_p",
            json!(0),
            "`top_p`: sampler setting `top_p` is 0: it must be above 0",
        ),
        ("n", json!(0), "`n`: is 0: must be between 1 and 16"),
        (
            "max_tokens",
            json!(-1),
            "`max_tokens`: invalid value: integer `-1`, expected usize",
        ),
        (
            "seed",
            json!(1.5),
            "`seed`: invalid type: floating point `1.5`, expected i64",
        ),
        (
            "stop",
            json!([""]),
            "`stop`: stop string 0 is empty: it must have at least one",
        ),
        (
            "stop",
            json!(7),
            "`stop`: must be a string or a list of strings",
        ),
        (
            "stop",
            json!(vec!["a"; 17]),
            "`stop`: has 17 strings: at most 16 may be given",
        ),
        (
            "logit_bias",
            json!({ "512": 1 }),
            "`logit_bias`: token 512: must be below the 512",
        ),
        (
            "logit_bias",
            json!({ "5": 101 }),
            "`logit_bias`: 101 for token 5: must be between",
        ),
        (
            "presence_penalty",
            json!(-3),
            "`presence_penalty`: is -3: must be between -2 and 2",
        ),
        (
            "stream_options",
            json!({ "include_usage": true }),
            "`stream_options`: needs `stream`",
        ),
        (
            "temprature",
            json!(1),
            "`temprature`: is not a field that this server knows",
        ),
        ("store", json!(true), "`store`: this server stores nothing"),
    ] {
        for (path, body) in [
            ("/v1/chat/completions", &chat),
            ("/v1/completions", &completion),
        ] {
            let answer = server.post(path, &with(body, json!({ name: value })));
            let found = answer.error(400);
            assert!(found.starts_with(message), "{path}: {found}");
            assert_eq!(answer.json()["error"]["param"], json!(name));
        }
    }

    let second = |message: Value| json!([{ "role": "user", "content": "a" }, message]);
    let image = json!([{ "type": "image_url", "image_url": {} }]);
    let part = "messages[1].content[0].type";
    for (name, value, param, message) in [
        ("messages", Value::Null, "messages", "is missing"),
        ("messages", json!([]), "messages", "is empty"),
        ("messages", json!(["a"]), "messages[0]", "must be an object"),
        (
            "messages",
            second(json!({ "content": "a" })),
            "messages[1].role",
            "is missing",
        ),
        (
            "messages",
            second(json!({ "role": "tool" })),
            "messages[1].role",
            "is \"tool\": must",
        ),
        (
            "messages",
            second(json!({ "role": "user" })),
            "messages[1].content",
            "is missing",
        ),
        (
            "messages",
            second(json!({ "role": "user", "content": 7 })),
            "messages[1].content",
            "must",
        ),
        (
            "messages",
            second(json!({ "role": "user", "content": "a", "x": 1 })),
            "messages[1].x",
            "is not",
        ),
        (
            "messages",
            second(json!({ "role": "user", "content": image })),
            part,
            "only text",
        ),
        ("tools", json!([{}]), "tools", "is not supported"),
        (
            "tool_choice",
            json!("required"),
            "tool_choice",
            "only none or auto",
        ),
        (
            "top_logprobs",
            json!(2),
            "top_logprobs",
            "needs `logprobs`: true",
        ),
        (
            "response_format",
            json!({ "type": "xml" }),
            "response_format.type",
            "must be text, json_object or json_schema",
        ),
        (
            "response_format",
            json!({ "type": "json_schema" }),
            "response_format.json_schema",
            "is missing",
        ),
        (
            "response_format",
            json!({ "type": "json_schema", "json_schema": { "name": "a", "schema": { "type": "strin" } } }),
            "response_format",
            "strin",
        ),
        ("n", json!(17), "n", "between 1 and 16"),
    ] {
        let answer = server.post("/v1/chat/completions", &with(&chat, json!({ name: value })));
        let found = answer.error(400);
        assert!(found.starts_with(&format!("`{param}`: ")), "{found}");
        assert!(found.contains(message), "{found}");
        assert_eq!(answer.json()["error"]["param"], json!(param));
    }

    for (name, value, message) in [
        ("prompt", Value::Null, "is missing"),
        ("prompt", json!({}), "must be a string"),
        ("prompt", json!([512]), "must be below vocab_size = 512"),
        ("prompt", json!([]), "empty"),
        (
            "prompt",
            json!(vec!["a"; 17]),
            "asks for 17 answers: at most 16",
        ),
        ("prompt", json!(vec![5; 2560]), "2560 tokens"),
        ("echo", json!(true), "is not supported"),
        ("suffix", json!("b"), "is not supported"),
        ("best_of", json!(2), "must be the same as `n`"),
        ("logprobs", json!(21), "between 0 and 20"),
    ] {
        let answer = server.post(
            "/v1/completions",
            &with(&completion, json!({ name: value })),
        );
        let found = answer.error(400);
        assert!(found.contains(message), "{found}");
        assert_eq!(answer.json()["error"]["param"], json!(name));
    }
    for (path, body, message) in [
        (
            "/tokenize",
            json!({}),
            "`prompt`: is missing, and so is `messages`",
        ),
        (
            "/tokenize",
            json!({ "prompt": "a", "x": 1 }),
            "`x`: is not a field",
        ),
        (
            "/detokenize",
            json!({ "tokens": [512] }),
            "`tokens`: token 512: must be below",
        ),
        (
            "/detokenize",
            json!({ "tokens": "a" }),
            "`tokens`: invalid type",
        ),
    ] {
        let found = server.post(path, &body).error(400);
        assert!(found.starts_with(message), "{found}");
    }

    let other = with(&completion, json!({ "model": "other" }));
    let found = server.post("/v1/completions", &other).error(404);
    assert!(
        found.contains("\"other\" is not served here: this server has \"tiny\""),
        "{found}"
    );
    // Labels that change nothing are taken.
    let labels = json!({ "user": "u", "metadata": { "a": "b" }, "model": "tiny", "store": false });
    let answer = server.post("/v1/completions", &with(&completion, labels));
    assert_eq!(answer.status, 200, "{}", answer.body);
}

#[test]
fn requests_that_are_none_are_refused() {
    let mut begin = Start::default();
    begin.settings.limits = Limits {
        body_bytes: 1000,
        prompt_tokens: 20,
        new_tokens: 5,
        ..Limits::default()
    };
    let server = start(begin);
    let path = "/v1/completions";
    let refused = |status, headers: &[&str], body: &str| {
        server.send("POST", path, headers, body).error(status)
    };
    assert!(refused(400, &[JSON], "{").starts_with("the body is not JSON: "));
    assert_eq!(
        refused(400, &[JSON], "[]"),
        "the body must be a JSON object"
    );
    assert!(refused(415, &["Content-Type: text/plain"], "{}").contains("\"text/plain\""));
    assert!(refused(415, &[], "{}").contains("must be application/json"));
    assert!(refused(413, &[JSON], &" ".repeat(1001)).contains("1000 bytes"));
    assert!(server.get("/v2").error(404).contains("/v2"));
    assert!(server.get(path).error(405).contains(path));
    let message = server
        .post("/v1/embeddings", &json!({ "input": "a" }))
        .error(400);
    assert!(message.contains("no embeddings"), "{message}");

    for prompt in [json!(vec![5; 21]), json!("? ".repeat(11))] {
        let message = server.post(path, &json!({ "prompt": prompt })).error(400);
        assert!(
            message.contains("tokens: this server takes 20"),
            "{message}"
        );
    }
    let many = json!({ "prompt": "a", "max_tokens": 6 });
    assert!(
        server
            .post(path, &many)
            .error(400)
            .contains("between 1 and 5")
    );
    // What nobody asked for is cut to what there is.
    let answer = server.post(path, &json!({ "prompt": "a", "ignore_eos": true }));
    assert_eq!(answer.json()["usage"]["completion_tokens"], json!(5));
}

#[test]
fn a_key_opens_everything_and_little_opens_without() {
    let mut begin = Start::default();
    begin.settings.api_key = Some(ApiKey::new("secret"));
    let server = start(begin);
    for path in ["/v1/models", "/stats", "/metrics", "/nowhere"] {
        assert!(server.get(path).error(401).contains("an API key is needed"));
        let wrong = server.send("GET", path, &["Authorization: Bearer secre"], "");
        assert_eq!(wrong.error(401), "the API key is wrong");
        assert_eq!(wrong.header("www-authenticate"), Some("Bearer"));
        let right = server.send("GET", path, &["Authorization: Bearer secret"], "");
        assert_ne!(right.status, 401);
    }
    let answer = server.post("/v1/completions", &json!({ "prompt": "a" }));
    assert_eq!(answer.status, 401);
    assert_eq!(server.service.statistics().finished, 0);
    assert_eq!(server.get("/health").status, 200);
    assert_eq!(server.get("/").status, 200);
}
