//! Certificates between nodes: who may speak, and as whom.
//!
//! Every connection uses the certificate of the moment: after [`PeerTls::replace`] connections that are open live on, and the next
//! handshake, in either direction, is made with the new one.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use arc_swap::ArcSwap;
use ensign_proto::{ClusterId, NodeId};
use ensign_raft::env::{Lane, UnixNanos};
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, ServerConfig, SignatureScheme};
use thiserror::Error;
use x509_parser::prelude::{FromDer as _, GeneralName, X509Certificate};

const H2: &[u8] = b"h2";
/// What a peer's control connection says that it is: it is HTTP/2 like the other one, and is served by threads of its own. A node that
/// does not know this name takes it for the other.
pub(super) const CONTROL_ALPN: &[u8] = b"ensign-control";
/// What a machine without a certificate says that it wants; it is given nothing else.
pub(crate) const JOIN_ALPN: &[u8] = b"ensign-join";
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
    control: Arc<ClientConfig>,
    server: Arc<ServerConfig>,
    /// For machines that have no certificate yet.
    join: Arc<ServerConfig>,
    /// What the node's own certificate says.
    own: Certified,
    expires: Option<UnixNanos>,
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
    /// The authority does not vouch for the certificate, whatever time it is.
    #[error(
        "the certificate {path} is not one that {authority} vouches for ({message}): peers would refuse it. Give this node a certificate of \
         the cluster's authority, good for servers and for clients, or correct cluster.authority"
    )]
    NotVouched {
        /// The certificate's file.
        path: PathBuf,
        /// The authority's file.
        authority: PathBuf,
        /// What is wrong.
        message: String,
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
        vouched(&leaf, &roots, node).map_err(|message| TlsError::NotVouched {
            path: certificate.to_owned(),
            authority: authority.to_owned(),
            message,
        })?;
        Ok(Self { now: Arc::new(ArcSwap::from_pointee(material)) })
    }

    /// When the certificate of the moment runs out.
    pub fn expires(&self) -> Option<UnixNanos> {
        self.now.load().expires
    }

    /// Takes over what the files hold now, for the next handshakes. On an error everything stays as it is.
    ///
    /// # Errors
    /// As [`PeerTls::load`].
    pub fn reload(
        &self,
        node: NodeId,
        certificate: &Path,
        private_key: &Path,
        authority: &Path,
    ) -> Result<(), TlsError> {
        let fresh = Self::load(node, certificate, private_key, authority)?;
        self.now.store(fresh.now.load_full());
        Ok(())
    }

    /// The cluster that this node's certificate names, if it names one.
    pub fn cluster(&self) -> Option<ClusterId> {
        self.now.load().own.cluster
    }

    /// For machines that join: they know the cluster by the authority, so it is shown along.
    pub(super) fn join(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.now.load().join)
    }

    /// The server's side: peers must show a certificate of the authority.
    pub(super) fn server(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.now.load().server)
    }

    /// The client's side of a connection for `lane`; the callee must be named as [`server_name`] says.
    pub(super) fn client(&self, lane: Lane) -> Arc<ClientConfig> {
        let now = self.now.load();
        Arc::clone(match lane {
            Lane::Bulk => &now.client,
            Lane::Control => &now.control,
        })
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
        let own = Certified::read(&chain[0])
            .ok_or_else(|| malformed(CERTIFICATE, certificate, "no X.509 certificate in it"))?;
        let mut shown = chain.clone();
        shown.extend(authorities.iter().filter(|root| !chain.contains(root)).cloned());
        let mut roots = RootCertStore::empty();
        for root in authorities {
            roots.add(root).map_err(|error| malformed(AUTHORITY, authority, &error.to_string()))?;
        }
        let expires = chain.first().and_then(|leaf| end_of(leaf));
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
        let mut control = client.clone();
        control.alpn_protocols.insert(0, CONTROL_ALPN.to_vec());
        let verifier = WebPkiClientVerifier::builder_with_provider(roots, Arc::clone(&provider))
            .build()
            .map_err(|error| unusable(&error))?;
        let mut join = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(&versions)
            .map_err(|error| unusable(&error))?
            .with_no_client_auth()
            .with_single_cert(shown, key.clone_key())
            .map_err(|error| unusable(&error))?;
        join.alpn_protocols = vec![JOIN_ALPN.to_vec()];
        join.send_tls13_tickets = 0;
        let mut server = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&versions)
            .map_err(|error| unusable(&error))?
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain, key)
            .map_err(|error| unusable(&error))?;
        server.alpn_protocols = vec![CONTROL_ALPN.to_vec(), H2.to_vec()];
        server.send_tls13_tickets = 0;
        Ok(Self {
            client: Arc::new(client),
            control: Arc::new(control),
            server: Arc::new(server),
            join: Arc::new(join),
            own,
            expires,
        })
    }
}

