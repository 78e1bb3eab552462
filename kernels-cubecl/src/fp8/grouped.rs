//! FP8 products of experts: every segment of rows with a matrix of its own, and the gradients of both.

use std::ops::Range;

use burn::{
    backend::{
        Autodiff, Dispatch, TensorMetadata,
        autodiff::{
            checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
            grads::Gradients,
            ops::{Backward, Ops, OpsKind},
        },
        backend_extension,
        tensor::{FloatTensor, IntTensor},
    },
    tensor::{Device, Shape, Slice, Tensor},
};

use super::{Fp8Ops, ScaleFormat, TILE, Tile, is_native_f32_or_flex, linear, linear::product};
use crate::{
    flex::dims,
    grouped_gemm::reference::by_segment,
    permute::Permutation,
    weight_grad::{Lift, Weight},
};

/// What [`grouped_linear`] wants the segments padded to a multiple of on `device`: a kernel's tile where there are
/// kernels, one elsewhere.
pub fn segment_tile(device: &Device) -> usize {
    match crate::cube::is_cube(device) {
        true => TILE,
        false => 1,
    }
}

/// As [`linear`], each expert's segment of the rows of `x` with a matrix of its own: `y_e = x_e W_e`. Rows that pad are
/// zero in `x`, and then in the result.
///
/// On CUDA one kernel for all experts, which reads the segments on the device; elsewhere one product after another.
///
/// # Shapes
/// - `x`: `[R, K]` in the order of `order`, `weights`: `[E, K, N]`
/// - result: `[R, N]`
///
/// # Panics
/// As [`linear`], and if `order` is of another number of rows or experts, or is not padded to [`segment_tile`].
pub fn grouped_linear(
    x: Tensor<2>,
    weights: Tensor<3>,
    order: &Permutation,
    format: ScaleFormat,
) -> Tensor<2> {
    check(&x, &weights, order);
    let counts = order.rows.clone();
    if is_native_f32_or_flex(&x.device(), x.dtype()) {
        return Tensor::from_dispatch(Dispatch::fp8_grouped_linear(
            x.into_dispatch(),
            weights.into_dispatch(),
            counts.into_dispatch(),
            format,
        ));
    }
    by_segment(x, weights, counts, |x, weight| linear(x, weight, format))
}

/// Panics unless rows, weights and order fit each other.
pub(super) fn check(x: &Tensor<2>, weights: &Tensor<3>, order: &Permutation) {
    let ([rows, k], [experts, inner, _]) = (x.dims(), weights.dims());
    let ([expected], [segments]) = (order.order.dims(), order.rows.dims());
    assert!(
        k == inner && rows == expected && experts == segments,
        "x {:?} and weights {:?} do not fit {segments} segments with {expected} rows in all",
        x.dims(),
        weights.dims()
    );
    let tile = segment_tile(&x.device());
    assert!(
        order.tile.is_multiple_of(tile),
        "segments are padded to multiples of {}, FP8 products on this device want {tile}",
        order.tile
    );
}

#[backend_extension(Cube: cfg(any(feature = "wgpu", feature = "cuda")), Flex, Autodiff)]
pub(crate) trait Fp8GroupedOps: burn::backend::Backend {
    /// `x_e W_e`: the rows of `x` `[R, K]`, as many for each matrix of `weights` `[E, K, N]` as `counts` says.
    fn fp8_grouped_linear(
        x: FloatTensor<Self>,
        weights: FloatTensor<Self>,
        counts: IntTensor<Self>,
        format: ScaleFormat,
    ) -> FloatTensor<Self>;
}

/// The gradients of [`Fp8GroupedOps`], on backends without autodiff.
pub(crate) trait Fp8GroupedGrad: Lift {
    /// `dx_e = dy_e W_e^T`.
    fn fp8_grouped_input_grad(
        grad: FloatTensor<Self>,
        weights: FloatTensor<Self>,
        counts: IntTensor<Self>,
        format: ScaleFormat,
    ) -> FloatTensor<Self>;

    /// `dW_e = x_e^T dy_e`, zero for an empty segment.
    fn fp8_grouped_weight_grad(
        x: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        counts: IntTensor<Self>,
        format: ScaleFormat,
    ) -> FloatTensor<Self>;
}

/// [`Fp8GroupedOps`] and [`Fp8GroupedGrad`] one expert after another, for backends whose host knows the `counts`.
pub(super) struct OneByOne<'a> {
    pub(super) counts: &'a [usize],
    pub(super) format: ScaleFormat,
}

