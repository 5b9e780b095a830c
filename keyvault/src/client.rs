//! What the rest of a node asks of the vault: rings, custody and secrets. Every call may be repeated.

mod receipts;
mod rings;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use ensign_proto::pb::vault::v1 as pb;
use ensign_proto::{Algorithm, ClusterId, KeyVersion, LogIndex, NodeId, PartitionContext, ProjectId, RingId};
use subtle::ConstantTimeEq as _;
use tokio::time::{Instant, sleep};
use zeroize::Zeroizing;

pub use self::receipts::{ReceiptKeyInfo, ReceiptKind, RingReceipts, SignedReceipt};
pub use self::rings::{RingState, ScheduledInfo};
use crate::entropy::Entropy;
use crate::error::CallError;
use crate::grant::{Opener, ProcessKey, secret_info};
use crate::holder::reply_result;
use crate::link::{Reason, Refusal, VaultLink};
use crate::vault::read_aad;
use crate::wire;
use crate::wrap::KekId;

/// What a version of a ring may still be used for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum VersionState {
    /// Seals and opens. At most one of a ring.
    Active,
    /// Opens only.
    Retired,
    /// Neither any more, but not every node has given it up yet.
    Disabling,
    /// Neither, until it is enabled again.
    Disabled,
    /// Being destroyed.
    Revoking,
    /// Destroyed, for ever.
    Revoked,
}

/// A version of a ring, as anyone may know it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VersionInfo {
    /// From 1.
    pub version: KeyVersion,
    /// What it may be used for.
    pub state: VersionState,
    /// Its key's public fingerprint.
    pub kek_id: KekId,
    /// When it was made, in Unix milliseconds.
    pub created_ms: u64,
    /// Since when it is in this state.
    pub changed_ms: u64,
    /// Revoked, and in no file of the vault any more.
    pub erased: bool,
}

/// A key ring, as anyone may know it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RingInfo {
    /// Its id.
    pub ring: RingId,
    /// The project it belongs to.
    pub project: ProjectId,
    /// How data keys that are made from now on seal.
    pub alg: Algorithm,
    /// When it was made, in Unix milliseconds.
    pub created_ms: u64,
    /// Ascending.
    pub versions: Vec<VersionInfo>,
    /// Whether it may be used as a whole.
    pub state: RingState,
    /// Empty for the ring that its project began with.
    pub name: String,
    /// How old the active version is when the next one is made.
    pub rotation: Duration,
    /// Revocations to come.
    pub scheduled: Vec<ScheduledInfo>,
    /// In the answer to a change: where that stands in the vault's log.
    pub index: LogIndex,
}

impl RingInfo {
    /// Whether it was revoked as a whole, and no node holds a key of it any more.
    pub fn is_destroyed(&self) -> bool {
        self.state == RingState::Revoked && self.versions.iter().all(|version| version.state == VersionState::Revoked)
    }

    /// The version that seals, if there is one.
    pub fn active(&self) -> Option<KeyVersion> {
        self.active_info().map(|version| version.version)
    }

    /// When the next version is made, in Unix milliseconds; `None` while none is active.
    pub fn next_rotation_ms(&self) -> Option<u64> {
        let period = u64::try_from(self.rotation.as_millis()).unwrap_or(u64::MAX);
        self.active_info().map(|version| version.created_ms.saturating_add(period))
    }

    fn active_info(&self) -> Option<&VersionInfo> {
        let usable = self.state == RingState::Enabled;
        self.versions.iter().find(|version| usable && version.state == VersionState::Active)
    }
}

/// What the vault committed when it destroyed keys: from here on no node can open what they sealed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Receipt {
    /// Of which ring.
    pub ring: RingId,
    /// The versions that this order destroyed, ascending.
    pub versions: Vec<(KeyVersion, KekId)>,
    /// Whether the whole ring was revoked.
    pub all: bool,
    /// The vault's epoch from then on.
    pub epoch: u64,
    /// Where the order and its completion stand in the vault's log.
    pub revoking: LogIndex,
    /// See `revoking`.
    pub drained: LogIndex,
    /// Nodes that gave the keys up.
    pub surrendered: Vec<NodeId>,
    /// Nodes that did not answer, and were outwaited.
    pub waited: Vec<NodeId>,
    /// From order to completion, by the leaders' wall clocks.
    pub took: Duration,
    /// The receipt as the vault signed it, a JWS in compact form. Empty while there is no receipt key, or it cannot be used.
    pub jws: String,
}

