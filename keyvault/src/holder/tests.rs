use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use ensign_proto::{Algorithm, Link, Offset, Partition, ProjectId, Rlid, Term, TopicId};
use ensign_raft::env::BootTime;
use futures::FutureExt as _;
use futures::future::BoxFuture;

use super::*;
use crate::link::LinkError;
use crate::testing::{ManualClock, TestVault};
use crate::wire::Dead;

const CLUSTER: ClusterId = ClusterId::from_bytes([1; 16]);
const PROJECT: ProjectId = ProjectId::from_bytes([2; 16]);
const ME: NodeId = NodeId(1);

fn ctx(partition: u32) -> PartitionContext {
    PartitionContext {
        cluster: CLUSTER,
        project: PROJECT,
        topic: TopicId::from_bytes([3; 16]),
        partition: Partition(partition),
    }
}

fn header() -> BatchHeader {
    BatchHeader {
        algorithm: Algorithm::Aes256Gcm,
        count: 1,
        term: Term(1),
        base_offset: Offset(1),
        first_id: Rlid::new(1, 1),
        last_id: Rlid::new(1, 1),
        dek: DekId::default(),
        prev: Link([0; 32]),
        producers: Vec::new(),
        types: Vec::new(),
        fingerprints: Vec::new(),
    }
}

fn plain(text: &str) -> PlainBatch {
    let mut plain = PlainBatch::with_capacity(text.len());
    plain.append(text.as_bytes()).unwrap();
    plain
}

struct World {
    vault: Arc<TestVault>,
    clock: Arc<ManualClock>,
    tasks: Tasks,
    holder: Holder,
    ring: RingId,
}

impl World {
    fn new() -> Self {
        let (vault, clock, tasks) = (TestVault::new(CLUSTER), ManualClock::new(), Tasks::new());
        let holder = vault.holder(ME, clock.clone(), &tasks);
        let ring = vault.create_ring(PROJECT);
        for partition in 0..4 {
            vault.put_custody(ME, &ctx(partition));
        }
        Self { vault, clock, tasks, holder, ring }
    }

    /// Another process's holder, whose replies pass through `edit`.
    fn holder_behind(&self, edit: impl Fn(&mut pb::LeaseReply) + Send + Sync + 'static) -> Holder {
        let link = Arc::new(EditedLink { inner: self.vault.link(ME), edit: Arc::new(edit) });
        Holder::new(HolderConfig::new(CLUSTER, ME), link, self.clock.clone(), &self.tasks)
    }

    fn surrender_request(&self, holder: &Holder, index: u64) -> pb::SurrenderRequest {
        pb::SurrenderRequest {
            session: wire::bytes(holder.session().as_bytes()),
            index,
            dead: vec![wire::dead_to(&Dead::Ring(self.ring))],
            switched: Vec::new(),
        }
    }
}

type Edit = Arc<dyn Fn(&mut pb::LeaseReply) + Send + Sync>;

struct EditedLink {
    inner: Arc<dyn VaultLink>,
    edit: Edit,
}

impl VaultLink for EditedLink {
    fn call(&self, request: pb::Request) -> BoxFuture<'static, Result<pb::Reply, LinkError>> {
        let (reply, edit) = (self.inner.call(request), Arc::clone(&self.edit));
        reply
            .map(move |reply| {
                reply.map(|mut reply| {
                    if let Some(pb::reply::Result::Lease(lease)) = &mut reply.result {
                        edit(lease);
                    }
                    reply
                })
            })
            .boxed()
    }
}

/// Gives up early, since the clock that leases count on stands still while tokio's runs.
async fn soon<T>(work: impl Future<Output = T>) -> Option<T> {
    timeout(Duration::from_millis(150), work).await.ok()
}

#[tokio::test]
async fn what_is_sealed_under_a_lease_opens_under_a_lease() {
    let world = World::new();
    let wrapped = world.holder.create_dek(&ctx(0), world.ring).await.unwrap();
    let sealed = world.holder.seal(&ctx(0), wrapped.dek, header(), plain("event")).unwrap();
    assert_eq!(sealed.header().dek, wrapped.dek);
    assert_eq!(world.holder.open(&ctx(0), sealed.bytes()).unwrap().blocks(), b"event");
    assert!(matches!(world.holder.open(&ctx(1), sealed.bytes()), Err(KeyError::Damaged)));
    assert!(matches!(
        world.holder.seal(&ctx(1), wrapped.dek, header(), plain("event")),
        Err(KeyError::Unsealable { .. })
    ));

    // Another process knows nothing until it has asked.
    let other = world.vault.holder(ME, world.clock.clone(), &world.tasks);
    assert!(!other.usable(wrapped.dek));
    assert!(other.open(&ctx(0), sealed.bytes()).is_err());
    other.ensure(&ctx(0), &wrapped).await.unwrap();
    assert_eq!(other.open(&ctx(0), sealed.bytes()).unwrap().blocks(), b"event");
}

