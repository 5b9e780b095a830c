//! What a process has used: CPU, bytes written, syncs.

use std::collections::BTreeMap;
use std::time::Duration;

use super::nodes::Nodes;

/// `/proc/<pid>/stat` counts in these on every Linux that we run on (`USER_HZ`).
const TICKS_PER_SECOND: u64 = 100;

/// The counters of a server, read at one moment.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Usage {
    pub(super) cpu: Option<Duration>,
    pub(super) written: Option<u64>,
    pub(super) syncs: Option<u64>,
}

impl Usage {
    /// What was used since `earlier`.
    pub(super) fn since(self, earlier: Self) -> Self {
        Self {
            cpu: self.cpu.zip(earlier.cpu).map(|(now, then)| now.saturating_sub(then)),
            written: self.written.zip(earlier.written).map(|(now, then)| now.saturating_sub(then)),
            syncs: self.syncs.zip(earlier.syncs).map(|(now, then)| now.saturating_sub(then)),
        }
    }
}

/// CPU time of a process, of all its threads. `None` where `/proc` does not tell.
pub(super) fn cpu(pid: u32) -> Option<Duration> {
    parse_cpu(&std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

fn parse_cpu(stat: &str) -> Option<Duration> {
    // The second field is the command in parentheses and may hold anything; the fields after it are plain.
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    let (user, system): (u64, u64) = (fields.get(11)?.parse().ok()?, fields.get(12)?.parse().ok()?);
    Some(Duration::from_millis((user + system) * 1000 / TICKS_PER_SECOND))
}

/// Resident memory of a process, in bytes. `None` where `/proc` does not tell.
pub(super) fn resident(pid: u32) -> Option<u64> {
    parse_resident(&std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?)
}

/// Resident memory of each node, in bytes, where `/proc` tells.
pub(super) fn resident_each(nodes: &Nodes) -> BTreeMap<u64, u64> {
    nodes.pids().filter_map(|(id, pid)| Some((id, resident(pid)?))).collect()
}

/// CPU time of each node, where `/proc` tells.
pub(super) fn cpu_each(nodes: &Nodes) -> BTreeMap<u64, Duration> {
    nodes.pids().filter_map(|(id, pid)| Some((id, cpu(pid)?))).collect()
}

fn parse_resident(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    Some(line.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok()? << 10)
}

/// The sum of all samples of one counter on a Prometheus page.
pub(super) fn counter(page: &str, name: &str) -> Option<u64> {
    let samples = page.lines().filter_map(|line| {
        let rest = line.strip_prefix(name)?;
        let labelled = rest.starts_with('{') || rest.starts_with(' ');
        labelled.then(|| rest.rsplit_once(' ')?.1.parse::<f64>().ok())?
    });
    samples.map(|value| value as u64).reduce(|a, b| a + b)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_is_read_past_a_command_with_odd_characters() {
        let stat = "7 (a) b ( c) S 1 7 7 0 -1 4194560 100 0 0 0 250 50 0 0 20 0 3 0 100 1 1";
        assert_eq!(parse_cpu(stat), Some(Duration::from_secs(3)));
        assert_eq!(parse_cpu("nonsense"), None);
    }

    #[test]
    fn resident_memory_is_read_in_bytes() {
        assert_eq!(parse_resident("Name:\tensign\nVmRSS:\t   12345 kB\nRssAnon:\t 1 kB\n"), Some(12_345 << 10));
        assert_eq!(parse_resident("Name:\tensign\n"), None);
    }

    #[test]
    fn a_counter_is_summed_over_its_labels_and_no_other() {
        let page = "# HELP syncs_total x\nsyncs_total{node=\"1\"} 3\nsyncs_total{node=\"2\"} 4\nsyncs_total_other 9\n";
        assert_eq!(counter(page, "syncs_total"), Some(7));
        assert_eq!(counter("syncs_total 5", "syncs_total"), Some(5));
        assert_eq!(counter(page, "missing"), None);
    }
}
