//! What training keeps for each parameter is what the table of `precision.rs` says.
#![cfg(target_os = "linux")]

#[path = "../../tests/support/process.rs"]
mod process;

use std::{env, process::Command};

use burn::{
    module::{Module, ModuleVisitor, Param},
    optim::GradientsParams,
    tensor::{Device, Int, Tensor},
};
use deepburn_model::{
    checkpoint::hf_config, config::ModelConfig, loss::BalanceReading, transformer::Transformer,
};
use deepburn_train::{
    config::OptimizerConfig,
    optimizer::adamw,
    precision::Precision,
    step::{LossWeights, UpdateRule, global_norm, losses, update},
};
use process::status;

/// The precision of a process of its own.
const SWITCH: &str = "DEEPBURN_TEST_PRECISION";

/// Many parameters for few tokens: what a batch needs is small beside them.
fn large(precision: Precision) -> Transformer {
    let config = ModelConfig {
        hidden_size: 256,
        moe_intermediate_size: 256,
        n_routed_experts: 32,
        ..hf_config::parse(include_str!("../../configs/model/tiny.json")).unwrap()
    };
    Transformer::new(&config, 1, &Device::flex().autodiff()).with_arithmetic(precision.arithmetic())
}

/// Reads every parameter, which are made when they are first used.
struct Touch;

impl ModuleVisitor for Touch {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let _ = param.val();
    }
}

/// Weights, gradients and moments of one step; a process of its own for each precision, which [`measured`] starts.
#[test]
fn step_once() {
    let Ok(name) = env::var(SWITCH) else { return };
    let precision: Precision = serde_json::from_str(&name).unwrap();
    let weights = LossWeights {
        mtp: 0.3,
        balance: 0.0,
        reading: BalanceReading::Paper,
    };
    let rule = UpdateRule {
        clip_norm: 1e9,
        gamma: 0.0,
    };
    let gradients = |model: &Transformer| {
        let windows = Tensor::<1, Int>::arange(0..18, &Device::flex().autodiff()).reshape([2, 9]);
        let loss = losses(model, windows, None, weights).total;
        GradientsParams::from_grads(loss.backward(), model)
    };
    // What threads and code take once is there before.
    drop(gradients(&large(precision)));

    let start = status("VmRSS:");
    let model = large(precision);
    model.visit(&mut Touch);
    let with_weights = status("VmRSS:");
    let gradients = gradients(&model);
    let with_gradients = status("VmRSS:");
    let parameters = model.num_params();
    let norm = global_norm(&model, &gradients);
    let mut optimizer = adamw(&OptimizerConfig::default(), precision);
    let model = update(
        model,
        &mut optimizer,
        1e-3.into(),
        gradients,
        norm,
        &[],
        rule,
    );
    let with_moments = status("VmRSS:");
    let parts = [
        with_weights - start,
        with_gradients - with_weights,
        with_moments - with_weights,
    ];
    let per_parameter = parts.map(|bytes| bytes as f64 / parameters as f64);
    eprintln!(
        "measured {}",
        serde_json::to_string(&per_parameter).unwrap()
    );
    drop((model, optimizer));
}

fn measured(precision: Precision) -> [f64; 3] {
    let output = Command::new(env::current_exe().unwrap())
        .args(["--exact", "step_once", "--nocapture"])
        .env(SWITCH, serde_json::to_string(&precision).unwrap())
        // What is freed goes back to the system.
        .env("MALLOC_MMAP_THRESHOLD_", "65536")
        .output()
        .unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix("measured "));
    serde_json::from_str(line.unwrap_or_else(|| panic!("{text}"))).unwrap()
}

#[test]
fn every_parameter_takes_the_bytes_of_the_table() {
    for precision in [Precision::Fp32, Precision::Bf16, Precision::Fp8] {
        let table = precision.bytes_per_parameter();
        for (found, (part, bytes)) in measured(precision).into_iter().zip(table) {
            assert!(
                (found / bytes as f64 - 1.0).abs() < 0.05,
                "{precision:?}: {part} take {found:.3} bytes per parameter, expected {bytes}"
            );
        }
    }
}
