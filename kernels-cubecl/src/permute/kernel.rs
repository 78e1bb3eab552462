//! The movement of tokens on CubeCL devices: a stable counting sort in three launches, and copies of rows.
//!
//! The sort counts experts per block of pairs, sums the counts over the blocks, and then places every pair at its
//! expert's start, behind the expert's pairs of earlier blocks, behind those before it in its own block. Nothing is
//! atomic, so pairs of an expert keep their order, and nothing is read by the host.

use cubecl::prelude::*;

/// Pairs of a block, and units of the cube that sorts it.
pub(super) const BLOCK: usize = 256;

/// Counts the pairs of every expert in each block.
#[cube(launch)]
pub(super) fn count_blocks<I: Int>(
    chosen: &[I],             // [S]
    block_counts: &mut [u32], // [blocks, E]
    experts: u32,
    #[define(I)] _dtype: ElemType,
) {
    let experts = experts as usize;
    let block = CUBE_POS;
    if block >= block_counts.len() / experts {
        terminate!();
    }
    let mut picks = Shared::<[u32]>::new_slice(BLOCK);
    load_block(chosen, &mut picks, block);
    for expert in range_stepped(UNIT_POS as usize, experts, BLOCK) {
        let count = occurrences(&mut picks, expert as u32, BLOCK as u32);
        block_counts[block * experts + expert] = count;
    }
}

/// Turns the counts of the blocks into the pairs of earlier blocks, and sums them into the sizes of the segments:
/// `counts` pairs in `rows` rows, a multiple of `tile`, from `starts` on. One cube.
#[cube(launch)]
pub(super) fn sum_blocks(
    block_counts: &mut [u32], // [blocks, E]
    counts: &mut [i32],       // [E]
    rows: &mut [i32],         // [E]
    starts: &mut [u32],       // [E]
    tile: u32,
    #[comptime] experts: usize,
) {
    let blocks = block_counts.len() / experts;
    let mut sizes = Shared::<[u32]>::new_slice(experts);
    for expert in range_stepped(UNIT_POS as usize, experts, BLOCK) {
        let mut total = 0u32;
        for block in 0..blocks {
            let at = block * experts + expert;
            let count = block_counts[at];
            block_counts[at] = total;
            total += count;
        }
        let size = total.div_ceil(tile) * tile;
        counts[expert] = total as i32;
        rows[expert] = size as i32;
        sizes[expert] = size;
    }
    sync_cube();
    for expert in range_stepped(UNIT_POS as usize, experts, BLOCK) {
        let mut start = 0u32;
        for earlier in 0..expert {
            start += sizes[earlier];
        }
        starts[expert] = start;
    }
}

/// Writes where every pair goes and which pair every row has. Rows that pad a segment are left as they are.
#[cube(launch)]
pub(super) fn place_pairs<I: Int>(
    chosen: &[I],           // [S]
    earlier_blocks: &[u32], // [blocks, E]
    starts: &[u32],         // [E]
    order: &mut [i32],      // [R]
    slots: &mut [i32],      // [S]
    #[define(I)] _dtype: ElemType,
) {
    let experts = starts.len();
    let block = CUBE_POS;
    if block >= earlier_blocks.len() / experts {
        terminate!();
    }
    let mut picks = Shared::<[u32]>::new_slice(BLOCK);
    load_block(chosen, &mut picks, block);
    let pair = block * BLOCK + UNIT_POS as usize;
    if pair < chosen.len() {
        let expert = picks[UNIT_POS as usize];
        let rank = occurrences(&mut picks, expert, UNIT_POS);
        let before = earlier_blocks[block * experts + expert as usize];
        let row = starts[expert as usize] + before + rank;
        slots[pair] = row as i32;
        order[row as usize] = pair as i32;
    }
}

/// Loads the experts of a block's pairs; those past the end are of no expert.
#[cube]
fn load_block<I: Int>(chosen: &[I], picks: &mut Shared<[u32]>, block: usize) {
    let pair = block * BLOCK + UNIT_POS as usize;
    let mut expert = u32::MAX.runtime();
    if pair < chosen.len() {
        expert = u32::cast_from(chosen[pair]);
    }
    picks[UNIT_POS as usize] = expert;
    sync_cube();
}

/// How many of the first `count` pairs of a block go to `expert`.
#[cube]
fn occurrences(picks: &mut Shared<[u32]>, expert: u32, count: u32) -> u32 {
    let mut found = 0u32;
    for pair in 0..count {
        found += u32::cast_from(picks[pair as usize] == expert);
    }
    found
}

/// Copies the row of each place's token, or zeros where a row only pads a segment.
#[cube(launch, address_type = "dynamic")]
pub(super) fn permute_rows<F: Float, N: Size, I: Int>(
    x: &[Vector<F, N>],       // [T, D]
    order: &[I],              // [R]
    out: &mut [Vector<F, N>], // [R, D]
    width: usize,             // D / N
    k: u32,
    #[define(F)] _float: ElemType,
    #[define(I)] _int: ElemType,
) {
    let row = ABSOLUTE_POS / width;
    if row >= order.len() {
        terminate!();
    }
    let token = (u32::cast_from(order[row]) / k) as usize;
    let mut value = Vector::<F, N>::new(F::new(0.0f32));
    if token < x.len() / width {
        value = x[token * width + ABSOLUTE_POS % width];
    }
    out[ABSOLUTE_POS] = value;
}

