//! The FP8 kernels as they are, for measurements and for layers that fuse: errors instead of references where there is
//! no kernel, and no gradients.

#[cfg(feature = "cuda")]
use burn::tensor::DType;
use burn::{
    backend::Cube,
    tensor::{BackendPrimitive, Int, Tensor},
};
use burn_cubecl::tensor::CubeTensor;

pub use super::launch::Unsupported;
use super::{
    Quantized, launch,
    tiles::{ScaleFormat, Tile},
};

/// [`super::quantize`] by a kernel.
///
/// # Shapes
/// - `x`: `[R, C]`, f32 or (on CUDA) bf16
///
/// # Errors
/// If no kernel serves the tensor.
pub fn quantize(x: Tensor<2>, tile: Tile, format: ScaleFormat) -> Result<Quantized, Unsupported> {
    launch::quantize(primitive("the matrix to quantise", x)?, tile, format)
        .map(|parts| quantized(parts, tile))
}

/// Rows' tiles of the transposed matrix, which are tiles of 128 rows of `x`: what the gradient of a weight multiplies.
///
/// # Shapes
/// - `x`: `[R, C]`, f32 or (on CUDA) bf16
/// - result: `[C, R]`
///
/// # Errors
/// If no kernel serves the tensor.
pub fn quantize_transposed(x: Tensor<2>, format: ScaleFormat) -> Result<Quantized, Unsupported> {
    launch::quantize_transposed(primitive("the matrix to quantise", x)?, format)
        .map(|parts| quantized(parts, Tile::Row))
}

/// Rows' tiles of `silu(gate) * up`, computed in single precision.
///
/// # Shapes
/// - `gate`, `up`: `[R, C]`, f32 or (on CUDA) bf16
/// - result: `[R, C]`
///
/// # Errors
/// If no kernel serves the tensors.
pub fn swiglu_quantize(
    gate: Tensor<2>,
    up: Tensor<2>,
    format: ScaleFormat,
) -> Result<Quantized, Unsupported> {
    let gate = primitive("the gates", gate)?;
    let up = primitive("the factors of the gates", up)?;
    launch::swiglu_quantize(gate, up, format).map(|parts| quantized(parts, Tile::Row))
}

/// Rows' tiles of `x / sqrt(mean(x^2) + epsilon) * weight`, the mean over each row, computed in single precision.
///
/// # Shapes
/// - `x`: `[R, C]`, f32 or (on CUDA) bf16
/// - `weight`: `[C]`, of the same type
/// - result: `[R, C]`
///
/// # Errors
/// If no kernel serves the tensors.
pub fn rms_norm_quantize(
    x: Tensor<2>,
    weight: Tensor<1>,
    epsilon: f64,
    format: ScaleFormat,
) -> Result<Quantized, Unsupported> {
    let x = primitive("the matrix to normalise", x)?;
    let weight = primitive("the weight of the norm", weight)?;
    launch::rms_norm_quantize(x, weight, epsilon as f32, format)
        .map(|parts| quantized(parts, Tile::Row))
}

/// [`super::matmul_nt`] by a kernel, with a result of type `dtype`: f32 or bf16.
///
/// # Shapes
/// - `a`: `[M, K]` in rows' tiles, `b`: `[N, K]` in rows' tiles or blocks
/// - result: `[M, N]`
///
/// # Errors
/// If no kernel serves the tensors.
#[cfg(feature = "cuda")]
pub fn matmul_nt(a: &Quantized, b: &Quantized, dtype: DType) -> Result<Tensor<2>, Unsupported> {
    let b_tile = b.tile;
    let (a, b) = operands(a, b)?;
    launch::matmul_nt(a, b, b_tile, dtype).map(Tensor::from_primitive::<Cube>)
}

