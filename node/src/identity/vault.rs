//! Hashes and private keys in the cluster's vault.

use std::fmt;

use ensign_keyvault::{CallError, Reason, SecretKind as VaultKind, VaultClient};
use ensign_proto::NodeId;
use futures::FutureExt as _;
use futures::future::BoxFuture;

use super::secrets::{Secret, SecretError, SecretKind, SecretStore};
use crate::catalog::{Patience, is_passing};

/// [`SecretStore`] by the cluster's vault. Every call is repeated for some seconds while the vault elects.
#[derive(Clone)]
pub struct VaultSecrets {
    client: VaultClient,
    actor: String,
}

impl fmt::Debug for VaultSecrets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VaultSecrets").field("actor", &self.actor).finish_non_exhaustive()
    }
}

impl VaultSecrets {
    /// For node `me`, which the vault's record of events will name.
    pub fn new(client: VaultClient, me: NodeId) -> Self {
        Self { client, actor: format!("node {me}") }
    }
}

impl SecretStore for VaultSecrets {
    fn put(&self, kind: SecretKind, id: [u8; 16], secret: Secret) -> BoxFuture<'static, Result<(), SecretError>> {
        let this = self.clone();
        async move {
            // A repetition finds its own write and succeeds.
            let patience = Patience::new();
            loop {
                match this.client.put_secret(&this.actor, vault_kind(kind), id, 0, secret.expose()).await {
                    Err(error) if patience.again(&error).await => {}
                    settled => return settled.map(drop).map_err(|error| secret_error(&error)),
                }
            }
        }
        .boxed()
    }

    fn get(&self, kind: SecretKind, id: [u8; 16]) -> BoxFuture<'static, Result<Option<Secret>, SecretError>> {
        let this = self.clone();
        async move {
            let patience = Patience::new();
            loop {
                match this.client.secret(vault_kind(kind), id).await {
                    Ok(secret) => return Ok(Some(Secret::new(secret.expose().to_vec()))),
                    Err(error) if error.reason() == Some(Reason::NotFound) => return Ok(None),
                    Err(error) if patience.again(&error).await => {}
                    Err(error) => return Err(secret_error(&error)),
                }
            }
        }
        .boxed()
    }

    fn delete(&self, kind: SecretKind, id: [u8; 16]) -> BoxFuture<'static, Result<(), SecretError>> {
        let this = self.clone();
        async move {
            let patience = Patience::new();
            loop {
                match this.client.delete_secret(&this.actor, vault_kind(kind), id, None).await {
                    Err(error) if patience.again(&error).await => {}
                    settled => return settled.map_err(|error| secret_error(&error)),
                }
            }
        }
        .boxed()
    }
}

fn vault_kind(kind: SecretKind) -> VaultKind {
    match kind {
        SecretKind::TokenSigning => VaultKind::TOKEN_KEY,
        SecretKind::ApiKey => VaultKind::API_KEY,
        SecretKind::Authority => VaultKind::AUTHORITY,
    }
}

fn secret_error(error: &CallError) -> SecretError {
    let cause = error.to_string();
    match error.reason() {
        Some(Reason::Conflict | Reason::AlreadyExists) => SecretError::Exists,
        _ if is_passing(error) => SecretError::Unavailable { cause },
        _ => SecretError::Refused { cause },
    }
}
