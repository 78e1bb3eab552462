use std::{
    cell::RefCell,
    collections::HashMap,
    path::{Path, PathBuf},
    rc::Rc,
};

use burn::tensor::{Device, Tensor};
use deepburn_model::{checkpoint, config::ModelConfig, transformer::Transformer};
use safetensors::{SafeTensors, tensor::TensorView};
use tokenizers::Tokenizer;

use super::*;
use crate::sampler::SamplerConfig;
use crate::speculation::SpeculationState;

fn fixture(case: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../tests/fixtures")
        .join(case)
}

/// A model with the tokenizer of another case: its ids are enough for all of them.
fn engine(config: ModelConfig, model: Transformer) -> Engine {
    Engine {
        config,
        model,
        tokenizer: Tokenizer::from_file(fixture("tiny-yarn").join("tokenizer.json")).unwrap(),
        device: Device::flex(),
        bos: Some(0),
        eos: vec![1],
    }
}

fn opened(case: &str) -> Engine {
    let (config, model) = checkpoint::load(&fixture(case), &Device::flex()).unwrap();
    engine(config, model)
}

/// Random weights, with prediction modules that pass the embedding on: they predict what the model without its layers
/// would, which is right often and wrong often.
fn predicting(modules: usize, seed: u64) -> Engine {
    predicting_as("tiny-mtp", modules, seed)
}

/// As [`predicting`], in the shape of a case.
pub(crate) fn predicting_as(case: &str, modules: usize, seed: u64) -> Engine {
    let device = Device::flex();
    // Small weights: attention adds less to an embedding than that is itself.
    const SIZE: f64 = 0.008;
    let config = ModelConfig {
        num_nextn_predict_layers: modules,
        initializer_range: SIZE,
        ..checkpoint::read_config(&fixture(case)).unwrap()
    };
    let mut model = Transformer::new(&config, seed, &device);
    for module in &mut model.mtp {
        let weight = std::mem::replace(
            &mut module.eh_proj.weight,
            burn::module::Param::from_tensor(Tensor::zeros([1, 1], &device)),
        );
        module.eh_proj.weight = weight.map(|weight| {
            let [_, width] = weight.dims();
            let eye = Tensor::<2>::eye(width, &device) * SIZE;
            Tensor::cat(vec![eye, Tensor::zeros([width, width], &device)], 0)
        });
    }
    engine(config, model)
}

/// Prompts of many lengths, the same for the same arguments.
fn prompts(count: usize, vocabulary: usize) -> Vec<Vec<u32>> {
    let token = |i: usize, j: usize| ((i * 7919 + j * 104_729 + 13) % (vocabulary - 2)) as u32 + 2;
    (0..count)
        .map(|i| (0..1 + i * i % 37).map(|j| token(i, j)).collect())
        .collect()
}

fn greedy(max_new_tokens: usize) -> GenerateOptions {
    GenerateOptions {
        max_new_tokens,
        ignore_eos: true,
        ..GenerateOptions::default()
    }
}

#[derive(Clone, Debug, Default)]
struct Text {
    tokens: Vec<TokenInfo>,
    summary: Option<Summary>,
}

impl Text {
    fn ids(&self) -> Vec<u32> {
        self.tokens.iter().map(|token| token.id).collect()
    }
}

/// Adds a text; what becomes of it can be read where it is returned.
fn add(batch: &mut Batch<'_>, request: Request) -> Rc<RefCell<Text>> {
    let text = Rc::new(RefCell::new(Text::default()));
    let heard = Rc::clone(&text);
    let listener = move |event| {
        let mut heard = heard.borrow_mut();
        match event {
            Event::Piece { tokens, .. } => heard.tokens.extend(tokens),
            Event::Finished(summary) => heard.summary = Some(summary),
            Event::Failed(error) => panic!("{error}"),
        }
        ControlFlow::Continue(())
    };
    batch.add(request, Box::new(listener)).unwrap();
    text
}

fn request(prompt: &[u32], options: &GenerateOptions) -> Request {
    Request {
        prompt: prompt.to_vec(),
        options: options.clone(),
        logprobs: None,
    }
}

