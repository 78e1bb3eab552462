//! Launches of the matrix products.

#![allow(
    unsafe_code,
    reason = "kernels that check their indices themselves are launched unchecked"
)]

use burn::{
    backend::TensorMetadata,
    tensor::{DType, Shape, bf16},
};
use burn_cubecl::tensor::CubeTensor;
use cubecl::{prelude::*, zspace::shape};

use super::{Unsupported, aligned_rows, capability, expect_shape, fits, matrix};
use crate::fp8::{
    kernel::{hopper, portable},
    tiles::{TILE, Tile},
};

/// Codes in one copy of a kernel.
const CHUNK: usize = 16;

/// The product `a b^T` of quantised matrices, summed in single precision.
///
/// # Shapes
/// - `a_codes`: `[M, K]`, `a_scales`: `[M, ceil(K / 128)]`
/// - `b_codes`: `[N, K]`, `b_scales`: of [`Tile::scale_shape`]
/// - result: `[M, N]`, of type `dtype`: f32 or bf16
pub(crate) fn matmul_nt(
    (a_codes, a_scales): (CubeTensor, CubeTensor),
    (b_codes, b_scales): (CubeTensor, CubeTensor),
    b_tile: Tile,
    dtype: DType,
) -> Result<CubeTensor, Unsupported> {
    let [m, k] = codes("the left codes", &a_codes)?;
    let [n, _] = codes("the right codes", &b_codes)?;
    expect_shape("the right codes", &b_codes, [n, k])?;
    let a_scales = scales("the left scales", a_scales, Tile::Row.scale_shape([m, k]))?;
    let b_scales = scales("the right scales", b_scales, b_tile.scale_shape([n, k]))?;
    fits("the product", m * n)?;
    if !matches!(dtype, DType::F32 | DType::BF16) {
        return Err(Unsupported::ElementType {
            what: "the product",
            found: dtype,
            supported: "F32 and BF16",
        });
    }
    let client = a_codes.client.clone();
    let capability = capability(&client);
    let y = CubeTensor::new_contiguous(
        client.clone(),
        a_codes.device(),
        Shape::new([m, n]),
        client.empty(m * n * dtype.size()),
        dtype,
    );
    let product = Product {
        size: [m as u32, n as u32, k as u32],
        b_blocks: b_tile == Tile::Block,
        // Rows of an odd length start in the middle of a pair.
        width: if n.is_multiple_of(2) { 2 } else { 1 },
        client,
        a_codes,
        a_scales,
        b_codes,
        b_scales,
        y: y.clone(),
    };
    match (capability, dtype) {
        (Some(90), DType::F32) => product.hopper::<f32>(),
        (Some(90), _) => product.hopper::<bf16>(),
        // The others that have instructions for FP8 and no tensor memory.
        (Some(89 | 120 | 121), DType::F32) => product.portable::<f32>(),
        (Some(89 | 120 | 121), _) => product.portable::<bf16>(),
        _ => {
            return Err(Unsupported::Device {
                what: "the FP8 matrix product",
                found: device_name(&product.client),
                supported: "NVIDIA GPUs of compute capability 8.9, 9.0, 12.0 and 12.1",
            });
        }
    }
    Ok(y)
}

fn device_name(client: &Client) -> String {
    let identity = &client.properties().identity;
    format!("{} ({})", identity.name, identity.fingerprint)
}

/// The shape of codes that kernels can copy.
fn codes(what: &'static str, codes: &CubeTensor) -> Result<[usize; 2], Unsupported> {
    let [rows, inner] = matrix(what, codes)?;
    if codes.dtype != DType::U8 {
        return Err(Unsupported::ElementType {
            what,
            found: codes.dtype,
            supported: "U8",
        });
    }
    let &[pitch, 1] = &codes.meta.strides()[..] else {
        return Err(Unsupported::Alignment {
            what,
            pitch: codes.meta.strides()[0],
            offset: 0,
        });
    };
    let offset = codes.handle.offset_start.unwrap_or(0);
    if !pitch.is_multiple_of(CHUNK) || pitch < inner || !offset.is_multiple_of(CHUNK as u64) {
        return Err(Unsupported::Alignment {
            what,
            pitch,
            offset,
        });
    }
    fits(what, rows * pitch)?;
    Ok([rows, inner])
}

