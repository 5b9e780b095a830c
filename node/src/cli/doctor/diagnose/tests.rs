use super::*;

/// Three healthy nodes; node 1 leads the catalog and node 2 the topic `orders`.
fn healthy() -> pb::ClusterReportReply {
    let group = |id: u64, name: &str, leader: u64| pb::GroupReport {
        group_id: id,
        name: name.to_owned(),
        term: 2,
        leader,
        last_log_index: 5_000,
        committed_index: 5_000,
        applied_index: 5_000,
        health: "running".to_owned(),
        members: (1..=3).map(|node_id| pb::MemberReport { node_id, voter: true, lag: 0 }).collect(),
        ..Default::default()
    };
    let node = |id: u64, groups: Vec<pb::GroupReport>| pb::PeerReport {
        node_id: id,
        address: format!("node-{id}:5357"),
        round_trip: Some(prost_types::Duration { seconds: 0, nanos: 2_000_000 }),
        clock_offset: Some(prost_types::Duration { seconds: 0, nanos: -1_000_000 }),
        report: Some(pb::NodeReport {
            node_id: id,
            version: "1.0.0".to_owned(),
            phase: "serving".to_owned(),
            wall_clock: Some(prost_types::Timestamp { seconds: 1_000_000, nanos: 0 }),
            certificate_expires: Some(prost_types::Timestamp { seconds: 1_000_000 + 90 * 86_400, nanos: 0 }),
            disk_bytes: 1_000,
            disk_free_bytes: 600,
            lease_left: Some(prost_types::Duration { seconds: 7, nanos: 0 }),
            replicas: 2,
            speaks: 2,
            cluster_version: 2,
            leads: groups.len() as u64,
            groups,
            ..Default::default()
        }),
        ..Default::default()
    };
    pb::ClusterReportReply {
        cluster_id: "cluster".to_owned(),
        answered_by: 1,
        nodes: vec![node(1, vec![group(1, "catalog", 1)]), node(2, vec![group(16, "orders", 2)]), node(3, Vec::new())],
        partitions: vec![pb::PartitionAssignment {
            group_id: 16,
            name: "orders".to_owned(),
            replicas: vec![1, 2, 3],
            ..Default::default()
        }],
        ..Default::default()
    }
}

fn report(cluster: &mut pb::ClusterReportReply, node: usize) -> &mut pb::NodeReport {
    cluster.nodes[node - 1].report.as_mut().unwrap()
}

fn orders(cluster: &mut pb::ClusterReportReply) -> &mut pb::GroupReport {
    &mut report(cluster, 2).groups[0]
}

fn silence(cluster: &mut pb::ClusterReportReply, node: usize) {
    cluster.nodes[node - 1].report = None;
    cluster.nodes[node - 1].failure = "connection refused".to_owned();
}

/// Severity and code of what is found, after `change`.
fn found(change: impl Fn(&mut pb::ClusterReportReply)) -> Vec<(Severity, &'static str)> {
    let mut now = healthy();
    change(&mut now);
    diagnose(&now, &now).iter().map(|finding| (finding.severity, finding.code)).collect()
}

#[test]
fn a_healthy_cluster_has_no_findings() {
    assert_eq!(found(|_| ()), []);
}

#[test]
fn a_silent_node_is_found_and_its_replicas_are_counted_once() {
    let mut now = healthy();
    silence(&mut now, 3);
    let findings = diagnose(&now, &now);
    let codes: Vec<_> = findings.iter().map(|it| (it.severity, it.code)).collect();
    let expected = ["under-replicated", "voter-lost"].map(|code| (Severity::Warning, code));
    assert_eq!(codes, [&[(Severity::Critical, "node-silent")][..], &expected].concat());
    assert!(findings[0].what.contains("node 3 at node-3:5357 does not answer: connection refused"));
    assert_eq!((findings[1].nodes.as_slice(), findings[1].groups.as_slice()), (&[3][..], &[16][..]));
    assert!(findings[1].what.starts_with("orders has a replica on node 3"), "{}", findings[1].what);
}

