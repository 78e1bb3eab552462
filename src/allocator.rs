//! The allocator of the process: one that keeps what is freed.
//!
//! Tensors of megabytes come and go at every step. glibc returns them to the system when they are freed, and so does
//! mimalloc after 10 ms unless told otherwise; the page faults of getting them back cost half of a training step on
//! two cores.

use mimalloc::MiMalloc;

#[global_allocator]
static GLOBAL: MiMalloc = MiMalloc;

/// `mi_option_purge_delay` of mimalloc's C interface, which the bindings leave out.
const PURGE_DELAY: libmimalloc_sys::mi_option_t = 15;

/// Keeps freed memory for the next step. Once, before the first tensor.
pub(crate) fn keep_freed_memory() {
    // SAFETY: sets an integer option of the allocator, which may be done at any time.
    #[allow(unsafe_code, reason = "the option is reached through C only")]
    unsafe {
        libmimalloc_sys::mi_option_set(PURGE_DELAY, -1);
    }
}
