//! Letting machines in.

use ensign_proto::ClusterVersion;
use ensign_proto::pb::peer::v1::join_server::{Join, JoinServer};
use ensign_proto::pb::peer::v1::{JoinPeer, JoinReply, JoinRequest};
use sha2::{Digest as _, Sha256};
use subtle::ConstantTimeEq as _;
use tonic::transport::server::{TcpConnectInfo, TlsConnectInfo};
use tonic::{Request, Response, Status};
use tracing::{info, warn};
use ulid::Ulid;

use super::{AuthorityUnavailable, Joins, Token};
use crate::authority::key_of_request;
use crate::catalog::{self, JoinError, NodeRecord, Refusal, WriteFailure};
use crate::config::{Label, PeerAddress};
use crate::status;

/// A request is a public key and some names.
const MESSAGE_MAX: usize = 16 << 10;

/// The service that machines without a certificate may call.
pub fn service(joins: Joins) -> JoinServer<impl Join> {
    JoinServer::new(Service(joins)).max_decoding_message_size(MESSAGE_MAX)
}

struct Service(Joins);

#[tonic::async_trait]
impl Join for Service {
    async fn join(&self, request: Request<JoinRequest>) -> Result<Response<JoinReply>, Status> {
        let from = request
            .extensions()
            .get::<TlsConnectInfo<TcpConnectInfo>>()
            .and_then(|connection| connection.get_ref().remote_addr())
            .map(|address| address.ip());
        let request = request.into_inner();
        let shown: [u8; 32] = Sha256::digest(&request.token).into();
        if let Some(wait) = self.0.wait(from, &shown) {
            let seconds = wait.as_secs() + 1;
            return Err(Status::resource_exhausted(format!("too many failed attempts: try again in {seconds} s")));
        }
        let token = match self.known(&request).await {
            Ok(token) => token,
            Err(refused) => {
                self.0.failed(from, shown);
                warn!(?from, reason = refused.message(), "a machine was not let in");
                return Err(refused);
            }
        };
        let join = self.read(&request, token)?;
        // Whoever is let in gets a certificate: without an authority, no number may be given away.
        self.0.authority().await.map_err(|error| unavailable(&error))?;
        let address = join.peer.clone();
        let node = match self.0.parts.catalog.join(join).await {
            Err(JoinError::Refused(Refusal::AddressTaken)) => return Err(self.address_taken(&address)),
            joined => joined.map_err(|error| refused(&error))?,
        };
        let reply = self.welcome(&request, &node).await?;
        info!(node = %node.id, name = node.name, address = node.peer, token = %Ulid::from_bytes(token), "a machine joined the cluster");
        Ok(Response::new(reply))
    }
}

impl Service {
    /// The token that was shown, if its secret was. Takes as long whether there is such a token or not.
    async fn known(&self, request: &JoinRequest) -> Result<[u8; 16], Status> {
        let catalog = &self.0.parts.catalog;
        catalog.refresh().await.map_err(|error| Status::unavailable(error.to_string()))?;
        let id = <[u8; 16]>::try_from(&request.token[..]).unwrap_or_default();
        let record = catalog.join_token(&id);
        let stored = record.as_ref().map_or([0; 32], |token| token.hash);
        let right: bool = Token::hash(&request.secret)[..].ct_eq(&stored[..]).into();
        let (Some(token), true) = (record, right) else {
            return Err(Status::unauthenticated(
                "the join token is not known to this cluster: it was mistyped, or forgotten a week after it ended. Make one with \
                 `ensign cluster token create`",
            ));
        };
        if token.revoked_at.is_some() {
            return Err(Status::unauthenticated(Refusal::TokenRevoked.to_string()));
        }
        if self.0.parts.clock.wall() >= token.expires {
            return Err(Status::unauthenticated(Refusal::TokenExpired.to_string()));
        }
        Ok(token.id)
    }

    fn address_taken(&self, address: &str) -> Status {
        let who = self.0.parts.catalog.view().node_at(address);
        let who = who.map_or_else(|| "another node".to_owned(), |node| format!("node {} ({})", node.id, node.name));
        Status::already_exists(format!(
            "{who} of the cluster is reached at {address}: name the address of this machine's own peer listener with --address. If that \
             node is gone for good, remove it first (`ensign node remove`)"
        ))
    }

