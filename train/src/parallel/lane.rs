//! A thread that communicates while others compute.

use std::{
    fmt,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    sync::mpsc::{Receiver, Sender, channel},
    thread::{self, JoinHandle},
};

use super::communicator::{CommError, Communicator};

type Job = Box<dyn FnOnce(&dyn Communicator) + Send>;

/// A group whose calls are made in order by a thread of its own.
pub struct Lane {
    jobs: Option<Sender<Job>>,
    thread: Option<JoinHandle<()>>,
    rank: usize,
}

/// A result on its way.
#[derive(Debug)]
pub struct Pending<T> {
    result: Receiver<thread::Result<Result<T, CommError>>>,
    rank: usize,
}

impl Lane {
    /// A thread for `group`. All members have to start their jobs in the same order.
    ///
    /// # Panics
    /// If the system has no thread left.
    pub fn new(group: Box<dyn Communicator>) -> Self {
        let rank = group.members()[group.rank()];
        let (jobs, queue) = channel::<Job>();
        let work = move || {
            for job in queue {
                job(&*group);
            }
        };
        Self {
            jobs: Some(jobs),
            thread: Some(thread::spawn(work)),
            rank,
        }
    }

    /// Starts `job` after those before it.
    pub fn start<T: Send + 'static>(
        &self,
        job: impl FnOnce(&dyn Communicator) -> Result<T, CommError> + Send + 'static,
    ) -> Pending<T> {
        let (done, result) = channel();
        let job = Box::new(move |group: &dyn Communicator| {
            // Nobody waits for it any more if this fails.
            let _ = done.send(catch_unwind(AssertUnwindSafe(|| job(group))));
        });
        if let Some(jobs) = &self.jobs {
            // If the thread is gone, the result never comes: `finish` tells.
            let _ = jobs.send(job);
        }
        let rank = self.rank;
        Pending { result, rank }
    }
}

impl<T> Pending<T> {
    /// Waits for the result.
    ///
    /// # Errors
    /// That of the job, or that its thread has ended.
    ///
    /// # Panics
    /// If the job has.
    pub fn finish(self) -> Result<T, CommError> {
        let ended = |_| CommError::Library {
            rank: self.rank,
            call: "communication thread",
            message: "has ended".into(),
        };
        let result = self.result.recv().map_err(ended)?;
        result.unwrap_or_else(|panic| resume_unwind(panic))
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        drop(self.jobs.take());
        if let Some(thread) = self.thread.take() {
            // What it panicked with has been printed.
            let _ = thread.join();
        }
    }
}

impl fmt::Debug for Lane {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Lane of rank {}", self.rank)
    }
}
