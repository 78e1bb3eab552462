//! Cross-entropy with one right class per row: of logits, and of an output head that makes them.
//!
//! Native on Flex for f32. Of logits: one pass over them forward and one backward, in place of a log-softmax and its
//! gradient as tensors of their own. With the head: a slice of rows at a time from logits to gradients, so that neither
//! logits nor their gradient are ever there as a whole.

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
    tensor::{Int, Tensor, activation::log_softmax},
};
use rayon::prelude::*;

use crate::{
    flex::{
        ascending, contiguous, dims, elements, elements_mut, float_tensor, indices, is_native_f32,
        matrix,
    },
    gemm::{Into, Matrix, add_product, multiply},
    vector::{exp, max, sum, vectorized},
};

/// Mean over the rows of `-log softmax(logits)[target]`, in nats.
///
/// # Shapes
/// - `logits`: `[N, W]`
/// - `targets`: `[N]`, classes below W
/// - result: `[1]`
pub fn cross_entropy(logits: Tensor<2>, targets: Tensor<1, Int>) -> Tensor<1> {
    if is_native_f32(&logits.device(), logits.dtype()) {
        let (logits, targets) = (logits.into_dispatch(), targets.into_dispatch());
        Tensor::from_dispatch(Dispatch::mean_cross_entropy(logits, targets))
    } else {
        reference(logits, targets)
    }
}

/// As [`cross_entropy`], of the logits `x W`.
///
/// # Shapes
/// - `x`: `[N, D]`, `weight`: `[D, W]`
/// - `targets`: `[N]`, classes below W
/// - result: `[1]`
pub fn linear_cross_entropy(x: Tensor<2>, weight: Tensor<2>, targets: Tensor<1, Int>) -> Tensor<1> {
    if is_native_f32(&x.device(), x.dtype()) {
        let (x, weight) = (x.into_dispatch(), weight.into_dispatch());
        let targets = targets.into_dispatch();
        Tensor::from_dispatch(Dispatch::head_cross_entropy(x, weight, targets))
    } else {
        cross_entropy(x.matmul(weight), targets)
    }
}

fn reference(logits: Tensor<2>, targets: Tensor<1, Int>) -> Tensor<1> {
    log_softmax(logits, 1)
        .gather(1, targets.unsqueeze_dim(1))
        .mean()
        .neg()
}

#[backend_extension(Flex, Autodiff)]
pub(crate) trait CrossEntropyOps: burn::backend::Backend {
    fn mean_cross_entropy(logits: FloatTensor<Self>, targets: IntTensor<Self>)
    -> FloatTensor<Self>;

    fn head_cross_entropy(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        targets: IntTensor<Self>,
    ) -> FloatTensor<Self>;
}

/// The gradient of [`CrossEntropyOps`], on backends without autodiff.
pub(crate) trait CrossEntropyGrad: burn::backend::Backend {
    /// `grad / N * (softmax(logits) - one_hot(targets))`
    fn mean_cross_entropy_grad(
        grad: FloatTensor<Self>,
        logits: FloatTensor<Self>,
        targets: IntTensor<Self>,
    ) -> FloatTensor<Self>;

    /// The loss of `head_cross_entropy` and its gradients with respect to `x` and to `weight`.
    fn head_cross_entropy_grads(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        targets: IntTensor<Self>,
    ) -> [FloatTensor<Self>; 3];

    /// A gradient times that of the loss, a single number.
    fn scaled(grad: FloatTensor<Self>, scale: FloatTensor<Self>) -> FloatTensor<Self>;
}

impl CrossEntropyOps for Flex {
    fn mean_cross_entropy(
        logits: FloatTensor<Self>,
        targets: IntTensor<Self>,
    ) -> FloatTensor<Self> {
        let [rows, classes] = dims(&logits);
        let (logits, targets) = (contiguous(logits), indices(&targets));
        let losses: Vec<f32> = elements::<f32>(&logits)
            .par_chunks_exact(classes)
            .zip(targets)
            .map(|(row, target)| {
                vectorized!({
                    let (highest, total) = softmax_parts(row);
                    (highest - row[target]) + total.ln()
                })
            })
            .collect();
        float_tensor(vec![mean(&losses, rows)], [1])
    }

