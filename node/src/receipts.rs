//! The public keys that verify the vault's receipts, for everybody: `/.well-known/ensign-receipts.json`.
//!
//! A JWK set (RFC 7517). Each key but the first carries what the key before it signed (`endorsement`), so who knows the fingerprint of
//! one of them can trust all that follow it. Who asks needs no credentials, so the vault is asked once a minute at most.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use axum::Router;
use axum::body::Body;
use axum::extract::State;
use axum::response::Response;
use axum::routing::any;
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ensign_keyvault::{ReceiptKeyInfo, VaultClient, receipt_fingerprint};
use ensign_proto::ClusterVersion;
use http::header::{ALLOW, CACHE_CONTROL, CONTENT_TYPE, RETRY_AFTER};
use http::{Method, StatusCode};
use jiff::Timestamp;
use serde::Serialize;
use tokio::sync::Mutex;
use tokio::time::{Instant, sleep, timeout};
use tracing::debug;

use crate::catalog::Catalog;

/// How long an answer of the vault is good for.
const FRESH: Duration = Duration::from_mins(1);
/// How long whoever asks may wait for the vault.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long the first key is waited for, and between two looks.
const FIRST_KEY: Duration = Duration::from_secs(15);
const FIRST_KEY_POLL: Duration = Duration::from_millis(100);

struct Keys {
    vault: VaultClient,
    /// When the vault was asked last, and what it last answered. Locked while it is asked: the others wait for that answer.
    known: Mutex<Known>,
}

#[derive(Default)]
struct Known {
    asked: Option<Instant>,
    document: Option<String>,
}

#[derive(Serialize)]
struct Document {
    keys: Vec<Jwk>,
}

#[derive(Serialize)]
struct Jwk {
    kty: &'static str,
    crv: &'static str,
    alg: &'static str,
    #[serde(rename = "use")]
    usage: &'static str,
    kid: String,
    x: String,
    number: u32,
    created: Option<String>,
    #[serde(skip_serializing_if = "String::is_empty")]
    endorsement: String,
}

impl From<ReceiptKeyInfo> for Jwk {
    fn from(key: ReceiptKeyInfo) -> Self {
        let created = i64::try_from(key.created_ms).ok().and_then(|ms| Timestamp::from_millisecond(ms).ok());
        Self {
            kty: "OKP",
            crv: "Ed25519",
            alg: "EdDSA",
            usage: "sig",
            kid: receipt_fingerprint(&key.public),
            x: URL_SAFE_NO_PAD.encode(key.public),
            number: key.number,
            created: created.map(|time| time.to_string()),
            endorsement: key.endorsement,
        }
    }
}

/// The fingerprint of the first key; see [`crate::node::Node::receipt_fingerprint`].
pub(crate) async fn first_fingerprint(catalog: &Catalog, vault: &VaultClient) -> anyhow::Result<Option<String>> {
    catalog.refresh().await?;
    if catalog.view().cluster_version() < ClusterVersion::V2 {
        return Ok(None);
    }
    let deadline = Instant::now() + FIRST_KEY;
    let keys = loop {
        match vault.receipt_keys().await {
            Ok(keys) => break keys,
            Err(error) if Instant::now() >= deadline => return Err(error.into()),
            Err(_) => sleep(FIRST_KEY_POLL).await,
        }
    };
    let first = keys.first().context("the vault has no receipt key")?;
    Ok(Some(receipt_fingerprint(&first.public)))
}

/// Serves the keys.
pub(crate) fn router(vault: VaultClient) -> Router {
    let keys = Keys { vault, known: Mutex::default() };
    Router::new().route("/.well-known/ensign-receipts.json", any(document)).with_state(Arc::new(keys))
}

async fn document(State(keys): State<Arc<Keys>>, method: Method) -> Response {
    if method != Method::GET && method != Method::HEAD {
        let mut reply = reply(StatusCode::METHOD_NOT_ALLOWED, failure("method not allowed"));
        reply.headers_mut().insert(ALLOW, http::HeaderValue::from_static("GET, HEAD"));
        return reply;
    }
    if let Some(document) = keys.current().await {
        let mut reply = reply(StatusCode::OK, document);
        reply.headers_mut().insert(CACHE_CONTROL, http::HeaderValue::from_static("public, max-age=60"));
        return reply;
    }
    let why = "the key vault cannot be reached, is sealed, or has no receipt key yet";
    let mut reply = reply(StatusCode::SERVICE_UNAVAILABLE, failure(why));
    reply.headers_mut().insert(RETRY_AFTER, http::HeaderValue::from_static("5"));
    reply
}

impl Keys {
    /// What the vault says, or said when it could be reached last: keys are only ever added.
    async fn current(&self) -> Option<String> {
        let mut known = timeout(PATIENCE, self.known.lock()).await.ok()?;
        let every = if known.document.is_some() { FRESH } else { Duration::from_secs(1) };
        if known.asked.is_some_and(|asked| asked.elapsed() < every) {
            return known.document.clone();
        }
        known.asked = Some(Instant::now());
        match timeout(PATIENCE, self.vault.receipt_keys()).await {
            Ok(Ok(keys)) => {
                let document = Document { keys: keys.into_iter().map(Into::into).collect() };
                known.document = serde_json::to_string(&document).ok();
            }
            Ok(Err(error)) => debug!(%error, "the receipt keys are not to be had now"),
            Err(_) => debug!("the vault gives no receipt keys in time"),
        }
        known.document.clone()
    }
}

fn failure(error: &str) -> String {
    serde_json::json!({ "success": false, "error": error }).to_string()
}

fn reply(status: StatusCode, json: String) -> Response {
    let mut reply = Response::new(Body::from(json));
    *reply.status_mut() = status;
    reply.headers_mut().insert(CONTENT_TYPE, http::HeaderValue::from_static("application/json; charset=utf-8"));
    reply
}
