//! Receipts: what an auditor is given when versions were disabled, revoked or erased, and the keys that sign it.
//!
//! What is signed is made here, while a command is applied, and stays in the state: every leader has the same bytes. The signature is
//! made when somebody asks for it (`vault`). What was committed before there was a receipt key gets its payload with the first one.

use std::collections::BTreeMap;

use bytes::Bytes;
use ensign_proto::pb::vault::v1 as pb;
use ensign_proto::{ClusterId, KeyVersion, LogIndex, ProjectId, RingId};
use ensign_storage::EntryId;
use serde::Serialize;

use super::command::{self, Command};
use super::state::{Done, Outcome, Ring, State, refuse};
use crate::link::Reason;
use crate::receipt::receipt_fingerprint;
use crate::wire;

/// One a year, for centuries.
const KEYS_MAX: usize = 512;
const BOX_MAX: usize = 1024;
const ENDORSEMENT_MAX: usize = 4096;
/// Receipts of disablings that a ring keeps; the oldest go.
const DISABLED_MAX: usize = 64;
/// Erasures of one command: what applies at once stays short.
const ERASURES_MAX: usize = 1_000;
/// How old a receipt key is when its successor is made.
const KEY_PERIOD_MS: u64 = 365 * 24 * 60 * 60 * 1_000;

pub(crate) const REVOKED: u32 = 1;
pub(crate) const DISABLED: u32 = 2;
pub(crate) const ERASED: u32 = 3;

/// A key pair that signs receipts, or did.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct ReceiptKey {
    pub(crate) public: [u8; 32],
    /// The private half, sealed as a secret of the vault's own.
    pub(crate) boxed: Bytes,
    pub(crate) master_epoch: u64,
    pub(crate) created_ms: u64,
    /// What its predecessor signed; empty for the first.
    pub(crate) endorsement: String,
}

impl ReceiptKey {
    /// What its box is bound to.
    pub(crate) fn object(public: &[u8; 32]) -> [u8; 16] {
        let mut object = [0; 16];
        object.copy_from_slice(&public[..16]);
        object
    }
}

/// An order to disable that has holders to wait for: what its receipt will say of it.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct DisableOrder {
    pub(crate) id: EntryId,
    /// 0: the ring.
    pub(crate) version: KeyVersion,
    pub(crate) ms: u64,
    pub(crate) actor: String,
}

impl State {
    /// The number of the receipt key that is to be made at `now_ms`, and the one that vouches for it.
    pub(crate) fn due_receipt_key(&self, now_ms: u64) -> Option<(u32, Option<&ReceiptKey>)> {
        let last = self.receipt_keys.last();
        let due = last.is_none_or(|last| now_ms >= last.created_ms.saturating_add(KEY_PERIOD_MS));
        (due && self.receipt_keys.len() < KEYS_MAX).then_some((self.receipt_keys.len() as u32 + 1, last))
    }

    pub(super) fn add_receipt_key(
        &mut self,
        at: EntryId,
        command: &Command,
        change: &command::AddReceiptKey,
    ) -> Outcome {
        let next = self.receipt_keys.len() + 1;
        if change.number as usize != next {
            return refuse(Reason::Conflict, format!("receipt key {next} is the next one"));
        }
        if next > KEYS_MAX {
            return refuse(Reason::Exhausted, format!("there are {KEYS_MAX} receipt keys"));
        }
        let public: [u8; 32] = change.public[..].try_into().map_err(|_| wire::malformed("public"))?;
        if change.boxed.len() > BOX_MAX || change.endorsement.len() > ENDORSEMENT_MAX {
            return Err(wire::malformed("receipt key"));
        }
        self.receipt_keys.push(ReceiptKey {
            public,
            boxed: change.boxed.clone(),
            master_epoch: change.master_epoch,
            created_ms: command.ms,
            endorsement: change.endorsement.clone(),
        });
        self.record(at, command, "receipt key", &ReceiptKey::object(&public), change.number);
        if next == 1 {
            for receipt in self.rings.values_mut().flat_map(|ring| ring.receipts.iter_mut().chain(&mut ring.disabled)) {
                (receipt.key, receipt.payload) = (1, payload(receipt));
            }
        }
        Ok(Done::ReceiptKey)
    }

