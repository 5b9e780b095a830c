//! The sealed names of the types that a partition counts.

use std::collections::BTreeSet;

use bytes::Bytes;
use ensign_proto::PartitionContext;
use futures::{FutureExt as _, StreamExt as _};
use tokio::time::timeout;

use super::keys::{KEY_DEADLINE, Keys, KeysError};
use super::machine::{DekRow, TypeCount};

/// Keys that are asked for at a time.
const ASKED_MAX: usize = 16;

/// The names of types, in their order: encoded `EventKind`s. None where the key cannot be had within [`KEY_DEADLINE`].
///
/// Each key is asked for once, however many names it seals.
pub(super) async fn open_names(
    keys: &dyn Keys,
    context: &PartitionContext,
    deks: &[DekRow],
    types: &[TypeCount],
) -> Vec<Option<Bytes>> {
    let open = |counted: &TypeCount| keys.open_type(context, counted.dek, counted.handle, &counted.sealed);
    let mut wanted = BTreeSet::new();
    let mut names = Vec::with_capacity(types.len());
    for counted in types {
        let name = open(counted);
        if let Err(KeysError::NotHeld(_) | KeysError::Unavailable(_)) = &name {
            wanted.insert(counted.dek);
        }
        names.push(name.ok());
    }
    if wanted.is_empty() {
        return names;
    }
    let asked: Vec<_> = deks.iter().filter(|row| wanted.contains(&row.dek)).collect();
    let calls = asked.into_iter().map(|row| keys.ensure(*context, row.wrapped.clone()));
    let all = futures::stream::iter(calls).for_each_concurrent(ASKED_MAX, |call| call.map(drop));
    // What did not come in time is not known.
    let _ = timeout(KEY_DEADLINE, all).await;
    for (name, counted) in names.iter_mut().zip(types).filter(|(_, counted)| wanted.contains(&counted.dek)) {
        *name = open(counted).ok();
    }
    names
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    use ensign_proto::{ClusterId, DekId, Partition, ProjectId, TopicId};
    use tokio::time::Instant;

    use super::*;
    use crate::partition::testing::OpenKeys;

    #[tokio::test(start_paused = true)]
    async fn keys_that_do_not_come_hold_names_up_for_one_deadline_however_many_there_are() {
        let context = PartitionContext {
            cluster: ClusterId::from_bytes([1; 16]),
            project: ProjectId::from_bytes([2; 16]),
            topic: TopicId::from_bytes([3; 16]),
            partition: Partition(0),
        };
        let dek = |n: u8| DekId::from_bytes([n; 16]);
        let row = |n: u8| DekRow { dek: dek(n), wrapped: Bytes::from(vec![n; 32]) };
        let counted = |handle: u32, n: u8| TypeCount {
            handle,
            dek: dek(n),
            sealed: Bytes::from(vec![n]),
            events: 1,
            bytes: 1,
            modified_ms: 0,
        };
        let deks: Vec<DekRow> = (1..=40).map(row).collect();
        // Each key seals the names of two types; the last one seals none.
        let types: Vec<TypeCount> = (0..78).map(|n| counted(n + 1, (n / 2 + 1) as u8)).collect();
        let keys = OpenKeys::default();
        keys.mute.lock().unwrap().extend((1..=39).map(dek));
        let begin = Instant::now();
        let names = open_names(&keys, &context, &deks, &types).await;
        assert!(names.iter().all(Option::is_none) && names.len() == 78);
        assert!(begin.elapsed() < 2 * KEY_DEADLINE, "it took {:?}", begin.elapsed());
        assert_eq!(keys.ensured.load(Ordering::SeqCst), ASKED_MAX as u64);

        // One that does not come leaves the others known, and each is asked for once.
        *keys.mute.lock().unwrap() = BTreeSet::from([dek(5)]);
        keys.fetched.lock().unwrap().clear();
        keys.unheld.store(true, Ordering::SeqCst);
        keys.ensured.store(0, Ordering::SeqCst);
        let names = open_names(&keys, &context, &deks, &types).await;
        assert_eq!(names.iter().filter(|name| name.is_none()).count(), 2);
        assert_eq!(names[9], None);
        assert_eq!(names[77], Some(Bytes::from(vec![39])));
        assert_eq!(keys.ensured.load(Ordering::SeqCst), 39, "one that seals no name is not asked for");
    }
}
