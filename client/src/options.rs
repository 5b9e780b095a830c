//! Where a cluster is, and how to talk to it.

use std::path::PathBuf;
use std::time::Duration;

use crate::credentials::{Credentials, CredentialsFile};

/// Which of several addresses a client uses first. It stays there until it cannot be reached, then goes on to the next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum BeginWith {
    /// Any of them, so that clients with the same list do not all use the same node.
    #[default]
    Any,
    /// The first of the list: the nearest, say.
    First,
}

/// Everything [`crate::Client::connect`] needs to know.
#[derive(Debug)]
pub struct Options {
    /// gRPC addresses, each `host:port`. Any node serves any call; the others are tried when one cannot be reached.
    pub endpoints: Vec<String>,
    /// HTTP addresses for logging in, each a URL.
    pub auth_urls: Vec<String>,
    /// Where to begin in each of the two lists.
    pub begin_with: BeginWith,
    /// Whether gRPC goes without TLS. The scheme of an `auth_url` decides for logging in.
    pub insecure: bool,
    /// A PEM file of certificate authorities to trust besides those of the operating system.
    pub ca_file: Option<PathBuf>,
    /// Who we are.
    pub credentials: Credentials,
    /// What the server is told about us, on every stream.
    pub client_id: String,
    /// How long one call (not a stream) may take, retries included.
    pub call_timeout: Duration,
    /// How long one attempt to connect, or to log in, may take.
    pub connect_timeout: Duration,
}

impl Options {
    /// The port that `ensign` serves gRPC on.
    pub const DEFAULT_ENDPOINT: &str = "localhost:5356";
    /// The address that `ensign` answers logins on.
    pub const DEFAULT_AUTH_URL: &str = "http://localhost:8088";

    /// Options for a cluster on this machine without TLS, which is what `ensign dev` starts.
    pub fn new(credentials: Credentials) -> Self {
        Self {
            endpoints: vec![Self::DEFAULT_ENDPOINT.to_owned()],
            auth_urls: vec![Self::DEFAULT_AUTH_URL.to_owned()],
            begin_with: BeginWith::default(),
            insecure: true,
            ca_file: None,
            credentials,
            client_id: concat!("ensign-rust/", env!("CARGO_PKG_VERSION")).to_owned(),
            call_timeout: Duration::from_secs(30),
            connect_timeout: Duration::from_secs(5),
        }
    }

    /// The options that a credentials file describes, for the project's key and, where there is one, the administrator's.
    ///
    /// TLS is expected unless the file says otherwise or names no endpoint, which means a cluster on this machine.
    pub fn from_file(file: CredentialsFile) -> (Self, Option<Self>) {
        let admin = file.admin.map(Self::new);
        let mut options = Self::new(file.credentials);
        options.insecure = file.insecure.unwrap_or(file.endpoint.is_none());
        options.ca_file = file.ca_file;
        if let Some(endpoint) = file.endpoint {
            options.endpoints = split(&endpoint);
        }
        if let Some(url) = file.auth_url {
            options.auth_urls = split(&url);
        }
        let admin = admin.map(|admin| Self {
            endpoints: options.endpoints.clone(),
            auth_urls: options.auth_urls.clone(),
            insecure: options.insecure,
            ca_file: options.ca_file.clone(),
            ..admin
        });
        (options, admin)
    }

    /// Replaces the gRPC addresses; `list` may hold several, separated by commas.
    pub fn set_endpoints(&mut self, list: &str) {
        self.endpoints = split(list);
    }

    /// Replaces the login addresses; `list` may hold several, separated by commas.
    pub fn set_auth_urls(&mut self, list: &str) {
        self.auth_urls = split(list);
    }
}

fn split(list: &str) -> Vec<String> {
    list.split(',').map(str::trim).filter(|part| !part.is_empty()).map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(endpoint: Option<&str>, insecure: Option<bool>) -> CredentialsFile {
        CredentialsFile {
            credentials: Credentials::new("a", "b"),
            endpoint: endpoint.map(str::to_owned),
            auth_url: None,
            insecure,
            ca_file: None,
            admin: Some(Credentials::new("c", "d")),
        }
    }

    #[test]
    fn a_remote_cluster_is_reached_over_tls_unless_the_file_says_otherwise() {
        assert!(!Options::from_file(file(Some("ensign.example:443"), None)).0.insecure);
        assert!(Options::from_file(file(Some("ensign.example:443"), Some(true))).0.insecure);
        assert!(Options::from_file(file(None, None)).0.insecure);
    }

    #[test]
    fn the_administrator_reaches_the_same_nodes() {
        let (options, admin) = Options::from_file(file(Some("a:1, b:2,"), Some(true)));
        let admin = admin.unwrap();
        assert_eq!(options.endpoints, ["a:1", "b:2"]);
        assert_eq!(admin.endpoints, options.endpoints);
        assert_eq!(admin.credentials.client_id(), "c");
    }
}
