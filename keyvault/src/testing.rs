//! Doubles for tests of what is built on this crate: a vault without a cluster, and a clock that is set by hand.
//!
//! [`TestVault`] runs the real state machine and the real cryptography; only agreement is missing. So what a node built on
//! it sees of leases, rotations and revocations is what the vault does.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ensign_proto::pb::vault::v1 as pb;
use ensign_proto::{
    Algorithm, ClusterId, KeyVersion, LogIndex, NodeId, PartitionContext, ProjectId, RingId, SessionId, Term,
};
use ensign_raft::env::{BootTime, Clock, Tasks, UnixNanos};
use ensign_raft::{CommittedEntry, StateMachine as _};
use ensign_storage::EntryId;
use futures::FutureExt as _;
use futures::future::BoxFuture;

use crate::entropy::Entropy;
use crate::holder::{Holder, HolderConfig};
use crate::lease::LeaseConfig;
use crate::link::{LinkError, Reason, Refusal, VaultLink};
use crate::machine::{
    Change, Command, CreateRing, Custodies, Custody, DeleteSecret, Done, Drain, Hold, Outcome, Revoke, Rotate, SetRing,
    SettleDisable, State, Target, VaultMachine,
};
use crate::root::{RootProvider as _, TestRoot};
use crate::vault::{
    LeaseCall, MasterKey, custodies_from, custody_page, first_master, fulfil, plan, seal_reply, secret_name, stored,
    target_of,
};
use crate::wire::{self, Dead};

/// A clock that moves when it is told to.
#[derive(Debug, Default)]
pub struct ManualClock {
    boot_ns: AtomicU64,
    wall_ns: AtomicU64,
}

impl ManualClock {
    /// A clock at one hour after boot, in November 2023.
    pub fn new() -> Arc<Self> {
        let clock = Self::default();
        clock.boot_ns.store(3_600_000_000_000, Ordering::SeqCst);
        clock.wall_ns.store(1_700_000_000_000_000_000, Ordering::SeqCst);
        Arc::new(clock)
    }

    /// Lets time pass.
    pub fn advance(&self, by: Duration) {
        self.boot_ns.fetch_add(by.as_nanos() as u64, Ordering::SeqCst);
        self.wall_ns.fetch_add(by.as_nanos() as u64, Ordering::SeqCst);
    }

    /// Sets the wall clock, backwards too. The boot clock goes on as it did.
    pub fn set_wall(&self, to: UnixNanos) {
        self.wall_ns.store(to.0, Ordering::SeqCst);
    }

    /// Sets the boot clock, backwards too.
    pub fn set_boot(&self, to: BootTime) {
        self.boot_ns.store(to.0.as_nanos() as u64, Ordering::SeqCst);
    }
}

impl Clock for ManualClock {
    fn boot(&self) -> BootTime {
        BootTime(Duration::from_nanos(self.boot_ns.load(Ordering::SeqCst)))
    }

    fn wall(&self) -> UnixNanos {
        UnixNanos(self.wall_ns.load(Ordering::SeqCst))
    }
}

/// A vault in one piece, for tests.
pub struct TestVault {
    cluster: ClusterId,
    lease: LeaseConfig,
    entropy: Entropy,
    master: MasterKey,
    inner: Mutex<Inner>,
    reachable: AtomicBool,
    calls: AtomicU64,
    holders: Mutex<BTreeMap<SessionId, (NodeId, Holder)>>,
}

struct Inner {
    machine: VaultMachine,
    index: u64,
    ms: u64,
}

impl Inner {
    fn apply(&mut self, change: Change) -> Outcome {
        self.index += 1;
        self.ms += 1;
        let payload = Command::new(self.ms, "test", change).to_payload();
        let id = EntryId { term: Term(1), index: LogIndex(self.index) };
        self.machine.apply(&CommittedEntry { id, payload })
    }
}

impl TestVault {
    /// An initialized vault without rings.
    pub fn new(cluster: ClusterId) -> Arc<Self> {
        Self::with_lease(cluster, LeaseConfig::default())
    }

