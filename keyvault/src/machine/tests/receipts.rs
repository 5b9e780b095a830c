use serde_json::Value;

use super::*;
use crate::machine::receipts::{DISABLED, ERASED, REVOKED};

fn add_key(driver: &mut Driver, number: u32) -> Outcome {
    driver.apply(Change::AddReceiptKey(AddReceiptKey {
        number,
        public: bytes(number as u8, 32),
        boxed: bytes(0xee, 112),
        master_epoch: 1,
        endorsement: if number == 1 { String::new() } else { "a.b.c".to_owned() },
    }))
}

fn erase(driver: &mut Driver, through: u64, nodes: &[u64]) -> Outcome {
    let voters = nodes.iter().map(|node| pb::ErasedVoter { node: *node, through: through + node }).collect();
    driver.apply(Change::Erase(Erase { through, voters }))
}

fn ring(driver: &Driver) -> &Ring {
    &driver.state().rings[&ensign_proto::RingId::from_bytes([4; 16])]
}

fn payloads(driver: &Driver) -> Vec<(u32, u32, Value)> {
    let all = ring(driver).unsigned(LogIndex(0)).into_iter();
    all.map(|it| (it.signed.kind, it.key, serde_json::from_slice(&it.payload).unwrap_or_default())).collect()
}

fn restarted(driver: &Driver) -> State {
    let mut machine = VaultMachine::default();
    machine.restore(&driver.machine.snapshot()).unwrap();
    machine.state().unwrap().clone()
}

#[test]
fn a_revocation_is_attested_when_it_is_complete_and_again_when_it_is_erased() {
    let mut driver = Driver::new();
    driver.create(4).unwrap();
    add_key(&mut driver, 1).unwrap();
    driver.revoke(4, 1).unwrap();
    let revoking = driver.index;
    assert_eq!((driver.state().destroyed, payloads(&driver).len()), (LogIndex(0), 0));
    driver.drain(4, revoking).unwrap();
    let drained = driver.index;
    assert_eq!((driver.state().destroyed, ring(&driver).erase_through()), (LogIndex(drained), Some(LogIndex(drained))));
    assert_eq!(driver.state().erasing_since_ms(), Some(1_000 + drained));
    let [(REVOKED, 1, revoked)] = &payloads(&driver)[..] else { panic!("{:?}", payloads(&driver)) };
    assert_eq!(revoked["drained"]["index"], drained);
    assert_eq!(revoked["voters"], serde_json::json!(["n1", "n2", "n3"]));
    assert_eq!(revoked["basis"], serde_json::json!({"surrendered": ["n1"], "waited": ["n2"], "w_ms": 14_472}));
    assert_eq!(restarted(&driver), *driver.state());

    // Not as far as that: nothing is erased.
    erase(&mut driver, drained - 1, &[1, 2]).unwrap();
    assert_eq!(payloads(&driver).len(), 1);
    erase(&mut driver, drained, &[1, 2]).unwrap();
    let [_, (ERASED, 1, erased)] = &payloads(&driver)[..] else { panic!("{:?}", payloads(&driver)) };
    assert_eq!(erased["erased_through"], serde_json::json!({"n1": drained + 1, "n2": drained + 2}));
    assert_eq!(erased["missing"], serde_json::json!(["n3"]), "it was a member when the key was destroyed");
    assert_eq!(erased["audit"]["seq"], driver.state().audit_seq);
    assert!(erased["basis"].is_null() && revoked["erased_through"].is_null());
    assert!(driver.state().erasures.is_empty() && ring(&driver).erase_through().is_none());
    assert!(ring(&driver).to_wire(ensign_proto::RingId::from_bytes([4; 16])).versions[0].erased);
    // A repetition, as of two leaders, changes nothing.
    let before = ring(&driver).clone();
    erase(&mut driver, drained, &[1, 2, 3]).unwrap();
    assert_eq!(ring(&driver), &before);
    assert_eq!(restarted(&driver), *driver.state());
}