/// Whether the authorities vouch for the first certificate of a chain, as a server's and as a client's: what peers ask in a handshake. Whether it
/// is valid now is asked elsewhere, as long as a node runs.
fn vouched(certificate: &[u8], authority: &[u8], node: NodeId) -> Result<(), String> {
    let text = |error: &dyn std::error::Error| error.to_string();
    let (Some(chain), Some(authorities)) = (certificates(certificate), certificates(authority)) else { return Ok(()) };
    let Some((leaf, between)) = chain.split_first() else { return Ok(()) };
    let mut roots = RootCertStore::empty();
    for root in authorities {
        roots.add(root).map_err(|error| text(&error))?;
    }
    let (roots, provider) = (Arc::new(roots), Arc::new(rustls::crypto::aws_lc_rs::default_provider()));
    let server = WebPkiServerVerifier::builder_with_provider(Arc::clone(&roots), Arc::clone(&provider));
    let server = server.build().map_err(|error| text(&error))?;
    let client = WebPkiClientVerifier::builder_with_provider(roots, provider).build().map_err(|error| text(&error))?;
    // At one of these the authority was valid, too, unless it never was while the certificate is.
    for at in times_of(leaf) {
        let asked = server.verify_server_cert(leaf, between, &server_name(node), &[], at).map(drop);
        let asked = asked.and_then(|()| client.verify_client_cert(leaf, between, at).map(drop));
        match asked {
            Ok(()) => return Ok(()),
            Err(rustls::Error::InvalidCertificate(
                CertificateError::Expired
                | CertificateError::ExpiredContext { .. }
                | CertificateError::NotValidYet
                | CertificateError::NotValidYetContext { .. },
            )) => {}
            Err(error) => return Err(text(&error)),
        }
    }
    Ok(())
}

/// Some times at which a certificate is valid: its end, its middle, its beginning.
fn times_of(certificate: &[u8]) -> Vec<UnixTime> {
    let Ok((_, parsed)) = X509Certificate::from_der(certificate) else { return Vec::new() };
    let seconds = |time: i64| u64::try_from(time).unwrap_or_default();
    let (from, until) =
        (seconds(parsed.validity().not_before.timestamp()), seconds(parsed.validity().not_after.timestamp()));
    let at = |seconds| UnixTime::since_unix_epoch(std::time::Duration::from_secs(seconds));
    [until, from + until.saturating_sub(from) / 2, from].map(at).into()
}

/// The name that the callee's certificate must carry.
pub(super) fn server_name(node: NodeId) -> ServerName<'static> {
    // Letters, digits and hyphens, well below 64 of them: always a DNS name.
    ServerName::try_from(node_name(node)).expect("a node's name is a DNS name")
}

/// What a peer's certificate says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Certified {
    /// The node that it names as `ensign-node-ID`.
    pub(super) node: Option<NodeId>,
    /// The cluster that its `ensign://` name tells, if it has one.
    pub(super) cluster: Option<ClusterId>,
    /// Whether it may be a node's; one without an `ensign://` name may.
    pub(super) is_node: bool,
}

impl Certified {
    /// Of a DER certificate; none if it is no such thing.
    pub(super) fn read(certificate: &[u8]) -> Option<Self> {
        let (_, parsed) = X509Certificate::from_der(certificate).ok()?;
        let mut found = Self { node: None, cluster: None, is_node: true };
        let names = parsed.subject_alternative_name().ok().flatten();
        for name in names.iter().flat_map(|names| &names.value.general_names) {
            match name {
                GeneralName::DNSName(name) => {
                    let node = name.strip_prefix("ensign-node-").and_then(|id| id.parse().ok()).map(NodeId);
                    found.node = found.node.or(node);
                }
                GeneralName::URI(uri) => {
                    let Some(rest) = uri.strip_prefix("ensign://") else { continue };
                    let (place, query) = rest.split_once('?').unwrap_or((rest, ""));
                    let mut place = place.split('/');
                    found.cluster = place.next().and_then(|cluster| cluster.parse().ok());
                    let roles = query.split('&').find_map(|pair| pair.strip_prefix("roles=")).unwrap_or_default();
                    // A name of ours that cannot be read allows nothing.
                    found.is_node = found.cluster.is_some() && roles.split(',').any(|role| role == "node");
                }
                _ => {}
            }
        }
        Some(found)
    }
}

/// Believes a server that shows the authority with a fingerprint, and a certificate of it: what a joining machine knows its cluster by.
#[derive(Debug)]
pub(crate) struct PinnedAuthority {
    fingerprint: [u8; 32],
    provider: Arc<CryptoProvider>,
}

impl PinnedAuthority {
    /// For the authority with this SHA-256.
    pub(crate) fn new(fingerprint: [u8; 32]) -> Self {
        Self { fingerprint, provider: Arc::new(rustls::crypto::aws_lc_rs::default_provider()) }
    }
}

impl ServerCertVerifier for PinnedAuthority {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let pinned = |der: &&CertificateDer<'_>| crate::authority::fingerprint(der) == self.fingerprint;
        let Some(authority) = intermediates.iter().find(pinned) else {
            return Err(rustls::Error::General(
                "the node belongs to another cluster: its certificate authority is not the one that the join token names. Check \
                 --seed and the token; nothing was sent"
                    .to_owned(),
            ));
        };
        let mut roots = RootCertStore::empty();
        roots.add(authority.clone().into_owned())?;
        let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&self.provider))
            .build()
            .map_err(|error| rustls::Error::General(error.to_string()))?;
        let node = Certified::read(end_entity).and_then(|certified| certified.node).ok_or_else(|| {
            rustls::Error::General("the node's certificate does not name a node as ensign-node-ID".to_owned())
        })?;
        verifier.verify_server_cert(end_entity, intermediates, &server_name(node), ocsp_response, now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls12_signature(message, cert, dss, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, cert, dss, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

fn certificates(pem: &[u8]) -> Option<Vec<CertificateDer<'static>>> {
    CertificateDer::pem_slice_iter(pem).collect::<Result<_, _>>().ok()
}

/// When a DER certificate runs out.
fn end_of(certificate: &[u8]) -> Option<UnixNanos> {
    let (_, parsed) = X509Certificate::from_der(certificate).ok()?;
    let seconds = u64::try_from(parsed.validity().not_after.timestamp()).ok()?;
    Some(UnixNanos(seconds.saturating_mul(1_000_000_000)))
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
