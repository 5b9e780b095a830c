//! Who may call what.

use std::sync::Arc;

use ensign_proto::{ApiKeyId, Permission, ProjectId};
use tonic::Status;
use tonic::metadata::MetadataMap;

use super::Shared;
use crate::health::Phase;
use crate::identity::{Claims, Identity};
use crate::status::{self, text};

/// What a call needs its caller to be allowed.
#[derive(Debug, Clone, Copy)]
pub(super) enum Need {
    /// All of these.
    All(&'static [Permission]),
    /// One of these.
    Any(&'static [Permission]),
}

/// A caller who may do what it asks for.
#[derive(Debug, Clone)]
pub(super) struct Caller {
    pub(super) claims: Arc<Claims>,
}

impl Caller {
    /// The one project that the caller can see.
    pub(super) fn project(&self) -> Result<ProjectId, Status> {
        self.claims.project.ok_or_else(|| Status::permission_denied(text::NOT_AUTHORIZED))
    }

    pub(super) fn permits(&self, permission: Permission) -> Result<(), Status> {
        let denied = || Status::permission_denied(text::NOT_AUTHORIZED);
        self.claims.permits(permission).then_some(()).ok_or_else(denied)
    }
}

/// Verifies the caller's token.
pub(super) async fn authenticate(shared: &Shared, metadata: &MetadataMap) -> Result<Caller, Status> {
    verify(&shared.parts.identity, metadata).await.map(|claims| Caller { claims })
}

/// Verifies the token of a call. Several may be sent; the first that verifies counts.
pub(crate) async fn verify(identity: &Identity, metadata: &MetadataMap) -> Result<Arc<Claims>, Status> {
    let mut refusal = None;
    for value in metadata.get_all("authorization") {
        let Some(token) = value.to_str().ok().and_then(|value| value.strip_prefix("Bearer ")) else {
            refusal.get_or_insert_with(|| Status::unauthenticated("invalid credentials"));
            continue;
        };
        match identity.verify(token).await {
            Ok(claims) => return Ok(claims),
            Err(error) => refusal = Some(status::unauthenticated(&error)),
        }
    }
    Err(refusal.unwrap_or_else(|| Status::unauthenticated(text::NO_CREDENTIALS)))
}

/// Verifies the caller's token and what it permits.
pub(super) async fn authorize(shared: &Shared, metadata: &MetadataMap, need: Need) -> Result<Caller, Status> {
    let caller = authenticate(shared, metadata).await?;
    let granted = match need {
        Need::All(permissions) => permissions.iter().all(|permission| caller.claims.permits(*permission)),
        Need::Any(permissions) => permissions.iter().any(|permission| caller.claims.permits(*permission)),
    };
    if granted { Ok(caller) } else { Err(Status::permission_denied(text::NOT_AUTHORIZED)) }
}

/// What ends a stream that neither side has ended.
#[derive(Clone)]
pub(super) struct Ends {
    shared: Arc<Shared>,
    subject: ApiKeyId,
}

impl Ends {
    pub(super) fn of(shared: &Arc<Shared>, caller: &Caller) -> Self {
        Self { shared: Arc::clone(shared), subject: caller.claims.subject }
    }

    /// Returns when the API key is revoked, or when nobody could tell any more.
    pub(super) async fn revoked(self) -> Status {
        let mut changes = self.shared.parts.catalog.view().changes();
        let mut fresh = self.shared.parts.catalog.freshness();
        loop {
            changes.mark_unchanged();
            if self.shared.parts.catalog.view().is_revoked(self.subject) {
                return Status::unauthenticated(text::KEY_REVOKED);
            }
            if !*fresh.borrow_and_update() {
                return Status::unavailable(text::OUT_OF_TOUCH);
            }
            let changed = tokio::select! {
                changed = changes.changed() => changed,
                changed = fresh.changed() => changed,
            };
            if changed.is_err() {
                return Status::unavailable(text::STOPPING);
            }
        }
    }

    /// Returns when the API key is revoked, or the node stops.
    pub(super) async fn ended(self) -> Status {
        let mut phase = self.shared.parts.phase.clone();
        tokio::select! {
            biased;
            status = self.revoked() => status,
            _ = phase.wait_for(|phase| *phase == Phase::Stopping) => Status::unavailable(text::STOPPING),
        }
    }
}

/// Ends a stream when its API key is revoked or the node stops. Pending until then.
pub(super) async fn ended(shared: Arc<Shared>, caller: Caller) -> Status {
    Ends::of(&shared, &caller).ended().await
}
