//! Disabling and enabling: the reversible half of a revoke, and its way back. Also what is set of a ring.

use ensign_proto::pb::vault::v1 as pb;
use ensign_proto::{KeyVersion, LogIndex, RingId};
use tokio::time::timeout;
use tracing::debug;

use super::rotate::TELL_WITHIN;
use super::{Vault, expect_ring, unexpected};
use crate::link::{Reason, Refusal};
use crate::machine::{Change, Done, ScheduleRevoke, SetRing, State, Switch, Target};
use crate::wire;

impl Vault {
    /// Stops grants, and answers once no node holds what is disabled, or with `Pending` when that takes longer than a call may.
    pub(super) async fn disable(&self, actor: &str, request: &pb::SwitchRequest) -> Result<pb::Ring, Refusal> {
        self.must_lead()?;
        let (ring, target) = target_of(request)?;
        let version = KeyVersion(target.version);
        let index = if request.order == 0 {
            match self.propose(actor, Change::Disable(target)).await? {
                Done::Disabling(index) => index,
                other => return Err(unexpected(&other)),
            }
        } else {
            // What was enabled meanwhile is not disabled again by whoever still waits.
            self.read_index().await?;
            LogIndex(request.order)
        };
        self.0.ordered.notify_one();
        let look = |state: &State| {
            let found = state.rings.get(&ring).and_then(|it| Some((it, it.switch_of(version)?)));
            match found {
                Some((it, Switch::Off(order))) if order == index => Ok(Some(it.to_wire_at(ring, index))),
                Some((_, Switch::Disabling(order))) if order == index => Ok(None),
                _ => Err(Refusal::new(Reason::Conflict, "it was enabled again before every node had given it up")),
            }
        };
        self.await_holders(look).await?.ok_or_else(|| {
            let message = "the key is disabled in the vault; its holders are being waited for";
            Refusal { order: index, ..Refusal::new(Reason::Pending, message) }
        })
    }

    /// Takes something back into use, and answers once every holder that can be reached knows.
    pub(super) async fn enable(&self, actor: &str, request: &pb::SwitchRequest) -> Result<pb::Ring, Refusal> {
        self.must_lead()?;
        let (ring, target) = target_of(request)?;
        let answer = expect_ring(self.propose(actor, Change::Enable(target)).await?)?;
        let applied = self.inspect(|state| Ok(state.applied))?;
        if timeout(TELL_WITHIN, self.tell_holders(applied)).await.is_err() {
            debug!(%ring, "some holders hear with their next renewal only that a key is enabled");
        }
        Ok(answer)
    }

    pub(super) async fn set_ring(&self, actor: &str, request: &pb::SetRingRequest) -> Result<pb::Ring, Refusal> {
        self.must_lead()?;
        if request.rotation_ms == 0 && request.alg == 0 {
            return Err(Refusal::new(Reason::Invalid, "nothing is set: say a rotation period, an algorithm, or both"));
        }
        let set = SetRing { ring: request.ring.clone(), rotation_ms: request.rotation_ms, alg: request.alg };
        expect_ring(self.propose(actor, Change::SetRing(set)).await?)
    }

    pub(super) async fn schedule_revoke(
        &self,
        actor: &str,
        request: &pb::ScheduleRevokeRequest,
    ) -> Result<pb::Ring, Refusal> {
        use pb::schedule_revoke_request::Target;
        self.must_lead()?;
        let version = match request.target {
            Some(Target::Version(version)) if version != 0 => version,
            Some(Target::All(true)) => 0,
            _ => return Err(wire::malformed("target")),
        };
        let order = ScheduleRevoke { ring: request.ring.clone(), version, after_ms: request.after_ms };
        expect_ring(self.propose(actor, Change::ScheduleRevoke(order)).await?)
    }

    pub(super) async fn cancel_revoke(
        &self,
        actor: &str,
        request: &pb::CancelRevokeRequest,
    ) -> Result<pb::Ring, Refusal> {
        use pb::cancel_revoke_request::Target as Which;
        self.must_lead()?;
        let version = match request.target {
            Some(Which::Version(version)) if version != 0 => version,
            Some(Which::All(true)) => 0,
            _ => return Err(wire::malformed("target")),
        };
        let cancel = Target { ring: request.ring.clone(), version };
        expect_ring(self.propose(actor, Change::CancelRevoke(cancel)).await?)
    }
}

pub(crate) fn target_of(request: &pb::SwitchRequest) -> Result<(RingId, Target), Refusal> {
    use pb::switch_request::Target as Which;
    let ring: RingId = wire::id(&request.ring, "ring")?;
    let version = match request.target {
        Some(Which::Version(version)) if version != 0 => version,
        Some(Which::All(true)) => 0,
        _ => return Err(wire::malformed("target")),
    };
    Ok((ring, Target { ring: request.ring.clone(), version }))
}
