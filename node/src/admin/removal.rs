//! Whether a node can be removed: a drained one, which nothing needs any more, or by force one that does not come back.
//!
//! By force, a node goes that still holds replicas and votes. For each group it is then what it was before: a member that does not
//! answer. So nothing is lost that is not lost already, as long as a majority of the group answers without it: that majority agrees to who
//! belongs to the group from then on. Where there is none, only the disk of the node that is to go can prove what was acknowledged, and its
//! number never comes back; so that is refused, and whoever gives the data up says so for each topic, by destroying it.

use std::collections::{BTreeMap, BTreeSet};

use ensign_proto::{GroupId, NodeId};
use ensign_raft::{GroupStatus, Health, PeerState};
use tonic::Status;

use crate::catalog::NodeState;
use crate::placement::planner::{NodeFacts, TopicFacts};

/// The groups that span the cluster.
const COUNCILS: [(GroupId, &str); 2] = [(GroupId::CATALOG, "catalog"), (GroupId::VAULT, "vault")];
/// Names of topics that one sentence has.
const NAMES: usize = 3;

/// Some of these names, and how many more there are.
pub(super) fn some<T: AsRef<str>>(names: &[T]) -> String {
    let shown: Vec<&str> = names.iter().take(NAMES).map(AsRef::as_ref).collect();
    let more = names.len().saturating_sub(NAMES);
    if more == 0 { shown.join(", ") } else { format!("{} and {more} more", shown.join(", ")) }
}

/// A node that votes in the cluster's own groups cannot go: they would lose a vote, in the end their majority.
pub(super) fn check_votes(groups: &[GroupStatus], node: NodeId) -> Result<(), Status> {
    for (id, name) in COUNCILS {
        let voters = voters_of(groups, id, name)?;
        if voters.contains(&node) {
            return Err(Status::failed_precondition(format!(
                "node {node} is one of the {} voters of the {name}, which would lose a vote: a drained node's vote goes to another \
                 node first; if none can take it, add a node",
                voters.len()
            )));
        }
    }
    Ok(())
}

/// Who votes in one of the cluster's own groups, if this node knows.
fn voters_of<'a>(groups: &'a [GroupStatus], id: GroupId, name: &str) -> Result<&'a BTreeSet<NodeId>, Status> {
    let group = groups.iter().find(|group| group.id == id);
    // Without its core, a replica remembers only who voted first.
    if let Some(Health::Recovering | Health::Fenced { .. } | Health::Stopped) = group.map(|group| &group.health) {
        return Err(Status::failed_precondition(format!(
            "this node's replica of the {name} does not work and does not know who votes there: ask another node"
        )));
    }
    group.map(|group| &group.voters).filter(|voters| !voters.is_empty()).ok_or_else(|| {
        Status::failed_precondition(format!(
            "this node does not hold the {name} and does not know who votes there: ask a node that has the root key"
        ))
    })
}

/// What is looked at before a node is removed by force.
pub(super) struct Held<'a> {
    /// The groups of this node.
    pub(super) groups: &'a [GroupStatus],
    /// The names of the topics, and what is known of each.
    pub(super) topics: Vec<(String, TopicFacts)>,
    /// The nodes of the cluster.
    pub(super) nodes: BTreeMap<NodeId, NodeFacts>,
    /// Whether a node answers this one.
    pub(super) state: &'a dyn Fn(NodeId) -> PeerState,
}

