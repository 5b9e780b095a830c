use super::*;

const PATH: &str = "/ensign.peer.v1.Peer/Propose";

fn member(cluster: u8, incarnation: u64, process: u64) -> HeaderMap {
    let mut headers = HeaderMap::new();
    let cluster = ClusterId::from_bytes([cluster; 16]);
    Membership { cluster, life: Life { incarnation, process } }.show(&mut headers);
    headers
}

fn gate() -> Gate {
    let own = Membership { cluster: ClusterId::from_bytes([7; 16]), life: Life { incarnation: 1, process: 1 } };
    let gate = Gate::new(NodeId(1), Some(own), Speaks::NEWEST);
    gate.update([(NodeId(2), None), (NodeId(3), None)].into_iter());
    gate
}

#[test]
fn only_known_peers_of_this_cluster_pass() {
    let gate = gate();
    let headers = member(7, 1, 5);
    assert_eq!(gate.admit(Some(NodeId(2)), PATH, &headers), Ok(NodeId(2)));
    assert_eq!(gate.admit(None, PATH, &headers), Err(Stranger::NoCertificate));
    for impostor in [NodeId(1), NodeId(9)] {
        let refused = gate.admit(Some(impostor), PATH, &headers);
        assert_eq!(refused, Err(Stranger::NotAPeer { peer: impostor, me: NodeId(1) }));
    }
    assert_eq!(gate.admit(Some(NodeId(2)), PATH, &HeaderMap::new()), Err(Stranger::NoCluster { peer: NodeId(2) }));
    let message = gate.admit(Some(NodeId(2)), PATH, &member(8, 1, 5)).unwrap_err().to_string();
    assert!(message.contains(&ClusterId::from_bytes([7; 16]).to_string()), "{message}");
    assert!(message.contains(&ClusterId::from_bytes([8; 16]).to_string()), "{message}");
    assert!(message.contains("empty data directory"), "{message}");
}

#[test]
fn a_node_without_a_cluster_may_only_say_hello() {
    let nothing = HeaderMap::new();
    assert_eq!(gate().admit(Some(NodeId(2)), HELLO, &nothing), Ok(NodeId(2)));
    assert!(gate().admit(Some(NodeId(9)), HELLO, &nothing).is_err());
    assert!(gate().admit(Some(NodeId(2)), PATH, &nothing).is_err());
}

#[test]
fn a_node_lives_once() {
    let gate = gate();
    let admit = |incarnation, process| gate.admit(Some(NodeId(2)), PATH, &member(7, incarnation, process));
    admit(5, 50).unwrap();
    admit(5, 50).unwrap();
    let twin = Stranger::Twin { peer: NodeId(2), seen: 5, shown: 5, registered: false };
    assert_eq!(admit(5, 51), Err(twin), "a copy of the same directory");
    admit(6, 60).unwrap();
    assert!(matches!(admit(5, 50), Err(Stranger::Twin { seen: 6, shown: 5, .. })), "a restored directory");
    assert!(gate.admit(Some(NodeId(3)), PATH, &member(7, 1, 1)).is_ok(), "lives are counted by node");
}

#[test]
fn a_refusal_that_is_for_ever_says_so_to_programs_too() {
    let gate = gate();
    gate.admit(Some(NodeId(2)), PATH, &member(7, 6, 60)).unwrap();
    let refused =
        |incarnation, process| gate.admit(Some(NodeId(2)), PATH, &member(7, incarnation, process)).unwrap_err().ended();
    assert_eq!(refused(5, 50), Some(Ended::Outlived { seen: 6 }));
    assert_eq!(refused(6, 61), None, "the catalog says which of the two stays");
    gate.update([(NodeId(2), Some(Life { incarnation: 6, process: 60 })), (NodeId(3), None)].into_iter());
    assert_eq!(refused(6, 61), Some(Ended::Outlived { seen: 6 }), "and has said so");
    gate.remove([NodeId(3)].into_iter());
    let removed = gate.admit(Some(NodeId(3)), PATH, &member(7, 1, 1)).unwrap_err();
    assert_eq!(removed.ended(), Some(Ended::Removed));
    assert_eq!(
        gate.admit(Some(NodeId(9)), PATH, &member(7, 1, 1)).unwrap_err().ended(),
        None,
        "it may be about to join"
    );
}

#[test]
fn what_two_processes_of_one_node_are_told_can_be_understood() {
    let twin = |seen, shown| Stranger::Twin { peer: NodeId(2), seen, shown, registered: true }.to_string();
    assert!(twin(8, 8).contains("has begun life 8 of it, as another one had before"), "{}", twin(8, 8));
    assert!(twin(8, 7).contains("is in life 7 of it, and life 8 is known"), "{}", twin(8, 7));
    assert!(twin(8, 7).contains("stop that one, then start the other one again"), "{}", twin(8, 7));
}

#[test]
fn what_peers_say_of_this_process_is_kept_and_only_what_is_newer_than_itself() {
    let gate = gate();
    let told = gate.ended();
    gate.note_ended(None);
    gate.note_ended(Some(Ended::Outlived { seen: 0 }));
    assert_eq!(*told.borrow(), None, "it is life 1 itself");
    gate.note_ended(Some(Ended::Outlived { seen: 1 }));
    assert_eq!(*told.borrow(), Some(Ended::Outlived { seen: 1 }), "another process has begun life 1");
    gate.note_ended(Some(Ended::Outlived { seen: 3 }));
    gate.note_ended(Some(Ended::Outlived { seen: 2 }));
    assert_eq!(*told.borrow(), Some(Ended::Outlived { seen: 3 }));
    gate.note_ended(Some(Ended::Removed));
    gate.note_ended(Some(Ended::Outlived { seen: 9 }));
    assert_eq!(*told.borrow(), Some(Ended::Removed));
}

