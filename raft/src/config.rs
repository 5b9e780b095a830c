//! Settings of the runtime and of one group.

use std::collections::BTreeSet;
use std::time::Duration;

use ensign_proto::{ByteCount, ClusterVersion, GroupId, NodeId};

use crate::errors::StartError;

/// How fast a cluster beats. One profile per cluster; election timeouts must exceed ten times the slowest voter's round trip.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timing {
    /// Between two heartbeats of a leader; also the deadline of one.
    pub heartbeat: Duration,
    /// The shortest silence after which a follower stands for election.
    pub election_min: Duration,
    /// The longest; it is also the leader's lease.
    pub election_max: Duration,
}

impl Timing {
    /// Nodes within one network.
    pub const LAN: Self = Self {
        heartbeat: Duration::from_millis(200),
        election_min: Duration::from_millis(600),
        election_max: Duration::from_millis(900),
    };
    /// Nodes across regions.
    pub const WAN: Self = Self {
        heartbeat: Duration::from_secs(1),
        election_min: Duration::from_secs(3),
        election_max: Duration::from_secs(5),
    };

    /// How a group beats. A node has thousands of partitions, and whether a leader's node lives is found out once for all of them
    /// ([`crate::liveness`]); their own heartbeats only renew the leader's lease, and find a leader that is lost on a living node.
    ///
    /// Nodes of the first version find a dead leader by its heartbeats alone, and take one that beats slowly for dead: while there may
    /// be any, groups stand for election slowly and beat as fast as those expect.
    pub(crate) fn of(self, group: GroupId, version: ClusterVersion) -> Self {
        if group < GroupId::FIRST_PARTITION {
            return self;
        }
        let slower = |factor: u32| self.heartbeat * factor <= PARTITION_HEARTBEAT_MAX;
        let factor = (2..=PARTITIONS_SLOWER).rev().find(|factor| slower(*factor)).unwrap_or(1);
        Self {
            heartbeat: if version < ClusterVersion::V2 { self.heartbeat } else { self.heartbeat * factor },
            election_min: self.election_min * factor,
            election_max: self.election_max * factor,
        }
    }

    pub(crate) fn check(&self) -> Result<(), StartError> {
        let sound = self.heartbeat >= Duration::from_millis(1)
            && self.election_min >= self.heartbeat * 5 / 2
            && self.election_min < self.election_max;
        sound.then_some(()).ok_or_else(|| StartError::Invalid {
            what: format!("{self:?}: elections need at least 2.5 heartbeats, and a minimum below their maximum"),
        })
    }
}

/// By how much partitions beat slower than catalog and vault, unless that takes them beyond the maximum.
const PARTITIONS_SLOWER: u32 = 5;
const PARTITION_HEARTBEAT_MAX: Duration = Duration::from_secs(1);

/// How long a group is idle before it sleeps, unless told otherwise.
const QUIESCE_AFTER: Duration = Duration::from_secs(2);

/// What keeps every queue and message bounded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// The largest payload of one proposal.
    pub proposal: ByteCount,
    /// Where one AppendEntries message stops taking entries; one entry always fits.
    pub append: ByteCount,
    /// Proposed bytes of one group whose outcome is open; more of them wait in `submit`.
    pub pending: ByteCount,
    /// Unanswered AppendEntries bytes to one peer, over all groups.
    pub in_flight: ByteCount,
    /// The largest snapshot that is sent or accepted.
    pub snapshot: ByteCount,
    /// Applied bytes after which a machine is asked for a checkpoint.
    pub checkpoint: ByteCount,
    /// Applied entries after which a machine is asked for a checkpoint.
    pub checkpoint_entries: u64,
    /// What this node sends a second to replicas that do not vote, over all groups; see `Runtime::limit_learners`.
    pub learners: ByteCount,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            proposal: ByteCount(8 << 20),
            append: ByteCount(1 << 20),
            pending: ByteCount(16 << 20),
            in_flight: ByteCount(16 << 20),
            snapshot: ByteCount(256 << 20),
            checkpoint: ByteCount(64 << 20),
            checkpoint_entries: 8192,
            learners: ByteCount(64 << 20),
        }
    }
}

