//! How much goes into one batch while others are on their way.

use ensign_raft::env::Stop;

use super::*;
use crate::partition::append::Chunk;
use crate::partition::batcher::CROWDED;
use crate::partition::producers::Sequenced;

const ME: NodeId = NodeId(1);
/// Chunks of a burst, of 4 KiB each.
const BURST: u64 = 20;

/// The `first` event of a session, which takes so many bytes.
fn chunk(session: u8, first: u64, previous: u64, bytes: usize) -> Chunk {
    let mut body = Vec::new();
    encode_body(api::EventWrapper { event: vec![b'x'; bytes].into(), ..Default::default() }, &mut body);
    Chunk {
        producer: Sequenced { session: SessionId::new(1, [session; 10]), epoch: 1, first, count: 1 },
        previous: Some(previous),
        publisher: Bytes::from_static(b"\x0a\x01p"),
        kinds: vec![Bytes::from_static(b"\x0a\x04kind")],
        shapes: [BodyShape::new(body.len() as u32, true)].into(),
        kind_of: [1].into(),
        bodies: body.into(),
        ring: None,
    }
}

/// How many events each batch has of a burst that comes while the batch before it is not on the disk yet.
async fn batches(crowd: Crowd) -> Vec<u32> {
    let mut cluster = Cluster::prepare(1, MemoryLog::flushed_by_hand);
    (cluster.target, cluster.crowd) = (ByteCount(1 << 20), crowd);
    let log = cluster.logs[&ME].clone();
    let disk = cluster.tasks.child();
    let flush = move |stop: Stop| async move {
        while !stop.is_cancelled() {
            log.flush();
            tokio::task::yield_now().await;
        }
    };
    disk.spawn("disk", flush.clone());
    cluster.run(ME).await;
    cluster.leader().await;
    let batcher = cluster.link.batchers.lock().unwrap()[&ME].clone();
    let send = async |chunk: Chunk| batcher.reserve(chunk.size()).await.unwrap().send(chunk);
    // The key and the kind of event are known from then on.
    send(chunk(1, 1, 0, 1)).await.await.unwrap().unwrap();
    assert!(disk.shut_down(Duration::from_secs(30)).await);

    let mut waiting = Vec::new();
    for number in 2..BURST + 3 {
        let bytes = if number == 2 { 1 } else { 4 << 10 };
        waiting.push(send(chunk(1, number, number - 1, bytes)).await);
        // This is refused as soon as the batcher comes to it, and so it has come to the one before.
        let refused = send(chunk(2, 9, 8, 1)).await.await.unwrap();
        assert!(matches!(refused, Err(AppendError::Gap { .. })), "{refused:?}");
    }

    cluster.tasks.spawn("disk", flush);
    for outcome in waiting {
        outcome.await.unwrap().unwrap();
    }
    let (handle, mut place) = (&cluster.nodes[&ME].handle, None);
    let batches = handle.read(Offset::FIRST, ByteCount(1 << 20), &mut place).await.unwrap();
    batches.iter().map(|batch| (batch.end().0 - batch.base.0) as u32).collect()
}

#[tokio::test]
async fn a_batch_gathers_more_while_the_partitions_of_the_node_have_much_in_flight() {
    // The event that made the key, and the one that finds nothing in flight; then 8 KiB, 32 KiB, and what is left.
    assert_eq!(batches(Crowd::default()).await, [1, 1, 2, 8, 10]);
    let crowd = Crowd::default();
    let others: Vec<_> = (0..CROWDED).map(|_| crowd.enter()).collect();
    assert_eq!(batches(crowd).await, [1, 1, BURST as u32]);
    drop(others);
}
