//! FP8 as DeepSeek publishes weights: E4M3 codes with one scale per block of 128 x 128.
//!
//! Pure functions on row-major matrices; sizes need not be multiples of the block.

/// Rows and columns of a block.
pub const BLOCK: usize = 128;

/// The largest number of E4M3.
pub const MAX: f32 = 448.0;

/// The number that a code stands for; NaN for 0x7f and 0xff. There are no infinities.
pub fn decode(code: u8) -> f32 {
    let exponent = i32::from((code >> 3) & 0xf);
    let mantissa = f32::from(code & 7);
    let magnitude = match exponent {
        15 if code & 7 == 7 => f32::NAN,
        0 => mantissa * 2f32.powi(-9),
        _ => (8.0 + mantissa) * 2f32.powi(exponent - 10),
    };
    if code & 0x80 == 0 {
        magnitude
    } else {
        -magnitude
    }
}

/// The code nearest to a number, the even one of two that are equally near. Beyond ±448 it is that of ±448, as
/// GPUs convert; NaN has a code of its own.
pub fn encode(value: f32) -> u8 {
    let sign = if value.is_sign_negative() { 0x80 } else { 0 };
    if value.is_nan() {
        return sign | 0x7f;
    }
    let magnitude = value.abs().min(MAX);
    // From one power of two to the next there are eight codes; those below 2^-6, the subnormal ones, are spaced as
    // those of the next power of two.
    let exponent = ((magnitude.to_bits() >> 23) as i32 - 127).max(-6);
    let steps = (magnitude * 2f32.powi(3 - exponent)).round_ties_even();
    // A magnitude that rounds up to the next power of two carries into the exponent by itself.
    sign | (((exponent + 6) * 8) as u8 + steps as u8)
}

/// Rows and columns of the scales of a matrix with these rows and columns.
pub fn scale_shape([rows, columns]: [usize; 2]) -> [usize; 2] {
    [rows.div_ceil(BLOCK), columns.div_ceil(BLOCK)]
}

/// A scale per block, with which its largest magnitude becomes 448.
///
/// # Panics
/// If `columns` is 0.
pub fn scales(values: &[f32], columns: usize) -> Vec<f32> {
    let [_, across] = scale_shape([0, columns]);
    values
        .chunks(BLOCK * columns)
        .flat_map(|rows| {
            let mut largest = vec![0f32; across];
            for row in rows.chunks(columns) {
                for (largest, block) in largest.iter_mut().zip(row.chunks(BLOCK)) {
                    *largest = block.iter().fold(*largest, |a, b| a.max(b.abs()));
                }
            }
            largest
        })
        .map(|largest| match largest / MAX {
            // A block of zeros, or of numbers too small for a scale: its codes are zeros.
            0.0 => 1.0,
            scale => scale,
        })
        .collect()
}

/// The codes of a matrix divided by its scales.
///
/// # Panics
/// If `columns` is 0 or `scales` are not those of such a matrix.
pub fn quantize(values: &[f32], columns: usize, scales: &[f32]) -> Vec<u8> {
    by_block(values, columns, scales, |&value, scale| {
        encode(value / scale)
    })
}

/// The matrix that codes and scales stand for: their products in single precision.
///
/// # Panics
/// If `columns` is 0 or `scales` are not those of such a matrix.
pub fn dequantize(codes: &[u8], columns: usize, scales: &[f32]) -> Vec<f32> {
    let decoded: [f32; 256] = std::array::from_fn(|code| decode(code as u8));
    by_block(codes, columns, scales, |&code, scale| {
        decoded[usize::from(code)] * scale
    })
}

