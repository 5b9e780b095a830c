//! What a publisher sends again, and what becomes of its numbers.

use super::*;

#[tokio::test]
async fn a_publishers_own_numbers_make_its_retry_harmless() {
    let cluster = Cluster::start(3).await;
    let session = SessionId::new(1_700_000_000_000, [4; 10]);
    let numbered = |first| Numbering::Theirs { session, epoch: 1, first };
    let first = cluster.publisher(NodeId(1));
    let appended = first.send(numbered(1), &names("e", 0..4)).await.await.unwrap().unwrap();
    // The same publisher, reconnected elsewhere, sends what it has no answer for, and goes on.
    let second = cluster.publisher(NodeId(2));
    let again = second.send(numbered(3), &names("e", 2..6)).await.await.unwrap().unwrap();
    assert_eq!(again.runs[0].offset, appended.runs[0].offset.plus(2));
    assert_eq!(again.runs[0].committed_ms, appended.runs[0].committed_ms);
    assert_eq!((again.runs[1].offset, again.runs[1].count), (Offset(5), 2));
    let expected: Vec<_> = names("e", 0..6).into_iter().map(Bytes::from).collect();
    assert_eq!(cluster.read(NodeId(3)).await.into_iter().map(|(_, event)| event).collect::<Vec<_>>(), expected);
    // A newer epoch ends the older one.
    let newer = Numbering::Theirs { session, epoch: 2, first: 1 };
    second.send(newer, &names("f", 0..1)).await.await.unwrap().unwrap();
    let fenced = first.send(numbered(7), &names("e", 6..7)).await.await.unwrap();
    assert_eq!(fenced, Err(PublishError::Fenced { epoch: 2 }));
}

#[tokio::test]
async fn a_head_that_moved_behind_the_batchers_back_is_taken_anew() {
    let cluster = Cluster::start(1).await;
    let node = &cluster.nodes[&NodeId(1)];
    let publisher = cluster.publisher(NodeId(1));
    publisher.publish(&names("e", 0..2)).await.unwrap();
    // Somebody else's batch takes the place that the batcher has predicted.
    let (dek, header) = node.group.inspect(|machine| {
        let state = machine.state();
        let dek = state.deks.last().unwrap().dek;
        let first_id = state.last_id.plus(1);
        let header = BatchHeader {
            algorithm: ensign_proto::Algorithm::default(),
            count: 1,
            term: node.group.leadership().borrow().term,
            base_offset: state.next_offset,
            first_id,
            last_id: first_id,
            dek,
            prev: state.link,
            producers: Vec::new(),
            types: Vec::new(),
            fingerprints: Vec::new(),
        };
        (dek, header)
    });
    let foreign = names("foreign", 0..1);
    let mut body = Vec::new();
    encode_body(api::EventWrapper { event: foreign[0].clone().into(), ..Default::default() }, &mut body);
    let shapes = [BodyShape::new(body.len() as u32, true)];
    let run = super::super::block::BlockRun { publisher: &Bytes::new(), shapes: &shapes, bodies: &body };
    let mut blocks = Vec::new();
    super::super::block::encode(&[run], &mut blocks);
    let mut plain = PlainBatch::with_capacity(blocks.len());
    plain.append(&blocks).unwrap();
    let sealed = cluster.keys.seal(&context(), dek, header, plain).unwrap();
    node.group.propose(None, sealed.into_bytes()).await.unwrap();
    publisher.publish(&names("e", 2..4)).await.unwrap();
    let events: Vec<_> = cluster.read(NodeId(1)).await.into_iter().map(|(_, event)| event).collect();
    assert_eq!(events, ["e-000000", "e-000001", "foreign-000000", "e-000002", "e-000003"].map(Bytes::from));
}

