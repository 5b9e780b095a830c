//! Proposing to a group from any node: at the leader, wherever it is.

use std::collections::{BTreeSet, VecDeque};
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use ensign_proto::pb::peer::v1::peer_client::PeerClient;
use ensign_proto::pb::peer::v1::propose_refusal::Reason;
use ensign_proto::pb::peer::v1::{
    ProposeRefusal, ProposeReply, ProposeRequest, ReadIndexReply, ReadIndexRequest, propose_reply, read_index_reply,
};
use ensign_proto::{GroupId, LogIndex, NodeId, Term};
use ensign_raft::{Leadership, ProposeError, ReadError};
use ensign_storage::EntryId;
use futures::FutureExt as _;
use futures::future::BoxFuture;
use tokio::sync::watch;
use tonic::{Code, Request, Status};

use super::gate::is_refusal;
use super::{PeerChannel, Peers};
use crate::catalog::{ProposeLink, ProposeLinkError};

/// How long one call to a leader may take.
const CALL_TIMEOUT: Duration = Duration::from_secs(5);
/// How many nodes one call asks before it gives up.
const HOPS_MAX: usize = 8;

/// Reaches the catalog's leader through the peers' control connections.
///
/// The local replica's word comes first, then that of the node that led last; a node whose replica knows nobody, since it waits to
/// be added or is cut off, asks one peer after the other, and each may name the leader.
#[derive(Clone)]
pub struct LeaderLink {
    peers: Peers,
    group: GroupId,
    leadership: watch::Receiver<Leadership>,
    /// Who led last, by a call that it answered; 0 for nobody.
    led: Arc<AtomicU64>,
}

impl fmt::Debug for LeaderLink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LeaderLink").field("group", &self.group).finish_non_exhaustive()
    }
}

/// What one leader said.
enum Answer<T> {
    Done(T),
    /// Nothing was appended; ask the node it names, or wait for an election.
    Elsewhere(Option<NodeId>),
    /// Nothing was appended, as the node cannot answer at all; another one may.
    Absent(ProposeLinkError),
    Failed(ProposeLinkError),
}

impl LeaderLink {
    /// A link to the leader of `group`, whose local replica reports `leadership`.
    pub fn new(peers: Peers, group: GroupId, leadership: watch::Receiver<Leadership>) -> Self {
        Self { peers, group, leadership, led: Arc::default() }
    }

    /// Calls the leader, following redirections.
    async fn call<T, F>(&self, mut ask: impl FnMut(PeerClient<PeerChannel>) -> F) -> Result<T, ProposeLinkError>
    where
        F: Future<Output = Answer<T>>,
    {
        let known = self.leadership.borrow().leader;
        let led = Some(NodeId(self.led.load(Ordering::Relaxed))).filter(|led| led.0 != 0);
        // Each is asked once, but for one that somebody names again: a leader may have come to be meanwhile.
        let mut order: VecDeque<NodeId> = known.into_iter().chain(led).chain(self.peers.others()).collect();
        let mut asked = BTreeSet::new();
        let mut why = None;
        for _ in 0..HOPS_MAX {
            let Some(target) = order.pop_front() else { break };
            if !asked.insert(target) {
                continue;
            }
            let Some(channel) = self.peers.channel(target) else { continue };
            match ask(PeerClient::new(channel)).await {
                Answer::Done(value) => {
                    self.led.store(target.0, Ordering::Relaxed);
                    return Ok(value);
                }
                Answer::Failed(error) => return Err(error),
                Answer::Absent(error) => why = Some(error),
                Answer::Elsewhere(Some(named)) if named != target => {
                    asked.remove(&named);
                    order.push_front(named);
                }
                Answer::Elsewhere(_) => {}
            }
        }
        Err(why.unwrap_or_else(|| ProposeLinkError::Unreachable {
            cause: format!("no leader of group {} is known", self.group),
        }))
    }
}

