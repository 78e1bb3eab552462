//! FP8 arithmetic against torch, and its versions against each other.

use std::path::Path;

use burn::tensor::{Device, Distribution, Int, Tensor, TensorData, Tolerance};
use proptest::prelude::*;
use safetensors::{SafeTensors, tensor::TensorView};

use super::{
    Quantized, ScaleFormat, Tile,
    e4m3::{MAX, decode, encode},
    linear, matmul_nt, quantize, reference,
    tiles::{self, TILE},
};

/// What torch 2.11.0 computed; see the README beside the files.
fn torch(file: &str) -> Vec<u8> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/tiny-fp8");
    std::fs::read(root.join(file)).unwrap()
}

fn floats(view: &TensorView<'_>) -> Vec<f32> {
    let (words, _) = view.data().as_chunks::<4>();
    words.iter().map(|word| f32::from_le_bytes(*word)).collect()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

fn matrix(values: Vec<f32>, columns: usize) -> Tensor<2> {
    let rows = values.len() / columns;
    Tensor::from_data(TensorData::new(values, [rows, columns]), &Device::flex())
}

fn codes(tensor: &Tensor<2, Int>) -> Vec<u8> {
    tensor.to_data().iter::<u8>().collect()
}

fn values(tensor: &Tensor<2>) -> Vec<f32> {
    tensor.to_data().iter::<f32>().collect()
}

/// The native version, which the reference must equal.
fn both(x: &Tensor<2>, tile: Tile, format: ScaleFormat) -> Quantized {
    let native = quantize(x.clone(), tile, format);
    let (by_reference, scales) = reference::quantize(x.clone(), tile, format);
    assert_eq!(bits(&values(&native.scales)), bits(&values(&scales)));
    assert_eq!(codes(&native.codes), codes(&by_reference));
    native
}

#[test]
fn every_code_is_decoded_as_torch_decodes_it() {
    let bytes = torch("fp8_linear_codec.safetensors");
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let expected = floats(&file.tensor("decode.values").unwrap());
    assert_eq!(expected.len(), 256);
    for (code, expected) in (0..=255).zip(expected) {
        let found = decode(code);
        let nan = found.is_nan() && expected.is_nan();
        assert!(
            nan || found.to_bits() == expected.to_bits(),
            "{code:#x}: {found} for {expected}"
        );
    }
}

#[test]
fn numbers_are_encoded_as_torch_encodes_them_but_saturate() {
    let bytes = torch("fp8_linear_codec.safetensors");
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let expected = file.tensor("encode.codes").unwrap().data().to_vec();
    let inputs = floats(&file.tensor("encode.input").unwrap());
    assert_eq!(expected.len(), inputs.len());
    let mut saturated = 0;
    for (&input, expected) in inputs.iter().zip(expected) {
        // The CPU of the reference makes NaN of what rounds above 448.
        let expected = if input.abs() > 464.0 {
            saturated += 1;
            (expected & 0x80) | 0x7e
        } else {
            expected
        };
        assert_eq!(encode(input), expected, "{input:e}");
    }
    assert!(saturated < inputs.len() / 2);
    assert_eq!(encode(f32::INFINITY), 0x7e);
    assert_eq!(encode(f32::NEG_INFINITY), 0xfe);
    assert_eq!(encode(f32::NAN), 0x7f);
}

#[test]
fn codes_survive_decoding() {
    for code in (0..=255).filter(|code| code & 0x7f != 0x7f) {
        assert_eq!(encode(decode(code)), code);
    }
}

#[test]
fn a_linear_layer_is_that_of_the_published_kernels() {
    let bytes = torch("fp8_linear.safetensors");
    let file = SafeTensors::deserialize(&bytes).unwrap();
    for case in ["aligned", "tail"] {
        let stored = |name: &str| file.tensor(&format!("{case}.{name}")).unwrap();
        let columns = stored("w").shape()[1];
        let w_codes = stored("w").data();
        let given = floats(&stored("w_scale_inv"));
        let dequantized = floats(&stored("w_dequant"));
        let found = tiles::dequantize(w_codes, columns, Tile::Block, &given);
        assert_eq!(bits(&found), bits(&dequantized), "{case}");
        // Every block of the reference has a code of 448, so that its scales can be found again, except for the
        // rounding of 448 times the scale.
        let w = both(
            &matrix(dequantized, columns),
            Tile::Block,
            ScaleFormat::Float32,
        );
        for (found, given) in values(&w.scales).iter().zip(&given) {
            assert!((found - given).abs() <= given * f32::EPSILON);
        }
        assert_eq!(codes(&w.codes), w_codes);

        let shape = w.codes.dims();
        let w = Quantized::new(w_codes.to_vec(), given, shape, Tile::Block, &Device::flex());
        for (format, suffix) in [
            (ScaleFormat::Float32, ""),
            (ScaleFormat::PowerOfTwo, "_ue8m0"),
        ] {
            let x = both(&matrix(floats(&stored("x")), columns), Tile::Row, format);
            let scales = floats(&stored(&format!("x_scale{suffix}")));
            assert_eq!(bits(&values(&x.scales)), bits(&scales), "{case}{suffix}");
            let expected = stored(&format!("x_q{suffix}"));
            assert_eq!(codes(&x.codes), expected.data(), "{case}{suffix}");
            let expected = floats(&stored(&format!("y_w8a8{suffix}")));
            let largest = expected.iter().fold(0f32, |a, b| a.max(b.abs()));
            for y in [matmul_nt(&x, &w), reference::matmul_nt(&x, &w)] {
                for (found, expected) in values(&y).iter().zip(&expected) {
                    // The bound of the reference: sums of 384 products in another order.
                    assert!(
                        (found - expected).abs() <= 1e-5 * largest,
                        "{case}{suffix}: {found} for {expected}"
                    );
                }
            }
        }
    }
}

#[test]
fn blocks_are_independent_and_may_be_zero() {
    // 130 x 129: four blocks, of which three are narrow.
    let at = |row: usize, column: usize| match (row / TILE, column / TILE) {
        (0, 0) => 448.0,
        (0, 1) => -4.48e-3,
        (1, 0) => 1e-45,
        _ => 0.0,
    };
    let elements: Vec<f32> = (0..130)
        .flat_map(|row| (0..129).map(move |column| at(row, column)))
        .collect();
    let found = tiles::scales(&elements, 129, Tile::Block, ScaleFormat::Float32);
    assert_eq!(found, [1.0, 4.48e-3 / 448.0, 1.0, 1.0]);
    assert_eq!(Tile::Block.scale_shape([130, 129]), [2, 2]);
    let codes = tiles::quantize(&elements, 129, Tile::Block, &found);
    let [first, second, third, last] = [0, 128, 128 * 129, 128 * 129 + 128];
    assert_eq!(
        [codes[first], codes[second], codes[third], codes[last]],
        [0x7e, 0xfe, 0, 0]
    );
}

#[test]
fn zeros_have_a_scale_and_what_is_not_finite_spoils_its_tile() {
    let mut row = vec![0.0f32; 3 * TILE + 1];
    row[TILE] = f32::INFINITY;
    row[2 * TILE + 5] = f32::NAN;
    row[2 * TILE + 6] = 3.0;
    row[3 * TILE] = -2.0;
    for format in [ScaleFormat::Float32, ScaleFormat::PowerOfTwo] {
        let found = both(&matrix(row.clone(), row.len()), Tile::Row, format);
        let (scales, codes) = (values(&found.scales), codes(&found.codes));
        let least = Tile::Row.scale(0.0, format);
        assert_eq!(scales[0], least);
        assert!((1e-4 / MAX..4e-4 / MAX).contains(&least));
        assert!(codes[..TILE].iter().all(|&code| code == 0));
        assert!(scales[1].is_nan() && scales[2].is_nan());
        assert!(codes[TILE..3 * TILE].iter().all(|&code| code == 0x7f));
        let decoded = decode(codes[3 * TILE]) * scales[3];
        assert!((decoded + 2.0).abs() < 0.07, "{decoded}");
    }
}

#[test]
fn powers_of_two_are_the_next_ones() {
    let at = |largest| Tile::Block.scale(largest, ScaleFormat::PowerOfTwo);
    for exponent in [-126, -125, -20, -1, 0, 1, 60, 118] {
        let power = 2f32.powi(exponent);
        let above = f32::from_bits((power * MAX).to_bits() + 32);
        assert_eq!(at(power * MAX), power);
        assert_eq!(at(above), power * 2.0);
    }
    assert_eq!(at(1e-42), f32::MIN_POSITIVE);
    assert_eq!(at(0.0), 1.0);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    /// Codes and scales are equal, products differ by the order of their sums.
    #[test]
    fn native_equals_reference(
        (m, n, k) in (1usize..300, 1usize..300, 1usize..600),
        blocks in any::<bool>(),
        power_of_two in any::<bool>(),
        exponent in -30f64..30.0,
    ) {
        let device = Device::flex();
        let format = if power_of_two { ScaleFormat::PowerOfTwo } else { ScaleFormat::Float32 };
        let tile = if blocks { Tile::Block } else { Tile::Row };
        let size = 2f64.powf(exponent);
        let x = Tensor::<2>::random([m, k], Distribution::Normal(0.0, size), &device);
        let w = Tensor::<2>::random([n, k], Distribution::Normal(0.0, 1.0 / size), &device);
        let (x, w) = (both(&x, Tile::Row, format), both(&w, tile, format));
        let (native, expected) = (values(&matmul_nt(&x, &w)), values(&reference::matmul_nt(&x, &w)));
        // Each partial sum of 128 products of standard normal numbers, added in any order, is off by at most 128 units
        // of its magnitudes' sum; a hundred of the result's typical size are ample.
        let bound = 1e-4 * (k as f32).sqrt();
        for (native, expected) in native.iter().zip(&expected) {
            prop_assert!((native - expected).abs() <= bound, "{native} for {expected}");
        }
    }
}

#[test]
fn gradients_are_products_of_quantised_operands() {
    three_products(Device::flex().autodiff());
}

#[cfg(feature = "wgpu")]
#[test]
fn on_wgpu_gradients_are_products_of_quantised_operands() {
    three_products(crate::cube::wgpu().autodiff());
}

/// Each of the three products, from the definition: operands quantised, multiplied in double precision.
fn three_products(device: Device) {
    let format = ScaleFormat::Float32;
    let (m, k, n) = (150, 140, 270);
    let random = |shape| Tensor::<2>::random(shape, Distribution::Normal(0.0, 1.0), &device);
    let (x, w) = (random([m, k]).require_grad(), random([k, n]).require_grad());
    let dy = random([m, n]);
    let y = linear(x.clone(), w.clone(), format);
    let grads = (y.clone() * dy.clone()).sum().backward();
    let exact = |a: Tensor<2>, b: Tensor<2>, b_tile| {
        let rounded = |x: Tensor<2>, tile| {
            let [_, columns] = x.dims();
            let elements = values(&x);
            let scales = tiles::scales(&elements, columns, tile, format);
            let codes = tiles::quantize(&elements, columns, tile, &scales);
            let products = tiles::dequantize(&codes, columns, tile, &scales);
            products.into_iter().map(f64::from).collect::<Vec<_>>()
        };
        let [_, inner] = a.dims();
        let (a, b) = (rounded(a, Tile::Row), rounded(b, b_tile));
        let mut found = Vec::new();
        for a in a.chunks(inner) {
            for b in b.chunks(inner) {
                found.push(a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>() as f32);
            }
        }
        found
    };
    // Sums of at most 270 products of numbers around one in single precision.
    let close = Tolerance::<f32>::absolute(1e-4);
    let check = |found: Tensor<2>, expected: Vec<f32>| {
        let shape = found.dims();
        found
            .into_data()
            .assert_approx_eq(&TensorData::new(expected, shape), close);
    };
    check(y, exact(x.clone(), w.clone().transpose(), Tile::Block));
    check(
        x.grad(&grads).unwrap(),
        exact(dy.clone(), w.clone(), Tile::Block),
    );
    check(
        w.grad(&grads).unwrap(),
        exact(x.transpose(), dy.transpose(), Tile::Row),
    );
}
