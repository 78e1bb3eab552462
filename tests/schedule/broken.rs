//! Timelines with one mistake each: none of them is valid.

use deepburn_train::pipeline::schedule::{
    Action, Chunk, Costs, Direction, Pass, Schedule, Step, Timeline, Transfer, TransferKind,
    simulate,
};

use crate::timeline;

fn chunk(direction: usize, micro_batch: usize) -> Chunk {
    Chunk {
        direction: Direction::BOTH[direction],
        micro_batch,
    }
}

/// The step of a rank with this action.
#[track_caller]
fn at(timeline: &Timeline, rank: usize, action: &str) -> usize {
    let mut steps = timeline.ranks[rank].steps.iter();
    let found = steps.position(|step| step.action.to_string() == action);
    found.unwrap_or_else(|| panic!("rank {rank} has no {action}"))
}

/// Takes a step out; its transfers are waited for with those of the next.
fn drop_step(timeline: &mut Timeline, rank: usize, at: usize) -> Step {
    let rank = &mut timeline.ranks[rank];
    let dropped = rank.steps.remove(at);
    let next = match rank.steps.get_mut(at) {
        Some(step) => &mut step.wait,
        None => &mut rank.final_wait,
    };
    next.splice(0..0, dropped.wait.iter().copied());
    dropped
}

/// Swaps two actions but not what is waited for before them.
fn swap(timeline: &mut Timeline, rank: usize, [a, b]: [&str; 2]) {
    let (a, b) = (at(timeline, rank, a), at(timeline, rank, b));
    let steps = &mut timeline.ranks[rank].steps;
    (steps[a].action, steps[b].action) = (steps[b].action, steps[a].action);
}

/// Breaks a timeline and holds the violation against what is expected.
#[track_caller]
fn finds(expected: &str, mut broken: Timeline, break_it: impl FnOnce(&mut Timeline)) {
    assert_eq!(broken.validate(), Ok(()));
    break_it(&mut broken);
    let violation = broken.validate().unwrap_err();
    assert_eq!(violation.to_string(), expected);
    assert_eq!(simulate(&broken, &Costs::UNIT), Err(violation));
}

fn dualpipe() -> Timeline {
    timeline(Schedule::DualPipe, 4, 10)
}

#[test]
fn dropped_actions_are_missed() {
    for (rank, action, expected) in [
        (0, "W0.4", "rank 0: W0.4 never comes"),
        (0, "W0.3", "rank 0, step 16: W0.4 comes where W0.3 is due"),
        (
            0,
            "F0.0",
            "rank 0, step 0: F0.1 comes where micro-batch 0 is due",
        ),
        (
            1,
            "B1.3",
            "rank 1, step 12: Bi1.4 comes where micro-batch 3 is due",
        ),
        (1, "Bi1.4", "rank 1, step 14: W1.4 comes where W0.4 is due"),
    ] {
        finds(expected, dualpipe(), |timeline| {
            let at = at(timeline, rank, action);
            drop_step(timeline, rank, at);
        });
    }
    let single = || timeline(Schedule::OneFOneB, 1, 2);
    finds("rank 0: B0.1 never comes", single(), |timeline| {
        drop_step(timeline, 0, 3);
    });
    finds("rank 0: F0.1 never comes", single(), |timeline| {
        timeline.ranks[0].steps.truncate(2);
    });
    finds("3 ranks, expected 4", dualpipe(), |timeline| {
        timeline.ranks.pop();
    });
}

#[test]
fn repeated_actions_are_found() {
    for (action, expected) in [
        (
            "F0.1",
            "rank 0, step 2: F0.1 comes where micro-batch 2 is due",
        ),
        (
            "F0.3&B1.1",
            "rank 0, step 8: F0.3 comes where micro-batch 4 is due",
        ),
        (
            "B1.3",
            "rank 0, step 12: B1.3 comes where micro-batch 4 is due",
        ),
        ("W1.0", "rank 0, step 6: W1.0 comes where none is due"),
    ] {
        finds(expected, dualpipe(), |timeline| {
            let at = at(timeline, 0, action);
            let again = Step {
                wait: Vec::new(),
                ..timeline.ranks[0].steps[at].clone()
            };
            timeline.ranks[0].steps.insert(at + 1, again);
        });
    }
}

#[test]
fn swapped_actions_are_found() {
    for (rank, actions, expected) in [
        (
            0,
            ["F0.0", "F0.1"],
            "rank 0, step 0: F0.1 comes where micro-batch 0 is due",
        ),
        (
            0,
            ["F0.4&B1.2", "F1.3&B0.1"],
            "rank 0, step 9: F1.3 needs \"recvF 1.3 from 1\" before it",
        ),
        (
            0,
            ["Bi0.3", "W0.3"],
            "rank 0, step 14: W0.3 comes where none is due",
        ),
        (
            2,
            ["W0.4", "W1.4"],
            "rank 2, step 15: W1.4 comes where W0.4 is due",
        ),
        (
            3,
            ["F0.0", "Bi0.0"],
            "rank 3, step 3: Bi0.0 comes before F0.0",
        ),
    ] {
        finds(expected, dualpipe(), |timeline| {
            swap(timeline, rank, actions);
        });
    }
    // On the last rank of DualPipeV the second leg takes over from the first, and back.
    let folded = || timeline(Schedule::DualPipeV, 2, 4);
    finds(
        "rank 1, step 0: F1.0 comes before F0.0",
        folded(),
        |timeline| swap(timeline, 1, ["F0.0", "F1.0"]),
    );
    finds(
        "rank 1, step 5: B0.0 comes before B1.0",
        folded(),
        |timeline| {
            let steps = &mut timeline.ranks[1].steps;
            steps[5].action = Action::Backward(chunk(0, 0));
            let all: Vec<Step> = steps.drain(6..).collect();
            let receives = all.into_iter().flat_map(|step| step.wait);
            steps[5].wait.extend(receives);
        },
    );
}

