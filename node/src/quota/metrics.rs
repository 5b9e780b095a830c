//! What quotas count. No label names a tenant.

use std::time::Duration;

use metrics::{Unit, counter, describe_counter, describe_histogram, histogram};

use crate::catalog::Resource;

/// Registers help texts. Call once, after the recorder is installed.
pub fn describe() {
    describe_counter!(
        "ensign_quota_refused_total",
        "Events, streams and topics that were refused because their project has used up a quota, by quota"
    );
    describe_histogram!(
        "ensign_quota_waited_seconds",
        Unit::Seconds,
        "How long events waited because their project publishes faster than it may; those that did not wait are not counted"
    );
    describe_counter!(
        "ensign_quota_apart_total",
        "Times that this node let in its even share of a project's rate because the catalog's leader could not be asked"
    );
}

/// So many were refused.
pub(crate) fn refused(resource: Resource, count: u64) {
    counter!("ensign_quota_refused_total", "quota" => resource.as_str()).increment(count);
}

pub(super) fn waited(time: Duration) {
    histogram!("ensign_quota_waited_seconds").record(time.as_secs_f64());
}

pub(super) fn apart() {
    counter!("ensign_quota_apart_total").increment(1);
}
