//! What a run measured, for people and for programs.

use std::time::Duration;

use hdrhistogram::{CreationError, Histogram};
use serde::Serialize;

use super::disk::Floor;
use super::usage::Usage;
use crate::cli::thousands;

/// The longest time that is told apart from longer ones: ten minutes.
const MICROSECONDS_MAX: u64 = 600_000_000;

/// An empty histogram of microseconds. Of a fixed range, since `saturating_record` never makes one grow.
pub(super) fn microseconds() -> Result<Histogram<u64>, CreationError> {
    Histogram::new_with_max(MICROSECONDS_MAX, 3)
}

/// The figures of one run. Absent means that this run could not tell.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    pub(super) bench: &'static str,
    pub(super) events: u64,
    pub(super) size: u32,
    pub(super) replicas: Option<u64>,
    pub(super) clients: u32,
    pub(super) window: u32,
    pub(super) topics: u32,
    pub(super) seconds: f64,
    pub(super) events_per_second: f64,
    pub(super) megabytes_per_second: f64,
    pub(super) ack_p50_us: Option<u64>,
    pub(super) ack_p99_us: Option<u64>,
    pub(super) ack_p999_us: Option<u64>,
    pub(super) ack_max_us: Option<u64>,
    pub(super) fsyncs_per_event: Option<f64>,
    pub(super) disk_bytes_per_byte: Option<f64>,
    pub(super) server_cpu_seconds: Option<f64>,
    pub(super) client_cpu_seconds: Option<f64>,
    pub(super) fdatasync_p50_us: Option<u64>,
    pub(super) fdatasync_p99_us: Option<u64>,
    pub(super) ack_p50_per_fdatasync_p50: Option<f64>,
}

/// What every run has.
pub(super) struct Run {
    pub(super) bench: &'static str,
    pub(super) events: u64,
    pub(super) size: u32,
    pub(super) replicas: Option<u64>,
    pub(super) clients: u32,
    pub(super) window: u32,
    pub(super) topics: u32,
    pub(super) elapsed: Duration,
    pub(super) server: Usage,
    pub(super) client_cpu: Option<Duration>,
    pub(super) floor: Option<Floor>,
}

impl Report {
    pub(super) fn new(run: &Run, latency: Option<&Histogram<u64>>) -> Self {
        let seconds = run.elapsed.as_secs_f64().max(1e-9);
        let events = run.events as f64;
        let bytes = events * f64::from(run.size);
        let quantile = |q| latency.map(|it| it.value_at_quantile(q));
        let floor_p50 = run.floor.map(|it| it.p50_us);
        Self {
            bench: run.bench,
            events: run.events,
            size: run.size,
            replicas: run.replicas,
            clients: run.clients,
            window: run.window,
            topics: run.topics,
            seconds,
            events_per_second: events / seconds,
            megabytes_per_second: bytes / seconds / 1e6,
            ack_p50_us: quantile(0.5),
            ack_p99_us: quantile(0.99),
            ack_p999_us: quantile(0.999),
            ack_max_us: latency.map(Histogram::max),
            fsyncs_per_event: run.server.syncs.map(|it| it as f64 / events),
            disk_bytes_per_byte: run.server.written.map(|it| it as f64 / bytes),
            server_cpu_seconds: run.server.cpu.map(|it| it.as_secs_f64()),
            client_cpu_seconds: run.client_cpu.map(|it| it.as_secs_f64()),
            fdatasync_p50_us: floor_p50,
            fdatasync_p99_us: run.floor.map(|it| it.p99_us),
            ack_p50_per_fdatasync_p50: quantile(0.5)
                .zip(floor_p50)
                .map(|(ack, floor)| ack as f64 / floor.max(1) as f64),
        }
    }

    /// The figures as `name  value` lines.
    pub(super) fn lines(&self) -> Vec<(&'static str, String)> {
        let micros = |value: Option<u64>| value.map(|us| format!("{} µs", thousands(us)));
        let number = |value: Option<f64>, unit: &str| value.map(|value| format!("{value:.3}{unit}"));
        let lines = [
            ("events", Some(format!("{} of {} bytes in {:.2} s", thousands(self.events), self.size, self.seconds))),
            ("throughput", Some(self.throughput())),
            ("ack p50", micros(self.ack_p50_us)),
            ("ack p99", micros(self.ack_p99_us)),
            ("ack p99.9", micros(self.ack_p999_us)),
            ("ack max", micros(self.ack_max_us)),
            ("fsyncs per event", self.fsyncs_per_event.map(|it| format!("{it:.5}"))),
            ("disk bytes per byte", number(self.disk_bytes_per_byte, "")),
            ("server CPU", number(self.server_cpu_seconds, " s")),
            ("client CPU", number(self.client_cpu_seconds, " s")),
            ("disk: 4 KiB append + fdatasync p50", micros(self.fdatasync_p50_us)),
            ("ack p50 / disk p50", number(self.ack_p50_per_fdatasync_p50, "")),
        ];
        lines.into_iter().filter_map(|(name, value)| value.map(|value| (name, value))).collect()
    }

    fn throughput(&self) -> String {
        format!("{} events/s, {:.1} MB/s", thousands(self.events_per_second as u64), self.megabytes_per_second)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run() -> Run {
        Run {
            bench: "publish",
            events: 1_000,
            size: 1_000,
            replicas: Some(3),
            clients: 8,
            window: 256,
            topics: 1,
            elapsed: Duration::from_secs(2),
            server: Usage { cpu: Some(Duration::from_millis(1500)), written: Some(3_300_000), syncs: Some(50) },
            client_cpu: Some(Duration::from_millis(250)),
            floor: Some(Floor { p50_us: 200, p99_us: 900 }),
        }
    }

    #[test]
    fn a_report_has_every_figure_that_the_help_promises() {
        let mut latency = Histogram::new(3).unwrap();
        for us in 1..=1_000 {
            latency.record(us).unwrap();
        }
        let report = Report::new(&run(), Some(&latency));
        insta::assert_json_snapshot!(report);
    }

    #[test]
    fn a_long_time_is_recorded_as_long_as_it_was() {
        let mut latency = microseconds().unwrap();
        for us in [3, 4_000, 5_000_000] {
            latency.saturating_record(us);
        }
        let report = Report::new(&run(), Some(&latency));
        assert_eq!(report.ack_p50_us.map(|us| us / 10), Some(400));
        assert!(report.ack_max_us.is_some_and(|us| us >= 4_990_000), "{:?}", report.ack_max_us);
    }

    #[test]
    fn what_a_run_cannot_tell_is_absent() {
        let run = Run { server: Usage::default(), client_cpu: None, floor: None, ..run() };
        let report = Report::new(&run, None);
        assert!(report.fsyncs_per_event.is_none() && report.ack_p50_us.is_none());
        assert_eq!(report.lines().len(), 2);
    }
}