    /// Lets the newest receipt key sign it.
    pub(super) fn attest(&self, receipt: &mut pb::Receipt) {
        let key = self.receipt_keys.len() as u32;
        if key != 0 {
            (receipt.key, receipt.payload) = (key, payload(receipt));
        }
    }

    /// The receipt of a disabling whose last holder is gone. The epoch and the record of it are made already.
    pub(super) fn attest_disabled(
        &mut self,
        at: EntryId,
        command: &Command,
        id: RingId,
        order: &DisableOrder,
        change: &command::SettleDisable,
        audit_prev: [u8; 32],
    ) {
        let (cluster, epoch) = (self.cluster, self.epoch);
        let Some(ring) = self.rings.get(&id) else { return };
        let all = order.version == KeyVersion(0);
        let named =
            ring.versions.iter().filter(|(which, it)| if all { it.is_living() } else { **which == order.version });
        let versions = named
            .map(|(which, it)| pb::RevokedVersion { version: which.0, kek_id: Bytes::copy_from_slice(&it.kek_id.0) });
        let mut receipt = pb::Receipt {
            v: 1,
            kind: DISABLED,
            cluster: wire::bytes(cluster.as_bytes()),
            project: wire::bytes(ring.project.as_bytes()),
            ring: wire::bytes(id.as_bytes()),
            versions: versions.collect(),
            all,
            epoch,
            revoking_index: order.id.index.0,
            revoking_term: order.id.term.0,
            drained_index: at.index.0,
            drained_term: at.term.0,
            surrendered: change.surrendered.clone(),
            waited: change.waited.clone(),
            w_ms: change.w_ms,
            voters: change.voters.clone(),
            actor: order.actor.clone(),
            revoking_ms: order.ms,
            drained_ms: command.ms,
            audit_seq: self.audit_seq,
            audit_prev: Bytes::copy_from_slice(&audit_prev),
            audit_this: Bytes::copy_from_slice(&self.audit_head),
            ..pb::Receipt::default()
        };
        self.attest(&mut receipt);
        if let Some(ring) = self.rings.get_mut(&id) {
            ring.disabled.push(receipt);
            let over = ring.disabled.len().saturating_sub(DISABLED_MAX);
            ring.disabled.drain(..over);
        }
    }

    /// The last step of a revocation: no member of the vault has the wrapped keys on its disk.
    pub(super) fn erase(&mut self, at: EntryId, command: &Command, change: &command::Erase) -> Done {
        let through = LogIndex(change.through);
        let due = self.erasures.range(..=through).take(ERASURES_MAX);
        let due: Vec<(LogIndex, RingId)> = due.map(|(drained, ring)| (*drained, *ring)).collect();
        for (drained, id) in due {
            self.erasures.remove(&drained);
            let find = |ring: &Ring| ring.receipts.iter().position(|it| it.drained_index == drained.0);
            let Some((place, mut receipt)) = self.rings.get(&id).and_then(|ring| {
                let place = find(ring)?;
                Some((place, ring.receipts[place].clone()))
            }) else {
                continue;
            };
            let prev = self.audit_head;
            let version = if receipt.all { 0 } else { receipt.versions.first().map_or(0, |it| it.version) };
            self.record(at, command, "erased", id.as_bytes(), version);
            let said = |node: &u64| change.voters.iter().any(|voter| voter.node == *node);
            let mut erasure = pb::Erasure {
                index: at.index.0,
                term: at.term.0,
                ms: command.ms,
                voters: change.voters.clone(),
                missing: receipt.voters.iter().copied().filter(|node| !said(node)).collect(),
                ..pb::Erasure::default()
            };
            let key = self.receipt_keys.len() as u32;
            if key != 0 {
                let audit = Audit::of(self.audit_seq, &prev, &self.audit_head);
                (erasure.key, erasure.payload) = (key, erased_payload(&receipt, &erasure, audit));
            }
            receipt.erasure = Some(erasure);
            if let Some(ring) = self.rings.get_mut(&id) {
                ring.receipts[place] = receipt;
            }
        }
        Done::Erased
    }

