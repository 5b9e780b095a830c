//! The vault's replica and the keys held here, as other nodes call them.

use ensign_keyvault::{Caller, Holder, RefreshError, SurrenderError, Vault};
use ensign_proto::NodeId;
use ensign_proto::pb::vault::v1::{RefreshReply, RefreshRequest, Reply, Request, SurrenderReply, SurrenderRequest};
use futures::FutureExt as _;
use futures::future::BoxFuture;
use tonic::Status;

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

    fn refresh(&self, request: RefreshRequest) -> BoxFuture<'static, Result<RefreshReply, Status>> {
        let holder = self.0.clone();
        async move {
            holder.refresh(request).await.map_err(|error| match error {
                RefreshError::OtherSession => Status::not_found(error.to_string()),
                RefreshError::Late => Status::unavailable(error.to_string()),
            })
        }
        .boxed()
    }
}
