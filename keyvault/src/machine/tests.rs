use std::collections::BTreeMap;

use ensign_proto::pb::vault::v1 as pb;
use ensign_proto::{LogIndex, Term};
use ensign_storage::EntryId;
use proptest::prelude::*;

use super::*;
use crate::lease::LeaseTerms;
use crate::wire::Dead;

mod receipts;
mod rings;

fn bytes(byte: u8, len: usize) -> Bytes {
    vec![byte; len].into()
}

fn kek(byte: u8) -> Kek {
    Kek { id: bytes(byte, 32), boxed: bytes(byte, 112), master_epoch: 1 }
}

fn custody(node: u64, topic: u8) -> Custody {
    Custody { node, project: bytes(9, 16), topic: bytes(topic, 16), partition: 0 }
}

fn initialize(lease: Option<LeaseTerms>) -> Initialize {
    Initialize {
        cluster: bytes(1, 16),
        master_box: bytes(2, 112),
        root_id: bytes(3, 16),
        root_version: 1,
        lease,
        kind: 0,
        reference: String::new(),
    }
}

fn terms(seconds: u64) -> LeaseTerms {
    LeaseTerms { length_ms: seconds * 1_000, drift_ppm: 110_000, margin_ms: 2_000 }
}

struct Driver {
    machine: VaultMachine,
    index: u64,
}

impl Driver {
    fn new() -> Self {
        let mut driver = Self { machine: VaultMachine::default(), index: 0 };
        driver.apply(Change::Initialize(initialize(Some(terms(10))))).unwrap();
        driver
    }

    fn set_lease(&mut self, seconds: u64) -> LogIndex {
        self.apply(Change::SetLease(SetLease { terms: terms(seconds) })).unwrap();
        LogIndex(self.index)
    }

    fn settle(&mut self, changed: LogIndex) -> Outcome {
        self.apply(Change::SettleLease(SettleLease { changed: changed.0 }))
    }

    fn apply(&mut self, change: Change) -> Outcome {
        self.index += 1;
        let payload = Command::new(1_000 + self.index, "tester", change).to_payload();
        let id = EntryId { term: Term(1), index: LogIndex(self.index) };
        self.machine.apply(&CommittedEntry { id, payload })
    }

    fn state(&self) -> &State {
        self.machine.state().unwrap()
    }

    fn create(&mut self, ring: u8) -> Outcome {
        self.apply(Change::CreateRing(CreateRing {
            ring: bytes(ring, 16),
            project: bytes(9, 16),
            alg: 1,
            kek: kek(ring),
            name: String::new(),
        }))
    }

    fn rotate(&mut self, ring: u8, version: u32, expected: u32) -> Outcome {
        self.apply(Change::Rotate(Rotate { ring: bytes(ring, 16), version, expected, kek: kek(version as u8) }))
    }

    fn revoke(&mut self, ring: u8, version: u32) -> Outcome {
        self.apply(Change::Revoke(Revoke { ring: bytes(ring, 16), version }))
    }

    fn drain(&mut self, ring: u8, revoking: u64) -> Outcome {
        self.apply(Change::Drain(Drain {
            ring: bytes(ring, 16),
            revoking,
            surrendered: vec![1],
            waited: vec![2],
            w_ms: 14_472,
            voters: vec![1, 2, 3],
        }))
    }
}

fn reason(outcome: &Outcome) -> Option<Reason> {
    outcome.as_ref().err().map(|refusal| refusal.reason)
}

fn states(outcome: Outcome) -> Vec<pb::VersionState> {
    let Ok(Done::Ring(ring)) = outcome else { panic!("{outcome:?}") };
    ring.versions.iter().map(pb::Version::state).collect()
}

#[test]
fn nothing_happens_before_the_vault_is_initialized() {
    let mut driver = Driver { machine: VaultMachine::default(), index: 0 };
    assert_eq!(reason(&driver.create(1)), Some(Reason::Sealed));
}

