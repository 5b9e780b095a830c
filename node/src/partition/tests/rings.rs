//! Batches of several rings in one partition: who has a ring of its own, and a topic that is bound to another one.

use ensign_raft::env::Stop;

use super::*;
use crate::partition::keys::Keys;

fn ring(n: u8) -> RingId {
    RingId::from_bytes([n; 16])
}

impl Cluster {
    /// The ring of each batch, in order, and how many events it has.
    async fn rings(&self, node: NodeId) -> Vec<(RingId, u32)> {
        let handle = &self.nodes[&node].handle;
        handle.catch_up(Duration::from_secs(10)).await.unwrap();
        let (mut next, mut place, mut rings) = (Offset::FIRST, None, Vec::new());
        loop {
            let batches = handle.read(next, ByteCount(32 << 10), &mut place).await.unwrap();
            let Some(last) = batches.last() else { return rings };
            for batch in &batches {
                let dek = BatchHeader::decode(&batch.sealed).unwrap().header.dek;
                let row = handle.data_key(dek).unwrap();
                rings.push((self.keys.ring_of(&row.wrapped).unwrap(), batch.count));
            }
            next = last.end();
        }
    }

    /// How many events are sealed under each ring.
    async fn events_by_ring(&self, node: NodeId) -> BTreeMap<RingId, u32> {
        let mut events = BTreeMap::new();
        for (ring, count) in self.rings(node).await {
            *events.entry(ring).or_default() += count;
        }
        events
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_batch_has_one_ring_and_nothing_is_lost_or_reordered_between_them() {
    let cluster = Cluster::start(3).await;
    let own = [None, Some(ring(1)), Some(ring(2))];
    let publish = |n: usize, own: Option<RingId>| {
        let publisher = cluster.publisher_under(NodeId(n as u64 + 1), own);
        async move {
            let mut waiting = Vec::new();
            for at in 0..100 {
                waiting.push(publisher.send(Numbering::Ours, &names(&format!("p{n}"), at * 3..at * 3 + 3)).await);
            }
            for outcome in waiting {
                outcome.await.unwrap().unwrap();
            }
        }
    };
    tokio::join!(publish(0, own[0]), publish(1, own[1]), publish(2, own[2]));
    let events = cluster.read(NodeId(1)).await;
    for n in 0..own.len() {
        let prefix = format!("p{n}-");
        let read: Vec<_> =
            events.iter().map(|(_, event)| event.clone()).filter(|e| e.starts_with(prefix.as_bytes())).collect();
        assert_eq!(read, names(&format!("p{n}"), 0..300).into_iter().map(Bytes::from).collect::<Vec<_>>());
    }
    let expected = [(RingId::default(), 300), (ring(1), 300), (ring(2), 300)].into();
    assert_eq!(cluster.events_by_ring(NodeId(1)).await, expected);
    let deks = cluster.nodes[&NodeId(1)].group.inspect(|machine| machine.state().deks.len());
    assert_eq!(deks, 3, "a key for each ring, made once");
}

#[tokio::test]
async fn a_ring_that_is_disabled_refuses_its_own_events_and_nobody_elses() {
    let cluster = Cluster::start(1).await;
    let (mine, plain) = (cluster.publisher_under(NodeId(1), Some(ring(1))), cluster.publisher(NodeId(1)));
    cluster.keys.disabled.lock().unwrap().insert(ring(1));
    for n in 0..20 {
        let refused = mine.publish(&names("no", n..n + 1)).await;
        assert!(matches!(refused, Err(PublishError::KeyDisabled { .. })), "{refused:?}");
        plain.publish(&names("e", n..n + 1)).await.unwrap();
    }
    cluster.keys.disabled.lock().unwrap().clear();
    mine.publish(&names("mine", 0..1)).await.expect("the same stream goes on");
    assert_eq!(cluster.events_by_ring(NodeId(1)).await, [(RingId::default(), 20), (ring(1), 1)].into());
}

#[tokio::test]
async fn who_waits_for_a_key_keeps_nobody_waiting_who_has_one() {
    let cluster = Cluster::start(1).await;
    cluster.keys.late.lock().unwrap().insert(ring(1));
    let (mine, plain) = (cluster.publisher_under(NodeId(1), Some(ring(1))), cluster.publisher(NodeId(1)));
    let mut late = mine.send(Numbering::Ours, &names("late", 0..1)).await;
    for n in 0..20 {
        plain.publish(&names("e", n..n + 1)).await.unwrap();
    }
    assert!(late.try_recv().is_err(), "there is no key for it yet");
    cluster.keys.late.lock().unwrap().clear();
    cluster.keys.arrived.notify_waiters();
    late.await.unwrap().unwrap();
    assert_eq!(cluster.rings(NodeId(1)).await.last(), Some(&(ring(1), 1)));
}

#[tokio::test]
async fn a_topic_that_is_bound_to_another_ring_seals_what_comes_later_under_that() {
    let cluster = Cluster::start(1).await;
    let publisher = cluster.publisher(NodeId(1));
    publisher.publish(&names("e", 0..2)).await.unwrap();
    cluster.ring.send_replace(ring(3));
    publisher.publish(&names("e", 2..5)).await.unwrap();
    cluster.ring.send_replace(RingId::default());
    publisher.publish(&names("e", 5..6)).await.unwrap();
    assert_eq!(cluster.rings(NodeId(1)).await, [(RingId::default(), 2), (ring(3), 3), (RingId::default(), 1)]);
    let deks = cluster.nodes[&NodeId(1)].group.inspect(|machine| machine.state().deks.len());
    assert_eq!(deks, 2, "the key of before is taken up again");
    assert_eq!(cluster.read(NodeId(1)).await.len(), 6);
}

/// The retry of what is on its way must not hear that nothing was appended, only because the topic's new ring has no key.
#[tokio::test]
async fn a_retry_of_what_is_in_flight_waits_for_it_although_there_is_no_key_now() {
    const ME: NodeId = NodeId(1);
    let mut cluster = Cluster::prepare(1, MemoryLog::flushed_by_hand);
    let log = cluster.logs[&ME].clone();
    let flush = move |stop: Stop| async move {
        while !stop.is_cancelled() {
            log.flush();
            tokio::task::yield_now().await;
        }
    };
    let disk = cluster.tasks.child();
    disk.spawn("disk", flush.clone());
    cluster.run(ME).await;
    cluster.publisher(ME).publish(&names("before", 0..1)).await.unwrap();
    assert!(disk.shut_down(Duration::from_secs(30)).await);

    let session = SessionId::new(SystemClock.wall().as_millis(), [7; 10]);
    let numbering = Numbering::Theirs { session, epoch: 1, first: 1 };
    let first = cluster.publisher(ME).send(numbering, &names("e", 0..1)).await;
    let sealed = async {
        while cluster.keys.uses() == 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), sealed).await.expect("in flight");
    cluster.keys.disabled.lock().unwrap().insert(ring(4));
    cluster.ring.send_replace(ring(4));
    let mut retry = cluster.publisher(ME).send(numbering, &names("e", 0..1)).await;
    for _ in 0..3 {
        // These are no retries, so they are refused as soon as the batcher comes to them, and so it has come to the one before.
        let other = cluster.publisher(ME).publish(&names("no", 0..1)).await;
        assert!(matches!(other, Err(PublishError::KeyDisabled { .. })), "{other:?}");
    }
    assert!(retry.try_recv().is_err(), "neither acknowledged nor refused");
    cluster.tasks.spawn("disk", flush);
    first.await.unwrap().unwrap();
    retry.await.unwrap().unwrap();
    assert_eq!(cluster.read(ME).await.len(), 2);
}
