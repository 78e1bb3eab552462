//! A run of several ranks: that they agree on what to do, what each of them does, and how it ends when one cannot go on.

use std::{collections::BTreeMap, sync::Arc, thread, time::Duration};

use burn::{data::dataloader::DataLoader, module::Module, tensor::Device, train::Interrupter};
use deepburn_model::{
    checkpoint::{self, hf_config},
    config::ModelConfig,
    moe::TokenDispatcher,
    parameters::Registry,
    transformer::Transformer,
};
use sha2::{Digest, Sha256};

use crate::{
    average::{Average, with_values},
    config::TrainConfig,
    data::Prepared,
    learner::Exchange,
    parallel::{
        Communicator, ExpertDispatch, ExpertPlacement, Group, Local, LocalOptions, Wire, local,
    },
    pipeline::{
        layout::{Layout, Piece},
        schedule::Schedule,
        stage::Part,
        trainee::{Arrangement, Rank, RankTrainee},
    },
    run::{self, Beginning, RunOptions, RunSummary, TrainError},
    shards, state,
    strategy::{Plan, Run, Training},
};

/// What every rank is given.
pub(crate) struct Job<'a> {
    config: &'a TrainConfig,
    shape: &'a ModelConfig,
    data: &'a Prepared,
    device: Device,
    resume: bool,
    interrupter: Interrupter,
}

impl<'a> Job<'a> {
    /// A job with what is checked.
    pub(crate) fn of(
        config: &'a TrainConfig,
        shape: &'a ModelConfig,
        data: &'a Prepared,
        options: &RunOptions,
    ) -> Self {
        Self {
            config,
            shape,
            data,
            device: options.device.clone(),
            resume: options.resume,
            interrupter: options.interrupter.clone(),
        }
    }

    /// Trains with the ranks as threads of this process, of which this one is the first.
    pub(crate) fn on_threads(&self, options: RunOptions) -> Result<RunSummary, TrainError> {
        let local = LocalOptions {
            deadline: Duration::from_secs(self.config.parallel.deadline),
            link: None,
        };
        let nodes = vec![0; self.config.parallel.mesh().ranks()];
        together(local::world(&nodes, local), self, options)
    }

    /// Trains as the rank of `world` that this process is. The first one shows and logs what happens.
    pub(crate) fn as_rank(
        &self,
        world: Arc<dyn Communicator>,
        options: RunOptions,
    ) -> Result<RunSummary, TrainError> {
        let leads = world.rank() == 0;
        take_part(world, self, leads.then_some(options))
    }
}

fn together(
    world: Vec<Local>,
    job: &Job<'_>,
    options: RunOptions,
) -> Result<RunSummary, TrainError> {
    let mut ranks = world.into_iter();
    let first = ranks.next().expect("a mesh has a rank");
    thread::scope(|scope| {
        let others: Vec<_> = ranks
            .map(|rank| scope.spawn(move || take_part(Arc::new(rank), job, None)))
            .collect();
        let mut results = vec![take_part(Arc::new(first), job, Some(options))];
        results.extend(others.into_iter().enumerate().map(|(number, other)| {
            other.join().unwrap_or_else(|panic| {
                let said = panic.downcast_ref::<&str>().map(ToString::to_string);
                let said = said.or_else(|| panic.downcast_ref::<String>().cloned());
                Err(TrainError::Rank {
                    rank: number + 1,
                    what: said.unwrap_or_else(|| "panicked".into()),
                })
            })
        }));
        let met =
            |result: &Result<_, TrainError>| matches!(result, Err(error) if !error.is_heard());
        let cause = results.iter().position(met).unwrap_or(0);
        match results.swap_remove(cause) {
            Err(error) if cause > 0 && !matches!(error, TrainError::Rank { .. }) => {
                Err(TrainError::Rank {
                    rank: cause,
                    what: error.to_string(),
                })
            }
            result => result,
        }
    })
}

/// What one rank does. The first one is given the `options` and shows and logs what happens.
fn take_part(
    world: Arc<dyn Communicator>,
    job: &Job<'_>,
    options: Option<RunOptions>,
) -> Result<RunSummary, TrainError> {
    let result = enter(world.as_ref(), job).and_then(|(beginning, arrangement)| {
        let (rank, training) = set_up(world.clone(), arrangement, job, &beginning)?;
        train(&rank, training, job, beginning, options)
    });
    if let Err(error) = &result {
        world.abort(&error.to_string());
    }
    result
}