/// What a secret is for: its kind is part of its name, and bound into its box.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct SecretKind(pub u8);

impl SecretKind {
    /// A private key that signs tokens.
    pub const TOKEN_KEY: Self = Self(1);
    /// The credential hash of an API key.
    pub const API_KEY: Self = Self(2);
    /// The credential hash of a user.
    pub const USER: Self = Self(3);
    /// The private key of the cluster's certificate authority.
    pub const AUTHORITY: Self = Self(4);
}

/// A secret's name and revision.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SecretInfo {
    /// What it is for.
    pub kind: SecretKind,
    /// Which one.
    pub id: [u8; 16],
    /// From 1, counting up with each write.
    pub revision: u64,
    /// When it was written, in Unix milliseconds.
    pub changed_ms: u64,
}

/// A secret, in memory that is overwritten when it is dropped.
pub struct Secret {
    /// Its name.
    pub info: SecretInfo,
    bytes: Zeroizing<Vec<u8>>,
}

impl Secret {
    /// The secret itself.
    pub fn expose(&self) -> &[u8] {
        &self.bytes
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Secret").field(&self.info).finish()
    }
}

/// The most custody records that one commit of the vault takes.
pub const CUSTODY_BATCH_MAX: usize = crate::machine::CUSTODIES_MAX;

fn custodies_to(records: &[(NodeId, PartitionContext)]) -> pb::CustodiesRequest {
    let record = |(node, ctx): &(NodeId, PartitionContext)| pb::CustodyRequest {
        node: node.0,
        context: Some(wire::context_to(ctx)),
    };
    pb::CustodiesRequest { custody: records.iter().map(record).collect() }
}

/// An operator's seal was ordered or lifted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Held {
    /// Where in the vault's log.
    pub index: LogIndex,
    /// Whether a seal is in force now.
    pub held: bool,
    /// How long keys that were granted before may still be used.
    pub wait: Duration,
}

fn held_of(reply: pb::reply::Result) -> Result<Held, CallError> {
    let pb::reply::Result::Hold(reply) = reply else {
        return Err(CallError::Malformed { what: "it says nothing of a seal" });
    };
    Ok(Held { index: LogIndex(reply.index), held: reply.held, wait: Duration::from_millis(reply.wait_ms) })
}

/// Calls the vault. Clones are cheap and share the link.
#[derive(Clone)]
pub struct VaultClient {
    link: Arc<dyn VaultLink>,
    process: Arc<ProcessKey>,
    cluster: ClusterId,
    node: NodeId,
}

impl VaultClient {
    /// A client of this node.
    pub fn new(link: Arc<dyn VaultLink>, cluster: ClusterId, node: NodeId, entropy: &Entropy) -> Self {
        Self { link, process: Arc::new(ProcessKey::generate(entropy)), cluster, node }
    }

    /// Makes a ring with one active version. The same ring again is not an error.
    ///
    /// # Errors
    /// [`CallError`]; with `AlreadyExists` there is a different ring of that id.
    pub async fn create_ring(
        &self,
        actor: &str,
        ring: RingId,
        project: ProjectId,
        alg: Algorithm,
    ) -> Result<RingInfo, CallError> {
        let request = pb::CreateRingRequest {
            ring: wire::bytes(ring.as_bytes()),
            project: wire::bytes(project.as_bytes()),
            alg: alg as u32,
            name: String::new(),
        };
        ring_of(self.call(actor, pb::request::Call::CreateRing(request)).await?)
    }

