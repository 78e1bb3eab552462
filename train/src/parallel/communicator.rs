//! What ranks say to each other: one trait, written once for all ways of carrying bytes.
//!
//! Every rank of a group makes the same calls in the same order (SPMD). An implementation carries batches of messages;
//! the collectives are made of these here, so that a sum is taken in the order of the ranks everywhere and does not depend
//! on timing. After an error a communicator and all groups split from the same world are of no further use.

use std::{collections::BTreeMap, fmt, ops::Range, time::Duration};

/// A group of ranks, seen from one of them.
///
/// Ranks in arguments count within the group; ranks in errors are those of the world.
pub trait Communicator: Send + Sync {
    /// This rank.
    fn rank(&self) -> usize;

    /// The rank in the world of each member.
    fn members(&self) -> &[usize];

    /// The node of each member; equal numbers share a node.
    fn nodes(&self) -> &[usize];

    /// Starts all transfers together and ends when all are done: NCCL's group semantics. Nothing is buffered, so a send is
    /// done when the other side has received. Messages from one rank to another keep their order, over all batches of
    /// this group, and are as long as the receiver expects. `kind` says whom the bytes are counted for.
    ///
    /// # Errors
    /// A rank that is gone or has aborted; no progress until the deadline; a message of another length.
    fn transfer(&self, kind: Kind, transfers: &mut [Transfer<'_>]) -> Result<(), CommError>;

    /// The members that give the same `color`, ordered by `key` and then by their rank here. Called by all members.
    ///
    /// # Errors
    /// As [`transfer`](Self::transfer).
    fn split(&self, color: u64, key: u64) -> Result<Box<dyn Communicator>, CommError>;

    /// Ends all ranks of the world within seconds: what they wait for or ask for next fails, or they are killed.
    fn abort(&self, reason: &str);

    /// Fails if a rank has given up: what to ask during long computations.
    ///
    /// # Errors
    /// [`CommError::Aborted`], or the hang that a rank has met.
    fn check(&self) -> Result<(), CommError>;

    /// What this rank has sent, over all groups split from the same world.
    fn traffic(&self) -> Traffic;

    /// Number of ranks.
    fn size(&self) -> usize {
        self.members().len()
    }

    /// The node of this rank.
    fn node(&self) -> usize {
        self.nodes()[self.rank()]
    }

    /// [`transfer`](Self::transfer) between pipeline stages.
    ///
    /// # Errors
    /// As [`transfer`](Self::transfer).
    fn batch_p2p(&self, transfers: &mut [Transfer<'_>]) -> Result<(), CommError> {
        self.transfer(Kind::PointToPoint, transfers)
    }

    /// Ends when all ranks have come to it.
    ///
    /// # Errors
    /// As [`transfer`](Self::transfer).
    fn barrier(&self) -> Result<(), CommError> {
        // In each round, who has heard of all ranks up to some distance below tells the rank at that distance above.
        let (rank, size) = (self.rank(), self.size());
        let mut distance = 1;
        while distance < size {
            let mut heard = [0];
            self.transfer(
                Kind::Barrier,
                &mut [
                    Transfer::Send {
                        to: (rank + distance) % size,
                        bytes: &[1],
                    },
                    Transfer::Receive {
                        from: (rank + size - distance) % size,
                        into: &mut heard,
                    },
                ],
            )?;
            distance *= 2;
        }
        Ok(())
    }

    /// Gives all ranks the bytes of `root`; those of the others are replaced.
    ///
    /// # Errors
    /// As [`transfer`](Self::transfer).
    fn broadcast(&self, root: usize, bytes: &mut Vec<u8>) -> Result<(), CommError> {
        let mut length = (bytes.len() as u64).to_le_bytes();
        broadcast_slice(self, Kind::Sizes, root, &mut length)?;
        bytes.resize(u64::from_le_bytes(length) as usize, 0);
        broadcast_slice(self, Kind::Broadcast, root, bytes)
    }

    /// Reduces each element over all ranks, in the order of the ranks, and gives all the result. All have as many.
    ///
    /// # Errors
    /// As [`transfer`](Self::transfer).
    fn all_reduce(&self, values: Values<'_>, reduction: Reduction) -> Result<(), CommError> {
        match values {
            Values::F32(values) => reduce(self, values, reduction),
            Values::F64(values) => reduce(self, values, reduction),
            Values::U64(values) => reduce(self, values, reduction),
        }
    }

    /// The bytes of every rank, which may differ in length.
    ///
    /// # Errors
    /// As [`transfer`](Self::transfer).
    fn all_gather(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>, CommError> {
        exchange(self, Kind::AllGather, &vec![bytes; self.size()])
    }

    /// Sends `to[r]` to each rank r; the result has what each rank sent here. First the lengths, then the bytes.
    ///
    /// # Errors
    /// As [`transfer`](Self::transfer).
    ///
    /// # Panics
    /// If there is not one message per rank.
    fn all_to_all_v(&self, to: &[Vec<u8>]) -> Result<Vec<Vec<u8>>, CommError> {
        let to: Vec<&[u8]> = to.iter().map(Vec::as_slice).collect();
        exchange(self, Kind::AllToAll, &to)
    }
}

/// One message of a batch, from the side of this rank.
#[derive(Debug)]
pub enum Transfer<'a> {
    /// To another rank.
    Send {
        /// Which.
        to: usize,
        /// What.
        bytes: &'a [u8],
    },
    /// From another rank.
    Receive {
        /// Which.
        from: usize,
        /// Where to; its length is the message's.
        into: &'a mut [u8],
    },
}

/// Numbers to be reduced in place.
#[derive(Debug)]
pub enum Values<'a> {
    /// Single precision.
    F32(&'a mut [f32]),
    /// Double precision.
    F64(&'a mut [f64]),
    /// Counts.
    U64(&'a mut [u64]),
}

/// How numbers of several ranks become one.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Reduction {
    /// Their sum, from rank 0 on.
    Sum,
    /// The largest. NaN, where there is one.
    Max,
}

/// What bytes are sent for.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Kind {
    /// Between pipeline stages.
    PointToPoint,
    /// [`Communicator::barrier`]
    Barrier,
    /// [`Communicator::broadcast`]
    Broadcast,
    /// [`Communicator::all_reduce`]
    AllReduce,
    /// [`Communicator::all_gather`]
    AllGather,
    /// [`Communicator::all_to_all_v`]
    AllToAll,
    /// Lengths that precede messages of any kind.
    Sizes,
}

/// How far bytes go. What a rank hands to itself is not counted.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Hop {
    /// To a rank of the same node.
    Within,
    /// To a rank of another node.
    Between,
}

/// Messages and bytes that a rank has sent.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Traffic(BTreeMap<(Kind, Hop), Amount>);

/// Some messages.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Amount {
    /// Their number.
    pub messages: u64,
    /// Their bytes together.
    pub bytes: u64,
}

impl Traffic {
    /// What was sent for one purpose over one distance.
    pub fn of(&self, kind: Kind, hop: Hop) -> Amount {
        self.0.get(&(kind, hop)).copied().unwrap_or_default()
    }

