//! What a token says, who believes it, and until when.

use aws_lc_rs::rsa::KeySize;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ensign_proto::Permission;
use jsonwebtoken::{Algorithm, DecodingKey, Validation};
use serde_json::{Value, json};

use super::login::other_key;
use super::*;
use crate::identity::token::{RawClaims, Signer};

const HOUR: u64 = 3_600;

fn payload(token: &str) -> Value {
    let part = token.split('.').nth(1).unwrap();
    serde_json::from_slice(&URL_SAFE_NO_PAD.decode(part).unwrap()).unwrap()
}

fn claims(fixture: &Fixture) -> RawClaims {
    let config = config();
    RawClaims {
        iss: config.issuer,
        aud: vec![config.audience],
        sub: fixture.key.id.to_string(),
        jti: "01hf7yat00xxxxxxxxxxxxxxxx".to_owned(),
        iat: START,
        nbf: START,
        exp: START + HOUR,
        org: fixture.org.id.to_string(),
        project: Some(fixture.project.id.to_string()),
        permissions: Some(vec!["publisher".to_owned()]),
    }
}

/// A token signed with the cluster's key, whatever it says.
fn signed(claims: &RawClaims) -> String {
    Signer::from_pkcs8(KID, &signing_key_der()).unwrap().sign(claims).unwrap()
}

