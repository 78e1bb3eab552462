//! Which bytes cross between nodes, and that every token finds all of its experts and comes back.

use deepburn_train::parallel::{
    Communicator, ExpertPlacement, Hop, Kind, LocalOptions, RowFormat, local::run, routes::Routes,
    wire::Row,
};
use proptest::prelude::*;

/// A layout with a routing of some tokens on each rank.
#[derive(Clone, Debug)]
struct Case {
    nodes: Vec<usize>,
    experts: usize,
    groups: usize,
    groups_per_token: usize,
    k: usize,
    /// For each rank, `k` experts for each of its tokens.
    chosen: Vec<Vec<usize>>,
}

fn case() -> impl Strategy<Value = Case> {
    // Nodes, ranks on each, experts of a group per rank of its node, groups on a node.
    (1usize..=4, 1usize..=3, 1usize..=2, 1usize..=2).prop_flat_map(
        |(nodes, ranks, per_rank, groups_on_node)| {
            let groups = nodes * groups_on_node;
            let of_group = ranks * per_rank;
            (1..=groups, Just((nodes, ranks, groups, of_group))).prop_flat_map(
                |(groups_per_token, (nodes, ranks, groups, of_group))| {
                    let most = groups_per_token * of_group;
                    (1..=most.min(5)).prop_flat_map(move |k| {
                        let token = token(groups, groups_per_token, of_group, k);
                        let tokens =
                            prop::collection::vec(token, 0..6).prop_map(|tokens| tokens.concat());
                        prop::collection::vec(tokens, nodes * ranks).prop_map(move |chosen| Case {
                            nodes: (0..nodes * ranks).map(|rank| 10 + rank / ranks).collect(),
                            experts: groups * of_group,
                            groups,
                            groups_per_token,
                            k,
                            chosen,
                        })
                    })
                },
            )
        },
    )
}

/// Different experts from few groups.
fn token(
    groups: usize,
    groups_per_token: usize,
    of_group: usize,
    k: usize,
) -> impl Strategy<Value = Vec<usize>> {
    let groups: Vec<usize> = (0..groups).collect();
    prop::sample::subsequence(groups, groups_per_token)
        .prop_flat_map(move |groups| {
            let experts = groups
                .iter()
                .flat_map(|group| group * of_group..(group + 1) * of_group);
            prop::sample::subsequence(experts.collect::<Vec<_>>(), k)
        })
        .prop_shuffle()
}

impl Case {
    fn placement(&self) -> ExpertPlacement {
        ExpertPlacement::new(self.experts, self.groups, &self.nodes).unwrap()
    }

    /// Other nodes than that of `rank` with experts of each of its tokens.
    fn crossings(&self, rank: usize) -> Vec<usize> {
        let placement = self.placement();
        let others = |experts: &[usize]| {
            let nodes = experts
                .iter()
                .map(|&expert| placement.node_of_expert(expert));
            let nodes: std::collections::BTreeSet<usize> = nodes.collect();
            nodes
                .iter()
                .filter(|&&node| node != placement.node(rank))
                .count()
        };
        self.chosen[rank].chunks(self.k).map(others).collect()
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    /// Between nodes, tokens cross as often as they have other nodes, at most `topk_group` times, and come back as often.
    #[test]
    fn tokens_cross_to_each_node_once(case in case()) {
        let row = Row { format: RowFormat::Fp8, width: 130, exact: case.k };
        let plain = Row { format: RowFormat::F32, width: 2, exact: 0 };
        let placement = case.placement();
        let ranks = run(&case.nodes, LocalOptions::default(), |world| {
            let between = |kind| world.traffic().of(kind, Hop::Between).bytes;
            let chosen = &case.chosen[world.rank()];
            let tokens = chosen.len() / case.k;
            let routes = Routes::plan(&world, &placement, chosen, case.k).unwrap();
            let planned = between(Kind::AllToAll);
            let numbers = vec![1.0; tokens * row.numbers()];
            let arrived = routes.scatter(&world, row, &numbers).unwrap();
            let scattered = between(Kind::AllToAll) - planned;
            routes.gather(&world, row, &arrived).unwrap();
            let gathered = between(Kind::AllToAll) - planned - scattered;

            // Tokens are numbered by rank; each row names its token.
            let name = |at: usize| [world.rank() as f32, at as f32];
            let tokens: Vec<f32> = (0..tokens).flat_map(name).collect();
            let arrived = routes.scatter(&world, plain, &tokens).unwrap();
            let back = routes.gather(&world, plain, &arrived).unwrap();
            (planned, scattered, gathered, arrived, back, routes.chosen().to_vec())
        });
        let mut crossing = 0;
        for (rank, (planned, scattered, ..)) in ranks.iter().enumerate() {
            let crossings = case.crossings(rank);
            let sum = crossings.iter().sum::<usize>() as u64;
            prop_assert_eq!(*planned, sum * 2 * case.k as u64);
            prop_assert_eq!(*scattered, sum * row.bytes() as u64);
            prop_assert!(crossings.iter().all(|&nodes| nodes <= case.groups_per_token));
            crossing += sum;
        }
        let returned: u64 = ranks.iter().map(|(_, _, gathered, ..)| gathered).sum();
        prop_assert_eq!(returned, crossing * row.bytes() as u64);

        // A rank has a row for each token with an expert there, in the order of rank and token, with its choices.
        for (rank, (.., arrived, back, chosen)) in ranks.iter().enumerate() {
            let own = placement.experts_of(rank);
            let mut expected = (Vec::new(), Vec::new());
            for (source, tokens) in case.chosen.iter().enumerate() {
                for (token, experts) in tokens.chunks(case.k).enumerate() {
                    if experts.iter().any(|expert| own.contains(expert)) {
                        expected.0.extend([source as f32, token as f32]);
                        let local = |expert: &usize| own.contains(expert).then(|| expert - own.start);
                        expected.1.extend(experts.iter().map(local));
                    }
                }
            }
            prop_assert_eq!((arrived, chosen), (&expected.0, &expected.1));
            // What returns is the sum over the ranks that a token went to.
            for (token, experts) in case.chosen[rank].chunks(case.k).enumerate() {
                let owners = experts.iter().map(|&expert| placement.owner(expert));
                let owners = owners.collect::<std::collections::BTreeSet<_>>().len() as f32;
                prop_assert_eq!(back[2 * token], owners * rank as f32);
                prop_assert_eq!(back[2 * token + 1], owners * token as f32);
            }
        }
    }
}