    /// What was sent after `earlier`.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Self {
        let after = |(&key, amount): (&(Kind, Hop), &Amount)| {
            let before = earlier.of(key.0, key.1);
            let amount = Amount {
                messages: amount.messages - before.messages,
                bytes: amount.bytes - before.bytes,
            };
            (key, amount)
        };
        Self(self.0.iter().map(after).collect())
    }

    /// Counts a message.
    pub(super) fn count(&mut self, kind: Kind, hop: Hop, bytes: usize) {
        let amount = self.0.entry((kind, hop)).or_default();
        amount.messages += 1;
        amount.bytes += bytes as u64;
    }
}

/// Why ranks cannot go on. Ranks are those of the world.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum CommError {
    /// A rank has called [`Communicator::abort`] or met an error.
    #[error("rank {rank} gave up: {reason}")]
    Aborted {
        /// Which.
        rank: usize,
        /// What it said.
        reason: String,
    },
    /// A rank has ended while it was waited for.
    #[error("rank {rank} is gone: {wait}")]
    Gone {
        /// Which.
        rank: usize,
        /// Who waited for it.
        wait: Wait,
    },
    /// Nothing moved until the deadline.
    #[error("no progress for {deadline:?}: {}", list(waiting))]
    Hang {
        /// How long.
        deadline: Duration,
        /// Who waits, as far as this rank knows.
        waiting: Vec<Wait>,
    },
    /// A message is not as long as the receiver expected: the two sides do not do the same.
    #[error("rank {rank} sent {found} bytes where {wait}, {expected} bytes expected")]
    Length {
        /// The sender.
        rank: usize,
        /// Bytes sent.
        found: usize,
        /// Bytes expected.
        expected: usize,
        /// What the receiver was doing.
        wait: Wait,
    },
    /// A rank that the group does not have.
    #[error("rank {rank} of a group of {size}")]
    NoSuchRank {
        /// As given.
        rank: usize,
        /// Ranks in the group.
        size: usize,
    },
    /// The library that carries the bytes has failed.
    #[error("{call} on rank {rank}: {message}")]
    Library {
        /// This rank.
        rank: usize,
        /// The function.
        call: &'static str,
        /// What it says.
        message: String,
    },
}

