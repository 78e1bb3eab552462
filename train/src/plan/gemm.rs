//! The parts of a model as the products that they consist of, and what is counted from these: parameters and FLOPs.

use deepburn_model::config::ModelConfig;
use serde::Serialize;

/// A product with weights. Products with the same input are one, as kernels compute them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Gemm {
    /// Hugging Face's names of what is joined.
    pub name: &'static str,
    /// Inner dimension of the forward pass.
    pub inputs: usize,
    /// Columns of the result.
    pub outputs: usize,
    /// Rows per token: as many as chosen experts, else one.
    pub rows: usize,
    /// Matrices of this shape in the layer: as many as routed experts, else one.
    pub matrices: usize,
    /// Whether its rows come from all-to-all.
    pub dispatched: bool,
    /// Whether it is one of those that section 3.3.1 computes in FP8.
    pub fp8: bool,
    /// Whether it is an up-projection of MLA, which section 3.2.3 computes again on the way back.
    pub up_projection: bool,
}

impl Gemm {
    fn new(name: &'static str, inputs: usize, outputs: usize) -> Self {
        Self {
            name,
            inputs,
            outputs,
            rows: 1,
            matrices: 1,
            dispatched: false,
            fp8: true,
            up_projection: false,
        }
    }

    /// Of one pass over one token; forward, backward for the input and for the weights have the same.
    pub fn flops(&self) -> f64 {
        2.0 * (self.inputs * self.outputs * self.rows) as f64
    }

    /// All matrices together.
    pub fn parameters(&self) -> usize {
        self.inputs * self.outputs * self.matrices
    }
}

/// A part of a model that lies in one pipeline stage.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Part {
    /// The embedding, a lookup.
    Embedding,
    /// A layer with a dense feed-forward part.
    Dense,
    /// A layer with experts.
    Moe,
    /// What a multi-token prediction module (section 2.2) has before its layer.
    Merge,
    /// The last norm and the output head.
    Head,
    /// The last norm of a multi-token prediction module and the main model's head.
    SharedHead,
}

impl Part {
    /// All parts of a model in order: what comes before the layers, the layers, what comes after.
    pub fn all(model: &ModelConfig) -> [Vec<Self>; 3] {
        let layer = |layer| match model.is_dense(layer) {
            true => Self::Dense,
            false => Self::Moe,
        };
        let mut after = vec![Self::Head];
        for _ in 0..model.num_nextn_predict_layers {
            let block = layer(model.num_hidden_layers);
            after.extend([Self::Merge, block, Self::SharedHead]);
        }
        let layers = (0..model.num_hidden_layers).map(layer).collect();
        [vec![Self::Embedding], layers, after]
    }

    /// Whether it is a layer, with attention in it.
    pub fn is_layer(self) -> bool {
        matches!(self, Self::Dense | Self::Moe)
    }

    /// Its products with weights, in order.
    pub fn gemms(self, model: &ModelConfig) -> Vec<Gemm> {
        let hidden = model.hidden_size;
        let unquantised = |gemm| Gemm { fp8: false, ..gemm };
        match self {
            Self::Embedding => Vec::new(),
            Self::Dense => {
                let width = model.intermediate_size;
                let mut gemms = attention(model);
                gemms.extend([
                    Gemm::new("gate_proj, up_proj", hidden, 2 * width),
                    Gemm::new("down_proj", width, hidden),
                ]);
                gemms
            }
            Self::Moe => {
                let mut gemms = attention(model);
                gemms.extend(moe(model));
                gemms
            }
            Self::Merge => vec![unquantised(Gemm::new("eh_proj", 2 * hidden, hidden))],
            Self::Head | Self::SharedHead => {
                vec![unquantised(Gemm::new("lm_head", hidden, model.vocab_size))]
            }
        }
    }

