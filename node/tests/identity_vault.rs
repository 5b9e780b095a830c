//! Logins with the real vault behind them: nothing secret is kept anywhere else.

use std::sync::Arc;
use std::time::Duration;

use ensign_keyvault::testing::TestVault;
use ensign_keyvault::{Entropy, VaultClient};
use ensign_node::catalog::{VaultRings, VaultWrites as _, testing};
use ensign_node::identity::{
    AuthError, Credentials, HashParams, Identity, IdentityConfig, LoginError, NewApiKey, Rejection, Secret,
    SecretError, SecretKind, SecretStore as _, VaultSecrets,
};
use ensign_proto::{ClusterId, NodeId, PermissionSet, ProjectId, RingId, TopicId};
use ensign_raft::env::{OsRng, SystemClock};
use tokio::time::Instant;

const CLUSTER: ClusterId = ClusterId::from_bytes([9; 16]);

fn client(vault: &Arc<TestVault>) -> VaultClient {
    VaultClient::new(vault.link(NodeId(1)), CLUSTER, NodeId(1), &Entropy::kernel())
}

#[tokio::test]
async fn secrets_come_back_as_they_went_and_only_once() {
    let vault = TestVault::new(CLUSTER);
    let secrets = VaultSecrets::new(client(&vault), NodeId(1));
    let (hash, other) = (Secret::new(b"a hash".to_vec()), Secret::new(b"another".to_vec()));
    assert_eq!(secrets.get(SecretKind::ApiKey, [1; 16]).await, Ok(None));
    secrets.put(SecretKind::ApiKey, [1; 16], hash.clone()).await.unwrap();
    assert_eq!(secrets.get(SecretKind::ApiKey, [1; 16]).await, Ok(Some(hash.clone())));
    assert_eq!(secrets.get(SecretKind::TokenSigning, [1; 16]).await, Ok(None), "kinds are apart");
    assert_eq!(secrets.put(SecretKind::ApiKey, [1; 16], other).await, Err(SecretError::Exists));
    assert_eq!(secrets.get(SecretKind::ApiKey, [1; 16]).await, Ok(Some(hash)));
    for _ in 0..2 {
        secrets.delete(SecretKind::ApiKey, [1; 16]).await.unwrap();
    }
    assert_eq!(secrets.get(SecretKind::ApiKey, [1; 16]).await, Ok(None));
}

#[tokio::test]
async fn rings_and_custody_may_be_made_again() {
    let vault = TestVault::new(CLUSTER);
    let rings = VaultRings::new(client(&vault), CLUSTER, NodeId(1), Arc::new(|| ensign_proto::ClusterVersion::NEWEST));
    let (project, ring, topic) =
        (ProjectId::from_bytes([1; 16]), RingId::from_bytes([2; 16]), TopicId::from_bytes([3; 16]));
    for _ in 0..2 {
        rings.create_ring(project, ring).await.unwrap();
        rings.put_custody(NodeId(1), project, topic).await.unwrap();
    }
    assert_eq!(client(&vault).ring(ring).await.unwrap().versions.len(), 1);
    assert!(rings.create_ring(ProjectId::from_bytes([4; 16]), ring).await.is_err(), "another project's ring");
    rings.drop_custody(NodeId(1), project, topic).await.unwrap();
}

#[tokio::test]
async fn a_call_waits_for_a_vault_that_is_on_its_way() {
    let vault = TestVault::new(CLUSTER);
    let secrets = VaultSecrets::new(client(&vault), NodeId(1));
    vault.set_reachable(false);
    let (got, ()) = tokio::join!(secrets.get(SecretKind::ApiKey, [1; 16]), async {
        tokio::time::sleep(Duration::from_millis(120)).await;
        vault.set_reachable(true);
    });
    assert_eq!(got, Ok(None));
}

#[tokio::test]
async fn a_key_logs_in_after_a_restart_and_no_more_after_its_revocation() {
    let vault = TestVault::new(CLUSTER);
    let (clock, rng) = (Arc::new(SystemClock), Arc::new(OsRng));
    let catalog = testing::solo(clock.clone(), rng.clone());
    let config = IdentityConfig {
        hash: HashParams { memory_kib: 64, passes: 1, lanes: 1 },
        // Long enough for a slow machine to reach the vault in time; only a refusal waits for it.
        failure_delay: Duration::from_secs(2),
        ..IdentityConfig::new(CLUSTER)
    };
    let start = || {
        let secrets = Arc::new(VaultSecrets::new(client(&vault), NodeId(1)));
        Identity::new(config.clone(), catalog.clone(), secrets, clock.clone(), rng.clone())
    };
    let first = start();
    first.ensure_signing_key().await.unwrap();
    let org = first.ensure_organization("Example").await.unwrap();
    let project = first.ensure_project(org.id, "first").await.unwrap();
    let permissions = PermissionSet::api_key();
    let new = NewApiKey {
        name: "key".to_owned(),
        org: org.id,
        project: Some(project.id),
        permissions,
        admin: false,
        ring: None,
    };
    let credentials = Credentials::generate(&OsRng);
    let key = first.ensure_api_key(new, &credentials).await.unwrap();

    let login = async |identity: &Identity| {
        let secret = credentials.secret.expose().to_owned();
        identity.authenticate(credentials.client_id.as_str(), secret, None, Instant::now()).await
    };
    let pair = login(&first).await.unwrap();
    let second = start();
    assert_eq!(second.verify(&pair.access).await.unwrap().subject, key.id);
    let again = login(&second).await.unwrap();
    assert_eq!(first.verify(&again.access).await.unwrap().project, Some(project.id));

    // Verifying needs no vault, nor does a login that is remembered.
    vault.set_reachable(false);
    second.verify(&pair.access).await.unwrap();
    login(&second).await.unwrap();
    assert_eq!(login(&start()).await.err(), Some(LoginError::Unavailable));
    vault.set_reachable(true);

    second.revoke_api_key(key.id).await.unwrap();
    assert_eq!(login(&second).await.err(), Some(LoginError::Refused));
    assert_eq!(second.verify(&pair.access).await.err(), Some(AuthError::Invalid(Rejection::Revoked)));
    let left = VaultSecrets::new(client(&vault), NodeId(1)).get(SecretKind::ApiKey, *key.id.as_bytes()).await;
    assert_eq!(left, Ok(None), "its hash is gone too");
}
