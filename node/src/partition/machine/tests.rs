//! The state machine against a model: whatever a leader, a deposed leader or a confused network puts into the log.

use std::collections::HashMap;

use ensign_proto::{
    ByteCount, COMMIT_BYTES, ClusterId, Partition, ProducerRow, ProjectId, SALT_BYTES, TAG_BYTES, Term, TopicId,
    TypeRow,
};
use ensign_storage::EntryId;
use proptest::prelude::*;

use super::*;
use crate::partition::tail::TailBudget;
use crate::partition::{checkpoint, rlid};

fn context() -> PartitionContext {
    PartitionContext {
        cluster: ClusterId::from_bytes([1; 16]),
        project: ProjectId::from_bytes([2; 16]),
        topic: TopicId::from_bytes([3; 16]),
        partition: Partition(0),
    }
}

fn machine() -> PartitionMachine {
    let tail = Tail::new(TailBudget::new(ByteCount(1 << 20), ByteCount(1 << 20)));
    PartitionMachine::new(context(), tail)
}

const DEK: DekId = DekId::from_bytes([9; 16]);

fn entry(term: u64, index: u64, payload: Bytes) -> CommittedEntry {
    CommittedEntry { id: EntryId { term: Term(term), index: LogIndex(index) }, payload }
}

/// Bytes that read as a sealed batch: what apply looks at needs no key.
fn sealed(header: &BatchHeader, salt: u8) -> Bytes {
    let ciphertext = [7; 24];
    let mut bytes = header.encode(ciphertext.len()).expect("a drafted header is sound");
    bytes.extend_from_slice(&[salt; SALT_BYTES]);
    bytes.extend_from_slice(&[salt; COMMIT_BYTES]);
    bytes.extend_from_slice(&ciphertext);
    bytes.extend_from_slice(&[salt; TAG_BYTES]);
    bytes.into()
}

/// A head as a leader predicts it.
#[derive(Clone)]
struct Head {
    next: Offset,
    link: Link,
    last_id: Rlid,
}

impl Head {
    fn of(machine: &PartitionMachine) -> Self {
        let state = machine.state();
        Self { next: state.next_offset, link: state.link, last_id: state.last_id }
    }

    fn draft(&self, term: u64, now_ms: u64, rows: &[(SessionId, u32, u64, u32)]) -> BatchHeader {
        let count: u32 = rows.iter().map(|row| row.3).sum();
        let first_id = rlid::first_of_batch(now_ms, self.last_id);
        let producer = |row: &(SessionId, u32, u64, u32)| ProducerRow {
            session: row.0,
            epoch: row.1,
            first_sequence: row.2,
            count: row.3,
        };
        BatchHeader {
            algorithm: ensign_proto::Algorithm::default(),
            count,
            term: Term(term),
            base_offset: self.next,
            first_id,
            last_id: first_id.plus(u64::from(count) - 1),
            dek: DEK,
            prev: self.link,
            producers: rows.iter().map(producer).collect(),
            types: vec![TypeRow { handle: 0, count, bytes: 10 * u64::from(count) }],
            fingerprints: Vec::new(),
        }
    }

    fn advance(&mut self, header: &BatchHeader, bytes: &Bytes) {
        let parsed = SealedBytes::parse(bytes.clone()).expect("it was made a moment ago");
        *self = Self { next: header.next_offset(), link: link(&context(), &parsed), last_id: header.last_id };
    }
}

fn with_key() -> PartitionMachine {
    let mut machine = machine();
    let introduced = machine.apply(&entry(1, 1, Payload::dek_introduced(DEK, b"wrapped")));
    assert_eq!(introduced, Applied::Introduced);
    machine
}

fn session(n: u8) -> SessionId {
    SessionId::new(1_000 + u64::from(n), [n; 10])
}

#[test]
fn a_batch_moves_the_head_and_its_repetition_does_nothing() {
    let mut machine = with_key();
    let header = Head::of(&machine).draft(1, 5_000, &[(session(1), 1, 1, 3)]);
    let bytes = sealed(&header, 1);
    let applied = machine.apply(&entry(1, 2, bytes.clone()));
    assert_eq!(applied, Applied::Batch { base: Offset(1), committed_ms: 5_000 });
    assert_eq!(machine.state().next_offset, Offset(4));
    assert_eq!(machine.state().bytes, 30);
    assert_eq!(machine.tail.high_watermark(), Offset(4));
    let before = machine.snapshot();
    assert_eq!(machine.apply(&entry(1, 3, bytes)), Applied::Stale);
    assert_eq!(machine.snapshot(), before, "a refused batch changes nothing");
}

