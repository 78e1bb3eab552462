//! Ranks that exchange bytes through NCCL, one GPU for each.
//!
//! The bytes of this interface are the host's: they are copied to the device, sent from there and copied back. NCCL is
//! met through another communicator, which carries its identifiers and tells who has given up; it stays the one that
//! knows ranks and nodes.

#![allow(
    unsafe_code,
    reason = "NCCL's communicators are pointers, which are not Send by themselves"
)]

use std::{
    fmt, mem,
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

use cudarc::{
    driver::{self, CudaContext, CudaSlice, CudaStream, DriverError},
    nccl::{
        self,
        result::NcclError,
        safe::{Comm, Id, group_end, group_start},
    },
};

use super::communicator::{CommError, Communicator, Hop, Kind, Traffic, Transfer, Wait};

/// A group of GPUs.
pub struct Nccl {
    control: Box<dyn Communicator>,
    stream: Arc<CudaStream>,
    /// None after a failure.
    comm: Mutex<Option<Owned>>,
    deadline: Duration,
    traffic: Arc<Mutex<Traffic>>,
}

struct Owned(Comm);

// SAFETY: NCCL allows calls from any thread as long as no two are made at once, and the communicator is behind a lock.
unsafe impl Send for Owned {}

impl Nccl {
    /// The ranks of `control` with the GPU of the given number each. Called by all of them; no two ranks may have the same
    /// GPU. `deadline` is how long a batch of transfers may take.
    ///
    /// # Errors
    /// A GPU or NCCL that is not there; as [`Communicator::transfer`].
    pub fn new(
        control: Box<dyn Communicator>,
        gpu: usize,
        deadline: Duration,
    ) -> Result<Self, CommError> {
        let rank = control.members()[control.rank()];
        // SAFETY: both open a library, whose initialisers are NVIDIA's, and close it.
        let [cuda, nccl] = unsafe {
            [
                driver::sys::is_culib_present(),
                nccl::sys::is_culib_present(),
            ]
        };
        for (there, library) in [(cuda, "libcuda"), (nccl, "libnccl")] {
            if !there {
                return Err(CommError::Library {
                    rank,
                    call: "dlopen",
                    message: format!("{library}.so is not among the libraries of this system"),
                });
            }
        }
        let context = CudaContext::new(gpu).map_err(|error| of_cuda(rank, &error))?;
        Self::join(control, &context, deadline, Arc::default())
    }

    fn join(
        control: Box<dyn Communicator>,
        context: &Arc<CudaContext>,
        deadline: Duration,
        traffic: Arc<Mutex<Traffic>>,
    ) -> Result<Self, CommError> {
        let rank = control.members()[control.rank()];
        let mut identifier = Vec::new();
        if control.rank() == 0 {
            let new = Id::new().map_err(|error| of_nccl(rank, "ncclGetUniqueId", &error))?;
            identifier.extend(new.internal().map(|letter| letter as u8));
        }
        control.broadcast(0, &mut identifier)?;
        let identifier = <[u8; 128]>::try_from(identifier).map_err(|found| CommError::Library {
            rank,
            call: "ncclGetUniqueId",
            message: format!("an identifier has 128 bytes, found {}", found.len()),
        })?;
        let identifier = Id::uninit(identifier.map(|letter| letter as std::ffi::c_char));
        let stream = context
            .new_stream()
            .map_err(|error| of_cuda(rank, &error))?;
        let comm = Comm::from_rank(stream.clone(), control.rank(), control.size(), identifier)
            .map_err(|error| of_nccl(rank, "ncclCommInitRank", &error))?;
        Ok(Self {
            control,
            stream,
            comm: Mutex::new(Some(Owned(comm))),
            deadline,
            traffic,
        })
    }

    fn me(&self) -> usize {
        self.control.members()[self.control.rank()]
    }

    fn count(&self, kind: Kind, transfers: &[Transfer<'_>]) {
        let (rank, nodes) = (self.rank(), self.nodes());
        let mut traffic = self.traffic.lock().unwrap_or_else(PoisonError::into_inner);
        for transfer in transfers {
            if let Transfer::Send { to, bytes } = transfer
                && *to != rank
            {
                let within = nodes[*to] == nodes[rank];
                let hop = if within { Hop::Within } else { Hop::Between };
                traffic.count(kind, hop, bytes.len());
            }
        }
    }

    /// Copies to the device, and starts all transfers together.
    fn start(
        &self,
        comm: &Comm,
        transfers: &[Transfer<'_>],
        buffers: &mut Vec<CudaSlice<u8>>,
    ) -> Result<(), CommError> {
        let rank = self.me();
        for transfer in transfers {
            let buffer = match transfer {
                // Memory of the device has at least one byte; empty messages are not sent.
                Transfer::Send { bytes: [], .. } => self.stream.alloc_zeros(1),
                Transfer::Send { bytes, .. } => self.stream.clone_htod(*bytes),
                Transfer::Receive { into, .. } => self.stream.alloc_zeros(into.len().max(1)),
            };
            buffers.push(buffer.map_err(|error| of_cuda(rank, &error))?);
        }
        let nccl = |call| move |error: NcclError| of_nccl(rank, call, &error);
        group_start().map_err(nccl("ncclGroupStart"))?;
        for (transfer, buffer) in transfers.iter().zip(buffers) {
            match transfer {
                Transfer::Send { to, bytes } if !bytes.is_empty() => {
                    comm.send(buffer, *to as i32).map_err(nccl("ncclSend"))?;
                }
                Transfer::Receive { from, into } if !into.is_empty() => {
                    comm.recv(buffer, *from as i32).map_err(nccl("ncclRecv"))?;
                }
                _ => {}
            }
        }
        group_end().map_err(nccl("ncclGroupEnd"))?;
        Ok(())
    }

    /// Waits, and copies to the host.
    fn finish(
        &self,
        kind: Kind,
        transfers: &mut [Transfer<'_>],
        buffers: &[CudaSlice<u8>],
    ) -> Result<(), CommError> {
        let cuda = |error: DriverError| of_cuda(self.me(), &error);
        let (started, done) = (
            Instant::now(),
            self.stream.record_event(None).map_err(cuda)?,
        );
        while !done.try_is_complete().map_err(cuda)? {
            self.control.check()?;
            if started.elapsed() >= self.deadline {
                return Err(CommError::Hang {
                    deadline: self.deadline,
                    waiting: vec![self.wait(kind, transfers)],
                });
            }
            thread::yield_now();
        }
        for (transfer, buffer) in transfers.iter_mut().zip(buffers) {
            if let Transfer::Receive { into, .. } = transfer
                && !into.is_empty()
            {
                self.stream.memcpy_dtoh(buffer, *into).map_err(cuda)?;
            }
        }
        self.stream.synchronize().map_err(cuda)
    }

    /// All of a batch: NCCL does not tell what is done of it.
    fn wait(&self, kind: Kind, transfers: &[Transfer<'_>]) -> Wait {
        let members = self.members();
        let (mut sends, mut receives) = (Vec::new(), Vec::new());
        for transfer in transfers {
            match transfer {
                Transfer::Send { to, .. } => sends.push(members[*to]),
                Transfer::Receive { from, .. } => receives.push(members[*from]),
            }
        }
        Wait {
            rank: self.me(),
            kind,
            sends,
            receives,
        }
    }
}

impl Communicator for Nccl {
    fn rank(&self) -> usize {
        self.control.rank()
    }

    fn members(&self) -> &[usize] {
        self.control.members()
    }

    fn nodes(&self) -> &[usize] {
        self.control.nodes()
    }

    fn transfer(&self, kind: Kind, transfers: &mut [Transfer<'_>]) -> Result<(), CommError> {
        self.control.check()?;
        let size = self.size();
        for transfer in transfers.iter() {
            let (Transfer::Send { to: peer, .. } | Transfer::Receive { from: peer, .. }) = transfer;
            if *peer >= size {
                return Err(CommError::NoSuchRank { rank: *peer, size });
            }
        }
        if transfers.is_empty() {
            return Ok(());
        }
        self.count(kind, transfers);
        let mut comm = self.comm.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(Owned(open)) = comm.as_ref() else {
            return Err(CommError::Library {
                rank: self.me(),
                call: "NCCL",
                message: "the communicator has failed before".into(),
            });
        };
        let mut buffers = Vec::new();
        let result = self
            .start(open, transfers, &mut buffers)
            .and_then(|()| self.finish(kind, transfers, &buffers));
        if let Err(error) = &result {
            self.control.abort(&error.to_string());
            // Dropping it ends what is under way, which may still use the buffers.
            comm.take();
            mem::forget(buffers);
        }
        result
    }

    fn split(&self, color: u64, key: u64) -> Result<Box<dyn Communicator>, CommError> {
        let control = self.control.split(color, key)?;
        let (context, traffic) = (self.stream.context(), self.traffic.clone());
        let group = Self::join(control, context, self.deadline, traffic)?;
        Ok(Box::new(group))
    }

    fn abort(&self, reason: &str) {
        self.control.abort(reason);
    }

    fn check(&self) -> Result<(), CommError> {
        self.control.check()
    }

    fn traffic(&self) -> Traffic {
        let traffic = self.traffic.lock();
        traffic.unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl fmt::Debug for Nccl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Nccl(rank {} of {:?})", self.rank(), self.members())
    }
}

fn of_cuda(rank: usize, error: &DriverError) -> CommError {
    CommError::Library {
        rank,
        call: "CUDA",
        message: error.to_string(),
    }
}

fn of_nccl(rank: usize, call: &'static str, error: &NcclError) -> CommError {
    CommError::Library {
        rank,
        call,
        message: format!("{:?}", error.0),
    }
}
