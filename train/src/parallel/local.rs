//! Ranks as threads of one process.
//!
//! Nothing is buffered as far as the ranks can see: a send is done when the other side has received, as in the worst case
//! of MPI and NCCL. A program that gets to its end here does not depend on buffers anywhere else.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    fmt,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use super::communicator::{
    CommError, Communicator, Hop, Kind, Traffic, Transfer, Wait, members_of_split,
};

/// How ranks of one process are connected.
#[derive(Clone)]
pub struct LocalOptions {
    /// How long nothing may move between any ranks while one waits.
    pub deadline: Duration,
    /// What messages go through.
    pub link: Option<Arc<dyn Link>>,
}

/// A simulated connection.
pub trait Link: Send + Sync {
    /// Called, by world ranks, for each message between two nodes before it arrives. As long as it takes, the message is
    /// under way.
    fn carry(&self, from: usize, to: usize, bytes: usize);
}

impl Default for LocalOptions {
    fn default() -> Self {
        Self {
            deadline: Duration::from_secs(300),
            link: None,
        }
    }
}

impl fmt::Debug for LocalOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LocalOptions")
            .field("deadline", &self.deadline)
            .field("link", &self.link.is_some())
            .finish()
    }
}

/// A rank of a group of threads.
pub struct Local {
    hub: Arc<Hub>,
    group: usize,
    rank: usize,
    members: Vec<usize>,
    nodes: Vec<usize>,
    splits: AtomicU64,
    traffic: Arc<Mutex<Traffic>>,
}

/// The ranks of a world; `nodes` has the simulated node of each. Every rank is to be given to a thread of its own.
pub fn world(nodes: &[usize], options: LocalOptions) -> Vec<Local> {
    let hub = Arc::new(Hub {
        state: Mutex::new(State {
            last: Instant::now(),
            groups: 1,
            splits: BTreeMap::new(),
            lanes: BTreeMap::new(),
            gone: BTreeSet::new(),
            waiting: BTreeMap::new(),
            waits: 0,
            failed: None,
        }),
        changed: Condvar::new(),
        options,
    });
    (0..nodes.len())
        .map(|rank| Local {
            hub: hub.clone(),
            group: 0,
            rank,
            members: (0..nodes.len()).collect(),
            nodes: nodes.to_vec(),
            splits: AtomicU64::new(0),
            traffic: Arc::default(),
        })
        .collect()
}

