//! A rank's part of a model as Burn's Learner trains it: all micro-batches of a step at once, with the other ranks.

use std::{
    ops::Range,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use burn::{
    module::{Module, ParamId},
    optim::{
        GradientsParams, ModuleOptimizer, OptimizerRecord,
        lr_scheduler::module_lr_scheduler::ModuleLearningRate,
    },
    train::{InferenceStep, TrainOutput, TrainStep},
};
use deepburn_model::{config::ModelConfig, parameters::Registry};

use super::{
    copies,
    execute::{Executed, MicroLosses, Share, Terms},
    layout::Layout,
    schedule::Timeline,
    stage::Part,
};
use crate::{
    learner::{Batch, Exchange},
    parallel::{
        CommError, Communicator, DataParallel, ExpertDispatch, Group, Mesh, Reduction, Values,
        data_parallel::sum_loads,
    },
    report::StepReport,
    run::TrainError,
    shards,
    state::{Checkpoints, Contents},
    step::{self, LossWeights},
    strategy::Trained,
};

/// A rank's part of a model in training.
#[derive(Module, Debug)]
pub struct RankTrainee {
    /// What it has of the model.
    pub part: Part,
    #[module(skip)]
    rank: Rank,
    #[module(skip)]
    exchange: Exchange,
}

/// Who a rank is and whom it talks to. Shared by all clones of its [`RankTrainee`].
#[derive(Clone)]
pub struct Rank(Arc<Seat>);

/// How a model is trained by several ranks.
#[derive(Clone, Debug)]
pub struct Arrangement {
    /// The ranks.
    pub mesh: Mesh,
    /// The stages of each pipeline.
    pub layout: Layout,
    /// What each rank of a pipeline does; has been validated.
    pub timeline: Timeline,
    /// The model's shape.
    pub shape: ModelConfig,
    /// Windows in a micro-batch.
    pub sequences: usize,
    /// Micro-batches of a step over all pipelines.
    pub micro_batches: usize,
    /// Whether stages compute their forward passes again instead of keeping what they gave.
    pub recompute: bool,
    /// Whether the two passes of a pair compute on two threads where tokens travel to their experts.
    pub overlap: bool,
}

struct Seat {
    /// In the world.
    rank: usize,
    arrangement: Arrangement,
    registry: Registry,
    /// The number in the model of each mixture-of-experts layer, MTP modules last.
    routed: Vec<usize>,
    /// Brings tokens to experts on other ranks, if they are divided.
    dispatch: Option<ExpertDispatch>,
    voices: Mutex<Voices>,
}

/// The groups that a rank talks in.
pub(crate) struct Voices {
    pub(crate) world: Arc<dyn Communicator>,
    pipeline: Box<dyn Communicator>,
    pub(crate) copies: DataParallel,
}

impl std::fmt::Debug for Rank {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Rank({})", self.0.rank)
    }
}

impl Rank {
    /// Takes the place of the world's rank in an arrangement with its part of the model, whose experts are those of
    /// `dispatch`. Called by all ranks.
    ///
    /// # Errors
    /// What keeps ranks from talking.
    pub fn new(
        world: Arc<dyn Communicator>,
        arrangement: Arrangement,
        (part, registry): (&Part, Registry),
        dispatch: Option<ExpertDispatch>,
    ) -> Result<Self, TrainError> {
        let shape = &arrangement.shape;
        let layers = shape.num_hidden_layers;
        let all = 0..layers + shape.num_nextn_predict_layers;
        let dense = |layer: usize| shape.is_dense(layer.min(layers));
        let rank = world.rank();
        let voices = Voices {
            pipeline: arrangement.mesh.split(world.as_ref(), Group::Pipeline)?,
            copies: copies::data_parallel(
                world.as_ref(),
                (arrangement.mesh, &arrangement.layout),
                (part, &registry),
            )?,
            world,
        };
        Ok(Self(Arc::new(Seat {
            rank,
            routed: all.filter(|&layer| !dense(layer)).collect(),
            arrangement,
            registry,
            dispatch,
            voices: Mutex::new(voices),
        })))
    }

