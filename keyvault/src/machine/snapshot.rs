//! The whole state as bytes: `version u8 = 2 or 3 ‖ protobuf ‖ SHA-256 of what precedes`. Version 1 had no leases. Version 3 is written
//! only where there is something that the build before could not respect: an operator's seal, a root key that no file keeps, a receipt key,
//! or a ring in which something is disabled, scheduled, named, set or erased.

use bytes::{BufMut as _, Bytes, BytesMut};
use ensign_proto::pb::vault::v1 as pb;
use ensign_proto::{KeyVersion, LogIndex, NodeId, Partition, PartitionContext, RingId, Term};
use ensign_raft::RestoreError;
use ensign_storage::EntryId;
use prost::Message as _;
use sha2::{Digest as _, Sha256};

use super::custody::CustodyKey;
use super::receipts::{DisableOrder, ReceiptKey};
use super::rings::{Scheduled, Switch};
use super::secrets::Secret;
use super::state::{Event, Hold, Master, Revocation, Ring, State, Version, VersionState, What};
use crate::lease::LeaseTerms;
use crate::link::Refusal;
use crate::wire;
use crate::wrap::KekId;

const VERSION: u8 = 3;
/// What is written where the build before understands all of it.
const BEFORE: u8 = 2;
/// The first version, without the fields 12 to 14.
const FIRST: u8 = 1;

