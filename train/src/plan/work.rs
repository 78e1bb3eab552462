//! What the passes of a part take on one GPU for one micro-batch.

use std::ops::{Add, AddAssign};

use deepburn_model::config::ModelConfig;
use serde::Serialize;

use super::{
    all_to_all::AllToAll,
    config::PlanConfig,
    gemm::{Gemm, Part, attention_flops},
};

/// Seconds by what limits them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Work {
    /// Products and attention, on all multiprocessors.
    pub math: f64,
    /// Passes over memory between them.
    pub memory: f64,
    /// All-to-all.
    pub network: f64,
}

impl Work {
    /// Without the network, on a part of the multiprocessors.
    pub fn computation(&self, multiprocessors: f64) -> f64 {
        self.math / multiprocessors + self.memory
    }
}

impl Add for Work {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            math: self.math + other.math,
            memory: self.memory + other.memory,
            network: self.network + other.network,
        }
    }
}

/// F, Bi and W of section 3.2.1.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Passes {
    /// F
    pub forward: Work,
    /// Bi, with what is computed again.
    pub input: Work,
    /// W
    pub weight: Work,
}

impl AddAssign for Passes {
    fn add_assign(&mut self, other: Self) {
        self.forward = self.forward + other.forward;
        self.input = self.input + other.input;
        self.weight = self.weight + other.weight;
    }
}

impl Passes {
    /// B
    pub fn backward(&self) -> Work {
        self.input + self.weight
    }

    /// Computation of F and B, all multiprocessors.
    pub fn computation(&self) -> f64 {
        (self.forward + self.backward()).computation(1.0)
    }
}

/// Knows the rates and the sizes.
pub struct Machine<'a> {
    /// The model's shape.
    pub model: &'a ModelConfig,
    /// The rates.
    pub config: &'a PlanConfig,
}

