//! Nodes: their lives, names and join tokens.

use super::*;

#[test]
fn a_life_of_a_node_that_is_over_is_refused_also_after_a_restart() {
    let (mut machine, _) = CatalogMachine::new();
    let put = |machine: &mut CatalogMachine, incarnation, process| {
        machine.apply(&entry(1, Command::PutNode(node(2, "b", incarnation, process)).encode()))
    };
    put(&mut machine, 5, 50).unwrap();
    put(&mut machine, 5, 50).unwrap();
    let (mut restored, view) = CatalogMachine::new();
    restored.restore(&machine.snapshot()).unwrap();
    for (incarnation, process) in [(1, 1), (4, 50), (5, 51)] {
        assert_eq!(put(&mut restored, incarnation, process), Err(Refusal::LifeOver), "{incarnation} {process}");
    }
    put(&mut restored, 6, 60).unwrap();
    assert_eq!((view.node(NodeId(2)).unwrap().incarnation, view.node(NodeId(2)).unwrap().process), (6, 60));
}

#[test]
fn a_token_that_is_over_lets_nobody_in() {
    let (mut machine, _) = CatalogMachine::new();
    let mut apply = |command: Command| machine.apply(&entry(1, command.encode())).map(|_| ());
    apply(Command::CreateJoinToken(JoinToken { expires: at(5), ..join_token(1, 9) })).unwrap();
    apply(Command::Join(Join { at: at(4), ..join(1, 1, "a") })).unwrap();
    assert_eq!(apply(Command::Join(Join { at: at(5), ..join(1, 2, "b") })), Err(Refusal::TokenExpired));
    apply(Command::Join(Join { at: at(6), ..join(1, 1, "a") })).unwrap();
    // What ended more than a week ago is forgotten when the next one is made.
    let later = UnixNanos(at(5).0 + 8 * 24 * 3600 * 1_000_000_000);
    let fresh = JoinToken { created: later, expires: UnixNanos(later.0 + 1), ..join_token(2, 1) };
    apply(Command::CreateJoinToken(fresh)).unwrap();
    assert_eq!(apply(Command::RevokeJoinToken { token: [1; 16], at: later }), Err(Refusal::TokenUnknown));
}

#[test]
fn a_name_belongs_to_one_node() {
    let (mut machine, view) = CatalogMachine::new();
    let mut put = |node| machine.apply(&entry(1, Command::PutNode(node).encode()));
    // Records of before had no names, all of them.
    put(NodeRecord { name: String::new(), ..node(3, "c", 0, 0) }).unwrap();
    put(NodeRecord { name: String::new(), ..node(4, "d", 0, 0) }).unwrap();
    put(node(1, "a", 1, 1)).unwrap();
    assert_eq!(put(node(2, "a", 1, 1)), Err(Refusal::NameTaken));
    put(node(2, "b", 1, 1)).unwrap();
    assert_eq!(put(node(2, "a", 2, 2)), Err(Refusal::NameTaken), "nor may a node take it later");
    assert_eq!(view.nodes().len(), 4);
}
