//! The admin service: organizations, projects, API keys, key rings and the state of the cluster, for who may.
//!
//! Served beside the public API on the gRPC port; `admin.proto` is its documentation. A caller sees its own organization, an
//! operator's key sees all. Here requests are read and answered; what they change is the catalog's and the vault's.

mod apikeys;
mod convert;
mod keys;
mod placement;
mod quota;
mod removal;
mod scope;
mod status;
mod topics;
mod version;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use ensign_keyvault::{LeaseConfig, VaultClient};
use ensign_proto::pb::admin::v1 as pb;
use ensign_proto::pb::admin::v1::admin_server::{Admin, AdminServer};
use ensign_proto::{ApiKeyId, ClusterId, KeyVersion, NodeId, Permission};
use ensign_raft::Runtime;
use ensign_raft::env::{Clock, UnixNanos};
use tonic::{Request, Response, Status};
use tracing::info;

use crate::catalog::{ApiKey, Catalog};
use crate::identity::{Identity, NewApiKey};
use crate::join::Joins;
use crate::local;
use crate::partition::Partitions;
use crate::quota::Quotas;
use crate::report::PeerReports;
use crate::upgrade::Upgrades;
use scope::Caller;
pub(crate) use status::vault as vault_status;

/// How long a join token lives where nothing is said.
const JOIN_TTL: Duration = Duration::from_hours(1);

/// What the admin service needs.
pub struct AdminParts {
    /// This node.
    pub node: NodeId,
    /// This cluster.
    pub cluster: ClusterId,
    /// Organizations, projects, API keys, nodes.
    pub catalog: Catalog,
    /// Who is calling; also makes API keys.
    pub identity: Identity,
    /// The partitions of this node, which those that just made a topic wait for.
    pub partitions: Partitions,
    /// Join tokens.
    pub joins: Joins,
    /// The cluster's version.
    pub upgrades: Upgrades,
    /// Key rings.
    pub vault: VaultClient,
    /// The cluster's leases, which say how long a revocation takes at worst.
    pub lease: LeaseConfig,
    /// The groups of this node.
    pub runtime: Runtime,
    /// What projects use.
    pub quotas: Quotas,
    /// How every node is.
    pub reports: PeerReports,
    /// What time it is.
    pub clock: Arc<dyn Clock>,
}

struct Shared {
    node: NodeId,
    cluster: ClusterId,
    catalog: Catalog,
    identity: Identity,
    partitions: Partitions,
    joins: Joins,
    upgrades: Upgrades,
    vault: VaultClient,
    lease: LeaseConfig,
    runtime: Runtime,
    quotas: Quotas,
    reports: PeerReports,
    clock: Arc<dyn Clock>,
    started: UnixNanos,
}

/// The `ensign.admin.v1.Admin` service. Add it to the client listener's routes.
pub fn service(parts: AdminParts) -> AdminServer<impl Admin> {
    let AdminParts {
        node,
        cluster,
        catalog,
        identity,
        partitions,
        joins,
        upgrades,
        vault,
        lease,
        runtime,
        quotas,
        reports,
        clock,
    } = parts;
    let started = clock.wall();
    let shared = Shared {
        node,
        cluster,
        catalog,
        identity,
        partitions,
        joins,
        upgrades,
        vault,
        lease,
        runtime,
        quotas,
        reports,
        clock,
        started,
    };
    AdminServer::new(Service(Arc::new(shared)))
}

struct Service(Arc<Shared>);

impl Service {
    /// Verifies the caller, and catches up with the cluster so that what it made elsewhere a moment ago is seen.
    async fn enter<T>(&self, request: Request<T>, need: Permission) -> Result<(Caller, T), Status> {
        let caller = Caller::authorize(&self.0, request.metadata(), need).await?;
        self.0.catalog.refresh().await.map_err(|error| status::stale(&error))?;
        Ok((caller, request.into_inner()))
    }

    /// Who is named in the vault's record of key events.
    fn actor(caller: &Caller) -> String {
        format!("apikey:{}", caller.claims.subject)
    }