    /// The rings of a project, or of all, in id order.
    ///
    /// # Errors
    /// [`CallError`].
    pub async fn list_rings(&self, project: Option<ProjectId>) -> Result<Vec<RingInfo>, CallError> {
        let mut rings: Vec<RingInfo> = Vec::new();
        loop {
            let request = pb::ListRingsRequest {
                project: project.map(|project| wire::bytes(project.as_bytes())).unwrap_or_default(),
                ring: Bytes::new(),
                after: rings.last().map(|ring| wire::bytes(ring.ring.as_bytes())).unwrap_or_default(),
                limit: 0,
            };
            let reply = self.list(request).await?;
            for ring in reply.rings {
                rings.push(ring_info(&ring)?);
            }
            if !reply.more {
                return Ok(rings);
            }
        }
    }

    /// One ring.
    ///
    /// # Errors
    /// [`CallError`]; with `NotFound` there is no such ring.
    pub async fn ring(&self, ring: RingId) -> Result<RingInfo, CallError> {
        let request = pb::ListRingsRequest { ring: wire::bytes(ring.as_bytes()), ..pb::ListRingsRequest::default() };
        let reply = self.list(request).await?;
        let absent = || Refusal::new(Reason::NotFound, format!("there is no key ring {ring}"));
        ring_info(reply.rings.first().ok_or_else(absent)?)
    }

    /// Makes a new active version, so that new data keys are wrapped under it. Nothing is re-written.
    ///
    /// With `expected`, only if that version is active; a repetition with it rotates once.
    ///
    /// # Errors
    /// [`CallError`]; with `Conflict` another version is active, with `Revoked` the ring is gone.
    pub async fn rotate(&self, actor: &str, ring: RingId, expected: Option<KeyVersion>) -> Result<RingInfo, CallError> {
        let request =
            pb::RotateRequest { ring: wire::bytes(ring.as_bytes()), expected: expected.map_or(0, |version| version.0) };
        ring_of(self.call(actor, pb::request::Call::Rotate(request)).await?)
    }

    /// Destroys one version of a ring, or with `None` all of them, and returns once no node can open what they sealed.
    ///
    /// That takes a round trip when every holder answers, at worst the lease wait. Dropping the future cancels nothing: what
    /// is ordered is carried out, and a repetition gets the same receipt.
    ///
    /// # Errors
    /// [`CallError`]; with `Pending` or `Unreachable` after `patience`, ask again.
    pub async fn revoke(
        &self,
        actor: &str,
        ring: RingId,
        version: Option<KeyVersion>,
        patience: Duration,
    ) -> Result<Receipt, CallError> {
        let target = version
            .map_or(pb::revoke_request::Target::All(true), |version| pb::revoke_request::Target::Version(version.0));
        let request = pb::RevokeRequest { ring: wire::bytes(ring.as_bytes()), target: Some(target) };
        match self.call_patiently(actor, patience, |_| pb::request::Call::Revoke(request.clone())).await? {
            pb::reply::Result::Receipt(receipt) => receipt_of(&receipt),
            _ => Err(CallError::Malformed { what: "it is not a receipt" }),
        }
    }

    /// Repeats what may be repeated, while the vault is on its way to it. `call` is told of the order that is under way.
    async fn call_patiently(
        &self,
        actor: &str,
        patience: Duration,
        call: impl Fn(LogIndex) -> pb::request::Call,
    ) -> Result<pb::reply::Result, CallError> {
        let deadline = Instant::now() + patience;
        let mut order = LogIndex(0);
        loop {
            let error = match self.call(actor, call(order)).await {
                Ok(result) => return Ok(result),
                Err(error) => error,
            };
            let passes = match error.reason() {
                None => matches!(error, CallError::Unreachable(_)),
                Some(reason) => matches!(
                    reason,
                    Reason::Pending | Reason::NotLeader | Reason::Unavailable | Reason::Sealed | Reason::OutcomeUnknown
                ),
            };
            if !passes || Instant::now() >= deadline {
                return Err(error);
            }
            if let CallError::Refused(refusal) = &error {
                order = order.max(refusal.order);
            }
            sleep(Duration::from_millis(50)).await;
        }
    }

    /// Seals the vault: no key and no secret is handed out any more, by whoever leads, also after restarts. Keys that nodes hold end
    /// within the wait that is returned.
    ///
    /// # Errors
    /// [`CallError`]. Safe to repeat.
    pub async fn seal(&self, actor: &str) -> Result<Held, CallError> {
        held_of(self.call(actor, pb::request::Call::Seal(pb::HoldRequest {})).await?)
    }