impl Machine<'_> {
    /// All passes of a part.
    pub fn passes(&self, part: Part) -> Passes {
        let mut passes = Passes::default();
        for gemm in part.gemms(self.model) {
            passes += self.gemm(&gemm);
        }
        if part.is_layer() {
            passes += self.attention();
            passes += self.between(part);
        }
        if part == Part::Moe {
            let network = AllToAll::new(self.model, self.config).time;
            passes.forward.network += network;
            passes.input.network += network;
        }
        passes
    }

    /// Products forward, for the input and for the weights. The inner dimension is that of the inputs, of the outputs,
    /// and the number of rows.
    fn gemm(&self, gemm: &Gemm) -> Passes {
        let assumed = &self.config.assumptions;
        let (tokens, fp8) = (
            self.config.tokens() as f64,
            self.config.training.fp8 && gemm.fp8,
        );
        let routed = gemm.matrices > 1;
        // What all GPUs send to one expert, which lies on one of them.
        let (share, imbalance) = match routed {
            true => (self.config.layout.ep as f64, assumed.expert_imbalance),
            false => (1.0, 1.0),
        };
        let rows = tokens * gemm.rows as f64;
        let rows_of_a_matrix = rows * share / gemm.matrices as f64;
        let flops = gemm.flops() * tokens * imbalance;
        let math = |inner: f64| flops / (self.tflops(fp8, inner) * 1e12);
        let (inputs, outputs) = (gemm.inputs as f64, gemm.outputs as f64);
        // Read in BF16, written in FP8 (section 3.5.2); what is dispatched is quantised once, before it is copied.
        let quantised = |elements: f64| match fp8 {
            true => self.seconds(elements * (assumed.bf16_bytes + 1.0)),
            false => 0.0,
        };
        let input_rows = if gemm.dispatched { tokens } else { rows };
        // FP8 tiles along tokens are made from those along channels: read and written.
        let turned = if fp8 {
            self.seconds(2.0 * rows * inputs)
        } else {
            0.0
        };
        // Added to what is accumulated: read and written.
        let local = gemm.inputs * gemm.outputs * gemm.matrices;
        let accumulated = self.seconds(2.0 * assumed.gradient_bytes * local as f64 / share);
        let forward = Work {
            math: math(inputs),
            memory: quantised(input_rows * inputs),
            network: 0.0,
        };
        let mut input = Work {
            math: math(outputs),
            memory: quantised(rows * outputs),
            network: 0.0,
        };
        if gemm.up_projection && self.config.layout.recompute_up_projections {
            input = input + forward;
        }
        let weight = Work {
            math: math(rows_of_a_matrix),
            memory: turned + quantised(rows * outputs) + accumulated,
            network: 0.0,
        };
        Passes {
            forward,
            input,
            weight,
        }
    }

    fn attention(&self) -> Passes {
        let (layout, assumed) = (&self.config.layout, &self.config.assumptions);
        let flops = attention_flops(self.model, layout.sequence_length);
        let work = |flops: f64, tflops: f64| Work {
            math: flops * self.config.tokens() as f64 / (tflops * assumed.rate_factor * 1e12),
            ..Work::default()
        };
        Passes {
            forward: work(flops.forward, assumed.attention_forward_tflops),
            input: work(flops.backward, assumed.attention_backward_tflops),
            weight: Work::default(),
        }
    }

    /// Norms, rotation, SwiGLU, residuals, permutation: elements that pass through memory, once for each time that
    /// they are read or written in BF16.
    fn between(&self, part: Part) -> Passes {
        let (model, layout) = (self.model, &self.config.layout);
        let hidden = model.hidden_size;
        let latents = model.q_lora_rank.unwrap_or(0) + model.kv_lora_rank;
        let rotated = (model.num_attention_heads + 1) * model.qk_rope_head_dim;
        let (active, copies) = match part {
            Part::Moe => (
                model.moe_intermediate_size * (model.num_experts_per_tok + model.n_shared_experts),
                model.num_experts_per_tok,
            ),
            _ => (model.intermediate_size, 0),
        };
        // Read and written.
        let norms = 2 * (2 * hidden + latents);
        let rotation = 2 * rotated;
        // Two read, one written.
        let (swiglu, residuals) = (3 * active, 2 * 3 * hidden);
        // Into expert order and back, both read and written.
        let permutation = 4 * copies * hidden;
        let mut again = 0;
        if layout.recompute_norms {
            again += norms;
        }
        if layout.recompute_up_projections {
            again += rotation;
        }
        if layout.recompute_swiglu {
            again += swiglu;
        }
        // A norm reads its input and a gradient and writes one; SwiGLU reads three and writes two.
        let backward = norms / 2 * 3 + rotation + 5 * active + residuals + permutation;
        let work = |elements: usize| Work {
            memory: self.seconds(
                elements as f64 * self.config.tokens() as f64 * self.config.assumptions.bf16_bytes,
            ),
            ..Work::default()
        };
        Passes {
            forward: work(norms + rotation + swiglu + residuals + permutation),
            input: work(backward + again),
            weight: Work::default(),
        }
    }

    /// Time to move bytes through memory.
    pub fn seconds(&self, bytes: f64) -> f64 {
        bytes / (self.config.cluster.hbm_gb_s * 1e9 * self.config.assumptions.hbm_efficiency)
    }

    /// Rate of a product with this inner dimension.
    pub fn tflops(&self, fp8: bool, inner: f64) -> f64 {
        let assumed = &self.config.assumptions;
        let points = [
            (512f64, assumed.fp8_tflops_k512),
            (1536.0, assumed.fp8_tflops_k1536),
            (2048.0, assumed.fp8_tflops_k2048),
            (7168.0, assumed.fp8_tflops_k7168),
            (16384.0, assumed.fp8_tflops_k16384),
        ];
        let rate = match fp8 {
            true => interpolated(&points, inner),
            false => assumed.bf16_tflops,
        };
        rate * assumed.rate_factor
    }
}

