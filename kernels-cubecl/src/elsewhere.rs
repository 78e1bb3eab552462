//! Results that other code has computed, with the gradients that it computes: how rows that went to other processes and
//! back are part of a graph.

use std::{fmt::Debug, sync::Arc};

use burn::{
    backend::{
        Autodiff, Backend, Dispatch, Flex, TensorMetadata,
        autodiff::{
            checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
            grads::Gradients,
            ops::{Backward, Ops, OpsKind},
        },
        backend_extension,
        ops::FloatTensorOps,
        tensor::FloatTensor,
    },
    tensor::{Tensor, TensorData, read_sync},
};

/// How the gradient of an input follows from that of a result.
pub trait GradientElsewhere: Debug + Send + Sync {
    /// The gradient of the input, of its shape. Called once, on the thread that computes gradients, in the same place among
    /// the other operations whatever the numbers are.
    fn input_gradient(&self, gradient: TensorData) -> TensorData;
}

/// The tensor of `result` as a function of `x`.
///
/// # Shapes
/// - `x`: any
/// - result: that of `result`, in the type of `x`
pub fn computed_elsewhere(
    x: Tensor<2>,
    result: TensorData,
    gradient: Arc<dyn GradientElsewhere>,
) -> Tensor<2> {
    let result = result.convert_dtype(x.dtype());
    Tensor::from_dispatch(Dispatch::adopt(x.into_dispatch(), result, gradient))
}

#[backend_extension(Cube: cfg(any(feature = "wgpu", feature = "cuda")), Flex, Autodiff)]
pub(crate) trait ElsewhereOps: Backend {
    fn adopt(
        x: FloatTensor<Self>,
        result: TensorData,
        gradient: Arc<dyn GradientElsewhere>,
    ) -> FloatTensor<Self>;
}

impl ElsewhereOps for Flex {
    fn adopt(
        x: FloatTensor<Self>,
        result: TensorData,
        _: Arc<dyn GradientElsewhere>,
    ) -> FloatTensor<Self> {
        Self::float_from_data(result, &x.device())
    }
}

#[cfg(any(feature = "wgpu", feature = "cuda"))]
impl ElsewhereOps for burn::backend::Cube {
    fn adopt(
        x: FloatTensor<Self>,
        result: TensorData,
        _: Arc<dyn GradientElsewhere>,
    ) -> FloatTensor<Self> {
        Self::float_from_data(result, &x.device())
    }
}

#[derive(Debug)]
struct Adopt;

impl<B: Backend> Backward<B, 1> for Adopt {
    type State = (Arc<dyn GradientElsewhere>, B::Device);

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let grad = grads.consume::<B>(&ops.node);
        let (gradient, device) = ops.state;
        let dtype = grad.dtype();
        let grad =
            read_sync(B::float_into_data(grad)).expect("the device gives its tensors to the host");
        // Even if nobody wants it here: others take part in what is computed.
        let grad = gradient.input_gradient(grad).convert_dtype(dtype);
        let [x] = ops.parents;
        if let Some(x) = x {
            grads.register::<B>(x.id, B::float_from_data(grad, &device));
        }
    }
}

impl<B: ElsewhereOps, C: CheckpointStrategy> ElsewhereOps for Autodiff<B, C> {
    fn adopt(
        x: FloatTensor<Self>,
        result: TensorData,
        gradient: Arc<dyn GradientElsewhere>,
    ) -> FloatTensor<Self> {
        let node = x.node();
        let x = x.into_primitive();
        let device = x.device();
        let output = B::adopt(x, result, gradient.clone());
        match Adopt.prepare::<C>([node]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish((gradient, device), output),
            OpsKind::UnTracked(prep) => prep.finish(output),
        }
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;

    use super::*;

    /// Reverses the rows and doubles them.
    #[derive(Debug)]
    struct Doubled;

    fn reversed(data: TensorData) -> TensorData {
        let rows = data.shape().clone();
        let values: Vec<f32> = data.iter::<f32>().map(|value| 2.0 * value).collect();
        let values = values.chunks(rows[1]).rev().flatten().copied().collect();
        TensorData::new::<f32, _>(values, rows)
    }

    impl GradientElsewhere for Doubled {
        fn input_gradient(&self, gradient: TensorData) -> TensorData {
            reversed(gradient)
        }
    }

    #[test]
    fn gradients_pass_through_what_others_computed() {
        let device = Device::flex().autodiff();
        let x = Tensor::<2>::from_data([[1.0, 2.0], [3.0, 4.0]], &device).require_grad();
        let inner = x.clone() * 3.0;
        let y = computed_elsewhere(
            inner.clone(),
            reversed(inner.into_data()),
            Arc::new(Doubled),
        );
        let factors = Tensor::from_data([[1.0, 10.0], [100.0, 1000.0]], &device);
        let grads = (y.clone() * factors).sum().backward();
        let expected = TensorData::from([[18.0f32, 24.0], [6.0, 12.0]]);
        y.into_data().assert_eq(&expected, true);
        let expected = TensorData::from([[600.0f32, 6000.0], [6.0, 60.0]]);
        x.grad(&grads)
            .unwrap()
            .into_data()
            .assert_eq(&expected, true);
    }

    #[test]
    fn without_gradients_it_is_a_constant() {
        let x = Tensor::<2>::ones([1, 2], &Device::flex());
        let y = computed_elsewhere(x, TensorData::from([[5.0f32], [6.0]]), Arc::new(Doubled));
        y.into_data()
            .assert_eq(&TensorData::from([[5.0f32], [6.0]]), true);
    }
}
