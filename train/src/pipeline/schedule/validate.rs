//! Proves that a timeline can be executed and computes every micro-batch once.

use std::collections::{BTreeMap, VecDeque};

use super::{
    action::{Action, Chunk, Pass, Transfer, TransferKind},
    placement::{Neighbour, Placement},
    rendezvous,
    timeline::{RankSteps, Timeline},
};

/// Why a timeline cannot be executed, or not with the right result. Steps count from 0.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum Violation {
    /// There are not as many ranks as the placement has.
    #[error("{found} ranks, expected {expected}")]
    Ranks {
        /// As many as the placement has.
        expected: usize,
        /// As many as have steps.
        found: usize,
    },
    /// A direction that the placement lacks, or a micro-batch beyond the last.
    #[error("rank {rank}, step {step}: {action} is on a chunk that does not exist")]
    UnknownChunk {
        /// Where.
        rank: usize,
        /// Where.
        step: usize,
        /// The action, or the part of a pair.
        action: Action,
    },
    /// Another micro-batch is due: this one is repeated or comes too early.
    #[error("rank {rank}, step {step}: {action} comes where micro-batch {due} is due")]
    OutOfOrder {
        /// Where.
        rank: usize,
        /// Where.
        step: usize,
        /// The action, or the part of a pair.
        action: Action,
        /// The micro-batch whose turn it is.
        due: usize,
    },
    /// An action before the one of the same rank that it takes its input from.
    #[error("rank {rank}, step {step}: {action} comes before {needs}")]
    TooEarly {
        /// Where.
        rank: usize,
        /// Where.
        step: usize,
        /// The action, or the part of a pair.
        action: Action,
        /// What has to come before.
        needs: Action,
    },
    /// A W that is not the one that is queued for longest.
    #[error(
        "rank {rank}, step {step}: W{found} comes where {} is due",
        due(expected)
    )]
    WeightOutOfOrder {
        /// Where.
        rank: usize,
        /// Where.
        step: usize,
        /// The first of the queue, if there is one.
        expected: Option<Chunk>,
        /// The chunk of the action.
        found: Chunk,
    },
    /// An action that never comes.
    #[error("rank {rank}: {action} never comes")]
    Missing {
        /// Where.
        rank: usize,
        /// What is missing.
        action: Action,
    },
    /// An input or output of an action that is not transferred where it has to be.
    #[error("rank {rank}, step {step}: {action} needs \"{transfer}\" {when} it")]
    NotTransferred {
        /// Where.
        rank: usize,
        /// Where.
        step: usize,
        /// The action, or the part of a pair.
        action: Action,
        /// What is not there.
        transfer: Transfer,
        /// `before` or `after`.
        when: &'static str,
    },
    /// A transfer that is repeated or that no action needs.
    #[error("rank {rank}: \"{transfer}\" is one too many")]
    NotNeeded {
        /// Where.
        rank: usize,
        /// What is too many.
        transfer: Transfer,
    },
    /// What a rank sends is not what the other receives at this place between the two.
    #[error(
        "transfer {place} from rank {from} to rank {to}: sent is {}, received is {}",
        name(sent),
        name(received)
    )]
    Mismatch {
        /// The rank that sends.
        from: usize,
        /// The rank that receives.
        to: usize,
        /// Counts the transfers between the two, from 0.
        place: usize,
        /// What is sent.
        sent: Option<(Pass, Chunk)>,
        /// What is received.
        received: Option<(Pass, Chunk)>,
    },
    /// Ranks that wait for each other for ever.
    #[error("deadlock: {}", circle(waiting))]
    Deadlock {
        /// Who waits, and before which step (their number is the end). Each waits for the next, the last for the
        /// first.
        waiting: Vec<(usize, usize)>,
    },
}

fn circle(waiting: &[(usize, usize)]) -> String {
    let first = waiting.first().map_or(0, |(rank, _)| *rank);
    let waits = waiting
        .iter()
        .map(|(rank, step)| format!("rank {rank} before step {step} waits for "));
    waits.collect::<String>() + &format!("rank {first}")
}

fn due(chunk: &Option<Chunk>) -> String {
    chunk.map_or("none".to_owned(), |chunk| format!("W{chunk}"))
}

fn name(transfer: &Option<(Pass, Chunk)>) -> String {
    match transfer {
        Some((pass, chunk)) => format!("{}{chunk}", pass.letter()),
        None => "nothing".to_owned(),
    }
}

impl Timeline {
    /// Proves that it can be executed:
    ///
    /// - on every rank, each chunk has F once and then B, or Bi and W, once; micro-batches are in order in each
    ///   direction, W in the order of Bi;
    /// - an input is there before its action starts: computed on the same rank, or received. An output is sent once,
    ///   when it is computed. Nothing else is transferred;
    /// - between two ranks, sends and receives are the same in the same order;
    /// - no rank waits for ever, even if a send is not done before its receive is started.
    ///
    /// # Errors
    /// The first violation that is found.
    pub fn validate(&self) -> Result<(), Violation> {
        if self.ranks.len() != self.placement.ranks {
            return Err(Violation::Ranks {
                expected: self.placement.ranks,
                found: self.ranks.len(),
            });
        }
        for (rank, steps) in self.ranks.iter().enumerate() {
            Validation::new(self, rank, steps)?.run(steps)?;
        }
        rendezvous::check(self)
    }
}