/// Runs all prompts together; the texts and what the batch counted.
fn run(
    engine: &Engine,
    config: BatchConfig,
    prompts: &[Vec<u32>],
    options: &GenerateOptions,
) -> (Vec<Text>, Totals) {
    let mut batch = Batch::new(engine, config);
    let texts: Vec<_> = prompts
        .iter()
        .map(|prompt| add(&mut batch, request(prompt, options)))
        .collect();
    while !batch.is_idle() {
        batch.step();
        let (used, all) = batch.cached_tokens();
        assert!(used <= all);
    }
    let totals = batch.totals().unwrap();
    let texts = texts.iter().map(|text| text.borrow().clone()).collect();
    (texts, totals)
}

fn ids(texts: &[Text]) -> Vec<Vec<u32>> {
    texts.iter().map(Text::ids).collect()
}

fn alone(engine: &Engine, prompts: &[Vec<u32>], new: usize) -> Vec<Vec<u32>> {
    let one = |prompt: &Vec<u32>| {
        let config = BatchConfig::default();
        let (texts, _) = run(engine, config, std::slice::from_ref(prompt), &greedy(new));
        texts[0].ids()
    };
    prompts.iter().map(one).collect()
}

#[test]
fn together_texts_are_what_they_are_alone() {
    for case in ["tiny-yarn", "tiny-noqlora-bf16"] {
        let engine = opened(case);
        let prompts = prompts(20, engine.config.vocab_size);
        let expected = alone(&engine, &prompts, 24);
        for (max_batch, prefill_chunk, page) in [(20, 512, 64), (7, 5, 4), (3, 1, 16)] {
            let config = BatchConfig {
                max_batch,
                prefill_chunk,
                page,
                ..BatchConfig::default()
            };
            let (texts, totals) = run(&engine, config, &prompts, &greedy(24));
            assert_eq!(ids(&texts), expected, "{case} {config:?}");
            assert_eq!((totals.finished, totals.new_tokens), (20, 20 * 24));
        }
    }
}

/// Every token and logit of transformers' greedy generation, all prompts of a case together.
#[test]
fn greedy_tokens_and_logits_are_those_of_transformers() {
    for (case, tolerance) in [
        ("tiny-dense-moe", 2e-5),
        ("tiny-dense-moe-sharded", 2e-5),
        ("tiny-train-10", 2e-5),
        ("tiny-yarn", 5e-5),
    ] {
        let engine = opened(case);
        let bytes = std::fs::read(fixture(case).join("reference_generate.safetensors")).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let rows = |name: &str| -> Vec<Vec<u32>> {
            let view: TensorView<'_> = file.tensor(name).unwrap();
            let words = view.data().chunks_exact(8);
            let ids: Vec<u32> = words
                .map(|word| i64::from_le_bytes(word.try_into().unwrap()) as u32)
                .collect();
            ids.chunks_exact(view.shape()[1])
                .map(<[u32]>::to_vec)
                .collect()
        };
        let (prompts, outputs) = (rows("prompt_ids"), rows("output_ids"));
        let vocabulary = engine.config.vocab_size;
        let new = outputs[0].len() - prompts[0].len();
        let logits: Vec<f32> = file
            .tensor("step_logits")
            .unwrap()
            .data()
            .chunks_exact(4)
            .map(|word| f32::from_le_bytes(word.try_into().unwrap()))
            .collect();

        let mut batch = Batch::new(&engine, BatchConfig::default());
        let texts: Vec<_> = prompts
            .iter()
            .map(|prompt| {
                let request = Request {
                    logprobs: Some(vocabulary),
                    ..request(prompt, &greedy(new))
                };
                add(&mut batch, request)
            })
            .collect();
        while !batch.is_idle() {
            batch.step();
        }
        for (row, (text, output)) in texts.iter().zip(&outputs).enumerate() {
            let text = text.borrow();
            assert_eq!(text.ids(), output[prompts[row].len()..], "{case}");
            for (step, token) in text.tokens.iter().enumerate() {
                let from = (row * new + step) * vocabulary;
                let expected =
                    TokenInfo::new(token.id, &logits[from..from + vocabulary], vocabulary);
                let expected: HashMap<u32, f32> = expected.top.into_iter().collect();
                // A logarithm of a probability moves by twice what the logits move.
                for (id, logprob) in &token.top {
                    let off = (logprob - expected[id]).abs();
                    assert!(
                        off < 2.0 * tolerance,
                        "{case} row {row} step {step}: off by {off:e}"
                    );
                }
            }
        }
    }
}