#[tokio::test]
async fn without_a_lease_there_is_no_plaintext() {
    let world = World::new();
    let wrapped = world.holder.create_dek(&ctx(0), world.ring).await.unwrap();
    let sealed = world.holder.seal(&ctx(0), wrapped.dek, header(), plain("event")).unwrap();
    world.vault.set_reachable(false);
    world.clock.advance(Duration::from_millis(9_999));
    assert!(world.holder.open(&ctx(0), sealed.bytes()).is_ok());
    world.clock.advance(Duration::from_millis(1));
    assert!(!world.holder.usable(wrapped.dek));
    assert!(matches!(world.holder.open(&ctx(0), sealed.bytes()), Err(KeyError::NoLease)));
    assert!(matches!(world.holder.seal(&ctx(0), wrapped.dek, header(), plain("x")), Err(KeyError::NoLease)));
    assert!(matches!(world.holder.begin_use(wrapped.dek), Err(KeyError::NoLease)));

    let slot = Arc::clone(&world.holder.0.table().keys[&wrapped.dek]);
    world.holder.expire();
    assert!(slot.slot.with(|_| ()).is_none(), "the key is overwritten when its lease ends");
    assert_eq!(world.holder.held(), 0);

    world.vault.set_reachable(true);
    world.holder.ensure(&ctx(0), &wrapped).await.unwrap();
    assert_eq!(world.holder.open(&ctx(0), sealed.bytes()).unwrap().blocks(), b"event");
}

#[tokio::test]
async fn a_clock_that_was_set_back_ends_the_lease() {
    let world = World::new();
    let wrapped = world.holder.create_dek(&ctx(0), world.ring).await.unwrap();
    let now = world.clock.boot();
    world.clock.set_boot(BootTime(now.0.saturating_sub(Duration::from_millis(1))));
    assert!(!world.holder.usable(wrapped.dek));
    world.clock.set_boot(now);
    assert!(world.holder.usable(wrapped.dek));
}

#[tokio::test]
async fn a_lease_counts_from_before_the_request_was_sent() {
    let world = World::new();
    let clock = world.clock.clone();
    // The vault answers at once, but the reply takes four seconds.
    let holder = world.holder_behind(move |_| clock.advance(Duration::from_secs(4)));
    holder.create_dek(&ctx(0), world.ring).await.unwrap();
    let left = holder.lease_left().unwrap();
    assert!(left <= Duration::from_secs(6), "{left:?} of ten seconds are left after four");
}

#[tokio::test]
async fn a_lease_is_never_longer_than_either_side_says() {
    let world = World::new();
    let holder = world.holder_behind(|reply| reply.lease_ms = 60_000);
    holder.create_dek(&ctx(0), world.ring).await.unwrap();
    assert!(holder.lease_left().unwrap() <= Duration::from_secs(10));
    let holder = world.holder_behind(|reply| reply.lease_ms = 3_000);
    holder.create_dek(&ctx(0), world.ring).await.unwrap();
    assert!(holder.lease_left().unwrap() <= Duration::from_secs(3));
}

#[tokio::test]
async fn a_reply_to_another_session_has_no_effect() {
    let world = World::new();
    let holder = world.holder_behind(|reply| reply.session = wire::bytes(&[9; 16]));
    assert!(soon(holder.create_dek(&ctx(0), world.ring)).await.is_none());
    assert_eq!((holder.lease_left(), holder.held()), (None, 0));
}

#[tokio::test]
async fn a_reply_of_a_vault_that_was_set_back_has_no_effect() {
    let world = World::new();
    let epoch = Arc::new(AtomicU64::new(7));
    let told = Arc::clone(&epoch);
    let holder = world.holder_behind(move |reply| reply.epoch = told.load(Ordering::SeqCst));
    holder.create_dek(&ctx(0), world.ring).await.unwrap();
    assert_eq!(holder.floor(), 7);
    let before = holder.held();
    epoch.store(6, Ordering::SeqCst);
    assert!(soon(holder.create_dek(&ctx(0), world.ring)).await.is_none());
    assert_eq!(holder.held(), before);
}

