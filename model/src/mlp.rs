//! The dense feed-forward part, also the form of the shared experts.

use burn::{module::Module, tensor::Tensor};
use deepburn_kernels::{
    compact::{CompactFormat, NotCompact},
    swiglu::swiglu,
};

use crate::{
    init::Initializer,
    projection::{Arithmetic, Projection},
};

/// SwiGLU (Shazeer, 2020): `down(silu(gate(x)) * up(x))`.
#[derive(Module, Debug)]
pub struct Mlp {
    /// `[D, F]`
    pub gate_proj: Projection,
    /// `[D, F]`
    pub up_proj: Projection,
    /// `[F, D]`
    pub down_proj: Projection,
}

impl Mlp {
    /// A feed-forward part of the given width.
    pub fn new(hidden: usize, width: usize, init: Initializer) -> Self {
        Self {
            gate_proj: Projection::new(hidden, width, init.child("gate_proj")),
            up_proj: Projection::new(hidden, width, init.child("up_proj")),
            down_proj: Projection::new(width, hidden, init.child("down_proj")),
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

    /// Holds the weights in a compact format.
    pub(crate) fn hold(&mut self, format: CompactFormat) -> Result<(), NotCompact> {
        [&mut self.gate_proj, &mut self.up_proj, &mut self.down_proj]
            .into_iter()
            .try_for_each(|projection| projection.hold(format))
    }

    /// Sets how products are computed.
    pub(crate) fn set_arithmetic(&mut self, arithmetic: Arithmetic) {
        for projection in [&mut self.gate_proj, &mut self.up_proj, &mut self.down_proj] {
            projection.arithmetic = arithmetic;
        }
    }
}
