//! Secrets of the identity service: token-signing keys, credential hashes. Sealed under the vault master key.

use ensign_proto::ClusterId;
use ensign_proto::NodeId;
use ensign_proto::pb::vault::v1 as pb;
use zeroize::Zeroize as _;

use super::{Caller, Vault, page, refuse_held, unexpected};
use crate::entropy::Entropy;
use crate::grant::{Sealer, secret_info};
use crate::link::{Reason, Refusal};
use crate::machine::{Change, DeleteSecret, Done};
use crate::wire;

const SECRET_MAX: usize = 64 * 1024;

/// What the answer to a read is bound to: `kind u8 ‖ id ‖ revision u64`.
pub(crate) fn read_aad(kind: u8, id: &[u8; 16], revision: u64) -> Vec<u8> {
    [&[kind][..], id, &revision.to_be_bytes()].concat()
}

/// The name of a secret.
pub(crate) fn name(kind: u32, id: &[u8]) -> Result<(u8, [u8; 16]), Refusal> {
    let kind = u8::try_from(kind).ok().filter(|kind| *kind != 0).ok_or_else(|| wire::malformed("kind"))?;
    Ok((kind, id.try_into().map_err(|_| wire::malformed("id"))?))
}

/// Seals a secret to the process that asked for it.
pub(crate) fn seal_reply(
    cluster: ClusterId,
    node: NodeId,
    public: &[u8],
    meta: pb::SecretMeta,
    secret: &[u8],
    entropy: &Entropy,
) -> Result<pb::SecretReply, Refusal> {
    let (kind, id) = name(meta.kind, &meta.id)?;
    let mut sealer =
        Sealer::new(public, &secret_info(cluster, node), entropy).ok_or_else(|| wire::malformed("hpke pk"))?;
    let sealed = sealer
        .seal(secret, &read_aad(kind, &id, meta.revision))
        .ok_or_else(|| Refusal::new(Reason::Unavailable, "the secret could not be sealed to the caller"))?;
    Ok(pb::SecretReply { meta: Some(meta), enc: sealer.enc().to_vec().into(), sealed: sealed.into() })
}

impl Vault {
    pub(super) async fn put_secret(
        &self,
        actor: &str,
        request: pb::PutSecretRequest,
    ) -> Result<pb::SecretMeta, Refusal> {
        self.must_lead()?;
        let (kind, id) = name(request.kind, &request.id)?;
        if request.secret.len() > SECRET_MAX {
            return Err(wire::malformed("secret"));
        }
        let master = self.master().await?;
        let change = master.seal_secret(kind, &id, request.expected + 1, &request.secret, &self.0.config.entropy);
        // Where nobody else shares the buffer that it came in, the plaintext ends here.
        if let Ok(mut buffer) = request.secret.try_into_mut() {
            buffer[..].zeroize();
        }
        match self.propose(actor, Change::PutSecret(change?)).await? {
            Done::Secret(meta) => Ok(meta),
            other => Err(unexpected(&other)),
        }
    }

    pub(super) async fn secret(&self, caller: Caller, request: &pb::SecretRequest) -> Result<pb::SecretReply, Refusal> {
        let (kind, id) = name(request.kind, &request.id)?;
        let master = self.master().await?;
        self.read_index().await?;
        let (meta, boxed) = self.inspect(|state| {
            refuse_held(state)?;
            let secret = state.secrets.get(&(kind, id));
            let secret = secret.ok_or_else(|| Refusal::new(Reason::NotFound, "there is no such secret"))?;
            Ok((secret.meta((kind, id), state.applied), secret.boxed.clone()))
        })?;
        let secret = master.open_secret(kind, &id, meta.revision, &boxed)?;
        let config = &self.0.config;
        seal_reply(config.cluster, caller.node, &request.hpke_pk, meta, &secret, &config.entropy)
    }

    pub(super) async fn delete_secret(
        &self,
        actor: &str,
        request: &pb::DeleteSecretRequest,
    ) -> Result<pb::SecretMeta, Refusal> {
        self.must_lead()?;
        name(request.kind, &request.id)?;
        let change = DeleteSecret { kind: request.kind, id: request.id.clone(), expected: request.expected };
        match self.propose(actor, Change::DeleteSecret(change)).await? {
            Done::Secret(meta) => Ok(meta),
            other => Err(unexpected(&other)),
        }
    }

    pub(super) async fn list_secrets(&self, request: &pb::ListSecretsRequest) -> Result<pb::ListSecretsReply, Refusal> {
        let kind = u8::try_from(request.kind).map_err(|_| wire::malformed("kind"))?;
        let after: [u8; 16] = if request.after.is_empty() {
            [0; 16]
        } else {
            request.after[..].try_into().map_err(|_| wire::malformed("after"))?
        };
        self.read_index().await?;
        self.inspect(|state| {
            let from = (kind, after);
            let of_kind = state.secrets.range(from..).take_while(|((other, _), _)| *other == kind);
            let later = of_kind.filter(|((_, id), _)| request.after.is_empty() || *id != after);
            let metas = later.map(|(key, secret)| secret.meta(*key, state.applied));
            let (secrets, more) = page(metas, request.limit);
            Ok(pb::ListSecretsReply { secrets, more })
        })
    }
}
