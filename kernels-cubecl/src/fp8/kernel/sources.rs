//! What of these kernels is compiled without a device: every branch of their constants, for each kind of architecture
//! that launches them.

use burn::tensor::bf16;
use cubecl::{
    CompilationError,
    prelude::{CubeDim, Float, Scalar},
};

use super::{grouped, hopper, portable, quantize::*};
use crate::cuda_source::{EVERY, Kernels, Launch, buffer};

/// Architectures that convert to E4M3 in an instruction.
const FP8: &[&str] = &["sm_89", "sm_90a", "sm_120a"];
/// Architectures with instructions for FP8 products of a warp.
const WARPS: &[&str] = &["sm_89", "sm_120a"];

/// The programs of these kernels.
pub(crate) fn sources(kernels: &mut Kernels) -> Result<(), CompilationError> {
    quantizations(kernels)?;
    for (tiles, b_blocks) in [("blocks", true), ("rows", false)] {
        products::<f32>(kernels, "f32", tiles, b_blocks)?;
        products::<bf16>(kernels, "bf16", tiles, b_blocks)?;
    }
    let units = Launch::checked(CubeDim::new_1d(grouped::UNITS));
    let int = i32::elem_type_native();
    kernels.add("tile_experts", units, |settings, device, target| {
        grouped::tile_experts::TileExperts::new(settings, device, target, buffer(), buffer(), int)
    })?;
    kernels.add("segment_starts", units, |settings, device, target| {
        grouped::segment_starts::SegmentStarts::new(
            settings,
            device,
            target,
            buffer(),
            buffer(),
            int,
        )
    })?;
    grouped_products::<f32>(kernels, "f32")?;
    grouped_products::<bf16>(kernels, "bf16")
}

/// Adds the program of a kernel with its buffers, scalars, vector sizes and constants.
macro_rules! add {
    ($kernels:ident, $name:expr, $on:expr, $units:expr, $kernel:ty, [$($argument:expr),* $(,)?]) => {
        $kernels.add(
            $name,
            Launch::unchecked($on, $units),
            |settings, device, target| <$kernel>::new(settings, device, target, $($argument),*),
        )
    };
}

#[rustfmt::skip]
fn quantizations(kernels: &mut Kernels) -> Result<(), CompilationError> {
    for (power_of_two, native, on, how) in [
        (false, true, FP8, "any scale, cvt"),
        (true, false, EVERY, "powers of two, integer"),
    ] {
        add!(kernels, format!("quantize_rows bf16, {how}"), on, ROW_UNITS, quantize_rows::QuantizeRows<bf16, u8>,
            [buffer(), buffer(), buffer(), (), (), (), (), 4, power_of_two, native])?;
        add!(kernels, format!("quantize_rows f32, {how}"), on, ROW_UNITS, quantize_rows::QuantizeRows<f32, u8>,
            [buffer(), buffer(), buffer(), (), (), (), (), 4, power_of_two, native])?;
        add!(kernels, format!("quantize_rows f32 unaligned, {how}"), on, ROW_UNITS, quantize_rows::QuantizeRows<f32, u8>,
            [buffer(), buffer(), buffer(), (), (), (), (), 1, power_of_two, native])?;
        add!(kernels, format!("swiglu_quantize_rows bf16, {how}"), on, ROW_UNITS,
            swiglu_quantize_rows::SwigluQuantizeRows<bf16, u8>,
            [buffer(), buffer(), buffer(), buffer(), (), (), (), (), 4, power_of_two, native])?;
        add!(kernels, format!("rms_norm_quantize_rows bf16, {how}"), on, ROW_UNITS,
            rms_norm_quantize_rows::RmsNormQuantizeRows<bf16, u8>,
            [buffer(), buffer(), buffer(), buffer(), (), (), (), (), (), 4, power_of_two, native])?;
        add!(kernels, format!("rms_norm_quantize_rows f32, {how}"), on, ROW_UNITS,
            rms_norm_quantize_rows::RmsNormQuantizeRows<f32, u8>,
            [buffer(), buffer(), buffer(), buffer(), (), (), (), (), (), 4, power_of_two, native])?;
        add!(kernels, format!("quantize_blocks f32, {how}"), on, BLOCK_UNITS, quantize_blocks::QuantizeBlocks<f32, u8>,
            [buffer(), buffer(), buffer(), (), (), (), (), 4, power_of_two, native])?;
        add!(kernels, format!("quantize_transposed bf16, {how}"), on, BLOCK_UNITS,
            quantize_transposed::QuantizeTransposed<bf16, u8>,
            [buffer(), buffer(), buffer(), (), (), (), (), power_of_two, native])?;
    }
    Ok(())
}

#[rustfmt::skip]
fn products<O: Float>(
    kernels: &mut Kernels,
    element: &str,
    tiles: &str,
    b_blocks: bool,
) -> Result<(), CompilationError> {
    for columns in [64, 128] {
        let shape = hopper::shape(columns, b_blocks);
        add!(kernels, format!("hopper multiply {columns} {element}x2, b in {tiles}"), &["sm_90a"], hopper::UNITS,
            hopper::multiply::Multiply<O>,
            [(), buffer(), (), buffer(), buffer(), (), (), (), 2, columns as usize / 2, shape])?;
    }
    for width in [1, 2] {
        add!(kernels, format!("portable multiply {element}x{width}, b in {tiles}"), WARPS, portable::UNITS,
            portable::multiply::Multiply<O>,
            [buffer(), buffer(), buffer(), buffer(), buffer(), (), (), (), (), (), width, b_blocks])?;
    }
    Ok(())
}

#[rustfmt::skip]
fn grouped_products<O: Float>(kernels: &mut Kernels, element: &str) -> Result<(), CompilationError> {
    for columns in [64, 128] {
        let shape = hopper::shape(columns, true);
        add!(kernels, format!("hopper multiply {columns} {element}x2, b in experts' blocks"), &["sm_90a"],
            hopper::UNITS, hopper::multiply_grouped::MultiplyGrouped<O>,
            [(), buffer(), (), buffer(), buffer(), buffer(), (), (), (), (), 2, columns as usize / 2, shape])?;
        let shape = hopper::shape(columns, false);
        add!(kernels, format!("hopper multiply {columns} {element}x2, segments"), &["sm_90a"], hopper::UNITS,
            hopper::multiply_segments::MultiplySegments<O>,
            [(), buffer(), (), buffer(), buffer(), buffer(), (), (), (), 2, columns as usize / 2, shape])?;
    }
    for width in [1, 2] {
        add!(kernels, format!("portable multiply {element}x{width}, b in experts' blocks"), WARPS, portable::UNITS,
            portable::multiply_grouped::MultiplyGrouped<O>,
            [buffer(), buffer(), buffer(), buffer(), buffer(), buffer(), (), (), (), (), (), (), width])?;
        add!(kernels, format!("portable multiply {element}x{width}, segments"), WARPS, portable::UNITS,
            portable::multiply_segments::MultiplySegments<O>,
            [buffer(), buffer(), buffer(), buffer(), buffer(), buffer(), (), (), (), (), (), width])?;
    }
    Ok(())
}