    /// Lifts an operator's seal. For a node whose voter has just proven the root key.
    ///
    /// # Errors
    /// [`CallError`]. Safe to repeat.
    pub async fn lift(&self, actor: &str) -> Result<Held, CallError> {
        held_of(self.call(actor, pb::request::Call::Lift(pb::HoldRequest {})).await?)
    }

    /// Lets a node hold the data keys of a partition. For the catalog, before a replica is placed.
    ///
    /// # Errors
    /// [`CallError`].
    pub async fn put_custody(&self, actor: &str, node: NodeId, ctx: &PartitionContext) -> Result<(), CallError> {
        let request = pb::CustodyRequest { node: node.0, context: Some(wire::context_to(ctx)) };
        self.call(actor, pb::request::Call::PutCustody(request)).await.map(drop)
    }

    /// Ends a node's custody of a partition. For the catalog, after a replica is gone. The node's lease may still run.
    ///
    /// # Errors
    /// [`CallError`].
    pub async fn drop_custody(&self, actor: &str, node: NodeId, ctx: &PartitionContext) -> Result<(), CallError> {
        let request = pb::CustodyRequest { node: node.0, context: Some(wire::context_to(ctx)) };
        self.call(actor, pb::request::Call::DropCustody(request)).await.map(drop)
    }

    /// Lets nodes hold the data keys of many partitions, in one commit for every [`CUSTODY_BATCH_MAX`] records. When it fails some
    /// of these commits may have been made; a repetition makes the rest.
    ///
    /// # Errors
    /// [`CallError`].
    pub async fn put_custodies(&self, actor: &str, records: &[(NodeId, PartitionContext)]) -> Result<(), CallError> {
        for batch in records.chunks(CUSTODY_BATCH_MAX) {
            match batch {
                // Voters of an older build know this one.
                [(node, ctx)] => self.put_custody(actor, *node, ctx).await?,
                _ => self.call(actor, pb::request::Call::PutCustodies(custodies_to(batch))).await.map(drop)?,
            }
        }
        Ok(())
    }

    /// Ends nodes' custody of many partitions, as [`VaultClient::put_custodies`] gives it.
    ///
    /// # Errors
    /// [`CallError`].
    pub async fn drop_custodies(&self, actor: &str, records: &[(NodeId, PartitionContext)]) -> Result<(), CallError> {
        for batch in records.chunks(CUSTODY_BATCH_MAX) {
            match batch {
                [(node, ctx)] => self.drop_custody(actor, *node, ctx).await?,
                _ => self.call(actor, pb::request::Call::DropCustodies(custodies_to(batch))).await.map(drop)?,
            }
        }
        Ok(())
    }

    /// Every node's custody of every partition.
    ///
    /// # Errors
    /// [`CallError`].
    pub async fn list_custody(&self) -> Result<Vec<(NodeId, PartitionContext)>, CallError> {
        let mut all = Vec::new();
        let mut after = None;
        loop {
            let request = pb::ListCustodyRequest { after: after.take(), limit: 0 };
            let answer = self.call("", pb::request::Call::ListCustody(request)).await?;
            let pb::reply::Result::ListCustody(reply) = answer else {
                return Err(CallError::Malformed { what: "it is not a list of custody" });
            };
            for custody in &reply.custody {
                all.push((NodeId(custody.node), wire::context_from(self.cluster, custody.context.as_ref())?));
            }
            if !reply.more {
                return Ok(all);
            }
            after = reply.custody.into_iter().next_back();
            if after.is_none() {
                return Err(CallError::Malformed { what: "a page of custody is empty and not the last" });
            }
        }
    }