/// Makes sure that all ranks have the same before them.
fn enter(world: &dyn Communicator, job: &Job<'_>) -> Result<(Beginning, Arrangement), TrainError> {
    let arrangement = arrange(job)?;
    let beginning = Beginning::find(job.config, job.data, job.resume)?;
    let mesh = arrangement.mesh.checked(world.size());
    mesh.map_err(|refused| TrainError::Ranks(refused.to_string()))?;
    agree(world, &facts(job, &beginning))?;
    Ok((beginning, arrangement))
}

/// How the ranks of a configuration are arranged.
///
/// # Errors
/// A schedule or a cut that the model cannot be trained by.
fn arrange(job: &Job<'_>) -> Result<Arrangement, TrainError> {
    let parallel = &job.config.parallel;
    let refused =
        |refused: crate::pipeline::schedule::Refused| TrainError::Ranks(refused.to_string());
    let schedule = Schedule::from(parallel.schedule);
    let timeline = schedule
        .timeline(parallel.pipeline, job.config.micro_batches_per_pipeline())
        .map_err(refused)?;
    timeline
        .validate()
        .map_err(|violation| TrainError::Ranks(violation.to_string()))?;
    // On several nodes, whose they are decides too.
    let one_node = vec![0; parallel.expert];
    ExpertPlacement::new(job.shape.n_routed_experts, job.shape.n_group, &one_node)
        .map_err(|refused| TrainError::Ranks(refused.to_string()))?;
    let layers = parallel.layers.as_deref();
    let layout = Layout::new(timeline.placement, job.shape, layers).map_err(refused)?;
    Ok(Arrangement {
        mesh: parallel.mesh(),
        layout,
        timeline,
        shape: job.shape.clone(),
        sequences: job.config.batch.sequences,
        micro_batches: job.config.batch.accumulation,
        recompute: parallel.recompute,
        overlap: parallel.overlap,
    })
}

/// What has to be the same on all ranks, by name.
fn facts(job: &Job<'_>, beginning: &Beginning) -> BTreeMap<String, String> {
    let mut facts = BTreeMap::from([
        (
            "the version of deepburn".to_owned(),
            env!("CARGO_PKG_VERSION").to_owned(),
        ),
        (
            "the model's shape".to_owned(),
            hf_config::render(job.shape, checkpoint::StoredType::F32),
        ),
        (
            "the tokenizer".to_owned(),
            job.data.report.tokenizer_sha256.clone(),
        ),
        (
            "the number of training tokens".to_owned(),
            job.data.report.train.tokens.to_string(),
        ),
        (
            "the step to begin with".to_owned(),
            beginning.done().to_string(),
        ),
    ]);
    let config = toml::Table::try_from(job.config).expect("read from such a file");
    for (section, value) in config {
        facts.insert(format!("[{section}]"), value.to_string());
    }
    facts
}

/// Compares what ranks hold to be true.
fn agree(world: &dyn Communicator, facts: &BTreeMap<String, String>) -> Result<(), TrainError> {
    let digests: BTreeMap<&String, Vec<u8>> = facts
        .iter()
        .map(|(name, value)| (name, Sha256::digest(value.as_bytes()).to_vec()))
        .collect();
    let mine = serde_json::to_vec(&digests).expect("names and bytes");
    let mut all: Vec<BTreeMap<String, Vec<u8>>> = Vec::new();
    for said in world.all_gather(&mine)? {
        all.push(serde_json::from_slice(&said).unwrap_or_default());
    }
    let expected = &all[0];
    for (rank, said) in all.iter().enumerate() {
        let names = expected.keys().chain(said.keys());
        let differ = names.filter(|name| expected.get(*name) != said.get(*name));
        let mut differ: Vec<String> = differ.cloned().collect();
        differ.sort();
        differ.dedup();
        if !differ.is_empty() {
            let what = differ.join(", ");
            return Err(TrainError::Differs { rank, what });
        }
    }
    Ok(())
}

