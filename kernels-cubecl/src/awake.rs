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
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
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
    watch: Option<Arc<Watch>>,
    /// It belongs to the thread that asked for it.
    on_this_thread: PhantomData<*const ()>,
}

#[derive(Debug, Default)]
struct Watch {
    /// Threads that have begun to wait.
    waiting: AtomicUsize,
    over: AtomicBool,
}

/// How long the other threads are waited for: some times what waking one takes.
const PATIENCE: Duration = Duration::from_micros(500);

/// Keeps the threads of the pool awake, for the length of a step, at the price of their processors' time in between.
///
/// Does nothing if `device` is none of the CPU, on a thread that is not of the pool, where there is no other, where it
/// has been called already, and if the other threads are busy.
/// What is computed meanwhile must not wait for other work of the same pool: a thread may take that up in between.
pub fn awake(device: &Device) -> Awake {
    let threads = rayon::current_num_threads();
    let of_pool = is_flex(device) && rayon::current_thread_index().is_some() && threads > 1;
    let mut awake = Awake {
        watch: None,
        on_this_thread: PhantomData,
    };
    if of_pool && !LEADS.replace(true) {
        let watch = Arc::<Watch>::default();
        awake.watch = Some(watch.clone());
        rayon::spawn_broadcast({
            let watch = watch.clone();
            move |_| wait(&watch)
        });
        // A thread that begins later may do so amid its part of this thread's work, which would then never end.
        let asked = Instant::now();
        while watch.waiting.load(Ordering::Relaxed) < threads - 1 {
            if asked.elapsed() > PATIENCE {
                awake.end();
                break;
            }
            thread::yield_now();
        }
    }
    awake
}

impl Awake {
    fn end(&mut self) {
        if let Some(watch) = self.watch.take() {
            watch.over.store(true, Ordering::Relaxed);
            LEADS.set(false);
        }
    }
}

impl Drop for Awake {
    fn drop(&mut self) {
        self.end();
    }
}

/// Does what work there is until it is over.
fn wait(watch: &Watch) {
    /// How often work is looked for before others get the processor.
    const LOOKS: usize = 16;
    watch.waiting.fetch_add(1, Ordering::Relaxed);
    let goes_on = || !watch.over.load(Ordering::Relaxed) && !LEADS.get();
    while goes_on() {
        for _ in 0..LOOKS {
            if goes_on() && rayon::yield_now() == Some(rayon::Yield::Idle) {
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
        /// Once in some thousand steps a thread would begin to wait within the work of a step, if it could.
        const STEPS: usize = 10_000;
        let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build();
        let total: usize = pool.expect("threads").install(|| {
            (0..STEPS)
                .map(|_| {
                    let outer = awake(&Device::flex());
                    let nested = awake(&Device::flex());
                    assert!(outer.watch.is_none() || nested.watch.is_none());
                    drop(nested);
                    (0..1000usize)
                        .into_par_iter()
                        .filter(|n| n % 2 == 0)
                        .count()
                })
                .sum()
        });
        assert_eq!(total, STEPS * 500);
    }

    #[test]
    fn a_thread_outside_has_none() {
        assert!(awake(&Device::flex()).watch.is_none());
    }
}
