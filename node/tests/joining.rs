//! `ensign cluster init`, `token` and `join` as an operator types them, with TLS for clients.

mod support;

use std::path::Path;
use std::process::Output;

use anyhow::{Context as _, ensure};
use ensign_client::{Client, CredentialsFile, Event, Mime, Options, PublisherOptions};
use support::process::ensign;
use support::{Process, free_port};

fn run(args: &[&str]) -> anyhow::Result<Output> {
    Ok(ensign().args(args).stdin(std::process::Stdio::null()).output()?)
}

fn json(args: &[&str]) -> anyhow::Result<serde_json::Value> {
    let output = run(args)?;
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.success(), "{args:?}: {error}");
    Ok(serde_json::from_slice(&output.stdout)?)
}

fn text(path: &Path) -> String {
    path.display().to_string()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cluster_is_made_and_a_machine_joins_it_by_token() -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    let at = |name: &str| text(&dir.path().join(name));
    let ports: Vec<u16> = (0..5).map(|_| free_port()).collect::<Result<_, _>>()?;
    let peer = format!("127.0.0.1:{}", ports[0]);
    let (first, data, root) = (at("first"), at("first/data"), at("root.key"));
    let typed = format!(
        "cluster init --address {peer} --dir {first} --data-dir {data} --root-key {root} --region eu --output json"
    );
    let init: Vec<&str> = typed.split(' ').collect();
    let made = json(&init)?;
    let again = run(&init)?;
    ensure!(again.status.code() == Some(2), "nothing is overwritten: {again:?}");
    ensure!(String::from_utf8_lossy(&again.stderr).contains("exists already"), "{again:?}");

    let credentials = at("credentials.json");
    let config = made["config"].as_str().context("no settings")?.to_owned();
    let typed = format!(
        "serve --config {config} --bootstrap --authority-key {first}/ca.key --credentials {credentials} --grpc-listen \
         127.0.0.1:{} --http-listen 127.0.0.1:{} --metrics-listen 127.0.0.1:{} --log-prefill 64MiB --listen-certificate \
         {first}/node.pem --listen-private-key {first}/node.key",
        ports[1], ports[2], ports[3]
    );
    let args: Vec<String> = typed.split(' ').map(str::to_owned).collect();
    let log = dir.path().join("log");
    let mut server = Process::start("the first node", &args, &log, None)?;

    // Clients speak TLS, and trust the cluster's authority because the credentials file names it.
    let file = std::fs::read_to_string(&credentials)?;
    ensure!(file.contains("\"insecure\": false") && file.contains("https://"), "the credentials file: {file}");
    let (options, _) = Options::from_file(CredentialsFile::read(Path::new(&credentials))?);
    ensure!(!options.insecure && options.ca_file.is_some(), "TLS is expected");
    let client = Client::connect(options)?;
    client.create_topic("secure").await?;
    let publisher = client.publisher("secure", PublisherOptions::default()).await?;
    publisher.publish(Event::new("over TLS").with_mimetype(Mime::TextPlain)).await?.await?;
    publisher.close().await;
    let (mut plain, _) = Options::from_file(CredentialsFile::read(Path::new(&credentials))?);
    (plain.insecure, plain.call_timeout) = (true, std::time::Duration::from_secs(3));
    ensure!(Client::connect(plain)?.create_topic("clear").await.is_err(), "in clear nothing is served");

    let token = json(&["cluster", "token", "create", "--credentials", &credentials, "--output", "json"])?;
    let (id, secret) = (token["id"].as_str().context("no id")?, token["token"].as_str().context("no token")?);
    ensure!(!std::fs::read_to_string(&log)?.contains(secret), "a token does not belong in a log");
    std::fs::write(dir.path().join("token"), secret)?;
    let second = at("second");
    let own = format!("127.0.0.1:{}", ports[4]);
    let join = |dir: &str| {
        let token = at("token");
        let typed = format!(
            "cluster join --token-file {token} --seed {peer} --dir {dir} --address {own} --name b --output json"
        );
        run(&typed.split(' ').collect::<Vec<_>>())
    };
    let output = join(&second)?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let joined: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    ensure!(joined["node"] == 2 && joined["name"] == "b", "{joined}");
    ensure!(joined["cluster"] == made["cluster"], "{joined}");
    let refused = join(&at("third"))?;
    ensure!(String::from_utf8_lossy(&refused.stderr).contains("used as often as it may"), "{refused:?}");
    json(&["cluster", "token", "revoke", id, "--credentials", &credentials, "--output", "json"])?;
    let listed = json(&["cluster", "token", "list", "--credentials", &credentials, "--output", "json"])?;
    ensure!(listed[0]["used"] == 1 && listed[0]["revoked"] == true && listed[0]["token"].is_null(), "{listed}");

    // The settings that were written are good, and the running cluster knows the new node.
    ensure!(run(&["config", "check", "--config", joined["config"].as_str().unwrap_or_default()])?.status.success());
    let status = json(&["status", "--credentials", &credentials, "--output", "json"])?;
    ensure!(
        status["nodes"].as_array().is_some_and(|nodes| nodes.iter().any(|node| node["address"] == own)),
        "{status}"
    );
    ensure!(server.terminate(std::time::Duration::from_mins(1))?, "the first node ends well");
    Ok(())
}
