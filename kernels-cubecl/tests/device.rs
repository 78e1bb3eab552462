//! The FP8 kernels on a CUDA device, against the functions on slices and exact sums, and attention on tensor cores.

use burn::tensor::{DType, Device, DeviceType, Int, Tensor, TensorData, Tolerance, bf16};
use deepburn_kernels::{
    compact::{CompactFormat, CompactMatrices},
    fp8::{
        self, Quantized, ScaleFormat, TILE, Tile, native,
        tiles::{self, dequantize},
    },
    grouped_gemm::grouped_matmul,
    mla_decode::mla_decode,
    permute::{Permutation, combine, permute},
};

/// Rows of both matrices and the inner size: one element, edges of warps' and cubes' tiles, tails of the inner size, one
/// and many stages of the ring, and (the last) more tiles of 128 x 128 than any GPU has multiprocessors.
const SHAPES: [[usize; 3]; 10] = [
    [1, 1, 1],
    [1, 2, 128],
    [7, 130, 129],
    [64, 64, 100],
    [128, 128, 256],
    [129, 127, 384],
    [200, 72, 1024],
    [65, 384, 1200],
    [300, 258, 2048],
    [2048, 1664, 272],
];

/// The CUDA device, or nothing and a word about it.
fn cuda() -> Option<Device> {
    if Device::enumerate(DeviceType::Cuda).is_empty() {
        eprintln!("skipped: no CUDA device");
        return None;
    }
    Some(Device::cuda(0))
}

fn upload(values: &[f32], columns: usize, dtype: DType, device: &Device) -> Tensor<2> {
    let data = TensorData::new(values.to_vec(), [values.len() / columns, columns]);
    Tensor::<2>::from_data(data, device).cast(dtype)
}

fn download(tensor: Tensor<2>) -> Vec<f32> {
    let data = tensor.cast(DType::F32).into_data();
    data.try_to_vec().expect("single precision")
}

fn parts(quantized: &Quantized) -> (Vec<u8>, Vec<f32>) {
    let codes = quantized.codes.clone().into_data().convert::<u8>();
    let codes = codes.try_to_vec().expect("codes in bytes");
    (codes, download(quantized.scales.clone()))
}

/// Numbers between -1 and 1.
fn noise(length: usize, seed: u32) -> impl Iterator<Item = f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9) | 1;
    (0..length).map(move |_| {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    })
}

/// Integers from -2 to 2 times a power of two per tile, so that codes, products and sums are exact: a sum over 128 has
/// at most ten bits, of which tensor cores keep about fourteen, and the sum of all at most 24.
fn exact(rows: usize, columns: usize, tile: Tile, seed: u32) -> Vec<f32> {
    let [down, _] = tile.dims();
    noise(rows * columns, seed)
        .enumerate()
        .map(|(at, noise)| {
            let [row, column] = [at / columns / down, at % columns / TILE];
            (noise * 2.49).round() * 2f32.powi(((row * 3 + column * 5) % 4) as i32 - 2)
        })
        .collect()
}

/// `a b^T`.
fn product(a: &[f32], b: &[f32], inner: usize) -> Vec<f32> {
    let rows = a.chunks(inner);
    rows.flat_map(|a| {
        b.chunks(inner).map(move |b| {
            let terms = a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b));
            terms.sum::<f64>() as f32
        })
    })
    .collect()
}

