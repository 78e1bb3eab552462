//! The binary as a user meets it: output, errors and exit codes.

use std::{
    fs,
    ops::ControlFlow,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use burn::tensor::{Device, Int, Tensor, TensorData};
use deepburn_infer::engine::{Engine, GenerateOptions};
use deepburn_kernels::compact::CompactFormat;
use deepburn_model::{
    attention::AttentionMask,
    checkpoint::{self, SaveOptions},
    config::ModelConfig,
    transformer::Transformer,
};
use serde_json::Value;
use tokenizers::Tokenizer;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn model_config(name: &str) -> PathBuf {
    root().join("configs/model").join(name)
}

fn fixture(case: &str) -> PathBuf {
    root().join("tests/fixtures").join(case)
}

fn deepburn(args: &[&str]) -> Output {
    let binary = env!("CARGO_BIN_EXE_deepburn");
    let output = Command::new(binary)
        .args(args)
        .stdin(Stdio::null())
        .output();
    output.expect("the binary starts")
}

/// Standard output of a run that succeeds.
#[track_caller]
fn succeeds(args: &[&str]) -> String {
    let output = deepburn(args);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{args:?}: {errors}");
    String::from_utf8(output.stdout).unwrap()
}

/// Standard error of a run that ends with this code and prints nothing else.
#[track_caller]
fn fails(code: i32, args: &[&str]) -> String {
    let output = deepburn(args);
    let errors = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(code), "{args:?}: {errors}");
    assert_eq!(output.stdout, b"", "{args:?}");
    assert!(errors.starts_with("error: "), "{args:?}: {errors}");
    errors
}

#[track_caller]
fn contains(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "{part:?} is not in:\n{text}");
    }
}

#[test]
fn memory_of_training_is_counted_per_precision() {
    let shape = concat!(env!("CARGO_MANIFEST_DIR"), "/configs/model/tiny.json");
    let run = |arguments: &[&str]| {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_deepburn"));
        command
            .args(["inspect", shape])
            .args(arguments)
            .output()
            .unwrap()
    };
    for (precision, bytes) in [("fp32", 16), ("bf16", 12), ("fp8", 12)] {
        let output = run(&["--json", "--training", precision]);
        let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        let parameters = ["total", "mtp"].map(|part| report["parameters"][part].as_u64().unwrap());
        let average = report["average_bytes"].as_u64();
        assert_eq!(average, Some(4 * parameters.iter().sum::<u64>()));
        let parts = report["training_bytes"].as_object().unwrap();
        let sum: u64 = parts.values().map(|bytes| bytes.as_u64().unwrap()).sum();
        assert_eq!(sum, bytes * parameters.iter().sum::<u64>(), "{precision}");
    }
    let text = String::from_utf8(run(&["--training", "fp8"]).stdout).unwrap();
    assert!(text.contains("training in fp8: weights "), "{text}");
    let refused = run(&["--training", "int8"]);
    let message = String::from_utf8_lossy(&refused.stderr);
    assert!(
        !refused.status.success() && message.contains("fp32"),
        "{message}"
    );
}

#[test]
fn inspect_counts_the_published_model() {
    let path = model_config("deepseek-v3-671b.json");
    let text = succeeds(&["inspect", path.to_str().unwrap()]);
    // By hand from the shape, with matrices as in the report's section 2.1 and norms and biases included:
    //   attention     61 x 187,107,328     = 11,413,547,008
    //   dense          3 x 396,361,728     =  1,189,085,184
    //   experts 58 x 256 x 44,040,192      = 653,908,770,816, of which 8 of 256 are active: 20,434,649,088
    //   shared        58 x 44,040,192      =  2,554,331,136
    //   routers       58 x 1,835,264       =    106,445,312
    //   norms         61 x 14,336 + 7,168  =        881,664
    //   embedding and head, each           =    926,679,040
    // The published count is 671B total and 37B activated.
    contains(
        &text,
        &[
            "parameters: 671.0B total, 37B active per token",
            "671,026,419,200",
            "36,625,618,432",
            "653,908,770,816",
            // One MTP module without the embedding and the head.
            "11,610,068,224",
            // 61 layers of 512 + 64 numbers of 4 bytes.
            "latent cache: 140,544 bytes per token",
            "embedding is a lookup",
        ],
    );

    let json: Value =
        serde_json::from_str(&succeeds(&["inspect", "--json", path.to_str().unwrap()])).unwrap();
    let total = json["parameters"]["total"].as_u64().unwrap();
    assert_eq!(total, 671_026_419_200);
    assert!(
        total.abs_diff(671_000_000_000) < 3_355_000_000,
        "within 0.5%"
    );
    assert_eq!(json["parameters"]["active"], 36_625_618_432_u64);
    assert_eq!(json["config"]["rope_scaling"]["factor"], 40.0);
}