#[test]
fn a_lost_majority_names_the_nodes_to_bring_back() {
    let mut now = healthy();
    silence(&mut now, 2);
    silence(&mut now, 3);
    // Node 1 goes on believing that it leads the catalog; the topic has nobody left who would.
    let findings = diagnose(&now, &now);
    let lost: Vec<_> = findings.iter().filter(|it| it.code == "no-quorum").collect();
    assert_eq!(lost.len(), 1);
    assert_eq!(lost[0].groups, [1, 16]);
    assert!(lost[0].what.contains("no majority: nothing is written to them"), "{}", lost[0].what);
    assert!(lost[0].remedy.contains("bring nodes 2, 3 back"), "{}", lost[0].remedy);
    assert!(findings.iter().all(|it| it.code != "under-replicated"), "the same is not said twice");
}

#[test]
fn an_election_that_lasts_is_told_from_a_lost_majority() {
    let mut now = healthy();
    orders(&mut now).leader = 0;
    let findings = diagnose(&now, &now);
    assert_eq!(findings[0].code, "leaderless");
    assert!(findings[0].remedy.contains("an election takes seconds"), "{}", findings[0].remedy);
}

#[test]
fn disks_that_fill_up_are_found_in_time() {
    assert_eq!(found(|it| report(it, 1).disk_free_bytes = 240), [(Severity::Warning, "disk-pressure")]);
    assert_eq!(found(|it| report(it, 1).disk_free_bytes = 90), [(Severity::Critical, "disk-pressure")]);
}

#[test]
fn clocks_that_differ_are_found_whichever_way() {
    let offset = |seconds| {
        move |it: &mut pb::ClusterReportReply| {
            it.nodes[2].clock_offset = Some(prost_types::Duration { seconds, nanos: 0 });
        }
    };
    assert_eq!(found(offset(-2)), [(Severity::Warning, "clock-skew")]);
    assert_eq!(found(offset(20)), [(Severity::Critical, "clock-skew")]);
    // A slow answer is no wrong clock.
    let slow = |it: &mut pb::ClusterReportReply| {
        it.nodes[2].round_trip = Some(prost_types::Duration { seconds: 2, nanos: 0 });
        it.nodes[2].clock_offset = Some(prost_types::Duration { seconds: 1, nanos: 0 });
    };
    assert_eq!(found(slow), []);
}

#[test]
fn certificates_that_run_out_are_found_in_time() {
    let days = |days: i64| {
        move |it: &mut pb::ClusterReportReply| {
            report(it, 2).certificate_expires =
                Some(prost_types::Timestamp { seconds: 1_000_000 + days * 86_400, nanos: 0 });
        }
    };
    assert_eq!(found(days(20)), [(Severity::Warning, "certificate-expiry")]);
    assert_eq!(found(days(3)), [(Severity::Critical, "certificate-expiry")]);
    assert_eq!(found(days(-1)), [(Severity::Critical, "certificate-expiry")]);
}

#[test]
fn a_node_without_a_lease_or_a_root_key_is_found() {
    assert_eq!(found(|it| report(it, 3).lease_left = None), [(Severity::Critical, "no-lease")]);
    assert_eq!(found(|it| report(it, 3).sealed = "no root key".to_owned()), [(Severity::Warning, "vault-sealed")]);
}

#[test]
fn damaged_and_fenced_replicas_are_found() {
    assert_eq!(found(|it| report(it, 3).damaged = 2), [(Severity::Critical, "replica-damaged")]);
    let fenced = |it: &mut pb::ClusterReportReply| {
        let fenced =
            pb::GroupReport { health: "fenced".to_owned(), cause: "bad page".to_owned(), ..orders(it).clone() };
        report(it, 3).groups.push(fenced);
    };
    assert_eq!(found(fenced), [(Severity::Critical, "replica-unwell")]);
}

