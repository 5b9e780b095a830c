//! A stub of the transit engine that does what its documentation says, behind TLS.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::body::Bytes;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse as _, Response};
use axum::routing::get;
use ensign_proto::{ClusterId, NodeId};
use ensign_raft::env::Tasks;
use serde_json::Value;
use tokio::net::TcpListener;

use super::*;
use crate::authority::Authority;
use crate::certificates::ClientTls;
use crate::config::ListenSettings;
use crate::edge;

const NAME: MasterName = MasterName { cluster: ClusterId::from_bytes([3; 16]), epoch: 1 };
const TOKEN: &str = "s.the-token";

/// One key of the engine. Ciphertexts are handles: what a test needs is who may open them and when, and not how.
#[derive(Default)]
struct Engine {
    latest: u32,
    min_decryption: u32,
    min_encryption: u32,
    min_available: u32,
    sealed: Vec<(u32, String, String)>,
    /// What the next call answers instead, and under which status.
    planted: Option<(u16, String)>,
    calls: Vec<String>,
}

type Shared = Arc<Mutex<Engine>>;

fn refused(status: u16, errors: &[&str]) -> Response {
    let status = StatusCode::from_u16(status).unwrap();
    (status, axum::Json(json!({ "errors": errors }))).into_response()
}

fn data(data: Value) -> Response {
    axum::Json(json!({ "request_id": "1", "lease_id": "", "renewable": false, "data": data })).into_response()
}

async fn serve(State(engine): State<Shared>, Path(path): Path<String>, headers: HeaderMap, body: Bytes) -> Response {
    let mut engine = engine.lock().unwrap();
    engine.calls.push(path.clone());
    if headers.get(TOKEN_HEADER).is_none_or(|token| token != TOKEN) {
        return refused(403, &["permission denied"]);
    }
    if let Some((status, text)) = engine.planted.take() {
        return (StatusCode::from_u16(status).unwrap(), text).into_response();
    }
    let asked: Value = serde_json::from_slice(&body).unwrap_or_default();
    let text = |name: &str| asked[name].as_str().unwrap_or_default().to_owned();
    let number = |name: &str| asked[name].as_u64().map_or(0, |number| number as u32);
    match &*path {
        "encrypt/root" => {
            let (version, handle) = (engine.latest, engine.sealed.len());
            engine.sealed.push((version, text("plaintext"), text("associated_data")));
            data(json!({ "ciphertext": format!("vault:v{version}:{handle}"), "key_version": version }))
        }
        "decrypt/root" => {
            let ciphertext = text("ciphertext");
            let handle = ciphertext.rsplit_once(':').and_then(|(_, handle)| handle.parse::<usize>().ok());
            match handle.and_then(|handle| engine.sealed.get(handle)) {
                Some((version, ..)) if *version < engine.min_decryption => {
                    refused(400, &["ciphertext or signature version is disallowed by policy (too old)"])
                }
                Some((_, plaintext, bound)) if *bound == text("associated_data") => {
                    data(json!({ "plaintext": plaintext }))
                }
                _ => refused(400, &["cipher: message authentication failed"]),
            }
        }
        "keys/root" => data(json!({
            "type": "aes256-gcm96", "name": "root", "latest_version": engine.latest,
            "min_available_version": engine.min_available, "min_decryption_version": engine.min_decryption,
        })),
        "keys/root/rotate" => {
            engine.latest += 1;
            StatusCode::NO_CONTENT.into_response()
        }
        "keys/root/config" => {
            (engine.min_decryption, engine.min_encryption) =
                (number("min_decryption_version"), number("min_encryption_version"));
            StatusCode::NO_CONTENT.into_response()
        }
        "keys/root/trim" => {
            let to = number("min_available_version");
            let bounds = engine.min_decryption.min(engine.min_encryption);
            if bounds == 0 || to > bounds {
                return refused(
                    400,
                    &["minimum available version cannot be set when minimum encryption version is not set"],
                );
            }
            engine.min_available = to;
            StatusCode::NO_CONTENT.into_response()
        }
        _ => refused(404, &[]),
    }
}