#[test]
fn quantisation_is_that_of_slices_bit_for_bit() {
    let Some(device) = cuda() else { return };
    for [rows, columns] in [[1, 1], [5, 384], [130, 132], [257, 131], [300, 1000]] {
        let mut values: Vec<f32> = noise(rows * columns, 1)
            .enumerate()
            .map(|(at, noise)| noise * 2f32.powi((at % 31) as i32 - 16))
            .collect();
        if columns > 131 {
            values[3] = f32::NAN;
            values[columns + 200 % columns] = f32::INFINITY;
        }
        for dtype in [DType::F32, DType::BF16] {
            let x = upload(&values, columns, dtype, &device);
            let values = download(x.clone());
            let transposed: Vec<f32> = (0..rows * columns)
                .map(|at| values[at % rows * columns + at / rows])
                .collect();
            for format in [ScaleFormat::Float32, ScaleFormat::PowerOfTwo] {
                let expect = |found: Quantized, values: &[f32], columns: usize| {
                    let scales = tiles::scales(values, columns, found.tile, format);
                    let codes = tiles::quantize(values, columns, found.tile, &scales);
                    let (found_codes, found_scales) = parts(&found);
                    let bits = |scales: &[f32]| -> Vec<u32> {
                        let nan = |scale: &f32| if scale.is_nan() { f32::NAN } else { *scale };
                        scales.iter().map(|scale| nan(scale).to_bits()).collect()
                    };
                    assert_eq!(
                        bits(&found_scales),
                        bits(&scales),
                        "scales {dtype:?} {columns}"
                    );
                    assert_eq!(found_codes, codes, "codes {dtype:?} {columns}");
                };
                for tile in [Tile::Row, Tile::Block] {
                    let found = native::quantize(x.clone(), tile, format).expect("a kernel");
                    expect(found, &values, columns);
                }
                let found = native::quantize_transposed(x.clone(), format).expect("a kernel");
                expect(found, &transposed, rows);
            }
        }
    }
}

#[test]
fn normalised_rows_are_quantised_as_their_values_would_be() {
    let Some(device) = cuda() else { return };
    for [rows, columns] in [[1, 1], [5, 384], [130, 131], [3, 7168]] {
        for dtype in [DType::F32, DType::BF16] {
            let x: Vec<f32> = noise(rows * columns, 8).collect();
            let weight: Vec<f32> = noise(columns, 9).map(|x| 1.5 + x).collect();
            let (x, weight) = (
                upload(&x, columns, dtype, &device),
                upload(&weight, columns, dtype, &device).reshape([columns]),
            );
            let (values, weights) = (
                download(x.clone()),
                download(weight.clone().reshape([1, -1])),
            );
            let found = native::rms_norm_quantize(x, weight, 1e-6, ScaleFormat::PowerOfTwo);
            let (codes, scales) = parts(&found.expect("a kernel"));
            let found = dequantize(&codes, columns, Tile::Row, &scales);
            let across = columns.div_ceil(TILE);
            for (at, found) in found.into_iter().enumerate() {
                let (row, column) = (at / columns, at % columns);
                let squares = values[row * columns..][..columns].iter();
                let mean = squares.map(|&x| f64::from(x).powi(2)).sum::<f64>() / columns as f64;
                let expected = f64::from(values[at]) / (mean + 1e-6).sqrt();
                let expected = (expected * f64::from(weights[column])) as f32;
                // Half a step of the codes, and what rounds differently.
                let scale = scales[row * across + column / TILE];
                let bound = 0.501 * (scale / 512.0).max(expected.abs() / 8.0);
                assert!(
                    (found - expected).abs() <= bound,
                    "{at} of {columns} columns in {dtype:?}: {found}, expected {expected}"
                );
            }
        }
    }
}

#[test]
fn products_of_small_integers_are_exact() {
    let Some(device) = cuda() else { return };
    for [m, n, k] in SHAPES {
        let a_values = exact(m, k, Tile::Row, 2);
        for b_tile in [Tile::Block, Tile::Row] {
            let b_values = exact(n, k, b_tile, 3);
            let quantize = |values: &[f32], tile| {
                let x = upload(values, k, DType::F32, &device);
                native::quantize(x, tile, ScaleFormat::PowerOfTwo).expect("a kernel")
            };
            let (a, b) = (quantize(&a_values, Tile::Row), quantize(&b_values, b_tile));
            let expected = product(&a_values, &b_values, k);
            let found = native::matmul_nt(&a, &b, DType::F32).expect("a kernel");
            assert_eq!(found.dims(), [m, n]);
            let found = download(found);
            for (at, (found, expected)) in found.iter().zip(&expected).enumerate() {
                let [row, column] = [at / n, at % n];
                assert_eq!(
                    found, expected,
                    "{m} x {n} x {k}, {b_tile:?}: {row}, {column}"
                );
            }
            let found = download(native::matmul_nt(&a, &b, DType::BF16).expect("a kernel"));
            let rounded = |x: &f32| bf16::from_f32(*x).to_f32();
            let expected: Vec<f32> = expected.iter().map(rounded).collect();
            assert!(found == expected, "{m} x {n} x {k}, {b_tile:?} in bf16");
        }
    }
}

