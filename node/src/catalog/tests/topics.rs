//! Topics: their names, groups and places, one by one and in batches.

use super::*;

#[test]
fn the_last_place_for_a_topic_is_given_once_and_a_repeated_creation_is_no_further_topic() {
    let mut machine = sample();
    let mut index = 100;
    let mut apply = |command: &Command| {
        index += 1;
        machine.apply(&entry(index, command.encode())).map(|_| ())
    };
    let create = |n: u8| {
        Command::CreateTopic(NewTopic {
            id: topic(n),
            project: project(1),
            name: name(n),
            ring: ring(1),
            replicas: nodes(3),
            placement: Placement::default(),
            policies: policies(0),
            at: at(n),
        })
    };
    let limit = |limit| Command::SetQuota {
        project: Some(project(1)),
        change: QuotaChange { topics: limit, ..QuotaChange::default() },
    };
    // One is there already.
    apply(&limit(Change::Set(Limit::At(2)))).unwrap();
    apply(&create(10)).unwrap();
    assert_eq!(apply(&create(11)), Err(Refusal::TopicQuota));
    apply(&create(10)).unwrap();
    apply(&limit(Change::Unset)).unwrap();
    apply(&create(11)).unwrap();
    let stranger = Command::SetQuota { project: Some(project(9)), change: QuotaChange::default() };
    assert_eq!(apply(&stranger), Err(Refusal::ProjectUnknown));
}

#[test]
fn a_destroyed_topic_frees_its_name_but_never_its_group_or_id() {
    let mut machine = sample();
    let view = machine.view();
    let again = |id| {
        let (replicas, placement, policies, at) = (nodes(3), Placement::default(), policies(0), at(9));
        let new = NewTopic { id, project: project(1), name: name(2), ring: ring(1), replicas, placement, policies, at };
        Command::CreateTopic(new).encode()
    };
    assert_eq!(machine.apply(&entry(50, again(topic(2)))), Err(Refusal::IdTaken), "a late retry of its creation");
    assert!(machine.apply(&entry(51, again(topic(3)))).is_ok());
    assert_eq!(view.topic(topic(3)).unwrap().group, GroupId(18));
    // After a restart from a snapshot, too.
    let (mut restored, view) = CatalogMachine::new();
    restored.restore(&machine.snapshot()).unwrap();
    let (replicas, placement, policies, at) = (nodes(3), Placement::default(), policies(0), at(9));
    let other =
        NewTopic { id: topic(4), project: project(1), name: name(4), ring: ring(1), replicas, placement, policies, at };
    restored.apply(&entry(52, Command::CreateTopic(other).encode())).unwrap();
    assert_eq!(view.topic(topic(4)).unwrap().group, GroupId(19));
}

#[test]
fn a_batch_of_topics_makes_those_that_can_be_and_says_why_the_others_were_not() {
    let (mut machine, view) = CatalogMachine::new();
    let mut index = 0;
    let mut apply = |command: Command| {
        index += 1;
        machine.apply(&entry(index, command.encode()))
    };
    apply(Command::CreateOrganization { id: org(1), name: "org".to_owned(), at: at(0) }).unwrap();
    let owner = Project { id: project(1), org: org(1), name: "p".to_owned(), ring: ring(1), created: at(0) };
    apply(Command::CreateProject(owner)).unwrap();
    apply(Command::CreateTopic(new_topic(1, 1, 1))).unwrap();
    // Made, taken before, taken in the batch itself, of a project that there is not, and made.
    let batch =
        vec![new_topic(2, 1, 2), new_topic(3, 1, 1), new_topic(4, 1, 2), new_topic(5, 9, 5), new_topic(6, 1, 6)];
    let command = Command::CreateTopics(batch);
    let response = apply(command.clone());
    let Ok(Outcome::Topics(each)) = &response else { panic!("{response:?}") };
    let groups: Vec<_> =
        each.iter().map(|topic| topic.as_ref().map(|topic| topic.group.0).map_err(|why| *why)).collect();
    let taken = Err(Refusal::NameTaken);
    assert_eq!(groups, [Ok(17), taken, taken, Err(Refusal::ProjectUnknown), Ok(18)]);
    assert_eq!(view.topic_count(), 3);
    assert_eq!(apply(command), response, "again it answers the same");
    assert_eq!(view.topic_count(), 3);
    assert_eq!(wire::decode_response(&wire::encode_response(&response)), Ok(response), "also to another node");
}

#[test]
fn a_batch_that_is_too_large_or_names_an_id_twice_is_no_command() {
    let many = |count: usize| {
        let one = |n: usize| NewTopic { id: TopicId::new(n as u64, [1; 10]), ..new_topic(1, 1, 1) };
        (0..count).map(one).collect::<Vec<_>>()
    };
    let decoded = |topics: Vec<NewTopic>| Command::decode(&Command::CreateTopics(topics).encode());
    assert!(decoded(many(TOPICS_BATCH_MAX)).is_ok());
    assert_eq!(decoded(many(TOPICS_BATCH_MAX + 1)), Err(DecodeError::Invalid("topics")));
    assert_eq!(decoded([many(3), many(1)].concat()), Err(DecodeError::Invalid("topics")));
}