impl Held<'_> {
    /// Whether the cluster can do without `node`, which does not answer.
    ///
    /// # Errors
    /// FAILED_PRECONDITION says why not, and what to do.
    pub(super) fn check(&self, node: NodeId) -> Result<(), Status> {
        let refuse = |why: String| Err(Status::failed_precondition(why));
        match (self.state)(node) {
            PeerState::Dead => {}
            PeerState::Alive => {
                return refuse(format!(
                    "node {node} answers: drain it (`ensign node drain {node} --wait`), then remove it. To remove it by force, stop its \
                     process first"
                ));
            }
            PeerState::Unknown => {
                return refuse(format!("it is not known yet whether node {node} answers: try again in a few seconds"));
            }
        }
        if !self.nodes.iter().any(|(other, facts)| *other != node && facts.state == NodeState::Active) {
            return refuse(format!(
                "no node but {node} is active: its replicas could go nowhere; add a node, or undrain one"
            ));
        }
        for (id, name) in COUNCILS {
            let voters = voters_of(self.groups, id, name)?;
            if voters.contains(&node) && !self.can_do_without(voters, node) {
                return refuse(format!(
                    "without node {node} no majority of the {} voters of the {name} answers: bring it back with its disk, or others of \
                     them",
                    voters.len()
                ));
            }
        }
        let needs = |set: &BTreeSet<NodeId>| set.contains(&node) && !self.can_do_without(set, node);
        let lost = |topic: &TopicFacts| needs(&topic.replicas) || topic.target.as_ref().is_some_and(needs);
        let lost: Vec<&String> = self.topics.iter().filter(|(_, facts)| lost(facts)).map(|(name, _)| name).collect();
        if lost.is_empty() {
            return Ok(());
        }
        let (replicas, these) = match lost.len() {
            1 => ("a replica of a partition that has".to_owned(), "that topic"),
            many => (format!("replicas of {many} partitions that have"), "those topics"),
        };
        refuse(format!(
            "node {node} has {replicas} no majority without it ({}): what was acknowledged there may be on its disk alone. Bring it back with its disk, then drain it. If the disk is lost for good, read what other nodes still have of it (`ensign subscribe NAME --from earliest`), destroy {these} (`ensign topic destroy \
             NAME`), then remove the node",
            some(&lost)
        ))
    }

    /// Whether a majority of these answers, not counting `node`.
    fn can_do_without(&self, members: &BTreeSet<NodeId>, node: NodeId) -> bool {
        let answers = |member: &&NodeId| {
            let removed = self.nodes.get(member).is_some_and(|facts| facts.state == NodeState::Removed);
            **member != node && !removed && (self.state)(**member) == PeerState::Alive
        };
        members.iter().filter(answers).count() * 2 > members.len()
    }
}

#[cfg(test)]
mod tests {
    use ensign_proto::{LogIndex, TopicId};
    use ensign_raft::Leadership;

    use crate::catalog::Placement;
    use crate::placement::planner::Pulse;

    use super::*;

    fn group(id: GroupId, voters: &[u64]) -> GroupStatus {
        let none = LogIndex(0);
        GroupStatus {
            id,
            health: Health::Running,
            leadership: Leadership::default(),
            last: none,
            committed: none,
            applied: none,
            snapshot: none,
            purged: none,
            voters: voters.iter().copied().map(NodeId).collect(),
            matched: BTreeMap::new(),
            restarts: 0,
            asleep: false,
        }
    }

    fn refused(groups: &[GroupStatus], node: u64) -> String {
        let status = check_votes(groups, NodeId(node)).expect_err("it has a vote");
        assert_eq!(status.code(), tonic::Code::FailedPrecondition);
        status.message().to_owned()
    }

    #[test]
    fn a_node_that_votes_in_the_catalog_or_the_vault_is_not_removed_and_the_reason_is_said() {
        // The vault may have other voters than the catalog: only some nodes hold the root key.
        let groups = [group(GroupId::CATALOG, &[1, 2, 3]), group(GroupId::VAULT, &[1, 2, 4])];
        let catalog = refused(&groups, 3);
        assert!(
            catalog.starts_with("node 3 is one of the 3 voters of the catalog, which would lose a vote"),
            "{catalog}"
        );
        let vault = refused(&groups, 4);
        assert!(vault.starts_with("node 4 is one of the 3 voters of the vault, which would lose a vote"), "{vault}");
        assert!(vault.contains("if none can take it, add a node"), "{vault}");
        assert!(check_votes(&groups, NodeId(5)).is_ok(), "it has no vote");
        // The last quorum.
        let last = [group(GroupId::CATALOG, &[1]), group(GroupId::VAULT, &[1])];
        assert!(refused(&last, 1).contains("one of the 1 voters of the catalog"));
    }

    #[test]
    fn a_node_that_does_not_know_who_votes_in_the_vault_removes_nobody() {
        let groups = [group(GroupId::CATALOG, &[1, 2, 3]), group(GroupId::VAULT, &[])];
        for groups in [&groups[..], &groups[..1]] {
            let unknown = refused(groups, 5);
            assert!(
                unknown.contains("does not hold the vault") && unknown.contains("ask a node that has the root key"),
                "{unknown}"
            );
        }
    }

    #[test]
    fn a_replica_that_does_not_work_is_not_believed_about_who_votes() {
        for health in [Health::Recovering, Health::Fenced { cause: "disk".into() }, Health::Stopped] {
            // What it names are those that voted first.
            let mut groups = [group(GroupId::CATALOG, &[1]), group(GroupId::VAULT, &[1])];
            groups[1].health = health;
            let unknown = refused(&groups, 3);
            assert!(unknown.contains("replica of the vault does not work"), "{unknown}");
            assert!(unknown.contains("ask another node"), "{unknown}");
        }
        let mut full = [group(GroupId::CATALOG, &[1, 2]), group(GroupId::VAULT, &[1, 2])];
        full[1].health = Health::DiskFull;
        assert!(check_votes(&full, NodeId(3)).is_ok(), "a full disk knows");
    }

