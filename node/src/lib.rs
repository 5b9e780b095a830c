//! The Ensign server: everything behind the `ensign` command.

pub mod config;