#[tokio::test]
async fn a_reply_from_before_a_surrender_has_no_effect() {
    let world = World::new();
    // The reply is made before the revoke and arrives after it: in between the holder has surrendered.
    let slot: Arc<Mutex<Option<Holder>>> = Arc::default();
    let (inside, ring) = (Arc::clone(&slot), world.ring);
    let holder = world.holder_behind(move |reply| {
        if reply.results.is_empty() {
            return;
        }
        let holder = inside.lock().unwrap().clone().unwrap();
        let request = pb::SurrenderRequest {
            session: wire::bytes(holder.session().as_bytes()),
            index: reply.index + 1,
            dead: vec![wire::dead_to(&Dead::Ring(ring))],
            switched: Vec::new(),
        };
        holder.surrender(request).now_or_never().unwrap().unwrap();
    });
    *slot.lock().unwrap() = Some(holder.clone());
    assert!(soon(holder.create_dek(&ctx(0), world.ring)).await.is_none());
    assert_eq!(holder.held(), 0);
}

#[tokio::test]
async fn a_surrender_waits_for_the_uses_in_progress() {
    let world = World::new();
    let wrapped = world.holder.create_dek(&ctx(0), world.ring).await.unwrap();
    let other = world.holder.create_dek(&ctx(1), world.vault.create_ring(PROJECT)).await.unwrap();
    let using = world.holder.begin_use(wrapped.dek).unwrap();
    let held = Arc::clone(&using.held);
    let request = world.surrender_request(&world.holder, 1_000);
    let mut surrender = Box::pin(world.holder.surrender(request));
    assert!(soon(&mut surrender).await.is_none(), "acknowledged while a use is in progress");
    assert!(matches!(world.holder.begin_use(wrapped.dek), Err(KeyError::Revoked { .. })), "no new uses");
    assert!(!using.is_live() && !world.holder.usable(wrapped.dek));
    drop(using);
    assert_eq!(surrender.await.unwrap().index, 1_000);
    assert!(held.slot.with(|_| ()).is_none(), "overwritten before it is acknowledged");
    assert!(world.holder.usable(other.dek), "another ring's keys stay");
    assert!(matches!(
        world.holder.ensure(&ctx(0), &wrapped).await,
        Err(KeyError::Revoked { ring, .. }) if ring == world.ring
    ));
}

#[tokio::test]
async fn a_use_that_does_not_end_is_asked_to_and_never_acknowledged() {
    let world = World::new();
    let wrapped = world.holder.create_dek(&ctx(0), world.ring).await.unwrap();
    let using = world.holder.begin_use(wrapped.dek).unwrap();
    let request = world.surrender_request(&world.holder, 1_000);
    assert_eq!(world.holder.surrender(request.clone()).await, Err(SurrenderError::InUse));
    assert!(using.severed().is_cancelled());
    drop(using);
    assert!(world.holder.surrender(request).await.is_ok(), "the vault asks again");
}

#[tokio::test]
async fn a_use_that_ends_when_it_is_asked_to_is_acknowledged() {
    let world = World::new();
    let wrapped = world.holder.create_dek(&ctx(0), world.ring).await.unwrap();
    let using = world.holder.begin_use(wrapped.dek).unwrap();
    world.tasks.spawn("stream", |_| async move {
        using.severed().cancelled().await;
        drop(using);
    });
    assert!(world.holder.surrender(world.surrender_request(&world.holder, 1_000)).await.is_ok());
}

#[tokio::test]
async fn a_surrender_waits_until_opened_events_are_gone() {
    let world = World::new();
    let wrapped = world.holder.create_dek(&ctx(0), world.ring).await.unwrap();
    let sealed = world.holder.seal(&ctx(0), wrapped.dek, header(), plain("event")).unwrap();
    let bytes = world.holder.open(&ctx(0), sealed.bytes()).unwrap().into_bytes();
    let (head, tail) = (bytes.slice(..2), bytes.slice(2..));
    drop(bytes);
    let mut surrender = Box::pin(world.holder.surrender(world.surrender_request(&world.holder, 1_000)));
    assert!(soon(&mut surrender).await.is_none());
    drop(head);
    assert!(soon(&mut surrender).await.is_none());
    drop(tail);
    assert!(soon(&mut surrender).await.unwrap().is_ok());
}