#[test]
fn drafts_change_no_greedy_token() {
    let shipped = opened("tiny-mtp");
    let random = [(1, 3), (2, 4), (3, 5)].map(|(modules, seed)| predicting(modules, seed));
    for (at, engine) in [shipped].iter().chain(&random).enumerate() {
        let prompts = prompts(12, engine.config.vocab_size);
        let expected = alone(engine, &prompts, 20);
        for depth in 1..=4 {
            for (max_batch, prefill_chunk) in [(1, 512), (12, 7)] {
                let config = BatchConfig {
                    max_batch,
                    prefill_chunk,
                    page: 4,
                    speculate: Speculation::Depth(depth),
                    ..BatchConfig::default()
                };
                let (texts, totals) = run(engine, config, &prompts, &greedy(20));
                assert_eq!(ids(&texts), expected, "model {at}, depth {depth}");
                let drafts = totals.drafts;
                assert!(drafts.drafted > 0 && drafts.accepted <= drafts.drafted);
                // The first token of a text comes from its prompt.
                assert_eq!(drafts.tokens, 12 * 19);
                assert_eq!(drafts.tokens, drafts.steps + drafts.accepted);
                if at > 0 {
                    let rate = drafts.acceptance().unwrap();
                    assert!((0.02..0.98).contains(&rate), "model {at}: {drafts:?}");
                }
            }
        }
    }
}

/// The drafts themselves: those of a module over whole sequences, where the drafted tokens are known to be right.
#[test]
fn modules_draft_what_they_predict_over_whole_sequences() {
    use burn::tensor::{Int, TensorData};
    use deepburn_model::attention::AttentionMask;

    let engine = predicting(2, 4);
    let prompt = &prompts(6, engine.config.vocab_size)[5];
    let text = [
        prompt.clone(),
        alone(&engine, std::slice::from_ref(prompt), 16).remove(0),
    ]
    .concat();
    let model = &engine.model;
    let device = &engine.device;
    let tokens = |from: usize, length: usize| {
        let ids: Vec<i32> = text[from..from + length]
            .iter()
            .map(|&id| id as i32)
            .collect();
        Tensor::<2, Int>::from_data(TensorData::new(ids, [1, length]), device)
    };
    let best = |hidden: Tensor<3>| -> Vec<u32> {
        let best = model.logits(hidden).argmax(2).into_data();
        best.iter::<u32>().collect()
    };
    let length = text.len() - 2;
    let mask = AttentionMask::causal(length, device);
    let main = model.forward(tokens(0, length), &mask).hidden;
    let first = model.predict_further(0, main, tokens(1, length), &mask);
    let second = model.predict_further(1, first.hidden.clone(), tokens(2, length), &mask);
    let predicted = [best(first.hidden), best(second.hidden)];

    let config = BatchConfig {
        speculate: Speculation::Depth(2),
        prefill_chunk: 9,
        page: 4,
        ..BatchConfig::default()
    };
    let mut batch = Batch::new(&engine, config);
    add(&mut batch, request(prompt, &greedy(16)));
    let mut compared = [0, 0];
    while !batch.is_idle() {
        batch.step();
        for sequence in &batch.running {
            let last = sequence.tokens.len() - 1;
            if sequence.is_decoding() {
                // The second module's last row has read a token that is only drafted, and does not count.
                assert_eq!(sequence.ahead.rows(), Some(last - 1));
            }
            for (depth, (drafted, _)) in sequence.drafts.iter().enumerate() {
                let so_far = sequence.drafts[..depth].iter().map(|draft| draft.0);
                let right = so_far.eq(text[last + 1..].iter().copied().take(depth));
                if right && last - 1 < length {
                    assert_eq!(
                        *drafted,
                        predicted[depth][last - 1],
                        "row {last} depth {depth}"
                    );
                    compared[depth] += 1;
                }
            }
        }
    }
    assert!(compared[0] > 3 && compared[1] > 0, "{compared:?}");
}