    /// When the oldest revocation that is not erased everywhere was complete.
    pub(crate) fn erasing_since_ms(&self) -> Option<u64> {
        let (drained, id) = self.erasures.first_key_value()?;
        let receipts = &self.rings.get(id)?.receipts;
        receipts.iter().find(|it| it.drained_index == drained.0).map(|it| it.drained_ms)
    }

    /// What follows from the receipts, after a state was read.
    pub(super) fn index_erasures(&mut self) {
        for (id, ring) in &self.rings {
            for receipt in &ring.receipts {
                let drained = LogIndex(receipt.drained_index);
                self.destroyed = self.destroyed.max(drained);
                if receipt.erasure.is_none() {
                    self.erasures.insert(drained, *id);
                }
            }
        }
    }
}

/// What there is to sign of a ring.
#[derive(Debug, Clone)]
pub(crate) struct Unsigned {
    pub(crate) signed: pb::SignedReceipt,
    pub(crate) key: u32,
    pub(crate) payload: Bytes,
}

impl Ring {
    /// Everything that was committed after `after`, in order.
    pub(crate) fn unsigned(&self, after: LogIndex) -> Vec<Unsigned> {
        let one = |it: &pb::Receipt, kind, index, ms, key, payload: &Bytes| Unsigned {
            signed: pb::SignedReceipt {
                kind,
                versions: it.versions.iter().map(|version| version.version).collect(),
                all: it.all,
                index,
                ms,
                jws: String::new(),
                missing: Vec::new(),
            },
            key,
            payload: payload.clone(),
        };
        let mut all: Vec<Unsigned> = Vec::new();
        for it in &self.receipts {
            all.push(one(it, REVOKED, it.drained_index, it.drained_ms, it.key, &it.payload));
            if let Some(erasure) = &it.erasure {
                let mut erased = one(it, ERASED, erasure.index, erasure.ms, erasure.key, &erasure.payload);
                erased.signed.missing.clone_from(&erasure.missing);
                all.push(erased);
            }
        }
        all.extend(
            self.disabled.iter().map(|it| one(it, DISABLED, it.drained_index, it.drained_ms, it.key, &it.payload)),
        );
        all.retain(|it| it.signed.index > after.0);
        all.sort_by_key(|it| (it.signed.index, it.signed.versions.clone()));
        all
    }

    /// Up to where the vault's members have to erase for this ring; `None` when all is done.
    pub(crate) fn erase_through(&self) -> Option<LogIndex> {
        let open = self.receipts.iter().filter(|receipt| receipt.erasure.is_none());
        open.map(|receipt| LogIndex(receipt.drained_index)).max()
    }
}

#[derive(Serialize)]
struct Payload<'a> {
    v: u32,
    kind: &'static str,
    cluster: String,
    project: String,
    ring: String,
    versions: Vec<Named>,
    epoch: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    revoking: Option<Place>,
    #[serde(skip_serializing_if = "Option::is_none")]
    disabling: Option<Place>,
    #[serde(skip_serializing_if = "Option::is_none")]
    drained: Option<Place>,
    #[serde(skip_serializing_if = "Option::is_none")]
    disabled: Option<Place>,
    #[serde(skip_serializing_if = "Option::is_none")]
    erased: Option<Place>,
    #[serde(skip_serializing_if = "Option::is_none")]
    basis: Option<Basis>,
    #[serde(skip_serializing_if = "Option::is_none")]
    voters: Option<Vec<String>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    erased_through: Option<BTreeMap<String, u64>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    missing: Option<Vec<String>>,
    actor: &'a str,
    time: String,
    audit: Audit,
    #[serde(skip_serializing_if = "Option::is_none")]
    erasure: Option<&'static str>,
}

