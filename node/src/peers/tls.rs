//! Certificates between nodes: who may speak, and as whom.

use std::path::{Path, PathBuf};

use ensign_proto::NodeId;
use thiserror::Error;
use tonic::transport::{Certificate, ClientTlsConfig, Identity, ServerTlsConfig};
use x509_parser::prelude::{FromDer as _, GeneralName, X509Certificate};

/// The name that a node's certificate must carry.
pub fn node_name(node: NodeId) -> String {
    format!("ensign-node-{node}")
}

/// This node's certificate and key, and the authority that signs every node's.
#[derive(Clone)]
pub struct PeerTls {
    certificate: Vec<u8>,
    private_key: Vec<u8>,
    authority: Vec<u8>,
}

impl std::fmt::Debug for PeerTls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("PeerTls")
    }
}

/// Why certificates cannot be used.
#[derive(Debug, Error)]
pub enum TlsError {
    /// A file cannot be read.
    #[error("cannot read {what} {path}: {source}")]
    Unreadable {
        /// Which of the three.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file holds something else.
    #[error("{what} {path} is not what it should be: {message}")]
    Malformed {
        /// Which of the three.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What is wrong.
        message: String,
    },
    /// The certificate belongs to another node.
    #[error("the certificate {path} names {found}, not {expected}: give this node its own certificate, or set node.id")]
    WrongNode {
        /// The file.
        path: PathBuf,
        /// The name it should carry.
        expected: String,
        /// The names it carries.
        found: String,
    },
}

impl PeerTls {
    /// From PEM text.
    pub fn from_pem(
        certificate: impl Into<Vec<u8>>,
        private_key: impl Into<Vec<u8>>,
        authority: impl Into<Vec<u8>>,
    ) -> Self {
        Self { certificate: certificate.into(), private_key: private_key.into(), authority: authority.into() }
    }

    /// From three PEM files; the certificate must name `node`.
    ///
    /// # Errors
    /// [`TlsError`]: a file is missing or malformed, or the certificate is another node's.
    pub fn load(node: NodeId, certificate: &Path, private_key: &Path, authority: &Path) -> Result<Self, TlsError> {
        let read = |what: &'static str, path: &Path| {
            std::fs::read(path).map_err(|source| TlsError::Unreadable { what, path: path.to_owned(), source })
        };
        let tls = Self {
            certificate: read("the node's certificate", certificate)?,
            private_key: read("the node's private key", private_key)?,
            authority: read("the cluster's certificate authority", authority)?,
        };
        let malformed = |what, path: &Path, message: &str| {
            Err(TlsError::Malformed { what, path: path.to_owned(), message: message.to_owned() })
        };
        let Some(der) = first_certificate(&tls.certificate) else {
            return malformed("the node's certificate", certificate, "no PEM certificate in it");
        };
        if first_certificate(&tls.authority).is_none() {
            return malformed("the cluster's certificate authority", authority, "no PEM certificate in it");
        }
        if rustls_pemfile::private_key(&mut tls.private_key.as_slice()).ok().flatten().is_none() {
            return malformed("the node's private key", private_key, "no PEM private key in it");
        }
        let names = names_of(&der);
        if !names.contains(&node_name(node)) {
            let found = if names.is_empty() { "nobody".to_owned() } else { names.join(", ") };
            return Err(TlsError::WrongNode { path: certificate.to_owned(), expected: node_name(node), found });
        }
        Ok(tls)
    }

    /// The server's side: peers must show a certificate of the authority.
    pub(super) fn server(&self) -> ServerTlsConfig {
        ServerTlsConfig::new()
            .identity(Identity::from_pem(&self.certificate, &self.private_key))
            .client_ca_root(Certificate::from_pem(&self.authority))
    }

    /// The client's side: the callee must be `peer`.
    pub(super) fn client(&self, peer: NodeId) -> ClientTlsConfig {
        ClientTlsConfig::new()
            .domain_name(node_name(peer))
            .identity(Identity::from_pem(&self.certificate, &self.private_key))
            .ca_certificate(Certificate::from_pem(&self.authority))
    }
}

/// The node that a peer's certificate names.
pub(super) fn node_of(certificate: &[u8]) -> Option<NodeId> {
    names_of(certificate).iter().find_map(|name| name.strip_prefix("ensign-node-")?.parse().ok().map(NodeId))
}

fn first_certificate(pem: &[u8]) -> Option<Vec<u8>> {
    rustls_pemfile::certs(&mut &*pem).next()?.ok().map(|der| der.to_vec())
}

/// The DNS names of a DER certificate.
fn names_of(certificate: &[u8]) -> Vec<String> {
    let Ok((_, parsed)) = X509Certificate::from_der(certificate) else { return Vec::new() };
    let Ok(Some(names)) = parsed.subject_alternative_name() else { return Vec::new() };
    names
        .value
        .general_names
        .iter()
        .filter_map(|name| match name {
            GeneralName::DNSName(name) => Some((*name).to_owned()),
            _ => None,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(dir: &Path, name: &str, text: &str) -> PathBuf {
        let path = dir.join(name);
        std::fs::write(&path, text).unwrap();
        path
    }

    #[test]
    fn a_certificate_must_name_the_node() {
        let dir = tempfile::tempdir().unwrap();
        let authority = crate::authority::Authority::generate("test").unwrap();
        let issued = authority.issue(NodeId(2)).unwrap();
        let certificate = write(dir.path(), "node.pem", &issued.certificate);
        let key = write(dir.path(), "node.key", &issued.private_key);
        let ca = write(dir.path(), "ca.pem", authority.certificate());

        PeerTls::load(NodeId(2), &certificate, &key, &ca).unwrap();
        let error = PeerTls::load(NodeId(3), &certificate, &key, &ca).unwrap_err().to_string();
        assert!(error.contains("names ensign-node-2, localhost, not ensign-node-3"), "{error}");
        let error = PeerTls::load(NodeId(2), &key, &key, &ca).unwrap_err().to_string();
        assert!(error.contains("no PEM certificate in it"), "{error}");
        let error = PeerTls::load(NodeId(2), &certificate, &ca, &ca).unwrap_err().to_string();
        assert!(error.contains("no PEM private key in it"), "{error}");
        let error = PeerTls::load(NodeId(2), &dir.path().join("absent"), &key, &ca).unwrap_err().to_string();
        assert!(error.starts_with("cannot read the node's certificate"), "{error}");
    }
}