#[test]
fn every_configuration_of_a_model_is_valid() {
    for (name, headline) in [
        ("bench-24m.json", "24.0M total, 9.5M active per token"),
        // Published: 16B in all; 2.24B activated, to which the head of 0.34B comes here.
        (
            "moonlight-16b-a3b.json",
            "16.0B total, 2.6B active per token",
        ),
        ("tiny.json", "active per token"),
    ] {
        let path = model_config(name);
        contains(&succeeds(&["inspect", path.to_str().unwrap()]), &[headline]);
    }
    for entry in fs::read_dir(model_config("")).unwrap() {
        let path = entry.unwrap().path();
        checkpoint::read_config(&path).unwrap_or_else(|error| panic!("{error}"));
    }
}

#[test]
fn inspect_lists_what_a_checkpoint_holds() {
    let dir = fixture("tiny-noqlora-bf16");
    let dir = dir.to_str().unwrap();
    let size = fs::metadata(fixture("tiny-noqlora-bf16").join("model.safetensors"))
        .unwrap()
        .len();

    let plain = succeeds(&["inspect", dir]);
    contains(&plain, &["model.safetensors: ", " BF16"]);
    assert!(!plain.contains("model.embed_tokens.weight"));
    let listed = succeeds(&["inspect", dir, "--tensors"]);
    contains(&listed, &["model.layers.0.self_attn.q_proj.weight BF16 ["]);

    let json: Value =
        serde_json::from_str(&succeeds(&["inspect", dir, "--tensors", "--json"])).unwrap();
    let mut files = json["files"].as_array().unwrap().iter();
    let file = files
        .find(|file| file["name"] == "model.safetensors")
        .unwrap();
    assert_eq!(file["bytes"], size);
    assert_eq!(file["tensors"], file["list"].as_array().unwrap().len());
    // The model holds all that is stored, once.
    let elements: u64 = file["list"]
        .as_array()
        .unwrap()
        .iter()
        .flat_map(|tensor| tensor["shape"].as_array())
        .map(|shape| shape.iter().filter_map(Value::as_u64).product::<u64>())
        .sum();
    assert_eq!(json["parameters"]["total"], elements);
}

const PROMPT: &str = "The quick brown fox";

fn generate<'a>(model: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    [
        &[
            "generate",
            "--model",
            model,
            "--prompt",
            PROMPT,
            "--max-new-tokens",
            "24",
        ],
        more,
    ]
    .concat()
}

/// The greedy continuation by whole forward passes: no cache, no sampler, no streaming.
fn continuation(dir: &Path, new: usize) -> String {
    let device = Device::flex();
    let (_, model) = checkpoint::load(dir, &device).unwrap();
    let tokenizer = Tokenizer::from_file(dir.join("tokenizer.json")).unwrap();
    let mut ids = tokenizer.encode(PROMPT, false).unwrap().get_ids().to_vec();
    let prompt = ids.len();
    for _ in 0..new {
        let length = ids.len();
        let data: Vec<i32> = ids.iter().map(|&id| id as i32).collect();
        let tokens = Tensor::<2, Int>::from_data(TensorData::new(data, [1, length]), &device);
        let hidden = model
            .forward(tokens, &AttentionMask::causal(length, &device))
            .hidden;
        let best = model.logits(hidden.narrow(1, length - 1, 1)).argmax(2);
        ids.push(best.into_data().iter::<u32>().next().unwrap());
    }
    tokenizer.decode(&ids[prompt..], true).unwrap()
}