#[tokio::test]
async fn a_key_that_died_in_use_is_overwritten_when_the_use_ends() {
    let world = World::new();
    let wrapped = world.holder.create_dek(&ctx(0), world.ring).await.unwrap();
    let using = world.holder.begin_use(wrapped.dek).unwrap();
    let held = Arc::clone(&using.held);
    // Heard of in a renewal: nobody will ask for a surrender.
    world.vault.order_revoke(world.ring, None);
    let other = world.vault.create_ring(PROJECT);
    world.holder.create_dek(&ctx(1), other).await.unwrap();
    assert!(!using.is_live() && held.slot.with(|_| ()).is_some());
    drop(using);
    assert!(held.slot.with(|_| ()).is_none());
}

#[tokio::test]
async fn a_process_does_not_speak_for_another() {
    let world = World::new();
    let other = world.vault.holder(ME, world.clock.clone(), &world.tasks);
    let request = world.surrender_request(&other, 5);
    assert_eq!(world.holder.surrender(request).await, Err(SurrenderError::OtherSession));
}

#[tokio::test]
async fn a_revoked_key_opens_nothing_any_more() {
    let world = World::new();
    let first = world.holder.create_dek(&ctx(0), world.ring).await.unwrap();
    let old = world.holder.seal(&ctx(0), first.dek, header(), plain("old")).unwrap();
    let version = world.vault.rotate(world.ring);
    let second = world.holder.create_dek(&ctx(0), world.ring).await.unwrap();
    assert_eq!((first.version, second.version), (KeyVersion(1), version));
    assert!(world.holder.should_roll_over(first.dek) && !world.holder.should_roll_over(second.dek));
    let new = world.holder.seal(&ctx(0), second.dek, header(), plain("new")).unwrap();

    world.vault.revoke(world.ring, Some(KeyVersion(1))).await;
    assert!(matches!(world.holder.open(&ctx(0), old.bytes()), Err(KeyError::Revoked { version: KeyVersion(1), .. })));
    assert_eq!(world.holder.open(&ctx(0), new.bytes()).unwrap().blocks(), b"new");
    let other = world.vault.holder(ME, world.clock.clone(), &world.tasks);
    assert!(matches!(other.ensure(&ctx(0), &first).await, Err(KeyError::Revoked { .. })));
    other.ensure(&ctx(0), &second).await.unwrap();

    world.vault.revoke(world.ring, None).await;
    assert!(matches!(world.holder.open(&ctx(0), new.bytes()), Err(KeyError::Revoked { .. })));
    assert!(matches!(world.holder.create_dek(&ctx(0), world.ring).await, Err(KeyError::Revoked { .. })));
}

#[tokio::test]
async fn a_renewal_brings_what_died_and_what_was_rotated() {
    let world = World::new();
    let other_ring = world.vault.create_ring(PROJECT);
    let dead = world.holder.create_dek(&ctx(0), world.ring).await.unwrap();
    let rotated = world.holder.create_dek(&ctx(1), other_ring).await.unwrap();
    let mut deaths = world.holder.deaths();
    deaths.mark_unchanged();
    world.vault.order_revoke(world.ring, None);
    world.vault.rotate(other_ring);
    // Whatever call comes next renews everything.
    world.holder.create_dek(&ctx(2), other_ring).await.unwrap();
    assert!(matches!(world.holder.begin_use(dead.dek), Err(KeyError::Revoked { .. })));
    assert!(world.holder.should_roll_over(rotated.dek));
    assert!(deaths.has_changed().unwrap());
}

#[tokio::test]
async fn news_is_heard_when_it_is_told_of_and_not_when_the_renewal_is_due() {
    let world = World::new();
    let wrapped = world.holder.create_dek(&ctx(0), world.ring).await.unwrap();
    let refresh = |session: SessionId, index| {
        world.holder.refresh(pb::RefreshRequest { session: wire::bytes(session.as_bytes()), index })
    };
    let before = world.vault.calls();
    let reply = refresh(world.holder.session(), 1).await.unwrap();
    assert!(reply.index > 1, "it has heard of more than that already");
    assert_eq!(world.vault.calls(), before, "old news costs no call");

    world.vault.rotate(world.ring);
    assert!(!world.holder.should_roll_over(wrapped.dek));
    refresh(world.holder.session(), reply.index + 1).await.unwrap();
    assert!(world.holder.should_roll_over(wrapped.dek));
    assert_eq!(refresh(SessionId::from_bytes([9; 16]), 1).await, Err(RefreshError::OtherSession));
}

