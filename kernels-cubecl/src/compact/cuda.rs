//! What of these kernels is compiled without a device.

use cubecl::{CompilationError, prelude::*};

use super::kernel::*;
use crate::cuda_source::{EVERY, Kernels, Launch, buffer as b};

/// The programs of these kernels.
#[rustfmt::skip]
pub(crate) fn sources(kernels: &mut Kernels) -> Result<(), CompilationError> {
    let few = Launch::unchecked(EVERY, UNITS as u32);
    for (name, fp8) in [("bf16", false), ("fp8", true)] {
        for rows in [1, ROWS] {
            kernels.add(format!("compact {name}, {rows} rows"), few, |s, d, t| {
                few_rows::FewRows::new(s, d, t, b(), b(), b(), b(), (), (), rows, fp8)
            })?;
            kernels.add(format!("compact {name}, {rows} rows by segment"), few, |s, d, t| {
                few_rows_by_segment::FewRowsBySegment::new(s, d, t, b(), b(), b(), b(), b(), (), (), rows, fp8)
            })?;
        }
        kernels.add(format!("compact {name}, widened"), Launch::checked(CubeDim::new_1d(256)), |s, d, t| {
            widen::Widen::new(s, d, t, b(), b(), b(), (), (), fp8)
        })?;
    }
    Ok(())
}
