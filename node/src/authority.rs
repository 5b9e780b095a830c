//! The cluster's certificate authority: what `ensign cluster init` makes, the vault keeps, and joins and renewals are signed with.
//!
//! ```text
//! certificate of a node    DNS ensign-node-ID, localhost     URI ensign://CLUSTER/node/ID?roles=node
//! ```
//! A certificate of an operator's own authority needs the DNS name only; what its URI would say is then not checked.

use std::time::Duration;

use ensign_proto::{ClusterId, NodeId};
use ensign_raft::env::{Clock as _, OsRng, Rng, SystemClock, UnixNanos};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, PublicKeyData, SanType, SerialNumber, date_time_ymd,
};
use rustls::pki_types::{CertificateDer, CertificateSigningRequestDer};
use sha2::{Digest as _, Sha256};
use thiserror::Error;
use zeroize::Zeroizing;

use crate::peers::node_name;

/// How long an authority's certificate is valid.
const AUTHORITY_VALID: Duration = Duration::from_hours(24 * 3653);
/// How long a node's certificate is valid.
pub const NODE_VALID: Duration = Duration::from_hours(24 * 365);
/// A certificate begins this long before it is made, for nodes whose clocks are behind.
const BACKDATED: Duration = Duration::from_hours(1);

/// An authority with its private key.
pub struct Authority {
    certificate: CertificateDer<'static>,
    pem: String,
    private_key: Zeroizing<String>,
    issuer: Issuer<'static, KeyPair>,
}

impl std::fmt::Debug for Authority {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Authority")
    }
}

/// Why a certificate was not made.
#[derive(Debug, Error)]
pub enum AuthorityError {
    /// The authority's certificate or key is not what it should be.
    #[error("the certificate authority cannot be used: {0}")]
    Unusable(String),
    /// The request is malformed, or is not signed with the key it names.
    #[error("the certificate request is no PKCS#10 request, or is not signed with its own key: {0}")]
    Request(String),
    /// The cryptographic library refuses.
    #[error("the certificate could not be signed: {0}")]
    Signing(#[source] rcgen::Error),
}

/// A node's certificate and private key, PEM.
pub struct Issued {
    /// The certificate.
    pub certificate: String,
    /// Its private key: a secret.
    pub private_key: String,
}

/// Whom a certificate is for, and how long.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Subject {
    /// The node.
    pub node: NodeId,
    /// Its cluster; none leaves the URI out, as an operator's own authority may.
    pub cluster: Option<ClusterId>,
    /// Further names or addresses that clients reach it by.
    pub names: Vec<String>,
    /// From when on it is valid.
    pub from: UnixNanos,
    /// Until when.
    pub until: UnixNanos,
}

impl Subject {
    /// A node of `cluster`, from about `now` on for a year.
    pub fn node(node: NodeId, cluster: ClusterId, now: UnixNanos) -> Self {
        let from = UnixNanos(now.0.saturating_sub(BACKDATED.as_nanos() as u64));
        let until = UnixNanos(now.0 + NODE_VALID.as_nanos() as u64);
        Self { node, cluster: Some(cluster), names: Vec::new(), from, until }
    }

    fn params(&self, rng: &dyn Rng) -> Result<CertificateParams, rcgen::Error> {
        let mut names = vec![node_name(self.node), "localhost".to_owned()];
        names.extend(self.names.iter().filter(|name| !name.is_empty()).cloned());
        let mut params = CertificateParams::new(names)?;
        if let Some(cluster) = self.cluster {
            let uri = format!("ensign://{cluster}/node/{}?roles=node", self.node);
            params.subject_alt_names.push(SanType::URI(uri.try_into()?));
        }
        params.distinguished_name.push(DnType::CommonName, node_name(self.node));
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        params.serial_number = Some(serial(rng));
        valid(&mut params, self.from, self.until);
        Ok(params)
    }
}

/// Sixteen random bytes, positive and of full length.
fn serial(rng: &dyn Rng) -> SerialNumber {
    let mut serial = [0; 16];
    rng.fill(&mut serial);
    serial[0] = serial[0] & 0x7f | 0x40;
    SerialNumber::from_slice(&serial)
}

fn valid(params: &mut CertificateParams, from: UnixNanos, until: UnixNanos) {
    let time = |at: UnixNanos| date_time_ymd(1970, 1, 1) + Duration::from_secs(at.0 / 1_000_000_000);
    params.not_before = time(from);
    params.not_after = time(until);
}

impl Authority {
    /// A new authority, from now on, by the system's clock and randomness.
    ///
    /// # Errors
    /// The cryptographic library refuses.
    pub fn generate(name: &str) -> Result<Self, AuthorityError> {
        Self::create(name, SystemClock.wall(), &OsRng)
    }

