//! Quantisation: f32 or bf16 to E4M3 codes and scales, by the rules of [`Tile::scale`](crate::fp8::Tile::scale) and
//! [`encode`](crate::fp8::e4m3::encode), bit for bit.
//!
//! Everything that decides is integer arithmetic on the bits of single-precision numbers, so that no device's maximum
//! (which may drop NaN) or logarithm (which rounds as it likes) has a say. The one exception are the quotients by 448
//! and by the scale, which have to be rounded correctly: CUDA does, other devices may be one code off.
//!
//! Reductions go through shared memory and assume nothing of planes. Codes are written with rows of `pitch` elements;
//! what is beyond the matrix in a row is zero.

use cubecl::prelude::*;

use super::TILE;

/// Units of a cube that quantises rows' tiles, and of those that quantise blocks or transpose.
pub(crate) const ROW_UNITS: u32 = 128;
pub(crate) const BLOCK_UNITS: u32 = 256;
/// Units that share a row's tile, and the elements of each.
const TILE_UNITS: u32 = 16;
const UNIT_ELEMENTS: usize = 8;
/// Tiles of a cube that quantises rows' tiles.
pub(crate) const ROW_TILES: u32 = ROW_UNITS / TILE_UNITS;
/// Columns of a cube that transposes.
pub(crate) const TRANSPOSED_COLUMNS: u32 = 32;

/// The bits of a number's magnitude. Their order is that of the magnitudes, with infinity and NaN above all others.
#[cube]
fn magnitude(value: f32) -> u32 {
    u32::reinterpret(value) & 0x7fff_ffffu32
}

/// The scale of a tile whose largest magnitude has these bits.
#[cube]
fn tile_scale(largest: u32, floor: f32, #[comptime] power_of_two: bool) -> f32 {
    let floored = f32::reinterpret(max(largest, u32::reinterpret(floor)));
    let exact = u32::reinterpret(floored / 448.0f32);
    let mut bits = exact;
    if comptime!(power_of_two) {
        // Up to the next exponent unless the mantissa is zero, from the least normal number on.
        bits = (max(exact, 0x0080_0000u32) + 0x007f_ffffu32) & 0xff80_0000u32;
    }
    let one_for_zeros = select(exact == 0u32, 0x3f80_0000u32, bits);
    f32::reinterpret(select(
        largest >= 0x7f80_0000u32,
        0x7fc0_0000u32,
        one_for_zeros,
    ))
}

/// The code of a number.
#[cube]
fn encode(value: f32, #[comptime] native: bool) -> u32 {
    if comptime!(native) {
        let code: u32;
        gpu_asm!(
            "{{ .reg .b16 pair; cvt.rn.satfinite.e4m3x2.f32 pair, 0f00000000, {value}; cvt.u32.u16 {code}, pair; }}",
            code = out(_) code,
            value = in(_) value,
            options(pure, nomem),
        );
        code
    } else {
        let magnitude = magnitude(value);
        let sign = (u32::reinterpret(value) >> 24u32) & 0x80u32;
        // Exponent and three bits of mantissa, rounded to even; exponents of E4M3 are 120 less.
        let rounded = (magnitude + 0x0007_ffffu32 + ((magnitude >> 20u32) & 1u32)) >> 20u32;
        let normal = min(rounded - 960u32, 0x7eu32);
        // Below 2^-6 codes are steps of 2^-9, the last place of 2^14: adding that rounds to even.
        let subnormal = u32::reinterpret(f32::reinterpret(magnitude) + 16384.0f32) - 0x4680_0000u32;
        let finite = sign | select(magnitude < 0x3c80_0000u32, subnormal, normal);
        select(magnitude > 0x7f80_0000u32, 0x7fu32, finite)
    }
}

/// Quantises a tile of which each of [`TILE_UNITS`] neighbouring units has [`UNIT_ELEMENTS`] elements; all units of
/// the cube must come here. Writes the codes of elements from `start` on, every unit's vectors as far apart as they
/// were read, and returns the scale.
#[cube]
fn quantize_tile<C: Int, N: Size>(
    values: &Array<f32>,
    codes: &mut [Vector<C, N>],
    start: u32,
    end: u32,
    floor: f32,
    #[comptime] power_of_two: bool,
    #[comptime] native: bool,
) -> f32 {
    let width = N::value().comptime();
    let mut shared = Shared::<[u32]>::new_slice(comptime!(ROW_UNITS as usize));
    let mut largest = 0u32;
    #[unroll]
    for i in 0..UNIT_ELEMENTS {
        largest = max(largest, magnitude(values[i]));
    }
    shared[UNIT_POS as usize] = largest;
    sync_cube();
    let group = UNIT_POS / TILE_UNITS * TILE_UNITS;
    #[unroll]
    for i in 0..TILE_UNITS {
        largest = max(largest, shared[(group + i) as usize]);
    }
    let scale = tile_scale(largest, floor, power_of_two);
    #[unroll]
    for i in 0..comptime!(UNIT_ELEMENTS / width) {
        let at = start + (i as u32 * TILE_UNITS + UNIT_POS % TILE_UNITS) * width as u32;
        if at < end {
            let mut vector = Vector::<C, N>::empty();
            #[unroll]
            for j in 0..width {
                let code = encode(values[comptime!(i * width + j)] / scale, native);
                vector.insert(j, C::cast_from(code));
            }
            codes[at as usize / width] = vector;
        }
    }
    scale
}

