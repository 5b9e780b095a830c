//! Three replicas in one process.

mod common;

use bytes::Bytes;
use common::{Cluster, GROUP, within};
use ensign_proto::{ByteCount, LogIndex, NodeId, Term};
use ensign_raft::testing::Journal;
use ensign_raft::{Health, ProposeError, ReadError};
use ensign_storage::LogError;
use futures::future::join_all;

#[tokio::test]
async fn a_committed_entry_reaches_every_replica() {
    let cluster = Cluster::start(3).await;
    let index = cluster.propose("a").await;
    for id in [1, 2, 3].map(NodeId) {
        cluster.applied(id, index).await;
        assert_eq!(cluster.journal(id), ["a"]);
    }
    let leader = cluster.leader().await;
    let status = cluster.node(leader).group.status();
    assert_eq!(status.health, Health::Running);
    assert_eq!(status.voters.len(), 3);
    assert_eq!(status.applied, index);
}

#[tokio::test]
async fn many_proposals_in_flight_keep_their_order() {
    let cluster = Cluster::start(3).await;
    let leader = cluster.leader().await;
    let group = &cluster.node(leader).group;
    let term = group.leadership().borrow().term;
    let mut pending = Vec::new();
    for n in 0..500_u32 {
        pending.push(group.submit(Some(term), Bytes::copy_from_slice(&n.to_be_bytes())).await.unwrap());
    }
    let outcomes = join_all(pending).await;
    let indexes: Vec<_> = outcomes.into_iter().map(|outcome| outcome.unwrap().id.index).collect();
    assert!(indexes.is_sorted());
    let numbers: Vec<_> = group.inspect(|journal| journal.entries.iter().map(|entry| entry.payload.clone()).collect());
    let expected: Vec<_> = (0..500_u32).map(|n| Bytes::copy_from_slice(&n.to_be_bytes())).collect();
    assert_eq!(numbers, expected);
}

#[tokio::test]
async fn a_leader_that_stops_is_replaced_and_comes_back_as_a_follower() {
    let mut cluster = Cluster::start(3).await;
    cluster.propose("a").await;
    let old = cluster.leader().await;
    let log = cluster.crash(old).await;
    let index = cluster.propose("b").await;
    let new = cluster.leader().await;
    assert_ne!(new, old);
    cluster.start_node(old, log).await;
    cluster.applied(old, index).await;
    assert_eq!(cluster.journal(old), ["a", "b"]);
}

#[tokio::test]
async fn a_deposed_leader_does_not_acknowledge() {
    let cluster = Cluster::start(3).await;
    cluster.propose("a").await;
    let old = cluster.leader().await;
    let group = &cluster.node(old).group;
    let term = group.leadership().borrow().term;
    cluster.net.isolate(old);
    let pending = group.submit(Some(term), Bytes::from_static(b"lost")).await.unwrap();
    let others: Vec<_> = [1, 2, 3].map(NodeId).into_iter().filter(|id| *id != old).collect();
    let new = cluster.leader_among(&others).await;
    let committed = cluster.node(new).group.propose(None, Bytes::from_static(b"b")).await.unwrap();
    cluster.net.heal();
    let outcome = within("an outcome", pending).await;
    assert!(matches!(outcome, Err(ProposeError::OutcomeUnknown)), "{outcome:?}");
    cluster.applied(old, committed.id.index).await;
    assert_eq!(cluster.journal(old), ["a", "b"]);
    // What was prepared in the old term lands nowhere.
    let late = cluster.node(new).group.propose(Some(term), Bytes::from_static(b"late")).await;
    assert!(matches!(late, Err(ProposeError::NotLeader { .. })), "{late:?}");
}

#[tokio::test]
async fn a_follower_says_who_leads() {
    let cluster = Cluster::start(3).await;
    let leader = cluster.leader().await;
    cluster.propose("a").await;
    let follower = [1, 2, 3].map(NodeId).into_iter().find(|id| *id != leader).unwrap();
    let group = &cluster.node(follower).group;
    within("the leader's name", async {
        group.leadership().wait_for(|now| now.leader == Some(leader)).await.map(|_| ())
    })
    .await
    .unwrap();
    let refused = group.propose(None, Bytes::from_static(b"x")).await;
    assert!(matches!(refused, Err(ProposeError::NotLeader { leader: Some(named) }) if named == leader), "{refused:?}");
    let refused = group.read_index().await;
    assert!(matches!(refused, Err(ReadError::NotLeader { leader: Some(named) }) if named == leader), "{refused:?}");
}

