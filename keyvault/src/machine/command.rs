//! What the vault's log holds: `version u8`, then a protobuf message. Keys in it are wrapped already.
//!
//! Times, ids and boxes are chosen by the leader before it proposes, so that applying is a pure function.

use bytes::{BufMut as _, Bytes, BytesMut};
use ensign_proto::pb::vault::v1 as pb;
use prost::Message as _;

use crate::lease::LeaseTerms;

/// Version 2 knows what leases the vault grants, version 3 custody in batches, version 4 what is done to rings beside rotating and
/// revoking them, an operator's seal, root keys that are kept by something else than a file, receipt keys and erasures. Everything else is
/// still written as version 1, so that older builds follow.
const VERSIONS: std::ops::RangeInclusive<u8> = 1..=4;

/// One change, who asked for it, and when.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct Command {
    #[prost(uint64, tag = "1")]
    pub(crate) ms: u64,
    #[prost(string, tag = "2")]
    pub(crate) actor: String,
    #[prost(
        oneof = "Change",
        tags = "3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 30, 31, 40, 41, 80, 81"
    )]
    pub(crate) change: Option<Change>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
pub(crate) enum Change {
    #[prost(message, tag = "3")]
    Initialize(Initialize),
    #[prost(message, tag = "4")]
    CreateRing(CreateRing),
    #[prost(message, tag = "5")]
    Rotate(Rotate),
    #[prost(message, tag = "6")]
    Revoke(Revoke),
    #[prost(message, tag = "7")]
    Drain(Drain),
    #[prost(message, tag = "8")]
    PutCustody(Custody),
    #[prost(message, tag = "9")]
    DropCustody(Custody),
    #[prost(message, tag = "10")]
    PutSecret(PutSecret),
    #[prost(message, tag = "11")]
    DeleteSecret(DeleteSecret),
    #[prost(message, tag = "12")]
    SetLease(SetLease),
    #[prost(message, tag = "13")]
    SettleLease(SettleLease),
    #[prost(message, tag = "14")]
    Disable(Target),
    #[prost(message, tag = "15")]
    SettleDisable(SettleDisable),
    #[prost(message, tag = "16")]
    Enable(Target),
    #[prost(message, tag = "17")]
    SetRing(SetRing),
    #[prost(message, tag = "18")]
    ScheduleRevoke(ScheduleRevoke),
    #[prost(message, tag = "19")]
    CancelRevoke(Target),
    #[prost(message, tag = "20")]
    Elapse(Elapse),
    #[prost(message, tag = "21")]
    RevokeDue(RevokeDue),
    #[prost(message, tag = "30")]
    Seal(Hold),
    #[prost(message, tag = "31")]
    Lift(Hold),
    #[prost(message, tag = "40")]
    AddReceiptKey(AddReceiptKey),
    #[prost(message, tag = "41")]
    Erase(Erase),
    #[prost(message, tag = "80")]
    PutCustodies(Custodies),
    #[prost(message, tag = "81")]
    DropCustodies(Custodies),
}

#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct Initialize {
    #[prost(bytes = "bytes", tag = "1")]
    pub(crate) cluster: Bytes,
    #[prost(bytes = "bytes", tag = "2")]
    pub(crate) master_box: Bytes,
    #[prost(bytes = "bytes", tag = "3")]
    pub(crate) root_id: Bytes,
    #[prost(uint32, tag = "4")]
    pub(crate) root_version: u32,
    /// The leases that this vault grants. Absent in version 1.
    #[prost(message, optional, tag = "5")]
    pub(crate) lease: Option<LeaseTerms>,
    /// What keeps the root key; 0, a file, before version 4.
    #[prost(uint32, tag = "30")]
    pub(crate) kind: u32,
    /// What keeps it calls it so.
    #[prost(string, tag = "31")]
    pub(crate) reference: String,
}

/// An operator seals the vault, or lifts that.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct Hold {}

