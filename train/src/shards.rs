//! Checkpoints that several ranks write: each the parameters and moments that it answers for, all or none.
//!
//! ```text
//! step-00000500/  config.json model-00001-of-00002.safetensors model-00002-of-00002.safetensors
//!                 model.safetensors.index.json tokenizer.json ...
//!                 training/{state.json, config.toml, optimizer-00001-of-00002.bpk, optimizer-00002-of-00002.bpk,
//!                           manifest.json}
//! ```
//!
//! Ranks write into a folder under a temporary name, which the first rank renames when all are done. Nothing in it depends
//! on how the ranks were arranged: parameters and moments are found by name, so that any number of ranks can go on from it.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    ops::Range,
    path::{Path, PathBuf},
};

use burn::optim::OptimizerRecord;
use burn_pack::{Reader, Scalar, Tensor, Writer};
use deepburn_model::checkpoint::{self, Shard, write_file};
use serde::{Deserialize, Serialize};

use crate::{
    parallel::data_parallel::is_routed_expert,
    pipeline::{stage::Part, trainee::Rank},
    run::TrainError,
    state::{AVERAGE, Checkpoints, Contents, OPTIMIZER, StateError, io_error, write_run},
};

const MANIFEST: &str = "training/manifest.json";

/// Which files belong to a checkpoint, and how long they are.
#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct Manifest {
    files: BTreeMap<String, u64>,
}

/// Writes a checkpoint of all ranks, of what each has of the model and of the average of its weights, if one is kept, and
/// returns where it is. Called by all of them.
///
/// # Errors
/// What the file system answers, on any rank; then there is no new checkpoint.
pub(crate) fn write(
    checkpoints: &Checkpoints,
    (part, average): (&Part, Option<&Part>),
    rank: &Rank,
    contents: Contents<'_>,
    record: OptimizerRecord,
) -> Result<PathBuf, TrainError> {
    let voices = rank.voices();
    let world = voices.world.as_ref();
    let answers = |id: u64| {
        let path = rank.registry().path(id.into())?;
        voices.copies.owns(id.into()).then(|| path.to_owned())
    };
    let share = |staging: &Path| -> Result<usize, TrainError> {
        let held = rank
            .registry()
            .held(part)
            .filter(|id| answers(*id).is_some());
        let writes = [u8::from(held.count() > 0)];
        let writers = world.all_gather(&writes)?;
        let count = writers.iter().filter(|writes| writes[0] == 1).count();
        let before = writers[..world.rank()].iter();
        let number = before.filter(|writes| writes[0] == 1).count();
        let written = match writes[0] {
            1 => {
                let mine = Mine {
                    part,
                    average,
                    own: rank.experts(),
                    answers: &answers,
                };
                write_share(staging, [number, count], mine, contents, record)
            }
            _ => Ok(()),
        };
        let said = written.err().map(|error| error.to_string());
        let all = world.all_gather(said.unwrap_or_default().as_bytes())?;
        match all.iter().position(|said| !said.is_empty()) {
            None => Ok(count),
            Some(rank) => Err(TrainError::Rank {
                rank,
                what: String::from_utf8_lossy(&all[rank]).into_owned(),
            }),
        }
    };

    // First the folder, then everybody's share, then whether it is in place.
    if world.rank() > 0 {
        let mut staging = Vec::new();
        world.broadcast(0, &mut staging)?;
        let shared = match staging.is_empty() {
            true => Ok(0),
            false => share(Path::new(&*String::from_utf8_lossy(&staging))),
        };
        if let Err(TrainError::Communication(error)) = shared {
            return Err(error.into());
        }
        let mut outcome = Vec::new();
        world.broadcast(0, &mut outcome)?;
        let said = String::from_utf8_lossy(&outcome[1..]).into_owned();
        return match outcome[0] {
            0 => Ok(said.into()),
            _ => Err(TrainError::Rank {
                rank: 0,
                what: said,
            }),
        };
    }
    let mut started = false;
    let result = checkpoints.commit(contents.state.step, |staging| {
        let training = staging.join("training");
        fs::create_dir(&training).map_err(io_error(&training))?;
        let averages = average.map(|_| staging.join(AVERAGE));
        if let Some(folder) = &averages {
            fs::create_dir(folder).map_err(io_error(folder))?;
        }
        started = true;
        let mut bytes = staging.to_string_lossy().into_owned().into_bytes();
        world.broadcast(0, &mut bytes)?;
        let count = share(staging)?;
        for folder in [staging].into_iter().chain(averages.as_deref()) {
            checkpoint::write_index(folder, contents.shape, count)?;
        }
        write_run(staging, contents)?;
        Ok(write_manifest(staging, count, average.is_some())?)
    });
    if let Err(TrainError::Communication(error)) = result {
        return Err(error.into());
    }
    if !started {
        world.broadcast(0, &mut Vec::new())?;
    }
    let mut outcome = match &result {
        Ok(path) => [&[0], path.to_string_lossy().as_bytes()].concat(),
        Err(error) => [&[1], error.to_string().as_bytes()].concat(),
    };
    world.broadcast(0, &mut outcome)?;
    result
}

