//! Settings that cannot be: `ensign config check` and `ensign serve` say the same, and end with 2.

mod support;

use std::path::Path;

use anyhow::ensure;
use ensign_node::authority::Authority;
use ensign_proto::NodeId;
use support::refused::refused;

/// A folder with the files of one node, certified by an authority of its own.
fn node() -> anyhow::Result<tempfile::TempDir> {
    let dir = tempfile::tempdir()?;
    let (ours, other) = (Authority::generate("ours")?, Authority::generate("another")?);
    let put = |name: &str, text: &str| std::fs::write(dir.path().join(name), text);
    let issued = ours.issue(NodeId(1))?;
    put("node.pem", &issued.certificate)?;
    put("node.key", &issued.private_key)?;
    put("ca.pem", ours.certificate())?;
    put("other.pem", other.certificate())?;
    put("other.key", &ours.issue(NodeId(1))?.private_key)?;
    put("second.pem", &ours.issue(NodeId(2))?.certificate)?;
    put("empty.pem", "")?;
    Ok(dir)
}

fn settings(dir: &Path, change: &[(&str, &str)]) -> anyhow::Result<String> {
    let root = dir.display();
    let mut text = format!(
        "[node]\nid = 1\ndata_dir = \"{root}/data\"\nroot_key = \"{root}/root.key\"\n\
         [listen]\ngrpc = \"127.0.0.1:0\"\nhttp = \"127.0.0.1:0\"\nmetrics = \"127.0.0.1:0\"\npeers = \"127.0.0.1:0\"\n\
         [cluster]\npeers = [\"1=127.0.0.1:5357\"]\ncertificate = \"{root}/node.pem\"\nprivate_key = \"{root}/node.key\"\n\
         authority = \"{root}/ca.pem\"\n"
    );
    for (from, to) in change {
        ensure!(text.contains(from), "no {from} in {text}");
        text = text.replace(from, to);
    }
    let file = dir.join("ensign.toml");
    std::fs::write(&file, text)?;
    Ok(file.display().to_string())
}

#[test]
fn what_config_check_refuses_serve_refuses_with_the_same_words() -> anyhow::Result<()> {
    let dir = node()?;
    std::fs::write(dir.path().join("file"), "")?;
    for (change, words) in [
        (&[("node.pem", "absent.pem")][..], "cannot read the node's certificate"),
        (&[("node.key", "absent.key")], "cannot read the node's private key"),
        (&[("ca.pem", "absent.pem")], "cannot read the cluster's certificate authority"),
        (&[("node.pem", "empty.pem")], "no PEM certificate in it"),
        (&[("node.key", "other.key")], "the certificates of this node cannot be used"),
        (&[("node.pem", "second.pem"), ("node.key", "node.key")], "cannot be used"),
        (&[("ca.pem", "other.pem")], "peers would refuse it"),
        (&[("[\"1=127.0.0.1:5357\"]", "[]")], "cluster.peers is empty"),
        (
            &[
                ("http = \"127.0.0.1:0\"", "http = \"127.0.0.1:5356\""),
                ("grpc = \"127.0.0.1:0\"", "grpc = \"127.0.0.1:5356\""),
            ],
            "are the same port",
        ),
        (&[("/data\"", "/file\"")], "is no directory"),
        (
            &[("[listen]", "[listen]\ncertificate = \"/absent.pem\"\nprivate_key = \"/absent.key\"")],
            "cannot read listen.certificate",
        ),
    ] {
        let config = settings(dir.path(), change)?;
        let said = ["serve", "config check"].map(|command| {
            let args = command.split(' ').chain(["--config", &config]).map(str::to_owned).collect::<Vec<_>>();
            refused(&args)
        });
        for said in said {
            let (code, said) = said?;
            ensure!(code == Some(2) && said.contains(words), "{change:?}: {code:?}, {said}");
        }
        ensure!(!dir.path().join("data").exists(), "{change:?}: something was made");
    }
    // What is well is well; a root key that is not there yet is worth a word.
    let args = ["config", "check", "--config", &settings(dir.path(), &[])?].map(str::to_owned);
    let (code, said) = refused(&args)?;
    ensure!(code == Some(0) && said.contains("root.key\" is not there"), "{code:?}: {said}");
    Ok(())
}

#[test]
fn a_cluster_is_not_made_without_an_authority_by_oversight() -> anyhow::Result<()> {
    let dir = node()?;
    let config = settings(dir.path(), &[("peers = \"127.0.0.1:0\"", "peers = \"0.0.0.0:0\"")])?;
    let args = ["serve", "--config", &config, "--bootstrap"].map(str::to_owned);
    let (code, said) = refused(&args)?;
    ensure!(
        code == Some(2) && said.contains("cannot be changed later") && said.contains("--own-certificates"),
        "{code:?}: {said}"
    );
    ensure!(!dir.path().join("data").exists() && !dir.path().join("root.key").exists(), "something was made");
    Ok(())
}