#[test]
fn what_older_builds_could_not_respect_is_written_as_they_cannot_read_it() {
    let command = |change| Command::new(1, "tester", change).to_payload()[0];
    assert_eq!(command(Change::Seal(Hold {})), 4);
    assert_eq!(command(Change::Lift(Hold {})), 4);
    let outside = |kind| Initialize { kind, reference: "kms/key".to_owned(), ..initialize(Some(terms(10))) };
    assert_eq!(command(Change::Initialize(outside(2))), 4);

    // A snapshot that forgot the seal would have an older build, or a restored one, grant again.
    let mut driver = Driver::new();
    assert_eq!(driver.machine.snapshot()[0], 2);
    driver.apply(Change::Seal(Hold {})).unwrap();
    assert_eq!(driver.machine.snapshot()[0], 3);
    let mut restored = VaultMachine::default();
    restored.restore(&driver.machine.snapshot()).unwrap();
    assert_eq!(restored.state(), driver.machine.state());
    assert_eq!(
        restored.state().unwrap().hold.as_ref().map(|hold| (hold.index, &*hold.actor)),
        Some((LogIndex(2), "tester"))
    );
    driver.apply(Change::Lift(Hold {})).unwrap();
    assert_eq!(driver.machine.snapshot()[0], 2);

    let mut driver = Driver { machine: VaultMachine::default(), index: 0 };
    driver.apply(Change::Initialize(outside(3))).unwrap();
    assert_eq!(driver.machine.snapshot()[0], 3);
    restored.restore(&driver.machine.snapshot()).unwrap();
    let master = restored.state().unwrap().master.as_ref().unwrap();
    assert_eq!((master.kind, &*master.reference), (3, "kms/key"));
    let large = Initialize { master_box: bytes(2, crate::root::BLOB_MAX + 1), ..outside(3) };
    let mut driver = Driver { machine: VaultMachine::default(), index: 0 };
    assert_eq!(reason(&driver.apply(Change::Initialize(large))), Some(Reason::Invalid));
}

#[test]
fn a_seal_and_its_lift_are_recorded_and_each_seal_is_one_of_its_own() {
    let mut driver = Driver::new();
    let recorded = |driver: &Driver| driver.state().audit_seq;
    let before = recorded(&driver);
    assert_eq!(driver.apply(Change::Lift(Hold {})), Ok(Done::Hold(LogIndex(2))));
    assert_eq!(recorded(&driver), before, "there was nothing to lift");
    assert_eq!(driver.apply(Change::Seal(Hold {})), Ok(Done::Hold(LogIndex(3))));
    assert_eq!(driver.apply(Change::Seal(Hold {})), Ok(Done::Hold(LogIndex(4))));
    assert_eq!(driver.state().hold.as_ref().unwrap().index, LogIndex(4));
    assert_eq!(driver.apply(Change::Lift(Hold {})), Ok(Done::Hold(LogIndex(5))));
    assert_eq!((driver.state().hold.clone(), recorded(&driver)), (None, before + 3));
}

#[test]
fn the_first_root_key_stays_the_root_key() {
    let mut driver = Driver::new();
    let again = |root: u8| {
        Change::Initialize(Initialize { master_box: bytes(7, 112), root_id: bytes(root, 16), ..initialize(None) })
    };
    assert_eq!(driver.apply(again(3)), Ok(Done::Initialized));
    assert_eq!(reason(&driver.apply(again(4))), Some(Reason::AlreadyExists));
    assert_eq!(driver.state().master.as_ref().unwrap().boxed, bytes(2, 112));
}

