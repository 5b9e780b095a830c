//! Making the vault match the catalog after a crash between the two.
//!
//! The vault is written first when something is made, and last when a topic is forgotten. A crash in between, or a node that
//! registers while another makes a topic, leaves the vault with too much or too little. The catalog is the truth for what exists, and for
//! which rings are to be destroyed with an API key: whoever asked for that may have been cut off, or the vault was sealed.

use std::time::Duration;

use ensign_raft::env::Stop;
use futures::{StreamExt as _, TryStreamExt as _};
use tokio::time::timeout;
use tracing::{info, warn};

use super::errors::{ReconcileError, VaultFailure};
use super::handle::{Catalog, VAULT_CALLS_MAX};
use super::link::Custody;
use super::moves::NodeState;
use super::records::TopicState;

/// A topic that the catalog does not list may be on its way there for this long: its custody is left alone.
const IN_THE_MAKING: Duration = Duration::from_mins(10);
/// The most that one pass writes; what is left is for the next.
const WRITES_MAX: usize = 32_768;
/// The most rings that one pass has destroyed, each of which waits for the nodes that hold it.
const DESTROYED_MAX: usize = 256;

/// What a pass has changed in the vault.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Reconciled {
    /// Key rings that were missing.
    pub rings: usize,
    /// Custody that was missing.
    pub granted: usize,
    /// Custody of topics that do not exist.
    pub dropped: usize,
    /// Key rings that are to be destroyed with an API key, and were not.
    pub destroyed: usize,
}

impl Catalog {
    /// Compares the vault with the catalog and puts right what differs: reads both, and writes no more than is needed.
    /// Idempotent, bounded, and safe at any time. Rings of projects that were never made stay: nothing uses them.
    ///
    /// # Errors
    /// One of the two could not be read or written; call it again.
    pub async fn reconcile(&self) -> Result<Reconciled, ReconcileError> {
        let has = self.parts.vault.list().await?;
        // Read after the vault: what was made in between is in both, or in the making.
        self.refresh().await?;
        let rings: Vec<_> = self
            .projects(None)
            .iter()
            .map(|project| (project.id, project.ring))
            .filter(|ring| !has.rings.contains(ring))
            .take(WRITES_MAX)
            .collect();
        let (topics, nodes) = (self.all_topics(), self.custodians());
        let wanted = topics.iter().filter(|topic| topic.state != TopicState::Deleting).flat_map(|topic| {
            nodes.iter().map(|node| Custody { node: *node, project: topic.project, topic: topic.id })
        });
        let granted: Vec<_> = wanted.filter(|custody| !has.custody.contains(custody)).take(WRITES_MAX).collect();
        let made_before = self.now().as_millis().saturating_sub(IN_THE_MAKING.as_millis() as u64);
        let is_left_over = |custody: &&Custody| {
            // The id of a topic begins with the time when it was made.
            let made = custody.topic.as_bytes()[..6].iter().fold(0, |ms, byte| ms << 8 | u64::from(*byte));
            let removed = self.node(custody.node).is_some_and(|node| node.state == NodeState::Removed);
            removed || (made < made_before && self.topic(custody.topic).is_none())
        };
        let dropped: Vec<_> = has.custody.iter().filter(is_left_over).copied().take(WRITES_MAX).collect();
        let mut doomed = self.view().shredded_rings(&has.living);
        doomed.truncate(DESTROYED_MAX);
        let done =
            Reconciled { rings: rings.len(), granted: granted.len(), dropped: dropped.len(), destroyed: doomed.len() };

        let vault = &self.parts.vault;
        carry_out(rings.into_iter().map(|(project, ring)| vault.create_ring(project, ring))).await?;
        if !granted.is_empty() {
            vault.put_custodies(granted).await?;
        }
        if !dropped.is_empty() {
            vault.drop_custodies(dropped).await?;
        }
        // Last, and each for itself: one that the vault cannot destroy now keeps nothing else from being put right.
        let calls = doomed.into_iter().map(|ring| vault.destroy_ring(ring));
        let ordered: Vec<_> = futures::stream::iter(calls).buffer_unordered(VAULT_CALLS_MAX).collect().await;
        ordered.into_iter().collect::<Result<Vec<()>, _>>()?;
        if done != Reconciled::default() {
            let Reconciled { rings, granted, dropped, destroyed } = done;
            info!(rings, granted, dropped, destroyed, "the vault was put right");
        }
        Ok(done)
    }

    /// Reconciles whenever this node comes to lead the catalog, and then every `period`, until `stop`. One task a node.
    pub async fn keep_reconciled(self, period: Duration, stop: Stop) {
        let mut leadership = self.parts.replica.leadership();
        loop {
            let leads = leadership.borrow_and_update().ready;
            if leads && let Some(Err(error)) = stop.run_until_cancelled(self.reconcile()).await {
                warn!(%error, "the vault could not be compared with the catalog; tried again later");
            }
            // Who leads hears of the end of its leadership only to begin anew with the next one.
            let woken = stop.run_until_cancelled(timeout(period, leadership.changed())).await;
            if woken.is_none() || matches!(woken, Some(Ok(Err(_)))) {
                return;
            }
        }
    }
}

/// Carries a few at a time out.
pub(super) async fn carry_out<F>(calls: impl Iterator<Item = F>) -> Result<(), VaultFailure>
where
    F: Future<Output = Result<(), VaultFailure>>,
{
    futures::stream::iter(calls).buffer_unordered(VAULT_CALLS_MAX).try_collect().await
}
