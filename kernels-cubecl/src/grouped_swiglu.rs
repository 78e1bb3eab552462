//! SwiGLU experts over contiguous segments of rows: `y_e = (silu(x_e G_e) * x_e U_e) D_e`.
//!
//! Native on Flex for f32: the rows of a segment go through the three matrices on one thread, so that what is between
//! them stays in its cache. The backward pass keeps `x G` and `x U` and computes the gate again.

use std::{mem::MaybeUninit, ops::Range};

use burn::{
    backend::{
        Autodiff, Dispatch, Flex,
        autodiff::{
            checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
            grads::Gradients,
            ops::{Backward, Ops, OpsKind},
        },
        backend_extension,
        tensor::{FloatTensor, IntTensor},
    },
    tensor::{Int, Tensor},
};

use crate::{
    flex::{FlexFloat, contiguous, dims, elements, float_tensor, is_native_f32},
    gemm::{Into, Matrix, multiply, multiply_fresh},
    grouped_gemm::{GroupedGemmGrad, flex::segments, grouped_matmul},
    parts::{by_rows, zeroed},
    swiglu::{gate, gate_and_grads, swiglu},
    vector::vectorized,
    weight_grad::Weight,
};

/// Applies expert `e`, its matrices number `e` of `gate`, `up` and `down`, to segment `e` of the rows of `x`.
///
/// Segments are as in [`grouped_matmul`]: `counts[e]` rows each, and rows behind the last are zero in the result. Where
/// there is no native version, the products are [`grouped_matmul`]'s.
///
/// # Shapes
/// - `x`: `[S, D]`, `gate` and `up`: `[E, D, F]`, `down`: `[E, F, D]`, `counts`: `[E]` with a sum of at most S
/// - result: `[S, D]`
///
/// # Panics
/// If sizes do not fit each other, or types.
pub fn grouped_swiglu(
    x: Tensor<2>,
    [gate, up, down]: [Tensor<3>; 3],
    counts: Tensor<1, Int>,
) -> Tensor<2> {
    let ([_, width], [experts, inner, hidden]) = (x.dims(), gate.dims());
    assert!(
        width == inner
            && up.dims() == gate.dims()
            && down.dims() == [experts, hidden, width]
            && counts.dims() == [experts],
        "x {:?}, gate {:?}, up {:?}, down {:?} and counts {:?} do not fit",
        x.dims(),
        gate.dims(),
        up.dims(),
        down.dims(),
        counts.dims()
    );
    let types = [gate.dtype(), up.dtype(), down.dtype()];
    assert!(
        types.iter().all(|&dtype| dtype == x.dtype()),
        "x in {:?} with weights in {types:?}",
        x.dtype()
    );
    if is_native_f32(&x.device(), x.dtype()) {
        let [gate, up, down] = [gate, up, down].map(Tensor::into_dispatch);
        let (x, counts) = (x.into_dispatch(), counts.into_dispatch());
        Tensor::from_dispatch(Dispatch::segment_swiglu(x, gate, up, down, counts))
    } else {
        reference(x, [gate, up, down], counts)
    }
}

fn reference(x: Tensor<2>, [gate, up, down]: [Tensor<3>; 3], counts: Tensor<1, Int>) -> Tensor<2> {
    let gate = grouped_matmul(x.clone(), gate, counts.clone());
    let up = grouped_matmul(x, up, counts.clone());
    grouped_matmul(swiglu(gate, up), down, counts)
}

#[backend_extension(Flex, Autodiff)]
pub(crate) trait GroupedSwigluOps: burn::backend::Backend {
    fn segment_swiglu(
        x: FloatTensor<Self>,
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        down: FloatTensor<Self>,
        counts: IntTensor<Self>,
    ) -> FloatTensor<Self>;
}

/// The three matrices of all experts.
type Matrices<B> = [FloatTensor<B>; 3];

/// What the backward passes of [`GroupedSwigluOps`] need, on backends without autodiff.
pub(crate) trait GroupedSwigluGrad: GroupedGemmGrad {
    /// The result, `x G` and `x U`.
    fn segment_swiglu_saving(
        x: FloatTensor<Self>,
        weights: Matrices<Self>,
        counts: IntTensor<Self>,
    ) -> [FloatTensor<Self>; 3];

    /// The gradients with respect to `x`, `x G` and `x U`, given the latter two, and what comes into `D`.
    fn segment_swiglu_input_grad(
        grad: FloatTensor<Self>,
        between: [FloatTensor<Self>; 2],
        weights: Matrices<Self>,
        counts: IntTensor<Self>,
    ) -> [FloatTensor<Self>; 4];
}

impl GroupedSwigluOps for Flex {
    fn segment_swiglu(
        x: FloatTensor<Self>,
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        down: FloatTensor<Self>,
        counts: IntTensor<Self>,
    ) -> FloatTensor<Self> {
        let [y, ..] = Self::segment_swiglu_saving(x, [gate, up, down], counts);
        y
    }
}

