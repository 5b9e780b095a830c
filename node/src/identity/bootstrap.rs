//! Making what logins need: signing keys, organizations, projects, API keys. Vault first, catalog second, and again is no error.

use std::sync::Arc;

use ensign_proto::{ApiKeyId, OrgId, Permission, PermissionSet, ProjectId, RingId};
use thiserror::Error;
use tracing::info;

use super::credentials::Credentials;
use super::secrets::{SecretError, SecretKind};
use super::service::Identity;
use super::signing::{self, SigningError};
use crate::catalog::{
    ApiKey, ApiKeyError, CreateOrganizationError, CreateProjectError, Organization, Project, RefreshError,
};

/// The longest name of a key, a project or an organization, in characters.
const NAME_MAX: usize = 200;

/// All that an operator's key can have: everything but carrying data.
pub fn operator_permissions() -> PermissionSet {
    let data = [Permission::Publisher, Permission::Subscriber];
    Permission::ALL.iter().copied().filter(|permission| !data.contains(permission)).collect()
}

/// An API key that is to be made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewApiKey {
    /// Its name, for people: 1 to 200 characters, not only blanks.
    pub name: String,
    /// Whose it is.
    pub org: OrgId,
    /// The one project it works in; may be absent for an operator's key only.
    pub project: Option<ProjectId>,
    /// What it may do: of [`PermissionSet::api_key`], or of [`operator_permissions`] for an operator's key.
    pub permissions: PermissionSet,
    /// Whether it is an operator's key.
    pub admin: bool,
    /// The key ring that its events are sealed under: one of its project, which the caller has seen in the vault. None for that
    /// of the topic.
    pub ring: Option<RingId>,
}