#[test]
fn products_of_experts_segments_are_exact() {
    let Some(device) = cuda() else { return };
    let (k, format) = (400, ScaleFormat::PowerOfTwo);
    // Matrices that end in the middle of a block and those that do not, empty segments, and tiles behind the last.
    for n in [72, 130, 256] {
        let counts = [0, 200, 1, 0, 128, 0];
        let rows = 6 * TILE;
        let a_values = exact(rows, k, Tile::Row, 10);
        let a = upload(&a_values, k, DType::F32, &device);
        let a = native::quantize(a, Tile::Row, format).expect("a kernel");
        let matrices: Vec<_> = (0..counts.len())
            .map(|expert| exact(n, k, Tile::Block, 11 + expert as u32))
            .collect();
        let quantized: Vec<_> = matrices
            .iter()
            .map(|matrix| {
                let matrix = upload(matrix, k, DType::F32, &device);
                native::quantize(matrix, Tile::Block, format).expect("a kernel")
            })
            .collect();
        let b = Quantized {
            codes: Tensor::cat(quantized.iter().map(|it| it.codes.clone()).collect(), 0),
            scales: Tensor::cat(quantized.iter().map(|it| it.scales.clone()).collect(), 0),
            tile: Tile::Block,
        };
        let segments = Tensor::<1, Int>::from_data(counts, &device);
        let found = native::grouped_matmul_nt(&a, &b, segments, DType::F32).expect("a kernel");
        assert_eq!(found.dims(), [rows, n]);
        let mut expected = Vec::new();
        for (&count, matrix) in counts.iter().zip(&matrices) {
            let from = expected.len() / n * k;
            let rows = (count as usize).next_multiple_of(TILE);
            expected.extend(product(&a_values[from..][..rows * k], matrix, k));
        }
        expected.resize(rows * n, 0.0);
        for (at, (found, expected)) in download(found).iter().zip(&expected).enumerate() {
            assert_eq!(found, expected, "{n} columns: {}, {}", at / n, at % n);
        }
    }
}

#[test]
fn products_of_segments_of_the_inner_size_are_exact() {
    let Some(device) = cuda() else { return };
    let (counts, rows, format) = ([0, 200, 1, 0, 128, 0], 6 * TILE, ScaleFormat::PowerOfTwo);
    for [m, n] in [[7, 130], [129, 72], [256, 384]] {
        let [a_values, b_values] =
            [(m, 20), (n, 21)].map(|(m, seed)| exact(m, rows, Tile::Row, seed));
        let [a, b] = [&a_values, &b_values].map(|values| {
            let matrix = upload(values, rows, DType::F32, &device);
            native::quantize(matrix, Tile::Row, format).expect("a kernel")
        });
        let segments = Tensor::<1, Int>::from_data(counts, &device);
        let found = native::segments_matmul_nt(&a, &b, segments, DType::F32).expect("a kernel");
        assert_eq!(found.dims(), [counts.len() * m, n]);
        let mut start = 0;
        let mut expected = Vec::new();
        for count in counts {
            let end = start + (count as usize).next_multiple_of(TILE);
            let part = |values: &[f32]| -> Vec<f32> {
                let rows = values.chunks(rows).flat_map(|row| &row[start..end]);
                rows.copied().collect()
            };
            match end - start {
                0 => expected.extend(vec![0.0; m * n]),
                k => expected.extend(product(&part(&a_values), &part(&b_values), k)),
            }
            start = end;
        }
        for (at, (found, expected)) in download(found).iter().zip(&expected).enumerate() {
            assert_eq!(found, expected, "{m} x {n}: {}, {}", at / n, at % n);
        }
    }
}

