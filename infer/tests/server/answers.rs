//! What comes back when all is well.

use serde_json::{Value, json};

use crate::{
    http::{Start, start},
    known, reference, with,
};

fn ids(tokens: &Value) -> Vec<u32> {
    serde_json::from_value(tokens.clone()).unwrap()
}

fn texts(answer: &Value) -> Vec<&str> {
    let choices = answer["choices"].as_array().unwrap().iter();
    choices
        .map(|choice| choice["text"].as_str().unwrap())
        .collect()
}

#[test]
fn completions_are_those_of_transformers() {
    let server = start(Start::default());
    let (body, text) = known(&server);
    let answer = server.post("/v1/completions", &body).json();
    assert_eq!(answer["choices"][0]["text"], json!(text));
    assert_eq!(answer["choices"][0]["finish_reason"], json!("length"));
    assert_eq!(answer["choices"][0]["logprobs"], Value::Null);
    assert_eq!(answer["object"], json!("text_completion"));
    assert_eq!(answer["model"], json!("tiny"));
    let usage = &answer["usage"];
    let counts = ["prompt_tokens", "completion_tokens", "total_tokens"].map(|name| &usage[name]);
    assert_eq!(counts, [48, 32, 80]);

    let counted = json!({ "stream": true, "stream_options": { "include_usage": true } });
    let events = server.stream("/v1/completions", &with(&body, counted));
    let (last, parts) = events.split_last().unwrap();
    assert_eq!(last["usage"]["total_tokens"], json!(80));
    assert_eq!(last["choices"], json!([]));
    let pieces = parts.iter().map(|part| {
        assert_eq!(part["id"], last["id"]);
        assert_eq!(part["usage"], Value::Null);
        part["choices"][0]["text"].as_str().unwrap()
    });
    assert_eq!(pieces.collect::<String>(), text);
    let ending = &parts.last().unwrap()["choices"][0];
    assert_eq!(ending["finish_reason"], json!("length"));
    assert!(parts.len() > 10, "only {} parts", parts.len());
    // Without being asked for, counts are left out.
    let events = server.stream("/v1/completions", &with(&body, json!({ "stream": true })));
    assert!(events.iter().all(|event| event.get("usage").is_none()));

    // A stop string ends the text before it.
    let (before, _) = text.split_once("inL").unwrap();
    let stopping = with(&body, json!({ "stop": ["never", "inL"] }));
    let choice = &server.post("/v1/completions", &stopping).json()["choices"][0];
    assert_eq!(choice["text"], json!(before));
    assert_eq!(choice["finish_reason"], json!("stop"));
    // The default length is OpenAI's.
    let answer = server.post(
        "/v1/completions",
        &json!({ "prompt": "a", "ignore_eos": true }),
    );
    assert_eq!(answer.json()["usage"]["completion_tokens"], json!(16));
}

#[test]
fn several_prompts_and_choices_are_numbered_in_order() {
    let server = start(Start::default());
    let (body, text) = known(&server);
    let body = with(
        &body,
        json!({ "prompt": [body["prompt"], [5, 6, 7]], "n": 2 }),
    );
    let answer = server.post("/v1/completions", &body).json();
    let indices = answer["choices"].as_array().unwrap().iter();
    assert!(indices.map(|choice| &choice["index"]).eq(&[0, 1, 2, 3]));
    let whole = texts(&answer);
    assert_eq!([whole[0], whole[1]], [&text, &text]);
    assert_eq!(whole[2], whole[3]);
    assert_ne!(whole[0], whole[2]);
    assert_eq!(answer["usage"]["prompt_tokens"], json!(48 + 3));
    assert_eq!(answer["usage"]["completion_tokens"], json!(4 * 32));

    // Streamed, each part says which answer it belongs to.
    let events = server.stream("/v1/completions", &with(&body, json!({ "stream": true })));
    let mut streamed = vec![String::new(); 4];
    for event in &events {
        let choice = &event["choices"][0];
        let index = choice["index"].as_u64().unwrap() as usize;
        streamed[index] += choice["text"].as_str().unwrap();
    }
    assert_eq!(streamed, whole);

    // A seed fixes the answers, which differ from one another.
    let seeded = json!({ "prompt": "a", "n": 3, "seed": -5, "max_tokens": 12, "ignore_eos": true });
    let first = server.post("/v1/completions", &seeded).json();
    let again = server.post("/v1/completions", &seeded).json();
    assert_eq!(texts(&first), texts(&again));
    assert!(texts(&first)[0] != texts(&first)[1] && texts(&first)[1] != texts(&first)[2]);
    // Without one they are others each time.
    let free = with(&seeded, json!({ "seed": null }));
    let other = server.post("/v1/completions", &free).json();
    assert_ne!(
        texts(&server.post("/v1/completions", &free).json()),
        texts(&other)
    );
}

