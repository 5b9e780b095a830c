//! Agreement: openraft behind our own small face. No openraft type leaves this crate.

pub mod env;