/// The layer's operation, and its gradients, against the same on the CPU.
#[test]
fn grouped_linear_layers_equal_those_of_the_cpu() {
    let Some(device) = cuda() else { return };
    let (tokens, experts, width, hidden) = (300, 5, 256, 200);
    let chosen: Vec<i32> = (0..2 * tokens).map(|pair| pair * 7 % 11 % 4).collect();
    let run = |device: Device| {
        let tensor = |count: usize, seed, shape: [usize; 3]| {
            let values = noise(count, seed).collect::<Vec<f32>>();
            Tensor::<3>::from_data(TensorData::new(values, shape), &device).require_grad()
        };
        let x = tensor(tokens as usize * width, 30, [1, tokens as usize, width]);
        let weights = tensor(experts * width * hidden, 31, [experts, width, hidden]);
        let chosen = TensorData::new(chosen.clone(), [tokens as usize, 2]);
        let chosen = Tensor::<2, Int>::from_data(chosen, &device);
        let tile = fp8::segment_tile(&device);
        let order = Permutation::by_expert_padded(chosen, experts, tile);
        let rows = permute(x.clone().squeeze_dim(0), &order);
        let y = fp8::grouped_linear(rows, weights.clone(), &order, ScaleFormat::Float32);
        let ones = Tensor::ones(order.dims(), &device);
        let y = combine(y, ones, &order);
        let grads = y.clone().powi_scalar(2).sum().backward();
        let grads = [&x, &weights].map(|of| of.grad(&grads).expect("reached").into_data());
        (y.into_data(), grads)
    };
    let (found, found_grads) = run(device.autodiff());
    let (expected, expected_grads) = run(Device::flex().autodiff());
    // Tensor cores keep some fourteen bits of a sum.
    let close = Tolerance::<f32>::rel_abs(2e-3, 2e-2);
    found.assert_approx_eq(&expected, close);
    for (found, expected) in found_grads.iter().zip(&expected_grads) {
        found.assert_approx_eq(expected, close);
    }
}

#[test]
fn products_are_as_precise_as_the_tensor_cores() {
    let Some(device) = cuda() else { return };
    let [m, n, k] = [256, 384, 4096];
    let (a, b): (Vec<f32>, Vec<f32>) = (noise(m * k, 4).collect(), noise(n * k, 5).collect());
    let format = ScaleFormat::Float32;
    let quantize = |values: &[f32], tile| {
        native::quantize(upload(values, k, DType::F32, &device), tile, format).expect("a kernel")
    };
    let (a, b) = (quantize(&a, Tile::Row), quantize(&b, Tile::Block));
    let numbers = |of: &Quantized| {
        let (codes, scales) = parts(of);
        dequantize(&codes, k, of.tile, &scales)
    };
    let (a_values, b_values) = (numbers(&a), numbers(&b));
    let expected = product(&a_values, &b_values, k);
    let found = download(native::matmul_nt(&a, &b, DType::F32).expect("a kernel"));
    for (at, (found, expected)) in found.iter().zip(&expected).enumerate() {
        let (a, b) = (&a_values[at / n * k..][..k], &b_values[at % n * k..][..k]);
        // A tensor core aligns the 32 products of an instruction and the sum so far to the largest of them and keeps
        // thirteen bits of fraction or more (report, section 3.3.2: "around 14 bits"). An instruction is so wrong by
        // at most 33 units of 2^-13 of the largest, which is at most all that were summed since the last promotion.
        let bound: f32 = a
            .chunks(TILE)
            .zip(b.chunks(TILE))
            .map(|(a, b)| a.iter().zip(b).map(|(a, b)| (a * b).abs()).sum::<f32>())
            .map(|magnitudes| 4.0 * 33.0 / 8192.0 * magnitudes)
            .sum();
        assert!(
            (found - expected).abs() <= bound,
            "{at}: {found}, expected {expected}"
        );
    }
}

