//! Which experts a token goes to and how much each counts: POLICY, always in single precision.
//!
//! Affinities are s = sigmoid(x e^T). Experts are chosen by s + b (equation 16), where the bias b is moved by load
//! alone and no gradient reaches it; they are weighted by s without b, normalised over the chosen (equation 13)
//! and scaled. Groups of experts stand for nodes: a token's experts come from `topk_group` of them, so that it is
//! sent to few nodes.

use burn::{
    module::{Module, Param},
    tensor::{DType, Int, Tensor, activation::sigmoid},
};
use deepburn_kernels::routing::{GroupLimit, Weighting, route};

use crate::{config::ModelConfig, init::Initializer};

/// The router of one layer.
#[derive(Module, Debug)]
pub struct Router {
    /// Centroids of the experts, `[D, E]`.
    pub weight: Param<Tensor<2>>,
    /// Selection bias of each expert, b. `[E]`
    pub e_score_correction_bias: Param<Tensor<1>>,
    #[module(skip)]
    limit: GroupLimit,
    #[module(skip)]
    weighting: Weighting,
}

/// How tokens were routed.
#[derive(Clone, Debug)]
pub struct Routing {
    /// Scores before the sigmoid. `[T, E]`
    pub logits: Tensor<2>,
    /// Affinities, s. `[T, E]`
    pub affinity: Tensor<2>,
    /// Chosen experts, best first. `[T, K]`
    pub chosen: Tensor<2, Int>,
    /// Their weights. `[T, K]`
    pub weights: Tensor<2>,
}

impl Router {
    /// The router of one layer for a model of the given shape.
    pub fn new(config: &ModelConfig, init: Initializer) -> Self {
        let experts = config.n_routed_experts;
        Self {
            weight: init.normal("weight", [config.hidden_size, experts]),
            e_score_correction_bias: init
                .zeros_without_gradient("e_score_correction_bias", experts),
            limit: GroupLimit {
                experts_per_token: config.num_experts_per_tok,
                groups: config.n_group,
                groups_per_token: config.topk_group,
            },
            weighting: Weighting {
                normalised: config.norm_topk_prob,
                scale: config.routed_scaling_factor,
            },
        }
    }

    /// Routes tokens.
    ///
    /// # Shapes
    /// - `x`: `[T, D]`
    pub fn forward(&self, x: Tensor<2>) -> Routing {
        let dtype = x.dtype();
        let logits = single(x).matmul(single(self.weight.val()));
        let affinity = sigmoid(logits.clone());
        let bias = self.e_score_correction_bias.val();
        let routed = route(logits.clone(), bias, self.limit, self.weighting);
        Routing {
            logits,
            affinity,
            chosen: routed.chosen,
            weights: routed.weights.cast(dtype),
        }
    }
}

/// Half precisions are widened; double stays.
fn single<const D: usize>(tensor: Tensor<D>) -> Tensor<D> {
    match tensor.dtype() {
        DType::F32 | DType::F64 => tensor,
        _ => tensor.cast(DType::F32),
    }
}
