//! Receipts, signed when they are asked for, and the keys that sign them: made at the first need, and anew every year.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use ensign_proto::pb::vault::v1 as pb;
use ensign_proto::{ClusterVersion, LogIndex, RingId, Term};
use ensign_raft::Leadership;
use tracing::{debug, info, warn};
use zeroize::Zeroizing;

use super::{MasterKey, Vault};
use crate::link::{Reason, Refusal};
use crate::machine::{AddReceiptKey, Change, ReceiptKey, State, endorsement};
use crate::receipt::Signer;
use crate::seal;
use crate::wire;

/// The kind of secret that a receipt key is, in the name that its box is bound to. The state keeps it apart from other secrets.
const RECEIPT_KEY: u8 = 5;
/// Receipts of one answer: each is signed for it.
const PAGE: usize = 256;
const ACTOR: &str = "vault";

impl Vault {
    /// Whether every voter can read what receipts and erasures are written as.
    pub(super) fn attests(&self) -> bool {
        (self.0.version)() >= ClusterVersion::V2
    }

    /// Makes the receipt key that is due, if one is. What fails is due again at the next look.
    pub(super) async fn tend_receipt_keys(&self, leadership: Leadership) {
        if !leadership.ready || !self.attests() {
            return;
        }
        match self.add_due_key(leadership.term).await {
            Ok(()) => {}
            Err(refusal) if refusal.reason == Reason::Conflict => {
                debug!(%refusal, "another leader made the receipt key");
            }
            Err(refusal) => warn!(%refusal, "a receipt key is due, and was not made"),
        }
    }

    async fn add_due_key(&self, term: Term) -> Result<(), Refusal> {
        let (clock, entropy) = (&self.0.clock, &self.0.config.entropy);
        let ms = clock.wall().as_millis();
        let due = self.inspect(|state| Ok(state.due_receipt_key(ms).map(|(number, last)| (number, last.cloned()))))?;
        let Some((number, last)) = due else { return Ok(()) };
        let master = self.master().await?;
        let seed = Zeroizing::new(seal::fresh_key(entropy).to_vec());
        let unusable = || Refusal::new(Reason::Damaged, "the receipt key cannot be used");
        let signer = Signer::new(&seed).ok_or_else(unusable)?;
        let public = signer.public();
        let object = ReceiptKey::object(&public);
        let sealed = master.seal_secret(RECEIPT_KEY, &object, u64::from(number), &seed, entropy)?;
        let endorsement = match last {
            Some(last) => {
                let before = signer_of(&master, number - 1, &last)?;
                before.endorse(&endorsement(self.0.config.cluster, number, &public, ms))
            }
            None => String::new(),
        };
        let change = AddReceiptKey {
            number,
            public: public.to_vec().into(),
            boxed: sealed.boxed,
            master_epoch: sealed.master_epoch,
            endorsement,
        };
        self.propose_in(Some(term), ACTOR, Change::AddReceiptKey(change)).await?;
        info!(number, fingerprint = crate::receipt_fingerprint(&public), "receipts are signed with a new key");
        Ok(())
    }

    /// The receipt with its signature; without one where there is no key, or the vault is sealed: it can be asked for later.
    pub(super) async fn signed(&self, mut receipt: pb::Receipt) -> pb::Receipt {
        match self.signer(receipt.key).await {
            Ok(Some(signer)) => receipt.jws = signer.receipt(&receipt.payload),
            Ok(None) => {}
            Err(refusal) => warn!(%refusal, "a receipt could not be signed now; `ensign key receipts` gets it later"),
        }
        receipt
    }

    /// The key of this number; `None` for 0.
    async fn signer(&self, number: u32) -> Result<Option<Signer>, Refusal> {
        let Some(place) = (number as usize).checked_sub(1) else { return Ok(None) };
        let key = self.inspect(|state| {
            let key = state.receipt_keys.get(place).cloned();
            key.ok_or_else(|| Refusal::new(Reason::NotFound, format!("there is no receipt key {number}")))
        })?;
        let master = self.master().await?;
        signer_of(&master, number, &key).map(Some)
    }

    pub(super) async fn list_receipts(
        &self,
        request: &pb::ListReceiptsRequest,
    ) -> Result<pb::ListReceiptsReply, Refusal> {
        let ring: RingId = wire::id(&request.ring, "ring")?;
        self.must_lead()?;
        self.read_index().await?;
        let (mut found, wanted) = self.inspect(|state| {
            let known = state.rings.get(&ring);
            let known = known.ok_or_else(|| Refusal::new(Reason::NotFound, format!("there is no key ring {ring}")))?;
            Ok((known.unsigned(LogIndex(request.after)), known.erase_through()))
        })?;
        // What one entry committed stays together: the next page begins after it.
        let cut = found.get(PAGE).map(|next| next.signed.index);
        if let Some(cut) = cut {
            let whole = found.iter().position(|it| it.signed.index == cut).unwrap_or(PAGE);
            found.truncate(if whole == 0 { found.partition_point(|it| it.signed.index <= cut) } else { whole });
        }
        let mut signers: BTreeMap<u32, Option<Signer>> = BTreeMap::new();
        let mut receipts = Vec::with_capacity(found.len());
        for mut it in found {
            let signer = match signers.entry(it.key) {
                Entry::Occupied(known) => known.into_mut(),
                Entry::Vacant(new) => new.insert(self.signer(it.key).await?),
            };
            if let Some(signer) = signer {
                it.signed.jws = signer.receipt(&it.payload);
            }
            receipts.push(it.signed);
        }
        let voters = wanted.map(|_| self.erasers()).unwrap_or_default();
        Ok(pb::ListReceiptsReply { receipts, more: cut.is_some(), voters, wanted: wanted.map_or(0, |wanted| wanted.0) })
    }

    pub(super) async fn receipt_keys(&self) -> Result<pb::ReceiptKeysReply, Refusal> {
        let term = self.must_lead()?;
        self.read_index().await?;
        let keys = |state: &State| Ok(keys_of(state));
        let found = self.inspect(keys)?;
        if !found.is_empty() {
            return Ok(pb::ReceiptKeysReply { keys: found });
        }
        if !self.attests() {
            let message = "the cluster is being upgraded: receipts are signed when all nodes run the new release";
            return Err(Refusal::new(Reason::Unavailable, message));
        }
        match self.add_due_key(term).await {
            Err(refusal) if refusal.reason != Reason::Conflict => Err(refusal),
            _ => Ok(pb::ReceiptKeysReply { keys: self.inspect(keys)? }),
        }
    }
}

fn signer_of(master: &MasterKey, number: u32, key: &ReceiptKey) -> Result<Signer, Refusal> {
    let object = ReceiptKey::object(&key.public);
    let seed = master.open_secret(RECEIPT_KEY, &object, u64::from(number), &key.boxed)?;
    let signer = Signer::new(&seed).filter(|signer| signer.public() == key.public);
    signer.ok_or_else(|| Refusal::new(Reason::Damaged, format!("receipt key {number} is not what it is called")))
}

pub(crate) fn keys_of(state: &State) -> Vec<pb::ReceiptKey> {
    let key = |(number, key): (u32, &ReceiptKey)| pb::ReceiptKey {
        number,
        public: key.public.to_vec().into(),
        created_ms: key.created_ms,
        endorsement: key.endorsement.clone(),
    };
    (1..).zip(&state.receipt_keys).map(key).collect()
}