impl GroupedSwigluGrad for Flex {
    fn segment_swiglu_saving(
        x: FloatTensor<Self>,
        weights: Matrices<Self>,
        counts: IntTensor<Self>,
    ) -> [FloatTensor<Self>; 3] {
        let ([rows, width], [_, _, hidden]) = (dims(&x), dims(&weights[0]));
        let (x, weights) = (contiguous(x), weights.map(contiguous));
        let x = elements::<f32>(&x);
        let segments = segments(&counts, rows);
        of_segments(&segments, [width, hidden, hidden], |expert, all| {
            let rows = segments[expert].clone();
            let Some([gate_proj, up_proj, down_proj]) = of_expert(&weights, expert) else {
                return all.map(zeroed);
            };
            let [y, gated, up] = all;
            let x = Matrix::of(&x[rows.start * width..], rows.len(), width);
            let gated = multiply_fresh(x, gate_proj, gated);
            let up = multiply_fresh(x, up_proj, up);
            let mut hidden_rows = vec![0f32; gated.len()];
            vectorized!(gate(gated, up, &mut hidden_rows));
            let hidden_rows = Matrix::of(&hidden_rows, rows.len(), hidden);
            let y = multiply_fresh(hidden_rows, down_proj, y);
            [y, gated, up]
        })
    }

    fn segment_swiglu_input_grad(
        grad: FloatTensor<Self>,
        between: [FloatTensor<Self>; 2],
        weights: Matrices<Self>,
        counts: IntTensor<Self>,
    ) -> [FloatTensor<Self>; 4] {
        let ([rows, width], [_, _, hidden]) = (dims(&grad), dims(&weights[0]));
        let (grad, weights) = (contiguous(grad), weights.map(contiguous));
        let grad = elements::<f32>(&grad);
        let [gated, up] = between.each_ref().map(elements::<f32>);
        let segments = segments(&counts, rows);
        of_segments(&segments, [width, hidden, hidden, hidden], |expert, all| {
            let rows = segments[expert].clone();
            let Some(matrices) = of_expert(&weights, expert) else {
                return all.map(zeroed);
            };
            let [dx, d_gated, d_up, hidden_rows] = all;
            let [gate_proj, up_proj, down_proj] = matrices.map(Matrix::transposed);
            let grad = Matrix::of(&grad[rows.start * width..], rows.len(), width);
            let d_up = multiply_fresh(grad, down_proj, d_up);
            let (d_gated, hidden_rows) = (zeroed(d_gated), zeroed(hidden_rows));
            let part = rows.start * hidden..rows.end * hidden;
            let inputs = gated[part.clone()].iter().zip(&up[part]);
            vectorized!({
                let outputs = d_gated.iter_mut().zip(&mut *d_up).zip(&mut *hidden_rows);
                for ((&gated, &up), ((d_gated, d_up), hidden)) in inputs.clone().zip(outputs) {
                    [*hidden, *d_gated, *d_up] = gate_and_grads(gated, up, *d_up);
                }
            });
            let of_hidden = |values| Matrix::of(values, rows.len(), hidden);
            let dx = multiply_fresh(of_hidden(&*d_gated), gate_proj, dx);
            multiply(of_hidden(&*d_up), up_proj, dx, Into::Add);
            [dx, d_gated, d_up, hidden_rows]
        })
    }
}

/// The matrices of one expert; none for the rows behind the last.
fn of_expert(weights: &[FlexFloat; 3], expert: usize) -> Option<[Matrix<'_, f32>; 3]> {
    let [experts, ..]: [usize; 3] = dims(&weights[0]);
    (expert < experts).then(|| {
        weights.each_ref().map(|weights| {
            let [_, rows, columns] = dims(weights);
            let first = expert * rows * columns;
            Matrix::of(&elements::<f32>(weights)[first..], rows, columns)
        })
    })
}

/// Matrices of the given widths, of which `fill` fills and returns the rows of each segment.
fn of_segments<const N: usize>(
    segments: &[Range<usize>],
    widths: [usize; N],
    fill: impl for<'a> Fn(usize, [&'a mut [MaybeUninit<f32>]; N]) -> [&'a mut [f32]; N] + Sync,
) -> [FlexFloat; N] {
    let rows: Vec<usize> = segments.iter().map(Range::len).collect();
    let all = by_rows(&rows, widths, fill);
    let mut widths = widths.into_iter();
    all.map(|elements| {
        let width = widths.next().expect("as many");
        float_tensor(elements, [rows.iter().sum(), width])
    })
}

#[derive(Debug)]
struct SegmentSwiglu;

/// What the backward pass needs.
#[derive(Clone, Debug)]
struct Kept<B: burn::backend::Backend> {
    x: FloatTensor<B>,
    /// `x G` and `x U`.
    between: [FloatTensor<B>; 2],
    weights: Matrices<B>,
    counts: IntTensor<B>,
}