/// Between the two points beside it, over the logarithm; beyond the last the same as there.
fn interpolated(points: &[(f64, f64)], at: f64) -> f64 {
    let above = points.partition_point(|(place, _)| *place < at);
    match (
        above.checked_sub(1).and_then(|i| points.get(i)),
        points.get(above),
    ) {
        (Some(&(low, from)), Some(&(high, to))) => {
            let share = (at / low).ln() / (high / low).ln();
            from + share * (to - from)
        }
        (Some(&(_, rate)), None) | (None, Some(&(_, rate))) => rate,
        (None, None) => 0.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::test_model::{small, small_plan};

    #[test]
    fn rates_are_the_published_ones_and_between_them() {
        let (model, config) = (small(), small_plan());
        let machine = Machine {
            model: &model,
            config: &config,
        };
        let rate = |inner| machine.tflops(true, inner);
        let published = [512.0, 1536.0, 2048.0, 7168.0, 16384.0].map(rate);
        assert_eq!(published, [590.0, 990.0, 1025.0, 1304.0, 1358.0]);
        assert_eq!((rate(8.0), rate(1e6)), (590.0, 1358.0));
        // Half way from 512 to 1536 in the logarithm.
        let middle = rate(512.0 * 3f64.sqrt());
        assert!((middle - 790.0).abs() < 1e-9, "{middle}");
        assert_eq!(machine.tflops(false, 512.0), 585.0);
    }

    /// The dense layer of 16 tokens with rates of one for everything and no other traffic than that of the products:
    /// 16 x 1360 FLOPs for each of the three, q_b and kv_b once more, attention of 320 and 832 with 16 tokens in a
    /// sequence.
    #[test]
    fn passes_are_flops_over_rates() {
        let (model, mut config) = (small(), small_plan());
        let assumed = &mut config.assumptions;
        for rate in [
            &mut assumed.fp8_tflops_k512,
            &mut assumed.attention_forward_tflops,
            &mut assumed.attention_backward_tflops,
        ] {
            *rate = 1e-12;
        }
        let machine = Machine {
            model: &model,
            config: &config,
        };
        let passes = machine.passes(Part::Dense);
        let attention = attention_flops(&model, 16);
        assert_eq!((attention.forward, attention.backward), (320.0, 832.0));
        let products = 16.0 * 1360.0;
        let again = 16.0 * 2.0 * (72.0 + 64.0);
        assert_eq!(passes.forward.math, products + 16.0 * 320.0);
        assert_eq!(passes.input.math, products + 16.0 * 832.0 + again);
        assert_eq!(passes.weight.math, products);
        assert_eq!(passes.backward().network, 0.0);
        config.layout.recompute_up_projections = false;
        let machine = Machine {
            model: &model,
            config: &config,
        };
        let less = machine.passes(Part::Dense);
        assert_eq!(less.input.math, passes.input.math - again);
    }

    /// Traffic of o_proj, 8 x 8, by hand: FP8 inputs of 16 tokens forward, 16 x 8 x 3 bytes; gradients for Bi the same;
    /// for W 16 x 8 x (2 + 3) and 64 gradients of 4 bytes read and written.
    #[test]
    fn memory_traffic_is_counted_per_pass() {
        let (model, mut config) = (small(), small_plan());
        config.cluster.hbm_gb_s = 1e-9;
        config.assumptions.hbm_efficiency = 1.0;
        let machine = Machine {
            model: &model,
            config: &config,
        };
        let o_proj = Part::Dense.gemms(&model)[3];
        assert_eq!(o_proj.name, "o_proj");
        let passes = machine.gemm(&o_proj);
        assert_eq!(passes.forward.memory, 384.0);
        assert_eq!(passes.input.memory, 384.0);
        assert_eq!(passes.weight.memory, 640.0 + 512.0);
        config.training.fp8 = false;
        let machine = Machine {
            model: &model,
            config: &config,
        };
        let passes = machine.gemm(&o_proj);
        assert_eq!((passes.forward.memory, passes.weight.memory), (0.0, 512.0));
    }

    /// Experts see the rows of all GPUs, and the fullest one sets the time.
    #[test]
    fn imbalance_slows_experts_only() {
        let (model, even) = (small(), small_plan());
        let mut uneven = even.clone();
        uneven.assumptions.expert_imbalance = 1.5;
        let math = |config: &PlanConfig, part| {
            let machine = Machine {
                model: &model,
                config,
            };
            machine.passes(part).forward.math
        };
        assert_eq!(math(&even, Part::Dense), math(&uneven, Part::Dense));
        let machine = Machine {
            model: &model,
            config: &even,
        };
        let experts: f64 = Part::Moe
            .gemms(&model)
            .iter()
            .filter(|gemm| gemm.matrices > 1)
            .map(|gemm| machine.gemm(gemm).forward.math)
            .sum();
        let more = math(&uneven, Part::Moe) - math(&even, Part::Moe);
        assert!((more / (0.5 * experts) - 1.0).abs() < 1e-9);
    }
}
