//! Whether new replicas come closer to the end of the log. What is written may grow as fast as they are sent, and then a move
//! never ends, however long one waits.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use ensign_proto::NodeId;
use tokio::time::Instant;

use super::step::{LAG_MAX, Seen};

/// How long a new replica must have come no closer. What is written comes in waves.
pub(super) const WINDOW: Duration = Duration::from_secs(30);

/// How new replicas have got on since the last look.
#[derive(Debug, Default)]
pub(super) struct Pace {
    mark: Option<Mark>,
    /// What the last window showed; holds until the next one ends.
    slow: String,
}

/// How it was when the window began.
#[derive(Debug)]
struct Mark {
    at: Instant,
    throttled: Duration,
    /// What each new replica held, and missed.
    replicas: BTreeMap<NodeId, (u64, u64)>,
}

impl Pace {
    /// Says why the `arriving` do not arrive; empty if they get on, or nothing is known yet.
    pub(super) fn look(&mut self, arriving: &BTreeSet<NodeId>, seen: &Seen, now: Instant) -> &str {
        if self.mark.as_ref().is_some_and(|mark| now.duration_since(mark.at) < WINDOW) {
            return &self.slow;
        }
        let missing = arriving.iter().filter_map(|node| Some((*node, *seen.missing.get(node)?)));
        let replicas = missing.map(|(node, missing)| (node, (seen.last.saturating_sub(missing), missing))).collect();
        let mark = Mark { at: now, throttled: seen.throttled, replicas };
        self.slow = self.mark.as_ref().map(|before| verdict(before, &mark)).unwrap_or_default();
        self.mark = Some(mark);
        &self.slow
    }
}

fn verdict(before: &Mark, now: &Mark) -> String {
    // One that has taken nothing at all waits for something else: its snapshot, or its node.
    let slow = |(node, (held, missing)): (&NodeId, &(u64, u64))| {
        let (held_before, missing_before) = before.replicas.get(node)?;
        (held > held_before && missing >= missing_before && *missing > LAG_MAX).then(|| node.to_string())
    };
    let slow: Vec<String> = now.replicas.iter().filter_map(slow).collect();
    let who = match &slow[..] {
        [] => return String::new(),
        [one] => format!("node {one} catches"),
        many => format!("nodes {} catch", many.join(", ")),
    };
    let throttled = now.throttled.saturating_sub(before.throttled) * 2 >= now.at.duration_since(before.at);
    let what = if throttled {
        "raise storage.move_rate on the nodes that hold it, or write less"
    } else {
        "storage.move_rate leaves room, so look at the disks and the network"
    };
    format!("{who} up no faster than the partition is written: {what}")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One look a second for so long, at a log that grows by 100 entries a second and of which the new replicas, nodes 4 and 5, take so
    /// many. What is said at the end.
    async fn said(seconds: u32, takes: [u64; 2], throttled: Duration) -> String {
        let mut pace = Pace::default();
        let new = [4, 5].map(NodeId);
        let mut seen = Seen { last: 50_000, missing: new.map(|node| (node, 40_000)).into(), ..Seen::default() };
        let mut last = String::new();
        for _ in 0..=seconds {
            pace.look(&new.into(), &seen, Instant::now()).clone_into(&mut last);
            tokio::time::advance(Duration::from_secs(1)).await;
            seen.last += 100;
            seen.throttled += throttled;
            for (missing, takes) in seen.missing.values_mut().zip(takes) {
                *missing = *missing + 100 - takes;
            }
        }
        last
    }

    const ALL: Duration = Duration::from_secs(1);

    #[tokio::test(start_paused = true)]
    async fn a_replica_that_comes_no_closer_while_it_is_sent_to_is_told_of() {
        let rate = "up no faster than the partition is written: raise storage.move_rate on the nodes that hold it, or write less";
        assert_eq!(said(30, [100, 200], ALL).await, format!("node 4 catches {rate}"));
        assert_eq!(said(45, [90, 100], ALL).await, format!("nodes 4, 5 catch {rate}"));
        assert_eq!(said(29, [90, 100], ALL).await, "", "not at once");
    }

    #[tokio::test(start_paused = true)]
    async fn where_the_rate_is_not_used_up_something_else_is_slow() {
        let expected = "node 5 catches up no faster than the partition is written: storage.move_rate leaves room, so look at the disks and \
                        the network";
        assert_eq!(said(30, [101, 99], Duration::from_millis(400)).await, expected);
        assert!(expected.len() < 200, "a report would cut it");
    }

    #[tokio::test(start_paused = true)]
    async fn a_replica_that_comes_closer_and_one_that_is_sent_nothing_are_not_called_slow() {
        assert_eq!(said(100, [101, 102], ALL).await, "");
        assert_eq!(said(100, [0, 0], ALL).await, "");
    }

    #[tokio::test(start_paused = true)]
    async fn who_is_nearly_there_is_not_called_slow_and_what_was_said_is_taken_back() {
        let (mut pace, new) = (Pace::default(), BTreeSet::from([NodeId(4)]));
        let mut look = async |last: u64, missing: u64| {
            let seen = Seen { last, missing: [(NodeId(4), missing)].into(), ..Seen::default() };
            let said = pace.look(&new, &seen, Instant::now()).to_owned();
            tokio::time::advance(WINDOW).await;
            said
        };
        assert_eq!(look(100, LAG_MAX).await, "");
        assert_eq!(look(200, LAG_MAX).await, "", "it is in the group in a moment");
        assert_ne!(look(300, LAG_MAX + 1).await, "");
        assert_eq!(look(400, LAG_MAX).await, "");
    }
}
