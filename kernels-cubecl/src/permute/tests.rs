//! The movement of tokens against a scalar oracle, on every device of the build.

use burn::tensor::{DType, Device, TensorData, Tolerance};
use proptest::prelude::*;

use super::*;

/// The experts of some tokens.
#[derive(Clone, Debug)]
struct Case {
    experts: usize,
    k: usize,
    tile: usize,
    picks: Vec<i32>,
}

impl Case {
    fn sort(&self, device: &Device) -> Permutation {
        Permutation::by_expert_padded(self.chosen(device), self.experts, self.tile)
    }

    fn chosen(&self, device: &Device) -> Tensor<2, Int> {
        let shape = [self.picks.len() / self.k, self.k];
        Tensor::from_data(TensorData::new(self.picks.clone(), shape), device)
    }
}

fn case(
    experts: impl Strategy<Value = usize>,
    tokens: std::ops::Range<usize>,
) -> impl Strategy<Value = Case> {
    (
        experts,
        1usize..4,
        tokens,
        prop::sample::select(&[1, 1, 4, 5][..]),
    )
        .prop_flat_map(|(experts, k, tokens, tile)| {
            // Only even experts half of the time: the others have no pair.
            (
                prop::collection::vec(0..experts as i32, tokens * k),
                any::<bool>(),
            )
                .prop_map(move |(mut picks, even)| {
                    if even {
                        picks.iter_mut().for_each(|expert| *expert &= !1);
                    }
                    Case {
                        experts,
                        k,
                        tile,
                        picks,
                    }
                })
        })
}

/// `order`, `slots`, `counts` and `rows`, from the definition.
fn oracle(case: &Case) -> [Vec<i32>; 4] {
    let pairs = case.picks.len();
    let mut order = Vec::new();
    let mut slots = vec![0; pairs];
    let (mut counts, mut rows) = (Vec::new(), Vec::new());
    for expert in 0..case.experts as i32 {
        let start = order.len();
        for pair in (0..pairs).filter(|&pair| case.picks[pair] == expert) {
            slots[pair] = order.len() as i32;
            order.push(pair as i32);
        }
        counts.push((order.len() - start) as i32);
        while order.len() % case.tile != 0 {
            order.push(pairs as i32);
        }
        rows.push((order.len() - start) as i32);
    }
    let worst = case.experts.min(pairs) * (case.tile - 1) + pairs;
    order.resize(worst - worst % case.tile, pairs as i32);
    [order, slots, counts, rows]
}

fn list<const D: usize>(tensor: Tensor<D, Int>) -> Vec<i32> {
    tensor.into_data().iter::<i32>().collect()
}

fn lists(permutation: Permutation) -> [Vec<i32>; 4] {
    let Permutation {
        order,
        slots,
        counts,
        rows,
        tile: _,
    } = permutation;
    [list(order), list(slots), list(counts), list(rows)]
}

/// The sort that serves `device`, and the reference, against the oracle.
fn check_sort(case: &Case, device: &Device) {
    let expected = oracle(case);
    assert_eq!(lists(case.sort(device)), expected, "native");
    if !case.picks.is_empty() {
        let chosen = case.chosen(&Device::flex());
        let reference = reference::sort_by_expert(chosen, case.experts, case.tile);
        assert_eq!(lists(reference), expected, "reference");
    }
}

/// Numbers between -1 and 1 that differ from place to place.
fn numbers(rows: usize, columns: usize) -> Vec<f32> {
    let number = |at: usize| (at * 37 % 101) as f32 / 50.0 - 1.0;
    (0..rows * columns).map(number).collect()
}

/// What moving rows to their experts and back, weighted, results in and has as gradients.
struct Moved {
    rows: TensorData,
    out: TensorData,
    grads: [TensorData; 2],
}

