//! Changing the catalog, from any node. What can be changed is in the files beside, by kind of record.

mod nodes;
mod tenants;
mod topics;

use std::collections::BTreeSet;
use std::fmt;
use std::ops::Deref;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use ensign_proto::{ApiKeyId, ClusterVersion, GroupId, LogIndex, NodeId, ProjectId, TopicId};
use ensign_raft::env::{Clock, Rng, Stop};
use ensign_raft::{ProposeError, ReadError};
use ensign_storage::EntryId;
use futures::future::BoxFuture;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tracing::warn;

use super::command::{Command, Outcome, Refusal};
use super::errors::{RefreshError, WriteFailure};
use super::freshness::Freshness;
use super::link::{Custody, Liveness, ProposeLink, ProposeLinkError, Replica, VaultWrites};
use super::moves::NodeState;
use super::records::{NodeRecord, Topic};
use super::view::View;
use super::wire;

/// How many topics a cluster takes: each is a Raft group on every node.
pub(super) const TOPICS_MAX: usize = 10_000;
/// How long a change may take, failover included, before its caller hears that it did not happen (or that nobody knows).
const DEADLINE: Duration = Duration::from_secs(15);
/// How often a majority is asked whether this node's view is complete, and how often streams hear what became of it.
const CONFIRM_EVERY: Duration = Duration::from_secs(1);
const LOOK_EVERY: Duration = Duration::from_millis(200);
const BACK_OFF_MIN: Duration = Duration::from_millis(20);
const BACK_OFF_MAX: Duration = Duration::from_millis(500);
/// Vault calls in flight while custody is put right.
pub(super) const VAULT_CALLS_MAX: usize = 16;
/// Applied entries between two snapshots, and how many stay in the log for followers that are a little behind.
const COMPACT_EVERY: u64 = 4096;
const COMPACT_KEEP: u64 = 1024;

/// What a [`Catalog`] is made of.
pub struct CatalogParts {
    /// This node.
    pub me: NodeId,
    /// The nodes that the settings name: the founders, until the catalog says who they were.
    pub founders: BTreeSet<NodeId>,
    /// Its replica of the catalog's group.
    pub replica: Arc<dyn Replica>,
    /// The view of the same replica's machine.
    pub view: View,
    /// The way to the leader.
    pub link: Arc<dyn ProposeLink>,
    /// The vault.
    pub vault: Arc<dyn VaultWrites>,
    /// How long this node vouches for its view after a majority confirmed it: at most the lease of keys.
    pub fresh_for: Duration,
    /// Which nodes answer.
    pub liveness: Arc<dyn Liveness>,
    /// For how long a node must be silent before its replicas are made anew elsewhere.
    pub lost_after: Duration,
    /// For times.
    pub clock: Arc<dyn Clock>,
    /// For ids.
    pub rng: Arc<dyn Rng>,
}

/// Finds out which nodes keep the cluster from a version, or what else does, and what to do about it.
pub type WhyNotYet = dyn Fn(ClusterVersion) -> BoxFuture<'static, Option<String>> + Send + Sync;

/// As long as nobody can be asked.
const NOT_YET: &str = "run the new version of ensign on every node; `ensign cluster version` shows which are behind, or what else holds the \
                       cluster back";

/// The catalog on this node: everything a [`View`] reads, and changes. Clones are cheap and share it.
///
/// Dropping a change midway may or may not have carried it out. When a change returns, a majority holds it, and this node's
/// view shows it (unless this node's replica is stuck, which does not undo it).
#[derive(Clone)]
pub struct Catalog {
    pub(super) parts: Arc<CatalogParts>,
    freshness: Arc<Freshness>,
    why_not_yet: Arc<OnceLock<Arc<WhyNotYet>>>,
}

impl fmt::Debug for Catalog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Catalog").field("me", &self.parts.me).finish_non_exhaustive()
    }
}

impl Deref for Catalog {
    type Target = View;

    fn deref(&self) -> &View {
        &self.parts.view
    }
}

