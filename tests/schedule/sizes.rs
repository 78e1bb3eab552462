//! Properties of every schedule at many sizes.

use deepburn_train::pipeline::schedule::{
    Action, Costs, MAX_CHUNKS, Schedule, Simulation, Timeline, simulate,
};

use crate::{sizes, timeline};

fn unit(timeline: &Timeline) -> Simulation {
    simulate(timeline, &Costs::UNIT).unwrap()
}

#[test]
fn every_schedule_is_valid_at_every_size() {
    for schedule in Schedule::ALL {
        let mut count = 0;
        for (ranks, micro_batches) in sizes(schedule) {
            let valid = timeline(schedule, ranks, micro_batches).validate();
            assert_eq!(valid, Ok(()), "{schedule:?} {ranks} {micro_batches}");
            count += 1;
        }
        assert!(count >= 40, "{schedule:?}: {count}");
    }
}

/// F = Bi = W = B / 2 and F&B = F + B: there the formulas of table 2 are exact, on every rank.
#[test]
fn bubbles_are_those_of_the_closed_formulas() {
    for schedule in Schedule::ALL {
        for (ranks, micro_batches) in sizes(schedule).filter(|(ranks, m)| m >= ranks) {
            let timeline = timeline(schedule, ranks, micro_batches);
            let simulation = unit(&timeline);
            let expected = schedule.bubble(ranks, &Costs::UNIT);
            let place = format!("{schedule:?} {ranks} {micro_batches}");
            assert_eq!(simulation.bubble, vec![expected; ranks], "{place}");
            // Written out: (PP - 1)(1 + 2), (PP - 1)(1 + 2 - 2), (PP / 2 - 1)(3 + 2 - 3), the last with PP = 2 ranks
            // for DualPipeV.
            let by_hand = match schedule {
                Schedule::OneFOneB => 3 * (ranks - 1),
                Schedule::ZeroBubble => ranks - 1,
                Schedule::DualPipe => ranks - 2,
                Schedule::DualPipeV => 2 * (ranks - 1),
            };
            assert_eq!(expected, by_hand as f64, "{place}");
            let work = 3 * timeline.micro_batches * timeline.placement.directions().len();
            assert_eq!(simulation.makespan, (work + by_hand) as f64, "{place}");
        }
    }
}

/// Overlap that saves time: then ranks have different numbers of pairs, and the formula is that of the longest bubble.
#[test]
fn bubbles_of_dualpipe_are_those_of_the_formula_for_faster_pairs() {
    for overlapped in [2.0, 2.5, 2.75] {
        let costs = Costs {
            overlapped,
            ..Costs::UNIT
        };
        for schedule in [Schedule::DualPipe, Schedule::DualPipeV] {
            for (ranks, micro_batches) in sizes(schedule) {
                let timeline = timeline(schedule, ranks, micro_batches);
                let found = simulate(&timeline, &costs).unwrap().bubble;
                let found = found.into_iter().fold(0.0, f64::max);
                let expected = schedule.bubble(ranks, &costs);
                assert_eq!(found, expected, "{schedule:?} {ranks} {micro_batches}");
            }
        }
    }
}

/// The makespan of 1F1B is (M + PP - 1)(F + B) whatever these are, and with fewer micro-batches than ranks too.
#[test]
fn the_formula_of_1f1b_holds_for_all_costs() {
    let costs = Costs {
        forward: 1.5,
        backward: 2.25,
        ..Costs::UNIT
    };
    for (ranks, micro_batches) in sizes(Schedule::OneFOneB) {
        let timeline = timeline(Schedule::OneFOneB, ranks, micro_batches);
        let simulation = simulate(&timeline, &costs).unwrap();
        let expected = Schedule::OneFOneB.bubble(ranks, &costs);
        let found = simulation.bubble;
        assert_eq!(found, vec![expected; ranks], "{ranks} {micro_batches}");
        let makespan = (micro_batches + ranks - 1) as f64 * 3.75;
        assert_eq!(simulation.makespan, makespan, "{ranks} {micro_batches}");
    }
}

/// Table 2: PP activations of 1F1B and ZB1P, PP + 1 of DualPipe on every rank, whatever the number of micro-batches.
#[test]
fn peaks_of_activations_are_those_of_the_report() {
    for schedule in Schedule::ALL {
        for (ranks, micro_batches) in sizes(schedule) {
            let found = timeline(schedule, ranks, micro_batches).peak_activations();
            let expected: Vec<usize> = match schedule {
                Schedule::OneFOneB => (0..ranks)
                    .map(|rank| (ranks - rank).min(micro_batches))
                    .collect(),
                Schedule::ZeroBubble => vec![ranks.min(micro_batches); ranks],
                Schedule::DualPipe => vec![ranks + 1; ranks],
                Schedule::DualPipeV => vec![2 * ranks + 1; ranks],
            };
            assert_eq!(found, expected, "{schedule:?} {ranks} {micro_batches}");
            if micro_batches >= ranks {
                let most = found.into_iter().max();
                assert_eq!(most, Some(schedule.activations(ranks)), "{schedule:?}");
            }
        }
    }
}

