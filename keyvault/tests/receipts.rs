//! Receipts and erasure on three voters: what is signed, who verifies it, and what has to have happened first.

#[path = "common/mod.rs"]
mod common;

use std::time::Duration;

use common::{CLUSTER, Cluster, PROJECT, VOTERS, lease, within};
use ensign_keyvault::testing::ManualClock;
use ensign_keyvault::{ReceiptKeyInfo, ReceiptKind, RingReceipts, VaultClient, receipt_fingerprint};
use ensign_proto::{Algorithm, KeyVersion, LogIndex, NodeId, RingId};
use ensign_raft::env::{Clock as _, UnixNanos};
use jsonwebtoken::{Algorithm as Jose, DecodingKey, Validation, decode, decode_header};
use serde_json::Value;

const RING: RingId = RingId::from_bytes([7; 16]);
const PATIENCE: Duration = Duration::from_secs(15);

/// Verifies with a library that knows nothing of us.
fn verify(keys: &[ReceiptKeyInfo], jws: &str, typ: &str) -> Result<Value, jsonwebtoken::errors::Error> {
    let header = decode_header(jws)?;
    assert_eq!(header.typ.as_deref(), Some(typ));
    let kid = header.kid.expect("a receipt names its key");
    let key = keys.iter().find(|key| receipt_fingerprint(&key.public) == kid).expect("a published key");
    let mut validation = Validation::new(Jose::EdDSA);
    validation.required_spec_claims.clear();
    (validation.validate_exp, validation.validate_aud) = (false, false);
    Ok(decode::<Value>(jws, &DecodingKey::from_ed_der(&key.public), &validation)?.claims)
}

