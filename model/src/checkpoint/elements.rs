//! The elements of stored tensors in single precision.

use std::collections::BTreeMap;

use burn::tensor::{bf16, f16};
use deepburn_kernels::fp8::tiles::{Tile, dequantize};
use safetensors::{Dtype, tensor::TensorView};

use super::hf_names::scales_of;

/// The elements of the tensor `name`, or what is wrong with it. `quantized`: `config.json` says how FP8 is scaled.
pub(super) fn elements(
    name: &str,
    view: &TensorView<'_>,
    tensors: &BTreeMap<String, TensorView<'_>>,
    quantized: bool,
) -> Result<Vec<f32>, Vec<String>> {
    if view.dtype() != Dtype::F8_E4M3 {
        return widen(view).ok_or_else(|| {
            let found = view.dtype();
            vec![format!(
                "{name}: expected F32, F16, BF16 or F8_E4M3, found {found:?}"
            )]
        });
    }
    let &[rows, columns] = view.shape() else {
        return Err(vec![format!("{name}: F8_E4M3 is for matrices only")]);
    };
    let mut problems = Vec::new();
    if !quantized {
        problems.push(format!(
            "{name}: F8_E4M3, but config.json has no quantization_config"
        ));
    }
    if let Some(at) = view.data().iter().position(|code| code & 0x7f == 0x7f) {
        problems.push(format!(
            "{name}: NaN at [{}, {}]",
            at / columns,
            at % columns
        ));
    }
    let scales = scales(&scales_of(name), [rows, columns], tensors);
    match scales {
        Ok(scales) if problems.is_empty() => {
            Ok(dequantize(view.data(), columns, Tile::Block, &scales))
        }
        Ok(_) => Err(problems),
        Err(problem) => {
            problems.push(problem);
            Err(problems)
        }
    }
}

fn scales(
    name: &str,
    matrix: [usize; 2],
    tensors: &BTreeMap<String, TensorView<'_>>,
) -> Result<Vec<f32>, String> {
    let expected = Tile::Block.scale_shape(matrix);
    let Some(view) = tensors.get(name) else {
        return Err(format!(
            "{name}: missing, expected {expected:?} beside F8_E4M3"
        ));
    };
    if view.shape() != expected {
        let found = view.shape();
        return Err(format!("{name}: expected {expected:?}, found {found:?}"));
    }
    let found = view.dtype();
    let values = (found == Dtype::F32).then(|| widen(view)).flatten();
    let values = values.ok_or_else(|| format!("{name}: expected F32, found {found:?}"))?;
    let unusable = |value: &&f32| !value.is_finite() || **value < 0.0;
    match values.iter().find(unusable) {
        Some(value) => Err(format!(
            "{name}: has {value}, where scales are finite and not negative"
        )),
        None => Ok(values),
    }
}

/// The elements of a stored float tensor; `None` for types that need more than their own bytes, and for all others.
fn widen(view: &TensorView<'_>) -> Option<Vec<f32>> {
    let bytes = view.data();
    let words = || bytes.chunks_exact(2).map(|pair| [pair[0], pair[1]]);
    Some(match view.dtype() {
        Dtype::F32 => bytes
            .chunks_exact(4)
            .map(|word| f32::from_le_bytes([word[0], word[1], word[2], word[3]]))
            .collect(),
        Dtype::BF16 => words()
            .map(|pair| bf16::from_le_bytes(pair).to_f32())
            .collect(),
        Dtype::F16 => words()
            .map(|pair| f16::from_le_bytes(pair).to_f32())
            .collect(),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is wrong with an FP8 tensor `w` of the given codes and sizes, beside scales of the given type and sizes.
    fn problems(
        shape: &[usize],
        codes: &[u8],
        scales: Option<(Dtype, &[usize], &[u8])>,
        quantized: bool,
    ) -> Vec<String> {
        let weight = TensorView::new(Dtype::F8_E4M3, shape.to_vec(), codes).unwrap();
        let mut tensors = BTreeMap::new();
        if let Some((dtype, shape, bytes)) = scales {
            let view = TensorView::new(dtype, shape.to_vec(), bytes).unwrap();
            tensors.insert("w_scale_inv".to_owned(), view);
        }
        elements("w", &weight, &tensors, quantized)
            .err()
            .unwrap_or_default()
    }

    #[test]
    fn what_is_wrong_with_fp8_is_told() {
        let codes = [0u8; 129];
        let both = |a: f32, b: f32| [a.to_le_bytes(), b.to_le_bytes()].concat();
        let good = both(1.0, 0.0);
        let given = |bytes: &[u8]| {
            let scales = Some((Dtype::F32, &[2, 1][..], bytes));
            problems(&[129, 1], &codes, scales, true)
        };
        assert_eq!(given(&good), [""; 0]);
        for (bad, text) in [(f32::NAN, "NaN"), (f32::INFINITY, "inf"), (-1.0, "-1")] {
            let expected =
                format!("w_scale_inv: has {text}, where scales are finite and not negative");
            assert_eq!(given(&both(1.0, bad)), [expected]);
        }
        let case = |scales, quantized| problems(&[129, 1], &codes, scales, quantized);
        assert_eq!(
            case(None, true),
            ["w_scale_inv: missing, expected [2, 1] beside F8_E4M3"]
        );
        assert_eq!(
            case(Some((Dtype::F32, &[1, 2], &good)), true),
            ["w_scale_inv: expected [2, 1], found [1, 2]"]
        );
        assert_eq!(
            case(Some((Dtype::BF16, &[2, 1], &good[..4])), true),
            ["w_scale_inv: expected F32, found BF16"]
        );
        assert_eq!(
            case(Some((Dtype::F32, &[2, 1], &good)), false),
            ["w: F8_E4M3, but config.json has no quantization_config"]
        );
        assert_eq!(
            problems(&[129], &codes, None, true),
            ["w: F8_E4M3 is for matrices only"]
        );
        for nan in [0x7f, 0xff] {
            let mut codes = codes;
            codes[5] = nan;
            let scales = Some((Dtype::F32, &[1, 1][..], &good[..4]));
            assert_eq!(
                problems(&[43, 3], &codes, scales, true),
                ["w: NaN at [1, 2]"]
            );
        }
    }

    #[test]
    fn other_types_are_refused_by_name() {
        let bytes = [0u8; 4];
        let view = TensorView::new(Dtype::F8_E5M2, vec![4], &bytes).unwrap();
        assert_eq!(
            elements("w", &view, &BTreeMap::new(), true).unwrap_err(),
            ["w: expected F32, F16, BF16 or F8_E4M3, found F8_E5M2"]
        );
    }
}