#[test]
fn prompts_that_begin_alike_are_read_once() {
    let plain = (opened("tiny-yarn"), Speculation::Off);
    let drafting = (predicting(2, 4), Speculation::Depth(3));
    for (engine, speculate) in [plain, drafting] {
        let beginning: Vec<u32> = (0..22).map(|i| 20 + i * 3).collect();
        let prompts: Vec<Vec<u32>> = (0..5)
            .map(|i| [beginning.clone(), vec![30 + i; 1 + i as usize]].concat())
            .collect();
        let expected = alone(&engine, &prompts, 12);
        let config = BatchConfig {
            page: 4,
            max_batch: 2,
            speculate,
            ..BatchConfig::default()
        };
        let (texts, totals) = run(&engine, config, &prompts, &greedy(12));
        assert_eq!(ids(&texts), expected);
        // The first two start together; the others find all full pages whose following tokens are the same.
        let reused: Vec<usize> = texts
            .iter()
            .map(|text| text.summary.unwrap().reused_tokens)
            .collect();
        assert_eq!(reused, [0, 0, 20, 20, 20], "{speculate:?}");
        assert_eq!((totals.prefix_hits, totals.reused_tokens), (3, 60));
        // New tokens can be a beginning as well.
        let whole = [prompts[0].clone(), expected[0].clone(), vec![40]].concat();
        let mut batch = Batch::new(&engine, config);
        let first = add(&mut batch, request(&prompts[0], &greedy(12)));
        while !batch.is_idle() {
            batch.step();
        }
        let second = add(&mut batch, request(&whole, &greedy(2)));
        while !batch.is_idle() {
            batch.step();
        }
        assert_eq!(first.borrow().ids(), expected[0]);
        assert_eq!(second.borrow().ids(), alone(&engine, &[whole], 2)[0]);
        let reused = second.borrow().summary.unwrap().reused_tokens;
        assert!(reused >= 28, "{reused}");
    }
}

/// Four texts that fill the cache two at a time: they wait, give up their room and are computed again.
#[test]
fn texts_wait_for_room_and_end_the_same() {
    let plain = (opened("tiny-yarn"), Speculation::Off);
    let drafting = (predicting(1, 3), Speculation::Depth(2));
    for (engine, speculate) in [plain, drafting] {
        let prompts: Vec<Vec<u32>> = (0..4).map(|i| vec![20 + i, 31, 42, 53 + i]).collect();
        let expected = alone(&engine, &prompts, 40);
        let config = BatchConfig {
            page: 4,
            cached_tokens: 64,
            speculate,
            ..BatchConfig::default()
        };
        let (texts, totals) = run(&engine, config, &prompts, &greedy(40));
        assert_eq!(ids(&texts), expected);
        assert!(totals.interrupted > 0);
        // Alone in a cache that ends before the text.
        let config = BatchConfig {
            cached_tokens: 20,
            ..config
        };
        let (texts, _) = run(&engine, config, &prompts[..1], &greedy(40));
        assert_eq!(texts[0].ids(), expected[0][..16]);
        assert_eq!(texts[0].summary.unwrap().finish, Finish::ContextFull);
    }
}

#[test]
fn every_token_that_is_computed_counts_for_its_experts() {
    let engine = opened("tiny-yarn");
    let prompts = prompts(5, engine.config.vocab_size);
    let (_, totals) = run(&engine, BatchConfig::default(), &prompts, &greedy(4));
    // The last token of a text is chosen but not computed.
    let computed: usize = prompts.iter().map(|prompt| prompt.len() + 3).sum();
    assert_eq!(totals.expert_loads.len(), 2);
    for layer in &totals.expert_loads {
        assert_eq!(layer.len(), engine.config.n_routed_experts);
        let all: u64 = layer.iter().sum();
        assert_eq!(all as usize, computed * engine.config.num_experts_per_tok);
    }
}