#[tokio::test]
async fn a_vault_whose_clock_is_behind_makes_keys_that_last() {
    let world = World::new();
    world.clock.advance(Duration::from_hours(24 * 365));
    let wrapped = world.holder.create_dek(&ctx(0), world.ring).await.unwrap();
    assert!(!world.holder.should_roll_over(wrapped.dek), "or its successor would be worn as well, and so on");
    let other = world.vault.holder(ME, world.clock.clone(), &world.tasks);
    other.ensure(&ctx(0), &wrapped).await.unwrap();
    assert!(other.should_roll_over(wrapped.dek), "who finds an old key replaces it");
    world.clock.advance(Duration::from_hours(24 * 28));
    world.holder.ensure(&ctx(0), &wrapped).await.unwrap();
    assert!(world.holder.should_roll_over(wrapped.dek));
}

#[tokio::test]
async fn news_that_cannot_be_fetched_is_not_acknowledged() {
    let world = World::new();
    let lease = LeaseConfig { length: Duration::from_secs(3), ..LeaseConfig::default() };
    let config = HolderConfig { lease, ..HolderConfig::new(CLUSTER, ME) };
    let holder = Holder::new(config, world.vault.link(ME), world.clock.clone(), &world.tasks);
    world.vault.set_reachable(false);
    let request = pb::RefreshRequest { session: wire::bytes(holder.session().as_bytes()), index: 1 };
    assert_eq!(holder.refresh(request).await, Err(RefreshError::Late));
}

#[tokio::test]
async fn a_ring_that_died_is_known_to_those_who_hold_none_of_its_keys() {
    let world = World::new();
    let (versioned, closed) = (world.vault.create_ring(PROJECT), world.vault.create_ring(PROJECT));
    world.holder.create_dek(&ctx(0), world.ring).await.unwrap();
    let mut deaths = world.holder.deaths();
    deaths.mark_unchanged();
    world.vault.order_revoke(versioned, Some(KeyVersion(1)));
    world.vault.order_revoke(closed, None);
    world.holder.create_dek(&ctx(1), world.ring).await.unwrap();
    assert!(deaths.has_changed().unwrap());
    let refused = world.holder.refuse_ring(closed).unwrap_err();
    assert_eq!(refused.to_string(), format!("key ring {closed} was revoked"));
    assert_eq!(world.holder.refuse_ring(versioned), Ok(()), "a ring outlives its versions: it can be rotated");
    assert_eq!(world.holder.refuse_ring(world.ring), Ok(()));

    // A process that begins after that history is gone hears of it, too.
    for _ in 0..=crate::machine::EVENTS_MAX {
        world.vault.put_custody(ME, &ctx(9));
        world.vault.drop_custody(ME, &ctx(9));
    }
    let fresh = world.vault.holder(ME, world.clock.clone(), &world.tasks);
    fresh.create_dek(&ctx(0), world.ring).await.unwrap();
    assert!(fresh.refuse_ring(closed).is_err());
    assert_eq!(fresh.refuse_ring(world.ring), Ok(()));
}

#[tokio::test]
async fn what_is_disabled_is_given_up_says_so_and_is_had_again_when_it_is_enabled() {
    let world = World::new();
    let first = world.holder.create_dek(&ctx(0), world.ring).await.unwrap();
    let sealed = world.holder.seal(&ctx(0), first.dek, header(), plain("an event")).unwrap();
    world.vault.rotate(world.ring);
    let second = world.holder.create_dek(&ctx(0), world.ring).await.unwrap();
    let using = world.holder.begin_use(first.dek).unwrap();
    let mut deaths = world.holder.deaths();
    deaths.mark_unchanged();
    let disabled = world.vault.disable(world.ring, Some(KeyVersion(1)));
    tokio::pin!(disabled);
    assert!(soon(&mut disabled).await.is_none(), "a use is in progress");
    let expected = KeyError::Disabled { ring: world.ring, version: KeyVersion(1) };
    assert_eq!(using.check(), Err(expected.clone()));
    assert!(deaths.has_changed().unwrap());
    drop(using);
    disabled.await.unwrap();
    assert!(!world.holder.usable(first.dek));
    assert_eq!(world.holder.ensure(&ctx(0), &first).await, Err(expected));
    assert!(world.holder.usable(second.dek), "another version goes on");
    assert_eq!(world.holder.refuse_ring(world.ring), Ok(()));

    world.vault.enable(world.ring, Some(KeyVersion(1)));
    world.holder.create_dek(&ctx(1), world.ring).await.unwrap();
    world.holder.ensure(&ctx(0), &first).await.unwrap();
    assert_eq!(world.holder.open(&ctx(0), sealed.bytes()).unwrap().blocks(), b"an event");
}

