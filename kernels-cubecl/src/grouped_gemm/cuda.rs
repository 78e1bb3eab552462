//! What of these kernels is compiled without a device.

use burn::tensor::bf16;
use cubecl::{CompilationError, prelude::*};

use super::{
    kernel::*,
    tensor_cores::{self, segment_matmul_bf16, segment_weight_grad_bf16},
};
use crate::cuda_source::{EVERY, Kernels, Launch, buffer as b};

/// The programs of these kernels.
#[rustfmt::skip]
pub(crate) fn sources(kernels: &mut Kernels) -> Result<(), CompilationError> {
    let int = i32::elem_type_native();
    kernels.add("segment_bounds", Launch::checked(CubeDim::new_1d(256)), |s, d, t| {
        segment_bounds::SegmentBounds::new(s, d, t, b(), b(), (), 256, TILE as u32, int)
    })?;
    let tile = Launch::checked(CubeDim::new_2d(UNITS as u32, UNITS as u32));
    for (name, element) in [("f32", f32::elem_type_native()), ("bf16", bf16::elem_type_native())] {
        kernels.add(format!("segment_matmul {name}"), tile, |s, d, t| {
            segment_matmul::SegmentMatmul::new(s, d, t, b(), b(), b(), b(), (), (), false, element)
        })?;
        kernels.add(format!("segment_matmul_weight_grad {name}"), tile, |s, d, t| {
            segment_matmul_weight_grad::SegmentMatmulWeightGrad::new(s, d, t, b(), b(), b(), b(), (), (), element)
        })?;
    }
    let launch = Launch::unchecked(EVERY, tensor_cores::UNITS as u32);
    for (name, transposed) in [("forward", false), ("input grad", true)] {
        kernels.add(format!("grouped tensor cores, {name}"), launch, |s, d, t| {
            segment_matmul_bf16::SegmentMatmulBf16::new(s, d, t, b(), b(), b(), b(), (), (), transposed)
        })?;
    }
    kernels.add("grouped tensor cores, weight grad", launch, |s, d, t| {
        segment_weight_grad_bf16::SegmentWeightGradBf16::new(s, d, t, b(), b(), b(), b(), (), ())
    })
}
