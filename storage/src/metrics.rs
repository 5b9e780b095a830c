//! This crate's metrics: each name, unit and help lives here and nowhere else.

use std::time::Duration;

use metrics::{Unit, counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram};

/// Describes every metric; call it once, after the recorder is installed.
pub fn describe() {
    describe_counter!("ensign_log_commits_total", "Group commits of the frame log.");
    describe_counter!("ensign_log_records_total", "Entries, votes and other records committed.");
    describe_counter!("ensign_log_bytes_total", Unit::Bytes, "Bytes of frames committed.");
    describe_counter!("ensign_log_purged_bytes_total", Unit::Bytes, "Bytes of frames removed.");
    describe_counter!(
        "ensign_log_moved_bytes_total",
        Unit::Bytes,
        "Bytes of old entries written again to free their frames."
    );
    describe_histogram!("ensign_log_commit_bytes", Unit::Bytes, "Bytes of one group commit.");
    describe_counter!(
        "ensign_log_written_bytes_total",
        Unit::Bytes,
        "Bytes written to the log's file: pages of the database, or room (zeros ahead of need)."
    );
    describe_counter!("ensign_log_syncs_total", "Syncs of the log's file; a commit needs one.");
    describe_histogram!("ensign_log_sync_seconds", Unit::Seconds, "How long the disk took to sync.");
    describe_gauge!("ensign_log_queued_bytes", Unit::Bytes, "Bytes waiting for the next group commit.");
    describe_gauge!("ensign_log_full", "1 while the disk has no room and appends are refused.");
    describe_gauge!("ensign_log_fenced", "1 once a failed write or sync has fenced the log.");
}

pub(crate) fn observe_commit(records: u64, bytes: u64, queued: u64) {
    counter!("ensign_log_commits_total").increment(1);
    counter!("ensign_log_records_total").increment(records);
    counter!("ensign_log_bytes_total").increment(bytes);
    histogram!("ensign_log_commit_bytes").record(bytes as f64);
    gauge!("ensign_log_queued_bytes").set(queued as f64);
}

pub(crate) fn observe_sync(took: Duration) {
    counter!("ensign_log_syncs_total").increment(1);
    histogram!("ensign_log_sync_seconds").record(took.as_secs_f64());
}

pub(crate) fn observe_written(bytes: u64) {
    counter!("ensign_log_written_bytes_total", "what" => "pages").increment(bytes);
}

pub(crate) fn observe_room(bytes: u64) {
    counter!("ensign_log_written_bytes_total", "what" => "room").increment(bytes);
}

pub(crate) fn observe_purge(bytes: u64) {
    counter!("ensign_log_purged_bytes_total").increment(bytes);
}

pub(crate) fn observe_move(bytes: u64) {
    counter!("ensign_log_moved_bytes_total").increment(bytes);
}

pub(crate) fn set_full(full: bool) {
    gauge!("ensign_log_full").set(f64::from(u8::from(full)));
}

pub(crate) fn set_fenced() {
    gauge!("ensign_log_fenced").set(1.0);
}
