//! How a key travels: HPKE-sealed to the process that asked (RFC 9180 base mode, X25519, HKDF-SHA256, AES-256-GCM).
//!
//! Not for the wire, which is mTLS already, but for memory: protobuf, HTTP/2 and TLS buffers are never overwritten, and
//! other voters may forward. One encapsulation serves all boxes of a reply; they open in their order.

use std::fmt;

use ensign_proto::{ClusterId, DekId, LogIndex, NodeId, SessionId};
use hpke::aead::{AeadCtxR, AeadCtxS, AeadTag, AesGcm256};
use hpke::inout::InOutBuf;
use hpke::kdf::HkdfSha256;
use hpke::kem::X25519HkdfSha256;
use hpke::{Deserializable as _, Kem, OpModeR, OpModeS, Serializable as _};

use crate::entropy::{Entropy, HpkeRng};
use crate::seal::{OpenError, wipe};

type PrivateKey = <X25519HkdfSha256 as Kem>::PrivateKey;
type PublicKey = <X25519HkdfSha256 as Kem>::PublicKey;
type EncappedKey = <X25519HkdfSha256 as Kem>::EncappedKey;

const TAG_LEN: usize = 16;

/// A process's key pair; it lives exactly as long as the process.
pub(crate) struct ProcessKey {
    secret: PrivateKey,
    public: [u8; 32],
}

impl ProcessKey {
    pub(crate) fn generate(entropy: &Entropy) -> Self {
        let (secret, public) = X25519HkdfSha256::gen_keypair_with_rng(&mut HpkeRng(entropy));
        let mut bytes = [0; 32];
        bytes.copy_from_slice(&public.to_bytes());
        Self { secret, public: bytes }
    }

    pub(crate) fn public(&self) -> &[u8; 32] {
        &self.public
    }
}

impl fmt::Debug for ProcessKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ProcessKey")
    }
}

/// Seals the boxes of one reply.
pub(crate) struct Sealer {
    enc: [u8; 32],
    context: AeadCtxS<AesGcm256, HkdfSha256, X25519HkdfSha256>,
}

impl Sealer {
    /// Encapsulates to `public`; a key that is no point to agree with is refused.
    pub(crate) fn new(public: &[u8], info: &[u8], entropy: &Entropy) -> Option<Self> {
        let public = PublicKey::from_bytes(public).ok()?;
        let (enc, context): (EncappedKey, _) =
            hpke::setup_sender_with_rng(&OpModeS::Base, &public, info, &mut HpkeRng(entropy)).ok()?;
        let mut bytes = [0; 32];
        bytes.copy_from_slice(&enc.to_bytes());
        Some(Self { enc: bytes, context })
    }

    pub(crate) fn enc(&self) -> &[u8; 32] {
        &self.enc
    }

    /// The next box: `plaintext` encrypted, then a 16-byte tag.
    pub(crate) fn seal(&mut self, plaintext: &[u8], aad: &[u8]) -> Option<Vec<u8>> {
        let mut sealed = Vec::with_capacity(plaintext.len() + TAG_LEN);
        sealed.extend_from_slice(plaintext);
        let Ok(tag) = self.context.seal_inout_detached(InOutBuf::from(&mut sealed[..]), aad) else {
            wipe(&mut sealed);
            return None;
        };
        sealed.extend_from_slice(&tag.to_bytes());
        zeroize::zeroize_stack::<4_096>();
        Some(sealed)
    }
}

/// Opens the boxes of one reply, in their order.
pub(crate) struct Opener(AeadCtxR<AesGcm256, HkdfSha256, X25519HkdfSha256>);

impl Opener {
    pub(crate) fn new(key: &ProcessKey, enc: &[u8], info: &[u8]) -> Result<Self, OpenError> {
        let enc = EncappedKey::from_bytes(enc).map_err(|_| OpenError)?;
        hpke::setup_receiver(&OpModeR::Base, &key.secret, &enc, info).map(Self).map_err(|_| OpenError)
    }

