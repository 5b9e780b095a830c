//! Keeps one group's core alive: builds it from storage, watches it, and builds it again when it dies.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use ensign_proto::{ClusterVersion, LogIndex, NodeId, Term};
use ensign_storage::{Entry, EntryId, LogError};
use openraft::async_runtime::watch::WatchReceiver as _;
use openraft::{Config, ServerState, SnapshotPolicy};
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep};
use tracing::{info, warn};

use crate::apply::Applier;
use crate::codec;
use crate::config::{GroupSpec, Mode, RuntimeConfig};
use crate::errors::StartError;
use crate::group::Leadership;
use crate::metrics;
use crate::net::{Factory, Peers};
use crate::replica::Replica;
use crate::store::{self, Store};
use crate::sweep::rank;
use crate::ticks;
use crate::types::{Membership, Raft, RaftPayload};

const PAUSE_MIN: Duration = Duration::from_millis(100);
const PAUSE_MAX: Duration = Duration::from_secs(30);
/// A core that ran this long is taken to be sound again.
const SOUND_AFTER: Duration = Duration::from_mins(1);

/// openraft's settings; the reasons are in docs/adr.
fn settings(config: &RuntimeConfig, group: &GroupSpec, version: ClusterVersion) -> Result<Config, StartError> {
    let millis = |duration: Duration| duration.as_millis() as u64;
    let timing = config.timing.of(group.id, version);
    let swept = ticks::swept(config, group.id, version).is_some();
    let settings = Config {
        cluster_name: format!("group {}", group.id),
        heartbeat_interval: millis(timing.heartbeat),
        // Less than the interval of those that the sweep has beat: it comes by a little sooner or later.
        heartbeat_min_interval: Some(millis(if swept { timing.heartbeat * 3 / 4 } else { timing.heartbeat })),
        election_timeout_min: millis(timing.election_min),
        election_timeout_max: millis(timing.election_max),
        install_snapshot_timeout: 60_000,
        // Bytes bound a message (`Limits::append`), not a count of entries.
        max_payload_entries: 4096,
        // Whether a follower needs a snapshot is decided by what was purged, never by how far it is behind.
        replication_lag_threshold: u64::MAX,
        snapshot_policy: SnapshotPolicy::Never,
        max_in_snapshot_log_to_keep: u64::MAX,
        api_channel_size: Some(4096),
        api_batch_capacity: 1024,
        api_batch_linger_ms: 0,
        enable_pre_vote: Some(true),
        // A core that may sleep starts asleep; who wakes it is in `nap` and `sweep`.
        enable_tick: config.quiesce_after.is_none(),
        // Restoring a leadership loses acknowledged entries when flushes are asynchronous: replication runs ahead of the
        // leader's own flush, so a leader that lost its tail could write something else under an id that followers hold.
        enable_leader_restore: Some(restore_leader(config)),
        ..Config::default()
    };
    settings.validate().map_err(|error| StartError::Invalid { what: error.to_string() })
}

#[cfg(not(feature = "planted-bugs"))]
fn restore_leader(_config: &RuntimeConfig) -> bool {
    false
}

#[cfg(feature = "planted-bugs")]
fn restore_leader(config: &RuntimeConfig) -> bool {
    config.planted_leader_restore
}

/// Runs the replica until it is stopped or fenced. `started` hears how the first start went.
pub(crate) async fn run(
    replica: Arc<Replica>,
    peers: Arc<Peers>,
    spec: GroupSpec,
    started: oneshot::Sender<Result<(), StartError>>,
) {
    let mut started = Some(started);
    let mut failures: u32 = 0;
    loop {
        let begun = Instant::now();
        let version = peers.version();
        match start_core(&replica, &peers, &spec, version).await {
            Ok(raft) => {
                replica.set_raft(Some(raft.clone()));
                replica.begin_nap(ticks::swept(&replica.config, spec.id, version));
                if let Some(started) = started.take() {
                    let _ = started.send(Ok(()));
                }
                open_elections(&replica, &raft, &spec).await;
                observe(&replica, &raft).await;
                let term = replica.leadership().borrow().term;
                replica.publish_leadership(Leadership { term, leader: None, ready: false });
                replica.set_raft(None);
                replica.end_nap();
                let _ = raft.shutdown().await;
            }
            Err(error) => {
                if let Some(started) = started.take() {
                    let _ = started.send(Err(error));
                    break;
                }
                warn!(group = %replica.id, %error, "a group cannot be re-created");
            }
        }
        if replica.stop.is_cancelled() || replica.fenced().is_some() {
            break;
        }
        failures = if begun.elapsed() >= SOUND_AFTER { 1 } else { failures.saturating_add(1) };
        replica.restarts.fetch_add(1, Ordering::Relaxed);
        metrics::restarted();
        let pause = PAUSE_MIN.saturating_mul(1 << failures.min(16).saturating_sub(1)).min(PAUSE_MAX);
        warn!(group = %replica.id, failures, ?pause, "a group's core died; it is re-created from storage");
        tokio::select! {
            () = sleep(pause) => {}
            () = replica.stop.cancelled() => break,
        }
    }
    if replica.fenced().is_none() {
        replica.put_checkpoint();
    }
    replica.ended.cancel();
}