#[tokio::test]
async fn both_tokens_carry_the_claims_of_the_wire_reference() {
    let fixture = Fixture::new().await;
    let pair = fixture.login().await.unwrap();
    let (access, refresh) = (payload(&pair.access), payload(&pair.refresh));
    let jti = access["jti"].as_str().unwrap();
    assert_eq!((jti.len(), jti), (26, jti.to_lowercase().as_str()));
    let issuer = "urn:ensign:09144gj289144gj289144gj289";
    let common = json!({
        "iss": issuer, "sub": fixture.key.id.to_string(), "jti": jti, "iat": START,
        "org": fixture.org.id.to_string(), "project": fixture.project.id.to_string(),
    });
    let with = |more: Value| {
        let mut all = common.as_object().unwrap().clone();
        all.extend(more.as_object().unwrap().clone());
        Value::Object(all)
    };
    let permissions =
        ["metrics:read", "publisher", "subscriber", "topics:create", "topics:destroy", "topics:edit", "topics:read"];
    let expected = json!({"aud": [issuer], "nbf": START, "exp": START + HOUR, "permissions": permissions});
    assert_eq!(access, with(expected));
    let audience = [issuer.to_owned(), format!("{issuer}/v1/refresh")];
    assert_eq!(refresh, with(json!({"aud": audience, "nbf": START + HOUR - 900, "exp": START + 2 * HOUR})));
    let header = URL_SAFE_NO_PAD.decode(pair.access.split('.').next().unwrap()).unwrap();
    assert_eq!(header, br#"{"alg":"RS256","typ":"JWT","kid":"01040G2081040G2081040G2081"}"#);
}

#[tokio::test]
async fn an_operators_token_names_no_project() {
    let fixture = Fixture::new().await;
    let new = NewApiKey { project: None, admin: true, permissions: operator_permissions(), ..other_key(&fixture) };
    let (_, operator) = fixture.identity.create_api_key(new).await.unwrap();
    let pair = fixture.login_with(operator.client_id.as_str(), operator.secret.expose()).await.unwrap();
    assert_eq!(payload(&pair.access).get("project"), None);
    let claims = fixture.identity.verify(&pair.access).await.unwrap();
    assert!(claims.permits(Permission::ApiKeysEdit) && !claims.permits(Permission::Publisher));
    assert_eq!(claims.project, None);
}

#[tokio::test]
async fn another_implementation_verifies_our_tokens_with_the_published_key() {
    let fixture = Fixture::new().await;
    let pair = fixture.login().await.unwrap();
    let published = serde_json::to_value(fixture.identity.published_keys()).unwrap();
    let text = |field: &str| published[0][field].as_str().unwrap();
    assert_eq!((text("kty"), text("use"), text("alg"), text("e")), ("RSA", "sig", "RS256", "AQAB"));
    assert_eq!(Some(text("kid")), jsonwebtoken::decode_header(&pair.access).unwrap().kid.as_deref());
    let mut validation = Validation::new(Algorithm::RS256);
    validation.set_audience(&[config().audience]);
    validation.set_issuer(&[config().issuer]);
    (validation.validate_exp, validation.validate_nbf) = (false, false);
    let key = DecodingKey::from_rsa_components(text("n"), text("e")).unwrap();
    let decoded = jsonwebtoken::decode::<Value>(&pair.access, &key, &validation).unwrap();
    assert_eq!(decoded.claims["sub"], fixture.key.id.to_string());
}

#[tokio::test]
async fn a_stored_token_still_verifies() {
    let fixture = Fixture::new().await;
    // Made by this code once. If this fails, tokens of a running cluster would be void after an upgrade.
    insta::assert_snapshot!("token_vector", fixture.login().await.unwrap().access);
}

#[tokio::test]
async fn a_verified_token_says_who_it_is() {
    let fixture = Fixture::new().await;
    let pair = fixture.login().await.unwrap();
    for identity in [&fixture.identity, &fixture.restarted(config())] {
        let claims = identity.verify(&pair.access).await.unwrap();
        assert_eq!((claims.subject, claims.org), (fixture.key.id, fixture.org.id));
        assert_eq!((claims.project, claims.permissions), (Some(fixture.project.id), PermissionSet::api_key()));
        assert_eq!(claims.expires, START + HOUR);
    }
}

#[tokio::test]
async fn a_token_ends_when_it_says_and_begins_within_a_minute_of_it() {
    let fixture = Fixture::new().await;
    let early = signed(&RawClaims { nbf: START + 61, iat: START + 61, ..claims(&fixture) });
    assert_eq!(fixture.rejection(&early).await, Rejection::NotYet);
    fixture.clock.advance(Duration::from_secs(1));
    fixture.identity.verify(&early).await.unwrap();
    let token = signed(&claims(&fixture));
    fixture.clock.advance(Duration::from_secs(HOUR - 2));
    fixture.identity.verify(&token).await.unwrap();
    fixture.clock.advance(Duration::from_secs(1));
    // Twice: the first time from the cache, the second time anew.
    assert_eq!(fixture.rejection(&token).await, Rejection::Expired);
    assert_eq!(fixture.rejection(&token).await, Rejection::Expired);
}

#[tokio::test]
async fn a_token_for_something_else_is_refused() {
    let fixture = Fixture::new().await;
    let refused = async |change: fn(&mut RawClaims)| {
        let mut claims = claims(&fixture);
        change(&mut claims);
        fixture.rejection(&signed(&claims)).await
    };
    assert_eq!(refused(|claims| claims.iss = "urn:ensign:other".into()).await, Rejection::WrongIssuer);
    assert_eq!(refused(|claims| claims.aud = vec!["https://example.com".into()]).await, Rejection::WrongAudience);
    assert_eq!(refused(|claims| claims.aud = Vec::new()).await, Rejection::WrongAudience);
    assert_eq!(refused(|claims| claims.permissions = None).await, Rejection::Malformed);
    assert_eq!(refused(|claims| claims.project = Some("mine".into())).await, Rejection::Malformed);
    assert_eq!(refused(|claims| claims.sub = "01".repeat(13)).await, Rejection::Revoked);
}

#[tokio::test]
async fn a_token_of_another_cluster_is_refused() {
    let (here, there) = (Fixture::new().await, Fixture::new().await);
    // The same signing key, by whatever accident: issuer and audience still name the other cluster.
    let other = IdentityConfig::new(ClusterId::from_bytes([8; 16]));
    let identity = there.restarted(IdentityConfig { hash: config().hash, ..other });
    let id = there.credentials.client_id.as_str();
    let pair = identity.authenticate(id, there.credentials.secret.expose().to_owned(), None, Instant::now()).await;
    assert_eq!(here.rejection(&pair.unwrap().access).await, Rejection::WrongIssuer);
    // And with a key of its own.
    let foreign = KeyPair::generate(KeySize::Rsa2048).unwrap();
    let der: aws_lc_rs::encoding::Pkcs8V1Der<'_> = aws_lc_rs::encoding::AsDer::as_der(&foreign).unwrap();
    let sign = |kid| Signer::from_pkcs8(kid, der.as_ref()).unwrap().sign(&claims(&here)).unwrap();
    assert_eq!(here.rejection(&sign([2; 16])).await, Rejection::UnknownKey);
    assert_eq!(here.rejection(&sign(KID)).await, Rejection::BadSignature);
}

#[tokio::test]
async fn every_altered_token_is_refused() {
    let fixture = Fixture::new().await;
    let token = fixture.login().await.unwrap().access;
    for place in 0..token.len() {
        let mut altered = token.clone().into_bytes();
        altered[place] = if altered[place] == b'A' { b'B' } else { b'A' };
        let altered = String::from_utf8(altered).unwrap();
        assert!(fixture.identity.verify(&altered).await.is_err(), "character {place}");
    }
    for end in 0..token.len() {
        assert!(fixture.identity.verify(&token[..end]).await.is_err(), "cut at {end}");
    }
    for garbage in ["", ".", "..", "a.b.c", "💥", &"x".repeat(100_000), &format!("{token}.x"), &format!(" {token}")] {
        assert_eq!(fixture.rejection(garbage).await, Rejection::Malformed);
    }
}

#[tokio::test]
async fn only_our_own_kind_of_header_is_believed() {
    let fixture = Fixture::new().await;
    let token = signed(&claims(&fixture));
    let (_, rest) = token.split_once('.').unwrap();
    for header in [
        json!({"alg": "none", "typ": "JWT", "kid": "01040G2081040G2081040G2081"}),
        json!({"alg": "HS256", "typ": "JWT", "kid": "01040G2081040G2081040G2081"}),
        json!({"alg": "RS512", "typ": "JWT", "kid": "01040G2081040G2081040G2081"}),
        json!({"alg": "RS256", "typ": "at+jwt", "kid": "01040G2081040G2081040G2081"}),
        json!({"alg": "RS256", "typ": "JWT", "kid": "01040G2081040G2081040G2081", "crit": ["b64"]}),
        json!({"alg": "RS256", "typ": "JWT", "kid": 7}),
        json!({"alg": "RS256", "typ": "JWT"}),
        json!(["RS256"]),
    ] {
        let forged = format!("{}.{rest}", URL_SAFE_NO_PAD.encode(header.to_string()));
        assert_eq!(fixture.rejection(&forged).await, Rejection::Malformed, "{header}");
    }
}

#[tokio::test]
async fn a_refresh_token_opens_the_refresh_call_and_nothing_else() {
    let fixture = Fixture::new().await;
    let pair = fixture.login().await.unwrap();
    assert_eq!(fixture.rejection(&pair.refresh).await, Rejection::WrongAudience);
    let refused = fixture.identity.refresh(&pair.refresh, Instant::now()).await;
    assert_eq!(refused, Err(LoginError::Refused), "before its time");
    fixture.clock.advance(Duration::from_secs(HOUR - 900));
    assert_eq!(fixture.rejection(&pair.refresh).await, Rejection::WrongAudience);
    let fresh = fixture.identity.refresh(&pair.refresh, Instant::now()).await.unwrap();
    assert_eq!(fresh.last_login, Some(START));
    assert_ne!(fresh.access, pair.access);
    fixture.identity.verify(&fresh.access).await.unwrap();
    fixture.pauses.take();
    for access in [&pair.access, &fresh.access] {
        assert_eq!(fixture.identity.refresh(access, Instant::now()).await, Err(LoginError::Refused));
    }
    assert_eq!(fixture.pauses.take(), [DELAY; 2], "as late as a failed login");
    fixture.clock.advance(Duration::from_secs(2 * HOUR));
    assert_eq!(fixture.identity.refresh(&pair.refresh, Instant::now()).await, Err(LoginError::Refused), "expired");
}

#[tokio::test]
async fn revoking_a_key_ends_its_tokens_at_once() {
    let fixture = Fixture::new().await;
    let pair = fixture.login().await.unwrap();
    let claims = fixture.identity.verify(&pair.access).await.unwrap();
    assert!(fixture.identity.is_live(&claims));
    let changes = fixture.catalog.changes();
    fixture.identity.revoke_api_key(fixture.key.id).await.unwrap();
    assert!(changes.has_changed().unwrap(), "open streams are woken");
    assert!(!fixture.identity.is_live(&claims));
    assert_eq!(fixture.rejection(&pair.access).await, Rejection::Revoked);
    assert_eq!(fixture.rejection(&pair.access).await, Rejection::Revoked);
    fixture.clock.advance(Duration::from_secs(HOUR - 900));
    assert_eq!(fixture.identity.refresh(&pair.refresh, Instant::now()).await, Err(LoginError::Refused));
    // Only its own.
    let (_, other) = fixture.identity.create_api_key(other_key(&fixture)).await.unwrap();
    fixture.login_with(other.client_id.as_str(), other.secret.expose()).await.unwrap();
}

#[tokio::test]
async fn an_old_signing_key_is_replaced_without_voiding_a_token() {
    let fixture = Fixture::new().await;
    let rotate = async || {
        let (store, clock, rng) = (&*fixture.secrets, &*fixture.clock, &SeededRng::new(4));
        let longest = config().refresh_ttl;
        crate::identity::signing::rotate_if_due(&fixture.catalog, store, clock, rng, longest).await.unwrap();
    };
    let kid = |token: &str| jsonwebtoken::decode_header(token).unwrap().kid.unwrap();
    let published = || fixture.identity.published_keys().len();
    rotate().await;
    assert_eq!(published(), 1, "young");
    fixture.clock.advance(Duration::from_secs(30 * 24 * HOUR));
    rotate().await;
    assert_eq!(published(), 2, "published ahead");
    let before = fixture.login().await.unwrap();
    assert_eq!(kid(&before.access), ulid::Ulid::from_bytes(KID).to_string());
    fixture.clock.advance(Duration::from_mins(10));
    rotate().await;
    let after = fixture.login().await.unwrap();
    assert_ne!(kid(&after.access), kid(&before.access));
    fixture.identity.verify(&before.access).await.unwrap();
    fixture.identity.verify(&after.access).await.unwrap();
    fixture.clock.advance(Duration::from_secs(2 * HOUR + 60));
    rotate().await;
    assert_eq!(published(), 1);
    assert_eq!(fixture.secrets.get(SecretKind::TokenSigning, KID).await, Ok(None), "nobody can sign with it again");
}

#[tokio::test]
async fn a_node_that_is_cut_off_stops_vouching_for_keys() {
    let clock = Arc::new(TestClock(Mutex::new(Duration::ZERO)));
    let (catalog, cut) = testing::cuttable(Arc::clone(&clock) as _, Arc::new(SeededRng::new(1)));
    let fixture = Fixture::with(clock, catalog).await;
    let access = fixture.login().await.unwrap().access;
    fixture.identity.verify(&access).await.unwrap();

    // From here on, a revocation elsewhere would not be heard of.
    cut.store(true, std::sync::atomic::Ordering::SeqCst);
    fixture.clock.advance(testing::FRESH_FOR * 9 / 10);
    fixture.identity.verify(&access).await.unwrap();
    fixture.clock.advance(testing::FRESH_FOR / 10);
    let refused = fixture.identity.verify(&access).await;
    assert!(matches!(refused, Err(AuthError::Unavailable { .. })), "{refused:?}");

    cut.store(false, std::sync::atomic::Ordering::SeqCst);
    // Who has just failed does not ask again at once.
    while let Err(error) = fixture.identity.verify(&access).await {
        assert!(matches!(error, AuthError::Unavailable { .. }), "{error:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
