//! Attention over the latent cache against a scalar oracle, on every device of the build.

use burn::tensor::{TensorData, Tolerance};
use proptest::prelude::*;

use super::*;

/// Sizes, the length of every sequence, and what queries are multiplied with.
#[derive(Clone, Debug)]
struct Case {
    queries: usize,
    heads: usize,
    latent: usize,
    rope: usize,
    positions: usize,
    lengths: Vec<i32>,
    scale: f32,
}

/// The operands in the order of the arguments.
struct Operands {
    q_latent: Vec<f32>,
    q_pe: Vec<f32>,
    c_kv: Vec<f32>,
    k_pe: Vec<f32>,
}

/// Multiples of 1/64 between -1 and 1, which all types have, without a pattern that a wrong index would meet.
fn numbers(count: usize, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9) | 1;
    let mut number = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        ((state >> 8) % 129) as f32 / 64.0 - 1.0
    };
    (0..count).map(|_| number()).collect()
}

impl Case {
    /// Operands with a cache that is not a number where it is not valid.
    fn operands(&self) -> Operands {
        let rows = self.lengths.len() * self.queries * self.heads;
        let scaled = |width, seed| {
            let values = numbers(rows * width, seed).into_iter();
            values.map(|value| value * self.scale).collect()
        };
        let cached = |width, seed| {
            let mut values = numbers(self.lengths.len() * self.positions * width, seed);
            for (batch, &length) in self.lengths.iter().enumerate() {
                let from = batch * self.positions + length as usize;
                let end = (batch + 1) * self.positions;
                values[from * width..end * width].fill(f32::NAN);
            }
            values
        };
        Operands {
            q_latent: scaled(self.latent, 1),
            q_pe: scaled(self.rope, 2),
            c_kv: cached(self.latent, 3),
            k_pe: cached(self.rope, 4),
        }
    }

    /// The definition, one row at a time, in double precision.
    fn oracle(&self, of: &Operands) -> Vec<f32> {
        let dot = |a: &[f32], b: &[f32]| -> f64 {
            let terms = a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b));
            terms.sum()
        };
        let (latent, rope) = (self.latent, self.rope);
        let mut out = Vec::new();
        for (batch, &length) in self.lengths.iter().enumerate() {
            for query in 0..self.queries {
                let seen = (length as usize + query + 1).saturating_sub(self.queries);
                let keys = batch * self.positions..batch * self.positions + seen;
                for head in 0..self.heads {
                    let row = (batch * self.queries + query) * self.heads + head;
                    let scores: Vec<f64> = keys
                        .clone()
                        .map(|key| {
                            dot(
                                &of.q_latent[row * latent..][..latent],
                                &of.c_kv[key * latent..][..latent],
                            ) + dot(
                                &of.q_pe[row * rope..][..rope],
                                &of.k_pe[key * rope..][..rope],
                            )
                        })
                        .collect();
                    let highest = scores.iter().fold(f64::MIN, |a, &b| a.max(b));
                    let weights = scores.iter().map(|score| (score - highest).exp());
                    let mut sums = vec![0.0; latent];
                    let mut total = 0.0;
                    for (key, weight) in keys.clone().zip(weights) {
                        total += weight;
                        for (sum, &value) in sums.iter_mut().zip(&of.c_kv[key * latent..]) {
                            *sum += weight * f64::from(value);
                        }
                    }
                    let total = if seen == 0 { 1.0 } else { total };
                    out.extend(sums.into_iter().map(|sum| (sum / total) as f32));
                }
            }
        }
        out
    }

    /// Operands of the given type on a device.
    fn tensors(&self, of: &Operands, dtype: DType, device: &Device) -> Tensors {
        let batch = self.lengths.len();
        let queries = |values: &[f32], width| {
            let data = TensorData::new(values.to_vec(), [batch, self.queries, self.heads, width]);
            Tensor::<4>::from_data(data, (device, dtype))
        };
        let cached = |values: &[f32], width| {
            let data = TensorData::new(values.to_vec(), [batch, self.positions, width]);
            Tensor::<3>::from_data(data, (device, dtype))
        };
        let lengths = TensorData::new(self.lengths.clone(), [batch]);
        (
            [
                queries(&of.q_latent, self.latent),
                queries(&of.q_pe, self.rope),
            ],
            [cached(&of.c_kv, self.latent), cached(&of.k_pe, self.rope)],
            Tensor::from_data(lengths, device),
        )
    }

    /// How far single precision may be from the oracle, whose outputs are below one.
    ///
    /// A score is a sum of n products of at most `scale`: its rounding is below n^2 `scale` u with the unit roundoff u
    /// = 6e-8, as is the highest score's, and both are in a weight's exponent. Numerator and denominator are sums of
    /// S such weights, each rounded S times at most; exponentials and the merging of chunks are ten roundings more.
    fn tolerance(&self) -> f32 {
        let terms = (self.latent + self.rope) as f32;
        let unit = f32::EPSILON / 2.0;
        2.0 * (2.0 * terms * terms * self.scale + self.positions as f32 + 10.0) * unit
    }
}

