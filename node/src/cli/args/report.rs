//! What `ensign cluster status` and `ensign doctor` take.

use clap::Args;

use super::ClientArgs;

/// Where a report of the cluster comes from, and how often.
#[derive(Debug, Args)]
pub struct ReportArgs {
    /// Ask a node's metrics port, without logging in, so that it works while the cluster has no quorum. Names of topics are
    /// then left out.
    #[arg(long, value_name = "URL")]
    pub direct: Option<String>,
    /// Show it again and again, this far apart, until Ctrl-C.
    #[arg(long, value_name = "PAUSE", num_args = 0..=1, default_missing_value = "2s", value_parser = humantime::parse_duration)]
    pub watch: Option<std::time::Duration>,
    /// Connection.
    #[command(flatten)]
    pub client: ClientArgs,
}

/// `ensign doctor`.
#[derive(Debug, Args)]
#[command(
    after_help = "Looks twice, so that it can tell what stands still. Exit code 0: nothing needs an operator; 8: something does.

Examples:
  ensign doctor
  ensign doctor --output json | jq '.findings[] | {code, what, remedy}'
  ensign doctor --direct http://127.0.0.1:1205    on a node, without logging in: works without a quorum too"
)]
pub struct DoctorArgs {
    /// How far apart it looks.
    #[arg(long, value_name = "TIME", default_value = "2s", value_parser = humantime::parse_duration)]
    pub over: std::time::Duration,
    /// Where from.
    #[command(flatten)]
    pub report: ReportArgs,
}
