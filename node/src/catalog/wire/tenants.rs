//! Rows of organizations, projects, API keys and token-signing keys.

use bytes::Bytes;
use ensign_proto::{ApiKeyId, OrgId, Permission, PermissionSet, ProjectId, RingId};
use ensign_raft::env::UnixNanos;
use prost::Message;

use super::DecodeError;
use super::rows::{id, raw};
use crate::catalog::records::{ApiKey, Organization, Project, SigningKey};

#[derive(Clone, PartialEq, Message)]
pub(super) struct OrganizationRow {
    #[prost(bytes = "bytes", tag = "1")]
    pub(super) id: Bytes,
    #[prost(string, tag = "2")]
    pub(super) name: String,
    #[prost(uint64, tag = "3")]
    pub(super) created: u64,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct ProjectRow {
    #[prost(bytes = "bytes", tag = "1")]
    pub(super) id: Bytes,
    #[prost(bytes = "bytes", tag = "2")]
    pub(super) org: Bytes,
    #[prost(string, tag = "3")]
    pub(super) name: String,
    #[prost(bytes = "bytes", tag = "4")]
    pub(super) ring: Bytes,
    #[prost(uint64, tag = "5")]
    pub(super) created: u64,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct ApiKeyRow {
    #[prost(bytes = "bytes", tag = "1")]
    pub(super) id: Bytes,
    #[prost(string, tag = "2")]
    pub(super) client_id: String,
    #[prost(string, tag = "3")]
    pub(super) name: String,
    #[prost(bytes = "bytes", tag = "4")]
    pub(super) org: Bytes,
    // Empty for none.
    #[prost(bytes = "bytes", tag = "5")]
    pub(super) project: Bytes,
    // Wire strings: numbers could be renumbered by mistake.
    #[prost(string, repeated, tag = "6")]
    pub(super) permissions: Vec<String>,
    #[prost(bool, tag = "7")]
    pub(super) admin: bool,
    #[prost(uint64, tag = "8")]
    pub(super) created: u64,
    #[prost(uint64, optional, tag = "9")]
    pub(super) revoked_at: Option<u64>,
    // Empty for none, as in what was written before API keys had rings.
    #[prost(bytes = "bytes", tag = "10")]
    pub(super) ring: Bytes,
    #[prost(bool, tag = "11")]
    pub(super) shredded: bool,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct SigningKeyRow {
    #[prost(bytes = "bytes", tag = "1")]
    pub(super) kid: Bytes,
    #[prost(bytes = "bytes", tag = "2")]
    public_key: Bytes,
    #[prost(uint64, tag = "3")]
    pub(super) created: u64,
    #[prost(uint64, tag = "4")]
    pub(super) signs_from: u64,
    #[prost(uint64, optional, tag = "5")]
    pub(super) verifies_until: Option<u64>,
}

pub(super) fn kid(bytes: &Bytes) -> Result<[u8; 16], DecodeError> {
    <[u8; 16]>::try_from(&bytes[..]).map_err(|_| DecodeError::Invalid("kid"))
}

impl From<&Organization> for OrganizationRow {
    fn from(org: &Organization) -> Self {
        Self { id: raw(org.id.as_bytes()), name: org.name.clone(), created: org.created.0 }
    }
}

impl TryFrom<OrganizationRow> for Organization {
    type Error = DecodeError;

    fn try_from(row: OrganizationRow) -> Result<Self, DecodeError> {
        Ok(Self { id: id::<OrgId>(&row.id, "organization")?, name: row.name, created: UnixNanos(row.created) })
    }
}

impl From<&Project> for ProjectRow {
    fn from(project: &Project) -> Self {
        Self {
            id: raw(project.id.as_bytes()),
            org: raw(project.org.as_bytes()),
            name: project.name.clone(),
            ring: raw(project.ring.as_bytes()),
            created: project.created.0,
        }
    }
}

impl TryFrom<ProjectRow> for Project {
    type Error = DecodeError;

    fn try_from(row: ProjectRow) -> Result<Self, DecodeError> {
        Ok(Self {
            id: id::<ProjectId>(&row.id, "project")?,
            org: id::<OrgId>(&row.org, "organization")?,
            name: row.name,
            ring: id::<RingId>(&row.ring, "ring")?,
            created: UnixNanos(row.created),
        })
    }
}

/// Strict: a permission that this version does not know must not get lost in the next snapshot.
fn permissions(texts: &[String]) -> Result<PermissionSet, DecodeError> {
    let known: Result<PermissionSet, _> = texts.iter().map(|text| text.parse::<Permission>()).collect();
    known.map_err(|_| DecodeError::Invalid("permission"))
}

impl From<&ApiKey> for ApiKeyRow {
    fn from(key: &ApiKey) -> Self {
        Self {
            id: raw(key.id.as_bytes()),
            client_id: key.client_id.clone(),
            name: key.name.clone(),
            org: raw(key.org.as_bytes()),
            project: key.project.map(|project| raw(project.as_bytes())).unwrap_or_default(),
            permissions: key.permissions.to_texts().into_iter().map(str::to_owned).collect(),
            admin: key.admin,
            created: key.created.0,
            revoked_at: key.revoked_at.map(|at| at.0),
            ring: key.ring.map(|ring| raw(ring.as_bytes())).unwrap_or_default(),
            shredded: key.shredded,
        }
    }
}

impl TryFrom<ApiKeyRow> for ApiKey {
    type Error = DecodeError;

    fn try_from(row: ApiKeyRow) -> Result<Self, DecodeError> {
        let project = (!row.project.is_empty()).then(|| id::<ProjectId>(&row.project, "project")).transpose()?;
        Ok(Self {
            id: id::<ApiKeyId>(&row.id, "API key")?,
            client_id: row.client_id,
            name: row.name,
            org: id::<OrgId>(&row.org, "organization")?,
            project,
            permissions: permissions(&row.permissions)?,
            admin: row.admin,
            created: UnixNanos(row.created),
            revoked_at: row.revoked_at.map(UnixNanos),
            ring: (!row.ring.is_empty()).then(|| id::<RingId>(&row.ring, "ring")).transpose()?,
            shredded: row.shredded,
        })
    }
}

impl From<&SigningKey> for SigningKeyRow {
    fn from(key: &SigningKey) -> Self {
        Self {
            kid: raw(&key.kid),
            public_key: key.public_key.clone(),
            created: key.created.0,
            signs_from: key.signs_from.0,
            verifies_until: key.verifies_until.map(|until| until.0),
        }
    }
}

impl TryFrom<SigningKeyRow> for SigningKey {
    type Error = DecodeError;

    fn try_from(row: SigningKeyRow) -> Result<Self, DecodeError> {
        Ok(Self {
            kid: kid(&row.kid)?,
            public_key: Bytes::copy_from_slice(&row.public_key),
            created: UnixNanos(row.created),
            signs_from: UnixNanos(row.signs_from),
            verifies_until: row.verifies_until.map(UnixNanos),
        })
    }
}
