//! The native version against the reference, values and gradients.

use burn::tensor::{Device, Distribution, Int, Tensor, TensorData, Tolerance};

use super::{Sizes, causal_attention, reference};
use crate::rope::Rotation;

#[test]
fn native_agrees_with_reference() {
    let device = Device::flex().autodiff();
    // Below, at and above the block of 64 queries; sequences in one piece and cut into documents.
    for (batch, length, heads, rope, cut) in [
        (1, 1, 1, 4, 0),
        (2, 63, 3, 2, 0),
        (3, 64, 2, 4, 10),
        (2, 150, 2, 2, 37),
        (2, 130, 1, 6, 0),
    ] {
        let (nope, value) = (8, 7);
        let sizes = Sizes {
            heads,
            nope,
            value,
            scale: ((nope + rope) as f64).powf(-0.5),
        };
        let random = |width| {
            let shape = [batch, length, width];
            Tensor::<3>::random(shape, Distribution::Normal(0.0, 1.0), &device).require_grad()
        };
        let q = random(heads * (nope + rope));
        let (kv, k_pe) = (random(heads * (nope + value)), random(rope));
        let mask = random(heads * value).detach();
        let angles = (0..length * rope / 2).map(|at| 0.37 * at as f32);
        let rotation = Rotation::new(angles.map(f32::sin_cos), [length, rope / 2], &device);
        let rows = if cut > 0 { batch } else { 1 };
        let first: Vec<i32> = (0..rows * length)
            .map(|at| {
                (at % length)
                    .checked_div(cut)
                    .map_or(0, |document| document * cut)
            })
            .map(|first| first as i32)
            .collect();
        let first = Tensor::<2, Int>::from_data(TensorData::new(first, [rows, length]), &device);
        let run = |attend: fn(_, _, _, &Rotation, _, _) -> Tensor<3>| {
            let out = attend(
                q.clone(),
                kv.clone(),
                k_pe.clone(),
                &rotation,
                sizes,
                first.clone(),
            );
            let grads = (out.clone() * mask.clone()).sum().backward();
            let grad = |t: &Tensor<3>| t.grad(&grads).expect("reached").into_data();
            (out.into_data(), [grad(&q), grad(&kv), grad(&k_pe)])
        };
        let (found, found_grads) = run(causal_attention);
        let (expected, expected_grads) = run(reference::causal_attention);
        let close = Tolerance::<f32>::rel_abs(1e-5, 2e-5);
        found.assert_approx_eq(&expected, close);
        for (found, expected) in found_grads.iter().zip(&expected_grads) {
            found.assert_approx_eq(expected, close);
        }
    }
}
