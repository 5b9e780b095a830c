//! The HTTP face: what both SDKs call, byte for byte as they expect it, and the published keys.
//!
//! Bodies are JSON whatever their Content-Type says (PyEnsign labels them as a form). Replies say exactly
//! `application/json; charset=utf-8` (go-ensign compares the text). No redirects, no other content type, 404 and 405 included.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use axum::Router;
use axum::body::{Body, to_bytes};
use axum::extract::{ConnectInfo, Request, State};
use axum::response::Response;
use axum::routing::any;
use http::header::{ALLOW, CACHE_CONTROL, CONTENT_TYPE, RETRY_AFTER};
use http::{HeaderMap, HeaderValue, Method, StatusCode};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use tokio::time::{Instant, timeout};
use zeroize::Zeroize as _;

use super::metrics;
use super::service::{Availability, Identity, LoginError, TokenPair};
use super::signing::Jwk;

const JSON: HeaderValue = HeaderValue::from_static("application/json; charset=utf-8");
/// A login is some hundred bytes, a refresh with both old tokens some thousand.
const BODY_MAX: usize = 64 * 1024;
const BODY_DEADLINE: Duration = Duration::from_secs(10);

/// Serves `/v1/authenticate`, `/v1/refresh`, `/v1/status` and `/.well-known/*`; everything else is a JSON 404.
///
/// Serve it with `into_make_service_with_connect_info::<SocketAddr>()`, or failures are not counted by address.
pub fn router(identity: Identity) -> Router {
    Router::new()
        .route("/v1/authenticate", any(authenticate))
        .route("/v1/refresh", any(refresh))
        .route("/v1/status", any(status))
        .route("/.well-known/jwks.json", any(jwks))
        .route("/.well-known/openid-configuration", any(openid_configuration))
        .fallback(async || failure(StatusCode::NOT_FOUND, "resource not found"))
        .with_state(identity)
}

#[derive(Serialize)]
struct Failure<'a> {
    success: bool,
    error: &'a str,
}

#[derive(Serialize)]
struct LoginReply {
    access_token: String,
    refresh_token: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    last_login: Option<String>,
}

#[derive(Serialize)]
struct StatusReply<'a> {
    status: &'a str,
    uptime: String,
    version: &'a str,
}

#[derive(Serialize)]
struct Jwks {
    keys: Vec<Jwk>,
}

#[derive(Deserialize)]
struct AuthenticateRequest {
    #[serde(default)]
    client_id: String,
    #[serde(default)]
    client_secret: String,
}

impl Drop for AuthenticateRequest {
    fn drop(&mut self) {
        self.client_secret.zeroize();
    }
}

#[derive(Deserialize)]
struct RefreshRequest {
    #[serde(default)]
    refresh_token: String,
}

async fn authenticate(State(identity): State<Identity>, request: Request) -> Response {
    let arrived = Instant::now();
    if let Some(reply) = refused(&identity, request.method(), &[Method::POST]) {
        return reply;
    }
    let from = caller(&identity, &request);
    let mut body: AuthenticateRequest = match json_body(request).await {
        Ok(body) => body,
        Err(reply) => return reply,
    };
    if body.client_id.is_empty() || body.client_secret.is_empty() {
        return failure(StatusCode::BAD_REQUEST, "missing client_id or client_secret");
    }
    let secret = std::mem::take(&mut body.client_secret);
    login_reply(identity.authenticate(&body.client_id, secret, from, arrived).await)
}

async fn refresh(State(identity): State<Identity>, request: Request) -> Response {
    let arrived = Instant::now();
    if let Some(reply) = refused(&identity, request.method(), &[Method::POST]) {
        return reply;
    }
    let body: RefreshRequest = match json_body(request).await {
        Ok(body) => body,
        Err(reply) => return reply,
    };
    if body.refresh_token.is_empty() {
        return failure(StatusCode::BAD_REQUEST, "missing refresh_token");
    }
    login_reply(identity.refresh(&body.refresh_token, arrived).await)
}

async fn status(State(identity): State<Identity>, method: Method) -> Response {
    if let Some(reply) = wrong_method(&method, &[Method::GET, Method::HEAD, Method::POST]) {
        return reply;
    }
    status_reply(&identity)
}

async fn jwks(State(identity): State<Identity>, method: Method) -> Response {
    if let Some(reply) = wrong_method(&method, &[Method::GET, Method::HEAD]) {
        return reply;
    }
    cached(json(StatusCode::OK, &Jwks { keys: identity.published_keys() }))
}