    /// An initialized vault that grants leases of this length.
    pub fn with_lease(cluster: ClusterId, lease: LeaseConfig) -> Arc<Self> {
        let entropy = Entropy::kernel();
        let root = TestRoot::new([0x5a; 32]);
        let mut inner = Inner { machine: VaultMachine::default(), index: 0, ms: 1_700_000_000_000 };
        let first = first_master(cluster, &root, None, &lease, &entropy).now_or_never();
        let first = first.and_then(Result::ok).expect("this root key is always there");
        let initialized = inner.apply(first);
        assert!(initialized.is_ok(), "an empty vault can be initialized");
        let state = inner.machine.state().expect("no newer build wrote to it");
        let (name, wrapped) = stored(cluster, state).expect("it was initialized");
        let unwrapped = root.unwrap(name, &wrapped, None).now_or_never().and_then(Result::ok);
        let master = MasterKey::new(name, unwrapped.expect("its root key opens it"));
        Arc::new(Self {
            cluster,
            lease,
            entropy,
            master,
            inner: Mutex::new(inner),
            reachable: AtomicBool::new(true),
            calls: AtomicU64::new(0),
            holders: Mutex::default(),
        })
    }

    /// How `node` reaches the vault.
    pub fn link(self: &Arc<Self>, node: NodeId) -> Arc<dyn VaultLink> {
        Arc::new(TestLink { vault: Arc::clone(self), node })
    }

    /// A holder for `node`, which also surrenders when keys are revoked.
    pub fn holder(self: &Arc<Self>, node: NodeId, clock: Arc<dyn Clock>, tasks: &Tasks) -> Holder {
        let config = HolderConfig { lease: self.lease, ..HolderConfig::new(self.cluster, node) };
        let holder = Holder::new(config, self.link(node), clock, tasks);
        self.holders().insert(holder.session(), (node, holder.clone()));
        holder
    }

    /// Cuts every node off the vault, or lets them through again.
    pub fn set_reachable(&self, reachable: bool) {
        self.reachable.store(reachable, Ordering::SeqCst);
    }

    /// How many calls have arrived.
    pub fn calls(&self) -> u64 {
        self.calls.load(Ordering::SeqCst)
    }

    /// Makes a ring for a project.
    pub fn create_ring(&self, project: ProjectId) -> RingId {
        let ring = RingId::from_bytes(self.entropy.array());
        let request = pb::CreateRingRequest {
            ring: wire::bytes(ring.as_bytes()),
            project: wire::bytes(project.as_bytes()),
            alg: 1,
            name: String::new(),
        };
        self.create(&request).expect("a fresh id is free");
        ring
    }

    /// Lets `node` hold the keys of a partition.
    pub fn put_custody(&self, node: NodeId, ctx: &PartitionContext) {
        self.inner().apply(Change::PutCustody(custody(node, ctx))).expect("custody can be put");
    }

    /// Ends that.
    pub fn drop_custody(&self, node: NodeId, ctx: &PartitionContext) {
        self.inner().apply(Change::DropCustody(custody(node, ctx))).expect("custody can be dropped");
    }

    /// Makes a new active version.
    pub fn rotate(&self, ring: RingId) -> KeyVersion {
        let request = pb::RotateRequest { ring: wire::bytes(ring.as_bytes()), expected: 0 };
        let ring = self.rotate_inner(&request).expect("the ring can be rotated");
        KeyVersion(ring.versions.last().map_or(0, |version| version.version))
    }

    /// Destroys a version, or all of them. Waits for the holders that [`TestVault::holder`] made, and never outwaits them.
    pub async fn revoke(&self, ring: RingId, version: Option<KeyVersion>) {
        let index = self.order_revoke(ring, version);
        self.finish_revoke(ring, version, index).await;
    }

    /// The first half of a revoke: nothing is granted any more, but nobody has surrendered.
    pub fn order_revoke(&self, ring: RingId, version: Option<KeyVersion>) -> LogIndex {
        let change = Revoke { ring: wire::bytes(ring.as_bytes()), version: version.map_or(0, |version| version.0) };
        match self.inner().apply(Change::Revoke(change)) {
            Ok(Done::Revoking(index)) => index,
            Ok(Done::Revoked(receipt)) => LogIndex(receipt.revoking_index),
            other => panic!("the ring cannot be revoked: {other:?}"),
        }
    }

    /// The second half.
    pub async fn finish_revoke(&self, ring: RingId, version: Option<KeyVersion>, index: LogIndex) {
        let dead = version.map_or(Dead::Ring(ring), |version| Dead::Version(ring, version));
        self.surrender_all(index, vec![wire::dead_to(&dead)], Vec::new()).await;
        let drain = Drain {
            ring: wire::bytes(ring.as_bytes()),
            revoking: index.0,
            surrendered: Vec::new(),
            waited: Vec::new(),
            w_ms: self.lease.wait().as_millis() as u64,
            voters: Vec::new(),
        };
        self.inner().apply(Change::Drain(drain)).expect("what was ordered can be completed");
    }

