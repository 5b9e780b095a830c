//! What every call between nodes passes first, in both directions: a certificate of a known peer, the same cluster, and one
//! process per node.
//!
//! ```text
//! caller ── ensign-cluster, ensign-life, ensign-version ──> a peer's certificate? same cluster? its newest life? new enough? ──> the service
//! caller <── the same three ── answer                                                                             (checked likewise)
//! ```
//!
//! One authority may have signed the certificates of several clusters, or of one that was made anew: only the cluster's id tells
//! old data from new. A life is one process of a node (its incarnation, and a number it drew): a copied data directory, or
//! one `node.id` given twice, shows as two lives at once. `Hello` alone is answered to nodes that have no cluster yet, and then only
//! to those that never had one: who has lived and comes without a cluster has lost its disk.
//!
//! Who the peers are, and which lives they had, is told by the catalog and by the settings (channels.rs, follow.rs).

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use ensign_proto::{ClusterId, ClusterVersion, NodeId};
use futures::FutureExt as _;
use futures::future::BoxFuture;
use http::{HeaderMap, HeaderName, HeaderValue, Request, Response};
use thiserror::Error;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tonic::body::Body;
use tonic::transport::Channel;
use tonic::transport::server::{TcpConnectInfo, TlsConnectInfo};
use tonic::{Code, Status};
use tower::{BoxError, Layer, Service};
use tracing::error;

use super::ended::Ended;
use super::tls::Certified;
use crate::catalog::NodeRecord;

/// Sixteen bytes as a ULID.
const CLUSTER: HeaderName = HeaderName::from_static("ensign-cluster");
/// `incarnation-process`, both decimal.
const LIFE: HeaderName = HeaderName::from_static("ensign-life");
/// The newest cluster version that the node speaks, and `-held` behind it on a node that does not want the cluster's to be raised. Nodes
/// of the first version do not send it.
const VERSION: HeaderName = HeaderName::from_static("ensign-version");
const HELD: &str = "-held";
/// The one call that a node without a cluster may make.
const HELLO: &str = "/ensign.peer.v1.Peer/Hello";
/// A peer that keeps trying is complained about this often.
const COMPLAIN_EVERY: Duration = Duration::from_secs(30);

/// One process of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Life {
    /// How often the node's data directory was started.
    pub incarnation: u64,
    /// Drawn at start: tells apart two processes on copies of one directory.
    pub process: u64,
}

impl Life {
    /// The newest life that the catalog knows; none of a node that never registered, or did before lives were kept.
    pub(super) fn of(node: &NodeRecord) -> Option<Self> {
        let life = Self { incarnation: node.incarnation, process: node.process };
        (life.incarnation > 0).then_some(life)
    }
}

/// What a node shows with every call and every answer, once it has a cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Membership {
    /// The cluster whose data it holds.
    pub cluster: ClusterId,
    /// This process of it.
    pub life: Life,
}

/// What a node says of itself with every call and every answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Speaks {
    /// The newest version of the cluster that it can take part in.
    pub newest: ClusterVersion,
    /// Whether the cluster's version is to be raised by command only.
    pub held: bool,
}

impl Speaks {
    /// What this build speaks, and nothing held back.
    pub const NEWEST: Self = Self { newest: ClusterVersion::NEWEST, held: false };

    /// What these headers say.
    pub(crate) fn of(headers: &HeaderMap) -> Self {
        let text = headers.get(&VERSION).and_then(|value| value.to_str().ok()).unwrap_or_default();
        let (number, held) = text.strip_suffix(HELD).map_or((text, false), |number| (number, true));
        Self { newest: ClusterVersion::or_first(number.parse().unwrap_or_default()), held }
    }

    fn show(self, headers: &mut HeaderMap) {
        let text = format!("{}{}", self.newest, if self.held { HELD } else { "" });
        // Digits, letters and a hyphen: always a valid header.
        if let Ok(value) = HeaderValue::try_from(text) {
            headers.insert(VERSION, value);
        }
    }
}