/// Runs `body` on every rank, each on a thread of its own, and returns what they returned, in the order of the ranks.
///
/// # Panics
/// If `body` panics on a rank, after all have ended.
pub fn run<T: Send>(
    nodes: &[usize],
    options: LocalOptions,
    body: impl Fn(Local) -> T + Sync,
) -> Vec<T> {
    std::thread::scope(|scope| {
        let threads: Vec<_> = world(nodes, options)
            .into_iter()
            .map(|rank| scope.spawn(|| body(rank)))
            .collect();
        let results: Vec<_> = threads.into_iter().map(|thread| thread.join()).collect();
        results
            .into_iter()
            .map(|result| result.unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            .collect()
    })
}

/// Where the ranks of a world meet. Ranks are those of the world here.
struct Hub {
    state: Mutex<State>,
    changed: Condvar,
    options: LocalOptions,
}

struct State {
    /// When a message was last received by anyone.
    last: Instant,
    groups: usize,
    /// The group that a split made: by group, number of the split in it, and color.
    splits: BTreeMap<(usize, u64, u64), usize>,
    /// Messages on the way, by group, sender and receiver.
    lanes: BTreeMap<(usize, usize, usize), Lane>,
    /// Members of groups that have ended.
    gone: BTreeSet<(usize, usize)>,
    waiting: BTreeMap<u64, Wait>,
    waits: u64,
    failed: Option<CommError>,
}

#[derive(Default)]
struct Lane {
    queue: VecDeque<Vec<u8>>,
    sent: u64,
    received: u64,
}

impl Hub {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn fail(&mut self, rank: usize, error: &CommError) {
        self.failed.get_or_insert_with(|| match error {
            CommError::Aborted { .. } | CommError::Hang { .. } => error.clone(),
            other => CommError::Aborted {
                rank,
                reason: other.to_string(),
            },
        });
    }

    fn is_gone(&self, group: usize, rank: usize) -> bool {
        self.gone.contains(&(group, rank))
    }
}

/// A batch under way: what is not done yet.
struct Batch<'a, 'b> {
    /// World rank of the receiver, and the number of messages on the lane when it has received.
    sends: Vec<(usize, u64)>,
    /// World rank of the sender.
    receives: Vec<(usize, &'a mut &'b mut [u8])>,
}

impl Local {
    fn me(&self) -> usize {
        self.members[self.rank]
    }

    fn wait_for(&self, kind: Kind, batch: &Batch<'_, '_>) -> Wait {
        Wait {
            rank: self.me(),
            kind,
            sends: batch.sends.iter().map(|(to, _)| *to).collect(),
            receives: batch.receives.iter().map(|(from, _)| *from).collect(),
        }
    }

    fn world_rank(&self, rank: usize) -> Result<usize, CommError> {
        let size = self.members.len();
        let member = self.members.get(rank).copied();
        member.ok_or(CommError::NoSuchRank { rank, size })
    }

    fn start<'a, 'b>(
        &self,
        kind: Kind,
        transfers: &'a mut [Transfer<'b>],
    ) -> Result<Batch<'a, 'b>, CommError> {
        let mut batch = Batch {
            sends: Vec::new(),
            receives: Vec::new(),
        };
        let mut state = self.hub.lock();
        if let Some(error) = &state.failed {
            return Err(error.clone());
        }
        for transfer in transfers {
            match transfer {
                Transfer::Send { to, bytes } => {
                    let peer = self.world_rank(*to)?;
                    let lane = state.lanes.entry((self.group, self.me(), peer));
                    let lane = lane.or_default();
                    lane.queue.push_back(bytes.to_vec());
                    lane.sent += 1;
                    batch.sends.push((peer, lane.sent));
                    if *to != self.rank {
                        let within = self.nodes[*to] == self.nodes[self.rank];
                        let hop = if within { Hop::Within } else { Hop::Between };
                        let traffic = self.traffic.lock();
                        let mut traffic = traffic.unwrap_or_else(PoisonError::into_inner);
                        traffic.count(kind, hop, bytes.len());
                    }
                }
                Transfer::Receive { from, into } => {
                    batch.receives.push((self.world_rank(*from)?, into));
                }
            }
        }
        self.hub.changed.notify_all();
        Ok(batch)
    }

    /// Receives what has come and tells whether there was anything.
    fn receive(&self, kind: Kind, batch: &mut Batch<'_, '_>) -> Result<bool, CommError> {
        let me = self.me();
        let mut arrived = Vec::new();
        {
            let mut state = self.hub.lock();
            let mut at = 0;
            while let Some((from, _)) = batch.receives.get(at) {
                let lane = state.lanes.get_mut(&(self.group, *from, me));
                match lane.and_then(|lane| lane.queue.pop_front()) {
                    Some(bytes) => arrived.push((batch.receives.remove(at), bytes)),
                    None => at += 1,
                }
            }
        }
        let any = !arrived.is_empty();
        for ((from, into), bytes) in arrived {
            if bytes.len() != into.len() {
                return Err(CommError::Length {
                    rank: from,
                    found: bytes.len(),
                    expected: into.len(),
                    wait: Wait {
                        receives: vec![from],
                        sends: Vec::new(),
                        ..self.wait_for(kind, batch)
                    },
                });
            }
            let node = |rank| self.nodes[self.members.iter().position(|&m| m == rank).unwrap_or(0)];
            if let Some(link) = &self.hub.options.link
                && node(from) != node(me)
            {
                link.carry(from, me, bytes.len());
            }
            into.copy_from_slice(&bytes);
            let mut state = self.hub.lock();
            state.last = Instant::now();
            state
                .lanes
                .entry((self.group, from, me))
                .or_default()
                .received += 1;
            self.hub.changed.notify_all();
        }
        Ok(any)
    }

    fn finish(&self, kind: Kind, batch: &mut Batch<'_, '_>) -> Result<(), CommError> {
        let mut number = None;
        let result = self.finish_known_as(&mut number, kind, batch);
        if let Some(number) = number {
            self.hub.lock().waiting.remove(&number);
        }
        result
    }

    /// What others read of its wait stays from the first time that there is one, under `number`.
    fn finish_known_as(
        &self,
        number: &mut Option<u64>,
        kind: Kind,
        batch: &mut Batch<'_, '_>,
    ) -> Result<(), CommError> {
        let (me, started, deadline) = (self.me(), Instant::now(), self.hub.options.deadline);
        loop {
            if self.receive(kind, batch)? {
                continue;
            }
            let mut state = self.hub.lock();
            let lanes = &state.lanes;
            batch.sends.retain(|&(to, number)| {
                let lane = lanes.get(&(self.group, me, to));
                lane.is_none_or(|lane| lane.received < number)
            });
            if batch.sends.is_empty() && batch.receives.is_empty() {
                return Ok(());
            }
            if let Some(error) = &state.failed {
                return Err(error.clone());
            }
            let came = |from: usize| {
                let lane = state.lanes.get(&(self.group, from, me));
                lane.is_some_and(|lane| !lane.queue.is_empty())
            };
            if batch.receives.iter().any(|(from, _)| came(*from)) {
                continue;
            }
            let wait = self.wait_for(kind, batch);
            let mut peers = wait.sends.iter().chain(&wait.receives);
            if let Some(&rank) = peers.find(|&&peer| state.is_gone(self.group, peer)) {
                return Err(CommError::Gone { rank, wait });
            }
            let number = *number.get_or_insert_with(|| {
                state.waits += 1;
                state.waits
            });
            state.waiting.insert(number, wait);
            let idle = started.max(state.last).elapsed();
            if idle >= deadline {
                let mut waiting: Vec<Wait> = state.waiting.values().cloned().collect();
                waiting.sort_by_key(|wait| wait.rank);
                return Err(CommError::Hang { deadline, waiting });
            }
            let waited = self.hub.changed.wait_timeout(state, deadline - idle);
            drop(waited.unwrap_or_else(PoisonError::into_inner));
        }
    }
}