    /// Writes a secret of at most 64 KiB over the revision `expected`; 0 means that there is none yet. A repetition after an
    /// unknown outcome finds its own write and succeeds.
    ///
    /// # Errors
    /// [`CallError`]; with `Conflict` the secret is at another revision, or is another one.
    pub async fn put_secret(
        &self,
        actor: &str,
        kind: SecretKind,
        id: [u8; 16],
        expected: u64,
        secret: &[u8],
    ) -> Result<SecretInfo, CallError> {
        let request = pb::PutSecretRequest {
            kind: u32::from(kind.0),
            id: wire::bytes(&id),
            expected,
            secret: Bytes::from_owner(Zeroizing::new(secret.to_vec())),
        };
        match self.call(actor, pb::request::Call::PutSecret(request)).await {
            Ok(pb::reply::Result::SecretMeta(meta)) => secret_info_of(&meta),
            Ok(_) => Err(CallError::Malformed { what: "it is not a secret's name" }),
            Err(error) if error.reason() == Some(Reason::Conflict) => {
                let stored = self.secret(kind, id).await.map_err(|_| error.clone())?;
                let mine = stored.info.revision == expected + 1 && bool::from(stored.expose().ct_eq(secret));
                if mine { Ok(stored.info) } else { Err(error) }
            }
            Err(error) => Err(error),
        }
    }

    /// Reads a secret, sealed to this process on its way.
    ///
    /// # Errors
    /// [`CallError`]; with `NotFound` there is none.
    pub async fn secret(&self, kind: SecretKind, id: [u8; 16]) -> Result<Secret, CallError> {
        let request = pb::SecretRequest {
            kind: u32::from(kind.0),
            id: wire::bytes(&id),
            hpke_pk: self.process.public().to_vec().into(),
        };
        let answer = self.call("", pb::request::Call::Secret(request)).await?;
        let pb::reply::Result::Secret(reply) = answer else {
            return Err(CallError::Malformed { what: "it is not a secret" });
        };
        let malformed = |what| CallError::Malformed { what };
        let info = secret_info_of(reply.meta.as_ref().ok_or(malformed("it has no name"))?)?;
        if (info.kind, info.id) != (kind, id) {
            return Err(malformed("it is another secret"));
        }
        let mut opener = Opener::new(&self.process, &reply.enc, &secret_info(self.cluster, self.node))
            .map_err(|_| malformed("it is not for this process"))?;
        let mut bytes = Zeroizing::new(vec![0; reply.sealed.len().saturating_sub(16)]);
        opener
            .open_into(&reply.sealed, &read_aad(kind.0, &id, info.revision), &mut bytes)
            .map_err(|_| malformed("it does not open"))?;
        Ok(Secret { info, bytes })
    }

    /// Deletes a secret, with `expected` only at that revision. Deleting what is not there is not an error.
    ///
    /// # Errors
    /// [`CallError`]; with `Conflict` the secret is at another revision.
    pub async fn delete_secret(
        &self,
        actor: &str,
        kind: SecretKind,
        id: [u8; 16],
        expected: Option<u64>,
    ) -> Result<(), CallError> {
        let request =
            pb::DeleteSecretRequest { kind: u32::from(kind.0), id: wire::bytes(&id), expected: expected.unwrap_or(0) };
        self.call(actor, pb::request::Call::DeleteSecret(request)).await.map(drop)
    }

    /// The names of all secrets of a kind, in id order.
    ///
    /// # Errors
    /// [`CallError`].
    pub async fn list_secrets(&self, kind: SecretKind) -> Result<Vec<SecretInfo>, CallError> {
        let mut secrets: Vec<SecretInfo> = Vec::new();
        loop {
            let request = pb::ListSecretsRequest {
                kind: u32::from(kind.0),
                after: secrets.last().map(|secret| wire::bytes(&secret.id)).unwrap_or_default(),
                limit: 0,
            };
            let answer = self.call("", pb::request::Call::ListSecrets(request)).await?;
            let pb::reply::Result::ListSecrets(reply) = answer else {
                return Err(CallError::Malformed { what: "it is not a list of secrets" });
            };
            for meta in &reply.secrets {
                secrets.push(secret_info_of(meta)?);
            }
            if !reply.more {
                return Ok(secrets);
            }
        }
    }

    async fn list(&self, request: pb::ListRingsRequest) -> Result<pb::ListRingsReply, CallError> {
        match self.call("", pb::request::Call::ListRings(request)).await? {
            pb::reply::Result::ListRings(reply) => Ok(reply),
            _ => Err(CallError::Malformed { what: "it is not a list of rings" }),
        }
    }