/// One token of each sequence and several, at the report's widths, over lengths of nothing to several chunks. Scores
/// differ by a few units; those of the second scale by hundreds, so that one position has all the weight.
#[test]
fn attention_in_bf16_is_that_of_the_cpu_but_for_the_rounding_of_weights() {
    let Some(device) = cuda() else { return };
    let (heads, latent, rope, positions) = (128, 512, 64, 1500);
    for (queries, lengths, scale) in [
        (1, vec![1500i32, 0, 1, 64, 65, 127, 1000], 1.0 / 64.0),
        (3, vec![1500, 2, 3, 700], 1.0 / 64.0),
        (2, vec![1499, 33], 16.0),
    ] {
        let batch = lengths.len();
        // Multiples of 1/64, which bf16 has.
        let values = |count, seed, scale: f32| -> Vec<f32> {
            noise(count, seed)
                .map(|x| (x * 64.0).round() / 64.0 * scale)
                .collect()
        };
        let run = |device: &Device, dtype| {
            let rows = batch * queries * heads;
            let query = |width, seed| {
                let shape = [batch, queries, heads, width];
                let data = TensorData::new(values(rows * width, seed, scale), shape);
                Tensor::<4>::from_data(data, (device, dtype))
            };
            let cached = |width, seed| {
                let mut values = values(batch * positions * width, seed, 1.0);
                for (sequence, &length) in values.chunks_mut(positions * width).zip(&lengths) {
                    sequence[length as usize * width..].fill(f32::NAN);
                }
                let data = TensorData::new(values, [batch, positions, width]);
                Tensor::<3>::from_data(data, (device, dtype))
            };
            let lengths = TensorData::new(lengths.clone(), [batch]);
            let lengths = Tensor::<1, Int>::from_data(lengths, device);
            let (q_latent, q_pe) = (query(latent, 40), query(rope, 41));
            let (c_kv, k_pe) = (cached(latent, 42), cached(rope, 43));
            let out = mla_decode(q_latent, q_pe, c_kv, k_pe, lengths);
            out.into_data().convert::<f32>()
        };
        let found = run(&device, DType::BF16);
        let again = run(&device, DType::BF16);
        found.assert_eq(&again, true);
        let expected = run(&Device::flex(), DType::F32);
        // Latents are below one. Each weight is rounded by 2^-9 of itself at most, in the numerator and in the
        // denominator, and so is the result; single precision does the rest.
        let close = Tolerance::<f32>::absolute(3.0 / 512.0 + 1e-3);
        found.assert_approx_eq(&expected, close);
    }
}

/// Scores of zero and of a thousand: outputs are means of integers, which the kernel adds up without rounding.
#[test]
fn attention_in_bf16_has_exact_means() {
    let Some(device) = cuda() else { return };
    let (heads, latent, rope, positions) = (128, 512, 64, 777);
    let bits: Vec<f32> = (0..positions * rope)
        .map(|at| f32::from(at / rope * 7 % 61 > at % rope))
        .collect();
    let integers: Vec<f32> = noise(positions * latent, 44)
        .map(|x| (x * 3.0).round())
        .collect();
    let mut q_pe = vec![0.0; heads * rope];
    for head in 0..heads {
        q_pe[head * rope + head % rope] = 1024.0;
    }
    let mut expected = Vec::new();
    for head in 0..heads {
        let mut chosen: Vec<usize> = (0..positions)
            .filter(|key| bits[key * rope + head % rope] > 0.0)
            .collect();
        if chosen.is_empty() {
            chosen = (0..positions).collect();
        }
        expected.extend((0..latent).map(|channel| {
            let sum: f32 = chosen
                .iter()
                .map(|key| integers[key * latent + channel])
                .sum();
            bf16::from_f32(sum / chosen.len() as f32).to_f32()
        }));
    }
    let cached = |values, width| {
        let data = TensorData::new(values, [1, positions, width]);
        Tensor::<3>::from_data(data, (&device, DType::BF16))
    };
    let q_pe = TensorData::new(q_pe, [1, 1, heads, rope]);
    let found = mla_decode(
        Tensor::zeros([1, 1, heads, latent], (&device, DType::BF16)),
        Tensor::from_data(q_pe, (&device, DType::BF16)),
        cached(integers, latent),
        cached(bits, rope),
        Tensor::full([1], positions as i32, &device),
    );
    let expected = TensorData::new(expected, [1, 1, heads, latent]);
    found
        .into_data()
        .convert::<f32>()
        .assert_eq(&expected, true);
}

