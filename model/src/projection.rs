//! Multiplication with a matrix of weights, and the arithmetic that it is done in.

use burn::{
    module::{Module, Param},
    tensor::Tensor,
};
use deepburn_kernels::{
    bf16::{rounded, rounded_weight},
    compact::{CompactFormat, CompactMatrices, NotCompact},
    fp8::{self, ScaleFormat, ablation::Ablation},
    linear::linear,
};

use crate::{held::hold, init::Initializer, recompute::Recompute};

/// How the layers compute.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Arithmetic {
    /// Products of activations and weights in FP8, with activations quantised in tiles of 1 x 128, whose scales have this
    /// format, and weights in blocks of 128 x 128 (report section 3.3). Otherwise in the type of the weights.
    /// Embedding, output head, router, norms, the attention core and the projection of MTP stay as they are.
    pub fp8: Option<ScaleFormat>,
    /// Activations between the layers' parts and their gradients are rounded to BF16, and so are weights that are not
    /// quantised; sums, norms, softmax, router and loss are in single precision. Tensors keep their type.
    pub bf16: bool,
    /// What FP8 does worse, for an experiment.
    pub ablation: Option<Ablation>,
    /// Whether the backward pass computes the outputs of RMSNorm and of MLA's up-projections again instead of keeping them
    /// (section 3.2.3). Results are the same.
    pub recompute: bool,
}

impl Arithmetic {
    /// All in the type of the weights.
    pub const FULL: Self = Self {
        fp8: None,
        bf16: false,
        ablation: None,
        recompute: false,
    };

    /// Whether all is in the type of the weights.
    pub(crate) fn is_full(self) -> bool {
        self.fp8.is_none() && !self.bf16
    }

    /// Products in FP8 and nothing else: what a checkpoint in FP8 means.
    pub fn fp8(format: ScaleFormat) -> Self {
        Self {
            fp8: Some(format),
            ..Self::FULL
        }
    }

    /// An activation as the next part sees it.
    pub fn activation<const N: usize>(self, x: Tensor<N>) -> Tensor<N> {
        if self.bf16 { rounded(x) } else { x }
    }

    /// A weight as a product sees it that is not in FP8.
    pub fn weight<const N: usize>(self, weight: Tensor<N>) -> Tensor<N> {
        if self.bf16 {
            rounded_weight(weight)
        } else {
            weight
        }
    }

    /// For inputs that training keeps or sends in FP8: those of `o_proj` and of the routed experts have scales that are
    /// powers of two (section 3.3.3).
    pub(crate) fn of_kept_inputs(self) -> Self {
        match self.fp8 {
            Some(_) if self.bf16 => Self {
                fp8: Some(ScaleFormat::PowerOfTwo),
                ..self
            },
            _ => self,
        }
    }

    /// Without FP8.
    pub(crate) fn unquantised(self) -> Self {
        Self { fp8: None, ..self }
    }
}

/// A matrix without bias.
#[derive(Module, Debug)]
pub struct Projection {
    /// `[in, out]`: the transpose of PyTorch's layout, which rows multiply faster.
    pub weight: Param<Tensor<2>>,
    #[module(skip)]
    pub(crate) arithmetic: Arithmetic,
    #[module(skip)]
    held: Option<CompactMatrices>,
    /// Whether the backward pass computes the result again.
    #[module(skip)]
    pub(crate) recompute: Recompute,
}

impl Projection {
    /// A matrix with random elements.
    pub fn new(inputs: usize, outputs: usize, init: Initializer) -> Self {
        Self {
            weight: init.normal("weight", [inputs, outputs]),
            arithmetic: Arithmetic::FULL,
            held: None,
            recompute: Recompute::default(),
        }
    }

    /// Holds the weights in a compact format.
    pub(crate) fn hold(&mut self, format: CompactFormat) -> Result<(), NotCompact> {
        self.held = Some(hold(&mut self.weight, format)?);
        Ok(())
    }

    /// Multiplies every row of `x`.
    ///
    /// # Shapes
    /// - `x`: `[.., in]`
    /// - result: `[.., out]`
    pub fn forward<const N: usize>(&self, x: Tensor<N>) -> Tensor<N> {
        let mut shape = x.dims();
        let arithmetic = self.arithmetic;
        let inputs = shape[N - 1] as i32;
        // Of an input that is computed again, neither another shape nor the rounded numbers are kept.
        let rows = Recompute(arithmetic.recompute)
            .of(x, |x| arithmetic.activation(x.reshape([-1, inputs])));
        if let Some(held) = &self.held {
            shape[N - 1] = held.dims()[2];
            return arithmetic.activation(held.linear(rows)).reshape(shape);
        }
        let weight = self.weight.val();
        shape[N - 1] = weight.dims()[1];
        self.recompute.with_weight(rows, weight, |rows, weight| {
            let rows = match (arithmetic.fp8, arithmetic.ablation) {
                (None, _) => linear(rows, arithmetic.weight(weight)),
                (Some(format), None) => fp8::linear(rows, weight, format),
                (Some(format), Some(worse)) => fp8::ablation::linear(rows, weight, format, worse),
            };
            arithmetic.activation(rows).reshape(shape)
        })
    }
}
