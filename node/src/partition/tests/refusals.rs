//! What is refused or has to wait: a topic that is closed, a key that is gone, room that is taken.

use super::*;

#[tokio::test]
async fn an_archived_or_deleted_topic_refuses_for_certain() {
    let cluster = Cluster::start(3).await;
    let follower = NodeId(cluster.leader().await.0 % 3 + 1);
    let publisher = cluster.publisher(follower);
    publisher.publish(&names("e", 0..1)).await.unwrap();
    cluster.admit(Admission::Archived);
    assert_eq!(publisher.publish(&names("no", 0..1)).await, Err(PublishError::Archived));
    cluster.admit(Admission::Open);
    publisher.publish(&names("e", 1..2)).await.unwrap();
    assert_eq!(cluster.read(follower).await.len(), 2, "what was refused left no hole in the numbers, and no event");
    cluster.admit(Admission::Deleted);
    assert_eq!(publisher.publish(&names("no", 0..1)).await, Err(PublishError::Deleted));
}

#[tokio::test]
async fn a_topic_that_is_destroyed_while_its_leader_is_away_refuses_what_waits() {
    let cluster = Cluster::start(3).await;
    let follower = NodeId(cluster.leader().await.0 % 3 + 1);
    let publisher = cluster.publisher(follower);
    publisher.publish(&names("e", 0..1)).await.unwrap();
    for node in 1..=3 {
        cluster.net.isolate(NodeId(node));
        cluster.link.cut.lock().unwrap().insert(NodeId(node));
    }
    // A new stream: the way that the old one had is not cut with the links.
    let publisher = cluster.publisher(follower);
    let waiting = publisher.send(Numbering::Ours, &names("no", 0..1)).await;
    cluster.admit(Admission::Deleted);
    assert_eq!(waiting.await.unwrap(), Err(PublishError::Deleted));
}

#[tokio::test]
async fn a_revoked_ring_refuses_writes_and_a_rotated_one_moves_to_its_new_key() {
    let cluster = Cluster::start(1).await;
    let publisher = cluster.publisher(NodeId(1));
    publisher.publish(&names("e", 0..1)).await.unwrap();
    cluster.keys.roll_over.store(true, Ordering::SeqCst);
    publisher.publish(&names("e", 1..2)).await.unwrap();
    let deks = cluster.nodes[&NodeId(1)].group.inspect(|machine| machine.state().deks.clone());
    assert_eq!(deks.len(), 2);
    let dead = deks.iter().map(|row| row.dek);
    cluster.keys.dead.lock().unwrap().extend(dead);
    cluster.keys.revoked.store(true, Ordering::SeqCst);
    let refused = publisher.publish(&names("no", 0..1)).await;
    assert!(matches!(refused, Err(PublishError::KeyUnusable { .. })), "{refused:?}");
    let handle = &cluster.nodes[&NodeId(1)].handle;
    let batches = handle.read(Offset::FIRST, ByteCount(1 << 20), &mut None).await.unwrap();
    let unreadable = handle.open(&batches[0]).await;
    assert!(matches!(unreadable, Err(super::ReadError::Key(KeysError::Unusable(_)))), "{unreadable:?}");
}

#[tokio::test]
async fn a_vault_that_is_away_for_a_moment_delays_and_loses_nothing() {
    let cluster = Cluster::start(1).await;
    cluster.keys.away.store(true, Ordering::SeqCst);
    let publisher = cluster.publisher(NodeId(1));
    let waiting = publisher.send(Numbering::Ours, &names("e", 0..3)).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    cluster.keys.away.store(false, Ordering::SeqCst);
    waiting.await.unwrap().unwrap();
    assert_eq!(cluster.read(NodeId(1)).await.len(), 3);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_key_that_is_asked_back_is_let_go_although_no_quorum_decides_what_it_sealed() {
    let cluster = Cluster::start(3).await;
    let leader = cluster.leader().await;
    let publisher = cluster.publisher(leader);
    publisher.publish(&names("before", 0..3)).await.unwrap();
    cluster.net.isolate(leader);
    let waiting = publisher.send(Numbering::Ours, &names("doubtful", 0..3)).await;
    let until = |uses: usize| {
        let keys = Arc::clone(&cluster.keys);
        let reached = async move {
            while keys.uses() != uses {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(20), reached)
    };
    until(1).await.expect("sealed, and in flight");
    // As a surrender does it: dead for new uses first, then asked back from those in progress.
    cluster.keys.revoke_all();
    cluster.keys.severed.cancel();
    until(0).await.expect("let go");
    // It was proposed: neither acknowledged, nor said to be refused.
    let outcome = tokio::time::timeout(Duration::from_mins(1), waiting).await.expect("an outcome").unwrap();
    assert!(matches!(outcome, Err(PublishError::OutcomeUnknown { .. })), "{outcome:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn chunks_from_other_nodes_wait_for_room_and_go_on_when_there_is_some() {
    let cluster = Cluster::start(3).await;
    let leader = cluster.leader().await;
    cluster.publisher(leader).publish(&names("before", 0..1)).await.unwrap();
    let chunk = |session: u8| {
        let mut bodies = Vec::new();
        encode_body(api::EventWrapper { event: vec![session; 5 << 10].into(), ..Default::default() }, &mut bodies);
        let made = SystemClock.wall().as_millis();
        peer::AppendChunk {
            session: Bytes::copy_from_slice(SessionId::new(made, [session; 10]).as_bytes()),
            epoch: 1,
            first: 1,
            previous: Some(0),
            publisher: Bytes::from_static(b"\x0a\x01p"),
            kinds: Vec::new(),
            lengths: vec![BodyShape::new(bodies.len() as u32, true).to_wire()],
            kind_of: vec![0],
            bodies: bodies.into(),
            ring: Bytes::new(),
        }
    };
    // Room for one of them.
    let room = FairRoom::new(8 << 10);
    let handle = &cluster.nodes[&leader].handle;
    cluster.net.isolate(leader);
    let first = forward::queue(handle, &room, chunk(1)).await.unwrap();
    let mut second = Box::pin(forward::queue(handle, &room, chunk(2)));
    assert!((&mut second).now_or_never().is_none(), "taken although there is no room");
    cluster.net.heal();
    // Whatever became of the first, it makes room for the second.
    let settled = tokio::time::timeout(Duration::from_mins(1), first).await.expect("an outcome").unwrap();
    assert!(matches!(settled, Ok(_) | Err(AppendError::OutcomeUnknown | AppendError::NotLeader { .. })), "{settled:?}");
    let queued = tokio::time::timeout(Duration::from_mins(1), second).await.expect("room again").unwrap();
    tokio::time::timeout(Duration::from_mins(1), queued).await.expect("an outcome").unwrap().ok();
}
