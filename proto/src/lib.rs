//! Ensign's wire contracts (`pb`) and the vocabulary that every crate shares.
//!
//! Nothing here does I/O or is async, and nothing here depends on another crate of the workspace.

mod ids;

pub use ids::*;
