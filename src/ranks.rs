//! The processes that `mpirun` or a scheduler has started to train together.

use std::{env, sync::Arc, time::Duration};

use deepburn_train::parallel::Communicator;

/// All of them, as one of them sees them.
pub(crate) struct Processes {
    pub(crate) world: Arc<dyn Communicator>,
    // Dropped after what uses it.
    #[cfg(feature = "mpi")]
    _session: deepburn_train::parallel::mpi::Session,
}

/// Joins the others, if there are any. `deadline` is how long they wait for each other while nothing moves.
///
/// # Errors
/// Several processes where this build has no MPI, or MPI does not start.
pub(crate) fn join(deadline: Duration) -> anyhow::Result<Option<Processes>> {
    match number(&["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"]) {
        None | Some(1) => Ok(None),
        Some(count) => Ok(Some(start(count, deadline)?)),
    }
}

/// This process's number among those of its node.
pub(crate) fn local_rank() -> Option<usize> {
    number(&[
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "MPI_LOCALRANKID",
        "SLURM_LOCALID",
    ])
}

/// The first of the variables that is set.
fn number(names: &[&str]) -> Option<usize> {
    let mut values = names.iter().filter_map(|name| env::var(name).ok());
    values.find_map(|value| value.parse().ok())
}

#[cfg(feature = "mpi")]
fn start(count: usize, deadline: Duration) -> anyhow::Result<Processes> {
    use deepburn_train::parallel::mpi::{self, MpiOptions};

    let nodes = None;
    let (session, world) = mpi::start(MpiOptions { deadline, nodes })?;
    if world.size() != count {
        anyhow::bail!(
            "started as one of {count} processes, of which MPI finds {}: the library that deepburn was built with is not the \
             launcher's",
            world.size()
        );
    }
    Ok(Processes {
        world: Arc::new(world),
        _session: session,
    })
}

#[cfg(not(feature = "mpi"))]
fn start(count: usize, _: Duration) -> anyhow::Result<Processes> {
    anyhow::bail!(
        "started as one of {count} processes, and this build has no MPI: build it with --features mpi, or start it without \
         mpirun, when the ranks are threads of one process"
    )
}
