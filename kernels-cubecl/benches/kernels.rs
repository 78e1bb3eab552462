//! Times of the FP8 kernels and of attention over the latent cache on a CUDA device. [`kernels.sh`](kernels.sh) builds
//! and runs it.
//!
//! Shapes are those of DeepSeek-V3 at 4096 tokens, in bf16, and of its decoding, a token per sequence. Environment:
//! - `DEEPBURN_COMMIT`: what the table says of the version;
//! - `DEEPBURN_TFLOPS`: the device's limit for dense FP8 products, in TFLOP/s (an H100 SXM: 1979);
//! - `DEEPBURN_PEER`: a file with lines of M, N, K and microseconds of torch's `_scaled_mm`.

use std::{collections::HashMap, env, fs, time::Instant};

use burn::tensor::{DType, Device, DeviceType, Distribution, Int, Tensor};
use deepburn_kernels::{
    compact::{CompactFormat, CompactMatrices},
    fp8::{Quantized, ScaleFormat, Tile, native},
    mla_decode::mla_decode,
};

/// M, N, K: the projections of attention and of an expert, forward and (in rows' tiles) for the weight's gradient.
const PRODUCTS: [([usize; 3], Tile); 9] = [
    ([4096, 2112, 7168], Tile::Block),
    ([4096, 24576, 1536], Tile::Block),
    ([4096, 32768, 512], Tile::Block),
    ([4096, 7168, 16384], Tile::Block),
    ([4096, 4096, 7168], Tile::Block),
    ([4096, 7168, 2048], Tile::Block),
    ([64, 7168, 2048], Tile::Block),
    ([4096, 7168, 4096], Tile::Row),
    ([7168, 2048, 4096], Tile::Row),
];
/// Rows and columns to quantise.
const MATRICES: [[usize; 2]; 2] = [[4096, 7168], [4096, 2048]];
/// Matrices that are held: both sizes of an expert's, and the head's.
const HELD: [[usize; 2]; 3] = [[7168, 2048], [2048, 7168], [7168, 129_280]];
/// Sequences and positions of each, all of them cached.
const CACHES: [[usize; 2]; 6] = [
    [1, 4096],
    [1, 32_768],
    [8, 4096],
    [32, 4096],
    [64, 4096],
    [128, 4096],
];
/// Heads, latents and rotated channels of decoding.
const DECODING: [usize; 3] = [128, 512, 64];
const NORMAL: Distribution = Distribution::Normal(0.0, 1.0);
/// Launches per time, and times of which the median counts.
const LAUNCHES: u32 = 20;
const TIMES: usize = 7;