/// Names what exists; of the flows that OpenID Connect knows, none does.
#[derive(Serialize)]
struct Discovery {
    issuer: String,
    authorization_endpoint: &'static str,
    token_endpoint: &'static str,
    device_authorization_endpoint: &'static str,
    userinfo_endpoint: &'static str,
    mfa_challenge_endpoint: &'static str,
    jwks_uri: String,
    registration_endpoint: &'static str,
    revocation_endpoint: &'static str,
    scopes_supported: [&'static str; 3],
    response_types_supported: [&'static str; 2],
    code_challenge_methods_supported: [&'static str; 2],
    response_modes_supported: [&'static str; 3],
    subject_types_supported: [&'static str; 1],
    id_token_signing_alg_values_supported: [&'static str; 1],
    token_endpoint_auth_methods_supported: [&'static str; 2],
    claims_supported: [&'static str; 6],
    request_uri_parameter_supported: bool,
}

async fn openid_configuration(State(identity): State<Identity>, method: Method) -> Response {
    if let Some(reply) = wrong_method(&method, &[Method::GET, Method::HEAD]) {
        return reply;
    }
    cached(json(
        StatusCode::OK,
        &Discovery {
            issuer: identity.config().issuer.clone(),
            authorization_endpoint: "",
            token_endpoint: "",
            device_authorization_endpoint: "",
            userinfo_endpoint: "",
            mfa_challenge_endpoint: "",
            jwks_uri: format!("{}/.well-known/jwks.json", identity.config().public_url),
            registration_endpoint: "",
            revocation_endpoint: "",
            scopes_supported: ["openid", "profile", "email"],
            response_types_supported: ["token", "id_token"],
            code_challenge_methods_supported: ["S256", "plain"],
            response_modes_supported: ["query", "fragment", "form_post"],
            subject_types_supported: ["public"],
            id_token_signing_alg_values_supported: ["RS256"],
            token_endpoint_auth_methods_supported: ["client_secret_basic", "client_secret_post"],
            claims_supported: ["aud", "email", "exp", "iat", "iss", "sub"],
            request_uri_parameter_supported: false,
        },
    ))
}

/// Why a login call is not even looked at.
fn refused(identity: &Identity, method: &Method, allowed: &[Method]) -> Option<Response> {
    if let Some(reply) = wrong_method(method, allowed) {
        return Some(reply);
    }
    (identity.availability() != Availability::Ok).then(|| status_reply(identity))
}

fn wrong_method(method: &Method, allowed: &[Method]) -> Option<Response> {
    if allowed.contains(method) {
        return None;
    }
    let names: Vec<&str> = allowed.iter().map(Method::as_str).collect();
    let mut reply = failure(StatusCode::METHOD_NOT_ALLOWED, "method not allowed");
    if let Ok(names) = HeaderValue::from_str(&names.join(", ")) {
        reply.headers_mut().insert(ALLOW, names);
    }
    Some(reply)
}

async fn json_body<T: for<'de> Deserialize<'de>>(request: Request) -> Result<T, Response> {
    let read = timeout(BODY_DEADLINE, to_bytes(request.into_body(), BODY_MAX)).await;
    let body = match read {
        Ok(Ok(body)) => body,
        // Too long, or the client went away, which makes the answer moot.
        Ok(Err(_)) => return Err(failure(StatusCode::PAYLOAD_TOO_LARGE, "request body is too large")),
        Err(_) => return Err(failure(StatusCode::REQUEST_TIMEOUT, "request body did not arrive in time")),
    };
    // The parser's message could quote the secret, so it is not passed on.
    let parsed = serde_json::from_slice(&body).map_err(|_| failure(StatusCode::BAD_REQUEST, "could not parse request"));
    // Where the buffer is ours alone. What the connection still shares is overwritten by what it receives next.
    if let Ok(mut body) = body.try_into_mut() {
        body.as_mut().zeroize();
    }
    parsed
}

fn login_reply(result: Result<TokenPair, LoginError>) -> Response {
    metrics::login(match &result {
        Ok(_) => "ok",
        Err(LoginError::Refused) => "refused",
        Err(LoginError::Busy { .. }) => "busy",
        Err(LoginError::Unavailable) => "unavailable",
    });
    match result {
        Ok(pair) => {
            let last_login = pair.last_login.and_then(|seconds| {
                Timestamp::from_second(i64::try_from(seconds).ok()?).ok().map(|time| time.to_string())
            });
            let mut reply = json(
                StatusCode::OK,
                &LoginReply { access_token: pair.access, refresh_token: pair.refresh, last_login },
            );
            reply.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
            reply
        }
        Err(error @ LoginError::Refused) => failure(StatusCode::FORBIDDEN, &error.to_string()),
        Err(LoginError::Busy { retry_after }) => {
            let seconds = retry_after.as_millis().div_ceil(1000).max(1);
            let mut reply = failure(StatusCode::TOO_MANY_REQUESTS, "too many requests");
            reply.headers_mut().insert(RETRY_AFTER, HeaderValue::from(seconds as u64));
            reply
        }
        Err(error @ LoginError::Unavailable) => {
            let mut reply = failure(StatusCode::SERVICE_UNAVAILABLE, &error.to_string());
            reply.headers_mut().insert(RETRY_AFTER, HeaderValue::from(1));
            reply
        }
    }
}

fn status_reply(identity: &Identity) -> Response {
    let (code, status) = match identity.availability() {
        Availability::Ok => (StatusCode::OK, "ok"),
        Availability::Maintenance => (StatusCode::SERVICE_UNAVAILABLE, "maintenance"),
        Availability::Stopping => (StatusCode::SERVICE_UNAVAILABLE, "stopping"),
    };
    let uptime = go_duration(identity.uptime());
    json(code, &StatusReply { status, uptime, version: &identity.config().version })
}

fn failure(code: StatusCode, error: &str) -> Response {
    json(code, &Failure { success: false, error })
}

fn json(code: StatusCode, body: &impl Serialize) -> Response {
    // Plain structs of strings: serializing them cannot fail.
    let body = serde_json::to_vec(body).unwrap_or_default();
    let mut reply = Response::new(Body::from(body));
    *reply.status_mut() = code;
    reply.headers_mut().insert(CONTENT_TYPE, JSON);
    reply
}

fn cached(mut reply: Response) -> Response {
    reply.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static("max-age=300"));
    reply
}

/// The caller's address: the peer's, or what the nearest proxy that is not trusted was told by the ones that are.
fn caller(identity: &Identity, request: &Request) -> Option<IpAddr> {
    let peer = request.extensions().get::<ConnectInfo<SocketAddr>>()?.0.ip().to_canonical();
    Some(behind_proxies(peer, request.headers(), &identity.config().trusted_proxies))
}

fn behind_proxies(peer: IpAddr, headers: &HeaderMap, trusted: &[IpAddr]) -> IpAddr {
    let hops = headers.get_all("x-forwarded-for").iter().filter_map(|value| value.to_str().ok());
    let hops: Vec<&str> = hops.flat_map(|value| value.split(',')).map(str::trim).collect();
    let mut address = peer;
    // From the nearest hop outwards, for as long as the one who says so is believed.
    for hop in hops.into_iter().rev() {
        if !trusted.contains(&address) {
            break;
        }
        let Ok(next) = hop.parse::<IpAddr>() else { break };
        address = next.to_canonical();
    }
    address
}

/// A duration as Go prints it (`1h2m3.5s`): go-ensign's users read it, and some parse it.
fn go_duration(duration: Duration) -> String {
    let (seconds, nanos) = (duration.as_secs(), duration.subsec_nanos());
    if seconds == 0 {
        return match nanos {
            0 => "0s".to_owned(),
            1..1_000 => format!("{nanos}ns"),
            1_000..1_000_000 => format!("{}µs", decimal(u64::from(nanos / 1_000), nanos % 1_000, 3)),
            _ => format!("{}ms", decimal(u64::from(nanos / 1_000_000), nanos % 1_000_000, 6)),
        };
    }
    let (hours, minutes) = (seconds / 3_600, seconds / 60 % 60);
    let rest = decimal(seconds % 60, nanos, 9);
    match (hours, minutes) {
        (0, 0) => format!("{rest}s"),
        (0, _) => format!("{minutes}m{rest}s"),
        _ => format!("{hours}h{minutes}m{rest}s"),
    }
}

fn decimal(whole: u64, fraction: u32, digits: usize) -> String {
    let text = format!("{whole}.{fraction:0digits$}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_read_as_go_prints_them() {
        let cases = [
            (Duration::ZERO, "0s"),
            (Duration::from_nanos(7), "7ns"),
            (Duration::from_nanos(1_500), "1.5µs"),
            (Duration::from_millis(250), "250ms"),
            (Duration::from_millis(10), "10ms"),
            (Duration::from_secs(1), "1s"),
            (Duration::from_secs(10), "10s"),
            (Duration::from_millis(61_500), "1m1.5s"),
            (Duration::from_hours(1), "1h0m0s"),
            (Duration::new(93_784, 5), "26h3m4.000000005s"),
        ];
        for (duration, text) in cases {
            assert_eq!(go_duration(duration), text);
        }
    }

    #[test]
    fn only_trusted_proxies_are_believed() {
        let address = |text: &str| text.parse::<IpAddr>().unwrap();
        let mut headers = HeaderMap::new();
        headers.insert("x-forwarded-for", HeaderValue::from_static("6.6.6.6, 1.2.3.4, 10.0.0.2"));
        let seen = |trusted: &[&str]| {
            let trusted: Vec<IpAddr> = trusted.iter().map(|text| address(text)).collect();
            behind_proxies(address("10.0.0.1"), &headers, &trusted).to_string()
        };
        assert_eq!(seen(&[]), "10.0.0.1");
        assert_eq!(seen(&["10.0.0.1"]), "10.0.0.2");
        // What the client itself claims is never reached.
        assert_eq!(seen(&["10.0.0.1", "10.0.0.2"]), "1.2.3.4");
    }
}
