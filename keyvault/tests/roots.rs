//! Voters that lack the root key, that an operator seals, or that wait for a passphrase.

mod common;

use std::sync::Arc;
use std::time::Duration;

use common::{CLUSTER, Cluster, PROJECT, ROOT, VOTERS, ctx, lease, within};
use ensign_keyvault::testing::ManualClock;
use ensign_keyvault::{
    CallError, Cost, Holder, KeyError, Passphrase, PassphraseRoot, Reason, RootError, RootKind, RootProvider,
    SecretKind, UnsealError, Unsealed, VaultClient,
};
use ensign_proto::{Algorithm, NodeId, RingId};
use ensign_raft::env::SystemClock;
use ensign_storage::MemoryLog;
use tokio::time::sleep;
use zeroize::Zeroizing;

const RING: RingId = RingId::from_bytes([7; 16]);
const A: NodeId = NodeId(11);
const WRONG: [u8; 32] = [0x22; 32];
const LOOK: Duration = Duration::from_millis(10);

async fn ring_in_custody(client: &VaultClient) {
    within("a ring", async {
        while let Err(error) = client.create_ring("test", RING, PROJECT, Algorithm::Aes256Gcm).await {
            assert!(!matches!(error, CallError::Malformed { .. }), "{error}");
            sleep(LOOK).await;
        }
    })
    .await;
    client.put_custody("test", A, &ctx()).await.expect("custody can be put");
}

async fn until(what: &str, holds: impl Fn() -> bool) {
    within(what, async {
        while !holds() {
            sleep(LOOK).await;
        }
    })
    .await;
}

/// Repeats a call while the vault elects.
async fn settled<T>(call: impl AsyncFn() -> Result<T, CallError>) -> Result<T, CallError> {
    within("an answer", async {
        loop {
            match call().await {
                Err(CallError::Unreachable(_)) => {}
                Err(CallError::Refused(refusal))
                    if matches!(refusal.reason, Reason::NotLeader | Reason::Unavailable | Reason::OutcomeUnknown) => {}
                settled => return settled,
            }
            sleep(LOOK).await;
        }
    })
    .await
}

/// What the vault says to whoever wants a key or a secret while it is sealed.
async fn sealed<T: std::fmt::Debug>(call: impl AsyncFn() -> Result<T, CallError>) -> String {
    match settled(call).await {
        Err(CallError::Refused(refusal)) if refusal.reason == Reason::Sealed => refusal.message,
        other => panic!("{other:?}"),
    }
}

/// As the vault refused it, whatever the holder makes of it.
async fn create_dek(holder: &Holder) -> Result<(), CallError> {
    match holder.create_dek(&ctx(), RING).await {
        Ok(_) => Ok(()),
        Err(KeyError::Vault(error)) => Err(error),
        Err(other) => panic!("{other}"),
    }
}

fn phrase(text: &str) -> Passphrase {
    Passphrase::new(Zeroizing::new(text.as_bytes().to_vec())).expect("a short line is a passphrase")
}

#[tokio::test]
async fn sealed_voters_vote_and_grant_nothing_and_lead_no_longer_than_they_must() {
    let mut cluster = Cluster::start().await;
    let client = cluster.client(A);
    ring_in_custody(&client).await;
    let put = async || client.put_secret("test", SecretKind::TOKEN_KEY, [9; 16], 0, b"private key").await;
    settled(put).await.unwrap();
    let mut logs = Vec::new();
    for node in VOTERS {
        logs.push((node, cluster.crash(node).await));
    }
    let mut logs = logs.into_iter();
    let (first, log_of_first) = logs.next().unwrap();
    for (node, log) in logs {
        cluster.start_voter(node, log, WRONG, lease()).await;
    }
    // One of two sealed voters leads: they elect, and that is all they do.
    let led_sealed = cluster.leader().await;
    let holder = cluster.holder(A);
    let refused = sealed(async || create_dek(&holder).await).await;
    assert!(refused.contains("wrong root key"), "{refused}");
    until("a reason", || cluster.voters[&led_sealed].vault.sealed().is_some_and(|why| why.contains("wrong root key")))
        .await;
    sealed(async || client.secret(SecretKind::TOKEN_KEY, [9; 16]).await).await;

    cluster.start_voter(first, log_of_first, ROOT, lease()).await;
    until("the one that is unsealed leads", || cluster.leads(first)).await;
    // Without the other sealed one there is just a majority: what is committed now has a sealed voter's vote.
    let other = VOTERS.into_iter().find(|node| ![first, led_sealed].contains(node)).unwrap();
    cluster.crash(other).await;
    within("a grant", async {
        while holder.create_dek(&ctx(), RING).await.is_err() {
            sleep(LOOK).await;
        }
    })
    .await;
    let secret = settled(async || client.secret(SecretKind::TOKEN_KEY, [9; 16]).await).await.unwrap();
    assert_eq!(secret.expose(), b"private key");
    let put = async || client.put_secret("test", SecretKind::TOKEN_KEY, [9; 16], 1, b"next key").await;
    settled(put).await.unwrap();
    // What it needs is what the vault was made with: nothing was overwritten.
    let root = |node: NodeId| cluster.voters[&node].vault.seal_status().root.unwrap();
    assert_eq!(root(first), root(led_sealed));
}