struct Stub {
    folder: tempfile::TempDir,
    engine: Shared,
    root: TransitRoot,
    tasks: Tasks,
}

impl Stub {
    async fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        let authority = Authority::generate("stub").unwrap();
        let issued = authority.issue(NodeId(1)).unwrap();
        fs::write(at("ca.pem"), authority.certificate()).unwrap();
        fs::write(at("stub.pem"), issued.certificate).unwrap();
        fs::write(at("stub.key"), issued.private_key).unwrap();
        fs::write(at("token"), format!("{TOKEN}\n")).unwrap();
        fs::set_permissions(at("token"), Permissions::from_mode(0o600)).unwrap();
        let listen =
            ListenSettings { certificate: at("stub.pem"), private_key: at("stub.key"), ..ListenSettings::default() };
        let tls = ClientTls::load(&listen).unwrap().unwrap();
        let engine = Shared::default();
        engine.lock().unwrap().latest = 1;
        let calls = get(serve).post(serve);
        let router = Router::new().route("/v1/transit/{*path}", calls).with_state(Arc::clone(&engine));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = format!("https://localhost:{}", listener.local_addr().unwrap().port());
        let tasks = Tasks::new();
        edge::serve_http("stub", listener, Some(&tls), router, &tasks);
        let root = TransitRoot {
            address,
            mount: "transit".to_owned(),
            key: "root".to_owned(),
            token: at("token"),
            authority: at("ca.pem"),
        };
        Self { folder, engine, root, tasks }
    }

    fn plant(&self, status: u16, text: &str) {
        self.engine.lock().unwrap().planted = Some((status, text.to_owned()));
    }
}

async fn refusal(root: &TransitRoot, wrapped: &WrappedMaster) -> String {
    root.unwrap(NAME, wrapped, None).await.unwrap_err().to_string()
}

#[tokio::test]
async fn a_master_key_comes_back_from_the_engine_and_is_bound_to_its_place() {
    let stub = Stub::start().await;
    let wrapped = stub.root.wrap(NAME, &[9; 32], None).await.unwrap();
    assert_eq!((wrapped.kind, wrapped.version, &*wrapped.reference), (RootKind::Transit, 1, "transit/root"));
    stub.root.unwrap(NAME, &wrapped, None).await.unwrap();
    let elsewhere = MasterName { epoch: 2, ..NAME };
    let refused = stub.root.unwrap(elsewhere, &wrapped, None).await.unwrap_err().to_string();
    assert!(refused.contains("cipher: message authentication failed"), "{refused}");
    let other = TransitRoot { key: "other".to_owned(), ..stub.root.clone() };
    assert_eq!(
        refusal(&other, &wrapped).await,
        "wrong root key: the vault needs root key transit/root, this node has transit/other"
    );
    stub.tasks.shut_down(Duration::from_secs(5)).await;
}

#[tokio::test]
async fn a_destroyed_version_opens_nothing_and_the_newest_is_never_destroyed() {
    let stub = Stub::start().await;
    let old = stub.root.wrap(NAME, &[9; 32], None).await.unwrap();
    let refused = stub.root.destroy(1).await.unwrap_err().to_string();
    assert!(refused.contains("is its newest: rotate it first"), "{refused}");
    assert_eq!(stub.root.rotate().await.unwrap(), 2);
    let new = stub.root.wrap(NAME, &[8; 32], None).await.unwrap();
    assert_eq!(new.version, 2);
    stub.root.unwrap(NAME, &old, None).await.unwrap();
    stub.root.destroy(1).await.unwrap();
    let refused = refusal(&stub.root, &old).await;
    assert!(refused.contains("disallowed by policy (too old)"), "{refused}");
    stub.root.unwrap(NAME, &new, None).await.unwrap();
    let engine = stub.engine.lock().unwrap();
    assert_eq!((engine.min_decryption, engine.min_encryption, engine.min_available), (2, 2, 2));
}