impl ProposeLink for LeaderLink {
    fn propose(
        &self,
        group: GroupId,
        payload: Bytes,
    ) -> BoxFuture<'static, Result<(EntryId, Bytes), ProposeLinkError>> {
        let link = self.clone();
        async move {
            link.call(|mut client| {
                let request = ProposeRequest { group: group.0, payload: payload.clone() };
                async move {
                    match client.propose(timed(request)).await.map(tonic::Response::into_inner) {
                        Ok(ProposeReply { result: Some(propose_reply::Result::Committed(committed)) }) => {
                            let id = EntryId { term: Term(committed.term), index: LogIndex(committed.index) };
                            Answer::Done((id, committed.response))
                        }
                        Ok(ProposeReply { result: Some(propose_reply::Result::Refusal(refusal)) }) => refused(refusal),
                        Ok(ProposeReply { result: None }) => Answer::Failed(ProposeLinkError::OutcomeUnknown {
                            cause: "the leader's answer is empty".to_owned(),
                        }),
                        Err(status) => match failed(&status) {
                            error @ ProposeLinkError::Unreachable { .. } => Answer::Absent(error),
                            error => Answer::Failed(error),
                        },
                    }
                }
            })
            .await
        }
        .boxed()
    }

    fn read_index(&self, group: GroupId) -> BoxFuture<'static, Result<LogIndex, ProposeLinkError>> {
        let link = self.clone();
        async move {
            link.call(|mut client| async move {
                match client
                    .read_index(timed(ReadIndexRequest { group: group.0 }))
                    .await
                    .map(tonic::Response::into_inner)
                {
                    Ok(ReadIndexReply { result: Some(read_index_reply::Result::Index(index)) }) => {
                        Answer::Done(LogIndex(index))
                    }
                    Ok(ReadIndexReply { result: Some(read_index_reply::Result::Refusal(refusal)) }) => refused(refusal),
                    Ok(ReadIndexReply { result: None }) => Answer::Failed(ProposeLinkError::Unreachable {
                        cause: "the leader's answer is empty".to_owned(),
                    }),
                    Err(status) => Answer::Absent(ProposeLinkError::Unreachable { cause: status.message().to_owned() }),
                }
            })
            .await
        }
        .boxed()
    }
}

fn timed<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(CALL_TIMEOUT);
    request
}

/// A transport failure: only a connection that was never made, or the peer's gate, proves that nothing was appended.
fn failed(status: &Status) -> ProposeLinkError {
    let cause = status.message().to_owned();
    let never_sent =
        status.code() == Code::Unavailable && std::error::Error::source(status).is_some_and(is_connect_error);
    if never_sent || is_refusal(status) {
        ProposeLinkError::Unreachable { cause }
    } else {
        ProposeLinkError::OutcomeUnknown { cause }
    }
}

fn is_connect_error(error: &(dyn std::error::Error + 'static)) -> bool {
    let mut next = Some(error);
    while let Some(error) = next {
        if error
            .downcast_ref::<hyper_util::client::legacy::Error>()
            .is_some_and(hyper_util::client::legacy::Error::is_connect)
            || error.downcast_ref::<tonic::ConnectError>().is_some()
        {
            return true;
        }
        next = error.source();
    }
    false
}

fn refused<T>(refusal: ProposeRefusal) -> Answer<T> {
    let cause = refusal.message.clone();
    match refusal.reason() {
        Reason::NotLeader => Answer::Elsewhere((refusal.leader != 0).then_some(NodeId(refusal.leader))),
        Reason::Unavailable | Reason::UnknownGroup => Answer::Absent(ProposeLinkError::Unreachable { cause }),
        Reason::Refused => Answer::Failed(ProposeLinkError::Refused { cause }),
        Reason::OutcomeUnknown | Reason::Unspecified => Answer::Failed(ProposeLinkError::OutcomeUnknown { cause }),
    }
}

/// The callee's words for a failed proposal.
pub(super) fn propose_refusal(error: &ProposeError) -> ProposeRefusal {
    let (reason, leader) = match error {
        ProposeError::NotLeader { leader } => (Reason::NotLeader, *leader),
        ProposeError::OutcomeUnknown => (Reason::OutcomeUnknown, None),
        ProposeError::TooLarge { .. } => (Reason::Refused, None),
        ProposeError::DiskFull | ProposeError::Stopped | ProposeError::Fenced { .. } => (Reason::Unavailable, None),
    };
    ProposeRefusal { reason: reason.into(), leader: leader.map_or(0, |leader| leader.0), message: error.to_string() }
}

/// The callee's words for a failed read index.
pub(super) fn read_refusal(error: &ReadError) -> ProposeRefusal {
    let (reason, leader) = match error {
        ReadError::NotLeader { leader } => (Reason::NotLeader, *leader),
        _ => (Reason::Unavailable, None),
    };
    ProposeRefusal { reason: reason.into(), leader: leader.map_or(0, |leader| leader.0), message: error.to_string() }
}
