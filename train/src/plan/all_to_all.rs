//! How far tokens travel to their experts and back (report, section 3.2.2).
//!
//! A token crosses the network once for each node that has some of its experts, to the GPU with the same place in that
//! node, and goes on over NVLink to each GPU that has some. Node-limited routing bounds the number of nodes. Both hops
//! go on at the same time, so that the slower one counts.

use deepburn_model::config::ModelConfig;
use serde::Serialize;

use super::config::PlanConfig;

/// Transfers that a token needs on average, the GPU and the node that it is on left out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Hops {
    /// Nodes with some of its experts, its own included.
    pub nodes: f64,
    /// To other nodes.
    pub network: f64,
    /// To other GPUs of a node.
    pub nvlink: f64,
}

impl Hops {
    /// For experts spread over `layout.ep` GPUs, all of those in reach equally likely.
    pub fn new(model: &ModelConfig, config: &PlanConfig) -> Self {
        let (ep, experts) = (config.layout.ep, model.n_routed_experts);
        let nodes = config.expert_nodes();
        let in_node = ep / nodes;
        let (reach, reached_nodes) = match config.layout.node_limit {
            // Groups are nodes, or whole parts of one, or lie on several whole ones.
            true => (
                model.topk_group * (experts / model.n_group),
                nodes.min(model.topk_group * (nodes / model.n_group).max(1)),
            ),
            false => (experts, nodes),
        };
        let met = |places: f64| occupied(places, reach as f64, model.num_experts_per_tok);
        let met_nodes = met(reached_nodes as f64);
        let met_gpus = met(reach as f64 * ep as f64 / experts as f64);
        let others = |places: usize| (places - 1) as f64 / places as f64;
        Self {
            nodes: met_nodes,
            network: met_nodes * others(nodes),
            nvlink: met_gpus * others(in_node),
        }
    }
}

/// Bytes and time of one layer's all-to-all for one micro-batch, of each GPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct AllToAll {
    /// To the experts: bytes over the network and over NVLink.
    pub dispatch: [f64; 2],
    /// Back from them: the same.
    pub combine: [f64; 2],
    /// Seconds for both.
    pub time: f64,
}

impl AllToAll {
    /// One way there and one way back; a backward pass has the same, of gradients (section 3.3.3).
    pub fn new(model: &ModelConfig, config: &PlanConfig) -> Self {
        let hops = Hops::new(model, config);
        let (cluster, assumed) = (&config.cluster, &config.assumptions);
        let elements = (config.tokens() * model.hidden_size) as f64;
        let bytes = |element: f64| [hops.network, hops.nvlink].map(|hop| hop * elements * element);
        let dispatched = match config.training.fp8 {
            true => assumed.fp8_bytes,
            false => assumed.bf16_bytes,
        };
        let time = |[network, nvlink]: [f64; 2], efficiency: f64| {
            let network = network / (cluster.ib_gb_s * 1e9 * efficiency);
            let nvlink = nvlink / (cluster.nvlink_gb_s * 1e9 * assumed.nvlink_efficiency);
            match f64::max(network, nvlink) {
                0.0 => 0.0,
                longer => longer + cluster.latency_us * 1e-6,
            }
        };
        let (dispatch, combine) = (bytes(dispatched), bytes(assumed.bf16_bytes));
        Self {
            dispatch,
            combine,
            time: time(dispatch, assumed.dispatch_efficiency)
                + time(combine, assumed.combine_efficiency),
        }
    }
}

/// How many of `places` have some of the `drawn` of `items`, which lie evenly on them: drawn without putting back.
fn occupied(places: f64, items: f64, drawn: usize) -> f64 {
    let elsewhere = items - items / places;
    let none: f64 = (0..drawn)
        .map(|taken| (elsewhere - taken as f64).max(0.0) / (items - taken as f64))
        .product();
    places * (1.0 - none)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::test_model::{small, small_plan};

    /// Two of four on two places: 2 of 6 pairs are on one place, so 2/6 x 1 + 4/6 x 2.
    #[test]
    fn places_are_those_of_a_draw_without_putting_back() {
        let close =
            |found: f64, expected: f64| assert!((found - expected).abs() < 1e-12, "{found}");
        close(occupied(2.0, 4.0, 2), 10.0 / 6.0);
        close(occupied(3.0, 3.0, 2), 2.0);
        close(occupied(1.0, 8.0, 2), 1.0);
    }

    /// 8 experts on 4 nodes of 2 GPUs, 2 chosen. Of all: 4 (1 - C(6,2)/C(8,2)) = 4 (1 - 15/28) = 13/7 nodes and 2
    /// GPUs. Of one group of four, which is a node: 1 node, still 2 GPUs.
    #[test]
    fn the_node_limit_saves_network_and_not_nvlink() {
        let mut config = small_plan();
        let close =
            |found: f64, expected: f64| assert!((found - expected).abs() < 1e-12, "{found}");
        config.layout.node_limit = false;
        let all = Hops::new(&small(), &config);
        close(all.nodes, 13.0 / 7.0);
        close(all.network, 13.0 / 7.0 * 3.0 / 4.0);
        close(all.nvlink, 1.0);
        config.layout.node_limit = true;
        let limited = Hops::new(&small(), &config);
        close(limited.nodes, 1.0);
        close(limited.network, 0.75);
        close(limited.nvlink, 1.0);

        // 16 tokens of width 8 in FP8 with scales and back in BF16, each 0.75 times over the network and once over
        // NVLink.
        let found = AllToAll::new(&small(), &config);
        assert_eq!(found.dispatch, [0.75 * 132.0, 132.0]);
        assert_eq!(found.combine, [0.75 * 256.0, 256.0]);
        let slow = |bytes: f64, efficiency: f64| bytes / (50e9 * efficiency) + 5e-6;
        let expected = slow(99.0, 0.805) + slow(192.0, 0.7875);
        close(found.time / expected, 1.0);
    }

    #[test]
    fn experts_on_one_gpu_need_no_transfers() {
        let mut config = small_plan();
        config.layout.ep = 1;
        assert_eq!(AllToAll::new(&small(), &config).time, 0.0);
    }
}