#[test]
fn a_rotation_retires_the_active_version_and_a_retry_does_not_rotate_twice() {
    let mut driver = Driver::new();
    driver.create(1).unwrap();
    assert_eq!(states(driver.create(1)), [pb::VersionState::Active], "creating it again changes nothing");
    assert_eq!(states(driver.rotate(1, 2, 1)), [pb::VersionState::Retired, pb::VersionState::Active]);
    assert_eq!(reason(&driver.rotate(1, 3, 1)), Some(Reason::Conflict));
    assert_eq!(reason(&driver.rotate(1, 2, 0)), Some(Reason::Conflict), "its box is for a version that exists");
    assert_eq!(driver.rotate(1, 3, 0).map(|_| ()), Ok(()));
    assert_eq!(reason(&driver.rotate(8, 2, 0)), Some(Reason::NotFound));
}

#[test]
fn a_revoked_key_leaves_the_state_and_a_receipt_stays() {
    let mut driver = Driver::new();
    driver.create(1).unwrap();
    driver.rotate(1, 2, 0).unwrap();
    let Ok(Done::Revoking(index)) = driver.revoke(1, 1) else { panic!() };
    assert_eq!(driver.revoke(1, 1), Ok(Done::Revoking(index)), "ordered once");
    assert_eq!(driver.state().epoch, 1);

    let Ok(Done::Revoked(receipt)) = driver.drain(1, index.0) else { panic!() };
    assert_eq!(driver.state().epoch, 2);
    assert_eq!((receipt.epoch, receipt.versions.len(), receipt.all), (2, 1, false));
    assert_eq!((receipt.surrendered.clone(), receipt.waited.clone()), (vec![1], vec![2]));
    assert_eq!(receipt.audit_this, driver.state().audit_head[..]);
    assert_eq!(driver.drain(1, index.0), Ok(Done::Revoked(receipt.clone())), "drained once");
    assert_eq!(driver.revoke(1, 1), Ok(Done::Revoked(receipt)));
    assert_eq!(driver.state().epoch, 2);

    let ring = driver.state().rings.values().next().unwrap();
    assert!(ring.versions.values().next().unwrap().boxed.is_empty());
    assert!(!ring.versions.values().nth(1).unwrap().boxed.is_empty());
    assert_eq!(reason(&driver.drain(1, 77)), Some(Reason::NotFound));
    assert_eq!(reason(&driver.revoke(1, 9)), Some(Reason::NotFound));
}

#[test]
fn a_revoked_ring_is_closed_for_ever() {
    let mut driver = Driver::new();
    driver.create(1).unwrap();
    driver.rotate(1, 2, 0).unwrap();
    let Ok(Done::Revoking(first)) = driver.revoke(1, 1) else { panic!() };
    let Ok(Done::Revoking(all)) = driver.revoke(1, 0) else { panic!() };
    assert_ne!(first, all);
    assert_eq!(reason(&driver.rotate(1, 3, 0)), Some(Reason::Revoked));
    let Ok(Done::Revoked(receipt)) = driver.drain(1, all.0) else { panic!() };
    assert_eq!(receipt.versions.iter().map(|revoked| revoked.version).collect::<Vec<_>>(), [2]);
    assert_eq!(driver.revoke(1, 0), Ok(Done::Revoked(receipt)));
    assert!(matches!(driver.drain(1, first.0), Ok(Done::Revoked(_))));
    assert!(driver.state().rings.values().all(|ring| ring.versions.values().all(|version| version.boxed.is_empty())));
}

#[test]
fn a_secret_changes_by_its_revision() {
    let mut driver = Driver::new();
    let put = |driver: &mut Driver, revision: u64| {
        driver.apply(Change::PutSecret(PutSecret {
            kind: 2,
            id: bytes(5, 16),
            revision,
            boxed: bytes(revision as u8, 100),
            master_epoch: 1,
        }))
    };
    let delete = |driver: &mut Driver, expected: u64| {
        driver.apply(Change::DeleteSecret(DeleteSecret { kind: 2, id: bytes(5, 16), expected }))
    };
    put(&mut driver, 1).unwrap();
    assert_eq!(reason(&put(&mut driver, 1)), Some(Reason::Conflict));
    assert_eq!(reason(&put(&mut driver, 3)), Some(Reason::Conflict));
    put(&mut driver, 2).unwrap();
    assert_eq!(reason(&delete(&mut driver, 1)), Some(Reason::Conflict));
    delete(&mut driver, 2).unwrap();
    delete(&mut driver, 0).unwrap();
    put(&mut driver, 1).unwrap();
}