    fn find_api_key(&self, caller: &Caller, text: &str) -> Result<Arc<ApiKey>, Status> {
        if text.is_empty() {
            return Err(Status::invalid_argument("key: name an API key by its id or its client id"));
        }
        let view = self.0.catalog.view();
        let by_id = text.parse::<ApiKeyId>().ok().and_then(|id| view.api_key(id));
        let found = by_id.or_else(|| view.api_key_by_client(text)).filter(|key| caller.sees(key.org));
        found.ok_or_else(|| Status::not_found("API key not found"))
    }
}

#[tonic::async_trait]
impl Admin for Service {
    async fn create_organization(
        &self,
        request: Request<pb::CreateOrganizationRequest>,
    ) -> Result<Response<pb::Organization>, Status> {
        let (_, request) = self.enter(request, Permission::OrganizationsEdit).await?;
        let name = scope::name(&request.name)?;
        let created = self.0.catalog.create_organization(name).await;
        let org = created.map_err(|error| status::create_organization(&error))?;
        Ok(Response::new(convert::organization(&org)))
    }

    async fn list_organizations(
        &self,
        request: Request<pb::ListOrganizationsRequest>,
    ) -> Result<Response<pb::ListOrganizationsReply>, Status> {
        let (caller, _) = self.enter(request, Permission::OrganizationsRead).await?;
        let all = self.0.catalog.view().organizations();
        let organizations =
            all.iter().filter(|org| caller.sees(org.id)).map(|org| convert::organization(org)).collect();
        Ok(Response::new(pb::ListOrganizationsReply { organizations }))
    }

    async fn create_project(
        &self,
        request: Request<pb::CreateProjectRequest>,
    ) -> Result<Response<pb::Project>, Status> {
        let (caller, request) = self.enter(request, Permission::ProjectsEdit).await?;
        let org = caller.organization(&request.organization_id)?;
        let name = scope::name(&request.name)?;
        let created = self.0.catalog.create_project(org, name).await;
        let project = created.map_err(|error| status::create_project(&error))?;
        Ok(Response::new(convert::project(&project)))
    }

    async fn list_projects(
        &self,
        request: Request<pb::ListProjectsRequest>,
    ) -> Result<Response<pb::ListProjectsReply>, Status> {
        let (caller, request) = self.enter(request, Permission::ProjectsRead).await?;
        let org = caller.organizations(&request.organization_id)?;
        let projects = self.0.catalog.view().projects(org).iter().map(|project| convert::project(project)).collect();
        Ok(Response::new(pb::ListProjectsReply { projects }))
    }

    async fn create_topics(
        &self,
        request: Request<pb::CreateTopicsRequest>,
    ) -> Result<Response<pb::CreateTopicsReply>, Status> {
        let (caller, request) = self.enter(request, Permission::TopicsCreate).await?;
        let project = caller.project(&self.0, &request.project_id)?;
        topics::create(&self.0, &project, request.names, &request.ring).await.map(Response::new)
    }

    async fn list_topic_rings(
        &self,
        request: Request<pb::ListTopicRingsRequest>,
    ) -> Result<Response<pb::ListTopicRingsReply>, Status> {
        let (caller, request) = self.enter(request, Permission::TopicsRead).await?;
        let project = caller.project(&self.0, &request.project_id)?;
        topics::rings(&self.0, &project, &request.topic_id).map(Response::new)
    }

    async fn create_api_key(
        &self,
        request: Request<pb::CreateApiKeyRequest>,
    ) -> Result<Response<pb::CreateApiKeyReply>, Status> {
        let (caller, request) = self.enter(request, Permission::ApiKeysEdit).await?;
        let name = scope::name(&request.name)?.to_owned();
        let permissions = convert::permissions(&request.permissions)?;
        let project = caller.project(&self.0, &request.project_id)?;
        let id = self.0.catalog.fresh_api_key();
        let ring = apikeys::ring(&self.0, &caller, &project, id, request.sealing).await?;
        let new = NewApiKey { name, org: project.org, project: Some(project.id), permissions, admin: false, ring };
        let created = self.0.identity.create_api_key_as(id, new).await;
        let (key, credentials) = created.map_err(|error| status::create_api_key(&error))?;
        Ok(Response::new(pb::CreateApiKeyReply {
            key: Some(convert::api_key(&key)),
            client_secret: credentials.secret.expose().to_owned(),
        }))
    }

