//! Logs and metrics of the process.

use std::io::IsTerminal as _;
use std::sync::OnceLock;

use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder, PrometheusHandle};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::util::{SubscriberInitExt as _, TryInitError};

use crate::config::{LogFormat, LogSettings};

/// Buckets of every histogram in seconds: from the 20 µs of a recycled page's sync to the 10 s of a lost majority.
const SECONDS: &[f64] = &[
    0.000_02, 0.000_05, 0.000_1, 0.000_2, 0.000_5, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0,
    10.0,
];
/// Buckets of every histogram in bytes: one event to one commit.
const BYTES: &[f64] = &[256.0, 1024.0, 4096.0, 16384.0, 65536.0, 262_144.0, 1_048_576.0, 4_194_304.0, 16_777_216.0];
/// Buckets of every other histogram: counts.
const COUNTS: &[f64] = &[1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0];

/// Sends logs to stderr, in the form that `settings` ask for.
///
/// # Errors
/// The filter is malformed, or logging was set up before.
pub fn start_logs(settings: &LogSettings) -> anyhow::Result<()> {
    let filter = EnvFilter::try_new(&settings.filter)
        .map_err(|error| anyhow::anyhow!("log.filter = {:?} is malformed: {error}", settings.filter))?;
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        // A log that nobody reads any more is no reason to stop: reporting it would panic in whatever task was logging.
        .log_internal_errors(false)
        .with_ansi(std::io::stderr().is_terminal());
    let installed: Result<(), TryInitError> = match settings.format {
        LogFormat::Human => builder.with_target(false).finish().try_init(),
        LogFormat::Json => builder.json().flatten_event(true).with_current_span(false).finish().try_init(),
    };
    Ok(installed?)
}

/// The process's metrics, in Prometheus' text form. The recorder is installed at the first call.
///
/// # Errors
/// Another recorder is installed already.
pub fn metrics() -> Result<&'static PrometheusHandle, BuildError> {
    static HANDLE: OnceLock<PrometheusHandle> = OnceLock::new();
    if let Some(handle) = HANDLE.get() {
        return Ok(handle);
    }
    let handle = PrometheusBuilder::new()
        .set_buckets_for_metric(Matcher::Suffix("_seconds".to_owned()), SECONDS)?
        .set_buckets_for_metric(Matcher::Suffix("_bytes".to_owned()), BYTES)?
        .set_buckets(COUNTS)?
        .install_recorder()?;
    ensign_storage::metrics::describe();
    ensign_keyvault::metrics::describe();
    crate::partition::metrics::describe();
    crate::quota::metrics::describe();
    crate::report::metrics::describe();
    Ok(HANDLE.get_or_init(|| handle))
}
