//! What a partition's Raft entries are. The first byte tells the kind and its version.
//!
//! ```text
//! 0x01  a sealed batch, exactly as it was sealed (its own format byte is 1): no copy on the way to the log
//! 0x81  a data key, introduced before its first use: dek[16] | the wrapped key, as keyvault encodes it
//! 0x82  a type, introduced before it is first counted: handle u32 | dek[16] | its name, sealed under that key
//! ```

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use ensign_proto::{BATCH_FORMAT, DekId};

const DEK_INTRODUCED: u8 = 0x81;
const TYPE_INTRODUCED: u8 = 0x82;

/// An entry's payload, told apart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Payload {
    /// A sealed batch.
    Batch(Bytes),
    /// A data key.
    DekIntroduced { dek: DekId, wrapped: Bytes },
    /// A type's sealed name.
    TypeIntroduced { handle: u32, dek: DekId, sealed: Bytes },
    /// Nothing that this build knows.
    Unknown { first_byte: Option<u8> },
}

impl Payload {
    pub(super) fn dek_introduced(dek: DekId, wrapped: &[u8]) -> Bytes {
        let mut out = BytesMut::with_capacity(17 + wrapped.len());
        out.put_u8(DEK_INTRODUCED);
        out.put_slice(dek.as_bytes());
        out.put_slice(wrapped);
        out.freeze()
    }

    pub(super) fn type_introduced(handle: u32, dek: DekId, sealed: &[u8]) -> Bytes {
        let mut out = BytesMut::with_capacity(21 + sealed.len());
        out.put_u8(TYPE_INTRODUCED);
        out.put_u32(handle);
        out.put_slice(dek.as_bytes());
        out.put_slice(sealed);
        out.freeze()
    }

    pub(super) fn read(payload: &Bytes) -> Self {
        let first_byte = payload.first().copied();
        let mut rest = payload.clone();
        match first_byte {
            Some(BATCH_FORMAT) => Self::Batch(rest),
            Some(DEK_INTRODUCED) if rest.len() > 17 => {
                rest.advance(1);
                Self::DekIntroduced { dek: take_dek(&mut rest), wrapped: rest }
            }
            Some(TYPE_INTRODUCED) if rest.len() > 21 => {
                rest.advance(1);
                let handle = rest.get_u32();
                Self::TypeIntroduced { handle, dek: take_dek(&mut rest), sealed: rest }
            }
            _ => Self::Unknown { first_byte },
        }
    }
}

fn take_dek(rest: &mut Bytes) -> DekId {
    let mut id = [0; 16];
    rest.copy_to_slice(&mut id);
    DekId::from_bytes(id)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_told_apart() {
        let dek = DekId::from_bytes([5; 16]);
        let introduced = Payload::read(&Payload::dek_introduced(dek, b"wrapped"));
        assert_eq!(introduced, Payload::DekIntroduced { dek, wrapped: Bytes::from_static(b"wrapped") });
        let introduced = Payload::read(&Payload::type_introduced(7, dek, b"name"));
        assert_eq!(introduced, Payload::TypeIntroduced { handle: 7, dek, sealed: Bytes::from_static(b"name") });
        assert!(matches!(Payload::read(&Bytes::from_static(b"\x01...")), Payload::Batch(_)));
        for odd in [&b""[..], b"\x02", b"\x81short", b"\x82short"] {
            assert!(matches!(Payload::read(&Bytes::from_static(odd)), Payload::Unknown { .. }));
        }
    }
}