    /// Disables a version, or the whole ring. Waits as [`TestVault::revoke`] does.
    ///
    /// # Errors
    /// What the machine refuses.
    pub async fn disable(&self, ring: RingId, version: Option<KeyVersion>) -> Result<pb::Ring, Refusal> {
        let bytes = wire::bytes(ring.as_bytes());
        let target = Target { ring: bytes.clone(), version: version.map_or(0, |version| version.0) };
        let order = match self.inner().apply(Change::Disable(target))? {
            Done::Disabling(index) => index,
            other => panic!("a ring was disabled with {other:?}"),
        };
        let switched = self.inspect(|state| state.rings.get(&ring).map(|known| known.switched(ring, state.applied)));
        self.surrender_all(order, Vec::new(), switched.into_iter().collect()).await;
        expect_ring(self.inner().apply(Change::SettleDisable(SettleDisable {
            ring: bytes,
            disabling: order.0,
            ..SettleDisable::default()
        })))
    }

    /// Takes it back into use. Holders hear of it when they renew.
    pub fn enable(&self, ring: RingId, version: Option<KeyVersion>) {
        let target = Target { ring: wire::bytes(ring.as_bytes()), version: version.map_or(0, |version| version.0) };
        self.inner().apply(Change::Enable(target)).expect("what is not revoked can be enabled");
    }

