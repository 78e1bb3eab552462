//! A mixture-of-experts layer in FP8, of the operations of this crate together: values and all gradients equal those of
//! a loop over the experts.

use burn::tensor::{Device, Distribution, IndexingUpdateOp, Int, Tensor, TensorData, Tolerance};
use deepburn_kernels::{
    fp8::{self, ScaleFormat},
    permute::{Permutation, combine, permute},
    routing::{GroupLimit, Weighting, route},
    swiglu::swiglu,
};

const TOKENS: usize = 70;
const CHOICES: usize = 2;
/// More than one tile of 128, and a tail.
const WIDTH: usize = 130;
const HIDDEN: usize = 66;
const EXPERTS: usize = 6;
const FORMAT: ScaleFormat = ScaleFormat::Float32;

/// Matrices of all experts, `[E, in, out]`.
struct Experts {
    gate: Tensor<3>,
    up: Tensor<3>,
    down: Tensor<3>,
}

fn together(
    x: Tensor<2>,
    chosen: Tensor<2, Int>,
    weights: Tensor<2>,
    experts: &Experts,
) -> Tensor<2> {
    let tile = fp8::segment_tile(&x.device());
    let order = Permutation::by_expert_padded(chosen, EXPERTS, tile);
    let multiply =
        |x, matrices: &Tensor<3>| fp8::grouped_linear(x, matrices.clone(), &order, FORMAT);
    let rows = permute(x, &order);
    let hidden = swiglu(
        multiply(rows.clone(), &experts.gate),
        multiply(rows, &experts.up),
    );
    combine(multiply(hidden, &experts.down), weights, &order)
}

fn one_by_one(
    x: Tensor<2>,
    chosen: Tensor<2, Int>,
    weights: Tensor<2>,
    experts: &Experts,
) -> Tensor<2> {
    let device = x.device();
    let chosen: Vec<i64> = chosen.into_data().iter::<i64>().collect();
    let weights = weights.reshape([TOKENS * CHOICES, 1]);
    let mut y = x.zeros_like();
    for expert in 0..EXPERTS {
        let pairs = (0..chosen.len()).filter(|&pair| chosen[pair] == expert as i64);
        let pairs: Vec<i32> = pairs.map(|pair| pair as i32).collect();
        if pairs.is_empty() {
            continue;
        }
        let list = |values: Vec<i32>| {
            let size = [values.len()];
            Tensor::<1, Int>::from_data(TensorData::new(values, size), &device)
        };
        let tokens = list(pairs.iter().map(|pair| pair / CHOICES as i32).collect());
        let matrix = |all: &Tensor<3>| all.clone().narrow(0, expert, 1).squeeze_dim::<2>(0);
        let rows = x.clone().select(0, tokens.clone());
        let gate = fp8::linear(rows.clone(), matrix(&experts.gate), FORMAT);
        let up = fp8::linear(rows, matrix(&experts.up), FORMAT);
        let out = fp8::linear(swiglu(gate, up), matrix(&experts.down), FORMAT);
        let out = out * weights.clone().select(0, list(pairs));
        y = y.select_assign(0, tokens, out, IndexingUpdateOp::Add);
    }
    y
}

fn agree(device: Device) {
    let random = |shape: [usize; 3]| {
        Tensor::<3>::random(shape, Distribution::Normal(0.0, 0.3), &device).require_grad()
    };
    let x = random([1, TOKENS, WIDTH]);
    let logits = random([1, TOKENS, EXPERTS]);
    let experts = Experts {
        gate: random([EXPERTS, WIDTH, HIDDEN]),
        up: random([EXPERTS, WIDTH, HIDDEN]),
        down: random([EXPERTS, HIDDEN, WIDTH]),
    };
    // Expert 1 is chosen by nobody, expert 2 by everybody.
    let bias = Tensor::<1>::from_data([0.0, -9.0, 9.0, 0.0, 0.0, 0.0], &device);
    let limit = GroupLimit {
        experts_per_token: CHOICES,
        groups: 2,
        groups_per_token: 2,
    };
    let weighting = Weighting {
        normalised: true,
        scale: 2.5,
    };
    let mask = Tensor::<2>::random([TOKENS, WIDTH], Distribution::Default, &device);
    type Layer = fn(Tensor<2>, Tensor<2, Int>, Tensor<2>, &Experts) -> Tensor<2>;
    let run = |layer: Layer| {
        let routed = route(
            logits.clone().squeeze_dim(0),
            bias.clone(),
            limit,
            weighting,
        );
        let input = x.clone().squeeze_dim(0);
        let y = layer(input, routed.chosen, routed.weights, &experts);
        let grads = (y.clone() * mask.clone()).sum().backward();
        let inputs = [&x, &logits, &experts.gate, &experts.up, &experts.down];
        let grads = inputs.map(|input| input.grad(&grads).expect("reached").into_data());
        (y.into_data(), grads)
    };
    let (found, found_grads) = run(together);
    let (expected, expected_grads) = run(one_by_one);
    // The same products; sums over a token's choices in another order, of numbers up to ten.
    let close = Tolerance::<f32>::rel_abs(1e-5, 1e-5);
    found.assert_approx_eq(&expected, close);
    for (found, expected) in found_grads.iter().zip(&expected_grads) {
        found.assert_approx_eq(expected, close);
    }
}

#[test]
fn on_the_cpu() {
    agree(Device::flex().autodiff());
}

#[cfg(feature = "wgpu")]
#[test]
fn on_wgpu() {
    agree(Device::wgpu(burn::tensor::DeviceKind::DefaultDevice).autodiff());
}
