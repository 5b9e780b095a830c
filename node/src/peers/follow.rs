//! Who the peers are follows the catalog.
//!
//! ```text
//! seeds (cluster.peers) ──────┐
//! last known (peers.json) ────┼─> entries ─> Peers::update: what is admitted, where it is called
//! node records (catalog) ─────┘
//! ```
//! What the catalog knows of a node wins; one that was removed is no peer, whoever names it. A seed that it does not list stays a peer: it
//! may be about to register for the first time. A seed's address is tried after the catalog's, so that a cluster whose nodes all moved
//! at once is found again. What was last known counts until the catalog can be read. So does the version of the cluster that peers must
//! speak.

use std::collections::{BTreeMap, BTreeSet};

use ensign_proto::NodeId;
use ensign_raft::env::Stop;

use super::memory::PeerMemory;
use super::{Life, PeerEntry, Peers};
use crate::catalog::View;
use crate::config::PeerAddress;

/// Keeps `peers` as the catalog has them, until `stop`. One task a node; what was remembered holds before it has begun.
pub fn follow(
    peers: Peers,
    seeds: Vec<PeerAddress>,
    view: View,
    mut memory: PeerMemory,
    stop: Stop,
) -> impl Future<Output = ()> {
    let mut last = known(&seeds, &view, &memory);
    apply(&peers, &last);
    async move {
        let mut changes = view.changes();
        loop {
            changes.mark_unchanged();
            peers.require(view.cluster_version());
            let now = known(&seeds, &view, &memory);
            if now != last {
                apply(&peers, &now);
                memory.keep(&now.0, &now.1);
                last = now;
            }
            if !matches!(stop.run_until_cancelled(changes.changed()).await, Some(Ok(()))) {
                return;
            }
        }
    }
}

type Known = (Vec<PeerEntry>, Vec<NodeId>);

fn apply(peers: &Peers, (entries, removed): &Known) {
    peers.remove(removed);
    peers.update(entries);
}

/// The peers that the catalog, the settings and the last life name together, and the nodes that are none any more.
fn known(seeds: &[PeerAddress], view: &View, memory: &PeerMemory) -> Known {
    let removed: BTreeSet<NodeId> = view.revoked_nodes().into_iter().chain(memory.removed()).collect();
    let mut entries: BTreeMap<NodeId, PeerEntry> = BTreeMap::new();
    for node in view.nodes() {
        let addresses = if node.peer.is_empty() { Vec::new() } else { vec![node.peer.clone()] };
        entries.insert(node.id, PeerEntry { id: node.id, addresses, life: Life::of(&node) });
    }
    for remembered in memory.peers() {
        match entries.get_mut(&remembered.id) {
            None => {
                entries.insert(remembered.id, remembered);
            }
            // The catalog is still on its way to what it was.
            Some(entry) if entry.life.map(|life| life.incarnation) < remembered.life.map(|life| life.incarnation) => {
                entry.life = remembered.life;
            }
            Some(_) => {}
        }
    }
    for seed in seeds {
        let entry = entries.entry(seed.id).or_insert_with(|| PeerEntry::from(seed));
        if !entry.addresses.contains(&seed.address) {
            entry.addresses.push(seed.address.clone());
        }
    }
    let peers = entries.into_values().filter(|entry| !removed.contains(&entry.id)).collect();
    (peers, removed.into_iter().collect())
}
