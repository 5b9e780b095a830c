//! What is done to a ring beside making, rotating and revoking it: cases by name, then every order of everything against a model.

use std::collections::{BTreeMap, BTreeSet};

use ensign_proto::{Algorithm, KeyVersion, RingId};
use proptest::prelude::*;

use super::*;
use crate::machine::state::VersionState;

const RING: RingId = RingId::from_bytes([1; 16]);
const MINUTE: u64 = 60_000;

impl Driver {
    fn with_ring(versions: u32) -> Self {
        let mut driver = Self::new();
        driver.create(1).unwrap();
        for version in 2..=versions {
            driver.rotate(1, version, 0).unwrap();
        }
        driver
    }

    fn target(version: u32) -> Target {
        Target { ring: bytes(1, 16), version }
    }

    fn disable(&mut self, version: u32) -> Outcome {
        self.apply(Change::Disable(Self::target(version)))
    }

    fn settle_disable(&mut self, order: u64) -> Outcome {
        self.apply(Change::SettleDisable(SettleDisable {
            ring: bytes(1, 16),
            disabling: order,
            ..SettleDisable::default()
        }))
    }

    fn enable(&mut self, version: u32) -> Outcome {
        self.apply(Change::Enable(Self::target(version)))
    }

    fn schedule(&mut self, version: u32, after_ms: u64) -> Outcome {
        self.apply(Change::ScheduleRevoke(ScheduleRevoke { ring: bytes(1, 16), version, after_ms }))
    }

    fn cancel(&mut self, version: u32) -> Outcome {
        self.apply(Change::CancelRevoke(Self::target(version)))
    }

    fn elapse(&mut self, ms: u64) {
        self.apply(Change::Elapse(Elapse { ms })).unwrap();
    }

    fn revoke_due(&mut self, scheduled: u64) -> Outcome {
        self.apply(Change::RevokeDue(RevokeDue { ring: bytes(1, 16), scheduled }))
    }

    fn set(&mut self, rotation_ms: u64, alg: u32) -> Outcome {
        self.apply(Change::SetRing(SetRing { ring: bytes(1, 16), rotation_ms, alg }))
    }

    fn ring(&self) -> &Ring {
        &self.state().rings[&RING]
    }

    /// What the vault would unwrap, and what it would seal with.
    fn grants(&self) -> (BTreeSet<u32>, Option<u32>) {
        let ring = self.ring();
        let open = ring.versions.keys().filter(|version| ring.openable(RING, **version).is_ok());
        (open.map(|version| version.0).collect(), ring.sealable(RING).ok().map(|version| version.0))
    }

    fn restart(&mut self) {
        let mut restored = VaultMachine::default();
        restored.restore(&self.machine.snapshot()).unwrap();
        assert_eq!(restored.state(), self.machine.state());
        self.machine = restored;
    }
}

fn order(outcome: Outcome) -> u64 {
    match outcome {
        Ok(Done::Disabling(index) | Done::Revoking(index)) => index.0,
        other => panic!("{other:?}"),
    }
}

fn message(outcome: Outcome) -> String {
    outcome.unwrap_err().message
}

#[test]
fn nothing_is_granted_from_the_order_to_disable_on_and_all_of_it_again_when_it_is_enabled() {
    let mut driver = Driver::with_ring(2);
    let index = order(driver.disable(1));
    assert_eq!(driver.grants(), ([2].into(), Some(2)), "before any holder has heard of it");
    assert_eq!(order(driver.disable(1)), index, "ordered once");
    let epoch = driver.state().epoch;
    let Ok(Done::Ring(ring)) = driver.settle_disable(index) else { panic!() };
    assert_eq!((ring.index, ring.versions[0].state()), (index, pb::VersionState::Disabled));
    assert_eq!(driver.state().epoch, epoch + 1, "a vault that is set back is not believed");
    let head = driver.state().audit_head;
    driver.settle_disable(index).unwrap();
    assert_eq!((driver.state().epoch, driver.state().audit_head), (epoch + 1, head), "settled once");
    assert_eq!(order(driver.disable(1)), index);
    assert_eq!(states(driver.enable(1)), [pb::VersionState::Retired, pb::VersionState::Active]);
    assert_eq!(driver.grants(), ([1, 2].into(), Some(2)));
}

