//! Who gets tokens, when, and what a failure tells.

use std::net::IpAddr;

use super::super::service::lock;
use super::*;

#[tokio::test]
async fn every_failed_login_says_the_same_after_the_same_time() {
    let fixture = Fixture::new().await;
    let (id, secret) = (fixture.credentials.client_id.as_str(), fixture.credentials.secret.expose());
    let unknown = "x".repeat(32);
    let revoked = {
        let (key, credentials) = fixture.identity.create_api_key(other_key(&fixture)).await.unwrap();
        fixture.identity.revoke_api_key(key.id).await.unwrap();
        credentials
    };
    let cases = [
        ("wrong secret", id, wrong_secret()),
        ("unknown id", &unknown, secret.to_owned()),
        ("revoked", revoked.client_id.as_str(), revoked.secret.expose().to_owned()),
        ("no id at all", "\u{1F511}", secret.to_owned()),
        ("no secret at all", id, "short".to_owned()),
        ("an enormous id", &"x".repeat(60_000), secret.to_owned()),
    ];
    for (what, id, secret) in cases {
        assert_eq!(fixture.login_with(id, &secret).await, Err(LoginError::Refused), "{what}");
        assert_eq!(fixture.pauses.take(), [DELAY], "{what}");
    }
}

#[tokio::test]
async fn the_delay_counts_from_the_arrival_and_covers_the_hashing() {
    let fixture = Fixture::new().await;
    let id = fixture.credentials.client_id.as_str();
    let refused = async |id: &str, ago: Duration| {
        let arrived = Instant::now().checked_sub(ago).unwrap();
        assert_eq!(fixture.identity.authenticate(id, wrong_secret(), None, arrived).await, Err(LoginError::Refused));
        fixture.pauses.take()
    };
    assert_eq!(refused(id, Duration::from_mins(30)).await, [DELAY]);
    // Whoever is too late for that answers at the next beat, so that lateness says nothing either.
    assert_eq!(refused(&"x".repeat(32), Duration::from_mins(70)).await, [DELAY * 2]);
}

#[tokio::test]
async fn nothing_is_hashed_for_an_id_that_could_not_log_in() {
    let fixture = Fixture::new().await;
    fixture.login().await.unwrap();
    fixture.identity.revoke_api_key(fixture.key.id).await.unwrap();
    let before = fixture.secrets.reads();
    assert_eq!(fixture.login().await, Err(LoginError::Refused));
    assert_eq!(fixture.login_with(&"x".repeat(32), &wrong_secret()).await, Err(LoginError::Refused));
    // The hash lies in the vault: what was not fetched was not computed.
    assert_eq!(fixture.secrets.reads(), before);
}

#[tokio::test]
async fn a_secret_that_was_right_is_remembered_until_its_key_is_revoked() {
    let fixture = Fixture::new().await;
    fixture.login().await.unwrap();
    let before = fixture.secrets.reads();
    for _ in 0..100 {
        fixture.login().await.unwrap();
    }
    assert_eq!(fixture.secrets.reads(), before);
    assert_eq!(
        fixture.login_with(fixture.credentials.client_id.as_str(), &wrong_secret()).await,
        Err(LoginError::Refused)
    );
    fixture.identity.revoke_api_key(fixture.key.id).await.unwrap();
    assert_eq!(fixture.login().await, Err(LoginError::Refused));
}

#[tokio::test]
async fn a_client_id_that_fails_too_often_must_wait_but_its_known_secret_passes() {
    let fixture = Fixture::new().await;
    fixture.login().await.unwrap();
    let id = fixture.credentials.client_id.as_str();
    for _ in 0..20 {
        assert_eq!(fixture.login_with(id, &wrong_secret()).await, Err(LoginError::Refused));
    }
    let busy = Err(LoginError::Busy { retry_after: Duration::from_secs(3) });
    assert_eq!(fixture.login_with(id, &wrong_secret()).await, busy);
    fixture.login().await.unwrap();
    fixture.clock.advance(Duration::from_secs(3));
    assert_eq!(fixture.login_with(id, &wrong_secret()).await, Err(LoginError::Refused));
}

#[tokio::test]
async fn knowing_an_id_does_not_lock_its_owner_out() {
    let fixture = Fixture::new().await;
    let id = fixture.credentials.client_id.as_str();
    let from = |last: u8| Some(IpAddr::from([192, 0, 2, last]));
    let login = |secret: String, from| fixture.identity.authenticate(id, secret, from, Instant::now());
    for _ in 0..20 {
        assert_eq!(login(wrong_secret(), from(1)).await, Err(LoginError::Refused));
    }
    assert!(matches!(login(wrong_secret(), from(1)).await, Err(LoginError::Busy { .. })));
    // Elsewhere the owner logs in, for the first time on this node.
    login(fixture.credentials.secret.expose().to_owned(), from(2)).await.unwrap();
}

