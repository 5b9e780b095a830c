//! The catalog's side of the vault: key rings and custody, through the vault's client.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use ensign_keyvault::{CUSTODY_BATCH_MAX, CallError, Reason, VaultClient};
use ensign_proto::{Algorithm, ClusterId, ClusterVersion, NodeId, Partition, PartitionContext, ProjectId, RingId};
use futures::FutureExt as _;
use futures::future::BoxFuture;
use tokio::time::{Instant, sleep};

use super::errors::VaultFailure;
use super::link::{Custody, VaultHas, VaultWrites};
use super::reconcile::carry_out;

/// How long a call is repeated while the vault elects, starts or cannot be reached.
const PATIENCE: Duration = Duration::from_secs(10);
const PAUSE: Duration = Duration::from_millis(50);

/// [`VaultWrites`] by the cluster's vault.
#[derive(Clone)]
pub struct VaultRings {
    client: VaultClient,
    cluster: ClusterId,
    actor: String,
    version: Version,
}

/// The cluster's version, whenever it is asked for.
type Version = Arc<dyn Fn() -> ClusterVersion + Send + Sync>;

impl fmt::Debug for VaultRings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VaultRings").field("actor", &self.actor).finish_non_exhaustive()
    }
}

impl VaultRings {
    /// For node `me`, which the vault's record of events will name. `version` tells the cluster's.
    pub fn new(client: VaultClient, cluster: ClusterId, me: NodeId, version: Version) -> Self {
        Self { client, cluster, actor: format!("node {me}"), version }
    }

    /// How many records one command of the vault may carry now: one is written as nodes of the first version can read it.
    fn batch(&self) -> usize {
        if (self.version)() >= ClusterVersion::V2 { CUSTODY_BATCH_MAX } else { 1 }
    }

    fn places(&self, records: &[Custody]) -> Vec<(NodeId, PartitionContext)> {
        let context = |it: &Custody| PartitionContext {
            cluster: self.cluster,
            project: it.project,
            topic: it.topic,
            partition: Partition(0),
        };
        records.iter().map(|it| (it.node, context(it))).collect()
    }
}

impl VaultWrites for VaultRings {
    fn list(&self) -> BoxFuture<'static, Result<VaultHas, VaultFailure>> {
        let this = self.clone();
        async move {
            let rings = this.client.list_rings(None).await.map_err(failure)?;
            let custody = this.client.list_custody().await.map_err(failure)?;
            Ok(VaultHas {
                rings: rings.iter().map(|ring| (ring.project, ring.ring)).collect(),
                living: rings.iter().filter(|ring| !ring.is_destroyed()).map(|ring| ring.ring).collect(),
                custody: custody
                    .into_iter()
                    .map(|(node, at)| Custody { node, project: at.project, topic: at.topic })
                    .collect(),
            })
        }
        .boxed()
    }

    fn create_ring(&self, project: ProjectId, ring: RingId) -> BoxFuture<'static, Result<(), VaultFailure>> {
        let this = self.clone();
        async move {
            let patience = Patience::new();
            loop {
                match this.client.create_ring(&this.actor, ring, project, Algorithm::default()).await {
                    Err(error) if patience.again(&error).await => {}
                    settled => return settled.map(drop).map_err(failure),
                }
            }
        }
        .boxed()
    }

    fn destroy_ring(&self, ring: RingId) -> BoxFuture<'static, Result<(), VaultFailure>> {
        let this = self.clone();
        async move {
            match this.client.revoke(&this.actor, ring, None, Duration::ZERO).await {
                // The vault's leader goes on with what it was ordered.
                Err(CallError::Refused(refusal)) if refusal.reason == Reason::Pending => Ok(()),
                settled => settled.map(drop).map_err(failure),
            }
        }
        .boxed()
    }

    fn put_custodies(&self, records: Vec<Custody>) -> BoxFuture<'static, Result<(), VaultFailure>> {
        let (this, records) = (self.clone(), self.places(&records));
        let calls: Vec<_> = records.chunks(this.batch()).map(<[_]>::to_vec).collect();
        let call = move |batch: Vec<(NodeId, PartitionContext)>| {
            let this = this.clone();
            async move {
                let patience = Patience::new();
                while let Err(error) = this.client.put_custodies(&this.actor, &batch).await {
                    if !patience.again(&error).await {
                        return Err(failure(error));
                    }
                }
                Ok(())
            }
        };
        carry_out(calls.into_iter().map(call)).boxed()
    }

    fn drop_custodies(&self, records: Vec<Custody>) -> BoxFuture<'static, Result<(), VaultFailure>> {
        let (this, records) = (self.clone(), self.places(&records));
        let calls: Vec<_> = records.chunks(this.batch()).map(<[_]>::to_vec).collect();
        let call = move |batch: Vec<(NodeId, PartitionContext)>| {
            let this = this.clone();
            async move {
                let patience = Patience::new();
                while let Err(error) = this.client.drop_custodies(&this.actor, &batch).await {
                    if !patience.again(&error).await {
                        return Err(failure(error));
                    }
                }
                Ok(())
            }
        };
        carry_out(calls.into_iter().map(call)).boxed()
    }
}

fn failure(error: CallError) -> VaultFailure {
    VaultFailure::new(error.to_string())
}

/// How often a call that may be repeated is repeated: while the vault is only on its way.
#[derive(Debug)]
pub(crate) struct Patience {
    deadline: Instant,
}

impl Patience {
    /// From now on.
    pub(crate) fn new() -> Self {
        Self { deadline: Instant::now() + PATIENCE }
    }

    /// Whether to call again after this failure; waits a moment first.
    pub(crate) async fn again(&self, error: &CallError) -> bool {
        let again = is_passing(error) && Instant::now() + PAUSE < self.deadline;
        if again {
            sleep(PAUSE).await;
        }
        again
    }
}

/// Whether the same call may succeed in a moment.
pub(crate) fn is_passing(error: &CallError) -> bool {
    match error {
        CallError::Unreachable(_) => true,
        CallError::Refused(refusal) => {
            matches!(refusal.reason, Reason::NotLeader | Reason::Unavailable | Reason::Sealed | Reason::OutcomeUnknown)
        }
        CallError::Malformed { .. } => false,
    }
}
