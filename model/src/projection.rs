//! Multiplication with a matrix of weights, and the arithmetic that it is done in.

use burn::{
    module::{Module, Param},
    tensor::Tensor,
};
use deepburn_kernels::{
    fp8::{self, ScaleFormat},
    linear::linear,
};

use crate::init::Initializer;

/// How the layers' products of activations and weights are computed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Arithmetic {
    /// In the type of the weights.
    #[default]
    Full,
    /// In FP8, with activations quantised in tiles of 1 x 128, whose scales have this format, and weights in blocks of
    /// 128 x 128 (report section 3.3).
    /// Embedding, output head, router, norms, the attention core and the projection of MTP stay as they are.
    Fp8(ScaleFormat),
}

/// A matrix without bias.
#[derive(Module, Debug)]
pub struct Projection {
    /// `[in, out]`: the transpose of PyTorch's layout, which rows multiply faster.
    pub weight: Param<Tensor<2>>,
    #[module(skip)]
    pub(crate) arithmetic: Arithmetic,
}

impl Projection {
    /// A matrix with random elements.
    pub fn new(inputs: usize, outputs: usize, init: Initializer) -> Self {
        Self {
            weight: init.normal("weight", [inputs, outputs]),
            arithmetic: Arithmetic::Full,
        }
    }

    /// Multiplies every row of `x`.
    ///
    /// # Shapes
    /// - `x`: `[.., in]`
    /// - result: `[.., out]`
    pub fn forward<const N: usize>(&self, x: Tensor<N>) -> Tensor<N> {
        let weight = self.weight.val();
        let [inputs, outputs] = weight.dims();
        let mut shape = x.dims();
        let rows = x.reshape([-1, inputs as i32]);
        let rows = match self.arithmetic {
            Arithmetic::Full => linear(rows, weight),
            Arithmetic::Fp8(format) => fp8::linear(rows, weight, format),
        };
        shape[N - 1] = outputs;
        rows.reshape(shape)
    }
}