/// What a rank writes.
struct Mine<'a> {
    part: &'a Part,
    average: Option<&'a Part>,
    /// Its experts of every layer.
    own: Range<usize>,
    /// The names of the parameters that it answers for.
    answers: &'a Names<'a>,
}

/// This rank's files, written to the disk.
fn write_share(
    staging: &Path,
    [number, count]: [usize; 2],
    mine: Mine<'_>,
    contents: Contents<'_>,
    record: OptimizerRecord,
) -> Result<(), StateError> {
    let Mine {
        part,
        average,
        own,
        answers,
    } = mine;
    let first = |path: &str| match is_routed_expert(path) {
        true => own.start,
        false => 0,
    };
    let shard = Shard {
        number,
        count,
        name: &|id| answers(id.val()).map(|path| (path.clone(), first(&path))),
    };
    checkpoint::save_shard(part, contents.shape, staging, &shard)?;
    if let Some(average) = average {
        checkpoint::save_shard(average, contents.shape, &staging.join(AVERAGE), &shard)?;
    }
    let path = staging.join(moments_name(number, count));
    let wrong = |source| StateError::Optimizer {
        path: path.clone(),
        source,
    };
    let mut pack = Pack::default();
    let bytes = record.into_bytes().map_err(wrong)?;
    let reader = Reader::from_bytes(bytes).map_err(|error| wrong(error.into()))?;
    pack.add(reader, answers)
        .map_err(|error| wrong(error.into()))?;
    let named = std::mem::take(&mut pack.names).into_keys();
    for id in named {
        if let Some(path) = id.parse().ok().and_then(answers) {
            if is_routed_expert(&path) {
                pack.names
                    .insert(format!("{id}{FIRST}"), own.start.to_string());
            }
            pack.names.insert(id, path);
        }
    }
    let written = pack.writer().write_to_file(&path);
    written.map_err(|error| wrong(error.into()))?;
    let synced = File::open(&path).and_then(|file| file.sync_all());
    synced.map_err(io_error(&path))
}

fn moments_name(number: usize, count: usize) -> String {
    format!("training/optimizer-{:05}-of-{count:05}.bpk", number + 1)
}

fn write_manifest(staging: &Path, count: usize, average: bool) -> Result<(), StateError> {
    let weights = (0..count).map(|number| checkpoint::shard_name(number, count));
    let averages = weights.clone().filter(|_| average);
    let averages = averages.map(|name| format!("{AVERAGE}/{name}"));
    let moments = (0..count).map(|number| moments_name(number, count));
    let mut files = BTreeMap::new();
    for name in weights.chain(averages).chain(moments) {
        let path = staging.join(&name);
        let metadata = fs::metadata(&path).map_err(io_error(&path))?;
        files.insert(name, metadata.len());
    }
    let text = serde_json::to_vec_pretty(&Manifest { files }).expect("names and numbers");
    Ok(write_file(&staging.join(MANIFEST), &text)?)
}

/// The moments in a checkpoint of any number of writers, of the parameters that `wanted` knows the names of by their
/// identity; of routed experts those in `own`.
///
/// # Errors
/// Files that are missing, malformed or not of the length that the manifest says.
pub(crate) fn read_moments(
    checkpoint: &Path,
    wanted: &Names<'_>,
    own: Range<usize>,
) -> Result<OptimizerRecord, StateError> {
    let mut pack = Pack::default();
    for path in moments_of(checkpoint)? {
        let wrong = |source| StateError::Optimizer {
            path: path.clone(),
            source,
        };
        let reader = Reader::from_file(&path).map_err(|error| wrong(error.into()))?;
        pack.add(reader, wanted)
            .map_err(|error| wrong(error.into()))?;
    }
    let bytes = pack.join(own).and_then(|pack| pack.writer().into_bytes());
    bytes
        .map_err(Into::into)
        .and_then(OptimizerRecord::from_bytes)
        .map_err(|source| StateError::Optimizer {
            path: checkpoint.to_owned(),
            source,
        })
}

