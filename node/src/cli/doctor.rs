//! `ensign doctor`: what is wrong with the cluster, and what to do about it.

mod diagnose;

use serde::Serialize;

use super::args::{DoctorArgs, Output};
use super::cluster::status;
use super::exit::Unwell;
use super::output::{self, line};
use diagnose::{Finding, Severity, diagnose};

#[derive(Serialize)]
struct Diagnosis<'a> {
    cluster: &'a str,
    answered_by: u64,
    /// The worst severity; absent where nothing was found.
    worst: Option<Severity>,
    findings: &'a [Finding],
}

/// Runs `ensign doctor`.
///
/// # Errors
/// [`Unwell`] if something needs an operator; whatever keeps a report from being made.
pub(super) async fn run(args: DoctorArgs) -> anyhow::Result<()> {
    let mut before = status::report(&args.report).await?;
    // What stands still shows only over time.
    tokio::time::sleep(args.over).await;
    let mut worst = None;
    status::watching(&args.report, |now| {
        let findings = diagnose(&before, &now);
        worst = findings.first().map(|finding| finding.severity);
        show(args.report.client.output, &now, &findings)?;
        before = now;
        Ok(())
    })
    .await?;
    match worst {
        Some(Severity::Warning | Severity::Critical) => Err(Unwell.into()),
        Some(Severity::Note) | None => Ok(()),
    }
}

fn show(
    output: Output,
    now: &ensign_proto::pb::admin::v1::ClusterReportReply,
    findings: &[Finding],
) -> anyhow::Result<()> {
    let worst = findings.first().map(|finding| finding.severity);
    if output == Output::Json {
        return output::json(&Diagnosis { cluster: &now.cluster_id, answered_by: now.answered_by, worst, findings });
    }
    if findings.is_empty() {
        let groups: u64 = now.nodes.iter().filter_map(|it| it.report.as_ref()).map(|it| it.leads).sum();
        return line(format_args!("well: {} nodes answer, {groups} groups have a leader", now.nodes.len()));
    }
    for finding in findings {
        line(format_args!("{:8} {} [{}]", label(finding.severity), finding.what, finding.code))?;
        line(format_args!("         → {}", finding.remedy))?;
    }
    Ok(())
}

fn label(severity: Severity) -> &'static str {
    match severity {
        Severity::Critical => "CRITICAL",
        Severity::Warning => "WARNING",
        Severity::Note => "note",
    }
}
