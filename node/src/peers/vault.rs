//! The way to the vault's voters, and from the vault's leader to the nodes that hold keys.

use std::fmt;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use ensign_keyvault::{HolderLink, LinkError, VaultPeer};
use ensign_proto::NodeId;
use ensign_proto::pb::vault::v1::keyholder_client::KeyholderClient;
use ensign_proto::pb::vault::v1::vault_client::VaultClient;
use ensign_proto::pb::vault::v1::{RefreshReply, RefreshRequest, Reply, Request, SurrenderReply, SurrenderRequest};
use futures::FutureExt as _;
use futures::future::BoxFuture;

use super::server::{HolderEndpoint, VaultEndpoint};
use super::{PeerChannel, Peers};

/// How long any call may take: the longest that the way to the leader waits for one voter (a revoke, which answers after two
/// seconds at the latest, and its commits). Most calls are given up sooner by the link.
const CALL_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a holder may take to give keys up: uses in progress end within two seconds.
const SURRENDER_TIMEOUT: Duration = Duration::from_secs(4);

/// Calls between holders and the vault: to other nodes over the control connection, to this one directly.
#[derive(Clone)]
pub struct VaultCalls {
    peers: Peers,
    vault: Arc<OnceLock<Arc<dyn VaultEndpoint>>>,
    holder: Arc<OnceLock<Arc<dyn HolderEndpoint>>>,
}

impl fmt::Debug for VaultCalls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VaultCalls").field("peers", &self.peers).finish_non_exhaustive()
    }
}

impl VaultCalls {
    /// Calls over `peers`. The vault and the holder need this to exist first, and are made known afterwards.
    pub fn new(peers: Peers) -> Self {
        Self { peers, vault: Arc::default(), holder: Arc::default() }
    }

    /// Makes this node's vault and holder known.
    pub fn connect(&self, vault: Arc<dyn VaultEndpoint>, holder: Arc<dyn HolderEndpoint>) {
        // Set once, at start; a second call changes nothing.
        let _ = self.vault.set(vault);
        let _ = self.holder.set(holder);
    }
}

fn timed<T>(message: T, timeout: Duration) -> tonic::Request<T> {
    let mut request = tonic::Request::new(message);
    request.set_timeout(timeout);
    request
}

impl VaultPeer for VaultCalls {
    fn call(&self, node: NodeId, request: Request) -> BoxFuture<'static, Result<Reply, LinkError>> {
        if node == self.peers.me() {
            let Some(vault) = self.vault.get().cloned() else {
                return async { Err(LinkError::new("this node's vault has not started")) }.boxed();
            };
            return async move {
                tokio::time::timeout(CALL_TIMEOUT, vault.call(node, request))
                    .await
                    .map_err(|_| LinkError::new("this node's vault gave no answer in time"))
            }
            .boxed();
        }
        let channel = self.peers.channel(node);
        async move {
            let channel = channel.ok_or_else(|| LinkError::new(format!("node {node} is no node of this cluster")))?;
            let reply = VaultClient::new(channel).call(timed(request, CALL_TIMEOUT)).await;
            reply.map(tonic::Response::into_inner).map_err(|status| LinkError::new(status.message()))
        }
        .boxed()
    }
}

impl VaultCalls {
    /// This node's own holder.
    fn own_holder(&self) -> Result<Arc<dyn HolderEndpoint>, LinkError> {
        self.holder.get().cloned().ok_or_else(|| LinkError::new("this node holds no keys yet"))
    }

    /// The holder of another node.
    fn holder_of(&self, node: NodeId) -> Result<KeyholderClient<PeerChannel>, LinkError> {
        let channel = self.peers.channel(node);
        channel
            .map(KeyholderClient::new)
            .ok_or_else(|| LinkError::new(format!("node {node} is no node of this cluster")))
    }
}

impl HolderLink for VaultCalls {
    fn surrender(
        &self,
        node: NodeId,
        request: SurrenderRequest,
    ) -> BoxFuture<'static, Result<SurrenderReply, LinkError>> {
        let this = self.clone();
        async move {
            let reply = if node == this.peers.me() {
                this.own_holder()?.surrender(request).await
            } else {
                let request = timed(request, SURRENDER_TIMEOUT);
                this.holder_of(node)?.surrender(request).await.map(tonic::Response::into_inner)
            };
            reply.map_err(|status| LinkError::new(status.message()))
        }
        .boxed()
    }

    fn refresh(&self, node: NodeId, request: RefreshRequest) -> BoxFuture<'static, Result<RefreshReply, LinkError>> {
        let this = self.clone();
        async move {
            let reply = if node == this.peers.me() {
                this.own_holder()?.refresh(request).await
            } else {
                let request = timed(request, CALL_TIMEOUT);
                this.holder_of(node)?.refresh(request).await.map(tonic::Response::into_inner)
            };
            reply.map_err(|status| LinkError::new(status.message()))
        }
        .boxed()
    }
}