    /// What the machine asks for.
    fn read(&self, request: &JoinRequest, token: [u8; 16]) -> Result<catalog::Join, Status> {
        let invalid = |field: &str, message: String| Status::invalid_argument(format!("{field}: {message}"));
        let label = |field: &str, text: &str| {
            text.parse::<Label>().map(|label| label.to_string()).map_err(|message| invalid(field, message))
        };
        let key = key_of_request(&request.request).map_err(|error| invalid("request", error.to_string()))?;
        for (field, text) in [("region", &request.region), ("zone", &request.zone)] {
            if text.is_empty() {
                return Err(invalid(field, "is empty".to_owned()));
            }
        }
        // The number does not matter here: what counts is that the rest is an address.
        let address = format!("1={}", request.address).parse::<PeerAddress>();
        Ok(catalog::Join {
            token,
            key,
            name: label("name", &request.name)?,
            region: label("region", &request.region)?,
            zone: label("zone", &request.zone)?,
            peer: address.map_err(|_| invalid("address", format!("{:?} is not HOST:PORT", request.address)))?.address,
            above: self.0.parts.above,
            version: ClusterVersion::or_first(request.newest_version),
            at: self.0.parts.clock.wall(),
        })
    }

    async fn welcome(&self, request: &JoinRequest, node: &NodeRecord) -> Result<JoinReply, Status> {
        let host = node.peer.rsplit_once(':').map(|(host, _)| host.trim_matches(['[', ']']).to_owned());
        let certified = self.0.certify(&request.request, node.id, host.into_iter().collect()).await;
        let (certificate, authority) = certified.map_err(|error| unavailable(&error))?;
        let view = self.0.parts.catalog.view();
        let others = view.nodes().into_iter().filter(|other| other.id != node.id && !view.is_node_revoked(other.id));
        Ok(JoinReply {
            node: node.id.0,
            cluster: self.0.parts.cluster.as_bytes().to_vec().into(),
            name: node.name.clone(),
            certificate: certificate.into(),
            authority: authority.der().to_vec().into(),
            peers: others.map(|other| JoinPeer { node: other.id.0, address: other.peer.clone() }).collect(),
        })
    }
}

fn unavailable(error: &AuthorityUnavailable) -> Status {
    match error {
        AuthorityUnavailable::ByHand => Status::failed_precondition(error.to_string()),
        AuthorityUnavailable::Vault(_) => Status::unavailable(error.to_string()),
        AuthorityUnavailable::Unusable(_) => {
            warn!(%error, "the cluster's authority cannot sign");
            Status::internal(error.to_string())
        }
    }
}

fn refused(error: &JoinError) -> Status {
    match error {
        JoinError::Refused(Refusal::NameTaken) => {
            Status::already_exists("another node of the cluster has this name: choose another one with --name")
        }
        JoinError::Refused(
            refusal @ (Refusal::TokenUnknown | Refusal::TokenExpired | Refusal::TokenUsedUp | Refusal::TokenRevoked),
        ) => Status::unauthenticated(refusal.to_string()),
        JoinError::Refused(refusal) => Status::failed_precondition(refusal.to_string()),
        // Whoever holds a token is let in by an operator, who is told which nodes are behind.
        JoinError::Write(failure @ WriteFailure::NotYet { .. }) => Status::failed_precondition(failure.to_string()),
        JoinError::Write(failure) => status::write_failed(failure, "the machine could not be let in"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_that_comes_before_the_cluster_is_upgraded_hears_which_nodes_are_behind() {
        let why = "node 3 speaks version 1: run the new version of ensign on it".to_owned();
        let not_yet = WriteFailure::NotYet { needs: ClusterVersion::V2, active: ClusterVersion::V1, why };
        let status = refused(&JoinError::Write(not_yet));
        assert_eq!(status.code(), tonic::Code::FailedPrecondition);
        assert!(status.message().contains("node 3 speaks version 1"), "{status:?}");
    }
}