    fn topic(name: &str, replicas: &[u64], target: &[u64]) -> (String, TopicFacts) {
        let ids = |numbers: &[u64]| numbers.iter().copied().map(NodeId).collect::<BTreeSet<_>>();
        let facts = TopicFacts {
            id: TopicId::from_bytes([1; 16]),
            group: GroupId::FIRST_PARTITION,
            replicas: ids(replicas),
            target: (!target.is_empty()).then(|| ids(target)),
            cancelled: false,
            placement: Placement::anywhere(replicas.len() as u32),
        };
        (name.to_owned(), facts)
    }

    /// Four nodes, of which `dead` do not answer, asked to do without node 3.
    fn forced(dead: &[u64], voters: &[u64], topics: Vec<(String, TopicFacts)>) -> Result<(), String> {
        let facts =
            || NodeFacts { region: String::new(), zone: String::new(), state: NodeState::Active, pulse: Pulse::Alive };
        let state = |node: NodeId| match node.0 {
            id if dead.contains(&id) => PeerState::Dead,
            9 => PeerState::Unknown,
            _ => PeerState::Alive,
        };
        let groups = [group(GroupId::CATALOG, voters), group(GroupId::VAULT, voters)];
        let nodes = (1..=4).map(|id| (NodeId(id), facts())).collect();
        let held = Held { groups: &groups, topics, nodes, state: &state };
        held.check(NodeId(3)).map_err(|status| {
            assert_eq!(status.code(), tonic::Code::FailedPrecondition);
            status.message().to_owned()
        })
    }

    #[test]
    fn a_dead_node_goes_by_force_where_every_group_has_a_majority_without_it() {
        let topics = || vec![topic("kept", &[1, 2, 3], &[]), topic("moving", &[1, 2, 3], &[1, 2, 4])];
        assert_eq!(forced(&[3], &[1, 2, 3], topics()), Ok(()));
        assert_eq!(forced(&[3, 4], &[1, 2, 3], vec![topic("elsewhere", &[4], &[])]), Ok(()), "it is not about node 4");
        let answers = forced(&[], &[1, 2, 3], topics()).unwrap_err();
        assert!(answers.starts_with("node 3 answers: drain it"), "{answers}");
    }

    #[test]
    fn a_node_that_was_not_heard_of_yet_is_not_taken_for_dead() {
        let (groups, state) = ([group(GroupId::CATALOG, &[1])], |_| PeerState::Unknown);
        let held = Held { groups: &groups, topics: Vec::new(), nodes: BTreeMap::new(), state: &state };
        assert!(held.check(NodeId(3)).unwrap_err().message().contains("not known yet whether node 3 answers"));
    }

    #[test]
    fn what_only_a_dead_node_can_prove_is_not_given_up_by_removing_it() {
        let topics = vec![
            topic("a", &[3], &[]),
            topic("b", &[2, 3], &[]),
            topic("c", &[1, 2, 4], &[3]),
            topic("d", &[3, 1], &[1]),
            topic("kept", &[1, 2, 3], &[]),
        ];
        let refused = forced(&[3], &[1, 2, 4], topics).unwrap_err();
        assert!(refused.contains("4 partitions that have no majority without it (a, b, c and 1 more)"), "{refused}");
        assert!(refused.contains("destroy those topics (`ensign topic destroy NAME`)"), "{refused}");
        let one = forced(&[2, 3], &[1], vec![topic("only", &[1, 2, 3], &[])]).unwrap_err();
        assert!(
            one.contains("a partition that has no majority without it (only)") && one.contains("destroy that topic"),
            "{one}"
        );
    }

    #[test]
    fn the_catalog_and_the_vault_keep_their_majority() {
        let refused = forced(&[2, 3], &[1, 2, 3], Vec::new()).unwrap_err();
        let expected = "without node 3 no majority of the 3 voters of the catalog answers: bring it back with its disk, or others of them";
        assert_eq!(refused, expected);
        assert!(forced(&[3], &[3], Vec::new()).is_err(), "the last voter");
        assert!(forced(&[3], &[1, 3], Vec::new()).is_err(), "one of two is no majority");
    }

    #[test]
    fn the_last_active_node_does_not_go() {
        let (groups, state) = ([group(GroupId::CATALOG, &[1]), group(GroupId::VAULT, &[1])], |_| PeerState::Dead);
        let held = Held { groups: &groups, topics: Vec::new(), nodes: BTreeMap::new(), state: &state };
        assert!(held.check(NodeId(3)).unwrap_err().message().contains("no node but 3 is active"));
    }

    #[test]
    fn many_names_are_cut() {
        assert_eq!(some(&["a"]), "a");
        assert_eq!(some(&["a", "b", "c"]), "a, b, c");
        assert_eq!(some(&["a", "b", "c", "d", "e"]), "a, b, c and 2 more");
    }
}
