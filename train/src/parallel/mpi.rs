//! Ranks as processes that MPI has started.
//!
//! Only point-to-point messages of MPI are used, none of them blocking, so that every wait has a deadline and sees when
//! another rank has given up. A message is received once its length is known, into memory of its own; memory of messages
//! that are still under way when a wait fails is left to MPI for good.

#![allow(
    unsafe_code,
    reason = "MPI is a C library; rsmpi's own requests cannot be given up at a deadline"
)]

use std::{
    collections::BTreeSet,
    ffi::{c_int, c_void},
    fmt, mem,
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

use mpi::{
    environment::{Threading, Universe},
    ffi,
};

use super::communicator::{
    CommError, Communicator, Hop, Kind, Traffic, Transfer, Wait, members_of_split,
};

/// The largest part of a message: MPI counts in 32 bits.
const PART: usize = 1 << 30;

const TAG: c_int = 0;

/// How long a wait only yields before it sleeps.
const SPIN: Duration = Duration::from_millis(2);

/// How processes are connected.
#[derive(Clone, Debug)]
pub struct MpiOptions {
    /// How long a transfer may see none of its messages move.
    pub deadline: Duration,
    /// The node of each rank; `None` asks MPI who shares memory.
    pub nodes: Option<Vec<usize>>,
}

impl Default for MpiOptions {
    fn default() -> Self {
        Self {
            deadline: Duration::from_secs(300),
            nodes: None,
        }
    }
}

/// MPI in this process, from its start to its end. To be dropped after all communicators, on the thread that made it.
pub struct Session {
    universe: Option<Universe>,
    alarm: Arc<Alarm>,
}

/// A group of processes.
pub struct Mpi {
    comm: Handle,
    rank: usize,
    members: Vec<usize>,
    nodes: Vec<usize>,
    deadline: Duration,
    traffic: Arc<Mutex<Traffic>>,
    alarm: Arc<Alarm>,
}

/// A communicator of MPI.
struct Handle(ffi::MPI_Comm);

// SAFETY: MPI was started with MPI_THREAD_MULTIPLE, so that any thread may use a communicator.
unsafe impl Send for Handle {}
// SAFETY: as above.
unsafe impl Sync for Handle {}

/// Tells all ranks of the world that one has given up, beside all other messages.
struct Alarm {
    comm: Handle,
    rank: usize,
    size: usize,
    raised: Mutex<Option<CommError>>,
}

/// Starts MPI. Called once, by a process that `mpirun` or a scheduler has started.
///
/// # Errors
/// MPI that runs already or cannot be used from several threads; as [`Communicator::transfer`].
pub fn start(options: MpiOptions) -> Result<(Session, Mpi), CommError> {
    let unusable = |message: String| CommError::Library {
        rank: 0,
        call: "MPI_Init_thread",
        message,
    };
    let (universe, threading) = mpi::initialize_with_threading(Threading::Multiple)
        .ok_or_else(|| unusable("MPI runs already in this process".into()))?;
    if threading != Threading::Multiple {
        let message = format!("several threads need MPI_THREAD_MULTIPLE, found {threading:?}");
        return Err(unusable(message));
    }
    // SAFETY: MPI has been started, as above.
    let world = unsafe { ffi::RSMPI_COMM_WORLD };
    let (rank, size) = place(world)?;
    let duplicate = |rank| {
        // SAFETY: `comm` is written by the call before it is read.
        let (code, comm) = unsafe {
            let mut comm = ffi::RSMPI_COMM_NULL;
            (ffi::MPI_Comm_dup(world, &raw mut comm), comm)
        };
        check(rank, "MPI_Comm_dup", code)?;
        returning_errors(rank, comm)
    };
    let alarm = Arc::new(Alarm {
        comm: duplicate(rank)?,
        rank,
        size,
        raised: Mutex::new(None),
    });
    let mut group = Mpi {
        comm: duplicate(rank)?,
        rank,
        members: (0..size).collect(),
        nodes: vec![0; size],
        deadline: options.deadline,
        traffic: Arc::default(),
        alarm: alarm.clone(),
    };
    group.nodes = match options.nodes {
        Some(nodes) if nodes.len() == size => nodes,
        Some(nodes) => {
            let size = nodes.len();
            return Err(CommError::NoSuchRank { rank, size });
        }
        None => group.find_nodes()?,
    };
    // What finding nodes took is not the user's.
    group.traffic = Arc::default();
    let session = Session {
        universe: Some(universe),
        alarm,
    };
    Ok((session, group))
}

impl Drop for Session {
    fn drop(&mut self) {
        let raised = self.alarm.raised.lock();
        if raised.unwrap_or_else(PoisonError::into_inner).is_some() {
            // MPI_Finalize would wait for messages that nobody receives. A process that ends without it makes mpirun end
            // the others.
            mem::forget(self.universe.take());
        }
    }
}

/// What has been started of a batch and is not done.
#[derive(Default)]
struct Batch {
    sends: Vec<Part>,
    /// In the order of the transfers.
    expected: Vec<Expected>,
    arriving: Vec<(Expected, Part)>,
}

/// A part of a message, with memory that is MPI's until the request is done.
struct Part {
    peer: usize,
    request: ffi::MPI_Request,
    bytes: Vec<u8>,
}

/// A part of a message that has not come.
struct Expected {
    transfer: usize,
    from: usize,
    start: usize,
    length: usize,
}

/// Starts and lengths of the parts of a message.
fn parts(length: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..length.div_ceil(PART).max(1)).map(move |part| {
        let start = part * PART;
        (start, PART.min(length - start))
    })
}

