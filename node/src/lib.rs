//! The Ensign server: everything behind the `ensign` command.

pub mod admin;
pub mod authority;
pub mod bench;
pub mod bootstrap;
pub mod catalog;
pub mod cli;
pub mod config;
pub mod dev;
mod door;
mod edge;
pub mod ensql;
pub mod files;
mod harden;
pub mod health;
pub mod identity;
pub mod node;
pub mod partition;
pub mod peers;
mod plant;
pub mod quota;
pub mod rpc;
pub mod serve;
mod signals;
mod status;
pub mod telemetry;
mod vault;