#[test]
fn a_follower_of_the_topics_hears_of_what_changed_and_of_nothing_else() {
    let (mut machine, view) = CatalogMachine::new();
    let mut index = 0;
    let mut apply = |machine: &mut CatalogMachine, command: Command| {
        index += 1;
        machine.apply(&entry(index, command.encode())).unwrap();
    };
    let (mut seen, all) = view.changed_topics(TopicsSeen::default());
    assert_eq!(all, None, "whoever has seen nothing looks at everything");
    let mut changed = |view: &View| {
        let (now, changed) = view.changed_topics(seen);
        seen = now;
        changed
    };
    apply(&mut machine, Command::CreateOrganization { id: org(1), name: "org".to_owned(), at: at(0) });
    let owner = Project { id: project(1), org: org(1), name: "p".to_owned(), ring: ring(1), created: at(0) };
    apply(&mut machine, Command::CreateProject(owner));
    assert_eq!(changed(&view), Some(vec![]));
    apply(&mut machine, Command::CreateTopics(vec![new_topic(1, 1, 1), new_topic(2, 1, 2)]));
    apply(&mut machine, Command::SetTopicState { topic: topic(1), state: TopicState::Deleting, at: at(1) });
    assert_eq!(changed(&view), Some(vec![topic(1), topic(2), topic(1)]));
    assert_eq!(changed(&view), Some(vec![]), "each change is told once");
    apply(&mut machine, Command::FinishDestroy { topic: topic(1), at: at(2) });
    assert_eq!(changed(&view), Some(vec![topic(1)]));
    let snapshot = machine.snapshot();
    machine.restore(&snapshot).unwrap();
    assert_eq!(changed(&view), None, "after a snapshot everything may be different");
    assert_eq!(changed(&view), Some(vec![]));
    for round in 0..9_000_u64 {
        let state = policies((round % 2) as u8);
        apply(&mut machine, Command::SetTopicPolicies { topic: topic(2), policies: state, at: at(3) });
    }
    assert_eq!(changed(&view), None, "who is too far behind looks at everything");
}

/// What an API key shares with anything else, be it a topic's past, is not destroyed with it.
#[test]
fn an_api_key_is_shredded_with_a_ring_that_is_its_alone_and_with_no_other() {
    let mut state = crate::catalog::state::State::default();
    let key = |n| ApiKeyId::from_bytes([n; 16]);
    let own = |n: u8, to| Command::CreateApiKey(ApiKey { ring: to, ..api_key(n, n, 1, Some(1)) });
    let bind = |to| Command::SetTopicRing { topic: topic(1), ring: to, at: at(2) };
    let founded = Project { id: project(1), org: org(1), name: "one".to_owned(), ring: ring(1), created: at(1) };
    for command in [
        Command::CreateOrganization { id: org(1), name: "Example".to_owned(), at: at(1) },
        Command::CreateProject(founded),
        Command::CreateTopic(NewTopic { ring: ring(2), ..new_topic(1, 1, 1) }),
        bind(ring(3)),
        own(1, Some(ring(1))),
        own(2, Some(ring(2))),
        own(3, Some(ring(3))),
        own(4, Some(ring(4))),
        own(5, Some(ring(4))),
        own(6, Some(ring(6))),
        own(7, None),
    ] {
        state.apply(command).unwrap();
    }
    let mut shred = |n| state.apply(Command::ShredApiKey { key: key(n), at: at(3) }).map(drop);
    for (n, with) in [(1, "its project"), (2, "a topic's past"), (3, "a topic"), (4, "an API key"), (5, "an API key")] {
        assert_eq!(shred(n), Err(Refusal::RingShared), "shared with {with}");
    }
    assert_eq!((shred(7), shred(8)), (Err(Refusal::NoRing), Err(Refusal::ApiKeyUnknown)));
    assert_eq!((shred(6), shred(6)), (Ok(()), Ok(())), "again changes nothing");
    assert!((1..=5).all(|n| state.api_keys[&key(n)].revoked_at.is_none()), "what is refused changes nothing");
    let revoked = &state.api_keys[&key(6)];
    assert!(revoked.shredded && revoked.revoked_at == Some(at(3)));
    // Nothing is bound to what is about to be destroyed.
    let new = Command::CreateTopic(NewTopic { ring: ring(6), ..new_topic(2, 1, 2) });
    for late in [bind(ring(6)), new, own(8, Some(ring(6)))] {
        assert_eq!(state.apply(late).map(drop), Err(Refusal::RingShredded));
    }
}