#[tokio::test]
async fn a_ring_that_is_disabled_is_known_to_those_who_begin_after_that_history_is_gone() {
    let world = World::new();
    world.vault.disable(world.ring, None).await.unwrap();
    assert!(matches!(world.holder.create_dek(&ctx(0), world.ring).await, Err(KeyError::Disabled { .. })));
    for _ in 0..=crate::machine::EVENTS_MAX {
        world.vault.put_custody(ME, &ctx(9));
        world.vault.drop_custody(ME, &ctx(9));
    }
    let other = world.vault.create_ring(PROJECT);
    let fresh = world.vault.holder(ME, world.clock.clone(), &world.tasks);
    fresh.create_dek(&ctx(0), other).await.unwrap();
    let expected = KeyError::Disabled { ring: world.ring, version: KeyVersion(0) };
    assert_eq!(fresh.refuse_ring(world.ring), Err(expected));
    world.vault.enable(world.ring, None);
    fresh.create_dek(&ctx(1), other).await.unwrap();
    assert_eq!(fresh.refuse_ring(world.ring), Ok(()));
}

#[tokio::test]
async fn an_order_to_give_up_that_comes_late_does_not_take_back_what_was_enabled_since() {
    let world = World::new();
    world.holder.create_dek(&ctx(0), world.ring).await.unwrap();
    let disabled = world.vault.disable(world.ring, None).await.unwrap();
    world.vault.enable(world.ring, None);
    world.holder.create_dek(&ctx(1), world.ring).await.unwrap();
    let late = pb::SurrenderRequest {
        session: wire::bytes(world.holder.session().as_bytes()),
        index: disabled.index,
        dead: Vec::new(),
        switched: vec![pb::Switched {
            ring: wire::bytes(world.ring.as_bytes()),
            all: true,
            versions: Vec::new(),
            index: disabled.index,
        }],
    };
    world.holder.surrender(late).await.unwrap();
    assert_eq!(world.holder.refuse_ring(world.ring), Ok(()));
    world.holder.create_dek(&ctx(2), world.ring).await.unwrap();
}

/// The vault's leader asks for one ring, and dies before it asks for another that it was told to destroy first.
#[tokio::test]
async fn a_surrender_hides_nothing_that_the_vault_did_before_it() {
    let world = World::new();
    let dek = world.holder.create_dek(&ctx(0), world.ring).await.unwrap();
    let other = world.vault.create_ring(PROJECT);
    world.vault.order_revoke(world.ring, None);
    let index = world.vault.order_revoke(other, None);
    let only_the_other = pb::SurrenderRequest {
        session: wire::bytes(world.holder.session().as_bytes()),
        index: index.0,
        dead: vec![wire::dead_to(&Dead::Ring(other))],
        switched: Vec::new(),
    };
    world.holder.surrender(only_the_other).await.unwrap();
    assert!(world.holder.usable(dek.dek), "nobody has told of it yet");
    let third = world.vault.create_ring(PROJECT);
    world.holder.create_dek(&ctx(1), third).await.unwrap();
    assert!(!world.holder.usable(dek.dek), "the lease was renewed, and the key of a revoked ring lives on");
    assert!(matches!(world.holder.ensure(&ctx(0), &dek).await, Err(KeyError::Revoked { .. })));
}

