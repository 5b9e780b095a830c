//! `ensign apikey describe` and `revoke --shred`: an API key and what was published with it.

use std::time::Duration;

use ensign_client::admin_api as pb;
use serde::Serialize;

use super::admin::ShownApiKey;
use super::args::ClientArgs;
use super::connect::connect;
use super::exit::NotAlone;
use super::key::seals;
use super::output::{confirm, one, record, thousands};

/// As many topics as a question names.
const NAMED_MAX: usize = 10;

#[derive(Serialize)]
struct Described {
    #[serde(flatten)]
    key: ShownApiKey,
    /// Topics that hold events which are sealed under its own ring, as far as the answering node holds them.
    topics: Vec<String>,
    /// Topics that node holds no replica of.
    topics_elsewhere: u64,
}

#[derive(Serialize)]
struct Shredded {
    #[serde(flatten)]
    key: ShownApiKey,
    versions: Vec<u32>,
    /// A signed receipt of the ring's destruction; empty where an older vault made none.
    receipt: String,
    waited_seconds: f64,
}

/// Shows one API key.
pub(super) async fn describe(key: &str, client: &ClientArgs) -> anyhow::Result<()> {
    let reply = connect(client)?.admin()?.api_key(key).await?;
    let holds = where_it_is(&reply);
    let key: ShownApiKey = reply.key.unwrap_or_default().into();
    let described = Described { key, topics: reply.topics, topics_elsewhere: reply.topics_elsewhere };
    let key = &described.key;
    let mut fields = vec![
        ("name", key.name.clone()),
        ("id", key.id.clone()),
        ("client id", key.client_id.clone()),
        ("project", key.project.clone()),
        ("state", key.state().to_owned()),
        ("permissions", key.permissions.join(" ")),
        ("key ring", key.ring.clone().unwrap_or_else(|| "that of each topic".to_owned())),
    ];
    if key.ring.is_some() {
        fields.push(("events", holds));
    }
    record(client.output, &described, &fields)
}

/// Revokes an API key and destroys its key ring, after a confirmation that names what becomes unreadable.
pub(super) async fn shred(key: &str, yes: bool, client: &ClientArgs) -> anyhow::Result<()> {
    let clients = connect(client)?;
    let admin = clients.admin()?;
    if !yes {
        confirm(yes, &question(&admin.api_key(key).await?)?)?;
    }
    let reply = admin.shred_api_key(key).await?;
    let waited = reply.waited.and_then(|it| Duration::try_from(it).ok()).unwrap_or_default();
    let key = ShownApiKey::from(reply.key.unwrap_or_default());
    let (versions, receipt) = (reply.versions, reply.receipt);
    let shredded = Shredded { key, versions, receipt, waited_seconds: waited.as_secs_f64() };
    let ring = shredded.key.ring.clone().unwrap_or_default();
    let sentence = format!(
        "revoked API key {} and destroyed key ring {ring}; no node opens what was published with it any more",
        shredded.key.id
    );
    one(client.output, &shredded, sentence)
}

/// What is to be confirmed. What the answering node holds to be impossible is refused here: it may be behind the cluster, which would
/// then do it although nobody was asked.
fn question(described: &pb::ApiKeyDescription) -> Result<String, NotAlone> {
    let id = described.key.as_ref().map(|key| key.id.clone()).unwrap_or_default();
    let Some(ring) = &described.ring else {
        return Err(NotAlone(format!(
            "API key {id} has no key ring of its own: its events are sealed under those of their topics, with others'; nothing was revoked. \
             Without --shred it is revoked, and its events stay"
        )));
    };
    if ring.bindings.len() != 1 || ring.bindings_left_out != 0 {
        let ring_id = &ring.id;
        return Err(NotAlone(format!(
            "key ring {ring_id} is not API key {id}'s alone, as the node that answered sees it{}; nothing was revoked. \
             `ensign key revoke --ring {ring_id} --all` destroys it for everything that is sealed under it",
            seals(ring)
        )));
    }
    Ok(stake(described))
}