#[tokio::test]
async fn an_operators_seal_holds_on_every_voter_and_through_restarts_until_it_is_lifted() {
    let mut cluster = Cluster::start().await;
    let client = cluster.client(A);
    ring_in_custody(&client).await;
    let holder = cluster.holder(A);
    let dek = within("a grant", async {
        loop {
            match holder.create_dek(&ctx(), RING).await {
                Ok(dek) => return dek,
                Err(_) => sleep(LOOK).await,
            }
        }
    })
    .await;
    let held = settled(async || client.seal("ada").await).await.unwrap();
    assert!(held.held && held.wait >= lease().length, "{held:?}");
    // From its answer on, nothing: not a renewal either.
    let refused = sealed(async || create_dek(&holder).await).await;
    assert!(refused.contains("an operator has sealed it (ada)"), "{refused}");
    let other = RingId::from_bytes([8; 16]);
    let create_ring = async || client.create_ring("test", other, PROJECT, Algorithm::Aes256Gcm).await;
    sealed(create_ring).await;
    for node in VOTERS {
        let vault = cluster.voters[&node].vault.clone();
        until("sealed", || vault.sealed().is_some_and(|why| why.contains("ensign vault unseal"))).await;
        assert!(vault.seal_status().held);
    }
    until("the lease of what was granted ends", || !holder.usable(dek.dek)).await;
    // A revocation needs no key of the vault's, and is the last thing that a seal should keep from happening.
    client.revoke("test", RING, None, Duration::from_secs(30)).await.unwrap();

    let mut logs = Vec::new();
    for node in VOTERS {
        logs.push((node, cluster.crash(node).await));
    }
    for (node, log) in logs {
        cluster.start_voter(node, log, ROOT, lease()).await;
    }
    let leader = cluster.leader().await;
    assert!(sealed(async || create_dek(&holder).await).await.contains("ada"));

    // The root key is proven on any voter, and then the whole vault is open again.
    let any = VOTERS.into_iter().find(|node| *node != leader).unwrap();
    let proven = cluster.voters[&any].vault.unseal(None).await.unwrap();
    assert_eq!(proven, Unsealed { held: true, already: false });
    assert!(cluster.voters[&any].vault.sealed().is_some(), "proven is not lifted");
    sealed(async || client.secret(SecretKind::TOKEN_KEY, [9; 16]).await).await;
    assert!(!settled(async || client.lift("ada").await).await.unwrap().held);
    for node in VOTERS {
        let vault = cluster.voters[&node].vault.clone();
        until("unsealed", || vault.sealed().is_none()).await;
        assert_eq!(vault.unseal(None).await.unwrap(), Unsealed { held: false, already: true });
    }
    settled(create_ring).await.unwrap();
}

struct Typed {
    cluster: Cluster,
    clock: Arc<ManualClock>,
    log: MemoryLog,
    node: NodeId,
}

/// A vault made with a passphrase, one of whose voters was stopped.
async fn made_with(text: &str) -> Typed {
    let mut cluster = Cluster::start_empty();
    let root = || Arc::new(PassphraseRoot::new(Cost::SECOND)) as Arc<dyn RootProvider>;
    for node in VOTERS {
        cluster.start_voter_with(node, MemoryLog::new(), root(), Arc::new(SystemClock), lease()).await;
    }
    let leader = cluster.leader().await;
    let first = cluster.voters[&leader].vault.clone();
    first.initialize(Duration::from_secs(20), Some(&phrase(text))).await.expect("the vault is initialized");
    let node = VOTERS.into_iter().find(|node| *node != leader).expect("two voters do not lead");
    let vault = cluster.voters[&node].vault.clone();
    until("the others know of it", || vault.seal_status().root.is_some()).await;
    let log = cluster.crash(node).await;
    Typed { cluster, clock: ManualClock::new(), log, node }
}

