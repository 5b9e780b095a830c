//! Rings that are disabled, enabled, rotated by the clock and revoked by it, over three voters that may die meanwhile.

mod common;

use std::sync::Arc;
use std::time::Duration;

use common::{Cluster, PROJECT, ROOT, VOTERS, batch, ctx, lease, within};
use ensign_keyvault::testing::ManualClock;
use ensign_keyvault::{CallError, Caller, KeyError, Reason, RingInfo, RingState, VaultClient, VersionState};
use ensign_proto::pb::vault::v1 as pb;
use ensign_proto::{Algorithm, KeyVersion, NodeId, RingId};
use ensign_raft::env::{Clock as _, UnixNanos};
use tokio::time::sleep;

const RING: RingId = RingId::from_bytes([7; 16]);
/// Rotated once a day: where it was, the leader has looked.
const WITNESS: RingId = RingId::from_bytes([8; 16]);
const A: NodeId = NodeId(11);
const B: NodeId = NodeId(12);
const PATIENCE: Duration = Duration::from_secs(30);
const DAY: Duration = Duration::from_hours(24);

fn retriable(error: &CallError) -> bool {
    match error {
        CallError::Unreachable(_) => true,
        CallError::Malformed { .. } => false,
        CallError::Refused(refusal) => {
            matches!(refusal.reason, Reason::NotLeader | Reason::Unavailable | Reason::Pending | Reason::OutcomeUnknown)
        }
    }
}

/// Calls until the vault has a leader that answers.
async fn settled<T, F: Future<Output = Result<T, CallError>>>(mut call: impl FnMut() -> F) -> T {
    within("an answer", async {
        loop {
            match call().await {
                Ok(answer) => return answer,
                Err(error) => assert!(retriable(&error), "{error}"),
            }
            sleep(Duration::from_millis(20)).await;
        }
    })
    .await
}

async fn ring_in_custody(client: &VaultClient, nodes: &[NodeId]) {
    settled(|| client.create_ring("test", RING, PROJECT, Algorithm::Aes256Gcm)).await;
    for node in nodes {
        client.put_custody("test", *node, &ctx()).await.expect("custody can be put");
    }
}

/// The ring, once it is so.
async fn once(client: &VaultClient, ring: RingId, what: &str, so: impl Fn(&RingInfo) -> bool) -> RingInfo {
    within(what, async {
        loop {
            if let Ok(found) = client.ring(ring).await
                && so(&found)
            {
                return found;
            }
            sleep(Duration::from_millis(10)).await;
        }
    })
    .await
}

#[tokio::test]
async fn what_is_disabled_is_closed_on_every_node_when_that_is_answered_and_open_again_when_it_is_enabled() {
    let cluster = Cluster::start().await;
    let client = cluster.client(A);
    ring_in_custody(&client, &[A, B]).await;
    let (a, b) = (cluster.holder(A), cluster.holder(B));
    let dek = a.create_dek(&ctx(), RING).await.unwrap();
    b.ensure(&ctx(), &dek).await.unwrap();
    let (header, plain) = batch("event");
    let sealed = a.seal(&ctx(), dek.dek, header, plain).unwrap();
    for version in [Some(KeyVersion(1)), None] {
        for holder in [&a, &b] {
            holder.ensure(&ctx(), &dek).await.unwrap();
            assert_eq!(holder.open(&ctx(), sealed.bytes()).unwrap().blocks(), b"event");
        }
        let disabled = client.disable("test", RING, version, PATIENCE).await.unwrap();
        let version_state = if version.is_some() { VersionState::Disabled } else { VersionState::Active };
        assert_eq!(disabled.versions[0].state, version_state);
        assert_eq!(disabled.state == RingState::Disabled, version.is_none());
        assert!(disabled.index.0 > 0 && disabled.active().is_none());
        for holder in [&a, &b] {
            assert!(!holder.usable(dek.dek));
            assert!(holder.open(&ctx(), sealed.bytes()).is_err());
            let refused = holder.ensure(&ctx(), &dek).await;
            assert!(matches!(refused, Err(KeyError::Disabled { .. })), "{refused:?}");
            let refused = holder.create_dek(&ctx(), RING).await.unwrap_err();
            assert!(refused.to_string().contains("ensign key enable"), "{refused}");
        }
        let again = client.disable("test", RING, version, PATIENCE).await.unwrap();
        assert_eq!(again, disabled, "a repetition is answered alike");
        assert!(client.enable("test", RING, version).await.unwrap().index > disabled.index);
    }
    // Answered when the holders know: nothing is waited for any more.
    for holder in [&a, &b] {
        holder.ensure(&ctx(), &dek).await.unwrap();
        assert_eq!(holder.open(&ctx(), sealed.bytes()).unwrap().blocks(), b"event");
    }
    assert_eq!(a.create_dek(&ctx(), RING).await.unwrap().version, KeyVersion(1));
}