/// A rank and what it waits for. Ranks are those of the world.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Wait {
    /// Who waits.
    pub rank: usize,
    /// In which call.
    pub kind: Kind,
    /// Ranks that have yet to receive from it.
    pub sends: Vec<usize>,
    /// Ranks that it has yet to receive from.
    pub receives: Vec<usize>,
}

impl fmt::Display for Wait {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rank {} waits in {:?}", self.rank, self.kind)?;
        for (what, ranks) in [
            (" to receive from", &self.receives),
            (" to send to", &self.sends),
        ] {
            if !ranks.is_empty() {
                write!(f, "{what} {ranks:?}")?;
            }
        }
        Ok(())
    }
}

fn list(waiting: &[Wait]) -> String {
    let waits: Vec<String> = waiting.iter().map(ToString::to_string).collect();
    waits.join("; ")
}

/// The members of this rank's part of a split, as ranks of the group that is split: what an implementation's `split` begins
/// with. All ranks have come to it when it returns.
pub(super) fn members_of_split<C: Communicator + ?Sized>(
    group: &C,
    color: u64,
    key: u64,
) -> Result<Vec<usize>, CommError> {
    let pairs = group.all_gather(bytemuck::bytes_of(&[color, key]))?;
    let pairs: Vec<[u64; 2]> = pairs
        .iter()
        .map(|pair| bytemuck::pod_read_unaligned(pair))
        .collect();
    let mut members: Vec<usize> = (0..pairs.len()).filter(|&r| pairs[r][0] == color).collect();
    members.sort_by_key(|&rank| (pairs[rank][1], rank));
    Ok(members)
}

/// Along a binomial tree: in each round all who have the bytes hand them to one more.
fn broadcast_slice<C: Communicator + ?Sized>(
    group: &C,
    kind: Kind,
    root: usize,
    bytes: &mut [u8],
) -> Result<(), CommError> {
    let size = group.size();
    if root >= size {
        return Err(CommError::NoSuchRank { rank: root, size });
    }
    let place = (group.rank() + size - root) % size;
    let mut reach = size.next_power_of_two();
    if place > 0 {
        reach = 1 << place.trailing_zeros();
        let from = (place - reach + root) % size;
        group.transfer(kind, &mut [Transfer::Receive { from, into: bytes }])?;
    }
    let mut sends = Vec::new();
    while reach > 1 {
        reach /= 2;
        if place + reach < size {
            let to = (place + reach + root) % size;
            sends.push(Transfer::Send { to, bytes });
        }
    }
    group.transfer(kind, &mut sends)
}

