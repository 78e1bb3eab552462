//! The quantising kernels on a wgpu device against the functions on slices, bit for bit.

use burn::tensor::{Device, DeviceKind, Tensor, TensorData};

use super::{Unsupported, quantize, quantize_transposed, rms_norm_quantize, swiglu_quantize};
use crate::fp8::{
    Quantized, e4m3,
    tiles::{self, ScaleFormat, TILE, Tile},
};

fn device() -> Device {
    Device::wgpu(DeviceKind::DefaultDevice)
}

/// Numbers of many magnitudes, with exact ties, zeros of both signs and subnormal numbers among them.
fn values(rows: usize, columns: usize) -> Vec<f32> {
    let mut state = 0x2545_f491_u32;
    (0..rows * columns)
        .map(|at| {
            state ^= state << 13;
            state ^= state >> 17;
            state ^= state << 5;
            match at % 97 {
                0 => 0.0,
                1 => -0.0,
                2 => 1e-42,
                3 => 448.0,
                // Half of the way between neighbouring codes when the scale is a power of two.
                4 => (state % 16) as f32 / 1024.0,
                _ => {
                    let mantissa = (state >> 8) as f32 / (1 << 23) as f32 - 1.0;
                    mantissa * 2f32.powi((state % 24) as i32 - 16)
                }
            }
        })
        .collect()
}

fn matrix(values: &[f32], columns: usize) -> Tensor<2> {
    let data = TensorData::new(values.to_vec(), [values.len() / columns, columns]);
    Tensor::from_data(data, &device())
}

fn read(quantized: Quantized) -> (Vec<u8>, Vec<f32>) {
    let codes = quantized.codes.into_data().convert::<i32>();
    let codes = codes.try_to_vec::<i32>().expect("codes in i32");
    let scales = quantized
        .scales
        .into_data()
        .try_to_vec()
        .expect("scales in f32");
    (
        codes
            .into_iter()
            .map(|code| u8::try_from(code).expect("a code is a byte"))
            .collect(),
        scales,
    )
}

#[track_caller]
fn check(quantized: Quantized, values: &[f32], columns: usize, tile: Tile, format: ScaleFormat) {
    let scales = tiles::scales(values, columns, tile, format);
    let codes = tiles::quantize(values, columns, tile, &scales);
    let shape = tile.scale_shape([values.len() / columns, columns]);
    assert_eq!(quantized.scales.dims(), shape);
    assert_eq!(quantized.codes.dims(), [values.len() / columns, columns]);
    let (found_codes, found_scales) = read(quantized);
    for (at, (found, expected)) in found_scales.iter().zip(&scales).enumerate() {
        let same = found.to_bits() == expected.to_bits() || found.is_nan() && expected.is_nan();
        assert!(same, "scale {at}: {found:e}, expected {expected:e}");
    }
    for (at, (found, expected)) in found_codes.iter().zip(&codes).enumerate() {
        let value = values[at];
        assert_eq!(
            found, expected,
            "code {at} of {columns} columns, of {value:e}"
        );
    }
}

#[test]
fn every_magnitude_is_encoded_as_on_slices() {
    // Scales of 1: 448 in every tile. All mantissas of 12 bits and all exponents from far below the subnormal codes.
    let mut values = Vec::new();
    for exponent in -20..9 {
        for mantissa in 0..4096 {
            let value = (1.0 + mantissa as f32 / 4096.0) * 2f32.powi(exponent);
            if values.len() % TILE == 0 {
                values.push(448.0);
            }
            values.push(if mantissa % 2 == 0 { value } else { -value }.clamp(-448.0, 448.0));
        }
    }
    values.truncate(values.len() / TILE * TILE);
    let found = quantize(matrix(&values, TILE), Tile::Row, ScaleFormat::Float32);
    let (codes, scales) = read(found.expect("a kernel for wgpu"));
    assert!(scales.iter().all(|&scale| scale == 1.0));
    for (value, code) in values.into_iter().zip(codes) {
        assert_eq!(code, e4m3::encode(value), "{value:e}");
    }
}

#[test]
fn tiles_are_quantised_as_on_slices() {
    for [rows, columns] in [[1, 1], [3, 128], [5, 384], [130, 132], [257, 131]] {
        let values = values(rows, columns);
        for tile in [Tile::Row, Tile::Block] {
            for format in [ScaleFormat::Float32, ScaleFormat::PowerOfTwo] {
                let found = quantize(matrix(&values, columns), tile, format);
                check(
                    found.expect("a kernel for wgpu"),
                    &values,
                    columns,
                    tile,
                    format,
                );
            }
        }
    }
}

