//! Rotating: make a new version, and tell those who seal.

use std::time::Duration;

use ensign_proto::pb::vault::v1 as pb;
use ensign_proto::{LogIndex, RingId};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tracing::debug;

use super::{Vault, expect_ring};
use crate::link::{Reason, Refusal};
use crate::machine::{Change, Rotate};
use crate::wire;

/// How long a rotation waits for holders to have heard of it. Whoever is late hears of it with its next renewal.
pub(super) const TELL_WITHIN: Duration = Duration::from_secs(2);

impl Vault {
    /// Makes a new active version, and answers once every holder that can be reached knows.
    pub(super) async fn rotate(&self, actor: &str, request: &pb::RotateRequest) -> Result<pb::Ring, Refusal> {
        let id: RingId = wire::id(&request.ring, "ring")?;
        let ring = self.rotate_one(actor, id, request.expected).await?;
        let applied = self.inspect(|state| Ok(state.applied))?;
        if timeout(TELL_WITHIN, self.tell_holders(applied)).await.is_err() {
            debug!(ring = %id, "some holders hear of a rotation with their next renewal only");
        }
        Ok(ring)
    }

    /// Makes a new active version; with `expected` only if that one is active.
    pub(super) async fn rotate_one(&self, actor: &str, id: RingId, expected: u32) -> Result<pb::Ring, Refusal> {
        let master = self.master().await?;
        let mut tries = 0;
        loop {
            self.read_index().await?;
            let (project, alg, version) = self.inspect(|state| {
                let ring = state.rings.get(&id);
                let ring = ring.ok_or_else(|| Refusal::new(Reason::NotFound, format!("there is no key ring {id}")))?;
                Ok((ring.project, ring.alg, ring.next_version()))
            })?;
            let kek = master.make_kek(project, id, version, alg, &self.0.config.entropy)?;
            let change = Rotate { ring: wire::bytes(id.as_bytes()), version: version.0, expected, kek };
            match self.propose(actor, Change::Rotate(change)).await {
                // Another rotation took the number; with nothing expected this one may be the next.
                Err(refusal) if refusal.reason == Reason::Conflict && expected == 0 && tries < 3 => tries += 1,
                outcome => return expect_ring(outcome?),
            }
        }
    }

    /// Has every known session renew its lease now, so that it hears of what was applied up to `index`. Each is asked once.
    pub(super) async fn tell_holders(&self, index: LogIndex) {
        let known = self.book().known(self.0.clock.boot(), self.0.config.lease.wait());
        let mut told: JoinSet<()> = known
            .into_iter()
            .map(|(session, node)| {
                let request = pb::RefreshRequest { session: wire::bytes(session.as_bytes()), index: index.0 };
                let told = self.0.holders.refresh(node, request);
                // A holder that cannot be reached, or is another process by now, renews by itself.
                async move { drop(told.await) }
            })
            .collect();
        while told.join_next().await.is_some() {}
    }
}