    /// How the ranks are arranged.
    pub(crate) fn arrangement(&self) -> &Arrangement {
        &self.0.arrangement
    }

    /// The names of the parameters.
    pub(crate) fn registry(&self) -> &Registry {
        &self.0.registry
    }

    /// The name of a parameter that this rank updates; `None` for others.
    pub(crate) fn updates(&self, id: ParamId) -> Option<&str> {
        let owns = self.voices().copies.owns(id);
        self.registry().path(id).filter(|_| owns)
    }

    pub(crate) fn voices(&self) -> MutexGuard<'_, Voices> {
        let voices = self.0.voices.lock();
        voices.unwrap_or_else(PoisonError::into_inner)
    }

    /// Which of the pipelines this rank is in, by the micro-batches that they take.
    pub(crate) fn pipeline(&self) -> usize {
        let mesh = self.arrangement().mesh;
        let place = mesh.place(self.0.rank);
        place.data * mesh.expert + place.expert
    }

    /// Its experts of every layer.
    pub(crate) fn experts(&self) -> Range<usize> {
        let Arrangement { mesh, shape, .. } = self.arrangement();
        let each = shape.n_routed_experts / mesh.expert;
        let first = mesh.place(self.0.rank).expert * each;
        first..first + each
    }

    /// All micro-batches of a step: gradients summed over those who have copies of a parameter, and what is reported.
    fn train(
        &self,
        part: &Part,
        batch: &Batch,
        weights: LossWeights,
    ) -> Result<(GradientsParams, StepReport, Vec<Vec<u64>>), CommError> {
        let arrangement = self.arrangement();
        let micro_batches = batch.parts(arrangement.sequences);
        let windows: Vec<_> = micro_batches
            .map(|batch| batch.on(&part.device()))
            .collect();
        let voices = self.voices();
        let executed = self.share(part, &voices, weights).train(&windows);
        let Executed {
            gradients,
            losses,
            loads,
            order: _,
        } = self.checked(executed)?;
        let gradients = voices.copies.reduce(part, gradients)?;

        let experts = arrangement.shape.n_routed_experts;
        let counts = self.0.routed.iter().map(|layer| match loads.get(layer) {
            Some(load) => load.to_data().iter::<i64>().map(|n| n as u64).collect(),
            None => vec![0; experts],
        });
        let mut loads: Vec<Vec<u64>> = counts.collect();
        sum_loads(voices.world.as_ref(), &mut loads)?;

        let first = self.pipeline() * windows.len();
        let all = self.losses(
            voices.world.as_ref(),
            first,
            losses,
            arrangement.micro_batches,
        )?;
        let report = self.report(&all, batch.predicted() / windows.len() as u64, weights);
        Ok((gradients, report, loads))
    }

    /// What came of a pass, if tokens have reached their experts.
    fn checked<T>(&self, passed: Result<T, CommError>) -> Result<T, CommError> {
        match &self.0.dispatch {
            Some(dispatch) => dispatch.check().and(passed),
            None => passed,
        }
    }

    fn share<'a>(&'a self, part: &'a Part, voices: &'a Voices, weights: LossWeights) -> Share<'a> {
        let arrangement = self.arrangement();
        Share {
            timeline: &arrangement.timeline,
            layout: &arrangement.layout,
            ranks: voices.pipeline.as_ref(),
            part,
            terms: Terms {
                weights,
                micro_batches: arrangement.micro_batches,
                recompute: arrangement.recompute,
                overlap: arrangement.overlap && self.0.dispatch.is_some(),
            },
        }
    }

    /// The losses of `count` micro-batches, of which this rank knows some from number `first` on: main, balance, and of
    /// each MTP depth.
    fn losses(
        &self,
        ranks: &dyn Communicator,
        first: usize,
        mine: Vec<MicroLosses>,
        count: usize,
    ) -> Result<Vec<Vec<f64>>, CommError> {
        let width = 2 + self.arrangement().shape.num_nextn_predict_layers;
        let mut numbers = vec![0f64; count * width];
        for (slots, losses) in numbers.chunks_mut(width).skip(first).zip(mine) {
            let number = |tensor: burn::tensor::Tensor<1>| tensor.into_scalar::<f64>();
            if let Some(main) = losses.main {
                slots[0] = number(main);
            }
            slots[1] = losses.balance.into_iter().map(number).sum();
            for (slot, loss) in slots[2..].iter_mut().zip(losses.mtp) {
                *slot = number(loss);
            }
        }
        // Each is known to one rank but for the balance loss, to which every stage adds; the others give zeros.
        ranks.all_reduce(Values::F64(&mut numbers), Reduction::Sum)?;
        Ok(numbers.chunks(width).map(<[f64]>::to_vec).collect())
    }

    fn report(&self, all: &[Vec<f64>], predicted_tokens: u64, weights: LossWeights) -> StepReport {
        let reports = all.iter().map(|losses| {
            let mtp = losses[2..].to_vec();
            let lambda = weights.mtp / mtp.len().max(1) as f64;
            let loss = losses[0] + lambda * mtp.iter().sum::<f64>() + weights.balance * losses[1];
            StepReport {
                predicted_tokens,
                // As far as the numbers reach that it is computed in.
                loss: f64::from(loss as f32),
                main: losses[0],
                mtp,
                balance: losses[1],
                ..StepReport::default()
            }
        });
        StepReport::mean(&reports.collect::<Vec<_>>())
    }

    /// Every pipeline takes as many windows of the batch as the others; what is left over, all of them do.
    fn evaluate(
        &self,
        part: &Part,
        batch: &Batch,
        weights: LossWeights,
    ) -> Result<StepReport, CommError> {
        let pipelines = self.arrangement().mesh.pipelines();
        let (own, voices) = (self.pipeline(), self.voices());
        let each = batch.windows.len() / pipelines;
        let mut reports = Vec::new();
        let mut evaluate = |batch: Batch, ranks: &dyn Communicator, first, count| {
            let windows = batch.on(&part.device());
            let losses = self.share(part, &voices, weights).evaluate(&windows);
            let losses = self.checked(losses)?;
            let all = self.losses(ranks, first, vec![losses], count)?;
            reports.push(self.report(&all, batch.predicted(), weights));
            Ok::<_, CommError>(())
        };
        if each > 0 {
            let share = batch.part(own * each..(own + 1) * each);
            evaluate(share, voices.world.as_ref(), own, pipelines)?;
        }
        let left = batch.part(each * pipelines..batch.windows.len());
        for left in left.parts(self.arrangement().sequences) {
            evaluate(left, voices.pipeline.as_ref(), 0, 1)?;
        }
        Ok(StepReport::mean(&reports))
    }

    /// The names, over all ranks, of parameters whose gradients are not finite.
    fn not_finite(
        &self,
        part: &Part,
        gradients: &GradientsParams,
    ) -> Result<Vec<String>, CommError> {
        let registry = self.registry();
        let names = step::not_finite(part, gradients);
        let names: Vec<&str> = names.iter().filter_map(|&id| registry.path(id)).collect();
        let all = self
            .voices()
            .world
            .all_gather(names.join("\n").as_bytes())?;
        let mut all: Vec<String> = all
            .iter()
            .flat_map(|names| {
                let names = String::from_utf8_lossy(names).into_owned();
                names.lines().map(str::to_owned).collect::<Vec<_>>()
            })
            .collect();
        all.sort();
        all.dedup();
        Ok(all)
    }
}

