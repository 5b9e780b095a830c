//! openraft's network on top of `Transport` pipes.
//!
//! ```text
//! Client ── call ──> Conn ── queue ──> frames ──> pipe ──> serve ──> the group's core
//!    ^                 ^                                      │
//!    └──── answer ─────┴── pump <── frames <── pipe <─────────┘
//! ```
//!
//! Each node opens two pipes to each peer, bulk and control, for all groups together; requests go out on the pipe that a
//! node opened, answers come back on it. What waits on a pipe is packed into one frame, so the heartbeats, votes and answers
//! of many groups share messages. Every call has its own deadline, and a pipe that stays silent while calls wait is given up.

mod client;
mod conn;
mod message;
mod serve;
mod sleeper;

pub(crate) use client::Factory;
pub(crate) use conn::{Broken, Peers};
pub(crate) use message::{Answer, NO_GROUP, Request};
pub(crate) use serve::{Local, serve};
pub(crate) use sleeper::{SLEEPERS_MAX, Sleeper, Verdict};

#[cfg(test)]
mod tests;