    async fn surrender_all(&self, index: LogIndex, dead: Vec<pb::Dead>, switched: Vec<pb::Switched>) {
        let holders: Vec<(SessionId, Holder)> =
            self.holders().iter().map(|(session, (_, holder))| (*session, holder.clone())).collect();
        for (session, holder) in holders {
            let request = pb::SurrenderRequest {
                session: wire::bytes(session.as_bytes()),
                index: index.0,
                dead: dead.clone(),
                switched: switched.clone(),
            };
            while holder.surrender(request.clone()).await.is_err() {}
        }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn holders(&self) -> MutexGuard<'_, BTreeMap<SessionId, (NodeId, Holder)>> {
        self.holders.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn inspect<T>(&self, look: impl FnOnce(&State) -> T) -> T {
        look(self.inner().machine.state().expect("no newer build wrote to it"))
    }

    fn create(&self, request: &pb::CreateRingRequest) -> Result<pb::Ring, Refusal> {
        let (ring, project) = (wire::id(&request.ring, "ring")?, wire::id(&request.project, "project")?);
        let alg = Algorithm::Aes256Gcm;
        let kek = self.master.make_kek(project, ring, KeyVersion(1), alg, &self.entropy)?;
        let (ring, project) = (request.ring.clone(), request.project.clone());
        expect_ring(self.inner().apply(Change::CreateRing(CreateRing {
            ring,
            project,
            alg: alg as u32,
            kek,
            name: request.name.clone(),
        })))
    }

    fn rotate_inner(&self, request: &pb::RotateRequest) -> Result<pb::Ring, Refusal> {
        let id: RingId = wire::id(&request.ring, "ring")?;
        let found =
            self.inspect(|state| state.rings.get(&id).map(|ring| (ring.project, ring.alg, ring.next_version())));
        let (project, alg, version) =
            found.ok_or_else(|| Refusal::new(Reason::NotFound, "there is no such key ring"))?;
        let kek = self.master.make_kek(project, id, version, alg, &self.entropy)?;
        let change = Rotate { ring: request.ring.clone(), version: version.0, expected: request.expected, kek };
        expect_ring(self.inner().apply(Change::Rotate(change)))
    }

    fn hold(&self, change: Change) -> Result<pb::reply::Result, Refusal> {
        let Done::Hold(index) = self.inner().apply(change)? else {
            return Err(Refusal::new(Reason::OutcomeUnknown, "the vault answered something else"));
        };
        let (held, wait) = self.inspect(|state| (state.hold.is_some(), state.lease_wait()));
        let reply = pb::HoldReply { index: index.0, held, wait_ms: wait.as_millis() as u64 };
        Ok(pb::reply::Result::Hold(reply))
    }

    async fn dispatch(&self, node: NodeId, call: pb::request::Call) -> Result<pb::reply::Result, Refusal> {
        use pb::reply::Result as Answer;
        use pb::request::Call;
        match call {
            Call::Lease(request) => {
                let call = LeaseCall::parse(self.cluster, &request)?;
                let plan = self.inspect(|state| plan(state, node, &call))?;
                let ms = self.inner().ms;
                fulfil(plan, node, &call, &self.master, ms, &self.entropy).map(Answer::Lease)
            }
            Call::Release(request) => {
                self.holders().remove(&wire::id(&request.session, "session")?);
                Ok(Answer::Release(pb::ReleaseReply {}))
            }
            Call::CreateRing(request) => self.create(&request).map(Answer::Ring),
            Call::ListRings(request) => Ok(Answer::ListRings(self.inspect(|state| {
                let matches = |ring: &pb::Ring| {
                    (request.ring.is_empty() || ring.ring == request.ring)
                        && (request.project.is_empty() || ring.project == request.project)
                        && ring.ring > request.after
                };
                let rings = state.rings.iter().map(|(id, ring)| ring.to_wire(*id)).filter(matches).collect();
                pb::ListRingsReply { rings, more: false, index: state.applied.0 }
            }))),
            Call::Rotate(request) => self.rotate_inner(&request).map(Answer::Ring),
            Call::Revoke(request) => {
                let ring = wire::id(&request.ring, "ring")?;
                let version = match request.target {
                    Some(pb::revoke_request::Target::Version(version)) => Some(KeyVersion(version)),
                    _ => None,
                };
                if self.inspect(|state| !state.rings.contains_key(&ring)) {
                    return Err(Refusal::new(Reason::NotFound, "there is no such key ring"));
                }
                let index = self.order_revoke(ring, version);
                self.finish_revoke(ring, version, index).await;
                let receipt = self.inspect(|state| {
                    let receipts = state.rings.get(&ring).map(|ring| ring.receipts.clone()).unwrap_or_default();
                    receipts.into_iter().find(|receipt| receipt.revoking_index == index.0)
                });
                receipt.map(Answer::Receipt).ok_or_else(|| Refusal::new(Reason::Pending, "not yet"))
            }
            Call::Disable(request) => {
                let (ring, target) = target_of(&request)?;
                let version = KeyVersion(target.version);
                self.disable(ring, (version.0 != 0).then_some(version)).await.map(Answer::Ring)
            }
            Call::Enable(request) => {
                expect_ring(self.inner().apply(Change::Enable(target_of(&request)?.1))).map(Answer::Ring)
            }
            Call::SetRing(request) => {
                let set = SetRing { ring: request.ring, rotation_ms: request.rotation_ms, alg: request.alg };
                expect_ring(self.inner().apply(Change::SetRing(set))).map(Answer::Ring)
            }
            Call::ScheduleRevoke(_) | Call::CancelRevoke(_) => {
                Err(Refusal::new(Reason::Unavailable, "this double has no schedule"))
            }
            Call::ListReceipts(_) | Call::ReceiptKeys(_) => {
                Err(Refusal::new(Reason::Unavailable, "this double signs no receipts"))
            }
            Call::PutCustody(request) => self.custody(&request, Change::PutCustody),
            Call::DropCustody(request) => self.custody(&request, Change::DropCustody),
            Call::PutCustodies(request) => self.custodies(&request, Change::PutCustodies),
            Call::DropCustodies(request) => self.custodies(&request, Change::DropCustodies),
            Call::ListCustody(request) => self.inspect(|state| custody_page(state, &request)).map(Answer::ListCustody),
            Call::PutSecret(request) => {
                let (kind, id) = secret_name(request.kind, &request.id)?;
                let revision = request.expected + 1;
                let put = self.master.seal_secret(kind, &id, revision, &request.secret, &self.entropy)?;
                expect_secret(self.inner().apply(Change::PutSecret(put)))
            }
            Call::Secret(request) => {
                let key = secret_name(request.kind, &request.id)?;
                let found = self.inspect(|state| {
                    let secret = state.secrets.get(&key)?;
                    Some((secret.meta(key, state.applied), secret.boxed.clone()))
                });
                let (meta, boxed) = found.ok_or_else(|| Refusal::new(Reason::NotFound, "there is no such secret"))?;
                let secret = self.master.open_secret(key.0, &key.1, meta.revision, &boxed)?;
                seal_reply(self.cluster, node, &request.hpke_pk, meta, &secret, &self.entropy).map(Answer::Secret)
            }
            Call::DeleteSecret(request) => {
                let change = DeleteSecret { kind: request.kind, id: request.id.clone(), expected: request.expected };
                expect_secret(self.inner().apply(Change::DeleteSecret(change)))
            }
            Call::ListSecrets(request) => Ok(Answer::ListSecrets(self.inspect(|state| {
                let of_kind = state.secrets.iter().filter(|((kind, _), _)| u32::from(*kind) == request.kind);
                let later = of_kind.filter(|((_, id), _)| id[..] > request.after[..]);
                let secrets = later.map(|(key, secret)| secret.meta(*key, state.applied)).collect();
                pb::ListSecretsReply { secrets, more: false }
            }))),
            Call::Seal(_) => self.hold(Change::Seal(Hold {})),
            Call::Lift(_) => self.hold(Change::Lift(Hold {})),
            Call::Status(_) => Ok(Answer::Status(self.inspect(|state| pb::StatusReply {
                node: 1,
                leader: 1,
                term: 1,
                applied: state.applied.0,
                epoch: state.epoch,
                rings: state.rings.len() as u64,
                secrets: state.secrets.len() as u64,
                audit_seq: state.audit_seq,
                audit_head: state.audit_head.to_vec().into(),
                ..pb::StatusReply::default()
            }))),
        }
    }

    fn custody(
        &self,
        request: &pb::CustodyRequest,
        change: fn(Custody) -> Change,
    ) -> Result<pb::reply::Result, Refusal> {
        let ctx = wire::context_from(self.cluster, request.context.as_ref())?;
        self.change_custody(change(custody(NodeId(request.node), &ctx)))
    }

    fn custodies(
        &self,
        request: &pb::CustodiesRequest,
        change: fn(Custodies) -> Change,
    ) -> Result<pb::reply::Result, Refusal> {
        self.change_custody(change(custodies_from(self.cluster, request)?))
    }

    fn change_custody(&self, change: Change) -> Result<pb::reply::Result, Refusal> {
        match self.inner().apply(change)? {
            Done::Custody(index) => Ok(pb::reply::Result::Custody(pb::CustodyReply { index: index.0 })),
            other => panic!("a custody command was answered with {other:?}"),
        }
    }
}

impl fmt::Debug for TestVault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TestVault")
    }
}

