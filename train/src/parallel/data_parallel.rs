//! Data parallelism: gradients of all ranks are summed, and each rank updates its part of the parameters (ZeRO-1;
//! Rajbhandari et al., 2020).
//!
//! Every parameter belongs to a group of ranks that hold the same values of it: routed experts to the replicas of their
//! rank, all else to all ranks of a pipeline stage. Within its group a parameter has one owner, which alone keeps its
//! moments. Whole parameters are owned, the largest first by who has least: the sum of a parameter's gradients is taken by
//! its owner, in the order of the ranks, and its new value goes from there to the others.
//!
//! A step, on every rank:
//!
//! ```text
//! loss / ranks -> backward -> reduce -> norm -> step::update of what is owned -> share
//! ```
//!
//! Each rank's loss is a mean over as many tokens as any other's, so that with the division above sums over the ranks are
//! those of the mean over all tokens. Groups communicate beside each other, on threads of their own; in a group, one
//! bucket's bytes are prepared while another's are on their way.

use std::{collections::BTreeMap, fmt};

use burn::{
    module::{Module, ModuleMapper, ModuleVisitor, Param, ParamId},
    optim::GradientsParams,
    tensor::{Tensor, TensorData},
};
use deepburn_model::parameters::Registry;

use super::{
    communicator::{CommError, Communicator, Reduction, Values},
    lane::{Lane, Pending},
};
use crate::step;

/// Bytes of gradients that are exchanged together, if nothing else is asked for.
pub const BUCKET_BYTES: usize = 32 << 20;

/// What keeps a group of ranks from updating together.
#[derive(Debug, thiserror::Error)]
pub enum DataParallelError {
    /// Communication has failed.
    #[error(transparent)]
    Communication(#[from] CommError),
    /// Ranks of one group do not hold the same parameters.
    #[error("rank {rank} has parameters {found}, rank {other} has {expected}")]
    Parameters {
        /// This rank.
        rank: usize,
        /// What it has first that the other has not.
        found: String,
        /// Another rank of the group.
        other: usize,
        /// What that has in its place.
        expected: String,
    },
}

/// How parameters are spread over groups of ranks, and within them over owners.
pub struct DataParallel {
    groups: Vec<Ranks>,
    parameters: BTreeMap<ParamId, Place>,
    bucket: usize,
}

struct Ranks {
    lane: Lane,
    rank: usize,
    size: usize,
    /// The group's parameters in the order of the module, in buckets.
    buckets: Vec<Vec<ParamId>>,
}

/// Whose a parameter is.
#[derive(Clone, Debug, Eq, PartialEq)]
struct Place {
    path: String,
    shape: Vec<usize>,
    group: usize,
    owner: usize,
    /// Others are owned to be saved once.
    trained: bool,
}

/// Gradients summed over ranks.
type Sums = Vec<(ParamId, Vec<f32>)>;

/// Whether a parameter is one of the routed experts', which are divided along the expert axis.
pub fn is_routed_expert(path: &str) -> bool {
    path.contains(".mlp.experts.")
}

impl DataParallel {
    /// Spreads the parameters of `module`, which is in training and whose names in the whole model are in `registry`. `group_of` names, for a
    /// parameter's path, the group in `groups` that it belongs to: for a model without pipeline `[dense, replicas]` and
    /// [`is_routed_expert`]. Called by all ranks of all groups; those of a group hold the same parameters of it in the same
    /// order.
    ///
    /// # Errors
    /// Other parameters on another rank; as [`Communicator::transfer`].
    ///
    /// # Panics
    /// If `group_of` names a group that is not there, or the module has a parameter that the registry has not.
    pub fn new(
        (module, registry): (&impl Module, &Registry),
        groups: Vec<Box<dyn Communicator>>,
        group_of: impl Fn(&str) -> usize,
        bucket_bytes: usize,
    ) -> Result<Self, DataParallelError> {
        let mut listed = Listed {
            registry,
            found: Vec::new(),
        };
        module.visit(&mut listed);
        let mut members: Vec<Vec<(ParamId, Place)>> = groups.iter().map(|_| Vec::new()).collect();
        for (id, place) in listed.found {
            let group = group_of(&place.path);
            members[group].push((id, Place { group, ..place }));
        }
        let mut parallel = Self {
            groups: Vec::new(),
            parameters: BTreeMap::new(),
            bucket: bucket_bytes.div_ceil(size_of::<f32>()).max(1),
        };
        for (group, mut places) in groups.into_iter().zip(members) {
            compare(&*group, &places)?;
            assign(&mut places, group.size());
            let buckets = buckets(&places, parallel.bucket);
            parallel.parameters.extend(places);
            parallel.groups.push(Ranks {
                rank: group.rank(),
                size: group.size(),
                lane: Lane::new(group),
                buckets,
            });
        }
        Ok(parallel)
    }