/// Four tokens, each one of two: with drafts and without, as often. With 15 degrees of freedom two right samplers differ
/// by more than 37.7 once in a thousand seeds; the seeds are fixed.
#[test]
fn drafts_do_not_change_what_is_sampled() {
    const TEXTS: u64 = 1500;
    let engine = predicting(1, 3);
    let count = |speculate, from: u64| {
        let config = BatchConfig {
            max_batch: 50,
            speculate,
            ..BatchConfig::default()
        };
        let mut batch = Batch::new(&engine, config);
        let texts: Vec<_> = (from..from + TEXTS)
            .map(|seed| {
                let options = GenerateOptions {
                    sampler: SamplerConfig {
                        temperature: 1.0,
                        top_k: Some(2),
                        seed,
                        ..SamplerConfig::default()
                    },
                    ..greedy(4)
                };
                add(&mut batch, request(&[20, 31], &options))
            })
            .collect();
        while !batch.is_idle() {
            batch.step();
        }
        let drafts = batch.totals().unwrap().drafts;
        let mut counts: HashMap<Vec<u32>, f64> = HashMap::new();
        for text in texts {
            *counts.entry(text.borrow().ids()).or_default() += 1.0;
        }
        (counts, drafts)
    };
    let (plain, _) = count(Speculation::Off, 0);
    let (drafted, drafts) = count(Speculation::Depth(2), 1_000_000);
    assert!(
        drafts.accepted > TEXTS / 4 && drafts.accepted < drafts.drafted,
        "{drafts:?}"
    );
    let mut cells: Vec<&Vec<u32>> = plain.keys().chain(drafted.keys()).collect();
    cells.sort();
    cells.dedup();
    assert!((9..=16).contains(&cells.len()), "{}", cells.len());
    let statistic: f64 = cells
        .iter()
        .map(|cell| {
            let [a, b] = [&plain, &drafted].map(|counts| counts.get(*cell).copied().unwrap_or(0.0));
            (a - b).powi(2) / (a + b)
        })
        .sum();
    assert!(statistic < 37.7, "{statistic}");
}

#[test]
fn measuring_ends_with_a_decision_and_changes_no_token() {
    let engine = predicting(1, 3);
    let prompts = prompts(4, engine.config.vocab_size);
    let expected = alone(&engine, &prompts, 90);
    let config = BatchConfig {
        speculate: Speculation::Auto,
        page: 4,
        ..BatchConfig::default()
    };
    let mut batch = Batch::new(&engine, config);
    assert_eq!(batch.speculation(), SpeculationState::Measuring);
    let texts: Vec<_> = prompts
        .iter()
        .map(|prompt| add(&mut batch, request(prompt, &greedy(90))))
        .collect();
    while !batch.is_idle() {
        batch.step();
    }
    for (text, expected) in texts.iter().zip(&expected) {
        assert_eq!(text.borrow().ids(), *expected);
    }
    let state = batch.speculation();
    assert!(
        matches!(state, SpeculationState::Measured { with, without, kept } if kept == (with < without)),
        "{state:?}"
    );
    let engine = opened("tiny-yarn");
    let batch = Batch::new(&engine, config);
    assert_eq!(batch.speculation(), SpeculationState::NoModules);
}

#[test]
fn an_unwanted_text_ends_and_gives_its_pages_back() {
    let engine = opened("tiny-yarn");
    let mut batch = Batch::new(&engine, BatchConfig::default());
    let mut pieces = 0;
    let counter = Rc::new(RefCell::new(0));
    let heard = Rc::clone(&counter);
    let listener = move |event| {
        if let Event::Piece { .. } = event {
            pieces += 1;
            *heard.borrow_mut() = pieces;
        }
        ControlFlow::Break(())
    };
    batch
        .add(request(&[20, 21], &greedy(50)), Box::new(listener))
        .unwrap();
    while !batch.is_idle() {
        batch.step();
    }
    assert_eq!(*counter.borrow(), 1);
    assert_eq!(batch.cached_tokens().0, 0);
}
