//! Threads that wait for their next work without going to sleep.
//!
//! A training step on the CPU is some thousand operations, of which each hands a part to the pool's other threads and most
//! last less than a millisecond. A thread that sleeps between them comes too late to many.

use std::{
    cell::Cell,
    hint,
    marker::PhantomData,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
};

use burn::tensor::Device;

use crate::flex::is_flex;

thread_local! {
    /// Whether this thread computes what the others are awake for.
    static LEADS: Cell<bool> = const { Cell::new(false) };
}

/// While it is there, no thread of the pool sleeps.
#[derive(Debug)]
#[must_use = "threads may sleep again when it is dropped"]
pub struct Awake {
    /// `None` where nothing is to be done.
    over: Option<Arc<AtomicBool>>,
    /// It belongs to the thread that asked for it.
    on_this_thread: PhantomData<*const ()>,
}

/// Keeps the threads of the pool awake, for the length of a step, at the price of their processors' time in between.
///
/// Does nothing if `device` is none of the CPU, on a thread that is not of the pool, where there is no other, and where it
/// has been called already.
/// What is computed meanwhile must not wait for other work of the same pool: a thread may take that up in between.
pub fn awake(device: &Device) -> Awake {
    let threads = rayon::current_num_threads();
    let of_pool = is_flex(device) && rayon::current_thread_index().is_some() && threads > 1;
    let over = (of_pool && !LEADS.replace(true)).then(Arc::<AtomicBool>::default);
    if let Some(over) = over.clone() {
        rayon::spawn_broadcast(move |_| wait(&over));
    }
    Awake {
        over,
        on_this_thread: PhantomData,
    }
}

impl Drop for Awake {
    fn drop(&mut self) {
        if let Some(over) = &self.over {
            over.store(true, Ordering::Relaxed);
            LEADS.set(false);
        }
    }
}

/// Does what work there is until it is over.
fn wait(over: &AtomicBool) {
    /// How often work is looked for before others get the processor.
    const LOOKS: usize = 16;
    while !over.load(Ordering::Relaxed) && !LEADS.get() {
        for _ in 0..LOOKS {
            if rayon::yield_now() == Some(rayon::Yield::Idle) {
                hint::spin_loop();
            }
        }
        thread::yield_now();
    }
}

#[cfg(test)]
mod tests {
    use rayon::prelude::*;

    use super::*;

    /// Nested and again and again, with work on all threads in between; it would stand still if a thread that leads
    /// waited for itself.
    #[test]
    fn work_goes_on() {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build();
        let total: usize = pool.expect("threads").install(|| {
            (0..200)
                .map(|_| {
                    let _awake = awake(&Device::flex());
                    let nested = awake(&Device::flex());
                    assert!(nested.over.is_none());
                    drop(nested);
                    (0..1000usize)
                        .into_par_iter()
                        .filter(|n| n % 2 == 0)
                        .count()
                })
                .sum()
        });
        assert_eq!(total, 200 * 500);
    }

    #[test]
    fn a_thread_outside_has_none() {
        assert!(awake(&Device::flex()).over.is_none());
    }
}