impl Communicator for Local {
    fn rank(&self) -> usize {
        self.rank
    }

    fn members(&self) -> &[usize] {
        &self.members
    }

    fn nodes(&self) -> &[usize] {
        &self.nodes
    }

    fn transfer(&self, kind: Kind, transfers: &mut [Transfer<'_>]) -> Result<(), CommError> {
        let result = self
            .start(kind, transfers)
            .and_then(|mut batch| self.finish(kind, &mut batch));
        if let Err(error) = &result {
            self.hub.lock().fail(self.me(), error);
            self.hub.changed.notify_all();
        }
        result
    }

    fn split(&self, color: u64, key: u64) -> Result<Box<dyn Communicator>, CommError> {
        let members = members_of_split(self, color, key)?;
        let number = self.splits.fetch_add(1, Ordering::Relaxed);
        let group = {
            let mut state = self.hub.lock();
            let next = state.groups;
            let split = state.splits.entry((self.group, number, color));
            let group = *split.or_insert(next);
            state.groups = next.max(group + 1);
            group
        };
        let rank = members.iter().position(|&member| member == self.rank);
        Ok(Box::new(Self {
            hub: self.hub.clone(),
            group,
            rank: rank.expect("a rank is in the part of its own color"),
            members: members.iter().map(|&rank| self.members[rank]).collect(),
            nodes: members.iter().map(|&rank| self.nodes[rank]).collect(),
            splits: AtomicU64::new(0),
            traffic: self.traffic.clone(),
        }))
    }

    fn abort(&self, reason: &str) {
        let error = CommError::Aborted {
            rank: self.me(),
            reason: reason.to_owned(),
        };
        self.hub.lock().fail(self.me(), &error);
        self.hub.changed.notify_all();
    }

    fn check(&self) -> Result<(), CommError> {
        self.hub.lock().failed.clone().map_or(Ok(()), Err)
    }

    fn traffic(&self) -> Traffic {
        let traffic = self.traffic.lock();
        traffic.unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Drop for Local {
    fn drop(&mut self) {
        self.hub
            .lock()
            .gone
            .insert((self.group, self.members[self.rank]));
        self.hub.changed.notify_all();
    }
}

impl fmt::Debug for Local {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Local(rank {} of {:?})", self.rank, self.members)
    }
}
