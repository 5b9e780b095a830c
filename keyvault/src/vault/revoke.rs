//! Revoking and disabling: order it, have every holder surrender or outwait it, then destroy what was revoked.

use std::collections::{BTreeSet, HashSet};
use std::time::Duration;

use ensign_proto::pb::vault::v1 as pb;
use ensign_proto::pb::vault::v1::SurrenderRequest;
use ensign_proto::{LogIndex, NodeId, RingId, SessionId, Term};
use ensign_raft::env::{BootTime, Stop};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};
use tracing::{debug, info, warn};

use super::{Vault, unexpected};
use crate::link::{Reason, Refusal};
use crate::machine::{Change, Done, Drain, Revocation, Revoke, Ring, SettleDisable, State};
use crate::metrics;
use crate::wire::{self, Dead};

/// How long one call waits for the destruction; the caller asks again.
const ANSWER_WITHIN: Duration = Duration::from_secs(2);
/// Between two looks at the clock.
const LOOK: Duration = Duration::from_millis(10);
/// Between two tries to reach a holder.
const PUSH_AGAIN: Duration = Duration::from_millis(200);
/// One try: a holder waits up to three seconds for its streams.
const PUSH_DEADLINE: Duration = Duration::from_secs(4);

/// What was ordered and has holders to wait for.
#[derive(Debug, Clone)]
struct Order {
    ring: RingId,
    index: LogIndex,
    /// Absent: something is disabled.
    revocation: Option<Revocation>,
}

impl Vault {
    /// Orders a revocation and answers with its receipt, or with `Pending` when it takes longer than a call may.
    pub(super) async fn revoke(&self, actor: &str, request: &pb::RevokeRequest) -> Result<pb::Receipt, Refusal> {
        self.must_lead()?;
        let ring: RingId = wire::id(&request.ring, "ring")?;
        let version = match request.target {
            Some(pb::revoke_request::Target::Version(version)) if version != 0 => version,
            Some(pb::revoke_request::Target::All(true)) => 0,
            _ => return Err(wire::malformed("target")),
        };
        let change = Revoke { ring: request.ring.clone(), version };
        let index = match self.propose(actor, Change::Revoke(change)).await? {
            Done::Revoked(receipt) if version != 0 => return Ok(*receipt),
            Done::Revoked(receipt) => LogIndex(receipt.revoking_index),
            Done::Revoking(index) => index,
            other => return Err(unexpected(&other)),
        };
        self.0.ordered.notify_one();
        let look = |state: &State| Ok(state.rings.get(&ring).and_then(|ring| complete(ring, version, index)));
        self.await_holders(look).await?.ok_or_else(|| {
            Refusal::new(Reason::Pending, "the key is dead to the vault; its holders are being waited for")
        })
    }

    /// What `look` finds once the state has it; `None` when that takes longer than a call may.
    pub(super) async fn await_holders<T>(
        &self,
        look: impl Fn(&State) -> Result<Option<T>, Refusal>,
    ) -> Result<Option<T>, Refusal> {
        let mut applied = self.0.group.applied();
        let deadline = Instant::now() + ANSWER_WITHIN;
        loop {
            applied.borrow_and_update();
            if let Some(found) = self.inspect(&look)? {
                return Ok(Some(found));
            }
            if !matches!(tokio::time::timeout_at(deadline, applied.changed()).await, Ok(Ok(()))) {
                return Ok(None);
            }
        }
    }

