//! A plan as tables.

use std::fmt::{Arguments, Write};

use deepburn_train::plan::{
    Plan, Prediction, RankTimes,
    assumptions::{self, NOTES},
    sensitivity::Variant,
    work::Work,
};

const RANKS: &str = "\
Seconds of a step: computation; communication beside it and before or after it; waiting for other ranks. Then 10^9
bytes on each GPU: weights, gradients, optimizer state (ZeRO-1), activations at the worst moment.
";

pub(super) fn text(plan: &Plan, variants: &[Variant]) -> String {
    let mut text = Text::default();
    text.head(plan);
    text.prediction(plan);
    text.step(plan);
    text.layer(plan);
    text.ranks(plan);
    text.sensitivity(plan, variants);
    text.assumptions(plan);
    text.0
}

#[derive(Default)]
struct Text(String);

impl Text {
    fn put(&mut self, content: Arguments<'_>) {
        writeln!(self.0, "{content}").expect("a string takes whatever is written to it");
    }

    fn head(&mut self, plan: &Plan) {
        let (config, parameters) = (&plan.config, &plan.parameters);
        let (cluster, layout) = (&config.cluster, &config.layout);
        self.put(format_args!(
            "{}: {} parameters, {} active per token, {} in MTP modules",
            config.training.model.display(),
            human(parameters.total as f64, 1),
            human(parameters.active as f64, 1),
            human(parameters.mtp as f64, 1),
        ));
        self.put(format_args!(
            "{} GPUs on {} nodes: {} pipelines of {} ranks, experts of a layer on {} GPUs of {} nodes",
            cluster.gpus,
            cluster.gpus / cluster.gpus_per_node,
            config.data_parallel(),
            layout.pp,
            layout.ep,
            config.expert_nodes(),
        ));
        let tokens = layout.global_batch * layout.sequence_length;
        self.put(format_args!(
            "{}: {} micro-batches of {} x {} tokens through each pipeline, {} tokens a step",
            layout.schedule.name(),
            config.micro_batches(),
            layout.micro_batch,
            layout.sequence_length,
            human(tokens as f64, 1),
        ));
    }

    fn prediction(&mut self, plan: &Plan) {
        let reported = plan.reported.as_ref();
        let known = if reported.is_some() {
            ["reported", "ratio"]
        } else {
            [""; 2]
        };
        self.put(format_args!(
            "\n{:<34}{:>12}{:>12}{:>8}",
            "", "predicted", known[0], known[1]
        ));
        let hours = format!(
            "GPU hours, {} tokens",
            human(plan.config.training.tokens, 1)
        );
        let bf16 = format!(
            "of the BF16 peak, {} TFLOP/s",
            plan.config.cluster.bf16_peak_tflops
        );
        let fp8 = format!(
            "of the FP8 peak, {} TFLOP/s",
            plan.config.cluster.fp8_peak_tflops
        );
        let rows: [Row<'_>; 7] = [
            ("step", |p| p.step, |value| format!("{value:.2} s")),
            (&hours, |p| p.gpu_hours, |value| human(value, 3)),
            ("cost", |p| p.usd, |value| format!("${}", human(value, 3))),
            (
                "tokens per second",
                |p| p.tokens_per_second,
                |value| human(value, 2),
            ),
            (
                "model TFLOP/s per GPU",
                |p| p.tflops,
                |value| format!("{value:.0}"),
            ),
            (&bf16, |p| p.bf16_utilisation, percent),
            (&fp8, |p| p.fp8_utilisation, percent),
        ];
        for (name, value, show) in rows {
            let predicted = value(&plan.prediction);
            let beside = reported.map(value);
            let ratio = beside.filter(|beside| *beside > 0.0);
            self.put(format_args!(
                "{name:<34}{:>12}{:>12}{:>8}",
                show(predicted),
                beside.map(show).unwrap_or_default(),
                ratio
                    .map(|beside| format!("{:.2}", predicted / beside))
                    .unwrap_or_default(),
            ));
        }
    }

    /// Means over the ranks: computation, exposed communication and bubble add up to the pipeline's time on each.
    fn step(&mut self, plan: &Plan) {
        let mean = |of: fn(&RankTimes) -> f64| {
            plan.ranks.iter().map(|(times, _)| of(times)).sum::<f64>() / plan.ranks.len() as f64
        };
        let Prediction {
            step,
            reduction,
            optimizer,
            ..
        } = plan.prediction;
        self.put(format_args!("\nWhere a step goes, mean of the ranks"));
        for (name, seconds) in [
            ("computation", mean(|times| times.computation)),
            ("exposed communication", mean(|times| times.exposed)),
            ("bubble", mean(|times| times.bubble)),
            ("gradients and weights", reduction),
            ("optimizer", optimizer),
        ] {
            self.put(format_args!(
                "{name:<34}{seconds:>10.3} s{:>12}",
                percent(seconds / step)
            ));
        }
        let hidden = mean(|times| times.hidden);
        self.put(format_args!(
            "{:<34}{hidden:>10.3} s",
            "hidden communication"
        ));
    }