#[tokio::test]
async fn a_read_index_covers_what_was_committed_before_it() {
    let cluster = Cluster::start(3).await;
    let index = cluster.propose("a").await;
    let leader = cluster.leader().await;
    assert!(cluster.node(leader).group.read_index().await.unwrap() >= index);
    cluster.net.isolate(leader);
    let read = cluster.node(leader).group.read_index().await;
    assert!(matches!(read, Err(ReadError::NoQuorum | ReadError::NotLeader { .. })), "{read:?}");
}

#[tokio::test]
async fn leadership_moves_where_it_is_sent() {
    let cluster = Cluster::start(3).await;
    cluster.propose("a").await;
    let old = cluster.leader().await;
    let to = [1, 2, 3].map(NodeId).into_iter().find(|id| *id != old).unwrap();
    cluster.node(old).group.transfer_leader(to).await.unwrap();
    assert_eq!(cluster.leader().await, to);
    cluster.propose("b").await;
}

#[tokio::test]
async fn shutting_down_hands_leadership_over_first() {
    let mut cluster = Cluster::start(3).await;
    cluster.propose("a").await;
    let old = cluster.leader().await;
    let node = cluster.nodes.remove(&old).unwrap();
    node.runtime.shut_down(std::time::Duration::from_secs(5)).await;
    assert_eq!(node.group.status().health, Health::Stopped);
    assert!(matches!(node.group.propose(None, Bytes::new()).await, Err(ProposeError::Stopped)));
    cluster.propose("b").await;
}

#[tokio::test]
async fn a_node_that_hands_over_leads_nothing_and_runs_on() {
    let cluster = Cluster::start(3).await;
    cluster.propose("a").await;
    let old = cluster.leader().await;
    cluster.node(old).runtime.hand_over(std::time::Duration::from_secs(5)).await;
    let status = cluster.node(old).group.status();
    assert_eq!(status.health, Health::Running);
    assert!(!status.leadership.leads(old), "{status:?}");
    // It follows, and knows whom to send a proposal to.
    let refused = cluster.node(old).group.propose(None, Bytes::new()).await;
    assert!(matches!(refused, Err(ProposeError::NotLeader { leader: Some(new) }) if new != old), "{refused:?}");
    cluster.propose("b").await;
    // Once more is no harm, where there is nothing to hand over.
    cluster.node(old).runtime.hand_over(std::time::Duration::from_secs(5)).await;
}

