//! DeepSeekMoE (report section 2.1.2): a router sends each token to a few of many small experts; shared experts see
//! every token.

mod dispatch;
mod experts;
mod router;

use std::{ops::Range, sync::Arc};

use burn::{
    module::Module,
    tensor::{Int, Tensor},
};
use deepburn_kernels::compact::{CompactFormat, NotCompact};

pub use dispatch::{Dispatch, Dispatched, LocalDispatcher, TokenDispatcher};
pub use experts::Experts;
pub use router::{Router, Routing};

use crate::{
    config::ModelConfig, init::Initializer, mlp::Mlp, projection::Arithmetic, recompute::Recompute,
};

/// The feed-forward part of a mixture-of-experts layer.
#[derive(Module, Debug)]
pub struct Moe {
    /// Chooses experts.
    pub gate: Router,
    /// The routed experts, stacked.
    pub experts: Experts,
    /// Shared experts as one feed-forward part of their summed width.
    pub shared_experts: Option<Mlp>,
    /// Whether what comes in is computed again in the backward pass.
    #[module(skip)]
    recompute: Recompute,
    #[module(skip)]
    dispatcher: Arc<dyn TokenDispatcher>,
}

/// What a mixture-of-experts layer returns.
#[derive(Clone, Debug)]
pub struct MoeOutput {
    /// `[B, T, D]`
    pub hidden: Tensor<3>,
    /// How the tokens were routed.
    pub routing: Routing,
    /// Tokens that each routed expert received. `[E]`
    pub load: Tensor<1, Int>,
}

impl Moe {
    /// A layer for a model of the given shape.
    pub fn new(config: &ModelConfig, init: Initializer) -> Self {
        let shared = config.n_shared_experts * config.moe_intermediate_size;
        Self {
            gate: Router::new(config, init.child("gate")),
            experts: Experts::new(config, init.child("experts")),
            shared_experts: (shared > 0)
                .then(|| Mlp::new(config.hidden_size, shared, init.child("shared_experts"))),
            recompute: Recompute::default(),
            dispatcher: Arc::new(LocalDispatcher),
        }
    }

    /// This layer as one of several that share the routed experts: it keeps those in `own`, and `dispatcher` brings tokens
    /// to the others.
    #[must_use]
    pub fn distributed(mut self, own: Range<usize>, dispatcher: Arc<dyn TokenDispatcher>) -> Self {
        self.experts = self.experts.keep(own);
        self.dispatcher = dispatcher;
        self
    }

    /// Sets how products with the experts' weights are computed.
    pub(crate) fn set_arithmetic(&mut self, arithmetic: Arithmetic) {
        self.experts.arithmetic = arithmetic;
        self.recompute = Recompute(arithmetic.recompute);
        if let Some(shared) = &mut self.shared_experts {
            shared.set_arithmetic(arithmetic);
        }
    }

    /// Holds the experts' weights in a compact format.
    pub(crate) fn hold(&mut self, format: CompactFormat) -> Result<(), NotCompact> {
        self.experts.hold(format)?;
        match &mut self.shared_experts {
            Some(shared) => shared.hold(format),
            None => Ok(()),
        }
    }

    /// Applies the layer. Nothing is dropped: every token reaches all of its experts.
    ///
    /// # Shapes
    /// - `x`: `[B, T, D]`
    pub fn forward(&self, x: Tensor<3>) -> MoeOutput {
        let [batch, length, width] = x.dims();
        let rows = [batch * length, width];
        let tokens = self.recompute.of(x.clone(), |x| x.reshape(rows));
        let routing = self.gate.forward(tokens.clone());
        let dispatch = self.dispatcher.dispatch(tokens, &routing);
        let shared = self.shared_experts.as_ref().map(|shared| shared.forward(x));
        let Dispatched { hidden, load } = dispatch.finish(&self.experts);
        let hidden = hidden.reshape([batch, length, width]);
        MoeOutput {
            hidden: match shared {
                Some(shared) => hidden + shared,
                None => hidden,
            },
            routing,
            load,
        }
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, Distribution, TensorData, Tolerance, activation::silu};

    use super::*;
    use crate::config::tests::tiny;

    /// A loop over tokens and their experts, from equations 12 to 16.
    fn one_token_at_a_time(moe: &Moe, x: Tensor<2>) -> Tensor<2> {
        let routing = moe.gate.forward(x.clone());
        let weights: Vec<f32> = routing.weights.to_data().try_to_vec().unwrap();
        let chosen: Vec<usize> = routing
            .chosen
            .to_data()
            .iter::<i64>()
            .map(|e| e as usize)
            .collect();
        let [tokens, k] = routing.chosen.dims();
        let rows = (0..tokens).map(|token| {
            let x = x.clone().narrow(0, token, 1);
            let shared = moe.shared_experts.as_ref().unwrap().forward(x.clone());
            (0..k).fold(shared, |sum, choice| {
                let at = |weights: &burn::module::Param<Tensor<3>>| {
                    weights
                        .val()
                        .narrow(0, chosen[token * k + choice], 1)
                        .squeeze_dim::<2>(0)
                };
                let gate = silu(x.clone().matmul(at(&moe.experts.gate_proj)));
                let hidden = gate * x.clone().matmul(at(&moe.experts.up_proj));
                sum + hidden.matmul(at(&moe.experts.down_proj)) * weights[token * k + choice]
            })
        });
        Tensor::cat(rows.collect(), 0)
    }

    #[test]
    fn grouped_experts_equal_a_loop_over_tokens() {
        let device = Device::flex();
        // All experts, one group; and a bias that leaves some experts without any token.
        for (config, biased) in [
            (tiny(), false),
            (tiny(), true),
            (
                ModelConfig {
                    n_group: 1,
                    topk_group: 1,
                    num_experts_per_tok: 8,
                    ..tiny()
                },
                false,
            ),
        ] {
            let mut moe = Moe::new(&config, Initializer::new(&device, 3, 0.3));
            if biased {
                let bias = TensorData::from([9.0f32, 9.0, -9.0, -9.0, -9.0, -9.0, -9.0, -9.0]);
                moe.gate.e_score_correction_bias = moe
                    .gate
                    .e_score_correction_bias
                    .map(|b| Tensor::from_data(bias, &b.device()));
            }
            let x = Tensor::<2>::random([13, 32], Distribution::Normal(0.0, 1.0), &device);
            let expected = one_token_at_a_time(&moe, x.clone());
            let output = moe.forward(x.unsqueeze_dim(0));
            let load: Vec<i64> = output.load.into_data().iter::<i64>().collect();
            assert_eq!(
                load.iter().sum::<i64>() as usize,
                13 * config.num_experts_per_tok
            );
            assert!(!biased || load[0] == 13 && load[1] == 13, "{load:?}");
            // Sums in another order, of numbers that reach 40.
            let close = Tolerance::<f32>::rel_abs(1e-6, 1e-5);
            output
                .hidden
                .squeeze_dim::<2>(0)
                .into_data()
                .assert_approx_eq(&expected.into_data(), close);
        }
    }
}