#[test]
fn the_chain_of_changes_has_a_link_for_each() {
    let mut driver = Driver::new();
    let mut heads = vec![driver.state().audit_head];
    driver.create(1).unwrap();
    heads.push(driver.state().audit_head);
    driver.rotate(1, 2, 0).unwrap();
    heads.push(driver.state().audit_head);
    driver.rotate(1, 2, 0).unwrap_err();
    assert_eq!(driver.state().audit_head, heads[2], "what has no effect has no link");
    assert_eq!(driver.state().audit_seq, 3);
    heads.dedup();
    assert_eq!(heads.len(), 3);
}

#[test]
fn a_shorter_lease_is_waited_for_as_the_longer_one_until_that_has_run_out() {
    let mut driver = Driver::new();
    assert_eq!(driver.state().lease_wait(), terms(10).wait());
    driver.set_lease(60);
    assert_eq!(driver.state().lease_wait(), terms(60).wait());
    let shorter = driver.set_lease(3);
    assert_eq!(driver.state().lease, Some(terms(3)));
    assert_eq!(driver.state().lease_wait(), terms(60).wait(), "leases of a minute may be running");
    assert_eq!(reason(&driver.settle(LogIndex(shorter.0 - 1))), Some(Reason::Conflict));
    assert_eq!(driver.state().lease_wait(), terms(60).wait());
    // The same again is no change, and ends no wait either.
    driver.set_lease(3);
    assert_eq!(driver.state().lease_wait(), terms(60).wait());
    driver.settle(shorter).unwrap();
    assert_eq!(driver.state().lease_wait(), terms(3).wait());
    let mut restored = VaultMachine::default();
    restored.restore(&driver.machine.snapshot()).unwrap();
    assert_eq!(restored.state().unwrap(), driver.state());
}

#[test]
fn terms_that_would_not_be_safe_are_refused() {
    let mut driver = Driver::new();
    let good = terms(10);
    for bad in [
        LeaseTerms { length_ms: 2_999, ..good },
        LeaseTerms { length_ms: 60_001, ..good },
        LeaseTerms { drift_ppm: 999, ..good },
        LeaseTerms { drift_ppm: 200_001, ..good },
        LeaseTerms { margin_ms: 30_001, ..good },
    ] {
        let outcome = driver.apply(Change::SetLease(SetLease { terms: bad }));
        assert_eq!(reason(&outcome), Some(Reason::Invalid), "{bad:?}");
        assert_eq!(driver.state().lease, Some(good));
    }
}

#[test]
fn only_what_older_builds_cannot_read_is_written_as_version_two() {
    let version = |change| Command::new(1, "tester", change).to_payload()[0];
    assert_eq!(version(Change::SetLease(SetLease { terms: terms(10) })), 2);
    assert_eq!(version(Change::SettleLease(SettleLease { changed: 1 })), 2);
    assert_eq!(version(Change::Initialize(initialize(Some(terms(10))))), 2);
    assert_eq!(version(Change::Initialize(initialize(None))), 1);
    assert_eq!(version(Change::Revoke(Revoke { ring: bytes(1, 16), version: 0 })), 1);
}