/// Rows' tiles: codes `[R, pitch]`, scales `[R, ceil(C / 128)]`. A cube has [`ROW_TILES`] tiles.
#[cube(launch_unchecked)]
pub(crate) fn quantize_rows<F: Float, C: Int, N: Size>(
    x: &[Vector<F, N>],
    codes: &mut [Vector<C, N>],
    scales: &mut [f32],
    rows: u32,
    columns: u32,
    pitch: u32,
    floor: f32,
    #[comptime] power_of_two: bool,
    #[comptime] native: bool,
) {
    let width = N::value().comptime();
    let across = columns.div_ceil(TILE);
    let tile = CUBE_POS as u32 * ROW_TILES + UNIT_POS / TILE_UNITS;
    let (row, first) = (tile / across, tile % across * TILE);
    let mut values = Array::<f32>::new(UNIT_ELEMENTS);
    #[unroll]
    for i in 0..comptime!(UNIT_ELEMENTS / width) {
        let column = first + (i as u32 * TILE_UNITS + UNIT_POS % TILE_UNITS) * width as u32;
        let mut vector = Vector::<f32, N>::zeroed();
        if row < rows && column < columns {
            vector = Vector::cast_from(x[(row * columns + column) as usize / width]);
        }
        #[unroll]
        for j in 0..width {
            values[comptime!(i * width + j)] = vector.extract(j);
        }
    }
    let start = row * pitch + first;
    let end = select(row < rows, (row + 1) * pitch, 0u32);
    let scale = quantize_tile::<C, N>(&values, codes, start, end, floor, power_of_two, native);
    let lane = UNIT_POS % TILE_UNITS;
    if row < rows && lane == 0 {
        scales[tile as usize] = scale;
    }
}

/// [`quantize_rows`] of `silu(gate) * up`, computed in single precision.
#[cube(launch_unchecked)]
pub(crate) fn swiglu_quantize_rows<F: Float, C: Int, N: Size>(
    gate: &[Vector<F, N>],
    up: &[Vector<F, N>],
    codes: &mut [Vector<C, N>],
    scales: &mut [f32],
    rows: u32,
    columns: u32,
    pitch: u32,
    floor: f32,
    #[comptime] power_of_two: bool,
    #[comptime] native: bool,
) {
    let width = N::value().comptime();
    let across = columns.div_ceil(TILE);
    let tile = CUBE_POS as u32 * ROW_TILES + UNIT_POS / TILE_UNITS;
    let (row, first) = (tile / across, tile % across * TILE);
    let mut values = Array::<f32>::new(UNIT_ELEMENTS);
    #[unroll]
    for i in 0..comptime!(UNIT_ELEMENTS / width) {
        let column = first + (i as u32 * TILE_UNITS + UNIT_POS % TILE_UNITS) * width as u32;
        let mut gates = Vector::<f32, N>::zeroed();
        let mut ups = Vector::<f32, N>::zeroed();
        if row < rows && column < columns {
            let at = (row * columns + column) as usize / width;
            gates = Vector::cast_from(gate[at]);
            ups = Vector::cast_from(up[at]);
        }
        #[unroll]
        for j in 0..width {
            let g = gates.extract(j);
            values[comptime!(i * width + j)] = g / (1.0f32 + (-g).exp()) * ups.extract(j);
        }
    }
    let start = row * pitch + first;
    let end = select(row < rows, (row + 1) * pitch, 0u32);
    let scale = quantize_tile::<C, N>(&values, codes, start, end, floor, power_of_two, native);
    let lane = UNIT_POS % TILE_UNITS;
    if row < rows && lane == 0 {
        scales[tile as usize] = scale;
    }
}

