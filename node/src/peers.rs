//! The other nodes of the cluster: two mutually authenticated connections to each, and what they may call here.
//!
//! ```text
//! raft pipes      bulk and control lane, one each way        transport.rs ── Peer.Pipe
//! catalog writes  forwarded to the leader                    propose.rs   ── Peer.Propose, Peer.ReadIndex
//! vault           leases, keys, secrets; surrenders back     vault.rs     ── Vault.Call, Keyholder.Surrender
//! publishes       forwarded by the data plane                (node::partition) ── Forward
//! ```
//!
//! A node is who its certificate says it is (tls.rs): names are `ensign-node-ID`, signed by the cluster's authority. Nothing is
//! called or answered before the gate (gate.rs) has seen a known peer of the same cluster. Who is known follows the catalog
//! (follow.rs); the settings name those to begin with.

mod channels;
mod ended;
mod follow;
mod gate;
mod memory;
mod propose;
mod server;
mod tls;
mod transport;
mod vault;

pub use channels::{PeerEntry, Peers};
pub use ended::Ended;
pub use follow::follow;
pub(crate) use gate::{CallingNode, is_refusal};
pub use gate::{Life, Membership, PeerChannel, Speaks};
pub use memory::PeerMemory;
pub use propose::LeaderLink;
pub use server::{HolderEndpoint, Services, VaultEndpoint, serve};
pub(crate) use tls::{JOIN_ALPN, PinnedAuthority};
pub use tls::{PeerTls, TlsError, node_name};
pub use transport::PipeTransport;
pub use vault::VaultCalls;

#[cfg(test)]
mod tests;
