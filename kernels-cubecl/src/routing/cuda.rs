//! What of these kernels is compiled without a device.

use burn::tensor::bf16;
use cubecl::{CompilationError, prelude::*};

use super::{
    GroupLimit,
    kernel::{route::Route, select_experts::SelectExperts},
};
use crate::cuda_source::{Kernels, Launch, buffer};

/// The programs of these kernels, for the published model's experts.
#[rustfmt::skip]
pub(crate) fn sources(kernels: &mut Kernels) -> Result<(), CompilationError> {
    let limit = GroupLimit { experts_per_token: 8, groups: 8, groups_per_token: 4 };
    let launch = Launch::checked(CubeDim::new_1d(256));
    kernels.add("select_experts 256", launch, |settings, device, target| {
        SelectExperts::new(settings, device, target, buffer(), buffer(), 256, limit)
    })?;
    kernels.add("route 256 bf16", launch, |settings, device, target| {
        Route::new(
            settings, device, target, buffer(), buffer(), buffer(), buffer(), (), true, 256, limit,
            bf16::elem_type_native(),
        )
    })
}
