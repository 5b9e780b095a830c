//! The vault's state and its transitions: a pure function of state and command.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use bytes::Bytes;
use ensign_proto::pb::vault::v1 as pb;
use ensign_proto::{Algorithm, ClusterId, KeyVersion, LogIndex, ProjectId, RingId};
use ensign_storage::EntryId;
use prost::Message as _;
use sha2::{Digest as _, Sha256};

use super::command::{self, Change, Command};
use super::custody::CustodyKey;
use super::receipts::{DisableOrder, ReceiptKey};
use super::rings::{self, Scheduled, Switch};
use super::secrets::Secret;
use crate::lease::LeaseTerms;
use crate::link::{Reason, Refusal};
use crate::root::{BLOB_MAX, REFERENCE_MAX};
use crate::wire::{self, Dead};
use crate::wrap::KekId;

/// Bounds of what the state may hold.
const RINGS_MAX: usize = 200_000;
const VERSIONS_MAX: usize = 4_096;
/// How much history a renewal can be answered from. Older sessions start over.
pub(crate) const EVENTS_MAX: usize = 4_096;

#[derive(Debug, Clone, PartialEq, Default)]
pub(crate) struct State {
    pub(crate) cluster: ClusterId,
    /// The vault master key, wrapped by the root key; `None` before bootstrap.
    pub(crate) master: Option<Master>,
    pub(crate) rings: BTreeMap<RingId, Ring>,
    pub(crate) custody: BTreeSet<CustodyKey>,
    pub(crate) secrets: BTreeMap<(u8, [u8; 16]), Secret>,
    /// The leases that are granted; `None` in what an older build wrote, until a leader says it.
    pub(crate) lease: Option<LeaseTerms>,
    /// The longest that may still be running since the last change of `lease`; `None` once they cannot.
    pub(crate) lease_before: Option<LeaseTerms>,
    /// Where `lease` was changed last.
    pub(crate) lease_changed: LogIndex,
    /// An operator has sealed the vault: nothing is granted until that is lifted.
    pub(crate) hold: Option<Hold>,
    /// Rises with every destruction of a key.
    pub(crate) epoch: u64,
    /// What holders need to hear of, oldest first.
    pub(crate) events: VecDeque<Event>,
    /// History up to here is gone.
    pub(crate) events_floor: LogIndex,
    pub(crate) audit_seq: u64,
    pub(crate) audit_head: [u8; 32],
    pub(crate) applied: LogIndex,
    /// Oldest first; the last one signs.
    pub(crate) receipt_keys: Vec<ReceiptKey>,
    /// Where a wrapped key was destroyed last: files that are older may hold it.
    pub(crate) destroyed: LogIndex,
    /// Of revocations that are not erased everywhere: where each was complete, and of which ring.
    pub(crate) erasures: BTreeMap<LogIndex, RingId>,
}

#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Master {
    pub(crate) epoch: u64,
    pub(crate) boxed: Bytes,
    pub(crate) root_id: [u8; 16],
    pub(crate) root_version: u32,
    /// The number of what keeps the root key, and what that calls it.
    pub(crate) kind: u32,
    pub(crate) reference: String,
}

/// An operator's seal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Hold {
    /// Where it was ordered. Ordering it again is another one.
    pub(crate) index: LogIndex,
    pub(crate) ms: u64,
    pub(crate) actor: String,
}

#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Ring {
    pub(crate) project: ProjectId,
    /// Of data keys that are made from now on.
    pub(crate) alg: Algorithm,
    pub(crate) created_ms: u64,
    /// Empty for the ring that the project began with.
    pub(crate) name: String,
    /// Of the ring as a whole, whatever those of its versions.
    pub(crate) switch: Switch,
    /// 0: as often as where nothing is said.
    pub(crate) rotation_ms: u64,
    pub(crate) scheduled: Vec<Scheduled>,
    pub(crate) versions: BTreeMap<KeyVersion, Version>,
    /// Revoked as a whole: no version is made any more.
    pub(crate) closed: bool,
    /// Ordered, and not complete yet.
    pub(crate) revocations: Vec<Revocation>,
    pub(crate) receipts: Vec<pb::Receipt>,
    /// Receipts of disablings.
    pub(crate) disabled: Vec<pb::Receipt>,
    /// Orders to disable that have holders to wait for.
    pub(crate) disablers: Vec<DisableOrder>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum VersionState {
    Active,
    Retired,
    Revoking,
    Revoked,
}

