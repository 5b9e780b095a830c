//! All groups of a node.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use ensign_proto::{GroupId, NodeId};
use ensign_storage::GroupLog;

use crate::config::{GroupSpec, RuntimeConfig};
use crate::env::{Clock, Lane, Pipe, Rng, Tasks, Transport};
use crate::errors::StartError;
use crate::group::Group;
use crate::machine::StateMachine;

/// Runs a node's groups over one transport. Clones are cheap and share it.
#[derive(Clone)]
pub struct Runtime {
    inner: Arc<Inner>,
}

struct Inner {
    config: RuntimeConfig,
}

impl fmt::Debug for Runtime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Runtime").field("node", &self.inner.config.node).finish_non_exhaustive()
    }
}

impl Runtime {
    /// A runtime without groups. Call it within a tokio runtime; its tasks are children of `tasks`.
    pub fn new(
        config: RuntimeConfig,
        transport: Arc<dyn Transport>,
        clock: Arc<dyn Clock>,
        rng: Arc<dyn Rng>,
        tasks: Tasks,
    ) -> Self {
        let _ = (transport, clock, rng, tasks);
        Self { inner: Arc::new(Inner { config }) }
    }

    /// This node.
    pub fn node(&self) -> NodeId {
        self.inner.config.node
    }

    /// Serves a pipe that `peer` opened; the caller has authenticated `peer`. Returns at once.
    pub fn accept(&self, peer: NodeId, lane: Lane, pipe: Pipe) {
        let _ = (peer, lane, pipe);
    }

    /// Starts a group on `log`: recovers `machine` from snapshot, checkpoint and log, and takes part from then on.
    ///
    /// # Errors
    /// See [`StartError`].
    pub async fn start<S: StateMachine>(
        &self,
        spec: GroupSpec,
        log: Arc<dyn GroupLog>,
        machine: S,
    ) -> Result<Group<S>, StartError> {
        let _ = (spec, log, machine);
        Err(StartError::Stopping)
    }

    /// Stops a group here, without a hand-over; its data stays. Does nothing if it does not run.
    pub async fn stop(&self, group: GroupId) {
        let _ = group;
    }

    /// Hands leaderships over, then stops every group; what is not done by `deadline` is cut short.
    pub async fn shut_down(&self, deadline: Duration) {
        let _ = deadline;
    }
}