#[test]
fn what_a_life_has_opened_ends_with_it() {
    let gate = gate();
    let (older, newer) = (member(7, 5, 50), member(7, 6, 60));
    gate.admit(Some(NodeId(2)), PATH, &older).unwrap();
    let pipe = gate.gone(NodeId(2), &older);
    gate.admit(Some(NodeId(2)), PATH, &older).unwrap();
    assert!(!pipe.is_cancelled());
    gate.admit(Some(NodeId(2)), PATH, &newer).unwrap();
    assert!(pipe.is_cancelled(), "a copy of the directory was started, and both would vote");
    assert!(gate.gone(NodeId(2), &older).is_cancelled(), "admitted just before, and opened just after");
    let pipe = gate.gone(NodeId(2), &newer);
    assert!(!pipe.is_cancelled());
    // Both began life 6, and the other one was first to register.
    gate.update([(NodeId(2), Some(Life { incarnation: 6, process: 61 }))].into_iter());
    assert!(pipe.is_cancelled());
}

#[test]
fn a_life_that_the_catalog_tells_counts_as_if_it_had_been_seen() {
    let gate = gate();
    let admit = |incarnation, process| gate.admit(Some(NodeId(2)), PATH, &member(7, incarnation, process));
    let told = |incarnation, process| {
        gate.update([(NodeId(2), Some(Life { incarnation, process })), (NodeId(3), None)].into_iter());
    };
    told(5, 50);
    assert!(matches!(admit(1, 10), Err(Stranger::Twin { seen: 5, shown: 1, .. })), "a wiped disk");
    assert!(matches!(admit(5, 51), Err(Stranger::Twin { seen: 5, shown: 5, .. })), "a copied disk");
    admit(5, 50).unwrap();
    admit(6, 60).unwrap();
    // The catalog is behind what was seen here.
    told(5, 50);
    assert!(admit(5, 50).is_err());
    admit(6, 60).unwrap();
    // Both began life 7, and the other one was first to register.
    admit(7, 70).unwrap();
    told(7, 71);
    assert!(admit(7, 70).is_err());
    admit(7, 71).unwrap();
}

#[test]
fn who_has_lived_and_has_no_cluster_any_more_has_lost_its_disk() {
    let gate = gate();
    let nothing = HeaderMap::new();
    gate.admit(Some(NodeId(2)), PATH, &member(7, 5, 50)).unwrap();
    let wiped = gate.admit(Some(NodeId(2)), HELLO, &nothing).unwrap_err();
    assert_eq!(wiped, Stranger::Wiped { peer: NodeId(2), seen: 5 });
    assert!(wiped.to_string().contains("a new node.id"), "{wiped}");
    gate.admit(Some(NodeId(3)), HELLO, &nothing).unwrap();
}

#[test]
fn what_a_node_speaks_is_read_as_it_was_said_and_silence_is_the_first_version() {
    for (newest, held) in [(1, false), (2, true), (30, false)] {
        let (said, mut headers) = (Speaks { newest: ClusterVersion(newest), held }, HeaderMap::new());
        said.show(&mut headers);
        assert_eq!(Speaks::of(&headers), said);
    }
    let first = Speaks { newest: ClusterVersion::V1, held: false };
    assert_eq!(Speaks::of(&HeaderMap::new()), first);
    for garbage in ["", "-held", "two", "0", "-1", "99999999999"] {
        let mut headers = HeaderMap::new();
        headers.insert(VERSION, HeaderValue::from_static(garbage));
        assert_eq!(Speaks::of(&headers).newest, ClusterVersion::V1, "{garbage}");
    }
}

#[test]
fn a_peer_that_does_not_speak_the_clusters_version_is_refused_and_told_what_to_do() {
    let gate = gate();
    let headers = |newest| {
        let mut headers = member(7, 1, 5);
        Speaks { newest: ClusterVersion(newest), held: false }.show(&mut headers);
        headers
    };
    gate.admit(Some(NodeId(2)), PATH, &member(7, 1, 5)).unwrap();
    gate.require(ClusterVersion(3));
    gate.require(ClusterVersion::V2);
    for (path, shown) in [(PATH, headers(2)), (PATH, member(7, 1, 5)), (HELLO, headers(2)), (HELLO, HeaderMap::new())] {
        let refused = gate.admit(Some(NodeId(2)), path, &shown).unwrap_err();
        assert!(matches!(refused, Stranger::TooOld { active: ClusterVersion(3), .. }), "{refused:?}");
        assert!(is_refusal(&Status::from(&refused)));
        assert!(refused.to_string().contains("run a newer version of ensign on it"), "{refused}");
    }
    gate.admit(Some(NodeId(2)), PATH, &headers(3)).unwrap();
    gate.admit(Some(NodeId(3)), HELLO, &headers(4)).unwrap();
}

#[test]
fn peers_come_and_go() {
    let gate = gate();
    let headers = member(7, 1, 5);
    gate.admit(Some(NodeId(3)), PATH, &headers).unwrap();
    let (stays, leaves) = (gate.gone(NodeId(2), &headers), gate.gone(NodeId(3), &headers));
    gate.update([(NodeId(2), None), (NodeId(4), None)].into_iter());
    assert_eq!((stays.is_cancelled(), leaves.is_cancelled()), (false, true));
    let refused = gate.admit(Some(NodeId(3)), PATH, &headers);
    assert_eq!(refused, Err(Stranger::NotAPeer { peer: NodeId(3), me: NodeId(1) }));
    gate.admit(Some(NodeId(4)), PATH, &headers).unwrap();
    assert!(gate.gone(NodeId(9), &headers).is_cancelled());
}
