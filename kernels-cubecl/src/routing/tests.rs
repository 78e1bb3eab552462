//! Every version of routing against a scalar oracle written from the definition, on every device of the build.

use burn::tensor::{Device, TensorData, Tolerance};
use proptest::prelude::*;

use super::*;

const fn limit(experts_per_token: usize, groups: usize, groups_per_token: usize) -> GroupLimit {
    GroupLimit {
        experts_per_token,
        groups,
        groups_per_token,
    }
}

/// Scores of some tokens over a number of experts.
#[derive(Clone, Debug)]
struct Case {
    experts: usize,
    limit: GroupLimit,
    rows: Vec<f32>,
}

impl Case {
    fn tensor(&self, device: &Device) -> Tensor<2> {
        let shape = [self.rows.len() / self.experts, self.experts];
        Tensor::from_data(TensorData::new(self.rows.clone(), shape), device)
    }
}

/// The definition, one token at a time.
fn oracle(row: &[f32], limit: GroupLimit) -> Vec<i32> {
    let number = |value: f32| {
        if value.is_nan() {
            f32::NEG_INFINITY
        } else {
            value
        }
    };
    let best_first = |values: &[f32]| {
        let mut order: Vec<usize> = (0..values.len()).collect();
        // Stable: equal values stay in order of their index.
        order.sort_by(|&a, &b| values[b].partial_cmp(&values[a]).unwrap());
        order
    };
    let row: Vec<f32> = row.iter().map(|&value| number(value)).collect();
    let per_group = row.len() / limit.groups;
    let group_scores: Vec<f32> = row
        .chunks(per_group)
        .map(|group| {
            let two: Vec<f32> = best_first(group)
                .iter()
                .take(2)
                .map(|&e| group[e])
                .collect();
            number(two[1..].iter().fold(two[0], |sum, value| sum + value))
        })
        .collect();
    let kept = &best_first(&group_scores)[..limit.groups_per_token];
    best_first(&row)
        .into_iter()
        .filter(|expert| kept.contains(&(expert / per_group)))
        .take(limit.experts_per_token)
        .map(|expert| expert as i32)
        .collect()
}

/// Quarters with many ties, both zeros, infinities and NaN.
fn score() -> impl Strategy<Value = f32> {
    prop_oneof![
        12 => (-3i8..4).prop_map(|quarters| f32::from(quarters) / 4.0),
        1 => Just(-0.0),
        1 => Just(f32::NEG_INFINITY),
        1 => Just(f32::INFINITY),
        1 => Just(f32::NAN),
    ]
}

fn case(experts: usize, limit: GroupLimit, tokens: usize) -> impl Strategy<Value = Case> {
    prop::collection::vec(score(), experts * tokens).prop_map(move |rows| Case {
        experts,
        limit,
        rows,
    })
}

fn any_limit() -> impl Strategy<Value = (usize, GroupLimit)> {
    (1usize..5, 1usize..5)
        .prop_flat_map(|(groups, per_group)| (Just(groups), Just(per_group), 1..=groups))
        .prop_flat_map(|(groups, per_group, kept)| {
            (Just((groups, per_group, kept)), 1..=kept * per_group)
        })
        .prop_map(|((groups, per_group, kept), k)| (groups * per_group, limit(k, groups, kept)))
}

fn list(tensor: Tensor<2, Int>) -> Vec<i32> {
    tensor.into_data().iter::<i32>().collect()
}

/// The version that serves `device`, and the reference, against the oracle.
fn check_selection(case: &Case, device: &Device) {
    let rows = case.rows.chunks(case.experts);
    let expected: Vec<i32> = rows.flat_map(|row| oracle(row, case.limit)).collect();
    let native = select_experts(case.tensor(device), case.limit);
    assert_eq!(list(native), expected, "native");
    if !expected.is_empty() {
        let reference = reference::select_experts(case.tensor(&Device::flex()), case.limit);
        assert_eq!(list(reference), expected, "reference");
    }
}

fn select_row(row: &[f32], limit: GroupLimit) -> Vec<i32> {
    let case = Case {
        experts: row.len(),
        limit,
        rows: row.to_vec(),
    };
    check_selection(&case, &Device::flex());
    list(select_experts(case.tensor(&Device::flex()), limit))
}

