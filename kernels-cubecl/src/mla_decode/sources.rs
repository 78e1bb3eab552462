//! What of these kernels is compiled without a device: for the report's widths, and of the tensor cores' kernel for
//! small ones too, which `tests/emulated_attention.rs` runs.

use burn::tensor::bf16;
use cubecl::{
    CompilationError,
    prelude::{ElemType, Scalar},
};

use super::{
    kernel::{self, Widths},
    shape::{SHAPES, Shape},
    tensor_cores,
};
use crate::cuda_source::{EVERY, Kernels, Launch, buffer};

const REPORT: Widths = Widths {
    heads: 128,
    latent: 512,
    rope: 64,
};
/// Fewer tiles of channels than warps; more, and steps of a product that do not divide by four.
const SMALL: [Widths; 2] = [
    Widths {
        heads: 5,
        latent: 48,
        rope: 16,
    },
    Widths {
        heads: 3,
        latent: 144,
        rope: 32,
    },
];

/// The programs of these kernels.
pub(crate) fn sources(kernels: &mut Kernels) -> Result<(), CompilationError> {
    let launch = Launch::unchecked(EVERY, kernel::UNITS as u32);
    let (float, int) = (bf16::elem_type_native(), i32::elem_type_native());
    kernels.add("mla attend bf16", launch, |settings, device, target| {
        kernel::attend::Attend::new(
            settings,
            device,
            target,
            buffer(),
            buffer(),
            buffer(),
            buffer(),
            buffer(),
            buffer(),
            buffer(),
            (),
            (),
            (),
            (),
            REPORT,
            float,
            int,
        )
    })?;
    merge(kernels, REPORT)?;
    for (shape, architectures) in SHAPES.into_iter().zip(ARCHITECTURES) {
        attend(kernels, REPORT, shape, architectures)?;
    }
    for widths in SMALL {
        for shape in SHAPES {
            attend(kernels, widths, shape, LARGE)?;
        }
        merge(kernels, widths)?;
    }
    Ok(())
}

/// Those with the most shared memory, in which every shape has room.
const LARGE: &[&str] = &["sm_90a"];
/// Where each of the shapes is launched at the report's widths. All have the last, for few rows.
const ARCHITECTURES: [&[&str]; 3] = [LARGE, &["sm_80"], &["sm_80", "sm_89", "sm_90a", "sm_120a"]];

fn of(widths: Widths) -> String {
    let Widths {
        heads,
        latent,
        rope,
    } = widths;
    format!("{heads} x {latent} + {rope}")
}

fn attend(
    kernels: &mut Kernels,
    widths: Widths,
    shape: Shape,
    architectures: &'static [&'static str],
) -> Result<(), CompilationError> {
    let launch = Launch::unchecked(architectures, shape.units as u32);
    let Shape {
        rows, keys, stages, ..
    } = shape;
    let name = format!("mla tensor cores {rows}x{keys}x{stages}, {}", of(widths));
    let int: ElemType = i32::elem_type_native();
    kernels.add(name, launch, |settings, device, target| {
        tensor_cores::attend_bf16::AttendBf16::new(
            settings,
            device,
            target,
            buffer(),
            buffer(),
            buffer(),
            buffer(),
            buffer(),
            buffer(),
            buffer(),
            (),
            (),
            (),
            (),
            widths,
            shape,
            int,
        )
    })
}

fn merge(kernels: &mut Kernels, widths: Widths) -> Result<(), CompilationError> {
    let launch = Launch::unchecked(EVERY, kernel::UNITS as u32);
    let (float, int) = (bf16::elem_type_native(), i32::elem_type_native());
    let name = format!("mla merge bf16, {}", of(widths));
    kernels.add(name, launch, |settings, device, target| {
        kernel::merge::Merge::new(
            settings,
            device,
            target,
            buffer(),
            buffer(),
            buffer(),
            buffer(),
            (),
            (),
            (),
            (),
            widths,
            float,
            int,
        )
    })
}