async fn until_erased(client: &VaultClient) -> RingReceipts {
    within("an erasure", async {
        loop {
            match client.receipts(RING).await {
                Ok(known) if known.receipts.iter().any(|it| it.kind == ReceiptKind::Erased) => return known,
                _ => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        }
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_third_party_verifies_what_any_leader_says_and_every_leader_says_the_same() {
    let mut cluster = Cluster::start().await;
    let client = cluster.client(VOTERS[0]);
    client.create_ring("op", RING, PROJECT, Algorithm::Aes256Gcm).await.unwrap();
    client.rotate("op", RING, None).await.unwrap();
    let keys = client.receipt_keys().await.unwrap();
    assert_eq!(keys.len(), 1);
    client.disable("op", RING, Some(KeyVersion(2)), PATIENCE).await.unwrap();
    let ring = client.ring(RING).await.unwrap();
    let receipt = client.revoke("op", RING, Some(KeyVersion(1)), PATIENCE).await.unwrap();
    let said = verify(&keys, &receipt.jws, "ensign-receipt+jws").unwrap();
    assert_eq!((&said["kind"], &said["cluster"]), (&Value::from("revoked"), &Value::from(CLUSTER.to_string())));
    assert_eq!(said["versions"][0]["kek_id"], ring.versions[0].kek_id.to_string());
    assert_eq!(said["voters"], serde_json::json!(["n1", "n2", "n3"]));
    // One character of it, and a key of somebody else.
    let mut altered = receipt.jws.clone().into_bytes();
    let middle = altered.len() / 2;
    altered[middle] = if altered[middle] == b'A' { b'B' } else { b'A' };
    verify(&keys, &String::from_utf8(altered).unwrap(), "ensign-receipt+jws").unwrap_err();

    let known = until_erased(&client).await;
    let kinds: Vec<_> = known.receipts.iter().map(|it| (it.kind, it.versions.clone())).collect();
    let (one, two) = (vec![KeyVersion(1)], vec![KeyVersion(2)]);
    assert_eq!(kinds, [(ReceiptKind::Disabled, two), (ReceiptKind::Revoked, one.clone()), (ReceiptKind::Erased, one)]);
    assert_eq!(known.receipts[1].jws, receipt.jws);
    assert_eq!((known.erase_through, known.erasers.len()), (None, 0));
    for it in &known.receipts {
        verify(&keys, &it.jws, "ensign-receipt+jws").unwrap();
    }
    assert!(client.ring(RING).await.unwrap().versions[0].erased);

    // Another leader, by other means: the same bytes.
    let leader = cluster.leader().await;
    cluster.crash(leader).await;
    let other = *VOTERS.iter().find(|node| **node != leader).unwrap();
    cluster.leader_but(Some(leader)).await;
    let again = within("an answer of the new leader", async {
        loop {
            match cluster.client(other).receipts(RING).await {
                Ok(again) => return again,
                Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        }
    })
    .await;
    assert_eq!(again.receipts, known.receipts);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_receipt_key_is_a_year_old_at_most_and_vouches_for_the_next() {
    let clock = ManualClock::new();
    let cluster = Cluster::start_on(clock.clone(), &[common::ROOT; 3], lease()).await;
    let client = cluster.client(VOTERS[0]);
    assert_eq!(client.receipt_keys().await.unwrap().len(), 1);
    clock.set_wall(UnixNanos(clock.wall().0 + Duration::from_hours(365 * 24 + 1).as_nanos() as u64));
    let keys = within("a second receipt key", async {
        loop {
            match client.receipt_keys().await {
                Ok(keys) if keys.len() == 2 => return keys,
                _ => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        }
    })
    .await;
    let said = verify(&keys[..1], &keys[1].endorsement, "ensign-receipt-key+jws").unwrap();
    assert_eq!((&said["kid"], &said["number"]), (&Value::from(receipt_fingerprint(&keys[1].public)), &Value::from(2)));
    client.create_ring("op", RING, PROJECT, Algorithm::Aes256Gcm).await.unwrap();
    // The hand-set clock stands still: who is waited for would be waited for for ever, and nobody holds a key.
    clock.advance(Duration::from_mins(1));
    let receipt = client.revoke("op", RING, None, PATIENCE).await.unwrap();
    assert_eq!(decode_header(&receipt.jws).unwrap().kid, Some(receipt_fingerprint(&keys[1].public)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_is_no_member_any_more_keeps_a_key_from_being_erased_until_it_is_removed_and_is_named_then() {
    let cluster = Cluster::start().await;
    let leader = cluster.leader().await;
    let client = cluster.client(leader);
    client.create_ring("op", RING, PROJECT, Algorithm::Aes256Gcm).await.unwrap();
    // Its vote went to another, and it does not answer.
    let gone = NodeId(99);
    cluster.elsewhere.lock().unwrap().push(gone);
    client.revoke("op", RING, None, PATIENCE).await.unwrap();
    let open = within("the members' erasure", async {
        loop {
            let known = client.receipts(RING).await.unwrap();
            let wanted = known.erase_through.expect("a node that had a copy is away");
            let members = known.erasers.iter().filter(|(node, _)| *node != gone);
            if members.clone().count() == 3 && members.clone().all(|(_, through)| *through >= wanted) {
                return known;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
    assert!(open.erasers.contains(&(gone, LogIndex(0))), "{:?}", open.erasers);
    // The leader has looked since.
    tokio::time::sleep(Duration::from_secs(2)).await;
    let still = client.receipts(RING).await.unwrap();
    assert!(still.receipts.iter().all(|it| it.kind != ReceiptKind::Erased), "a copy is out there");

    cluster.elsewhere.lock().unwrap().clear();
    let known = until_erased(&client).await;
    let erased = known.receipts.last().unwrap();
    assert_eq!(erased.missing, [gone]);
    let erased = verify(&client.receipt_keys().await.unwrap(), &erased.jws, "ensign-receipt+jws").unwrap();
    assert_eq!(erased["missing"], serde_json::json!(["n99"]));
    assert_eq!(erased["erased_through"].as_object().map(serde_json::Map::len), Some(3));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_erased_while_a_member_that_holds_it_is_away_and_everything_when_it_is_back() {
    let mut cluster = Cluster::start().await;
    let leader = cluster.leader().await;
    let client = cluster.client(leader);
    client.create_ring("op", RING, PROJECT, Algorithm::Aes256Gcm).await.unwrap();
    let away = *VOTERS.iter().find(|node| **node != leader).unwrap();
    let log = cluster.crash(away).await;
    client.revoke("op", RING, None, PATIENCE).await.unwrap();
    let open = within("the others' erasure", async {
        loop {
            let known = client.receipts(RING).await.unwrap();
            let wanted = known.erase_through.expect("a member is away");
            // The leader may owe the one that is away what it would purge; the third does not.
            let others = known.erasers.iter().filter(|(node, _)| *node != away && *node != leader);
            if !known.erasers.is_empty() && others.clone().all(|(_, through)| *through >= wanted) {
                return known;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
    let of_away = open.erasers.iter().find(|(node, _)| *node == away).map(|(_, through)| through.0);
    assert_eq!(of_away, Some(0), "who does not answer is named, with nothing");
    assert!(open.receipts.iter().all(|it| it.kind != ReceiptKind::Erased));

    cluster.start_voter(away, log, common::ROOT, lease()).await;
    let known = until_erased(&client).await;
    let jws = &known.receipts.last().unwrap().jws;
    let erased = verify(&client.receipt_keys().await.unwrap(), jws, "ensign-receipt+jws").unwrap();
    let through = erased["erased_through"].as_object().unwrap();
    assert!(through.len() == 3 && through.values().all(|it| it.as_u64() >= erased["drained"]["index"].as_u64()));
    assert_eq!(erased["missing"], serde_json::json!([]));
}