type Tensors = ([Tensor<4>; 2], [Tensor<3>; 2], Tensor<1, Int>);

fn operation(([q_latent, q_pe], [c_kv, k_pe], lengths): Tensors) -> Tensor<4> {
    mla_decode(q_latent, q_pe, c_kv, k_pe, lengths)
}

#[track_caller]
fn assert_close(out: Tensor<4>, expected: &[f32], close: f32) {
    let found = out.clone().into_data().convert::<f32>();
    let expected = TensorData::new(expected.to_vec(), out.dims());
    found.assert_approx_eq(&expected, Tolerance::<f32>::absolute(close));
}

fn check(case: &Case, device: &Device) {
    let operands = case.operands();
    let expected = case.oracle(&operands);
    let out = operation(case.tensors(&operands, DType::F32, device));
    assert_close(out, &expected, case.tolerance());
}

/// Widths, and cases of them: lengths at and around the borders of tiles, none and all among them.
fn case(
    widths: impl Strategy<Value = (usize, usize, usize)>,
    most_positions: usize,
) -> impl Strategy<Value = Case> {
    let positions = 1..most_positions;
    (widths, positions, 1usize..4, 1usize..4).prop_flat_map(
        |((heads, latent, rope), positions, queries, batch)| {
            let most = positions as i32;
            let length = prop_oneof![
                2 => 0..=most,
                1 => Just(most),
                1 => Just(0),
                2 => prop::sample::select(vec![1, 127, 128, 129, 255, 256, 257])
                    .prop_map(move |length| length.min(most)),
            ];
            prop::collection::vec(length, batch).prop_map(move |lengths| Case {
                queries,
                heads,
                latent,
                rope,
                positions,
                lengths,
                // Scores of a few units, so that no weight is all and none is nothing.
                scale: 1.0 / 32.0,
            })
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn attention_agrees_with_a_scalar_oracle(
        case in case((1usize..5, 1usize..30, 1usize..9), 60)
    ) {
        check(&case, &Device::flex());
    }
}

#[test]
fn each_query_sees_the_positions_up_to_its_own() {
    // Scores of zero: outputs are means of the latents 1, 2, 3 that are seen.
    let device = Device::flex();
    let zeros = || Tensor::<4>::zeros([2, 2, 1, 1], &device);
    let c_kv = Tensor::<3>::from_data([[[1.0], [2.0], [3.0]], [[1.0], [2.0], [f32::NAN]]], &device);
    let k_pe = Tensor::<3>::zeros([2, 3, 1], &device);
    let lengths = Tensor::<1, Int>::from_data([3, 1], &device);
    let out = mla_decode(zeros(), zeros(), c_kv, k_pe, lengths);
    let expected = TensorData::from([[[[1.5f32]], [[2.0]]], [[[0.0]], [[1.0]]]]);
    out.into_data()
        .assert_approx_eq(&expected, Tolerance::<f32>::absolute(1e-6));
}

/// Large scores whose differences are zero or large: weights are equal among the best and vanish elsewhere.
fn check_large_scores(device: &Device) {
    let case = Case {
        queries: 2,
        heads: 3,
        latent: 4,
        rope: 2,
        positions: 300,
        lengths: vec![300, 129, 1, 0],
        scale: 1e4,
    };
    let mut operands = case.operands();
    let thirds = |values: &mut Vec<f32>, unit: f32| {
        for value in values.iter_mut().filter(|value| !value.is_nan()) {
            *value = (*value / unit * 1.5).round() * unit;
        }
    };
    thirds(&mut operands.q_latent, 1e4);
    thirds(&mut operands.q_pe, 1e4);
    thirds(&mut operands.c_kv, 1.0);
    thirds(&mut operands.k_pe, 1.0);
    let expected = case.oracle(&operands);
    let out = operation(case.tensors(&operands, DType::F32, device));
    // Scores are exact, and so are weights of zero and one; what is left are the sum, its chunks and the quotient.
    assert_close(out, &expected, 1e-6);
}

#[test]
fn large_scores_do_not_overflow() {
    check_large_scores(&Device::flex());
}

#[test]
fn no_positions_and_no_queries() {
    let device = Device::flex();
    let of = |queries, positions| {
        mla_decode(
            Tensor::ones([2, queries, 3, 4], &device),
            Tensor::ones([2, queries, 3, 2], &device),
            Tensor::ones([2, positions, 4], &device),
            Tensor::ones([2, positions, 2], &device),
            Tensor::zeros([2], &device),
        )
    };
    let zeros = TensorData::new(vec![0.0f32; 24], [2, 1, 3, 4]);
    of(1, 0).into_data().assert_eq(&zeros, true);
    assert_eq!(of(0, 5).dims(), [2, 0, 3, 4]);
}

/// The result is a constant of the backward pass.
fn check_constant(device: &Device) {
    let device = device.clone().autodiff();
    let q = Tensor::<4>::ones([1, 1, 3, 20], &device).require_grad();
    // Scores of 1.9 and 5.9: both weights count, and would have a gradient.
    let c_kv = Tensor::<1, Int>::arange(0..40, &device).float() / 100.0;
    let out = mla_decode(
        q.clone(),
        Tensor::zeros([1, 1, 3, 7], &device),
        c_kv.reshape([1, 2, 20]),
        Tensor::zeros([1, 2, 7], &device),
        Tensor::<1, Int>::full([1], 2, &device),
    );
    let grads = (q.clone() * out.clone()).sum().backward();
    let grad = q.grad(&grads).expect("the product's");
    grad.into_data().assert_eq(&out.into_data(), true);
}

#[test]
fn no_gradient_passes() {
    check_constant(&Device::flex());
}

/// What is decided before a launch, for devices that are not here.
#[cfg(any(feature = "wgpu", feature = "cuda"))]
mod plans {
    use super::super::{
        kernel::Widths,
        launch::tiles_of_a_chunk,
        shape::{SHAPES, Shape},
    };

    const REPORT: Widths = Widths {
        heads: 128,
        latent: 512,
        rope: 64,
    };

    #[test]
    fn shapes_follow_from_shared_memory_widths_and_rows() {
        let of = |widths, rows, kibibytes: usize| Shape::of(widths, rows, kibibytes * 1024);
        assert_eq!(of(REPORT, 128, 227), Some(SHAPES[0]));
        assert_eq!(of(REPORT, 128, 163), Some(SHAPES[1]));
        assert_eq!(of(REPORT, 128, 99), Some(SHAPES[2]));
        assert_eq!(of(REPORT, 128, 64), None);
        assert_eq!(of(REPORT, 33, 227), Some(SHAPES[0]));
        assert_eq!(of(REPORT, 32, 227), Some(SHAPES[2]));
        let wide = |latent, rope| {
            let widths = Widths {
                latent,
                rope,
                ..REPORT
            };
            of(widths, 128, 227)
        };
        assert_eq!(wide(16, 16), Some(SHAPES[0]));
        assert_eq!(wide(496, 80), Some(SHAPES[0]));
        for (latent, rope) in [
            (520, 64),
            (528, 64),
            (500, 64),
            (512, 40),
            (512, 0),
            (0, 64),
        ] {
            assert_eq!(wide(latent, rope), None, "{latent} + {rope}");
        }
    }

    #[cfg(feature = "cuda")]
    #[test]
    fn the_programs_have_the_shared_memory_that_shapes_are_chosen_by() {
        let sources = crate::cuda_source::cuda_sources().expect("CubeCL accepts the kernels");
        for shape in SHAPES {
            let Shape {
                rows, keys, stages, ..
            } = shape;
            let name = format!("mla tensor cores {rows}x{keys}x{stages}, 128 x 512 + 64");
            let source = sources.iter().find(|source| source.name == name);
            let source = source.expect("a program of the shape");
            assert_eq!(shape.shared_memory(REPORT), source.shared_memory, "{name}");
        }
    }

    #[test]
    fn chunks_are_those_whose_waves_end_soonest() {
        // 132 cubes at a time, and 64 positions of a tile.
        // A sequence of 4096, two cubes of rows per chunk: a tile each.
        assert_eq!(tiles_of_a_chunk(64, 2, 132), 1);
        // A sequence of 131072: 64 chunks, one wave.
        assert_eq!(tiles_of_a_chunk(2048, 2, 132), 32);
        // 64 sequences fill a wave, and would fill two with half of the work.
        assert_eq!(tiles_of_a_chunk(64, 128, 132), 64);
        // 40 sequences: three chunks in two waves.
        assert_eq!(tiles_of_a_chunk(64, 80, 132), 22);
        // Two waves of three tiles are fewer tiles than one of eight, but have twice what comes beside them.
        assert_eq!(tiles_of_a_chunk(8, 85, 132), 8);
        // More sequences than multiprocessors, one tile, and one of everything.
        assert_eq!(tiles_of_a_chunk(10, 1000, 132), 10);
        assert_eq!(tiles_of_a_chunk(1, 1, 132), 1);
        assert_eq!(tiles_of_a_chunk(1, 1, 1), 1);
    }
}

/// The kernels are compiled for each H, C and R: few of them.
#[cfg(feature = "wgpu")]
mod on_wgpu {
    use super::*;
    use crate::cube::wgpu;

    /// Less than a cube's rows, units and channels at once; a little more than each.
    const COMPILED: [(usize, usize, usize); 2] = [(3, 20, 7), (17, 130, 33)];

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(16))]

        /// With chunks of one tile, as few rows have, and of several; again, to the last bit.
        #[test]
        fn attention_agrees_with_a_scalar_oracle_and_the_reference(
            case in case(prop::sample::select(&COMPILED[..]), 420),
            tiles in 1usize..4,
        ) {
            let device = wgpu();
            let operands = case.operands();
            let expected = case.oracle(&operands);
            let native = || case.tensors(&operands, DType::F32, &device);
            let out = operation(native());
            out.to_data().assert_eq(&operation(native()).into_data(), true);
            assert_close(out, &expected, case.tolerance());
            let (queries, cache, lengths) = native();
            let inputs = launch::Inputs::new(queries, cache, lengths);
            let plan = launch::Plan {
                shape: None,
                chunk: tiles * kernel::KEYS,
            };
            let chunked = launch::mla_decode(inputs, plan);
            assert_close(chunked, &expected, case.tolerance());
            let reference = operation(case.tensors(&operands, DType::F32, &Device::flex()));
            assert_close(reference, &expected, case.tolerance());
        }
    }

    #[test]
    fn the_reports_widths() {
        let case = Case {
            queries: 2,
            heads: 128,
            latent: 512,
            rope: 64,
            positions: 150,
            lengths: vec![140],
            scale: 1.0 / 64.0,
        };
        check(&case, &wgpu());
    }

    #[test]
    fn half_precision_is_summed_in_single() {
        let case = Case {
            queries: 1,
            heads: 17,
            latent: 130,
            rope: 33,
            positions: 300,
            lengths: vec![300, 129, 0],
            scale: 1.0 / 32.0,
        };
        let mut operands = case.operands();
        // Of one sign, so that sums grow to where half precision has steps of an eighth.
        for value in &mut operands.c_kv {
            *value = value.abs();
        }
        let expected = case.oracle(&operands);
        let out = operation(case.tensors(&operands, DType::F16, &wgpu()));
        assert_eq!(out.dtype(), DType::F16);
        // Operands are exact in 11 bits; the result, below one, is rounded to them.
        assert_close(out, &expected, case.tolerance() + 2.5e-4);
    }

    #[test]
    fn large_scores_do_not_overflow() {
        check_large_scores(&wgpu());
    }

    #[test]
    fn no_gradient_passes() {
        check_constant(&wgpu());
    }

    #[test]
    fn chunks_are_whole_tiles_and_as_many_as_fill_a_device() {
        // One token of the report's model over a cache of 4096, of 100 and of 131072; 64 sequences.
        assert_eq!(launch::chunk(4096, 128), 128);
        assert_eq!(launch::chunk(100, 128), 128);
        assert_eq!(launch::chunk(131_072, 128), 2048);
        assert_eq!(launch::chunk(4000, 64 * 128), 4096);
    }
}
