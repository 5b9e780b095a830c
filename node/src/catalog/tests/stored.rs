//! What the catalog stores and sends: logs and snapshots outlive the code that wrote them.

use proptest::prelude::*;

use super::commands::command;
use super::*;
use crate::catalog::state::State;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn every_command_and_answer_survives_its_bytes(commands in proptest::collection::vec(command(), 0..20)) {
        let mut state = State::default();
        for command in commands {
            prop_assert_eq!(&Command::decode(&command.encode()).unwrap(), &command);
            let answer = state.apply(command);
            prop_assert_eq!(wire::decode_response(&wire::encode_response(&answer)).unwrap(), answer);
        }
    }

    #[test]
    fn garbage_is_refused_and_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let bytes = Bytes::from(bytes);
        prop_assert!(Command::decode(&bytes).is_err());
        prop_assert!(wire::decode_response(&bytes).is_err());
        prop_assert!(CatalogMachine::new().0.restore(&bytes).is_err());
    }
}

fn hex(bytes: &Bytes) -> String {
    bytes.iter().fold(String::new(), |text, byte| text + &format!("{byte:02x}"))
}

/// Logs and snapshots outlive the code that wrote them. If this fails, the format has changed: give it a new version.
#[test]
fn stored_bytes_are_still_what_they_were() {
    let commands: Vec<String> = sample_commands().iter().map(|command| hex(&command.encode())).collect();
    insta::assert_snapshot!("stored_commands", commands.join("\n"));
    insta::assert_snapshot!("stored_snapshot", hex(&sample().snapshot()));
}

#[test]
fn stored_quotas_are_still_what_they_were() {
    let change = QuotaChange {
        events_per_second: Change::Set(Limit::At(1_000)),
        bytes_per_second: Change::Set(Limit::Unlimited),
        stored_bytes: Change::Unset,
        topics: Change::Set(Limit::At(0)),
        streams: Change::Keep,
    };
    let commands = [None, Some(project(1))].map(|project| Command::SetQuota { project, change });
    insta::assert_snapshot!(
        "stored_quota_commands",
        commands.each_ref().map(|command| hex(&command.encode())).join("\n")
    );
    let mut machine = sample();
    for (index, command) in commands.iter().enumerate() {
        assert_eq!(Command::decode(&command.encode()).unwrap(), *command);
        machine.apply(&entry(50 + index, command.encode())).unwrap();
    }
    let snapshot = machine.snapshot();
    insta::assert_snapshot!("stored_quota_snapshot", hex(&snapshot));
    let (mut other, view) = CatalogMachine::new();
    other.restore(&snapshot).unwrap();
    assert_eq!(view.own_quota(project(1)), view.default_quota());
    assert_eq!(view.quota(project(1)).events_per_second, Limit::At(1_000));
    assert_eq!(view.quota(project(1)).streams, BUILT_IN.streams);
}

#[test]
fn stored_bindings_of_rings_are_still_what_they_were() {
    let own = |n: u8, owner| ApiKey { ring: Some(ring(n)), ..api_key(n, n, 9, Some(owner)) };
    let mut machine = CatalogMachine::new().0;
    let commands = [
        Command::CreateOrganization { id: org(9), name: "Example".to_owned(), at: at(1) },
        Command::CreateProject(Project {
            id: project(9),
            org: org(9),
            name: "one".to_owned(),
            ring: ring(9),
            created: at(1),
        }),
        Command::CreateTopic(new_topic(9, 9, 9)),
        Command::SetTopicRing { topic: topic(9), ring: ring(7), at: at(2) },
        Command::CreateApiKey(own(5, 9)),
        Command::CreateApiKey(own(6, 9)),
        Command::ShredApiKey { key: ApiKeyId::from_bytes([6; 16]), at: at(3) },
    ];
    for (index, command) in commands.iter().enumerate() {
        assert_eq!(Command::decode(&command.encode()).unwrap(), *command);
        machine.apply(&entry(index, command.encode())).unwrap();
    }
    let new = commands[3..].iter().map(|command| hex(&command.encode()));
    insta::assert_snapshot!("stored_ring_commands", new.collect::<Vec<_>>().join("\n"));
    let snapshot = machine.snapshot();
    insta::assert_snapshot!("stored_ring_snapshot", hex(&snapshot));
    let (mut other, view) = CatalogMachine::new();
    other.restore(&snapshot).unwrap();
    let bound = view.bound_to(ring(9));
    assert_eq!((bound.projects.len(), bound.topics.len(), bound.former_topics.len()), (1, 0, 1));
    assert!(view.has_api_key_ring(project(9), ring(5)) && !view.has_api_key_ring(project(1), ring(5)));
    let refused = other.apply(&entry(
        50,
        Command::CreateApiKey(ApiKey { id: ApiKeyId::from_bytes([8; 16]), client_id: "8".to_owned(), ..own(6, 9) })
            .encode(),
    ));
    assert_eq!(refused, Err(Refusal::RingShredded), "what is destroyed with its API key is given to nobody else");
}

#[test]
fn every_flipped_bit_and_every_cut_is_refused() {
    let snapshot = sample().snapshot();
    let command = sample_commands()[3].encode();
    let refuses = |bytes: &Bytes| CatalogMachine::new().0.restore(bytes).is_err() && Command::decode(bytes).is_err();
    for bytes in [snapshot, command] {
        for bit in 0..bytes.len() * 8 {
            let mut flipped = bytes.to_vec();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(refuses(&Bytes::from(flipped)), "bit {bit}");
        }
        assert!((0..bytes.len()).all(|length| refuses(&bytes.slice(..length))));
    }
}