    /// Parameters that are stored for it; a shared matrix is counted where it is not marked as shared.
    pub fn parameters(self, model: &ModelConfig) -> usize {
        let hidden = model.hidden_size;
        let products: usize = self.gemms(model).iter().map(Gemm::parameters).sum();
        let norms = 2 * hidden + model.q_lora_rank.unwrap_or(0) + model.kv_lora_rank;
        match self {
            Self::Embedding => model.vocab_size * hidden,
            Self::Dense => products + norms,
            // The selection bias.
            Self::Moe => products + norms + model.n_routed_experts,
            Self::Merge => products + 2 * hidden,
            Self::Head if model.tie_word_embeddings => hidden,
            Self::Head => products + hidden,
            Self::SharedHead => hidden,
        }
    }

    /// Of these, what lies on one device with its share of the experts, and how many of it are experts.
    pub fn stored(self, model: &ModelConfig, ep: usize) -> [usize; 2] {
        let gemms = self.gemms(model);
        let experts = gemms.iter().filter(|gemm| gemm.matrices > 1);
        let experts: usize = experts.map(Gemm::parameters).sum();
        [self.parameters(model) - experts, experts / ep]
    }

    /// FLOPs of its forward pass over one token in a sequence of `length`, causal attention included.
    pub fn flops(self, model: &ModelConfig, length: usize) -> f64 {
        let products: f64 = self.gemms(model).iter().map(Gemm::flops).sum();
        products
            + match self.is_layer() {
                true => attention_flops(model, length).forward,
                false => 0.0,
            }
    }
}

/// Parameters by the rules of [`deepburn_model::parameters::ParameterCount`].
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, Serialize)]
pub struct Parameters {
    /// The main model's.
    pub total: usize,
    /// What one token is multiplied with in the main model.
    pub active: usize,
    /// Of the multi-token prediction modules.
    pub mtp: usize,
}

impl Parameters {
    /// Counts a model of the given shape.
    pub fn of(model: &ModelConfig) -> Self {
        let [before, layers, after] = Part::all(model);
        let sum = |parts: &[Part]| -> usize { parts.iter().map(|p| p.parameters(model)).sum() };
        let main = [&before[..], &layers, &after[..1]].concat();
        let idle = |gemm: &Gemm| gemm.inputs * gemm.outputs * (gemm.matrices - gemm.rows);
        let idle: usize = main
            .iter()
            .flat_map(|part| part.gemms(model))
            .map(|gemm| idle(&gemm))
            .sum();
        let lookup = match model.tie_word_embeddings {
            true => 0,
            false => sum(&before),
        };
        Self {
            total: sum(&main),
            active: sum(&main) - idle - lookup,
            mtp: sum(&after[1..]),
        }
    }
}

/// FLOPs of attention between queries and keys, for one token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionFlops {
    /// Scores and weighted values.
    pub forward: f64,
    /// Scores once more, and the gradients of values, weights, queries and keys.
    pub backward: f64,
}

/// Half of the square of the length is not masked: the convention of FlashAttention's published rates.
pub fn attention_flops(model: &ModelConfig, length: usize) -> AttentionFlops {
    let seen = length as f64 / 2.0;
    let (key, value) = (model.qk_head_dim(), model.v_head_dim);
    let product = |widths: usize| 2.0 * seen * (model.num_attention_heads * widths) as f64;
    AttentionFlops {
        forward: product(key + value),
        backward: product(3 * key + 2 * value),
    }
}

