//! Weights that are held in fewer bits than they are computed with, for models that only decode.

use burn::{
    module::Param,
    tensor::{Shape, Tensor},
};
use deepburn_kernels::compact::{CompactFormat, CompactMatrices, NotCompact};

/// Rounds a matrix, or stacked ones, to a compact format. The parameter has the rounded numbers from then on, which it
/// makes again only if it is asked for them.
///
/// # Errors
/// Weights that are not in single precision, or on a device that [`CompactFormat::check`] refuses.
pub(crate) fn hold<const D: usize>(
    parameter: &mut Param<Tensor<D>>,
    format: CompactFormat,
) -> Result<CompactMatrices, NotCompact> {
    let weights = parameter.val();
    let (shape, device) = (weights.dims(), weights.device());
    let [inner, columns] = [shape[D - 2], shape[D - 1]];
    let held = CompactMatrices::new(weights.reshape([-1, inner as i32, columns as i32]), format)?;
    let numbers = held.clone();
    *parameter = Param::uninitialized(
        parameter.id,
        move |device, _| numbers.widened().reshape(shape).to_device(device),
        device,
        false,
        Shape::from(shape.to_vec()),
    );
    Ok(held)
}