#[derive(Serialize)]
struct Named {
    n: u32,
    kek_id: String,
    origin: &'static str,
}

#[derive(Serialize)]
struct Place {
    index: u64,
    term: u64,
}

#[derive(Serialize)]
struct Basis {
    surrendered: Vec<String>,
    waited: Vec<String>,
    w_ms: u64,
}

#[derive(Serialize)]
struct Audit {
    seq: u64,
    prev: String,
    this: String,
}

impl Audit {
    fn of(seq: u64, prev: &[u8], this: &[u8]) -> Self {
        Self { seq, prev: hex(prev), this: hex(this) }
    }
}

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::with_capacity(2 * bytes.len()), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

fn names(nodes: &[u64]) -> Vec<String> {
    nodes.iter().map(|node| format!("n{node}")).collect()
}

fn json(payload: &Payload<'_>) -> Bytes {
    serde_json::to_vec(payload).expect("strings and numbers are JSON").into()
}

/// What all receipts say.
fn common<'a>(receipt: &'a pb::Receipt, kind: &'static str, ms: u64, audit: Audit) -> Payload<'a> {
    let named = receipt.versions.iter().map(|it| Named { n: it.version, kek_id: hex(&it.kek_id), origin: "generated" });
    Payload {
        v: 1,
        kind,
        cluster: ClusterId::try_from(&receipt.cluster[..]).unwrap_or_default().to_string(),
        project: ProjectId::try_from(&receipt.project[..]).unwrap_or_default().to_string(),
        ring: RingId::try_from(&receipt.ring[..]).unwrap_or_default().to_string(),
        versions: named.collect(),
        epoch: receipt.epoch,
        revoking: None,
        disabling: None,
        drained: None,
        disabled: None,
        erased: None,
        basis: None,
        voters: None,
        erased_through: None,
        missing: None,
        actor: &receipt.actor,
        time: rfc3339(ms),
        audit,
        erasure: None,
    }
}

/// What is signed of a disabling or a revocation.
fn payload(receipt: &pb::Receipt) -> Bytes {
    let disabled = receipt.kind == DISABLED;
    let audit = Audit::of(receipt.audit_seq, &receipt.audit_prev, &receipt.audit_this);
    let ordered = Place { index: receipt.revoking_index, term: receipt.revoking_term };
    let done = Place { index: receipt.drained_index, term: receipt.drained_term };
    let basis = Basis { surrendered: names(&receipt.surrendered), waited: names(&receipt.waited), w_ms: receipt.w_ms };
    let mut payload = common(receipt, if disabled { "disabled" } else { "revoked" }, receipt.drained_ms, audit);
    if disabled {
        (payload.disabling, payload.disabled) = (Some(ordered), Some(done));
    } else {
        (payload.revoking, payload.drained, payload.erasure) = (Some(ordered), Some(done), Some("pending"));
    }
    (payload.basis, payload.voters) = (Some(basis), Some(names(&receipt.voters)));
    json(&payload)
}

/// What is signed of an erasure.
fn erased_payload(receipt: &pb::Receipt, erasure: &pb::Erasure, audit: Audit) -> Bytes {
    let mut payload = common(receipt, "erased", erasure.ms, audit);
    payload.drained = Some(Place { index: receipt.drained_index, term: receipt.drained_term });
    payload.erased = Some(Place { index: erasure.index, term: erasure.term });
    let through = erasure.voters.iter().map(|voter| (format!("n{}", voter.node), voter.through));
    payload.erased_through = Some(through.collect());
    // Of what was revoked before members were noted, nobody knows who had a copy.
    payload.missing = (!receipt.voters.is_empty()).then(|| names(&erasure.missing));
    json(&payload)
}

