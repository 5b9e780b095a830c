//! Tokens and single calls.

mod support;

use std::time::Duration;

use ensign_client::{AuthError, CallError, Client, Credentials};
use support::Server;

#[tokio::test]
async fn many_calls_at_once_log_in_once() {
    let server = Server::start().await;
    let client = server.client();
    let calls = (0..20).map(|_| client.status());
    for state in futures::future::join_all(calls).await {
        assert_eq!(state.unwrap().version, "fake");
    }
    assert_eq!(server.state().logins.len(), 1);
}

#[tokio::test]
async fn a_token_is_refreshed_before_it_ends() {
    let server = Server::start().await;
    server.state().token_life = 2;
    let client = server.client();
    client.status().await.unwrap();
    // Past four fifths of its life, not past its end.
    tokio::time::sleep(Duration::from_millis(1_700)).await;
    client.status().await.unwrap();
    let logins = server.state().logins.clone();
    assert_eq!(logins.len(), 2);
    assert!(logins[1].contains("refresh_token") && !logins[1].contains("secret"), "{}", logins[1]);
}

#[tokio::test]
async fn an_old_token_serves_while_the_login_service_is_away() {
    let server = Server::start().await;
    server.state().token_life = 6;
    let client = server.client();
    client.status().await.unwrap();
    // Past four fifths of its life; 1.1 s are left, and trying to renew it takes less.
    tokio::time::sleep(Duration::from_millis(4_900)).await;
    server.state().login_failures.extend(["503 Service Unavailable"; 20]);
    client.status().await.unwrap();
    assert!(server.state().logins.len() > 1, "no renewal was tried");
}

#[tokio::test]
async fn a_token_that_the_server_rejects_is_replaced_once() {
    let server = Server::start().await;
    let client = server.client();
    client.status().await.unwrap();
    {
        let mut state = server.state();
        state.rejected = state.seen.clone();
    }
    client.status().await.unwrap();
    assert_eq!(server.state().logins.len(), 2);
    // And if the fresh one is no better, that is the answer.
    {
        let mut state = server.state();
        state.rejected = state.seen.clone();
        state.login_failures.push_back("403 Forbidden");
    }
    assert!(matches!(client.status().await, Err(CallError::Auth(AuthError::Refused { .. }))));
}

#[tokio::test]
async fn a_login_service_that_comes_back_is_waited_for() {
    let server = Server::start().await;
    server.state().login_failures.extend(["503 Service Unavailable", "500 Internal Server Error"]);
    server.client().log_in().await.unwrap();
    assert_eq!(server.state().logins.len(), 3);
}

#[tokio::test]
async fn a_refused_login_names_the_client_id_and_never_the_secret() {
    let server = Server::start().await;
    let mut options = server.options();
    options.credentials = Credentials::new("my-id", "my-secret");
    let error = Client::connect(options).unwrap().log_in().await.unwrap_err();
    assert!(matches!(error, AuthError::Refused { .. }));
    assert!(error.to_string().contains("my-id") && !error.to_string().contains("my-secret"));
}

#[tokio::test]
async fn a_call_that_reads_is_repeated_until_it_works() {
    let server = Server::start().await;
    server.state().unavailable = 3;
    server.client().status().await.unwrap();
}

#[tokio::test]
async fn a_call_that_writes_is_not_repeated_when_its_outcome_is_unknown() {
    let server = Server::start().await;
    let error = server.client().create_topic("x").await.unwrap_err();
    assert!(matches!(error, CallError::OutcomeUnknown { .. }), "{error}");
    assert_eq!(server.state().arrived, 1);
}

#[tokio::test]
async fn a_call_that_reads_has_no_outcome_that_nobody_knows() {
    let server = Server::start().await;
    let error = server.client().topic_exists("x").await.unwrap_err();
    assert!(matches!(error, CallError::Unavailable { .. }), "{error}");
}

#[tokio::test]
async fn every_page_is_read() {
    let server = Server::start().await;
    let names: Vec<_> = server.client().topics().await.unwrap().into_iter().map(|topic| topic.name).collect();
    assert_eq!(names, ["topic-0", "topic-1", "topic-2"]);
    assert!(matches!(server.client().find_topic("nope").await, Err(CallError::NotFound { .. })));
}

#[tokio::test]
async fn a_server_that_is_not_there_is_unavailable_in_time() {
    let server = Server::start().await;
    let mut options = server.options();
    options.endpoints = vec!["127.0.0.1:1".to_owned()];
    options.call_timeout = Duration::from_millis(300);
    let error = Client::connect(options).unwrap().status().await.unwrap_err();
    assert!(matches!(error, CallError::Unavailable { .. }), "{error}");
}

#[tokio::test]
async fn a_server_without_tls_is_told_from_one_that_is_away() {
    let server = Server::start().await;
    let mut options = server.options();
    options.insecure = false;
    // Asking again would be of no use, and would take longer than this test.
    options.call_timeout = Duration::from_mins(10);
    let client = Client::connect(options).unwrap();
    let outcome = tokio::time::timeout(Duration::from_secs(20), client.status()).await.expect("it does not ask again");
    let error = outcome.unwrap_err();
    assert!(matches!(&error, CallError::Unavailable { message } if message.contains("speaks no TLS")), "{error}");
}
