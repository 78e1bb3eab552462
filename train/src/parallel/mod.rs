//! Several ranks train one model: who they are ([`mesh`]), how they talk ([`communicator`]) and over what ([`local`]).

pub mod communicator;
pub mod local;
pub mod mesh;

pub use communicator::{CommError, Communicator, Hop, Kind, Reduction, Traffic, Transfer, Values};
pub use local::{Link, Local, LocalOptions};
pub use mesh::{ExpertPlacement, Group, Mesh, Place, Refused};
