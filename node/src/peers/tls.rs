//! Certificates between nodes: who may speak, and as whom.
//!
//! Every connection uses the certificate of the moment: after [`PeerTls::replace`] connections that are open live on, and the next
//! handshake, in either direction, is made with the new one.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use arc_swap::ArcSwap;
use ensign_proto::NodeId;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use thiserror::Error;
use x509_parser::prelude::{FromDer as _, GeneralName, X509Certificate};

const H2: &[u8] = b"h2";
const CERTIFICATE: &str = "the node's certificate";
const KEY: &str = "the node's private key";
const AUTHORITY: &str = "the cluster's certificate authority";

/// The name that a node's certificate must carry.
pub fn node_name(node: NodeId) -> String {
    format!("ensign-node-{node}")
}

/// This node's certificate and key, and the authority that signs every node's. Clones share them, and what replaces them.
#[derive(Clone)]
pub struct PeerTls {
    now: Arc<ArcSwap<Material>>,
}

/// Both sides of a handshake, ready for use.
struct Material {
    client: Arc<ClientConfig>,
    server: Arc<ServerConfig>,
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
    /// The three do not fit together.
    #[error("the certificates of this node cannot be used: {0}")]
    Unusable(String),
}

/// Three PEM texts.
struct Pem<'a> {
    certificate: &'a [u8],
    private_key: &'a [u8],
    authority: &'a [u8],
}

impl PeerTls {
    /// From PEM text.
    ///
    /// # Errors
    /// [`TlsError`]: one of the three is malformed, or the key is another certificate's.
    pub fn from_pem(
        certificate: impl AsRef<[u8]>,
        private_key: impl AsRef<[u8]>,
        authority: impl AsRef<[u8]>,
    ) -> Result<Self, TlsError> {
        let (certificate, private_key) = (certificate.as_ref(), private_key.as_ref());
        let pem = Pem { certificate, private_key, authority: authority.as_ref() };
        let none = Path::new("(from memory)");
        let material = Material::of(&pem, [none; 3])?;
        Ok(Self { now: Arc::new(ArcSwap::from_pointee(material)) })
    }

    /// From three PEM files; the certificate must name `node`.
    ///
    /// # Errors
    /// [`TlsError`]: a file is missing or malformed, they do not fit together, or the certificate is another node's.
    pub fn load(node: NodeId, certificate: &Path, private_key: &Path, authority: &Path) -> Result<Self, TlsError> {
        let read = |what: &'static str, path: &Path| {
            std::fs::read(path).map_err(|source| TlsError::Unreadable { what, path: path.to_owned(), source })
        };
        let leaf = read(CERTIFICATE, certificate)?;
        let key = zeroize::Zeroizing::new(read(KEY, private_key)?);
        let roots = read(AUTHORITY, authority)?;
        let pem = Pem { certificate: &leaf, private_key: &key, authority: &roots };
        let material = Material::of(&pem, [certificate, private_key, authority])?;
        let names = first_certificate(&leaf).map(|der| names_of(&der)).unwrap_or_default();
        if !names.contains(&node_name(node)) {
            let found = if names.is_empty() { "nobody".to_owned() } else { names.join(", ") };
            return Err(TlsError::WrongNode { path: certificate.to_owned(), expected: node_name(node), found });
        }
        Ok(Self { now: Arc::new(ArcSwap::from_pointee(material)) })
    }

    /// The server's side: peers must show a certificate of the authority.
    pub(super) fn server(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.now.load().server)
    }

    /// The client's side; the callee must be named as [`server_name`] says.
    pub(super) fn client(&self) -> Arc<ClientConfig> {
        Arc::clone(&self.now.load().client)
    }
}

impl Material {
    fn of(pem: &Pem<'_>, [certificate, private_key, authority]: [&Path; 3]) -> Result<Self, TlsError> {
        let malformed = |what, path: &Path, message: &str| TlsError::Malformed {
            what,
            path: path.to_owned(),
            message: message.to_owned(),
        };
        let chain = certificates(pem.certificate).filter(|chain| !chain.is_empty());
        let chain = chain.ok_or_else(|| malformed(CERTIFICATE, certificate, "no PEM certificate in it"))?;
        let authorities = certificates(pem.authority).filter(|roots| !roots.is_empty());
        let authorities = authorities.ok_or_else(|| malformed(AUTHORITY, authority, "no PEM certificate in it"))?;
        let key = PrivateKeyDer::from_pem_slice(pem.private_key)
            .map_err(|_| malformed(KEY, private_key, "no PEM private key in it"))?;
        let mut roots = RootCertStore::empty();
        for root in authorities {
            roots.add(root).map_err(|error| malformed(AUTHORITY, authority, &error.to_string()))?;
        }
        let unusable = |error: &dyn std::error::Error| TlsError::Unusable(error.to_string());
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let roots = Arc::new(roots);
        let versions = [&rustls::version::TLS13];
        let mut client = ClientConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(&versions)
            .map_err(|error| unusable(&error))?
            .with_root_certificates(Arc::clone(&roots))
            .with_client_auth_cert(chain.clone(), key.clone_key())
            .map_err(|error| unusable(&error))?;
        client.alpn_protocols = vec![H2.to_vec()];
        // What was proven in an earlier handshake may have been revoked since: every connection shows its certificate anew.
        client.resumption = rustls::client::Resumption::disabled();
        let verifier = WebPkiClientVerifier::builder_with_provider(roots, Arc::clone(&provider))
            .build()
            .map_err(|error| unusable(&error))?;
        let mut server = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&versions)
            .map_err(|error| unusable(&error))?
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain, key)
            .map_err(|error| unusable(&error))?;
        server.alpn_protocols = vec![H2.to_vec()];
        server.send_tls13_tickets = 0;
        Ok(Self { client: Arc::new(client), server: Arc::new(server) })
    }
}

/// The name that the callee's certificate must carry.
pub(super) fn server_name(node: NodeId) -> ServerName<'static> {
    // Letters, digits and hyphens, well below 64 of them: always a DNS name.
    ServerName::try_from(node_name(node)).expect("a node's name is a DNS name")
}

/// The node that a peer's certificate names.
pub(super) fn node_of(certificate: &[u8]) -> Option<NodeId> {
    names_of(certificate).iter().find_map(|name| name.strip_prefix("ensign-node-")?.parse().ok().map(NodeId))
}

fn certificates(pem: &[u8]) -> Option<Vec<CertificateDer<'static>>> {
    CertificateDer::pem_slice_iter(pem).collect::<Result<_, _>>().ok()
}

fn first_certificate(pem: &[u8]) -> Option<CertificateDer<'static>> {
    certificates(pem)?.into_iter().next()
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
        let other = write(dir.path(), "other.key", &authority.issue(NodeId(2)).unwrap().private_key);
        let error = PeerTls::load(NodeId(2), &certificate, &other, &ca).unwrap_err().to_string();
        assert!(error.contains("cannot be used") && error.contains("eys"), "{error}");
        let error = PeerTls::load(NodeId(2), &certificate, &ca, &ca).unwrap_err().to_string();
        assert!(error.contains("no PEM private key in it"), "{error}");
        let error = PeerTls::load(NodeId(2), &dir.path().join("absent"), &key, &ca).unwrap_err().to_string();
        assert!(error.starts_with("cannot read the node's certificate"), "{error}");
    }
}
