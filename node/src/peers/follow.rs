//! Who the peers are follows the catalog.
//!
//! ```text
//! seeds (cluster.peers) ─┐
//!                        ├─> entries ─> Peers::update: what is admitted, where it is called
//! NodeRecords (catalog) ─┘
//! ```
//! What the catalog knows of a node wins. A seed that it does not list stays a peer: it may be about to register for the first time.
//! A seed's address is tried after the catalog's, so that a cluster whose nodes all moved at once is found again.

use std::collections::BTreeMap;

use ensign_proto::NodeId;
use ensign_raft::env::Stop;

use super::{Life, PeerEntry, Peers};
use crate::catalog::View;
use crate::config::PeerAddress;

/// Keeps `peers` as the catalog has them, until `stop`. One task a node.
pub async fn follow(peers: Peers, seeds: Vec<PeerAddress>, view: View, stop: Stop) {
    let mut changes = view.changes();
    let mut last = Vec::new();
    loop {
        changes.mark_unchanged();
        let now = entries(&seeds, &view);
        if now != last {
            peers.update(&now);
            last = now;
        }
        if !matches!(stop.run_until_cancelled(changes.changed()).await, Some(Ok(()))) {
            return;
        }
    }
}

/// The peers that the catalog and the settings name together.
fn entries(seeds: &[PeerAddress], view: &View) -> Vec<PeerEntry> {
    let mut entries: BTreeMap<NodeId, PeerEntry> = BTreeMap::new();
    for node in view.nodes() {
        let addresses = if node.peer.is_empty() { Vec::new() } else { vec![node.peer.clone()] };
        let entry = PeerEntry { id: node.id, addresses, life: Life::of(&node) };
        entries.insert(node.id, entry);
    }
    for seed in seeds {
        let entry =
            entries.entry(seed.id).or_insert_with(|| PeerEntry { id: seed.id, addresses: Vec::new(), life: None });
        if !entry.addresses.contains(&seed.address) {
            entry.addresses.push(seed.address.clone());
        }
    }
    entries.into_values().collect()
}
