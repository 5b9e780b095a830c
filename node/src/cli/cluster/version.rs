//! `ensign cluster version` and `ensign cluster upgrade`.

use ensign_client::admin_api as pb;
use serde::Serialize;

use super::super::args::{ClientArgs, Output};
use super::super::connect::connect;
use super::super::output::{json, line, list};

#[derive(Serialize)]
struct Shown {
    active: u32,
    newest: u32,
    obstacle: String,
    nodes: Vec<ShownNode>,
}

#[derive(Serialize)]
struct ShownNode {
    node: u64,
    name: String,
    /// Null: it did not answer.
    speaks: Option<u32>,
    release: String,
    upgrade: &'static str,
    failure: String,
}

impl From<pb::VersionReply> for Shown {
    fn from(reply: pb::VersionReply) -> Self {
        let node = |node: pb::NodeVersion| ShownNode {
            node: node.node_id,
            name: node.name,
            speaks: (node.newest > 0).then_some(node.newest),
            release: node.release,
            upgrade: if node.held { "manual" } else { "auto" },
            failure: node.failure,
        };
        Self {
            active: reply.active,
            newest: reply.newest,
            obstacle: reply.obstacle,
            nodes: reply.nodes.into_iter().map(node).collect(),
        }
    }
}

/// Shows the cluster's version.
pub(super) async fn show(client: &ClientArgs) -> anyhow::Result<()> {
    let reply = connect(client)?.admin()?.cluster_version().await?;
    print(client.output, &reply.into())
}

/// Raises it.
pub(super) async fn upgrade(to: Option<u32>, without: &[u64], client: &ClientArgs) -> anyhow::Result<()> {
    let reply = connect(client)?.admin()?.raise_cluster_version(to, without).await?;
    print(client.output, &reply.into())
}

fn print(output: Output, shown: &Shown) -> anyhow::Result<()> {
    if output == Output::Json {
        return json(shown);
    }
    line(format_args!("the cluster is at version {}", shown.active))?;
    if !shown.obstacle.is_empty() {
        line(format_args!("it does not rise to {}: {}", shown.newest, shown.obstacle))?;
    }
    let row = |node: &ShownNode| {
        let speaks = node.speaks.map_or_else(|| "no answer".to_owned(), |version| version.to_string());
        vec![node.node.to_string(), node.name.clone(), speaks, node.release.clone(), node.upgrade.to_owned()]
    };
    list(output, &["node", "name", "speaks", "release", "upgrade"], &shown.nodes, row, "no nodes")
}