fn stake(described: &pb::ApiKeyDescription) -> String {
    let key = described.key.clone().unwrap_or_default();
    format!(
        "Nobody will be able to log in with API key {:?} ({}) any more, and everything that was published with it becomes unreadable for \
         everybody: {}.",
        key.name,
        key.id,
        where_it_is(described)
    )
}

/// Which topics hold events of the API key, and what is not known about that.
fn where_it_is(described: &pb::ApiKeyDescription) -> String {
    let named = described.topics.iter().take(NAMED_MAX).cloned().collect::<Vec<_>>().join(", ");
    let named = match described.topics.len().saturating_sub(NAMED_MAX) {
        0 => named,
        more => format!("{named} and {} more", thousands(more as u64)),
    };
    let known = match described.topics.len() {
        0 => "no topic that the answering node holds has events of it".to_owned(),
        1 => format!("events in topic {named}"),
        _ => format!("events in topics {named}"),
    };
    match described.topics_elsewhere {
        0 => known,
        1 => format!("{known}, and perhaps in one topic that the answering node does not hold"),
        many => format!("{known}, and perhaps in {} topics that the answering node does not hold", thousands(many)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_seems_impossible_is_refused_and_never_done_without_a_question() {
        let binding = |id: &str, name: &str, kind: pb::ring_binding::Kind| pb::RingBinding {
            kind: kind.into(),
            id: id.to_owned(),
            name: name.to_owned(),
        };
        let key = pb::ApiKey { id: "K".to_owned(), name: "device".to_owned(), ..Default::default() };
        let mut described = pb::ApiKeyDescription { key: Some(key), ..Default::default() };
        let none = question(&described).expect_err("it has no ring").to_string();
        assert!(
            none.starts_with("API key K has no key ring of its own") && none.contains("nothing was revoked"),
            "{none}"
        );
        let own = binding("K", "device", pb::ring_binding::Kind::ApiKey);
        let topic = binding("T", "pay", pb::ring_binding::Kind::Topic);
        for (bindings, named) in
            [(vec![], "sees it; nothing"), (vec![own.clone(), topic], " (API key device, topic pay); ")]
        {
            described.ring = Some(pb::KeyRing { id: "R".to_owned(), bindings, ..Default::default() });
            let shared = question(&described).expect_err("it is not its alone").to_string();
            assert!(shared.starts_with("key ring R is not API key K's alone") && shared.contains(named), "{shared}");
        }
        described.ring = Some(pb::KeyRing { bindings: vec![own], ..Default::default() });
        assert_eq!(question(&described).ok(), Some(stake(&described)));
    }

    #[test]
    fn a_shredded_key_is_gone_with_its_events_only_once_its_ring_is_destroyed() {
        let state = |ring_destroyed| {
            ShownApiKey::from(pb::ApiKey { revoked: true, shredded: true, ring_destroyed, ..Default::default() })
                .state()
        };
        assert_eq!(state(Some(true)), "revoked, with its events");
        assert_eq!(state(Some(false)), "revoked; its ring is still to be destroyed");
        assert_eq!(state(None), "revoked; the vault does not say whether its ring is destroyed");
    }

    #[test]
    fn what_becomes_unreadable_is_named_and_what_is_not_known_is_said() {
        let key = pb::ApiKey { id: "K".to_owned(), name: "device".to_owned(), ..Default::default() };
        let mut described = pb::ApiKeyDescription { key: Some(key), ..Default::default() };
        assert!(stake(&described).ends_with("no topic that the answering node holds has events of it."));
        described.topics = vec!["a".to_owned(), "b".to_owned()];
        described.topics_elsewhere = 3;
        let expected = "Nobody will be able to log in with API key \"device\" (K) any more, and everything that was published with it becomes \
                        unreadable for everybody: events in topics a, b, and perhaps in 3 topics that the answering node does not hold.";
        assert_eq!(stake(&described), expected);
        described.topics = (0..12).map(|n| n.to_string()).collect();
        assert!(where_it_is(&described).starts_with("events in topics 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 2 more"));
    }
}
