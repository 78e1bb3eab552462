//! Whether this process is one of several that `mpirun` or a scheduler has started to train together.

use std::env;

use anyhow::bail;

/// Refuses to be one of several processes, which would all do the same: ranks are threads of one process.
pub(crate) fn alone() -> anyhow::Result<()> {
    let sizes = ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE"].into_iter();
    let mut sizes = sizes.filter_map(|name| env::var(name).ok()?.parse().ok());
    let launched: usize = sizes.next().unwrap_or(1);
    if launched > 1 {
        bail!(
            "started as one of {launched} processes; ranks are threads of one process, to be started without mpirun"
        );
    }
    Ok(())
}