    /// Opens the next box into `out`, which has the plaintext's length and is zeros on failure.
    pub(crate) fn open_into(&mut self, sealed: &[u8], aad: &[u8], out: &mut [u8]) -> Result<(), OpenError> {
        let (ciphertext, tag) = sealed.split_last_chunk::<TAG_LEN>().ok_or(OpenError)?;
        if ciphertext.len() != out.len() {
            return Err(OpenError);
        }
        out.copy_from_slice(ciphertext);
        let tag = AeadTag::from_bytes(tag).map_err(|_| OpenError)?;
        let opened = self.0.open_inout_detached(InOutBuf::from(&mut *out), aad, &tag);
        zeroize::zeroize_stack::<4_096>();
        opened.map_err(|_| {
            wipe(out);
            OpenError
        })
    }
}

/// What a lease reply's boxes are bound to beside their own AAD.
pub(crate) fn lease_info(cluster: ClusterId, node: NodeId, session: SessionId) -> Vec<u8> {
    [b"ensign/lease/v1", &cluster.as_bytes()[..], &node.0.to_be_bytes(), session.as_bytes()].concat()
}

/// What one granted key is bound to.
pub(crate) fn lease_aad(dek: DekId, index: LogIndex) -> [u8; 24] {
    let mut aad = [0; 24];
    aad[..16].copy_from_slice(dek.as_bytes());
    aad[16..].copy_from_slice(&index.0.to_be_bytes());
    aad
}

/// What a secret's reply is bound to beside its AAD.
pub(crate) fn secret_info(cluster: ClusterId, node: NodeId) -> Vec<u8> {
    [b"ensign/secret/v1", &cluster.as_bytes()[..], &node.0.to_be_bytes()].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn boxes_open_in_their_order_at_their_process_only() {
        let (key, other) = (ProcessKey::generate(&Entropy::kernel()), ProcessKey::generate(&Entropy::kernel()));
        let info = lease_info(ClusterId::from_bytes([1; 16]), NodeId(2), SessionId::from_bytes([3; 16]));
        let mut sealer = Sealer::new(key.public(), &info, &Entropy::kernel()).unwrap();
        let aads = [1, 2].map(|n| lease_aad(DekId::from_bytes([n; 16]), LogIndex(9)));
        let boxes: Vec<_> =
            [[5; 32], [6; 32]].iter().zip(&aads).map(|(dek, aad)| sealer.seal(dek, aad).unwrap()).collect();
        assert!(boxes.iter().all(|sealed| sealed.len() == 48));

        let mut out = [0; 32];
        let mut opener = Opener::new(&key, sealer.enc(), &info).unwrap();
        assert_eq!(opener.open_into(&boxes[1], &aads[1], &mut out), Err(OpenError), "out of order");
        assert_eq!(opener.open_into(&boxes[0], &aads[1], &mut out), Err(OpenError), "another key's place");
        opener.open_into(&boxes[0], &aads[0], &mut out).unwrap();
        assert_eq!(out, [5; 32]);
        opener.open_into(&boxes[1], &aads[1], &mut out).unwrap();
        assert_eq!(out, [6; 32]);

        let mut opener = Opener::new(&other, sealer.enc(), &info).unwrap();
        assert_eq!(opener.open_into(&boxes[0], &aads[0], &mut out), Err(OpenError), "another process");
        assert_eq!(out, [0; 32]);
        let info = lease_info(ClusterId::from_bytes([1; 16]), NodeId(3), SessionId::from_bytes([3; 16]));
        let mut opener = Opener::new(&key, sealer.enc(), &info).unwrap();
        assert_eq!(opener.open_into(&boxes[0], &aads[0], &mut out), Err(OpenError), "another node");
    }

    #[test]
    fn a_public_key_that_agrees_on_nothing_is_refused() {
        assert!(Sealer::new(&[0; 32], b"", &Entropy::kernel()).is_none());
        assert!(Sealer::new(&[1; 31], b"", &Entropy::kernel()).is_none());
    }
}
