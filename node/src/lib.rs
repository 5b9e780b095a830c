//! The Ensign server: everything behind the `ensign` command.

pub mod authority;
pub mod bench;
pub mod catalog;
pub mod cli;
pub mod config;
pub mod files;
pub mod health;
pub mod identity;
pub mod peers;
pub mod telemetry;