/// A KEK as it is stored.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct Kek {
    #[prost(bytes = "bytes", tag = "1")]
    pub(crate) id: Bytes,
    #[prost(bytes = "bytes", tag = "2")]
    pub(crate) boxed: Bytes,
    #[prost(uint64, tag = "3")]
    pub(crate) master_epoch: u64,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct CreateRing {
    #[prost(bytes = "bytes", tag = "1")]
    pub(crate) ring: Bytes,
    #[prost(bytes = "bytes", tag = "2")]
    pub(crate) project: Bytes,
    #[prost(uint32, tag = "3")]
    pub(crate) alg: u32,
    #[prost(message, required, tag = "4")]
    pub(crate) kek: Kek,
    /// Empty: the ring that a project begins with. Absent before version 4.
    #[prost(string, tag = "5")]
    pub(crate) name: String,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct Rotate {
    #[prost(bytes = "bytes", tag = "1")]
    pub(crate) ring: Bytes,
    /// The version that is made. The box is bound to it, so it must be the ring's next one.
    #[prost(uint32, tag = "2")]
    pub(crate) version: u32,
    /// The active version that the caller knows of; 0: whichever.
    #[prost(uint32, tag = "3")]
    pub(crate) expected: u32,
    #[prost(message, required, tag = "4")]
    pub(crate) kek: Kek,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct Revoke {
    #[prost(bytes = "bytes", tag = "1")]
    pub(crate) ring: Bytes,
    /// 0: all.
    #[prost(uint32, tag = "2")]
    pub(crate) version: u32,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct Drain {
    #[prost(bytes = "bytes", tag = "1")]
    pub(crate) ring: Bytes,
    /// The index of the revocation that is complete.
    #[prost(uint64, tag = "2")]
    pub(crate) revoking: u64,
    #[prost(uint64, repeated, tag = "3")]
    pub(crate) surrendered: Vec<u64>,
    #[prost(uint64, repeated, tag = "4")]
    pub(crate) waited: Vec<u64>,
    #[prost(uint64, tag = "5")]
    pub(crate) w_ms: u64,
    /// The members of the vault's group. Absent before version 4.
    #[prost(uint64, repeated, tag = "40")]
    pub(crate) voters: Vec<u64>,
}

/// A key pair that signs receipts from here on.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct AddReceiptKey {
    /// It must be the next one.
    #[prost(uint32, tag = "1")]
    pub(crate) number: u32,
    #[prost(bytes = "bytes", tag = "2")]
    pub(crate) public: Bytes,
    /// The private key, sealed as a secret of the vault's own.
    #[prost(bytes = "bytes", tag = "3")]
    pub(crate) boxed: Bytes,
    #[prost(uint64, tag = "4")]
    pub(crate) master_epoch: u64,
    /// What its predecessor signed; empty for the first.
    #[prost(string, tag = "5")]
    pub(crate) endorsement: String,
}

/// These members' files hold nothing that was destroyed up to these indexes: all members' do, as far as `through`.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct Erase {
    #[prost(uint64, tag = "1")]
    pub(crate) through: u64,
    #[prost(message, repeated, tag = "2")]
    pub(crate) voters: Vec<pb::ErasedVoter>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct Custody {
    #[prost(uint64, tag = "1")]
    pub(crate) node: u64,
    #[prost(bytes = "bytes", tag = "2")]
    pub(crate) project: Bytes,
    #[prost(bytes = "bytes", tag = "3")]
    pub(crate) topic: Bytes,
    #[prost(uint32, tag = "4")]
    pub(crate) partition: u32,
}

/// Many records, all of them or none.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct Custodies {
    #[prost(message, repeated, tag = "1")]
    pub(crate) custody: Vec<Custody>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct PutSecret {
    #[prost(uint32, tag = "1")]
    pub(crate) kind: u32,
    #[prost(bytes = "bytes", tag = "2")]
    pub(crate) id: Bytes,
    /// The revision that is written. The box is bound to it, so it must be the next one.
    #[prost(uint64, tag = "3")]
    pub(crate) revision: u64,
    #[prost(bytes = "bytes", tag = "4")]
    pub(crate) boxed: Bytes,
    #[prost(uint64, tag = "5")]
    pub(crate) master_epoch: u64,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct DeleteSecret {
    #[prost(uint32, tag = "1")]
    pub(crate) kind: u32,
    #[prost(bytes = "bytes", tag = "2")]
    pub(crate) id: Bytes,
    /// 0: whichever.
    #[prost(uint64, tag = "3")]
    pub(crate) expected: u64,
}

/// From here on, leases are granted on these terms.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct SetLease {
    #[prost(message, required, tag = "1")]
    pub(crate) terms: LeaseTerms,
}

/// No lease on older terms than those of the change at this index can be running any more.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct SettleLease {
    #[prost(uint64, tag = "1")]
    pub(crate) changed: u64,
}

/// A ring, or one version of it.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct Target {
    #[prost(bytes = "bytes", tag = "1")]
    pub(crate) ring: Bytes,
    /// 0: the whole ring.
    #[prost(uint32, tag = "2")]
    pub(crate) version: u32,
}

