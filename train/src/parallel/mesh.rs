//! Which rank does what: data, pipeline and expert parallelism as three axes of a grid, and where experts live.
//!
//! Every rank of the grid sees tokens of its own. Along the expert axis the routed experts of a layer are divided, all else
//! is repeated; along the pipeline axis the layers are divided; along the data axis all is repeated. So a gradient is summed
//! over the data axis for routed experts, and over data and expert axes for the rest.

use std::ops::Range;

use super::communicator::{CommError, Communicator};

/// The sizes of the three axes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Mesh {
    /// Along which everything is repeated.
    pub data: usize,
    /// Pipeline stages' ranks.
    pub pipeline: usize,
    /// Ranks that share the routed experts of a layer.
    pub expert: usize,
}

/// A rank's place along each axis.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Place {
    /// Along the data axis.
    pub data: usize,
    /// Along the pipeline axis.
    pub pipeline: usize,
    /// Along the expert axis.
    pub expert: usize,
}

/// Which ranks belong together.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Group {
    /// They share the experts of their layers: same data and pipeline place.
    Expert,
    /// They share the layers of a model: same data and expert place.
    Pipeline,
    /// They hold the same parameters but for routed experts: same pipeline place.
    Dense,
    /// They hold the same routed experts: same pipeline and expert place.
    Replicas,
}

/// A size that does not fit.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("{field} = {value}: {rule}")]
pub struct Refused {
    /// What it is.
    pub field: &'static str,
    /// As it was found.
    pub value: usize,
    /// What holds for it.
    pub rule: String,
}

impl Mesh {
    /// This mesh, if it is one of `ranks` ranks.
    ///
    /// # Errors
    /// Axes of size zero or whose product is not the number of ranks.
    pub fn checked(self, ranks: usize) -> Result<Self, Refused> {
        let axes = [
            ("data", self.data),
            ("pipeline", self.pipeline),
            ("expert", self.expert),
        ];
        for (field, value) in axes {
            if value == 0 {
                let rule = "an axis has at least one rank".into();
                return Err(Refused { field, value, rule });
            }
        }
        let product = axes.iter().try_fold(1usize, |p, (_, n)| p.checked_mul(*n));
        if product != Some(ranks) {
            let Self {
                data,
                pipeline,
                expert,
            } = self;
            return Err(Refused {
                field: "ranks",
                value: ranks,
                rule: format!("data {data} x pipeline {pipeline} x expert {expert} needs as many"),
            });
        }
        Ok(self)
    }

    /// Number of ranks.
    pub fn ranks(self) -> usize {
        self.data * self.pipeline * self.expert
    }

    /// Number of pipelines, among which the windows of a step are divided.
    pub fn pipelines(self) -> usize {
        self.data * self.expert
    }

    /// The rank at a place. Those that exchange most are neighbours and so on one node: experts first, then stages.
    pub fn rank(self, place: Place) -> usize {
        (place.data * self.pipeline + place.pipeline) * self.expert + place.expert
    }

    /// The place of a rank.
    pub fn place(self, rank: usize) -> Place {
        Place {
            data: rank / self.expert / self.pipeline,
            pipeline: rank / self.expert % self.pipeline,
            expert: rank % self.expert,
        }
    }

    /// The ranks that belong together with `rank`, itself included, in order.
    pub fn group(self, group: Group, rank: usize) -> Vec<usize> {
        let color = self.color(group, rank);
        let ranks = 0..self.ranks();
        ranks
            .filter(|&other| self.color(group, other) == color)
            .collect()
    }

    /// A number that the ranks of a group have in common and no others: the color of [`Communicator::split`].
    pub fn color(self, group: Group, rank: usize) -> u64 {
        let place = self.place(rank);
        let color = match group {
            Group::Expert => place.data * self.pipeline + place.pipeline,
            Group::Pipeline => place.data * self.expert + place.expert,
            Group::Dense => place.pipeline,
            Group::Replicas => place.pipeline * self.expert + place.expert,
        };
        color as u64
    }

    /// The group of one kind that this rank is in. Called by all ranks of the world.
    ///
    /// # Errors
    /// As [`Communicator::split`].
    pub fn split(
        self,
        world: &dyn Communicator,
        group: Group,
    ) -> Result<Box<dyn Communicator>, CommError> {
        let rank = world.rank();
        world.split(self.color(group, rank), rank as u64)
    }
}

/// The owners of the routed experts along the expert axis, and their nodes.
///
/// Rank r holds the r-th of equal runs of neighbouring experts. The groups of experts that the router limits a token to
/// stand for nodes (report, section 2.1.2): none of them lies on two, so that a token that goes to `topk_group` groups goes
/// to no more nodes.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct ExpertPlacement {
    experts: usize,
    /// The node of each rank, counted from 0 in the order of their first ranks.
    nodes: Vec<usize>,
    /// The ranks of each node.
    ranks: Vec<Vec<usize>>,
}