#[test]
fn transposed_tiles_are_those_of_the_transposed_matrix() {
    for [rows, columns] in [[1, 1], [128, 32], [130, 33], [300, 70]] {
        let values = values(rows, columns);
        let transposed: Vec<f32> = (0..rows * columns)
            .map(|at| values[at % rows * columns + at / rows])
            .collect();
        for format in [ScaleFormat::Float32, ScaleFormat::PowerOfTwo] {
            let found = quantize_transposed(matrix(&values, columns), format);
            check(
                found.expect("a kernel for wgpu"),
                &transposed,
                rows,
                Tile::Row,
                format,
            );
        }
    }
}

#[test]
fn what_is_not_finite_spoils_its_tile_alone() {
    for fault in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut values = values(130, 260);
        values[129 * 260 + 200] = fault;
        for tile in [Tile::Row, Tile::Block] {
            let found = quantize(matrix(&values, 260), tile, ScaleFormat::Float32);
            check(
                found.expect("a kernel"),
                &values,
                260,
                tile,
                ScaleFormat::Float32,
            );
        }
    }
}

#[test]
fn zeros_have_the_scale_of_the_rules() {
    let zeros = vec![0.0; 129 * 129];
    for tile in [Tile::Row, Tile::Block] {
        for format in [ScaleFormat::Float32, ScaleFormat::PowerOfTwo] {
            let found = quantize(matrix(&zeros, 129), tile, format);
            check(found.expect("a kernel"), &zeros, 129, tile, format);
        }
    }
}

#[test]
fn swiglu_is_quantised_as_its_result_would_be() {
    let columns = 260;
    // Gates small enough for the exponential of every device.
    let gate: Vec<f32> = values(7, columns)
        .iter()
        .map(|x| x.clamp(-20.0, 20.0))
        .collect();
    let up: Vec<f32> = values(7, columns).into_iter().rev().collect();
    let product: Vec<f32> = gate
        .iter()
        .zip(&up)
        .map(|(&gate, &up)| {
            (f64::from(gate) / (1.0 + f64::from(-gate).exp()) * f64::from(up)) as f32
        })
        .collect();
    let format = ScaleFormat::Float32;
    let found = swiglu_quantize(matrix(&gate, columns), matrix(&up, columns), format);
    // The exponential, the sum, the quotient and the product round: a few parts in 2^23, or of what exponentials
    // on devices are allowed (3 + 2 |x| units in the last place of them: 43 for 20).
    check_nearly(
        found.expect("a kernel"),
        &product,
        columns,
        64.0 * f32::EPSILON,
    );
}

/// As [`check`], of values that may be wrong by `precision`, a part of them.
#[track_caller]
fn check_nearly(quantized: Quantized, values: &[f32], columns: usize, precision: f32) {
    let (codes, scales) = read(quantized);
    let expected_scales = tiles::scales(values, columns, Tile::Row, ScaleFormat::Float32);
    assert_eq!(scales.len(), expected_scales.len());
    for (at, (found, expected)) in scales.iter().zip(&expected_scales).enumerate() {
        assert!(
            (found - expected).abs() <= precision * expected,
            "scale {at} of {columns} columns: {found:e}, expected {expected:e}"
        );
    }
    let found = tiles::dequantize(&codes, columns, Tile::Row, &scales);
    let step = |scale: f32, value: f32| (scale / 512.0).max(value.abs() / 8.0);
    let across = columns.div_ceil(TILE);
    for (at, (found, expected)) in found.iter().zip(values).enumerate() {
        let scale = scales[at / columns * across + at % columns / TILE];
        // Half a step, and what rounds differently.
        let bound = 0.501 * step(scale, *expected);
        assert!(
            (found - expected).abs() <= bound,
            "{at} of {columns} columns: {found:e}, expected {expected:e}"
        );
    }
}

#[test]
fn rms_norm_is_quantised_as_its_result_would_be() {
    // Rows that a cube goes through at once and in two rounds, with and without vectors.
    for (rows, columns) in [(1, 1), (7, 260), (5, 131), (3, 1300), (3, 1155)] {
        let x = values(rows, columns);
        let weight: Vec<f32> = values(1, columns)
            .iter()
            .map(|x| 1.0 + x.clamp(-0.9, 0.9))
            .collect();
        let epsilon = 1e-6;
        let normalised: Vec<f32> = x
            .chunks(columns)
            .flat_map(|row| {
                let squares = row.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>();
                let root = (squares / columns as f64 + epsilon).sqrt();
                let pairs = row.iter().zip(&weight);
                pairs.map(move |(&x, &w)| (f64::from(x) / root * f64::from(w)) as f32)
            })
            .collect();
        let found = rms_norm_quantize(
            matrix(&x, columns),
            Tensor::from_data(TensorData::new(weight, [columns]), &device()),
            epsilon,
            ScaleFormat::Float32,
        );
        // A unit adds at most 11 squares and the cube 7 times, which the root halves; then the root, its reciprocal
        // (devices may be 2.5 and more units off in each) and two products round.
        let found = found.expect("a kernel");
        check_nearly(found, &normalised, columns, 32.0 * f32::EPSILON);
    }
}

