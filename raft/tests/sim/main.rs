//! A cluster of three in simulated time: turmoil's network, the frame log on a disk that loses what was not synced, and
//! everything from one seed. `SEED=… cargo test --workspace --test sim` replays one.

#[cfg(not(tokio_unstable))]
compile_error!("a simulation replays only under `--cfg tokio_unstable`; .cargo/config.toml sets it");

mod check;
mod cluster;
mod host;
mod world;

use std::time::Duration;

use ensign_storage::fault::Crash;
use ensign_storage::frame::Plant;

use crate::check::Violation;
use crate::cluster::{Options, Report, SimCluster};
use crate::host::Plants;

/// The seeds of a test: the one that `SEED` names, else these.
fn seeds(usual: &[u64]) -> Vec<u64> {
    match std::env::var("SEED") {
        Ok(seed) => vec![seed.parse().expect("SEED is a number")],
        Err(_) => usual.to_vec(),
    }
}

fn storm(seed: u64, length: Duration) -> Result<Report, Violation> {
    let mut cluster = SimCluster::new(Options::new(seed));
    cluster.storm(length)?;
    cluster.finish()
}

#[test]
fn a_cluster_keeps_its_promises_through_crashes_and_partitions() {
    for seed in seeds(&[1, 2, 3, 4]) {
        let report = storm(seed, Duration::from_secs(10)).unwrap_or_else(|found| panic!("SEED={seed}: {found}"));
        // A run in which nothing was promised, or nothing went wrong, shows nothing.
        assert!(report.acked >= 100, "SEED={seed}: only {} entries were acknowledged", report.acked);
        assert!(report.disturbances >= 8, "SEED={seed}: only {} disturbances", report.disturbances);
    }
}

#[test]
fn the_same_seed_gives_the_same_trace_twice() {
    for seed in seeds(&[7]) {
        let [first, second] = [(); 2].map(|()| storm(seed, Duration::from_secs(6)).expect("the run is clean").trace);
        assert!(first.lines().count() > 100, "the trace is too short to prove anything");
        if let Ok(folder) = std::env::var("TRACES") {
            std::fs::write(format!("{folder}/first"), &first).expect("written");
            std::fs::write(format!("{folder}/second"), &second).expect("written");
        }
        let parted = first.lines().zip(second.lines()).find(|(first, second)| first != second);
        assert_eq!(parted, None, "SEED={seed} gave two traces");
        assert_eq!(first.len(), second.len(), "SEED={seed} gave a trace that goes on");
    }
}

#[test]
fn another_seed_gives_another_trace() {
    let [first, second] = [8, 9].map(|seed| storm(seed, Duration::from_secs(2)).expect("the run is clean").trace);
    assert_ne!(first, second);
}

/// The leader appends and its followers acknowledge, while the leader's own flush is late; then its power fails and it is
/// back at once, without the tail that the cluster has committed (key-design §4.4).
fn a_leader_loses_its_unflushed_tail(planted_leader_restore: bool) -> Result<Report, Violation> {
    let mut options = Options::new(42);
    options.plants.leader_restore = planted_leader_restore;
    let mut cluster = SimCluster::new(options);
    let leader = cluster.run_to_leader()?;
    cluster.run_until_acked(20)?;
    cluster.hold_syncs(leader, true);
    let acked = cluster.acked();
    cluster.run_until_acked(acked + 5)?;
    cluster.crash(leader, Crash::DropAll);
    cluster.hold_syncs(leader, false);
    cluster.restart(leader);
    cluster.run(Duration::from_secs(3))?;
    cluster.finish()
}

#[test]
fn a_leader_that_lost_its_unflushed_tail_does_not_lead_its_old_term_again() {
    let report = a_leader_loses_its_unflushed_tail(false).unwrap_or_else(|found| panic!("{found}"));
    assert!(report.acked >= 25);
}

#[test]
fn planted_leader_restore_forks_the_log_and_is_caught() {
    let found = a_leader_loses_its_unflushed_tail(true).err();
    let Some(Violation(what)) = found else { panic!("the planted bug was not found") };
    // Whoever looks first: the log's checker, or a client whose read misses what was acknowledged.
    let forked = what.contains("two entries") || what.contains("a read index of");
    assert!(forked, "found something else: {what}");
}