impl Catalog {
    /// The catalog of this node.
    pub fn new(parts: CatalogParts) -> Self {
        let freshness = Arc::new(Freshness::new(Arc::clone(&parts.clock), parts.fresh_for));
        Self { parts: Arc::new(parts), freshness, why_not_yet: Arc::default() }
    }

    /// From now on a change that the cluster's version does not allow is refused with what this answers. The first one stays.
    pub fn explain_not_yet(&self, why: Arc<WhyNotYet>) {
        let _ = self.why_not_yet.set(why);
    }

    /// The reading half.
    pub fn view(&self) -> &View {
        &self.parts.view
    }

    /// Who leads the catalog's group, as this node knows it.
    pub fn leadership(&self) -> ensign_raft::Leadership {
        *self.parts.replica.leadership().borrow()
    }

    /// Whether this node leads the catalog's group, and is ready to.
    pub fn leads(&self) -> bool {
        self.parts.replica.leadership().borrow().ready
    }

    /// Catches up: what the view shows afterwards holds everything that was acknowledged, anywhere, before this call.
    ///
    /// # Errors
    /// No leader was reached in time; the view is as it was.
    pub async fn refresh(&self) -> Result<(), RefreshError> {
        let deadline = Instant::now() + DEADLINE;
        let mut cause = String::from("no answer in time");
        let mut back_off = BACK_OFF_MIN;
        loop {
            let asked = self.freshness.now();
            match timeout_at(deadline, self.read_index()).await {
                Err(_) => return Err(RefreshError { cause }),
                Ok(Ok(index)) => {
                    self.wait_applied(index, deadline).await?;
                    self.freshness.confirmed(asked);
                    return Ok(());
                }
                Ok(Err(error)) => cause = error,
            }
            if Instant::now() + back_off >= deadline {
                return Err(RefreshError { cause });
            }
            sleep(back_off).await;
            back_off = BACK_OFF_MAX.min(back_off * 2);
        }
    }

    /// Whether what the view does *not* say may be relied on: a majority confirmed lately that it is complete. If not,
    /// [`Catalog::refresh`] first.
    pub fn is_fresh(&self) -> bool {
        self.freshness.is_fresh()
    }

    /// Becomes false when the view is not fresh any more: what open streams watch. Kept by [`Catalog::keep_fresh`].
    pub fn freshness(&self) -> watch::Receiver<bool> {
        self.freshness.watch()
    }

    #[cfg(test)]
    pub(crate) fn forget_confirmation(&self) {
        self.freshness.forget();
    }

    /// Has the view confirmed about once a second, until `stop`: one round trip to the leader. One task a node that serves
    /// clients.
    pub async fn keep_fresh(self, stop: Stop) {
        let limit = self.freshness.lasts() / 4;
        let confirming = async {
            loop {
                // What goes wrong is said once, by the look, if it goes on.
                let _ = timeout(limit, self.refresh()).await;
                sleep(CONFIRM_EVERY.min(limit)).await;
            }
        };
        let looking = async {
            loop {
                self.freshness.look();
                sleep(LOOK_EVERY).await;
            }
        };
        stop.run_until_cancelled(async { tokio::join!(confirming, looking) }).await;
    }

    async fn read_index(&self) -> Result<LogIndex, String> {
        match self.parts.replica.read_index().await {
            Ok(index) => Ok(index),
            Err(ReadError::NotLeader { .. }) => {
                self.parts.link.read_index(GroupId::CATALOG).await.map_err(|error| error.to_string())
            }
            Err(error) => Err(error.to_string()),
        }
    }