#[tokio::test]
async fn a_second_seal_also_concerns_who_has_proven_the_root_key_since_the_first() {
    let text = "correct horse battery staple";
    let Typed { cluster, .. } = made_with(text).await;
    let client = cluster.client(A);
    let open = cluster.voters.values().map(|voter| voter.vault.clone()).find(|vault| vault.sealed().is_none());
    let vault = open.expect("the voter that made it is open");
    settled(async || client.seal("ada").await).await.unwrap();
    until("sealed", || vault.seal_status().held).await;
    assert_eq!(vault.unseal(Some(&phrase(text))).await.unwrap(), Unsealed { held: true, already: false });
    assert_eq!(vault.unseal(Some(&phrase(text))).await.unwrap(), Unsealed { held: true, already: true }, "it waits");
    let second = settled(async || client.seal("ada").await).await.unwrap();
    until("the second seal", || vault.seal_status().applied >= second.index).await;
    // Lifted by somebody else: what was typed before the second seal is gone.
    let lifted = settled(async || client.lift("bob").await).await.unwrap();
    until("the lift", || vault.seal_status().applied >= lifted.index).await;
    until("it asks", || vault.sealed().is_some_and(|why| why.contains("waits for the passphrase"))).await;
    assert_eq!(vault.unseal(Some(&phrase(text))).await.unwrap(), Unsealed { held: false, already: false });
}

#[tokio::test]
async fn a_passphrase_is_typed_after_each_restart_and_guessing_it_is_slow() {
    let Typed { mut cluster, clock, log, node } = made_with("correct horse battery staple").await;
    let root = Arc::new(PassphraseRoot::new(Cost::SECOND));
    let own: Arc<ManualClock> = Arc::clone(&clock);
    cluster.start_voter_with(node, log, root, own, lease()).await;
    let vault = cluster.voters[&node].vault.clone();
    until("it asks", || vault.sealed().is_some_and(|why| why.contains("waits for the passphrase"))).await;
    let before = vault.seal_status();
    assert_eq!(
        (before.provider, before.root.as_ref().unwrap().kind),
        (RootKind::Passphrase, Some(RootKind::Passphrase))
    );

    let wrong = phrase("correct horse battery stable");
    let mut waits = Vec::new();
    for _ in 0..3 {
        let refused = vault.unseal(Some(&wrong)).await.unwrap_err();
        assert!(matches!(refused, UnsealError::Root(RootError::PassphraseWrong)), "{refused}");
        // The right one has to wait as well: nobody can tell before.
        let soon = vault.unseal(Some(&phrase("correct horse battery staple"))).await.unwrap_err();
        let UnsealError::TooSoon { wait } = soon else { panic!("{soon}") };
        waits.push(wait);
        clock.advance(wait);
    }
    assert_eq!(waits, [1, 2, 4].map(Duration::from_secs));
    assert!(matches!(vault.unseal(None).await, Err(UnsealError::Root(RootError::PassphraseNeeded))));

    let right = phrase("correct horse battery staple");
    let (one, two) = tokio::join!(vault.unseal(Some(&right)), vault.unseal(Some(&right)));
    assert_eq!(one.unwrap(), Unsealed { held: false, already: false });
    assert!(matches!(two, Err(UnsealError::Busy)), "one attempt at a time");
    assert_eq!(vault.sealed(), None);
    assert_eq!(vault.seal_status().root, before.root, "nothing was overwritten");
}

#[tokio::test]
async fn a_node_that_is_set_to_something_else_says_what_the_vault_needs() {
    let Typed { mut cluster, log, node, .. } = made_with("correct horse battery staple").await;
    cluster.start_voter(node, log, ROOT, lease()).await;
    let vault = cluster.voters[&node].vault.clone();
    until("a reason", || vault.sealed().is_some_and(|why| why.contains("set root.provider = \"passphrase\""))).await;
    let open = cluster.leader().await;
    let refused = cluster.voters[&open].vault.unseal(Some(&phrase("anything"))).await;
    assert_eq!(refused.unwrap(), Unsealed { held: false, already: true }, "nothing is checked where nothing is sealed");
    assert_eq!(CLUSTER, ctx().cluster);
}

#[tokio::test]
async fn a_vault_whose_root_key_is_a_file_takes_no_passphrase() {
    let mut cluster = Cluster::start().await;
    let log = cluster.crash(VOTERS[2]).await;
    cluster.start_voter(VOTERS[2], log, WRONG, lease()).await;
    let vault = cluster.voters[&VOTERS[2]].vault.clone();
    until("a reason", || vault.sealed().is_some_and(|why| why.contains("wrong root key"))).await;
    let refused = vault.unseal(Some(&phrase("anything"))).await.unwrap_err().to_string();
    assert_eq!(refused, "the vault's root key is kept by file: it takes no passphrase");
    let refused = vault.unseal(None).await.unwrap_err().to_string();
    assert!(refused.contains("wrong root key"), "{refused}");
}
