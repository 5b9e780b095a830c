//! How nodes reach the vault, and how the vault reaches them. The node implements both over its peer connections.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use ensign_proto::pb::vault::v1 as pb;
use ensign_proto::{KeyVersion, LogIndex, NodeId, RingId};
use ensign_raft::Leadership;
use futures::future::BoxFuture;
use thiserror::Error;
use tokio::sync::watch;
use tokio::time::timeout;

use crate::lease::LeaseConfig;

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
    /// What was ordered is under way: ask again for its outcome.
    Pending,
    /// The ring or the version is disabled, until it is enabled.
    Disabled,
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
    /// With `Revoked`, `Disabled` and `NoActiveVersion`: of which ring.
    pub ring: RingId,
    /// With `Revoked` and `Disabled`: which version; zero for all.
    pub version: KeyVersion,
    /// With `Pending`, of a disable: the order to ask for again.
    pub order: LogIndex,
}

impl Refusal {
    /// A refusal for this reason.
    pub fn new(reason: Reason, message: impl Into<String>) -> Self {
        Self {
            reason,
            message: message.into(),
            leader: None,
            ring: RingId::default(),
            version: KeyVersion(0),
            order: LogIndex(0),
        }
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
            Reason::Disabled => Wire::Disabled,
        };
        Self {
            reason: reason.into(),
            message: refusal.message,
            leader: refusal.leader.map_or(0, |node| node.0),
            ring: refusal.ring.as_bytes().to_vec().into(),
            version: refusal.version.0,
            order: refusal.order.0,
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
            Wire::Disabled => Reason::Disabled,
        };
        Self {
            reason,
            leader: (wire.leader != 0).then_some(NodeId(wire.leader)),
            ring: RingId::try_from(&wire.ring[..]).unwrap_or_default(),
            version: KeyVersion(wire.version),
            order: LogIndex(wire.order),
            message: wire.message,
        }
    }
}

/// Finds the leader among the vault's voters, and remembers it.
///
/// A voter that does not lead names who does; one that does not answer is passed over, after a part of the caller's time only,
/// so that a leader that hangs costs a call one hop and not all of it. Every call goes round the voters at most twice, so it
/// ends; the caller retries, with back-off.
#[derive(Clone)]
pub struct RoutedLink {
    peers: Arc<dyn VaultPeer>,
    voters: Arc<Mutex<Arc<BTreeSet<NodeId>>>>,
    leader: Arc<AtomicU64>,
    /// The voter that gave no answer last; 0 for none.
    silent: Arc<AtomicU64>,
    /// What the local replica knows, where there is one.
    known: Option<watch::Receiver<Leadership>>,
    /// How long one voter may take to answer a lease.
    lease_hop: Duration,
}

/// How long one voter may take to answer what it need not commit.
const READ_HOP: Duration = Duration::from_secs(1);
/// The same for what it commits first: to pass it over sooner would only do things twice on a slow disk.
const WRITE_HOP: Duration = Duration::from_secs(3);
/// The same for what waits for holders, for two seconds at most, and its commits: to revoke, to rotate, to disable, to enable.
const WAITING_HOP: Duration = Duration::from_secs(5);

impl RoutedLink {
    /// A link to these voters.
    pub fn new(peers: Arc<dyn VaultPeer>, voters: BTreeSet<NodeId>, lease: &LeaseConfig) -> Self {
        let first = voters.first().map_or(0, |node| node.0);
        let (leader, silent) = (Arc::new(AtomicU64::new(first)), Arc::default());
        Self {
            peers,
            voters: Arc::new(Mutex::new(Arc::new(voters))),
            leader,
            silent,
            known: None,
            lease_hop: lease.call_deadline() / 3,
        }
    }

    /// From now on asks these nodes. They need not all vote: one that does not names the leader if it knows it.
    pub fn follow(&self, voters: BTreeSet<NodeId>) {
        *self.voters.lock().unwrap_or_else(PoisonError::into_inner) = Arc::new(voters);
    }