    fn layer(&mut self, plan: &Plan) {
        let Some(passes) = plan.moe_layer else { return };
        self.put(format_args!(
            "\n{:<34}{:>12}{:>12}{:>12}",
            "A layer with experts, ms", "F", "Bi", "W"
        ));
        let rows: [(&str, PartOfWork); 3] = [
            ("products and attention", |work| work.math),
            ("memory", |work| work.memory),
            ("all-to-all", |work| work.network),
        ];
        for (name, of) in rows {
            let [f, bi, w] =
                [passes.forward, passes.input, passes.weight].map(|work| of(&work) * 1e3);
            self.put(format_args!("{name:<34}{f:>12.2}{bi:>12.2}{w:>12.2}"));
        }
        let [dispatch, combine] = [plan.all_to_all.dispatch, plan.all_to_all.combine]
            .map(|bytes| bytes.map(|bytes| bytes / 1e6));
        self.put(format_args!(
            "A token's experts are on {:.2} nodes; {:.2} crossings of the network, {:.2} of NVLink. A GPU dispatches {:.0} MB \
             over\nthe network and {:.0} MB over NVLink, and combines {:.0} MB and {:.0} MB.",
            plan.hops.nodes,
            plan.hops.network,
            plan.hops.nvlink,
            dispatch[0],
            dispatch[1],
            combine[0],
            combine[1],
        ));
    }

    fn ranks(&mut self, plan: &Plan) {
        self.put(format_args!(
            "\n{:<6}{:>7}{:>9}{:>8}{:>9}{:>8}{:>10}{:>10}{:>10}{:>12}{:>8}",
            "rank",
            "layers",
            "compute",
            "hidden",
            "exposed",
            "bubble",
            "weights",
            "gradients",
            "optimizer",
            "activations",
            "total"
        ));
        let placement = plan.timeline.placement;
        for (rank, (times, memory)) in plan.ranks.iter().enumerate() {
            let stages = placement.directions().iter();
            let layers: Vec<String> = stages
                .map(|&way| plan.stages[placement.stage(rank, way)].layers().to_string())
                .collect();
            let gb = |bytes: f64| bytes / 1e9;
            self.put(format_args!(
                "{rank:<6}{:>7}{:>9.2}{:>8.2}{:>9.2}{:>8.2}{:>10.1}{:>10.1}{:>10.1}{:>12.1}{:>8.1}",
                layers.join("+"),
                times.computation,
                times.hidden,
                times.exposed,
                times.bubble,
                gb(memory.weights),
                gb(memory.gradients),
                gb(memory.optimizer),
                gb(memory.activations),
                gb(memory.total()),
            ));
        }
        self.put(format_args!("{}", RANKS.trim_end()));
        let most = plan
            .ranks
            .iter()
            .map(|(_, memory)| memory.total())
            .fold(0.0, f64::max)
            / 1e9;
        let has = plan.config.cluster.hbm_gb;
        let verdict = if most <= has { "fits" } else { "does not fit" };
        self.put(format_args!("At most {most:.1} of {has} GB: it {verdict}."));
    }

    fn sensitivity(&mut self, plan: &Plan, variants: &[Variant]) {
        self.put(format_args!(
            "\n{:<44}{:>10}{:>12}{:>9}",
            "If one thing is different", "step", "GPU hours", "change"
        ));
        for Variant {
            name, prediction, ..
        } in variants
        {
            let change = prediction.step / plan.prediction.step - 1.0;
            self.put(format_args!(
                "{name:<44}{:>8.2} s{:>12}{:>+8.1}%",
                prediction.step,
                human(prediction.gpu_hours, 3),
                change * 100.0,
            ));
        }
    }

    fn assumptions(&mut self, plan: &Plan) {
        self.put(format_args!(
            "\nAssumed; sections, tables and figures are the technical report's"
        ));
        for row in assumptions::table(&plan.config) {
            let source = match row.default {
                Some(default) => format!("as set; by default {default}: {}", row.source),
                None => row.source.to_owned(),
            };
            self.put(format_args!("{:<40}{:>14}  {source}", row.key, row.value));
        }
        self.put(format_args!(""));
        for note in NOTES {
            self.put(format_args!("- {note}"));
        }
    }
}

fn percent(part: f64) -> String {
    format!("{:.1}%", part * 100.0)
}

/// A name, its value in a prediction, and how that is written.
type Row<'a> = (&'a str, fn(&Prediction) -> f64, fn(f64) -> String);

/// A part of the work.
type PartOfWork = fn(&Work) -> f64;

/// With the largest unit that fits.
fn human(value: f64, decimals: usize) -> String {
    let units = [(1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")];
    match units.iter().find(|(size, _)| value >= *size) {
        Some((size, unit)) => format!("{:.decimals$}{unit}", value / size),
        None => format!("{value:.decimals$}"),
    }
}