#[test]
fn options_reach_the_sampler() {
    let server = start(Start::default());
    let (body, text) = known(&server);
    let answer = |more: Value| {
        let answer = server.post("/v1/completions", &with(&body, more)).json();
        answer["choices"][0]["text"].as_str().unwrap().to_owned()
    };
    let (_, new) = reference();
    // A bias of -100 rules the first token out, +100 makes it the only one.
    assert_ne!(
        answer(json!({ "logit_bias": { new[0].to_string(): -100 } })),
        text
    );
    let only = answer(json!({ "logit_bias": { new[1].to_string(): 100 }, "max_tokens": 3 }));
    let tokenizer = server.service.tokenizer();
    assert_eq!(only, tokenizer.decode(&[new[1]; 3], true).unwrap());
    // The likeliest of one is the likeliest of all.
    let hot = json!({ "temperature": 2, "top_k": 1 });
    assert_eq!(answer(hot), text);
    let hot = json!({ "temperature": 1.5, "top_p": 0.0001 });
    assert_eq!(answer(hot), text);
    let hot = json!({ "temperature": 1.5, "min_p": 0.999 });
    assert_eq!(answer(hot), text);
    let repeated = json!({ "logit_bias": { "70": 3 } });
    let plain = answer(repeated.clone());
    for name in [
        "frequency_penalty",
        "presence_penalty",
        "repetition_penalty",
    ] {
        let penalised = with(&repeated, json!({ name: 2 }));
        assert_ne!(answer(penalised), plain, "{name} changes nothing");
    }
}

#[test]
fn logprobs_come_in_the_shape_of_each_interface() {
    let server = start(Start::default());
    let (body, text) = known(&server);
    let body = with(&body, json!({ "logprobs": 3 }));
    let answer = server.post("/v1/completions", &body).json();
    let logprobs = &answer["choices"][0]["logprobs"];
    let (_, new) = reference();
    let tokenizer = server.service.tokenizer();
    let alone = |&id: &u32| tokenizer.decode(&[id], false).unwrap();
    let expected: Vec<String> = new.iter().map(alone).collect();
    assert_eq!(logprobs["tokens"], json!(expected));
    for at in 0..32 {
        let top = logprobs["top_logprobs"][at].as_object().unwrap();
        let own = logprobs["token_logprobs"][at].as_f64().unwrap();
        // Greedy: no other is likelier. Tokens that look the same share a key.
        assert!((1..=3).contains(&top.len()));
        assert!(top.values().all(|value| value.as_f64().unwrap() <= own));
        let offset = logprobs["text_offset"][at].as_u64().unwrap() as usize;
        let before: String = text.chars().take(offset).collect();
        let decoded = tokenizer.decode(&new[..at], true).unwrap();
        assert!(decoded.starts_with(&before), "{before:?} of {decoded:?}");
    }

    let body = json!({
        "messages": [{ "role": "user", "content": "Hello" }], "temperature": 0, "max_tokens": 8,
        "ignore_eos": true, "logprobs": true, "top_logprobs": 2,
    });
    let answer = server.post("/v1/chat/completions", &body).json();
    let content = answer["choices"][0]["logprobs"]["content"]
        .as_array()
        .unwrap();
    assert_eq!(content.len(), 8);
    let mut bytes = Vec::new();
    for entry in content {
        assert_eq!(entry["token"], entry["top_logprobs"][0]["token"]);
        assert_eq!(entry["top_logprobs"].as_array().unwrap().len(), 2);
        let list: Vec<u8> = serde_json::from_value(entry["bytes"].clone()).unwrap();
        bytes.extend(list);
    }
    let text = answer["choices"][0]["message"]["content"].as_str().unwrap();
    assert_eq!(String::from_utf8_lossy(&bytes), text);
    // Streamed, the same.
    let events = server.stream(
        "/v1/chat/completions",
        &with(&body, json!({ "stream": true })),
    );
    let lists = events
        .iter()
        .filter_map(|event| event["choices"][0]["logprobs"]["content"].as_array());
    assert!(lists.flatten().eq(content));
}

