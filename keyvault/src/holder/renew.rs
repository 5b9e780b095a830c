//! The one task that talks to the vault for a holder: renewals and wants in one call at a time.
//!
//! One call at a time keeps replies in order, and gathers wants into the next call while one is under way.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use ensign_proto::pb::vault::v1 as pb;
use ensign_proto::{DekId, KeyVersion, LogIndex, PartitionContext, RingId, SessionId};
use ensign_raft::env::{BootTime, Stop};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, sleep_until, timeout};
use tracing::{debug, error, warn};

use super::table::{Held, Switched};
use super::{Holder, reply_result};
use crate::error::{CallError, KeyError};
use crate::grant::{Opener, lease_aad, lease_info};
use crate::lease::ReplyHead;
use crate::link::{LinkError, Refusal};
use crate::metrics;
use crate::wire;
use crate::wrap::{DekUse, WrappedDek};

/// How many wants one call carries.
pub(super) const WANTS_PER_CALL: usize = 256;

/// A key that somebody waits for.
#[derive(Debug, Clone)]
pub(super) enum Want {
    Create { ctx: PartitionContext, ring: RingId, usage: DekUse },
    Unwrap { ctx: PartitionContext, wrapped: WrappedDek },
}

impl Want {
    fn ctx(&self) -> &PartitionContext {
        match self {
            Self::Create { ctx, .. } | Self::Unwrap { ctx, .. } => ctx,
        }
    }

