//! What happens when a core or a machine panics.

mod common;

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use bytes::Bytes;
use common::{GROUP, within};
use ensign_proto::{ByteCount, LogIndex, NodeId};
use ensign_raft::env::{SeededRng, SystemClock, Tasks};
use ensign_raft::testing::{Journal, MemoryNet, quick};
use ensign_raft::{
    CommittedEntry, Group, GroupSpec, Health, Mode, ProposeError, ReadError, RestoreError, Runtime, StartError,
    StateMachine,
};
use ensign_storage::{Done, Entry, EntryId, GroupLog, GroupState, LogError, MemoryLog, NodeLog as _};
use tokio::sync::mpsc;

/// A log that a test tampers with.
struct Tampered {
    log: Arc<dyn GroupLog>,
    /// The next append panics, within the core that called it.
    panics: AtomicBool,
    /// There is no space, and who waits for some.
    crowded: Mutex<Option<Waker>>,
    /// Truncations go there and stay unanswered.
    held: Option<mpsc::UnboundedSender<Done>>,
}

impl Tampered {
    fn new(log: Arc<dyn GroupLog>) -> Self {
        Self { log, panics: AtomicBool::new(false), crowded: Mutex::default(), held: None }
    }
}

impl GroupLog for Tampered {
    fn state(&self) -> GroupState {
        self.log.state()
    }

    fn poll_space(&self, context: &mut Context<'_>) -> Poll<()> {
        match &mut *self.crowded.lock().unwrap_or_else(PoisonError::into_inner) {
            Some(waker) => {
                waker.clone_from(context.waker());
                Poll::Pending
            }
            None => Poll::Ready(()),
        }
    }

    fn append(&self, entries: Vec<Entry>, done: Done) {
        assert!(!self.panics.swap(false, Ordering::SeqCst), "a bug in the log");
        self.log.append(entries, done);
    }

    fn save_vote(&self, vote: Bytes, done: Done) {
        self.log.save_vote(vote, done);
    }

    fn save_committed(&self, committed: Option<Bytes>) {
        self.log.save_committed(committed);
    }

    fn truncate(&self, from: LogIndex, done: Done) {
        match &self.held {
            Some(held) => held.send(done).unwrap_or_else(|_| panic!("the test listens")),
            None => self.log.truncate(from, done),
        }
    }

    fn purge(&self, through: EntryId, done: Done) {
        self.log.purge(through, done);
    }

    fn read_cached(&self, range: Range<LogIndex>, limit: ByteCount) -> Option<Vec<Entry>> {
        self.log.read_cached(range, limit)
    }

    fn read(&self, range: Range<LogIndex>, limit: ByteCount) -> Result<Vec<Entry>, LogError> {
        self.log.read(range, limit)
    }

    fn put_snapshot(&self, snapshot: Bytes, done: Done) {
        self.log.put_snapshot(snapshot, done);
    }

    fn snapshot(&self) -> Result<Option<Bytes>, LogError> {
        self.log.snapshot()
    }

    fn put_checkpoint(&self, checkpoint: Bytes) {
        self.log.put_checkpoint(checkpoint);
    }

    fn checkpoint(&self) -> Result<Option<Bytes>, LogError> {
        self.log.checkpoint()
    }
}

fn alone() -> (Runtime, Tasks) {
    let (net, tasks) = (MemoryNet::new(), Tasks::new());
    let node = NodeId(1);
    let rng = Arc::new(SeededRng::new(1));
    let runtime = Runtime::new(quick(node), net.transport(node), Arc::new(SystemClock), rng, tasks.clone());
    net.attach(&runtime);
    (runtime, tasks)
}

fn spec() -> GroupSpec {
    GroupSpec { id: GROUP, voters: BTreeSet::from([NodeId(1)]), mode: Mode::Found }
}

async fn ready<S: StateMachine>(group: &Group<S>) {
    let mut leadership = group.leadership();
    within("a leader", async { leadership.wait_for(|now| now.ready).await.map(|_| ()) })
        .await
        .expect("the group lives");
}