#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Version {
    pub(crate) state: VersionState,
    pub(crate) switch: Switch,
    /// The ring's when it was made: its box is bound to it.
    pub(crate) alg: Algorithm,
    pub(crate) kek_id: KekId,
    /// Empty once revoked: that is the destruction.
    pub(crate) boxed: Bytes,
    pub(crate) master_epoch: u64,
    pub(crate) created_ms: u64,
    pub(crate) changed_ms: u64,
}

#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Revocation {
    pub(crate) id: EntryId,
    pub(crate) versions: Vec<KeyVersion>,
    pub(crate) all: bool,
    pub(crate) ms: u64,
    pub(crate) actor: String,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Event {
    pub(crate) index: LogIndex,
    pub(crate) what: What,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum What {
    Dead(Dead),
    Rotated(RingId, KeyVersion),
    /// Something of it was disabled or enabled.
    Switched(RingId),
}

/// What a command did.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Done {
    Initialized,
    Ring(pb::Ring),
    /// Ordered at this index; complete once a receipt says so.
    Revoking(LogIndex),
    Revoked(Box<pb::Receipt>),
    /// Ordered at this index; complete once its switch is off.
    Disabling(LogIndex),
    Elapsed,
    Custody(LogIndex),
    Secret(pb::SecretMeta),
    Lease,
    /// Sealed, or lifted, at this index.
    Hold(LogIndex),
    ReceiptKey,
    Erased,
}

pub(crate) type Outcome = Result<Done, Refusal>;

pub(super) fn refuse<T>(reason: Reason, message: impl Into<String>) -> Result<T, Refusal> {
    Err(Refusal::new(reason, message))
}

impl State {
    pub(crate) fn apply(&mut self, at: EntryId, command: &Command, change: Change) -> Outcome {
        self.applied = at.index;
        if self.master.is_none() && !matches!(change, Change::Initialize(_)) {
            return refuse(Reason::Sealed, "the vault is not initialized");
        }
        match change {
            Change::Initialize(change) => self.initialize(at, command, &change),
            Change::CreateRing(change) => self.create_ring(at, command, &change),
            Change::Rotate(change) => self.rotate(at, command, &change),
            Change::Revoke(change) => self.revoke(at, command, &change),
            Change::Drain(change) => self.drain(at, command, &change),
            Change::Disable(change) => self.disable(at, command, &change),
            Change::SettleDisable(change) => self.settle_disable(at, command, &change),
            Change::Enable(change) => self.enable(at, command, &change),
            Change::SetRing(change) => self.set_ring(at, command, &change),
            Change::ScheduleRevoke(change) => self.schedule_revoke(at, command, &change),
            Change::CancelRevoke(change) => self.cancel_revoke(at, command, &change),
            Change::Elapse(change) => Ok(self.elapse(&change)),
            Change::RevokeDue(change) => self.revoke_due(at, command, &change),
            Change::PutCustody(change) => self.put_custody(at, command, &change),
            Change::DropCustody(change) => self.drop_custody(at, command, &change),
            Change::PutCustodies(change) => self.put_custodies(at, command, &change),
            Change::DropCustodies(change) => self.drop_custodies(at, command, &change),
            Change::PutSecret(change) => self.put_secret(at, command, change),
            Change::DeleteSecret(change) => self.delete_secret(at, command, &change),
            Change::SetLease(change) => self.set_lease(at, command, change.terms),
            Change::SettleLease(change) => self.settle_lease(&change),
            Change::Seal(_) => Ok(self.hold(at, command)),
            Change::Lift(_) => Ok(self.lift(at, command)),
            Change::AddReceiptKey(change) => self.add_receipt_key(at, command, &change),
            Change::Erase(change) => Ok(self.erase(at, command, &change)),
        }
    }

