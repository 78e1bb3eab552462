//! The routed experts of one layer: MATHS. One grouped matrix product per projection, no loop over tokens.

use std::ops::Range;

use burn::{
    module::{Module, Param},
    tensor::{Device, Int, Tensor},
};
use deepburn_kernels::{
    compact::{CompactFormat, CompactMatrices, NotCompact},
    fp8,
    grouped_gemm::grouped_matmul,
    grouped_swiglu::grouped_swiglu,
    permute::Permutation,
    swiglu::swiglu,
};

use crate::{config::ModelConfig, held::hold, init::Initializer, projection::Arithmetic};

/// SwiGLU experts with their matrices stacked.
#[derive(Module, Debug)]
pub struct Experts {
    /// `[E, D, F]`
    pub gate_proj: Param<Tensor<3>>,
    /// `[E, D, F]`
    pub up_proj: Param<Tensor<3>>,
    /// `[E, F, D]`
    pub down_proj: Param<Tensor<3>>,
    #[module(skip)]
    pub(crate) arithmetic: Arithmetic,
    #[module(skip)]
    held: Option<[CompactMatrices; 3]>, // of gate, up and down
}

impl Experts {
    /// The experts of one layer for a model of the given shape.
    pub fn new(config: &ModelConfig, init: Initializer) -> Self {
        let (experts, hidden) = (config.n_routed_experts, config.hidden_size);
        let width = config.moe_intermediate_size;
        Self {
            gate_proj: init.normal("gate_proj", [experts, hidden, width]),
            up_proj: init.normal("up_proj", [experts, hidden, width]),
            down_proj: init.normal("down_proj", [experts, width, hidden]),
            arithmetic: Arithmetic::FULL,
            held: None,
        }
    }

    /// Holds the weights in a compact format.
    pub(crate) fn hold(&mut self, format: CompactFormat) -> Result<(), NotCompact> {
        self.held = Some([
            hold(&mut self.gate_proj, format)?,
            hold(&mut self.up_proj, format)?,
            hold(&mut self.down_proj, format)?,
        ]);
        Ok(())
    }

    /// Those in `own`, which are counted from 0 then.
    #[must_use]
    pub fn keep(self, own: Range<usize>) -> Self {
        let keep = |weights: Param<Tensor<3>>| {
            let trained = weights.is_require_grad();
            weights.map(|weights| {
                let own = weights.narrow(0, own.start, own.len()).detach();
                own.set_require_grad(trained)
            })
        };
        Self {
            gate_proj: keep(self.gate_proj),
            up_proj: keep(self.up_proj),
            down_proj: keep(self.down_proj),
            arithmetic: self.arithmetic,
            held: None,
        }
    }

    /// Experts, E.
    pub fn len(&self) -> usize {
        self.gate_proj.lazy_shape()[0]
    }

    /// Whether there is no expert.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The order of the rows that [`forward`](Self::forward) takes.
    ///
    /// # Shapes
    /// - `chosen`: `[T, K]`
    pub fn order(&self, chosen: Tensor<2, Int>) -> Permutation {
        let tile = self.tile(&chosen.device());
        Permutation::by_expert_padded(chosen, self.len(), tile)
    }

    /// As [`order`](Self::order), of pairs that the host knows and of which some are for experts elsewhere.
    ///
    /// # Shapes
    /// - `chosen`: `[T * K]`, `k` for each token
    pub fn order_of_known(&self, chosen: &[Option<usize>], k: usize) -> Permutation {
        let device = self.gate_proj.val().device();
        Permutation::of_known(chosen, k, self.len(), self.tile(&device), &device)
    }

    fn tile(&self, device: &Device) -> usize {
        match self.arithmetic.fp8 {
            None => 1,
            Some(_) => fp8::segment_tile(device),
        }
    }

    /// Applies every expert to the rows of its segment.
    ///
    /// # Shapes
    /// - `x`: `[R, D]` in the given order, as the result
    pub fn forward(&self, x: Tensor<2>, order: &Permutation) -> Tensor<2> {
        if let Some([gate, up, down]) = &self.held {
            let hidden = swiglu(
                gate.grouped_linear(x.clone(), order),
                up.grouped_linear(x, order),
            );
            return down.grouped_linear(hidden, order);
        }
        if self.arithmetic.is_full() {
            let weights = [&self.gate_proj, &self.up_proj, &self.down_proj];
            return grouped_swiglu(x, weights.map(Param::val), order.rows.clone());
        }
        let inputs = self.arithmetic.of_kept_inputs();
        let multiply = |arithmetic: Arithmetic, x, weights: &Param<Tensor<3>>| {
            let (x, weights) = (arithmetic.activation(x), weights.val());
            let y = match (arithmetic.fp8, arithmetic.ablation) {
                (None, _) => grouped_matmul(x, arithmetic.weight(weights), order.rows.clone()),
                (Some(format), None) => fp8::grouped_linear(x, weights, order, format),
                (Some(format), Some(worse)) => {
                    fp8::ablation::grouped_linear(x, weights, order, format, worse)
                }
            };
            arithmetic.activation(y)
        };
        let gate = multiply(inputs, x.clone(), &self.gate_proj);
        let up = multiply(inputs, x, &self.up_proj);
        match self.arithmetic {
            // What comes into the gate is kept in FP8 (section 3.3.3); experiments keep it as it is.
            Arithmetic {
                fp8: Some(format),
                ablation: None,
                bf16,
                ..
            } => {
                let down = self.down_proj.val();
                let y = fp8::gated_grouped_linear(gate, up, down, order, format, bf16);
                self.arithmetic.activation(y)
            }
            arithmetic => multiply(arithmetic, swiglu(gate, up), &self.down_proj),
        }
    }
}