fn scales(
    what: &'static str,
    scales: CubeTensor,
    expected: [usize; 2],
) -> Result<CubeTensor, Unsupported> {
    expect_shape(what, &scales, expected)?;
    if scales.dtype != DType::F32 {
        return Err(Unsupported::ElementType {
            what,
            found: scales.dtype,
            supported: "F32",
        });
    }
    Ok(aligned_rows(scales))
}

/// A product whose operands have been checked.
struct Product {
    client: Client,
    a_codes: CubeTensor,
    a_scales: CubeTensor,
    b_codes: CubeTensor,
    b_scales: CubeTensor,
    y: CubeTensor,
    /// M, N, K.
    size: [u32; 3],
    b_blocks: bool,
    /// Elements of the result that are written at once.
    width: usize,
}

impl Product {
    fn hopper<O: Float>(self) {
        let [m, n, k] = self.size;
        let tiles = |columns: u32| m.div_ceil(hopper::ROWS) * n.div_ceil(columns);
        let processors = self
            .client
            .properties()
            .hardware
            .num_streaming_multiprocessors;
        // Narrow tiles where wide ones would leave multiprocessors without work.
        let columns = if tiles(128) < processors.unwrap_or(0) {
            64
        } else {
            128
        };
        let shape = hopper::shape(columns, self.b_blocks);
        let map = |codes: CubeTensor, rows: usize| {
            let boxes = TiledArgs {
                tile_size: shape![rows, TILE],
            };
            TensorMapArg::new(boxes, codes.into_tensor_arg(), u8::elem_type_native())
                .with_swizzle(TensorMapSwizzle::B128)
                .with_prefetch(TensorMapPrefetch::B256)
        };
        // SAFETY: rows and columns beyond the matrices are neither read (the tensor memory accelerator writes zeros
        // for them, scales are those of the last) nor written; loops are counted.
        unsafe {
            hopper::multiply::launch_unchecked::<O>(
                &self.client,
                CubeCount::Static(tiles(columns), 1, 1),
                CubeDim::new_1d(hopper::UNITS),
                self.width,
                columns as usize / 2,
                map(self.a_codes, hopper::ROWS as usize),
                self.a_scales.into_buffer_arg(),
                map(self.b_codes, columns as usize),
                self.b_scales.into_buffer_arg(),
                self.y.into_buffer_arg(),
                m,
                n,
                k,
                shape,
            );
        }
    }

    fn portable<O: Float>(self) {
        let [m, n, k] = self.size;
        let pitch = |codes: &CubeTensor| (codes.meta.strides()[0] / CHUNK) as u32;
        let (a_pitch, b_pitch) = (pitch(&self.a_codes), pitch(&self.b_codes));
        let (down, across) = (
            m.div_ceil(portable::CUBE_TILE),
            n.div_ceil(portable::CUBE_TILE),
        );
        // SAFETY: copies start inside of the matrices and end with the row, scales and results beyond them are
        // neither read nor written; loops are counted.
        unsafe {
            portable::multiply::launch_unchecked::<O>(
                &self.client,
                CubeCount::Static(down, across, 1),
                CubeDim::new_1d(portable::UNITS),
                self.width,
                self.a_codes.into_buffer_arg(),
                self.a_scales.into_buffer_arg(),
                self.b_codes.into_buffer_arg(),
                self.b_scales.into_buffer_arg(),
                self.y.into_buffer_arg(),
                m,
                n,
                k,
                a_pitch,
                b_pitch,
                self.b_blocks,
            );
        }
    }
}