/// Why a peer is not spoken to.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub(super) enum Stranger {
    #[error("peers must show a certificate that names a node as ensign-node-ID")]
    NoCertificate,
    #[error(
        "node {peer} is not a peer of node {me}: neither the catalog nor cluster.peers there names it (it never joined, or was \
         removed), or it claims to be that node"
    )]
    NotAPeer { peer: NodeId, me: NodeId },
    #[error("node {peer} does not say which cluster it belongs to: it runs another version, or has joined none")]
    NoCluster { peer: NodeId },
    #[error(
        "node {peer} belongs to cluster {theirs}, node {me} to cluster {ours}: one of them has the data directory of another \
         cluster. Correct cluster.peers, or give the node that does not belong here an empty data directory and a new node.id"
    )]
    OtherCluster { peer: NodeId, theirs: ClusterId, me: NodeId, ours: ClusterId },
    /// `registered`: the catalog knows the life that was seen.
    #[error("{}", two_lives(*.peer, *.seen, *.shown))]
    Twin { peer: NodeId, seen: u64, shown: u64, registered: bool },
    #[error(
        "node {peer} has lived before (life {seen}), and comes back without its data: its node.data_dir is empty. If the data is elsewhere, \
         for example because a path in its settings depends on the folder that it is started in, correct node.data_dir. If it is lost, what \
         the node promised is lost with it, and it may not vote under this number again: give it a new node.id (`ensign cluster \
         join` does), and remove node {peer}"
    )]
    Wiped { peer: NodeId, seen: u64 },
    #[error(
        "node {peer} was removed from the cluster: it may come back only as a new node, with an empty data directory"
    )]
    Removed { peer: NodeId },
    #[error(
        "the certificate of node {peer} is for cluster {theirs}, and this is cluster {ours}: give the node a certificate of this \
         cluster, or correct the addresses"
    )]
    OtherCertificate { peer: NodeId, theirs: ClusterId, ours: ClusterId },
    #[error(
        "node {peer} speaks versions of the cluster up to {speaks}, and the cluster is at version {active}: run a newer version of ensign on \
         it, one that speaks version {active}"
    )]
    TooOld { peer: NodeId, speaks: ClusterVersion, active: ClusterVersion },
    #[error("the certificate is not a node's: its ensign:// name does not have the role node")]
    NoNode,
}

fn two_lives(peer: NodeId, seen: u64, shown: u64) -> String {
    let this = if shown == seen {
        format!("has begun life {shown} of it, as another one had before")
    } else {
        format!("is in life {shown} of it, and life {seen} is known")
    };
    format!(
        "two processes run as node {peer}: this one {this} (each start of a data directory is one life). One of the two runs on a copy of \
         the other's data directory, or has the wrong node.id: stop that one, then start the other one again. A node that lost its data \
         comes back under a new node.id"
    )
}

impl Stranger {
    /// What it means for the process that is refused, where that is for ever. Of two that began the same life, the one that registered stays.
    fn ended(&self) -> Option<Ended> {
        match self {
            Self::Removed { .. } => Some(Ended::Removed),
            Self::Twin { seen, shown, registered, .. } if seen > shown || *registered => {
                Some(Ended::Outlived { seen: *seen })
            }
            Self::Twin { .. }
            | Self::NoCertificate
            | Self::NotAPeer { .. }
            | Self::NoCluster { .. }
            | Self::OtherCluster { .. }
            | Self::Wiped { .. }
            | Self::OtherCertificate { .. }
            | Self::TooOld { .. }
            | Self::NoNode => None,
        }
    }
}

impl From<&Stranger> for Status {
    fn from(stranger: &Stranger) -> Self {
        let code = match stranger {
            Stranger::NoCertificate => Code::Unauthenticated,
            Stranger::NotAPeer { .. }
            | Stranger::Removed { .. }
            | Stranger::OtherCertificate { .. }
            | Stranger::NoNode => Code::PermissionDenied,
            Stranger::NoCluster { .. }
            | Stranger::OtherCluster { .. }
            | Stranger::Twin { .. }
            | Stranger::TooOld { .. }
            | Stranger::Wiped { .. } => Code::FailedPrecondition,
        };
        Self::new(code, stranger.to_string())
    }
}

/// Whether a call was refused before any service saw it: a proof that it had no effect.
pub(crate) fn is_refusal(status: &Status) -> bool {
    matches!(status.code(), Code::Unauthenticated | Code::PermissionDenied | Code::FailedPrecondition)
}