    fn voters(&self) -> Arc<BTreeSet<NodeId>> {
        Arc::clone(&self.voters.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The same, with the knowledge of a replica on this node.
    #[must_use]
    pub fn with_replica(mut self, leadership: watch::Receiver<Leadership>) -> Self {
        self.known = Some(leadership);
        self
    }

    fn first(&self, voters: &BTreeSet<NodeId>) -> Option<NodeId> {
        let known = self.known.as_ref().and_then(|known| known.borrow().leader);
        // The replica may still believe in a leader that hangs.
        let silent = NodeId(self.silent.load(Ordering::Relaxed));
        known
            .filter(|node| *node != silent && voters.contains(node))
            .or(Some(NodeId(self.leader.load(Ordering::Relaxed))).filter(|node| voters.contains(node)))
            .or(voters.first().copied())
    }

    fn hop_of(&self, request: &pb::Request) -> Duration {
        use pb::request::Call;
        match request.call {
            Some(Call::Lease(_) | Call::Release(_)) => self.lease_hop,
            Some(
                Call::ListRings(_)
                | Call::ListCustody(_)
                | Call::Secret(_)
                | Call::ListSecrets(_)
                | Call::ListReceipts(_)
                | Call::Status(_),
            )
            | None => READ_HOP,
            Some(Call::Revoke(_) | Call::Rotate(_) | Call::Disable(_) | Call::Enable(_)) => WAITING_HOP,
            Some(
                Call::CreateRing(_)
                | Call::SetRing(_)
                | Call::ScheduleRevoke(_)
                | Call::CancelRevoke(_)
                | Call::PutCustody(_)
                | Call::DropCustody(_)
                | Call::PutCustodies(_)
                | Call::DropCustodies(_)
                | Call::PutSecret(_)
                | Call::DeleteSecret(_)
                | Call::ReceiptKeys(_)
                | Call::Seal(_)
                | Call::Lift(_),
            ) => WRITE_HOP,
        }
    }

    /// One call to one voter. If it does not answer, or whoever waits gives up first, the next call begins at another one.
    async fn hop(&self, node: NodeId, request: pb::Request) -> Result<pb::Reply, LinkError> {
        let limit = self.hop_of(&request);
        let voters = self.voters();
        let after = voters.range(NodeId(node.0 + 1)..).chain(voters.iter()).find(|other| **other != node);
        let mut pass_over = PassOver { link: self, node, next: after.copied() };
        let reply = timeout(limit, self.peers.call(node, request)).await;
        let reply =
            reply.unwrap_or_else(|_| Err(LinkError::new(format!("node {node} gave no answer within {limit:?}"))));
        if reply.is_ok() {
            pass_over.next = None;
            let _ = self.silent.compare_exchange(node.0, 0, Ordering::Relaxed, Ordering::Relaxed);
        }
        reply
    }

    async fn route(self, request: pb::Request) -> Result<pb::Reply, LinkError> {
        let voters = self.voters();
        let mut order: Vec<NodeId> = voters.iter().copied().collect();
        let mut last = Err(LinkError::new("the vault has no voters"));
        let Some(mut next) = self.first(&voters) else { return last };
        let mut sealed = None;
        for _ in 0..2 * voters.len() {
            last = self.hop(next, request.clone()).await;
            let hint = match &last {
                Ok(reply) => match elsewhere(reply) {
                    Next::Done => {
                        self.leader.store(next.0, Ordering::Relaxed);
                        return last;
                    }
                    Next::Named(leader) => Some(leader),
                    Next::Round => None,
                    Next::Sealed => {
                        sealed = last.clone().ok();
                        None
                    }
                },
                Err(_) => None,
            };
            // A hint beats the round; a voter that failed goes to the end of it.
            order.retain(|node| *node != next);
            order.push(next);
            next = hint.filter(|leader| *leader != next && voters.contains(leader)).unwrap_or(order[0]);
        }
        // A leader that is sealed says more than those that do not lead.
        sealed.map_or(last, Ok)
    }
}

/// Moves the hint away from a voter that gave no answer, also when the call is dropped meanwhile.
struct PassOver<'a> {
    link: &'a RoutedLink,
    node: NodeId,
    next: Option<NodeId>,
}

impl Drop for PassOver<'_> {
    fn drop(&mut self) {
        if let Some(next) = self.next {
            // Unless another call has found the leader already.
            self.link.silent.store(self.node.0, Ordering::Relaxed);
            let _ = self.link.leader.compare_exchange(self.node.0, next.0, Ordering::Relaxed, Ordering::Relaxed);
        }
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
    /// The same, unless all of them are no better.
    Sealed,
}

fn elsewhere(reply: &pb::Reply) -> Next {
    let Some(pb::reply::Result::Refusal(refusal)) = &reply.result else { return Next::Done };
    match refusal.reason() {
        pb::refusal::Reason::NotLeader if refusal.leader != 0 => Next::Named(NodeId(refusal.leader)),
        // A sealed leader hands its leadership over; one without a quorum may have a successor that it does not know of.
        pb::refusal::Reason::Sealed => Next::Sealed,
        pb::refusal::Reason::NotLeader | pb::refusal::Reason::Unavailable => Next::Round,
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
        f.debug_struct("RoutedLink").field("voters", &self.voters()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use ensign_proto::Term;

    use super::*;

    /// Voter 1 hangs; every other one answers.
    #[derive(Default)]
    struct Hanging(Mutex<Vec<u64>>);

    impl VaultPeer for Hanging {
        fn call(&self, node: NodeId, _: pb::Request) -> BoxFuture<'static, Result<pb::Reply, LinkError>> {
            self.0.lock().unwrap().push(node.0);
            Box::pin(async move {
                if node == NodeId(1) {
                    std::future::pending::<()>().await;
                }
                Ok(pb::Reply { result: Some(pb::reply::Result::Release(pb::ReleaseReply {})) })
            })
        }
    }

    impl Hanging {
        fn asked(&self) -> Vec<u64> {
            std::mem::take(&mut self.0.lock().unwrap())
        }
    }

    fn lease_call() -> pb::Request {
        pb::Request { actor: String::new(), call: Some(pb::request::Call::Lease(pb::LeaseRequest::default())) }
    }

    fn link(peers: &Arc<Hanging>) -> RoutedLink {
        let voters = [NodeId(1), NodeId(2), NodeId(3)].into();
        RoutedLink::new(Arc::clone(peers) as _, voters, &LeaseConfig::default())
    }

    #[tokio::test]
    async fn a_leader_that_hangs_costs_a_call_a_third_of_its_time() {
        let peers = Arc::new(Hanging::default());
        let link = link(&peers);
        let deadline = LeaseConfig::default().call_deadline();
        assert!(link.hop_of(&lease_call()) <= deadline / 3);
        timeout(deadline, link.call(lease_call())).await.unwrap().unwrap();
        assert_eq!(peers.asked(), [1, 2]);
        link.call(lease_call()).await.unwrap();
        assert_eq!(peers.asked(), [2], "who answered is asked first");
    }

    #[tokio::test]
    async fn a_call_that_is_given_up_leaves_the_next_one_another_voter() {
        let peers = Arc::new(Hanging::default());
        let link = link(&peers);
        assert!(timeout(Duration::from_millis(1), link.call(lease_call())).await.is_err());
        link.call(lease_call()).await.unwrap();
        assert_eq!(peers.asked(), [1, 2]);
    }

    #[tokio::test]
    async fn the_local_replica_knows_the_leader_unless_that_one_was_silent() {
        let peers = Arc::new(Hanging::default());
        let leadership = watch::Sender::new(Leadership { term: Term(1), leader: Some(NodeId(3)), ready: false });
        let link = link(&peers).with_replica(leadership.subscribe());
        link.call(lease_call()).await.unwrap();
        assert_eq!(peers.asked(), [3]);
        leadership.send_modify(|now| now.leader = Some(NodeId(1)));
        link.call(lease_call()).await.unwrap();
        assert_eq!(peers.asked(), [1, 2]);
        link.call(lease_call()).await.unwrap();
        assert_eq!(peers.asked(), [2], "the replica still believes in the leader that hangs");
        leadership.send_modify(|now| now.leader = Some(NodeId(3)));
        link.call(lease_call()).await.unwrap();
        assert_eq!(peers.asked(), [3]);
    }
}
