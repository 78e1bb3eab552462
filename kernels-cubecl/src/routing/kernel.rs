//! Routing on CubeCL devices: one cube per token, whose units share the token's experts.
//!
//! Scores are compared as integers of the same order ([`order_of`]), which has NaN and the tie rule right whatever a
//! shading language says about infinities. An expert's place among the chosen is the number of experts before it,
//! which every unit counts for its own experts: E comparisons, no sort, no plane operations and no assumption about
//! the size of a plane.

use cubecl::prelude::*;

use super::GroupLimit;

/// See [`super::select_experts`].
#[cube(launch)]
pub(super) fn select_experts(
    choice: &[f32],     // [T, E]
    chosen: &mut [i32], // [T, K]
    #[comptime] experts: usize,
    #[comptime] limit: GroupLimit,
) {
    let k = comptime!(limit.experts_per_token);
    let token = CUBE_POS;
    if token >= chosen.len() / k {
        terminate!();
    }
    let mut order = Shared::<[u32]>::new_slice(experts);
    for expert in range_stepped(UNIT_POS as usize, experts, CUBE_DIM as usize) {
        order[expert] = order_of(choice[token * experts + expert]);
    }
    sync_cube();

    let mut picks = Shared::<[u32]>::new_slice(k);
    pick(&mut order, &mut picks, experts, limit);
    for place in range_stepped(UNIT_POS as usize, k, CUBE_DIM as usize) {
        chosen[token * k + place] = picks[place] as i32;
    }
}

/// See [`super::route`].
#[cube(launch)]
pub(super) fn route<F: Float>(
    logits: &[F],       // [T, E]
    bias: &[f32],       // [E]
    chosen: &mut [i32], // [T, K]
    weights: &mut [F],  // [T, K]
    scale: f32,
    #[comptime] normalised: bool,
    #[comptime] experts: usize,
    #[comptime] limit: GroupLimit,
    #[define(F)] _dtype: ElemType,
) {
    let k = comptime!(limit.experts_per_token);
    let token = CUBE_POS;
    if token >= chosen.len() / k {
        terminate!();
    }
    let mut order = Shared::<[u32]>::new_slice(experts);
    let mut affinity = Shared::<[f32]>::new_slice(experts);
    for expert in range_stepped(UNIT_POS as usize, experts, CUBE_DIM as usize) {
        let logit = f32::cast_from(logits[token * experts + expert]);
        let score = 1.0f32 / (1.0f32 + (-logit).exp());
        affinity[expert] = score;
        order[expert] = order_of(score + bias[expert]);
    }
    sync_cube();

    let mut picks = Shared::<[u32]>::new_slice(k);
    pick(&mut order, &mut picks, experts, limit);
    let mut factor = scale;
    if normalised {
        let mut sum = 0.0f32;
        for place in 0..k {
            sum += affinity[picks[place] as usize];
        }
        factor = scale / (sum + 1e-20f32);
    }
    for place in range_stepped(UNIT_POS as usize, k, CUBE_DIM as usize) {
        let expert = picks[place];
        chosen[token * k + place] = expert as i32;
        weights[token * k + place] = F::cast_from(affinity[expert as usize] * factor);
    }
}

/// Puts the chosen experts into `picks`, best first. `order` loses what it has of the experts that are out.
#[cube]
fn pick(
    order: &mut Shared<[u32]>,
    picks: &mut Shared<[u32]>,
    #[comptime] experts: usize,
    #[comptime] limit: GroupLimit,
) {
    let groups = comptime!(limit.groups);
    let per_group = comptime!(experts / limit.groups);
    if comptime!(limit.groups_per_token < limit.groups) {
        let mut scores = Shared::<[u32]>::new_slice(groups);
        for group in range_stepped(UNIT_POS as usize, groups, CUBE_DIM as usize) {
            scores[group] = group_order(order, group * per_group, per_group);
        }
        sync_cube();
        for expert in range_stepped(UNIT_POS as usize, experts, CUBE_DIM as usize) {
            let before = places_before(&mut scores, expert / per_group, groups);
            if before >= comptime!(limit.groups_per_token as u32) {
                order[expert] = 0;
            }
        }
        sync_cube();
    }
    for expert in range_stepped(UNIT_POS as usize, experts, CUBE_DIM as usize) {
        if order[expert] > 0 {
            let before = places_before(order, expert, experts);
            if before < comptime!(limit.experts_per_token as u32) {
                picks[before as usize] = expert as u32;
            }
        }
    }
    sync_cube();
}

/// How many of the `count` entries come before the one at `at`: the higher ones, and equal ones at a lower index.
#[cube]
fn places_before(order: &mut Shared<[u32]>, at: usize, #[comptime] count: usize) -> u32 {
    let own = order[at];
    let mut before = 0u32;
    for other in 0..count {
        let value = order[other];
        before += u32::cast_from(value > own || (value == own && other < at));
    }
    before
}

/// The order of a group's score, the sum of its two highest values or its one.
#[cube]
fn group_order(order: &mut Shared<[u32]>, start: usize, #[comptime] count: usize) -> u32 {
    let mut first = order[start];
    if comptime!(count > 1) {
        let mut second = 0u32;
        for expert in start + 1..start + count {
            let value = order[expert];
            let lower = select(value > first, first, value);
            second = select(lower > second, lower, second);
            first = select(value > first, value, first);
        }
        first = order_of(value_of(first) + value_of(second));
    }
    first
}

const SIGN: u32 = 0x8000_0000;
const INFINITY: u32 = 0x7f80_0000;

/// An integer above zero that is ordered as `value` is: both zeros equal, NaN as -inf.
#[cube]
fn order_of(value: f32) -> u32 {
    let bits = u32::reinterpret(value);
    let magnitude = bits & 0x7fff_ffff;
    let number = select(magnitude > INFINITY, SIGN | INFINITY, bits);
    let number = select(magnitude == 0, 0, number);
    select(number >= SIGN, !number, number | SIGN)
}

/// The number of which `order` is the [`order_of`].
#[cube]
fn value_of(order: u32) -> f32 {
    f32::reinterpret(select(order >= SIGN, order & 0x7fff_ffff, !order))
}