#[test]
fn generate_is_greedy_and_deterministic() {
    let dir = fixture("tiny-yarn");
    let model = dir.to_str().unwrap();
    let expected = continuation(&dir, 24);
    for _ in 0..2 {
        let output = deepburn(&generate(model, &["--greedy", "--ignore-eos"]));
        assert!(output.status.success());
        assert_eq!(
            String::from_utf8(output.stdout).unwrap(),
            format!("{expected}\n")
        );
        contains(
            &String::from_utf8(output.stderr).unwrap(),
            &[
                "prompt: 6 tokens, ",
                "new:    24 tokens, ",
                "end:    --max-new-tokens reached",
                // 3 layers of 16 + 16 numbers of 4 bytes.
                "cache:  384 bytes per token",
            ],
        );
    }
    let drawn = |seed| succeeds(&generate(model, &["--seed", seed, "--temperature", "1.5"]));
    assert_eq!(drawn("1"), drawn("1"));
    assert_ne!(drawn("1"), drawn("2"));
}

#[test]
fn generate_reads_the_prompt_from_standard_input() {
    let dir = fixture("tiny-yarn");
    let piped = fixture("tiny-yarn").join("README.md");
    let prompt: String = fs::read_to_string(&piped).unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_deepburn"))
        .args([
            "generate",
            "--greedy",
            "--max-new-tokens",
            "3",
            "--prompt",
            "-",
            "--model",
        ])
        .arg(&dir)
        .stdin(fs::File::open(&piped).unwrap())
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let engine = Engine::open(&dir, &Device::flex()).unwrap();
    let options = GenerateOptions {
        max_new_tokens: 3,
        ..GenerateOptions::default()
    };
    let expected = engine
        .generate(&prompt, &options, &mut |_| ControlFlow::Continue(()))
        .unwrap();
    assert!(expected.summary.prompt_tokens > 512, "more than one chunk");
    assert_eq!(
        String::from_utf8(output.stdout).unwrap(),
        format!("{}\n", expected.text)
    );
}

/// With drafts, which the grammar is for as well.
#[test]
fn a_text_keeps_to_a_schema() {
    let dir = predicting();
    let model = dir.path().to_str().unwrap();
    let file = dir.path().join("schema.json");
    let schema = r#"{ "type": "array", "items": { "enum": ["MLA", "MoE", "MTP"] }, "minItems": 3, "maxItems": 3 }"#;
    fs::write(&file, schema).unwrap();
    let file = file.to_str().unwrap();
    let args = [
        "generate",
        "--model",
        model,
        "--prompt",
        "a",
        "--json-schema",
        file,
    ];
    for seed in ["1", "2"] {
        let plain = succeeds(&[&args[..], &["--seed", seed]].concat());
        let parsed: Vec<String> = serde_json::from_str(&plain).unwrap();
        assert_eq!(parsed.len(), 3, "{plain}");
        let greedy = [&args[..], &["--greedy"]].concat();
        let drafted = [&greedy[..], &["--speculate", "1"]].concat();
        assert_eq!(succeeds(&drafted), succeeds(&greedy));
    }
    fs::write(file, "{ \"type\": \"strin\" }").unwrap();
    let said = fails(1, &args);
    assert!(
        said.contains("schema.json") && said.contains("strin"),
        "{said}"
    );
}

#[test]
fn weights_are_held_as_asked_for() {
    let dir = fixture("tiny-yarn");
    let model = dir.to_str().unwrap();
    for (weights, format) in [
        ("f32", None),
        ("bf16", Some(CompactFormat::Bf16)),
        ("fp8", Some(CompactFormat::Fp8)),
    ] {
        let engine = Engine::open_held(&dir, &Device::flex(), format).unwrap();
        let options = GenerateOptions {
            max_new_tokens: 12,
            ignore_eos: true,
            ..GenerateOptions::default()
        };
        let expected = engine
            .generate("pub fn ", &options, &mut |_| ControlFlow::Continue(()))
            .unwrap();
        let args = [
            "generate",
            "--model",
            model,
            "--weights",
            weights,
            "--prompt",
            "pub fn ",
            "--greedy",
            "--ignore-eos",
            "--max-new-tokens",
            "12",
        ];
        assert_eq!(succeeds(&args), format!("{}\n", expected.text), "{weights}");
    }
}

