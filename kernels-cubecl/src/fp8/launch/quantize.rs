//! Launches of the quantising kernels.

#![allow(
    unsafe_code,
    reason = "kernels that check their indices themselves are launched unchecked"
)]

use burn::{
    backend::TensorMetadata,
    tensor::{DType, Shape, bf16},
};
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

use super::{Unsupported, aligned_rows, capability, expect_shape, fits, matrix};
use crate::fp8::{
    kernel::quantize::{
        BLOCK_UNITS, ROW_TILES, ROW_UNITS, TRANSPOSED_COLUMNS, quantize_blocks, quantize_rows,
        quantize_transposed as transposed, rms_norm_quantize_rows, swiglu_quantize_rows,
    },
    tiles::{ScaleFormat, TILE, Tile},
};

/// Codes and scales of a matrix in rows' tiles or blocks. Rows of codes are a multiple of 128 bytes apart on CUDA
/// devices, and zero beyond the matrix.
///
/// # Shapes
/// - `x`: `[R, C]`, f32 or (on CUDA) bf16
/// - result: `[R, C]`, bytes on CUDA and i32 elsewhere, and the scales of [`Tile::scale_shape`]
pub(crate) fn quantize(
    x: CubeTensor,
    tile: Tile,
    format: ScaleFormat,
) -> Result<(CubeTensor, CubeTensor), Unsupported> {
    let [rows, columns] = matrix("the matrix to quantise", &x)?;
    let x = aligned_rows(x);
    let out = Quantized::empty(&x, [rows, columns], tile.scale_shape([rows, columns]))?;
    let width = width(&x, &[columns, out.pitch]);
    let launch = Launch::new(&x, [rows, columns], &out, tile, format)?;
    let cubes = match tile {
        Tile::Row => (rows * columns.div_ceil(TILE)).div_ceil(ROW_TILES as usize),
        Tile::Block => out.scales.meta.shape().num_elements(),
    };
    let count = grid(&launch.client, cubes);
    macro_rules! launch {
        ($kernel:ident, $units:expr, $float:ty, $code:ty) => {
            // SAFETY: the kernel's indices stay in the shapes that it is told, which are those of its buffers, and
            // its loops are counted.
            unsafe {
                $kernel::launch_unchecked::<$float, $code>(
                    &launch.client,
                    count,
                    CubeDim::new_1d($units),
                    width,
                    x.into_buffer_arg(),
                    out.codes.clone().into_buffer_arg(),
                    out.scales.clone().into_buffer_arg(),
                    launch.rows,
                    launch.columns,
                    launch.pitch,
                    launch.floor,
                    launch.power_of_two,
                    launch.native,
                )
            }
        };
    }
    match (tile, x.dtype, out.codes.dtype) {
        (Tile::Row, DType::F32, DType::U8) => launch!(quantize_rows, ROW_UNITS, f32, u8),
        (Tile::Row, DType::F32, _) => launch!(quantize_rows, ROW_UNITS, f32, i32),
        (Tile::Row, ..) => launch!(quantize_rows, ROW_UNITS, bf16, u8),
        (Tile::Block, DType::F32, DType::U8) => launch!(quantize_blocks, BLOCK_UNITS, f32, u8),
        (Tile::Block, DType::F32, _) => launch!(quantize_blocks, BLOCK_UNITS, f32, i32),
        (Tile::Block, ..) => launch!(quantize_blocks, BLOCK_UNITS, bf16, u8),
    }
    Ok((out.codes, out.scales))
}

