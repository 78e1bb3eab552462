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
use crate::{
    cube::{elem, empty},
    fp8::{
        kernel::{grouped, hopper, portable},
        tiles::{TILE, Tile},
    },
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
    expect_shape("the right codes", &b_codes, &[n, k])?;
    let a_scales = scales("the left scales", a_scales, Tile::Row.scale_shape([m, k]))?;
    let b_scales = scales("the right scales", b_scales, b_tile.scale_shape([n, k]))?;
    let operands = [a_codes, a_scales, b_codes, b_scales];
    let b_blocks = b_tile == Tile::Block;
    multiply(operands, [m, n, k], b_blocks, Groups::None, dtype)
}

/// The product of every expert's segment of rows of A with the transposed matrix of the expert; zero behind the last
/// segment. Segments are padded to a multiple of 128 rows.
///
/// # Shapes
/// - `a_codes`: `[S, K]`, `a_scales`: `[S, ceil(K / 128)]`
/// - `b_codes`: `[E N, K]`, `b_scales`: `[E ceil(N / 128), ceil(K / 128)]`
/// - `counts`: `[E]`, integers
/// - result: `[S, N]`, of type `dtype`: f32 or bf16
pub(crate) fn grouped_matmul_nt(
    (a_codes, a_scales): (CubeTensor, CubeTensor),
    (b_codes, b_scales): (CubeTensor, CubeTensor),
    counts: CubeTensor,
    dtype: DType,
) -> Result<CubeTensor, Unsupported> {
    let [m, k] = codes("the left codes", &a_codes)?;
    let [rows, _] = codes("the right codes", &b_codes)?;
    let experts = counts.shape().num_elements();
    if experts == 0 {
        return Err(Unsupported::Empty { what: "the counts" });
    }
    let n = rows.div_ceil(experts);
    expect_shape("the right codes", &b_codes, &[experts * n, k])?;
    let a_scales = scales("the left scales", a_scales, Tile::Row.scale_shape([m, k]))?;
    let [down, across] = Tile::Block.scale_shape([n, k]);
    let b_scales = scales("the right scales", b_scales, [experts * down, across])?;
    let groups = Groups::OfRows(tile_experts(counts, m.div_ceil(TILE)), experts as u32);
    let operands = [a_codes, a_scales, b_codes, b_scales];
    multiply(operands, [m, n, k], true, groups, dtype)
}

/// The product `a_e b_e^T` of every segment of the inner size, one below another; zero for empty segments. Segments are
/// padded to a multiple of 128.
///
/// # Shapes
/// - `a_codes`: `[M, S]`, `a_scales`: `[M, ceil(S / 128)]`; `b_codes`, `b_scales` the same of N rows
/// - `counts`: `[E]`, integers
/// - result: `[E M, N]`, of type `dtype`: f32 or bf16
pub(crate) fn segments_matmul_nt(
    (a_codes, a_scales): (CubeTensor, CubeTensor),
    (b_codes, b_scales): (CubeTensor, CubeTensor),
    counts: CubeTensor,
    dtype: DType,
) -> Result<CubeTensor, Unsupported> {
    let [m, k] = codes("the left codes", &a_codes)?;
    let [n, _] = codes("the right codes", &b_codes)?;
    expect_shape("the right codes", &b_codes, &[n, k])?;
    let a_scales = scales("the left scales", a_scales, Tile::Row.scale_shape([m, k]))?;
    let b_scales = scales("the right scales", b_scales, Tile::Row.scale_shape([n, k]))?;
    let experts = counts.shape().num_elements();
    if experts == 0 {
        return Err(Unsupported::Empty { what: "the counts" });
    }
    let groups = Groups::OfTheInnerSize(segment_starts(counts), experts as u32);
    let operands = [a_codes, a_scales, b_codes, b_scales];
    multiply(operands, [m, n, k], false, groups, dtype)
}

/// The expert of each of `tiles` tiles of 128 rows, the number of experts for those behind the last segment.
///
/// # Shapes
/// - `counts`: `[E]`, i32, i64 or u32
/// - result: `[tiles]`, u32
pub(crate) fn tile_experts(counts: CubeTensor, tiles: usize) -> CubeTensor {
    let out = empty(&counts, [tiles], DType::U32);
    let (client, dtype) = (counts.client.clone(), elem(&counts));
    let dim = CubeDim::new_1d(grouped::UNITS);
    grouped::tile_experts::launch(
        &client,
        CubeCount::new_1d(tiles.div_ceil(grouped::UNITS as usize) as u32),
        dim,
        aligned_rows(counts).into_buffer_arg(),
        out.clone().into_buffer_arg(),
        dtype,
    );
    out
}

/// The first tile of every segment, and the one behind the last.
///
/// # Shapes
/// - `counts`: `[E]`, i32, i64 or u32
/// - result: `[E + 1]`, u32
pub(crate) fn segment_starts(counts: CubeTensor) -> CubeTensor {
    let starts = counts.shape().num_elements() + 1;
    let out = empty(&counts, [starts], DType::U32);
    let (client, dtype) = (counts.client.clone(), elem(&counts));
    grouped::segment_starts::launch(
        &client,
        CubeCount::new_1d(starts.div_ceil(grouped::UNITS as usize) as u32),
        CubeDim::new_1d(grouped::UNITS),
        aligned_rows(counts).into_buffer_arg(),
        out.clone().into_buffer_arg(),
        dtype,
    );
    out
}