#[test]
fn what_is_not_finite_reaches_its_row_alone() {
    let Some(device) = cuda() else { return };
    let [m, n, k] = [130, 132, 300];
    let mut a = exact(m, k, Tile::Row, 6);
    a[100 * k + 299] = f32::INFINITY;
    let b = exact(n, k, Tile::Block, 7);
    let quantize = |values: &[f32], tile| {
        let x = upload(values, k, DType::F32, &device);
        native::quantize(x, tile, ScaleFormat::PowerOfTwo).expect("a kernel")
    };
    let (a, b) = (quantize(&a, Tile::Row), quantize(&b, Tile::Block));
    let found = download(native::matmul_nt(&a, &b, DType::F32).expect("a kernel"));
    for (row, found) in found.chunks(n).enumerate() {
        assert!(
            found.iter().all(|x| x.is_nan() == (row == 100)),
            "row {row}"
        );
    }
}

/// Of small integers, so that sums are exact and only the result is rounded.
#[test]
fn grouped_products_in_bf16_and_their_gradients_are_those_of_the_cpu() {
    let Some(device) = cuda() else { return };
    for (counts, rest, k, n) in [
        (vec![130, 0, 1, 64, 5], 3, 72, 136),
        (vec![0, 700, 300], 0, 512, 264),
        (vec![1], 150, 8, 16),
        // Widths that the tensor cores do not take.
        (vec![40, 7], 2, 20, 33),
    ] {
        let (experts, rows) = (counts.len(), counts.iter().sum::<i32>() as usize + rest);
        let integers = |length, seed| -> Vec<f32> {
            noise(length, seed)
                .map(|noise| (noise * 2.49).round())
                .collect()
        };
        let run = |device: &Device, dtype: DType| {
            let device = device.clone().autodiff();
            let of = |values: Vec<f32>, shape: [usize; 2]| {
                let data = TensorData::new(values, shape);
                Tensor::<2>::from_data(data, &device).cast(dtype)
            };
            let x = of(integers(rows * k, 1), [rows, k]).require_grad();
            let weights = of(integers(experts * k * n, 2), [experts * k, n]);
            let weights = weights.reshape([experts, k, n]).require_grad();
            let upstream = of(integers(rows * n, 3), [rows, n]);
            let counts = TensorData::new(counts.clone(), [experts]);
            let counts = Tensor::<1, Int>::from_data(counts, &device);
            let y = grouped_matmul(x.clone(), weights.clone(), counts);
            let grads = (y.clone() * upstream).sum().backward();
            let of_weights = weights.grad(&grads).expect("reached");
            let of_weights = of_weights.reshape([experts * k, n]);
            let results = [y.inner(), x.grad(&grads).expect("reached"), of_weights];
            results.map(|result| download(result.cast(DType::BF16)))
        };
        let found = run(&device, DType::BF16);
        let expected = run(&Device::flex(), DType::F32);
        assert_eq!(found, expected, "{counts:?}, {rest}, {k} x {n}");
    }
}

#[test]
fn held_weights_multiply_as_on_the_cpu() {
    let Some(device) = cuda() else { return };
    let order = |device: &Device| {
        // Expert 2 has no token.
        let chosen: Vec<i32> = (0..48).map(|pair| [0, 1, 3, 4, 5][pair % 5]).collect();
        let chosen = Tensor::<1, Int>::from_data(&chosen[..], device).reshape([24, 2]);
        Permutation::by_expert(chosen, 6)
    };
    let (inner, columns) = (1000, 330);
    let weights: Vec<f32> = noise(6 * inner * columns, 1).collect();
    let x: Vec<f32> = noise(48 * inner, 2).collect();
    let product = |device: &Device, format| {
        let weights = TensorData::new(weights.clone(), [6, inner, columns]);
        let held = CompactMatrices::new(Tensor::from_data(weights, device), format);
        let x = TensorData::new(x.clone(), [48, inner]);
        let held = held.expect("single precision");
        let y = held.grouped_linear(Tensor::from_data(x, device), &order(device));
        (download(y), held.widened().into_data())
    };
    for format in [CompactFormat::Bf16, CompactFormat::Fp8] {
        let (found, numbers) = product(&device, format);
        let (expected, same) = product(&Device::flex(), format);
        assert_eq!(numbers, same, "{format:?}");
        let close = Tolerance::<f32>::rel_abs(1e-4, 1e-3);
        let rows = |y: Vec<f32>| TensorData::new(y, [48, columns]);
        rows(found).assert_approx_eq(&rows(expected), close);
    }
}