/// Sends a message to each rank and receives one from each. A rank's message to itself is copied.
fn exchange<C: Communicator + ?Sized>(
    group: &C,
    kind: Kind,
    to: &[&[u8]],
) -> Result<Vec<Vec<u8>>, CommError> {
    let (rank, size) = (group.rank(), group.size());
    assert_eq!(to.len(), size, "one message per rank");
    let lengths: Vec<[u8; 8]> = to.iter().map(|m| (m.len() as u64).to_le_bytes()).collect();
    let mut received = vec![[0; 8]; size];
    let with_all = |kind, sent: &[&[u8]], received: Vec<&mut [u8]>| {
        let sends = sent.iter().enumerate();
        let sends = sends.map(|(to, bytes)| Transfer::Send { to, bytes });
        let receives = received.into_iter().enumerate();
        let receives = receives.map(|(from, into)| Transfer::Receive { from, into });
        // Messages without content are left out: both sides know their length.
        let mut transfers: Vec<Transfer> = sends
            .chain(receives)
            .filter(|transfer| match transfer {
                Transfer::Send { to, bytes } => *to != rank && !bytes.is_empty(),
                Transfer::Receive { from, into } => *from != rank && !into.is_empty(),
            })
            .collect();
        group.transfer(kind, &mut transfers)
    };
    let sent: Vec<&[u8]> = lengths.iter().map(<[u8; 8]>::as_slice).collect();
    let into = received.iter_mut().map(<[u8; 8]>::as_mut_slice).collect();
    with_all(Kind::Sizes, &sent, into)?;
    received[rank] = [0; 8];
    let mut messages: Vec<Vec<u8>> = received
        .iter()
        .map(|&length| vec![0; u64::from_le_bytes(length) as usize])
        .collect();
    with_all(
        kind,
        to,
        messages.iter_mut().map(Vec::as_mut_slice).collect(),
    )?;
    messages[rank] = to[rank].to_vec();
    Ok(messages)
}

/// A number that can be reduced.
trait Number: bytemuck::Pod {
    fn sum(self, other: Self) -> Self;
    fn max(self, other: Self) -> Self;
}

macro_rules! float_number {
    ($type:ty) => {
        impl Number for $type {
            fn sum(self, other: Self) -> Self {
                self + other
            }
            fn max(self, other: Self) -> Self {
                if self >= other || self.is_nan() {
                    self
                } else {
                    other
                }
            }
        }
    };
}
float_number!(f32);
float_number!(f64);

impl Number for u64 {
    fn sum(self, other: Self) -> Self {
        self + other
    }
    fn max(self, other: Self) -> Self {
        Ord::max(self, other)
    }
}

/// The part of `length` elements that each of `size` ranks reduces.
fn part(length: usize, size: usize, rank: usize) -> Range<usize> {
    length * rank / size..length * (rank + 1) / size
}

/// Each rank reduces a part for all and hands it to all: every byte is sent twice, whatever the number of ranks.
fn reduce<C: Communicator + ?Sized, T: Number>(
    group: &C,
    values: &mut [T],
    reduction: Reduction,
) -> Result<(), CommError> {
    let (rank, size, length) = (group.rank(), group.size(), values.len());
    let mine = part(length, size, rank);
    let mut others = vec![T::zeroed(); mine.len() * size];
    if size == 1 || length == 0 {
        return Ok(());
    }

    let mut transfers = Vec::new();
    for (from, into) in others.chunks_mut(mine.len().max(1)).enumerate() {
        if from != rank {
            let into = bytemuck::cast_slice_mut(into);
            transfers.push(Transfer::Receive { from, into });
        }
    }
    for to in (0..size).filter(|&to| to != rank && !part(length, size, to).is_empty()) {
        let bytes = bytemuck::cast_slice(&values[part(length, size, to)]);
        transfers.push(Transfer::Send { to, bytes });
    }
    group.transfer(Kind::AllReduce, &mut transfers)?;

    if !mine.is_empty() {
        others[rank * mine.len()..][..mine.len()].copy_from_slice(&values[mine.clone()]);
        let (first, further) = others.split_at(mine.len());
        values[mine.clone()].copy_from_slice(first);
        for other in further.chunks(mine.len()) {
            for (value, &other) in values[mine.clone()].iter_mut().zip(other) {
                *value = match reduction {
                    Reduction::Sum => value.sum(other),
                    Reduction::Max => value.max(other),
                };
            }
        }
    }

    let own = values[mine].to_vec();
    let mut transfers = Vec::new();
    let mut rest = values;
    for from in 0..size {
        let (into, behind) = rest.split_at_mut(part(length, size, from).len());
        rest = behind;
        if from != rank && !into.is_empty() {
            let into = bytemuck::cast_slice_mut(into);
            transfers.push(Transfer::Receive { from, into });
        }
    }
    if !own.is_empty() {
        for to in (0..size).filter(|&to| to != rank) {
            let bytes = bytemuck::cast_slice(&own);
            transfers.push(Transfer::Send { to, bytes });
        }
    }
    group.transfer(Kind::AllReduce, &mut transfers)
}
