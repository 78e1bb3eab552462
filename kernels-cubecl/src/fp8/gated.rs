//! The last product of SwiGLU experts, which keeps what comes into the gate in FP8 and computes what comes out of it again
//! in the backward pass (report section 3.3.3).

use burn::{
    backend::{
        Autodiff, Dispatch,
        autodiff::{
            checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
            grads::Gradients,
            ops::{Backward, Ops, OpsKind},
        },
        backend_extension,
        tensor::{FloatTensor, IntTensor},
    },
    tensor::Tensor,
};

use super::{
    Fp8Ops, ScaleFormat, Tile,
    grouped::{Fp8GroupedGrad, Fp8GroupedOps},
    grouped_linear, is_native_f32_or_flex,
};
use crate::{bf16::rounded, permute::Permutation, swiglu::swiglu};

/// As [`grouped_linear`] of `swiglu(gate, up)`, which is rounded to BF16 before if `bf16`.
///
/// For the backward pass `gate` and `up` are kept as codes with a scale per 1 x 128, any number, and the gradients are
/// those at the numbers that these stand for.
///
/// # Shapes
/// - `gate`, `up`: `[R, K]` in the order of `order`, `weights`: `[E, K, N]`
/// - result: `[R, N]`
///
/// # Panics
/// As [`grouped_linear`], and if `gate` and `up` have different sizes.
pub fn gated_grouped_linear(
    gate: Tensor<2>,
    up: Tensor<2>,
    weights: Tensor<3>,
    order: &Permutation,
    format: ScaleFormat,
    bf16: bool,
) -> Tensor<2> {
    assert_eq!(gate.dims(), up.dims(), "gate and up have different sizes");
    if !is_native_f32_or_flex(&gate.device(), gate.dtype()) {
        let hidden = swiglu(gate, up);
        let hidden = if bf16 { rounded(hidden) } else { hidden };
        return grouped_linear(hidden, weights, order, format);
    }
    super::grouped::check(&gate, &weights, order);
    Tensor::from_dispatch(Dispatch::fp8_gated_linear(
        gate.into_dispatch(),
        up.into_dispatch(),
        weights.into_dispatch(),
        order.rows.clone().into_dispatch(),
        Recipe { format, bf16 },
    ))
}

/// How the product and what comes before it are computed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Recipe {
    format: ScaleFormat,
    bf16: bool,
}

#[backend_extension(Cube: cfg(any(feature = "wgpu", feature = "cuda")), Flex, Autodiff)]
pub(crate) trait Fp8GatedOps: burn::backend::Backend {
    fn fp8_gated_linear(
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        weights: FloatTensor<Self>,
        counts: IntTensor<Self>,
        recipe: Recipe,
    ) -> FloatTensor<Self>;
}

/// What is between the products, on backends without autodiff.
pub(crate) trait Gated: Fp8Ops + Fp8GroupedOps + Fp8GroupedGrad {
    /// `silu(gate) up`, rounded if `bf16`.
    fn gated(gate: FloatTensor<Self>, up: FloatTensor<Self>, bf16: bool) -> FloatTensor<Self>;

    /// Its gradients with respect to `gate` and to `up`.
    fn gated_grad(
        grad: FloatTensor<Self>,
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        bf16: bool,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);

    /// The numbers that codes in rows' tiles stand for.
    fn numbers_of_rows(codes: IntTensor<Self>, scales: FloatTensor<Self>) -> FloatTensor<Self>;
}

/// [`Fp8GatedOps`] without autodiff.
pub(super) fn forward<B: Gated>(
    gate: FloatTensor<B>,
    up: FloatTensor<B>,
    weights: FloatTensor<B>,
    counts: IntTensor<B>,
    recipe: Recipe,
) -> FloatTensor<B> {
    let hidden = B::gated(gate, up, recipe.bf16);
    B::fp8_grouped_linear(hidden, weights, counts, recipe.format)
}

#[derive(Debug)]
struct GatedLinear;

/// What the backward pass needs.
#[derive(Clone, Debug)]
struct Kept<B: Gated> {
    /// Codes and scales.
    gate: (IntTensor<B>, FloatTensor<B>),
    up: (IntTensor<B>, FloatTensor<B>),
    weights: FloatTensor<B>,
    counts: IntTensor<B>,
    recipe: Recipe,
}

impl<B: Gated> Backward<B, 3> for GatedLinear {
    type State = Kept<B>;

    fn backward(self, ops: Ops<Kept<B>, 3>, grads: &mut Gradients, _: &mut Checkpointer) {
        let grad = grads.consume::<B>(&ops.node);
        let kept = ops.state;
        let Recipe { format, bf16 } = kept.recipe;
        let gate = B::numbers_of_rows(kept.gate.0, kept.gate.1);
        let up = B::numbers_of_rows(kept.up.0, kept.up.1);
        let [gate_node, up_node, weights_node] = ops.parents;
        if let Some(node) = weights_node {
            let hidden = B::gated(gate.clone(), up.clone(), bf16);
            let counts = kept.counts.clone();
            let grad = B::fp8_grouped_weight_grad(hidden, grad.clone(), counts, format);
            grads.register::<B>(node.id, grad);
        }
        if gate_node.is_none() && up_node.is_none() {
            return;
        }
        let grad = B::fp8_grouped_input_grad(grad, kept.weights, kept.counts, format);
        let (of_gate, of_up) = B::gated_grad(grad, gate, up, bf16);
        for (node, grad) in [(gate_node, of_gate), (up_node, of_up)] {
            if let Some(node) = node {
                grads.register::<B>(node.id, grad);
            }
        }
    }
}