impl RankTrainee {
    /// A part of a model, the rank that it is on, and the exchange with the training loop.
    pub fn new(part: Part, rank: Rank, exchange: Exchange) -> Self {
        Self {
            part,
            rank,
            exchange,
        }
    }

    fn update(
        &mut self,
        optimizer: &mut ModuleOptimizer,
        rate: ModuleLearningRate,
        gradients: GradientsParams,
    ) -> Result<(), CommError> {
        let (rule, loads) = (self.exchange.settings().rule, self.exchange.loads());
        let rank = self.rank.clone();
        let norm = {
            let voices = rank.voices();
            let (world, registry) = (voices.world.as_ref(), rank.registry());
            let copies = &voices.copies;
            copies.global_norm(world, (&self.part, registry), &gradients)?
        };
        let mut not_finite = Vec::new();
        if !norm.is_finite() {
            not_finite = rank.not_finite(&self.part, &gradients)?;
        } else if !self.exchange.is_left_out() {
            let gradients = step::clipped(&self.part, gradients, norm, rule);
            // What this rank owns, and then what others do.
            let part = optimizer.step(rate, self.part.clone(), gradients);
            let mut part = rank.voices().copies.share(part)?;
            let routed = &rank.0.routed;
            let routers = part.routers_mut(rank.arrangement().shape.num_hidden_layers);
            let routers = routers.filter_map(|(layer, router)| {
                let at = routed.binary_search(&layer).ok()?;
                Some((router, loads.get(at)?))
            });
            step::move_biases(routers, rule.gamma);
            self.part = part;
        }
        self.exchange.end(norm, not_finite, optimizer);
        Ok(())
    }
}