/// No holder is left of what was disabled.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct SettleDisable {
    #[prost(bytes = "bytes", tag = "1")]
    pub(crate) ring: Bytes,
    /// The index of the order that is complete.
    #[prost(uint64, tag = "2")]
    pub(crate) disabling: u64,
    /// As of a [`Drain`].
    #[prost(uint64, repeated, tag = "40")]
    pub(crate) surrendered: Vec<u64>,
    #[prost(uint64, repeated, tag = "41")]
    pub(crate) waited: Vec<u64>,
    #[prost(uint64, tag = "42")]
    pub(crate) w_ms: u64,
    #[prost(uint64, repeated, tag = "43")]
    pub(crate) voters: Vec<u64>,
}

/// What is 0 stays as it is.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct SetRing {
    #[prost(bytes = "bytes", tag = "1")]
    pub(crate) ring: Bytes,
    #[prost(uint64, tag = "2")]
    pub(crate) rotation_ms: u64,
    #[prost(uint32, tag = "3")]
    pub(crate) alg: u32,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct ScheduleRevoke {
    #[prost(bytes = "bytes", tag = "1")]
    pub(crate) ring: Bytes,
    /// 0: all.
    #[prost(uint32, tag = "2")]
    pub(crate) version: u32,
    /// How long a leader must have been there from the order on.
    #[prost(uint64, tag = "3")]
    pub(crate) after_ms: u64,
}

/// A leader was there for so long more: what is scheduled has waited for it.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct Elapse {
    #[prost(uint64, tag = "1")]
    pub(crate) ms: u64,
}

/// Carries out what was scheduled at this index, unless it was cancelled.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct RevokeDue {
    #[prost(bytes = "bytes", tag = "1")]
    pub(crate) ring: Bytes,
    #[prost(uint64, tag = "2")]
    pub(crate) scheduled: u64,
}

impl Change {
    fn version(&self) -> u8 {
        match self {
            Self::Initialize(change) if change.kind != 0 => 4,
            Self::Drain(change) if !change.voters.is_empty() => 4,
            Self::Seal(_)
            | Self::Lift(_)
            | Self::AddReceiptKey(_)
            | Self::Erase(_)
            | Self::Disable(_)
            | Self::SettleDisable(_)
            | Self::Enable(_)
            | Self::SetRing(_)
            | Self::ScheduleRevoke(_)
            | Self::CancelRevoke(_)
            | Self::Elapse(_)
            | Self::RevokeDue(_) => 4,
            Self::CreateRing(change) if !change.name.is_empty() => 4,
            Self::PutCustodies(_) | Self::DropCustodies(_) => 3,
            Self::SetLease(_) | Self::SettleLease(_) => 2,
            Self::Initialize(change) if change.lease.is_some() => 2,
            _ => 1,
        }
    }
}

impl Command {
    pub(crate) fn new(ms: u64, actor: &str, change: Change) -> Self {
        Self { ms, actor: actor.to_owned(), change: Some(change) }
    }

    pub(crate) fn to_payload(&self) -> Bytes {
        let mut payload = BytesMut::with_capacity(1 + self.encoded_len());
        payload.put_u8(self.change.as_ref().map_or(1, Change::version));
        self.encode(&mut payload).expect("a growing buffer has room");
        payload.freeze()
    }

    /// `None`: a newer build wrote it, and this one must not guess.
    pub(crate) fn from_payload(payload: &Bytes) -> Option<(Self, Change)> {
        if !payload.first().is_some_and(|version| VERSIONS.contains(version)) {
            return None;
        }
        let command = Self::decode(payload.slice(1..)).ok()?;
        let change = command.change.clone()?;
        Some((command, change))
    }
}