/// What is known of a rank on the way through its steps.
struct Validation {
    placement: Placement,
    micro_batches: usize,
    rank: usize,
    /// By pass and direction: how many are computed.
    computed: [[usize; 2]; 2],
    queue: VecDeque<Chunk>,
    /// By side: the transfers that no action has needed yet, with the number of their batch.
    transfers: [BTreeMap<(Pass, Chunk), (usize, Transfer)>; 2],
}

impl Validation {
    fn new(timeline: &Timeline, rank: usize, steps: &RankSteps) -> Result<Self, Violation> {
        let mut transfers: [BTreeMap<_, _>; 2] = Default::default();
        for (batch, wait) in steps.waits().enumerate() {
            for &transfer in wait {
                let key = (transfer.pass, transfer.chunk);
                let known = transfers[transfer.kind as usize].insert(key, (batch, transfer));
                if known.is_some() {
                    return Err(Violation::NotNeeded { rank, transfer });
                }
            }
        }
        Ok(Self {
            placement: timeline.placement,
            micro_batches: timeline.micro_batches,
            rank,
            computed: Default::default(),
            queue: VecDeque::new(),
            transfers,
        })
    }

    fn run(mut self, steps: &RankSteps) -> Result<(), Violation> {
        for (at, step) in steps.steps.iter().enumerate() {
            for part in step.action.parts() {
                self.part(at, part)?;
            }
        }
        self.nothing_is_left()
    }

    fn part(&mut self, step: usize, action: Action) -> Result<(), Violation> {
        let rank = self.rank;
        let chunk = action.chunk();
        if !self.placement.directions().contains(&chunk.direction)
            || chunk.micro_batch >= self.micro_batches
        {
            return Err(Violation::UnknownChunk { rank, step, action });
        }
        let Some(pass) = action.pass() else {
            let expected = self.queue.pop_front();
            return if expected == Some(chunk) {
                Ok(())
            } else {
                Err(Violation::WeightOutOfOrder {
                    rank,
                    step,
                    expected,
                    found: chunk,
                })
            };
        };
        let due = self.computed(pass, chunk);
        if due != chunk.micro_batch {
            return Err(Violation::OutOfOrder {
                rank,
                step,
                action,
                due,
            });
        }
        let too_early = |needs| Violation::TooEarly {
            rank,
            step,
            action,
            needs,
        };
        if pass == Pass::Backward && self.computed(Pass::Forward, chunk) <= due {
            return Err(too_early(Action::Forward(chunk)));
        }
        match self.placement.input(rank, pass, chunk.direction) {
            Neighbour::End => (),
            Neighbour::Local(direction) => {
                let source = Chunk { direction, ..chunk };
                if self.computed(pass, source) <= due {
                    return Err(too_early(match pass {
                        Pass::Forward => Action::Forward(source),
                        Pass::Backward => Action::Backward(source),
                    }));
                }
            }
            Neighbour::Rank(peer) => self.transfer(step, action, TransferKind::Receive, peer)?,
        }
        if let Neighbour::Rank(peer) = self.placement.output(rank, pass, chunk.direction) {
            self.transfer(step, action, TransferKind::Send, peer)?;
        }
        self.computed[pass as usize][chunk.direction.index()] += 1;
        if let Action::BackwardInput(chunk) = action {
            self.queue.push_back(chunk);
        }
        Ok(())
    }

    /// Takes the transfer that the action needs from those that are there.
    fn transfer(
        &mut self,
        step: usize,
        action: Action,
        kind: TransferKind,
        peer: usize,
    ) -> Result<(), Violation> {
        let pass = action.pass().expect("W has no transfers");
        let needed = Transfer {
            kind,
            pass,
            chunk: action.chunk(),
            peer,
        };
        let found = self.transfers[kind as usize].remove(&(pass, needed.chunk));
        let (in_time, when) = match kind {
            TransferKind::Receive => (found.is_some_and(|(batch, _)| batch <= step), "before"),
            TransferKind::Send => (found.is_some_and(|(batch, _)| batch > step), "after"),
        };
        if in_time && found.is_some_and(|(_, transfer)| transfer == needed) {
            return Ok(());
        }
        Err(Violation::NotTransferred {
            rank: self.rank,
            step,
            action,
            transfer: needed,
            when,
        })
    }

    fn nothing_is_left(&self) -> Result<(), Violation> {
        let rank = self.rank;
        let missing = |action| Err(Violation::Missing { rank, action });
        for &direction in self.placement.directions() {
            for pass in [Pass::Forward, Pass::Backward] {
                let micro_batch = self.computed[pass as usize][direction.index()];
                let chunk = Chunk {
                    direction,
                    micro_batch,
                };
                if micro_batch < self.micro_batches {
                    return missing(match pass {
                        Pass::Forward => Action::Forward(chunk),
                        Pass::Backward => Action::Backward(chunk),
                    });
                }
            }
        }
        if let Some(&chunk) = self.queue.front() {
            return missing(Action::BackwardWeight(chunk));
        }
        let mut left = self.transfers.iter().flat_map(BTreeMap::values);
        match left.next() {
            Some(&(_, transfer)) => Err(Violation::NotNeeded { rank, transfer }),
            None => Ok(()),
        }
    }

    fn computed(&self, pass: Pass, chunk: Chunk) -> usize {
        self.computed[pass as usize][chunk.direction.index()]
    }
}