/// What a receipt key says of the next one, at this time.
pub(crate) fn endorsement(cluster: ClusterId, number: u32, public: &[u8; 32], ms: u64) -> Vec<u8> {
    #[derive(Serialize)]
    struct Endorsed {
        v: u32,
        cluster: String,
        number: u32,
        kid: String,
        time: String,
    }
    let kid = receipt_fingerprint(public);
    let endorsed = Endorsed { v: 1, cluster: cluster.to_string(), number, kid, time: rfc3339(ms) };
    serde_json::to_vec(&endorsed).expect("strings and numbers are JSON")
}

/// Unix milliseconds as text, always with three decimals. Not a library's: what is signed must not change with one.
fn rfc3339(ms: u64) -> String {
    let (days, rest) = (ms / 86_400_000, ms % 86_400_000);
    // Howard Hinnant's `civil_from_days`, for days since 1970: eras of 400 years that begin in March.
    let days = days + 719_468;
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1_460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let date = day - (153 * month + 2) / 5 + 1;
    let (month, next) = if month < 10 { (month + 3, 0) } else { (month - 9, 1) };
    let (seconds, millis) = (rest / 1_000, rest % 1_000);
    let (hour, minute, second) = (seconds / 3_600, seconds / 60 % 60, seconds % 60);
    format!("{:04}-{month:02}-{date:02}T{hour:02}:{minute:02}:{second:02}.{millis:03}Z", year + era * 400 + next)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_time_is_the_one_that_others_write(ms in 0_u64..253_402_300_800_000) {
            let seconds = i64::try_from(ms / 1_000).unwrap();
            let theirs = prost_types::Timestamp { seconds, nanos: (ms % 1_000 * 1_000_000) as i32 };
            prop_assert_eq!(rfc3339(ms).parse::<prost_types::Timestamp>().unwrap(), theirs);
        }
    }

    #[test]
    fn the_payload_of_a_revocation_has_the_documented_form() {
        let receipt = pb::Receipt {
            v: 1,
            cluster: Bytes::from_static(&[1; 16]),
            project: Bytes::from_static(&[2; 16]),
            ring: Bytes::from_static(&[3; 16]),
            versions: vec![pb::RevokedVersion { version: 3, kek_id: Bytes::from_static(&[0xab; 2]) }],
            epoch: 812,
            revoking_index: 9120,
            revoking_term: 7,
            drained_index: 9124,
            drained_term: 7,
            surrendered: vec![1, 2],
            waited: vec![3],
            w_ms: 14_500,
            voters: vec![1, 2, 3],
            actor: "apikey:\"x\"".to_owned(),
            drained_ms: 1_700_000_000_123,
            audit_seq: 5521,
            audit_prev: Bytes::from_static(&[4; 2]),
            audit_this: Bytes::from_static(&[5; 2]),
            ..pb::Receipt::default()
        };
        let text = String::from_utf8(payload(&receipt).to_vec()).unwrap();
        let (cluster, project, ring) = (
            ClusterId::from_bytes([1; 16]).to_string(),
            ProjectId::from_bytes([2; 16]).to_string(),
            RingId::from_bytes([3; 16]).to_string(),
        );
        let expected = format!(
            r#"{{"v":1,"kind":"revoked","cluster":"{cluster}","project":"{project}","ring":"{ring}","versions":[{{"n":3,"kek_id":"abab","origin":"generated"}}],"epoch":812,"revoking":{{"index":9120,"term":7}},"drained":{{"index":9124,"term":7}},"basis":{{"surrendered":["n1","n2"],"waited":["n3"],"w_ms":14500}},"voters":["n1","n2","n3"],"actor":"apikey:\"x\"","time":"2023-11-14T22:13:20.123Z","audit":{{"seq":5521,"prev":"0404","this":"0505"}},"erasure":"pending"}}"#
        );
        assert_eq!(text, expected);
    }
}
