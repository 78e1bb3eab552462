//! `fp8_linear*.safetensors`: E4M3 codes, and linear layers with weights and activations in FP8, each by itself.
//!
//! A layer `CASE` has inputs `CASE.w` (codes), `CASE.w_scale_inv` and `CASE.x`; what is computed of them has names that
//! begin with `CASE.` too. The codec has `encode.input`, and all 256 codes.

use std::path::Path;

use burn::tensor::{Device, Tensor, TensorData};
use deepburn_kernels::fp8::{
    Quantized, ScaleFormat, Tile,
    e4m3::{MAX, decoded, encode},
    matmul_nt, quantize, tiles,
};
use safetensors::Dtype;

use super::{
    comparison::{Comparison, values},
    reference::ReferenceFile,
    report::Report,
    tolerance,
};

/// Whether a file is of this kind.
pub(super) fn is_fp8(name: &str) -> bool {
    name.starts_with("fp8_linear") && name.ends_with(".safetensors")
}

/// Scales of activations, and what is appended to names of results that use them.
pub(super) const FORMATS: [(ScaleFormat, &str); 2] = [
    (ScaleFormat::Float32, ""),
    (ScaleFormat::PowerOfTwo, "_ue8m0"),
];

/// Recomputes what is in the file `name`.
pub(super) fn verify(
    dir: &Path,
    name: &str,
    device: &Device,
    report: &mut Report,
) -> anyhow::Result<()> {
    let file = ReferenceFile::read(dir, name)?;
    let names = file.names();
    let cases = names.iter().filter_map(|name| name.strip_suffix(".w"));
    let cases: Vec<String> = cases.map(str::to_owned).collect();
    let inputs = cases
        .iter()
        .flat_map(|case| ["w", "w_scale_inv", "x"].map(|name| format!("{case}.{name}")));
    let inputs: Vec<String> = inputs.chain(["encode.input".to_owned()]).collect();
    let inputs: Vec<&str> = inputs.iter().map(String::as_str).collect();
    let mut comparison = Comparison::new(&file, report, &inputs);
    codec(&mut comparison)?;
    for case in &cases {
        linear(case, device, &mut comparison)?;
    }
    comparison.finish();
    Ok(())
}

fn codec(comparison: &mut Comparison) -> anyhow::Result<()> {
    comparison.exact("decode.values", &[256], &decoded())?;
    if comparison.file.has("encode.input") {
        let shape = comparison.file.shape("encode.input")?.to_vec();
        let input = comparison.file.floats("encode.input", &shape)?;
        let codes: Vec<u8> = input.iter().map(|&value| encode_as_torch(value)).collect();
        comparison.codes("encode.codes", Dtype::U8, &shape, &codes)?;
    }
    Ok(())
}

/// On CPUs torch makes NaN of what rounds to more than 448. In a model nothing does, and GPUs saturate, as `encode`.
fn encode_as_torch(value: f32) -> u8 {
    let beyond = value.abs() > MAX + 16.0;
    encode(value) | if beyond { 0x7f } else { 0 }
}

fn linear(case: &str, device: &Device, comparison: &mut Comparison) -> anyhow::Result<()> {
    let at = |name: &str| format!("{case}.{name}");
    let file = comparison.file;
    let (w_shape, x_shape) = (matrix(file, &at("w"))?, matrix(file, &at("x"))?);
    let ([_, inner], [rows, _]) = (w_shape, x_shape);
    let codes = file.codes(&at("w"), Dtype::F8_E4M3, &w_shape)?;
    let scales = file.floats(&at("w_scale_inv"), &Tile::Block.scale_shape(w_shape))?;
    let x = file.floats(&at("x"), &[rows, inner])?;

    let dequantized = tiles::dequantize(&codes, inner, Tile::Block, &scales);
    comparison.exact(&at("w_dequant"), &w_shape, &dequantized)?;
    let on_device = |values: Vec<f32>, shape: [usize; 2]| {
        Tensor::<2>::from_data(TensorData::new(values, shape), device)
    };
    let x = on_device(x, x_shape);
    let product = x
        .clone()
        .matmul(on_device(dequantized, w_shape).transpose());
    relative(&at("y_dequant"), product, comparison)?;

    let weight = Quantized::new(codes, scales, w_shape, Tile::Block, device);
    for (format, suffix) in FORMATS {
        let x = quantize(x.clone(), Tile::Row, format);
        let found: Vec<u8> = x.codes.to_data().iter::<u8>().collect();
        let name = at(&format!("x_q{suffix}"));
        comparison.codes(&name, Dtype::F8_E4M3, &x_shape, &found)?;
        let name = at(&format!("x_scale{suffix}"));
        comparison.exact(&name, &x.scales.dims(), &values(x.scales.clone()))?;
        let product = matmul_nt(&x, &weight);
        relative(&at(&format!("y_w8a8{suffix}")), product, comparison)?;
    }
    Ok(())
}

/// Compares a product, whose elements are as close as its largest one allows.
fn relative(name: &str, found: Tensor<2>, comparison: &mut Comparison) -> anyhow::Result<()> {
    if comparison.file.has(name) {
        let shape = found.dims();
        let largest = comparison.file.floats(name, &shape)?;
        let largest = largest.into_iter().fold(0f32, |a, b| a.max(b.abs()));
        comparison.floats(name, &shape, &values(found), tolerance::product(largest))?;
    }
    Ok(())
}

/// The sizes of a matrix with elements.
fn matrix(file: &ReferenceFile, name: &str) -> anyhow::Result<[usize; 2]> {
    let shape = file.shape(name)?;
    match *shape {
        [rows, columns] if rows > 0 && columns > 0 => Ok([rows, columns]),
        _ => Err(file.malformed(name, "a matrix with elements")),
    }
}
