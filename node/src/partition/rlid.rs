//! Event ids: strictly increasing within a partition, whatever the clock does.

use ensign_proto::Rlid;

/// The id of the next batch's first event; its others follow one by one ([`Rlid::plus`]).
///
/// It is the clock's millisecond, unless `last`, the newest id of the partition, has reached that already (a clock that stepped
/// back, or more events in a millisecond): then it is the id after `last`. The id's milliseconds are the batch's commit time, so
/// commit times never run backwards either.
pub(super) fn first_of_batch(now_ms: u64, last: Rlid) -> Rlid {
    Rlid::new(now_ms, 0).max(last.plus(1))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_clock_that_steps_back_does_not_take_ids_with_it() {
        let last = Rlid::new(5_000, 7);
        assert_eq!(first_of_batch(4_000, last), Rlid::new(5_000, 8));
        assert_eq!(first_of_batch(5_001, last), Rlid::new(5_001, 0));
    }

    proptest! {
        #[test]
        fn ids_strictly_increase(steps in prop::collection::vec((0_u64..1 << 40, 1_u64..10_000), 1..50)) {
            let mut last = Rlid::default();
            for (now, count) in steps {
                let first = first_of_batch(now, last);
                prop_assert!(first > last);
                last = first.plus(count - 1);
                prop_assert!(last >= first);
            }
        }
    }
}