/// Voters come and go, some of them for good, while nodes crash and networks are cut.
fn migration(seed: u64, length: Duration, plants: Plants) -> Result<Report, Violation> {
    let mut options = Options::new(seed);
    options.spares = 4;
    options.plants = plants;
    let mut cluster = SimCluster::new(options);
    let world = cluster.world();
    let report = cluster.migration(length).and_then(|()| cluster.finish());
    if let (Err(_), Ok(folder)) = (&report, std::env::var("TRACES")) {
        std::fs::write(format!("{folder}/{seed}"), &world.lock().trace).expect("written");
    }
    report
}

#[test]
fn a_cluster_keeps_its_promises_while_its_members_change() {
    for seed in seeds(&[21, 22, 23, 24]) {
        let report = migration(seed, Duration::from_secs(15), Plants::default())
            .unwrap_or_else(|found| panic!("SEED={seed}: {found}"));
        assert!(report.acked >= 100, "SEED={seed}: only {} entries were acknowledged", report.acked);
        assert!(report.changes >= 3, "SEED={seed}: only {} changes of the voters", report.changes);
        assert!(report.lost >= 1, "SEED={seed}: no node was lost");
        assert!(report.returns >= 2, "SEED={seed}: only {} replicas left and came back", report.returns);
        assert!(report.ambushes >= 1, "SEED={seed}: nobody who slept met one who left");
        assert!(report.turns >= 1, "SEED={seed}: no leader that was cut off saw its group called back");
    }
}

#[test]
fn a_change_of_members_replays_from_its_seed() {
    let [first, second] =
        [(); 2].map(|()| migration(25, Duration::from_secs(6), Plants::default()).expect("the run is clean").trace);
    assert!(first.contains("change from"), "no change of voters was tried");
    assert_eq!(first, second);
}

#[test]
fn a_planted_second_founding_gives_a_term_two_leaders_and_is_caught() {
    let found = migration(26, Duration::from_secs(3), Plants { refound: true, ..Plants::default() }).err();
    let Some(Violation(what)) = found else { panic!("the planted bug was not found") };
    assert!(what.contains("two leaders") || what.contains("two entries"), "found something else: {what}");
}

#[test]
fn planted_forgetting_of_promises_by_who_leaves_makes_a_second_history_and_is_caught() {
    for seed in seeds(&[3]) {
        let found = migration(seed, Duration::from_secs(3), Plants { forgetful: true, ..Plants::default() }).err();
        let Some(Violation(what)) = found else { panic!("SEED={seed}: the planted bug was not found") };
        assert!(what.contains("two leaders") || what.contains("two entries"), "found something else: {what}");
    }
}

#[test]
fn planted_hearsay_of_who_belongs_to_a_group_is_caught() {
    for seed in seeds(&[6]) {
        let found = migration(seed, Duration::from_secs(3), Plants { hearsay: true, ..Plants::default() }).err();
        let Some(Violation(what)) = found else { panic!("SEED={seed}: the planted bug was not found") };
        // Those who held the group have given it up.
        assert!(what.contains("did not happen"), "found something else: {what}");
    }
}

/// A whole cluster loses power again and again, and keeps only what was synced.
fn outages(plant: Option<Plant>) -> Result<Report, Violation> {
    let mut options = Options::new(5);
    options.plants.log = plant;
    let mut cluster = SimCluster::new(options);
    for _ in 0..6 {
        cluster.run_to_leader()?;
        let acked = cluster.acked();
        cluster.run_until_acked(acked + 20)?;
        cluster.outage()?;
    }
    cluster.finish()
}

#[test]
fn nothing_acknowledged_is_lost_when_every_node_loses_power() {
    let report = outages(None).unwrap_or_else(|found| panic!("{found}"));
    assert!(report.acked >= 120);
}

#[test]
fn planted_early_callbacks_lose_acknowledged_entries_and_are_caught() {
    assert!(outages(Some(Plant::AckEarly)).is_err());
}

#[test]
fn planted_unsynced_commits_lose_acknowledged_entries_and_are_caught() {
    assert!(outages(Some(Plant::DurabilityNone)).is_err());
}

#[test]
fn a_deposed_leader_does_not_acknowledge() {
    for seed in seeds(&[11, 12]) {
        let outcome = deposed(seed).unwrap_or_else(|found| panic!("SEED={seed}: {found}"));
        assert!(outcome.unknown > 0, "SEED={seed}: nothing was in flight when the leader was cut off");
    }
}

