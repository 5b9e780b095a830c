//! What the vault signs, and the keys to verify it with.

use ensign_proto::pb::vault::v1 as pb;
use ensign_proto::{KeyVersion, LogIndex, NodeId, RingId};

use super::VaultClient;
use crate::error::CallError;
use crate::machine::receipts;
use crate::wire;

/// What a receipt attests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ReceiptKind {
    /// No node opens what the versions sealed, for ever.
    Revoked,
    /// No node does, until they are enabled.
    Disabled,
    /// Their wrapped keys are in no file of the vault.
    Erased,
}

/// A receipt that anybody can verify who knows the receipt keys.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SignedReceipt {
    /// What it attests.
    pub kind: ReceiptKind,
    /// Of which versions, ascending.
    pub versions: Vec<KeyVersion>,
    /// Where in the vault's log it was committed.
    pub index: LogIndex,
    /// When, in Unix milliseconds.
    pub ms: u64,
    /// A JWS in compact form. Empty for what was committed before the vault had a receipt key.
    pub jws: String,
    /// Of an erasure: who had a copy when the key was destroyed, and never said that it is gone from theirs.
    pub missing: Vec<NodeId>,
}

/// All receipts of a ring, and how far its erasure is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RingReceipts {
    /// In the order in which they were committed.
    pub receipts: Vec<SignedReceipt>,
    /// Up to where the vault's members have to erase; `None`: nothing is left to be erased.
    pub erase_through: Option<LogIndex>,
    /// While something is left: each member, and how far its file is, as the vault's leader last heard.
    pub erasers: Vec<(NodeId, LogIndex)>,
}

/// A key that verifies receipts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReceiptKeyInfo {
    /// From 1.
    pub number: u32,
    /// An Ed25519 public key.
    pub public: [u8; 32],
    /// When it was made, in Unix milliseconds.
    pub created_ms: u64,
    /// What the key before it signed, a JWS in compact form; empty for the first.
    pub endorsement: String,
}

impl VaultClient {
    /// Every receipt of a ring.
    ///
    /// # Errors
    /// [`CallError`]; with `NotFound` there is no such ring.
    pub async fn receipts(&self, ring: RingId) -> Result<RingReceipts, CallError> {
        let mut all = RingReceipts::default();
        loop {
            let after = all.receipts.last().map_or(0, |last| last.index.0);
            let request = pb::ListReceiptsRequest { ring: wire::bytes(ring.as_bytes()), after };
            let answer = self.call("", pb::request::Call::ListReceipts(request)).await?;
            let pb::reply::Result::ListReceipts(reply) = answer else {
                return Err(CallError::Malformed { what: "it is not a list of receipts" });
            };
            for receipt in reply.receipts {
                let kind = match receipt.kind {
                    receipts::REVOKED => ReceiptKind::Revoked,
                    receipts::DISABLED => ReceiptKind::Disabled,
                    receipts::ERASED => ReceiptKind::Erased,
                    _ => return Err(CallError::Malformed { what: "a receipt attests something unknown" }),
                };
                all.receipts.push(SignedReceipt {
                    kind,
                    versions: receipt.versions.into_iter().map(KeyVersion).collect(),
                    index: LogIndex(receipt.index),
                    ms: receipt.ms,
                    jws: receipt.jws,
                    missing: receipt.missing.into_iter().map(NodeId).collect(),
                });
            }
            all.erase_through = (reply.wanted != 0).then_some(LogIndex(reply.wanted));
            all.erasers = reply.voters.iter().map(|it| (NodeId(it.node), LogIndex(it.through))).collect();
            let came = all.receipts.last().map_or(0, |last| last.index.0);
            if !reply.more {
                return Ok(all);
            }
            if came <= after {
                return Err(CallError::Malformed { what: "a page of receipts is empty and not the last" });
            }
        }
    }

    /// The keys that verify receipts, oldest first. Where there is none, the first one is made.
    ///
    /// # Errors
    /// [`CallError`].
    pub async fn receipt_keys(&self) -> Result<Vec<ReceiptKeyInfo>, CallError> {
        let answer = self.call("", pb::request::Call::ReceiptKeys(pb::ReceiptKeysRequest {})).await?;
        let pb::reply::Result::ReceiptKeys(reply) = answer else {
            return Err(CallError::Malformed { what: "it is not a list of receipt keys" });
        };
        let malformed = || CallError::Malformed { what: "a receipt key is not 32 bytes" };
        let info = |key: pb::ReceiptKey| {
            Ok(ReceiptKeyInfo {
                number: key.number,
                public: key.public[..].try_into().map_err(|_| malformed())?,
                created_ms: key.created_ms,
                endorsement: key.endorsement,
            })
        };
        reply.keys.into_iter().map(info).collect()
    }
}
