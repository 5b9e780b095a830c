//! The crate's metrics: names, units and help live here and nowhere else.

use metrics::{Unit, counter, describe_counter, describe_gauge, gauge};

const GROUPS_LED: &str = "ensign_raft_groups_led";
const RESTARTS: &str = "ensign_raft_group_restarts_total";
const FENCED: &str = "ensign_raft_groups_fenced_total";
const SENT: &str = "ensign_raft_peer_sent_bytes_total";
const COPIED: &str = "ensign_raft_learner_sent_bytes_total";
const CONNECTS: &str = "ensign_raft_peer_connects_total";
const BROKEN: &str = "ensign_raft_peer_pipes_broken_total";
const ALIVE: &str = "ensign_raft_peers_alive";
const DEATHS: &str = "ensign_raft_peer_deaths_total";
const ASLEEP: &str = "ensign_raft_groups_asleep";
const ELECTIONS: &str = "ensign_raft_elections_called_total";
const WON: &str = "ensign_raft_elections_won_total";

/// Tells the recorder what the names mean.
pub(crate) fn describe() {
    describe_gauge!(GROUPS_LED, "Raft groups that this node leads");
    describe_counter!(RESTARTS, "Replicas that were re-created from storage after a failure");
    describe_counter!(FENCED, "Replicas that were taken out of service after a storage or state machine failure");
    describe_counter!(SENT, Unit::Bytes, "Raft messages handed to the transport");
    describe_counter!(
        COPIED,
        Unit::Bytes,
        "Entries and snapshots sent to replicas that do not vote, which `storage.move_rate` limits"
    );
    describe_counter!(CONNECTS, "Pipes opened to peers");
    describe_counter!(BROKEN, "Pipes to or from peers that broke");
    describe_gauge!(ALIVE, "Peers that answer this node's pings");
    describe_counter!(DEATHS, "Peers that stopped answering, or came back as another incarnation");
    describe_gauge!(ASLEEP, "Replicas that sleep: idle, with their ticks off");
    describe_counter!(ELECTIONS, "Elections called because a leader's node died, or because nobody led a group");
    describe_counter!(WON, "Elections that this node won");
}

/// This node won or lost a leadership.
pub(crate) fn leadership_changed(led: bool, leads: bool) {
    if led != leads {
        gauge!(GROUPS_LED).increment(if leads { 1.0 } else { -1.0 });
        if leads {
            counter!(WON).increment(1);
        }
    }
}

/// A replica was re-created.
pub(crate) fn restarted() {
    counter!(RESTARTS).increment(1);
}

/// A replica was fenced.
pub(crate) fn fenced() {
    counter!(FENCED).increment(1);
}

/// Bytes went out to a peer.
pub(crate) fn sent(bytes: usize) {
    counter!(SENT).increment(bytes as u64);
}

/// Bytes of entries or snapshots go to a learner.
pub(crate) fn copied(bytes: u64) {
    counter!(COPIED).increment(bytes);
}

/// A pipe was opened.
pub(crate) fn connected() {
    counter!(CONNECTS).increment(1);
}

/// A pipe broke.
pub(crate) fn pipe_broken() {
    counter!(BROKEN).increment(1);
}

/// A replica fell asleep.
pub(crate) fn slept() {
    gauge!(ASLEEP).increment(1.0);
}

/// A replica that slept is awake, or gone.
pub(crate) fn woke() {
    gauge!(ASLEEP).decrement(1.0);
}

/// An election was called because a leader's node died, or nobody led.
pub(crate) fn election_called() {
    counter!(ELECTIONS).increment(1);
}

/// So many peers answer.
pub(crate) fn peers_alive(count: usize) {
    gauge!(ALIVE).set(count as f64);
}

/// A peer died, or restarted.
pub(crate) fn peer_died() {
    counter!(DEATHS).increment(1);
}