/// What this node shows its peers, and what it has seen of them.
pub(super) struct Gate {
    me: NodeId,
    own: Option<Membership>,
    speaks: Speaks,
    peers: Mutex<BTreeMap<NodeId, Seen>>,
    removed: Mutex<BTreeSet<NodeId>>,
    /// When somebody who is no peer was last complained about.
    stranger: Mutex<Option<Instant>>,
    /// The cluster's version: who does not speak it is no peer.
    required: AtomicU32,
    /// What a peer of this cluster has said about this process for good.
    ended: watch::Sender<Option<Ended>>,
}

#[derive(Default)]
struct Seen {
    life: Option<Life>,
    /// The newest life that the catalog has told.
    told: Option<Life>,
    complained: Option<Instant>,
    /// Cancelled when it is no peer any more, or lives anew.
    gone: CancellationToken,
}

impl Seen {
    /// It lives so from here on. What an earlier life has opened ends: of two processes on copies of one directory, one counts.
    fn lives(&mut self, life: Life) {
        if self.life.is_some_and(|before| before != life) {
            std::mem::take(&mut self.gone).cancel();
        }
        self.life = Some(life);
    }
}

impl Gate {
    /// For `me`, which has joined as `own` says or not yet. It knows nobody at first.
    pub(super) fn new(me: NodeId, own: Option<Membership>, speaks: Speaks) -> Self {
        let required = AtomicU32::new(ClusterVersion::V1.0);
        Self {
            me,
            own,
            speaks,
            peers: Mutex::default(),
            removed: Mutex::default(),
            stranger: Mutex::default(),
            required,
            ended: watch::Sender::new(None),
        }
    }

    /// Whether a peer has said that this process is no part of the cluster any more, and how it says so.
    pub(super) fn ended(&self) -> watch::Receiver<Option<Ended>> {
        self.ended.subscribe()
    }

    /// Notes what a peer that was recognized says of this process, unless a newer start of it knows better. Being removed weighs more.
    fn note_ended(&self, said: Option<Ended>) {
        let own = self.own.map_or(u64::MAX, |own| own.life.incarnation);
        let Some(said) = said.filter(|said| !matches!(said, Ended::Outlived { seen } if *seen < own)) else { return };
        self.ended.send_if_modified(|known| {
            let weighs = |ended: Ended| match ended {
                Ended::Removed => u64::MAX,
                Ended::Outlived { seen } => seen,
            };
            let newer = known.is_none_or(|known| weighs(said) > weighs(known));
            if newer {
                *known = Some(said);
            }
            newer
        });
    }

    /// Refuses who does not speak this version, from here on.
    pub(super) fn require(&self, version: ClusterVersion) {
        self.required.fetch_max(version.0, Ordering::SeqCst);
    }

    fn check_version(&self, peer: NodeId, headers: &HeaderMap) -> Result<(), Stranger> {
        let (speaks, active) = (Speaks::of(headers).newest, ClusterVersion(self.required.load(Ordering::SeqCst)));
        if speaks < active { Err(Stranger::TooOld { peer, speaks, active }) } else { Ok(()) }
    }

    /// Admits these peers and nobody else, and no life of theirs before the one that is told.
    pub(super) fn update(&self, others: impl Iterator<Item = (NodeId, Option<Life>)>) {
        let others: BTreeMap<NodeId, Option<Life>> = others.collect();
        let mut peers = self.lock();
        peers.retain(|peer, seen| {
            let stays = others.contains_key(peer);
            if !stays {
                seen.gone.cancel();
            }
            stays
        });
        for (peer, told) in others {
            let seen = peers.entry(peer).or_default();
            seen.told = told;
            // Of two processes that began the same life, the catalog says which came first.
            if let Some(told) = told
                && seen.life.is_none_or(|life| life.incarnation <= told.incarnation)
            {
                seen.lives(told);
            }
        }
    }

    /// Tells these why they are refused. They are no peers either: see [`Gate::update`].
    pub(super) fn remove(&self, removed: impl Iterator<Item = NodeId>) {
        *self.removed.lock().unwrap_or_else(PoisonError::into_inner) = removed.collect();
    }

    /// The node that a certificate names, if it may be a node of this cluster.
    fn certified(&self, certificate: Option<Certified>) -> Result<Option<NodeId>, Stranger> {
        let Some(certificate) = certificate else { return Ok(None) };
        if !certificate.is_node {
            return Err(Stranger::NoNode);
        }
        match (certificate.node, certificate.cluster, self.own) {
            (Some(peer), Some(theirs), Some(Membership { cluster: ours, .. })) if theirs != ours => {
                Err(Stranger::OtherCertificate { peer, theirs, ours })
            }
            (node, _, _) => Ok(node),
        }
    }

