//! The vault and the keys held here, in the shapes that the rest of the node wants.

use ensign_keyvault::{CallError, Caller, Holder, Reason, SurrenderError, Vault, VaultClient};
use ensign_proto::pb::vault::v1::{Reply, Request, SurrenderReply, SurrenderRequest};
use ensign_proto::{Algorithm, ClusterId, NodeId, Partition, PartitionContext, ProjectId, RingId, TopicId};
use futures::FutureExt as _;
use futures::future::BoxFuture;
use tonic::Status;

use crate::catalog::{VaultFailure, VaultWrites};
use crate::identity::{Secret, SecretError, SecretKind, SecretStore};
use crate::peers::{HolderEndpoint, VaultEndpoint};

/// The vault's replica on this node, for peers.
pub(crate) struct VaultService(pub(crate) Vault);

impl VaultEndpoint for VaultService {
    fn call(&self, caller: NodeId, request: Request) -> BoxFuture<'static, Reply> {
        let vault = self.0.clone();
        async move { vault.handle(Caller { node: caller }, request).await }.boxed()
    }
}

/// The keys held by this node, for the vault's leader.
pub(crate) struct HolderService(pub(crate) Holder);

impl HolderEndpoint for HolderService {
    fn surrender(&self, request: SurrenderRequest) -> BoxFuture<'static, Result<SurrenderReply, Status>> {
        let holder = self.0.clone();
        async move {
            holder.surrender(request).await.map_err(|error| match error {
                SurrenderError::OtherSession => Status::not_found(error.to_string()),
                SurrenderError::Malformed => Status::invalid_argument(error.to_string()),
                SurrenderError::InUse => Status::unavailable(error.to_string()),
            })
        }
        .boxed()
    }
}

/// The vault, wherever its leader is, for the catalog and for logins.
#[derive(Clone)]
pub(crate) struct VaultAccess {
    client: VaultClient,
    cluster: ClusterId,
    actor: String,
}

impl VaultAccess {
    /// Access on behalf of node `me`.
    pub(crate) fn new(client: VaultClient, cluster: ClusterId, me: NodeId) -> Self {
        Self { client, cluster, actor: format!("node {me}") }
    }

    /// Topics have one partition.
    fn context(&self, project: ProjectId, topic: TopicId) -> PartitionContext {
        PartitionContext { cluster: self.cluster, project, topic, partition: Partition(0) }
    }
}

fn failure(error: &CallError) -> VaultFailure {
    VaultFailure::new(error.to_string())
}

impl VaultWrites for VaultAccess {
    fn create_ring(&self, project: ProjectId, ring: RingId) -> BoxFuture<'static, Result<(), VaultFailure>> {
        let access = self.clone();
        async move {
            let made = access.client.create_ring(&access.actor, ring, project, Algorithm::default()).await;
            made.map(drop).map_err(|error| failure(&error))
        }
        .boxed()
    }

    fn put_custody(
        &self,
        node: NodeId,
        project: ProjectId,
        topic: TopicId,
    ) -> BoxFuture<'static, Result<(), VaultFailure>> {
        let access = self.clone();
        async move {
            let context = access.context(project, topic);
            access.client.put_custody(&access.actor, node, &context).await.map_err(|error| failure(&error))
        }
        .boxed()
    }

    fn drop_custody(
        &self,
        node: NodeId,
        project: ProjectId,
        topic: TopicId,
    ) -> BoxFuture<'static, Result<(), VaultFailure>> {
        let access = self.clone();
        async move {
            let context = access.context(project, topic);
            access.client.drop_custody(&access.actor, node, &context).await.map_err(|error| failure(&error))
        }
        .boxed()
    }
}

/// The vault's number for a kind of secret.
fn kind_of(kind: SecretKind) -> ensign_keyvault::SecretKind {
    match kind {
        SecretKind::TokenSigning => ensign_keyvault::SecretKind::TOKEN_KEY,
        SecretKind::ApiKey => ensign_keyvault::SecretKind::API_KEY,
    }
}

fn secret_error(error: &CallError) -> SecretError {
    let cause = error.to_string();
    match error.reason() {
        Some(Reason::Conflict | Reason::AlreadyExists) => SecretError::Exists,
        Some(Reason::Invalid | Reason::NotGranted | Reason::Exhausted | Reason::Damaged) => {
            SecretError::Refused { cause }
        }
        _ => SecretError::Unavailable { cause },
    }
}

impl SecretStore for VaultAccess {
    fn put(&self, kind: SecretKind, id: [u8; 16], secret: Secret) -> BoxFuture<'static, Result<(), SecretError>> {
        let access = self.clone();
        async move {
            let put = access.client.put_secret(&access.actor, kind_of(kind), id, 0, secret.expose()).await;
            put.map(drop).map_err(|error| secret_error(&error))
        }
        .boxed()
    }

    fn get(&self, kind: SecretKind, id: [u8; 16]) -> BoxFuture<'static, Result<Option<Secret>, SecretError>> {
        let access = self.clone();
        async move {
            match access.client.secret(kind_of(kind), id).await {
                Ok(secret) => Ok(Some(Secret::new(secret.expose().to_vec()))),
                Err(error) if error.reason() == Some(Reason::NotFound) => Ok(None),
                Err(error) => Err(secret_error(&error)),
            }
        }
        .boxed()
    }

    fn delete(&self, kind: SecretKind, id: [u8; 16]) -> BoxFuture<'static, Result<(), SecretError>> {
        let access = self.clone();
        async move {
            let deleted = access.client.delete_secret(&access.actor, kind_of(kind), id, None).await;
            deleted.map_err(|error| secret_error(&error))
        }
        .boxed()
    }
}
