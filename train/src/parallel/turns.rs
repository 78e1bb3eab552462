//! Work that one rank does for all, such as filling a cache that the others then read.

use std::{fmt::Display, sync::mpsc, thread, time::Duration};

use super::communicator::{CommError, Communicator};

/// How often the first rank says that it is still at work: far below any deadline.
const SIGN_OF_LIFE: Duration = Duration::from_millis(500);

/// Does `work` on the first rank, and when it is done there on the others. However long it takes, nobody gives up.
///
/// # Errors
/// As `work`; on the other ranks also what ended it on the first.
pub fn first_then_others<T: Send, E: Display + From<CommError> + Send>(
    world: &dyn Communicator,
    work: impl FnOnce() -> Result<T, E> + Send,
) -> Result<T, E> {
    if world.rank() > 0 {
        let mut said = Vec::new();
        while said.is_empty() {
            world.broadcast(0, &mut said)?;
        }
        let result = work();
        if let Err(error) = &result {
            world.abort(&error.to_string());
        }
        return result;
    }
    let (done, result) = mpsc::channel();
    thread::scope(|scope| {
        scope.spawn(move || {
            // If the other end is gone, so is the run.
            let _ = done.send(work());
        });
        loop {
            match result.recv_timeout(SIGN_OF_LIFE) {
                Ok(Ok(value)) => {
                    world.broadcast(0, &mut vec![1])?;
                    return Ok(value);
                }
                Ok(Err(error)) => {
                    world.abort(&error.to_string());
                    return Err(error);
                }
                Err(mpsc::RecvTimeoutError::Timeout) => world.broadcast(0, &mut Vec::new())?,
                Err(mpsc::RecvTimeoutError::Disconnected) => {
                    panic!("the work of the first rank has panicked")
                }
            }
        }
    })
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use crate::parallel::{LocalOptions, local};

    #[derive(Debug, thiserror::Error)]
    enum Failed {
        #[error("the disk is full")]
        Full,
        #[error(transparent)]
        Communication(#[from] CommError),
    }

    /// Longer than the deadline.
    const WORK: Duration = Duration::from_millis(1500);

    fn on_three(
        work: impl Fn(usize) -> Result<usize, Failed> + Sync,
    ) -> Vec<Result<usize, Failed>> {
        let options = LocalOptions {
            deadline: Duration::from_secs(1),
            ..LocalOptions::default()
        };
        local::run(&[0; 3], options, |rank| {
            first_then_others(&rank, || work(rank.rank()))
        })
    }

    #[test]
    fn others_begin_when_the_first_is_done() {
        let done = AtomicUsize::new(0);
        let results = on_three(|rank| {
            if rank == 0 {
                thread::sleep(WORK);
            }
            Ok(done.fetch_add(1, Ordering::SeqCst))
        });
        let order: Vec<usize> = results.into_iter().map(Result::unwrap).collect();
        assert_eq!(order[0], 0, "{order:?}");
    }

    #[test]
    fn a_failure_of_the_first_is_told() {
        let results = on_three(|rank| match rank {
            0 => Err(Failed::Full),
            _ => panic!("the first has failed"),
        });
        let text = |at: usize| results[at].as_ref().unwrap_err().to_string();
        assert_eq!(text(0), "the disk is full");
        assert_eq!(text(2), "rank 0 gave up: the disk is full");
    }
}