#[tokio::test]
async fn a_retry_of_what_is_stored_is_acknowledged_at_its_offset_whatever_became_of_the_topic() {
    let cluster = Cluster::start(1).await;
    let session = SessionId::new(1_700_000_000_000, [4; 10]);
    let publisher = cluster.publisher(NodeId(1));
    let mut stored = Vec::new();
    for n in 0..30 {
        let numbered = Numbering::Theirs { session, epoch: 1, first: 1 + u64::from(n) * 2 };
        stored.push((numbered, publisher.send(numbered, &names("e", n * 2..n * 2 + 2)).await.await.unwrap().unwrap()));
    }
    let retry_all = async |cluster: &Cluster| {
        let again = cluster.publisher(NodeId(1));
        for (n, (numbered, first)) in (0..).zip(&stored) {
            let outcome = again.send(*numbered, &names("e", n * 2..n * 2 + 2)).await.await.unwrap();
            assert_eq!(outcome.as_ref(), Ok(first));
        }
    };
    retry_all(&cluster).await;
    cluster.admit(Admission::Archived);
    retry_all(&cluster).await;
    cluster.admit(Admission::Open);
    let dead = cluster.nodes[&NodeId(1)].group.inspect(|machine| machine.state().deks.clone());
    cluster.keys.dead.lock().unwrap().extend(dead.iter().map(|row| row.dek));
    cluster.keys.revoked.store(true, Ordering::SeqCst);
    retry_all(&cluster).await;
}

#[tokio::test]
async fn a_number_that_was_passed_over_is_not_taken_for_a_retry() {
    let cluster = Cluster::start(1).await;
    let session = SessionId::new(1_700_000_000_000, [4; 10]);
    let numbered = |first| Numbering::Theirs { session, epoch: 1, first };
    let publisher = cluster.publisher(NodeId(1));
    publisher.send(numbered(1), &names("e", 0..1)).await.await.unwrap().unwrap();
    // Number 2 got a nack at the edge, and never came here.
    publisher.send(numbered(3), &names("e", 2..3)).await.await.unwrap().unwrap();
    let reused = publisher.send(numbered(2), &names("e", 1..2)).await.await.unwrap();
    assert_eq!(reused, Err(PublishError::Spent { sequence: 2 }));
    publisher.send(numbered(4), &names("e", 1..2)).await.await.unwrap().unwrap();
    let events: Vec<_> = cluster.read(NodeId(1)).await.into_iter().map(|(_, event)| event).collect();
    assert_eq!(events, ["e-000000", "e-000002", "e-000001"].map(Bytes::from));
}

/// The node that holds the client's stream sent a chunk, and its answer was lost. Whatever is said of the next attempt proves
/// nothing about the first one.
#[tokio::test]
async fn an_event_whose_first_attempt_was_lost_is_not_nacked_for_what_is_said_of_the_second() {
    let refusals = [
        AppendError::Archived,
        AppendError::Deleted,
        AppendError::TooLarge,
        AppendError::KeyUnusable { detail: "revoked".to_owned() },
        AppendError::KeyDisabled { detail: "revoked".to_owned() },
        AppendError::Fenced { epoch: 7 },
        AppendError::Spent { sequence: 1 },
        AppendError::Forgotten { now_ms: 7 },
    ];
    for refusal in refusals {
        for lost in [true, false] {
            let cluster = Cluster::start(3).await;
            let leader = cluster.leader().await;
            let follower = NodeId(leader.0 % 3 + 1);
            let attempts = Arc::new(AtomicU64::new(0));
            let (count, refuse) = (Arc::clone(&attempts), refusal.clone());
            let tap: Arc<Tap> = Arc::new(move |_| {
                let (batcher, mut chunks) = Batcher::tapped();
                let (count, refuse) = (Arc::clone(&count), refuse.clone());
                #[expect(clippy::disallowed_methods, reason = "ends with the route")]
                tokio::spawn(async move {
                    while let Some(tapped) = chunks.recv().await {
                        // Without an answer it is dropped, as with a connection that breaks.
                        if count.fetch_add(1, Ordering::SeqCst) > 0 || !lost {
                            let _ = tapped.reply.send(Err(refuse.clone()));
                        }
                    }
                });
                batcher
            });
            *cluster.link.tap.lock().unwrap() = Some(tap);
            let session = SessionId::new(1_700_000_000_000, [4; 10]);
            let numbering = Numbering::Theirs { session, epoch: 1, first: 1 };
            let outcome = cluster.publisher(follower).send(numbering, &names("e", 0..1)).await.await.unwrap();
            let unknown = matches!(outcome, Err(PublishError::OutcomeUnknown { .. }));
            assert_eq!(unknown, lost, "{refusal}: {outcome:?}");
            assert!(attempts.load(Ordering::SeqCst) > u64::from(lost));
        }
    }
}
