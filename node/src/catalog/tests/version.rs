//! The cluster's version: what it lets through, and whom it keeps out.

use ensign_proto::ClusterVersion;
use ensign_raft::env::{OsRng, SystemClock};

use super::super::testing;
use super::*;

const V1: ClusterVersion = ClusterVersion::V1;
const V2: ClusterVersion = ClusterVersion::V2;

async fn first_version() -> (Catalog, testing::Proposed, ProjectId) {
    let (catalog, proposed) = testing::of_version(V1, Arc::new(SystemClock), Arc::new(OsRng));
    let org = catalog.create_organization("org").await.unwrap();
    let project = catalog.create_project(org.id, "project").await.unwrap();
    (catalog, proposed, project.id)
}

fn full_record() -> NodeRecord {
    let (http, grpc) = ("b:8088".to_owned(), "b:5356".to_owned());
    NodeRecord { version: V2, http, grpc, vault: true, ..node(2, "b", 7, 70) }
}

const BEHIND: &str = "node 3 speaks version 1: run the new version of ensign on it";

/// Which kind of command it is, and whether nodes of the first version know it. A new kind does not compile without an answer.
fn kind(command: &Command) -> (u8, bool) {
    match command {
        Command::PutNode(_) => (1, true),
        Command::CreateOrganization { .. } => (2, true),
        Command::CreateProject(_) => (3, true),
        Command::CreateTopic(_) => (4, true),
        Command::SetTopicState { .. } => (5, true),
        Command::SetTopicPolicies { .. } => (6, true),
        Command::FinishDestroy { .. } => (7, true),
        Command::CreateApiKey(_) => (8, true),
        Command::RevokeApiKey { .. } => (9, true),
        Command::AddSigningKey(_) => (10, true),
        Command::RetireSigningKey { .. } => (11, true),
        Command::SetClusterVersion(_) => (12, true),
        Command::CreateTopics(_) => (13, false),
        Command::SetQuota { .. } => (14, false),
        Command::SetPlacementDefaults { .. } => (15, false),
        Command::SetNodeState { .. } => (16, false),
        Command::AlterTopic { .. } => (17, false),
        Command::StartMove { .. } => (18, false),
        Command::CancelMove { .. } => (19, false),
        Command::FinishMove { .. } => (20, false),
        Command::ReportMove { .. } => (21, false),
        Command::SetAuthority(_) => (22, false),
        Command::CreateJoinToken(_) => (23, false),
        Command::RevokeJoinToken { .. } => (24, false),
        Command::Join(_) => (25, false),
        Command::RevokeNode { .. } => (26, false),
        Command::SetTopicRing { .. } => (27, false),
        Command::ShredApiKey { .. } => (28, false),
    }
}

/// One of every kind that nodes of the first version do not know.
fn newer_commands() -> Vec<Command> {
    let (topic, assignment, at, by) = (topic(1), 0, at(1), NodeId(1));
    let report = MoveReport { phase: MovePhase::Waiting, behind: 0, waiting: String::new(), by, at };
    vec![
        Command::CreateTopics(vec![new_topic(8, 9, 8)]),
        Command::SetQuota { project: None, change: QuotaChange::default() },
        Command::SetPlacementDefaults { founders: nodes(3), replication: 3 },
        Command::SetNodeState { node: NodeId(2), state: NodeState::Draining, at },
        Command::AlterTopic { topic, placement: Placement::anywhere(1), at },
        Command::StartMove { topic, assignment, target: nodes(3), reason: MoveReason::Operator, at },
        Command::CancelMove { topic, assignment, at },
        Command::FinishMove { topic, assignment, replicas: nodes(3) },
        Command::ReportMove { topic, assignment, report },
        Command::SetAuthority(ClusterAuthority { certificate: "PEM".to_owned(), created: at }),
        Command::CreateJoinToken(join_token(1, 2)),
        Command::RevokeJoinToken { token: [1; 16], at },
        Command::Join(join(1, 1, "c")),
        Command::RevokeNode { node: NodeId(3), at },
        Command::SetTopicRing { topic, ring: ring(1), at },
        Command::ShredApiKey { key: ApiKeyId::from_bytes([1; 16]), at },
        Command::CreateApiKey(ApiKey { ring: Some(ring(1)), ..api_key(3, 3, 1, Some(1)) }),
    ]
}