#[tokio::test]
async fn a_silent_holder_is_outwaited_before_a_disable_is_answered_and_a_new_leader_goes_on_with_it() {
    let mut cluster = Cluster::start().await;
    let client = cluster.client(A);
    ring_in_custody(&client, &[A, B]).await;
    let b = cluster.holder(B);
    let dek = b.create_dek(&ctx(), RING).await.unwrap();
    let (header, plain) = batch("event");
    let sealed = b.seal(&ctx(), dek.dek, header, plain).unwrap();
    cluster.wires.cut(B);
    let leader = cluster.leader().await;
    let order = pb::Request {
        actor: "test".to_owned(),
        call: Some(pb::request::Call::Disable(pb::SwitchRequest {
            ring: RING.as_bytes().to_vec().into(),
            target: Some(pb::switch_request::Target::All(true)),
            order: 0,
        })),
    };
    let vault = cluster.voters[&leader].vault.clone();
    let reply = vault.handle(Caller { node: A }, order).await;
    let Some(pb::reply::Result::Refusal(refusal)) = reply.result else { panic!("{reply:?}") };
    assert_eq!(refusal.reason(), pb::refusal::Reason::Pending);
    drop(vault);
    let _log = cluster.crash(leader).await;
    // Nobody asks again.
    once(&client, RING, "the end of the wait", |ring| ring.state == RingState::Disabled).await;
    assert!(matches!(b.open(&ctx(), sealed.bytes()), Err(KeyError::NoLease)), "its lease ended before that");
}

#[tokio::test]
async fn enabling_takes_back_a_disable_that_is_waiting_and_what_is_revoked_stays_revoked() {
    let cluster = Cluster::start().await;
    let client = cluster.client(A);
    ring_in_custody(&client, &[A]).await;
    let a = cluster.holder(A);
    let dek = a.create_dek(&ctx(), RING).await.unwrap();
    let using = a.begin_use(dek.dek).unwrap();
    let waiting = client.disable("test", RING, None, PATIENCE);
    let enabled = async {
        once(&client, RING, "the order", |ring| ring.state == RingState::Disabling).await;
        client.enable("test", RING, None).await
    };
    let (disabled, enabled) = tokio::join!(waiting, enabled);
    assert_eq!(disabled.unwrap_err().reason(), Some(Reason::Conflict));
    assert_eq!(enabled.unwrap().active(), Some(KeyVersion(1)));
    drop(using);
    a.ensure(&ctx(), &dek).await.unwrap();

    client.disable("test", RING, Some(KeyVersion(1)), PATIENCE).await.unwrap();
    client.revoke("test", RING, Some(KeyVersion(1)), PATIENCE).await.unwrap();
    let refused = client.enable("test", RING, Some(KeyVersion(1))).await.unwrap_err();
    assert_eq!(refused.reason(), Some(Reason::Revoked));
    assert!(refused.to_string().contains("destroyed, for ever"), "{refused}");
}