impl OneByOne<'_> {
    /// `x_e W_e`, or `x_e W_e^T`.
    pub(super) fn product<B: Fp8Ops>(
        &self,
        x: FloatTensor<B>,
        weights: FloatTensor<B>,
        transposed: bool,
    ) -> FloatTensor<B> {
        let ([rows, _], [_, k, n]) = (dims(&x), dims(&weights));
        let width = if transposed { k } else { n };
        let of_segment = |(expert, rows): (usize, Range<usize>)| {
            let at = [
                Slice::from(expert..expert + 1),
                Slice::full(),
                Slice::full(),
            ];
            let weight = B::float_slice(weights.clone(), &at);
            let weight = B::float_reshape(weight, Shape::new([k, n]));
            let weight = match transposed {
                true => weight,
                false => B::float_transpose(weight),
            };
            let x = B::float_slice(x.clone(), &[Slice::from(rows), Slice::full()]);
            product::<B>(x, weight, Tile::Block, self.format)
        };
        let mut outputs: Vec<_> = self.segments().map(of_segment).collect();
        let behind = rows - self.counts.iter().sum::<usize>();
        if behind > 0 || outputs.is_empty() {
            outputs.push(zeros_like::<B>(&x, [behind, width]));
        }
        B::float_cat(outputs, 0)
    }

    /// `x_e^T dy_e`.
    pub(super) fn weight_grad<B: Fp8Ops>(
        &self,
        x: FloatTensor<B>,
        grad: FloatTensor<B>,
    ) -> FloatTensor<B> {
        let ([_, k], [_, n]) = (dims(&x), dims(&grad));
        let mut all = zeros_like::<B>(&x, [self.counts.len() * k, n]);
        for (expert, rows) in self.segments() {
            let columns = |of: &FloatTensor<B>| {
                let at = [Slice::from(rows.clone()), Slice::full()];
                B::float_transpose(B::float_slice(of.clone(), &at))
            };
            let grad = product::<B>(columns(&x), columns(&grad), Tile::Row, self.format);
            let at = [Slice::from(expert * k..(expert + 1) * k), Slice::full()];
            all = B::float_slice_assign(all, &at, grad);
        }
        B::float_reshape(all, Shape::new([self.counts.len(), k, n]))
    }

    /// Experts with rows, and which.
    fn segments(&self) -> impl Iterator<Item = (usize, Range<usize>)> {
        let mut end = 0;
        let segments = self.counts.iter().enumerate().map(move |(expert, &count)| {
            end += count;
            (expert, end - count..end)
        });
        segments.filter(|(_, rows)| !rows.is_empty())
    }
}

fn zeros_like<B: Fp8Ops>(like: &FloatTensor<B>, shape: [usize; 2]) -> FloatTensor<B> {
    B::float_zeros(Shape::new(shape), &like.device(), like.dtype().into())
}

#[derive(Debug)]
struct GroupedLinear;

impl<B: Fp8GroupedOps + Fp8GroupedGrad> Backward<B, 2> for GroupedLinear {
    type State = (FloatTensor<B>, FloatTensor<B>, IntTensor<B>, ScaleFormat);

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let grad = grads.consume::<B>(&ops.node);
        let weight_grad = Weight::of(&ops, 1);
        let (x, weights, counts, format) = ops.state;
        let [x_node, _] = ops.parents;
        if let Some(weight_grad) = weight_grad {
            let (grad, counts) = (grad.clone(), counts.clone());
            weight_grad.register::<B>(grads, move || {
                B::fp8_grouped_weight_grad(x, grad, counts, format)
            });
        }
        if let Some(node) = x_node {
            let grad = B::fp8_grouped_input_grad(grad, weights, counts, format);
            grads.register::<B>(node.id, grad);
        }
    }
}

impl<B: Fp8GroupedOps + Fp8GroupedGrad, C: CheckpointStrategy> Fp8GroupedOps for Autodiff<B, C> {
    fn fp8_grouped_linear(
        x: FloatTensor<Self>,
        weights: FloatTensor<Self>,
        counts: IntTensor<Self>,
        format: ScaleFormat,
    ) -> FloatTensor<Self> {
        match GroupedLinear
            .prepare::<C>([x.node(), weights.node()])
            .compute_bound()
            .stateful()
        {
            OpsKind::Tracked(prep) => {
                let (x, weights) = (x.into_primitive(), weights.into_primitive());
                let state = (x.clone(), weights.clone(), counts.clone(), format);
                prep.finish(state, B::fp8_grouped_linear(x, weights, counts, format))
            }
            OpsKind::UnTracked(prep) => prep.finish(B::fp8_grouped_linear(
                x.into_primitive(),
                weights.into_primitive(),
                counts,
                format,
            )),
        }
    }
}