fn custody(node: NodeId, ctx: &PartitionContext) -> Custody {
    Custody {
        node: node.0,
        project: wire::bytes(ctx.project.as_bytes()),
        topic: wire::bytes(ctx.topic.as_bytes()),
        partition: ctx.partition.0,
    }
}

fn expect_ring(outcome: Outcome) -> Result<pb::Ring, Refusal> {
    match outcome? {
        Done::Ring(ring) => Ok(ring),
        other => panic!("a ring command was answered with {other:?}"),
    }
}

fn expect_secret(outcome: Outcome) -> Result<pb::reply::Result, Refusal> {
    match outcome? {
        Done::Secret(meta) => Ok(pb::reply::Result::SecretMeta(meta)),
        other => panic!("a secret command was answered with {other:?}"),
    }
}

struct TestLink {
    vault: Arc<TestVault>,
    node: NodeId,
}

impl VaultLink for TestLink {
    fn call(&self, request: pb::Request) -> BoxFuture<'static, Result<pb::Reply, LinkError>> {
        let (vault, node) = (Arc::clone(&self.vault), self.node);
        Box::pin(async move {
            if !vault.reachable.load(Ordering::SeqCst) {
                return Err(LinkError::new("the test cut the link"));
            }
            vault.calls.fetch_add(1, Ordering::SeqCst);
            let call = request.call.ok_or_else(|| LinkError::new("an empty call"))?;
            let result = match vault.dispatch(node, call).await {
                Ok(result) => result,
                Err(refusal) => pb::reply::Result::Refusal(refusal.into()),
            };
            Ok(pb::Reply { result: Some(result) })
        })
    }
}

/// The wrapped keys that an entry of the vault's log carries, as it stores them: for tests that search files for their bytes.
pub fn wrapped_keys(entry: &[u8]) -> Vec<bytes::Bytes> {
    // The last byte is the log's own tag.
    let Some((_tag, payload)) = entry.split_last() else { return Vec::new() };
    match Command::from_payload(&bytes::Bytes::copy_from_slice(payload)) {
        Some((_, Change::CreateRing(made))) => vec![made.kek.boxed],
        Some((_, Change::Rotate(rotated))) => vec![rotated.kek.boxed],
        _ => Vec::new(),
    }
}
