//! Several ranks train one model: who they are ([`mesh`]), how they talk ([`communicator`]) and over what ([`local`], with
//! the features `mpi` and `nccl` also processes and GPUs); where tokens go ([`routes`], [`expert_dispatch`]) and whose
//! parameters are whose ([`data_parallel`]).

pub mod communicator;
pub mod data_parallel;
pub mod expert_dispatch;
pub mod lane;
pub mod local;
pub mod mesh;
#[cfg(feature = "mpi")]
pub mod mpi;
#[cfg(feature = "nccl")]
pub mod nccl;
pub mod routes;
pub mod turns;
pub mod wire;

pub use communicator::{
    CommError, Communicator, Hop, Kind, Reduction, Traffic, Transfer, Values, Wait,
};
pub use data_parallel::{DataParallel, DataParallelError};
pub use expert_dispatch::ExpertDispatch;
pub use lane::{Lane, Pending};
pub use local::{Link, Local, LocalOptions};
pub use mesh::{ExpertPlacement, Group, Mesh, Place, Refused};
pub use turns::first_then_others;
pub use wire::{RowFormat, Wire};
