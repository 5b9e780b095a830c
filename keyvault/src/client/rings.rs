//! What is done to a ring beside rotating and revoking it.

use std::time::Duration;

use bytes::Bytes;
use ensign_proto::pb::vault::v1 as pb;
use ensign_proto::{Algorithm, KeyVersion, LogIndex, ProjectId, RingId};

use super::{RingInfo, VaultClient, ring_of};
use crate::error::CallError;
use crate::wire;

/// Whether a ring as a whole may be used, whatever the states of its versions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RingState {
    /// As its versions are.
    Enabled,
    /// Not any more, but not every node has given it up yet.
    Disabling,
    /// Not at all, until it is enabled again.
    Disabled,
    /// Never again.
    Revoked,
}

/// A revocation that is to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ScheduledInfo {
    /// Which version; `None` for all.
    pub version: Option<KeyVersion>,
    /// When it was ordered, in Unix milliseconds.
    pub ordered_ms: u64,
    /// Who ordered it.
    pub actor: String,
    /// How long it cools off: only time in which the vault has a leader counts.
    pub after: Duration,
    /// How much of that is left.
    pub left: Duration,
}

impl From<&pb::Scheduled> for ScheduledInfo {
    fn from(wire: &pb::Scheduled) -> Self {
        Self {
            version: (wire.version != 0).then_some(KeyVersion(wire.version)),
            ordered_ms: wire.ordered_ms,
            actor: wire.actor.clone(),
            after: Duration::from_millis(wire.after_ms),
            left: Duration::from_millis(wire.after_ms.saturating_sub(wire.waited_ms)),
        }
    }
}

fn switch_request(ring: RingId, version: Option<KeyVersion>) -> pb::SwitchRequest {
    use pb::switch_request::Target;
    let target = version.map_or(Target::All(true), |version| Target::Version(version.0));
    pb::SwitchRequest { ring: wire::bytes(ring.as_bytes()), target: Some(target), order: 0 }
}

impl VaultClient {
    /// Makes a ring of that name in a project; the vault chooses its id.
    ///
    /// # Errors
    /// [`CallError`]; with `AlreadyExists` the project has a ring of that name, perhaps by an earlier attempt.
    pub async fn create_named_ring(
        &self,
        actor: &str,
        project: ProjectId,
        name: &str,
        alg: Algorithm,
    ) -> Result<RingInfo, CallError> {
        let request = pb::CreateRingRequest {
            ring: Bytes::new(),
            project: wire::bytes(project.as_bytes()),
            alg: alg as u32,
            name: name.to_owned(),
        };
        ring_of(self.call(actor, pb::request::Call::CreateRing(request)).await?)
    }

    /// Takes one version of a ring, or with `None` the whole ring, out of use, and returns once no node seals or opens under it. As
    /// [`VaultClient::revoke`] takes its time; a repetition gets the same answer.
    ///
    /// # Errors
    /// [`CallError`]; with `Pending` or `Unreachable` after `patience`, ask again; with `Conflict` somebody enabled it meanwhile; with
    /// `Revoked` there is nothing left to disable.
    pub async fn disable(
        &self,
        actor: &str,
        ring: RingId,
        version: Option<KeyVersion>,
        patience: Duration,
    ) -> Result<RingInfo, CallError> {
        let call = |order: LogIndex| {
            pb::request::Call::Disable(pb::SwitchRequest { order: order.0, ..switch_request(ring, version) })
        };
        ring_of(self.call_patiently(actor, patience, call).await?)
    }

    /// Takes it back into use, as it was before it was disabled. Where it is in use, nothing changes.
    ///
    /// # Errors
    /// [`CallError`]; with `Revoked` it is destroyed.
    pub async fn enable(&self, actor: &str, ring: RingId, version: Option<KeyVersion>) -> Result<RingInfo, CallError> {
        ring_of(self.call(actor, pb::request::Call::Enable(switch_request(ring, version))).await?)
    }

    /// Sets how often a ring is rotated, how data keys that are made from now on seal, or both.
    ///
    /// # Errors
    /// [`CallError`]; with `Invalid` the period is below a day or above two years, or nothing is set.
    pub async fn set_ring(
        &self,
        actor: &str,
        ring: RingId,
        rotation: Option<Duration>,
        alg: Option<Algorithm>,
    ) -> Result<RingInfo, CallError> {
        let request = pb::SetRingRequest {
            ring: wire::bytes(ring.as_bytes()),
            rotation_ms: rotation.map_or(0, millis),
            alg: alg.map_or(0, |alg| alg as u32),
        };
        ring_of(self.call(actor, pb::request::Call::SetRing(request)).await?)
    }

    /// Has a version, or with `None` all of them, be revoked when the vault has had a leader for `after`.
    ///
    /// # Errors
    /// [`CallError`]; with `Conflict` it is scheduled already, with `Invalid` a minute is not reached or a year exceeded.
    pub async fn schedule_revoke(
        &self,
        actor: &str,
        ring: RingId,
        version: Option<KeyVersion>,
        after: Duration,
    ) -> Result<RingInfo, CallError> {
        use pb::schedule_revoke_request::Target;
        let target = version.map_or(Target::All(true), |version| Target::Version(version.0));
        let request = pb::ScheduleRevokeRequest {
            ring: wire::bytes(ring.as_bytes()),
            target: Some(target),
            after_ms: millis(after),
        };
        ring_of(self.call(actor, pb::request::Call::ScheduleRevoke(request)).await?)
    }

    /// Cancels that.
    ///
    /// # Errors
    /// [`CallError`]; with `NotFound` nothing of the kind is scheduled, with `Revoked` it is too late.
    pub async fn cancel_revoke(
        &self,
        actor: &str,
        ring: RingId,
        version: Option<KeyVersion>,
    ) -> Result<RingInfo, CallError> {
        use pb::cancel_revoke_request::Target;
        let target = version.map_or(Target::All(true), |version| Target::Version(version.0));
        let request = pb::CancelRevokeRequest { ring: wire::bytes(ring.as_bytes()), target: Some(target) };
        ring_of(self.call(actor, pb::request::Call::CancelRevoke(request)).await?)
    }
}

fn millis(span: Duration) -> u64 {
    u64::try_from(span.as_millis()).unwrap_or(u64::MAX)
}
