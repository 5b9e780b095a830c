//! What a node takes from the world, as arguments: time, randomness, tasks and the network.
//!
//! One seed replays a cluster because nothing else in the workspace may ask for these (clippy refuses it).

mod clock;
mod rng;
mod tasks;
mod transport;

pub use clock::{BootTime, Clock, SystemClock, UnixNanos};
pub use rng::{OsRng, Rng, SeededRng};
pub use tasks::{Stop, Tasks};
pub use transport::{Lane, Pipe, Transport, TransportError};