fn explain(catalog: &Catalog) {
    catalog.explain_not_yet(Arc::new(|needs| Box::pin(std::future::ready((needs == V2).then(|| BEHIND.to_owned())))));
}

#[tokio::test]
async fn every_command_that_some_nodes_do_not_know_is_refused_with_their_names_and_what_to_do() {
    let (catalog, proposed, _) = first_version().await;
    explain(&catalog);
    let before = proposed.all().len();
    let commands = newer_commands();
    for command in &commands {
        assert_eq!(command.needs(), V2, "{command:?}");
        let refused = catalog.write(command.clone()).await.unwrap_err();
        assert_eq!(refused, WriteFailure::NotYet { needs: V2, active: V1, why: BEHIND.to_owned() }, "{command:?}");
        let said = format!("this needs version 2 of the cluster, which is at version 1: {BEHIND}");
        assert_eq!(refused.to_string(), said, "{command:?}");
    }
    assert_eq!(proposed.all().len(), before, "nothing was proposed");
    let whole = |command: &&Command| !matches!(command, Command::CreateApiKey(_));
    let tried: BTreeSet<_> = commands.iter().filter(whole).map(kind).collect();
    assert_eq!(tried, (13..=28).map(|kind| (kind, false)).collect(), "a kind that they do not know was not tried");
    // A kind that they do know is written without what they would drop.
    let mut known: Vec<Command> = sample_commands().into_iter().filter(|command| kind(command).1).collect();
    known.push(Command::SetClusterVersion(V2));
    assert!(known.iter().all(|command| command.clone().for_version(V1).needs() == V1));
    let tried: BTreeSet<_> = known.iter().map(kind).collect();
    assert_eq!(tried, (1..=12).map(|kind| (kind, true)).collect(), "a kind that they know was not tried");
}

#[tokio::test]
async fn as_long_as_nobody_can_be_asked_a_refusal_says_where_to_look() {
    let (catalog, _, _) = first_version().await;
    let refused = catalog.revoke_node(NodeId(3)).await.unwrap_err().to_string();
    assert!(refused.contains("run the new version of ensign on every node"), "{refused}");
    assert!(refused.contains("`ensign cluster version` shows which are behind"), "{refused}");
}

#[tokio::test]
async fn nothing_that_a_node_of_the_first_version_cannot_apply_is_proposed_before_all_can() {
    let (catalog, proposed, project) = first_version().await;
    explain(&catalog);
    let not_yet = WriteFailure::NotYet { needs: V2, active: V1, why: BEHIND.to_owned() };
    let change = QuotaChange { topics: Change::Set(Limit::At(1)), ..QuotaChange::default() };
    assert_eq!(catalog.set_quota(Some(project), change).await, Err(SetQuotaError::Write(not_yet.clone())));
    let refused = Err(JoinError::Write(not_yet.clone()));
    assert_eq!(catalog.create_join_token(join_token(1, 1)).await, refused);
    assert_eq!(catalog.revoke_join_token([1; 16]).await, refused);
    assert_eq!(catalog.set_authority("pem").await, refused);
    assert_eq!(catalog.join(join(1, 1, "a")).await, Err(JoinError::Write(not_yet.clone())));
    assert_eq!(catalog.revoke_node(NodeId(3)).await, Err(not_yet.clone()));
    let wish = PlacementWish { replication: Some(1), ..PlacementWish::default() };
    let placed = catalog.create_topic_at(project, name(4), TopicPolicies::default(), wish).await;
    assert_eq!(placed.err(), Some(CreateTopicError::Write(not_yet)));

    // What can do without is written as the first version wrote it.
    let names = (0..3).map(name).collect();
    let made = catalog.create_topics(project, names, &TopicPolicies::default(), None).await.unwrap();
    assert!(made.iter().all(|topic| topic.as_ref().is_ok_and(|topic| topic.replicas.is_empty())), "{made:?}");
    catalog.create_topic(project, name(3), TopicPolicies::default()).await.unwrap();
    catalog.put_node(full_record()).await.unwrap();
    let kept = catalog.node(NodeId(2)).unwrap();
    let NodeRecord { id, peer, grpc, http, .. } = full_record();
    assert_eq!(*kept, NodeRecord { id, peer, grpc, http, ..NodeRecord::default() });
    let needs: Vec<_> = proposed.all().iter().map(|payload| Command::decode(payload).unwrap().needs()).collect();
    assert_eq!((needs.len(), needs.into_iter().max()), (7, Some(V1)));
}

