//! Credentials: what an API key's holder logs in with, and the file that carries it.
//!
//! The file is JSON: `{"ClientID": "…", "ClientSecret": "…"}`, as every Ensign SDK reads it. Ours may also say where the
//! cluster is (`endpoint`, `auth_url`, `insecure`, `ca_file`) and carry an administrator's key (`admin`); SDKs ignore those.

use std::fmt;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use thiserror::Error;
use zeroize::Zeroizing;

/// A client id and its secret. Prints the id only; the secret is wiped from memory on drop.
#[derive(Deserialize)]
pub struct Credentials {
    #[serde(rename = "ClientID")]
    client_id: String,
    #[serde(rename = "ClientSecret", deserialize_with = "secret")]
    client_secret: Zeroizing<String>,
}

fn secret<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Zeroizing<String>, D::Error> {
    String::deserialize(deserializer).map(Zeroizing::new)
}

impl Credentials {
    /// The credentials of an API key.
    pub fn new(client_id: impl Into<String>, client_secret: impl Into<String>) -> Self {
        Self { client_id: client_id.into(), client_secret: Zeroizing::new(client_secret.into()) }
    }

    /// The public half.
    pub fn client_id(&self) -> &str {
        &self.client_id
    }

    pub(crate) fn client_secret(&self) -> &str {
        &self.client_secret
    }
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials").field("client_id", &self.client_id).finish_non_exhaustive()
    }
}

/// A credentials file, read.
#[derive(Debug)]
pub struct CredentialsFile {
    /// The project's key, which publishes, subscribes and queries.
    pub credentials: Credentials,
    /// Where the cluster's gRPC port is, `host:port`; several are separated by commas.
    pub endpoint: Option<String>,
    /// Where its HTTP port is, for example `http://localhost:8088`; several are separated by commas.
    pub auth_url: Option<String>,
    /// Whether gRPC goes without TLS.
    pub insecure: Option<bool>,
    /// A PEM file of certificate authorities to trust.
    pub ca_file: Option<PathBuf>,
    /// An administrator's key.
    pub admin: Option<Credentials>,
}

/// Why a credentials file is of no use.
#[derive(Debug, Error)]
pub enum CredentialsError {
    /// It cannot be read.
    #[error("cannot read the credentials file {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// It is not the JSON that it should be. The message never quotes the file's content.
    #[error(
        "the credentials file {path} is not valid (line {line}, column {column}): \
         expected {{\"ClientID\": \"…\", \"ClientSecret\": \"…\"}}"
    )]
    Malformed {
        /// The file.
        path: PathBuf,
        /// Where reading stopped, from 1.
        line: usize,
        /// Where reading stopped, from 1.
        column: usize,
    },
    /// A required value is empty.
    #[error("the credentials file {path} has an empty {field}")]
    Empty {
        /// The file.
        path: PathBuf,
        /// Its key in the JSON.
        field: &'static str,
    },
}

#[derive(Deserialize)]
struct Document {
    #[serde(flatten)]
    credentials: Credentials,
    endpoint: Option<String>,
    auth_url: Option<String>,
    insecure: Option<bool>,
    ca_file: Option<PathBuf>,
    admin: Option<Credentials>,
}

impl CredentialsFile {
    /// Reads a credentials file. A relative `ca_file` counts from the folder of the credentials file.
    ///
    /// # Errors
    /// [`CredentialsError`]; its text names the file and what is wrong, never what is inside.
    pub fn read(path: &Path) -> Result<Self, CredentialsError> {
        let text = std::fs::read_to_string(path)
            .map(Zeroizing::new)
            .map_err(|source| CredentialsError::Read { path: path.to_owned(), source })?;
        let document: Document = serde_json::from_str(&text).map_err(|error| CredentialsError::Malformed {
            path: path.to_owned(),
            line: error.line(),
            column: error.column(),
        })?;
        let keys = std::iter::once(&document.credentials).chain(&document.admin);
        for key in keys {
            let empty = |field| CredentialsError::Empty { path: path.to_owned(), field };
            if key.client_id().trim().is_empty() {
                return Err(empty("ClientID"));
            }
            if key.client_secret().trim().is_empty() {
                return Err(empty("ClientSecret"));
            }
        }
        let folder = path.parent().unwrap_or(Path::new("."));
        Ok(Self {
            credentials: document.credentials,
            endpoint: document.endpoint,
            auth_url: document.auth_url,
            insecure: document.insecure,
            ca_file: document.ca_file.map(|file| folder.join(file)),
            admin: document.admin,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<CredentialsFile, CredentialsError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key.json");
        std::fs::write(&path, text).unwrap();
        CredentialsFile::read(&path)
    }

    #[test]
    fn the_file_of_an_sdk_is_enough() {
        let file = read(r#"{"ClientID":"abc","ClientSecret":"def","other":1}"#).unwrap();
        assert_eq!(file.credentials.client_id(), "abc");
        assert_eq!(file.credentials.client_secret(), "def");
        assert!(file.endpoint.is_none() && file.admin.is_none());
    }

    #[test]
    fn our_file_says_where_the_cluster_is_and_who_administers_it() {
        let file = read(
            r#"{"ClientID":"a","ClientSecret":"b","endpoint":"localhost:5356","auth_url":"http://localhost:8088",
                "insecure":true,"ca_file":"ca.pem","admin":{"ClientID":"c","ClientSecret":"d"}}"#,
        )
        .unwrap();
        assert_eq!(file.endpoint.as_deref(), Some("localhost:5356"));
        assert_eq!(file.insecure, Some(true));
        assert!(file.ca_file.unwrap().is_absolute());
        assert_eq!(file.admin.unwrap().client_id(), "c");
    }

    #[test]
    fn a_bad_file_is_refused_without_quoting_it() {
        for text in ["", "{", r#"{"ClientID":"topsecret"}"#, r#"{"ClientID":1,"ClientSecret":"topsecret"}"#] {
            let error = read(text).unwrap_err();
            assert!(matches!(error, CredentialsError::Malformed { .. }), "{text}");
            assert!(!error.to_string().contains("topsecret"));
        }
        let error = read(r#"{"ClientID":"a","ClientSecret":" "}"#).unwrap_err();
        assert!(error.to_string().ends_with("has an empty ClientSecret"));
    }

    #[test]
    fn a_secret_is_never_printed() {
        let printed = format!("{:?}", Credentials::new("visible", "hidden"));
        assert!(printed.contains("visible") && !printed.contains("hidden"));
    }
}
