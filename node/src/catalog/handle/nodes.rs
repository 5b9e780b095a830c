//! Nodes, and the tokens and the authority that let machines become nodes.

use std::sync::Arc;

use ensign_proto::{ClusterVersion, NodeId};

use super::{Catalog, plain, unexpected};
use crate::catalog::command::{Command, Join, Outcome, Refusal, Response};
use crate::catalog::errors::{JoinError, PutNodeError, VaultFailure, WriteFailure};
use crate::catalog::link::Custody;
use crate::catalog::moves::NodeState;
use crate::catalog::records::{ClusterAuthority, JoinToken, NodeRecord, TopicState};

impl Catalog {
    /// Adds a node or replaces what is known of it. A node that registers for the first time gets custody of every topic first.
    ///
    /// # Errors
    /// See [`PutNodeError`].
    pub async fn put_node(&self, node: NodeRecord) -> Result<(), PutNodeError> {
        // What it speaks, and not what is left of that in a record for an older cluster, whose version may rise at this moment.
        let (id, speaks) = (node.id, node.speaks());
        let node = node.for_version(self.cluster_version());
        match self.node(id) {
            Some(known) if known.state == NodeState::Removed => return Err(PutNodeError::Revoked { node: id }),
            Some(known) if *known == (NodeRecord { state: known.state, ..node.clone() }) => return Ok(()),
            // It has custody already.
            Some(known) if known.incarnation > 0 => return self.write_node(node, speaks).await,
            Some(_) | None => {}
        }
        self.put_custody_of_all(&[id]).await?;
        self.write_node(node, speaks).await?;
        // Topics that were made meanwhile did not know of the node; from here on, they do.
        Ok(self.put_custody_of_all(&[id]).await?)
    }

    /// Makes a node known from afar, before it has a replica of the catalog: the leader gives it one because it is listed.
    /// Returns once a majority holds the record; what this node's view shows does not change by it.
    ///
    /// # Errors
    /// See [`PutNodeError`].
    pub async fn announce_node(&self, node: NodeRecord) -> Result<(), PutNodeError> {
        let (id, name, shown, speaks) = (node.id, node.name.clone(), node.incarnation, node.speaks());
        // What this node's view says of the cluster's version means nothing yet: first as the oldest nodes know a record. A cluster that
        // is past them refuses that, and can read all of it.
        let mut response = self.announce(node.clone().for_version(ClusterVersion::V1)).await?;
        if response == Err(Refusal::VersionTooOld) {
            response = self.announce(node).await?;
        }
        match response {
            Err(Refusal::NameTaken) => Err(PutNodeError::NameTaken { name }),
            Err(Refusal::NodeRevoked) => Err(PutNodeError::Revoked { node: id }),
            Err(Refusal::VersionTooOld) => {
                Err(PutNodeError::VersionTooOld { node: id, speaks, active: ClusterVersion(speaks.0 + 1) })
            }
            // It has registered with a life of its own already, and needs no announcement.
            Err(Refusal::LifeOver) => Err(PutNodeError::LifeOver { node: id, seen: shown + 1, shown }),
            response => Ok(plain(response)?),
        }
    }

    async fn announce(&self, node: NodeRecord) -> Result<Response, PutNodeError> {
        let proposed = self.propose(Command::PutNode(node).encode()).await;
        let (_, response) = proposed.map_err(|error| WriteFailure::Unavailable { cause: error.to_string() })?;
        Ok(response)
    }

    /// Writes the record, which may be one for an older cluster, of a node that speaks that.
    pub(in crate::catalog) async fn write_node(
        &self,
        node: NodeRecord,
        speaks: ClusterVersion,
    ) -> Result<(), PutNodeError> {
        let (id, name, shown) = (node.id, node.name.clone(), node.incarnation);
        match self.write(Command::PutNode(node)).await? {
            Err(Refusal::NameTaken) => Err(PutNodeError::NameTaken { name }),
            Err(Refusal::NodeRevoked) => Err(PutNodeError::Revoked { node: id }),
            Err(Refusal::VersionTooOld) => match self.cluster_version() {
                active if active <= speaks => Err(PutNodeError::VersionRaised),
                active => Err(PutNodeError::VersionTooOld { node: id, speaks, active }),
            },
            Err(Refusal::LifeOver) => {
                let seen = self.node(id).map_or(shown, |known| known.incarnation);
                Err(PutNodeError::LifeOver { node: id, seen, shown })
            }
            response => Ok(plain(response)?),
        }
    }

    /// Gives the cluster its certificate authority; the vault already has the key. Again changes nothing.
    ///
    /// # Errors
    /// [`JoinError`]: it has another one.
    pub async fn set_authority(&self, certificate: &str) -> Result<(), JoinError> {
        let authority = ClusterAuthority { certificate: certificate.to_owned(), created: self.now() };
        self.join_write(Command::SetAuthority(authority)).await.map(drop)
    }

    /// Adds a join token.
    ///
    /// # Errors
    /// [`JoinError`]: there are too many.
    pub async fn create_join_token(&self, token: JoinToken) -> Result<(), JoinError> {
        self.join_write(Command::CreateJoinToken(token)).await.map(drop)
    }

    /// Revokes a join token, for ever. Again changes nothing.
    ///
    /// # Errors
    /// [`JoinError`]: there is none.
    pub async fn revoke_join_token(&self, token: [u8; 16]) -> Result<(), JoinError> {
        self.join_write(Command::RevokeJoinToken { token, at: self.now() }).await.map(drop)
    }

    /// Lets a machine in whose token was checked. Asking again with the same key answers the same node.
    ///
    /// # Errors
    /// [`JoinError`]: the token is over, or the name is taken.
    pub async fn join(&self, join: Join) -> Result<Arc<NodeRecord>, JoinError> {
        match self.join_write(Command::Join(join)).await? {
            Outcome::Node(node) => Ok(node),
            other => Err(unexpected(&Ok(other)).into()),
        }
    }

    /// Ends a node's being one, for ever: every node refuses it as soon as it has applied this. Again changes nothing. It says
    /// nothing about what the node holds: move that away first.
    ///
    /// # Errors
    /// See [`WriteFailure`].
    pub async fn revoke_node(&self, node: NodeId) -> Result<(), WriteFailure> {
        plain(self.write(Command::RevokeNode { node, at: self.now() }).await?)
    }

    async fn join_write(&self, command: Command) -> Result<Outcome, JoinError> {
        self.write(command).await?.map_err(JoinError::Refused)
    }

    async fn put_custody_of_all(&self, nodes: &[NodeId]) -> Result<(), VaultFailure> {
        let topics = self.all_topics();
        let wanted = topics.iter().filter(|topic| topic.state != TopicState::Deleting);
        let custody: Vec<_> = wanted
            .flat_map(|topic| {
                nodes.iter().map(move |node| Custody { node: *node, project: topic.project, topic: topic.id })
            })
            .collect();
        if custody.is_empty() { Ok(()) } else { self.parts.vault.put_custodies(custody).await }
    }
}