#[tokio::test]
async fn a_key_is_granted_in_custody_and_in_its_place_only() {
    let world = World::new();
    let wrapped = world.holder.create_dek(&ctx(0), world.ring).await.unwrap();
    let stranger = world.vault.holder(NodeId(2), world.clock.clone(), &world.tasks);
    assert!(matches!(stranger.ensure(&ctx(0), &wrapped).await, Err(KeyError::NotGranted { .. })));
    assert!(matches!(stranger.create_dek(&ctx(0), world.ring).await, Err(KeyError::NotGranted { .. })));

    let fresh = world.vault.holder(ME, world.clock.clone(), &world.tasks);
    assert!(matches!(fresh.ensure(&ctx(1), &wrapped).await, Err(KeyError::Damaged)), "a forged context");
    let foreign = PartitionContext { project: ProjectId::from_bytes([8; 16]), ..ctx(0) };
    world.vault.put_custody(ME, &foreign);
    assert!(matches!(fresh.create_dek(&foreign, world.ring).await, Err(KeyError::NotGranted { .. })), "a foreign ring");

    world.vault.drop_custody(ME, &ctx(0));
    assert!(matches!(world.holder.create_dek(&ctx(0), world.ring).await, Err(KeyError::NotGranted { .. })));
    assert!(
        matches!(world.holder.begin_use(wrapped.dek), Err(KeyError::Unknown { .. })),
        "the key left with its custody"
    );
}

#[tokio::test]
async fn many_wants_share_few_calls() {
    let world = World::new();
    let wrapped = world.holder.create_dek(&ctx(0), world.ring).await.unwrap();
    let fresh = world.vault.holder(ME, world.clock.clone(), &world.tasks);
    let before = world.vault.calls();
    let place = ctx(0);
    let asked = (0..500).map(|_| fresh.ensure(&place, &wrapped));
    assert!(futures::future::join_all(asked).await.iter().all(Result::is_ok));
    let calls = world.vault.calls() - before;
    assert!(calls <= 3, "500 wants for one key took {calls} calls");
    let created = futures::future::join_all((0..600).map(|_| fresh.create_dek(&place, world.ring))).await;
    assert!(created.iter().all(Result::is_ok));
    let calls = world.vault.calls() - before - calls;
    assert!((3..=5).contains(&calls), "600 keys took {calls} calls");
    assert_eq!(fresh.held(), 601);
}

#[tokio::test]
async fn a_full_holder_gives_up_what_is_unused_for_longest() {
    let world = World::new();
    let config = HolderConfig { keys_max: 16, ..HolderConfig::new(CLUSTER, ME) };
    let holder = Holder::new(config, world.vault.link(ME), world.clock.clone(), &world.tasks);
    let mut keys = Vec::new();
    for _ in 0..16 {
        keys.push(holder.create_dek(&ctx(0), world.ring).await.unwrap().dek);
        world.clock.advance(Duration::from_millis(10));
    }
    let using = holder.begin_use(keys[0]).unwrap();
    let last = holder.create_dek(&ctx(0), world.ring).await.unwrap().dek;
    assert!(holder.usable(keys[0]), "it is in use");
    assert!(!holder.usable(keys[1]) && holder.usable(last));
    assert_eq!(holder.held(), 16);
    drop(using);
}

#[tokio::test]
async fn a_stop_overwrites_the_keys() {
    let world = World::new();
    let wrapped = world.holder.create_dek(&ctx(0), world.ring).await.unwrap();
    let held = Arc::clone(&world.holder.0.table().keys[&wrapped.dek]);
    assert!(world.tasks.shut_down(Duration::from_secs(5)).await);
    assert!(held.slot.with(|_| ()).is_none());
    assert!(!world.holder.usable(wrapped.dek));
    assert!(matches!(world.holder.ensure(&ctx(0), &wrapped).await, Err(KeyError::NoLease)));
}

#[tokio::test]
async fn damage_is_told_from_a_newer_format() {
    let world = World::new();
    let wrapped = world.holder.create_dek(&ctx(0), world.ring).await.unwrap();
    let sealed = world.holder.seal(&ctx(0), wrapped.dek, header(), plain("event")).unwrap();
    let flip = |at: usize, to: u8| {
        let mut bytes = sealed.bytes().to_vec();
        bytes[at] = to;
        world.holder.open(&ctx(0), &bytes.into()).unwrap_err()
    };
    assert!(matches!(flip(0, 2), KeyError::Newer(_)));
    assert_eq!(flip(1, 3), KeyError::Damaged, "not the key's algorithm");
    assert_eq!(flip(170, 0xff), KeyError::Damaged);
    assert_eq!(world.holder.open(&ctx(0), &sealed.bytes().slice(..50)).unwrap_err(), KeyError::Damaged);
    assert!(!format!("{:?}{wrapped:?}", world.holder).contains("event"));
}