#[test]
fn the_active_version_comes_back_as_what_it_was_unless_it_was_succeeded() {
    let mut driver = Driver::with_ring(1);
    driver.disable(1).unwrap();
    let refusal = driver.ring().sealable(RING).unwrap_err();
    assert_eq!(refusal.reason, Reason::NoActiveVersion);
    assert!(refusal.message.contains("ensign key enable --ring"), "{}", refusal.message);
    assert!(refusal.message.contains("ensign key rotate --ring"), "{}", refusal.message);
    driver.enable(1).unwrap();
    assert_eq!(driver.grants(), ([1].into(), Some(1)));

    driver.disable(1).unwrap();
    driver.rotate(1, 2, 0).unwrap();
    assert_eq!(driver.grants(), ([2].into(), Some(2)), "a rotation brings nothing back");
    assert_eq!(states(driver.enable(1)), [pb::VersionState::Retired, pb::VersionState::Active]);
}

#[test]
fn a_disabled_ring_grants_nothing_makes_no_version_and_comes_back_with_what_was_disabled_in_it_one_by_one() {
    let mut driver = Driver::with_ring(3);
    driver.disable(1).unwrap();
    let index = order(driver.disable(0));
    assert_eq!(driver.grants(), ([].into(), None));
    assert_eq!(driver.ring().sealable(RING).unwrap_err().reason, Reason::Disabled);
    assert_eq!(driver.ring().openable(RING, KeyVersion(3)).unwrap_err().reason, Reason::Disabled);
    let refused = driver.rotate(1, 4, 0);
    assert_eq!(reason(&refused), Some(Reason::Disabled));
    assert!(message(refused).contains("ensign key enable --ring"));
    driver.settle_disable(index).unwrap();
    driver.enable(2).unwrap();
    assert_eq!(driver.grants(), ([].into(), None), "a version that was enabled all along does not enable its ring");
    driver.enable(0).unwrap();
    assert_eq!(driver.grants(), ([2, 3].into(), Some(3)));
}

#[test]
fn enabling_takes_back_an_order_that_is_under_way() {
    let mut driver = Driver::with_ring(1);
    let first = order(driver.disable(0));
    driver.enable(0).unwrap();
    assert_eq!(reason(&driver.settle_disable(first)), Some(Reason::Conflict));
    let second = order(driver.disable(0));
    assert_ne!(first, second);
    assert_eq!(reason(&driver.settle_disable(first)), Some(Reason::Conflict), "what was waited for is another order");
    driver.settle_disable(second).unwrap();
}

#[test]
fn what_is_revoked_is_neither_disabled_nor_enabled_nor_scheduled_and_says_so() {
    let mut driver = Driver::with_ring(2);
    driver.disable(1).unwrap();
    driver.revoke(1, 1).unwrap();
    for outcome in [driver.enable(1), driver.disable(1), driver.schedule(1, MINUTE), driver.cancel(1)] {
        assert_eq!(reason(&outcome), Some(Reason::Revoked));
        assert!(message(outcome).contains("version 1 of key ring"));
    }
    driver.revoke(1, 0).unwrap();
    for outcome in [
        driver.enable(0),
        driver.disable(2),
        driver.schedule(0, MINUTE),
        driver.cancel(0),
        driver.set(0, 2),
        driver.enable(7),
    ] {
        assert_eq!(reason(&outcome), Some(Reason::Revoked), "{outcome:?}");
    }
}

#[test]
fn a_scheduled_revocation_waits_for_time_that_is_committed_and_begins_in_the_name_of_who_ordered_it() {
    let mut driver = Driver::with_ring(1);
    driver.schedule(1, 3 * MINUTE).unwrap();
    let scheduled = driver.index;
    assert_eq!(driver.grants().1, Some(1), "until then it is used");
    driver.elapse(2 * MINUTE);
    assert_eq!(reason(&driver.revoke_due(scheduled)), Some(Reason::Conflict), "not yet");
    driver.elapse(60 * MINUTE);
    assert_eq!(driver.ring().scheduled[0].waited_ms, 4 * MINUTE, "a step is two minutes at most");
    assert_eq!(reason(&driver.revoke_due(scheduled + 1)), Some(Reason::Conflict), "another order");
    assert!(matches!(driver.revoke_due(scheduled), Ok(Done::Revoking(_))));
    assert_eq!(driver.grants(), ([].into(), None));
    assert_eq!((driver.ring().scheduled.len(), &*driver.ring().revocations[0].actor), (0, "tester"));
    assert_eq!(reason(&driver.revoke_due(scheduled)), Some(Reason::Conflict), "once");
}