#[test]
fn what_is_not_finite_spoils_its_row_of_a_norm_alone() {
    let columns = 1300;
    for fault in [f32::NAN, f32::INFINITY] {
        let mut x = vec![1.0; 3 * columns];
        x[columns + 1200] = fault;
        let weight = Tensor::ones([columns], &device());
        let found = rms_norm_quantize(matrix(&x, columns), weight, 1e-6, ScaleFormat::Float32);
        let (_, scales) = read(found.expect("a kernel"));
        for (at, scale) in scales.iter().enumerate() {
            let (row, tile) = (at / 11, at % 11);
            // All is zero beside infinity, over which it is divided.
            let spoiled = row == 1 && (fault.is_nan() || tile == 1200 / TILE);
            assert_eq!(scale.is_nan(), spoiled, "row {row}, tile {tile}, {fault}");
        }
    }
}

#[cfg(feature = "cuda")]
#[test]
fn tiles_of_rows_belong_to_the_experts_of_their_segments() {
    use burn::{backend::Cube, tensor::Int};

    let found = |counts: &[i32], tiles: usize| {
        let counts = Tensor::<1, Int>::from_data(counts, &device());
        let counts = counts
            .try_into_primitive::<Cube>()
            .expect("a CubeCL device");
        let experts = crate::fp8::launch::tile_experts(counts, tiles);
        let experts = Tensor::<1, Int>::from_primitive::<Cube>(experts);
        experts.into_data().iter::<i32>().collect::<Vec<_>>()
    };
    // With and without the rows that pad.
    for counts in [[0, 1, 0, 0, 300, 128, 0], [0, 128, 0, 0, 384, 128, 0]] {
        assert_eq!(found(&counts, 7), [1, 4, 4, 4, 5, 7, 7]);
    }
    assert_eq!(found(&[0, 0], 1), [2]);
    assert_eq!(found(&[129], 2), [0, 0]);
    let all = found(&[128; 200], 201);
    assert!(all.into_iter().eq(0..201));
}

#[cfg(feature = "cuda")]
#[test]
fn segments_start_behind_the_padded_ones_before() {
    use burn::{backend::Cube, tensor::Int};

    let found = |counts: &[i32]| {
        let counts = Tensor::<1, Int>::from_data(counts, &device());
        let counts = counts
            .try_into_primitive::<Cube>()
            .expect("a CubeCL device");
        let starts = crate::fp8::launch::segment_starts(counts);
        let starts = Tensor::<1, Int>::from_primitive::<Cube>(starts);
        starts.into_data().iter::<i32>().collect::<Vec<_>>()
    };
    for counts in [[0, 1, 0, 0, 300, 128, 0], [0, 128, 0, 0, 384, 128, 0]] {
        assert_eq!(found(&counts), [0, 0, 1, 1, 1, 4, 5, 5]);
    }
    assert!(found(&[128; 200]).into_iter().eq(0..201));
}

#[test]
fn what_no_kernel_serves_is_refused() {
    let empty = Tensor::<2>::zeros([0, 4], &device());
    assert_eq!(
        quantize(empty, Tile::Row, ScaleFormat::Float32).expect_err("no element"),
        Unsupported::Empty {
            what: "the matrix to quantise"
        }
    );
    let cpu = Tensor::<2>::zeros([2, 4], &Device::flex());
    let error = quantize(cpu, Tile::Row, ScaleFormat::Float32).expect_err("not CubeCL's");
    assert!(matches!(error, Unsupported::Device { .. }), "{error}");
    let (gate, up) = (matrix(&[1.0; 8], 4), matrix(&[1.0; 8], 8));
    let error = swiglu_quantize(gate, up, ScaleFormat::Float32).expect_err("other shapes");
    assert!(matches!(error, Unsupported::Shape { .. }), "{error}");
    let weight = Tensor::ones([5], &device());
    let x = matrix(&[1.0; 8], 4);
    let error = rms_norm_quantize(x, weight, 1e-6, ScaleFormat::Float32);
    let error = error.expect_err("another width");
    assert!(matches!(error, Unsupported::Shape { .. }), "{error}");
}
