//! The frame log against the model: whatever is submitted, committed in whatever pieces, closed and opened again.

#[allow(dead_code, reason = "each test file uses a part of it")]
mod world;

use bytes::Bytes;
use ensign_proto::{GroupId, LogIndex, Term};
use ensign_storage::memory::Op;
use ensign_storage::{Entry, EntryId, LogConfig};
use proptest::prelude::*;
use world::World;

#[derive(Debug, Clone)]
enum Step {
    Append { group: u64, count: u64, size: usize, new_term: bool },
    Vote { group: u64 },
    Committed { group: u64, some: bool },
    Checkpoint { group: u64, size: usize },
    Truncate { group: u64, back: u64 },
    Purge { group: u64, keep: u64, past: u64 },
    Snapshot { group: u64, size: usize },
    Remove { group: u64 },
    Forget { group: u64 },
    Commit,
    Check,
    Reopen,
}

fn step() -> impl Strategy<Value = Step> {
    let group = || 16_u64..19;
    prop_oneof![
        12 => (group(), 0_u64..6, prop_oneof![0_usize..200, 3900_usize..4200, 0_usize..70_000], any::<bool>())
            .prop_map(|(group, count, size, new_term)| Step::Append { group, count, size, new_term }),
        2 => group().prop_map(|group| Step::Vote { group }),
        2 => (group(), any::<bool>()).prop_map(|(group, some)| Step::Committed { group, some }),
        2 => (group(), 0_usize..9000).prop_map(|(group, size)| Step::Checkpoint { group, size }),
        3 => (group(), 0_u64..12).prop_map(|(group, back)| Step::Truncate { group, back }),
        3 => (group(), 0_u64..12, 0_u64..3).prop_map(|(group, keep, past)| Step::Purge { group, keep, past }),
        1 => (group(), 0_usize..150_000).prop_map(|(group, size)| Step::Snapshot { group, size }),
        1 => group().prop_map(|group| Step::Remove { group }),
        1 => group().prop_map(|group| Step::Forget { group }),
        10 => Just(Step::Commit),
        2 => Just(Step::Check),
        1 => Just(Step::Reopen),
    ]
}

fn take(world: &mut World, n: usize, step: Step) -> Result<(), world::Violation> {
    let bytes = |size: usize| Bytes::from(vec![n as u8; size]);
    let (group, op) = match step {
        Step::Commit => {
            world.commit();
            return Ok(());
        }
        Step::Check => return world.check_live(),
        Step::Reopen => return world.reopen(),
        Step::Append { group, count, size, new_term } => {
            let last = world.live(GroupId(group)).state().last;
            let term = Term(last.map_or(1, |last| last.term.0) + u64::from(new_term));
            let next = last.map_or(1, |last| last.index.0 + 1);
            let entry = |index| Entry {
                id: EntryId { term, index: LogIndex(index) },
                payload: bytes(size + index as usize % 7),
            };
            (group, Op::Append((next..next + count).map(entry).collect()))
        }
        Step::Vote { group } => (group, Op::Vote(bytes(n % 30))),
        Step::Committed { group, some } => (group, Op::Committed(some.then(|| bytes(n % 20)))),
        Step::Checkpoint { group, size } => (group, Op::Checkpoint(bytes(size))),
        Step::Truncate { group, back } => {
            let state = world.live(GroupId(group)).state();
            let end = state.last.map_or(0, |last| last.index.0 + 1);
            (
                group,
                Op::Truncate(LogIndex(
                    end.saturating_sub(back).max(state.purged.map_or(0, |purged| purged.index.0 + 1)),
                )),
            )
        }
        Step::Purge { group, keep, past } => {
            let last = world.live(GroupId(group)).state().last.unwrap_or(EntryId { term: Term(1), index: LogIndex(0) });
            let index = if past > 0 { last.index.0 + past } else { last.index.0.saturating_sub(keep) };
            (group, Op::Purge(EntryId { term: last.term, index: LogIndex(index) }))
        }
        Step::Snapshot { group, size } => (group, Op::Snapshot(bytes(size))),
        Step::Remove { group } => (group, Op::Remove),
        Step::Forget { group } => (group, Op::Forget(bytes(n % 30))),
    };
    world.submit(GroupId(group), op);
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, ..ProptestConfig::default() })]
    #[test]
    fn the_frame_log_is_what_the_model_says(steps in proptest::collection::vec(step(), 1..120)) {
        let mut world = World::new(LogConfig::tiny()).expect("it opens");
        for (n, step) in steps.into_iter().enumerate() {
            take(&mut world, n, step).expect("the model agrees");
        }
        world.check_live().expect("the model agrees");
        world.reopen().expect("the model agrees after a restart");
    }
}