/// Applies `convert` to every element with the scale of its block.
fn by_block<A, B>(
    elements: &[A],
    columns: usize,
    scales: &[f32],
    convert: impl Fn(&A, f32) -> B,
) -> Vec<B> {
    let [down, across] = scale_shape([elements.len() / columns, columns]);
    assert_eq!(scales.len(), down * across, "one scale per block");
    let mut converted = Vec::with_capacity(elements.len());
    for (row, elements) in elements.chunks(columns).enumerate() {
        let scales = &scales[row / BLOCK * across..][..across];
        for (block, &scale) in elements.chunks(BLOCK).zip(scales) {
            converted.extend(block.iter().map(|element| convert(element, scale)));
        }
    }
    converted
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use safetensors::SafeTensors;

    use super::*;

    /// What torch 2.11.0 computed; see the README beside the files.
    fn reference(file: &str) -> Vec<u8> {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/tiny-fp8");
        std::fs::read(root.join(file)).unwrap()
    }

    fn floats(file: &SafeTensors<'_>, name: &str) -> Vec<f32> {
        let words = file.tensor(name).unwrap().data().chunks_exact(4);
        words
            .map(|word| f32::from_le_bytes(word.try_into().unwrap()))
            .collect()
    }

    fn bits(values: &[f32]) -> Vec<u32> {
        values.iter().map(|value| value.to_bits()).collect()
    }

    #[test]
    fn every_code_is_decoded_as_torch_decodes_it() {
        let bytes = reference("fp8_linear_codec.safetensors");
        let expected = floats(&SafeTensors::deserialize(&bytes).unwrap(), "decode.values");
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
        let bytes = reference("fp8_linear_codec.safetensors");
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let codes = file.tensor("encode.codes").unwrap().data().to_vec();
        let inputs = floats(&file, "encode.input");
        assert_eq!(codes.len(), inputs.len());
        let mut saturated = 0;
        for (&input, expected) in inputs.iter().zip(codes) {
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
        assert_eq!(encode(f32::NAN) & 0x7f, 0x7f);
    }

    #[test]
    fn codes_survive_decoding() {
        for code in (0..=255).filter(|code| code & 0x7f != 0x7f) {
            assert_eq!(encode(decode(code)), code);
        }
    }

    #[test]
    fn matrices_are_those_of_the_reference() {
        let bytes = reference("fp8_linear.safetensors");
        let file = SafeTensors::deserialize(&bytes).unwrap();
        for case in ["aligned", "tail"] {
            let weight = file.tensor(&format!("{case}.w")).unwrap();
            let columns = weight.shape()[1];
            let given = floats(&file, &format!("{case}.w_scale_inv"));
            let expected = floats(&file, &format!("{case}.w_dequant"));
            let found = dequantize(weight.data(), columns, &given);
            assert_eq!(bits(&found), bits(&expected), "{case}");
            // Every block of the reference has a code of 448, so that its scales can be found again, except for
            // the rounding of 448 times the scale.
            let again = scales(&expected, columns);
            for (found, given) in again.iter().zip(&given) {
                assert!((found - given).abs() <= given * f32::EPSILON);
            }
            assert_eq!(quantize(&expected, columns, &again), weight.data());

            // Activations have a scale per row and 128 columns: each row is a matrix.
            let (tiles, codes) = (
                floats(&file, &format!("{case}.x_scale")),
                file.tensor(&format!("{case}.x_q")).unwrap(),
            );
            let rows = floats(&file, &format!("{case}.x"));
            let mut found = (Vec::new(), Vec::new());
            for row in rows.chunks(columns) {
                let scales = scales(row, columns);
                found.1.extend(quantize(row, columns, &scales));
                found.0.extend(scales);
            }
            for (tile, (&found, &expected)) in found.0.iter().zip(&tiles).enumerate() {
                // For activations upstream takes a largest magnitude of at least 1e-4.
                let floor = expected == 1e-4 / MAX;
                assert!(
                    floor || found.to_bits() == expected.to_bits(),
                    "{case} {tile}"
                );
            }
            assert_eq!(found.1, codes.data(), "{case}");
        }
    }

    #[test]
    fn blocks_are_independent_and_may_be_zero() {
        // 130 x 129: four blocks, of which three are narrow.
        let at = |row: usize, column: usize| match (row / BLOCK, column / BLOCK) {
            (0, 0) => 448.0,
            (0, 1) => -4.48e-3,
            (1, 0) => 1e-45,
            _ => 0.0,
        };
        let matrix: Vec<f32> = (0..130)
            .flat_map(|row| (0..129).map(move |column| at(row, column)))
            .collect();
        let found = scales(&matrix, 129);
        assert_eq!(found, [1.0, 4.48e-3 / 448.0, 1.0, 1.0]);
        assert_eq!(scale_shape([130, 129]), [2, 2]);
        let codes = quantize(&matrix, 129, &found);
        let [first, second, third, last] = [0, 128, 128 * 129, 128 * 129 + 128];
        assert_eq!(
            [codes[first], codes[second], codes[third], codes[last]],
            [0x7e, 0xfe, 0, 0]
        );
    }
}