    /// Carries out what is ordered, while this node leads: also what an older leader left behind.
    pub(super) async fn drain_until(self, stop: Stop) {
        let mut leadership = self.0.group.leadership();
        let mut drains = JoinSet::new();
        let mut running: HashSet<(RingId, LogIndex)> = HashSet::new();
        let mut term = None;
        loop {
            let now = *leadership.borrow_and_update();
            let leading = now.ready.then_some(now.term);
            if leading != term {
                // What an older leadership knew about sessions and times is worth nothing in this one.
                drains.shutdown().await;
                running.clear();
                term = leading;
            }
            if let Some(term) = term {
                self.book().leading_since(term, self.0.clock.boot());
                for order in self.ordered() {
                    if running.insert((order.ring, order.index)) {
                        drains.spawn(self.clone().drain(term, order));
                    }
                }
            }
            let next = async {
                tokio::select! {
                    changed = leadership.changed() => changed.is_ok(),
                    () = self.0.ordered.notified() => true,
                    () = sleep(Duration::from_secs(1)) => true,
                    Some(done) = drains.join_next(), if !drains.is_empty() => {
                        if let Ok(done) = done {
                            running.remove(&done);
                        }
                        true
                    }
                }
            };
            if stop.run_until_cancelled(next).await != Some(true) {
                break;
            }
        }
        drains.shutdown().await;
    }

    fn ordered(&self) -> Vec<Order> {
        self.0.group.inspect(|machine| {
            let mut orders = Vec::new();
            for (id, ring) in machine.state().into_iter().flat_map(|state| &state.rings) {
                let order = |index, revocation| Order { ring: *id, index, revocation };
                orders.extend(ring.revocations.iter().map(|it| order(it.id.index, Some(it.clone()))));
                orders.extend(ring.disablings().map(|index| order(index, None)));
            }
            orders
        })
    }

    /// Whether it is still to be carried out: what is disabled may be enabled again meanwhile.
    fn stands(&self, order: &Order) -> bool {
        self.0.group.inspect(|machine| {
            let ring = machine.state().and_then(|state| state.rings.get(&order.ring));
            ring.is_some_and(|ring| order.revocation.is_some() || ring.disablings().any(|index| index == order.index))
        })
    }

    /// What its holders have to give up.
    fn surrender_of(&self, order: &Order) -> SurrenderRequest {
        let mut request = SurrenderRequest { index: order.index.0, ..SurrenderRequest::default() };
        if let Some(revocation) = &order.revocation {
            let versions = revocation.versions.iter().map(|version| Dead::Version(order.ring, *version));
            let dead: Vec<Dead> = if revocation.all { vec![Dead::Ring(order.ring)] } else { versions.collect() };
            request.dead = dead.iter().map(wire::dead_to).collect();
        } else {
            request.switched = self.0.group.inspect(|machine| {
                let state = machine.state();
                let ring = state.and_then(|state| Some((state.applied, state.rings.get(&order.ring)?)));
                ring.map(|(applied, ring)| ring.switched(order.ring, applied)).into_iter().collect()
            });
        }
        request
    }