    /// Cancelled when the life of `peer` that `headers` show is over, or it is no peer any more; at once for a stranger, and for a life
    /// that is over already. A pipe outlives the call that opened it, and so must ask this.
    pub(super) fn gone(&self, peer: NodeId, headers: &HeaderMap) -> CancellationToken {
        let shown = Membership::of(headers).map(|shown| shown.life);
        let peers = self.lock();
        let seen = peers.get(&peer).filter(|seen| seen.life.is_none() || shown.is_none() || seen.life == shown);
        seen.map_or_else(
            || {
                let gone = CancellationToken::new();
                gone.cancel();
                gone
            },
            |seen| seen.gone.clone(),
        )
    }

    /// Who calls, if the call may go on.
    fn admit(&self, certificate: Option<NodeId>, path: &str, headers: &HeaderMap) -> Result<NodeId, Stranger> {
        let peer = certificate.ok_or(Stranger::NoCertificate)?;
        if self.removed.lock().unwrap_or_else(PoisonError::into_inner).contains(&peer) {
            return Err(Stranger::Removed { peer });
        }
        if peer == self.me || !self.lock().contains_key(&peer) {
            return Err(Stranger::NotAPeer { peer, me: self.me });
        }
        self.check_version(peer, headers)?;
        if path != HELLO {
            self.recognize(peer, headers)?;
        } else if Membership::of(headers).is_none()
            && let Some(life) = self.lock().get(&peer).and_then(|seen| seen.life)
        {
            return Err(Stranger::Wiped { peer, seen: life.incarnation });
        }
        Ok(peer)
    }

    /// Whether `peer`, whose certificate was checked, is of this cluster and lives once.
    fn recognize(&self, peer: NodeId, headers: &HeaderMap) -> Result<(), Stranger> {
        let own = self.own.ok_or(Stranger::NoCluster { peer: self.me })?;
        let shown = Membership::of(headers).ok_or(Stranger::NoCluster { peer })?;
        if shown.cluster != own.cluster {
            let (me, ours) = (self.me, own.cluster);
            return Err(Stranger::OtherCluster { peer, theirs: shown.cluster, me, ours });
        }
        let mut peers = self.lock();
        let seen = peers.get_mut(&peer).ok_or(Stranger::NotAPeer { peer, me: self.me })?;
        match seen.life {
            Some(life) if life == shown.life => Ok(()),
            Some(life) if shown.life.incarnation <= life.incarnation => {
                let registered = seen.told == Some(life);
                Err(Stranger::Twin { peer, seen: life.incarnation, shown: shown.life.incarnation, registered })
            }
            Some(_) | None => {
                seen.lives(shown.life);
                Ok(())
            }
        }
    }

    /// Says so in the log, now and then.
    fn complain(&self, peer: Option<NodeId>, stranger: &Stranger) {
        // A node without a cluster asks and is asked all the time: that is not worth a line.
        let mut peers = self.lock();
        let mut strangers = self.stranger.lock().unwrap_or_else(PoisonError::into_inner);
        // Whoever was removed, or never joined, is no peer, and tries as often as one.
        let last = peers.get_mut(&peer.unwrap_or(self.me)).map_or(&mut *strangers, |seen| &mut seen.complained);
        if last.is_none_or(|last| last.elapsed() >= COMPLAIN_EVERY) {
            *last = Some(Instant::now());
            error!(refused = %stranger, "a peer is not spoken to");
        }
    }

    fn show(&self, headers: &mut HeaderMap) {
        self.speaks.show(headers);
        if let Some(own) = self.own {
            own.show(headers);
        }
    }