#[test]
fn ties_go_to_the_lowest_index() {
    assert_eq!(select_row(&[0.5; 8], limit(3, 4, 2)), [0, 1, 2]);
}

#[test]
fn experts_of_other_groups_are_out_even_among_negative_values() {
    // Group 1 has the best pair; with a zero mask the experts of group 0 would beat its negative second value.
    let row = [-0.9, -0.9, 0.8, -0.3];
    assert_eq!(select_row(&row, limit(2, 2, 1)), [2, 3]);
}

#[test]
fn experts_of_other_groups_are_out_even_where_the_rest_is_not_a_number() {
    let row = [0.1, 0.1, f32::INFINITY, f32::NAN, 0.5, f32::NAN];
    // inf + -inf is no number either: group 1 is out.
    assert_eq!(select_row(&row[..4], limit(2, 2, 1)), [0, 1]);
    assert_eq!(select_row(&row[2..], limit(2, 2, 1)), [0, 1]);
}

#[test]
fn a_group_is_judged_by_its_two_best_not_its_best() {
    let row = [0.9, 0.0, 0.0, 0.6, 0.5, 0.0];
    assert_eq!(select_row(&row, limit(2, 2, 1)), [3, 4]);
}

#[test]
fn groups_of_one_expert_one_group_and_all_experts() {
    assert_eq!(select_row(&[0.1, 0.4, 0.3], limit(2, 3, 2)), [1, 2]);
    assert_eq!(select_row(&[0.1, 0.4, 0.3], limit(3, 1, 1)), [1, 2, 0]);
}

proptest! {
    #[test]
    fn selection_agrees_with_a_scalar_oracle(
        case in any_limit().prop_flat_map(|(experts, limit)| case(experts, limit, 3))
    ) {
        check_selection(&case, &Device::flex());
    }
}

/// Routing of one batch: its logits, and the bias of every expert.
#[derive(Clone, Debug)]
struct RouteCase {
    scores: Case,
    bias: Vec<f32>,
    weighting: Weighting,
}

/// Halves from 0 to 4 with biases in eighths: no two affinities, and no two sums of two, are closer than 4e-5
/// without being equal, so that rounding does not decide between experts, nor between groups once those are left out whose
/// sums are equal in different ways.
fn route_case(
    experts: usize,
    limit: GroupLimit,
    tokens: usize,
) -> impl Strategy<Value = RouteCase> {
    let logits = prop::collection::vec((0i8..9).prop_map(|v| f32::from(v) / 2.0), experts * tokens);
    let bias = prop::collection::vec((-4i8..5).prop_map(|v| f32::from(v) / 8.0), experts);
    let weighting = prop_oneof![Just((true, 2.5)), Just((false, 1.0))];
    let case =
        (logits, bias, weighting).prop_map(move |(rows, bias, (normalised, scale))| RouteCase {
            scores: Case {
                experts,
                limit,
                rows,
            },
            bias,
            weighting: Weighting { normalised, scale },
        });
    case.prop_filter("groups that rounding decides between", move |case| {
        let rows = case.scores.rows.chunks(experts);
        !rows
            .into_iter()
            .any(|row| rounding_decides(row, &case.bias, limit.groups))
    })
}

/// Whether two groups have the same sum in another way, as with biases exchanged: the order of additions then rounds
/// them differently, and devices' exponentials do.
fn rounding_decides(row: &[f32], bias: &[f32], groups: usize) -> bool {
    let size = row.len() / groups;
    let sums: Vec<(f64, Vec<(f32, f32)>)> = row
        .chunks(size)
        .zip(bias.chunks(size))
        .map(|(row, bias)| {
            let choice = |&(v, b): &(f32, f32)| 1.0 / (1.0 + f64::from(-v).exp()) + f64::from(b);
            let mut best: Vec<_> = row.iter().copied().zip(bias.iter().copied()).collect();
            best.sort_by(|a, b| choice(b).total_cmp(&choice(a)));
            best.truncate(2);
            (best.iter().map(choice).sum(), best)
        })
        .collect();
    sums.iter().enumerate().any(|(at, (sum, best))| {
        let others = sums[..at].iter();
        others
            .into_iter()
            .any(|(other, others)| (sum - other).abs() < 2e-5 && best != others)
    })
}