#[test]
fn a_batch_is_refused_unless_everything_fits() {
    type Spoil = fn(&mut BatchHeader);
    let spoils: [(&str, Spoil); 6] = [
        ("another term", |header| header.term = Term(2)),
        ("another predecessor", |header| header.prev.0[0] ^= 1),
        ("a hole", |header| header.base_offset = Offset(2)),
        ("ids that run backwards", |header| {
            header.first_id = Rlid::default();
            header.last_id = Rlid::default().plus(u64::from(header.count) - 1);
        }),
        ("a key that was never introduced", |header| header.dek = DekId::from_bytes([8; 16])),
        ("a type that was never introduced", |header| header.types[0].handle = 1),
    ];
    for (what, spoil) in spoils {
        let mut machine = with_key();
        let mut header = Head::of(&machine).draft(1, 5_000, &[(session(1), 1, 1, 2)]);
        spoil(&mut header);
        assert_eq!(machine.apply(&entry(1, 2, sealed(&header, 1))), Applied::Stale, "{what}");
        assert_eq!(machine.state().next_offset, Offset::FIRST, "{what}");
    }
}

#[test]
fn a_batch_that_holds_an_event_twice_is_refused_and_remembered_as_refused() {
    let mut machine = with_key();
    let header = Head::of(&machine).draft(1, 5_000, &[(session(1), 1, 1, 2), (session(1), 1, 2, 1)]);
    assert_eq!(machine.apply(&entry(1, 2, sealed(&header, 1))), Applied::Stale);
    // A reader of the log, who only follows the chain, would take it for the batch that follows.
    assert_eq!(machine.state().refused_in_place, [LogIndex(2)]);
}

#[test]
fn an_entry_of_a_newer_build_halts_the_replica() {
    for payload in [&b"\x02 a batch of format 2"[..], b"\x90 an entry of a kind to come", b""] {
        let mut machine = with_key();
        assert_eq!(machine.apply(&entry(1, 2, Bytes::copy_from_slice(payload))), Applied::Unreadable);
        let header = Head::of(&machine).draft(1, 5_000, &[(session(1), 1, 1, 1)]);
        assert_eq!(machine.apply(&entry(1, 3, sealed(&header, 1))), Applied::Unreadable);
        assert!(machine.checkpoint().is_none(), "its state is not kept: a newer build replays the log");
    }
}

#[test]
fn types_are_introduced_one_by_one_and_counted() {
    let mut machine = with_key();
    let unknown_key = Payload::type_introduced(1, DekId::from_bytes([8; 16]), b"name");
    assert_eq!(machine.apply(&entry(1, 2, unknown_key)), Applied::Stale);
    assert_eq!(machine.apply(&entry(1, 3, Payload::type_introduced(2, DEK, b"name"))), Applied::Stale);
    assert_eq!(machine.apply(&entry(1, 4, Payload::type_introduced(1, DEK, b"name"))), Applied::Introduced);
    assert_eq!(machine.apply(&entry(1, 5, Payload::type_introduced(1, DEK, b"name"))), Applied::Stale);
    let long = [b'n'; SEALED_NAME_MAX + 1];
    assert_eq!(machine.apply(&entry(1, 5, Payload::type_introduced(2, DEK, &long))), Applied::Stale);
    let mut header = Head::of(&machine).draft(1, 5_000, &[(session(1), 1, 1, 4)]);
    header.types = vec![TypeRow { handle: 0, count: 1, bytes: 5 }, TypeRow { handle: 1, count: 3, bytes: 30 }];
    machine.apply(&entry(1, 6, sealed(&header, 1)));
    let counted = &machine.state().types[0];
    assert_eq!((counted.events, counted.bytes, counted.modified_ms), (3, 30, 5_000));
    assert_eq!(machine.state().bytes, 35);
}

#[test]
fn the_names_of_types_cannot_fill_the_state() {
    let mut machine = with_key();
    let name = [b'n'; SEALED_NAME_MAX];
    for n in 1..=TYPES_MAX as u32 + 5 {
        let introduced = machine.apply(&entry(1, u64::from(n) + 1, Payload::type_introduced(n, DEK, &name)));
        let expected = if n as usize <= TYPES_MAX { Applied::Introduced } else { Applied::Stale };
        assert_eq!(introduced, expected, "{n}");
    }
    assert!(machine.snapshot().len() < TYPES_MAX * (SEALED_NAME_MAX + 64));
}

#[test]
fn a_state_survives_its_checkpoint_and_damage_to_it_is_noticed() {
    let mut machine = with_key();
    machine.apply(&entry(1, 2, Payload::type_introduced(1, DEK, b"name")));
    for n in 0..5 {
        let header = Head::of(&machine).draft(1, 5_000 + n, &[(session(n as u8), 1, 1, 2)]);
        machine.apply(&entry(1, 3 + n, sealed(&header, n as u8)));
    }
    let bytes = machine.snapshot();
    let mut other = self::machine();
    other.restore_checkpoint(&bytes).expect("it is a checkpoint");
    assert_eq!(other.snapshot(), bytes);
    assert_eq!(other.tail.high_watermark(), Offset(11));
    for at in 0..bytes.len() {
        let mut flipped = bytes.to_vec();
        flipped[at] ^= 1;
        assert!(checkpoint::decode(&context(), &flipped.into()).is_err(), "byte {at}");
        assert!(checkpoint::decode(&context(), &bytes.slice(..at)).is_err(), "cut at {at}");
    }
    let elsewhere = PartitionContext { partition: Partition(1), ..context() };
    assert!(checkpoint::decode(&elsewhere, &bytes).is_err(), "a state of another partition");
}

