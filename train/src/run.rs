//! A training run from its configuration to its last checkpoint.

use std::{
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};

use burn::{
    data::dataset::DatasetError,
    module::Module,
    optim::OptimizerRecord,
    tensor::Device,
    train::{
        EventProcessorError, Interrupter, Learner, LearnerModel, SupervisedTraining,
        TrainingStrategy, logger::InMemoryMetricLogger, renderer::MetricsRenderer,
    },
};
use deepburn_kernels::fp8::ablation;
use deepburn_model::{
    checkpoint::{self, CheckpointError},
    config::{ConfigError as ShapeError, ModelConfig},
    parameters::Registry,
    transformer::Transformer,
};

use crate::{
    average::Average,
    cluster::Job,
    config::TrainConfig,
    data::{DataError, PackedDataset, Prepared},
    learner::{Exchange, StepSettings, Trainee},
    loader::WindowLoader,
    optimizer::{ReportSchedule, adamw},
    parallel::{CommError, Communicator, DataParallelError},
    report::{Measure, StepReport},
    shards,
    state::{self, Checkpoints, History, RunState, StateError},
    step::{LossWeights, UpdateRule},
    strategy::{Outcome, Plan, StepByStep, Trained, Training},
};

/// Why a run ended early.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// Data cannot be read.
    #[error(transparent)]
    Data(#[from] DataError),
    /// Data cannot be read, as Burn passes it on.
    #[error(transparent)]
    Dataset(#[from] DatasetError),
    /// The model's shape cannot be read, or a file cannot be written.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The shape does not fit the tokenizer.
    #[error("the model's shape with this tokenizer: {0}")]
    Shape(#[from] ShapeError),
    /// A checkpoint cannot be written or resumed from.
    #[error(transparent)]
    State(#[from] StateError),
    /// A metric cannot be computed.
    #[error(transparent)]
    Metrics(#[from] EventProcessorError),
    /// What Burn's training loop reports.
    #[error("{0}")]
    Burn(String),
    /// A sequence longer than the model can take.
    #[error("batch.sequence_length = {length}: must be at most max_position_embeddings = {limit}")]
    TooLong {
        /// Asked for.
        length: usize,
        /// The model's.
        limit: usize,
    },
    /// Multi-token prediction further than a sequence reaches.
    #[error("batch.sequence_length = {length}: must be above num_nextn_predict_layers = {depth}")]
    TooShort {
        /// Asked for.
        length: usize,
        /// The model's.
        depth: usize,
    },
    /// A new run where there is one.
    #[error(
        "{path}: there are checkpoints of an earlier run; resume it, or choose another run.directory"
    )]
    Exists {
        /// The run's folder.
        path: PathBuf,
    },
    /// An experiment that this device does not compute.
    #[error("ablation.fp8: is computed on the CPU alone, the device is {device}")]
    AblationDevice {
        /// The device.
        device: String,
    },
    /// The loss is NaN or infinite: the step is not taken.
    #[error("step {step}: the loss is {loss}; training stopped before the optimizer step")]
    NotFinite {
        /// The step.
        step: u64,
        /// Its loss.
        loss: f64,
    },
    /// Gradients are NaN or infinite: the step is not taken.
    #[error(
        "step {step}: the gradients of {} are not finite; training stopped before the optimizer step (optimizer.non_finite = \
         \"skip\" leaves such steps out)", tensors.join(", ")
    )]
    NonFiniteGradients {
        /// The step.
        step: u64,
        /// The parameters, by their names in the model.
        tensors: Vec<String>,
    },
    /// Batches ended before the steps.
    #[error("step {step}: the data ended")]
    DataEnded {
        /// The step.
        step: u64,
    },
    /// Ranks cannot talk to each other any more.
    #[error(transparent)]
    Communication(#[from] CommError),
    /// What ended the run on another rank.
    #[error("rank {rank}: {what}")]
    Rank {
        /// Which.
        rank: usize,
        /// What it says.
        what: String,
    },
    /// Ranks that were not started in the same way.
    #[error("rank {rank} differs from rank 0 in {what}")]
    Differs {
        /// Which.
        rank: usize,
        /// The parts of the configuration, or what else it is.
        what: String,
    },
    /// Ranks that hold other parameters than they have to.
    #[error(transparent)]
    Parameters(DataParallelError),
    /// `[parallel]` does not fit the model or the number of ranks.
    #[error("[parallel] {0}")]
    Ranks(String),
    /// A checkpoint was due and the optimizer's state was not recorded.
    #[error("step {step}: the optimizer's state was not recorded")]
    NoSnapshot {
        /// The step.
        step: u64,
    },
}

impl TrainError {
    /// Whether it is what another rank has met.
    pub fn is_heard(&self) -> bool {
        use CommError::{Aborted, Gone};
        matches!(self, Self::Communication(Aborted { .. } | Gone { .. }))
    }

    /// Whether all ranks see it.
    pub fn is_seen_by_all(&self) -> bool {
        matches!(self, Self::Differs { .. } | Self::Ranks(_))
    }
}

impl From<DataParallelError> for TrainError {
    fn from(error: DataParallelError) -> Self {
        match error {
            DataParallelError::Communication(error) => error.into(),
            other => Self::Parameters(other),
        }
    }
}

/// What a run is given besides its configuration.
pub struct RunOptions {
    /// Where to compute, without autodiff.
    pub device: Device,
    /// Whether to go on from the newest checkpoint.
    pub resume: bool,
    /// What shows progress; `None` for Burn's own.
    pub renderer: Option<Box<dyn MetricsRenderer>>,
    /// How the run is asked to stop after the step under way.
    pub interrupter: Interrupter,
}

/// What came of a run.
#[derive(Clone, Debug)]
pub struct RunSummary {
    /// Steps done, those before resuming included.
    pub steps: u64,
    /// Whether the run was asked to stop before its last step.
    pub interrupted: bool,
    /// The last validation.
    pub validation: Option<StepReport>,
    /// The newest checkpoint.
    pub checkpoint: Option<PathBuf>,
}

/// Trains on prepared data.
///
/// # Errors
/// Anything that keeps the run from its last step, except being asked to stop. What was saved stays.
pub fn run(
    config: &TrainConfig,
    data: Prepared,
    options: RunOptions,
) -> Result<RunSummary, TrainError> {
    let shape = checked_shape(config, &data, &options.device)?;
    if config.parallel.mesh().ranks() > 1 {
        return Job::of(config, &shape, &data, &options).on_threads(options);
    }
    let beginning = Beginning::find(config, &data, options.resume)?;
    let (model, record) = match beginning.checkpoint() {
        None => {
            let model = Transformer::new(&shape, config.run.seed, &options.device);
            (model, None)
        }
        Some(path) => {
            let (saved, model) = checkpoint::load(path, &options.device)?;
            beginning.check_shape(&saved, &shape)?;
            let registry = Registry::of(&model);
            let name = |id: u64| registry.path(id.into()).map(str::to_owned);
            let record = shards::read_moments(path, &name, 0..shape.n_routed_experts)?;
            (model, Some(record))
        }
    };
    let average = match (config.ema, beginning.checkpoint()) {
        (None, _) => None,
        (Some(ema), None) => Some(Average::new(model.clone(), ema.decay)),
        (Some(ema), Some(path)) => {
            let (_, model) = checkpoint::load(&path.join(state::AVERAGE), &Device::flex())?;
            Some(Average::new(model, ema.decay))
        }
    };
    let done = beginning.done();
    let exchange = Exchange::new(settings(config, done));
    let model = model.with_arithmetic(config.arithmetic());
    let learner = learner(Trainee::new(model, exchange).train(), config, done, record);
    let loaders = loaders(config, &data, done)?;
    let plan = Plan {
        config: config.clone(),
        shape,
        data,
        batches: config.batch.accumulation,
        alone_on: Some(options.device.clone()),
        done,
        history: beginning.history(),
        outcome: outcome(done),
    };
    lead(plan, Training { learner, average }, loaders, options)
}

/// Trains as the rank of `world` that this process is. The first one shows and logs what happens.
///
/// # Errors
/// As [`run`]; on all ranks, if on one. Ranks that were not started in the same way.
pub fn run_as_rank(
    world: Arc<dyn Communicator>,
    config: &TrainConfig,
    data: Prepared,
    options: RunOptions,
) -> Result<RunSummary, TrainError> {
    let shape = checked_shape(config, &data, &options.device)?;
    Job::of(config, &shape, &data, &options).as_rank(world, options)
}

fn checked_shape(
    config: &TrainConfig,
    data: &Prepared,
    device: &Device,
) -> Result<ModelConfig, TrainError> {
    if config.ablation.fp8.is_some() && !ablation::is_supported(device) {
        let device = format!("{device:?}");
        return Err(TrainError::AblationDevice { device });
    }
    shape_for(config, data)
}

/// Where a run begins.
pub(crate) struct Beginning(Option<(PathBuf, RunState)>);

impl Beginning {
    /// At the start, or where the newest checkpoint was written.
    pub(crate) fn find(
        config: &TrainConfig,
        data: &Prepared,
        resume: bool,
    ) -> Result<Self, TrainError> {
        let path = config.run.directory.clone();
        let checkpoints = Checkpoints::new(&path, config.checkpoint.keep);
        match (resume, checkpoints.latest()) {
            (false, Some(_)) => Err(TrainError::Exists { path }),
            (false, None) => Ok(Self(None)),
            (true, None) => Err(StateError::None { path }.into()),
            (true, Some(path)) => {
                let state = state::read(&path)?;
                state::check_unchanged(&path, &state, &RunState::new(state.step, config, data))?;
                Ok(Self(Some((path, state))))
            }
        }
    }

    /// What to go on from.
    pub(crate) fn checkpoint(&self) -> Option<&Path> {
        self.0.as_ref().map(|(path, _)| path.as_path())
    }

    /// Steps done before.
    pub(crate) fn done(&self) -> u64 {
        self.0.as_ref().map_or(0, |(_, state)| state.step)
    }

    /// What happened in them.
    pub(crate) fn history(&self) -> History {
        let state = self.0.as_ref().map(|(_, state)| state);
        state.map_or_else(History::default, |state| state.history.clone())
    }

    /// Refuses a checkpoint of another model.
    pub(crate) fn check_shape(
        &self,
        saved: &ModelConfig,
        expected: &ModelConfig,
    ) -> Result<(), StateError> {
        match &self.0 {
            Some((path, _)) if saved != expected => Err(StateError::State {
                path: path.clone(),
                what: "config.json differs from model.config with this tokenizer".into(),
            }),
            _ => Ok(()),
        }
    }
}

/// A learner that goes on after `done` steps with the moments of `record`.
pub(crate) fn learner<M: LearnerModel>(
    trainee: M,
    config: &TrainConfig,
    done: u64,
    record: Option<OptimizerRecord>,
) -> Learner<M> {
    let rate = ReportSchedule::new(config.schedule.clone(), config.run.steps, done);
    let mut learner = Learner::new(trainee, adamw(&config.optimizer, config.precision), rate);
    if let Some(record) = record {
        learner.load_optim(record);
    }
    learner
}

/// An outcome to begin with.
pub(crate) fn outcome(done: u64) -> Arc<Mutex<Outcome>> {
    Arc::new(Mutex::new(Outcome {
        steps: done,
        ..Outcome::default()
    }))
}

/// Trains in sight of the user.
pub(crate) fn lead<M: Trained>(
    plan: Plan,
    training: Training<M>,
    (train, valid): (WindowLoader, WindowLoader),
    options: RunOptions,
) -> Result<RunSummary, TrainError> {
    let plan = Arc::new(plan);
    let config = &plan.config;
    let folder = &config.run.directory;
    std::fs::create_dir_all(folder).map_err(|source| CheckpointError::Io {
        path: folder.clone(),
        source,
    })?;
    let strategy = StepByStep {
        plan: plan.clone(),
        device: options.device.clone().autodiff(),
        average: Mutex::new(training.average),
    };
    let stretches = config.run.steps.div_ceil(config.validation.interval) as usize;
    let mut burn = SupervisedTraining::new(folder, Arc::new(train), Arc::new(valid))
        .with_training_strategy(TrainingStrategy::Custom(Arc::new(strategy)))
        .with_metric_logger(InMemoryMetricLogger::new())
        .with_application_logger(None)
        .with_interrupter(options.interrupter)
        .num_epochs(stretches)
        // Where the display goes on; without checkpointers Burn loads nothing.
        .checkpoint((plan.done / config.validation.interval) as usize);
    for measure in Measure::of_training() {
        burn = burn.metric_train_numeric(measure);
    }
    for measure in Measure::of_validation() {
        burn = burn.metric_valid_numeric(measure);
    }
    if let Some(renderer) = options.renderer {
        burn = burn.renderer(renderer);
    }
    let result = burn.launch(training.learner);
    if let Some(error) = plan.outcome().error.take() {
        return Err(error);
    }
    if let Some(error) = result.error {
        return Err(TrainError::Burn(error.to_string()));
    }
    Ok(summary(&plan))
}

/// What came of a run that has ended well.
pub(crate) fn summary(plan: &Plan) -> RunSummary {
    let mut outcome = plan.outcome();
    RunSummary {
        steps: outcome.steps,
        interrupted: outcome.steps < plan.config.run.steps,
        validation: outcome.validation.take(),
        checkpoint: outcome.checkpoint.take(),
    }
}

/// The model's shape with vocabulary and special tokens of the tokenizer.
pub(crate) fn shape_for(config: &TrainConfig, data: &Prepared) -> Result<ModelConfig, TrainError> {
    let shape = ModelConfig {
        vocab_size: data.vocab_size,
        bos_token_id: data.bos_id,
        eos_token_id: Some(data.eos_id),
        ..checkpoint::read_config(&config.model.config)?
    }
    .validate()?;
    let length = config.batch.sequence_length;
    if length > shape.max_position_embeddings {
        return Err(TrainError::TooLong {
            length,
            limit: shape.max_position_embeddings,
        });
    }
    if length <= shape.num_nextn_predict_layers {
        return Err(TrainError::TooShort {
            length,
            depth: shape.num_nextn_predict_layers,
        });
    }
    Ok(shape)
}

/// What holds for step `step` (from 0).
pub(crate) fn settings(config: &TrainConfig, step: u64) -> StepSettings {
    let steps = config.run.steps;
    StepSettings {
        weights: LossWeights {
            mtp: config.loss.mtp_weight.at(step, steps),
            balance: config.loss.sequence_balance_loss_weight,
            reading: config.loss.balance_reading.into(),
        },
        rule: UpdateRule {
            clip_norm: config.optimizer.clip_norm,
            gamma: config.loss.bias_update_speed.at(step, steps) as f32,
        },
        accumulation: config.batch.accumulation,
        snapshot: false,
    }
}

/// Batches of the steps that are left, and of validation.
pub(crate) fn loaders(
    config: &TrainConfig,
    data: &Prepared,
    done: u64,
) -> Result<(WindowLoader, WindowLoader), DataError> {
    let batch = &config.batch;
    let document_end = config.data.document_mask.then_some(data.eos_id);
    let train = PackedDataset::new(data.train.clone(), batch.sequence_length, config.run.seed)?;
    let valid = PackedDataset::sequential(data.valid.clone(), batch.sequence_length)?;
    let per_step = (batch.sequences * batch.accumulation) as u64;
    let range = done * per_step..config.run.steps * per_step;
    let valid = WindowLoader::new(Arc::new(valid), batch.sequences, 0..0, document_end);
    Ok((
        WindowLoader::new(Arc::new(train), batch.sequences, range, document_end),
        valid.spread(config.validation.windows),
    ))
}