#[tokio::test]
async fn a_key_that_logs_in_without_end_has_to_wait() {
    let fixture = Fixture::new().await;
    let pair = fixture.login().await.unwrap();
    let now = fixture.clock.boot();
    while lock(&fixture.identity.inner.limits).issue(*fixture.key.id.as_bytes(), now).is_ok() {}
    assert!(matches!(fixture.login().await, Err(LoginError::Busy { .. })));
    // What it has stays good.
    fixture.identity.verify(&pair.access).await.unwrap();
    fixture.clock.advance(Duration::from_millis(50));
    fixture.login().await.unwrap();
    assert!(matches!(fixture.login().await, Err(LoginError::Busy { .. })));
}

#[tokio::test]
async fn without_the_vault_nobody_learns_which_ids_exist() {
    let fixture = Fixture::new().await;
    let id = fixture.credentials.client_id.as_str();
    fixture.secrets.set_down(true);
    // Whoever comes first: nobody has noticed yet that it is down.
    let unknown = fixture.login_with(&"x".repeat(32), &wrong_secret()).await;
    assert_eq!(unknown, Err(LoginError::Unavailable));
    fixture.secrets.set_down(false);
    fixture.clock.advance(Duration::from_secs(2));
    assert_eq!(fixture.login_with(&"x".repeat(32), &wrong_secret()).await, Err(LoginError::Refused));
    fixture.secrets.set_down(true);
    assert_eq!(fixture.login().await, Err(LoginError::Unavailable));
    for pause in [Duration::ZERO, Duration::from_secs(2)] {
        fixture.clock.advance(pause);
        assert_eq!(fixture.login_with(&"x".repeat(32), &wrong_secret()).await, Err(LoginError::Unavailable));
        assert_eq!(fixture.login_with(id, &wrong_secret()).await, Err(LoginError::Unavailable));
    }
    fixture.secrets.set_down(false);
    fixture.clock.advance(Duration::from_secs(2));
    assert_eq!(fixture.login_with(&"x".repeat(32), &wrong_secret()).await, Err(LoginError::Refused));
    fixture.login().await.unwrap();
}

#[tokio::test]
async fn whoever_logged_in_lately_gets_tokens_without_the_vault() {
    let fixture = Fixture::new().await;
    fixture.login().await.unwrap();
    fixture.secrets.set_down(true);
    let pair = fixture.login().await.unwrap();
    assert_eq!(fixture.identity.verify(&pair.access).await.unwrap().subject, fixture.key.id);
}

#[tokio::test]
async fn a_key_whose_hash_is_lost_cannot_log_in() {
    let fixture = Fixture::new().await;
    fixture.secrets.delete(SecretKind::ApiKey, *fixture.key.id.as_bytes()).await.unwrap();
    assert_eq!(fixture.login().await, Err(LoginError::Refused));
}

#[tokio::test]
async fn doing_the_bootstrap_again_changes_nothing() {
    let fixture = Fixture::new().await;
    fixture.identity.ensure_signing_key().await.unwrap();
    assert_eq!(fixture.catalog.signing_keys().len(), 1);
    assert_eq!(fixture.identity.ensure_organization("Example").await.unwrap(), fixture.org);
    assert_eq!(fixture.identity.ensure_project(fixture.org.id, "first").await.unwrap(), fixture.project);
    let again = fixture.identity.ensure_api_key(other_key(&fixture), &fixture.credentials).await.unwrap();
    assert_eq!(again, fixture.key);
    fixture.identity.revoke_api_key(fixture.key.id).await.unwrap();
    let refused = fixture.identity.ensure_api_key(other_key(&fixture), &fixture.credentials).await;
    assert!(matches!(refused, Err(BootstrapError::Revoked { .. })));
}

#[tokio::test]
async fn a_key_gets_only_what_such_a_key_may_have() {
    let fixture = Fixture::new().await;
    let made = async |change: fn(&mut NewApiKey)| {
        let mut new = other_key(&fixture);
        change(&mut new);
        fixture.identity.create_api_key(new).await.map(|(key, _)| key.permissions)
    };
    assert_eq!(made(|new| new.permissions = operator_permissions()).await, Err(CreateKeyError::Permissions));
    assert_eq!(made(|new| new.permissions = PermissionSet::EMPTY).await, Err(CreateKeyError::Permissions));
    assert_eq!(made(|new| new.project = None).await, Err(CreateKeyError::NoProject));
    assert_eq!(made(|new| new.name = "  ".to_owned()).await, Err(CreateKeyError::Name));
    assert_eq!(made(|new| new.name = "n".repeat(201)).await, Err(CreateKeyError::Name));
    let operator = made(|new| (new.admin, new.project, new.permissions) = (true, None, operator_permissions())).await;
    assert_eq!(operator, Ok(operator_permissions()));
}

pub(super) fn other_key(fixture: &Fixture) -> NewApiKey {
    NewApiKey {
        name: "another key".to_owned(),
        org: fixture.org.id,
        project: Some(fixture.project.id),
        permissions: PermissionSet::api_key(),
        admin: false,
        ring: None,
    }
}
