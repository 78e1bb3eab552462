//! Writes down the steps of one rank: numbers the micro-batches and adds the transfers.

use std::{collections::VecDeque, mem};

use super::{
    action::{Action, Chunk, Direction, Pass, Transfer, TransferKind},
    placement::{Neighbour, Placement},
    timeline::{RankSteps, Step},
};

/// Micro-batches go in order in each direction and pass, so that counts are all there is to know.
#[derive(Clone, Copy, Default)]
struct Counts {
    received: usize,
    computed: usize,
    sent: usize,
}

/// A rank whose steps are written down.
///
/// Unless told otherwise an action receives its input just before, and its output is sent just after: the transfer
/// is waited for with those of the next action, when there is an action for it to go on beside.
pub(super) struct Recorder {
    placement: Placement,
    rank: usize,
    counts: [[Counts; 2]; 2],
    weights: VecDeque<Chunk>,
    pending: Vec<Transfer>,
    steps: Vec<Step>,
}

impl Recorder {
    pub(super) fn new(placement: Placement, rank: usize) -> Self {
        Self {
            placement,
            rank,
            counts: Default::default(),
            weights: VecDeque::new(),
            pending: Vec::new(),
            steps: Vec::new(),
        }
    }

    /// F, then its output is sent.
    pub(super) fn forward(&mut self, direction: Direction) {
        self.forward_unsent(direction);
        self.send(Pass::Forward, direction);
    }

    /// F, whose output is to be sent later.
    pub(super) fn forward_unsent(&mut self, direction: Direction) {
        let chunk = self.compute(Pass::Forward, direction);
        self.step(Action::Forward(chunk));
    }

    /// B, then its output is sent.
    pub(super) fn backward(&mut self, direction: Direction) {
        self.backward_unsent(direction);
        self.send(Pass::Backward, direction);
    }

    /// B, whose output is to be sent later.
    pub(super) fn backward_unsent(&mut self, direction: Direction) {
        let chunk = self.compute(Pass::Backward, direction);
        self.step(Action::Backward(chunk));
    }

    /// Bi, then its output is sent. The rest is queued for [`Recorder::weight`].
    pub(super) fn backward_input(&mut self, direction: Direction) {
        let chunk = self.compute(Pass::Backward, direction);
        self.weights.push_back(chunk);
        self.step(Action::BackwardInput(chunk));
        self.send(Pass::Backward, direction);
    }

    /// The W that is queued for longest.
    pub(super) fn weight(&mut self) {
        let chunk = self.weights.pop_front();
        let chunk = chunk.expect("a schedule has as many W as Bi, each of them later");
        self.step(Action::BackwardWeight(chunk));
    }

    /// F of one and B of the other direction, overlapped.
    pub(super) fn overlapped(&mut self, forward: Direction, backward: Direction) {
        let pair = Action::Overlapped {
            forward: self.compute(Pass::Forward, forward),
            backward: self.compute(Pass::Backward, backward),
        };
        self.step(pair);
        self.send(Pass::Forward, forward);
        self.send(Pass::Backward, backward);
    }

    /// Receives the input of the next pass of this kind ahead of time.
    pub(super) fn receive(&mut self, pass: Pass, direction: Direction) {
        let counts = self.counts(pass, direction);
        let micro_batch = counts.received;
        counts.received += 1;
        if let Neighbour::Rank(peer) = self.placement.input(self.rank, pass, direction) {
            self.pending.push(Transfer {
                kind: TransferKind::Receive,
                pass,
                chunk: Chunk {
                    direction,
                    micro_batch,
                },
                peer,
            });
        }
    }

    /// Sends the first output of this kind that is not sent yet.
    pub(super) fn send(&mut self, pass: Pass, direction: Direction) {
        let counts = self.counts(pass, direction);
        let micro_batch = counts.sent;
        counts.sent += 1;
        if let Neighbour::Rank(peer) = self.placement.output(self.rank, pass, direction) {
            self.pending.push(Transfer {
                kind: TransferKind::Send,
                pass,
                chunk: Chunk {
                    direction,
                    micro_batch,
                },
                peer,
            });
        }
    }

    pub(super) fn finish(self) -> RankSteps {
        RankSteps {
            steps: self.steps,
            final_wait: self.pending,
        }
    }

    fn compute(&mut self, pass: Pass, direction: Direction) -> Chunk {
        let counts = self.counts(pass, direction);
        if counts.received == counts.computed {
            self.receive(pass, direction);
        }
        let counts = self.counts(pass, direction);
        let micro_batch = counts.computed;
        counts.computed += 1;
        Chunk {
            direction,
            micro_batch,
        }
    }

    fn step(&mut self, action: Action) {
        let wait = mem::take(&mut self.pending);
        self.steps.push(Step { wait, action });
    }

    fn counts(&mut self, pass: Pass, direction: Direction) -> &mut Counts {
        &mut self.counts[pass as usize][direction.index()]
    }
}