#[test]
fn conversations_become_prompts_by_the_models_template() {
    let server = start(Start::default());
    let parts = json!([{ "type": "text", "text": "Hello," }, { "type": "text", "text": "world!" }]);
    let messages = json!([
        { "role": "system", "content": "Be brief." },
        { "role": "user", "content": parts },
        { "role": "assistant", "content": "Hi.", "refusal": null, "tool_calls": [] },
        { "role": "user", "content": "Again", "name": "Ann" },
    ]);
    let rendered = "<｜begin▁of▁sentence｜>Be brief.<｜User｜>Hello,\nworld!<｜Assistant｜>Hi.\
                    <｜end▁of▁sentence｜><｜User｜>Again<｜Assistant｜></think>";
    let tokens = server.service.tokenizer().encode(rendered, false).unwrap();
    let tokens = tokens.get_ids();
    let answer = server
        .post("/tokenize", &json!({ "messages": messages }))
        .json();
    assert_eq!(answer["tokens"], json!(tokens));
    assert_eq!(answer["count"], json!(tokens.len()));

    // The same prompt through completions gives the same answer.
    let options = json!({ "temperature": 0, "max_tokens": 20, "ignore_eos": true });
    let completion = with(&options, json!({ "prompt": tokens }));
    let completion = server.post("/v1/completions", &completion).json();
    let expected = &completion["choices"][0]["text"];
    let body = with(&options, json!({ "messages": messages }));
    let answer = server.post("/v1/chat/completions", &body).json();
    assert_eq!(answer["object"], json!("chat.completion"));
    let message = &answer["choices"][0]["message"];
    assert_eq!(message["role"], json!("assistant"));
    assert_eq!(&message["content"], expected);
    assert_eq!(answer["usage"]["prompt_tokens"], json!(tokens.len()));

    let events = server.stream(
        "/v1/chat/completions",
        &with(&body, json!({ "stream": true })),
    );
    let (first, rest) = events.split_first().unwrap();
    let (last, middle) = rest.split_last().unwrap();
    assert_eq!(first["object"], json!("chat.completion.chunk"));
    let opening = json!({ "role": "assistant", "content": "" });
    assert_eq!(first["choices"][0]["delta"], opening);
    assert_eq!(last["choices"][0]["delta"], json!({}));
    assert_eq!(last["choices"][0]["finish_reason"], json!("length"));
    let content = middle
        .iter()
        .map(|event| &event["choices"][0]["delta"]["content"]);
    let content: String = content.map(|content| content.as_str().unwrap()).collect();
    assert_eq!(content, expected.as_str().unwrap());

    let thinking = json!({ "messages": messages, "chat_template_kwargs": { "thinking": true } });
    let answer = server.post("/tokenize", &thinking).json();
    let text = server
        .service
        .tokenizer()
        .decode(&ids(&answer["tokens"]), false);
    let text = text.unwrap();
    assert!(text.ends_with("<｜Assistant｜><think>"), "{text}");
}

