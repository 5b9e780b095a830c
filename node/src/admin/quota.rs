//! Quotas as administrators see them.

use ensign_proto::ProjectId;
use ensign_proto::pb::admin::v1 as pb;
use tonic::Status;

use super::Shared;
use super::scope::{self, Caller};
use crate::catalog::{Change, Limit, PerResource, Project, Quota, QuotaChange};
use crate::quota::Total;

fn limit(limit: Limit) -> pb::Limit {
    let kind = match limit {
        Limit::Unlimited => pb::limit::Kind::Unlimited(true),
        Limit::At(at) => pb::limit::Kind::At(at),
    };
    pb::Limit { kind: Some(kind) }
}

fn wire(quota: &PerResource<Option<Limit>>) -> pb::Quota {
    pb::Quota {
        events_per_second: quota.events_per_second.map(limit),
        bytes_per_second: quota.bytes_per_second.map(limit),
        stored_bytes: quota.stored_bytes.map(limit),
        topics: quota.topics.map(limit),
        streams: quota.streams.map(limit),
    }
}

/// What is to be done with each limit.
///
/// # Errors
/// INVALID_ARGUMENT: nothing is, or a limit says nothing.
pub(super) fn change(wire: Option<pb::Quota>) -> Result<QuotaChange, Status> {
    let wire = wire.filter(|wire| *wire != pb::Quota::default());
    let wire = wire.ok_or_else(|| Status::invalid_argument("change: name at least one limit"))?;
    let change = |field: &str, limit: Option<pb::Limit>| {
        use pb::limit::Kind;
        let Some(limit) = limit else { return Ok(Change::Keep) };
        match limit.kind {
            Some(Kind::At(at)) => Ok(Change::Set(Limit::At(at))),
            Some(Kind::Unlimited(true)) => Ok(Change::Set(Limit::Unlimited)),
            Some(Kind::Unset(true)) => Ok(Change::Unset),
            Some(Kind::Unlimited(false) | Kind::Unset(false)) | None => {
                Err(Status::invalid_argument(format!("change.{field}: say at, or unlimited, or unset")))
            }
        }
    };
    Ok(QuotaChange {
        events_per_second: change("events_per_second", wire.events_per_second)?,
        bytes_per_second: change("bytes_per_second", wire.bytes_per_second)?,
        stored_bytes: change("stored_bytes", wire.stored_bytes)?,
        topics: change("topics", wire.topics)?,
        streams: change("streams", wire.streams)?,
    })
}

/// Whose limits are changed; none for the cluster's default.
pub(super) fn whose(
    caller: &Caller,
    shared: &Shared,
    whose: Option<&pb::set_quota_request::Whose>,
) -> Result<Option<ProjectId>, Status> {
    use pb::set_quota_request::Whose;
    match whose {
        Some(Whose::ClusterDefault(true)) => Ok(None),
        Some(Whose::ProjectId(text)) if !text.is_empty() => {
            Ok(caller.named_project(shared, text)?.map(|project| project.id))
        }
        Some(Whose::ClusterDefault(false) | Whose::ProjectId(_)) | None => {
            Err(Status::invalid_argument("say whose limits to change: project_id or cluster_default"))
        }
    }
}

/// The cluster's default.
pub(super) fn default(shared: &Shared) -> pb::QuotaStatus {
    let set = shared.catalog.view().default_quota();
    let effective = Quota::default().or(&set);
    pb::QuotaStatus {
        set: Some(wire(&set)),
        effective: Some(wire(&PerResource::each(|resource| Some(*effective.of(resource))))),
        ..pb::QuotaStatus::default()
    }
}

/// The limits of projects and what they use, in their order.
pub(super) async fn projects(shared: &Shared, projects: &[std::sync::Arc<Project>]) -> Vec<pb::QuotaStatus> {
    let totals = shared.quotas.usage(projects.iter().map(|project| project.id).collect()).await;
    let status = |(at, project): (usize, &std::sync::Arc<Project>)| {
        let total = totals.as_ref().and_then(|totals| totals.get(at)).copied();
        of_project(shared, project, total)
    };
    projects.iter().enumerate().map(status).collect()
}

fn of_project(shared: &Shared, project: &Project, total: Option<Total>) -> pb::QuotaStatus {
    let view = shared.catalog.view();
    let effective = view.quota(project.id);
    pb::QuotaStatus {
        project_id: project.id.to_string(),
        project_name: project.name.clone(),
        set: Some(wire(&view.own_quota(project.id))),
        effective: Some(wire(&PerResource::each(|resource| Some(*effective.of(resource))))),
        usage: Some(pb::QuotaUsage {
            topics: view.topic_count_of(project.id),
            events_per_second: total.map(|total| total.sum.events_per_second),
            bytes_per_second: total.map(|total| total.sum.bytes_per_second),
            stored_bytes: total.map(|total| total.sum.stored_bytes),
            streams: total.map(|total| total.sum.streams),
            streams_of_busiest_node: total.map(|total| total.streams_of_busiest_node),
        }),
    }
}

/// The projects whose limits are shown: the one that is named, or all that the caller sees.
pub(super) fn shown(caller: &Caller, shared: &Shared, named: &str) -> Result<Vec<std::sync::Arc<Project>>, Status> {
    if let Some(project) = caller.named_project(shared, named)? {
        return Ok(vec![project]);
    }
    Ok(shared.catalog.view().projects(caller.organizations("")?))
}

/// A tenant does not set its own limits.
pub(super) fn check_operator(caller: &Caller) -> Result<(), Status> {
    if caller.is_operator() { Ok(()) } else { Err(Status::permission_denied(scope::OPERATORS_ONLY)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_says_something() {
        use pb::limit::Kind;
        let topics = |kind| Some(pb::Quota { topics: Some(pb::Limit { kind }), ..pb::Quota::default() });
        for nothing in [None, Some(pb::Quota::default()), topics(None), topics(Some(Kind::Unset(false)))] {
            let status = change(nothing).unwrap_err();
            assert_eq!(status.code(), tonic::Code::InvalidArgument);
            assert!(status.message().starts_with("change"), "{}", status.message());
        }
        let says = |kind| change(topics(Some(kind))).unwrap().topics;
        assert_eq!(says(Kind::At(0)), Change::Set(Limit::At(0)));
        assert_eq!(says(Kind::Unlimited(true)), Change::Set(Limit::Unlimited));
        assert_eq!(says(Kind::Unset(true)), Change::Unset);
        assert_eq!(change(topics(Some(Kind::At(1)))).unwrap().streams, Change::Keep);
    }
}
