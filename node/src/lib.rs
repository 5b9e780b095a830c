//! The Ensign server: everything behind the `ensign` command.

pub mod catalog;
pub mod config;
pub mod files;
pub mod health;
pub mod telemetry;