fn main() {
    if Device::enumerate(DeviceType::Cuda).is_empty() {
        eprintln!("skipped: no CUDA device");
        return;
    }
    let device = Device::cuda(0);
    let machine = env::var("DEEPBURN_MACHINE").unwrap_or_else(|_| format!("{device:?}"));
    let commit = env::var("DEEPBURN_COMMIT").unwrap_or_else(|_| "unknown".to_string());
    let limit = env::var("DEEPBURN_TFLOPS")
        .ok()
        .and_then(|limit| limit.parse::<f64>().ok());
    let peer = peer();
    println!("{machine}, commit {commit}, median of {TIMES} times {LAUNCHES} launches\n");

    println!(
        "| product | tiles of b | us | TFLOP/s | of the limit | x torch |\n|---|---|---|---|---|---|"
    );
    for ([m, n, k], tile) in PRODUCTS {
        let (a, b) = (random([m, k], &device), random([n, k], &device));
        let a = quantize(a, Tile::Row);
        let b = quantize(b, tile);
        let time = time(&device, || {
            native::matmul_nt(&a, &b, DType::BF16).expect("a kernel for this device");
        });
        let rate = 2.0 * (m * n * k) as f64 / time / 1e6;
        let share = limit.map_or("-".to_string(), |limit| {
            format!("{:.0}%", 100.0 * rate / limit)
        });
        let ratio = peer
            .get(&[m, n, k])
            .map_or("-".to_string(), |peer| format!("{:.2}", peer / time));
        println!("| {m} x {n} x {k} | {tile:?} | {time:.1} | {rate:.0} | {share} | {ratio} |");
    }

    println!("\n| quantisation, bf16 | us | GB/s |\n|---|---|---|");
    for [rows, columns] in MATRICES {
        let (x, y) = (
            random([rows, columns], &device),
            random([rows, columns], &device),
        );
        // Two bytes in and one out per element, and a scale for 128 in a row's tile.
        let row = |name: &str, inputs: usize, time: f64| {
            let bytes = (rows * columns) as f64 * (2.0 * inputs as f64 + 1.0 + 4.0 / 128.0);
            println!(
                "| {name} {rows} x {columns} | {time:.1} | {:.0} |",
                bytes / time / 1e3
            );
        };
        let format = ScaleFormat::PowerOfTwo;
        for tile in [Tile::Row, Tile::Block] {
            let time = time(&device, || {
                native::quantize(x.clone(), tile, format).expect("a kernel for this device");
            });
            row(&format!("{tile:?}"), 1, time);
        }
        let transposed = time(&device, || {
            native::quantize_transposed(x.clone(), format).expect("a kernel for this device");
        });
        row("transposed", 1, transposed);
        let swiglu = time(&device, || {
            native::swiglu_quantize(x.clone(), y.clone(), format)
                .expect("a kernel for this device");
        });
        row("swiglu", 2, swiglu);
    }

    println!("\n| rows times held weights | us | GB/s of the weights |\n|---|---|---|");
    for [inner, columns] in HELD {
        for format in [CompactFormat::Bf16, CompactFormat::Fp8] {
            let weights = Tensor::random([1, inner, columns], NORMAL, &device);
            let held = CompactMatrices::new(weights, format).expect("single precision");
            for rows in [1, 8, 64] {
                let x = Tensor::<2>::random([rows, inner], NORMAL, &device);
                let time = time(&device, || {
                    held.linear(x.clone());
                });
                let rate = held.bytes() as f64 / time / 1e3;
                println!("| {rows} x {inner} x {columns}, {format:?} | {time:.1} | {rate:.0} |");
            }
        }
    }

    println!(
        "\n| attention of a token, bf16 | us | TFLOP/s | GB/s of the cache |\n|---|---|---|---|"
    );
    for [batch, positions] in CACHES {
        let [heads, latent, rope] = DECODING;
        let query = |width| random4([batch, 1, heads, width], &device) / 16.0;
        let cached = |width| random4([batch, positions, 1, width], &device).squeeze_dim::<3>(2);
        let (q_latent, q_pe) = (query(latent), query(rope));
        let (c_kv, k_pe) = (cached(latent), cached(rope));
        let lengths = Tensor::<1, Int>::full([batch], positions as i32, &device);
        let time = time(&device, || {
            mla_decode(
                q_latent.clone(),
                q_pe.clone(),
                c_kv.clone(),
                k_pe.clone(),
                lengths.clone(),
            );
        });
        let products = (batch * positions * heads * (2 * latent + rope)) as f64;
        let bytes = (batch * positions * (latent + rope) * 2) as f64;
        println!(
            "| {batch} x {positions} positions | {time:.1} | {:.0} | {:.0} |",
            2.0 * products / time / 1e6,
            bytes / time / 1e3
        );
    }
}

fn random4(shape: [usize; 4], device: &Device) -> Tensor<4> {
    Tensor::<4>::random(shape, NORMAL, device).cast(DType::BF16)
}

fn random(shape: [usize; 2], device: &Device) -> Tensor<2> {
    Tensor::<2>::random(shape, NORMAL, device).cast(DType::BF16)
}

fn quantize(x: Tensor<2>, tile: Tile) -> Quantized {
    native::quantize(x, tile, ScaleFormat::PowerOfTwo).expect("a kernel for this device")
}

/// Microseconds of a launch, with all work on the device done.
fn time(device: &Device, launch: impl Fn()) -> f64 {
    let sync = || device.sync().expect("the device works");
    for _ in 0..LAUNCHES {
        launch();
    }
    sync();
    let mut times: Vec<f64> = (0..TIMES)
        .map(|_| {
            let start = Instant::now();
            (0..LAUNCHES).for_each(|_| launch());
            sync();
            start.elapsed().as_secs_f64() * 1e6 / f64::from(LAUNCHES)
        })
        .collect();
    times.sort_by(f64::total_cmp);
    times[TIMES / 2]
}

/// The peer's microseconds by shape.
fn peer() -> HashMap<[usize; 3], f64> {
    let Some(file) = env::var_os("DEEPBURN_PEER") else {
        return HashMap::new();
    };
    let text = fs::read_to_string(file).expect("DEEPBURN_PEER names a file");
    text.lines()
        .map(|line| {
            let fields: Vec<&str> = line.split_whitespace().collect();
            let size = |at: usize| fields[at].parse().expect("a size");
            (
                [size(0), size(1), size(2)],
                fields[3].parse().expect("microseconds"),
            )
        })
        .collect()
}