/// Codes and scales of the transposed matrix in rows' tiles, which are tiles of 128 rows of `x`: for the gradient of a
/// weight, whose inner size is the number of tokens.
///
/// # Shapes
/// - `x`: `[R, C]`, as for [`quantize`]
/// - result: `[C, R]` and `[C, ceil(R / 128)]`
pub(crate) fn quantize_transposed(
    x: CubeTensor,
    format: ScaleFormat,
) -> Result<(CubeTensor, CubeTensor), Unsupported> {
    let [rows, columns] = matrix("the matrix to quantise", &x)?;
    let x = aligned_rows(x);
    let out = Quantized::empty(&x, [columns, rows], [columns, rows.div_ceil(TILE)])?;
    let launch = Launch::new(&x, [rows, columns], &out, Tile::Row, format)?;
    let across = columns.div_ceil(TRANSPOSED_COLUMNS as usize);
    let down = rows.div_ceil(TILE);
    let (_, most, _) = launch.client.properties().hardware.max_cube_count;
    if down > most as usize {
        let what = "the matrix to quantise";
        return Err(Unsupported::Size {
            what,
            elements: rows * columns,
        });
    }
    let count = CubeCount::Static(across as u32, down as u32, 1);
    macro_rules! launch {
        ($float:ty, $code:ty) => {
            // SAFETY: as in `quantize`.
            unsafe {
                transposed::launch_unchecked::<$float, $code>(
                    &launch.client,
                    count,
                    CubeDim::new_1d(BLOCK_UNITS),
                    x.into_buffer_arg(),
                    out.codes.clone().into_buffer_arg(),
                    out.scales.clone().into_buffer_arg(),
                    launch.rows,
                    launch.columns,
                    launch.pitch,
                    launch.floor,
                    launch.power_of_two,
                    launch.native,
                )
            }
        };
    }
    match (x.dtype, out.codes.dtype) {
        (DType::F32, DType::U8) => launch!(f32, u8),
        (DType::F32, _) => launch!(f32, i32),
        _ => launch!(bf16, u8),
    }
    Ok((out.codes, out.scales))
}

/// Codes and scales of `silu(gate) * up`, computed in single precision, in rows' tiles.
///
/// # Shapes
/// - `gate`, `up`: `[R, C]`, as for [`quantize`]
/// - result: `[R, C]` and `[R, ceil(C / 128)]`
pub(crate) fn swiglu_quantize(
    gate: CubeTensor,
    up: CubeTensor,
    format: ScaleFormat,
) -> Result<(CubeTensor, CubeTensor), Unsupported> {
    let [rows, columns] = matrix("the gates", &gate)?;
    expect_shape("the factors of the gates", &up, &[rows, columns])?;
    if up.dtype != gate.dtype {
        return Err(Unsupported::ElementType {
            what: "the factors of the gates",
            found: up.dtype,
            supported: "those of the gates",
        });
    }
    let (gate, up) = (aligned_rows(gate), aligned_rows(up));
    let out = Quantized::empty(
        &gate,
        [rows, columns],
        Tile::Row.scale_shape([rows, columns]),
    )?;
    let launch = Launch::new(&gate, [rows, columns], &out, Tile::Row, format)?;
    let width = width(&gate, &[columns, out.pitch]).min(width(&up, &[columns]));
    let count = grid(
        &launch.client,
        (rows * columns.div_ceil(TILE)).div_ceil(ROW_TILES as usize),
    );
    macro_rules! launch {
        ($float:ty, $code:ty) => {
            // SAFETY: as in `quantize`.
            unsafe {
                swiglu_quantize_rows::launch_unchecked::<$float, $code>(
                    &launch.client,
                    count,
                    CubeDim::new_1d(ROW_UNITS),
                    width,
                    gate.into_buffer_arg(),
                    up.into_buffer_arg(),
                    out.codes.clone().into_buffer_arg(),
                    out.scales.clone().into_buffer_arg(),
                    launch.rows,
                    launch.columns,
                    launch.pitch,
                    launch.floor,
                    launch.power_of_two,
                    launch.native,
                )
            }
        };
    }
    match (gate.dtype, out.codes.dtype) {
        (DType::F32, DType::U8) => launch!(f32, u8),
        (DType::F32, _) => launch!(f32, i32),
        _ => launch!(bf16, u8),
    }
    Ok((out.codes, out.scales))
}

