//! A vault of three voters and the nodes that hold its keys, in one process.

mod common;

use std::time::Duration;

use common::{Cluster, PROJECT, ROOT, VOTERS, batch, ctx, lease, within};
use ensign_keyvault::{
    CallError, Caller, InitializeError, KeyError, LeaseConfig, Reason, RingState, SecretKind, VaultClient, VersionState,
};
use ensign_proto::pb::vault::v1 as pb;
use ensign_proto::{Algorithm, KeyVersion, NodeId, RingId};
use tokio::time::{Instant, sleep};

const RING: RingId = RingId::from_bytes([7; 16]);
const A: NodeId = NodeId(11);
const B: NodeId = NodeId(12);
const PATIENCE: Duration = Duration::from_secs(30);

async fn ring_in_custody(client: &VaultClient, nodes: &[NodeId]) {
    within("a ring", async {
        loop {
            match client.create_ring("test", RING, PROJECT, Algorithm::Aes256Gcm).await {
                Ok(ring) => return assert_eq!(ring.active(), Some(KeyVersion(1))),
                Err(error) => assert!(retriable(&error), "{error}"),
            }
            sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
    for node in nodes {
        client.put_custody("test", *node, &ctx()).await.expect("custody can be put");
    }
}

fn retriable(error: &CallError) -> bool {
    match error {
        CallError::Unreachable(_) => true,
        CallError::Malformed { .. } => false,
        CallError::Refused(refusal) => matches!(refusal.reason, Reason::NotLeader | Reason::Unavailable),
    }
}

#[tokio::test]
async fn keys_are_made_rotated_and_revoked_through_failovers() {
    let mut cluster = Cluster::start().await;
    let client = cluster.client(A);
    ring_in_custody(&client, &[A, B]).await;
    let (a, b) = (cluster.holder(A), cluster.holder(B));
    let old = a.create_dek(&ctx(), RING).await.unwrap();
    let (header, plain) = batch("old");
    let sealed_old = a.seal(&ctx(), old.dek, header, plain).unwrap();
    b.ensure(&ctx(), &old).await.unwrap();
    assert_eq!(b.open(&ctx(), sealed_old.bytes()).unwrap().blocks(), b"old");

    // A failover is invisible to those who hold a lease.
    let first = cluster.leader().await;
    let log = cluster.crash(first).await;
    assert_eq!(b.open(&ctx(), sealed_old.bytes()).unwrap().blocks(), b"old");
    let rotated = within("a rotation", async {
        loop {
            match client.rotate("test", RING, Some(KeyVersion(1))).await {
                Ok(ring) => return ring,
                Err(error) if error.reason() == Some(Reason::Conflict) => return client.ring(RING).await.unwrap(),
                Err(error) => assert!(retriable(&error), "{error}"),
            }
        }
    })
    .await;
    assert_eq!(rotated.active(), Some(KeyVersion(2)));
    assert_eq!(rotated.versions[0].state, VersionState::Retired);
    cluster.start_voter(first, log, ROOT, lease()).await;
    within("news of the rotation", async {
        while !a.should_roll_over(old.dek) {
            sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
    let new = a.create_dek(&ctx(), RING).await.unwrap();
    assert_eq!(new.version, KeyVersion(2));
    let (header, plain) = batch("new");
    let sealed_new = a.seal(&ctx(), new.dek, header, plain).unwrap();
    b.ensure(&ctx(), &new).await.unwrap();

    // What is revoked is dead at every holder when that is answered, across another failover.
    let second = cluster.leader().await;
    let log = cluster.crash(second).await;
    let receipt = client.revoke("test", RING, Some(KeyVersion(1)), PATIENCE).await.unwrap();
    assert_eq!(receipt.versions[0].0, KeyVersion(1));
    assert_eq!(receipt.versions[0].1, rotated.versions[0].kek_id);
    for holder in [&a, &b] {
        assert!(!holder.usable(old.dek));
        assert!(matches!(holder.open(&ctx(), sealed_old.bytes()), Err(KeyError::Revoked { .. })));
        assert_eq!(holder.open(&ctx(), sealed_new.bytes()).unwrap().blocks(), b"new");
        assert!(matches!(holder.ensure(&ctx(), &old).await, Err(KeyError::Revoked { .. })));
    }
    assert_eq!(client.revoke("test", RING, Some(KeyVersion(1)), PATIENCE).await.unwrap(), receipt, "once");
    cluster.start_voter(second, log, ROOT, lease()).await;

    let all = client.revoke("test", RING, None, PATIENCE).await.unwrap();
    assert!(all.all && all.epoch > receipt.epoch);
    assert!(matches!(a.create_dek(&ctx(), RING).await, Err(KeyError::Revoked { .. })));
    assert!(matches!(b.open(&ctx(), sealed_new.bytes()), Err(KeyError::Revoked { .. })));
    let ring = client.ring(RING).await.unwrap();
    assert!(
        ring.state == RingState::Revoked && ring.versions.iter().all(|version| version.state == VersionState::Revoked)
    );
}

#[tokio::test]
async fn a_rotation_is_answered_when_the_holders_that_can_be_reached_know_of_it() {
    let cluster = Cluster::start().await;
    let client = cluster.client(A);
    ring_in_custody(&client, &[A, B]).await;
    let (a, b) = (cluster.holder(A), cluster.holder(B));
    let dek = a.create_dek(&ctx(), RING).await.unwrap();
    b.ensure(&ctx(), &dek).await.unwrap();
    client.rotate("test", RING, None).await.unwrap();
    assert!(a.should_roll_over(dek.dek) && b.should_roll_over(dek.dek));
    let next = a.create_dek(&ctx(), RING).await.unwrap();
    b.ensure(&ctx(), &next).await.unwrap();

    // One that is cut off does not keep it from the others.
    cluster.wires.cut(B);
    assert_eq!(client.rotate("test", RING, None).await.unwrap().active(), Some(KeyVersion(3)));
    assert!(a.should_roll_over(next.dek) && !b.should_roll_over(next.dek));
}

#[tokio::test]
async fn holders_that_surrender_are_not_waited_for() {
    let cluster = Cluster::start().await;
    let client = cluster.client(A);
    ring_in_custody(&client, &[A, B]).await;
    let (a, b) = (cluster.holder(A), cluster.holder(B));
    let dek = a.create_dek(&ctx(), RING).await.unwrap();
    b.ensure(&ctx(), &dek).await.unwrap();
    // Until its leadership is older than W, a leader cannot know whom its predecessors granted what.
    sleep(lease().wait()).await;
    let began = Instant::now();
    let receipt = client.revoke("test", RING, None, PATIENCE).await.unwrap();
    let took = began.elapsed();
    assert!(took < Duration::from_secs(1), "{took:?}");
    assert_eq!((receipt.surrendered, receipt.waited), (vec![A, B], vec![]));
    assert!(!a.usable(dek.dek) && !b.usable(dek.dek));
}

#[tokio::test]
async fn a_holder_that_is_silent_is_outwaited() {
    let cluster = Cluster::start().await;
    let client = cluster.client(A);
    ring_in_custody(&client, &[A, B]).await;
    let (a, b) = (cluster.holder(A), cluster.holder(B));
    let dek = a.create_dek(&ctx(), RING).await.unwrap();
    b.ensure(&ctx(), &dek).await.unwrap();
    let (header, plain) = batch("event");
    let sealed = a.seal(&ctx(), dek.dek, header, plain).unwrap();
    sleep(lease().wait()).await;
    cluster.wires.cut(B);
    assert!(b.open(&ctx(), sealed.bytes()).is_ok(), "its lease runs on");
    let began = Instant::now();
    let receipt = client.revoke("test", RING, None, PATIENCE).await.unwrap();
    assert!(began.elapsed() >= lease().wait(), "{:?}", began.elapsed());
    assert!(matches!(b.open(&ctx(), sealed.bytes()), Err(KeyError::NoLease)), "the lease ended before the answer");
    assert_eq!((receipt.surrendered, receipt.waited), (vec![A], vec![B]));
}

#[tokio::test]
async fn a_use_in_progress_holds_a_revoke_up() {
    let cluster = Cluster::start().await;
    let client = cluster.client(A);
    ring_in_custody(&client, &[A]).await;
    let a = cluster.holder(A);
    let dek = a.create_dek(&ctx(), RING).await.unwrap();
    sleep(lease().wait()).await;
    let using = a.begin_use(dek.dek).unwrap();
    let revoked = client.revoke("test", RING, None, PATIENCE);
    tokio::pin!(revoked);
    let early = tokio::time::timeout(Duration::from_millis(700), &mut revoked).await;
    assert!(early.is_err(), "answered while a use is in progress: {early:?}");
    assert!(!using.is_live());
    drop(using);
    let receipt = within("a receipt", revoked).await.unwrap();
    assert_eq!(receipt.surrendered, [A]);
}

#[tokio::test]
async fn a_new_leader_finishes_what_an_old_one_began_and_waits_from_its_own_start() {
    let mut cluster = Cluster::start().await;
    let client = cluster.client(A);
    ring_in_custody(&client, &[A, B]).await;
    let b = cluster.holder(B);
    let dek = b.create_dek(&ctx(), RING).await.unwrap();
    sleep(lease().wait()).await;
    // Cut off, so that the order is committed, but nobody surrenders before the leader dies.
    cluster.wires.cut(B);
    let leader = cluster.leader().await;
    let order = pb::Request {
        actor: "test".to_owned(),
        call: Some(pb::request::Call::Revoke(pb::RevokeRequest {
            ring: RING.as_bytes().to_vec().into(),
            target: Some(pb::revoke_request::Target::All(true)),
        })),
    };
    let vault = cluster.voters[&leader].vault.clone();
    let reply = vault.handle(Caller { node: A }, order).await;
    let Some(pb::reply::Result::Refusal(refusal)) = reply.result else { panic!("{reply:?}") };
    assert_eq!(refusal.reason(), pb::refusal::Reason::Pending);
    drop(vault);
    let killed = Instant::now();
    let _log = cluster.crash(leader).await;

    // Nobody asks again.
    within("the destruction", async {
        loop {
            if let Ok(ring) = client.ring(RING).await
                && ring.versions[0].state == VersionState::Revoked
            {
                return;
            }
            sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
    let waited = killed.elapsed();
    assert!(waited >= lease().wait(), "a new leader waited {waited:?} only");
    assert!(!b.usable(dek.dek));
    let receipt = client.revoke("test", RING, None, PATIENCE).await.unwrap();
    assert!(receipt.all && receipt.waited.is_empty() && receipt.surrendered.is_empty());
}

#[tokio::test]
async fn the_longest_lease_is_waited_for_whatever_the_leaders_own_settings_say() {
    let (short, long) = (lease(), LeaseConfig { length: Duration::from_secs(6), ..lease() });
    let mut cluster = Cluster::start_with(&[ROOT; 3], long).await;
    let client = cluster.client(A);
    ring_in_custody(&client, &[A]).await;
    let a = cluster.holder_with(A, LeaseConfig { length: Duration::from_mins(1), ..lease() });
    let dek = a.create_dek(&ctx(), RING).await.unwrap();
    let left = a.lease_left().expect("a lease");
    assert!(
        left > short.length && left <= long.length,
        "{left:?}: what the state says, whatever the holder would take"
    );

    // The leader dies, and so does the way to the holder. The voters that are left have short leases in their settings.
    let leader = cluster.leader().await;
    for node in VOTERS.into_iter().filter(|node| *node != leader) {
        let log = cluster.crash(node).await;
        cluster.start_voter(node, log, ROOT, short).await;
        // So that the next one is missed by nobody.
        within("a majority", async { while client.ring(RING).await.is_err() {} }).await;
    }
    cluster.wires.cut(A);
    let killed = Instant::now();
    let _log = cluster.crash(leader).await;
    let operator = cluster.client(B);
    let receipt = within("a receipt", async {
        loop {
            match operator.revoke("test", RING, None, PATIENCE).await {
                Ok(receipt) => return receipt,
                Err(error) => assert!(retriable(&error), "{error}"),
            }
        }
    })
    .await;
    let waited = killed.elapsed();
    assert!(waited >= long.wait(), "acknowledged after {waited:?}, while leases of {:?} may run", long.length);
    assert!(receipt.all && !a.usable(dek.dek));
}

#[tokio::test]
async fn a_deposed_leader_grants_nothing() {
    let cluster = Cluster::start().await;
    let client = cluster.client(A);
    ring_in_custody(&client, &[A]).await;
    let old = cluster.leader().await;
    cluster.net.isolate(old);
    let lease = pb::LeaseRequest {
        session: vec![5; 16].into(),
        seen: 0,
        boot_ns: 0,
        hpke_pk: vec![9; 32].into(),
        want: vec![],
    };
    let request = pb::Request { actor: String::new(), call: Some(pb::request::Call::Lease(lease)) };
    let vault = cluster.voters[&old].vault.clone();
    // It still believes that it leads.
    let reply = within("a refusal", vault.handle(Caller { node: A }, request)).await;
    let Some(pb::reply::Result::Refusal(refusal)) = reply.result else { panic!("granted: {reply:?}") };
    let reason = refusal.reason();
    assert!(matches!(reason, pb::refusal::Reason::Unavailable | pb::refusal::Reason::NotLeader), "{reason:?}");
    let new = cluster.leader_but(Some(old)).await;
    assert_ne!(new, old);
    let a = cluster.holder(A);
    a.create_dek(&ctx(), RING).await.unwrap();
}

#[tokio::test]
async fn a_voter_with_a_wrong_root_key_is_sealed_and_harms_nobody() {
    let mut wrong = ROOT;
    wrong[0] ^= 1;
    let mut cluster = Cluster::start_with(&[ROOT, ROOT, ROOT], lease()).await;
    let client = cluster.client(A);
    ring_in_custody(&client, &[A]).await;
    let log = cluster.crash(VOTERS[2]).await;
    cluster.start_voter(VOTERS[2], log, wrong, lease()).await;
    let sealed = cluster.voters[&VOTERS[2]].vault.clone();
    let why = within("a reason", async {
        loop {
            match sealed.sealed() {
                Some(why) if why.contains("wrong root key") => return why,
                _ => sleep(Duration::from_millis(10)).await,
            }
        }
    })
    .await;
    assert!(!why.contains("11111111"), "{why}");
    assert!(matches!(sealed.initialize(Duration::ZERO, None).await, Err(InitializeError::Sealed { .. })));

    // It may be elected, and then hands its leadership over.
    let leader = cluster.leader().await;
    if leader != VOTERS[2] {
        let log = cluster.crash(leader).await;
        sleep(Duration::from_millis(300)).await;
        cluster.start_voter(leader, log, ROOT, lease()).await;
    }
    let holder = cluster.holder(A);
    let dek = within("a grant", async {
        loop {
            match holder.create_dek(&ctx(), RING).await {
                Ok(dek) => return dek,
                Err(error) => assert!(matches!(error, KeyError::Vault(_)), "{error}"),
            }
        }
    })
    .await;
    assert!(holder.usable(dek.dek));
}

#[tokio::test]
async fn secrets_survive_restarts_and_change_by_revision() {
    let mut cluster = Cluster::start().await;
    let client = cluster.client(A);
    ring_in_custody(&client, &[]).await;
    let id = [9; 16];
    let kind = SecretKind::TOKEN_KEY;
    let put = client.put_secret("test", kind, id, 0, b"private key").await.unwrap();
    assert_eq!(put.revision, 1);
    assert_eq!(client.put_secret("test", kind, id, 0, b"private key").await.unwrap(), put, "a repetition");
    let other = client.put_secret("test", kind, id, 0, b"another key").await.unwrap_err();
    assert_eq!(other.reason(), Some(Reason::Conflict));
    assert_eq!(client.put_secret("test", kind, id, 1, b"next key").await.unwrap().revision, 2);
    client.put_secret("test", kind, [8; 16], 0, b"x").await.unwrap();

    let mut logs = Vec::new();
    for node in VOTERS {
        logs.push((node, cluster.crash(node).await));
    }
    for (node, log) in logs {
        cluster.start_voter(node, log, ROOT, lease()).await;
    }
    cluster.leader().await;
    let secret = client.secret(kind, id).await.unwrap();
    assert_eq!((secret.expose(), secret.info.revision), (&b"next key"[..], 2));
    assert!(!format!("{secret:?}").contains("next"));
    let names: Vec<_> = client.list_secrets(kind).await.unwrap().iter().map(|info| info.id).collect();
    assert_eq!(names, [[8; 16], id]);
    assert!(client.list_secrets(SecretKind::API_KEY).await.unwrap().is_empty());
    client.delete_secret("test", kind, id, Some(2)).await.unwrap();
    assert_eq!(client.secret(kind, id).await.unwrap_err().reason(), Some(Reason::NotFound));
}

#[tokio::test]
async fn custody_is_listed_whole_however_many_pages_it_takes() {
    let cluster = Cluster::start().await;
    let client = cluster.client(A);
    ring_in_custody(&client, &[]).await;
    assert_eq!(client.list_custody().await.unwrap(), []);
    let nodes: Vec<NodeId> = (1..=1_001).map(NodeId).collect();
    let place = ctx();
    let put = nodes.iter().map(|node| client.put_custody("test", *node, &place));
    assert!(futures::future::join_all(put).await.iter().all(Result::is_ok));
    let listed = client.list_custody().await.unwrap();
    assert_eq!(listed, nodes.into_iter().map(|node| (node, ctx())).collect::<Vec<_>>());
}

#[tokio::test]
async fn many_records_of_custody_take_a_few_commits_and_not_one_each() {
    let cluster = Cluster::start().await;
    let client = cluster.client(A);
    ring_in_custody(&client, &[]).await;
    let leader = cluster.leader().await;
    let index = || cluster.voters[&leader].vault.group_status().applied.0;
    let before = index();
    let records: Vec<_> = (1..=5_000).map(|node| (NodeId(node), ctx())).collect();
    client.put_custodies("test", &records).await.unwrap();
    // Two batches; the vault's own upkeep may add one or the other entry.
    assert!(index() - before <= 10, "{} entries", index() - before);
    assert_eq!(client.list_custody().await.unwrap(), records);
    client.put_custodies("test", &records[..2]).await.unwrap();
    client.drop_custodies("test", &records).await.unwrap();
    client.drop_custodies("test", &records[..1]).await.unwrap();
    assert_eq!(client.list_custody().await.unwrap(), []);
    let nobody = client.put_custodies("test", &[(NodeId(0), ctx()), (NodeId(1), ctx())]).await;
    assert_eq!(nobody.unwrap_err().reason(), Some(Reason::Invalid));
    assert_eq!(client.list_custody().await.unwrap(), [], "all of a batch or nothing");
}

#[tokio::test]
async fn no_stored_or_sent_byte_shows_a_key_or_a_secret() {
    let cluster = Cluster::start().await;
    let client = cluster.client(A);
    ring_in_custody(&client, &[A]).await;
    client.put_secret("test", SecretKind::API_KEY, [4; 16], 0, b"a very recognisable secret").await.unwrap();
    let request = pb::Request {
        actor: String::new(),
        call: Some(pb::request::Call::Secret(pb::SecretRequest {
            kind: 2,
            id: vec![4; 16].into(),
            hpke_pk: vec![9; 32].into(),
        })),
    };
    let leader = cluster.leader().await;
    let reply = cluster.voters[&leader].vault.handle(Caller { node: A }, request).await;
    let shown = prost::Message::encode_to_vec(&reply);
    assert!(!shown.windows(12).any(|window| window == b"recognisable"));
}