#[tokio::test]
async fn a_replica_that_misses_what_was_purged_gets_the_snapshot() {
    let mut cluster = Cluster::start(3).await;
    cluster.propose("a").await;
    let leader = cluster.leader().await;
    let behind = [1, 2, 3].map(NodeId).into_iter().find(|id| *id != leader).unwrap();
    let log = cluster.crash(behind).await;
    for payload in ["b", "c", "d", "e", "f", "g"] {
        cluster.propose(payload).await;
    }
    let leader = cluster.leader().await;
    let group = &cluster.node(leader).group;
    let covered = group.compact(2).await.unwrap();
    within("a purge", async {
        while group.status().purged < LogIndex(covered.0 - 2) {
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
    })
    .await;
    let refused = group.read_log(LogIndex(0)..LogIndex(3), ByteCount(1000)).await;
    assert!(matches!(refused, Err(ReadError::Purged { .. })), "{refused:?}");
    cluster.start_node(behind, log).await;
    let index = cluster.propose("h").await;
    cluster.applied(behind, index).await;
    assert_eq!(cluster.journal(behind), ["a", "b", "c", "d", "e", "f", "g", "h"]);
    assert!(cluster.node(behind).group.status().snapshot >= covered);
    // And it survives a restart from that snapshot.
    let log = cluster.crash(behind).await;
    cluster.start_node(behind, log).await;
    cluster.applied(behind, index).await;
    assert_eq!(cluster.journal(behind).len(), 8);
}

#[tokio::test]
async fn a_snapshot_of_many_parts_arrives_whole() {
    let mut cluster = Cluster::start(3).await;
    let leader = cluster.leader().await;
    let behind = [1, 2, 3].map(NodeId).into_iter().find(|id| *id != leader).unwrap();
    let log = cluster.crash(behind).await;
    let leader = cluster.leader().await;
    let group = cluster.node(leader).group.clone();
    let mut last = LogIndex(0);
    for n in 0..5 {
        last = group.propose(None, Bytes::from(vec![n; 700_000])).await.unwrap().id.index;
    }
    group.compact(0).await.unwrap();
    cluster.start_node(behind, log).await;
    cluster.applied(behind, last).await;
    let sizes: Vec<_> =
        cluster.node(behind).group.inspect(|journal| journal.entries.iter().map(|e| e.payload.len()).collect());
    assert_eq!(sizes, [700_000; 5]);
}

#[tokio::test]
async fn a_restart_replays_only_what_follows_the_checkpoint() {
    let mut cluster = Cluster::start_with(1, Journal::with_checkpoints()).await;
    for payload in ["a", "b", "c"] {
        cluster.propose(payload).await;
    }
    let node = cluster.nodes.remove(&NodeId(1)).unwrap();
    node.runtime.stop(GROUP).await;
    // The checkpoint of an orderly stop rides in the next commit.
    node.log.flush();
    cluster.net.detach(NodeId(1));
    cluster.start_node(NodeId(1), node.log).await;
    let index = cluster.propose("d").await;
    cluster.applied(NodeId(1), index).await;
    assert_eq!(cluster.journal(NodeId(1)), ["a", "b", "c", "d"]);
}

#[tokio::test]
async fn the_log_reads_back_without_rafts_own_entries() {
    let cluster = Cluster::start(3).await;
    cluster.propose("a").await;
    let last = cluster.propose("b").await;
    let leader = cluster.leader().await;
    let group = &cluster.node(leader).group;
    let all = group.read_log(LogIndex(0)..LogIndex(u64::MAX), ByteCount(1000)).await.unwrap();
    assert_eq!(all.iter().map(|entry| &entry.payload[..]).collect::<Vec<_>>(), [b"a", b"b"]);
    assert_eq!(all[1].id.index, last);
    let one = group.read_log(LogIndex(0)..LogIndex(u64::MAX), ByteCount(1)).await.unwrap();
    assert_eq!(one.len(), 1);
    assert!(group.read_log(last.next()..LogIndex(u64::MAX), ByteCount(1000)).await.unwrap().is_empty());
}

#[tokio::test]
async fn a_payload_above_the_limit_is_refused() {
    let cluster = Cluster::start(1).await;
    let leader = cluster.leader().await;
    let outcome = cluster.node(leader).group.propose(None, Bytes::from(vec![0; (8 << 20) + 1])).await;
    assert!(matches!(outcome, Err(ProposeError::TooLarge { .. })), "{outcome:?}");
}

#[tokio::test]
async fn a_full_disk_refuses_proposals_and_heals() {
    let cluster = Cluster::start(1).await;
    cluster.propose("a").await;
    let node = cluster.node(NodeId(1));
    node.log.fail(Some(LogError::Full { cause: "no space left".into() }));
    let waiting = node.group.submit(None, Bytes::from_static(b"b")).await.unwrap();
    within("a full disk", async {
        while node.group.status().health != Health::DiskFull {
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
    })
    .await;
    let refused = node.group.propose(None, Bytes::from_static(b"c")).await;
    assert!(matches!(refused, Err(ProposeError::DiskFull)), "{refused:?}");
    node.log.fail(None);
    within("the held proposal", waiting).await.unwrap();
    assert_eq!(node.group.status().health, Health::Running);
    cluster.propose("d").await;
    assert_eq!(cluster.journal(NodeId(1)), ["a", "b", "d"]);
}

#[tokio::test]
async fn a_failed_write_fences_the_replica_and_another_leads() {
    let cluster = Cluster::start(3).await;
    cluster.propose("a").await;
    let leader = cluster.leader().await;
    let node = cluster.node(leader);
    node.log.fail(Some(LogError::Fenced { cause: "fsync failed".into() }));
    let _ = within("an answer", node.group.propose(None, Bytes::from_static(b"b"))).await;
    within("a fence", async {
        while !matches!(node.group.status().health, Health::Fenced { .. }) {
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
    })
    .await;
    let refused = node.group.propose(None, Bytes::from_static(b"c")).await;
    assert!(matches!(refused, Err(ProposeError::Fenced { .. })), "{refused:?}");
    let others: Vec<_> = [1, 2, 3].map(NodeId).into_iter().filter(|id| *id != leader).collect();
    let new = cluster.leader_among(&others).await;
    cluster.node(new).group.propose(None, Bytes::from_static(b"d")).await.unwrap();
    assert!(cluster.node(new).group.leadership().borrow().term > Term(1));
}

#[tokio::test]
async fn a_replica_whose_disk_is_full_still_stops() {
    let cluster = Cluster::start(1).await;
    cluster.propose("a").await;
    let node = cluster.node(NodeId(1));
    node.log.fail(Some(LogError::Full { cause: "no space left".into() }));
    let waiting = node.group.submit(None, Bytes::from_static(b"b")).await.unwrap();
    within("a full disk", async {
        while node.group.status().health != Health::DiskFull {
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
    })
    .await;
    within("a stop", node.runtime.stop(GROUP)).await;
    let outcome = within("an outcome", waiting).await;
    assert!(matches!(outcome, Err(ProposeError::OutcomeUnknown)), "{outcome:?}");
}
