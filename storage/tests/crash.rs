//! The power fails at thousands of moments, and what comes back is compared with what was promised.
//!
//! `SEED=… cargo test -p ensign-storage --test crash` replays one life. Every checker here is also shown a log that lies.

#[allow(dead_code, reason = "each test file uses a part of it")]
mod world;

use ensign_storage::LogConfig;
use ensign_storage::frame::Plant;
use world::{live_through, live_through_with};

const CRASHES: usize = 12;

fn seeds(count: u64) -> std::ops::Range<u64> {
    match std::env::var("SEED").ok().and_then(|seed| seed.parse().ok()) {
        Some(seed) => seed..seed + 1,
        None => 0..count,
    }
}

#[test]
fn what_was_promised_survives_a_power_failure_at_any_write() {
    let mut total = world::Tally::default();
    for seed in seeds(170) {
        let tally = live_through(seed, CRASHES, LogConfig::tiny(), false)
            .unwrap_or_else(|violation| panic!("SEED={seed}: {violation:?}"));
        total.crashes += tally.crashes;
        total.promised += tally.promised;
        total.lost_unpromised += tally.lost_unpromised;
        total.kept_unpromised += tally.kept_unpromised;
    }
    if std::env::var("SEED").is_err() {
        // The test is worth something only if crashes really took what was not promised.
        assert!(
            total.crashes >= 2000
                && total.promised > 10_000
                && total.lost_unpromised > 10_000
                && total.kept_unpromised > 0,
            "{total:?}"
        );
    }
}

fn finds_a_violation(config: LogConfig, lying: bool) -> bool {
    (0..30).any(|seed| live_through(seed, CRASHES, config, lying).is_err())
}

#[test]
fn commits_that_are_not_synced_are_found_out() {
    assert!(finds_a_violation(LogConfig { plant: Some(Plant::DurabilityNone), ..LogConfig::tiny() }, false));
}

#[test]
fn callbacks_before_the_sync_are_found_out() {
    assert!(finds_a_violation(LogConfig { plant: Some(Plant::AckEarly), ..LogConfig::tiny() }, false));
}

#[test]
fn a_disk_that_lies_about_syncs_is_found_out() {
    assert!(finds_a_violation(LogConfig::tiny(), true));
}

#[test]
fn one_seed_writes_the_same_bytes_twice() {
    let trace = |seed| {
        let mut traces = Vec::new();
        live_through_with(seed, 4, LogConfig::tiny(), false, |world| traces.push(world.disk.trace()))
            .expect("no violation");
        traces
    };
    for seed in 0..5 {
        assert_eq!(trace(seed), trace(seed), "SEED={seed}");
    }
    assert_ne!(trace(0), trace(1));
}