#[test]
fn a_group_is_stuck_only_if_nothing_was_committed_meanwhile() {
    let mut before = healthy();
    orders(&mut before).last_log_index = 5_010;
    let mut now = before.clone();
    assert_eq!(diagnose(&before, &now)[0].code, "stuck");
    orders(&mut now).committed_index = 5_005;
    assert_eq!(diagnose(&before, &now), [], "it gets on");
}

#[test]
fn a_replica_lags_only_if_it_comes_no_closer() {
    let mut before = healthy();
    orders(&mut before).members[2].lag = 4_000;
    let mut now = before.clone();
    let findings = diagnose(&before, &now);
    assert_eq!((findings[0].code, findings[0].nodes.as_slice()), ("lagging", &[3][..]));
    orders(&mut now).members[2].lag = 2_000;
    assert_eq!(diagnose(&before, &now), [], "it catches up");
}

#[test]
fn a_replica_that_is_being_built_is_a_note() {
    let building = |it: &mut pb::ClusterReportReply| it.partitions[0].replicas = vec![1, 2, 3, 4];
    assert_eq!(found(building), [(Severity::Note, "moving")]);
}

fn obstructed(kind: pb::obstacle::Kind, what: &str, nodes: &[u64]) -> pb::ClusterReportReply {
    let mut now = healthy();
    let obstacle = pb::Obstacle { kind: kind.into(), what: what.to_owned(), nodes: nodes.to_vec() };
    now.partitions[0].obstacle = Some(obstacle);
    now
}

#[test]
fn replicas_that_cannot_go_where_they_should_are_found_with_the_cause_and_the_remedy() {
    use pb::obstacle::Kind;
    let few = "3 replicas need 3 active nodes, and there are 2: add nodes, or ask for fewer replicas";
    for (kind, what, nodes, remedy) in [
        (Kind::Nodes, few, &[][..], "let a machine join"),
        (Kind::Majority, "its only replica, on node 3, does not answer", &[3], "bring node 3 back with its disk"),
        (Kind::Waits, "node 4 does not answer", &[], "ensign partition cancel"),
        (Kind::Slow, "node 4 catches up no faster than the partition is written", &[], "do what it says"),
    ] {
        let now = obstructed(kind, what, nodes);
        let found = diagnose(&now, &now);
        assert_eq!((found.len(), found[0].code, found[0].severity), (1, "move-stuck", Severity::Warning), "{found:?}");
        assert_eq!((found[0].nodes.as_slice(), found[0].groups.as_slice()), (nodes, &[16][..]));
        assert!(found[0].what.starts_with("orders has") && found[0].what.ends_with(what), "{found:?}");
        assert!(found[0].remedy.contains(remedy), "{found:?}");
        assert_eq!(diagnose(&healthy(), &now), [], "it may pass by itself");
    }
    let lost = obstructed(Kind::Majority, "two", &[2, 3]);
    assert!(diagnose(&lost, &lost)[0].remedy.contains("`ensign topic destroy`"), "what is gone for good is said, too");
}

#[test]
fn partitions_with_the_same_obstacle_are_one_finding() {
    let mut now = obstructed(pb::obstacle::Kind::Nodes, "too few", &[]);
    let other = pb::PartitionAssignment { group_id: 17, name: "bills".to_owned(), ..now.partitions[0].clone() };
    now.partitions.push(other);
    let found: Vec<Finding> = diagnose(&now, &now).into_iter().filter(|it| it.code == "move-stuck").collect();
    assert_eq!(found.len(), 1, "{found:?}");
    assert!(found[0].what.starts_with("2 groups (orders, bills) have replicas"), "{found:?}");
}

#[test]
fn a_move_that_waits_for_its_turn_is_no_finding() {
    let now = obstructed(pb::obstacle::Kind::Untaken, "nobody has taken the move up for 99 s", &[]);
    assert_eq!(diagnose(&now, &now), []);
}