impl<B: GroupedSwigluOps + GroupedSwigluGrad> Backward<B, 4> for SegmentSwiglu {
    type State = Kept<B>;

    fn backward(self, ops: Ops<Kept<B>, 4>, grads: &mut Gradients, _: &mut Checkpointer) {
        let grad = grads.consume::<B>(&ops.node);
        let of_weights = [1, 2, 3].map(|parent| Weight::of(&ops, parent));
        let Kept {
            x,
            between,
            weights,
            counts,
        } = ops.state;
        let [dx, d_gated, d_up, hidden] =
            B::segment_swiglu_input_grad(grad.clone(), between, weights, counts.clone());
        let factors = [(x.clone(), d_gated), (x, d_up), (hidden, grad)];
        for (weight, (x, grad)) in of_weights.into_iter().zip(factors) {
            if let Some(weight) = weight {
                let counts = counts.clone();
                weight.register::<B>(grads, || B::segment_matmul_weight_grad(x, grad, counts));
            }
        }
        let [x_node, ..] = ops.parents;
        if let Some(node) = x_node {
            grads.register::<B>(node.id, dx);
        }
    }
}

impl<B, C> GroupedSwigluOps for Autodiff<B, C>
where
    B: GroupedSwigluOps + GroupedSwigluGrad,
    C: CheckpointStrategy,
{
    fn segment_swiglu(
        x: FloatTensor<Self>,
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        down: FloatTensor<Self>,
        counts: IntTensor<Self>,
    ) -> FloatTensor<Self> {
        let nodes = [x.node(), gate.node(), up.node(), down.node()];
        let x = x.into_primitive();
        let weights = [gate, up, down].map(|weight| weight.into_primitive());
        let [output, gated, up] =
            B::segment_swiglu_saving(x.clone(), weights.clone(), counts.clone());
        match SegmentSwiglu.prepare::<C>(nodes).compute_bound().stateful() {
            OpsKind::Tracked(prep) => {
                let kept = Kept {
                    x,
                    between: [gated, up],
                    weights,
                    counts,
                };
                prep.finish(kept, output)
            }
            OpsKind::UnTracked(prep) => prep.finish(output),
        }
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, Distribution, TensorData, Tolerance};

    use super::*;
    use crate::weight_grad::put_off;

    /// One segment empty, one of a single row, rows behind the last; and none of any segment.
    const COUNTS: [[i32; 4]; 2] = [[40, 0, 1, 7], [0; 4]];

    type Experts = fn(Tensor<2>, [Tensor<3>; 3], Tensor<1, Int>) -> Tensor<2>;

    #[test]
    fn native_agrees_with_reference() {
        let device = Device::flex().autodiff();
        let normal = Distribution::Normal(0.0, 1.0);
        let (rows, width, hidden) = (51, 20, 12);
        for counts in COUNTS {
            let shapes = [[4, width, hidden], [4, width, hidden], [4, hidden, width]];
            let weights =
                shapes.map(|shape| Tensor::<3>::random(shape, normal, &device).require_grad());
            let x = Tensor::<2>::random([rows, width], normal, &device).require_grad();
            let run = |experts: Experts| {
                let counts = Tensor::from_data(TensorData::from(counts), &device);
                let y = experts(x.clone(), weights.clone(), counts);
                let grads = y.clone().powi_scalar(2).sum().backward();
                let of_weights = weights
                    .each_ref()
                    .map(|weight| weight.grad(&grads).expect("reached").into_data());
                let of_x = x.grad(&grads).expect("reached").into_data();
                [y.into_data(), of_x].into_iter().chain(of_weights)
            };
            for (found, expected) in run(grouped_swiglu).zip(run(reference)) {
                found.assert_approx_eq(&expected, Tolerance::<f32>::rel_abs(1e-5, 1e-3));
            }
        }
    }

    #[test]
    fn gradients_of_the_three_weights_can_wait() {
        let device = Device::flex().autodiff();
        let normal = Distribution::Normal(0.0, 1.0);
        let weights = [[4, 6, 5], [4, 6, 5], [4, 5, 6]]
            .map(|shape| Tensor::<3>::random(shape, normal, &device).require_grad());
        let x = Tensor::<2>::random([48, 6], normal, &device);
        let loss = || {
            let counts = Tensor::from_data(TensorData::from(COUNTS[0]), &device);
            grouped_swiglu(x.clone(), weights.clone(), counts).sum()
        };
        let (grads, products) = put_off(|| loss().backward());
        assert_eq!(products.len(), 3);
        let mut later = products.compute();
        let at_once = loss().backward();
        for weight in &weights {
            assert!(weight.grad(&grads).is_none());
            let later = later.remove(weight).expect("put off").into_data();
            assert_eq!(later, weight.grad(&at_once).expect("reached").into_data());
        }
    }
}