impl<B: Gated + Fp8GatedOps, C: CheckpointStrategy> Fp8GatedOps for Autodiff<B, C> {
    fn fp8_gated_linear(
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        weights: FloatTensor<Self>,
        counts: IntTensor<Self>,
        recipe: Recipe,
    ) -> FloatTensor<Self> {
        let nodes = [gate.node(), up.node(), weights.node()];
        let (gate, up) = (gate.into_primitive(), up.into_primitive());
        let weights = weights.into_primitive();
        match GatedLinear.prepare::<C>(nodes).compute_bound().stateful() {
            OpsKind::Tracked(prep) => {
                let coded = |x: &FloatTensor<B>| {
                    B::fp8_quantize(x.clone(), Tile::Row, ScaleFormat::Float32)
                };
                let kept = Kept::<B> {
                    gate: coded(&gate),
                    up: coded(&up),
                    weights: weights.clone(),
                    counts: counts.clone(),
                    recipe,
                };
                prep.finish(kept, B::fp8_gated_linear(gate, up, weights, counts, recipe))
            }
            OpsKind::UnTracked(prep) => {
                prep.finish(B::fp8_gated_linear(gate, up, weights, counts, recipe))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, Distribution, Int};

    use super::*;
    use crate::fp8::{quantize, tiles::dequantize};

    #[test]
    fn gradients_are_those_at_the_numbers_that_are_kept() {
        on(Device::flex().autodiff());
    }

    #[cfg(feature = "wgpu")]
    #[test]
    fn on_wgpu_gradients_are_those_at_the_numbers_that_are_kept() {
        on(crate::cube::wgpu().autodiff());
    }

    /// The same as the product and the gate by themselves: forward with the numbers given, backward with those kept.
    fn on(device: Device) {
        let random =
            |shape: [usize; 2]| Tensor::<2>::random(shape, Distribution::Normal(0.0, 1.0), &device);
        // The expert in the middle has no row.
        let chosen: Vec<i32> = (0..70)
            .map(|row| if row % 3 == 0 { 2 } else { 0 })
            .collect();
        let chosen = Tensor::<1, Int>::from_data(&chosen[..], &device).reshape([70, 1]);
        let tile = crate::fp8::segment_tile(&device);
        let order = Permutation::by_expert_padded(chosen, 3, tile);
        let [rows] = order.order.dims();
        let (width, hidden) = (200, 136);
        let x = [rows, width];
        let inside = order
            .order
            .clone()
            .lower_elem(70)
            .float()
            .reshape([rows, 1]);
        let (gate, up) = (random(x) * inside.clone(), random(x) * inside);
        let dy = random([rows, hidden]);
        let weights = random([3, width * hidden]).reshape([3, width, hidden]);
        let format = ScaleFormat::Float32;
        let values = |x: &Tensor<2>| x.to_data().iter::<f32>().collect::<Vec<_>>();
        let kept = |x: &Tensor<2>| {
            let coded = quantize(x.clone(), Tile::Row, format);
            let codes: Vec<u8> = coded.codes.into_data().iter::<u8>().collect();
            let numbers = dequantize(&codes, width, Tile::Row, &values(&coded.scales));
            let numbers = burn::tensor::TensorData::new(numbers, x.dims());
            Tensor::<2>::from_data(numbers, &device)
        };
        for bf16 in [false, true] {
            let fused =
                |gate, up, weights| gated_grouped_linear(gate, up, weights, &order, format, bf16);
            let apart = |gate, up, weights| {
                let hidden = swiglu(gate, up);
                let hidden = if bf16 { rounded(hidden) } else { hidden };
                grouped_linear(hidden, weights, &order, format)
            };
            type Product<'a> = &'a dyn Fn(Tensor<2>, Tensor<2>, Tensor<3>) -> Tensor<2>;
            let run = |multiply: Product<'_>, gate: &Tensor<2>, up: &Tensor<2>| {
                let gate = gate.clone().detach().require_grad();
                let up = up.clone().detach().require_grad();
                let weights = weights.clone().detach().require_grad();
                let y = multiply(gate.clone(), up.clone(), weights.clone());
                let grads = (y.clone() * dy.clone()).sum().backward();
                let of = |x: &Tensor<2>| values(&x.grad(&grads).unwrap());
                let of_weights = weights.grad(&grads).unwrap().into_data();
                (values(&y), of(&gate), of(&up), of_weights)
            };
            let found = run(&fused, &gate, &up);
            assert_eq!(found.0, run(&apart, &gate, &up).0);
            let expected = run(&apart, &kept(&gate), &kept(&up));
            assert_ne!(found.0, expected.0);
            if crate::flex::is_flex(&device) {
                assert_eq!(found, (found.0.clone(), expected.1, expected.2, expected.3));
                continue;
            }
            // Elementwise, one formula against Burn's gradients of two operations.
            let close = burn::tensor::Tolerance::<f32>::rel_abs(1e-5, 1e-5);
            let pairs = [(&found.1, &expected.1), (&found.2, &expected.2)];
            for (found, expected) in pairs {
                let data = |x: &Vec<f32>| burn::tensor::TensorData::from(&x[..]);
                data(found).assert_approx_eq(&data(expected), close);
            }
            found.3.assert_approx_eq(&expected.3, close);
        }
    }
}