#[tokio::test]
async fn each_trouble_says_what_to_do() {
    let stub = Stub::start().await;
    let wrapped = stub.root.wrap(NAME, &[9; 32], None).await.unwrap();
    let at = |name: &str| stub.folder.path().join(name);

    stub.plant(503, "{\"errors\":[\"Vault is sealed\"]}");
    let refused = refusal(&stub.root, &wrapped).await;
    assert!(
        refused.contains("503") && refused.contains("it is sealed itself") && refused.contains("Vault is sealed"),
        "{refused}"
    );
    stub.plant(200, "{\"data\":{\"plaintext\":\"AAAA\"}}");
    assert!(refusal(&stub.root, &wrapped).await.ends_with("it answered a key of 3 bytes, not of 32"));
    let other = BASE64_STANDARD.encode([7; 32]);
    stub.plant(200, &format!("{{\"data\":{{\"plaintext\":\"{other}\"}}}}"));
    let refused = refusal(&stub.root, &wrapped).await;
    assert!(
        refused.ends_with("it answered another key than it was given to wrap") && !refused.contains(&other),
        "{refused}"
    );
    stub.plant(200, "<html>");
    assert!(refusal(&stub.root, &wrapped).await.ends_with("its answer is not what the transit API promises"));
    stub.plant(200, &"x".repeat(70_000));
    assert!(refusal(&stub.root, &wrapped).await.ends_with("it answered more than 64 KiB"));
    stub.plant(307, "");
    let refused = refusal(&stub.root, &wrapped).await;
    assert!(refused.contains("307"), "no redirect is followed: {refused}");

    fs::write(at("token"), "s.another").unwrap();
    let refused = refusal(&stub.root, &wrapped).await;
    assert!(
        refused.contains("403") && refused.contains("root.transit_token") && !refused.contains("s.another"),
        "{refused}"
    );
    fs::set_permissions(at("token"), Permissions::from_mode(0o644)).unwrap();
    assert!(refusal(&stub.root, &wrapped).await.contains("chmod 600"));
    fs::set_permissions(at("token"), Permissions::from_mode(0o600)).unwrap();
    fs::write(at("token"), "\n").unwrap();
    assert!(refusal(&stub.root, &wrapped).await.ends_with("root.transit_token: the file is empty"));
    fs::write(at("token"), TOKEN).unwrap();

    let strange = TransitRoot { mount: "elsewhere".to_owned(), ..stub.root.clone() };
    let refused = strange.wrap(NAME, &[9; 32], None).await.unwrap_err().to_string();
    assert!(refused.contains("404") && refused.contains("root.transit_mount"), "{refused}");
}

#[tokio::test]
async fn the_token_goes_to_a_server_of_the_named_authority_or_nowhere() {
    let stub = Stub::start().await;
    let wrapped = stub.root.wrap(NAME, &[9; 32], None).await.unwrap();
    let calls = || stub.engine.lock().unwrap().calls.len();
    let before = calls();
    let stranger = stub.folder.path().join("stranger.pem");
    fs::write(&stranger, Authority::generate("stranger").unwrap().certificate()).unwrap();
    for authority in [stranger, PathBuf::new()] {
        let refused = refusal(&TransitRoot { authority, ..stub.root.clone() }, &wrapped).await;
        assert!(refused.to_lowercase().contains("certificate"), "{refused}");
    }
    let clear = TransitRoot { address: stub.root.address.replace("https", "http"), ..stub.root.clone() };
    assert!(refusal(&clear, &wrapped).await.contains("transit engine http://"));
    let absent = TransitRoot { authority: stub.folder.path().join("absent.pem"), ..stub.root.clone() };
    assert!(refusal(&absent, &wrapped).await.contains("root.transit_authority"));
    let nobody = TransitRoot { address: "https://localhost:1".to_owned(), ..stub.root.clone() };
    assert!(refusal(&nobody, &wrapped).await.contains("refused"), "{}", refusal(&nobody, &wrapped).await);
    assert_eq!(calls(), before, "nothing was sent to any of them");
}