#[test]
fn a_cancelled_revocation_never_begins_and_one_that_is_ordered_anew_waits_anew() {
    let mut driver = Driver::with_ring(2);
    driver.schedule(1, MINUTE).unwrap();
    let first = driver.index;
    driver.elapse(MINUTE);
    driver.cancel(1).unwrap();
    assert_eq!(reason(&driver.revoke_due(first)), Some(Reason::Conflict));
    assert_eq!(reason(&driver.cancel(1)), Some(Reason::NotFound));
    driver.schedule(1, MINUTE).unwrap();
    let second = driver.index;
    assert_eq!(reason(&driver.revoke_due(second)), Some(Reason::Conflict));
    let Ok(Done::Ring(again)) = driver.schedule(1, MINUTE) else { panic!() };
    assert_eq!(again.index, second, "a repetition is the same order");
    assert_eq!(reason(&driver.schedule(1, 2 * MINUTE)), Some(Reason::Conflict));
    driver.schedule(0, MINUTE).unwrap();
    assert_eq!(driver.ring().scheduled.len(), 2, "the ring and a version are two orders");
    driver.revoke(1, 1).unwrap();
    assert_eq!(driver.ring().scheduled.len(), 1, "what is revoked now need not be later");
}

#[test]
fn settings_have_bounds_and_an_algorithm_counts_for_what_is_made_from_then_on() {
    const DAY: u64 = 24 * 60 * MINUTE;
    let mut driver = Driver::with_ring(1);
    assert_eq!(driver.ring().rotation_ms(), 90 * DAY);
    for bad in [DAY - 1, 730 * DAY + 1, u64::MAX] {
        assert_eq!(reason(&driver.set(bad, 0)), Some(Reason::Invalid));
    }
    assert_eq!(reason(&driver.set(0, 9)), Some(Reason::Invalid));
    for bad in [0, MINUTE - 1, 366 * DAY, u64::MAX] {
        assert_eq!(reason(&driver.schedule(1, bad)), Some(Reason::Invalid));
    }
    driver.set(DAY, 3).unwrap();
    driver.rotate(1, 2, 0).unwrap();
    driver.set(0, 2).unwrap();
    let algorithms: Vec<_> = driver.ring().versions.values().map(|version| version.alg).collect();
    assert_eq!(algorithms, [Algorithm::Aes256Gcm, Algorithm::Aes128Gcm], "a box stays bound to what it was made with");
    assert_eq!((driver.ring().rotation_ms(), driver.ring().alg), (DAY, Algorithm::Aes192Gcm));
    driver.restart();
    assert!(driver.create(1).is_ok(), "what was set makes it no other ring");
}

#[test]
fn a_rotation_is_due_when_the_active_version_is_old_enough_and_never_for_what_is_out_of_use() {
    let mut driver = Driver::with_ring(2);
    let made = driver.ring().versions[&KeyVersion(2)].created_ms;
    let due = made + driver.ring().rotation_ms();
    assert_eq!(driver.ring().due_rotation(due - 1), None);
    assert_eq!(driver.ring().due_rotation(due), Some(KeyVersion(2)));
    driver.rotate(1, 3, 2).unwrap();
    assert_eq!(driver.ring().due_rotation(due), None, "its successor begins anew");
    assert_eq!(reason(&driver.rotate(1, 4, 2)), Some(Reason::Conflict), "another leader found it due as well");
    driver.disable(3).unwrap();
    assert_eq!(driver.ring().due_rotation(u64::MAX), None);
    driver.enable(3).unwrap();
    driver.disable(0).unwrap();
    assert_eq!(driver.ring().due_rotation(u64::MAX), None);
    driver.enable(0).unwrap();
    driver.revoke(1, 3).unwrap();
    assert_eq!(driver.ring().due_rotation(u64::MAX), None);
}

#[test]
fn names_are_fit_for_shells_and_unique_in_their_project() {
    let mut driver = Driver::with_ring(1);
    let mut create = |ring: u8, project: u8, name: &str| {
        driver.apply(Change::CreateRing(CreateRing {
            ring: bytes(ring, 16),
            project: bytes(project, 16),
            alg: 1,
            kek: kek(ring),
            name: name.to_owned(),
        }))
    };
    let too_long = "x".repeat(65);
    for bad in ["-x", "a b", "a/b", "ü", "01ARZ3NDEKTSV4RRFFQ69G5FAV", &*too_long] {
        assert_eq!(reason(&create(2, 9, bad)), Some(Reason::Invalid), "{bad}");
    }
    create(2, 9, "payments").unwrap();
    create(2, 9, "payments").unwrap();
    assert_eq!(reason(&create(2, 9, "other")), Some(Reason::AlreadyExists));
    assert_eq!(reason(&create(3, 9, "payments")), Some(Reason::AlreadyExists));
    create(3, 8, "payments").unwrap();
    driver.restart();
}

