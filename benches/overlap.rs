//! What it brings that the two passes of a pair compute on two threads: a step of four ranks of a thread each, two pipelines
//! of two whose experts are divided among both, over simulated links that carry a message in a latency and the time that
//! its bytes take.
//!
//! `cargo bench --bench overlap [-- --help]`. The parts of a model of bench-24m.json's layers are on two cores here, if there
//! are no more: ranks compute beside each other as well.

use std::{sync::Arc, thread, time::Duration};

use clap::Parser;
use deepburn_model::{checkpoint::hf_config, config::ModelConfig};
use deepburn_train::parallel::Link;
use four_ranks::{Work, step};

#[path = "../src/allocator.rs"]
mod allocator;
#[path = "../train/tests/parallel/four_ranks.rs"]
mod four_ranks;

#[derive(Debug, Parser)]
struct Args {
    /// Micro-batches of each pipeline
    #[arg(long, default_value_t = 10)]
    micro_batches: usize,
    /// Tokens of each, in two sequences
    #[arg(long, default_value_t = 256)]
    tokens: usize,
    /// Rates of the links, in MB/s
    #[arg(long, value_delimiter = ',', default_value = "1000,100,50,25,10")]
    rates: Vec<f64>,
    /// Microseconds that a message takes beside its bytes
    #[arg(long, default_value_t = 100)]
    latency: u64,
    /// Measured steps of each kind, in turn
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// As cargo passes it
    #[arg(long, hide = true)]
    bench: bool,
}

struct Wire {
    latency: Duration,
    bytes_per_second: f64,
}

impl Link for Wire {
    fn carry(&self, _: usize, _: usize, bytes: usize) {
        let bytes = Duration::from_secs_f64(bytes as f64 / self.bytes_per_second);
        thread::sleep(self.latency + bytes);
    }
}

fn main() {
    allocator::keep_freed_memory();
    let args = Args::parse();
    let shape = include_str!("../configs/model/bench-24m.json");
    let shape = ModelConfig {
        num_nextn_predict_layers: 1,
        ..hf_config::parse(shape).expect("a shape of this repository")
    };
    println!("link (MB/s)   one by one (s)   together (s)   ratio");
    for &rate in &args.rates {
        let link = Arc::new(Wire {
            latency: Duration::from_micros(args.latency),
            bytes_per_second: rate * 1e6,
        });
        let seconds = |overlap| {
            let work = Work {
                shape: &shape,
                micro_batches: args.micro_batches,
                sequences: 2,
                length: args.tokens / 2,
                overlap,
            };
            let took = step(&work, link.clone()).into_iter().map(|rank| rank.1);
            took.max().expect("there are ranks").as_secs_f64()
        };
        let mut taken = [Vec::new(), Vec::new()];
        for _ in 0..args.rounds {
            taken[0].push(seconds(false));
            taken[1].push(seconds(true));
        }
        let [apart, together] = taken.map(median);
        println!(
            "{rate:>11}   {apart:>14.3}   {together:>12.3}   {:>5.2}",
            apart / together
        );
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
