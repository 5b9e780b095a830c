//! Members come and go, in one process.

mod common;

use std::collections::BTreeSet;
use std::time::Duration;

use bytes::Bytes;
use common::{Cluster, GROUP, within};
use ensign_proto::{ByteCount, LogIndex, NodeId, Term};
use ensign_raft::testing::Journal;
use ensign_raft::{Group, GroupSpec, Members, MembershipError, Mode, ProposeError, StartError};
use ensign_storage::{EntryId, MemoryLog, NodeLog as _};

fn nodes<const N: usize>(ids: [u64; N]) -> BTreeSet<NodeId> {
    ids.map(NodeId).into()
}

async fn poll(what: &str, done: impl Fn() -> bool) {
    within(what, async {
        while !done() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
}

async fn leading(cluster: &Cluster) -> Group<Journal> {
    let leader = cluster.leader().await;
    cluster.node(leader).group.clone()
}

/// Does a change at whoever leads, again wherever and whenever it is told to.
async fn at_the_leader<F>(cluster: &Cluster, change: impl Fn(Group<Journal>) -> F)
where
    F: Future<Output = Result<(), MembershipError>>,
{
    within("a change of members", async {
        loop {
            match change(leading(cluster).await).await {
                Ok(()) => return,
                // What is not known is looked at again: on a loaded machine a leader may lose its lead over a change.
                Err(
                    MembershipError::NotLeader { .. }
                    | MembershipError::InProgress
                    | MembershipError::Behind { .. }
                    | MembershipError::OutcomeUnknown,
                ) => tokio::time::sleep(Duration::from_millis(5)).await,
                Err(error) => panic!("{error}"),
            }
        }
    })
    .await;
}

async fn add(cluster: &Cluster, node: u64) {
    at_the_leader(cluster, |group| async move { group.add_learner(NodeId(node)).await }).await;
}

/// Also where an attempt before this one was cut short.
async fn change<const M: usize, const N: usize>(cluster: &Cluster, from: [u64; M], to: [u64; N]) {
    at_the_leader(cluster, |group| async move {
        let now = group.members().voters;
        assert!(now == nodes(from) || now == nodes(to), "{now:?}");
        group.change_voters(&now, nodes(to)).await
    })
    .await;
}

#[tokio::test]
async fn a_lost_voter_is_replaced_by_a_node_that_was_never_there() {
    let mut cluster = Cluster::start(3).await;
    cluster.propose("a").await;
    let lost = (cluster.leader().await.0 % 3) + 1;
    cluster.crash(NodeId(lost)).await;
    cluster.propose("b").await;
    cluster.start_node(NodeId(4), MemoryLog::new()).await;
    add(&cluster, 4).await;
    let stay: Vec<_> = (1..=3).filter(|id| *id != lost).collect();
    change(&cluster, [1, 2, 3], [stay[0], stay[1], 4]).await;
    let index = cluster.propose("c").await;
    cluster.applied(NodeId(4), index).await;
    assert_eq!(cluster.journal(NodeId(4)), ["a", "b", "c"]);
    let expected = Members { voters: nodes([stay[0], stay[1], 4]), ..Members::default() };
    assert_eq!(cluster.node(NodeId(4)).group.members(), expected, "the lost voter is gone, and no learner");
    // The new voter counts: with it, the group survives one of the old ones.
    cluster.crash(NodeId(stay[0])).await;
    cluster.propose("d").await;
}

#[tokio::test]
async fn a_learner_follows_without_a_vote_and_goes_again() {
    let mut cluster = Cluster::start(3).await;
    cluster.start_node(NodeId(4), MemoryLog::new()).await;
    assert_eq!(cluster.node(NodeId(4)).group.members(), Members::default(), "it waits to be added");
    add(&cluster, 4).await;
    add(&cluster, 4).await;
    let index = cluster.propose("a").await;
    cluster.applied(NodeId(4), index).await;
    let members = leading(&cluster).await.members();
    assert_eq!(members, Members { voters: nodes([1, 2, 3]), learners: nodes([4]), ..Members::default() });
    let refused = leading(&cluster).await.remove_learner(NodeId(1)).await;
    assert_eq!(refused, Err(MembershipError::IsVoter { node: NodeId(1) }));
    at_the_leader(&cluster, |group| async move { group.remove_learner(NodeId(4)).await }).await;
    at_the_leader(&cluster, |group| async move { group.remove_learner(NodeId(4)).await }).await;
    let index = cluster.propose("b").await;
    for id in [1, 2, 3].map(NodeId) {
        cluster.applied(id, index).await;
        assert!(!cluster.node(id).group.members().contains(NodeId(4)));
    }
    assert_eq!(cluster.journal(NodeId(4)), ["a"]);
}

#[tokio::test]
async fn a_leader_that_leaves_hands_over_first() {
    let mut cluster = Cluster::start(3).await;
    cluster.propose("a").await;
    cluster.start_node(NodeId(4), MemoryLog::new()).await;
    add(&cluster, 4).await;
    let index = cluster.propose("b").await;
    cluster.applied(NodeId(4), index).await;
    let old = leading(&cluster).await;
    let leader = old.leadership().borrow().leader.unwrap();
    let stay: Vec<_> = (1..=3).filter(|id| *id != leader.0).collect();
    let to = nodes([stay[0], stay[1], 4]);
    let answer = within("an answer", old.change_voters(&nodes([1, 2, 3]), to.clone())).await;
    assert!(matches!(answer, Err(MembershipError::NotLeader { leader: Some(new) }) if to.contains(&new)), "{answer:?}");
    change(&cluster, [1, 2, 3], [stay[0], stay[1], 4]).await;
    cluster.propose("c").await;
    assert_ne!(cluster.leader().await, leader);
}

#[tokio::test]
async fn every_voter_can_be_replaced_at_once() {
    let mut cluster = Cluster::start(1).await;
    cluster.propose("a").await;
    for id in 2..=4 {
        cluster.start_node(NodeId(id), MemoryLog::new()).await;
        add(&cluster, id).await;
    }
    change(&cluster, [1], [2, 3, 4]).await;
    // Whoever leads by now: the old leader, for the moment that it still may, makes no further change.
    let answer = cluster.node(NodeId(1)).group.add_learner(NodeId(5)).await;
    assert!(matches!(answer, Err(MembershipError::NotLeader { .. })), "{answer:?}");
    let new = [2, 3, 4].map(NodeId);
    let leader = cluster.leader_among(&new).await;
    let group = &cluster.node(leader).group;
    within("a commit", async {
        while group.propose(None, Bytes::from_static(b"b")).await.is_err() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
    assert_eq!(group.members(), Members { voters: nodes([2, 3, 4]), ..Members::default() });
    let old = &cluster.node(NodeId(1)).group;
    poll("a step down", || !old.leadership().borrow().leads(NodeId(1))).await;
    assert!(matches!(old.propose(None, Bytes::new()).await, Err(ProposeError::NotLeader { .. })));
}

#[tokio::test]
async fn changes_that_make_no_sense_are_refused_with_a_reason() {
    let mut cluster = Cluster::start(3).await;
    cluster.propose("a").await;
    let leader = cluster.leader().await;
    let group = cluster.node(leader).group.clone();
    let from = nodes([1, 2, 3]);
    let outcome = group.change_voters(&from, BTreeSet::new()).await;
    assert_eq!(outcome, Err(MembershipError::NoVoters));
    let outcome = group.change_voters(&nodes([1, 2, 9]), nodes([1, 2])).await;
    assert_eq!(outcome, Err(MembershipError::Changed { voters: from.clone() }), "somebody else was faster");
    let outcome = group.change_voters(&from, nodes([1, 2, 3, 4])).await;
    assert_eq!(outcome, Err(MembershipError::LearnerMissing { node: NodeId(4) }));
    assert_eq!(group.change_voters(&from, from.clone()).await, Ok(()), "nothing to do");
    // A learner that nobody has ever reached.
    group.add_learner(NodeId(5)).await.unwrap();
    for _ in 0..80 {
        group.propose(None, Bytes::from_static(b"x")).await.unwrap();
    }
    let outcome = group.change_voters(&from, nodes([1, 2, 5])).await;
    assert!(
        matches!(outcome, Err(MembershipError::Behind { node: NodeId(5), missing }) if missing > 80),
        "{outcome:?}"
    );
    let follower = [1, 2, 3].map(NodeId).into_iter().find(|id| *id != leader).unwrap();
    let outcome = cluster.node(follower).group.add_learner(NodeId(4)).await;
    assert!(matches!(outcome, Err(MembershipError::NotLeader { .. })), "{outcome:?}");
    cluster.crash(leader).await;
    assert_eq!(group.add_learner(NodeId(4)).await, Err(MembershipError::Stopped));
}

#[tokio::test]
async fn one_change_at_a_time() {
    let cluster = Cluster::start(3).await;
    cluster.propose("a").await;
    let leader = cluster.leader().await;
    let group = cluster.node(leader).group.clone();
    // Without a majority the first one stays on its way.
    cluster.net.isolate(leader);
    let first = group.clone();
    let mut first = std::pin::pin!(first.add_learner(NodeId(4)));
    assert!(futures::poll!(&mut first).is_pending());
    let second = group.add_learner(NodeId(5)).await;
    assert_eq!(second, Err(MembershipError::InProgress));
    cluster.net.heal();
    // Whether it was committed after all is for the members to tell.
    let outcome = within("an outcome", first).await;
    assert!(matches!(outcome, Ok(()) | Err(MembershipError::OutcomeUnknown)), "{outcome:?}");
}

/// The logs of all founders begin alike, whoever of them lives and is elected first.
#[tokio::test]
async fn a_founder_holds_the_first_entry_before_it_hears_of_anyone() {
    let mut cluster = Cluster::start(0).await;
    let spec = GroupSpec { id: GROUP, voters: nodes([1, 2, 3]), mode: Mode::Found };
    cluster.start_node(NodeId(2), MemoryLog::new()).await;
    let node = cluster.node(NodeId(2));
    node.runtime.stop(GROUP).await;
    let log = MemoryLog::new();
    let group = node.runtime.start(spec, log.group(GROUP), Journal::default()).await.expect("it starts");
    let state = log.crash().group(GROUP).state();
    assert_eq!(state.last, Some(EntryId { term: Term(0), index: LogIndex(0) }));
    poll("membership", || group.members().voters == nodes([1, 2, 3])).await;
}

/// The first leader dies as soon as it is elected: the others have voted, and hold what they founded the group with and no more.
#[tokio::test]
async fn voters_that_have_only_founded_and_voted_elect_another_leader() {
    let mut cluster = Cluster::start(3).await;
    cluster.leader().await;
    let mut left = Vec::new();
    for node in [1, 2, 3].map(NodeId) {
        let log = cluster.crash(node).await.group(GROUP);
        let first = log.read(LogIndex(0)..LogIndex(1), ByteCount(u64::MAX)).expect("it is readable");
        left.push((node, first, log.state().vote.expect("it has voted")));
    }
    for (node, first, vote) in left.into_iter().skip(1) {
        let log = MemoryLog::new();
        log.group(GROUP).append(first, Box::new(|done| done.expect("durable")));
        log.group(GROUP).save_vote(vote, Box::new(|done| done.expect("durable")));
        cluster.start_node(node, log).await;
    }
    cluster.propose("a").await;
}

#[tokio::test]
async fn a_replica_that_waits_never_founds_the_group() {
    let mut cluster = Cluster::start(3).await;
    cluster.propose("a").await;
    cluster.start_node(NodeId(4), MemoryLog::new()).await;
    // Several times as long as any founder would have waited for its turn.
    cluster.propose("b").await;
    tokio::time::sleep(Duration::from_millis(1500)).await;
    let status = cluster.node(NodeId(4)).group.status();
    assert_eq!((status.last, status.leadership.term.0), (LogIndex(0), 0), "{status:?}");
    assert!(status.voters.is_empty());
    let spec = GroupSpec { id: ensign_proto::GroupId(17), voters: nodes([1, 2]), mode: Mode::Found };
    let log = MemoryLog::new().group(spec.id);
    let refused = cluster.node(NodeId(4)).runtime.start(spec, log, Journal::default()).await;
    assert!(matches!(refused, Err(StartError::Invalid { .. })), "a group is founded by its voters");
}

#[tokio::test]
async fn a_removed_voter_that_comes_back_disturbs_nobody() {
    let mut cluster = Cluster::start(3).await;
    cluster.propose("a").await;
    let leader = cluster.leader().await;
    let away = NodeId(leader.0 % 3 + 1);
    let log = cluster.crash(away).await;
    let stay: Vec<_> = (1..=3).filter(|id| *id != away.0).collect();
    change(&cluster, [1, 2, 3], [stay[0], stay[1]]).await;
    let group = leading(&cluster).await;
    let term = group.leadership().borrow().term;
    // It does not know that it was removed, and stands for election.
    cluster.start_node(away, log).await;
    poll("the stored membership", || cluster.node(away).group.members().votes(away)).await;
    for n in 0..30_u8 {
        group.propose(None, Bytes::from(vec![n])).await.unwrap();
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(group.leadership().borrow().term, term, "it made the others vote");
    // What it is not told it does not have.
    assert!(cluster.journal(away).len() <= 1);
}

#[tokio::test]
async fn a_learner_gets_what_was_purged_as_a_snapshot_and_the_rest_from_the_log() {
    let mut cluster = Cluster::start_with(3, Journal::with_checkpoints()).await;
    for payload in ["a", "b", "c", "d", "e", "f"] {
        cluster.propose(payload).await;
    }
    let group = leading(&cluster).await;
    let covered = group.compact(1).await.unwrap();
    poll("a purge", || group.status().purged >= LogIndex(covered.0 - 1)).await;
    cluster.propose("g").await;
    cluster.start_node(NodeId(4), MemoryLog::new()).await;
    add(&cluster, 4).await;
    let index = cluster.propose("h").await;
    cluster.applied(NodeId(4), index).await;
    assert_eq!(cluster.journal(NodeId(4)), ["a", "b", "c", "d", "e", "f", "g", "h"]);
    // It knows its group after a restart too.
    let log = cluster.crash(NodeId(4)).await;
    cluster.start_node(NodeId(4), log).await;
    poll("the stored membership", || cluster.node(NodeId(4)).group.members().learners == nodes([4])).await;
    let index = cluster.propose("i").await;
    cluster.applied(NodeId(4), index).await;
}

#[tokio::test]
async fn a_learner_catches_up_at_its_pace_while_voters_go_on_at_theirs() {
    let mut cluster = Cluster::start(3).await;
    let leader = cluster.leader().await;
    let node = cluster.node(leader);
    let group = node.group.clone();
    node.runtime.limit_learners(ByteCount(64 << 10));
    // 4 MiB: more than a minute at this rate.
    for n in 0..64_u8 {
        group.propose(None, Bytes::from(vec![n; 64 << 10])).await.unwrap();
    }
    cluster.start_node(NodeId(4), MemoryLog::new()).await;
    group.add_learner(NodeId(4)).await.unwrap();
    let learner = cluster.node(NodeId(4)).group.clone();
    poll("the first entries", || learner.status().last > LogIndex(0)).await;
    for n in 0..64_u8 {
        within("a commit", group.propose(None, Bytes::from(vec![n; 64 << 10]))).await.unwrap();
    }
    let (head, behind) = (group.status().last, learner.status().last);
    assert!(behind.0 + 64 < head.0, "{behind} of {head}: the learner was not slowed down");
    cluster.node(leader).runtime.limit_learners(ByteCount(1 << 30));
    poll("the learner's last entry", || learner.status().last >= head).await;
    let held = group.status().matched;
    assert!(held.contains_key(&NodeId(4)), "{held:?}");
    let _ = GROUP;
}
