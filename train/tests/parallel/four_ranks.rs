//! A step of four ranks: two pipelines of two ranks, whose experts are divided among both, with a link between all.

use std::{
    sync::{Arc, Barrier},
    time::{Duration, Instant},
};

use burn::{
    module::{Module, ModuleVisitor, Param},
    optim::GradientsParams,
    tensor::{Device, Tensor, TensorData},
};
use deepburn_model::{
    config::ModelConfig, loss::BalanceReading, moe::TokenDispatcher, transformer::Transformer,
};
use deepburn_train::{
    parallel::{
        Communicator, ExpertDispatch, ExpertPlacement, Group, Link, LocalOptions, Mesh, Wire, local,
    },
    pipeline::{
        execute::{Share, Terms},
        layout::Layout,
        schedule::Schedule,
        stage::Part,
    },
    step::{LossWeights, Windows},
};

/// What each rank computes.
pub(crate) struct Work<'a> {
    pub(crate) shape: &'a ModelConfig,
    pub(crate) micro_batches: usize,
    pub(crate) sequences: usize,
    pub(crate) length: usize,
    pub(crate) overlap: bool,
}

/// Gradients of a rank's parameters, in order.
type Gradients = Vec<Vec<f32>>;

/// The gradients on each rank, and how long the micro-batches took there.
pub(crate) fn step(work: &Work<'_>, link: Arc<dyn Link>) -> Vec<(Gradients, Duration)> {
    let mesh = Mesh {
        data: 1,
        pipeline: 2,
        expert: 2,
    };
    let options = LocalOptions {
        link: Some(link),
        ..LocalOptions::default()
    };
    let timeline = Schedule::DualPipeV.timeline(mesh.pipeline, work.micro_batches);
    let timeline = timeline.unwrap();
    let layout = Layout::new(timeline.placement, work.shape, None).unwrap();
    let together = Barrier::new(mesh.ranks());
    local::run(&[0, 1, 2, 3], options, |world| {
        let device = Device::flex().autodiff();
        let place = mesh.place(world.rank());
        let part = Part::cut(
            Transformer::new(work.shape, 11, &device),
            &layout,
            place.pipeline,
        );
        let experts = mesh.split(&world, Group::Expert).unwrap();
        let placement = ExpertPlacement::new(
            work.shape.n_routed_experts,
            work.shape.n_group,
            experts.nodes(),
        );
        let dispatch =
            ExpertDispatch::new(experts.as_ref(), placement.unwrap(), Wire::F32).unwrap();
        let dispatcher: Arc<dyn TokenDispatcher> = Arc::new(dispatch.clone());
        let part = part.with_experts(&dispatch.own(), &dispatcher);
        let part = part.materialize();
        let pipeline = mesh.split(&world, Group::Pipeline).unwrap();
        let share = Share {
            timeline: &timeline,
            layout: &layout,
            ranks: pipeline.as_ref(),
            part: &part,
            terms: Terms {
                weights: LossWeights {
                    mtp: 0.3,
                    balance: 1e-2,
                    reading: BalanceReading::Paper,
                },
                micro_batches: work.micro_batches * mesh.expert,
                recompute: false,
                overlap: work.overlap,
            },
        };
        let windows = windows(work, place.expert, &device);
        together.wait();
        let start = Instant::now();
        let executed = share.train(&windows).unwrap();
        let gradients = read(&part, &executed.gradients);
        let took = start.elapsed();
        dispatch.check().unwrap();
        (gradients, took)
    })
}

/// Of tokens that are the pipeline's own.
fn windows(work: &Work<'_>, pipeline: usize, device: &Device) -> Vec<Windows> {
    let shape = [work.sequences, work.length + 1];
    let windows = (0..work.micro_batches).map(|number| {
        let seed = pipeline * work.micro_batches + number;
        let first = seed * 7919;
        let tokens = (first..first + shape[0] * shape[1])
            .map(|at| (at * at % 4093 % work.shape.vocab_size) as i32)
            .collect();
        Windows {
            tokens: Tensor::from_data(TensorData::new::<i32, _>(tokens, shape), device),
            first: None,
        }
    });
    windows.collect()
}

fn read(part: &Part, gradients: &GradientsParams) -> Gradients {
    struct Values<'a>(&'a GradientsParams, Gradients);
    impl ModuleVisitor for Values<'_> {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            let gradient = self.0.get::<D>(param.id);
            self.1
                .extend(gradient.map(|g| g.into_data().iter().collect()));
        }
    }
    let mut values = Values(gradients, Vec::new());
    part.visit(&mut values);
    values.1
}