#[tokio::test]
async fn once_all_can_everything_is_written_and_nodes_tell_all_of_themselves() {
    let (catalog, proposed, project) = first_version().await;
    catalog.put_node(full_record()).await.unwrap();
    catalog.raise_version(V2).await.unwrap();
    let raised = proposed.all().len();
    catalog.raise_version(V1).await.unwrap();
    catalog.raise_version(V2).await.unwrap();
    assert_eq!(catalog.cluster_version(), V2, "it never falls");
    assert_eq!(proposed.all().len(), raised, "what it is already is not written again");
    catalog.put_node(full_record()).await.unwrap();
    assert_eq!(*catalog.node(NodeId(2)).unwrap(), full_record());
    let before = proposed.all().len();
    let made = catalog.create_topics(project, vec![name(1), name(2)], &TopicPolicies::default(), None).await.unwrap();
    assert!(made.iter().all(|topic| topic.as_ref().is_ok_and(|topic| !topic.replicas.is_empty())));
    assert_eq!(proposed.all().len(), before + 1, "one command for both");
    let change = QuotaChange { topics: Change::Set(Limit::At(9)), ..QuotaChange::default() };
    catalog.set_quota(Some(project), change).await.unwrap();
}

#[test]
fn who_does_not_speak_the_clusters_version_becomes_no_node() {
    let (mut machine, view) = CatalogMachine::speaking(ClusterVersion(3));
    let mut apply = |command: Command| machine.apply(&entry(1, command.encode())).map(|_| ());
    let old = NodeRecord { version: V1, ..NodeRecord::default() };
    apply(Command::PutNode(NodeRecord { id: NodeId(1), ..old.clone() })).unwrap();
    apply(Command::SetClusterVersion(ClusterVersion(3))).unwrap();
    assert_eq!(apply(Command::PutNode(NodeRecord { id: NodeId(1), ..old })), Err(Refusal::VersionTooOld));
    assert_eq!(apply(Command::PutNode(full_record())), Err(Refusal::VersionTooOld));
    apply(Command::PutNode(NodeRecord { version: ClusterVersion(3), ..full_record() })).unwrap();
    apply(Command::CreateJoinToken(join_token(1, 9))).unwrap();
    assert_eq!(apply(Command::Join(join(1, 1, "c"))), Err(Refusal::VersionTooOld));
    apply(Command::Join(Join { version: ClusterVersion(4), ..join(1, 1, "c") })).unwrap();
    assert_eq!(view.nodes().len(), 3);
    let speaks: Vec<_> = view.nodes().iter().map(|node| node.speaks().0).collect();
    assert_eq!(speaks, [1, 3, 4]);
}

#[test]
fn a_build_that_is_too_old_for_the_cluster_stands_still_and_says_so() {
    let (mut newer, _) = CatalogMachine::speaking(ClusterVersion(3));
    let raise = entry(0, Command::SetClusterVersion(ClusterVersion(3)).encode());
    newer.apply(&raise).unwrap();

    let (mut older, view) = CatalogMachine::new();
    assert_eq!(older.apply(&raise), Err(Refusal::VersionTooOld));
    assert_eq!((view.outdated_by(), view.stuck()), (Some(ClusterVersion(3)), Some(LogIndex(1))));
    let fine = Command::CreateOrganization { id: org(5), name: "later".to_owned(), at: at(5) };
    assert!(older.apply(&entry(1, fine.encode())).is_err());

    let (mut restored, view) = CatalogMachine::new();
    let error = restored.restore(&newer.snapshot()).unwrap_err().to_string();
    assert!(error.contains("version 3") && error.contains("upgrade this node"), "{error}");
    assert_eq!(view.outdated_by(), Some(ClusterVersion(3)));
    assert_eq!(view.cluster_version(), V1);
}

