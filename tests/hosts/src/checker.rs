//! The judge of a topic's history.
//!
//! The rules, each of which has bad histories in the tests that it must refuse:
//!
//! | Rule | Refuses |
//! |---|---|
//! | every node reads the same | two nodes that disagree |
//! | offsets are 1, 2, 3, … and ids rise | a hole, an id that goes back |
//! | an acked event is there, where the ack said | a lost event, one that moved |
//! | each event is there once, in its publisher's order (of one that never sends again: the acked ones) | a duplicate, events that changed places |
//! | what is there was published, and not refused | an event out of nowhere, one that was refused and stored all the same |
//! | who sends until acked is acked | an event that was given up |
//! | a subscriber gets what is read, in that order; one that follows everything, all of it | anything else |

use std::collections::{BTreeMap, HashMap};

use crate::history::{Following, History, Name, Received, Row, Sending};

/// How many violations of one kind are told in full.
const TOLD: usize = 5;

/// What was broken. Empty is what a history should lead to.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Verdict {
    /// How often each rule was broken.
    pub broken: BTreeMap<&'static str, u64>,
    /// The first few of each kind.
    pub told: Vec<String>,
}

impl Verdict {
    /// Whether nothing was broken.
    pub fn holds(&self) -> bool {
        self.broken.is_empty()
    }

    fn add(&mut self, rule: &'static str, what: impl FnOnce() -> String) {
        let count = self.broken.entry(rule).or_default();
        *count += 1;
        if *count <= TOLD as u64 {
            self.told.push(format!("{rule}: {}", what()));
        }
    }

    /// Adds another topic's.
    pub fn merge(&mut self, topic: &str, other: Self) {
        for (rule, count) in other.broken {
            *self.broken.entry(rule).or_default() += count;
        }
        self.told.extend(other.told.into_iter().map(|what| format!("{topic}: {what}")));
    }
}

/// Judges.
pub fn judge(history: &History) -> Verdict {
    let mut verdict = Verdict::default();
    let Some((reader, rows)) = history.read.iter().next() else {
        verdict.add("unread", || "nobody read the topic at the end".to_owned());
        return verdict;
    };
    for (other, others) in history.read.iter().skip(1) {
        if let Some(place) = difference(rows, others) {
            verdict.add("diverged", || {
                format!("row {place}: {reader} reads {:?}, {other} {:?}", rows.get(place), others.get(place))
            });
        }
    }
    order(rows, &mut verdict);
    let place_of = presence(history, rows, &mut verdict);
    acks(history, &place_of, &mut verdict);
    for received in &history.received {
        subscription(received, rows, &mut verdict);
    }
    verdict
}

fn difference(one: &[Row], other: &[Row]) -> Option<usize> {
    let same = one.iter().zip(other).position(|(one, other)| one != other);
    same.or_else(|| (one.len() != other.len()).then(|| one.len().min(other.len())))
}

/// Offsets without holes, and ids that rise.
fn order(rows: &[Row], verdict: &mut Verdict) {
    let mut before: Option<[u8; 10]> = None;
    for (place, row) in rows.iter().enumerate() {
        let expected = place as u64 + 1;
        if row.offset != Some(expected) {
            verdict.add("hole", || format!("{} has offset {:?} where {expected} belongs", row.name, row.offset));
        }
        if before >= Some(row.id) {
            verdict.add("id went back", || format!("{} at offset {expected}: {:?} after {before:?}", row.name, row.id));
        }
        before = Some(row.id);
    }
}

/// Each event once, in its publisher's order, and none out of nowhere. Where each is.
fn presence(history: &History, rows: &[Row], verdict: &mut Verdict) -> HashMap<Name, u64> {
    let mut place_of: HashMap<Name, u64> = HashMap::new();
    let mut last: HashMap<u32, u64> = HashMap::new();
    for row in rows {
        let offset = row.offset.unwrap_or_default();
        if let Some(first) = place_of.get(&row.name) {
            verdict.add("duplicated", || format!("{} is at offset {first} and again at {offset}", row.name));
            continue;
        }
        place_of.insert(row.name, offset);
        let Name { publisher, number } = row.name;
        let published = history.published.get(&publisher);
        if published.is_none_or(|it| number >= it.begun) {
            verdict.add("out of nowhere", || format!("{} at offset {offset} was never published", row.name));
        }
        if let Some(why) = published.and_then(|it| it.refused.get(&number)) {
            verdict.add("refused and stored", || format!("{} at offset {offset} was refused: {why}", row.name));
        }
        // Who never sends again may have an unanswered event committed late, by the node that had taken it, after the stream had
        // broken and another had gone on. What was acked was there before anything that followed.
        if published.is_some_and(|it| it.sending == Sending::Once && !it.acked.contains_key(&number)) {
            continue;
        }
        if last.get(&publisher).is_some_and(|last| *last > number) {
            verdict.add("reordered", || {
                format!("{} at offset {offset} comes after {publisher}:{}", row.name, last[&publisher])
            });
        } else {
            last.insert(publisher, number);
        }
    }
    place_of
}

/// What was acked is there, where the ack said; what must be acked is.
fn acks(history: &History, place_of: &HashMap<Name, u64>, verdict: &mut Verdict) {
    for (publisher, published) in &history.published {
        for (number, said) in &published.acked {
            let name = Name { publisher: *publisher, number: *number };
            match (place_of.get(&name), said) {
                (None, _) => verdict.add("lost", || format!("{name} was acked (offset {said:?}) and is not there")),
                (Some(place), Some(said)) if place != said => {
                    verdict.add("moved", || format!("{name} was acked at offset {said} and is at {place}"));
                }
                (Some(_), _) => {}
            }
        }
        if published.sending == Sending::UntilAcked {
            let unanswered = published.begun - published.acked.len() as u64;
            if unanswered > 0 {
                verdict
                    .add("given up", || format!("publisher {publisher}: {unanswered} events, {:?}", published.trouble));
            }
        }
    }
}

/// What a subscriber got is what is read, in that order.
fn subscription(received: &Received, rows: &[Row], verdict: &mut Verdict) {
    let by_id: HashMap<[u8; 10], usize> = rows.iter().enumerate().map(|(place, row)| (row.id, place)).collect();
    let mut before: Option<usize> = None;
    for row in &received.rows {
        let Some(place) = by_id.get(&row.id).copied() else {
            verdict.add("delivered and not there", || format!("{} got {} ({:?})", received.name, row.name, row.offset));
            continue;
        };
        let stored = rows[place];
        if stored.name != row.name || row.offset.is_some_and(|offset| stored.offset != Some(offset)) {
            verdict.add("delivered differently", || format!("{} got {row:?}, read is {stored:?}", received.name));
        }
        match before {
            Some(before) if place <= before => {
                verdict.add("delivered again or out of order", || {
                    format!("{} got {} after row {before}", received.name, row.name)
                });
            }
            _ => {
                let expected = before.map_or(0, |before| before + 1);
                if received.following == Following::Everything && place != expected {
                    verdict.add("missed", || format!("{} got row {place} where {expected} belongs", received.name));
                }
                before = Some(place);
            }
        }
    }
    if received.following == Following::Everything && received.rows.len() < rows.len() {
        verdict.add("missed", || format!("{} got {} of {} events", received.name, received.rows.len(), rows.len()));
    }
}

#[cfg(test)]
mod tests;
