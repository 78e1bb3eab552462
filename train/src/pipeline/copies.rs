//! What several ranks have copies of.

use deepburn_model::parameters::Registry;

use super::{
    layout::{Layout, Piece},
    stage::Part,
};
use crate::parallel::{
    CommError, Communicator, DataParallel, DataParallelError, Mesh, Place,
    data_parallel::{BUCKET_BYTES, is_routed_expert},
};

/// Spreads a rank's part of the model over the ranks that have copies of it. Called by all ranks of the world.
///
/// # Errors
/// As [`DataParallel::new`].
pub fn data_parallel(
    world: &dyn Communicator,
    (mesh, layout): (Mesh, &Layout),
    (part, registry): (&Part, &Registry),
) -> Result<DataParallel, DataParallelError> {
    let groups = groups(world, mesh, layout)?;
    DataParallel::new((part, registry), groups, group, BUCKET_BYTES)
}

/// The ranks that have the embedding, the layers, and the end of the model of this rank, and the routed experts of the last
/// two; this rank alone where it has none of it.
fn groups(
    world: &dyn Communicator,
    mesh: Mesh,
    layout: &Layout,
) -> Result<Vec<Box<dyn Communicator>>, CommError> {
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
    Ok(vec![
        split(Some(Piece::Embedding), 0)?,
        split(layer, 0)?,
        split(end, 0)?,
        split(layer, expert)?,
        split(end, expert)?,
    ])
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
