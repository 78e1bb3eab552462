//! What of these kernels is compiled without a device.

use burn::tensor::bf16;
use cubecl::{CompilationError, prelude::*};

use super::kernel::*;
use crate::cuda_source::{Kernels, Launch, buffer as b};

/// The programs of these kernels.
#[rustfmt::skip]
pub(crate) fn sources(kernels: &mut Kernels) -> Result<(), CompilationError> {
    let int = i32::elem_type_native();
    kernels.add("segment_bounds", Launch::checked(CubeDim::new_1d(256)), |s, d, t| {
        segment_bounds::SegmentBounds::new(s, d, t, b(), b(), (), 256, int)
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
    Ok(())
}