/// The sum of one number per unit, to all units of a cube of [`ROW_UNITS`], in an order that does not depend on time.
#[cube]
fn sum_of_cube(own: f32) -> f32 {
    let mut sums = Shared::<[f32]>::new_slice(comptime!(ROW_UNITS as usize));
    sums[UNIT_POS as usize] = own;
    sync_cube();
    let mut active = comptime!(ROW_UNITS / 2).runtime();
    while active > 0 {
        if UNIT_POS < active {
            let other = sums[(UNIT_POS + active) as usize];
            sums[UNIT_POS as usize] += other;
        }
        sync_cube();
        active /= 2;
    }
    sums[0]
}

/// [`quantize_rows`] of rows over their root mean square, times `weight`, computed in single precision. A cube has a
/// row and reads it twice, for the squares of all of it and then for its tiles, the second time from the cache.
#[cube(launch_unchecked)]
pub(crate) fn rms_norm_quantize_rows<F: Float, C: Int, N: Size>(
    x: &[Vector<F, N>],
    weight: &[Vector<F, N>],
    codes: &mut [Vector<C, N>],
    scales: &mut [f32],
    rows: u32,
    columns: u32,
    pitch: u32,
    epsilon: f32,
    floor: f32,
    #[comptime] power_of_two: bool,
    #[comptime] native: bool,
) {
    let row = CUBE_POS as u32;
    if row >= rows {
        terminate!();
    }
    let width = N::value().comptime();
    let step = comptime!(ROW_UNITS * width as u32);
    let mut squares = 0.0f32;
    for column in range_stepped(UNIT_POS * width as u32, columns, step) {
        let vector: Vector<f32, N> =
            Vector::cast_from(x[(row * columns + column) as usize / width]);
        #[unroll]
        for j in 0..width {
            let value = vector.extract(j);
            squares += value * value;
        }
    }
    let mean = sum_of_cube(squares) / f32::cast_from(columns);
    let factor = 1.0f32 / (mean + epsilon).sqrt();

    let across = columns.div_ceil(TILE);
    for tiles in range_stepped(0u32, across, ROW_TILES) {
        let tile = tiles + UNIT_POS / TILE_UNITS;
        let first = tile * TILE;
        let mut values = Array::<f32>::new(UNIT_ELEMENTS);
        #[unroll]
        for i in 0..comptime!(UNIT_ELEMENTS / width) {
            let column = first + (i as u32 * TILE_UNITS + UNIT_POS % TILE_UNITS) * width as u32;
            let mut vector = Vector::<f32, N>::zeroed();
            let mut weights = Vector::<f32, N>::zeroed();
            if column < columns {
                vector = Vector::cast_from(x[(row * columns + column) as usize / width]);
                weights = Vector::cast_from(weight[column as usize / width]);
            }
            #[unroll]
            for j in 0..width {
                let value = vector.extract(j) * factor * weights.extract(j);
                // Zero beyond the row, whatever the factor is.
                values[comptime!(i * width + j)] = select(column < columns, value, 0.0f32);
            }
        }
        let (start, end) = (row * pitch + first, (row + 1) * pitch);
        let scale = quantize_tile::<C, N>(&values, codes, start, end, floor, power_of_two, native);
        if tile < across && UNIT_POS & (TILE_UNITS - 1) == 0 {
            scales[(row * across + tile) as usize] = scale;
        }
        // The shared memory of these tiles has been read before that of the next is written.
        sync_cube();
    }
}

/// The largest of one number per unit, to all units of a cube of [`BLOCK_UNITS`].
#[cube]
fn largest_of_cube(own: u32) -> u32 {
    let mut shared = Shared::<[u32]>::new_slice(comptime!(BLOCK_UNITS as usize));
    shared[UNIT_POS as usize] = own;
    sync_cube();
    let mut largest = own;
    if UNIT_POS < 16 {
        for i in 0..16u32 {
            largest = max(largest, shared[(i * 16 + UNIT_POS) as usize]);
        }
    }
    sync_cube();
    if UNIT_POS < 16 {
        shared[UNIT_POS as usize] = largest;
    }
    sync_cube();
    #[unroll]
    for i in 0..16usize {
        largest = max(largest, shared[i]);
    }
    largest
}