/// A checkpoint of random weights with a prediction module and a tokenizer.
fn predicting() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let config = ModelConfig {
        num_nextn_predict_layers: 1,
        ..checkpoint::read_config(&fixture("tiny-yarn")).unwrap()
    };
    let model = Transformer::new(&config, 3, &Device::flex());
    checkpoint::save(&model, &config, dir.path(), &SaveOptions::default()).unwrap();
    let tokenizer = "tokenizer.json";
    fs::copy(
        fixture("tiny-yarn").join(tokenizer),
        dir.path().join(tokenizer),
    )
    .unwrap();
    dir
}

#[test]
fn drafts_change_no_greedy_text_and_are_counted() {
    let dir = predicting();
    let model = dir.path().to_str().unwrap();
    let plain = succeeds(&generate(model, &["--greedy", "--ignore-eos"]));
    for depth in ["1", "3", "auto"] {
        let args = ["--greedy", "--ignore-eos", "--speculate", depth];
        let output = deepburn(&generate(model, &args));
        assert_eq!(String::from_utf8(output.stdout).unwrap(), plain, "{depth}");
        let errors = String::from_utf8(output.stderr).unwrap();
        contains(&errors, &["drafts: ", " accepted (", " tokens per step"]);
        assert_eq!(errors.contains("auto:   being measured\n"), depth == "auto");
    }
    let without = fixture("tiny-yarn");
    let without = without.to_str().unwrap();
    let message = fails(1, &generate(without, &["--speculate", "1"]));
    contains(&message, &["num_nextn_predict_layers = 0"]);
    let message = fails(2, &generate(without, &["--speculate", "0"]));
    contains(&message, &["must be off, auto or 1 to 64"]);
}

#[test]
fn many_prompts_are_continued_as_each_alone() {
    let model = predicting();
    let model = model.path().to_str().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let (input, output) = (at("in.jsonl"), at("out.jsonl"));
    let prompts = ["The quick", "brown", "fox jumps over the lazy dog and", ""];
    let lines = prompts.iter().enumerate().map(|(number, prompt)| {
        serde_json::json!({ "prompt": prompt, "id": number, "max_new_tokens": 9 + number })
    });
    let lines: Vec<String> = lines.map(|line| line.to_string()).collect();
    fs::write(&input, lines.join("\n")).unwrap();
    let many = |more: &[&str]| -> Vec<Value> {
        let args = ["generate", "--model", model, "--greedy", "--ignore-eos"];
        let files = ["--batch", &input, "--output", &output];
        succeeds(&[&args[..], &files, more].concat());
        let text = fs::read_to_string(&output).unwrap();
        text.lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect()
    };
    let found = many(&["--max-batch", "3"]);
    assert_eq!(found, many(&["--speculate", "2"]));
    for (number, (prompt, line)) in prompts.iter().zip(&found).enumerate() {
        let new = (9 + number).to_string();
        let args = ["generate", "--model", model, "--greedy", "--ignore-eos"];
        let alone = ["--prompt", prompt, "--max-new-tokens", &new];
        let alone = succeeds(&[&args[..], &alone].concat());
        assert_eq!(format!("{}\n", line["text"].as_str().unwrap()), alone);
        assert_eq!(
            (&line["id"], &line["new_tokens"]),
            (&number.into(), &(9 + number).into())
        );
        assert_eq!(line["finish_reason"], "length");
    }
    // From a file, the same.
    fs::write(at("prompt"), prompts[0]).unwrap();
    let file = at("prompt");
    let args = [
        "generate",
        "--model",
        model,
        "--greedy",
        "--ignore-eos",
        "--file",
        &file,
    ];
    let text = succeeds(&[&args[..], &["--max-new-tokens", "9"]].concat());
    assert_eq!(text, format!("{}\n", found[0]["text"].as_str().unwrap()));

    fs::write(&input, "{\"prompt\": 3}").unwrap();
    let args = ["generate", "--model", model, "--batch", &input];
    contains(&fails(2, &args), &["--output"]);
    let message = fails(1, &[&args[..], &["--output", &output]].concat());
    contains(&message, &["in.jsonl:1: "]);
}

