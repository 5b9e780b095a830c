//! Organizations, projects, their limits, API keys and token-signing keys.

use std::sync::Arc;

use ensign_proto::{ApiKeyId, OrgId, ProjectId, RingId};

use super::{Catalog, plain, unexpected};
use crate::catalog::command::{Command, Outcome, Refusal};
use crate::catalog::errors::{ApiKeyError, CreateOrganizationError, CreateProjectError, SetQuotaError, WriteFailure};
use crate::catalog::quota::QuotaChange;
use crate::catalog::records::{ApiKey, Organization, Project, SigningKey};

impl Catalog {
    /// Makes an organization.
    ///
    /// # Errors
    /// See [`CreateOrganizationError`].
    pub async fn create_organization(&self, name: &str) -> Result<Arc<Organization>, CreateOrganizationError> {
        let (ms, random) = self.fresh();
        let id = OrgId::new(ms, random);
        match self.write(Command::CreateOrganization { id, name: name.to_owned(), at: self.now() }).await? {
            Ok(Outcome::Organization(org)) => Ok(org),
            Err(Refusal::NameTaken) => Err(CreateOrganizationError::NameTaken),
            other => Err(unexpected(&other).into()),
        }
    }

    /// Makes a project: its key ring in the vault first, then the project.
    ///
    /// # Errors
    /// See [`CreateProjectError`]. A ring whose project was not made stays in the vault, unused.
    pub async fn create_project(&self, org: OrgId, name: &str) -> Result<Arc<Project>, CreateProjectError> {
        // The catalog decides; looking first only saves rings that nobody would use.
        if self.organization(org).is_some() && self.projects(Some(org)).iter().any(|other| other.name == name) {
            return Err(CreateProjectError::NameTaken);
        }
        let (ms, random) = self.fresh();
        let id = ProjectId::new(ms, random);
        let (ms, random) = self.fresh();
        let ring = RingId::new(ms, random);
        self.parts.vault.create_ring(id, ring).await?;
        let project = Project { id, org, name: name.to_owned(), ring, created: self.now() };
        match self.write(Command::CreateProject(project)).await? {
            Ok(Outcome::Project(project)) => Ok(project),
            Err(Refusal::NameTaken) => Err(CreateProjectError::NameTaken),
            Err(Refusal::OrganizationUnknown) => Err(CreateProjectError::OrganizationUnknown),
            other => Err(unexpected(&other).into()),
        }
    }

    /// Changes a project's limits, or with none named those of every project that has none of its own. Doing it again changes
    /// nothing.
    ///
    /// # Errors
    /// See [`SetQuotaError`].
    pub async fn set_quota(&self, project: Option<ProjectId>, change: QuotaChange) -> Result<(), SetQuotaError> {
        match self.write(Command::SetQuota { project, change }).await? {
            Ok(_) => Ok(()),
            Err(Refusal::ProjectUnknown) => Err(SetQuotaError::ProjectUnknown),
            other => Err(unexpected(&other).into()),
        }
    }

    /// Adds an API key whose hash the vault already has. The caller chose every field; asking again answers the same key.
    ///
    /// # Errors
    /// See [`ApiKeyError`].
    pub async fn create_api_key(&self, key: ApiKey) -> Result<Arc<ApiKey>, ApiKeyError> {
        changed_api_key(self.write(Command::CreateApiKey(key)).await?)
    }

    /// Revokes an API key, for ever: every node refuses its tokens as soon as it has applied this. Again changes nothing.
    ///
    /// # Errors
    /// See [`ApiKeyError`].
    pub async fn revoke_api_key(&self, key: ApiKeyId) -> Result<Arc<ApiKey>, ApiKeyError> {
        changed_api_key(self.write(Command::RevokeApiKey { key, at: self.now() }).await?)
    }

    /// Revokes an API key as [`Catalog::revoke_api_key`] does, and lets nothing be bound to its ring any more. The caller destroys the ring
    /// afterwards. Again changes nothing.
    ///
    /// # Errors
    /// [`ApiKeyError::Ring`]: it has none of its own, or something else is sealed under it; nothing was changed.
    pub async fn shred_api_key(&self, key: ApiKeyId) -> Result<Arc<ApiKey>, ApiKeyError> {
        changed_api_key(self.write(Command::ShredApiKey { key, at: self.now() }).await?)
    }

    /// Publishes a token-signing key whose private half the vault already has. Again changes nothing.
    ///
    /// # Errors
    /// See [`WriteFailure`].
    pub async fn add_signing_key(&self, key: SigningKey) -> Result<(), WriteFailure> {
        plain(self.write(Command::AddSigningKey(key)).await?)
    }

    /// Lets a token-signing key verify tokens until `verifies_until` and no longer. A later time than before changes nothing.
    ///
    /// # Errors
    /// See [`WriteFailure`].
    pub async fn retire_signing_key(
        &self,
        kid: [u8; 16],
        verifies_until: ensign_raft::env::UnixNanos,
    ) -> Result<(), WriteFailure> {
        plain(self.write(Command::RetireSigningKey { kid, verifies_until }).await?)
    }
}

fn changed_api_key(response: Result<Outcome, Refusal>) -> Result<Arc<ApiKey>, ApiKeyError> {
    match response {
        Ok(Outcome::ApiKey(key)) => Ok(key),
        Err(Refusal::ApiKeyUnknown) => Err(ApiKeyError::Unknown),
        Err(Refusal::OrganizationUnknown) => Err(ApiKeyError::OrganizationUnknown),
        Err(Refusal::ProjectUnknown) => Err(ApiKeyError::ProjectUnknown),
        Err(Refusal::NameTaken | Refusal::IdTaken) => Err(ApiKeyError::Taken),
        Err(refusal @ (Refusal::RingShredded | Refusal::RingShared | Refusal::NoRing)) => {
            Err(ApiKeyError::Ring(refusal))
        }
        other => Err(unexpected(&other).into()),
    }
}