/// Blocks: codes `[R, pitch]`, scales `[ceil(R / 128), ceil(C / 128)]`. A cube has one block and reads it twice, the
/// second time from the cache.
#[cube(launch_unchecked)]
pub(crate) fn quantize_blocks<F: Float, C: Int, N: Size>(
    x: &[Vector<F, N>],
    codes: &mut [Vector<C, N>],
    scales: &mut [f32],
    rows: u32,
    columns: u32,
    pitch: u32,
    floor: f32,
    #[comptime] power_of_two: bool,
    #[comptime] native: bool,
) {
    let width = N::value().comptime();
    let units_per_row = comptime!(TILE / width as u32);
    let step = comptime!(BLOCK_UNITS / units_per_row);
    let across = columns.div_ceil(TILE);
    let block = CUBE_POS as u32;
    let first_row = block / across * TILE + UNIT_POS / units_per_row;
    let column = block % across * TILE + UNIT_POS % units_per_row * width as u32;
    let end = min((block / across + 1) * TILE, rows);

    let mut largest = 0u32;
    if column < columns {
        for row in range_stepped(first_row, end, step) {
            let vector: Vector<f32, N> =
                Vector::cast_from(x[(row * columns + column) as usize / width]);
            #[unroll]
            for j in 0..width {
                largest = max(largest, magnitude(vector.extract(j)));
            }
        }
    }
    let scale = tile_scale(largest_of_cube(largest), floor, power_of_two);
    if column < pitch {
        for row in range_stepped(first_row, end, step) {
            let mut vector = Vector::<f32, N>::zeroed();
            if column < columns {
                vector = Vector::cast_from(x[(row * columns + column) as usize / width]);
            }
            let mut written = Vector::<C, N>::empty();
            #[unroll]
            for j in 0..width {
                let code = encode(vector.extract(j) / scale, native);
                written.insert(j, C::cast_from(code));
            }
            codes[(row * pitch + column) as usize / width] = written;
        }
    }
    if UNIT_POS == 0 && first_row < rows {
        scales[block as usize] = scale;
    }
}

/// Rows' tiles of the transposed matrix: codes `[C, pitch]`, scales `[C, ceil(R / 128)]`, for weight gradients. A cube
/// has 128 rows of [`TRANSPOSED_COLUMNS`] columns.
#[cube(launch_unchecked)]
pub(crate) fn quantize_transposed<F: Float, C: Int>(
    x: &[F],
    codes: &mut [Vector<C, Const<4>>],
    scales: &mut [f32],
    rows: u32,
    columns: u32,
    pitch: u32,
    floor: f32,
    #[comptime] power_of_two: bool,
    #[comptime] native: bool,
) {
    let (lane, group) = (UNIT_POS % TRANSPOSED_COLUMNS, UNIT_POS / TRANSPOSED_COLUMNS);
    let first_column = CUBE_POS_X * TRANSPOSED_COLUMNS;
    let first_row = CUBE_POS_Y * TILE;
    let column = first_column + lane;

    // A unit has four times four neighbouring rows of one column.
    let mut values = Array::<f32>::new(16usize);
    let mut largest = 0u32;
    #[unroll]
    for i in 0..16usize {
        let row = first_row + (i as u32 / 4 * 8 + group) * 4 + i as u32 % 4;
        let mut value = 0.0f32;
        if row < rows && column < columns {
            value = f32::cast_from(x[(row * columns + column) as usize]);
        }
        values[i] = value;
        largest = max(largest, magnitude(value));
    }
    let mut shared = Shared::<[u32]>::new_slice(comptime!(BLOCK_UNITS as usize));
    shared[UNIT_POS as usize] = largest;
    sync_cube();
    #[unroll]
    for i in 0..8u32 {
        largest = max(largest, shared[(i * TRANSPOSED_COLUMNS + lane) as usize]);
    }
    let scale = tile_scale(largest, floor, power_of_two);
    if group == 0 && column < columns {
        scales[(column * rows.div_ceil(TILE) + CUBE_POS_Y) as usize] = scale;
    }

    // Through shared memory, so that neighbouring units write neighbouring rows' codes. Rows of 33 vectors: 32 units
    // that write one vector each of different rows reach different banks.
    let mut staged = Shared::<[Vector<C, Const<4>>]>::new_slice(comptime!(32 * 33usize));
    #[unroll]
    for i in 0..4usize {
        let mut vector = Vector::<C, Const<4>>::empty();
        #[unroll]
        for j in 0..4usize {
            let code = encode(values[comptime!(i * 4 + j)] / scale, native);
            vector.insert(j, C::cast_from(code));
        }
        staged[(lane * 33 + i as u32 * 8 + group) as usize] = vector;
    }
    sync_cube();
    #[unroll]
    for i in 0..4u32 {
        let (line, at) = (i * 8 + group, lane);
        let row = first_row + at * 4;
        if first_column + line < columns && row < pitch {
            let to = ((first_column + line) * pitch + row) / 4;
            codes[to as usize] = staged[(line * 33 + at) as usize];
        }
    }
}