    async fn call(&self, actor: &str, call: pb::request::Call) -> Result<pb::reply::Result, CallError> {
        let request = pb::Request { actor: actor.to_owned(), call: Some(call) };
        reply_result(self.link.call(request).await?)
    }
}

impl fmt::Debug for VaultClient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VaultClient").field("node", &self.node).finish_non_exhaustive()
    }
}

fn ring_of(result: pb::reply::Result) -> Result<RingInfo, CallError> {
    match result {
        pb::reply::Result::Ring(ring) => ring_info(&ring),
        _ => Err(CallError::Malformed { what: "it is not a ring" }),
    }
}

fn ring_info(ring: &pb::Ring) -> Result<RingInfo, CallError> {
    let version = |version: &pb::Version| {
        let state = match version.state() {
            pb::VersionState::Active => VersionState::Active,
            pb::VersionState::Retired => VersionState::Retired,
            pb::VersionState::Disabling => VersionState::Disabling,
            pb::VersionState::Disabled => VersionState::Disabled,
            pb::VersionState::Revoking => VersionState::Revoking,
            pb::VersionState::Revoked => VersionState::Revoked,
            pb::VersionState::Unspecified => return Err(CallError::Malformed { what: "a version has no state" }),
        };
        Ok(VersionInfo {
            version: KeyVersion(version.version),
            state,
            kek_id: kek_id(&version.kek_id)?,
            created_ms: version.created_ms,
            changed_ms: version.changed_ms,
            erased: version.erased,
        })
    };
    Ok(RingInfo {
        ring: wire::id(&ring.ring, "ring")?,
        project: wire::id(&ring.project, "project")?,
        alg: wire::algorithm_from(ring.alg)?,
        created_ms: ring.created_ms,
        versions: ring.versions.iter().map(version).collect::<Result<_, _>>()?,
        state: match ring.state() {
            _ if ring.closed => RingState::Revoked,
            // A voter of an older build says nothing of it, and knows of nothing but enabled rings.
            pb::RingState::Unspecified | pb::RingState::Enabled => RingState::Enabled,
            pb::RingState::Disabling => RingState::Disabling,
            pb::RingState::Disabled => RingState::Disabled,
        },
        name: ring.name.clone(),
        rotation: Duration::from_millis(ring.rotation_ms),
        scheduled: ring.scheduled.iter().map(Into::into).collect(),
        index: LogIndex(ring.index),
    })
}

fn kek_id(bytes: &[u8]) -> Result<KekId, CallError> {
    bytes.try_into().map(KekId).map_err(|_| CallError::Malformed { what: "a key fingerprint is not 32 bytes" })
}

fn receipt_of(receipt: &pb::Receipt) -> Result<Receipt, CallError> {
    let versions = receipt.versions.iter();
    let nodes = |nodes: &[u64]| nodes.iter().copied().map(NodeId).collect();
    Ok(Receipt {
        ring: wire::id(&receipt.ring, "ring")?,
        versions: versions
            .map(|revoked| Ok((KeyVersion(revoked.version), kek_id(&revoked.kek_id)?)))
            .collect::<Result<_, CallError>>()?,
        all: receipt.all,
        epoch: receipt.epoch,
        revoking: LogIndex(receipt.revoking_index),
        drained: LogIndex(receipt.drained_index),
        surrendered: nodes(&receipt.surrendered),
        waited: nodes(&receipt.waited),
        took: Duration::from_millis(receipt.drained_ms.saturating_sub(receipt.revoking_ms)),
        jws: receipt.jws.clone(),
    })
}

fn secret_info_of(meta: &pb::SecretMeta) -> Result<SecretInfo, CallError> {
    let malformed = || CallError::Malformed { what: "a secret's name makes no sense" };
    Ok(SecretInfo {
        kind: SecretKind(u8::try_from(meta.kind).map_err(|_| malformed())?),
        id: meta.id[..].try_into().map_err(|_| malformed())?,
        revision: meta.revision,
        changed_ms: meta.changed_ms,
    })
}
