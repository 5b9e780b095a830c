//! Placement: which nodes hold a topic's replicas, and how replicas get from where they are to where they shall be.
//!
//! ```text
//! planner      facts ──▶ who shall hold what      pure; the same on every node that sees the same
//! controller   on the catalog's leader: plans, and writes the moves to the catalog
//! mover        on a partition's leader: learner ──▶ caught up ──▶ joint change ──▶ hand over ──▶ the move is over
//! ```
//! There is no call from the controller to a partition: the catalog says what shall be, a partition's leader compares it with
//! the group's membership and does the next step. Every step can be repeated, so whoever crashes, the next leader goes on.
//! Not here: the records and what a command may change (`catalog`), starting and stopping replicas (`partition`).

pub mod planner;

mod controller;
mod mover;
mod obstacle;
mod pace;
mod step;

pub use controller::control;
pub use mover::{Mover, MoverParts, Seat, Seats};
pub use obstacle::{Obstacle, ObstacleKind, obstacles};
pub use step::Seen;
