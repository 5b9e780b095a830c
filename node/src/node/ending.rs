//! The end of a node that its cluster has no place for: it was removed, or a later life of it is known.

use std::sync::{Arc, OnceLock};

use ensign_proto::NodeId;
use ensign_raft::env::Stop;
use thiserror::Error;
use tracing::error;

use crate::catalog::{PutNodeError, View};
use crate::files::NodeFloor;
use crate::health::Health;
use crate::peers::{Ended, Peers};

/// Why a node does not go on.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum NodeEnd {
    /// Something failed; another start may work.
    #[error("{0}")]
    Failed(String),
    /// It may not run: it was removed, or another process runs as it. Who starts it again by itself, does harm.
    #[error("{0}")]
    Barred(String),
}

impl NodeEnd {
    /// The end of a node that was removed.
    pub(crate) fn removed(me: NodeId) -> Self {
        Self::Barred(format!(
            "node {me} was removed from the cluster, for ever, and its peers refuse it. If the machine is to be a node again, it joins with \
             an empty data directory (`ensign cluster join`), and gets a new number"
        ))
    }

    /// The end of a node that cannot register.
    pub(super) fn unregistered(error: &anyhow::Error) -> Self {
        match error.downcast_ref() {
            Some(PutNodeError::LifeOver { .. } | PutNodeError::Revoked { .. }) => Self::Barred(format!("{error:#}")),
            _ => Self::Failed(format!("{error:#}")),
        }
    }
}

/// What [`Ending::watch`] looks at and tells.
pub(super) struct Ending {
    pub(super) me: NodeId,
    pub(super) incarnation: u64,
    pub(super) peers: Peers,
    pub(super) view: View,
    pub(super) floor: Arc<NodeFloor>,
    pub(super) health: Health,
    pub(super) end: Arc<OnceLock<NodeEnd>>,
}

impl Ending {
    /// Stops the node once it is certain that it was removed: its own catalog says so, or a peer; and if another process began its life first. If a
    /// later life of it is known, it stays, tells `/readyz` why, and takes care that its next start is one that counts. One task a node,
    /// until `stop`.
    pub(super) async fn watch(self, stop: Stop) {
        let (mut told, mut changes) = (self.peers.ended(), self.view.changes());
        let mut outlived = 0;
        loop {
            changes.mark_unchanged();
            let now = *told.borrow_and_update();
            if self.view.is_node_revoked(self.me) || now == Some(Ended::Removed) {
                let end = NodeEnd::removed(self.me);
                error!(node = %self.me, "this node was removed from the cluster, and stops");
                self.health.trouble("node", Some(end.to_string()));
                let _ = self.end.set(end);
                stop.cancel();
                return;
            }
            if now == Some(Ended::Outlived { seen: self.incarnation }) {
                // It never was the one that counts, and has nothing to wait for.
                let why = PutNodeError::LifeOver { node: self.me, seen: self.incarnation, shown: self.incarnation };
                error!(node = %self.me, life = self.incarnation, "another process began this life of the node first; this one stops");
                self.health.trouble("node", Some(why.to_string()));
                let _ = self.end.set(NodeEnd::Barred(why.to_string()));
                stop.cancel();
                return;
            }
            if let Some(Ended::Outlived { seen }) = now
                && seen > outlived
            {
                outlived = seen;
                self.outlived(seen);
            }
            tokio::select! {
                () = stop.cancelled() => return,
                changed = told.changed() => if changed.is_err() { return },
                changed = changes.changed() => if changed.is_err() { return },
            }
        }
    }

    fn outlived(&self, seen: u64) {
        let (me, own) = (self.me, self.incarnation);
        let why = format!(
            "another process runs as node {me}: it has begun life {seen}, and this is life {own} (each start of a data directory is one), so \
             the peers refuse this one. One of the two runs on a copy of the other's data directory, or has the wrong node.id. Stop the one \
             that does not belong. If that is the other one, restart this one: it begins life {}",
            seen + 1
        );
        error!(node = %me, own, seen, "another process runs as this node, and has taken its place");
        self.health.trouble("node", Some(why));
        if let Err(error) = self.floor.raise_life(seen) {
            error!(%error, "what is known of this node's lives cannot be kept in node.json: it takes two restarts to come back");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_for_ever_bars_a_node() {
        let barred = |error: PutNodeError| matches!(NodeEnd::unregistered(&error.into()), NodeEnd::Barred(_));
        assert!(barred(PutNodeError::Revoked { node: NodeId(3) }));
        assert!(barred(PutNodeError::LifeOver { node: NodeId(3), seen: 8, shown: 8 }));
        assert!(!barred(PutNodeError::NameTaken { name: "a".to_owned() }));
    }
}