impl Mpi {
    fn me(&self) -> usize {
        self.members[self.rank]
    }

    fn start(
        &self,
        kind: Kind,
        transfers: &[Transfer<'_>],
        batch: &mut Batch,
    ) -> Result<(), CommError> {
        let size = self.members.len();
        for (transfer, at) in transfers.iter().zip(0..) {
            let (Transfer::Send { to: peer, .. } | Transfer::Receive { from: peer, .. }) = transfer;
            if *peer >= size {
                return Err(CommError::NoSuchRank { rank: *peer, size });
            }
            match transfer {
                Transfer::Send { to, bytes } => {
                    if *to != self.rank {
                        let within = self.nodes[*to] == self.nodes[self.rank];
                        let hop = if within { Hop::Within } else { Hop::Between };
                        let traffic = self.traffic.lock();
                        let mut traffic = traffic.unwrap_or_else(PoisonError::into_inner);
                        traffic.count(kind, hop, bytes.len());
                    }
                    for (start, length) in parts(bytes.len()) {
                        let bytes = bytes[start..start + length].to_vec();
                        let sent = self.comm.send(Until::Sent, self.me(), *to, bytes)?;
                        batch.sends.push(sent);
                    }
                }
                Transfer::Receive { from, into } => {
                    for (start, length) in parts(into.len()) {
                        batch.expected.push(Expected {
                            transfer: at,
                            from: *from,
                            start,
                            length,
                        });
                    }
                }
            }
        }
        Ok(())
    }

    /// Moves what can be moved and tells whether there was anything.
    fn advance(
        &self,
        kind: Kind,
        transfers: &mut [Transfer<'_>],
        batch: &mut Batch,
    ) -> Result<bool, CommError> {
        let me = self.me();
        let mut moved = false;
        let mut at = 0;
        while let Some(part) = batch.sends.get_mut(at) {
            if done(me, &mut part.request)? {
                batch.sends.remove(at);
                moved = true;
            } else {
                at += 1;
            }
        }
        // The first part from each sender is the next to come from it.
        let mut at = 0;
        let mut waiting = BTreeSet::new();
        while let Some(expected) = batch.expected.get(at) {
            let from = expected.from;
            let message = if waiting.contains(&from) {
                None
            } else {
                self.comm.probe(me, from as c_int)?
            };
            let Some(message) = message else {
                waiting.insert(from);
                at += 1;
                continue;
            };
            if message.length != expected.length {
                return Err(CommError::Length {
                    rank: self.members[from],
                    found: message.length,
                    expected: expected.length,
                    wait: self.wait_for(kind, batch),
                });
            }
            let expected = batch.expected.remove(at);
            batch.arriving.push((expected, message.receive(me)?));
            moved = true;
        }
        let mut at = 0;
        while let Some((expected, part)) = batch.arriving.get_mut(at) {
            if !done(me, &mut part.request)? {
                at += 1;
                continue;
            }
            if let Transfer::Receive { into, .. } = &mut transfers[expected.transfer] {
                into[expected.start..][..expected.length].copy_from_slice(&part.bytes);
            }
            batch.arriving.swap_remove(at);
            moved = true;
        }
        Ok(moved)
    }

    fn finish(
        &self,
        kind: Kind,
        transfers: &mut [Transfer<'_>],
        batch: &mut Batch,
    ) -> Result<(), CommError> {
        let mut last = Instant::now();
        loop {
            if self.advance(kind, transfers, batch)? {
                last = Instant::now();
            }
            if batch.sends.is_empty() && batch.expected.is_empty() && batch.arriving.is_empty() {
                return Ok(());
            }
            self.alarm.listen()?;
            let idle = last.elapsed();
            if idle >= self.deadline {
                return Err(CommError::Hang {
                    deadline: self.deadline,
                    waiting: vec![self.wait_for(kind, batch)],
                });
            }
            if idle < SPIN {
                thread::yield_now();
            } else {
                thread::sleep(Duration::from_micros(50));
            }
        }
    }

    fn wait_for(&self, kind: Kind, batch: &Batch) -> Wait {
        let arriving = batch.arriving.iter().map(|(expected, _)| expected);
        let receives = batch.expected.iter().chain(arriving);
        let world_ranks = |ranks: BTreeSet<usize>| -> Vec<usize> {
            ranks.into_iter().map(|rank| self.members[rank]).collect()
        };
        Wait {
            rank: self.me(),
            kind,
            sends: world_ranks(batch.sends.iter().map(|part| part.peer).collect()),
            receives: world_ranks(receives.map(|expected| expected.from).collect()),
        }
    }

    /// Numbers each node by its first rank.
    fn find_nodes(&self) -> Result<Vec<usize>, CommError> {
        let rank = self.rank as u64;
        // SAFETY: `node` is written by the call before it is read.
        let (code, node) = unsafe {
            let mut node = ffi::RSMPI_COMM_NULL;
            let code = ffi::MPI_Comm_split_type(
                self.comm.0,
                ffi::RSMPI_COMM_TYPE_SHARED,
                rank as c_int,
                ffi::RSMPI_INFO_NULL,
                &raw mut node,
            );
            (code, node)
        };
        check(self.rank, "MPI_Comm_split_type", code)?;
        let mut first = rank;
        // SAFETY: both buffers hold one number of the given type and live through the call.
        let code = unsafe {
            ffi::MPI_Allreduce(
                (&raw const rank).cast::<c_void>(),
                (&raw mut first).cast::<c_void>(),
                1,
                ffi::RSMPI_UINT64_T,
                ffi::RSMPI_MIN,
                node,
            )
        };
        check(self.rank, "MPI_Allreduce", code)?;
        let firsts = self.all_gather(&first.to_le_bytes())?;
        let number = |bytes: &Vec<u8>| bytemuck::pod_read_unaligned::<u64>(bytes) as usize;
        Ok(firsts.iter().map(number).collect())
    }
}

impl Communicator for Mpi {
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
        self.alarm.listen()?;
        let mut batch = Batch::default();
        let result = self
            .start(kind, transfers, &mut batch)
            .and_then(|()| self.finish(kind, transfers, &mut batch));
        if let Err(error) = &result {
            self.alarm.raise(error);
            mem::forget(batch);
        }
        result
    }

    fn split(&self, color: u64, key: u64) -> Result<Box<dyn Communicator>, CommError> {
        let members = members_of_split(self, color, key)?;
        // Colors of MPI have 31 bits: the first member stands for its part.
        let color = members.iter().min().copied().unwrap_or(0);
        let rank = members.iter().position(|&member| member == self.rank);
        let rank = rank.expect("a rank is in the part of its own color");
        // SAFETY: `comm` is written by the call before it is read.
        let (code, comm) = unsafe {
            let mut comm = ffi::RSMPI_COMM_NULL;
            let (color, key) = (color as c_int, rank as c_int);
            let code = ffi::MPI_Comm_split(self.comm.0, color, key, &raw mut comm);
            (code, comm)
        };
        check(self.me(), "MPI_Comm_split", code)?;
        Ok(Box::new(Self {
            comm: returning_errors(self.me(), comm)?,
            rank,
            members: members.iter().map(|&rank| self.members[rank]).collect(),
            nodes: members.iter().map(|&rank| self.nodes[rank]).collect(),
            deadline: self.deadline,
            traffic: self.traffic.clone(),
            alarm: self.alarm.clone(),
        }))
    }

    fn abort(&self, reason: &str) {
        self.alarm.raise(&CommError::Aborted {
            rank: self.me(),
            reason: reason.to_owned(),
        });
    }

    fn check(&self) -> Result<(), CommError> {
        self.alarm.listen()
    }

    fn traffic(&self) -> Traffic {
        let traffic = self.traffic.lock();
        traffic.unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl fmt::Debug for Mpi {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Mpi(rank {} of {:?})", self.rank, self.members)
    }
}

impl Alarm {
    /// Fails if a rank has given up.
    fn listen(&self) -> Result<(), CommError> {
        let mut raised = self.raised.lock().unwrap_or_else(PoisonError::into_inner);
        if raised.is_none() {
            // SAFETY: MPI has been started.
            let any = unsafe { ffi::RSMPI_ANY_SOURCE };
            if let Some(message) = self.comm.probe(self.rank, any)? {
                let rank = message.source;
                let mut part = message.receive(self.rank)?;
                while !done(self.rank, &mut part.request)? {
                    thread::yield_now();
                }
                let reason = String::from_utf8_lossy(&part.bytes).into_owned();
                *raised = Some(CommError::Aborted { rank, reason });
            }
        }
        raised.clone().map_or(Ok(()), Err)
    }

    /// Tells all others, unless one of them was first.
    fn raise(&self, error: &CommError) {
        {
            let mut raised = self.raised.lock().unwrap_or_else(PoisonError::into_inner);
            if raised.is_some() {
                return;
            }
            *raised = Some(match error {
                CommError::Aborted { .. } | CommError::Hang { .. } => error.clone(),
                other => CommError::Aborted {
                    rank: self.rank,
                    reason: other.to_string(),
                },
            });
        }
        let reason = match error {
            CommError::Aborted { reason, .. } => reason.clone(),
            other => other.to_string(),
        };
        let others = (0..self.size).filter(|&rank| rank != self.rank);
        // Done when the others have heard: a launcher ends them as soon as this process has ended. Who cannot be told sees
        // its deadline.
        let mut sends: Vec<Part> = others
            .filter_map(|to| {
                let reason = reason.clone().into_bytes();
                self.comm.send(Until::Heard, self.rank, to, reason).ok()
            })
            .collect();
        let start = Instant::now();
        while !sends.is_empty() && start.elapsed() < Duration::from_secs(1) {
            sends.retain_mut(|part| !done(self.rank, &mut part.request).unwrap_or(true));
            thread::yield_now();
        }
        mem::forget(sends);
    }
}

/// A message that has come as far as its length is known.
struct Message {
    handle: ffi::MPI_Message,
    source: usize,
    length: usize,
}

/// When a send is done.
#[derive(Clone, Copy)]
enum Until {
    /// MPI needs its memory no more.
    Sent,
    /// The other side has begun to receive.
    Heard,
}

impl Until {
    fn call(self) -> &'static str {
        match self {
            Self::Sent => "MPI_Isend",
            Self::Heard => "MPI_Issend",
        }
    }
}

impl Handle {
    fn send(
        &self,
        until: Until,
        rank: usize,
        to: usize,
        bytes: Vec<u8>,
    ) -> Result<Part, CommError> {
        // SAFETY: `request` is written by the call before it is read. The bytes are on the heap and stay there until the
        // request is done: whoever drops a part before leaves them to MPI.
        let (code, request) = unsafe {
            let mut request = ffi::RSMPI_REQUEST_NULL;
            let send = match until {
                Until::Sent => ffi::MPI_Isend,
                Until::Heard => ffi::MPI_Issend,
            };
            let code = send(
                bytes.as_ptr().cast(),
                bytes.len() as c_int,
                ffi::RSMPI_UINT8_T,
                to as c_int,
                TAG,
                self.0,
                &raw mut request,
            );
            (code, request)
        };
        check(rank, until.call(), code)?;
        Ok(Part {
            peer: to,
            request,
            bytes,
        })
    }

    fn probe(&self, rank: usize, source: c_int) -> Result<Option<Message>, CommError> {
        // SAFETY: `MPI_Status` is plain data for which zeros are valid; message, status and flag are written by the call.
        let (code, found, handle, status) = unsafe {
            let mut status: ffi::MPI_Status = mem::zeroed();
            let (mut found, mut handle) = (0, ffi::RSMPI_MESSAGE_NULL);
            let code = ffi::MPI_Improbe(
                source,
                TAG,
                self.0,
                &raw mut found,
                &raw mut handle,
                &raw mut status,
            );
            (code, found, handle, status)
        };
        check(rank, "MPI_Improbe", code)?;
        if found == 0 {
            return Ok(None);
        }
        let mut length = 0;
        // SAFETY: the status is that of a message that was found.
        let code =
            unsafe { ffi::MPI_Get_count(&raw const status, ffi::RSMPI_UINT8_T, &raw mut length) };
        check(rank, "MPI_Get_count", code)?;
        Ok(Some(Message {
            handle,
            source: status.MPI_SOURCE as usize,
            length: length as usize,
        }))
    }
}

impl Message {
    fn receive(mut self, rank: usize) -> Result<Part, CommError> {
        let mut bytes = vec![0; self.length];
        // SAFETY: as for a send; the memory is as long as the message.
        let (code, request) = unsafe {
            let mut request = ffi::RSMPI_REQUEST_NULL;
            let code = ffi::MPI_Imrecv(
                bytes.as_mut_ptr().cast(),
                self.length as c_int,
                ffi::RSMPI_UINT8_T,
                &raw mut self.handle,
                &raw mut request,
            );
            (code, request)
        };
        check(rank, "MPI_Imrecv", code)?;
        Ok(Part {
            peer: self.source,
            request,
            bytes,
        })
    }
}

fn done(rank: usize, request: &mut ffi::MPI_Request) -> Result<bool, CommError> {
    let mut flag = 0;
    // SAFETY: the request was made by MPI and its memory is held by its part.
    let code = unsafe { ffi::MPI_Test(request, &raw mut flag, ffi::RSMPI_STATUS_IGNORE) };
    check(rank, "MPI_Test", code)?;
    Ok(flag != 0)
}

fn place(comm: ffi::MPI_Comm) -> Result<(usize, usize), CommError> {
    let (mut rank, mut size) = (0, 0);
    // SAFETY: MPI has been started and the communicator is its.
    let codes = unsafe {
        [
            ffi::MPI_Comm_rank(comm, &raw mut rank),
            ffi::MPI_Comm_size(comm, &raw mut size),
        ]
    };
    check(0, "MPI_Comm_rank", codes[0])?;
    check(0, "MPI_Comm_size", codes[1])?;
    Ok((rank as usize, size as usize))
}

/// A new communicator, whose errors are to be returned. It is never freed: that is collective, and ranks drop their groups
/// in any order.
fn returning_errors(rank: usize, comm: ffi::MPI_Comm) -> Result<Handle, CommError> {
    // SAFETY: MPI has been started and the communicator is its.
    let code = unsafe { ffi::MPI_Comm_set_errhandler(comm, ffi::RSMPI_ERRORS_RETURN) };
    check(rank, "MPI_Comm_set_errhandler", code)?;
    Ok(Handle(comm))
}

fn check(rank: usize, call: &'static str, code: c_int) -> Result<(), CommError> {
    if code == ffi::MPI_SUCCESS as c_int {
        return Ok(());
    }
    let mut text = vec![0u8; ffi::MPI_MAX_ERROR_STRING as usize];
    let mut length = 0;
    // SAFETY: the text has the length that MPI asks for.
    unsafe {
        ffi::MPI_Error_string(code, text.as_mut_ptr().cast(), &raw mut length);
    }
    text.truncate(length as usize);
    Err(CommError::Library {
        rank,
        call,
        message: String::from_utf8_lossy(&text).into_owned(),
    })
}
