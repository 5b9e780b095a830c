//! Ensign's wire contracts (`pb`) and the vocabulary that every crate shares.
//!
//! Nothing here does I/O or is async, and nothing here depends on another crate of the workspace. `pb` types stop at
//! the edge: handlers and clients convert them, with the `TryFrom`s in [`convert`], into the vocabulary.

pub mod codec;

/// Generated from the files under `schema/`; a package `a.b.v1` is the module `pb::a::b::v1`.
#[allow(
    missing_docs,
    unreachable_pub,
    rustdoc::all,
    clippy::all,
    clippy::pedantic,
    clippy::allow_attributes_without_reason,
    clippy::disallowed_methods,
    reason = "generated code is not ours to style"
)]
pub mod pb {
    include!(concat!(env!("OUT_DIR"), "/tree.rs"));

    // `pb::vault::v1` for `pb::ensign::vault::v1`, and so on.
    pub use self::ensign::*;
}

/// The public API's file descriptors, for server reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/public.bin"));

mod batch;
pub mod convert;
mod ids;
mod permission;
mod place;
mod topic;
mod version;

pub use batch::*;
pub use ids::*;
pub use permission::*;
pub use place::*;
pub use topic::*;
pub use version::*;