#[test]
fn texts_become_tokens_and_come_back() {
    let mut begin = Start::default();
    begin.settings.add_bos = true;
    let server = start(begin);
    let text = "Hello, 漢字!";
    let answer = server.post("/tokenize", &json!({ "prompt": text })).json();
    let tokens = ids(&answer["tokens"]);
    assert_eq!(tokens[0], 0);
    let plain = json!({ "prompt": text, "add_special_tokens": false });
    let plain = server.post("/tokenize", &plain).json();
    assert_eq!(ids(&plain["tokens"]), tokens[1..]);
    assert_eq!(plain["max_model_len"], json!(2560));
    let back = server
        .post("/detokenize", &json!({ "tokens": tokens }))
        .json();
    assert_eq!(
        back["prompt"],
        json!(format!("<｜begin▁of▁sentence｜>{text}"))
    );
    let answer = server.post(
        "/v1/completions",
        &json!({ "prompt": text, "max_tokens": 1 }),
    );
    assert_eq!(answer.json()["usage"]["prompt_tokens"], json!(tokens.len()));
    let answer = server.post("/v1/completions", &json!({ "prompt": "", "max_tokens": 1 }));
    assert_eq!(answer.json()["usage"]["prompt_tokens"], json!(1));
}

#[test]
fn the_server_tells_about_itself() {
    let server = start(Start::default());
    assert_eq!(server.get("/health").json(), json!({ "status": "ok" }));
    let models = server.get("/v1/models").json();
    assert_eq!(models["data"][0]["id"], json!("tiny"));
    assert_eq!(server.get("/v1/models/tiny").json(), models["data"][0]);
    assert!(server.get("/v1/models/other").error(404).contains("other"));
    let (body, _) = known(&server);
    server.post("/v1/completions", &body);
    server.wait_for("counted", |now| now.finished == 1);
    let stats = server.get("/stats").json();
    let counts = ["finished", "new_tokens", "prompt_tokens"].map(|name| &stats[name]);
    assert_eq!(counts, [1, 32, 48]);
    assert_eq!(stats["model"], json!("tiny"));
    // Two of the three layers have experts.
    let layers = stats["expert_loads"].as_array().unwrap();
    assert_eq!(layers.len(), 2);
    for layer in layers {
        let loads: Vec<f64> = serde_json::from_value(layer.clone()).unwrap();
        assert_eq!(loads.len(), 8);
        let mean = loads.iter().sum::<f64>() / 8.0;
        assert!((mean - 1.0).abs() < 1e-9, "{layer}");
    }

    server.get("/nowhere");
    let metrics = server.get("/metrics");
    let kind = metrics.header("content-type").unwrap();
    assert!(kind.starts_with("application/openmetrics-text"), "{kind}");
    for line in [
        "deepburn_new_tokens_total 32",
        "deepburn_prompt_tokens_total 48",
        "deepburn_running 0",
        "deepburn_time_to_first_token_seconds_count 1",
        "deepburn_requests_total{endpoint=\"/v1/completions\",status=\"200\"} 1",
        "deepburn_requests_total{endpoint=\"/v1/models\",status=\"404\"} 1",
        "deepburn_requests_total{endpoint=\"other\",status=\"404\"} 1",
        "deepburn_request_duration_seconds_count{endpoint=\"/v1/completions\"} 1",
        "# EOF",
    ] {
        let found = metrics.body.lines().any(|found| found == line);
        assert!(found, "{line} is not in\n{}", metrics.body);
    }
    let page = server.get("/");
    assert_eq!(
        page.header("content-type"),
        Some("text/html; charset=utf-8")
    );
    assert!(
        page.header("content-security-policy")
            .unwrap()
            .starts_with("default-src 'none'")
    );
    assert!(page.body.contains("<title>Deepburn</title>"));
}