fn run(case: &Case, width: usize, dtype: DType, device: &Device, native: bool) -> Moved {
    let device = device.clone().autodiff();
    let permutation = case.sort(&device);
    let [tokens, k] = permutation.dims();
    let tensor = |columns| {
        let data = TensorData::new(numbers(tokens, columns), [tokens, columns]);
        Tensor::<2>::from_data(data, (&device, dtype))
    };
    let (x, weights) = (tensor(width).require_grad(), tensor(k).require_grad());
    let rows = match native {
        true => permute(x.clone(), &permutation),
        false => reference::permute(x.clone(), &permutation),
    };
    let y = rows.clone() * rows.clone();
    let out = match native {
        true => combine(y, weights.clone(), &permutation),
        false => reference::combine(y, weights.clone(), &permutation),
    };
    let grads = (out.clone() * tensor(width)).sum().backward();
    let single = |tensor: Tensor<2>| tensor.into_data().convert::<f32>();
    Moved {
        rows: single(rows),
        out: single(out),
        grads: [
            single(x.grad(&grads).unwrap()),
            single(weights.grad(&grads).unwrap()),
        ],
    }
}

/// The movement that serves `device` against loops, its gradients against the reference and Burn's autodiff.
fn check_movement(case: &Case, width: usize, dtype: DType, device: &Device, close: f32) {
    let moved = run(case, width, dtype, device, true);
    let [order, slots, ..] = oracle(case);
    let (tokens, k) = (case.picks.len() / case.k, case.k);
    let (x, weights) = (numbers(tokens, width), numbers(tokens, k));
    let mut rows = vec![0.0; order.len() * width];
    let mut out = vec![0.0; tokens * width];
    for (pair, &slot) in slots.iter().enumerate() {
        for column in 0..width {
            let value = x[pair / k * width + column];
            rows[slot as usize * width + column] = value;
            out[pair / k * width + column] += value * value * weights[pair];
        }
    }
    let close = Tolerance::<f32>::absolute(close);
    let expected = TensorData::new(rows, [order.len(), width]);
    moved.rows.assert_approx_eq(&expected, close);
    moved
        .out
        .assert_approx_eq(&TensorData::new(out, [tokens, width]), close);

    let reference = run(case, width, DType::F32, &Device::flex(), false);
    moved.grads[0].assert_approx_eq(&reference.grads[0], close);
    moved.grads[1].assert_approx_eq(&reference.grads[1], close);
}

/// Sums of at most 13 products of three numbers below one, in f32.
const CLOSE: f32 = 1e-5;

