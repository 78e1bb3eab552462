//! What the backward pass computes again is what it was, and is not kept.

#[cfg(target_os = "linux")]
#[path = "../../tests/support/process.rs"]
mod process;

use burn::{
    module::{Module, ModuleVisitor, Param},
    tensor::{Device, Gradients, Int, Tensor, TensorData},
};
use deepburn_kernels::fp8::ScaleFormat;
use deepburn_model::{
    attention::AttentionMask,
    checkpoint::hf_config,
    config::ModelConfig,
    loss::{BalanceReading, sequence_balance},
    projection::Arithmetic,
    transformer::Transformer,
};

fn tiny() -> ModelConfig {
    hf_config::parse(include_str!("../../configs/model/tiny.json")).unwrap()
}

fn tokens(first: usize, length: usize) -> Tensor<2, Int> {
    let tokens: Vec<i32> = (first..first + length)
        .map(|at| (at * 37 % 251) as i32)
        .collect();
    Tensor::from_data(
        TensorData::new(tokens, [1, length]),
        &Device::flex().autodiff(),
    )
}

/// All parts of the loss, and the loads of the experts.
fn loss(model: &Transformer, length: usize) -> (Tensor<1>, Vec<TensorData>) {
    let mask = |length| AttentionMask::causal(length, &Device::flex().autodiff());
    let output = model.forward(tokens(0, length), &mask(length));
    let mut loss = model.cross_entropy(output.hidden.clone(), tokens(1, length));
    let mut moe = output.moe;
    if !model.mtp.is_empty() {
        let length = length - 1;
        let previous = output.hidden.narrow(1, 0, length);
        let further = model.predict_further(0, previous, tokens(1, length), &mask(length));
        loss = loss + model.cross_entropy(further.hidden, tokens(2, length)) * 0.3;
        moe.extend(further.block.moe);
    }
    let balance = moe
        .iter()
        .map(|moe| sequence_balance(&moe.routing, 1, BalanceReading::Paper));
    let loss = balance.fold(loss, |loss, balance| loss + balance * 0.01);
    (
        loss,
        moe.into_iter().map(|moe| moe.load.into_data()).collect(),
    )
}

fn gradients(model: &Transformer, gradients: &Gradients) -> Vec<TensorData> {
    struct Collector<'a>(&'a Gradients, Vec<TensorData>);
    impl ModuleVisitor for Collector<'_> {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            self.1
                .extend(param.val().grad(self.0).map(Tensor::into_data));
        }
    }
    let mut collector = Collector(gradients, Vec::new());
    model.visit(&mut collector);
    collector.1
}

#[test]
fn gradients_are_the_same_bit_for_bit_and_loads_are_counted_once() {
    let bf16 = Arithmetic {
        bf16: true,
        ..Arithmetic::FULL
    };
    let fp8 = Arithmetic {
        bf16: true,
        ..Arithmetic::fp8(ScaleFormat::Float32)
    };
    let direct = ModelConfig {
        q_lora_rank: None,
        ..tiny()
    };
    for config in [tiny(), direct] {
        for arithmetic in [Arithmetic::FULL, bf16, fp8] {
            let run = |recompute| {
                let arithmetic = Arithmetic {
                    recompute,
                    ..arithmetic
                };
                let device = Device::flex().autodiff();
                let model = Transformer::new(&config, 5, &device).with_arithmetic(arithmetic);
                let (loss, loads) = loss(&model, 24);
                let found = gradients(&model, &loss.backward());
                (loss.into_data(), loads, found)
            };
            let (kept, again) = (run(false), run(true));
            assert!(kept.2.len() > 50, "{}", kept.2.len());
            assert!(
                kept == again,
                "{arithmetic:?} with {:?}",
                config.q_lora_rank
            );
        }
    }
}

#[cfg(target_os = "linux")]
mod memory {
    use std::{env, process::Command};

    use super::{process::status, *};

    const LENGTH: usize = 2048;
    /// Whether a process of its own is to recompute.
    const SWITCH: &str = "DEEPBURN_TEST_RECOMPUTE";

    /// Wide heads over few channels, so that what is computed again is most of what would be kept.
    fn wide() -> ModelConfig {
        ModelConfig {
            num_hidden_layers: 6,
            first_k_dense_replace: 6,
            num_nextn_predict_layers: 0,
            num_attention_heads: 16,
            ..tiny()
        }
    }

    /// One step's memory at its peak; a process of its own for each, which [`measured`] starts.
    #[test]
    fn step_once() {
        if let Ok(recompute) = env::var(SWITCH) {
            let arithmetic = Arithmetic {
                recompute: recompute == "true",
                ..Arithmetic::FULL
            };
            let device = Device::flex().autodiff();
            let model = Transformer::new(&wide(), 5, &device).with_arithmetic(arithmetic);
            let before = status("VmRSS:");
            let gradients = loss(&model, LENGTH).0.backward();
            eprintln!("peak {}", status("VmHWM:") - before);
            drop(gradients);
        }
    }

    fn measured(recompute: bool) -> f64 {
        let output = Command::new(env::current_exe().unwrap())
            .args(["--exact", "memory::step_once", "--nocapture"])
            .env(SWITCH, recompute.to_string())
            .output()
            .unwrap();
        let text = String::from_utf8(output.stderr).unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix("peak "));
        line.unwrap_or_else(|| panic!("{text}")).parse().unwrap()
    }

    /// Of every layer but the one under way in the backward pass, queries, keys and values of all heads are not there, nor
    /// are the normed inputs of their projections.
    #[test]
    fn what_is_computed_again_is_not_kept() {
        let config = wide();
        let heads = config.num_attention_heads
            * (config.qk_head_dim() + config.qk_nope_head_dim + config.v_head_dim);
        let latents = config.q_lora_rank.unwrap() + config.kv_lora_rank;
        let per_token = heads + latents + 2 * config.hidden_size;
        let expected = (4 * LENGTH * (config.num_hidden_layers - 1) * per_token) as f64;
        let (kept, again) = (measured(false), measured(true));
        let saved = kept - again;
        assert!(
            (0.8..1.25).contains(&(saved / expected)),
            "{:.1} MB without, {:.1} MB with: {:.1} MB less, expected {:.1}",
            kept / 1e6,
            again / 1e6,
            saved / 1e6,
            expected / 1e6
        );
    }
}