#[test]
fn what_was_revoked_before_there_was_a_receipt_key_is_attested_with_the_first_one() {
    let mut driver = Driver::new();
    driver.create(4).unwrap();
    driver.revoke(4, 1).unwrap();
    let revoking = driver.index;
    driver.drain(4, revoking).unwrap();
    assert_eq!(payloads(&driver), [(REVOKED, 0, Value::Null)]);
    driver.create(5).unwrap();
    driver.apply(Change::Disable(Target { ring: bytes(5, 16), version: 1 })).unwrap();
    let disabling = driver.index;
    let settle = SettleDisable { ring: bytes(5, 16), disabling, w_ms: 9, voters: vec![1], ..SettleDisable::default() };
    driver.apply(Change::SettleDisable(settle)).unwrap();
    add_key(&mut driver, 1).unwrap();
    let disabled = &driver.state().rings[&ensign_proto::RingId::from_bytes([5; 16])].disabled;
    assert!(disabled.len() == 1 && disabled[0].key == 1 && !disabled[0].payload.is_empty(), "{disabled:?}");
    let [(REVOKED, 1, revoked)] = &payloads(&driver)[..] else { panic!("{:?}", payloads(&driver)) };
    assert_eq!(revoked["kind"], "revoked");
    // The next key signs what comes next, and nothing again.
    add_key(&mut driver, 2).unwrap();
    let index = driver.index;
    erase(&mut driver, index, &[1]).unwrap();
    let keys: Vec<_> = payloads(&driver).iter().map(|(kind, key, _)| (*kind, *key)).collect();
    assert_eq!(keys, [(REVOKED, 1), (ERASED, 2)]);
}

#[test]
fn a_disabling_is_attested_in_the_name_of_who_ordered_it_unless_it_was_taken_back() {
    let mut driver = Driver::new();
    driver.create(4).unwrap();
    add_key(&mut driver, 1).unwrap();
    let target = || Target { ring: bytes(4, 16), version: 1 };
    let settle = |driver: &mut Driver, order: u64| {
        let settle = SettleDisable {
            ring: bytes(4, 16),
            disabling: order,
            surrendered: vec![7],
            w_ms: 9,
            voters: vec![1],
            ..SettleDisable::default()
        };
        driver.apply(Change::SettleDisable(settle))
    };
    driver.apply(Change::Disable(target())).unwrap();
    let order = driver.index;
    assert_eq!(restarted(&driver), *driver.state(), "who ordered it is kept");
    driver.apply(Change::Enable(target())).unwrap();
    settle(&mut driver, order).unwrap_err();
    assert!(payloads(&driver).is_empty() && ring(&driver).disablers.is_empty());
    driver.apply(Change::Disable(target())).unwrap();
    let order = driver.index;
    settle(&mut driver, order).unwrap();
    settle(&mut driver, order).unwrap();
    let [(DISABLED, 1, disabled)] = &payloads(&driver)[..] else { panic!("{:?}", payloads(&driver)) };
    assert_eq!((&disabled["kind"], &disabled["actor"]), (&Value::from("disabled"), &Value::from("tester")));
    assert_eq!((&disabled["disabling"]["index"], &disabled["disabled"]["index"]), (&order.into(), &(order + 1).into()));
    assert_eq!(disabled["basis"]["surrendered"], serde_json::json!(["n7"]));
    assert!(disabled["erasure"].is_null(), "nothing is destroyed");
    assert_eq!(restarted(&driver), *driver.state());
    assert_eq!(driver.state().destroyed, LogIndex(0));
}

#[test]
fn receipt_keys_are_made_once_each_and_a_year_apart() {
    const YEAR: u64 = 365 * 24 * 60 * 60 * 1_000;
    let mut driver = Driver::new();
    let due = |driver: &Driver, ms| driver.state().due_receipt_key(ms).map(|(number, last)| (number, last.is_some()));
    assert_eq!(due(&driver, 0), Some((1, false)));
    add_key(&mut driver, 1).unwrap();
    let made = 1_000 + driver.index;
    assert_eq!(reason(&add_key(&mut driver, 1)), Some(Reason::Conflict));
    assert_eq!(reason(&add_key(&mut driver, 3)), Some(Reason::Conflict));
    assert_eq!((due(&driver, made + YEAR - 1), due(&driver, made + YEAR)), (None, Some((2, true))));
    let short = AddReceiptKey { number: 2, public: bytes(1, 31), ..AddReceiptKey::default() };
    assert_eq!(reason(&driver.apply(Change::AddReceiptKey(short))), Some(Reason::Invalid));
    assert_eq!(restarted(&driver), *driver.state());
}

#[test]
fn what_older_voters_cannot_read_says_so() {
    let version = |change: Change| Command::new(1, "a", change).to_payload()[0];
    let drain = |voters| Change::Drain(Drain { voters, ..Drain::default() });
    assert_eq!((version(drain(Vec::new())), version(drain(vec![1]))), (1, 4));
    assert_eq!(version(Change::Erase(Erase::default())), 4);
    assert_eq!(version(Change::AddReceiptKey(AddReceiptKey::default())), 4);
    let mut driver = Driver::new();
    driver.create(4).unwrap();
    assert_eq!(driver.machine.snapshot()[0], 2);
    add_key(&mut driver, 1).unwrap();
    assert_eq!(driver.machine.snapshot()[0], 3);
}