#[test]
fn only_what_is_new_is_written_so_that_older_builds_cannot_read_it() {
    let version = |change| Command::new(1, "tester", change).to_payload()[0];
    assert_eq!(version(Change::Disable(Driver::target(0))), 4);
    assert_eq!(version(Change::Elapse(Elapse { ms: 1 })), 4);
    let create = |name: &str| {
        let name = name.to_owned();
        Change::CreateRing(CreateRing { ring: bytes(1, 16), project: bytes(9, 16), alg: 1, kek: kek(1), name })
    };
    assert_eq!((version(create("")), version(create("payments"))), (1, 4));
    let mut driver = Driver::with_ring(2);
    assert_eq!(driver.machine.snapshot()[0], 2);
    driver.disable(1).unwrap();
    assert_eq!(driver.machine.snapshot()[0], 3);
}

/// What these tests believe about a version: its state, and whether it is switched off (and that complete).
type Believed = (char, Option<bool>);

#[derive(Debug, Clone, Default)]
struct Belief {
    versions: BTreeMap<u32, Believed>,
    off: Option<bool>,
    closed: bool,
    /// By version: asked for and waited, in minutes.
    scheduled: BTreeMap<u32, (u64, u64)>,
}

impl Belief {
    fn living(&self, version: u32) -> Option<Reason> {
        if self.closed {
            return Some(Reason::Revoked);
        }
        match self.versions.get(&version) {
            _ if version == 0 => None,
            None => Some(Reason::NotFound),
            Some(('A' | 'T', _)) => None,
            Some(_) => Some(Reason::Revoked),
        }
    }

    fn off_mut(&mut self, version: u32) -> &mut Option<bool> {
        if version == 0 { &mut self.off } else { &mut self.versions.get_mut(&version).unwrap().1 }
    }

    fn revoke(&mut self, version: u32) {
        self.closed |= version == 0;
        for (number, (state, _)) in &mut self.versions {
            if (version == 0 || version == *number) && "AT".contains(*state) {
                *state = 'G';
            }
        }
        self.scheduled.retain(|scheduled, _| version != 0 && *scheduled != version);
    }

    fn grants(&self) -> (BTreeSet<u32>, Option<u32>) {
        let usable = |it: &Believed| self.off.is_none() && it.1.is_none() && "AT".contains(it.0);
        let open = self.versions.iter().filter(|(_, it)| usable(it));
        let seals = open.clone().find(|(_, it)| it.0 == 'A').map(|(version, _)| *version);
        (open.map(|(version, _)| *version).collect(), seals)
    }
}

#[derive(Debug, Clone)]
enum Step {
    Rotate,
    Disable(u32),
    Settle(u32),
    Enable(u32),
    Revoke(u32),
    Drain,
    Schedule(u32),
    Cancel(u32),
    Elapse,
    Due(u32),
    Restart,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let version = 0..5_u32;
    let of = |make: fn(u32) -> Step| (0..5_u32).prop_map(make).boxed();
    let step = prop_oneof![
        3 => Just(Step::Rotate),
        4 => of(Step::Disable),
        3 => of(Step::Settle),
        4 => of(Step::Enable),
        1 => version.prop_map(Step::Revoke),
        1 => Just(Step::Drain),
        2 => of(Step::Schedule),
        1 => of(Step::Cancel),
        2 => Just(Step::Elapse),
        2 => of(Step::Due),
        1 => Just(Step::Restart),
    ];
    prop::collection::vec(step, 1..80)
}

