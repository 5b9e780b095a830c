//! Publishing while everything goes wrong that can: from a seed, against what publishers were told.
//!
//! Answers are lost, requests are lost, requests arrive twice and late, leaders change, are cut off, and start anew. One publisher
//! numbers its events and sends them again under the same numbers until it has an answer, on whatever node; the others are SDKs
//! that never send twice. `SEED=n` repeats what is drawn; what the threads make of it differs.

use std::collections::VecDeque;

use ensign_raft::env::{Rng, SeededRng};
use tokio::sync::RwLock;

use super::*;

/// What a publisher knows of its events.
#[derive(Default)]
struct Told {
    acked: Vec<(String, Offset)>,
    /// Certainly not stored.
    refused: Vec<String>,
    /// Nobody knows.
    unknown: Vec<String>,
}

#[expect(clippy::print_stderr, reason = "shown where the test fails")]
fn seed() -> u64 {
    let given = std::env::var("SEED").ok().and_then(|text| text.parse().ok());
    let seed = given.unwrap_or_else(|| OsRng.next_u64() >> 32);
    eprintln!("SEED={seed}");
    seed
}

fn below(rng: &dyn Rng, limit: u64) -> u64 {
    rng.next_u64() % limit
}

/// A way to a leader on which chunks and answers get lost, and chunks arrive twice.
fn troubled(rng: &Arc<SeededRng>, calm: &Arc<AtomicBool>, tasks: &Tasks) -> Arc<Tap> {
    let (rng, calm, tasks) = (Arc::clone(rng), Arc::clone(calm), tasks.clone());
    Arc::new(move |to| {
        let (batcher, mut chunks) = Batcher::tapped();
        let (rng, calm, owner) = (Arc::clone(&rng), Arc::clone(&calm), tasks.clone());
        tasks.spawn("troubled-link", move |stop| async move {
            while let Some(Some(tapped)) = stop.run_until_cancelled(chunks.recv()).await {
                let Tapped { chunk, reply } = tapped;
                let fate = if calm.load(Ordering::SeqCst) { 99 } else { below(&*rng, 60) };
                if fate == 0 {
                    // Lost on the way, with all that was sent behind it.
                    return;
                }
                let Ok(slot) = to.reserve(chunk.size()).await else { return };
                let again = chunk.clone();
                let outcome = slot.send(chunk);
                match fate {
                    // The answer is lost.
                    1 => return,
                    // It arrives twice; the sender hears of the second.
                    2 => {
                        let Ok(slot) = to.reserve(again.size()).await else { return };
                        let outcome = slot.send(again);
                        owner.spawn("relay", move |_| async move {
                            if let Ok(outcome) = outcome.await {
                                let _ = reply.send(outcome);
                            }
                        });
                        continue;
                    }
                    // And once more, long after.
                    3 => {
                        let (to, late) = (to.clone(), 5 + below(&*rng, 200));
                        owner.spawn("straggler", move |_| async move {
                            tokio::time::sleep(Duration::from_millis(late)).await;
                            if let Ok(slot) = to.reserve(again.size()).await {
                                drop(slot.send(again));
                            }
                        });
                    }
                    _ => {}
                }
                owner.spawn("relay", move |_| async move {
                    if let Ok(outcome) = outcome.await {
                        let _ = reply.send(outcome);
                    }
                });
            }
        });
        batcher
    })
}

type Shared = Arc<RwLock<Cluster>>;

async fn connect(cluster: &Shared, rng: &dyn Rng) -> Publisher {
    let node = NodeId(1 + below(rng, 3));
    cluster.read().await.publisher(node)
}

/// What an outcome says of the events in a chunk; none: nothing, and the stream ends.
fn note(told: &mut Told, events: &[String], outcome: Result<Appended, PublishError>) -> Option<()> {
    match outcome {
        Ok(appended) => {
            let offsets = appended.runs.iter().flat_map(|run| (0..u64::from(run.count)).map(|n| run.offset.plus(n)));
            let offsets: Vec<_> = offsets.collect();
            assert_eq!(offsets.len(), events.len());
            told.acked.extend(events.iter().cloned().zip(offsets));
            Some(())
        }
        Err(PublishError::Archived | PublishError::DiskFull | PublishError::TooLarge) => {
            told.refused.extend(events.iter().cloned());
            Some(())
        }
        Err(PublishError::Unavailable { .. } | PublishError::OutcomeUnknown { .. }) => None,
        Err(error) => panic!("nobody did anything that is answered by: {error}"),
    }
}

/// Numbers its events and sends them until there is an answer.
async fn numbers_its_events(cluster: Shared, rng: Arc<SeededRng>, total: u32) -> Told {
    let session = SessionId::new(SystemClock.wall().as_millis(), [9; 10]);
    let mut told = Told::default();
    let mut unanswered: VecDeque<(u32, Vec<String>)> = VecDeque::new();
    let mut next = 0;
    while next < total || !unanswered.is_empty() {
        let publisher = connect(&cluster, &*rng).await;
        let mut waiting: VecDeque<Waiting> = VecDeque::new();
        let numbering = |first: u32| Numbering::Theirs { session, epoch: 1, first: u64::from(first) + 1 };
        // The oldest first.
        for (first, events) in &unanswered {
            waiting.push_back(publisher.send(numbering(*first), events).await);
        }
        loop {
            while unanswered.len() < 16 && next < total {
                let count = (1 + below(&*rng, 8) as u32).min(total - next);
                let events = names("numbered", next..next + count);
                waiting.push_back(publisher.send(numbering(next), &events).await);
                unanswered.push_back((next, events));
                next += count;
            }
            let Some(outcome) = waiting.pop_front() else { break };
            let Ok(outcome) = outcome.await else { break };
            if note(&mut told, &unanswered[0].1, outcome).is_none() {
                break;
            }
            unanswered.pop_front();
            if below(&*rng, 40) == 0 {
                // It loses patience, or its connection.
                break;
            }
        }
    }
    told
}