    fn head_cross_entropy(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        targets: IntTensor<Self>,
    ) -> FloatTensor<Self> {
        let ([rows, width], [_, classes]) = (dims(&x), dims(&weight));
        let (x, targets) = (contiguous(x), indices(&targets));
        let weight = ascending(weight);
        let (x, weight) = (elements::<f32>(&x), matrix(&weight));
        let (_, part) = slice_and_part(rows, classes);
        let mut losses = vec![0f32; rows];
        let parts = losses.par_chunks_mut(part).zip(x.par_chunks(part * width));
        parts
            .zip(targets.par_chunks(part))
            .for_each(|((losses, x), targets)| {
                let mut logits = vec![0f32; losses.len() * classes];
                multiply(
                    Matrix::of(x, losses.len(), width),
                    weight,
                    &mut logits,
                    Into::Replace,
                );
                for ((loss, row), &target) in losses
                    .iter_mut()
                    .zip(logits.chunks_exact(classes))
                    .zip(targets)
                {
                    let (highest, total) = vectorized!(softmax_parts(row));
                    *loss = (highest - row[target]) + total.ln();
                }
            });
        float_tensor(vec![mean(&losses, rows)], [1])
    }
}

/// In double precision and in order, so that the sum does not depend on threads.
fn mean(losses: &[f32], rows: usize) -> f32 {
    let total: f64 = losses.iter().map(|&loss| f64::from(loss)).sum();
    (total / rows as f64) as f32
}

/// Rows whose logits are there at a time, some megabytes, whatever the number of threads: the gradient of the weights is
/// summed over such slices. Also the rows of a slice that one thread has.
fn slice_and_part(rows: usize, classes: usize) -> (usize, usize) {
    const LOGITS: usize = 1 << 22;
    let slice = (LOGITS / classes).clamp(32, 512).min(rows.max(1));
    (slice, slice.div_ceil(rayon::current_num_threads()))
}

impl CrossEntropyGrad for Flex {
    fn mean_cross_entropy_grad(
        grad: FloatTensor<Self>,
        logits: FloatTensor<Self>,
        targets: IntTensor<Self>,
    ) -> FloatTensor<Self> {
        let [rows, classes] = dims(&logits);
        let scale = elements::<f32>(&contiguous(grad))[0] / rows as f32;
        let (logits, targets) = (contiguous(logits), indices(&targets));
        let mut out = vec![0f32; rows * classes];
        out.par_chunks_exact_mut(classes)
            .zip(elements::<f32>(&logits).par_chunks_exact(classes))
            .zip(targets)
            .for_each(|((out, row), target)| {
                vectorized!({
                    let (highest, total) = softmax_parts(row);
                    let factor = scale / total;
                    for (out, &logit) in out.iter_mut().zip(row) {
                        *out = factor * exp(logit - highest);
                    }
                });
                out[target] -= scale;
            });
        float_tensor(out, [rows, classes])
    }

    /// With P the probabilities and Y the right classes: dZ = (P - Y) / N, dX = dZ W^T, dW = X^T dZ. Threads have rows of
    /// X for the first two, rows of W for the last, which is summed over the slices in order.
    fn head_cross_entropy_grads(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        targets: IntTensor<Self>,
    ) -> [FloatTensor<Self>; 3] {
        let ([rows, width], [_, classes]) = (dims(&x), dims(&weight));
        let (x, targets) = (contiguous(x), indices(&targets));
        let weight = ascending(weight);
        let (x, weight) = (elements::<f32>(&x), matrix(&weight));
        let scale = 1.0 / rows as f32;
        let (slice, part) = slice_and_part(rows, classes);
        let mut losses = vec![0f32; rows];
        let mut grad_x = vec![0f32; rows * width];
        let mut grad_weight = vec![0f32; width * classes];
        let mut logits = vec![0f32; slice.min(rows) * classes];
        let slices = losses
            .chunks_mut(slice)
            .zip(grad_x.chunks_mut(slice * width));
        let inputs = x.chunks(slice * width).zip(targets.chunks(slice));
        for ((losses, grad_x), (x, targets)) in slices.zip(inputs) {
            let rows = losses.len();
            let logits = &mut logits[..rows * classes];
            let outputs = losses
                .par_chunks_mut(part)
                .zip(grad_x.par_chunks_mut(part * width));
            let inputs = x.par_chunks(part * width).zip(targets.par_chunks(part));
            let tasks = logits
                .par_chunks_mut(part * classes)
                .zip(outputs)
                .zip(inputs);
            tasks.for_each(|((logits, (losses, grad_x)), (x, targets))| {
                let rows = losses.len();
                multiply(Matrix::of(x, rows, width), weight, logits, Into::Replace);
                let examples = losses.iter_mut().zip(logits.chunks_exact_mut(classes));
                for ((loss, row), &target) in examples.zip(targets) {
                    let (highest, total) = vectorized!(softmax_parts(row));
                    *loss = (highest - row[target]) + total.ln();
                    let factor = scale / total;
                    vectorized!({
                        for logit in &mut *row {
                            *logit = factor * exp(*logit - highest);
                        }
                    });
                    row[target] -= scale;
                }
                let grad = Matrix::of(logits, rows, classes);
                multiply(grad, weight.transposed(), grad_x, Into::Replace);
            });
            let x = Matrix::of(x, rows, width).transposed();
            add_product(x, Matrix::of(logits, rows, classes), &mut grad_weight);
        }
        [
            float_tensor(vec![mean(&losses, losses.len())], [1]),
            float_tensor(grad_x, [rows, width]),
            float_tensor(grad_weight, [width, classes]),
        ]
    }