#[tokio::test]
async fn rings_are_made_by_name_and_an_algorithm_counts_for_new_data_keys() {
    let cluster = Cluster::start().await;
    let client = cluster.client(A);
    ring_in_custody(&client, &[A]).await;
    let a = cluster.holder(A);
    let old = a.create_dek(&ctx(), RING).await.unwrap();
    let (header, plain) = batch("old");
    let sealed = a.seal(&ctx(), old.dek, header, plain).unwrap();
    let set = client.set_ring("test", RING, Some(30 * DAY), Some(Algorithm::Aes128Gcm)).await.unwrap();
    assert_eq!((set.rotation, set.alg), (30 * DAY, Algorithm::Aes128Gcm));
    let new = a.create_dek(&ctx(), RING).await.unwrap();
    assert_eq!((old.alg, new.alg), (Algorithm::Aes256Gcm, Algorithm::Aes128Gcm));
    let (header, plain) = batch("new");
    let sealed_new = a.seal(&ctx(), new.dek, header, plain).unwrap();
    client.rotate("test", RING, None).await.unwrap();
    // Both open in a process that has to ask the vault for everything.
    let fresh = cluster.holder(A);
    for (dek, sealed, text) in [(&old, &sealed, b"old"), (&new, &sealed_new, b"new")] {
        fresh.ensure(&ctx(), dek).await.unwrap();
        assert_eq!(fresh.open(&ctx(), sealed.bytes()).unwrap().blocks(), text);
    }

    let named = client.create_named_ring("test", PROJECT, "payments", Algorithm::Aes192Gcm).await.unwrap();
    assert_eq!((&*named.name, named.alg, named.active()), ("payments", Algorithm::Aes192Gcm, Some(KeyVersion(1))));
    let twice = client.create_named_ring("test", PROJECT, "payments", Algorithm::Aes192Gcm).await.unwrap_err();
    assert_eq!(twice.reason(), Some(Reason::AlreadyExists));
    assert!(twice.to_string().contains(&named.ring.to_string()), "{twice}");
    assert_eq!(a.create_dek(&ctx(), named.ring).await.unwrap().alg, Algorithm::Aes192Gcm);
}

/// With a clock that is set by hand, and a ring that is rotated every day of it.
async fn by_hand() -> (Cluster, VaultClient, Arc<ManualClock>) {
    let clock = ManualClock::new();
    let cluster = Cluster::start_on(clock.clone(), &[ROOT; 3], lease()).await;
    let client = cluster.client(A);
    ring_in_custody(&client, &[A]).await;
    client.create_ring("test", WITNESS, PROJECT, Algorithm::Aes256Gcm).await.expect("the ring can be made and set");
    client.set_ring("test", WITNESS, Some(DAY), None).await.expect("the ring can be made and set");
    (cluster, client, clock)
}

/// The leader, whoever it is by now, has looked at the clock since it was set.
async fn has_looked(client: &VaultClient, versions: usize) {
    once(client, WITNESS, "a look at the clock", |ring| ring.versions.len() >= versions).await;
}

async fn replace_leader(cluster: &mut Cluster) {
    let leader = cluster.leader().await;
    let log = cluster.crash(leader).await;
    cluster.leader_but(Some(leader)).await;
    cluster.start_voter(leader, log, ROOT, lease()).await;
}

#[tokio::test]
async fn a_ring_is_rotated_once_a_period_whoever_leads() {
    let (mut cluster, client, clock) = by_hand().await;
    clock.advance(89 * DAY);
    has_looked(&client, 2).await;
    assert_eq!(client.ring(RING).await.unwrap().active(), Some(KeyVersion(1)), "a day too early");
    clock.advance(DAY);
    let rotated = once(&client, RING, "a rotation", |ring| ring.active() == Some(KeyVersion(2))).await;
    assert_eq!(rotated.next_rotation_ms(), Some(clock.wall().as_millis() + (90 * DAY).as_millis() as u64));
    let seen = client.ring(WITNESS).await.unwrap().versions.len();

    replace_leader(&mut cluster).await;
    clock.advance(DAY);
    has_looked(&client, seen + 1).await;
    assert_eq!(client.ring(RING).await.unwrap().active(), Some(KeyVersion(2)), "the new leader rotated again");

    // Restarts keep the period that was set, and when it began.
    for node in VOTERS {
        let log = cluster.crash(node).await;
        cluster.start_voter(node, log, ROOT, lease()).await;
        settled(|| client.ring(RING)).await;
    }
    clock.advance(89 * DAY);
    once(&client, RING, "the next rotation", |ring| ring.active() == Some(KeyVersion(3))).await;
}