    async fn drain(self, term: Term, order: Order) -> (RingId, LogIndex) {
        let done = (order.ring, order.index);
        // Of the longest lease that may be running, whoever granted it; see the state.
        let Ok(wait) = self.inspect(|state| Ok(state.lease_wait())) else { return done };
        // This runs after the order was applied here, so `begun` is not before that.
        let begun = self.0.clock.boot();
        let (start, sessions) = {
            let mut book = self.book();
            (book.leading_since(term, begun), book.known(begun, wait))
        };
        let request = self.surrender_of(&order);
        let mut pushes = JoinSet::new();
        for (session, node) in &sessions {
            pushes.spawn(self.clone().push(*session, *node, request.clone()));
        }
        let mut acked: BTreeSet<SessionId> = BTreeSet::new();
        loop {
            while let Some(push) = pushes.try_join_next() {
                acked.extend(push.ok());
            }
            if may_destroy(self.0.clock.boot(), start, begun, wait, acked.len() == sessions.len()) {
                break;
            }
            if self.must_lead() != Ok(term) || !self.stands(&order) {
                return done;
            }
            tokio::select! {
                // At once: with every holder there this is most of what a revocation takes.
                Some(push) = pushes.join_next(), if !pushes.is_empty() => acked.extend(push.ok()),
                () = sleep(LOOK) => {}
            }
        }
        let nodes = |holds: &dyn Fn(&SessionId) -> bool| -> Vec<u64> {
            let nodes: BTreeSet<NodeId> =
                sessions.iter().filter(|(session, _)| holds(session)).map(|(_, node)| *node).collect();
            nodes.into_iter().map(|node| node.0).collect()
        };
        let ring = wire::bytes(order.ring.as_bytes());
        // What older voters cannot read is left out.
        let voters = if self.attests() { self.copies().into_iter().map(|node| node.0).collect() } else { Vec::new() };
        let (surrendered, w_ms) = (nodes(&|session| acked.contains(session)), wait.as_millis() as u64);
        let waited = nodes(&|session| !acked.contains(session));
        let (actor, change) = if let Some(revocation) = &order.revocation {
            let drain = Drain { ring, revoking: order.index.0, surrendered, waited, w_ms, voters };
            (revocation.actor.as_str(), Change::Drain(drain))
        } else {
            let settle = SettleDisable { ring, disabling: order.index.0, surrendered, waited, w_ms, voters };
            ("vault", Change::SettleDisable(settle))
        };
        let waited = self.0.clock.boot().0.saturating_sub(begun.0);
        let (ring, holders) = (order.ring, sessions.len());
        // With the term: the wait was this leadership's, and proves nothing under another.
        match self.propose_in(Some(term), actor, change).await {
            Ok(_) if order.revocation.is_some() => {
                metrics::vault_revoked(waited);
                info!(%ring, ?waited, holders, "keys were revoked: no node can open what they sealed");
            }
            Ok(_) => {
                info!(%ring, ?waited, holders, "keys were disabled: no node can open what they sealed until they are enabled");
            }
            Err(refusal) if refusal.reason == Reason::Conflict => debug!(%ring, %refusal, "an order was taken back"),
            Err(refusal) => warn!(%ring, %refusal, "what was ordered for keys is not complete yet"),
        }
        done
    }

    /// Asks one session until it gives up its keys. Ended by whoever waits for it.
    async fn push(self, session: SessionId, node: NodeId, request: SurrenderRequest) -> SessionId {
        let request = SurrenderRequest { session: wire::bytes(session.as_bytes()), ..request };
        loop {
            let answer = timeout(PUSH_DEADLINE, self.0.holders.surrender(node, request.clone())).await;
            // Another process of that node cannot speak for this session, which may be its paused twin.
            if let Ok(Ok(answer)) = answer
                && answer.session == request.session
                && answer.index == request.index
            {
                return session;
            }
            sleep(PUSH_AGAIN).await;
        }
    }
}

/// Whether no lease can be running that covers the dead keys.
///
/// Either every session that this leadership granted has surrendered, and what older leaders granted has run out; or all has
/// run out, counted from the later of the leadership's start and the order.
fn may_destroy(now: BootTime, start: BootTime, begun: BootTime, wait: Duration, surrendered: bool) -> bool {
    (surrendered && now.0 >= start.0 + wait) || now.0 >= start.0.max(begun.0) + wait
}

/// The receipt, once nothing that the order covers is left.
fn complete(ring: &Ring, version: u32, index: LogIndex) -> Option<pb::Receipt> {
    // Revoking a ring is complete when every one of its versions is gone, also those that were ordered one by one before.
    if version == 0 && !ring.revocations.is_empty() {
        return None;
    }
    ring.receipts.iter().find(|receipt| receipt.revoking_index == index.0).cloned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_destroyed_while_a_lease_may_be_running() {
        let at = |seconds| BootTime(Duration::from_secs(seconds));
        let w = Duration::from_secs(15);
        let may = |now, start, begun, surrendered| may_destroy(at(now), at(start), at(begun), w, surrendered);
        // A leader of long standing: as soon as all surrendered, else after W from the order.
        assert!(may(101, 0, 100, true));
        assert!(!may(101, 0, 100, false) && !may(114, 0, 100, false));
        assert!(may(115, 0, 100, false));
        // A new leader knows no session of its predecessors, so an empty book proves nothing before start + W.
        assert!(!may(101, 100, 100, true) && !may(114, 100, 100, true));
        assert!(may(115, 100, 100, true));
        // A leader that found the order in the log waits from its own start.
        assert!(!may(114, 100, 90, false) && may(115, 100, 90, false));
    }
}