#[derive(Debug, Default)]
struct TestFloor {
    kept: AtomicU64,
    broken: std::sync::atomic::AtomicBool,
}

impl EpochFloor for TestFloor {
    fn kept(&self) -> u64 {
        self.kept.load(Ordering::SeqCst)
    }

    fn raise(&self, epoch: u64) -> Result<(), String> {
        if self.broken.load(Ordering::SeqCst) {
            return Err("the disk is full".to_owned());
        }
        self.kept.fetch_max(epoch, Ordering::SeqCst);
        Ok(())
    }
}

#[tokio::test]
async fn an_epoch_is_kept_before_its_grants_are_used_and_binds_the_next_life() {
    let world = World::new();
    let floor = Arc::new(TestFloor::default());
    let config = || HolderConfig { floor: floor.clone(), ..HolderConfig::new(CLUSTER, ME) };
    floor.broken.store(true, Ordering::SeqCst);
    let holder = Holder::new(config(), world.vault.link(ME), world.clock.clone(), &world.tasks);
    assert!(soon(holder.create_dek(&ctx(0), world.ring)).await.is_none_or(|outcome| outcome.is_err()));
    assert_eq!((holder.held(), holder.lease_left()), (0, None), "what could not be kept is not used");
    floor.broken.store(false, Ordering::SeqCst);
    holder.create_dek(&ctx(0), world.ring).await.unwrap();
    assert_eq!(floor.kept(), holder.floor());

    // The next life meets a vault that was set back: its grants are not taken.
    floor.kept.store(holder.floor() + 1, Ordering::SeqCst);
    let next = Holder::new(config(), world.vault.link(ME), world.clock.clone(), &world.tasks);
    assert!(soon(next.create_dek(&ctx(0), world.ring)).await.is_none_or(|outcome| outcome.is_err()));
    assert_eq!((next.held(), next.lease_left()), (0, None));
}

/// Holds every lease reply back until it is let go.
struct HeldBack {
    inner: Arc<dyn VaultLink>,
    arrived: Arc<Notify>,
    go: Arc<Notify>,
}

impl VaultLink for HeldBack {
    fn call(&self, request: pb::Request) -> BoxFuture<'static, Result<pb::Reply, LinkError>> {
        let is_lease = matches!(request.call, Some(pb::request::Call::Lease(_)));
        let (reply, arrived, go) = (self.inner.call(request), Arc::clone(&self.arrived), Arc::clone(&self.go));
        async move {
            let reply = reply.await;
            if is_lease {
                arrived.notify_one();
                go.notified().await;
            }
            reply
        }
        .boxed()
    }
}

#[tokio::test]
async fn a_renewal_that_arrives_after_the_release_gives_no_lease() {
    let world = World::new();
    let (arrived, go) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let link = Arc::new(HeldBack { inner: world.vault.link(ME), arrived: arrived.clone(), go: go.clone() });
    let holder = Holder::new(HolderConfig::new(CLUSTER, ME), link, world.clock.clone(), &world.tasks);
    let asking = {
        let (holder, ring) = (holder.clone(), world.ring);
        async move { holder.create_dek(&ctx(0), ring).await }
    };
    let releasing = async {
        arrived.notified().await;
        holder.release().await;
        go.notify_one();
    };
    let (asked, ()) = futures::join!(soon(asking), releasing);
    assert!(asked.is_none_or(|outcome| outcome.is_err()));
    assert_eq!((holder.held(), holder.lease_left()), (0, None));
}

#[tokio::test]
async fn a_lease_that_is_shorter_than_the_settings_is_renewed_in_its_own_time() {
    let world = World::new();
    let holder = world.holder_behind(|lease| lease.lease_ms = 4_000);
    holder.create_dek(&ctx(0), world.ring).await.unwrap();
    assert_eq!(holder.lease_left(), Some(Duration::from_secs(4)));
    assert_eq!(holder.lease_config().renew_every(), Duration::from_millis(1_200));
    // And never a longer one than the settings allow.
    let holder = world.holder_behind(|lease| lease.lease_ms = 60_000);
    holder.create_dek(&ctx(0), world.ring).await.unwrap();
    assert_eq!(holder.lease_left(), Some(LeaseConfig::default().length));
}