#[tokio::test]
async fn what_an_operator_disabled_is_not_succeeded_by_the_clock() {
    let (_cluster, client, clock) = by_hand().await;
    client.disable("test", RING, Some(KeyVersion(1)), Duration::ZERO).await.unwrap_err();
    clock.advance(100 * DAY);
    has_looked(&client, 2).await;
    assert_eq!(client.ring(RING).await.unwrap().versions.len(), 1);
    settled(|| client.enable("test", RING, Some(KeyVersion(1)))).await;
    once(&client, RING, "the rotation that was due", |ring| ring.active() == Some(KeyVersion(2))).await;
}

#[tokio::test]
async fn a_scheduled_revocation_waits_for_time_with_a_leader_and_not_for_the_wall_clock() {
    let minute = Duration::from_mins(1);
    let (mut cluster, client, clock) = by_hand().await;
    client.rotate("test", RING, None).await.unwrap();
    let scheduled = client.schedule_revoke("apikey:X", RING, Some(KeyVersion(1)), 3 * minute).await.unwrap();
    assert_eq!((scheduled.scheduled.len(), scheduled.scheduled[0].left), (1, 3 * minute));
    client.schedule_revoke("apikey:X", RING, Some(KeyVersion(2)), minute).await.unwrap();
    client.cancel_revoke("apikey:Y", RING, Some(KeyVersion(2))).await.unwrap();

    // A wall clock that is a year ahead destroys nothing.
    clock.set_wall(UnixNanos(clock.wall().0 + (365 * DAY).as_nanos() as u64));
    has_looked(&client, 2).await;
    let state = |ring: &RingInfo, version: usize| ring.versions[version - 1].state;
    let ring = client.ring(RING).await.unwrap();
    assert_eq!((state(&ring, 1), ring.scheduled[0].left), (VersionState::Retired, 3 * minute));

    // Nor does an hour that no leader counted. Steps are committed, so that a new leader goes on with them.
    clock.advance(Duration::from_hours(1));
    let ring = once(&client, RING, "a step", |ring| ring.scheduled[0].left < 3 * minute).await;
    assert_eq!(
        (state(&ring, 1), ring.scheduled[0].left),
        (VersionState::Retired, minute),
        "a step is two minutes at most"
    );
    replace_leader(&mut cluster).await;
    let ring = settled(|| client.ring(RING)).await;
    assert_eq!((state(&ring, 1), ring.scheduled[0].left), (VersionState::Retired, minute));
    let destroyed = within("the destruction", async {
        loop {
            clock.advance(minute / 4);
            sleep(Duration::from_millis(200)).await;
            match client.ring(RING).await {
                Ok(ring) if state(&ring, 1) == VersionState::Revoked => return ring,
                _ => {}
            }
        }
    })
    .await;
    assert!(destroyed.scheduled.is_empty());
    assert_ne!(state(&destroyed, 2), VersionState::Revoked, "what was cancelled is not carried out");
    let late = client.cancel_revoke("apikey:Y", RING, Some(KeyVersion(1))).await.unwrap_err();
    assert_eq!(late.reason(), Some(Reason::Revoked));
    let receipt = settled(|| client.revoke("test", RING, Some(KeyVersion(1)), PATIENCE)).await;
    assert_eq!(receipt.versions[0].0, KeyVersion(1));
}