#[test]
fn eval_tells_how_well_a_text_is_predicted() {
    let model = predicting();
    let model = model.path().to_str().unwrap();
    let readme = fixture("tiny-yarn").join("README.md");
    let args = [
        "eval",
        "--model",
        model,
        "--file",
        readme.to_str().unwrap(),
        "--context",
        "256",
    ];
    let text = succeeds(&[&args[..], &["--experts", "4"]].concat());
    contains(
        &text,
        &[
            "perplexity:    ",
            "bits per byte: ",
            "module 1: ",
            "MoE layer 1: MaxVio ",
        ],
    );
    let json: Value = serde_json::from_str(&succeeds(&[&args[..], &["--json"]].concat())).unwrap();
    // Random weights know nothing: each of 512 tokens is about as probable.
    let perplexity = json["perplexity"].as_f64().unwrap();
    assert!((400.0..650.0).contains(&perplexity), "{perplexity}");
    let message = fails(1, &[&args[..], &["--experts", "3"]].concat());
    contains(
        &message,
        &["8 experts and 3 redundant ones cannot be spread over 3 devices"],
    );
}

#[test]
fn bench_has_a_row_per_number_of_texts_with_drafts_and_without() {
    let model = predicting();
    let model = model.path().to_str().unwrap();
    let args = [
        "bench",
        "--model",
        model,
        "--batch",
        "1,3",
        "--prompt-tokens",
        "9",
    ];
    let args = [&args[..], &["--new-tokens", "5", "--repeat", "1"]].concat();
    contains(&succeeds(&args), &["prompt tokens/s", "new tokens/s"]);
    let rows: Value = serde_json::from_str(&succeeds(&[&args[..], &["--json"]].concat())).unwrap();
    let rows = rows.as_array().unwrap();
    let shape = rows
        .iter()
        .map(|row| (row["texts"].as_u64(), row["drafts_per_step"].as_u64()));
    let expected = [(1, 0), (1, 1), (3, 0), (3, 1)].map(|(n, k)| (Some(n), Some(k)));
    assert!(shape.eq(expected), "{rows:?}");
    for row in rows {
        assert!(row["new_tokens_per_second"].as_f64().unwrap() > 0.0);
    }
}

#[test]
fn generate_ends_before_a_stop_text() {
    let dir = fixture("tiny-yarn");
    let expected = continuation(&dir, 24);
    let stop: String = expected.chars().skip(5).take(3).collect();
    let text = succeeds(&generate(
        dir.to_str().unwrap(),
        &["--greedy", "--ignore-eos", "--stop", &stop],
    ));
    assert_eq!(text, format!("{}\n", expected.split_once(&stop).unwrap().0));
}

#[test]
fn generate_takes_the_newest_checkpoint_of_a_run() {
    let run = tempfile::tempdir().unwrap();
    let step = run.path().join("checkpoints/latest");
    fs::create_dir_all(&step).unwrap();
    for name in ["config.json", "model.safetensors", "tokenizer.json"] {
        fs::copy(fixture("tiny-yarn").join(name), step.join(name)).unwrap();
    }
    let run = run.path().to_str().unwrap();
    let text = succeeds(&generate(run, &["--greedy", "--ignore-eos"]));
    assert_eq!(
        text,
        format!("{}\n", continuation(&fixture("tiny-yarn"), 24))
    );
    contains(&succeeds(&["inspect", run]), &["model.safetensors: "]);
}

#[test]
fn a_closed_pipe_ends_quietly() {
    let dir = fixture("tiny-yarn");
    let dir = dir.to_str().unwrap();
    for args in [
        generate(dir, &["--greedy", "--ignore-eos"]),
        vec!["inspect", dir, "--tensors"],
    ] {
        let mut child = Command::new(env!("CARGO_BIN_EXE_deepburn"))
            .args(&args)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        drop(child.stdout.take());
        let output = child.wait_with_output().unwrap();
        let errors = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success(), "{args:?}: {errors}");
        assert!(!errors.contains("error"), "{args:?}: {errors}");
    }
}

#[test]
fn help_of_every_subcommand() {
    contains(
        &succeeds(&["--help"]),
        &["train     Train", "generate", "inspect", "130  interrupted"],
    );
    for command in [
        "train", "generate", "eval", "bench", "chat", "serve", "inspect", "convert", "verify",
        "pipeline", "plan",
    ] {
        contains(
            &succeeds(&[command, "--help"]),
            &["Usage: deepburn", "Exit codes:"],
        );
        contains(&succeeds(&[command, "-h"]), &["Usage: deepburn"]);
    }
    contains(
        &succeeds(&["--version"]),
        &[concat!("deepburn ", env!("CARGO_PKG_VERSION"))],
    );
}