#[derive(Clone, PartialEq, prost::Message)]
struct Whole {
    #[prost(bytes = "bytes", tag = "1")]
    cluster: Bytes,
    #[prost(message, optional, tag = "2")]
    master: Option<StoredMaster>,
    #[prost(message, repeated, tag = "3")]
    rings: Vec<StoredRing>,
    #[prost(message, repeated, tag = "4")]
    custody: Vec<StoredCustody>,
    #[prost(message, repeated, tag = "5")]
    secrets: Vec<StoredSecret>,
    #[prost(uint64, tag = "6")]
    epoch: u64,
    #[prost(message, repeated, tag = "7")]
    events: Vec<StoredEvent>,
    #[prost(uint64, tag = "8")]
    events_floor: u64,
    #[prost(uint64, tag = "9")]
    audit_seq: u64,
    #[prost(bytes = "bytes", tag = "10")]
    audit_head: Bytes,
    #[prost(uint64, tag = "11")]
    applied: u64,
    #[prost(message, optional, tag = "12")]
    lease: Option<LeaseTerms>,
    #[prost(message, optional, tag = "13")]
    lease_before: Option<LeaseTerms>,
    #[prost(uint64, tag = "14")]
    lease_changed: u64,
    #[prost(message, optional, tag = "40")]
    hold: Option<StoredHold>,
    #[prost(message, repeated, tag = "50")]
    receipt_keys: Vec<StoredReceiptKey>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct StoredReceiptKey {
    #[prost(bytes = "bytes", tag = "1")]
    public: Bytes,
    #[prost(bytes = "bytes", tag = "2")]
    boxed: Bytes,
    #[prost(uint64, tag = "3")]
    master_epoch: u64,
    #[prost(uint64, tag = "4")]
    created_ms: u64,
    #[prost(string, tag = "5")]
    endorsement: String,
}

#[derive(Clone, PartialEq, prost::Message)]
struct StoredMaster {
    #[prost(uint64, tag = "1")]
    epoch: u64,
    #[prost(bytes = "bytes", tag = "2")]
    boxed: Bytes,
    #[prost(bytes = "bytes", tag = "3")]
    root_id: Bytes,
    #[prost(uint32, tag = "4")]
    root_version: u32,
    #[prost(uint32, tag = "40")]
    kind: u32,
    #[prost(string, tag = "41")]
    reference: String,
}

#[derive(Clone, PartialEq, prost::Message)]
struct StoredHold {
    #[prost(uint64, tag = "1")]
    index: u64,
    #[prost(uint64, tag = "2")]
    ms: u64,
    #[prost(string, tag = "3")]
    actor: String,
}

#[derive(Clone, PartialEq, prost::Message)]
struct StoredRing {
    /// States, names and times, as callers see them.
    #[prost(message, required, tag = "1")]
    ring: pb::Ring,
    /// Of each version, in their order.
    #[prost(message, repeated, tag = "2")]
    boxes: Vec<StoredBox>,
    #[prost(message, repeated, tag = "3")]
    revocations: Vec<StoredRevocation>,
    #[prost(message, repeated, tag = "4")]
    receipts: Vec<pb::Receipt>,
    /// What was set; `ring` says what holds.
    #[prost(uint64, tag = "20")]
    rotation_ms: u64,
    #[prost(message, optional, tag = "21")]
    switch: Option<StoredSwitch>,
    /// Of disablings.
    #[prost(message, repeated, tag = "50")]
    disabled: Vec<pb::Receipt>,
    /// Orders to disable that have holders to wait for; `all` says nothing.
    #[prost(message, repeated, tag = "51")]
    disablers: Vec<StoredRevocation>,
}

/// Absent: on.
#[derive(Clone, PartialEq, prost::Message)]
struct StoredSwitch {
    /// Of the order.
    #[prost(uint64, tag = "1")]
    index: u64,
    /// No holder is left.
    #[prost(bool, tag = "2")]
    off: bool,
}

#[derive(Clone, PartialEq, prost::Message)]
struct StoredBox {
    #[prost(bytes = "bytes", tag = "1")]
    boxed: Bytes,
    #[prost(uint64, tag = "2")]
    master_epoch: u64,
    /// 0: the ring's.
    #[prost(uint32, tag = "20")]
    alg: u32,
    #[prost(message, optional, tag = "21")]
    switch: Option<StoredSwitch>,
    /// With `switch`: whether enabling it makes it the one that seals.
    #[prost(bool, tag = "22")]
    active: bool,
}

#[derive(Clone, PartialEq, prost::Message)]
struct StoredRevocation {
    #[prost(uint64, tag = "1")]
    index: u64,
    #[prost(uint64, tag = "2")]
    term: u64,
    #[prost(uint32, repeated, tag = "3")]
    versions: Vec<u32>,
    #[prost(bool, tag = "4")]
    all: bool,
    #[prost(uint64, tag = "5")]
    ms: u64,
    #[prost(string, tag = "6")]
    actor: String,
}

#[derive(Clone, PartialEq, prost::Message)]
struct StoredCustody {
    #[prost(uint64, tag = "1")]
    node: u64,
    #[prost(message, required, tag = "2")]
    context: pb::Context,
}

#[derive(Clone, PartialEq, prost::Message)]
struct StoredSecret {
    #[prost(uint32, tag = "1")]
    kind: u32,
    #[prost(bytes = "bytes", tag = "2")]
    id: Bytes,
    #[prost(uint64, tag = "3")]
    revision: u64,
    #[prost(bytes = "bytes", tag = "4")]
    boxed: Bytes,
    #[prost(uint64, tag = "5")]
    master_epoch: u64,
    #[prost(uint64, tag = "6")]
    changed_ms: u64,
}

#[derive(Clone, PartialEq, prost::Message)]
struct StoredEvent {
    #[prost(uint64, tag = "1")]
    index: u64,
    #[prost(message, optional, tag = "2")]
    dead: Option<pb::Dead>,
    #[prost(message, optional, tag = "3")]
    rotated: Option<pb::RingVersion>,
    #[prost(bytes = "bytes", tag = "20")]
    switched: Bytes,
}

pub(super) fn encode(state: &State) -> Bytes {
    let whole = to_stored(state);
    let mut out = BytesMut::with_capacity(1 + whole.encoded_len() + 32);
    let root = whole.master.as_ref().is_some_and(|master| master.kind != 0);
    out.put_u8(if whole.hold.is_some() || root || !whole.receipt_keys.is_empty() || needs_rings(state) {
        VERSION
    } else {
        BEFORE
    });
    whole.encode(&mut out).expect("a growing buffer has room");
    let digest = Sha256::digest(&out);
    out.put_slice(&digest);
    out.freeze()
}

pub(super) fn decode(bytes: &Bytes) -> Result<State, RestoreError> {
    let Some((body, digest)) = bytes.split_last_chunk::<32>() else {
        return Err(RestoreError::new("a vault snapshot is cut short"));
    };
    if Sha256::digest(body)[..] != digest[..] {
        return Err(RestoreError::new("a vault snapshot has a wrong checksum"));
    }
    if !body.first().is_some_and(|version| (FIRST..=VERSION).contains(version)) {
        return Err(RestoreError::new("a vault snapshot is of a newer format"));
    }
    let whole = Whole::decode(bytes.slice(1..body.len())).map_err(|error| RestoreError::new(error.to_string()))?;
    from_stored(&whole).map_err(|refusal| RestoreError::new(refusal.message))
}

/// Whether a build that knows nothing of switches, names, settings and schedules would lose something.
fn needs_rings(state: &State) -> bool {
    let plain = |ring: &Ring| {
        let of_ring = |version: &Version| version.switch.is_on() && version.alg == ring.alg;
        ring.name.is_empty()
            && ring.switch.is_on()
            && ring.rotation_ms == 0
            && ring.scheduled.is_empty()
            && ring.disabled.is_empty()
            && ring.receipts.iter().all(|receipt| receipt.voters.is_empty() && receipt.erasure.is_none())
            && ring.versions.values().all(of_ring)
    };
    !state.rings.values().all(plain) || state.events.iter().any(|event| matches!(event.what, What::Switched(_)))
}

fn switch_to(switch: Switch) -> Option<StoredSwitch> {
    let index = switch.ordered()?.0;
    Some(StoredSwitch { index, off: matches!(switch, Switch::Off(_)) })
}

fn switch_from(stored: Option<&StoredSwitch>) -> Switch {
    match stored {
        None => Switch::On,
        Some(StoredSwitch { index, off: true }) => Switch::Off(LogIndex(*index)),
        Some(StoredSwitch { index, off: false }) => Switch::Disabling(LogIndex(*index)),
    }
}

fn to_stored(state: &State) -> Whole {
    Whole {
        cluster: wire::bytes(state.cluster.as_bytes()),
        master: state.master.as_ref().map(|master| StoredMaster {
            epoch: master.epoch,
            boxed: master.boxed.clone(),
            root_id: wire::bytes(&master.root_id),
            root_version: master.root_version,
            kind: master.kind,
            reference: master.reference.clone(),
        }),
        rings: state.rings.iter().map(|(id, ring)| ring_to(*id, ring)).collect(),
        custody: state.custody.iter().map(custody_to).collect(),
        secrets: state
            .secrets
            .iter()
            .map(|((kind, id), secret)| StoredSecret {
                kind: u32::from(*kind),
                id: wire::bytes(id),
                revision: secret.revision,
                boxed: secret.boxed.clone(),
                master_epoch: secret.master_epoch,
                changed_ms: secret.changed_ms,
            })
            .collect(),
        epoch: state.epoch,
        events: state.events.iter().map(event_to).collect(),
        events_floor: state.events_floor.0,
        audit_seq: state.audit_seq,
        audit_head: Bytes::copy_from_slice(&state.audit_head),
        applied: state.applied.0,
        lease: state.lease,
        lease_before: state.lease_before,
        lease_changed: state.lease_changed.0,
        hold: state.hold.as_ref().map(|hold| StoredHold {
            index: hold.index.0,
            ms: hold.ms,
            actor: hold.actor.clone(),
        }),
        receipt_keys: state
            .receipt_keys
            .iter()
            .map(|key| StoredReceiptKey {
                public: Bytes::copy_from_slice(&key.public),
                boxed: key.boxed.clone(),
                master_epoch: key.master_epoch,
                created_ms: key.created_ms,
                endorsement: key.endorsement.clone(),
            })
            .collect(),
    }
}

fn from_stored(whole: &Whole) -> Result<State, Refusal> {
    let cluster = wire::id(&whole.cluster, "cluster")?;
    let mut state = State {
        cluster,
        epoch: whole.epoch,
        events_floor: LogIndex(whole.events_floor),
        audit_seq: whole.audit_seq,
        audit_head: whole.audit_head[..].try_into().map_err(|_| wire::malformed("audit head"))?,
        applied: LogIndex(whole.applied),
        lease: whole.lease,
        lease_before: whole.lease_before,
        lease_changed: LogIndex(whole.lease_changed),
        hold: whole.hold.as_ref().map(|hold| Hold {
            index: LogIndex(hold.index),
            ms: hold.ms,
            actor: hold.actor.clone(),
        }),
        ..State::default()
    };
    if let Some(master) = &whole.master {
        state.master = Some(Master {
            epoch: master.epoch,
            boxed: master.boxed.clone(),
            root_id: master.root_id[..].try_into().map_err(|_| wire::malformed("root id"))?,
            root_version: master.root_version,
            kind: master.kind,
            reference: master.reference.clone(),
        });
    }
    for stored in &whole.rings {
        let (id, ring) = ring_from(stored)?;
        state.rings.insert(id, ring);
    }
    for stored in &whole.custody {
        let ctx = wire::context_from(cluster, Some(&stored.context))?;
        state.custody.insert(CustodyKey::new(NodeId(stored.node), &ctx));
    }
    for stored in &whole.secrets {
        let kind = u8::try_from(stored.kind).map_err(|_| wire::malformed("kind"))?;
        let id = stored.id[..].try_into().map_err(|_| wire::malformed("id"))?;
        let secret = Secret {
            revision: stored.revision,
            boxed: stored.boxed.clone(),
            master_epoch: stored.master_epoch,
            changed_ms: stored.changed_ms,
        };
        state.secrets.insert((kind, id), secret);
    }
    for stored in &whole.events {
        let what = match (&stored.dead, &stored.rotated, stored.switched.is_empty()) {
            (Some(dead), None, true) => What::Dead(wire::dead_from(cluster, dead)?),
            (None, Some(rotated), true) => What::Rotated(wire::id(&rotated.ring, "ring")?, KeyVersion(rotated.version)),
            (None, None, false) => What::Switched(wire::id(&stored.switched, "switched")?),
            _ => return Err(wire::malformed("event")),
        };
        state.events.push_back(Event { index: LogIndex(stored.index), what });
    }
    for stored in &whole.receipt_keys {
        state.receipt_keys.push(ReceiptKey {
            public: stored.public[..].try_into().map_err(|_| wire::malformed("receipt key"))?,
            boxed: stored.boxed.clone(),
            master_epoch: stored.master_epoch,
            created_ms: stored.created_ms,
            endorsement: stored.endorsement.clone(),
        });
    }
    state.index_erasures();
    Ok(state)
}

fn ring_to(id: RingId, ring: &Ring) -> StoredRing {
    StoredRing {
        ring: ring.to_wire(id),
        boxes: ring
            .versions
            .values()
            .map(|version| StoredBox {
                boxed: version.boxed.clone(),
                master_epoch: version.master_epoch,
                alg: version.alg as u32,
                switch: switch_to(version.switch),
                active: version.state == VersionState::Active,
            })
            .collect(),
        revocations: ring
            .revocations
            .iter()
            .map(|revocation| StoredRevocation {
                index: revocation.id.index.0,
                term: revocation.id.term.0,
                versions: revocation.versions.iter().map(|version| version.0).collect(),
                all: revocation.all,
                ms: revocation.ms,
                actor: revocation.actor.clone(),
            })
            .collect(),
        receipts: ring.receipts.clone(),
        rotation_ms: ring.rotation_ms,
        switch: switch_to(ring.switch),
        disabled: ring.disabled.clone(),
        disablers: ring.disablers.iter().map(disabler_to).collect(),
    }
}

fn ring_from(stored: &StoredRing) -> Result<(RingId, Ring), Refusal> {
    let seen = &stored.ring;
    if seen.versions.len() != stored.boxes.len() {
        return Err(wire::malformed("boxes"));
    }
    let mut ring = Ring {
        project: wire::id(&seen.project, "project")?,
        alg: wire::algorithm_from(seen.alg)?,
        created_ms: seen.created_ms,
        name: seen.name.clone(),
        switch: switch_from(stored.switch.as_ref()),
        rotation_ms: stored.rotation_ms,
        scheduled: seen.scheduled.iter().map(scheduled_from).collect(),
        versions: std::collections::BTreeMap::new(),
        closed: seen.closed,
        revocations: Vec::new(),
        receipts: stored.receipts.clone(),
        disabled: stored.disabled.clone(),
        disablers: stored.disablers.iter().map(disabler_from).collect(),
    };
    for (version, stored) in seen.versions.iter().zip(&stored.boxes) {
        let state = match version.state() {
            pb::VersionState::Active => VersionState::Active,
            pb::VersionState::Retired => VersionState::Retired,
            pb::VersionState::Revoking => VersionState::Revoking,
            pb::VersionState::Revoked => VersionState::Revoked,
            pb::VersionState::Disabling | pb::VersionState::Disabled => {
                if stored.active {
                    VersionState::Active
                } else {
                    VersionState::Retired
                }
            }
            pb::VersionState::Unspecified => return Err(wire::malformed("state")),
        };
        let kek_id = KekId(version.kek_id[..].try_into().map_err(|_| wire::malformed("kek id"))?);
        let whole = Version {
            state,
            switch: switch_from(stored.switch.as_ref()),
            alg: if stored.alg == 0 { ring.alg } else { wire::algorithm_from(stored.alg)? },
            kek_id,
            boxed: stored.boxed.clone(),
            master_epoch: stored.master_epoch,
            created_ms: version.created_ms,
            changed_ms: version.changed_ms,
        };
        ring.versions.insert(KeyVersion(version.version), whole);
    }
    for stored in &stored.revocations {
        ring.revocations.push(Revocation {
            id: EntryId { term: Term(stored.term), index: LogIndex(stored.index) },
            versions: stored.versions.iter().copied().map(KeyVersion).collect(),
            all: stored.all,
            ms: stored.ms,
            actor: stored.actor.clone(),
        });
    }
    Ok((wire::id(&seen.ring, "ring")?, ring))
}

fn disabler_to(order: &DisableOrder) -> StoredRevocation {
    StoredRevocation {
        index: order.id.index.0,
        term: order.id.term.0,
        versions: vec![order.version.0],
        all: false,
        ms: order.ms,
        actor: order.actor.clone(),
    }
}

fn disabler_from(stored: &StoredRevocation) -> DisableOrder {
    DisableOrder {
        id: EntryId { term: Term(stored.term), index: LogIndex(stored.index) },
        version: KeyVersion(stored.versions.first().copied().unwrap_or_default()),
        ms: stored.ms,
        actor: stored.actor.clone(),
    }
}

fn scheduled_from(seen: &pb::Scheduled) -> Scheduled {
    Scheduled {
        index: LogIndex(seen.index),
        version: KeyVersion(seen.version),
        ordered_ms: seen.ordered_ms,
        actor: seen.actor.clone(),
        after_ms: seen.after_ms,
        waited_ms: seen.waited_ms,
    }
}

fn custody_to(key: &CustodyKey) -> StoredCustody {
    // The cluster is the same for all, so it is stored once.
    let ctx = PartitionContext {
        cluster: ensign_proto::ClusterId::default(),
        project: key.project,
        topic: key.topic,
        partition: Partition(key.partition),
    };
    StoredCustody { node: key.node.0, context: wire::context_to(&ctx) }
}

fn event_to(event: &Event) -> StoredEvent {
    let mut stored = StoredEvent { index: event.index.0, ..StoredEvent::default() };
    match &event.what {
        What::Dead(dead) => stored.dead = Some(wire::dead_to(dead)),
        What::Rotated(ring, version) => {
            stored.rotated = Some(pb::RingVersion { ring: wire::bytes(ring.as_bytes()), version: version.0 });
        }
        What::Switched(ring) => stored.switched = wire::bytes(ring.as_bytes()),
    }
    stored
}
