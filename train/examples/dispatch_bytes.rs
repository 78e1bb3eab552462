//! Bytes that one mixture-of-experts layer of DeepSeek-V3's shape sends per token: measured, over 64 ranks on 8 nodes.
//!
//! ```sh
//! cargo run --release -p deepburn-train --example dispatch_bytes
//! ```

use std::error::Error;

use burn::tensor::{Device, Distribution, Tensor};
use deepburn_kernels::routing::{GroupLimit, select_experts};
use deepburn_train::parallel::{
    CommError, Communicator, ExpertPlacement, Hop, Kind, LocalOptions, Wire, local::run,
    routes::Routes, wire::Row,
};

const NODES: usize = 8;
const RANKS: usize = 64;
const EXPERTS: usize = 256;
const CHOSEN: usize = 8;
const HIDDEN: usize = 7168;
const TOKENS: usize = 16;

/// Bytes per token of the whole world.
struct Measured {
    nodes: f64,
    between: [f64; 2],
    within: [f64; 2],
}

fn main() -> Result<(), Box<dyn Error>> {
    println!(
        "{EXPERTS} experts, {CHOSEN} per token, hidden size {HIDDEN}, {RANKS} ranks on {NODES} nodes, {TOKENS} tokens \
         per rank, uniform affinities"
    );
    println!("KiB per token, forward: to the experts + back\n");
    println!("| limit | formats | other nodes per token | between nodes | within nodes |");
    println!("|---|---|---|---|---|");
    for topk_group in [4, 8] {
        for (name, wire) in [("FP32, FP32", Wire::F32), ("FP8, BF16", Wire::FP8)] {
            let Measured {
                nodes,
                between,
                within,
            } = measure(topk_group, wire)?;
            let limit = if topk_group == NODES {
                "none".to_owned()
            } else {
                format!("{topk_group} nodes")
            };
            let kib =
                |[there, back]: [f64; 2]| format!("{:.1} + {:.1}", there / 1024.0, back / 1024.0);
            println!(
                "| {limit} | {name} | {nodes:.2} | {} | {} |",
                kib(between),
                kib(within)
            );
        }
    }
    Ok(())
}

fn measure(topk_group: usize, wire: Wire) -> Result<Measured, Box<dyn Error>> {
    let limit = GroupLimit {
        experts_per_token: CHOSEN,
        groups: NODES,
        groups_per_token: topk_group,
    };
    let affinities = Distribution::Uniform(0.0, 1.0);
    let device = Device::flex();
    device.seed(1);
    let affinities = Tensor::<2>::random([RANKS * TOKENS, EXPERTS], affinities, &device);
    let chosen = select_experts(affinities, limit).into_data();
    let chosen: Vec<usize> = chosen.iter::<i64>().map(|expert| expert as usize).collect();

    let nodes: Vec<usize> = (0..RANKS).map(|rank| rank / (RANKS / NODES)).collect();
    let placement = ExpertPlacement::new(EXPERTS, NODES, &nodes)?;
    let row = |format, exact| Row {
        format,
        width: HIDDEN,
        exact,
    };
    let on_rank = |world: &dyn Communicator| -> Result<[[f64; 2]; 2], CommError> {
        let own = &chosen[world.rank() * TOKENS * CHOSEN..][..TOKENS * CHOSEN];
        let sent = |hop| world.traffic().of(Kind::AllToAll, hop).bytes as f64;
        let to_experts = row(wire.dispatch, CHOSEN);
        let routes = Routes::plan(world, &placement, own, CHOSEN)?;
        let tokens = vec![0.5; TOKENS * to_experts.numbers()];
        routes.scatter(world, to_experts, &tokens)?;
        let there = [sent(Hop::Between), sent(Hop::Within)];
        let outputs = vec![0.5; routes.rows() * HIDDEN];
        routes.gather(world, row(wire.combine, 0), &outputs)?;
        let back = [Hop::Between, Hop::Within].map(sent);
        Ok([there, [back[0] - there[0], back[1] - there[1]]])
    };
    let mut sums = [[0.0; 2]; 2];
    for rank in run(&nodes, LocalOptions::default(), |world| on_rank(&world)) {
        for (sum, found) in sums.as_flattened_mut().iter_mut().zip(rank?.as_flattened()) {
            *sum += found / (RANKS * TOKENS) as f64;
        }
    }
    let [there, back] = sums;
    // What crosses with a token is its row and the names of its experts there.
    let crossing = row(wire.dispatch, CHOSEN).bytes() + 2 * CHOSEN;
    Ok(Measured {
        nodes: there[0] / crossing as f64,
        between: [there[0], back[0]],
        within: [there[1], back[1]],
    })
}