#[test]
fn a_batch_of_custody_is_what_the_same_records_one_by_one_are_but_for_the_place_in_the_log() {
    let records: Vec<Custody> = (0..40).map(|n| custody(1 + n % 3, 10 + (n / 3) as u8)).collect();
    let mut one_by_one = Driver::new();
    for record in &records {
        one_by_one.apply(Change::PutCustody(record.clone())).unwrap();
    }
    let mut batched = Driver::new();
    let before = batched.state().audit_seq;
    let batch = Custodies { custody: records.clone() };
    batched.apply(Change::PutCustodies(batch.clone())).unwrap();
    assert_eq!(batched.state().custody, one_by_one.state().custody);
    assert_eq!(batched.state().custody.len(), 40);
    assert_eq!(batched.state().audit_seq, before + 40, "one link of the chain for each record");
    assert_eq!(batched.state().audit_seq, one_by_one.state().audit_seq);

    let head = batched.state().audit_head;
    batched.apply(Change::PutCustodies(batch.clone())).unwrap();
    assert_eq!(batched.state().audit_head, head, "again changes nothing");

    let mut restored = VaultMachine::default();
    restored.restore(&batched.machine.snapshot()).unwrap();
    assert_eq!(restored.state(), batched.machine.state());

    batched.apply(Change::DropCustodies(batch)).unwrap();
    assert!(batched.state().custody.is_empty());
    let dead =
        batched.state().events.iter().filter(|event| matches!(event.what, What::Dead(Dead::Custody(..)))).count();
    assert_eq!(dead, 40, "holders hear of each");
}

#[test]
fn a_batch_of_custody_with_one_record_that_cannot_be_read_changes_nothing() {
    let mut driver = Driver::new();
    let mut records = vec![custody(1, 1), custody(2, 1)];
    records.push(Custody { topic: bytes(1, 3), ..custody(3, 1) });
    let outcome = driver.apply(Change::PutCustodies(Custodies { custody: records }));
    assert_eq!(reason(&outcome), Some(Reason::Invalid));
    let many = (0..=CUSTODIES_MAX as u64).map(|node| custody(1 + node, 1)).collect();
    let outcome = driver.apply(Change::PutCustodies(Custodies { custody: many }));
    assert_eq!(reason(&outcome), Some(Reason::Invalid));
    assert!(driver.state().custody.is_empty());
}

#[test]
fn only_a_batch_of_custody_is_written_so_that_older_builds_cannot_read_it() {
    let version = |change: Change| Command::new(1, "tester", change).to_payload()[0];
    assert_eq!(version(Change::PutCustody(custody(1, 1))), 1);
    assert_eq!(version(Change::PutCustodies(Custodies { custody: vec![custody(1, 1)] })), 3);
    assert_eq!(version(Change::DropCustodies(Custodies { custody: vec![custody(1, 1)] })), 3);
}

/// A snapshot that the first format wrote: one ring, and no word about leases.
const FIRST_SNAPSHOT: &str = include_str!("tests/snapshot-1.hex");

/// What the second format wrote of a ring that was rotated once.
const SECOND_SNAPSHOT: &str = include_str!("tests/snapshot-2.hex");

fn stored(hex: &str) -> Bytes {
    let byte = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap();
    hex.trim().as_bytes().chunks(2).map(byte).collect()
}

#[test]
fn a_snapshot_of_the_second_format_opens_with_everything_switched_on_and_nothing_set() {
    let bytes = stored(SECOND_SNAPSHOT);
    assert_eq!(bytes[0], 2);
    let mut driver = Driver { machine: VaultMachine::default(), index: 3 };
    driver.machine.restore(&bytes).unwrap();
    let ring = driver.state().rings.values().next().unwrap();
    let versions: Vec<_> = ring.versions.values().map(|it| (it.state, it.switch, it.alg)).collect();
    let alg = ensign_proto::Algorithm::Aes256Gcm;
    let expected = [(state::VersionState::Retired, Switch::On, alg), (state::VersionState::Active, Switch::On, alg)];
    assert_eq!(versions, expected);
    assert_eq!((&*ring.name, ring.switch, ring.rotation_ms, ring.alg), ("", Switch::On, 0, alg));
    assert!(driver.create(1).is_ok(), "it is the ring that it was");
    driver.rotate(1, 3, 2).unwrap();
}