/// A rank's part of the model, at the start or as it was saved, what trains it, and the average of its weights.
fn set_up(
    world: Arc<dyn Communicator>,
    arrangement: Arrangement,
    job: &Job<'_>,
    beginning: &Beginning,
) -> Result<(Rank, Training<RankTrainee>), TrainError> {
    let Job {
        config,
        shape,
        device,
        ..
    } = job;
    let layout = arrangement.layout.clone();
    let place = arrangement.mesh.place(world.rank()).pipeline;
    let holds = |path: &str| layout.holds(place, Piece::of(path));
    let whole = match beginning.checkpoint() {
        None => Transformer::new(shape, config.run.seed, device),
        Some(path) => {
            let (saved, model) = checkpoint::load_parts(path, device, &holds)?;
            beginning.check_shape(&saved, shape)?;
            model
        }
    };
    let registry = Registry::of(&whole);
    let dispatch = expert_dispatch(world.as_ref(), &arrangement, config.precision.wire())?;
    let cut = |whole: Transformer| {
        let part = Part::cut(whole.with_arithmetic(config.arithmetic()), &layout, place);
        match &dispatch {
            Some(dispatch) => {
                let dispatcher: Arc<dyn TokenDispatcher> = Arc::new(dispatch.clone());
                part.with_experts(&dispatch.own(), &dispatcher)
            }
            None => part,
        }
    };
    let part = cut(whole);
    let average = match (config.ema, beginning.checkpoint()) {
        (None, _) => None,
        (Some(ema), None) => Some(Average::new(part.clone(), ema.decay)),
        (Some(ema), Some(path)) => {
            let path = path.join(state::AVERAGE);
            let (_, saved) = checkpoint::load_parts(&path, &Device::flex(), &holds)?;
            let saved = with_values(part.clone(), &cut(saved));
            Some(Average::new(saved, ema.decay))
        }
    };
    let part = part.train();
    let rank = Rank::new(world, arrangement, (&part, registry), dispatch)?;
    let record = beginning.checkpoint().map(|path| {
        let name = |id: u64| rank.updates(id.into()).map(str::to_owned);
        shards::read_moments(path, &name, rank.experts())
    });
    let done = beginning.done();
    let exchange = Exchange::new(run::settings(config, done));
    let trainee = RankTrainee::new(part, rank.clone(), exchange);
    let learner = run::learner(trainee, config, done, record.transpose()?);
    Ok((rank, Training { learner, average }))
}

/// What brings tokens to the experts of a layer where these are divided among ranks.
fn expert_dispatch(
    world: &dyn Communicator,
    arrangement: &Arrangement,
    wire: Wire,
) -> Result<Option<ExpertDispatch>, TrainError> {
    let Arrangement { mesh, shape, .. } = arrangement;
    if mesh.expert == 1 {
        return Ok(None);
    }
    let ranks = mesh.split(world, Group::Expert)?;
    let placement = ExpertPlacement::new(shape.n_routed_experts, shape.n_group, ranks.nodes());
    let placement = placement.map_err(|refused| TrainError::Ranks(refused.to_string()))?;
    Ok(Some(ExpertDispatch::new(ranks.as_ref(), placement, wire)?))
}

fn train(
    rank: &Rank,
    mut training: Training<RankTrainee>,
    job: &Job<'_>,
    beginning: Beginning,
    options: Option<RunOptions>,
) -> Result<RunSummary, TrainError> {
    let (config, device) = (job.config, &job.device);
    let done = beginning.done();
    let (train, valid) = run::loaders(config, job.data, done)?;
    let pipelines = rank.arrangement().mesh.pipelines();
    let train = train.grouped(config.batch.accumulation, rank.pipeline(), pipelines);
    // They divide batches of as many windows as each can take.
    let valid = valid.grouped(pipelines, 0, 1);
    let plan = Plan {
        config: config.clone(),
        shape: job.shape.clone(),
        data: job.data.clone(),
        batches: 1,
        alone_on: None,
        done,
        history: beginning.history(),
        outcome: run::outcome(done),
    };
    if let Some(options) = options {
        return run::lead(plan, training, (train, valid), options);
    }
    training.learner.fork(&device.clone().autodiff());
    let mut steps = Run {
        plan: &plan,
        interrupter: job.interrupter.clone(),
        events: None,
        learner: training.learner,
        valid: Arc::new(valid),
        history: plan.history.clone(),
        average: training.average,
    };
    steps.steps(train.iter())?;
    Ok(run::summary(&plan))
}

#[cfg(test)]
mod tests;
