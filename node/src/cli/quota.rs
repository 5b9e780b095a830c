//! `ensign quota`.

use ensign_client::admin_api as pb;
use ensign_proto::ProjectId;
use serde::Serialize;

use super::admin::id;
use super::args::{Output, QuotaBytes, QuotaCommand, QuotaLimit, QuotaValue, Whose};
use super::connect::connect;
use super::exit::UsageError;
use super::output::{json, line, list, one, thousands};
use super::watch::watched;

/// A limit and what is used of it.
#[derive(Serialize)]
struct ShownLimit {
    limit: &'static str,
    /// What holds; absent for none.
    at: Option<u64>,
    /// Where it comes from: `project`, `default` or `built-in`.
    from: &'static str,
    /// Absent where it is not known.
    used: Option<u64>,
}

#[derive(Serialize)]
struct ShownQuota {
    /// Absent for the cluster's default.
    project: Option<String>,
    name: Option<String>,
    limits: Vec<ShownLimit>,
}

const LIMITS: [QuotaLimit; 5] = [
    QuotaLimit::EventsPerSecond,
    QuotaLimit::BytesPerSecond,
    QuotaLimit::StoredBytes,
    QuotaLimit::Topics,
    QuotaLimit::Streams,
];

fn name(limit: QuotaLimit) -> &'static str {
    match limit {
        QuotaLimit::EventsPerSecond => "events-per-second",
        QuotaLimit::BytesPerSecond => "bytes-per-second",
        QuotaLimit::StoredBytes => "stored-bytes",
        QuotaLimit::Topics => "topics",
        QuotaLimit::Streams => "streams",
    }
}

fn of(quota: &pb::Quota, limit: QuotaLimit) -> Option<pb::Limit> {
    match limit {
        QuotaLimit::EventsPerSecond => quota.events_per_second,
        QuotaLimit::BytesPerSecond => quota.bytes_per_second,
        QuotaLimit::StoredBytes => quota.stored_bytes,
        QuotaLimit::Topics => quota.topics,
        QuotaLimit::Streams => quota.streams,
    }
}

fn used(usage: &pb::QuotaUsage, limit: QuotaLimit) -> Option<u64> {
    match limit {
        QuotaLimit::EventsPerSecond => usage.events_per_second,
        QuotaLimit::BytesPerSecond => usage.bytes_per_second,
        QuotaLimit::StoredBytes => usage.stored_bytes,
        QuotaLimit::Topics => Some(usage.topics),
        QuotaLimit::Streams => usage.streams_of_busiest_node,
    }
}

fn at(limit: Option<pb::Limit>) -> Option<u64> {
    match limit?.kind? {
        pb::limit::Kind::At(at) => Some(at),
        pb::limit::Kind::Unlimited(_) | pb::limit::Kind::Unset(_) => None,
    }
}

/// `default` is what was set for every project, if that is known.
fn shown(quota: pb::QuotaStatus, default: Option<&pb::Quota>) -> ShownQuota {
    let set = quota.set.unwrap_or_default();
    let effective = quota.effective.unwrap_or_default();
    let usage = quota.usage;
    let is_default = quota.project_id.is_empty();
    let from = |limit| match of(&set, limit) {
        Some(_) if is_default => "default",
        Some(_) => "project",
        None if default.is_some_and(|default| of(default, limit).is_some()) => "default",
        // Who may not see the default cannot tell it from what is built in.
        None if default.is_none() && !is_default => "cluster",
        None => "built-in",
    };
    let limits = LIMITS.map(|limit| ShownLimit {
        limit: name(limit),
        at: at(of(&effective, limit)),
        from: from(limit),
        used: usage.as_ref().and_then(|usage| used(usage, limit)),
    });
    let some = |text: String| (!text.is_empty()).then_some(text);
    ShownQuota { project: some(quota.project_id), name: some(quota.project_name), limits: limits.into() }
}

fn whose(whose: Whose) -> Result<Option<ProjectId>, UsageError> {
    id(whose.project)
}

fn limit_of(at: Option<u64>) -> pb::Limit {
    pb::Limit { kind: Some(at.map_or(pb::limit::Kind::Unlimited(true), pb::limit::Kind::At)) }
}