/// What happens to a leader's proposals on their way into the log.
#[derive(Debug, Clone)]
enum Step {
    /// The leader prepares a batch for its predicted head.
    Propose { session: u8, epoch: u32, count: u32, retry: bool, clock: u64 },
    /// The oldest prepared batch reaches the log.
    Deliver,
    /// A prepared batch reaches the log out of turn.
    DeliverAny(usize),
    /// A batch that reached the log reaches it again.
    Repeat(usize),
    /// A prepared batch is lost.
    Lose(usize),
    /// The leader starts over from the applied head, perhaps as a new leader; what was prepared may still arrive.
    Restart { new_term: bool },
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (0_u8..4, 1_u32..3, 1_u32..4, any::<bool>(), 4_000_u64..6_000)
            .prop_map(|(session, epoch, count, retry, clock)| Step::Propose { session, epoch, count, retry, clock }),
        5 => Just(Step::Deliver),
        1 => any::<usize>().prop_map(Step::DeliverAny),
        1 => any::<usize>().prop_map(Step::Repeat),
        1 => any::<usize>().prop_map(Step::Lose),
        1 => any::<bool>().prop_map(|new_term| Step::Restart { new_term }),
    ]
}

/// The events that must be there: offset to producer and sequence.
#[derive(Default)]
struct Model {
    events: Vec<(SessionId, u32, u64)>,
    newest: HashMap<SessionId, (u32, u64)>,
}

impl Model {
    fn accept(&mut self, header: &BatchHeader) {
        for row in &header.producers {
            for sequence in row.first_sequence..=row.last_sequence() {
                let newest = self.newest.entry(row.session).or_default();
                assert!((row.epoch, sequence) > *newest, "an event is taken once, and never after a later one");
                *newest = (row.epoch, sequence);
                self.events.push((row.session, row.epoch, sequence));
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn the_log_may_bring_anything_and_the_partition_stays_dense_ordered_and_without_repeats(
        steps in prop::collection::vec(step(), 1..80),
        restore_at in 0_usize..80,
    ) {
        let mut machine = with_key();
        let mut twin = with_key();
        let mut model = Model::default();
        let (mut term, mut index) = (1, 2);
        let mut head = Head::of(&machine);
        let mut sequences: HashMap<(u8, u32), u64> = HashMap::new();
        let mut prepared: Vec<(u64, BatchHeader, Bytes)> = Vec::new();
        let mut logged: Vec<(u64, BatchHeader, Bytes)> = Vec::new();
        let mut last_id = Rlid::default();
        for (at, step) in steps.into_iter().enumerate() {
            let mut arriving = None;
            match step {
                Step::Propose { session: n, epoch, count, retry, clock } => {
                    let next = sequences.entry((n, epoch)).or_insert(1);
                    let first = if retry { next.saturating_sub(1).max(1) } else { *next };
                    *next = (*next).max(first + u64::from(count));
                    let header = head.draft(term, clock, &[(session(n), epoch, first, count)]);
                    let bytes = sealed(&header, at as u8);
                    head.advance(&header, &bytes);
                    prepared.push((term, header, bytes));
                }
                Step::Deliver if !prepared.is_empty() => arriving = Some(prepared.remove(0)),
                Step::DeliverAny(n) if !prepared.is_empty() => arriving = Some(prepared.remove(n % prepared.len())),
                Step::Repeat(n) if !logged.is_empty() => arriving = Some(logged[n % logged.len()].clone()),
                Step::Lose(n) if !prepared.is_empty() => { prepared.remove(n % prepared.len()); }
                Step::Restart { new_term } => {
                    term += u64::from(new_term);
                    head = Head::of(&machine);
                }
                _ => {}
            }
            if at == restore_at {
                let bytes = twin.snapshot();
                twin = self::machine();
                twin.restore(&bytes).expect("a snapshot restores");
            }
            let Some((of_term, header, bytes)) = arriving else { continue };
            let arrived = entry(of_term, index, bytes.clone());
            index += 1;
            let applied = machine.apply(&arrived);
            prop_assert_eq!(&applied, &twin.apply(&arrived), "replicas agree, restored or not");
            if let Applied::Batch { base, committed_ms } = applied {
                prop_assert_eq!(base.0, model.events.len() as u64 + 1, "offsets have no holes");
                prop_assert!(header.first_id > last_id, "ids increase");
                prop_assert_eq!(committed_ms, header.first_id.unix_ms());
                last_id = header.last_id;
                model.accept(&header);
            }
            logged.push((of_term, header, bytes));
            prop_assert_eq!(machine.state().next_offset.0, model.events.len() as u64 + 1);
            prop_assert_eq!(machine.snapshot(), twin.snapshot());
        }
    }
}
