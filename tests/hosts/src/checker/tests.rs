//! A good history, and what must be found once it is made bad.

use super::*;
use crate::history::Published;

fn row(offset: u64, publisher: u32, number: u64) -> Row {
    Row { offset: Some(offset), id: [offset as u8; 10], name: Name { publisher, number } }
}

/// Publisher 1 sends until acked, 2 sends once: its event 1 was never answered and is not there.
fn good() -> History {
    let rows = vec![row(1, 1, 0), row(2, 2, 0), row(3, 1, 1), row(4, 2, 2)];
    let mut history = History::default();
    let ours =
        Published { begun: 2, acked: [(0, Some(1)), (1, Some(3))].into(), ..Published::new(Sending::UntilAcked) };
    let theirs = Published { begun: 3, acked: [(0, None), (2, None)].into(), ..Published::new(Sending::Once) };
    history.published = [(1, ours), (2, theirs)].into();
    let all = Received { name: "ours".to_owned(), following: Following::Everything, rows: rows.clone() };
    let live = Row { offset: None, ..rows[2] };
    let some = Received { name: "theirs".to_owned(), following: Following::Live, rows: vec![live] };
    history.received = vec![all, some];
    history.read = [("node 1".to_owned(), rows.clone()), ("node 2".to_owned(), rows)].into();
    history
}

fn found(spoil: impl FnOnce(&mut History)) -> Vec<&'static str> {
    let mut history = good();
    spoil(&mut history);
    judge(&history).broken.into_keys().collect()
}

/// Changes what every node reads.
fn reread(history: &mut History, change: impl Fn(&mut Vec<Row>)) {
    history.read.values_mut().for_each(change);
    history.received.clear();
}

/// Gives rows the offsets and ids of their places.
fn renumber(rows: &mut [Row]) {
    for (place, row) in (1..).zip(rows) {
        (row.offset, row.id) = (Some(place), [place as u8; 10]);
    }
}

#[test]
fn a_good_history_holds() {
    assert_eq!(judge(&good()), Verdict::default());
}

#[test]
fn a_topic_that_nobody_read_is_not_judged_good() {
    assert_eq!(found(|history| history.read.clear()), ["unread"]);
}

#[test]
fn a_lost_event_is_found() {
    let lost = found(|history| {
        reread(history, |rows| {
            rows.pop();
        });
    });
    assert_eq!(lost, ["lost"]);
}

#[test]
fn a_duplicate_is_found() {
    let duplicated = found(|history| reread(history, |rows| rows.push(row(5, 2, 0))));
    assert_eq!(duplicated, ["duplicated"]);
}

#[test]
fn events_that_changed_places_are_found() {
    let swapped = found(|history| {
        reread(history, |rows| {
            rows.swap(1, 3);
            renumber(rows);
        });
    });
    assert_eq!(swapped, ["reordered"]);
}

#[test]
fn an_event_that_was_never_answered_and_never_sent_again_may_come_late() {
    let late = found(|history| reread(history, |rows| rows.push(row(5, 2, 1))));
    assert_eq!(late, [""; 0]);
    let ours = found(|history| {
        history.published.get_mut(&2).unwrap().sending = Sending::UntilAcked;
        reread(history, |rows| rows.push(row(5, 2, 1)));
    });
    assert_eq!(ours, ["given up", "reordered"]);
}

#[test]
fn an_event_that_is_not_where_its_ack_said_is_found() {
    let moved = found(|history| {
        reread(history, |rows| {
            rows.swap(1, 2);
            renumber(rows);
        });
    });
    assert_eq!(moved, ["moved"]);
}

#[test]
fn a_hole_is_found() {
    let hole = found(|history| {
        reread(history, |rows| rows[3].offset = Some(5));
    });
    assert_eq!(hole, ["hole"]);
}

#[test]
fn an_id_that_goes_back_is_found() {
    assert_eq!(found(|history| reread(history, |rows| rows[3].id = [2; 10])), ["id went back"]);
}

#[test]
fn nodes_that_disagree_are_found() {
    let diverged = found(|history| {
        history.read.entry("node 2".to_owned()).or_default().pop();
    });
    assert_eq!(diverged, ["diverged"]);
    let diverged = found(|history| history.read.entry("node 2".to_owned()).or_default()[1].id = [0; 10]);
    assert_eq!(diverged, ["diverged"]);
}

#[test]
fn an_event_out_of_nowhere_is_found() {
    assert_eq!(found(|history| reread(history, |rows| rows.push(row(5, 1, 2)))), ["out of nowhere"]);
    assert_eq!(found(|history| reread(history, |rows| rows.push(row(5, 3, 0)))), ["out of nowhere"]);
}

#[test]
fn a_refusal_that_was_a_lie_is_found() {
    let refused = found(|history| {
        let published = history.published.get_mut(&2).unwrap();
        published.refused.insert(2, "full".to_owned());
    });
    assert_eq!(refused, ["refused and stored"]);
}

#[test]
fn an_event_that_was_given_up_is_found() {
    assert_eq!(found(|history| history.published.get_mut(&1).unwrap().begun = 3), ["given up"]);
}

#[test]
fn what_a_subscriber_misses_gets_twice_or_gets_wrong_is_found() {
    let everything = |change: fn(&mut Vec<Row>)| found(|history| change(&mut history.received[0].rows));
    assert_eq!(
        everything(|rows| {
            rows.pop();
        }),
        ["missed"]
    );
    assert_eq!(
        everything(|rows| {
            rows.remove(1);
        }),
        ["missed"]
    );
    assert_eq!(everything(|rows| rows.push(row(2, 2, 0))), ["delivered again or out of order"]);
    assert_eq!(everything(|rows| rows[1].name = Name { publisher: 2, number: 1 }), ["delivered differently"]);
    assert_eq!(everything(|rows| rows.push(row(9, 2, 1))), ["delivered and not there"]);
    let live = found(|history| {
        let again = history.received[1].rows[0];
        history.received[1].rows.push(again);
    });
    assert_eq!(live, ["delivered again or out of order"]);
}