    /// A new authority, valid for ten years.
    ///
    /// # Errors
    /// The cryptographic library refuses.
    pub fn create(name: &str, now: UnixNanos, rng: &dyn Rng) -> Result<Self, AuthorityError> {
        let key = KeyPair::generate().map_err(AuthorityError::Signing)?;
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, format!("Ensign cluster {name}"));
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.serial_number = Some(serial(rng));
        let from = UnixNanos(now.0.saturating_sub(BACKDATED.as_nanos() as u64));
        valid(&mut params, from, UnixNanos(now.0 + AUTHORITY_VALID.as_nanos() as u64));
        let signed = params.self_signed(&key).map_err(AuthorityError::Signing)?;
        let private_key = Zeroizing::new(key.serialize_pem());
        Ok(Self { pem: signed.pem(), certificate: signed.der().clone(), private_key, issuer: Issuer::new(params, key) })
    }

    /// An authority that was made before, from PEM text.
    ///
    /// # Errors
    /// [`AuthorityError::Unusable`]: one of the two is malformed, or they do not belong together.
    pub fn from_pem(certificate: &str, private_key: &str) -> Result<Self, AuthorityError> {
        use rustls::pki_types::pem::PemObject as _;
        let unusable = |what: &str, error: &dyn std::fmt::Display| AuthorityError::Unusable(format!("{what}: {error}"));
        let der = CertificateDer::from_pem_slice(certificate.as_bytes())
            .map_err(|error| unusable("no PEM certificate", &error))?;
        let key = KeyPair::from_pem(private_key).map_err(|error| unusable("no PEM private key", &error))?;
        let (_, parsed) =
            x509_parser::parse_x509_certificate(&der).map_err(|error| unusable("the certificate", &error))?;
        if parsed.public_key().subject_public_key.data.as_ref() != key.der_bytes() {
            return Err(AuthorityError::Unusable("the private key is another certificate's".to_owned()));
        }
        let private_key = Zeroizing::new(private_key.to_owned());
        let issuer = Issuer::from_ca_cert_der(&der, key).map_err(|error| unusable("the certificate", &error))?;
        Ok(Self { pem: certificate.to_owned(), certificate: der, private_key, issuer })
    }

    /// The authority's own certificate, PEM.
    pub fn certificate(&self) -> &str {
        &self.pem
    }

    /// The authority's own certificate, DER.
    pub fn der(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    /// Its private key, PEM: whoever has it can make nodes.
    pub fn private_key(&self) -> &str {
        &self.private_key
    }

    /// A key and a certificate for `node`, of no particular cluster, as an operator's own authority makes them.
    ///
    /// # Errors
    /// The cryptographic library refuses.
    pub fn issue(&self, node: NodeId) -> Result<Issued, AuthorityError> {
        let now = SystemClock.wall();
        let subject = Subject { cluster: None, ..Subject::node(node, ClusterId::from_bytes([0; 16]), now) };
        self.issue_to(&subject, &OsRng)
    }

    /// A key and a certificate for `subject`.
    ///
    /// # Errors
    /// [`AuthorityError::Signing`]: a name is malformed, or the cryptographic library refuses.
    pub fn issue_to(&self, subject: &Subject, rng: &dyn Rng) -> Result<Issued, AuthorityError> {
        let key = KeyPair::generate().map_err(AuthorityError::Signing)?;
        let params = subject.params(rng).map_err(AuthorityError::Signing)?;
        let certificate = params.signed_by(&key, &self.issuer).map_err(AuthorityError::Signing)?.pem();
        Ok(Issued { certificate, private_key: key.serialize_pem() })
    }

    /// A certificate for `subject` and the key that signed `request`. Nothing else of the request is taken over.
    ///
    /// # Errors
    /// [`AuthorityError`]: the request is malformed, or the cryptographic library refuses.
    pub fn sign(
        &self,
        request: &[u8],
        subject: &Subject,
        rng: &dyn Rng,
    ) -> Result<CertificateDer<'static>, AuthorityError> {
        let params = subject.params(rng).map_err(AuthorityError::Signing)?;
        let key = parse_request(request)?.public_key;
        Ok(params.signed_by(&key, &self.issuer).map_err(AuthorityError::Signing)?.der().clone())
    }
}

fn parse_request(der: &[u8]) -> Result<CertificateSigningRequestParams, AuthorityError> {
    CertificateSigningRequestParams::from_der(&CertificateSigningRequestDer::from(der))
        .map_err(|error| AuthorityError::Request(error.to_string()))
}

/// What tells one requested key from another: a SHA-256 of it. The request is checked to be signed with that key.
///
/// # Errors
/// [`AuthorityError::Request`].
pub fn key_of_request(der: &[u8]) -> Result<[u8; 32], AuthorityError> {
    let parsed = parse_request(der)?;
    Ok(Sha256::digest(parsed.public_key.der_bytes()).into())
}

/// What a joining node knows its cluster by: the SHA-256 of the authority's certificate.
pub fn fingerprint(certificate: &[u8]) -> [u8; 32] {
    Sha256::digest(certificate).into()
}