    async fn describe_api_key(
        &self,
        request: Request<pb::DescribeApiKeyRequest>,
    ) -> Result<Response<pb::ApiKeyDescription>, Status> {
        let (caller, request) = self.enter(request, Permission::ApiKeysRead).await?;
        let key = self.find_api_key(&caller, &request.key)?;
        apikeys::describe(&self.0, &key).await.map(Response::new)
    }

    async fn list_api_keys(
        &self,
        request: Request<pb::ListApiKeysRequest>,
    ) -> Result<Response<pb::ListApiKeysReply>, Status> {
        let (caller, request) = self.enter(request, Permission::ApiKeysRead).await?;
        let project = caller.named_project(&self.0, &request.project_id)?.map(|project| project.id);
        let all = self.0.catalog.view().api_keys(project);
        let visible = all.iter().filter(|key| caller.sees(key.org));
        let mut keys: Vec<_> = visible.map(|key| convert::api_key(key)).collect();
        apikeys::tell_destroyed(&self.0, project, &mut keys).await;
        Ok(Response::new(pb::ListApiKeysReply { keys }))
    }

    async fn revoke_api_key(
        &self,
        request: Request<pb::RevokeApiKeyRequest>,
    ) -> Result<Response<pb::RevokeApiKeyReply>, Status> {
        let (caller, request) = self.enter(request, Permission::ApiKeysDelete).await?;
        let key = self.find_api_key(&caller, &request.key)?;
        if request.shred {
            return apikeys::shred(&self.0, &caller, &key).await.map(Response::new);
        }
        let revoked = self.0.identity.revoke_api_key(key.id).await.map_err(|error| status::api_key(&error))?;
        let key = Some(convert::api_key(&revoked));
        Ok(Response::new(pb::RevokeApiKeyReply { key, ..Default::default() }))
    }

    async fn list_keys(&self, request: Request<pb::ListKeysRequest>) -> Result<Response<pb::ListKeysReply>, Status> {
        let (caller, request) = self.enter(request, Permission::ProjectsRead).await?;
        let project = caller.named_project(&self.0, &request.project_id)?.map(|project| project.id);
        let all = self.0.vault.list_rings(project).await.map_err(|error| status::vault(&error))?;
        let view = self.0.catalog.view();
        let visible = |ring: &&ensign_keyvault::RingInfo| {
            view.project(ring.project).is_some_and(|project| caller.sees(project.org))
        };
        let rings = all.iter().filter(visible).map(convert::ring).collect();
        Ok(Response::new(pb::ListKeysReply { rings }))
    }

    async fn rotate_key(&self, request: Request<pb::RotateKeyRequest>) -> Result<Response<pb::RotateKeyReply>, Status> {
        let (caller, request) = self.enter(request, Permission::ProjectsEdit).await?;
        let ring = caller.ring(&self.0, &request.ring_id, &request.project_id).await?;
        let rotated = self.0.vault.rotate(&Self::actor(&caller), ring, None).await;
        let rotated = rotated.map_err(|error| status::vault(&error))?;
        let version = rotated.active().ok_or_else(|| Status::internal("the key ring has no active version"))?;
        info!(%ring, version = version.0, by = %caller.claims.subject, "a key ring was rotated");
        Ok(Response::new(pb::RotateKeyReply { ring_id: ring.to_string(), version: version.0 }))
    }