/// Each expert's segment of the rows of `a` times the transposed matrix of the expert: `y_e = a_e b_e^T`, by a kernel,
/// with a result of type `dtype`: f32 or bf16.
///
/// Segments follow each other in order of the experts, each padded to a multiple of 128 rows, as
/// [`Permutation::by_expert_padded`](crate::permute::Permutation::by_expert_padded) makes them; they may be empty. Which
/// they are is read on the device alone. Rows behind the last segment are zero in the result.
///
/// The experts' matrices are one below another, in blocks of every matrix by itself: where N is a multiple of 128 that is
/// what [`quantize`] makes of all of them, otherwise the codes and the scales that it makes of each, concatenated.
///
/// # Shapes
/// - `a`: `[S, K]` in rows' tiles
/// - `b`: `[E N, K]` with scales `[E ceil(N / 128), ceil(K / 128)]`
/// - `counts`: `[E]`, the rows of each segment, with or without those that pad it
/// - result: `[S, N]`
///
/// # Errors
/// If no kernel serves the tensors.
#[cfg(feature = "cuda")]
pub fn grouped_matmul_nt(
    a: &Quantized,
    b: &Quantized,
    counts: Tensor<1, Int>,
    dtype: DType,
) -> Result<Tensor<2>, Unsupported> {
    let (a, b) = operands(a, b)?;
    let counts = primitive("the counts", counts)?;
    launch::grouped_matmul_nt(a, b, counts, dtype).map(Tensor::from_primitive::<Cube>)
}

/// The product of every segment of the inner size, `y_e = a_e b_e^T`, by a kernel, with a result of type `dtype`: f32 or
/// bf16. With [`quantize_transposed`] of the rows of all experts, the gradients of their matrices.
///
/// Segments as for [`grouped_matmul_nt`]; the result of an empty one is zero.
///
/// # Shapes
/// - `a`: `[M, S]`, `b`: `[N, S]`, both in rows' tiles
/// - `counts`: `[E]`
/// - result: `[E M, N]`
///
/// # Errors
/// If no kernel serves the tensors.
#[cfg(feature = "cuda")]
pub fn segments_matmul_nt(
    a: &Quantized,
    b: &Quantized,
    counts: Tensor<1, Int>,
    dtype: DType,
) -> Result<Tensor<2>, Unsupported> {
    let (a, b) = operands(a, b)?;
    let counts = primitive("the counts", counts)?;
    launch::segments_matmul_nt(a, b, counts, dtype).map(Tensor::from_primitive::<Cube>)
}

/// Codes and scales.
#[cfg(feature = "cuda")]
type Operand = (CubeTensor, CubeTensor);

#[cfg(feature = "cuda")]
fn operands(a: &Quantized, b: &Quantized) -> Result<(Operand, Operand), Unsupported> {
    let parts = |what: [&'static str; 2], of: &Quantized| {
        let codes = primitive(what[0], of.codes.clone())?;
        Ok((codes, primitive(what[1], of.scales.clone())?))
    };
    let a = parts(["the left codes", "the left scales"], a)?;
    Ok((a, parts(["the right codes", "the right scales"], b)?))
}

fn primitive<const D: usize, K>(
    what: &'static str,
    tensor: Tensor<D, K>,
) -> Result<CubeTensor, Unsupported>
where
    K: burn::tensor::kind::Basic + BackendPrimitive<Cube, Primitive = CubeTensor>,
{
    let found = format!("{:?}", tensor.device());
    tensor
        .try_into_primitive::<Cube>()
        .map_err(|_| Unsupported::Device {
            what,
            found,
            supported: "CubeCL devices without autodiff",
        })
}

fn quantized((codes, scales): (CubeTensor, CubeTensor), tile: Tile) -> Quantized {
    Quantized {
        codes: Tensor::<2, Int>::from_primitive::<Cube>(codes),
        scales: Tensor::from_primitive::<Cube>(scales),
        tile,
    }
}

#[cfg(all(test, feature = "wgpu"))]
mod tests;
