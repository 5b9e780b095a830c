//! Logins and tokens, against a catalog and a vault in memory, at times that the test chooses.

mod http;
mod login;
mod tokens;

use std::sync::{Arc, Mutex};
use std::time::Duration;

use aws_lc_rs::rsa::KeyPair;
use aws_lc_rs::signature::KeyPair as _;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use ensign_proto::{ClusterId, PermissionSet};
use ensign_raft::env::{BootTime, Clock, SeededRng, UnixNanos};
use futures::FutureExt as _;
use futures::future::BoxFuture;
use tokio::time::Instant;

use super::service::Pause;
use super::*;
use crate::catalog::{ApiKey, Catalog, Organization, Project, SigningKey, testing};

/// 2023-11-14T22:13:20Z.
const START: u64 = 1_700_000_000;
const KID: [u8; 16] = [1; 16];
/// Made for these tests with `openssl genpkey`; signs nothing else.
const SIGNING_KEY: &str = include_str!("tests/signing_key.base64");

struct TestClock(Mutex<Duration>);

impl TestClock {
    fn advance(&self, by: Duration) {
        *self.0.lock().unwrap() += by;
    }
}

impl Clock for TestClock {
    fn boot(&self) -> BootTime {
        BootTime(*self.0.lock().unwrap())
    }

    fn wall(&self) -> UnixNanos {
        UnixNanos((Duration::from_secs(START) + *self.0.lock().unwrap()).as_nanos() as u64)
    }
}

/// Notes how long after its arrival each failure would have been answered, and does not wait.
#[derive(Default)]
struct NotedPauses(Mutex<Vec<Duration>>);

impl NotedPauses {
    fn take(&self) -> Vec<Duration> {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}

impl Pause for NotedPauses {
    fn until(&self, _: Instant, since_arrival: Duration) -> BoxFuture<'static, ()> {
        self.0.lock().unwrap().push(since_arrival);
        futures::future::ready(()).boxed()
    }
}

struct Fixture {
    pauses: Arc<NotedPauses>,
    clock: Arc<TestClock>,
    secrets: Arc<MemorySecrets>,
    catalog: Catalog,
    identity: Identity,
    org: Arc<Organization>,
    project: Arc<Project>,
    key: Arc<ApiKey>,
    credentials: Credentials,
}

/// Far longer than any test runs, so that no slow machine ever misses the first beat.
const DELAY: Duration = Duration::from_hours(1);

fn config() -> IdentityConfig {
    IdentityConfig {
        hash: HashParams { memory_kib: 64, passes: 1, lanes: 1 },
        failure_delay: DELAY,
        version: "0.1.0".to_owned(),
        ..IdentityConfig::new(ClusterId::from_bytes([9; 16]))
    }
}

fn signing_key_der() -> Vec<u8> {
    let text: String = SIGNING_KEY.split_whitespace().collect();
    STANDARD.decode(text).unwrap()
}

impl Fixture {
    async fn new() -> Self {
        let clock = Arc::new(TestClock(Mutex::new(Duration::ZERO)));
        let catalog = testing::solo(Arc::clone(&clock) as _, Arc::new(SeededRng::new(1)));
        Self::with(clock, catalog).await
    }

    async fn with(clock: Arc<TestClock>, catalog: Catalog) -> Self {
        let secrets = Arc::new(MemorySecrets::default());
        let (der, now) = (signing_key_der(), clock.wall());
        let public_key = Bytes::copy_from_slice(KeyPair::from_pkcs8(&der).unwrap().public_key().as_ref());
        let signing = SigningKey { kid: KID, public_key, created: now, signs_from: now, verifies_until: None };
        secrets.put(SecretKind::TokenSigning, KID, Secret::new(der)).await.unwrap();
        catalog.add_signing_key(signing).await.unwrap();
        let pauses = Arc::new(NotedPauses::default());
        let identity = Identity::with_pause(
            config(),
            catalog.clone(),
            Arc::clone(&secrets) as _,
            Arc::clone(&clock) as _,
            Arc::new(SeededRng::new(2)),
            Arc::clone(&pauses) as _,
        );
        let org = identity.ensure_organization("Example").await.unwrap();
        let project = identity.ensure_project(org.id, "first").await.unwrap();
        let new = NewApiKey {
            name: "a key".to_owned(),
            org: org.id,
            project: Some(project.id),
            permissions: PermissionSet::api_key(),
            admin: false,
            ring: None,
        };
        let (key, credentials) = identity.create_api_key(new).await.unwrap();
        Self { pauses, clock, secrets, catalog, identity, org, project, key, credentials }
    }

    /// Another node of the cluster, or this one after a restart, or one that is configured differently.
    fn restarted(&self, config: IdentityConfig) -> Identity {
        let rng = Arc::new(SeededRng::new(3));
        Identity::new(config, self.catalog.clone(), Arc::clone(&self.secrets) as _, Arc::clone(&self.clock) as _, rng)
    }

    async fn login(&self) -> Result<TokenPair, LoginError> {
        self.login_with(self.credentials.client_id.as_str(), self.credentials.secret.expose()).await
    }

    async fn login_with(&self, client_id: &str, secret: &str) -> Result<TokenPair, LoginError> {
        self.identity.authenticate(client_id, secret.to_owned(), None, Instant::now()).await
    }

    async fn rejection(&self, bearer: &str) -> Rejection {
        match self.identity.verify(bearer).await {
            Err(AuthError::Invalid(reason)) => reason,
            other => panic!("{other:?}"),
        }
    }
}

fn wrong_secret() -> String {
    "w".repeat(64)
}
