//! What several ranks have copies of: gradients are summed over them, and everything is counted once.

use burn::{
    module::{Module, ModuleVisitor, Param},
    optim::GradientsParams,
    tensor::{Device, Tensor, TensorData},
};
use deepburn_model::parameters::Registry;

use super::{
    layout::{Layout, Piece},
    stage::Part,
};
use crate::{
    parallel::{CommError, Communicator, Mesh, Place, Reduction, Values},
    step,
};

/// The ranks that hold the same parameters as this one.
pub struct Copies {
    /// Of the embedding, of the layers, of the end of the model, and of the routed experts of the last two; alone where this
    /// rank holds none of it.
    groups: [Box<dyn Communicator>; 5],
}

impl Copies {
    /// Finds them. Called by all ranks of the world.
    ///
    /// # Errors
    /// What keeps ranks from talking.
    pub fn find(world: &dyn Communicator, mesh: Mesh, layout: &Layout) -> Result<Self, CommError> {
        let rank = world.rank();
        let Place {
            pipeline: place,
            expert,
            ..
        } = mesh.place(rank);
        let stages = layout.placement().directions().iter();
        let layer = stages
            .flat_map(|&direction| layout.stage(place, direction).layers)
            .next();
        // Of routed experts, the ranks along the expert axis have different ones.
        let split = |piece: Option<Piece>, own: usize| {
            let held = piece.filter(|&piece| layout.holds(place, piece));
            let color = match held.map(|piece| layout.holders(piece)[0]) {
                Some(first) => first * mesh.expert + own,
                // Nobody else's.
                None => mesh.ranks() + rank,
            };
            world.split(color as u64, rank as u64)
        };
        let (layer, end) = (layer.map(Piece::Layer), Some(Piece::End));
        Ok(Self {
            groups: [
                split(Some(Piece::Embedding), 0)?,
                split(layer, 0)?,
                split(end, 0)?,
                split(layer, expert)?,
                split(end, expert)?,
            ],
        })
    }

    /// Whether this rank is the one that answers for a parameter.
    pub fn answers_for(&self, path: &str) -> bool {
        self.groups[group(path)].rank() == 0
    }

    /// Sums the gradients of every parameter over the ranks that hold it.
    ///
    /// # Errors
    /// What keeps ranks from talking.
    pub fn sum(
        &self,
        part: &Part,
        mut gradients: GradientsParams,
        registry: &Registry,
    ) -> Result<GradientsParams, CommError> {
        for (number, ranks) in self.groups.iter().enumerate() {
            if ranks.size() == 1 {
                continue;
            }
            let mut buffer = Buffer {
                group: number,
                registry,
                gradients: &mut gradients,
                device: part.device().inner(),
                values: Vec::new(),
                at: None,
            };
            part.visit(&mut buffer);
            ranks.all_reduce(Values::F32(&mut buffer.values), Reduction::Sum)?;
            buffer.at = Some(0);
            part.visit(&mut buffer);
        }
        Ok(gradients)
    }

    /// Euclidean norm of the gradients of all ranks together, each parameter counted once, in the order of the model: the
    /// same number as on one device.
    ///
    /// # Errors
    /// What keeps ranks from talking.
    pub fn global_norm(
        &self,
        world: &dyn Communicator,
        part: &Part,
        gradients: &GradientsParams,
        registry: &Registry,
    ) -> Result<f64, CommError> {
        let mut mine = Vec::new();
        for (id, square) in step::squares(part, gradients) {
            let (path, place) = (registry.path(id), registry.place(id));
            if let (Some(path), Some(place)) = (path, place)
                && self.answers_for(path)
            {
                mine.extend((place as u64).to_le_bytes());
                mine.extend(square.to_le_bytes());
            }
        }
        let mut all: Vec<(u64, f64)> = Vec::new();
        for squares in world.all_gather(&mine)? {
            all.extend(squares.chunks_exact(16).map(|pair| {
                let word = |at: usize| pair[at..at + 8].try_into().expect("eight bytes");
                (u64::from_le_bytes(word(0)), f64::from_le_bytes(word(8)))
            }));
        }
        all.sort_by_key(|(place, _)| *place);
        Ok(all.iter().map(|(_, square)| square).sum::<f64>().sqrt())
    }
}

fn group(path: &str) -> usize {
    match (Piece::of(path), is_routed_expert(path)) {
        (Piece::Embedding, _) => 0,
        (Piece::Layer(_), false) => 1,
        (Piece::End, false) => 2,
        (Piece::Layer(_), true) => 3,
        (Piece::End, true) => 4,
    }
}

/// Whether a parameter is one of the routed experts', which are divided along the expert axis.
pub(crate) fn is_routed_expert(path: &str) -> bool {
    path.contains(".mlp.experts.")
}

/// The gradients of a group one after the other; first filled, then read.
struct Buffer<'a> {
    group: usize,
    registry: &'a Registry,
    gradients: &'a mut GradientsParams,
    device: Device,
    values: Vec<f32>,
    /// Where the next one is read.
    at: Option<usize>,
}

impl ModuleVisitor for Buffer<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let path = self.registry.path(param.id);
        if path.is_none_or(|path| group(path) != self.group) {
            return;
        }
        let Some(at) = self.at else {
            if let Some(gradient) = self.gradients.get::<D>(param.id) {
                self.values.extend(gradient.into_data().iter::<f32>());
            }
            return;
        };
        let Some(gradient) = self.gradients.remove::<D>(param.id) else {
            return;
        };
        let shape = gradient.shape();
        let end = at + shape.num_elements();
        let values = self.values[at..end].to_vec();
        let sum = Tensor::<D>::from_data(TensorData::new(values, shape), &self.device);
        self.gradients.register(param.id, sum);
        self.at = Some(end);
    }
}