#[test]
fn a_vote_that_a_drained_node_keeps_is_found_where_nobody_can_take_it() {
    let mut now = healthy();
    now.nodes[2].draining = true;
    let found = diagnose(&now, &now);
    let codes: Vec<_> = found.iter().map(|it| (it.severity, it.code)).collect();
    assert_eq!(codes, [(Severity::Warning, "vote-kept")]);
    assert!(found[0].what.starts_with("catalog: node 3 is drained and votes"), "{found:?}");
    let mut fourth = now.nodes[0].clone();
    fourth.node_id = 4;
    (fourth.report.as_mut().unwrap().node_id, fourth.report.as_mut().unwrap().groups) = (4, Vec::new());
    now.nodes.push(fourth);
    assert_eq!(diagnose(&now, &now), [], "the fourth takes it in a moment");
}

#[test]
fn a_machine_that_joined_and_never_served_is_a_note() {
    let mut now = healthy();
    silence(&mut now, 3);
    now.nodes[2].never_started = true;
    let found = diagnose(&now, &now);
    let never = found.iter().find(|it| it.code == "node-never-started").unwrap();
    assert_eq!((never.severity, never.nodes.as_slice()), (Severity::Note, &[3][..]));
    assert!(found.iter().all(|it| it.code != "node-silent"), "nobody expects it to answer: {found:?}");
}

#[test]
fn a_node_that_was_removed_by_force_is_missed_where_it_is_a_member_still() {
    let mut now = healthy();
    now.nodes.pop();
    now.removed = vec![3];
    let codes: Vec<_> = diagnose(&now, &now).into_iter().map(|it| (it.code, it.nodes)).collect();
    assert_eq!(codes, [("under-replicated", vec![3]), ("voter-lost", vec![3])]);
}

#[test]
fn mixed_versions_are_a_note() {
    assert_eq!(found(|it| report(it, 3).version = "1.1.0".to_owned()), [(Severity::Note, "mixed-versions")]);
    let mut now = healthy();
    report(&mut now, 2).version = "0.9.0".to_owned();
    let mixed = &diagnose(&now, &now)[0];
    assert_eq!(mixed.what, "nodes run different versions: 0.9.0 on 2, 1.0.0 on 1, 3");
    assert_eq!(mixed.remedy, "finish the rolling upgrade");
    // A node that says nothing runs nothing.
    silence(&mut now, 2);
    assert!(diagnose(&now, &now).iter().all(|it| it.code != "mixed-versions"));
}

#[test]
fn troubles_of_a_node_are_told_in_its_words() {
    let trouble = |it: &mut pb::ClusterReportReply| {
        report(it, 1).troubles.insert("catalog".to_owned(), "the catalog has no leader".to_owned());
    };
    assert_eq!(found(trouble), [(Severity::Warning, "not-ready")]);
}

fn catalog(cluster: &mut pb::ClusterReportReply) -> &mut pb::GroupReport {
    &mut report(cluster, 1).groups[0]
}

#[test]
fn a_lost_voter_has_a_remedy_that_fits_who_is_left() {
    let mut now = healthy();
    silence(&mut now, 3);
    let remedy = |now: &pb::ClusterReportReply| {
        let findings = diagnose(now, now);
        let lost = findings.into_iter().find(|it| it.code == "voter-lost").unwrap();
        assert_eq!((lost.nodes.as_slice(), lost.groups.as_slice()), (&[3][..], &[1][..]));
        lost.remedy
    };
    assert!(remedy(&now).contains("ensign cluster join"), "nobody is there to take its vote");
    let mut fourth = now.nodes[1].clone();
    fourth.node_id = 4;
    (fourth.report.as_mut().unwrap().node_id, fourth.report.as_mut().unwrap().groups) = (4, Vec::new());
    now.nodes.push(fourth);
    assert!(remedy(&now).contains("vote_lost_after"), "the fourth takes it");
}

