//! What an operator does to a cluster and sees of it: machines that join, commands, metrics, processor time.

use std::time::Duration;

use anyhow::{Context as _, ensure};

use super::{Addresses, Cluster};
use crate::links::Node;
use crate::process::cpu_of;

impl Cluster {
    /// Lets a machine in as an operator would, with a token, and returns once it serves.
    ///
    /// # Errors
    /// It is refused, gets another number, or does not start.
    pub async fn join(&mut self, node: Node) -> anyhow::Result<()> {
        let token = self.admin()?.admin().create_join_token(Duration::from_mins(10), 1).await?.secret;
        let folder = self.root.join(format!("node-{node}"));
        std::fs::write(folder.join("token"), token)?;
        // The settings that it writes are those of a machine of its own; ours are kept.
        let certificates = folder.join("joined");
        let mut command = self.namespaces.as_ref().map(|it| it.command(node)).unwrap_or_default();
        command.push(self.plan.binary.display().to_string());
        command.extend(["cluster", "join", "--output", "json"].map(str::to_owned));
        for (option, value) in [
            ("--token-file", folder.join("token").display().to_string()),
            ("--seed", self.addresses[&1].peers.to_string()),
            ("--address", self.addresses[&node].peers.to_string()),
            ("--name", format!("node-{node}")),
            ("--dir", certificates.display().to_string()),
            ("--data-dir", folder.join("data").display().to_string()),
            ("--root-key", self.root.join("root.key").display().to_string()),
        ] {
            command.extend([option.to_owned(), value]);
        }
        let joined: serde_json::Value = serde_json::from_str(&output_of(&command)?)?;
        ensure!(joined["node"] == node, "the cluster gave it another number than {node}: {joined}");
        for name in ["node.pem", "node.key"] {
            std::fs::rename(certificates.join(name), folder.join(name))?;
        }
        self.spawn(node, false)?;
        self.ready(node).await
    }

    /// What an `ensign` command says, with the operator's credentials, asked of the first node that runs.
    ///
    /// # Errors
    /// It failed, and what it said.
    pub fn ensign(&self, args: &[&str]) -> anyhow::Result<String> {
        let node = self.running.keys().next().context("no node runs")?;
        let Addresses { grpc, http, .. } = self.addresses[node];
        let mut command = vec![self.plan.binary.display().to_string()];
        command.extend(args.iter().map(|arg| (*arg).to_owned()));
        for (option, value) in [
            ("--endpoint", grpc.to_string()),
            ("--auth-url", format!("http://{http}")),
            ("--credentials", self.credentials().display().to_string()),
        ] {
            command.extend([option.to_owned(), value]);
        }
        output_of(&command)
    }

    /// The processor time that this process and all nodes that run have used.
    ///
    /// # Errors
    /// A node has ended.
    pub fn cpu(&self) -> anyhow::Result<Duration> {
        let mut all = cpu_of("self")?;
        for process in self.running.values() {
            all += process.cpu()?;
        }
        Ok(all)
    }

    /// The processor time that a node has used.
    ///
    /// # Errors
    /// It does not run.
    pub fn cpu_of(&self, node: Node) -> anyhow::Result<Duration> {
        self.running.get(&node).with_context(|| format!("node {node} does not run"))?.cpu()
    }

    /// A number of the node's `/metrics`, added up over its labels.
    ///
    /// # Errors
    /// The node does not answer.
    pub async fn metric(&self, node: Node, name: &str) -> anyhow::Result<f64> {
        let url = format!("http://{}/metrics", self.addresses[&node].metrics);
        let page = self.http.get(url).send().await?.error_for_status()?.text().await?;
        let of_name = |line: &&str| line.strip_prefix(name).is_some_and(|rest| rest.starts_with(['{', ' ']));
        let values = page.lines().filter(of_name).filter_map(|line| line.rsplit_once(' ')?.1.parse::<f64>().ok());
        Ok(values.sum())
    }
}

fn output_of(command: &[String]) -> anyhow::Result<String> {
    let (program, args) = command.split_first().context("a command has a program")?;
    let output = std::process::Command::new(program).args(args).output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "`{}` failed: {said}", command.join(" "));
    Ok(String::from_utf8(output.stdout)?)
}