    fn scaled(mut grad: FloatTensor<Self>, scale: FloatTensor<Self>) -> FloatTensor<Self> {
        let scale = elements::<f32>(&contiguous(scale))[0];
        // That of a loss that is itself what is minimised.
        if scale != 1.0 {
            elements_mut::<f32>(&mut grad)
                .par_iter_mut()
                .for_each(|grad| *grad *= scale);
        }
        grad
    }
}

/// The highest logit and the sum of `e^(logit - highest)`. Kept apart: added up as a log-sum-exp, a probability near
/// one would carry the rounding of the highest logit.
#[inline(always)]
fn softmax_parts(row: &[f32]) -> (f32, f32) {
    let highest = max(row);
    (highest, sum(row, |logit| exp(logit - highest)))
}

#[derive(Debug)]
struct MeanCrossEntropy;

impl<B: CrossEntropyOps + CrossEntropyGrad> Backward<B, 1> for MeanCrossEntropy {
    type State = (FloatTensor<B>, IntTensor<B>);

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let grad = grads.consume::<B>(&ops.node);
        let (logits, targets) = ops.state;
        let [node] = ops.parents;
        if let Some(node) = node {
            grads.register::<B>(node.id, B::mean_cross_entropy_grad(grad, logits, targets));
        }
    }
}

impl<B, C> CrossEntropyOps for Autodiff<B, C>
where
    B: CrossEntropyOps + CrossEntropyGrad,
    C: CheckpointStrategy,
{
    fn mean_cross_entropy(
        logits: FloatTensor<Self>,
        targets: IntTensor<Self>,
    ) -> FloatTensor<Self> {
        match MeanCrossEntropy
            .prepare::<C>([logits.node()])
            .compute_bound()
            .stateful()
        {
            OpsKind::Tracked(prep) => {
                let logits = logits.into_primitive();
                let output = B::mean_cross_entropy(logits.clone(), targets.clone());
                prep.finish((logits, targets), output)
            }
            OpsKind::UnTracked(prep) => {
                prep.finish(B::mean_cross_entropy(logits.into_primitive(), targets))
            }
        }
    }

    fn head_cross_entropy(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        targets: IntTensor<Self>,
    ) -> FloatTensor<Self> {
        let nodes = [x.node(), weight.node()];
        let (x, weight) = (x.into_primitive(), weight.into_primitive());
        match HeadCrossEntropy
            .prepare::<C>(nodes)
            .compute_bound()
            .stateful()
        {
            OpsKind::Tracked(prep) => {
                let [loss, grad_x, grad_weight] = B::head_cross_entropy_grads(x, weight, targets);
                prep.finish([grad_x, grad_weight], loss)
            }
            OpsKind::UnTracked(prep) => prep.finish(B::head_cross_entropy(x, weight, targets)),
        }
    }
}

/// The gradients are there since the forward pass; the backward pass only scales them.
#[derive(Debug)]
struct HeadCrossEntropy;