    fn initialize(&mut self, at: EntryId, command: &Command, change: &command::Initialize) -> Outcome {
        let root_id: [u8; 16] = wire::id::<RingId>(&change.root_id, "root id").map(|id| *id.as_bytes())?;
        if let Some(master) = &self.master {
            // The first one wins; a repetition with the same root key changes nothing.
            return if master.root_id == root_id {
                Ok(Done::Initialized)
            } else {
                refuse(Reason::AlreadyExists, "the vault was initialized with another root key")
            };
        }
        if change.lease.is_some_and(|terms| !terms.are_safe()) {
            return Err(wire::malformed("lease"));
        }
        if change.master_box.len() > BLOB_MAX || change.reference.len() > REFERENCE_MAX {
            return Err(wire::malformed("master box"));
        }
        self.cluster = wire::id(&change.cluster, "cluster")?;
        self.lease = change.lease;
        self.lease_changed = if self.lease.is_some() { at.index } else { LogIndex(0) };
        let boxed = change.master_box.clone();
        self.master = Some(Master {
            epoch: 1,
            boxed,
            root_id,
            root_version: change.root_version,
            kind: change.kind,
            reference: change.reference.clone(),
        });
        self.epoch = 1;
        self.record(at, command, "initialize", &root_id, 0);
        Ok(Done::Initialized)
    }

    /// W: from a grant on, after this long none of the leases that may be running is.
    pub(crate) fn lease_wait(&self) -> std::time::Duration {
        let now = self.lease.unwrap_or(LeaseTerms::LONGEST).wait();
        self.lease_before.map_or(now, |before| now.max(before.wait()))
    }

    fn set_lease(&mut self, at: EntryId, command: &Command, terms: LeaseTerms) -> Outcome {
        if !terms.are_safe() {
            return Err(wire::malformed("lease"));
        }
        if self.lease == Some(terms) {
            return Ok(Done::Lease);
        }
        // What was granted runs on. Several changes in a row: the longest of all counts.
        let old = self.lease.unwrap_or(LeaseTerms::LONGEST);
        let before = self.lease_before.filter(|before| before.wait() > old.wait());
        self.lease_before = Some(before.unwrap_or(old));
        self.lease = Some(terms);
        self.lease_changed = at.index;
        let length = u32::try_from(terms.length_ms).unwrap_or(u32::MAX);
        self.record(at, command, "set lease", &[0; 16], length);
        Ok(Done::Lease)
    }

    /// From here on nothing is granted, by whoever leads, until it is lifted. A repetition is a seal of its own: it also concerns
    /// voters that have proven the root key since the first.
    fn hold(&mut self, at: EntryId, command: &Command) -> Done {
        self.hold = Some(Hold { index: at.index, ms: command.ms, actor: command.actor.clone() });
        self.record(at, command, "seal", &[0; 16], 0);
        Done::Hold(at.index)
    }

    fn lift(&mut self, at: EntryId, command: &Command) -> Done {
        if self.hold.take().is_some() {
            self.record(at, command, "unseal", &[0; 16], 0);
        }
        Done::Hold(at.index)
    }

    fn settle_lease(&mut self, change: &command::SettleLease) -> Outcome {
        // Whoever waited, waited for another change.
        if change.changed != self.lease_changed.0 {
            return refuse(Reason::Conflict, "the lease was changed again");
        }
        self.lease_before = None;
        Ok(Done::Lease)
    }

    fn create_ring(&mut self, at: EntryId, command: &Command, change: &command::CreateRing) -> Outcome {
        let id: RingId = wire::id(&change.ring, "ring")?;
        let project: ProjectId = wire::id(&change.project, "project")?;
        let alg = wire::algorithm_from(change.alg)?;
        if let Some(ring) = self.rings.get(&id) {
            // How it was made: what was set since makes it no other ring.
            let made = ring.versions.first_key_value().map_or(ring.alg, |(_, version)| version.alg);
            let same = ring.project == project && made == alg && ring.name == change.name;
            return if same {
                Ok(Done::Ring(ring.to_wire_at(id, at.index)))
            } else {
                refuse(Reason::AlreadyExists, format!("key ring {id} exists and is different"))
            };
        }
        if self.rings.len() >= RINGS_MAX {
            return refuse(Reason::Exhausted, format!("there are {RINGS_MAX} key rings"));
        }
        if !change.name.is_empty() {
            self.check_ring_name(project, &change.name)?;
        }
        let version = Version::active(&change.kek, alg, command.ms)?;
        let ring = Ring {
            project,
            alg,
            created_ms: command.ms,
            name: change.name.clone(),
            switch: Switch::On,
            rotation_ms: 0,
            scheduled: Vec::new(),
            versions: [(KeyVersion(1), version)].into(),
            closed: false,
            revocations: Vec::new(),
            receipts: Vec::new(),
            disabled: Vec::new(),
            disablers: Vec::new(),
        };
        let answer = ring.to_wire_at(id, at.index);
        self.rings.insert(id, ring);
        self.record(at, command, "create ring", id.as_bytes(), 1);
        Ok(Done::Ring(answer))
    }