    /// Whether this rank updates a parameter.
    pub fn owns(&self, id: ParamId) -> bool {
        self.parameters
            .get(&id)
            .is_some_and(|place| self.groups[place.group].rank == place.owner)
    }

    /// Whether a parameter is trained, and by other ranks too.
    fn shares(&self, id: ParamId) -> bool {
        self.parameters
            .get(&id)
            .is_some_and(|place| place.trained && self.groups[place.group].is_shared())
    }

    /// Elements of the parameters that this rank updates, and of all that it holds.
    pub fn share_of_elements(&self) -> (usize, usize) {
        let elements = |place: &Place| place.shape.iter().product::<usize>();
        let all = self.parameters.iter();
        let own = all.clone().filter(|(id, _)| self.owns(**id));
        (
            own.map(|(_, place)| elements(place)).sum(),
            all.map(|(_, place)| elements(place)).sum(),
        )
    }

    /// The sums of the gradients over the ranks that hold each parameter, for the parameters that this rank updates. A
    /// parameter without a gradient counts as one whose gradient is zero.
    ///
    /// # Errors
    /// As [`Communicator::transfer`].
    pub fn reduce(
        &self,
        module: &impl Module,
        gradients: GradientsParams,
    ) -> Result<GradientsParams, CommError> {
        let mut taken = Taken {
            parallel: self,
            gradients,
            found: BTreeMap::new(),
        };
        module.visit(&mut taken);
        let Taken {
            gradients,
            mut found,
            ..
        } = taken;
        let mut pending: Vec<Pending<Sums>> = Vec::new();
        for group in self.groups.iter().filter(|group| group.is_shared()) {
            for bucket in &group.buckets {
                let mut own = Vec::new();
                let mut messages = vec![Vec::new(); group.size];
                for id in bucket {
                    let place = &self.parameters[id];
                    let length = place.shape.iter().product();
                    let values = found.remove(id).unwrap_or_else(|| vec![0.0; length]);
                    if place.owner == group.rank {
                        own.push((*id, length));
                    }
                    messages[place.owner]
                        .extend_from_slice(bytemuck::cast_slice::<f32, u8>(&values));
                }
                pending.push(group.lane.start(move |group| {
                    let messages = group.all_to_all_v(&messages)?;
                    Ok(sum(own, &messages))
                }));
            }
        }
        let mut sums = BTreeMap::new();
        for bucket in pending {
            sums.extend(bucket.finish()?);
        }
        let mut registered = Registered { sums, gradients };
        module.visit(&mut registered);
        Ok(registered.gradients)
    }

    /// Gives every rank the values that the owners have.
    ///
    /// # Errors
    /// As [`Communicator::transfer`].
    pub fn share<M: Module>(&self, module: M) -> Result<M, CommError> {
        let mut owned = Owned {
            parallel: self,
            values: BTreeMap::new(),
        };
        module.visit(&mut owned);
        let mut values = owned.values;
        let mut pending = Vec::new();
        for group in self.groups.iter().filter(|group| group.is_shared()) {
            for bucket in &group.buckets {
                let own = bucket.iter().filter_map(|id| values.remove(id));
                let own: Vec<u8> = own.flatten().collect();
                let gathering = group.lane.start(move |group| group.all_gather(&own));
                pending.push((bucket, gathering));
            }
        }
        let mut received = BTreeMap::new();
        for (bucket, gathering) in pending {
            let mut parts: Vec<_> = gathering.finish()?.into_iter().map(Bytes::from).collect();
            for id in bucket {
                let place = &self.parameters[id];
                let length = place.shape.iter().product::<usize>();
                received.insert(*id, parts[place.owner].take(length));
            }
        }
        let mut replaced = Replaced {
            parallel: self,
            received,
        };
        Ok(module.map(&mut replaced))
    }