    async fn revoke_key(&self, request: Request<pb::RevokeKeyRequest>) -> Result<Response<pb::RevokeKeyReply>, Status> {
        use pb::revoke_key_request::Which;
        let (caller, request) = self.enter(request, Permission::ProjectsDelete).await?;
        let version = match request.which {
            Some(Which::Version(version)) if version > 0 => Some(KeyVersion(version)),
            Some(Which::All(true)) => None,
            Some(Which::Version(_) | Which::All(_)) | None => {
                return Err(Status::invalid_argument("say which version to destroy, from 1, or all"));
            }
        };
        let ring = caller.ring(&self.0, &request.ring_id, &request.project_id).await?;
        let begin = self.0.clock.boot();
        let patience = self.0.lease.revoke_patience();
        let revoked = self.0.vault.revoke(&Self::actor(&caller), ring, version, patience).await;
        let receipt = revoked.map_err(|error| status::vault(&error))?;
        info!(%ring, ?version, by = %caller.claims.subject, "keys were destroyed");
        Ok(Response::new(pb::RevokeKeyReply {
            ring_id: ring.to_string(),
            versions: receipt.versions.iter().map(|(version, _)| version.0).collect(),
            receipt: receipt.jws,
            waited: convert::span(self.0.clock.boot().0.saturating_sub(begin.0)),
        }))
    }

    async fn list_key_receipts(
        &self,
        request: Request<pb::ListKeyReceiptsRequest>,
    ) -> Result<Response<pb::ListKeyReceiptsReply>, Status> {
        let (caller, request) = self.enter(request, Permission::ProjectsRead).await?;
        keys::receipts(&self.0, &caller, &request).await.map(Response::new)
    }

    async fn create_key_ring(
        &self,
        request: Request<pb::CreateKeyRingRequest>,
    ) -> Result<Response<pb::KeyRing>, Status> {
        let (caller, request) = self.enter(request, Permission::ProjectsEdit).await?;
        keys::create(&self.0, &caller, &request).await.map(Response::new)
    }

    async fn describe_key(&self, request: Request<pb::DescribeKeyRequest>) -> Result<Response<pb::KeyRing>, Status> {
        let (caller, request) = self.enter(request, Permission::ProjectsRead).await?;
        keys::describe(&self.0, &caller, &request).await.map(Response::new)
    }

    async fn disable_key(&self, request: Request<pb::SwitchKeyRequest>) -> Result<Response<pb::KeyRing>, Status> {
        let (caller, request) = self.enter(request, Permission::ProjectsEdit).await?;
        keys::switch(&self.0, &caller, &request, keys::Switch::Disable).await.map(Response::new)
    }

    async fn enable_key(&self, request: Request<pb::SwitchKeyRequest>) -> Result<Response<pb::KeyRing>, Status> {
        let (caller, request) = self.enter(request, Permission::ProjectsEdit).await?;
        keys::switch(&self.0, &caller, &request, keys::Switch::Enable).await.map(Response::new)
    }

    async fn schedule_revoke_key(
        &self,
        request: Request<pb::ScheduleRevokeKeyRequest>,
    ) -> Result<Response<pb::KeyRing>, Status> {
        let (caller, request) = self.enter(request, Permission::ProjectsDelete).await?;
        keys::schedule_revoke(&self.0, &caller, &request).await.map(Response::new)
    }

    async fn cancel_revoke_key(&self, request: Request<pb::SwitchKeyRequest>) -> Result<Response<pb::KeyRing>, Status> {
        let (caller, request) = self.enter(request, Permission::ProjectsEdit).await?;
        keys::switch(&self.0, &caller, &request, keys::Switch::CancelRevoke).await.map(Response::new)
    }

    async fn set_key(&self, request: Request<pb::SetKeyRequest>) -> Result<Response<pb::KeyRing>, Status> {
        let (caller, request) = self.enter(request, Permission::ProjectsEdit).await?;
        keys::set(&self.0, &caller, &request).await.map(Response::new)
    }

    async fn create_join_token(
        &self,
        request: Request<pb::CreateJoinTokenRequest>,
    ) -> Result<Response<pb::CreateJoinTokenReply>, Status> {
        let (caller, request) = self.enter(request, Permission::OrganizationsEdit).await?;
        caller.operates()?;
        let ttl = request.ttl.map_or(Ok(JOIN_TTL), Duration::try_from);
        let ttl = ttl.map_err(|_| Status::invalid_argument("ttl is no span of time, or a negative one"))?;
        let created = self.0.joins.create_token(ttl, request.uses.max(1)).await;
        let (token, secret) = created.map_err(|error| status::create_join_token(&error))?;
        info!(id = %ulid::Ulid::from_bytes(token.id), by = %caller.claims.subject, "a join token was made");
        Ok(Response::new(pb::CreateJoinTokenReply {
            token: Some(convert::join_token(&token)),
            secret: secret.as_str().to_owned(),
        }))
    }

