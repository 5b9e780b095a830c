//! A replica that left its group and is asked back keeps its promises to those who slept meanwhile.
//!
//! ```text
//! 1 2 3        the first voters; the leader falls asleep, or is cut off
//! 2     4 5    those that took over, with one that stays; the third one leaves, and its log goes
//!   3 + 1      two of the first three: were the third one's promises gone with its log, these would be a majority
//! ```

mod common;

use std::collections::BTreeSet;
use std::time::Duration;

use bytes::Bytes;
use common::{Cluster, GROUP, within};
use ensign_proto::{NodeId, Term};
use ensign_raft::testing::QUICK;
use ensign_raft::{Leadership, MembershipError, ReadError};
use ensign_storage::{EntryId, MemoryLog, NodeLog as _};
use tokio::time::{sleep, timeout};

/// Between two tries of what a leader was not ready for.
const PAUSE: Duration = Duration::from_millis(5);

/// Who sleeps, who leaves, and the term in which the others took over.
struct Moved {
    cluster: Cluster,
    slept: NodeId,
    left: NodeId,
    term: Term,
}

impl Moved {
    fn leadership(&self, node: NodeId) -> Leadership {
        *self.cluster.node(node).group.leadership().borrow()
    }

    /// From now on nobody reaches anybody but these two each other.
    fn leave_alone(&self, a: NodeId, b: NodeId) {
        self.cluster.net.heal();
        for other in self.cluster.nodes.keys().filter(|node| ![a, b].contains(node)) {
            self.cluster.net.isolate(*other);
        }
    }

    /// All meet again: the replica that left is taken in once more, and nothing is missing.
    async fn meet(self) {
        let Self { cluster, slept, left, .. } = self;
        cluster.net.heal();
        let stay: Vec<NodeId> = cluster.nodes.keys().copied().filter(|node| ![slept, left].contains(node)).collect();
        change_voters(&cluster, &stay, &[stay[0], stay[1], left]).await;
        let committed = propose(&cluster, &[stay[0], stay[1], left], "c").await;
        cluster.applied(left, committed.index).await;
        let journal = cluster.journal(left);
        assert_eq!(&journal[..2], ["a", "b"]);
        assert!(!journal.contains(&"lost".to_owned()), "{journal:?}");
    }
}

/// Proposes at whoever leads of `electable` until it is committed.
async fn propose(cluster: &Cluster, electable: &[NodeId], payload: &'static str) -> EntryId {
    within("a commit", async {
        loop {
            let leader = cluster.leader_among(electable).await;
            match cluster.node(leader).group.propose(None, Bytes::from_static(payload.as_bytes())).await {
                Ok(committed) => return committed.id,
                Err(_) => sleep(PAUSE).await,
            }
        }
    })
    .await
}

/// Makes `to` the voters, with whoever leads of `electable`.
async fn change_voters(cluster: &Cluster, electable: &[NodeId], to: &[NodeId]) {
    let to: BTreeSet<NodeId> = to.iter().copied().collect();
    within("a change of voters", async {
        loop {
            let group = cluster.node(cluster.leader_among(electable).await).group.clone();
            let step = async {
                for new in to.difference(&group.members().voters) {
                    group.add_learner(*new).await?;
                }
                group.change_voters(&group.members().voters, to.clone()).await
            };
            match step.await {
                Ok(()) => return,
                Err(MembershipError::NoVoters | MembershipError::IsVoter { .. }) => panic!("not what was asked for"),
                Err(_) => sleep(PAUSE).await,
            }
        }
    })
    .await;
}