#[test]
fn a_group_with_fewer_voters_than_it_could_have_is_found() {
    let mut now = healthy();
    catalog(&mut now).members = vec![
        pb::MemberReport { node_id: 1, voter: true, lag: 0 },
        pb::MemberReport { node_id: 2, voter: false, lag: 0 },
        pb::MemberReport { node_id: 3, voter: false, lag: 0 },
    ];
    let few = diagnose(&now, &now).into_iter().find(|it| it.code == "too-few-voters").unwrap();
    assert_eq!((few.severity, few.nodes.as_slice(), few.groups.as_slice()), (Severity::Warning, &[2, 3][..], &[1][..]));
    assert!(few.what.contains("1 voters, and 3 nodes could be") && few.remedy.contains("log of node 1"), "{few:?}");
    // A node that is drained is to get no vote.
    now.nodes[2].draining = true;
    assert!(diagnose(&now, &now).iter().all(|it| it.code != "too-few-voters"));
    now.nodes[2].draining = false;
    // Nodes that cannot unseal the vault do not count for it.
    catalog(&mut now).group_id = 2;
    report(&mut now, 2).sealed = "no root key".to_owned();
    assert!(diagnose(&now, &now).iter().all(|it| it.code != "too-few-voters"));
}

#[test]
fn who_holds_the_clusters_version_back_is_found_by_name() {
    let held_back = |now: &pb::ClusterReportReply| -> Vec<Finding> {
        diagnose(now, now).into_iter().filter(|it| it.code == "version-held-back").collect()
    };
    let mut now = healthy();
    assert!(held_back(&now).is_empty());
    // All speak the next one: it rises by itself.
    for node in 1..=3 {
        report(&mut now, node).speaks = 3;
    }
    assert!(held_back(&now).is_empty());
    (report(&mut now, 2).speaks, report(&mut now, 2).version) = (2, "0.9.0".to_owned());
    let found = held_back(&now);
    assert_eq!((found.len(), found[0].severity, found[0].nodes.as_slice()), (1, Severity::Warning, &[2][..]));
    assert!(
        found[0].what.ends_with("stays at version 2, and could be at 3: node 2 runs 0.9.0 and speaks version 2"),
        "{found:?}"
    );
    assert_eq!(found[0].remedy, "run the new version of ensign on node 2");
    silence(&mut now, 2);
    report(&mut now, 3).holds_version = true;
    let found = held_back(&now);
    let nodes: Vec<_> = found.iter().map(|it| (it.severity, it.nodes.as_slice())).collect();
    assert_eq!(nodes, [(Severity::Warning, &[2][..]), (Severity::Note, &[3][..])]);
    assert!(found[0].remedy.contains("`ensign cluster upgrade --without 2`"), "{found:?}");
    assert!(found[1].what.contains("cluster.upgrade is \"manual\" on 3"), "{found:?}");
}

#[test]
fn a_node_that_does_not_tell_what_it_speaks_is_taken_for_one_of_the_first_version() {
    let held_back = |now: &pb::ClusterReportReply| -> Vec<Finding> {
        diagnose(now, now).into_iter().filter(|it| it.code == "version-held-back").collect()
    };
    let mut now = healthy();
    for node in 1..=3 {
        (report(&mut now, node).speaks, report(&mut now, node).cluster_version) = (0, 0);
    }
    assert!(held_back(&now).is_empty(), "all of them are of the first version, and so is the cluster");
    report(&mut now, 3).speaks = 2;
    let found = held_back(&now);
    assert_eq!(found.iter().map(|it| it.nodes.as_slice()).collect::<Vec<_>>(), [&[1][..], &[2]]);
    assert_eq!(
        found[0].what,
        "the cluster stays at version 1, and could be at 2: node 1 runs 1.0.0 and speaks version 1"
    );
    // A replica that has not heard yet that the version rose holds nothing back.
    report(&mut now, 1).speaks = 2;
    report(&mut now, 2).speaks = 2;
    report(&mut now, 2).cluster_version = 2;
    report(&mut now, 3).holds_version = true;
    assert!(held_back(&now).is_empty());
}