impl ExpertPlacement {
    /// Experts in `groups` groups over ranks with the given nodes.
    ///
    /// # Errors
    /// Experts that cannot be divided evenly, or a group of experts on two nodes.
    pub fn new(experts: usize, groups: usize, nodes: &[usize]) -> Result<Self, Refused> {
        let refused = |field, value, rule| Err(Refused { field, value, rule });
        let size = nodes.len();
        if size == 0 || experts == 0 || !experts.is_multiple_of(size) {
            let rule = format!("must divide n_routed_experts {experts}");
            return refused("expert", size, rule);
        }
        if groups == 0 || !experts.is_multiple_of(groups) {
            let rule = format!("must divide n_routed_experts {experts}");
            return refused("n_group", groups, rule);
        }
        let mut seen = Vec::new();
        let mut ranks: Vec<Vec<usize>> = Vec::new();
        let mut numbers = Vec::with_capacity(size);
        for (rank, node) in nodes.iter().enumerate() {
            let number = seen.iter().position(|seen| seen == node);
            let number = number.unwrap_or_else(|| {
                seen.push(*node);
                ranks.push(Vec::new());
                seen.len() - 1
            });
            numbers.push(number);
            ranks[number].push(rank);
        }
        let placement = Self {
            experts,
            nodes: numbers,
            ranks,
        };
        let per_group = experts / groups;
        for group in 0..groups {
            let members = group * per_group..(group + 1) * per_group;
            let first = placement.node_of_expert(members.start);
            if let Some(other) = members
                .map(|expert| placement.node_of_expert(expert))
                .find(|&node| node != first)
            {
                let rule = format!(
                    "group {group} of experts would be on nodes {} and {}; a group is to be on one",
                    seen[first], seen[other]
                );
                return refused("n_group", groups, rule);
            }
        }
        Ok(placement)
    }

    /// Number of routed experts.
    pub fn experts(&self) -> usize {
        self.experts
    }

    /// Number of ranks.
    pub fn ranks(&self) -> usize {
        self.nodes.len()
    }

    /// Number of nodes.
    pub fn nodes(&self) -> usize {
        self.ranks.len()
    }

    /// The experts of a rank.
    pub fn experts_of(&self, rank: usize) -> Range<usize> {
        let each = self.experts / self.ranks();
        rank * each..(rank + 1) * each
    }

    /// The rank of an expert.
    pub fn owner(&self, expert: usize) -> usize {
        expert / (self.experts / self.ranks())
    }

    /// The node of a rank, counted from 0.
    pub fn node(&self, rank: usize) -> usize {
        self.nodes[rank]
    }

    /// The node of an expert.
    pub fn node_of_expert(&self, expert: usize) -> usize {
        self.node(self.owner(expert))
    }

    /// The rank of `node` that takes what `rank` sends there: the one with the same index in its node; where a node has
    /// fewer ranks, they are used in turn. On its own node a rank is that itself.
    pub fn relay(&self, rank: usize, node: usize) -> usize {
        let index = self.ranks[self.node(rank)]
            .iter()
            .position(|&other| other == rank)
            .expect("a rank is on its node");
        let ranks = &self.ranks[node];
        ranks[index % ranks.len()]
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn neighbours_share_experts_then_layers() {
        let mesh = Mesh {
            data: 2,
            pipeline: 3,
            expert: 4,
        }
        .checked(24)
        .unwrap();
        assert_eq!(mesh.group(Group::Expert, 5), [4, 5, 6, 7]);
        assert_eq!(mesh.group(Group::Pipeline, 5), [1, 5, 9]);
        assert_eq!(mesh.group(Group::Replicas, 5), [5, 17]);
        assert_eq!(mesh.group(Group::Dense, 5), [4, 5, 6, 7, 16, 17, 18, 19]);
        for rank in 0..24 {
            assert_eq!(mesh.rank(mesh.place(rank)), rank);
        }
    }

    #[test]
    fn sizes_are_refused_by_name() {
        let mesh = |data, pipeline, expert| Mesh {
            data,
            pipeline,
            expert,
        };
        let text = |result: Result<Mesh, Refused>| result.unwrap_err().to_string();
        assert_eq!(
            text(mesh(2, 0, 1).checked(2)),
            "pipeline = 0: an axis has at least one rank"
        );
        assert_eq!(
            text(mesh(2, 2, 2).checked(6)),
            "ranks = 6: data 2 x pipeline 2 x expert 2 needs as many"
        );
        assert!(mesh(usize::MAX, 2, 2).checked(4).is_err());
        let placed = |experts, groups, nodes: &[usize]| {
            ExpertPlacement::new(experts, groups, nodes)
                .unwrap_err()
                .to_string()
        };
        assert_eq!(
            placed(8, 4, &[0; 3]),
            "expert = 3: must divide n_routed_experts 8"
        );
        assert_eq!(
            placed(8, 3, &[0; 2]),
            "n_group = 3: must divide n_routed_experts 8"
        );
        assert_eq!(
            placed(8, 2, &[7, 7, 9, 5]),
            "n_group = 2: group 1 of experts would be on nodes 9 and 5; a group is to be on one"
        );
    }

    #[test]
    fn relays_have_the_same_index_in_their_node() {
        // Ranks of two nodes in turn, and a third node with one rank.
        let placement = ExpertPlacement::new(10, 5, &[3, 1, 3, 1, 0]).unwrap();
        assert_eq!(placement.nodes(), 3);
        assert_eq!(placement.relay(0, 1), 1);
        assert_eq!(placement.relay(2, 1), 3);
        assert_eq!(placement.relay(3, 1), 3);
        assert_eq!(placement.relay(3, 2), 4);
        assert_eq!(placement.owner(7), 3);
        assert_eq!(placement.experts_of(3), 6..8);
    }

    proptest! {
        /// Every kind of group divides the ranks, and a group has one rank for each place along its axes.
        #[test]
        fn groups_divide_the_ranks(data in 1usize..4, pipeline in 1usize..4, expert in 1usize..4) {
            let mesh = Mesh { data, pipeline, expert };
            for (group, size) in [
                (Group::Expert, expert),
                (Group::Pipeline, pipeline),
                (Group::Dense, data * expert),
                (Group::Replicas, data),
            ] {
                for rank in 0..mesh.ranks() {
                    let members = mesh.group(group, rank);
                    prop_assert_eq!(members.len(), size);
                    prop_assert!(members.contains(&rank));
                    for &member in &members {
                        prop_assert_eq!(mesh.group(group, member), members.clone());
                    }
                }
            }
        }
    }
}