/// What of a product belongs to which expert.
enum Groups {
    None,
    /// The expert of each tile of rows of A and the number of experts, of whose matrices each has N rows.
    OfRows(CubeTensor, u32),
    /// The first block of each expert's segment and the number of experts.
    OfTheInnerSize(CubeTensor, u32),
}

impl Groups {
    /// Results, one below another.
    fn results(&self) -> u32 {
        match self {
            Self::OfTheInnerSize(_, experts) => *experts,
            Self::None | Self::OfRows(..) => 1,
        }
    }
}

/// A product of operands that have been checked.
fn multiply(
    [a_codes, a_scales, b_codes, b_scales]: [CubeTensor; 4],
    [m, n, k]: [usize; 3],
    b_blocks: bool,
    groups: Groups,
    dtype: DType,
) -> Result<CubeTensor, Unsupported> {
    let results = groups.results() as usize;
    fits("the product", results * m * n)?;
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
        Shape::new([results * m, n]),
        client.empty(results * m * n * dtype.size()),
        dtype,
    );
    let product = Product {
        size: [m as u32, n as u32, k as u32],
        b_blocks,
        groups,
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
    expect_shape(what, &scales, &expected)?;
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
    groups: Groups,
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
        let results = self.groups.results();
        let count = CubeCount::Static(tiles(columns), results, 1);
        let dim = CubeDim::new_1d(hopper::UNITS);
        let (a, b) = (
            map(self.a_codes, hopper::ROWS as usize),
            map(self.b_codes, columns as usize),
        );
        let (a_scales, b_scales) = (
            self.a_scales.into_buffer_arg(),
            self.b_scales.into_buffer_arg(),
        );
        let (client, width, sums) = (self.client, self.width, columns as usize / 2);
        let y = self.y.into_buffer_arg();
        match self.groups {
            // SAFETY: rows and columns beyond the matrices are neither read (the tensor memory accelerator writes
            // zeros for them, scales are those of the last) nor written; loops are counted.
            Groups::None => unsafe {
                hopper::multiply::launch_unchecked::<O>(
                    &client, count, dim, width, sums, a, a_scales, b, b_scales, y, m, n, k, shape,
                );
            },
            // SAFETY: as above. There is an expert for every tile of rows, and those that are none read the first's.
            Groups::OfRows(tile_experts, experts) => unsafe {
                let tile_experts = tile_experts.into_buffer_arg();
                hopper::multiply_grouped::launch_unchecked::<O>(
                    &client,
                    count,
                    dim,
                    width,
                    sums,
                    a,
                    a_scales,
                    b,
                    b_scales,
                    tile_experts,
                    y,
                    m,
                    n,
                    k,
                    experts,
                    shape,
                );
            },
            // SAFETY: as above. There is a start for every cube in Y and one more.
            Groups::OfTheInnerSize(starts, _) => unsafe {
                let starts = starts.into_buffer_arg();
                hopper::multiply_segments::launch_unchecked::<O>(
                    &client, count, dim, width, sums, a, a_scales, b, b_scales, starts, y, m, n, k,
                    shape,
                );
            },
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
        let results = self.groups.results();
        let count = CubeCount::Static(down, across, results);
        let dim = CubeDim::new_1d(portable::UNITS);
        let [a, a_scales, b, b_scales, y] = [
            self.a_codes,
            self.a_scales,
            self.b_codes,
            self.b_scales,
            self.y,
        ]
        .map(CubeTensor::into_buffer_arg);
        let (client, width, b_blocks) = (self.client, self.width, self.b_blocks);
        match self.groups {
            // SAFETY: copies start inside of the matrices and end with the row, scales and results beyond them are
            // neither read nor written; loops are counted.
            Groups::None => unsafe {
                portable::multiply::launch_unchecked::<O>(
                    &client, count, dim, width, a, a_scales, b, b_scales, y, m, n, k, a_pitch,
                    b_pitch, b_blocks,
                );
            },
            // SAFETY: as above. There is an expert for every tile of rows, and those that are none read the first's.
            Groups::OfRows(tile_experts, experts) => unsafe {
                let tile_experts = tile_experts.into_buffer_arg();
                portable::multiply_grouped::launch_unchecked::<O>(
                    &client,
                    count,
                    dim,
                    width,
                    a,
                    a_scales,
                    b,
                    b_scales,
                    tile_experts,
                    y,
                    m,
                    n,
                    k,
                    a_pitch,
                    b_pitch,
                    experts,
                );
            },
            // SAFETY: as above. There is a start for every cube in Z and one more.
            Groups::OfTheInnerSize(starts, _) => unsafe {
                let starts = starts.into_buffer_arg();
                portable::multiply_segments::launch_unchecked::<O>(
                    &client, count, dim, width, a, a_scales, b, b_scales, starts, y, m, n, k,
                    a_pitch, b_pitch,
                );
            },
        }
    }
}
