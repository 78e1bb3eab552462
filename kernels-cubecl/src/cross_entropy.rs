//! Cross-entropy of logits with one right class per row.
//!
//! Native on Flex for f32: one pass over the logits forward and one backward, in place of a log-softmax and its
//! gradient as tensors of their own.

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
    flex::{contiguous, dims, elements, float_tensor, indices, is_native_f32},
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
}

/// The gradient of [`CrossEntropyOps`], on backends without autodiff.
pub(crate) trait CrossEntropyGrad: burn::backend::Backend {
    /// `grad / N * (softmax(logits) - one_hot(targets))`
    fn mean_cross_entropy_grad(
        grad: FloatTensor<Self>,
        logits: FloatTensor<Self>,
        targets: IntTensor<Self>,
    ) -> FloatTensor<Self>;
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
                vectorized(|| {
                    let (highest, total) = softmax_parts(row);
                    (highest - row[target]) + total.ln()
                })
            })
            .collect();
        // In double precision and in order, so that the sum does not depend on threads.
        let total: f64 = losses.iter().map(|&loss| f64::from(loss)).sum();
        float_tensor(vec![(total / rows as f64) as f32], [1])
    }
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
                vectorized(|| {
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
}