/// Runs one of the quota commands.
pub(super) async fn run(command: QuotaCommand) -> anyhow::Result<()> {
    match command {
        QuotaCommand::Set {
            whose: who,
            events_per_second,
            bytes_per_second,
            stored_bytes,
            topics,
            streams,
            client,
        } => {
            let value = |value: Option<QuotaValue>| value.map(|value| limit_of(value.0));
            let bytes = |value: Option<QuotaBytes>| value.map(|value| limit_of(value.0));
            let change = pb::Quota {
                events_per_second: value(events_per_second),
                bytes_per_second: bytes(bytes_per_second),
                stored_bytes: bytes(stored_bytes),
                topics: value(topics),
                streams: value(streams),
            };
            if change == pb::Quota::default() {
                return Err(UsageError("name at least one limit to set, such as --topics 100".to_owned()).into());
            }
            let project = whose(who)?;
            let after = connect(&client)?.admin()?.set_quota(project, change).await?;
            changed(client.output, project, after, "set")
        }
        QuotaCommand::Unset { whose: who, limits, client } => {
            let unset = |limit| {
                let named = limits.is_empty() || limits.contains(&limit);
                named.then_some(pb::Limit { kind: Some(pb::limit::Kind::Unset(true)) })
            };
            let change = pb::Quota {
                events_per_second: unset(QuotaLimit::EventsPerSecond),
                bytes_per_second: unset(QuotaLimit::BytesPerSecond),
                stored_bytes: unset(QuotaLimit::StoredBytes),
                topics: unset(QuotaLimit::Topics),
                streams: unset(QuotaLimit::Streams),
            };
            let project = whose(who)?;
            let after = connect(&client)?.admin()?.set_quota(project, change).await?;
            changed(client.output, project, after, "unset")
        }
        QuotaCommand::Show { project, watch, client } => {
            let (project, admin) = (id(project)?, connect(&client)?.admin()?);
            watched(watch.watch, client.output, async || show(client.output, project, admin.quotas(project).await?))
                .await
        }
    }
}

fn changed(output: Output, project: Option<ProjectId>, after: pb::QuotaStatus, what: &str) -> anyhow::Result<()> {
    let whom =
        project.map_or_else(|| "every project without its own".to_owned(), |project| format!("project {project}"));
    let sentence = format!("{what} limits of {whom}; see `ensign quota show`");
    one(output, &shown(after, None), sentence)
}

fn show(output: Output, project: Option<ProjectId>, mut quotas: Vec<pb::QuotaStatus>) -> anyhow::Result<()> {
    let default = quotas.iter().find(|quota| quota.project_id.is_empty()).map(|quota| quota.set.unwrap_or_default());
    if project.is_some() {
        // It was there to tell where the project's limits come from.
        quotas.retain(|quota| !quota.project_id.is_empty());
    }
    let quotas: Vec<ShownQuota> = quotas.into_iter().map(|quota| shown(quota, default.as_ref())).collect();
    if output == Output::Json {
        return json(&quotas);
    }
    for quota in &quotas {
        match (&quota.name, &quota.project) {
            (Some(name), Some(project)) => line(format_args!("project {name} ({project})"))?,
            _ => line("every project that has no limit of its own")?,
        }
        let row = |limit: &ShownLimit| {
            let share = match (limit.used, limit.at) {
                (Some(used), Some(at)) if at > 0 => format!("{} %", u128::from(used) * 100 / u128::from(at)),
                _ => String::new(),
            };
            vec![
                limit.limit.to_owned(),
                limit.at.map_or_else(|| "unlimited".to_owned(), thousands),
                limit.from.to_owned(),
                limit.used.map_or_else(|| "-".to_owned(), thousands),
                share,
            ]
        };
        list(output, &["limit", "at", "set by", "used", "share"], &quota.limits, row, "no limits")?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_limit_says_where_it_comes_from_and_what_is_used_of_it() {
        let at = |at| Some(pb::Limit { kind: Some(pb::limit::Kind::At(at)) });
        let unlimited = Some(pb::Limit { kind: Some(pb::limit::Kind::Unlimited(true)) });
        let default = pb::Quota { topics: at(5), stored_bytes: at(7), ..Default::default() };
        let quota = pb::QuotaStatus {
            project_id: "p".to_owned(),
            project_name: "shop".to_owned(),
            set: Some(pb::Quota { topics: unlimited, ..Default::default() }),
            effective: Some(pb::Quota {
                topics: unlimited,
                stored_bytes: at(7),
                streams: at(2_000),
                ..Default::default()
            }),
            usage: Some(pb::QuotaUsage { topics: 3, stored_bytes: Some(6), ..Default::default() }),
        };
        let shown = shown(quota, Some(&default));
        let seen: Vec<_> = shown.limits.iter().map(|it| (it.limit, it.at, it.from, it.used)).collect();
        let expected = [
            ("events-per-second", None, "built-in", None),
            ("bytes-per-second", None, "built-in", None),
            ("stored-bytes", Some(7), "default", Some(6)),
            ("topics", None, "project", Some(3)),
            ("streams", Some(2_000), "built-in", None),
        ];
        assert_eq!(seen, expected);
    }
}