/// Codes and scales of `x / sqrt(mean(x^2) + epsilon) * weight`, the mean over each row, computed in single precision,
/// in rows' tiles.
///
/// # Shapes
/// - `x`: `[R, C]`, as for [`quantize`]; `weight`: `[C]`, of the same type
/// - result: `[R, C]` and `[R, ceil(C / 128)]`
pub(crate) fn rms_norm_quantize(
    x: CubeTensor,
    weight: CubeTensor,
    epsilon: f32,
    format: ScaleFormat,
) -> Result<(CubeTensor, CubeTensor), Unsupported> {
    let [rows, columns] = matrix("the matrix to normalise", &x)?;
    expect_shape("the weight of the norm", &weight, &[columns])?;
    if weight.dtype != x.dtype {
        return Err(Unsupported::ElementType {
            what: "the weight of the norm",
            found: weight.dtype,
            supported: "those of the matrix to normalise",
        });
    }
    let (x, weight) = (aligned_rows(x), aligned_rows(weight));
    let out = Quantized::empty(&x, [rows, columns], Tile::Row.scale_shape([rows, columns]))?;
    let launch = Launch::new(&x, [rows, columns], &out, Tile::Row, format)?;
    let width = width(&x, &[columns, out.pitch]).min(width(&weight, &[columns]));
    let count = grid(&launch.client, rows);
    macro_rules! launch {
        ($float:ty, $code:ty) => {
            // SAFETY: as in `quantize`.
            unsafe {
                rms_norm_quantize_rows::launch_unchecked::<$float, $code>(
                    &launch.client,
                    count,
                    CubeDim::new_1d(ROW_UNITS),
                    width,
                    x.into_buffer_arg(),
                    weight.into_buffer_arg(),
                    out.codes.clone().into_buffer_arg(),
                    out.scales.clone().into_buffer_arg(),
                    launch.rows,
                    launch.columns,
                    launch.pitch,
                    epsilon,
                    launch.floor,
                    launch.power_of_two,
                    launch.native,
                )
            }
        };
    }
    match (x.dtype, out.codes.dtype) {
        (DType::F32, DType::U8) => launch!(f32, u8),
        (DType::F32, _) => launch!(f32, i32),
        _ => launch!(bf16, u8),
    }
    Ok((out.codes, out.scales))
}

/// What all quantisations are told.
struct Launch {
    client: Client,
    rows: u32,
    columns: u32,
    pitch: u32,
    floor: f32,
    power_of_two: bool,
    /// Whether the device converts to E4M3 in an instruction.
    native: bool,
}

impl Launch {
    fn new(
        x: &CubeTensor,
        [rows, columns]: [usize; 2],
        out: &Quantized,
        tile: Tile,
        format: ScaleFormat,
    ) -> Result<Self, Unsupported> {
        let client = x.client.clone();
        let capability = capability(&client);
        match (x.dtype, capability) {
            (DType::F32, _) | (DType::BF16, Some(_)) => {}
            (found, _) => {
                return Err(Unsupported::ElementType {
                    what: "the matrix to quantise",
                    found,
                    supported: "F32, and BF16 on CUDA devices,",
                });
            }
        }
        Ok(Self {
            rows: rows as u32,
            columns: columns as u32,
            pitch: out.pitch as u32,
            floor: tile.floor(),
            power_of_two: format == ScaleFormat::PowerOfTwo,
            native: capability.is_some_and(|capability| capability >= 89),
            client,
        })
    }
}

/// A quantised matrix that is not yet written.
struct Quantized {
    codes: CubeTensor,
    scales: CubeTensor,
    /// Codes from row to row.
    pitch: usize,
}

impl Quantized {
    fn empty(
        like: &CubeTensor,
        [rows, columns]: [usize; 2],
        scales: [usize; 2],
    ) -> Result<Self, Unsupported> {
        let (client, device) = (like.client.clone(), like.device());
        let (dtype, pitch) = match capability(&client) {
            Some(_) => (DType::U8, columns.next_multiple_of(TILE)),
            // Kernels elsewhere write four codes at a time in the transposed order, and rows of any length otherwise.
            None => (DType::I32, columns.next_multiple_of(4)),
        };
        fits("the quantised matrix", rows * pitch)?;
        let codes = client.empty(rows * pitch * dtype.size());
        let mut codes = CubeTensor::new_contiguous(
            client.clone(),
            device.clone(),
            Shape::new([rows, pitch]),
            codes,
            dtype,
        );
        codes.meta.shape_mut()[1] = columns;
        let size = scales[0] * scales[1] * size_of::<f32>();
        let scales = CubeTensor::new_contiguous(
            client.clone(),
            device,
            Shape::new(scales),
            client.empty(size),
            DType::F32,
        );
        Ok(Self {
            codes,
            scales,
            pitch,
        })
    }
}

/// Elements that are read and written at a time: four where every row starts at a multiple of that.
fn width(x: &CubeTensor, rows: &[usize]) -> usize {
    let four = 4 * x.dtype.size() as u64;
    let aligned = x.handle.offset_start.unwrap_or(0).is_multiple_of(four);
    if aligned && rows.iter().all(|row| row.is_multiple_of(4)) {
        4
    } else {
        1
    }
}

/// At least so many cubes, in rows of at most 65535.
fn grid(client: &Client, cubes: usize) -> CubeCount {
    let (most, ..) = client.properties().hardware.max_cube_count;
    let across = cubes.min((most as usize).min(65_535));
    CubeCount::Static(across as u32, cubes.div_ceil(across) as u32, 1)
}
