//! Launches of the FP8 kernels on CubeCL tensors: check, choose by the device's capability, launch.
//!
//! What a kernel does not serve is an [`Unsupported`] that says what it does serve; nothing falls back to other code.

#[cfg(feature = "cuda")]
mod multiply;
mod quantize;

use burn::{backend::TensorMetadata, tensor::DType};
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::Client;

#[cfg(feature = "cuda")]
pub(crate) use multiply::{grouped_matmul_nt, matmul_nt, segments_matmul_nt};
#[cfg(all(test, feature = "cuda", feature = "wgpu"))]
pub(crate) use multiply::{segment_starts, tile_experts};
pub(crate) use quantize::{quantize, quantize_transposed, rms_norm_quantize, swiglu_quantize};

/// Why no kernel was launched.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum Unsupported {
    /// The device has no kernel for this.
    #[error("{what} runs on {supported}, not on {found}")]
    Device {
        /// The operation.
        what: &'static str,
        /// The device.
        found: String,
        /// Devices that there are kernels for.
        supported: &'static str,
    },
    /// No kernel reads or writes the element type.
    #[error("{what} has elements of type {found:?}; {supported} are supported")]
    ElementType {
        /// The tensor.
        what: &'static str,
        /// Its element type.
        found: DType,
        /// The types that there are kernels for.
        supported: &'static str,
    },
    /// Shapes do not fit together.
    #[error("{what} has the shape {found:?}, expected {expected:?}")]
    Shape {
        /// The tensor.
        what: &'static str,
        /// Its shape.
        found: Vec<usize>,
        /// The shape that goes with the others.
        expected: Vec<usize>,
    },
    /// A matrix of no element.
    #[error("{what} has no element")]
    Empty {
        /// The tensor.
        what: &'static str,
    },
    /// Codes that cannot be copied 16 bytes at a time.
    #[error(
        "{what} has rows {pitch} bytes apart, the first at byte {offset}; kernels copy 16 bytes at a time and want \
         multiples of that, as `quantize` makes them"
    )]
    Alignment {
        /// The tensor.
        what: &'static str,
        /// Bytes from row to row.
        pitch: usize,
        /// Where in its allocation the tensor starts.
        offset: u64,
    },
    /// Indices of 32 bits do not reach every element.
    #[error("{what} has {elements} elements; kernels index fewer than 2^31")]
    Size {
        /// The tensor.
        what: &'static str,
        /// Its elements.
        elements: usize,
    },
}

/// The compute capability of a CUDA device, as in `sm_90`.
pub(crate) fn capability(client: &Client) -> Option<u32> {
    let fingerprint = &client.properties().identity.fingerprint;
    fingerprint.strip_prefix("ptx_sm")?.parse().ok()
}

/// Whether a tensor is on a CUDA device.
#[cfg(feature = "cuda")]
pub(crate) fn is_cuda(tensor: &CubeTensor) -> bool {
    capability(&tensor.client).is_some()
}

/// A matrix's shape, which kernels can index.
fn matrix(what: &'static str, tensor: &CubeTensor) -> Result<[usize; 2], Unsupported> {
    let shape = tensor.shape();
    let found: Vec<usize> = shape.iter().copied().collect();
    let &[rows, columns] = found.as_slice() else {
        let expected = vec![0, 0];
        return Err(Unsupported::Shape {
            what,
            found,
            expected,
        });
    };
    if rows * columns == 0 {
        return Err(Unsupported::Empty { what });
    }
    fits(what, rows * columns)?;
    Ok([rows, columns])
}

fn fits(what: &'static str, elements: usize) -> Result<(), Unsupported> {
    match elements < 1 << 31 {
        true => Ok(()),
        false => Err(Unsupported::Size { what, elements }),
    }
}

fn expect_shape(
    what: &'static str,
    tensor: &CubeTensor,
    expected: &[usize],
) -> Result<(), Unsupported> {
    let found: Vec<usize> = tensor.shape().iter().copied().collect();
    match found == expected {
        true => Ok(()),
        false => Err(Unsupported::Shape {
            what,
            found,
            expected: expected.to_vec(),
        }),
    }
}

/// The tensor with its rows one after another.
fn aligned_rows(x: CubeTensor) -> CubeTensor {
    burn_cubecl::kernel::into_contiguous(x)
}