/// Settings of a node's Raft runtime.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RuntimeConfig {
    /// This node.
    pub node: NodeId,
    /// Raised with each start of this node, so that peers can tell its lives apart.
    pub incarnation: u64,
    /// The cluster's profile.
    pub timing: Timing,
    /// Bounds.
    pub limits: Limits,
    /// How long nothing may be asked of a group before it sleeps, three heartbeats at least. `None`: groups never sleep.
    pub quiesce_after: Option<Duration>,
    /// Where a read that memory cannot answer goes.
    pub disk_reads: DiskReads,
    /// Plants the bug that `enable_leader_restore` is, for the simulation that must find it.
    #[cfg(feature = "planted-bugs")]
    pub planted_leader_restore: bool,
    /// Plants a follower that sleeps on when its leader's node has died.
    #[cfg(feature = "planted-bugs")]
    pub planted_deep_sleep: bool,
}

/// Where reads that may block on the disk run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DiskReads {
    /// On tokio's pool of blocking threads.
    #[default]
    Pool,
    /// On the spot: for logs in memory, and for simulations, which another thread would make unrepeatable.
    Inline,
}

impl RuntimeConfig {
    /// How long a group is idle before it sleeps: a follower learns with a heartbeat what is committed.
    pub(crate) fn idle_max(&self) -> Option<Duration> {
        self.quiesce_after.map(|after| after.max(self.timing.heartbeat * 3))
    }

    /// Default bounds, LAN timing.
    pub fn new(node: NodeId) -> Self {
        Self {
            node,
            incarnation: 0,
            timing: Timing::LAN,
            limits: Limits::default(),
            quiesce_after: Some(QUIESCE_AFTER),
            disk_reads: DiskReads::Pool,
            #[cfg(feature = "planted-bugs")]
            planted_leader_restore: false,
            #[cfg(feature = "planted-bugs")]
            planted_deep_sleep: false,
        }
    }
}

/// One group, as this node is to run it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GroupSpec {
    /// Its number, the same on every node.
    pub id: GroupId,
    /// Its first voters; ignored once the group has a stored membership, and by a [`Mode::Member`].
    pub voters: BTreeSet<NodeId>,
    /// What this node does with an empty log.
    pub mode: Mode,
}

/// What a replica may do while its log is empty. A log with a membership in it says all by itself, in either mode.
///
/// A group is founded once. Who founds it again, on a disk that was wiped or re-created, makes a second history under the
/// same number; so [`Mode::Found`] is only for a replica that is certain never to have held anything of this group before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Writes the group's first entry and may stand for election. Every first voter does, and all name the same voters.
    Found,
    /// Waits until a leader adds it, and never creates anything.
    Member,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn partitions_beat_slower_where_the_cluster_beats_fast() {
        let heartbeat = |timing: Timing, group| timing.of(group, ClusterVersion::V2).heartbeat;
        for (timing, partitions) in [(Timing::LAN, Duration::from_secs(1)), (Timing::WAN, Timing::WAN.heartbeat)] {
            assert_eq!(heartbeat(timing, GroupId::FIRST_PARTITION), partitions);
            assert_eq!(heartbeat(timing, GroupId::CATALOG), timing.heartbeat);
            assert_eq!(heartbeat(timing, GroupId::VAULT), timing.heartbeat);
            let mixed = timing.of(GroupId::FIRST_PARTITION, ClusterVersion::V1);
            assert_eq!(mixed.heartbeat, timing.heartbeat, "what a node of the first version waits for");
            for version in [ClusterVersion::V1, ClusterVersion::V2] {
                let partitions = timing.of(GroupId::FIRST_PARTITION, version);
                partitions.check().expect("as sound as the cluster's");
                assert_eq!(partitions.election_min, mixed.election_min, "nodes of both kinds of timing live together");
            }
        }
        let slow = Timing { heartbeat: Duration::from_millis(400), ..Timing::WAN };
        assert_eq!(heartbeat(slow, GroupId::FIRST_PARTITION), Duration::from_millis(800));
    }
}