#[test]
fn a_snapshot_of_the_first_format_opens_and_waits_for_the_longest_lease_there_is() {
    let stored = stored(FIRST_SNAPSHOT);
    assert_eq!(stored[0], 1);
    let mut driver = Driver { machine: VaultMachine::default(), index: 2 };
    driver.machine.restore(&stored).unwrap();
    assert_eq!((driver.state().rings.len(), driver.state().lease), (1, None));
    assert_eq!(driver.state().lease_wait(), LeaseTerms::LONGEST.wait());
    let changed = driver.set_lease(10);
    assert_eq!(driver.state().lease_wait(), LeaseTerms::LONGEST.wait(), "nobody wrote down what was granted");
    driver.settle(changed).unwrap();
    assert_eq!(driver.state().lease_wait(), terms(10).wait());
}

#[test]
fn a_command_of_a_newer_build_stops_the_machine() {
    let mut driver = Driver::new();
    driver.create(1).unwrap();
    let id = EntryId { term: Term(1), index: LogIndex(9) };
    let newer = CommittedEntry { id, payload: Bytes::from_static(&[5, 0]) };
    assert_eq!(reason(&driver.machine.apply(&newer)), Some(Reason::Sealed));
    assert!(driver.machine.state().is_none());
    assert_eq!(reason(&driver.create(2)), Some(Reason::Sealed));
    let snapshot = driver.machine.snapshot();
    assert!(VaultMachine::default().restore(&snapshot).is_err());
}

#[test]
fn a_damaged_snapshot_is_refused() {
    let mut driver = Driver::new();
    driver.create(1).unwrap();
    let good = driver.machine.snapshot();
    for at in 0..good.len() {
        let mut bad = good.to_vec();
        bad[at] ^= 1;
        assert!(VaultMachine::default().restore(&bad.into()).is_err(), "byte {at}");
        assert!(VaultMachine::default().restore(&good.slice(..at)).is_err(), "{at} bytes");
    }
}

/// What the tests below believe about a ring.
#[derive(Debug, Clone, Default, PartialEq)]
struct Model {
    versions: BTreeMap<u32, char>,
    closed: bool,
}

#[derive(Debug, Clone)]
enum Step {
    Create(u8),
    Rotate(u8, u32),
    Revoke(u8, u32),
    DrainOldest(u8),
    Custody(u8, bool),
    Custodies(Vec<u8>, bool),
    Restart,
}

fn ring_numbers() -> std::ops::Range<u8> {
    1..4
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let ring = ring_numbers();
    let step = prop_oneof![
        2 => ring.clone().prop_map(Step::Create),
        4 => (ring.clone(), 0..4_u32).prop_map(|(ring, expected)| Step::Rotate(ring, expected)),
        3 => (ring.clone(), 0..4_u32).prop_map(|(ring, version)| Step::Revoke(ring, version)),
        3 => ring.clone().prop_map(Step::DrainOldest),
        1 => (ring, any::<bool>()).prop_map(|(node, put)| Step::Custody(node, put)),
        1 => (prop::collection::vec(ring_numbers(), 0..4), any::<bool>()).prop_map(|(nodes, put)| Step::Custodies(nodes, put)),
        1 => Just(Step::Restart),
    ];
    prop::collection::vec(step, 1..60)
}

fn seen(state: &State) -> BTreeMap<u8, Model> {
    let ring = |(id, ring): (&ensign_proto::RingId, &state::Ring)| {
        let letter = |version: &Version| match version.state {
            state::VersionState::Active => 'A',
            state::VersionState::Retired => 'T',
            state::VersionState::Revoking => 'G',
            state::VersionState::Revoked => 'R',
        };
        let versions = ring.versions.iter().map(|(number, version)| (number.0, letter(version))).collect();
        (id.as_bytes()[0], Model { versions, closed: ring.closed })
    };
    state.rings.iter().map(ring).collect()
}