async fn start_core(
    replica: &Arc<Replica>,
    peers: &Arc<Peers>,
    spec: &GroupSpec,
    version: ClusterVersion,
) -> Result<Raft, StartError> {
    let failed = |cause: String| StartError::Storage { group: spec.id, cause: cause.into() };
    let settings = Arc::new(settings(&replica.config, spec, version)?);
    let ready = if founds(replica, spec) {
        let first = first_entry(spec);
        // Whoever starts groups must not wait for room: what it does next may make some.
        match store::once(replica, move |log, done| log.append(vec![first.clone()], done)).await {
            Err(LogError::Full { cause }) => return Err(StartError::DiskFull { group: spec.id, cause }),
            done => done,
        }
    } else {
        // A core takes what it finds for durable. After a core's death the tail, or a vote, may still be on its way to the disk,
        // so let it arrive first: a truncation of nothing is a barrier. An empty log needs it too, for the vote's sake.
        let past = replica.log.state().last.map_or(LogIndex(0), |last| last.index.next());
        store::durable(replica, move |log, done| log.truncate(past, done)).await
    };
    ready.map_err(|error| failed(replica.storage_failed(&error).to_string()))?;
    let applier = Applier::take_over(Arc::clone(replica));
    applier.recover().await.map_err(|error| failed(replica.storage_failed(&error).to_string()))?;
    let factory = Factory::new(Arc::clone(peers), Arc::clone(replica));
    let store = Store::new(Arc::clone(replica));
    let node = replica.config.node.0;
    let raft = Raft::new(node, settings, factory, store, applier).await;
    raft.map_err(|fatal| failed(fatal.to_string()))
}

/// Whether this replica writes the group's first entry. One that has been here before and left has made promises.
fn founds(replica: &Replica, spec: &GroupSpec) -> bool {
    spec.mode == Mode::Found && replica.floor.is_none() && replica.log.state().last.is_none()
}

/// The entry that every log of the group begins with, the same wherever it is written: its first voters.
///
/// Every founder writes it, and does so before it votes. Did only one of them, and it died when the others had elected it and held
/// nothing yet, they would know of a term and of no voters: nobody could stand for election, nor found the group again.
fn first_entry(spec: &GroupSpec) -> Entry {
    let voters: BTreeSet<u64> = spec.voters.iter().map(|voter| voter.0).collect();
    let membership = Membership::new_with_defaults(vec![voters.clone()], voters);
    Entry {
        id: EntryId { term: Term(0), index: LogIndex(0) },
        payload: codec::stored(&RaftPayload::Membership(membership)),
    }
}

/// Has the first in turn stand for the group's first election at once. The others would stand later, see `sweep`.
async fn open_elections(replica: &Replica, raft: &Raft, spec: &GroupSpec) {
    // A core that has just started may not tell its vote yet.
    let first = spec.mode == Mode::Found && replica.log.state().vote.is_none();
    let voters: Vec<NodeId> = spec.voters.iter().copied().collect();
    if first && rank(spec.id, &voters, replica.config.node) == Some(0) {
        replica.stir();
        info!(group = %spec.id, "stands for the group's first election");
        // A core that has died is noticed where it is watched.
        let _ = raft.trigger().elect(false).await;
    }
}

/// Publishes who leads until the core ends or shall end.
async fn observe(replica: &Arc<Replica>, raft: &Raft) {
    let node = replica.config.node;
    let mut server = raft.server_metrics();
    let mut applied = replica.applied();
    loop {
        let (term, leader) = {
            let now = server.borrow_and_update();
            replica.note_members(&now.membership_config);
            // A leader that was removed and has stepped down goes on naming itself until it hears of another one.
            let leader = now.current_leader.filter(|leader| *leader != node.0 || now.state == ServerState::Leader);
            (now.vote.leader_id.term, leader)
        };
        let leads = leader == Some(node.0);
        let ready = leads && replica.progress().applied.is_some_and(|id| id.leader_id.term == term);
        let now = Leadership { term: Term(term), leader: leader.map(NodeId), ready };
        replica.publish_leadership(now);
        replica.observed(now);
        tokio::select! {
            biased;
            () = replica.stop.cancelled() => return,
            () = replica.fence.cancelled() => return,
            changed = server.changed() => {
                if changed.is_err() {
                    return;
                }
            }
            _ = applied.changed(), if leads && !ready => {}
        }
    }
}
