//! `deepburn plan`: the report's training, closed formulas, what is refused, and the command.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use burn::tensor::Device;
use deepburn_model::{
    checkpoint,
    config::ModelConfig,
    parameters::{self, ParameterCount},
    transformer::Transformer,
};
use deepburn_train::{
    pipeline::schedule::{Schedule, simulate},
    plan::{Plan, PlanConfig, Stage, gemm::Parameters},
};
use serde_json::Value;

fn file(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

fn cluster() -> PathBuf {
    file("configs/cluster/h800-2048.toml")
}

fn configured(set: &[&str]) -> (ModelConfig, PlanConfig) {
    let set: Vec<String> = set.iter().map(|&text| text.to_owned()).collect();
    let config = PlanConfig::read(&cluster(), &set).unwrap();
    let model = checkpoint::read_config(&config.model_path(&cluster())).unwrap();
    (model, config)
}

fn plan(set: &[&str]) -> Plan {
    let (model, config) = configured(set);
    Plan::new(&model, &config).unwrap()
}

fn refused(set: &[&str]) -> String {
    let (model, config) = configured(set);
    Plan::new(&model, &config).unwrap_err().to_string()
}

#[track_caller]
fn near(found: f64, expected: f64, tolerance: f64) {
    let off = (found / expected - 1.0).abs();
    assert!(off <= tolerance, "{found} is not {expected}");
}

/// Two ways to count: products here, the modules of the model there.
#[test]
fn parameters_are_those_that_the_model_has() {
    for name in ["deepseek-v3-671b", "moonlight-16b-a3b", "tiny", "bench-24m"] {
        let config = checkpoint::read_config(&file(&format!("configs/model/{name}.json"))).unwrap();
        for tied in [false, true] {
            let config = ModelConfig {
                tie_word_embeddings: tied,
                ..config.clone()
            };
            let listed = parameters::list(&Transformer::new(&config, 0, &Device::flex()));
            let count = ParameterCount::of(&listed, &config);
            let expected = Parameters {
                total: count.total(),
                active: count.active(),
                mtp: count.mtp,
            };
            assert_eq!(Parameters::of(&config), expected, "{name}, tied: {tied}");
        }
    }
    let published = plan(&[]).parameters;
    assert_eq!(published.total, 671_026_419_200);
    assert_eq!(published.active, 36_625_618_432);
}

/// What follows from the report's sizes by hand.
#[test]
fn the_reports_training_has_its_sizes() {
    let plan = plan(&[]);
    // 2048 / 16 pipelines; 15360 sequences over 128 of them.
    assert_eq!(plan.config.data_parallel(), 128);
    assert_eq!(plan.config.micro_batches(), 120);
    near(plan.prediction.steps, 14.8e12 / (15360.0 * 4096.0), 1e-12);
    let layers: Vec<usize> = plan.stages.iter().map(Stage::layers).collect();
    assert_eq!((layers.len(), layers.iter().sum()), (16, 61));

    // 4 (1 - C(96, 8) / C(128, 8)) nodes, 7 in 8 of them not the token's own.
    let missed: f64 = (0..8)
        .map(|i| f64::from(96 - i) / f64::from(128 - i))
        .product();
    near(plan.hops.nodes, 4.0 * (1.0 - missed), 1e-12);
    near(plan.hops.network, 3.5 * (1.0 - missed), 1e-12);
    let bytes = 3.5 * (1.0 - missed) * 4096.0 * 7168.0;
    near(plan.all_to_all.dispatch[0], bytes * 1.03125, 1e-12);
    near(plan.all_to_all.combine[0], bytes * 2.0, 1e-12);
}

/// The whole prediction, beside an estimate on the back of an envelope.
///
/// A token's forward pass through a layer with experts multiplies it with 187M + 1.8M + 9 x 44M = 585M weights: 4.79
/// TFLOP for 4096 tokens, at the published 590 to 1358 TFLOP/s about 4.1 ms. Attention is 0.69 TFLOP at 579: 1.2 ms.
/// Backward is 2 x 4.1, 2.6 x 0.69 at 542 = 3.3 and again the up-projections, 0.6: 12.1 ms. 17.4 ms for both, 20.5 on 112
/// of 132 multiprocessors. Passes over memory add a fifth to a third, as 8 bytes per gradient and the copies of 8
/// experts are some 15 GB: 24 to 28 ms, in 15 of which all-to-all fits.
///
/// 61 layers, MTP and two heads (3 x 7.6 TFLOP at 585 are 39 ms, 1.7 layers each) are 65 to 66 such, in 16 stages 0.10 to
/// 0.115 s for a pair: 120 of them are 12 to 14 s on a mean rank. A rank has two stages, eight or nine layers, so that the
/// longest has up to 9 % more. Table 2's bubble, 7 (F&B + B - 3 W), is 7 x 0.12 = 0.8 s, all-to-all of the 2 x 8 passes
/// that are not in pairs about 16 x 4 x 14 ms = 0.9 s, and 3.3 x 10^9 weights to be reduced and gathered at 40 GB/s
/// with 6 bytes each, experts half of it three quarters: 0.5 s. Together 14 to 17.5 s.
#[test]
fn the_reports_training_takes_what_its_kernels_take() {
    let plan = plan(&[]);
    let layer = plan.moe_layer.unwrap();
    let between = |name: &str, value: f64, [low, high]: [f64; 2]| {
        assert!((low..=high).contains(&value), "{name} is {value}");
    };
    between("forward", layer.forward.math * 1e3, [4.8, 5.8]);
    between("backward", layer.backward().math * 1e3, [11.0, 13.2]);
    let memory = (layer.forward + layer.backward()).memory;
    between("memory", memory * 1e3, [3.5, 7.5]);
    between("all-to-all", layer.forward.network * 1e3, [6.5, 8.5]);
    between("step", plan.prediction.step, [14.0, 17.5]);
    between("GPU hours", plan.prediction.gpu_hours, [1.87e6, 2.35e6]);

    // Computation, exposed communication and bubble are all that happens until the last backward pass.
    for (times, _) in &plan.ranks {
        let sum = times.computation + times.exposed + times.bubble;
        near(sum, plan.simulation.makespan, 1e-9);
    }
    // Section 3.2.3: no tensor parallelism is needed. 17 micro-batches keep 153 KB for each token and layer, 2.5 GB for
    // each of four layers, and 3.3 x 10^9 weights with their gradients take 6 bytes: 43 GB and 20 GB, where there is
    // a ninth layer more.
    let totals = plan.ranks.iter().map(|(_, memory)| memory.total());
    between(
        "memory of the fullest rank",
        totals.fold(0.0, f64::max),
        [63e9, 80e9],
    );

    // Section 3.2.1: pairs hide everything, so what is exposed is that of the few passes that are not in pairs.
    let exposed: f64 = plan.ranks.iter().map(|(times, _)| times.exposed).sum();
    let hidden: f64 = plan.ranks.iter().map(|(times, _)| times.hidden).sum();
    between("exposed part", exposed / (exposed + hidden), [0.02, 0.25]);

    // Table 1 beside it: 2664K hours are 180K for each trillion tokens, 19.9 s a step.
    let reported = plan.reported.unwrap();
    near(reported.gpu_hours, 2.664e6, 1e-9);
    near(reported.step, 19.9, 2e-3);
    near(reported.usd, 5.328e6, 1e-9);
}

/// Equal stages and nothing but products and attention: then the bubble of 1F1B is that of table 2, and what is
/// simulated stage by stage is what one set of costs gives.
#[test]
fn equal_stages_are_simulated_as_one_set_of_costs() {
    let mut model = checkpoint::read_config(&file("configs/model/tiny.json")).unwrap();
    (model.num_hidden_layers, model.first_k_dense_replace) = (8, 8);
    model.num_nextn_predict_layers = 0;
    for schedule in Schedule::ALL {
        let mut config = PlanConfig::default();
        (config.cluster.gpus, config.cluster.gpus_per_node) = (4, 4);
        (config.cluster.hbm_gb_s, config.cluster.latency_us) = (1e12, 0.0);
        config.layout.schedule = schedule;
        (config.layout.pp, config.layout.ep) = (4, 1);
        (config.layout.global_batch, config.layout.sequence_length) = (16, 32);
        // The head at no cost, and nothing to hand on.
        config.assumptions.bf16_tflops = 1e12;
        config.cluster.ib_gb_s = 1e12;
        let plan = Plan::new(&model, &config).unwrap();
        let uniform = simulate(&plan.timeline, &plan.mean).unwrap();
        near(plan.simulation.makespan, uniform.makespan, 1e-6);
        let stage = plan.stages[0].passes;
        let pass = stage.computation();
        let work = 16.0 * pass * (plan.stages.len() / 4) as f64;
        for (times, _) in &plan.ranks {
            match schedule {
                Schedule::OneFOneB => {
                    near(times.bubble, 3.0 * pass, 1e-6);
                    near(times.computation, work, 1e-6);
                }
                Schedule::ZeroBubble => near(times.computation, work, 1e-6),
                // Pairs, which most passes are in, leave 20 of 132 multiprocessors to communication.
                _ => {
                    let slower = times.computation / work;
                    assert!(slower > 1.05 && slower < 132.0 / 112.0, "{slower}");
                }
            }
        }
    }
}

#[test]
fn sizes_that_do_not_fit_are_refused() {
    for (set, expected) in [
        (
            "layout.pp=15",
            "layout.pp = 15: must divide cluster.gpus = 2048",
        ),
        (
            "layout.ep=48",
            "layout.ep = 48: must divide the number of pipelines, cluster.gpus / layout.pp = 128",
        ),
        (
            "cluster.gpus_per_node=7",
            "cluster.gpus_per_node = 7: must divide cluster.gpus = 2048",
        ),
        (
            "layout.global_batch=15361",
            "layout.global_batch = 15361: must be a multiple of 128: layout.micro_batch = 1 for each of 128 pipelines",
        ),
        (
            "layout.global_batch=3072",
            "layout.global_batch = 3072: gives 24 micro-batches per pipeline; DualPipe needs an even number, at least \
             32 for 16 ranks",
        ),
        (
            "layout.pp=0",
            "layout.pp = 0: must be a number above 0, at most 1.6777216e7",
        ),
        (
            "assumptions.hbm_efficiency=1.2",
            "assumptions.hbm_efficiency = 1.2: must be at most 1",
        ),
        (
            "assumptions.expert_imbalance=0.5",
            "assumptions.expert_imbalance = 0.5: must be at least 1",
        ),
        (
            "layout.communication_sms=132",
            "layout.communication_sms = 132: must be below cluster.sms = 132",
        ),
        (
            "cluster.ib_gb_s=nan",
            "cluster.ib_gb_s = NaN: must be a number above 0, at most 1e18",
        ),
    ] {
        assert_eq!(refused(&[set]), expected, "{set}");
    }
    let (model, mut config) = configured(&[]);
    config.layout.sequence_length = 200_000;
    let error = Plan::new(&model, &config).unwrap_err().to_string();
    assert_eq!(
        error,
        "layout.sequence_length = 200000: must be at most max_position_embeddings = 163840 of the model"
    );
    let odd = ["cluster.gpus_per_node=8", "layout.pp=128", "layout.ep=16"];
    assert!(refused(&odd).contains("128 stages"), "{}", refused(&odd));
}

/// Each change moves the step in the direction that it must.
#[test]
fn predictions_follow_what_is_assumed() {
    let step = |set: &[&str]| plan(set).prediction.step;
    let base = step(&[]);
    assert!(step(&["assumptions.rate_factor=1.1"]) < base);
    assert!(step(&["layout.overlap=false"]) > 1.2 * base);
    assert!(step(&["layout.node_limit=false"]) > base);
    assert!(step(&["cluster.ib_gb_s=25"]) > base);
    assert!(step(&["layout.schedule=1f1b"]) > 1.2 * base);
    assert!(step(&["training.fp8=false"]) > 1.2 * base);
    let activations = |set: &[&str]| plan(set).ranks[0].1.activations;
    let kept = activations(&[]);
    for what in ["norms", "up_projections", "swiglu"] {
        let set = format!("layout.recompute_{what}=false");
        assert!(activations(&[&set]) > kept, "{what}");
        if what != "norms" {
            continue;
        }
        assert!(step(&[&set]) < base, "{what}");
    }
}

fn deepburn(args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_deepburn"));
    command
        .arg("plan")
        .arg(cluster())
        .args(args)
        .output()
        .unwrap()
}

#[test]
fn the_command_prints_tables_json_and_a_drawing() {
    let output = deepburn(&["--set", "cluster.ib_gb_s=40"]);
    let text = String::from_utf8(output.stdout).unwrap();
    for part in [
        "671.0B parameters, 36.6B active per token",
        "2048 GPUs on 256 nodes: 128 pipelines of 16 ranks, experts of a layer on 64 GPUs of 8 nodes",
        "DualPipe: 120 micro-batches of 1 x 4096 tokens",
        "2.664M",
        "half the network bandwidth",
        "as set; by default 50: section 3.2.2",
        "layout.communication_sms                            20  sections 3.2.2 and 3.5.1",
    ] {
        assert!(text.contains(part), "{part:?} is not in:\n{text}");
    }

    let folder = tempfile::tempdir().unwrap();
    let drawing = folder.path().join("plan.svg");
    let output = deepburn(&["--json", "--svg", drawing.to_str().unwrap()]);
    let json: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(json["config"]["layout"]["schedule"], "dualpipe");
    assert_eq!(json["ranks"].as_array().unwrap().len(), 16);
    assert_eq!(
        json["predicted"]["step"].as_f64(),
        Some(plan(&[]).prediction.step)
    );
    assert_eq!(json["sensitivity"][4]["set"], "layout.overlap=false");
    let svg = fs::read_to_string(drawing).unwrap();
    assert!(
        svg.contains("DualPipe, 16 ranks, 120 micro-batches"),
        "{}",
        &svg[..600]
    );
    assert!(svg.contains("in milliseconds, a stage takes on average"));
    assert!(svg.ends_with("</svg>\n"));

    let output = deepburn(&["--set", "layout.pipelines=3"]);
    assert_eq!(output.status.code(), Some(1));
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(
        error.contains("h800-2048.toml: ") && error.contains("unknown field `pipelines`"),
        "{error}"
    );
}