proptest! {
    #[test]
    fn rings_follow_the_model_and_survive_every_restart(steps in steps()) {
        let mut driver = Driver::new();
        let mut model: BTreeMap<u8, Model> = BTreeMap::new();
        let mut epoch = 1;
        for step in steps {
            match step {
                Step::Create(ring) => {
                    prop_assert!(driver.create(ring).is_ok());
                    model.entry(ring).or_insert_with(|| Model { versions: [(1, 'A')].into(), closed: false });
                }
                Step::Rotate(ring, expected) => {
                    let known = model.get_mut(&ring);
                    let next = known.as_ref().map_or(1, |ring| ring.versions.len() as u32 + 1);
                    let outcome = driver.rotate(ring, next, expected);
                    let active = known.as_ref().and_then(|ring| ring.versions.iter().find(|(_, s)| **s == 'A')).map_or(0, |(v, _)| *v);
                    match known {
                        Some(known) if !known.closed && (expected == 0 || expected == active) => {
                            prop_assert!(outcome.is_ok());
                            known.versions.insert(next, 'A');
                            if active != 0 {
                                known.versions.insert(active, 'T');
                            }
                        }
                        _ => prop_assert!(outcome.is_err()),
                    }
                }
                Step::Revoke(ring, version) => {
                    let outcome = driver.revoke(ring, version);
                    match model.get_mut(&ring) {
                        Some(known) if version == 0 => {
                            prop_assert!(outcome.is_ok());
                            known.closed = true;
                            known.versions.values_mut().filter(|s| "AT".contains(**s)).for_each(|s| *s = 'G');
                        }
                        Some(known) if known.versions.contains_key(&version) => {
                            prop_assert!(outcome.is_ok());
                            known.versions.entry(version).and_modify(|s| if "AT".contains(*s) { *s = 'G' });
                        }
                        _ => prop_assert!(outcome.is_err()),
                    }
                }
                Step::DrainOldest(ring) => {
                    let id = ensign_proto::RingId::from_bytes([ring; 16]);
                    let oldest = driver.state().rings.get(&id).and_then(|ring| ring.revocations.first().cloned());
                    if let Some(oldest) = oldest {
                        prop_assert!(matches!(driver.drain(ring, oldest.id.index.0), Ok(Done::Revoked(_))));
                        epoch += 1;
                        for version in oldest.versions {
                            model.get_mut(&ring).unwrap().versions.insert(version.0, 'R');
                        }
                    }
                }
                Step::Custodies(nodes, put) => {
                    let custody: Vec<_> = nodes.iter().map(|node| custody(u64::from(*node), 8)).collect();
                    let batch = Custodies { custody };
                    let change = if put { Change::PutCustodies(batch) } else { Change::DropCustodies(batch) };
                    prop_assert!(driver.apply(change).is_ok());
                    let has = |node: &u8| driver.state().custody.iter().any(|key| key.node.0 == u64::from(*node));
                    prop_assert!(nodes.iter().all(|node| has(node) == put));
                }
                Step::Custody(node, put) => {
                    let custody = custody(u64::from(node), 8);
                    let change = if put { Change::PutCustody(custody) } else { Change::DropCustody(custody) };
                    prop_assert!(driver.apply(change).is_ok());
                    prop_assert_eq!(driver.state().custody.iter().any(|key| key.node.0 == u64::from(node)), put);
                }
                Step::Restart => {
                    let mut restored = VaultMachine::default();
                    restored.restore(&driver.machine.snapshot()).unwrap();
                    prop_assert_eq!(restored.state(), driver.machine.state());
                    driver.machine = restored;
                }
            }
            prop_assert_eq!(&seen(driver.state()), &model);
            prop_assert_eq!(driver.state().epoch, epoch);
            for ring in driver.state().rings.values() {
                for version in ring.versions.values() {
                    prop_assert_eq!(version.boxed.is_empty(), version.state == state::VersionState::Revoked);
                }
                prop_assert!(ring.versions.values().filter(|version| version.state == state::VersionState::Active).count() <= 1);
            }
        }
    }
}
