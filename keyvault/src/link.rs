//! How nodes reach the vault, and how the vault reaches them. The node implements both over its peer connections.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use ensign_proto::pb::vault::v1 as pb;
use ensign_proto::{KeyVersion, NodeId, RingId};
use futures::future::BoxFuture;
use thiserror::Error;

/// The call may or may not have reached the vault: nothing is known.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("the vault cannot be reached: {cause}")]
pub struct LinkError {
    /// What happened.
    pub cause: String,
}

impl LinkError {
    /// A failure with this cause.
    pub fn new(cause: impl fmt::Display) -> Self {
        Self { cause: cause.to_string() }
    }
}

/// Reaches the vault's leader.
pub trait VaultLink: Send + Sync + 'static {
    /// One call. A refusal is a reply; dropping the future is safe.
    fn call(&self, request: pb::Request) -> BoxFuture<'static, Result<pb::Reply, LinkError>>;
}

/// Reaches one vault voter, whether or not it leads. What the node implements; [`RoutedLink`] finds the leader.
pub trait VaultPeer: Send + Sync + 'static {
    /// One call to the `Vault` service of `node`. Must have a deadline of its own.
    fn call(&self, node: NodeId, request: pb::Request) -> BoxFuture<'static, Result<pb::Reply, LinkError>>;
}

/// Reaches the nodes that hold keys, from the vault's leader.
pub trait HolderLink: Send + Sync + 'static {
    /// One call to the `Keyholder` service of `node`. Must have a deadline of its own.
    fn surrender(
        &self,
        node: NodeId,
        request: pb::SurrenderRequest,
    ) -> BoxFuture<'static, Result<pb::SurrenderReply, LinkError>>;

    /// As [`HolderLink::surrender`]: tells of news.
    fn refresh(
        &self,
        node: NodeId,
        request: pb::RefreshRequest,
    ) -> BoxFuture<'static, Result<pb::RefreshReply, LinkError>>;
}

/// Why the vault did not do what it was asked: always a proof that it had no effect, except for `OutcomeUnknown`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Reason {
    /// Another voter leads.
    NotLeader,
    /// No leader or no quorum, for now. Retry.
    Unavailable,
    /// The voter has no root key, or a wrong one.
    Sealed,
    /// There is no such thing.
    NotFound,
    /// There is such a thing already, and it is different.
    AlreadyExists,
    /// The version or revision is not the expected one: read, then decide.
    Conflict,
    /// The request is malformed.
    Invalid,
    /// The caller has no custody of the partition.
    NotGranted,
    /// The key is being destroyed, or is.
    Revoked,
    /// The ring has no active version: rotate it.
    NoActiveVersion,
    /// The wrapped key is not what it claims to be.
    Damaged,
    /// A bound is reached.
    Exhausted,
    /// It may or may not have happened.
    OutcomeUnknown,
    /// The destruction is ordered and under way: ask again for its receipt.
    Pending,
}

/// A refusal, with what people need to know about it.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{message}")]
pub struct Refusal {
    /// What the caller can act on.
    pub reason: Reason,
    /// For people.
    pub message: String,
    /// With `NotLeader`: who leads.
    pub leader: Option<NodeId>,
    /// With `Revoked` and `NoActiveVersion`: of which ring.
    pub ring: RingId,
    /// With `Revoked`: which version; zero for all.
    pub version: KeyVersion,
}

impl Refusal {
    /// A refusal for this reason.
    pub fn new(reason: Reason, message: impl Into<String>) -> Self {
        Self { reason, message: message.into(), leader: None, ring: RingId::default(), version: KeyVersion(0) }
    }

    pub(crate) fn of_version(mut self, ring: RingId, version: KeyVersion) -> Self {
        (self.ring, self.version) = (ring, version);
        self
    }
}

impl From<Refusal> for pb::Refusal {
    fn from(refusal: Refusal) -> Self {
        use pb::refusal::Reason as Wire;
        let reason = match refusal.reason {
            Reason::NotLeader => Wire::NotLeader,
            Reason::Unavailable => Wire::Unavailable,
            Reason::Sealed => Wire::Sealed,
            Reason::NotFound => Wire::NotFound,
            Reason::AlreadyExists => Wire::AlreadyExists,
            Reason::Conflict => Wire::Conflict,
            Reason::Invalid => Wire::Invalid,
            Reason::NotGranted => Wire::NotGranted,
            Reason::Revoked => Wire::Revoked,
            Reason::NoActiveVersion => Wire::NoActiveVersion,
            Reason::Damaged => Wire::Damaged,
            Reason::Exhausted => Wire::Exhausted,
            Reason::OutcomeUnknown => Wire::OutcomeUnknown,
            Reason::Pending => Wire::Pending,
        };
        Self {
            reason: reason.into(),
            message: refusal.message,
            leader: refusal.leader.map_or(0, |node| node.0),
            ring: refusal.ring.as_bytes().to_vec().into(),
            version: refusal.version.0,
        }
    }
}