/// Takes the step in both; what the machine refuses and what the model would have refused.
fn take(driver: &mut Driver, belief: &mut Belief, step: &Step) -> (Option<Reason>, Option<Reason>) {
    match *step {
        Step::Rotate => {
            let next = belief.versions.len() as u32 + 1;
            let outcome = driver.rotate(1, next, 0);
            let expected = match (belief.closed, belief.off) {
                (true, _) => Some(Reason::Revoked),
                (_, Some(_)) => Some(Reason::Disabled),
                _ => None,
            };
            if expected.is_none() {
                belief.versions.values_mut().filter(|it| it.0 == 'A').for_each(|it| it.0 = 'T');
                belief.versions.insert(next, ('A', None));
            }
            (reason(&outcome), expected)
        }
        Step::Disable(version) => {
            let expected = belief.living(version);
            if expected.is_none() {
                belief.off_mut(version).get_or_insert(false);
            }
            (reason(&driver.disable(version)), expected)
        }
        Step::Settle(version) => {
            let switch = driver.ring().switch_of(KeyVersion(version));
            let Some(ordered) = switch.and_then(Switch::ordered) else { return (None, None) };
            *belief.off_mut(version) = Some(true);
            (reason(&driver.settle_disable(ordered.0)), None)
        }
        Step::Enable(version) => {
            let expected = belief.living(version);
            if expected.is_none() {
                *belief.off_mut(version) = None;
            }
            (reason(&driver.enable(version)), expected)
        }
        Step::Revoke(version) => {
            let expected = (version != 0 && !belief.versions.contains_key(&version)).then_some(Reason::NotFound);
            if expected.is_none() {
                let gone = belief.versions.get(&version).is_some_and(|it| "GR".contains(it.0));
                let again = gone || version == 0 && belief.closed;
                if !again {
                    belief.revoke(version);
                }
            }
            (reason(&driver.revoke(1, version)), expected)
        }
        Step::Drain => {
            let Some(oldest) = driver.ring().revocations.first().cloned() else { return (None, None) };
            for version in oldest.versions {
                belief.versions.get_mut(&version.0).unwrap().0 = 'R';
            }
            (reason(&driver.drain(1, oldest.id.index.0)), None)
        }
        Step::Schedule(version) => {
            let expected = belief.living(version);
            if expected.is_none() {
                belief.scheduled.entry(version).or_insert((3, 0));
            }
            (reason(&driver.schedule(version, 3 * MINUTE)), expected)
        }
        Step::Cancel(version) => {
            let known = belief.scheduled.remove(&version).is_some();
            let expected = if known { None } else { belief.living(version).or(Some(Reason::NotFound)) };
            (reason(&driver.cancel(version)), expected)
        }
        Step::Elapse => {
            belief.scheduled.values_mut().for_each(|(_, waited)| *waited += 2);
            driver.elapse(2 * MINUTE);
            (None, None)
        }
        Step::Due(version) => {
            let scheduled = driver.ring().scheduled.iter().find(|it| it.version.0 == version);
            let Some(index) = scheduled.map(|it| it.index.0) else { return (None, None) };
            let (after, waited) = belief.scheduled[&version];
            let expected = (waited < after).then_some(Reason::Conflict);
            if expected.is_none() {
                belief.revoke(version);
            }
            (reason(&driver.revoke_due(index)), expected)
        }
        Step::Restart => {
            driver.restart();
            (None, None)
        }
    }
}

proptest! {
    #[test]
    fn every_order_of_changes_is_taken_or_refused_as_the_model_says_and_leaves_granted_what_it_says(steps in steps()) {
        let mut driver = Driver::with_ring(1);
        let mut belief = Belief { versions: [(1, ('A', None))].into(), ..Belief::default() };
        for step in &steps {
            let (found, expected) = take(&mut driver, &mut belief, step);
            prop_assert_eq!(found, expected, "{:?}", step);
            prop_assert_eq!(driver.grants(), belief.grants(), "after {:?}", step);
            let ring = driver.ring();
            let versions: BTreeMap<u32, Believed> = ring.versions.iter().map(|(number, version)| {
                let state = match version.state {
                    VersionState::Active => 'A',
                    VersionState::Retired => 'T',
                    VersionState::Revoking => 'G',
                    VersionState::Revoked => 'R',
                };
                let off = version.switch.ordered().map(|_| matches!(version.switch, Switch::Off(_)));
                prop_assert_eq!(version.boxed.is_empty(), state == 'R');
                Ok((number.0, (state, off)))
            }).collect::<Result<_, TestCaseError>>()?;
            prop_assert_eq!(&versions, &belief.versions);
            prop_assert_eq!(ring.switch.ordered().map(|_| matches!(ring.switch, Switch::Off(_))), belief.off);
            let scheduled: BTreeMap<u32, (u64, u64)> =
                ring.scheduled.iter().map(|it| (it.version.0, (it.after_ms / MINUTE, it.waited_ms / MINUTE))).collect();
            prop_assert_eq!(&scheduled, &belief.scheduled);
        }
    }
}
