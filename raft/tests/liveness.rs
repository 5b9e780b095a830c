//! What a node knows of its peers' lives, over a network that can be cut.

mod common;

use std::collections::BTreeSet;

use common::{Cluster, within};
use ensign_proto::NodeId;
use ensign_raft::{Liveness, PeerState};

async fn becomes(liveness: &Liveness, node: NodeId, state: PeerState) {
    let mut changes = liveness.changes();
    within(&format!("news that node {node} is {state:?}"), async {
        while liveness.state(node) != state {
            changes.changed().await.expect("the runtime lives");
        }
    })
    .await;
}

fn incarnation(liveness: &Liveness, node: NodeId) -> u64 {
    liveness.peers().iter().find(|peer| peer.node == node).expect("it is watched").incarnation
}

#[tokio::test]
async fn a_node_that_is_cut_off_is_dead_until_it_answers_again() {
    let cluster = Cluster::start(3).await;
    let liveness = cluster.node(NodeId(1)).runtime.liveness();
    for node in [2, 3].map(NodeId) {
        becomes(&liveness, node, PeerState::Alive).await;
    }
    assert!(liveness.is_alive(NodeId(1)), "a node answers itself");
    cluster.net.isolate(NodeId(3));
    becomes(&liveness, NodeId(3), PeerState::Dead).await;
    assert!(liveness.is_alive(NodeId(2)));
    let there = cluster.node(NodeId(3)).runtime.liveness();
    becomes(&there, NodeId(1), PeerState::Dead).await;
    becomes(&there, NodeId(2), PeerState::Dead).await;
    let life = incarnation(&liveness, NodeId(3));
    cluster.net.heal();
    becomes(&liveness, NodeId(3), PeerState::Alive).await;
    assert_eq!(incarnation(&liveness, NodeId(3)), life, "it is the same life");
}

#[tokio::test]
async fn a_node_that_restarts_at_once_is_known_to_have_died() {
    let mut cluster = Cluster::start(3).await;
    let liveness = cluster.node(NodeId(1)).runtime.liveness();
    becomes(&liveness, NodeId(2), PeerState::Alive).await;
    let before = incarnation(&liveness, NodeId(2));
    let mut changes = liveness.changes();
    let log = cluster.crash(NodeId(2)).await;
    cluster.start_node(NodeId(2), log).await;
    within("another incarnation", async {
        while incarnation(&liveness, NodeId(2)) == before {
            changes.changed().await.expect("the runtime lives");
        }
    })
    .await;
    assert_eq!(incarnation(&liveness, NodeId(2)), cluster.lives);
}

#[tokio::test]
async fn a_peer_is_watched_while_a_group_or_the_node_names_it() {
    let cluster = Cluster::start(1).await;
    let runtime = &cluster.node(NodeId(1)).runtime;
    assert_eq!(runtime.liveness().peers(), []);
    assert_eq!(runtime.liveness().state(NodeId(9)), PeerState::Unknown, "nobody watches it");
    runtime.watch_peers(BTreeSet::from([NodeId(1), NodeId(7)]));
    becomes(&runtime.liveness(), NodeId(7), PeerState::Dead).await;
    runtime.watch_peers(BTreeSet::new());
    assert_eq!(runtime.liveness().peers(), []);
}