#[test]
fn wrong_usage_ends_with_2() {
    let dir = fixture("tiny-yarn");
    let dir = dir.to_str().unwrap();
    let wrong = |more| fails(2, &generate(dir, more));
    contains(&fails(2, &["inspect"]), &["<PATH>"]);
    contains(&fails(2, &["generate", "--model", dir]), &["--prompt"]);
    contains(&fails(2, &["infer"]), &["infer"]);
    contains(
        &wrong(&["--device", "gpu"]),
        &["must be one of cpu, wgpu, wgpu:N, cuda, cuda:N; found \"gpu\""],
    );
    contains(
        &wrong(&["--top-p", "1.5"]),
        &["`top_p` is 1.5: it must be above 0 and at most 1"],
    );
    contains(&wrong(&["--temperature", "-1"]), &["`temperature` is -1"]);
    contains(
        &wrong(&["--greedy", "--top-k", "3"]),
        &["--greedy", "--top-k"],
    );
    contains(&wrong(&["--stop", ""]), &["--stop"]);
}

#[test]
fn failures_end_with_1_and_name_what_is_wrong() {
    let dir = fixture("tiny-yarn");
    let dir = dir.to_str().unwrap();
    for (compiled, device, feature) in [
        (cfg!(feature = "cuda"), "cuda:0", "cuda"),
        (cfg!(feature = "wgpu"), "wgpu", "wgpu"),
    ] {
        if !compiled {
            let message = fails(1, &generate(dir, &["--device", device]));
            let has = format!("device {device}: this build has cpu");
            contains(
                &message,
                &[&has, &format!("build with --features {feature} for it")],
            );
        }
    }

    contains(
        &fails(
            1,
            &[
                "train",
                root()
                    .join("configs/train/quickstart.toml")
                    .to_str()
                    .unwrap(),
                "--set",
                "parallel.communicator=nccl",
            ],
        ),
        &["parallel.communicator = \"nccl\": needs processes, which mpirun or srun start"],
    );

    contains(
        &fails(1, &generate("no/such/place", &[])),
        &["no/such/place: there is no such folder"],
    );
    contains(
        &fails(1, &["inspect", "no/such/place"]),
        &["no/such/place: there is no such folder"],
    );
    let empty = tempfile::tempdir().unwrap();
    let message = fails(1, &generate(empty.path().to_str().unwrap(), &[]));
    contains(
        &message,
        &[
            "/config.json (a checkpoint)",
            "/checkpoints/latest/config.json",
        ],
    );

    // A value that breaks a rule: key, value, rule.
    let wrong = empty.path().join("config.json");
    let text = fs::read_to_string(fixture("tiny-yarn").join("config.json")).unwrap();
    let edited = text.replace("\"num_experts_per_tok\": 2", "\"num_experts_per_tok\": 5");
    assert_ne!(edited, text);
    fs::write(&wrong, edited).unwrap();
    let rule = "num_experts_per_tok = 5: must be at most 4";
    let message = fails(1, &["inspect", wrong.to_str().unwrap()]);
    contains(&message, &["config.json: ", rule]);
    assert_eq!(message.matches(rule).count(), 1, "told once: {message}");
    contains(
        &fails(1, &generate(empty.path().to_str().unwrap(), &[])),
        &[rule],
    );

    // Weights that end too early.
    fs::write(&wrong, text).unwrap();
    let weights = fs::read(fixture("tiny-yarn").join("model.safetensors")).unwrap();
    let broken = empty.path().join("model.safetensors");
    fs::write(&broken, &weights[..weights.len() - 4]).unwrap();
    contains(
        &fails(1, &["inspect", empty.path().to_str().unwrap()]),
        &["model.safetensors"],
    );

    let long = "fox ".repeat(3000);
    let message = fails(1, &["generate", "--model", dir, "--prompt", &long]);
    contains(&message, &["it must be shorter than 2560"]);
}
