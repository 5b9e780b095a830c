//! `ensign topic`.

use ensign_client::{Place, Topic, TopicState, admin_api as pb};
use serde::Serialize;

use super::args::TopicCommand;
use super::connect::connect;
use super::exit::UsageError;
use super::output::{confirm, list, one, record, thousands, time};
use super::placement;

/// A topic as it is printed.
#[derive(Serialize)]
struct Shown {
    id: String,
    name: String,
    state: &'static str,
    created: Option<String>,
    modified: Option<String>,
}

/// A topic with its counters.
#[derive(Serialize)]
struct Described {
    #[serde(flatten)]
    topic: Shown,
    project: String,
    events: u64,
    duplicates: u64,
    bytes: u64,
    types: Vec<DescribedType>,
}

#[derive(Serialize)]
struct DescribedType {
    mimetype: String,
    #[serde(rename = "type")]
    schema: String,
    events: u64,
    bytes: u64,
}

impl From<&Topic> for Shown {
    fn from(topic: &Topic) -> Self {
        let state = if topic.readonly { TopicState::Readonly } else { topic.state };
        Self {
            id: topic.id.to_string(),
            name: topic.name.clone(),
            state: state_name(state),
            created: topic.created.map(time),
            modified: topic.modified.map(time),
        }
    }
}

fn state_name(state: TopicState) -> &'static str {
    match state {
        TopicState::Undefined => "undefined",
        TopicState::Ready => "ready",
        TopicState::Readonly => "archived",
        TopicState::Deleting => "deleting",
        TopicState::Pending => "pending",
        TopicState::Allocating => "allocating",
        TopicState::Repairing => "repairing",
    }
}

/// Runs one of the topic commands.
pub(super) async fn run(command: TopicCommand) -> anyhow::Result<()> {
    match command {
        TopicCommand::Create { names, from: None, if_missing: false, replication, regions, leader_region, client }
            if names.len() == 1 =>
        {
            let place = Place { replication, regions, leader_region };
            let topic = connect(&client)?.project.create_topic_at(&names[0], &place).await?;
            let sentence = format!("created topic {} ({})", topic.name, topic.id);
            one(client.output, &Shown::from(&topic), sentence)
        }
        TopicCommand::Create { names, from, if_missing, replication, regions, leader_region, client } => {
            if replication.is_some() || !regions.is_empty() || !leader_region.is_empty() {
                let what =
                    "--replication, --region and --leader-region are for one topic at a time: name one, without --from";
                return Err(UsageError(what.to_owned()).into());
            }
            super::topics::create(names, from.as_deref(), if_missing, &client).await
        }
        TopicCommand::List { client } => {
            let topics: Vec<_> = connect(&client)?.project.topics().await?.iter().map(Shown::from).collect();
            let row = |topic: &Shown| {
                vec![
                    topic.name.clone(),
                    topic.id.clone(),
                    topic.state.to_owned(),
                    topic.created.clone().unwrap_or_default(),
                ]
            };
            list(
                client.output,
                &["name", "id", "state", "created"],
                &topics,
                row,
                "no topics yet; `ensign topic create NAME` makes one",
            )
        }
        TopicCommand::Describe { topic, client } => {
            let clients = connect(&client)?;
            let topic = clients.project.find_topic(&topic).await?;
            let info = clients.project.info(&[topic.id]).await?;
            let described = described(&topic, &info);
            let fields = fields(&described);
            record(client.output, &described, &fields)
        }
        TopicCommand::Alter { topic, replication, regions, any_region, leader_region, no_leader_region, client } => {
            let regions = (any_region || !regions.is_empty()).then_some(pb::RegionSet { regions });
            let leader_region = if no_leader_region { Some(String::new()) } else { leader_region };
            placement::alter(pb::AlterTopicRequest { topic, replication, regions, leader_region }, &client).await
        }
        TopicCommand::Archive { topic, yes, client } => {
            let clients = connect(&client)?;
            let topic = clients.project.find_topic(&topic).await?;
            confirm(yes, &format!("Topic {} will refuse new events for ever.", topic.name))?;
            clients.project.archive_topic(topic.id).await?;
            let shown = Shown { state: state_name(TopicState::Readonly), ..Shown::from(&topic) };
            one(client.output, &shown, format_args!("archived topic {}", topic.name))
        }
        TopicCommand::Destroy { topic, yes, client } => {
            let clients = connect(&client)?;
            let topic = clients.project.find_topic(&topic).await?;
            confirm(yes, &format!("Topic {} and every event in it will be destroyed.", topic.name))?;
            let state = clients.project.destroy_topic(topic.id).await?;
            let shown = Shown { state: state_name(state), ..Shown::from(&topic) };
            one(client.output, &shown, format_args!("destroying topic {}", topic.name))
        }
    }
}

fn described(topic: &Topic, info: &ensign_client::ProjectInfo) -> Described {
    let counters = info.topics.iter().find(|it| it.topic_id[..] == topic.id.as_bytes()[..]);
    let types = counters.map(|it| it.types.as_slice()).unwrap_or_default().iter().map(|it| DescribedType {
        mimetype: super::events::media_type(it.mimetype).into_owned(),
        schema: it.r#type.as_ref().map(super::events::schema_name).unwrap_or_default(),
        events: it.events,
        bytes: it.data_size_bytes,
    });
    Described {
        topic: topic.into(),
        project: topic.project.to_string(),
        events: counters.map_or(0, |it| it.events),
        duplicates: counters.map_or(0, |it| it.duplicates),
        bytes: counters.map_or(0, |it| it.data_size_bytes),
        types: types.collect(),
    }
}

fn fields(described: &Described) -> Vec<(&'static str, String)> {
    let topic = &described.topic;
    let mut fields = vec![
        ("name", topic.name.clone()),
        ("id", topic.id.clone()),
        ("project", described.project.clone()),
        ("state", topic.state.to_owned()),
        ("events", thousands(described.events)),
        ("bytes", thousands(described.bytes)),
    ];
    for kind in &described.types {
        let schema = if kind.schema.is_empty() { String::new() } else { format!(" {}", kind.schema) };
        fields.push((
            "",
            format!("{}{schema}: {} events, {} bytes", kind.mimetype, thousands(kind.events), thousands(kind.bytes)),
        ));
    }
    fields.push(("created", topic.created.clone().unwrap_or_default()));
    fields.push(("modified", topic.modified.clone().unwrap_or_default()));
    fields
}