#[tokio::test]
async fn a_core_that_panics_is_created_again_from_storage() {
    let (runtime, tasks) = alone();
    let log = Arc::new(Tampered::new(MemoryLog::new().group(GROUP)));
    let group = runtime.start(spec(), Arc::<Tampered>::clone(&log), Journal::default()).await.unwrap();
    ready(&group).await;
    let first = group.propose(None, Bytes::from_static(b"a")).await.unwrap();
    let term = group.leadership().borrow().term;
    log.panics.store(true, Ordering::SeqCst);
    let outcome = within("an outcome", group.propose(None, Bytes::from_static(b"b"))).await;
    assert!(matches!(outcome, Err(ProposeError::OutcomeUnknown)), "{outcome:?}");
    within("a restart", async {
        while group.status().restarts == 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
    ready(&group).await;
    // Every life of a core is a new term.
    assert!(group.leadership().borrow().term > term);
    let second = group.propose(None, Bytes::from_static(b"c")).await.unwrap();
    assert!(second.id > first.id);
    assert_eq!(group.status().health, Health::Running);
    let payloads = group.inspect(|journal| journal.entries.iter().map(|e| e.payload.clone()).collect::<Vec<_>>());
    assert_eq!(payloads, ["a", "c"]);
    assert_eq!(tasks.panicked(), None, "a group's death is not the node's");
}

struct Fragile;

impl StateMachine for Fragile {
    type Response = ();

    fn apply(&mut self, entry: &CommittedEntry) {
        assert_ne!(entry.payload, &b"poison"[..], "a bug in the machine");
    }

    fn snapshot(&self) -> Bytes {
        Bytes::new()
    }

    fn restore(&mut self, _snapshot: &Bytes) -> Result<(), RestoreError> {
        Ok(())
    }
}

#[tokio::test]
async fn a_machine_that_panics_fences_its_replica_and_nothing_else() {
    let (runtime, tasks) = alone();
    let logs = MemoryLog::new();
    let group = runtime.start(spec(), logs.group(GROUP), Fragile).await.unwrap();
    ready(&group).await;
    let outcome = within("an outcome", group.propose(None, Bytes::from_static(b"poison"))).await;
    assert!(matches!(outcome, Err(ProposeError::OutcomeUnknown | ProposeError::Fenced { .. })), "{outcome:?}");
    within("a fence", async {
        while !matches!(group.status().health, Health::Fenced { .. }) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
    assert_eq!(tasks.panicked(), None);
    let other = GroupSpec { id: ensign_proto::GroupId(17), ..spec() };
    let other = runtime.start(other, logs.group(ensign_proto::GroupId(17)), Fragile).await.unwrap();
    ready(&other).await;
    other.propose(None, Bytes::from_static(b"fine")).await.unwrap();
}

#[tokio::test]
async fn a_group_starts_once_and_again_after_it_was_stopped() {
    let (runtime, _tasks) = alone();
    let logs = MemoryLog::new();
    let group = runtime.start(spec(), logs.group(GROUP), Journal::default()).await.unwrap();
    ready(&group).await;
    group.propose(None, Bytes::from_static(b"a")).await.unwrap();
    let twice = runtime.start(spec(), logs.group(GROUP), Journal::default()).await;
    assert!(matches!(twice, Err(StartError::Running { group: GROUP })), "{twice:?}");
    runtime.stop(GROUP).await;
    assert!(matches!(group.propose(None, Bytes::new()).await, Err(ProposeError::Stopped)));
    let again = runtime.start(spec(), logs.group(GROUP), Journal::default()).await.unwrap();
    ready(&again).await;
    assert_eq!(again.inspect(|journal| journal.entries.len()), 1);
    runtime.shut_down(Duration::from_secs(2)).await;
    let late = runtime.start(spec(), logs.group(GROUP), Journal::default()).await;
    assert!(matches!(late, Err(StartError::Stopping)), "{late:?}");
}

#[tokio::test]
async fn a_group_on_a_failed_log_does_not_start() {
    let (runtime, _tasks) = alone();
    let logs = MemoryLog::new();
    let group = runtime.start(spec(), logs.group(GROUP), Journal::default()).await.unwrap();
    ready(&group).await;
    runtime.stop(GROUP).await;
    logs.fail(Some(LogError::Fenced { cause: "fsync failed".into() }));
    let refused = runtime.start(spec(), logs.group(GROUP), Journal::default()).await;
    assert!(matches!(refused, Err(StartError::Storage { group: GROUP, .. })), "{refused:?}");
    // Nothing of it is left behind: it starts once the log is sound.
    logs.fail(None);
    let again = runtime.start(spec(), logs.group(GROUP), Journal::default()).await.unwrap();
    ready(&again).await;
}

/// Whoever starts groups also destroys those that take the room: it must not wait here.
#[tokio::test]
async fn a_group_that_finds_no_room_to_begin_in_says_so_at_once() {
    let (runtime, _tasks) = alone();
    let logs = MemoryLog::new();
    logs.fail(Some(LogError::Full { cause: "no space left".into() }));
    let starting = runtime.start(spec(), logs.group(GROUP), Journal::default());
    let refused = within("an answer", starting).await;
    assert!(matches!(refused, Err(StartError::DiskFull { group: GROUP, .. })), "{refused:?}");
    logs.fail(None);
    let again = runtime.start(spec(), logs.group(GROUP), Journal::default()).await.unwrap();
    ready(&again).await;
}

#[tokio::test]
async fn a_core_does_not_start_before_what_its_log_holds_is_durable() {
    let (runtime, _tasks) = alone();
    let (held, mut truncations) = mpsc::unbounded_channel();
    let first = MemoryLog::new();
    ready(&runtime.start(spec(), first.group(GROUP), Journal::default()).await.unwrap()).await;
    runtime.stop(GROUP).await;
    let log = Tampered { held: Some(held), ..Tampered::new(first.group(GROUP)) };
    let mut starting = std::pin::pin!(runtime.start(spec(), Arc::new(log), Journal::default()));
    let barrier = tokio::select! {
        _ = &mut starting => panic!("a core was started over a vote that may be lost"),
        barrier = truncations.recv() => barrier.unwrap(),
    };
    barrier(Ok(()));
    ready(&starting.await.unwrap()).await;
}

#[tokio::test]
async fn a_group_that_waits_for_space_in_its_log_holds_up_no_other() {
    let (runtime, _tasks) = alone();
    let log = Arc::new(Tampered::new(MemoryLog::new().group(GROUP)));
    let crowded = runtime.start(spec(), Arc::<Tampered>::clone(&log), Journal::default()).await.unwrap();
    let other = GroupSpec { id: ensign_proto::GroupId(17), ..spec() };
    let other =
        runtime.start(other, MemoryLog::new().group(ensign_proto::GroupId(17)), Journal::default()).await.unwrap();
    ready(&crowded).await;
    ready(&other).await;
    let last = log.state().last;
    *log.crowded.lock().unwrap() = Some(Waker::noop().clone());
    let meanwhile = async {
        // One thread runs everything here: a core that blocked it would end the test.
        other.propose(None, Bytes::from_static(b"goes on")).await.unwrap();
        assert_eq!(log.state().last, last, "the append waits");
        log.crowded.lock().unwrap().take().unwrap().wake();
    };
    let (proposed, ()) =
        within("both", async { tokio::join!(crowded.propose(None, Bytes::from_static(b"waits")), meanwhile) }).await;
    proposed.unwrap();
}

#[tokio::test]
async fn a_reader_of_a_group_that_is_destroyed_hears_that_it_was_stopped() {
    let (runtime, _tasks) = alone();
    let logs = MemoryLog::new();
    let group = runtime.start(spec(), logs.group(GROUP), Journal::default()).await.unwrap();
    ready(&group).await;
    group.propose(None, Bytes::from_static(b"a")).await.unwrap();
    runtime.stop(GROUP).await;
    logs.remove(GROUP, Box::new(|_| ()));
    let read = group.read_log(LogIndex(0)..LogIndex(10), ByteCount(1000)).await;
    assert!(matches!(read, Err(ReadError::Stopped)), "{read:?}");
    assert_eq!(group.status().health, Health::Stopped);
}
