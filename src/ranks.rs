//! The processes that `mpirun` or a scheduler has started to train together.

use std::{env, sync::Arc};

use deepburn_train::{
    config::{CommunicatorName, ParallelConfig},
    parallel::Communicator,
};

use crate::device::DeviceSpec;

/// All of them, as one of them sees them.
pub(crate) struct Processes {
    pub(crate) world: Arc<dyn Communicator>,
    // Dropped after what uses it.
    #[cfg(feature = "mpi")]
    _session: deepburn_train::parallel::mpi::Session,
}

/// Joins the others, if there are any. `device` is this process's.
///
/// # Errors
/// Several processes where this build has no MPI, or MPI does not start; NCCL where it cannot be.
pub(crate) fn join(
    parallel: &ParallelConfig,
    device: DeviceSpec,
) -> anyhow::Result<Option<Processes>> {
    let count = number(&["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"]);
    let nccl = parallel.communicator == CommunicatorName::Nccl;
    match (count, device) {
        (None | Some(1), _) if nccl => {
            anyhow::bail!("{NCCL}: needs processes, which mpirun or srun start")
        }
        (None | Some(1), _) => Ok(None),
        (Some(_), DeviceSpec::Cpu | DeviceSpec::Wgpu(_)) if nccl => {
            anyhow::bail!("{NCCL}: needs --device cuda, found {device}")
        }
        (Some(count), _) => Ok(Some(start(count, parallel, device)?)),
    }
}

const NCCL: &str = "parallel.communicator = \"nccl\"";

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
fn start(count: usize, parallel: &ParallelConfig, device: DeviceSpec) -> anyhow::Result<Processes> {
    use std::time::Duration;

    use deepburn_train::parallel::mpi::{self, MpiOptions};

    let deadline = Duration::from_secs(parallel.deadline);
    let nodes = None;
    let (session, world) = mpi::start(MpiOptions { deadline, nodes })?;
    if world.size() != count {
        anyhow::bail!(
            "started as one of {count} processes, of which MPI finds {}: the library that deepburn was built with is not the \
             launcher's",
            world.size()
        );
    }
    let world: Arc<dyn Communicator> = match (parallel.communicator, device) {
        (CommunicatorName::Mpi, _) => Arc::new(world),
        #[cfg(feature = "nccl")]
        (CommunicatorName::Nccl, DeviceSpec::Cuda(number)) => {
            use deepburn_train::parallel::nccl::Nccl;

            Arc::new(Nccl::new(Box::new(world), number.unwrap_or(0), deadline)?)
        }
        (CommunicatorName::Nccl, _) => {
            anyhow::bail!("{NCCL}: this build has no NCCL: build it with --features nccl")
        }
    };
    Ok(Processes {
        world,
        _session: session,
    })
}

#[cfg(not(feature = "mpi"))]
fn start(count: usize, _: &ParallelConfig, _: DeviceSpec) -> anyhow::Result<Processes> {
    anyhow::bail!(
        "started as one of {count} processes, and this build has no MPI: build it with --features mpi, or start it without \
         mpirun, when the ranks are threads of one process"
    )
}
