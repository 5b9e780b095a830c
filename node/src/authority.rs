//! A certificate authority for the nodes of a cluster: what `ensign dev` and tests use in place of an operator's own.

use ensign_proto::NodeId;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
};

use crate::peers::node_name;

/// An authority with its private key.
pub struct Authority {
    certificate: String,
    issuer: Issuer<'static, KeyPair>,
}

impl std::fmt::Debug for Authority {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Authority")
    }
}

/// A node's certificate and private key, PEM.
pub struct Issued {
    /// The certificate.
    pub certificate: String,
    /// Its private key: a secret.
    pub private_key: String,
}

impl Authority {
    /// A new authority.
    ///
    /// # Errors
    /// The cryptographic library refuses.
    pub fn generate(name: &str) -> Result<Self, rcgen::Error> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, format!("Ensign cluster {name}"));
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let certificate = params.self_signed(&key)?.pem();
        Ok(Self { certificate, issuer: Issuer::new(params, key) })
    }

    /// The authority's own certificate, PEM.
    pub fn certificate(&self) -> &str {
        &self.certificate
    }

    /// A certificate for `node`, to speak and to be spoken to.
    ///
    /// # Errors
    /// The cryptographic library refuses.
    pub fn issue(&self, node: NodeId) -> Result<Issued, rcgen::Error> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::new(vec![node_name(node), "localhost".to_owned()])?;
        params.distinguished_name.push(DnType::CommonName, node_name(node));
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let certificate = params.signed_by(&key, &self.issuer)?.pem();
        Ok(Issued { certificate, private_key: key.serialize_pem() })
    }
}