#[test]
fn a_state_of_the_first_version_is_written_as_it_always_was() {
    let (mut machine, view) = CatalogMachine::new();
    let record = full_record().for_version(V1);
    machine.apply(&entry(0, Command::PutNode(record.clone()).encode())).unwrap();
    assert_eq!(view.cluster_version(), V1);
    // version ‖ checksum ‖ next group 16 ‖ the node's four fields ‖ applied 1 ‖ (since nodes join) next node 3
    let snapshot = machine.snapshot();
    assert_eq!(
        snapshot[5..],
        *b"\x08\x10\x12\x1a\x08\x02\x12\x06b:5357\x1a\x06b:5356\x22\x06b:8088\x48\x01\xd0\x02\x03"
    );
}

#[tokio::test]
async fn a_node_that_registers_while_the_version_rises_is_told_to_try_again() {
    let (catalog, _, _) = first_version().await;
    let for_the_first = full_record().for_version(V1);
    catalog.raise_version(V2).await.unwrap();
    let outcome = catalog.write_node(for_the_first.clone(), V2).await;
    assert!(matches!(outcome, Err(PutNodeError::VersionRaised)), "{outcome:?}");
    let outcome = catalog.write_node(for_the_first, V1).await;
    assert!(matches!(outcome, Err(PutNodeError::VersionTooOld { .. })), "{outcome:?}");
}

#[tokio::test]
async fn a_node_that_makes_itself_known_from_afar_is_written_as_all_nodes_of_the_cluster_can_read_it() {
    let (catalog, proposed, _) = first_version().await;
    // Without a life: it has not registered yet.
    let record = NodeRecord { incarnation: 0, process: 0, ..full_record() };
    catalog.announce_node(record.clone()).await.unwrap();
    let written = Command::decode(proposed.all().last().unwrap()).unwrap();
    assert_eq!(written, Command::PutNode(record.clone().for_version(V1)));
    assert_eq!((written.needs(), catalog.cluster_version()), (V1, V1));

    catalog.raise_version(V2).await.unwrap();
    catalog.announce_node(record.clone()).await.unwrap();
    assert_eq!(*catalog.node(NodeId(2)).unwrap(), record, "all of it");
    let refused = catalog.announce_node(record.for_version(V1)).await.unwrap_err();
    assert!(matches!(refused, PutNodeError::VersionTooOld { speaks: V1, active: V2, .. }), "{refused:?}");
}

#[test]
fn a_topic_for_which_places_were_chosen_needs_the_second_version() {
    let create = |replicas, placement| Command::CreateTopic(NewTopic { replicas, placement, ..new_topic(1, 1, 1) });
    assert_eq!(create(nodes(0), Placement::default()).needs(), V1);
    assert_eq!(create(nodes(3), Placement::default()).needs(), V2);
    assert_eq!(create(nodes(0), Placement::anywhere(3)).needs(), V2);
}

#[test]
fn a_node_with_a_name_or_a_life_is_none_of_the_first_version_whatever_its_record_says() {
    let bare = NodeRecord { id: NodeId(2), ..NodeRecord::default() };
    assert_eq!(bare.speaks(), V1);
    assert_eq!(NodeRecord { name: "b".to_owned(), ..bare.clone() }.speaks(), V2);
    assert_eq!(NodeRecord { incarnation: 1, ..bare.clone() }.speaks(), V2);
    assert_eq!(NodeRecord { incarnation: 1, version: ClusterVersion(3), ..bare }.speaks(), ClusterVersion(3));
}