    fn to_wire(&self) -> pb::Want {
        let what = match self {
            Self::Create { ring, usage, .. } => {
                pb::want::What::Create(pb::CreateDek { ring: wire::bytes(ring.as_bytes()), r#use: *usage as u32 })
            }
            Self::Unwrap { wrapped, .. } => pb::want::What::Unwrap(wire::wrapped_to(wrapped)),
        };
        pb::Want { context: Some(wire::context_to(self.ctx())), what: Some(what) }
    }
}

pub(super) struct Ask {
    pub(super) want: Want,
    pub(super) deadline: Instant,
    pub(super) reply: oneshot::Sender<Result<WrappedDek, KeyError>>,
}

/// A want and all who wait for it.
pub(super) struct Group {
    pub(super) want: Want,
    pub(super) asks: Vec<Ask>,
}

/// Everything that is waited for. Several waiters for one key are one want.
#[derive(Default)]
pub(super) struct Pending {
    creates: Vec<Ask>,
    unwraps: BTreeMap<DekId, Vec<Ask>>,
}

impl Pending {
    pub(super) fn push(&mut self, ask: Ask) {
        match &ask.want {
            Want::Create { .. } => self.creates.push(ask),
            Want::Unwrap { wrapped, .. } => self.unwraps.entry(wrapped.dek).or_default().push(ask),
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.creates.is_empty() && self.unwraps.is_empty()
    }

    /// The wants of the next call. Who gave up waiting is left out.
    pub(super) fn take(&mut self) -> Vec<Group> {
        self.creates.retain(|ask| !ask.reply.is_closed());
        for asks in self.unwraps.values_mut() {
            asks.retain(|ask| !ask.reply.is_closed());
        }
        self.unwraps.retain(|_, asks| !asks.is_empty());
        let creates = self.creates.drain(..self.creates.len().min(WANTS_PER_CALL));
        let mut groups: Vec<Group> = creates.map(|ask| Group { want: ask.want.clone(), asks: vec![ask] }).collect();
        while groups.len() < WANTS_PER_CALL
            && let Some((_, mut asks)) = self.unwraps.pop_first()
        {
            // Only those that agree on the place: another one's claim is judged by itself, in the next call.
            let want = asks[0].want.clone();
            let (same, other): (Vec<Ask>, Vec<Ask>) = asks.drain(..).partition(|ask| ask.want.ctx() == want.ctx());
            if !other.is_empty() {
                for ask in other {
                    let _ = ask.reply.send(Err(KeyError::Damaged));
                }
            }
            groups.push(Group { want, asks: same });
        }
        groups
    }

    /// Puts back what a failed call did not answer, except for those who have waited long enough.
    pub(super) fn put_back(&mut self, groups: Vec<Group>, error: &CallError) {
        let now = Instant::now();
        for ask in groups.into_iter().flat_map(|group| group.asks) {
            if ask.deadline <= now {
                let _ = ask.reply.send(Err(error.clone().into()));
            } else {
                self.push(ask);
            }
        }
    }
}

impl Holder {
    pub(super) async fn renew_until(self, stop: Stop, mut asks: mpsc::Receiver<Ask>) {
        let mut pending = Pending::default();
        let mut next = Instant::now();
        let mut failures = 0_u32;
        loop {
            let ready = async {
                // While calls fail, wants wait for the back-off like renewals do.
                if failures == 0 && !pending.is_empty() {
                    return None;
                }
                tokio::select! {
                    ask = asks.recv() => ask,
                    () = sleep_until(next) => None,
                    // While calls fail, news waits for the back-off, too.
                    () = self.0.nudge.notified(), if failures == 0 => None,
                }
            };
            let Some(first) = stop.run_until_cancelled(ready).await else { break };
            let asked = first.is_some();
            if let Some(ask) = first {
                pending.push(ask);
            }
            while let Ok(ask) = asks.try_recv() {
                pending.push(ask);
            }
            if asked && failures > 0 && Instant::now() < next {
                continue;
            }
            let groups = pending.take();
            let Some(outcome) = stop.run_until_cancelled(self.exchange(groups)).await else { break };
            match outcome {
                Ok(answered) => {
                    failures = 0;
                    next = Instant::now() + self.jittered(self.lease_config().renew_every());
                    metrics::renewal("renewed");
                    for (group, result) in answered {
                        for ask in group.asks {
                            let _ = ask.reply.send(result.clone());
                        }
                    }
                }
                Err((error, unanswered)) => {
                    failures += 1;
                    next = Instant::now() + self.jittered(self.back_off(failures));
                    metrics::renewal("failed");
                    debug!(%error, failures, "the vault did not renew the lease");
                    pending.put_back(unanswered, &error);
                }
            }
            metrics::lease(self.lease_left(), self.held());
        }
        self.release().await;
    }

    /// Between two tries: short at first, since a failover takes well below a second, and never longer than a tenth of L.
    fn back_off(&self, failures: u32) -> Duration {
        let length = self.lease_config().length;
        (length / 200 * (1 << failures.min(5))).min(length / 10)
    }

    /// Within ±10 %, so that the nodes of a cluster do not renew in step.
    fn jittered(&self, period: Duration) -> Duration {
        let [byte] = self.0.config.entropy.array::<1>();
        period.mul_f64(0.9 + 0.2 * f64::from(byte) / 255.0)
    }

    /// One call: renews the lease and asks for keys.
    pub(super) async fn exchange(
        &self,
        groups: Vec<Group>,
    ) -> Result<Vec<(Group, Result<WrappedDek, KeyError>)>, (CallError, Vec<Group>)> {
        let seen = self.0.table().lease.acted();
        // Before the request is handed to the transport: the vault cannot have granted earlier than this.
        let t0 = self.0.clock.boot();
        let request = pb::LeaseRequest {
            session: wire::bytes(self.0.session.as_bytes()),
            seen: seen.0,
            boot_ns: t0.0.as_nanos() as u64,
            hpke_pk: self.0.process.public().to_vec().into(),
            want: groups.iter().map(|group| group.want.to_wire()).collect(),
        };
        let request = pb::Request {
            actor: format!("node {}", self.0.config.node),
            call: Some(pb::request::Call::Lease(request)),
        };
        let reply = match timeout(self.lease_config().call_deadline(), self.0.link.call(request)).await {
            Ok(reply) => reply.map_err(CallError::from),
            Err(_) => Err(CallError::Unreachable(LinkError::new("no answer within a fifth of the lease"))),
        };
        let reply = reply.and_then(reply_result).and_then(|result| match result {
            pb::reply::Result::Lease(reply) => Ok(reply),
            _ => Err(CallError::Malformed { what: "it is not a lease" }),
        });
        let reply = match reply {
            Ok(reply) => self.keep_floor(&reply).await.map(|()| reply),
            Err(error) => Err(error),
        };
        match reply.and_then(|reply| self.accept(t0, &reply, &groups)) {
            Ok(results) => Ok(groups.into_iter().zip(results).collect()),
            Err(error) => Err((error, groups)),
        }
    }

    /// Keeps the epoch of a reply that is to be believed, before anything of it is used: a vault that is set back below it is
    /// refused by the next life of this node, too.
    async fn keep_floor(&self, reply: &pb::LeaseReply) -> Result<(), CallError> {
        let head = head_of(reply)?;
        {
            let table = self.0.table();
            if table.lease.accepts(&head).is_err() || head.epoch <= table.lease.floor() {
                return Ok(());
            }
        }
        let floor = Arc::clone(&self.0.config.floor);
        let kept = tokio::task::spawn_blocking(move || floor.raise(head.epoch)).await;
        kept.unwrap_or_else(|_| Err("this node is stopping".to_owned())).map_err(|cause| {
            error!(epoch = head.epoch, %cause, "the vault's epoch cannot be kept: its grants are not used");
            CallError::Unreachable(LinkError::new(format!("its epoch cannot be kept: {cause}")))
        })
    }

    /// Acts on a reply, whole or not at all.
    fn accept(
        &self,
        t0: BootTime,
        reply: &pb::LeaseReply,
        groups: &[Group],
    ) -> Result<Vec<Result<WrappedDek, KeyError>>, CallError> {
        let malformed = |what| CallError::Malformed { what };
        let head = head_of(reply)?;
        if reply.results.len() != groups.len() {
            return Err(malformed("it does not answer every want"));
        }
        let dead = reply
            .dead
            .iter()
            .map(|dead| wire::dead_from(self.0.config.cluster, dead))
            .collect::<Result<Vec<_>, Refusal>>()?;
        let switched = reply.switched.iter().map(Switched::parse).collect::<Result<Vec<_>, Refusal>>()?;
        // Opened before the lock is taken; what is not installed is overwritten as it drops.
        let granted = self.open_grants(reply, &head, groups);

        let mut table = self.0.table_mut();
        if table.released {
            return Err(malformed("it comes after this node gave its lease back"));
        }
        if let Err(ignored) = table.lease.accepts(&head) {
            drop(table);
            metrics::renewal("ignored");
            warn!(%ignored, index = reply.index, epoch = reply.epoch, "a reply of the vault is ignored");
            return Err(malformed("it is out of date, or not for this process"));
        }
        table.kill(&dead, self.0.config.node);
        if reply.resync {
            table.start_over();
        }
        for switched in &switched {
            table.switch(switched);
        }
        for rotated in &reply.rotated {
            if let Ok(ring) = RingId::try_from(&rotated.ring[..]) {
                table.saw_rotated(ring, KeyVersion(rotated.version));
            }
        }
        // Never longer than this node was told, nor than it was configured to trust.
        let length = Duration::from_millis(reply.lease_ms).min(self.0.config.lease.length);
        table.lease.renew(&head, t0, length);
        self.0.granted_ms.store(length.as_millis() as u64, Ordering::Relaxed);
        let results = granted
            .into_iter()
            .map(|granted| {
                let (held, active) = granted?;
                let wrapped = held.wrapped.clone();
                table.saw_active(wrapped.ring, active);
                table.install(held)?;
                Ok(wrapped)
            })
            .collect();
        drop(table);
        // Also for keys that are not held: whoever waits for the next event of their ring waits for nothing.
        if reply.resync || !dead.is_empty() || !reply.switched.is_empty() {
            self.0.deaths.send_modify(|count| *count += 1);
        }
        self.0.renewed.send_replace(head.index);
        Ok(results)
    }

    fn open_grants(
        &self,
        reply: &pb::LeaseReply,
        head: &ReplyHead,
        groups: &[Group],
    ) -> Vec<Result<(Held, KeyVersion), KeyError>> {
        let info = lease_info(self.0.config.cluster, self.0.config.node, self.0.session);
        let mut opener = Opener::new(&self.0.process, &reply.enc, &info).ok();
        let open = |(result, group): (&pb::WantResult, &Group)| match &result.result {
            Some(pb::want_result::Result::Grant(grant)) => {
                let opener = opener.as_mut().ok_or(KeyError::Damaged)?;
                self.open_grant(grant, head, &group.want, opener)
            }
            Some(pb::want_result::Result::Refusal(refusal)) => Err(Refusal::from(refusal.clone()).into()),
            None => Err(KeyError::Vault(CallError::Malformed { what: "a want has no answer" })),
        };
        reply.results.iter().zip(groups).map(open).collect()
    }

    fn open_grant(
        &self,
        grant: &pb::Grant,
        head: &ReplyHead,
        want: &Want,
        opener: &mut Opener,
    ) -> Result<(Held, KeyVersion), KeyError> {
        let malformed = || KeyError::Vault(CallError::Malformed { what: "it grants another key than was asked for" });
        let wrapped =
            grant.wrapped.as_ref().and_then(|wrapped| wire::wrapped_from(wrapped).ok()).ok_or_else(malformed)?;
        let asked = match want {
            Want::Create { ring, usage, .. } => wrapped.ring == *ring && wrapped.usage == *usage,
            Want::Unwrap { wrapped: asked, .. } => wrapped == *asked,
        };
        if !asked {
            return Err(malformed());
        }
        let slot = self.0.arena.take().map_err(|_| KeyError::Busy { cause: "no memory is left for another key" })?;
        let aad = lease_aad(wrapped.dek, head.index);
        slot.fill(|key| opener.open_into(&grant.sealed, &aad, key)).map_err(|_| KeyError::Damaged)?;
        let made = matches!(want, Want::Create { .. }).then(|| self.0.clock.wall());
        Ok((Held::new(wrapped, *want.ctx(), slot, self.0.clock.boot(), made), KeyVersion(grant.active)))
    }
}

fn head_of(reply: &pb::LeaseReply) -> Result<ReplyHead, CallError> {
    let session = SessionId::try_from(&reply.session[..]);
    let session = session.map_err(|_| CallError::Malformed { what: "its session is no id" })?;
    Ok(ReplyHead { session, index: LogIndex(reply.index), epoch: reply.epoch })
}

impl std::fmt::Debug for Group {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Group").field("want", &self.want).field("waiting", &self.asks.len()).finish()
    }
}