/// As [`permute_rows`], each row times its pair's weight.
#[cube(launch, address_type = "dynamic")]
pub(super) fn permute_weighted_rows<F: Float, N: Size, I: Int>(
    x: &[Vector<F, N>],       // [T, D]
    weights: &[F],            // [T, K]
    order: &[I],              // [R]
    out: &mut [Vector<F, N>], // [R, D]
    width: usize,             // D / N
    k: u32,
    #[define(F)] _float: ElemType,
    #[define(I)] _int: ElemType,
) {
    let row = ABSOLUTE_POS / width;
    if row >= order.len() {
        terminate!();
    }
    let pair = u32::cast_from(order[row]);
    let mut value = Vector::<F, N>::new(F::new(0.0f32));
    if (pair as usize) < weights.len() {
        let weight = Vector::<f32, N>::new(f32::cast_from(weights[pair as usize]));
        let at = (pair / k) as usize * width + ABSOLUTE_POS % width;
        value = Vector::cast_from(Vector::<f32, N>::cast_from(x[at]) * weight);
    }
    out[ABSOLUTE_POS] = value;
}

/// Sums the rows of each token, in single precision.
#[cube(launch, address_type = "dynamic")]
pub(super) fn sum_rows<F: Float, N: Size, I: Int>(
    y: &[Vector<F, N>],       // [R, D]
    slots: &[I],              // [T, K]
    out: &mut [Vector<F, N>], // [T, D]
    width: usize,             // D / N
    k: usize,
    #[define(F)] _float: ElemType,
    #[define(I)] _int: ElemType,
) {
    let token = ABSOLUTE_POS / width;
    if token >= slots.len() / k {
        terminate!();
    }
    let mut sum = Vector::<f32, N>::new(0.0f32);
    for choice in 0..k {
        let pair = token * k + choice;
        let at = usize::cast_from(slots[pair]) * width + ABSOLUTE_POS % width;
        sum += Vector::cast_from(y[at]);
    }
    out[ABSOLUTE_POS] = Vector::cast_from(sum);
}

/// Sums the rows of each token times their weights, in single precision.
#[cube(launch, address_type = "dynamic")]
pub(super) fn sum_weighted_rows<F: Float, N: Size, I: Int>(
    y: &[Vector<F, N>],       // [R, D]
    weights: &[F],            // [T, K]
    slots: &[I],              // [T, K]
    out: &mut [Vector<F, N>], // [T, D]
    width: usize,             // D / N
    k: usize,
    #[define(F)] _float: ElemType,
    #[define(I)] _int: ElemType,
) {
    let token = ABSOLUTE_POS / width;
    if token >= slots.len() / k {
        terminate!();
    }
    let mut sum = Vector::<f32, N>::new(0.0f32);
    for choice in 0..k {
        let pair = token * k + choice;
        let at = usize::cast_from(slots[pair]) * width + ABSOLUTE_POS % width;
        let weight = Vector::<f32, N>::new(f32::cast_from(weights[pair]));
        sum += Vector::cast_from(y[at]) * weight;
    }
    out[ABSOLUTE_POS] = Vector::cast_from(sum);
}

/// Units that share a row in [`row_products`]: a power of two.
pub(super) const UNITS_PER_ROW: usize = 64;

/// The scalar product of each pair's row of `y` with its token's row of `grad`, in single precision. One cube per
/// pair; partial sums are added in a fixed order.
#[cube(launch, address_type = "dynamic")]
pub(super) fn row_products<F: Float, N: Size, I: Int>(
    grad: &[Vector<F, N>], // [T, D]
    y: &[Vector<F, N>],    // [R, D]
    slots: &[I],           // [T, K]
    out: &mut [F],         // [T, K]
    width: usize,          // D / N
    k: usize,
    #[define(F)] _float: ElemType,
    #[define(I)] _int: ElemType,
) {
    let pair = CUBE_POS;
    if pair >= out.len() {
        terminate!();
    }
    let token = pair / k * width;
    let row = usize::cast_from(slots[pair]) * width;
    let mut sum = Vector::<f32, N>::new(0.0f32);
    for column in range_stepped(UNIT_POS as usize, width, UNITS_PER_ROW) {
        let grad = Vector::<f32, N>::cast_from(grad[token + column]);
        sum += grad * Vector::cast_from(y[row + column]);
    }
    let mut total = 0.0f32;
    #[unroll]
    for lane in 0..N::value() {
        total += sum.extract(lane);
    }
    let mut sums = Shared::<[f32]>::new_slice(UNITS_PER_ROW);
    sums[UNIT_POS as usize] = total;
    sync_cube();
    let mut active = comptime!(UNITS_PER_ROW as u32 / 2).runtime();
    while active > 0 {
        if UNIT_POS < active {
            let other = sums[(UNIT_POS + active) as usize];
            sums[UNIT_POS as usize] += other;
        }
        sync_cube();
        active /= 2;
    }
    if UNIT_POS == 0 {
        out[pair] = F::cast_from(sums[0]);
    }
}