impl From<pb::Refusal> for Refusal {
    fn from(wire: pb::Refusal) -> Self {
        use pb::refusal::Reason as Wire;
        let reason = match wire.reason() {
            Wire::NotLeader => Reason::NotLeader,
            // A reason of a newer build says at least that nothing happened.
            Wire::Unavailable | Wire::Unspecified => Reason::Unavailable,
            Wire::Sealed => Reason::Sealed,
            Wire::NotFound => Reason::NotFound,
            Wire::AlreadyExists => Reason::AlreadyExists,
            Wire::Conflict => Reason::Conflict,
            Wire::Invalid => Reason::Invalid,
            Wire::NotGranted => Reason::NotGranted,
            Wire::Revoked => Reason::Revoked,
            Wire::NoActiveVersion => Reason::NoActiveVersion,
            Wire::Damaged => Reason::Damaged,
            Wire::Exhausted => Reason::Exhausted,
            Wire::OutcomeUnknown => Reason::OutcomeUnknown,
            Wire::Pending => Reason::Pending,
        };
        Self {
            reason,
            leader: (wire.leader != 0).then_some(NodeId(wire.leader)),
            ring: RingId::try_from(&wire.ring[..]).unwrap_or_default(),
            version: KeyVersion(wire.version),
            message: wire.message,
        }
    }
}

/// Finds the leader among the vault's voters, and remembers it.
///
/// A voter that does not lead names who does; one that does not answer is passed over. Every call goes round the voters at
/// most twice, so it ends; the caller retries, with back-off.
#[derive(Clone)]
pub struct RoutedLink {
    peers: Arc<dyn VaultPeer>,
    voters: Arc<BTreeSet<NodeId>>,
    leader: Arc<AtomicU64>,
}

impl RoutedLink {
    /// A link to these voters.
    pub fn new(peers: Arc<dyn VaultPeer>, voters: BTreeSet<NodeId>) -> Self {
        let first = voters.first().map_or(0, |node| node.0);
        Self { peers, voters: Arc::new(voters), leader: Arc::new(AtomicU64::new(first)) }
    }

    async fn route(self, request: pb::Request) -> Result<pb::Reply, LinkError> {
        let mut order: Vec<NodeId> = self.voters.iter().copied().collect();
        let mut next = NodeId(self.leader.load(Ordering::Relaxed));
        let mut last = Err(LinkError::new("the vault has no voters"));
        for _ in 0..2 * self.voters.len() {
            last = self.peers.call(next, request.clone()).await;
            let hint = match &last {
                Ok(reply) => match elsewhere(reply) {
                    Next::Done => {
                        self.leader.store(next.0, Ordering::Relaxed);
                        return last;
                    }
                    Next::Named(leader) => Some(leader),
                    Next::Round => None,
                },
                Err(_) => None,
            };
            // A hint beats the round; a voter that failed goes to the end of it.
            order.retain(|node| *node != next);
            order.push(next);
            next = hint.filter(|leader| *leader != next && self.voters.contains(leader)).unwrap_or(order[0]);
        }
        last
    }
}

/// Where a call goes after a reply.
enum Next {
    /// It is answered.
    Done,
    /// To the leader that the voter named.
    Named(NodeId),
    /// To the next voter.
    Round,
}

fn elsewhere(reply: &pb::Reply) -> Next {
    let Some(pb::reply::Result::Refusal(refusal)) = &reply.result else { return Next::Done };
    match refusal.reason() {
        pb::refusal::Reason::NotLeader if refusal.leader != 0 => Next::Named(NodeId(refusal.leader)),
        // A sealed leader hands its leadership over; one without a quorum may have a successor that it does not know of.
        pb::refusal::Reason::NotLeader | pb::refusal::Reason::Sealed | pb::refusal::Reason::Unavailable => Next::Round,
        _ => Next::Done,
    }
}

impl VaultLink for RoutedLink {
    fn call(&self, request: pb::Request) -> BoxFuture<'static, Result<pb::Reply, LinkError>> {
        Box::pin(self.clone().route(request))
    }
}

impl fmt::Debug for RoutedLink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RoutedLink").field("voters", &self.voters).finish_non_exhaustive()
    }
}
