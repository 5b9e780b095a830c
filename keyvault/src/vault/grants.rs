//! A lease call in two steps: decide from the state, under its lock; then do the cryptography, outside of it.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use ensign_proto::pb::vault::v1 as pb;
use ensign_proto::{Algorithm, ClusterId, DekId, KeyVersion, LogIndex, NodeId, PartitionContext, RingId, SessionId};
use zeroize::Zeroizing;

use super::keys::{MasterKey, StoredKek};
use super::seal::refuse_held;
use crate::entropy::Entropy;
use crate::grant::{Sealer, lease_aad, lease_info};
use crate::lease::LeaseTerms;
use crate::link::{Reason, Refusal};
use crate::machine::{CustodyKey, State, What};
use crate::seal;
use crate::wire::{self, Dead};
use crate::wrap::{DekName, DekUse, WrappedDek};

/// How many wants one call may carry.
const WANTS_MAX: usize = 256;
/// A reply with more news than this starts the holder over instead.
const NEWS_MAX: usize = 1_024;

/// A lease request that makes sense.
#[derive(Debug)]
pub(crate) struct LeaseCall {
    pub(crate) session: SessionId,
    seen: LogIndex,
    public: Bytes,
    wants: Vec<Result<Wanted, Refusal>>,
}

#[derive(Debug)]
enum Wanted {
    Create { ctx: PartitionContext, ring: RingId, usage: DekUse },
    Unwrap { ctx: PartitionContext, wrapped: WrappedDek },
}

impl LeaseCall {
    pub(crate) fn parse(cluster: ClusterId, request: &pb::LeaseRequest) -> Result<Self, Refusal> {
        if request.want.len() > WANTS_MAX {
            return Err(Refusal::new(Reason::Invalid, format!("more than {WANTS_MAX} keys in one call")));
        }
        if request.hpke_pk.len() != 32 {
            return Err(wire::malformed("hpke pk"));
        }
        let session: SessionId = wire::id(&request.session, "session")?;
        if session.is_zero() {
            return Err(wire::malformed("session"));
        }
        Ok(Self {
            session,
            seen: LogIndex(request.seen),
            public: request.hpke_pk.clone(),
            wants: request.want.iter().map(|want| parse_want(cluster, want)).collect(),
        })
    }
}