/// The version that serves `device` against an oracle, its gradient against the reference and Burn's autodiff.
fn check_route(case: &RouteCase, device: &Device) {
    let Case { experts, limit, .. } = case.scores;
    let k = limit.experts_per_token;
    let run = |device: &Device, native: bool| {
        let device = device.clone().autodiff();
        let logits = case.scores.tensor(&device).require_grad();
        let bias = Tensor::from_data(TensorData::new(case.bias.clone(), [experts]), &device);
        let routed = if native {
            route(logits.clone(), bias, limit, case.weighting)
        } else {
            reference::route(logits.clone(), bias, limit, case.weighting)
        };
        let shape = routed.weights.dims();
        // An upstream gradient that differs from place to place.
        let upstream: Vec<f32> = (0..shape[0] * k).map(|at| 1.0 + (at % 7) as f32).collect();
        let upstream = Tensor::<2>::from_data(TensorData::new(upstream, shape), &device);
        let grads = (routed.weights.clone() * upstream).sum().backward();
        let grad = logits.grad(&grads).unwrap().into_data();
        (list(routed.chosen), routed.weights.into_data(), grad)
    };
    let (chosen, weights, grad) = run(device, true);

    let mut expected = (Vec::new(), Vec::new());
    for row in case.scores.rows.chunks(experts) {
        let affinity: Vec<f32> = row.iter().map(|&v| 1.0 / (1.0 + (-v).exp())).collect();
        let choice: Vec<f32> = affinity
            .iter()
            .zip(&case.bias)
            .map(|(s, b)| s + b)
            .collect();
        let chosen = oracle(&choice, limit);
        let weights: Vec<f32> = chosen.iter().map(|&e| affinity[e as usize]).collect();
        let sum = if case.weighting.normalised {
            weights.iter().sum()
        } else {
            1.0
        };
        let scale = case.weighting.scale as f32 / sum;
        expected
            .1
            .extend(weights.iter().map(|weight| weight * scale));
        expected.0.extend(chosen);
    }
    assert_eq!(chosen, expected.0);
    // Relative rounding of an exponential, a division and a sum of at most 320 terms: 1e-6 to 1e-5.
    let close = Tolerance::<f32>::rel_abs(2e-5, 2e-6);
    let shape = [case.scores.rows.len() / experts, k];
    weights.assert_approx_eq(&TensorData::new(expected.1, shape), close);

    let reference = run(&Device::flex(), false);
    assert_eq!(chosen, reference.0);
    // Differences of terms up to 7 times the scale.
    grad.assert_approx_eq(&reference.2, Tolerance::<f32>::rel_abs(1e-4, 1e-5));
}

proptest! {
    #[test]
    fn routes_agree_with_a_scalar_oracle(
        case in any_limit().prop_flat_map(|(experts, limit)| route_case(experts, limit, 3))
    ) {
        check_route(&case, &Device::flex());
    }
}

/// The kernels are compiled for each number of experts and limit: few of them, with many values.
#[cfg(feature = "wgpu")]
mod on_wgpu {
    use super::*;
    use crate::cube::wgpu;

    /// One expert; all of one group; groups of one; not a multiple of any plane; the report's; more experts than units.
    const COMPILED: [(usize, GroupLimit); 6] = [
        (1, limit(1, 1, 1)),
        (8, limit(8, 1, 1)),
        (6, limit(2, 6, 3)),
        (36, limit(5, 4, 2)),
        (256, limit(8, 8, 4)),
        (320, limit(6, 5, 3)),
    ];

    fn compiled() -> impl Strategy<Value = (usize, GroupLimit, usize)> {
        (prop::sample::select(&COMPILED[..]), 0usize..4)
            .prop_map(|((experts, limit), tokens)| (experts, limit, tokens))
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn selection_agrees_with_a_scalar_oracle(
            case in compiled().prop_flat_map(|(experts, limit, tokens)| case(experts, limit, tokens))
        ) {
            check_selection(&case, &wgpu());
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn routes_agree_with_a_scalar_oracle(
            case in compiled().prop_flat_map(|(experts, limit, tokens)| route_case(experts, limit, tokens.max(1)))
        ) {
            check_route(&case, &wgpu());
        }
    }
}