    /// The Euclidean norm of all gradients on all ranks, each counted once: `gradients` are those that this rank updates.
    /// Summed in the order of the whole model, as on one device.
    ///
    /// # Errors
    /// As [`Communicator::transfer`].
    pub fn global_norm(
        &self,
        world: &dyn Communicator,
        (module, registry): (&impl Module, &Registry),
        gradients: &GradientsParams,
    ) -> Result<f64, CommError> {
        let mut mine = Vec::new();
        for (id, square) in step::squares(module, gradients) {
            let place = registry.place(id).filter(|_| self.owns(id));
            if let Some(place) = place {
                mine.extend((place as u64).to_le_bytes());
                mine.extend(square.to_le_bytes());
            }
        }
        let mut all: Vec<(u64, f64)> = Vec::new();
        for squares in world.all_gather(&mine)? {
            let pairs = squares.chunks_exact(16);
            all.extend(
                pairs
                    .map(bytemuck::pod_read_unaligned::<[u64; 2]>)
                    .map(|[place, square]| (place, f64::from_bits(square))),
            );
        }
        all.sort_by_key(|(place, _)| *place);
        Ok(all.iter().map(|(_, square)| square).sum::<f64>().sqrt())
    }
}

impl Ranks {
    fn is_shared(&self) -> bool {
        self.size > 1
    }
}

impl fmt::Debug for DataParallel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (own, all) = self.share_of_elements();
        write!(f, "DataParallel(updates {own} of {all} elements)")
    }
}

/// Sums the loads of a step over the ranks that have seen tokens of the same layers.
///
/// # Errors
/// As [`Communicator::transfer`].
pub fn sum_loads(group: &dyn Communicator, loads: &mut [Vec<u64>]) -> Result<(), CommError> {
    let mut all = loads.concat();
    group.all_reduce(Values::U64(&mut all), Reduction::Sum)?;
    let mut rest = all.as_slice();
    for load in loads {
        let (own, behind) = rest.split_at(load.len());
        load.copy_from_slice(own);
        rest = behind;
    }
    Ok(())
}

/// Fails if another rank has other parameters: later their bytes would be taken for each other's.
fn compare(group: &dyn Communicator, places: &[(ParamId, Place)]) -> Result<(), DataParallelError> {
    let line = |(_, place): &(ParamId, Place)| format!("{} {:?}", place.path, place.shape);
    let own: Vec<String> = places.iter().map(line).collect();
    for (other, lines) in group
        .all_gather(own.join("\n").as_bytes())?
        .iter()
        .enumerate()
    {
        let lines = String::from_utf8_lossy(lines);
        let mut theirs = lines.lines();
        let mut own = own.iter();
        loop {
            let (found, expected) = (own.next().map(String::as_str), theirs.next());
            if found != expected {
                let name = |line: Option<&str>| line.unwrap_or("none further").to_owned();
                return Err(DataParallelError::Parameters {
                    rank: group.members()[group.rank()],
                    found: name(found),
                    other: group.members()[other],
                    expected: name(expected),
                });
            }
            if found.is_none() {
                break;
            }
        }
    }
    Ok(())
}

/// The largest parameter first, to the rank that has least.
fn assign(places: &mut [(ParamId, Place)], ranks: usize) {
    let elements = |place: &Place| place.shape.iter().product::<usize>();
    let mut by_size: Vec<usize> = (0..places.len()).collect();
    by_size.sort_by_key(|&at| std::cmp::Reverse(elements(&places[at].1)));
    let mut loads = vec![0; ranks];
    for at in by_size {
        let place = &mut places[at].1;
        let least = (0..ranks).min_by_key(|&rank| loads[rank]);
        place.owner = least.expect("a group has a rank");
        loads[place.owner] += elements(place);
    }
}

