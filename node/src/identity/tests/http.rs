//! The replies, byte for byte.

use ::http::{Method, Request, Response};
use std::fmt::Write as _;

use axum::Router;
use axum::body::{Body, to_bytes};
use tower::ServiceExt as _;

use super::*;

async fn call(app: &Router, method: Method, path: &str, content_type: &str, body: String) -> Response<Body> {
    let request = Request::builder().method(method).uri(path).header("content-type", content_type);
    app.clone().oneshot(request.body(Body::from(body)).unwrap()).await.unwrap()
}

/// Status line, headers and body, as they go out.
async fn shown(reply: Response<Body>) -> String {
    let mut text = format!("{}\n", reply.status());
    for (name, value) in reply.headers() {
        writeln!(text, "{name}: {}", value.to_str().unwrap()).unwrap();
    }
    let body = to_bytes(reply.into_body(), usize::MAX).await.unwrap();
    text + "\n" + std::str::from_utf8(&body).unwrap()
}

fn login_body(fixture: &Fixture) -> String {
    let (id, secret) = (&fixture.credentials.client_id, fixture.credentials.secret.expose());
    format!(r#"{{"client_id": "{id}", "client_secret": "{secret}"}}"#)
}

#[tokio::test]
async fn replies_are_what_the_sdks_expect() {
    let fixture = Fixture::new().await;
    let app = router(fixture.identity.clone());
    let post = async |path: &str, body: &str| {
        // The label that Python's urllib puts on every body.
        let label = "application/x-www-form-urlencoded";
        shown(call(&app, Method::POST, path, label, body.to_owned()).await).await
    };
    let get = async |path: &str| shown(call(&app, Method::GET, path, "", String::new()).await).await;

    insta::assert_snapshot!("login", post("/v1/authenticate", &login_body(&fixture)).await);
    let refused = format!(r#"{{"client_id":"{}","client_secret":"{}"}}"#, "x".repeat(32), wrong_secret());
    insta::assert_snapshot!("login_refused", post("/v1/authenticate", &refused).await);
    insta::assert_snapshot!("login_malformed", post("/v1/authenticate", r#"{"client_id":"#).await);
    insta::assert_snapshot!("login_missing", post("/v1/authenticate", r#"{"client_id":"x"}"#).await);
    insta::assert_snapshot!("refresh_refused", post("/v1/refresh", r#"{"refresh_token":"x.y.z"}"#).await);
    insta::assert_snapshot!("refresh_missing", post("/v1/refresh", "{}").await);
    insta::assert_snapshot!("method_not_allowed", get("/v1/authenticate").await);
    insta::assert_snapshot!("not_found", get("/v1/status/").await);
    fixture.clock.advance(Duration::from_millis(3_723_500));
    insta::assert_snapshot!("status", get("/v1/status").await);
    assert_eq!(post("/v1/status", "").await, get("/v1/status").await);
    insta::assert_snapshot!("jwks", get("/.well-known/jwks.json").await);
    insta::assert_snapshot!("openid_configuration", get("/.well-known/openid-configuration").await);
    fixture.identity.set_availability(Availability::Stopping);
    insta::assert_snapshot!("stopping", post("/v1/authenticate", &login_body(&fixture)).await);
    assert_eq!(get("/v1/status").await, post("/v1/refresh", "{}").await);
}

#[tokio::test]
async fn a_refresh_answers_as_a_login_does() {
    let fixture = Fixture::new().await;
    let app = router(fixture.identity.clone());
    let pair = fixture.login().await.unwrap();
    fixture.clock.advance(Duration::from_mins(50));
    // As go-ensign sends it, with the fields that the SDK does not need to send.
    let body = format!(
        r#"{{"access_token":"{}","refresh_token":"{}","last_login":"2024-01-01T00:00:00Z"}}"#,
        pair.access, pair.refresh
    );
    let reply = call(&app, Method::POST, "/v1/refresh", "application/json; charset=utf-8", body).await;
    assert_eq!(reply.status(), 200);
    let text = shown(reply).await;
    assert!(text.contains("\ncontent-type: application/json; charset=utf-8\n"), "{text}");
    assert!(text.ends_with(r#","last_login":"2023-11-14T22:13:20Z"}"#), "{text}");
}

#[tokio::test]
async fn bad_bodies_are_refused() {
    let fixture = Fixture::new().await;
    let app = router(fixture.identity.clone());
    let status = async |body: String| {
        call(&app, Method::POST, "/v1/authenticate", "application/json", body).await.status().as_u16()
    };
    assert_eq!(status("x".repeat(65 * 1024)).await, 413);
    assert_eq!(status(String::new()).await, 400);
    assert_eq!(status("[]".to_owned()).await, 400);
    assert_eq!(status(r#"{"client_id":7,"client_secret":"x"}"#.to_owned()).await, 400);
    assert_eq!(status("[".repeat(60_000)).await, 400);
    assert_eq!(status(login_body(&fixture).replace('}', r#","unknown":{"a":[1]}}"#)).await, 200);
}

#[tokio::test]
async fn too_many_failures_from_one_address_are_told_to_come_back() {
    let fixture = Fixture::new().await;
    let app = router(fixture.identity.clone());
    let fail = async |client: String| {
        let body = format!(r#"{{"client_id":"{client}","client_secret":"x"}}"#);
        let mut request = Request::post("/v1/authenticate").body(Body::from(body)).unwrap();
        let address: std::net::SocketAddr = "192.0.2.7:4000".parse().unwrap();
        request.extensions_mut().insert(axum::extract::ConnectInfo(address));
        app.clone().oneshot(request).await.unwrap()
    };
    for n in 0..300 {
        assert_eq!(fail(format!("client {n}")).await.status(), 403);
    }
    insta::assert_snapshot!("too_many_requests", shown(fail("one more".to_owned()).await).await);
    // Whoever comes from elsewhere is not concerned.
    fixture.login().await.unwrap();
}
