//! Logins over a real socket, with the very bytes that the SDKs send.

use std::net::SocketAddr;
use std::sync::Arc;

use ensign_node::catalog::testing;
use ensign_node::identity::{Credentials, HashParams, Identity, IdentityConfig, MemorySecrets, NewApiKey, router};
use ensign_proto::{ClusterId, PermissionSet};
use ensign_raft::env::{OsRng, SystemClock, Tasks};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

struct Server {
    address: SocketAddr,
    identity: Identity,
    credentials: Credentials,
    tasks: Tasks,
}

async fn serve() -> anyhow::Result<Server> {
    let (clock, rng) = (Arc::new(SystemClock), Arc::new(OsRng));
    let catalog = testing::solo(clock.clone(), rng.clone());
    let config = IdentityConfig {
        hash: HashParams { memory_kib: 64, passes: 1, lanes: 1 },
        ..IdentityConfig::new(ClusterId::from_bytes([9; 16]))
    };
    let identity = Identity::new(config, catalog, Arc::new(MemorySecrets::default()), clock, rng);
    identity.ensure_signing_key().await?;
    let org = identity.ensure_organization("Example").await?;
    let project = identity.ensure_project(org.id, "first").await?;
    let new = NewApiKey {
        name: "a key".to_owned(),
        org: org.id,
        project: Some(project.id),
        permissions: PermissionSet::api_key(),
        admin: false,
        ring: None,
    };
    let (_, credentials) = identity.create_api_key(new).await?;
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let (address, tasks) = (listener.local_addr()?, Tasks::new());
    let app = router(identity.clone()).into_make_service_with_connect_info::<SocketAddr>();
    tasks.spawn("http", |stop| async move {
        let _ = axum::serve(listener, app).with_graceful_shutdown(stop.cancelled_owned()).await;
    });
    Ok(Server { address, identity, credentials, tasks })
}

/// Sends these bytes and reads until the server closes.
async fn exchange(address: SocketAddr, request: &str) -> anyhow::Result<(String, String)> {
    let mut stream = TcpStream::connect(address).await?;
    stream.write_all(request.as_bytes()).await?;
    let mut reply = String::new();
    stream.read_to_string(&mut reply).await?;
    let (head, body) = reply.split_once("\r\n\r\n").ok_or_else(|| anyhow::anyhow!("no header end in {reply:?}"))?;
    Ok((head.to_owned(), body.to_owned()))
}

/// What `urllib.request` of PyEnsign 0.12.1b0 puts on the wire.
fn as_pyensign(path: &str, body: &str) -> String {
    format!(
        "POST {path} HTTP/1.1\r\nAccept-Encoding: identity\r\nContent-Type: application/x-www-form-urlencoded\r\n\
         Content-Length: {}\r\nHost: localhost\r\nUser-Agent: pyensign/0.12.1b0\r\nConnection: close\r\n\r\n{body}",
        body.len()
    )
}

/// What go-ensign puts on the wire, with the stale token that it always sends.
fn as_go_ensign(path: &str, body: &str) -> String {
    format!(
        "POST {path} HTTP/1.1\r\nHost: localhost\r\nUser-Agent: Ensign Go-SDK Client Authentication/v1\r\n\
         Content-Length: {}\r\nAccept: application/json\r\nAuthorization: Bearer expired.long.ago\r\n\
         Content-Type: application/json; charset=utf-8\r\nConnection: close\r\n\r\n{body}\n",
        body.len() + 1
    )
}

fn login_body(credentials: &Credentials) -> String {
    format!(r#"{{"client_id": "{}", "client_secret": "{}"}}"#, credentials.client_id, credentials.secret.expose())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn both_sdks_log_in_and_their_tokens_are_believed() {
    let server = serve().await.unwrap();
    let body = login_body(&server.credentials);
    for request in [as_pyensign("/v1/authenticate", &body), as_go_ensign("/v1/authenticate", &body)] {
        let (head, body) = exchange(server.address, &request).await.unwrap();
        assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
        assert!(head.contains("\r\ncontent-type: application/json; charset=utf-8\r\n"), "{head}");
        let reply: serde_json::Value = serde_json::from_str(&body).unwrap();
        assert!(reply["refresh_token"].is_string());
        let claims = server.identity.verify(reply["access_token"].as_str().unwrap()).await.unwrap();
        assert_eq!(claims.permissions, PermissionSet::api_key());
    }
    assert!(server.tasks.shut_down(std::time::Duration::from_secs(5)).await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refused_login_reads_the_same_for_every_reason() {
    let server = serve().await.unwrap();
    let known = server.credentials.client_id.as_str();
    let mut replies = Vec::new();
    for (id, secret) in [(known, "w".repeat(64)), (&"x".repeat(32), "w".repeat(64)), (known, "short".to_owned())] {
        let body = format!(r#"{{"client_id": "{id}", "client_secret": "{secret}"}}"#);
        let (head, body) = exchange(server.address, &as_pyensign("/v1/authenticate", &body)).await.unwrap();
        let head: Vec<&str> = head.split("\r\n").filter(|line| !line.starts_with("date:")).collect();
        replies.push((head.join("\n"), body));
    }
    assert!(replies[0].0.starts_with("HTTP/1.1 403 Forbidden\n"), "{replies:?}");
    assert!(replies.iter().all(|reply| *reply == replies[0]), "{replies:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_not_http_or_not_ours_is_turned_away() {
    let server = serve().await.unwrap();
    for (request, status) in [
        ("GET /v1/authenticate HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".to_owned(), "405"),
        ("GET /v1/apikeys HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".to_owned(), "404"),
        ("GET /v1/../v1/status HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".to_owned(), "404"),
        (as_pyensign("/v1/refresh", r#"{"refresh_token": null}"#), "400"),
        (as_pyensign("/v1/authenticate", "client_id=a&client_secret=b"), "400"),
        (as_pyensign("/v1/authenticate", &format!(r#"{{"client_id":"{}"}}"#, "x".repeat(70_000))), "413"),
    ] {
        let (head, body) = exchange(server.address, &request).await.unwrap();
        assert_eq!(head.split(' ').nth(1), Some(status), "{request}");
        let reply: serde_json::Value = serde_json::from_str(&body).unwrap();
        assert_eq!(reply["success"], false, "{body}");
    }
    let garbage = exchange(server.address, "\x16\x03\x01 hello\r\n\r\n").await.unwrap();
    assert!(garbage.0.starts_with("HTTP/1.1 400"), "{garbage:?}");
}