/// Two routes to one order: half of DualPipe on twice as many ranks with twice as many micro-batches.
#[test]
fn dualpipe_v_is_half_of_dualpipe() {
    for (ranks, micro_batches) in sizes(Schedule::DualPipeV) {
        let folded = timeline(Schedule::DualPipeV, ranks, micro_batches);
        let whole = timeline(Schedule::DualPipe, 2 * ranks, 2 * micro_batches);
        assert_eq!(folded.order()[..], whole.order()[..ranks]);
        assert_eq!(unit(&folded).spans[..], unit(&whole).spans[..ranks]);
    }
}

/// The other half is its mirror image.
#[test]
fn dualpipe_is_symmetric() {
    for (ranks, micro_batches) in sizes(Schedule::DualPipe) {
        let timeline = timeline(Schedule::DualPipe, ranks, micro_batches);
        let spans = unit(&timeline).spans;
        let directions = |rank: usize| -> Vec<usize> {
            let parts = timeline.ranks[rank].steps.iter();
            let parts = parts.flat_map(|step| step.action.parts());
            parts.map(|part| part.chunk().direction.index()).collect()
        };
        for rank in 0..ranks / 2 {
            let mirror = ranks - 1 - rank;
            assert_eq!(spans[rank], spans[mirror]);
            let mirrored: Vec<usize> = directions(mirror).iter().map(|d| 1 - d).collect();
            assert_eq!(directions(rank), mirrored);
        }
    }
}

/// Every rank overlaps all but a number of passes that does not grow with the micro-batches.
#[test]
fn pairs_grow_with_the_micro_batches_and_nothing_else_does() {
    let count = |micro_batches, pairs| {
        let timeline = timeline(Schedule::DualPipeV, 8, micro_batches);
        let steps = timeline.ranks.iter().map(|rank| {
            let actions = rank.steps.iter().map(|step| step.action);
            actions
                .filter(|action| matches!(action, Action::Overlapped { .. }) == pairs)
                .count()
        });
        steps.collect::<Vec<usize>>()
    };
    assert_eq!(count(17, false), count(40, false));
    for (few, many) in count(17, true).into_iter().zip(count(40, true)) {
        assert_eq!(few + 2 * (40 - 17), many);
    }
}

#[test]
fn sizes_that_a_schedule_is_not_made_for_are_refused() {
    for (schedule, [ranks, micro_batches], expected) in [
        (
            Schedule::OneFOneB,
            [0, 4],
            "ranks = 0: 1F1B needs a positive number",
        ),
        (
            Schedule::ZeroBubble,
            [4, 0],
            "micro_batches = 0: ZB1P needs at least 1 for 4 ranks",
        ),
        (
            Schedule::DualPipe,
            [0, 4],
            "ranks = 0: DualPipe needs a positive even number",
        ),
        (
            Schedule::DualPipe,
            [5, 20],
            "ranks = 5: DualPipe needs a positive even number",
        ),
        (
            Schedule::DualPipe,
            [4, 6],
            "micro_batches = 6: DualPipe needs an even number, at least 8 for 4 ranks",
        ),
        (
            Schedule::DualPipe,
            [4, 9],
            "micro_batches = 9: DualPipe needs an even number, at least 8 for 4 ranks",
        ),
        (
            Schedule::DualPipeV,
            [4, 7],
            "micro_batches = 7: DualPipeV needs at least 8 for 4 ranks",
        ),
        (
            Schedule::OneFOneB,
            [2, MAX_CHUNKS],
            "micro_batches = 1048576: ranks x micro_batches must be at most 1048576",
        ),
        (
            Schedule::DualPipeV,
            [usize::MAX, 2],
            "ranks = 18446744073709551615: ranks x micro_batches must be at most 1048576",
        ),
    ] {
        let refused = schedule.timeline(ranks, micro_batches).unwrap_err();
        assert_eq!(refused.to_string(), expected);
    }
    assert!(Schedule::DualPipeV.timeline(4, 9).is_ok());
    assert!(Schedule::OneFOneB.timeline(1, 1).is_ok());
}
