//! The Ensign server: everything behind the `ensign` command.

pub mod admin;
pub mod authority;
pub mod bench;
pub mod catalog;
pub mod cli;
pub mod config;
pub mod ensql;
pub mod files;
pub mod health;
pub mod identity;
pub mod partition;
pub mod peers;
pub mod rpc;
mod status;
pub mod telemetry;