#[test]
fn chunks_that_do_not_exist_are_found() {
    for (schedule, unknown) in [
        (Schedule::DualPipe, chunk(0, 5)),
        (Schedule::DualPipe, chunk(1, usize::MAX)),
        (Schedule::OneFOneB, chunk(1, 0)),
    ] {
        let whole = timeline(schedule, 4, 10);
        let expected = format!("rank 0, step 0: F{unknown} is on a chunk that does not exist");
        if schedule == Schedule::OneFOneB {
            assert!(unknown.micro_batch < 10);
        }
        finds(&expected, whole, |timeline| {
            timeline.ranks[0].steps[0].action = Action::Forward(unknown);
        });
    }
}

#[test]
fn transfers_that_are_not_there_or_not_needed_are_found() {
    let send = Transfer {
        kind: TransferKind::Send,
        pass: Pass::Forward,
        chunk: chunk(0, 0),
        peer: 1,
    };
    assert_eq!(dualpipe().ranks[0].steps[1].wait, [send]);
    let wait = |timeline: &mut Timeline, rank: usize, action: &str| {
        let at = at(timeline, rank, action);
        std::mem::take(&mut timeline.ranks[rank].steps[at].wait)
    };
    let not_sent = "rank 0, step 0: F0.0 needs \"sendF 0.0 to 1\" after it";
    let not_received = "rank 1, step 0: F0.0 needs \"recvF 0.0 from 0\" before it";
    finds(not_sent, dualpipe(), |timeline| {
        wait(timeline, 0, "F0.1");
    });
    finds(not_received, dualpipe(), |timeline| {
        wait(timeline, 1, "F0.0");
    });
    // Both sides: everybody gets to the end, but with nothing to compute on.
    finds(not_sent, dualpipe(), |timeline| {
        wait(timeline, 0, "F0.1");
        wait(timeline, 1, "F0.0");
    });
    // Too early, to the wrong rank, of the wrong kind.
    finds(not_sent, dualpipe(), |timeline| {
        let moved = wait(timeline, 0, "F0.1");
        timeline.ranks[0].steps[0].wait = moved;
    });
    for wrong in [
        Transfer { peer: 2, ..send },
        Transfer {
            pass: Pass::Backward,
            ..send
        },
        Transfer {
            kind: TransferKind::Receive,
            ..send
        },
    ] {
        finds(not_sent, dualpipe(), |timeline| {
            timeline.ranks[0].steps[1].wait = vec![wrong];
        });
    }
    // Too late.
    finds(not_received, dualpipe(), |timeline| {
        let moved = wait(timeline, 1, "F0.0");
        timeline.ranks[1].steps[1].wait.extend(moved);
    });
    // Twice, and for nobody.
    finds(
        "rank 0: \"sendF 0.0 to 1\" is one too many",
        dualpipe(),
        |timeline| timeline.ranks[0].final_wait.push(send),
    );
    finds(
        "rank 0: \"sendB 0.0 to 1\" is one too many",
        dualpipe(),
        |timeline| {
            let pass = Pass::Backward;
            timeline.ranks[0].final_wait.push(Transfer { pass, ..send });
        },
    );
}

#[test]
fn transfers_in_another_order_than_the_receivers_are_found() {
    let swap_wait = |timeline: &mut Timeline, rank: usize, action: &str| {
        let at = at(timeline, rank, action);
        timeline.ranks[rank].steps[at].wait.reverse();
    };
    let expected = "transfer 4 from rank 1 to rank 2: sent is B1.1, received is F0.3";
    finds(expected, dualpipe(), |timeline| {
        swap_wait(timeline, 1, "F1.3&B0.1");
    });
    // What a rank exchanges with different others may be in any order.
    let mut other = dualpipe();
    let swapped = at(&other, 1, "F1.0");
    other.ranks[1].steps[swapped].wait.rotate_left(1);
    assert_eq!(other.validate(), Ok(()));
}

/// The two ranks in the middle send at once what the other can only receive later.
#[test]
fn ranks_that_wait_for_each_other_are_found() {
    let send_early = |timeline: &mut Timeline, (rank, transfer): (usize, &str)| {
        let steps = &mut timeline.ranks[rank].steps;
        let held = steps[6].wait.iter();
        let held = held.map(ToString::to_string).position(|t| t == transfer);
        let held = steps[6].wait.remove(held.unwrap());
        steps[5].wait.push(held);
    };
    let [first, second] = [(1, "sendF 0.2 to 2"), (2, "sendF 1.2 to 1")];
    // One of them alone does no harm.
    let mut one = dualpipe();
    send_early(&mut one, first);
    assert_eq!(one.validate(), Ok(()));
    // Ranks 0 and 3 wait as well, but not in the circle.
    let expected = "deadlock: rank 1 before step 5 waits for rank 2 before step 5 waits for rank 1";
    finds(expected, dualpipe(), |timeline| {
        send_early(timeline, first);
        send_early(timeline, second);
    });
}