fn attention(model: &ModelConfig) -> Vec<Gemm> {
    let (hidden, heads) = (model.hidden_size, model.num_attention_heads);
    let queries = heads * model.qk_head_dim();
    let up = |gemm| Gemm {
        up_projection: true,
        ..gemm
    };
    let mut gemms = match model.q_lora_rank {
        Some(rank) => vec![
            Gemm::new(
                "q_a_proj, kv_a_proj_with_mqa",
                hidden,
                rank + model.cache_width(),
            ),
            up(Gemm::new("q_b_proj", rank, queries)),
        ],
        None => vec![Gemm::new(
            "q_proj, kv_a_proj_with_mqa",
            hidden,
            queries + model.cache_width(),
        )],
    };
    let keys_and_values = heads * (model.qk_nope_head_dim + model.v_head_dim);
    gemms.extend([
        up(Gemm::new("kv_b_proj", model.kv_lora_rank, keys_and_values)),
        Gemm::new("o_proj", heads * model.v_head_dim, hidden),
    ]);
    gemms
}

fn moe(model: &ModelConfig) -> Vec<Gemm> {
    let (hidden, width) = (model.hidden_size, model.moe_intermediate_size);
    let experts = model.n_routed_experts;
    let routed = |gemm| Gemm {
        rows: model.num_experts_per_tok,
        matrices: experts,
        ..gemm
    };
    let mut gemms = vec![
        Gemm {
            fp8: false,
            ..Gemm::new("gate", hidden, experts)
        },
        Gemm {
            dispatched: true,
            ..routed(Gemm::new("experts.gate_proj, up_proj", hidden, 2 * width))
        },
        routed(Gemm::new("experts.down_proj", width, hidden)),
    ];
    let shared = model.n_shared_experts * width;
    if shared > 0 {
        gemms.extend([
            Gemm::new("shared_experts.gate_proj, up_proj", hidden, 2 * shared),
            Gemm::new("shared_experts.down_proj", shared, hidden),
        ]);
    }
    gemms
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::test_model::small;

    /// By hand, D 8, two heads of 4 + 2 and 4, ranks 6 and 4, widths 16 and 4, 2 of 8 experts and a shared one:
    ///
    /// q_a and kv_a 8 x (6 + 4 + 2) = 96, q_b 6 x 12 = 72, kv_b 4 x 16 = 64, o 8 x 8 = 64: 296.
    /// Dense 3 x 8 x 16 = 384. Gate 8 x 8 = 64, an expert 3 x 8 x 4 = 96, of which 3 for a token.
    #[test]
    fn flops_are_twice_the_weights_that_a_token_meets() {
        let model = small();
        let products = |part: Part| -> f64 { part.gemms(&model).iter().map(Gemm::flops).sum() };
        assert_eq!(products(Part::Dense), 2.0 * (296.0 + 384.0));
        assert_eq!(products(Part::Moe), 2.0 * (296.0 + 64.0 + 3.0 * 96.0));
        assert_eq!(products(Part::Merge), 2.0 * 16.0 * 8.0);
        assert_eq!(products(Part::Head), 2.0 * 8.0 * 10.0);
        assert_eq!(products(Part::Embedding), 0.0);
    }

    /// A token in a sequence of 32 sees 16 others: 2 x 16 x 2 heads x (6 + 4) forward, (18 + 8) backward.
    #[test]
    fn attention_is_causal() {
        let flops = attention_flops(&small(), 32);
        assert_eq!((flops.forward, flops.backward), (640.0, 1664.0));
        assert_eq!(Part::Dense.flops(&small(), 32), 1360.0 + 640.0);
    }

    /// Norms of a layer: 2 x 8 + 6 + 4 = 26. A dense and two MoE layers, of which a token uses 3 experts of 9.
    #[test]
    fn parameters_are_those_of_the_products_and_the_norms() {
        let (dense, moe) = (296 + 384 + 26, 296 + 64 + 9 * 96 + 26 + 8);
        let parameters = Parameters::of(&small());
        assert_eq!(parameters.total, 80 + dense + 2 * moe + 8 + 80);
        assert_eq!(parameters.active, parameters.total - 80 - 2 * 6 * 96);
        assert_eq!(parameters.mtp, 128 + 16 + moe + 8);
        assert_eq!(Part::Moe.stored(&small(), 4), [moe - 8 * 96, 2 * 96]);
    }
}