// Burn's steps cannot fail: what keeps the ranks from a step is left in the exchange, where the loop finds it.
impl TrainStep for RankTrainee {
    type Input = Batch;
    type Output = StepReport;

    fn step(&self, batch: Batch) -> TrainOutput<StepReport> {
        let weights = self.exchange.settings().weights;
        let (grads, item) = match self.rank.train(&self.part, &batch, weights) {
            Ok((gradients, report, loads)) => {
                self.exchange.add_loads(&loads);
                (gradients, report)
            }
            Err(error) => {
                self.exchange.fail(error.into());
                (GradientsParams::new(), StepReport::default())
            }
        };
        TrainOutput { grads, item }
    }

    fn optimize(
        mut self,
        optimizer: &mut ModuleOptimizer,
        rate: ModuleLearningRate,
        gradients: GradientsParams,
    ) -> Self {
        if let Err(error) = self.update(optimizer, rate, gradients) {
            self.exchange.fail(error.into());
        }
        self
    }
}

impl InferenceStep for RankTrainee {
    type Input = Batch;
    type Output = StepReport;

    fn step(&self, batch: Batch) -> StepReport {
        let weights = self.exchange.settings().weights;
        let report = self.rank.evaluate(&self.part, &batch, weights);
        report.unwrap_or_else(|error| {
            self.exchange.fail(error.into());
            StepReport::default()
        })
    }
}

impl Trained for RankTrainee {
    type Weights = Part;

    fn exchange(&self) -> &Exchange {
        &self.exchange
    }

    fn weights(&self) -> &Part {
        &self.part
    }

    fn agree_to_stop(&self, asked: bool) -> Result<bool, TrainError> {
        let mut asked = [u64::from(asked)];
        let voices = self.rank.voices();
        voices
            .world
            .all_reduce(Values::U64(&mut asked), Reduction::Max)?;
        Ok(asked[0] > 0)
    }

    fn save(
        &self,
        checkpoints: &Checkpoints,
        contents: Contents<'_>,
        average: Option<&Part>,
        record: OptimizerRecord,
    ) -> Result<PathBuf, TrainError> {
        let weights = (&self.part, average);
        shards::write(checkpoints, weights, &self.rank, contents, record)
    }
}