impl<B: CrossEntropyOps + CrossEntropyGrad> Backward<B, 2> for HeadCrossEntropy {
    type State = [FloatTensor<B>; 2];

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let scale = grads.consume::<B>(&ops.node);
        for (node, grad) in ops.parents.into_iter().zip(ops.state) {
            if let Some(node) = node {
                grads.register::<B>(node.id, B::scaled(grad, scale.clone()));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, Distribution, TensorData, Tolerance};
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn native_agrees_with_reference(
            (classes, targets) in (1usize..70).prop_flat_map(|classes| (
                Just(classes), prop::collection::vec(0..classes as i32, 1..20)
            ))
        ) {
            let device = Device::flex().autodiff();
            let rows = targets.len();
            let spread = Distribution::Normal(0.0, 8.0);
            let logits = Tensor::<2>::random([rows, classes], spread, &device).require_grad();
            let targets = Tensor::<1, Int>::from_data(TensorData::new(targets, [rows]), &device);
            let run = |loss: Tensor<1>| {
                let grads = (loss.clone() * 3.0).backward();
                (loss.into_data(), logits.grad(&grads).unwrap().into_data())
            };
            let native = run(cross_entropy(logits.clone(), targets.clone()));
            let expected = run(reference(logits.clone(), targets));
            native.0.assert_approx_eq(&expected.0, Tolerance::<f32>::rel_abs(1e-5, 1e-5));
            // Logits go to about 40, where neighbouring numbers are 4e-6 apart: that is the relative error of exp.
            native.1.assert_approx_eq(&expected.1, Tolerance::<f32>::rel_abs(1e-5, 1e-6));
        }
    }

    #[test]
    fn gradients_do_not_depend_on_the_number_of_threads() {
        let device = Device::flex().autodiff();
        let random = |shape: [usize; 2]| {
            Tensor::<2>::random(shape, Distribution::Normal(0.0, 1.0), &device).require_grad()
        };
        let (x, weight) = (random([1100, 24]), random([24, 8192]));
        let targets: Vec<i32> = (0..1100).map(|row| row * 7919 % 8192).collect();
        let targets = Tensor::<1, Int>::from_data(&targets[..], &device);
        let run = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new()
                .num_threads(threads)
                .build()
                .unwrap();
            pool.install(|| {
                let loss = linear_cross_entropy(x.clone(), weight.clone(), targets.clone());
                let grads = loss.backward();
                [&x, &weight].map(|of| of.grad(&grads).expect("reached").into_data())
            })
        };
        let expected = run(1);
        for threads in [2, 3, 5] {
            assert_eq!(run(threads), expected, "{threads} threads");
        }
    }

    #[test]
    fn the_head_agrees_with_its_logits() {
        let device = Device::flex().autodiff();
        // One row; rows and classes that are cut into slices, with tails; a view for a weight, as of tied embeddings.
        for [rows, width, classes] in [[1, 3, 2], [70, 9, 33], [600, 20, 5001], [40, 4, 140_000]] {
            let random = |shape: [usize; 2]| {
                Tensor::<2>::random(shape, Distribution::Normal(0.0, 1.0), &device).require_grad()
            };
            let (x, weight) = (random([rows, width]), random([classes, width]));
            let targets: Vec<i32> = (0..rows).map(|row| (row * 7919 % classes) as i32).collect();
            let targets = Tensor::<1, Int>::from_data(TensorData::new(targets, [rows]), &device);
            let run = |loss: Tensor<1>| {
                let grads = (loss.clone() * 3.0).backward();
                let grads = [&x, &weight].map(|of| of.grad(&grads).expect("reached").into_data());
                (loss.into_data(), grads)
            };
            let view = || weight.clone().transpose();
            let found = run(linear_cross_entropy(x.clone(), view(), targets.clone()));
            let expected = run(reference(x.clone().matmul(view()), targets.clone()));
            found
                .0
                .assert_approx_eq(&expected.0, Tolerance::<f32>::relative(1e-5));
            for (found, expected) in found.1.iter().zip(&expected.1) {
                // Logits go to 20 and are off by some 5e-6, and so is a probability, relatively; it is multiplied with a
                // number up to 4 and 3 / N.
                let close = Tolerance::<f32>::rel_abs(1e-4, 1e-6 + 1e-4 / rows as f32);
                found.assert_approx_eq(expected, close);
            }
            let plain = linear_cross_entropy(x.clone().inner(), view().inner(), targets.inner());
            assert_eq!(plain.into_data(), found.0);
        }
    }
}
