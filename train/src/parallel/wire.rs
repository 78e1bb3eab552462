//! Rows of numbers as bytes.

use burn::tensor::bf16;
use deepburn_kernels::fp8::{ScaleFormat, TILE, Tile, tiles};

/// The formats in which tokens travel (report, section 3.3.3).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Wire {
    /// To the experts: activations forward, gradients of the layer's output backward.
    pub dispatch: RowFormat,
    /// Back: outputs forward, gradients of activations backward. Sums are taken in single precision, and rounded again
    /// where they travel on.
    pub combine: RowFormat,
}

impl Wire {
    /// Nothing is rounded.
    pub const F32: Self = Self {
        dispatch: RowFormat::F32,
        combine: RowFormat::F32,
    };

    /// Two bytes for a number.
    pub const BF16: Self = Self {
        dispatch: RowFormat::Bf16,
        combine: RowFormat::Bf16,
    };

    /// As the report trains.
    pub const FP8: Self = Self {
        dispatch: RowFormat::Fp8,
        combine: RowFormat::Bf16,
    };
}

/// The bytes of a row.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum RowFormat {
    /// Four bytes for a number.
    F32,
    /// Two.
    Bf16,
    /// E4M3, and a byte for the scale of each 128 numbers, a power of two.
    Fp8,
}

/// How wide rows are: numbers in a format, and behind them some in full.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Row {
    /// Of the first numbers.
    pub format: RowFormat,
    /// Numbers in that format.
    pub width: usize,
    /// Numbers in single precision behind them.
    pub exact: usize,
}

impl Row {
    /// Numbers of a row.
    pub fn numbers(self) -> usize {
        self.width + self.exact
    }

    /// Bytes of a row.
    pub fn bytes(self) -> usize {
        let width = self.width;
        let rounded = match self.format {
            RowFormat::F32 => 4 * width,
            RowFormat::Bf16 => 2 * width,
            RowFormat::Fp8 => width + width.div_ceil(TILE),
        };
        rounded + 4 * self.exact
    }

    /// Appends a row's bytes.
    ///
    /// # Panics
    /// If the row has another length.
    pub fn encode(self, row: &[f32], bytes: &mut Vec<u8>) {
        assert_eq!(row.len(), self.numbers(), "numbers of a row");
        let (rounded, exact) = row.split_at(self.width);
        let plain = |bytes: &mut Vec<u8>, numbers: &[f32]| {
            bytes.extend(numbers.iter().flat_map(|number| number.to_le_bytes()));
        };
        match self.format {
            RowFormat::F32 => plain(bytes, rounded),
            RowFormat::Bf16 => {
                let rounded = rounded.iter().map(|&number| bf16::from_f32(number));
                bytes.extend(rounded.flat_map(bf16::to_le_bytes));
            }
            RowFormat::Fp8 if rounded.is_empty() => {}
            RowFormat::Fp8 => {
                let (tile, format) = (Tile::Row, ScaleFormat::PowerOfTwo);
                let scales = tiles::scales(rounded, self.width, tile, format);
                bytes.extend(tiles::quantize(rounded, self.width, tile, &scales));
                // The exponent alone; 255 is NaN, as in ue8m0.
                bytes.extend(scales.iter().map(|scale| (scale.to_bits() >> 23) as u8));
            }
        }
        plain(bytes, exact);
    }

    /// Calls `with` for each number of an encoded row and its place.
    ///
    /// # Panics
    /// If there are fewer bytes than the row has.
    pub fn decode(self, bytes: &[u8], mut with: impl FnMut(usize, f32)) {
        let (rounded, exact) = bytes.split_at(self.bytes() - 4 * self.exact);
        let plain = |bytes: &[u8]| {
            let numbers = bytes.chunks_exact(4);
            let number = |number: &[u8]| bytemuck::pod_read_unaligned::<f32>(number);
            numbers.map(number).collect::<Vec<_>>()
        };
        let numbers = match self.format {
            RowFormat::F32 => plain(rounded),
            RowFormat::Bf16 => rounded
                .chunks_exact(2)
                .map(|number| bf16::from_le_bytes([number[0], number[1]]).to_f32())
                .collect(),
            RowFormat::Fp8 if rounded.is_empty() => Vec::new(),
            RowFormat::Fp8 => {
                let (codes, exponents) = rounded.split_at(self.width);
                let scale = |&exponent: &u8| match exponent {
                    255 => f32::NAN,
                    exponent => f32::from_bits(u32::from(exponent) << 23),
                };
                let scales: Vec<f32> = exponents.iter().map(scale).collect();
                tiles::dequantize(codes, self.width, Tile::Row, &scales)
            }
        };
        let numbers = numbers.into_iter().chain(plain(exact));
        for (place, number) in numbers.enumerate() {
            with(place, number);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn there_and_back(row: Row, numbers: &[f32]) -> Vec<f32> {
        let mut bytes = Vec::new();
        row.encode(numbers, &mut bytes);
        assert_eq!(bytes.len(), row.bytes());
        let mut decoded = vec![0.0; row.numbers()];
        row.decode(&bytes, |place, number| decoded[place] = number);
        decoded
    }

    #[test]
    fn rows_come_back_rounded_as_their_format_says() {
        let numbers: Vec<f32> = (0..303).map(|at| (at as f32 - 150.0) * 0.37).collect();
        for (format, error) in [
            (RowFormat::F32, 0.0),
            // Half a unit of the last place: 8 and 4 bits of precision.
            (RowFormat::Bf16, 1.0 / 256.0),
            (RowFormat::Fp8, 1.0 / 16.0),
        ] {
            let row = Row {
                format,
                width: 300,
                exact: 3,
            };
            let decoded = there_and_back(row, &numbers);
            for (place, (&found, &number)) in decoded.iter().zip(&numbers).enumerate() {
                // Next to the largest of a tile, 55.5, numbers below 2^-6 of its scale, 2^-2, are further apart.
                let bound = if place < 300 {
                    error * number.abs().max(2f32.powi(-8))
                } else {
                    0.0
                };
                assert!(
                    (found - number).abs() <= bound,
                    "{format:?} {number} {found}"
                );
            }
            // What is rounded once stays.
            assert_eq!(there_and_back(row, &decoded), decoded);
        }
    }

    #[test]
    fn numbers_that_are_not_finite_stay_so() {
        let row = Row {
            format: RowFormat::Fp8,
            width: 130,
            exact: 0,
        };
        let mut numbers = vec![1.0; 130];
        numbers[129] = f32::INFINITY;
        let decoded = there_and_back(row, &numbers);
        assert!(decoded[..128].iter().all(|&number| number == 1.0));
        assert!(decoded[128..].iter().all(|number| number.is_nan()));
    }
}