#[test]
fn sorts_pairs_by_expert_and_keeps_their_order() {
    let mut case = Case {
        experts: 5,
        k: 2,
        tile: 1,
        picks: vec![2, 0, 0, 2, 3, 2],
    };
    let [order, slots, counts, rows] = lists(case.sort(&Device::flex()));
    assert_eq!(order, [1, 2, 0, 3, 5, 4]);
    assert_eq!(slots, [2, 0, 1, 3, 5, 4]);
    assert_eq!(counts, [2, 0, 3, 1, 0]);
    assert_eq!(rows, counts);

    case.tile = 4;
    let [order, slots, counts, rows] = lists(case.sort(&Device::flex()));
    // Three experts with pairs; room for five.
    assert_eq!(order[..12], [1, 2, 6, 6, 0, 3, 5, 6, 4, 6, 6, 6]);
    assert_eq!(order[12..], [6; 8]);
    assert_eq!(slots, [4, 0, 1, 5, 8, 6]);
    assert_eq!(counts, [2, 0, 3, 1, 0]);
    assert_eq!(rows, [4, 0, 4, 4, 0]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn sort_agrees_with_a_scalar_oracle(case in case(1usize..6, 0..9)) {
        check_sort(&case, &Device::flex());
    }

    #[test]
    fn movement_agrees_with_a_scalar_oracle(case in case(1usize..6, 1..9), width in 1usize..5) {
        check_movement(&case, width, DType::F32, &Device::flex(), CLOSE);
    }
}

#[cfg(feature = "wgpu")]
mod on_wgpu {
    use super::*;
    use crate::cube::wgpu;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        /// More experts than units, and up to three blocks of pairs; few numbers of experts, for each of which a
        /// kernel is compiled.
        #[test]
        fn sort_agrees_with_a_scalar_oracle(
            case in prop_oneof![
                case(prop::sample::select(&[1, 5, 300][..]), 0..3),
                case(prop::sample::select(&[1, 5, 300][..]), 3..240),
            ]
        ) {
            check_sort(&case, &wgpu());
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(12))]

        /// Rows in vectors and not, of fewer and more elements than the units of a cube.
        #[test]
        fn movement_agrees_with_a_scalar_oracle(
            case in case(Just(5usize), 1..100),
            width in prop::sample::select(&[3, 8, 84, 516][..]),
        ) {
            // The products of a row are summed over its elements.
            let close = CLOSE * (width as f32).max(10.0) / 10.0;
            check_movement(&case, width, DType::F32, &wgpu(), close);
        }
    }

    #[test]
    fn half_precision_is_summed_in_single() {
        let case = Case {
            experts: 5,
            k: 3,
            tile: 4,
            picks: (0..60).map(|pair| pair * 7 % 5).collect(),
        };
        // Squares, products and sums of up to 24 numbers below one, rounded to 11 bits.
        check_movement(&case, 8, DType::F16, &wgpu(), 8e-3);
    }

    #[test]
    fn no_tokens_are_no_rows() {
        let case = Case {
            experts: 3,
            k: 2,
            tile: 4,
            picks: Vec::new(),
        };
        check_sort(&case, &wgpu());
        let permutation = case.sort(&wgpu());
        let rows = permute(Tensor::zeros([0, 8], &wgpu()), &permutation);
        assert_eq!(rows.dims(), [0, 8]);
        let weights = Tensor::zeros([0, 2], &wgpu());
        assert_eq!(combine(rows, weights, &permutation).dims(), [0, 8]);
    }
}

/// Pairs of no expert are as those of an expert whose output is zero.
#[test]
fn known_pairs_may_be_of_no_expert() {
    let device = Device::flex().autodiff();
    let chosen = [
        Some(2),
        None,
        Some(0),
        Some(2),
        None,
        None,
        Some(2),
        Some(0),
    ];
    for tile in [1, 4] {
        let some = Permutation::of_known(&chosen, 2, 3, tile, &device);
        assert_eq!(list(some.counts.clone()), [2, 0, 3]);
        // Expert 3 stands for none.
        let picks = chosen.map(|expert| expert.unwrap_or(3) as i32).to_vec();
        let case = Case {
            experts: 4,
            k: 2,
            tile,
            picks,
        };
        let all = case.sort(&device);
        let run = |order: &Permutation| {
            let of = |rows, columns| {
                let data = TensorData::new(numbers(rows, columns), [rows, columns]);
                Tensor::<2>::from_data(data, &device).require_grad()
            };
            let (x, weights) = (of(4, 5), of(4, 2));
            let rows = permute(x.clone(), order);
            let [height, _] = rows.dims();
            // Experts square, and expert 3 gives zero.
            let end = list(order.rows.clone())[..3].iter().sum::<i32>() as usize;
            let mask = Tensor::<2>::ones([end, 1], &device);
            let mask = Tensor::cat(vec![mask, Tensor::zeros([height - end, 1], &device)], 0);
            let y = combine(rows.clone() * rows * mask, weights.clone(), order);
            let grads = (y.clone() * of(4, 5).detach()).sum().backward();
            [
                y.into_data(),
                x.grad(&grads).unwrap().into_data(),
                weights.grad(&grads).unwrap().into_data(),
            ]
        };
        for (found, expected) in run(&some).iter().zip(&run(&all)) {
            found.assert_approx_eq(expected, Tolerance::<f32>::absolute(1e-6));
        }
    }
}
