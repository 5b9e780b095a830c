//! The Ensign server: everything behind the `ensign` command.

pub mod authority;
pub mod catalog;
pub mod config;
pub mod files;
pub mod health;
pub mod identity;
pub mod peers;
pub mod telemetry;
