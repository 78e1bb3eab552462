//! The dense feed-forward part, also the form of the shared experts.

use burn::{module::Module, nn::Linear, tensor::Tensor};
use deepburn_kernels::swiglu::swiglu;

use crate::init::Initializer;

/// SwiGLU (Shazeer, 2020): `down(silu(gate(x)) * up(x))`.
#[derive(Module, Debug)]
pub struct Mlp {
    /// `[D, F]`
    pub gate_proj: Linear,
    /// `[D, F]`
    pub up_proj: Linear,
    /// `[F, D]`
    pub down_proj: Linear,
}

impl Mlp {
    /// A feed-forward part of the given width.
    pub fn new(hidden: usize, width: usize, init: Initializer) -> Self {
        Self {
            gate_proj: linear(hidden, width, init.child("gate_proj")),
            up_proj: linear(hidden, width, init.child("up_proj")),
            down_proj: linear(width, hidden, init.child("down_proj")),
        }
    }

    /// Applies the layer.
    ///
    /// # Shapes
    /// - `x`: `[..., D]`, as the result
    pub fn forward<const N: usize>(&self, x: Tensor<N>) -> Tensor<N> {
        self.down_proj.forward(swiglu(
            self.gate_proj.forward(x.clone()),
            self.up_proj.forward(x),
        ))
    }
}

/// A projection without bias, stored `[in, out]`: the transpose of PyTorch's layout, which rows multiply faster.
pub(crate) fn linear(inputs: usize, outputs: usize, init: Initializer) -> Linear {
    Linear {
        weight: init.normal("weight", [inputs, outputs]),
        bias: None,
    }
}
