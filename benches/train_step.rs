//! Speed of one training step and of decoding at the shape of `configs/model/bench-24m.json`, in f32 on the CPU.
//!
//! `cargo bench --bench train_step [-- --help]`; threads by RAYON_NUM_THREADS. A step is forward, backward, clipping,
//! AdamW and the bias update. Medians over the steps after warming up.

use std::time::Instant;

use burn::{
    module::Module,
    optim::{GradientsParams, ModuleOptimizer},
    tensor::{Device, Distribution, Int, Tensor, TensorData},
};
use clap::{Parser, ValueEnum};
use deepburn_kernels::{awake::awake, compact::CompactFormat};
use deepburn_model::{
    attention::{Layout, Span},
    checkpoint::hf_config,
    config::ModelConfig,
    loss::BalanceReading,
    parameters,
    transformer::Transformer,
};
use deepburn_train::{
    config::OptimizerConfig,
    optimizer::adamw,
    precision::Precision,
    step::{LossWeights, UpdateRule, global_norm, losses, update},
};

#[path = "../src/allocator.rs"]
mod allocator;

/// Tokens per page of the cache, as in generation.
const PAGE: usize = 64;

/// What is measured, and at which sizes.
#[derive(Debug, Parser)]
struct Args {
    /// Sequences of a training step
    #[arg(long, default_value_t = 8)]
    sequences: usize,
    /// Tokens of each
    #[arg(long, default_value_t = 256)]
    length: usize,
    /// Measured training steps; 0 measures no training
    #[arg(long, default_value_t = 7)]
    steps: usize,
    /// Tokens before those that are decoded
    #[arg(long, default_value_t = 32)]
    context: usize,
    /// Tokens that are decoded
    #[arg(long, default_value_t = 128)]
    new_tokens: usize,
    /// Batches to decode; 0 is none
    #[arg(long, value_delimiter = ',', default_value = "1,8")]
    batches: Vec<usize>,
    /// How weights are held for decoding
    #[arg(long, value_enum, default_value_t = Weights::F32)]
    weights: Weights,
    /// Other values for keys of the model's configuration
    #[arg(long = "set", value_name = "KEY=NUMBER")]
    changes: Vec<String>,
    /// As cargo passes it
    #[arg(long, hide = true)]
    bench: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Weights {
    F32,
    Bf16,
    Fp8,
}

fn main() {
    allocator::keep_freed_memory();
    let args = Args::parse();
    let config = config(&args.changes);
    let device = Device::flex();
    let model = Transformer::new(&config, 1, &device);
    let count = parameters::ParameterCount::of(&parameters::list(&model), &config);
    let threads = rayon::current_num_threads();
    println!(
        "shape: {} parameters, {} active; {threads} threads",
        count.total(),
        count.active()
    );
    // As the program runs its commands.
    rayon::scope(|_| {
        if args.steps > 0 {
            training(&config, &args, &device);
        }
        let format = match args.weights {
            Weights::F32 => None,
            Weights::Bf16 => Some(CompactFormat::Bf16),
            Weights::Fp8 => Some(CompactFormat::Fp8),
        };
        let model = match format {
            None => model,
            Some(format) => model.hold(format).expect("single precision on the CPU"),
        };
        for &batch in args.batches.iter().filter(|&&batch| batch > 0) {
            decoding(
                &config,
                &model,
                batch,
                [args.context, args.new_tokens],
                &device,
            );
        }
    });
    let memory = memory_stats::memory_stats().map_or(0, |memory| memory.physical_mem);
    println!("memory of the process at the end: {} MiB", memory >> 20);
}

fn config(changes: &[String]) -> ModelConfig {
    let text = include_str!("../configs/model/bench-24m.json");
    let mut shape: serde_json::Value = serde_json::from_str(text).expect("shipped");
    for change in changes {
        let (key, value) = change.split_once('=').expect("KEY=NUMBER");
        shape[key] = value.parse::<u64>().expect("a number").into();
    }
    hf_config::parse(&shape.to_string()).expect("a shape that exists")
}

fn training(config: &ModelConfig, args: &Args, device: &Device) {
    let device = device.clone().autodiff();
    let mut model = Transformer::new(config, 1, &device).train();
    let mut optimizer: ModuleOptimizer = adamw(&OptimizerConfig::default(), Precision::Fp32);
    let weights = LossWeights {
        mtp: 0.3,
        balance: 1e-4,
        reading: BalanceReading::Paper,
    };
    let rule = UpdateRule {
        clip_norm: 1.0,
        gamma: 1e-3,
    };
    let mut parts = [Vec::new(), Vec::new(), Vec::new()];
    for step in 0..args.steps + 2 {
        let shape = [args.sequences, args.length + 1];
        let windows = tokens(config, shape, step as u64, &device);
        let awake = awake(&device);
        let started = Instant::now();
        let losses = losses(&model, windows, None, weights);
        let loads: Vec<Vec<u64>> = losses
            .loads
            .iter()
            .map(|load| {
                load.to_data()
                    .iter::<i64>()
                    .map(|load| load as u64)
                    .collect()
            })
            .collect();
        let forward = started.elapsed().as_secs_f64();
        let gradients = GradientsParams::from_grads(losses.total.backward(), &model);
        let backward = started.elapsed().as_secs_f64();
        let norm = global_norm(&model, &gradients);
        model = update(
            model,
            &mut optimizer,
            1e-4.into(),
            gradients,
            norm,
            &loads,
            rule,
        );
        let whole = started.elapsed().as_secs_f64();
        drop(awake);
        if step >= 2 {
            parts[0].push(forward);
            parts[1].push(backward - forward);
            parts[2].push(whole - backward);
        }
    }
    let whole: Vec<f64> = (0..parts[0].len())
        .map(|i| parts.iter().map(|part| part[i]).sum())
        .collect();
    let whole = median(whole);
    let [forward, backward, optimizer] = parts.map(|part| 1e3 * median(part));
    println!(
        "training {} x {}: {:.0} tokens/s (forward {forward:.0} ms, backward {backward:.0} ms, optimizer \
         {optimizer:.0} ms)",
        args.sequences,
        args.length,
        (args.sequences * args.length) as f64 / whole
    );
    let (products, limit) = (products(config, &model, args), product_rate(&device));
    println!(
        "products of a step: {products:.0} GFLOP, at {:.0}% of the rate of one large product, {limit:.0} GFLOP/s",
        100.0 * products / whole / limit
    );
}

/// Billions of operations of a step's matrix products: six for each token and weight that it meets, and attention to half
/// of the positions.
fn products(config: &ModelConfig, model: &Transformer, args: &Args) -> f64 {
    let active = parameters::ParameterCount::of(&parameters::list(model), config).active();
    let of_head = config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim;
    let attention = config.num_attention_heads * of_head * (args.length + 1) / 2;
    let of_token = active + config.num_hidden_layers * attention;
    (6 * args.sequences * args.length * of_token) as f64 / 1e9
}

/// Billions of operations per second of a product of square matrices of 1024 rows, the best of some.
fn product_rate(device: &Device) -> f64 {
    const SIDE: usize = 1024;
    let device = device.clone().inner();
    let matrix = Tensor::<2>::random([SIDE, SIDE], Distribution::Default, &device);
    let seconds = (0..20).map(|_| {
        let started = Instant::now();
        let _ = matrix.clone().matmul(matrix.clone()).into_data();
        started.elapsed().as_secs_f64()
    });
    2.0 * SIDE.pow(3) as f64 / seconds.fold(f64::INFINITY, f64::min) / 1e9
}

fn decoding(
    config: &ModelConfig,
    model: &Transformer,
    batch: usize,
    [context, new_tokens]: [usize; 2],
    device: &Device,
) {
    let room = (context + new_tokens + 1).div_ceil(PAGE);
    let mut rates = Vec::new();
    for run in 0..5 {
        let _awake = awake(device);
        let mut cache = model.new_paged_cache(batch * room);
        let mut next = tokens(config, [1, batch * context], run, device);
        let (mut start, mut length) = (0, context);
        let mut started = Instant::now();
        for token in 0..=new_tokens {
            let spans = (0..batch).map(|sequence| Span {
                pages: (sequence * room..(sequence + 1) * room)
                    .map(|page| page as u32)
                    .collect(),
                start,
                length,
            });
            let layout = Layout {
                page: PAGE,
                spans: spans.collect(),
            };
            let hidden = model.forward_paged(next, &mut cache, &layout).hidden;
            let width = config.hidden_size;
            let last = hidden
                .reshape([batch, length, width])
                .narrow(1, length - 1, 1);
            next = model.logits(last).argmax(2).reshape([1, batch]);
            (start, length) = (start + length, 1);
            if token == 0 {
                started = Instant::now();
            }
        }
        rates.push((batch * new_tokens) as f64 / started.elapsed().as_secs_f64());
    }
    println!(
        "decoding after {context} tokens, batch {batch}: {:.0} tokens/s",
        median(rates)
    );
}

/// Numbers without structure, the same on every machine.
fn tokens(config: &ModelConfig, shape: [usize; 2], seed: u64, device: &Device) -> Tensor<2, Int> {
    let numbers = (0..(shape[0] * shape[1]) as u64).map(|at| {
        let mixed = (at + 1 + seed * 1_000_003).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        ((mixed >> 33) % config.vocab_size as u64) as i32
    });
    Tensor::from_data(
        TensorData::new(numbers.collect::<Vec<i32>>(), shape),
        device,
    )
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
