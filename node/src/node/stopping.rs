//! Stopping: leaderships move, streams end, groups stop, the lease is given back, logs close.

use std::time::Duration;

use tracing::{info, warn};

use super::{Node, NodeEnd};
use crate::health::Phase;
use crate::identity::Availability;

impl Node {
    /// Returns when the node cannot go on, with the reason.
    pub async fn failed(&self) -> NodeEnd {
        self.tasks.stop_token().cancelled().await;
        let end = self.tasks.panicked().map(NodeEnd::Failed).or_else(|| self.end.get().cloned());
        end.unwrap_or_else(|| NodeEnd::Failed("the node was asked to stop".to_owned()))
    }

    /// Hands over every leadership while clients are still served, so that none of them waits for an election: what they publish from
    /// now on is passed on to the new leaders. A balancer is told first, by `/readyz`.
    pub async fn hand_over(&self) {
        let what = "this node is asked to stop: it hands its leaderships over";
        self.health.trouble("stopping", Some(what.to_owned()));
        let deadline: Duration = self.config.shutdown.deadline.into();
        self.runtime.hand_over(deadline / 2).await;
    }

    /// Refuses new work and ends streams, in order; what is in progress is finished or told that it is not.
    pub async fn drain(&self) {
        self.health.set(Phase::Stopping);
        self.identity.set_availability(Availability::Stopping);
        let deadline: Duration = self.config.shutdown.deadline.into();
        if !self.edge.shut_down(deadline).await {
            warn!("some client calls did not end in time; their connections are closed");
        }
    }

    /// Hands leaderships over, stops every group, gives the lease back and closes the logs.
    pub async fn close(self) {
        let deadline: Duration = self.config.shutdown.deadline.into();
        self.runtime.shut_down(deadline).await;
        self.holder.release().await;
        if !self.tasks.shut_down(deadline).await {
            warn!("some tasks did not end in time");
        }
        for log in self.logs {
            log.close().await;
        }
        info!(node = self.config.node.id, "stopped");
    }
}