/// Moves the group away from two of its three voters: from its leader, which notices nothing, and from one that knows.
async fn moved(falls_asleep: impl AsyncFnOnce(&mut Cluster, NodeId)) -> Moved {
    let mut cluster = Cluster::start(3).await;
    cluster.propose("a").await;
    let slept = cluster.leader().await;
    falls_asleep(&mut cluster, slept).await;
    let others: Vec<NodeId> = (1..=3).map(NodeId).filter(|node| *node != slept).collect();
    let (stays, left) = (others[0], others[1]);
    for new in [4, 5].map(NodeId) {
        cluster.start_node(new, MemoryLog::new()).await;
    }
    if cluster.nodes.contains_key(&slept) {
        // The new ones are cut off from it, too.
        cluster.net.isolate(slept);
    }
    let heirs = [stays, NodeId(4), NodeId(5)];
    change_voters(&cluster, &[stays, left, NodeId(4), NodeId(5)], &heirs).await;
    let committed = propose(&cluster, &heirs, "b").await;
    cluster.leave(left).await;
    cluster.come_back(left).await;
    assert_eq!(cluster.node(left).log.group(GROUP).state().last, None, "its log is gone");
    Moved { cluster, slept, left, term: committed.term }
}

#[tokio::test]
async fn who_slept_gets_no_vote_from_a_replica_that_left_and_came_back() {
    let mut log = None;
    let mut moved = moved(async |cluster, leader| log = Some(cluster.crash(leader).await)).await;
    for node in moved.cluster.nodes.keys().filter(|node| **node != moved.left) {
        moved.cluster.net.isolate(*node);
    }
    let (slept, left) = (moved.slept, moved.left);
    moved.cluster.start_node(slept, log.expect("it fell asleep")).await;
    moved.leave_alone(slept, left);
    // It hears of the term, so it has asked.
    within("an answer", async {
        while moved.leadership(slept).term < moved.term {
            sleep(PAUSE).await;
        }
    })
    .await;
    let mut leadership = moved.cluster.node(slept).group.leadership();
    let leads = timeout(QUICK.election_max * 15, leadership.wait_for(|now| now.leads(slept))).await;
    assert!(leads.is_err(), "two of the first voters made a second history: {leads:?}");
    moved.meet().await;
}

#[tokio::test]
async fn a_deposed_leader_gets_nothing_committed_by_a_replica_that_left_and_came_back() {
    let moved = moved(async |cluster, leader| cluster.net.isolate(leader)).await;
    let (slept, left) = (moved.slept, moved.left);
    assert!(moved.leadership(slept).leads(slept), "it noticed nothing");
    moved.leave_alone(slept, left);
    let group = moved.cluster.node(slept).group.clone();
    let lost = async {
        let outcome = group.propose(None, Bytes::from_static(b"lost")).await;
        assert!(outcome.is_err(), "{outcome:?}");
        std::future::pending::<()>().await;
    };
    // What became of the entry may stay open; what must not is that it was deposed, and only the one that left can tell it so.
    let told = async {
        while moved.leadership(slept).term < moved.term {
            assert_ne!(moved.leadership(left).leader, Some(slept), "it follows a leader that it saw deposed");
            sleep(PAUSE).await;
        }
    };
    tokio::select! {
        () = lost => {}
        () = within("an answer", told) => {}
    }
    moved.meet().await;
}

#[tokio::test]
async fn a_deposed_leader_does_not_say_for_certain_who_belongs_to_its_group() {
    let moved = moved(async |cluster, leader| cluster.net.isolate(leader)).await;
    let group = moved.cluster.node(moved.slept).group.clone();
    assert!(
        moved.leadership(moved.slept).leads(moved.slept) && group.members().votes(moved.left),
        "it noticed nothing"
    );
    let alone = group.confirmed_members().await;
    assert!(matches!(alone, Err(ReadError::NoQuorum)), "{alone:?}");
    // Two of its three voters, by what it knows. The other one has left, and keeps its word.
    moved.leave_alone(moved.slept, moved.left);
    let with_another = group.confirmed_members().await;
    assert!(with_another.is_err(), "{with_another:?}");
    moved.meet().await;
}

#[tokio::test]
async fn a_leader_says_for_certain_who_belongs_to_its_group() {
    let cluster = Cluster::start(3).await;
    cluster.propose("a").await;
    let leader = cluster.leader().await;
    let members = cluster.node(leader).group.confirmed_members().await.expect("all are there");
    assert_eq!(members.voters, (1..=3).map(NodeId).collect());
    let follower = (1..=3).map(NodeId).find(|node| *node != leader).expect("there are three");
    let refused = cluster.node(follower).group.confirmed_members().await;
    assert!(matches!(refused, Err(ReadError::NotLeader { .. })), "{refused:?}");
}