    async fn wait_applied(&self, index: LogIndex, deadline: Instant) -> Result<(), RefreshError> {
        let mut applied = self.parts.replica.applied();
        match timeout_at(deadline, applied.wait_for(|applied| *applied >= index)).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(_)) => Err(RefreshError { cause: "the catalog is stopped on this node".to_owned() }),
            Err(_) => Err(RefreshError { cause: "this node's replica lags behind".to_owned() }),
        }
    }

    /// Serves another node's proposal: checks it, proposes it here, and encodes the answer for the way back.
    ///
    /// # Errors
    /// [`ProposeError::NotLeader`]: the other node asks the leader. A payload that is no command comes back as an answer.
    pub async fn serve_propose(&self, payload: Bytes) -> Result<(EntryId, Bytes), ProposeError> {
        // What cannot be read must not enter the log: every replica would have to skip it for ever.
        if let Err(error) = Command::decode(&payload) {
            warn!(%error, "a peer proposed what is no catalog command");
            let place = EntryId { term: ensign_proto::Term(0), index: LogIndex(0) };
            return Ok((place, wire::encode_response(&Err(Refusal::Unreadable))));
        }
        let (id, response) = self.parts.replica.propose(payload).await?;
        Ok((id, wire::encode_response(&response)))
    }

    /// Serves another node's question for the read index.
    ///
    /// # Errors
    /// [`ReadError::NotLeader`]: the other node asks the leader.
    pub async fn serve_read_index(&self) -> Result<LogIndex, ReadError> {
        self.parts.replica.read_index().await
    }

    /// Carries a command out. It may be proposed more than once: commands answer a repetition as they did the first time.
    ///
    /// What some nodes could not read is not proposed: see [`Command::needs`].
    pub(super) async fn write(&self, command: Command) -> Result<Result<Outcome, Refusal>, WriteFailure> {
        let active = self.cluster_version();
        let command = command.for_version(active);
        self.require(command.needs()).await?;
        let payload = command.encode();
        let deadline = Instant::now() + DEADLINE;
        let mut back_off = BACK_OFF_MIN;
        let mut proposed = false;
        let mut cause = String::from("no answer in time");
        loop {
            match timeout_at(deadline, self.propose(payload.clone())).await {
                Ok(Ok((id, response))) => {
                    // The change is durable whatever happens here; waiting lets the caller read what it wrote.
                    let _ = self.wait_applied(id.index, deadline).await;
                    return Ok(response);
                }
                Ok(Err(ProposeLinkError::Refused { cause })) => return Err(WriteFailure::Internal { cause }),
                Ok(Err(ProposeLinkError::Unreachable { cause: why })) => cause = why,
                Ok(Err(ProposeLinkError::OutcomeUnknown { cause: why })) => (proposed, cause) = (true, why),
                Err(_) => proposed = true,
            }
            if Instant::now() + back_off >= deadline {
                return Err(if proposed {
                    WriteFailure::OutcomeUnknown { cause }
                } else {
                    WriteFailure::Unavailable { cause }
                });
            }
            sleep(back_off).await;
            back_off = BACK_OFF_MAX.min(back_off * 2);
        }
    }

    /// Whether the cluster's version is at least that. A view that trails says no too often, never yes. Asks around for who is behind.
    ///
    /// # Errors
    /// [`WriteFailure::NotYet`].
    pub async fn require(&self, needs: ClusterVersion) -> Result<(), WriteFailure> {
        let active = self.cluster_version();
        if needs <= active {
            return Ok(());
        }
        let asked = match self.why_not_yet.get() {
            Some(ask) => ask(needs).await,
            None => None,
        };
        Err(WriteFailure::NotYet { needs, active, why: asked.unwrap_or_else(|| NOT_YET.to_owned()) })
    }

    /// Raises the cluster's version, for ever. The caller has asked every node whether it speaks it: one that does not stops, and
    /// with enough of them the cluster does. Again changes nothing.
    ///
    /// # Errors
    /// See [`WriteFailure`].
    pub async fn raise_version(&self, to: ClusterVersion) -> Result<(), WriteFailure> {
        if to <= self.cluster_version() {
            return Ok(());
        }
        plain(self.write(Command::SetClusterVersion(to)).await?)
    }

    async fn propose(&self, payload: Bytes) -> Result<(EntryId, Result<Outcome, Refusal>), ProposeLinkError> {
        match self.parts.replica.propose(payload.clone()).await {
            Ok(committed) => Ok(committed),
            Err(ProposeError::NotLeader { .. }) => {
                let (id, response) = self.parts.link.propose(GroupId::CATALOG, payload).await?;
                // The leader carried it out, and says so in a way we cannot read: a mixed-version bug.
                let response = wire::decode_response(&response)
                    .map_err(|error| ProposeLinkError::OutcomeUnknown { cause: error.to_string() })?;
                Ok((id, response))
            }
            Err(error @ ProposeError::OutcomeUnknown) => {
                Err(ProposeLinkError::OutcomeUnknown { cause: error.to_string() })
            }
            Err(error @ ProposeError::TooLarge { .. }) => Err(ProposeLinkError::Refused { cause: error.to_string() }),
            Err(error @ (ProposeError::DiskFull | ProposeError::Stopped | ProposeError::Fenced { .. })) => {
                Err(ProposeLinkError::Unreachable { cause: error.to_string() })
            }
        }
    }

    pub(super) fn now(&self) -> ensign_raft::env::UnixNanos {
        self.parts.clock.wall()
    }

    /// The parts of a fresh ULID.
    fn fresh(&self) -> (u64, [u8; 10]) {
        let mut random = [0; 10];
        self.parts.rng.fill(&mut random);
        (self.now().as_millis(), random)
    }

    pub(super) fn fresh_topic(&self) -> TopicId {
        let (ms, random) = self.fresh();
        TopicId::new(ms, random)
    }

    /// A fresh API key id, for [`Catalog::create_api_key`].
    pub fn fresh_api_key(&self) -> ApiKeyId {
        let (ms, random) = self.fresh();
        ApiKeyId::new(ms, random)
    }

    /// The nodes that hold a replica of a topic.
    pub fn replicas_of(&self, topic: &Topic) -> BTreeSet<NodeId> {
        if topic.replicas.is_empty() { self.defaults().founders } else { topic.replicas.clone() }
    }

    /// Who shall have the keys of a topic: every node, and this one even if the catalog does not list it yet.
    pub(super) fn custodians(&self) -> Vec<NodeId> {
        let stays = |node: &&Arc<NodeRecord>| node.state != NodeState::Removed;
        let mut nodes: Vec<NodeId> = self.nodes().iter().filter(stays).map(|node| node.id).collect();
        if !nodes.contains(&self.parts.me) {
            nodes.push(self.parts.me);
        }
        nodes
    }

    /// Everyone's custody of a topic.
    pub(super) fn custody_of(&self, project: ProjectId, topic: TopicId) -> Vec<Custody> {
        self.custodians().into_iter().map(|node| Custody { node, project, topic }).collect()
    }

    /// Keeps the group's log short: a snapshot for every 4,096 applied entries, until `stop`. One task a node.
    pub async fn keep_compact(self, stop: Stop) {
        let mut applied = self.parts.replica.applied();
        let mut covered = 0;
        while let Some(Ok(index)) = stop
            .run_until_cancelled(async { applied.wait_for(|i| i.0 >= covered + COMPACT_EVERY).await.map(|i| *i) })
            .await
        {
            if self.stuck().is_some() {
                // A snapshot would pass for what this replica could not apply, and drop the entries that say it.
                return;
            }
            match self.parts.replica.compact(COMPACT_KEEP).await {
                Ok(through) => covered = through.0.max(index.0),
                Err(error) => {
                    warn!(%error, "the catalog's log could not be compacted");
                    // Wait for as many entries again, so that a lasting failure does not spin.
                    covered = index.0;
                }
            }
        }
    }
}

pub(super) fn unexpected(response: &Result<Outcome, Refusal>) -> WriteFailure {
    match response {
        Err(refusal) => WriteFailure::Internal { cause: refusal.to_string() },
        Ok(_) => WriteFailure::Internal { cause: "an answer of another kind".to_owned() },
    }
}

fn plain(response: Result<Outcome, Refusal>) -> Result<(), WriteFailure> {
    match response {
        Ok(_) => Ok(()),
        Err(_) => Err(unexpected(&response)),
    }
}