fn buckets(places: &[(ParamId, Place)], most: usize) -> Vec<Vec<ParamId>> {
    let mut buckets: Vec<Vec<ParamId>> = Vec::new();
    let mut held = most;
    for (id, place) in places.iter().filter(|(_, place)| place.trained) {
        let elements = place.shape.iter().product::<usize>();
        match buckets.last_mut() {
            Some(bucket) if held + elements <= most => bucket.push(*id),
            _ => {
                buckets.push(vec![*id]);
                held = 0;
            }
        }
        held += elements;
    }
    buckets
}

/// The sum over the ranks' messages, each of which has the same parameters behind each other.
fn sum(own: Vec<(ParamId, usize)>, messages: &[Vec<u8>]) -> Sums {
    let mut start = 0;
    let of_parameter = |(id, length): (ParamId, usize)| {
        let range = 4 * start..4 * (start + length);
        start += length;
        let mut sum = vec![0.0; length];
        for message in messages {
            let numbers = message[range.clone()].chunks_exact(4);
            for (sum, number) in sum.iter_mut().zip(numbers) {
                *sum += bytemuck::pod_read_unaligned::<f32>(number);
            }
        }
        (id, sum)
    };
    own.into_iter().map(of_parameter).collect()
}

/// Bytes that are taken from the start on.
struct Bytes {
    bytes: Vec<u8>,
    at: usize,
}

impl From<Vec<u8>> for Bytes {
    fn from(bytes: Vec<u8>) -> Self {
        Self { bytes, at: 0 }
    }
}

impl Bytes {
    fn take(&mut self, numbers: usize) -> Vec<f32> {
        let bytes = self.bytes[self.at..][..4 * numbers].chunks_exact(4);
        self.at += 4 * numbers;
        bytes.map(bytemuck::pod_read_unaligned).collect()
    }
}

fn single(data: TensorData) -> Vec<f32> {
    data.iter::<f32>().collect()
}

/// The parameters, by path.
struct Listed<'a> {
    registry: &'a Registry,
    found: Vec<(ParamId, Place)>,
}

impl ModuleVisitor for Listed<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let path = self.registry.path(param.id);
        let place = Place {
            path: path.expect("a parameter of the model").to_owned(),
            shape: param.lazy_shape().to_vec(),
            group: 0,
            owner: 0,
            trained: param.is_require_grad(),
        };
        self.found.push((param.id, place));
    }
}

/// Gradients of parameters that other ranks have too.
struct Taken<'a> {
    parallel: &'a DataParallel,
    gradients: GradientsParams,
    found: BTreeMap<ParamId, Vec<f32>>,
}

impl ModuleVisitor for Taken<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if !self.parallel.shares(param.id) {
            return;
        }
        if let Some(gradient) = self.gradients.remove::<D>(param.id) {
            self.found.insert(param.id, single(gradient.into_data()));
        }
    }
}

struct Registered {
    sums: BTreeMap<ParamId, Vec<f32>>,
    gradients: GradientsParams,
}

impl ModuleVisitor for Registered {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if let Some(sum) = self.sums.remove(&param.id) {
            let value = param.val();
            let (device, dtype) = (value.device().inner(), value.dtype());
            let sum = TensorData::new(sum, value.dims()).convert_dtype(dtype);
            let sum = Tensor::<D>::from_data(sum, (&device, dtype));
            self.gradients.register(param.id, sum);
        }
    }
}

struct Owned<'a> {
    parallel: &'a DataParallel,
    values: BTreeMap<ParamId, Vec<u8>>,
}

impl ModuleVisitor for Owned<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if self.parallel.shares(param.id) && self.parallel.owns(param.id) {
            let values = single(param.val().into_data());
            let bytes = bytemuck::cast_slice(&values).to_vec();
            self.values.insert(param.id, bytes);
        }
    }
}

struct Replaced<'a> {
    parallel: &'a DataParallel,
    received: BTreeMap<ParamId, Vec<f32>>,
}

impl ModuleMapper for Replaced<'_> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        match self.received.remove(&param.id) {
            Some(values) if !self.parallel.owns(param.id) => {
                let trained = param.is_require_grad();
                param.map(|old| {
                    let (device, dtype) = (old.device(), old.dtype());
                    let data = TensorData::new(values, old.dims()).convert_dtype(dtype);
                    Tensor::from_data(data, (&device, dtype)).set_require_grad(trained)
                })
            }
            _ => param,
        }
    }
}