    /// The name is fit for people, nobody else's in the project, and there is room.
    fn check_ring_name(&self, project: ProjectId, name: &str) -> Result<(), Refusal> {
        rings::check_name(name)?;
        let mut named = 0;
        for (id, ring) in self.rings.iter().filter(|(_, ring)| ring.project == project && !ring.name.is_empty()) {
            if ring.name == name {
                return refuse(Reason::AlreadyExists, format!("the project has a key ring {name} already: {id}"));
            }
            named += 1;
        }
        if named >= rings::NAMED_MAX {
            return refuse(Reason::Exhausted, format!("the project has {named} key rings beside its own"));
        }
        Ok(())
    }

    fn rotate(&mut self, at: EntryId, command: &Command, change: &command::Rotate) -> Outcome {
        let (id, ring) = self.ring_mut(&change.ring)?;
        if ring.closed {
            return Err(rings::closed(id));
        }
        if !ring.switch.is_on() {
            return Err(rings::disabled(id));
        }
        // Also one that is disabled: it is retired, and comes back as that.
        let active = ring.newest().unwrap_or_default();
        if change.expected != 0 && change.expected != active.0 {
            return refuse(
                Reason::Conflict,
                format!("version {active} of key ring {id} is active, not {}", change.expected),
            );
        }
        // Two leaders, or two callers, may have made the same version: the second one is refused, since its box is for it.
        if change.version != ring.next_version().0 {
            return refuse(Reason::Conflict, format!("the next version of key ring {id} is {}", ring.next_version()));
        }
        if ring.versions.len() >= VERSIONS_MAX {
            return refuse(Reason::Exhausted, format!("key ring {id} has {VERSIONS_MAX} versions"));
        }
        let version = Version::active(&change.kek, ring.alg, command.ms)?;
        if let Some(old) = ring.versions.get_mut(&active) {
            (old.state, old.changed_ms) = (VersionState::Retired, command.ms);
        }
        let new = KeyVersion(change.version);
        ring.versions.insert(new, version);
        let answer = ring.to_wire_at(id, at.index);
        self.event(at, What::Rotated(id, new));
        self.record(at, command, "rotate", id.as_bytes(), new.0);
        Ok(Done::Ring(answer))
    }

    /// Step 1 of a revoke: from here on nothing is granted under these versions. Not cancellable.
    pub(super) fn revoke(&mut self, at: EntryId, command: &Command, change: &command::Revoke) -> Outcome {
        let (id, ring) = self.ring_mut(&change.ring)?;
        let all = change.version == 0;
        let versions: Vec<KeyVersion> = if all {
            if ring.closed {
                return Ok(ring.revocation_outcome(|revocation| revocation.all, |receipt| receipt.all));
            }
            let living = ring.versions.iter().filter(|(_, version)| version.is_living());
            living.map(|(version, _)| *version).collect()
        } else {
            let which = KeyVersion(change.version);
            let Some(version) = ring.versions.get(&which) else {
                return refuse(Reason::NotFound, format!("key ring {id} has no version {which}"));
            };
            if !version.is_living() {
                return Ok(ring.revocation_outcome(
                    |revocation| revocation.versions.contains(&which),
                    |receipt| receipt.versions.iter().any(|revoked| revoked.version == which.0),
                ));
            }
            vec![which]
        };
        for which in &versions {
            if let Some(version) = ring.versions.get_mut(which) {
                (version.state, version.changed_ms) = (VersionState::Revoking, command.ms);
            }
        }
        ring.closed |= all;
        // What is revoked now need not be later.
        ring.scheduled.retain(|later| !all && later.version.0 != change.version);
        ring.revocations.push(Revocation {
            id: at,
            versions: versions.clone(),
            all,
            ms: command.ms,
            actor: command.actor.clone(),
        });
        if all {
            self.event(at, What::Dead(Dead::Ring(id)));
        } else {
            for version in &versions {
                self.event(at, What::Dead(Dead::Version(id, *version)));
            }
        }
        self.record(at, command, "revoking", id.as_bytes(), change.version);
        Ok(Done::Revoking(at.index))
    }