fn moments_of(checkpoint: &Path) -> Result<Vec<PathBuf>, StateError> {
    let path = checkpoint.join(MANIFEST);
    if !path.exists() {
        return Ok(vec![checkpoint.join(OPTIMIZER)]);
    }
    let wrong = |what| StateError::State {
        path: path.clone(),
        what,
    };
    let text = fs::read_to_string(&path).map_err(io_error(&path))?;
    let manifest: Manifest =
        serde_json::from_str(&text).map_err(|error| wrong(error.to_string()))?;
    for (name, expected) in &manifest.files {
        let found = fs::metadata(checkpoint.join(name)).map(|metadata| metadata.len());
        if found.as_ref().ok() != Some(expected) {
            let found = found.map_or_else(|error| error.to_string(), |found| found.to_string());
            return Err(wrong(format!("{name} has {expected} bytes, found {found}")));
        }
    }
    let names = manifest.files.keys();
    let moments = names.filter(|name| name.ends_with(".bpk"));
    Ok(moments.map(|name| checkpoint.join(name)).collect())
}

/// Names of parameters by their identity, of those that are asked for.
type Names<'a> = dyn Fn(u64) -> Option<String> + 'a;

/// In a file's metadata: the first expert of a stacked parameter.
const FIRST: &str = ".first";

/// Moments in Burn's format: what [`OptimizerRecord`] reads and writes but does not let one choose from.
#[derive(Default)]
struct Pack {
    tensors: Vec<Tensor>,
    /// Stacked experts by the name of the tensor and the first expert.
    experts: BTreeMap<(String, usize), Tensor>,
    scalars: BTreeMap<String, Scalar>,
    /// By identity as a number.
    names: BTreeMap<String, String>,
}

impl Pack {
    /// Adds what a file has of the `wanted` parameters.
    fn add(&mut self, reader: Reader, wanted: &Names<'_>) -> Result<(), burn_pack::Error> {
        let is_wanted = |key: &str| {
            let id = key.split('.').next().and_then(|id| id.parse().ok());
            id.and_then(wanted).is_some()
        };
        let scalars = reader.scalars().iter().filter(|(key, _)| is_wanted(key));
        self.scalars
            .extend(scalars.map(|(key, scalar)| (key.clone(), *scalar)));
        let names = reader.metadata().clone();
        for tensor in reader.into_tensors()? {
            let Some(id) = tensor.param_id else { continue };
            let Some(path) = wanted(id) else { continue };
            if is_routed_expert(&path) {
                let first = names.get(&format!("{id}{FIRST}"));
                let first = first.and_then(|first| first.parse().ok()).unwrap_or(0);
                self.experts.insert((tensor.name.clone(), first), tensor);
            } else {
                self.tensors.push(tensor);
            }
        }
        let names = names.into_iter().filter(|(key, _)| is_wanted(key));
        self.names.extend(names);
        Ok(())
    }

    /// Puts the experts of several files together, and keeps those in `own`.
    fn join(mut self, own: Range<usize>) -> Result<Self, burn_pack::Error> {
        let mut stacks: BTreeMap<String, Vec<Tensor>> = BTreeMap::new();
        for ((name, _), tensor) in std::mem::take(&mut self.experts) {
            stacks.entry(name).or_default().push(tensor);
        }
        for (name, parts) in stacks {
            let (dtype, id) = (parts[0].dtype, parts[0].param_id);
            let mut shape = parts[0].shape.to_vec();
            let experts: usize = parts.iter().map(|part| part.shape[0]).sum();
            let mut bytes = Vec::new();
            for part in parts {
                bytes.extend_from_slice(&part.into_bytes()?);
            }
            let each = bytes.len() / experts.max(1);
            let own = own.start.min(experts)..own.end.min(experts);
            shape[0] = own.len();
            let kept = bytes[own.start * each..own.end * each].to_vec();
            let kept = burn_pack::Bytes::from_bytes_vec(kept);
            self.tensors.push(Tensor::new(name, dtype, shape, id, kept));
        }
        self.names.retain(|key, _| !key.ends_with(FIRST));
        Ok(self)
    }

    fn writer(self) -> Writer {
        let experts = self.experts.into_values();
        let mut writer = Writer::new(self.tensors.into_iter().chain(experts).collect());
        for (key, scalar) in self.scalars {
            writer = writer.with_scalar(&key, scalar);
        }
        for (key, name) in self.names {
            writer = writer.with_metadata(&key, &name);
        }
        writer
    }
}