    async fn list_join_tokens(
        &self,
        request: Request<pb::ListJoinTokensRequest>,
    ) -> Result<Response<pb::ListJoinTokensReply>, Status> {
        let (caller, _) = self.enter(request, Permission::OrganizationsRead).await?;
        caller.operates()?;
        let tokens = self.0.catalog.view().join_tokens().iter().map(|token| convert::join_token(token)).collect();
        Ok(Response::new(pb::ListJoinTokensReply { tokens }))
    }

    async fn revoke_join_token(
        &self,
        request: Request<pb::RevokeJoinTokenRequest>,
    ) -> Result<Response<pb::RevokeJoinTokenReply>, Status> {
        let (caller, request) = self.enter(request, Permission::OrganizationsEdit).await?;
        caller.operates()?;
        let id: ulid::Ulid = request.id.parse().map_err(|_| {
            Status::invalid_argument("id: name a join token by its id, as `ensign cluster token list` shows it")
        })?;
        let revoked = self.0.catalog.revoke_join_token(id.to_bytes()).await;
        revoked.map_err(|error| status::join_token(&error))?;
        info!(%id, by = %caller.claims.subject, "a join token was revoked");
        Ok(Response::new(pb::RevokeJoinTokenReply {}))
    }

    async fn set_quota(&self, request: Request<pb::SetQuotaRequest>) -> Result<Response<pb::QuotaStatus>, Status> {
        let (caller, request) = self.enter(request, Permission::ProjectsEdit).await?;
        quota::check_operator(&caller)?;
        let change = quota::change(request.change)?;
        let whose = quota::whose(&caller, &self.0, request.whose.as_ref())?;
        let set = self.0.catalog.set_quota(whose, change).await;
        set.map_err(|error| status::set_quota(&error))?;
        info!(project = ?whose.map(|id| id.to_string()), ?change, by = %caller.claims.subject, "a quota was changed");
        let after = match whose.and_then(|project| self.0.catalog.view().project(project)) {
            Some(project) => quota::projects(&self.0, &[project]).await.pop().unwrap_or_default(),
            None => quota::default(&self.0),
        };
        Ok(Response::new(after))
    }

    async fn show_quotas(
        &self,
        request: Request<pb::ShowQuotasRequest>,
    ) -> Result<Response<pb::ShowQuotasReply>, Status> {
        let (caller, request) = self.enter(request, Permission::ProjectsRead).await?;
        let shown = quota::shown(&caller, &self.0, &request.project_id)?;
        let default = (caller.is_operator()).then(|| quota::default(&self.0));
        let quotas = default.into_iter().chain(quota::projects(&self.0, &shown).await).collect();
        Ok(Response::new(pb::ShowQuotasReply { quotas }))
    }

    async fn cluster_status(
        &self,
        request: Request<pb::ClusterStatusRequest>,
    ) -> Result<Response<pb::ClusterStatusReply>, Status> {
        // Not through `enter`: a node that cannot catch up is what this call is there to show.
        Caller::authorize(&self.0, request.metadata(), Permission::OrganizationsRead).await?;
        let shared = &self.0;
        let view = shared.catalog.view();
        let names: BTreeMap<_, _> =
            view.all_topics().iter().map(|topic| (topic.group, topic.name.as_str().to_owned())).collect();
        let groups = shared.runtime.groups();
        let leads = convert::leads(&groups);
        let nodes = view.nodes().into_iter().map(|node| pb::NodeStatus {
            id: node.id.0,
            address: node.peer.clone(),
            leads: leads.get(&node.id).copied().unwrap_or_default(),
        });
        Ok(Response::new(pb::ClusterStatusReply {
            cluster_id: shared.cluster.to_string(),
            node_id: shared.node.0,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            uptime: convert::span(Duration::from_nanos(shared.clock.wall().0.saturating_sub(shared.started.0))),
            nodes: nodes.collect(),
            groups: groups.iter().map(|group| convert::group(group, &names)).collect(),
        }))
    }