    /// Step 4: no holder is left, so the wrapped keys leave the state.
    fn drain(&mut self, at: EntryId, command: &Command, change: &command::Drain) -> Outcome {
        let (id, ring) = self.ring_mut(&change.ring)?;
        let revoking = LogIndex(change.revoking);
        let Some(place) = ring.revocations.iter().position(|revocation| revocation.id.index == revoking) else {
            // A new leader and an old one may both have waited; the second finds it done.
            let done = ring.receipts.iter().find(|receipt| receipt.revoking_index == revoking.0);
            return done.cloned().map(Box::new).map(Done::Revoked).ok_or_else(|| {
                Refusal::new(Reason::NotFound, format!("no revocation of key ring {id} was ordered at {revoking}"))
            });
        };
        let revocation = ring.revocations.remove(place);
        let mut receipt = pb::Receipt {
            v: 1,
            project: wire::bytes(ring.project.as_bytes()),
            ring: wire::bytes(id.as_bytes()),
            all: revocation.all,
            revoking_index: revocation.id.index.0,
            revoking_term: revocation.id.term.0,
            drained_index: at.index.0,
            drained_term: at.term.0,
            surrendered: change.surrendered.clone(),
            waited: change.waited.clone(),
            w_ms: change.w_ms,
            voters: change.voters.clone(),
            actor: revocation.actor.clone(),
            revoking_ms: revocation.ms,
            drained_ms: command.ms,
            ..pb::Receipt::default()
        };
        for which in &revocation.versions {
            let Some(version) = ring.versions.get_mut(which) else { continue };
            version.boxed = Bytes::new();
            (version.state, version.changed_ms) = (VersionState::Revoked, command.ms);
            let kek_id = Bytes::copy_from_slice(&version.kek_id.0);
            receipt.versions.push(pb::RevokedVersion { version: which.0, kek_id });
        }
        self.epoch += 1;
        receipt.cluster = wire::bytes(self.cluster.as_bytes());
        receipt.epoch = self.epoch;
        receipt.audit_prev = Bytes::copy_from_slice(&self.audit_head);
        let version = if revocation.all { 0 } else { revocation.versions.first().map_or(0, |version| version.0) };
        self.record(at, command, "revoked", id.as_bytes(), version);
        receipt.audit_seq = self.audit_seq;
        receipt.audit_this = Bytes::copy_from_slice(&self.audit_head);
        self.attest(&mut receipt);
        self.destroyed = at.index;
        self.erasures.insert(at.index, id);
        if let Some(ring) = self.rings.get_mut(&id) {
            ring.receipts.push(receipt.clone());
        }
        Ok(Done::Revoked(Box::new(receipt)))
    }

    pub(super) fn ring_mut(&mut self, id: &[u8]) -> Result<(RingId, &mut Ring), Refusal> {
        let id: RingId = wire::id(id, "ring")?;
        let ring = self.rings.get_mut(&id);
        ring.map(|ring| (id, ring)).ok_or_else(|| Refusal::new(Reason::NotFound, format!("there is no key ring {id}")))
    }

    pub(super) fn event(&mut self, at: EntryId, what: What) {
        self.events.push_back(Event { index: at.index, what });
        while self.events.len() > EVENTS_MAX {
            if let Some(oldest) = self.events.pop_front() {
                self.events_floor = oldest.index;
            }
        }
    }