fn parse_want(cluster: ClusterId, want: &pb::Want) -> Result<Wanted, Refusal> {
    let ctx = wire::context_from(cluster, want.context.as_ref())?;
    match want.what.as_ref().ok_or_else(|| wire::malformed("want"))? {
        pb::want::What::Create(create) => {
            Ok(Wanted::Create { ctx, ring: wire::id(&create.ring, "ring")?, usage: wire::usage_from(create.r#use)? })
        }
        pb::want::What::Unwrap(wrapped) => Ok(Wanted::Unwrap { ctx, wrapped: wire::wrapped_from(wrapped)? }),
    }
}

/// What was decided, with everything that carrying it out takes.
pub(crate) struct Plan {
    index: LogIndex,
    epoch: u64,
    lease: LeaseTerms,
    resync: bool,
    dead: Vec<Dead>,
    rotated: Vec<(RingId, KeyVersion)>,
    switched: Vec<pb::Switched>,
    grants: Vec<Result<Granted, Refusal>>,
}

struct Granted {
    ctx: PartitionContext,
    kek: StoredKek,
    active: KeyVersion,
    what: Key,
}

enum Key {
    Unwrap(WrappedDek),
    Create(DekUse, Algorithm),
}

/// Decides from applied state that a ReadIndex round, begun after the request arrived, has confirmed.
pub(crate) fn plan(state: &State, node: NodeId, call: &LeaseCall) -> Result<Plan, Refusal> {
    refuse_held(state)?;
    let lease = state.lease.ok_or_else(|| {
        Refusal::new(Reason::Unavailable, "the vault was written by an older build, and its leases are being put right")
    })?;
    let news = state.events.iter().filter(|event| event.index > call.seen);
    // A session that begins holds nothing that could have died, but must hear of nothing older either.
    let resync = call.seen < state.events_floor || news.clone().count() > NEWS_MAX;
    let (mut dead, mut rotated, mut switched) = (Vec::new(), Vec::new(), BTreeSet::new());
    for event in news.filter(|_| !resync) {
        match event.what {
            What::Dead(Dead::Custody(of, _)) if of != node => {}
            What::Dead(what) => dead.push(what),
            What::Rotated(ring, version) => rotated.push((ring, version)),
            What::Switched(ring) => drop(switched.insert(ring)),
        }
    }
    if resync {
        // Rings that are dead as a whole stay known, so that whoever waits for their next event hears that there is none.
        let closed = state.rings.iter().filter(|(_, ring)| ring.closed);
        dead.extend(closed.map(|(id, _)| Dead::Ring(*id)).take(NEWS_MAX));
        // Likewise rings that are disabled. The vault refuses those that find no room here, too.
        let off = state.rings.iter().filter(|(_, ring)| ring.has_switched_off());
        switched.extend(off.map(|(id, _)| *id).take(NEWS_MAX));
    }
    // As they are now, whatever was done to them on the way.
    let switched = switched.into_iter().filter_map(|id| Some(state.rings.get(&id)?.switched(id, state.applied)));
    let grants = call
        .wants
        .iter()
        .map(|want| want.as_ref().map_err(Clone::clone).and_then(|want| decide(state, node, want)))
        .collect();
    Ok(Plan {
        index: state.applied,
        epoch: state.epoch,
        lease,
        resync,
        dead,
        rotated,
        switched: switched.collect(),
        grants,
    })
}

fn decide(state: &State, node: NodeId, want: &Wanted) -> Result<Granted, Refusal> {
    let (ctx, ring_id) = match want {
        Wanted::Create { ctx, ring, .. } => (ctx, *ring),
        Wanted::Unwrap { ctx, wrapped } => (ctx, wrapped.ring),
    };
    // First of all, so that nobody learns about rings of partitions that are not theirs.
    if !state.custody.contains(&CustodyKey::new(node, ctx)) {
        let message = format!("node {node} has no custody of topic {}, partition {}", ctx.topic, ctx.partition);
        return Err(Refusal::new(Reason::NotGranted, message));
    }
    let ring = state.rings.get(&ring_id).filter(|ring| ring.project == ctx.project);
    let ring = ring
        .ok_or_else(|| Refusal::new(Reason::NotFound, format!("project {} has no key ring {ring_id}", ctx.project)))?;
    let (version, what) = match want {
        Wanted::Create { usage, .. } => (ring.sealable(ring_id)?, Key::Create(*usage, ring.alg)),
        Wanted::Unwrap { wrapped, .. } => (wrapped.version, Key::Unwrap(wrapped.clone())),
    };
    let stored = ring.openable(ring_id, version)?;
    let kek = StoredKek::of(state.cluster, ring_id, ring, version, stored);
    Ok(Granted { ctx: *ctx, kek, active: ring.active().unwrap_or_default(), what })
}

/// Makes and unwraps keys, and seals them to the session.
pub(crate) fn fulfil(
    plan: Plan,
    node: NodeId,
    call: &LeaseCall,
    master: &MasterKey,
    now_ms: u64,
    entropy: &Entropy,
) -> Result<pb::LeaseReply, Refusal> {
    let cluster = master.cluster();
    let info = lease_info(cluster, node, call.session);
    let mut sealer = Sealer::new(&call.public, &info, entropy).ok_or_else(|| wire::malformed("hpke pk"))?;
    // Unwrapped once a call; the vault keeps no KEK beyond it.
    let mut keks: BTreeMap<(RingId, KeyVersion), Zeroizing<[u8; 32]>> = BTreeMap::new();
    let mut results = Vec::with_capacity(plan.grants.len());
    for granted in plan.grants {
        let result = granted.and_then(|granted| {
            let name = granted.kek.key();
            if let std::collections::btree_map::Entry::Vacant(vacant) = keks.entry(name) {
                vacant.insert(master.unwrap(&granted.kek)?);
            }
            grant(&granted, &keks[&name], plan.index, &mut sealer, now_ms, entropy)
        });
        let result = match result {
            Ok(grant) => pb::want_result::Result::Grant(grant),
            Err(refusal) => pb::want_result::Result::Refusal(refusal.into()),
        };
        results.push(pb::WantResult { result: Some(result) });
    }
    Ok(pb::LeaseReply {
        session: wire::bytes(call.session.as_bytes()),
        index: plan.index.0,
        epoch: plan.epoch,
        lease_ms: plan.lease.length_ms,
        resync: plan.resync,
        dead: plan.dead.iter().map(wire::dead_to).collect(),
        rotated: plan
            .rotated
            .iter()
            .map(|(ring, version)| pb::RingVersion { ring: wire::bytes(ring.as_bytes()), version: version.0 })
            .collect(),
        switched: plan.switched,
        enc: Bytes::copy_from_slice(sealer.enc()),
        results,
    })
}

fn grant(
    granted: &Granted,
    kek: &[u8; 32],
    index: LogIndex,
    sealer: &mut Sealer,
    now_ms: u64,
    entropy: &Entropy,
) -> Result<pb::Grant, Refusal> {
    let mut dek = Zeroizing::new([0; 32]);
    let wrapped = match &granted.what {
        Key::Unwrap(wrapped) => {
            // Proves ring, version, project, topic, partition and use: the caller's word is not taken for any of them.
            wrapped.unwrap(kek, &granted.ctx, &mut dek).map_err(|_| {
                Refusal::new(Reason::Damaged, format!("data key {} is not what it claims to be", wrapped.dek))
            })?;
            wrapped.clone()
        }
        Key::Create(usage, alg) => {
            dek = seal::fresh_key(entropy);
            let (ring, version) = granted.kek.key();
            let id = DekId::new(now_ms, entropy.array());
            let name = DekName { dek: id, ring, version, alg: *alg, usage: *usage };
            WrappedDek::wrap(kek, &granted.ctx, name, &dek, entropy)
        }
    };
    let sealed = sealer
        .seal(&*dek, &lease_aad(wrapped.dek, index))
        .ok_or_else(|| Refusal::new(Reason::Unavailable, "the key could not be sealed to the session"))?;
    Ok(pb::Grant { wrapped: Some(wire::wrapped_to(&wrapped)), sealed: sealed.into(), active: granted.active.0 })
}