    #[cfg(test)]
    pub(super) fn note(&self, peer: NodeId, life: Life) {
        self.update([(peer, Some(life))].into_iter());
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<NodeId, Seen>> {
        self.peers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Membership {
    fn show(self, headers: &mut HeaderMap) {
        let Life { incarnation, process } = self.life;
        let values = [(CLUSTER, self.cluster.to_string()), (LIFE, format!("{incarnation}-{process}"))];
        for (name, value) in values {
            // Letters, digits and a hyphen: always a valid header.
            if let Ok(value) = HeaderValue::try_from(value) {
                headers.insert(name, value);
            }
        }
    }

    fn of(headers: &HeaderMap) -> Option<Self> {
        let text = |name: &HeaderName| headers.get(name)?.to_str().ok();
        let (incarnation, process) = text(&LIFE)?.split_once('-')?;
        let life = Life { incarnation: incarnation.parse().ok()?, process: process.parse().ok()? };
        Some(Self { cluster: text(&CLUSTER)?.parse().ok()?, life })
    }
}

/// The node that a call's certificate names: put there by the gate, and by nothing else.
#[derive(Debug, Clone, Copy)]
pub(crate) struct CallingNode(pub(crate) NodeId);

/// Puts a gate in front of all that a node offers its peers.
#[derive(Clone)]
pub(super) struct GateLayer(pub(super) Arc<Gate>);

impl<S> Layer<S> for GateLayer {
    type Service = Gated<S>;

    fn layer(&self, inner: S) -> Gated<S> {
        Gated { inner, gate: Arc::clone(&self.0) }
    }
}

/// Services behind a gate.
#[derive(Clone)]
pub(super) struct Gated<S> {
    inner: S,
    gate: Arc<Gate>,
}

impl<S, B> Service<Request<B>> for Gated<S>
where
    S: Service<Request<B>, Response = Response<Body>>,
    S::Future: Send + 'static,
    S::Error: Send + 'static,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = BoxFuture<'static, Result<Response<Body>, S::Error>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request<B>) -> Self::Future {
        let gate = Arc::clone(&self.gate);
        let certificate = certificate_behind(&request);
        let admitted =
            gate.certified(certificate).and_then(|node| gate.admit(node, request.uri().path(), request.headers()));
        let answer = match admitted {
            Ok(peer) => {
                request.extensions_mut().insert(CallingNode(peer));
                self.inner.call(request).left_future()
            }
            Err(stranger) => {
                gate.complain(certificate.and_then(|certificate| certificate.node), &stranger);
                let mut refusal = Status::from(&stranger).into_http();
                if let Some(ended) = stranger.ended() {
                    ended.show(refusal.headers_mut());
                }
                futures::future::ready(Ok(refusal)).right_future()
            }
        };
        async move {
            let mut response = answer.await?;
            gate.show(response.headers_mut());
            Ok(response)
        }
        .boxed()
    }
}

fn certificate_behind<B>(request: &Request<B>) -> Option<Certified> {
    let connection = request.extensions().get::<TlsConnectInfo<TcpConnectInfo>>()?;
    connection.peer_certs()?.first().and_then(|certificate| Certified::read(certificate))
}

/// A connection to a peer: shows who calls, and believes no answer of another cluster or of a node's twin.
#[derive(Clone)]
pub struct PeerChannel {
    inner: Channel,
    peer: NodeId,
    gate: Arc<Gate>,
}

impl std::fmt::Debug for PeerChannel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PeerChannel").field("peer", &self.peer).finish_non_exhaustive()
    }
}

impl PeerChannel {
    pub(super) fn new(inner: Channel, peer: NodeId, gate: Arc<Gate>) -> Self {
        Self { inner, peer, gate }
    }
}

impl Service<Request<Body>> for PeerChannel {
    type Response = Response<Body>;
    type Error = BoxError;
    type Future = BoxFuture<'static, Result<Response<Body>, BoxError>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.inner.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, mut request: Request<Body>) -> Self::Future {
        let (gate, peer) = (Arc::clone(&self.gate), self.peer);
        gate.show(request.headers_mut());
        let answer = self.inner.call(request);
        async move {
            let response = answer.await?;
            // Who has no cluster yet asks for one, and has nothing to compare.
            if gate.own.is_none() {
                return Ok(response);
            }
            let headers = response.headers();
            let checked = gate.recognize(peer, headers).and_then(|()| gate.check_version(peer, headers));
            let Err(stranger) = checked else {
                gate.note_ended(Ended::of(headers));
                return Ok(response);
            };
            gate.complain(Some(peer), &stranger);
            // The peer's own refusal says that nothing happened there; for anything else, nobody knows.
            if Status::from_header_map(response.headers()).is_some_and(|status| is_refusal(&status)) {
                return Ok(response);
            }
            Err(Status::unknown(stranger.to_string()).into())
        }
        .boxed()
    }
}
