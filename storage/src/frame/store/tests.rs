use std::sync::Arc;
use std::sync::mpsc::channel;
use std::thread;

use super::*;
use crate::fault::FaultDisk;

fn commit(store: &Store, first: u64, size: usize) -> Result<(), WriteFailure> {
    let id = EntryId { term: Term(1), index: LogIndex(first) };
    let mut frame = FrameBuilder::default();
    frame.entry(Kind::Append, GroupId(16), &Entry { id, payload: Bytes::from(vec![7; size]) });
    frame.finish();
    let (blobs, dropped_blobs) = (Vec::new(), Vec::new());
    store.commit(Commit {
        first,
        frame: &mut frame,
        max_order: 8,
        log_start: 1,
        purge: false,
        blobs,
        dropped_blobs,
        durable: true,
    })
}

/// A log that the disk has just refused growth, before anybody has opened it again.
fn refused() -> (FaultDisk, Store) {
    let disk = FaultDisk::new();
    let path = Path::new("log");
    let store = Store::open(Space::open(Arc::new(disk.clone()), path, 0).unwrap(), path, 0).unwrap();
    commit(&store, 1, 3000).unwrap();
    disk.set_capacity(Some(disk.allocated()));
    assert!(matches!(commit(&store, 2, 8 << 20), Err(WriteFailure::Full)));
    (disk, store)
}

fn first_bytes(db: &Database) -> Result<Bytes, ReadFailure> {
    Chunks::new(db)?.bytes(1, 0, 1000)
}

#[test]
fn a_read_that_meets_a_refused_growth_waits_until_the_database_is_open_again() {
    let (disk, store) = refused();
    let (sender, tries) = channel();
    thread::scope(|scope| {
        let reader = scope.spawn(|| {
            store.read(|db| {
                let found = first_bytes(db);
                sender.send(found.is_ok()).unwrap();
                found
            })
        });
        assert!(!tries.recv().unwrap(), "redb answers nobody after a refused growth");
        store.reopen().unwrap();
        assert_eq!(reader.join().unwrap().unwrap().len(), 1000);
        assert!(tries.recv().unwrap());
    });
    // What was refused counts for nothing, and there is room again one day.
    assert_eq!(store.extent().unwrap(), Some((1, 1, 1)));
    disk.set_capacity(None);
    commit(&store, 2, 8 << 20).unwrap();
}

#[test]
fn a_read_does_not_wait_for_a_writer_that_has_gone() {
    let (_disk, store) = refused();
    let (sender, tries) = channel();
    thread::scope(|scope| {
        let reader = scope.spawn(|| {
            store.read(|db| {
                sender.send(()).unwrap();
                first_bytes(db)
            })
        });
        tries.recv().unwrap();
        store.abandon();
        assert!(matches!(reader.join().unwrap(), Err(ReadFailure::Failed(_))));
    });
}

#[test]
fn a_read_that_fails_by_itself_does_not_wait() {
    let disk = FaultDisk::new();
    let path = Path::new("log");
    let store = Store::open(Space::open(Arc::new(disk.clone()), path, 0).unwrap(), path, 0).unwrap();
    commit(&store, 1, 3000).unwrap();
    disk.inject(crate::fault::Fault::Read(0));
    assert!(matches!(store.read(first_bytes), Err(ReadFailure::Failed(_))));
}
