//! Whom an administrator may act for, and what an absent field stands for.

use std::sync::Arc;

use ensign_proto::{InvalidId, OrgId, Permission, ProjectId, RingId};
use tonic::Status;
use tonic::metadata::MetadataMap;

use super::Shared;
use crate::catalog::Project;
use crate::identity::Claims;
use crate::rpc::auth;
use crate::status::text;

/// What others than operators are told.
pub(super) const OPERATORS_ONLY: &str = "only an operator's key may set quotas";

/// The longest name of an organization or a project, in characters.
const NAME_MAX: usize = 200;

/// A caller who may do what it asks for.
pub(super) struct Caller {
    pub(super) claims: Arc<Claims>,
    /// An operator's key: it may act for every organization.
    operator: bool,
}

impl Caller {
    /// Verifies the token of a call and what it permits.
    pub(super) async fn authorize(shared: &Shared, metadata: &MetadataMap, need: Permission) -> Result<Self, Status> {
        let claims = auth::verify(&shared.identity, metadata).await?;
        if !claims.permits(need) {
            return Err(Status::permission_denied(text::NOT_AUTHORIZED));
        }
        let operator = shared.catalog.view().api_key(claims.subject).is_some_and(|key| key.admin);
        Ok(Self { claims, operator })
    }

    /// Whether it is an operator's key that calls.
    pub(super) fn is_operator(&self) -> bool {
        self.operator
    }

    /// Nodes and partitions belong to the cluster, not to an organization: they are an operator's business.
    pub(super) fn operator(&self) -> Result<(), Status> {
        if self.operator {
            return Ok(());
        }
        Err(Status::permission_denied(
            "nodes and partitions are for an operator's key: use the one of the bootstrap, under `admin`",
        ))
    }

    /// Whether this organization is any of the caller's business. Others do not exist for it.
    pub(super) fn sees(&self, org: OrgId) -> bool {
        self.operator || self.claims.org == org
    }

    /// Refuses who is no operator: nodes are nobody else's business.
    pub(super) fn operates(&self) -> Result<(), Status> {
        if self.operator { Ok(()) } else { Err(Status::permission_denied(text::NOT_AUTHORIZED)) }
    }

    /// The organization to list or act for; the caller's own where none is named.
    pub(super) fn organization(&self, text: &str) -> Result<OrgId, Status> {
        let org = parse::<OrgId>(text, "organization_id")?.unwrap_or(self.claims.org);
        if self.sees(org) { Ok(org) } else { Err(Status::not_found("organization not found")) }
    }

    /// The organizations to list: one if it is named, else all that the caller sees (`None`).
    pub(super) fn organizations(&self, text: &str) -> Result<Option<OrgId>, Status> {
        if text.is_empty() && self.operator {
            return Ok(None);
        }
        self.organization(text).map(Some)
    }

    /// The project that is named, if one is.
    pub(super) fn named_project(&self, shared: &Shared, text: &str) -> Result<Option<Arc<Project>>, Status> {
        let Some(id) = parse::<ProjectId>(text, "project_id")? else { return Ok(None) };
        let project = shared.catalog.view().project(id).filter(|project| self.sees(project.org));
        project.map(Some).ok_or_else(|| Status::not_found("project not found"))
    }

    /// The project to act for: the one that is named, the caller's own, or the only one of its organization.
    pub(super) fn project(&self, shared: &Shared, text: &str) -> Result<Arc<Project>, Status> {
        if let Some(project) = self.named_project(shared, text)? {
            return Ok(project);
        }
        if let Some(own) = self.claims.project {
            return shared.catalog.view().project(own).ok_or_else(|| Status::not_found("project not found"));
        }
        let mut projects = shared.catalog.view().projects(Some(self.claims.org)).into_iter();
        match (projects.next(), projects.next()) {
            (Some(project), None) => Ok(project),
            (None, _) => Err(Status::not_found("the organization has no project")),
            (Some(_), Some(_)) => {
                Err(Status::invalid_argument("the organization has several projects: name one with project_id"))
            }
        }
    }

    /// The key ring to act on: the one that is named, by its id or by its name in the project, or the project's own.
    pub(super) async fn ring(&self, shared: &Shared, ring: &str, project: &str) -> Result<RingId, Status> {
        if ring.is_empty() {
            return self.project(shared, project).map(|project| project.ring);
        }
        let Ok(id) = ring.parse::<RingId>() else {
            let project = self.project(shared, project)?.id;
            let rings = shared.vault.list_rings(Some(project)).await.map_err(|error| super::status::vault(&error))?;
            let found = rings.iter().find(|known| known.name == ring).map(|known| known.ring);
            return found.ok_or_else(|| {
                let ring: String = ring.chars().take(64).collect();
                Status::not_found(format!(
                    "the project has no key ring {ring:?}: `ensign key list` shows ids and names"
                ))
            });
        };
        if !project.is_empty() {
            return Err(Status::invalid_argument("name ring_id or project_id, not both"));
        }
        let info = shared.vault.ring(id).await.map_err(|error| super::status::vault(&error))?;
        let project = shared.catalog.view().project(info.project);
        // A ring without a project is what an unfinished creation left: nobody's but the operator's.
        let visible = project.map_or(self.operator, |project| self.sees(project.org));
        if visible { Ok(id) } else { Err(Status::not_found(format!("there is no key ring {id}"))) }
    }
}

/// An id as text; empty means absent.
pub(super) fn parse<T: std::str::FromStr<Err = InvalidId>>(text: &str, field: &str) -> Result<Option<T>, Status> {
    if text.is_empty() {
        return Ok(None);
    }
    text.parse().map(Some).map_err(|error| Status::invalid_argument(format!("{field}: {error}")))
}

/// A name for people, without blanks around it.
pub(super) fn name(text: &str) -> Result<&str, Status> {
    let name = text.trim();
    let fits = !name.is_empty() && name.chars().count() <= NAME_MAX && !name.chars().any(char::is_control);
    fits.then_some(name).ok_or_else(|| {
        Status::invalid_argument("name: must have 1 to 200 characters, not only blanks, and no control characters")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_trimmed_and_bounded() {
        assert_eq!(name("  web shop ").unwrap(), "web shop");
        for bad in ["", "   ", "a\nb", &"x".repeat(201)] {
            assert_eq!(name(bad).unwrap_err().code(), tonic::Code::InvalidArgument, "{bad:?}");
        }
        assert!(name(&"é".repeat(200)).is_ok());
    }

    #[test]
    fn an_id_says_which_field_it_was() {
        assert!(parse::<ProjectId>("", "project_id").unwrap().is_none());
        let error = parse::<ProjectId>("nonsense", "project_id").unwrap_err();
        assert_eq!(error.message(), "project_id: \"nonsense\" is not a valid project id");
    }
}