fn deposed(seed: u64) -> Result<Report, Violation> {
    let mut cluster = SimCluster::new(Options::new(seed));
    let old = cluster.run_to_leader()?;
    cluster.run_until_acked(10)?;
    cluster.isolate(old);
    cluster.run_to_leader_other_than(old)?;
    let acked = cluster.acked();
    cluster.run_until_acked(acked + 10)?;
    cluster.heal();
    cluster.finish()
}

/// The leader's node dies while all sleep, and nobody says anything to wake the others.
fn a_leader_dies_in_its_sleep(planted_deep_sleep: bool) -> Result<Report, Violation> {
    let mut options = Options::new(21);
    options.plants.deep_sleep = planted_deep_sleep;
    let mut cluster = SimCluster::new(options);
    let leader = cluster.run_to_leader()?;
    cluster.run_until_acked(20)?;
    cluster.run_until_asleep()?;
    cluster.crash(leader, Crash::KeepAll);
    cluster.run_to_leader_other_than(leader)?;
    cluster.finish()
}

#[test]
fn a_group_whose_leader_dies_in_its_sleep_elects_another() {
    let report = a_leader_dies_in_its_sleep(false).unwrap_or_else(|found| panic!("{found}"));
    assert!(report.acked >= 30);
}

#[test]
fn planted_deep_sleep_leaves_a_group_without_a_leader_and_is_caught() {
    let found = a_leader_dies_in_its_sleep(true).err();
    let Some(Violation(what)) = found else { panic!("the planted bug was not found") };
    assert!(what.contains("a new leader did not happen"), "found something else: {what}");
}

#[test]
fn an_idle_group_sleeps_and_wakes_without_an_election() {
    for seed in seeds(&[31, 32]) {
        let slept = || -> Result<(), Violation> {
            let mut cluster = SimCluster::new(Options::new(seed));
            cluster.run_to_leader()?;
            cluster.run_until_acked(20)?;
            let elections = cluster.elections();
            for _ in 0..5 {
                cluster.run_until_asleep()?;
                cluster.run(Duration::from_secs(8))?;
                let acked = cluster.acked();
                cluster.propose(true);
                cluster.run_until_acked(acked + 5)?;
            }
            assert_eq!(cluster.elections(), elections, "SEED={seed}: somebody was elected");
            cluster.finish().map(|_| ())
        };
        slept().unwrap_or_else(|found| panic!("SEED={seed}: {found}"));
    }
}

#[test]
fn a_sleeping_group_survives_restarts_of_one_node_and_of_all() {
    for seed in seeds(&[41, 42]) {
        restarts(seed).unwrap_or_else(|found| panic!("SEED={seed}: {found}"));
    }
}

fn restarts(seed: u64) -> Result<(), Violation> {
    let mut cluster = SimCluster::new(Options::new(seed));
    cluster.run_to_leader()?;
    cluster.run_until_acked(20)?;
    for node in cluster.nodes() {
        cluster.run_until_asleep()?;
        cluster.crash(node, Crash::DropAll);
        cluster.run(Duration::from_secs(3))?;
        cluster.restart(node);
        cluster.run_until_asleep()?;
    }
    for node in cluster.nodes() {
        cluster.crash(node, Crash::DropAll);
    }
    for node in cluster.nodes() {
        cluster.restart(node);
        cluster.run(Duration::from_millis(300))?;
    }
    cluster.run_until_asleep()?;
    let elections = cluster.elections();
    assert!(elections <= 12, "{elections} elections for seven deaths");
    cluster.finish().map(|_| ())
}

#[test]
fn links_that_are_cut_one_way_do_not_make_leaders_change_for_ever() {
    for seed in seeds(&[51]) {
        one_way(seed).unwrap_or_else(|found| panic!("SEED={seed}: {found}"));
    }
}

fn one_way(seed: u64) -> Result<(), Violation> {
    let mut cluster = SimCluster::new(Options::new(seed));
    cluster.run_to_leader()?;
    cluster.run_until_acked(20)?;
    for from in cluster.nodes() {
        for to in cluster.nodes().into_iter().filter(|to| *to != from) {
            cluster.run_until_asleep()?;
            let before = cluster.elections();
            cluster.cut(from, to);
            cluster.run(Duration::from_secs(10))?;
            let elections = cluster.elections() - before;
            assert!(elections <= 2, "SEED={seed}: {elections} elections while n{from} could not reach n{to}");
            cluster.heal();
        }
    }
    cluster.finish().map(|_| ())
}
