//! What the data plane counts. Names, units and help live here and nowhere else.

use metrics::{Unit, counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram};

/// Registers help texts. Call once, after the recorder is installed.
pub fn describe() {
    describe_counter!("ensign_events", "Events committed by this node as a leader");
    describe_histogram!("ensign_batch_events", "Events in a sealed batch");
    describe_histogram!("ensign_batch_bytes", Unit::Bytes, "Plaintext bytes of a sealed batch");
    describe_histogram!(
        "ensign_publish_ack_seconds",
        Unit::Seconds,
        "From the arrival of events to their acknowledgement; events that arrive together count once"
    );
    describe_counter!(
        "ensign_publish_refused_total",
        "Events that were not acknowledged, by cause; those of outcome_unknown may be stored all the same"
    );
    describe_gauge!("ensign_online_publishers", "Open publish streams");
    describe_gauge!("ensign_online_subscribers", "Open subscribe streams");
}

pub(super) fn observe_batch(events: u32, bytes: usize) {
    histogram!("ensign_batch_events").record(f64::from(events));
    histogram!("ensign_batch_bytes").record(bytes as f64);
}

pub(super) fn observe_committed(events: u64) {
    counter!("ensign_events", "node" => "unk", "region" => "unk").increment(events);
}

/// Events that were not acknowledged. `cause` is one of a few words of ours.
pub(crate) fn observe_refused(cause: &'static str, events: u64) {
    counter!("ensign_publish_refused_total", "cause" => cause).increment(events);
}

pub(crate) fn observe_ack(latency: std::time::Duration) {
    histogram!("ensign_publish_ack_seconds").record(latency.as_secs_f64());
}

/// Counts an open stream for as long as it lives.
#[derive(Debug)]
pub(crate) struct Online(&'static str);

impl Online {
    pub(crate) fn publisher() -> Self {
        Self::new("ensign_online_publishers")
    }

    pub(crate) fn subscriber() -> Self {
        Self::new("ensign_online_subscribers")
    }

    fn new(name: &'static str) -> Self {
        gauge!(name).increment(1.0);
        Self(name)
    }
}

impl Drop for Online {
    fn drop(&mut self) {
        gauge!(self.0).decrement(1.0);
    }
}