    async fn cluster_report(
        &self,
        request: Request<pb::ClusterReportRequest>,
    ) -> Result<Response<pb::ClusterReportReply>, Status> {
        // As above: it is there for the hour in which nothing can be caught up with.
        Caller::authorize(&self.0, request.metadata(), Permission::OrganizationsRead).await?;
        Ok(Response::new(self.0.reports.gather().await))
    }

    async fn show_version(
        &self,
        request: Request<pb::ShowVersionRequest>,
    ) -> Result<Response<pb::VersionReply>, Status> {
        // As above.
        Caller::authorize(&self.0, request.metadata(), Permission::OrganizationsRead).await?;
        Ok(Response::new(version::shown(&self.0).await))
    }

    async fn raise_version(
        &self,
        request: Request<pb::RaiseVersionRequest>,
    ) -> Result<Response<pb::VersionReply>, Status> {
        let (caller, request) = self.enter(request, Permission::OrganizationsEdit).await?;
        caller.operates()?;
        version::raise(&self.0, &request).await?;
        info!(version = %self.0.catalog.cluster_version(), by = %caller.claims.subject, "the cluster's version was asked for");
        Ok(Response::new(version::shown(&self.0).await))
    }

    async fn seal_vault(&self, request: Request<pb::SealVaultRequest>) -> Result<Response<pb::SealVaultReply>, Status> {
        let (caller, _) = self.enter(request, Permission::OrganizationsEdit).await?;
        caller.operates()?;
        let (version, actor) = (self.0.catalog.cluster_version(), Self::actor(&caller));
        local::seal(&self.0.vault, version, &actor).await.map(Response::new)
    }

    async fn list_nodes(&self, request: Request<pb::ListNodesRequest>) -> Result<Response<pb::ListNodesReply>, Status> {
        // Not through `enter`, as for the status.
        Caller::authorize(&self.0, request.metadata(), Permission::OrganizationsRead).await?.operator()?;
        placement::list_nodes(&self.0, request.into_inner()).map(Response::new)
    }

    async fn set_node_state(&self, request: Request<pb::SetNodeStateRequest>) -> Result<Response<pb::Node>, Status> {
        let (caller, request) = self.enter(request, Permission::OrganizationsEdit).await?;
        caller.operator()?;
        placement::set_node_state(&self.0, &caller, request).await.map(Response::new)
    }

    async fn list_partitions(
        &self,
        request: Request<pb::ListPartitionsRequest>,
    ) -> Result<Response<pb::ListPartitionsReply>, Status> {
        Caller::authorize(&self.0, request.metadata(), Permission::OrganizationsRead).await?.operator()?;
        placement::list_partitions(&self.0, &request.into_inner()).await.map(Response::new)
    }

    async fn move_partition(
        &self,
        request: Request<pb::MovePartitionRequest>,
    ) -> Result<Response<pb::PartitionInfo>, Status> {
        let (caller, request) = self.enter(request, Permission::OrganizationsEdit).await?;
        caller.operator()?;
        placement::move_partition(&self.0, &caller, &request).await.map(Response::new)
    }

    async fn cancel_move(
        &self,
        request: Request<pb::CancelMoveRequest>,
    ) -> Result<Response<pb::PartitionInfo>, Status> {
        let (caller, request) = self.enter(request, Permission::OrganizationsEdit).await?;
        caller.operator()?;
        placement::cancel_move(&self.0, &caller, &request).await.map(Response::new)
    }

    async fn alter_topic(
        &self,
        request: Request<pb::AlterTopicRequest>,
    ) -> Result<Response<pb::PartitionInfo>, Status> {
        let (caller, request) = self.enter(request, Permission::OrganizationsEdit).await?;
        caller.operator()?;
        placement::alter_topic(&self.0, &caller, request).await.map(Response::new)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clients_wait_for_a_revoke_for_longer_than_any_server_does() {
        let slowest = LeaseConfig { length: Duration::from_mins(1), drift: 0.2, margin: Duration::from_secs(30) };
        assert!(slowest.check(Duration::from_secs(5)).is_ok());
        assert!(ensign_client::REVOKE_TIMEOUT > slowest.revoke_patience());
    }
}