/// Why an API key was not made.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum CreateKeyError {
    /// The name is empty, blank or too long.
    #[error("a name has 1 to 200 characters, not only blanks")]
    Name,
    /// There is none, or one that such a key may not have.
    #[error("these permissions cannot be given to such a key")]
    Permissions,
    /// An ordinary key works in a project.
    #[error("an API key needs a project")]
    NoProject,
    /// The secret could not be hashed, since too many logins wait. Try again.
    #[error("the secret could not be hashed")]
    Busy,
    /// The hash is not kept; nothing was made.
    #[error(transparent)]
    Vault(#[from] SecretError),
    /// See there; a hash that no key owns may stay in the vault.
    #[error(transparent)]
    Catalog(#[from] ApiKeyError),
}

/// Why the cluster was not set up. Everything that was done stays done; try again.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum BootstrapError {
    /// This node cannot tell what is there already.
    #[error(transparent)]
    Refresh(#[from] RefreshError),
    /// No token-signing key.
    #[error(transparent)]
    Signing(#[from] SigningError),
    /// No organization.
    #[error(transparent)]
    Organization(#[from] CreateOrganizationError),
    /// No project.
    #[error(transparent)]
    Project(#[from] CreateProjectError),
    /// No API key.
    #[error(transparent)]
    ApiKey(#[from] CreateKeyError),
    /// The credentials belong to a key that is revoked.
    #[error("the API key of client id {client_id} is revoked")]
    Revoked {
        /// Whose.
        client_id: String,
    },
}

impl Identity {
    /// Makes the first token-signing key, unless there is one.
    ///
    /// # Errors
    /// See [`BootstrapError`].
    pub async fn ensure_signing_key(&self) -> Result<(), BootstrapError> {
        let inner = &self.inner;
        inner.catalog.refresh().await?;
        let now = inner.clock.wall();
        let usable = inner.catalog.signing_keys().iter().any(|key| key.verifies_until.is_none_or(|until| now < until));
        if !usable {
            signing::new_signing_key(&inner.catalog, &*inner.secrets, &*inner.clock, &*inner.rng).await?;
        }
        Ok(())
    }

    /// The organization of this name; made if there is none.
    ///
    /// # Errors
    /// See [`BootstrapError`].
    pub async fn ensure_organization(&self, name: &str) -> Result<Arc<Organization>, BootstrapError> {
        let catalog = &self.inner.catalog;
        catalog.refresh().await?;
        let known = catalog.organizations().into_iter().find(|org| org.name == name);
        match known {
            Some(org) => Ok(org),
            None => Ok(catalog.create_organization(name).await?),
        }
    }

    /// The organization's project of this name; made, with its key ring, if there is none.
    ///
    /// # Errors
    /// See [`BootstrapError`].
    pub async fn ensure_project(&self, org: OrgId, name: &str) -> Result<Arc<Project>, BootstrapError> {
        let catalog = &self.inner.catalog;
        catalog.refresh().await?;
        let known = catalog.projects(Some(org)).into_iter().find(|project| project.name == name);
        match known {
            Some(project) => Ok(project),
            None => Ok(catalog.create_project(org, name).await?),
        }
    }

    /// The API key that these credentials log in as; made if there is none. Write the credentials to their file first: then a
    /// crash at any point is repaired by doing the same again.
    ///
    /// # Errors
    /// See [`BootstrapError`].
    pub async fn ensure_api_key(
        &self,
        new: NewApiKey,
        credentials: &Credentials,
    ) -> Result<Arc<ApiKey>, BootstrapError> {
        self.inner.catalog.refresh().await?;
        match self.inner.catalog.api_key_by_client(credentials.client_id.as_str()) {
            Some(key) if key.revoked_at.is_none() => Ok(key),
            Some(key) => Err(BootstrapError::Revoked { client_id: key.client_id.clone() }),
            None => Ok(self.make_api_key(self.inner.catalog.fresh_api_key(), new, credentials).await?),
        }
    }

    /// Makes an API key with fresh credentials, which exist nowhere but in this reply.
    ///
    /// # Errors
    /// See [`CreateKeyError`].
    pub async fn create_api_key(&self, new: NewApiKey) -> Result<(Arc<ApiKey>, Credentials), CreateKeyError> {
        self.create_api_key_as(self.inner.catalog.fresh_api_key(), new).await
    }

    /// The same under an id that is fresh, for who has told it to others already.
    ///
    /// # Errors
    /// See [`CreateKeyError`].
    pub async fn create_api_key_as(
        &self,
        id: ApiKeyId,
        new: NewApiKey,
    ) -> Result<(Arc<ApiKey>, Credentials), CreateKeyError> {
        let credentials = Credentials::generate(&*self.inner.rng);
        let key = self.make_api_key(id, new, &credentials).await?;
        Ok((key, credentials))
    }

    async fn make_api_key(
        &self,
        id: ApiKeyId,
        new: NewApiKey,
        credentials: &Credentials,
    ) -> Result<Arc<ApiKey>, CreateKeyError> {
        let inner = &self.inner;
        if new.name.trim().is_empty() || new.name.chars().count() > NAME_MAX {
            return Err(CreateKeyError::Name);
        }
        let allowed = if new.admin { operator_permissions() } else { PermissionSet::api_key() };
        if new.permissions.is_empty() || !allowed.contains_all(new.permissions) {
            return Err(CreateKeyError::Permissions);
        }
        if new.project.is_none() && !new.admin {
            return Err(CreateKeyError::NoProject);
        }
        let key = ApiKey {
            id,
            client_id: credentials.client_id.as_str().to_owned(),
            name: new.name,
            org: new.org,
            project: new.project,
            permissions: new.permissions,
            admin: new.admin,
            created: inner.clock.wall(),
            revoked_at: None,
            ring: new.ring,
            shredded: false,
        };
        let hash = inner.pool.hash(&credentials.secret, &*inner.rng).await.map_err(|_| CreateKeyError::Busy)?;
        inner.secrets.put(SecretKind::ApiKey, *key.id.as_bytes(), hash).await?;
        let key = inner.catalog.create_api_key(key).await?;
        info!(key = %key.id, client_id = %key.client_id, admin = key.admin, "an API key was made");
        Ok(key)
    }

    /// Revokes an API key, for ever: no login, no refresh, and every node that has applied it refuses its tokens.
    ///
    /// # Errors
    /// See [`ApiKeyError`].
    pub async fn revoke_api_key(&self, id: ApiKeyId) -> Result<Arc<ApiKey>, ApiKeyError> {
        let key = self.inner.catalog.revoke_api_key(id).await?;
        info!(key = %id, "an API key was revoked");
        Ok(self.forget_secret(key).await)
    }

    /// Revokes an API key likewise, and lets nothing be bound to its key ring any more. The caller destroys the ring afterwards.
    ///
    /// # Errors
    /// [`ApiKeyError::Ring`]: it has none of its own, or something else is sealed under it; nothing was changed.
    pub async fn shred_api_key(&self, id: ApiKeyId) -> Result<Arc<ApiKey>, ApiKeyError> {
        let key = self.inner.catalog.shred_api_key(id).await?;
        info!(key = %id, "an API key was revoked, to be destroyed with its key ring");
        Ok(self.forget_secret(key).await)
    }

    async fn forget_secret(&self, key: Arc<ApiKey>) -> Arc<ApiKey> {
        let id = key.id;
        // The hash is asked for no more; destroying it is tidiness.
        if let Err(error) = self.inner.secrets.delete(SecretKind::ApiKey, *id.as_bytes()).await {
            info!(key = %id, %error, "the hash of a revoked API key stays in the vault");
        }
        key
    }
}
