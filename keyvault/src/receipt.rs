//! What makes a receipt one that a third party can check: a JWS in compact form (RFC 7515), signed with Ed25519 (RFC 8037).
//!
//! Ed25519 is deterministic (RFC 8032), and what is signed is in the vault's state. So every voter makes the same bytes again, at any
//! time. Not here: what a receipt says (`machine`), who verifies it (anyone).

use std::fmt;

use aws_lc_rs::signature::{Ed25519KeyPair, KeyPair as _};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use sha2::{Digest as _, Sha256};
use zeroize::Zeroizing;

/// The `typ` of a receipt.
const RECEIPT: &str = "ensign-receipt+jws";
/// The `typ` of what one receipt key says of the next.
const ENDORSEMENT: &str = "ensign-receipt-key+jws";

/// The fingerprint of a receipt key, which is also its `kid`: its JWK thumbprint (RFC 7638), 43 characters.
pub fn receipt_fingerprint(public: &[u8; 32]) -> String {
    let x = URL_SAFE_NO_PAD.encode(public);
    URL_SAFE_NO_PAD.encode(Sha256::digest(format!(r#"{{"crv":"Ed25519","kty":"OKP","x":"{x}"}}"#)))
}

/// A key pair that signs receipts.
pub(crate) struct Signer {
    pair: Ed25519KeyPair,
    kid: String,
}

impl Signer {
    /// The key pair of a seed; `None` if the cryptographic library refuses it.
    pub(crate) fn new(seed: &Zeroizing<Vec<u8>>) -> Option<Self> {
        let pair = Ed25519KeyPair::from_seed_unchecked(seed).ok()?;
        let public: [u8; 32] = pair.public_key().as_ref().try_into().ok()?;
        Some(Self { pair, kid: receipt_fingerprint(&public) })
    }

    pub(crate) fn public(&self) -> [u8; 32] {
        self.pair.public_key().as_ref().try_into().expect("an Ed25519 public key has 32 bytes")
    }

    /// A receipt with its signature.
    pub(crate) fn receipt(&self, payload: &[u8]) -> String {
        self.sign(RECEIPT, payload)
    }

    /// What this key says of the next.
    pub(crate) fn endorse(&self, payload: &[u8]) -> String {
        self.sign(ENDORSEMENT, payload)
    }

    fn sign(&self, typ: &str, payload: &[u8]) -> String {
        let header = format!(r#"{{"alg":"EdDSA","typ":"{typ}","kid":"{}"}}"#, self.kid);
        let signed = format!("{}.{}", URL_SAFE_NO_PAD.encode(header), URL_SAFE_NO_PAD.encode(payload));
        let signature = self.pair.sign(signed.as_bytes());
        format!("{signed}.{}", URL_SAFE_NO_PAD.encode(signature.as_ref()))
    }
}

impl fmt::Debug for Signer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Signer").field("kid", &self.kid).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fingerprint_is_the_thumbprint_of_rfc_8037_appendix_a3() {
        let x = URL_SAFE_NO_PAD.decode("11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo").unwrap();
        assert_eq!(receipt_fingerprint(&x.try_into().unwrap()), "kPrK_qmxVWaYVA9wwBF6Iuo3vVzz7TxHCTwXBygrS4k");
    }

    #[test]
    fn a_signature_is_that_of_rfc_8037_appendix_a4_but_for_its_header() {
        let seed = URL_SAFE_NO_PAD.decode("nWGxne_9WmC6hEr0kuwsxERJxWl7MmkZcDusAxyuf2A").unwrap();
        let signer = Signer::new(&Zeroizing::new(seed)).unwrap();
        assert_eq!(URL_SAFE_NO_PAD.encode(signer.public()), "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo");
        // The raw primitive, over the signing input of the RFC.
        let signed = b"eyJhbGciOiJFZERTQSJ9.RXhhbXBsZSBvZiBFZDI1NTE5IHNpZ25pbmc";
        let expected = "hgyY0il_MGCjP0JzlnLWG1PPOt7-09PGcvMg3AIbQR6dWbhijcNR4ki4iylGjg5BhVsPt9g7sVvpAr_MuM0KAg";
        assert_eq!(URL_SAFE_NO_PAD.encode(signer.pair.sign(signed).as_ref()), expected);
        assert_eq!(signer.receipt(b"{}"), signer.receipt(b"{}"), "the same bytes from every voter");
    }
}