/// Sends each event once. What it has no answer for when its stream ends, it knows nothing about.
async fn sends_once(cluster: Shared, rng: Arc<SeededRng>, name: &'static str, total: u32) -> Told {
    let mut told = Told::default();
    let mut next = 0;
    while next < total {
        let publisher = connect(&cluster, &*rng).await;
        let mut waiting: VecDeque<(Vec<String>, Waiting)> = VecDeque::new();
        let mut ended = false;
        while !waiting.is_empty() || (next < total && !ended) {
            while !ended && waiting.len() < 16 && next < total {
                let count = (1 + below(&*rng, 8) as u32).min(total - next);
                let events = names(name, next..next + count);
                waiting.push_back((events.clone(), publisher.send(Numbering::Ours, &events).await));
                next += count;
            }
            let Some((events, outcome)) = waiting.pop_front() else { break };
            let known = match outcome.await {
                Ok(outcome) => note(&mut told, &events, outcome),
                Err(_) => None,
            };
            if known.is_none() {
                ended = true;
                told.unknown.extend(events);
            }
        }
    }
    told
}

/// Changes leaders, cuts them off, and starts them anew, until everybody is done.
async fn trouble(cluster: Shared, rng: Arc<SeededRng>, done: Arc<AtomicBool>) {
    while !done.load(Ordering::SeqCst) {
        tokio::time::sleep(Duration::from_millis(50 + below(&*rng, 200))).await;
        let leader = cluster.read().await.leader().await;
        match below(&*rng, 3) {
            0 => {
                let to = NodeId(leader.0 % 3 + 1);
                let group = cluster.read().await.nodes[&leader].group.clone();
                let _ = group.transfer_leader(to).await;
            }
            1 => {
                let held = cluster.read().await;
                held.net.isolate(leader);
                held.link.cut.lock().unwrap().insert(leader);
                tokio::time::sleep(Duration::from_millis(300 + below(&*rng, 300))).await;
                held.net.heal();
                held.link.cut.lock().unwrap().clear();
            }
            _ => cluster.write().await.restart(leader).await,
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_goes_wrong_what_publishers_were_told_is_true() {
    const EVENTS: u32 = 3_000;
    let seed = seed();
    let rng = Arc::new(SeededRng::new(seed));
    let cluster = Cluster::start(3).await;
    let calm = Arc::<AtomicBool>::default();
    *cluster.link.tap.lock().unwrap() = Some(troubled(&rng, &calm, &cluster.tasks));
    let cluster = Arc::new(RwLock::new(cluster));
    let done = Arc::<AtomicBool>::default();
    let publishing = async {
        let told = tokio::join!(
            numbers_its_events(Arc::clone(&cluster), Arc::clone(&rng), EVENTS),
            sends_once(Arc::clone(&cluster), Arc::clone(&rng), "once", EVENTS),
            sends_once(Arc::clone(&cluster), Arc::clone(&rng), "also", EVENTS),
        );
        done.store(true, Ordering::SeqCst);
        told
    };
    let (told, ()) = tokio::join!(publishing, trouble(Arc::clone(&cluster), Arc::clone(&rng), Arc::clone(&done)));
    calm.store(true, Ordering::SeqCst);
    let cluster = cluster.read().await;
    // An event of its own behind everything: what is still on its way has arrived, or never will.
    cluster.leader().await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    let stored = cluster.read(cluster.leader().await).await;
    let place: BTreeMap<_, _> = stored.iter().map(|(offset, event)| (event.clone(), *offset)).collect();
    assert_eq!(place.len(), stored.len(), "an event is stored twice (SEED={seed})");
    let (numbered, once, also) = told;
    assert_eq!(numbered.acked.len(), EVENTS as usize, "who asks until there is an answer gets one (SEED={seed})");
    for (who, told) in [("numbered", &numbered), ("once", &once), ("also", &also)] {
        let all = told.acked.len() + told.refused.len() + told.unknown.len();
        assert_eq!(all, EVENTS as usize, "{who} (SEED={seed})");
        for (event, offset) in &told.acked {
            let at = place.get(&Bytes::from(event.clone()));
            assert!(at.is_some(), "{event} was acknowledged and is not there (SEED={seed})");
            // 0: acknowledged without saying where.
            assert!(offset.0 == 0 || at == Some(offset), "{event} is at {at:?}, not at {offset:?} (SEED={seed})");
        }
        for event in &told.refused {
            assert!(!place.contains_key(&Bytes::from(event.clone())), "{event} was refused and is there (SEED={seed})");
        }
        // What has an answer is there before its publisher goes on, so the order is that of the names.
        let mut acked: Vec<_> = told.acked.iter().map(|(event, _)| event).collect();
        acked.sort_unstable_by_key(|event| place[event.as_bytes()]);
        assert!(acked.is_sorted(), "{who} is out of order (SEED={seed})");
    }
    for node in 1..=3 {
        assert_eq!(cluster.read(NodeId(node)).await, stored, "every replica gives the same (SEED={seed})");
    }
}