    /// Adds a link to the chain of what was changed: H(label ‖ previous ‖ seq ‖ index ‖ term ‖ len ‖ record).
    pub(super) fn record(&mut self, at: EntryId, command: &Command, action: &str, object: &[u8; 16], detail: u32) {
        let record = AuditRecord {
            ms: command.ms,
            actor: command.actor.clone(),
            action: action.to_owned(),
            object: object.to_vec(),
            detail,
        }
        .encode_to_vec();
        self.audit_seq += 1;
        let mut hash = Sha256::new();
        hash.update(b"ensign/audit/v1");
        hash.update(self.audit_head);
        hash.update(self.audit_seq.to_be_bytes());
        hash.update(at.index.0.to_be_bytes());
        hash.update(at.term.0.to_be_bytes());
        hash.update((record.len() as u32).to_be_bytes());
        hash.update(&record);
        self.audit_head = hash.finalize().into();
    }
}

/// What an audit link covers.
#[derive(Clone, PartialEq, prost::Message)]
struct AuditRecord {
    #[prost(uint64, tag = "1")]
    ms: u64,
    #[prost(string, tag = "2")]
    actor: String,
    #[prost(string, tag = "3")]
    action: String,
    #[prost(bytes = "vec", tag = "4")]
    object: Vec<u8>,
    #[prost(uint32, tag = "5")]
    detail: u32,
}

impl Version {
    fn active(kek: &command::Kek, alg: Algorithm, ms: u64) -> Result<Self, Refusal> {
        let kek_id = kek.id[..].try_into().map_err(|_| wire::malformed("kek id"))?;
        Ok(Self {
            state: VersionState::Active,
            switch: Switch::On,
            alg,
            kek_id: KekId(kek_id),
            boxed: kek.boxed.clone(),
            master_epoch: kek.master_epoch,
            created_ms: ms,
            changed_ms: ms,
        })
    }

    pub(crate) fn is_living(&self) -> bool {
        matches!(self.state, VersionState::Active | VersionState::Retired)
    }
}

impl Ring {
    /// The version that seals; none while it is disabled.
    pub(crate) fn active(&self) -> Option<KeyVersion> {
        self.newest().filter(|newest| self.switch.is_on() && self.versions[newest].switch.is_on())
    }

    /// The version that seals, or would if it were enabled.
    pub(crate) fn newest(&self) -> Option<KeyVersion> {
        let active = self.versions.iter().find(|(_, version)| version.state == VersionState::Active);
        active.map(|(version, _)| *version)
    }

    pub(crate) fn next_version(&self) -> KeyVersion {
        KeyVersion(self.versions.last_key_value().map_or(0, |(version, _)| version.0) + 1)
    }

    /// What a repeated order to revoke is answered with.
    fn revocation_outcome(&self, pending: impl Fn(&Revocation) -> bool, done: impl Fn(&pb::Receipt) -> bool) -> Done {
        let receipt = self.receipts.iter().find(|receipt| done(receipt)).cloned().map(Box::new).map(Done::Revoked);
        let ordered = self.revocations.iter().find(|revocation| pending(revocation));
        // A version that is not living was revoked in one of the two ways.
        ordered.map(|revocation| Done::Revoking(revocation.id.index)).or(receipt).unwrap_or(Done::Revoking(LogIndex(0)))
    }

    pub(crate) fn to_wire(&self, id: RingId) -> pb::Ring {
        let gone = self.receipts.iter().filter(|receipt| receipt.erasure.is_some());
        let gone: BTreeSet<u32> = gone.flat_map(|receipt| &receipt.versions).map(|revoked| revoked.version).collect();
        let version = |(number, version): (&KeyVersion, &Version)| pb::Version {
            erased: gone.contains(&number.0),
            version: number.0,
            state: version.shown().into(),
            kek_id: Bytes::copy_from_slice(&version.kek_id.0),
            created_ms: version.created_ms,
            changed_ms: version.changed_ms,
        };
        pb::Ring {
            ring: wire::bytes(id.as_bytes()),
            project: wire::bytes(self.project.as_bytes()),
            alg: self.alg as u32,
            created_ms: self.created_ms,
            versions: self.versions.iter().map(version).collect(),
            closed: self.closed,
            name: self.name.clone(),
            state: match self.switch {
                Switch::On => pb::RingState::Enabled,
                Switch::Disabling(_) => pb::RingState::Disabling,
                Switch::Off(_) => pb::RingState::Disabled,
            }
            .into(),
            rotation_ms: self.rotation_ms(),
            scheduled: self.scheduled.iter().map(Scheduled::to_wire).collect(),
            index: 0,
        }
    }
}
