//! The first node of a cluster: an authority, a certificate, and settings to start with.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use ensign_proto::{ClusterId, NodeId};
use ensign_raft::env::{Rng, UnixNanos};
use zeroize::Zeroizing;

use super::settings::Settings;
use crate::authority::{Authority, Subject};
use crate::config::{Label, PeerAddress};
use crate::files::{write_public, write_secret};

/// What `ensign cluster init` was told.
#[derive(Debug)]
pub struct InitSpec {
    /// The node's number.
    pub node: NodeId,
    /// Its name; empty: after its number.
    pub name: Label,
    /// Where it stands.
    pub region: Label,
    /// Where in the region.
    pub zone: Label,
    /// Where the others will reach its peer listener.
    pub address: String,
    /// Where to write.
    pub dir: PathBuf,
    /// Where it will keep its data.
    pub data_dir: PathBuf,
    /// Where the root key will be.
    pub root_key: PathBuf,
}

/// What was made.
#[derive(Debug)]
pub struct Initialized {
    /// The cluster's id.
    pub cluster: ClusterId,
    /// The settings to start the first node with.
    pub config: PathBuf,
    /// The authority's private key.
    pub authority_key: PathBuf,
    /// The authority's certificate.
    pub authority: PathBuf,
}

/// Refuses what is no address that others could call.
///
/// # Errors
/// Port 0, or an address that means all of a machine's.
pub(super) fn check_address(address: &str) -> anyhow::Result<()> {
    let (host, port) = address.rsplit_once(':').unwrap_or((address, ""));
    if port == "0" {
        bail!("--address {address}: other nodes cannot call port 0; name the port of listen.peers, 5357 by default");
    }
    let ip = host.trim_matches(['[', ']']).parse::<std::net::IpAddr>();
    if ip.is_ok_and(|ip| ip.is_unspecified()) {
        bail!(
            "--address {address}: that is every address of a machine; name the one at which other nodes reach this one"
        );
    }
    Ok(())
}

/// Writes `ca.pem`, `ca.key`, `node.pem`, `node.key` and `ensign.toml` into the folder; the two keys for their owner alone. Nothing is
/// overwritten: a folder that has any of them is refused.
///
/// # Errors
/// The folder is in use or cannot be written to, or the address is none.
pub fn init(spec: &InitSpec, now: UnixNanos, rng: &dyn Rng) -> anyhow::Result<Initialized> {
    std::fs::create_dir_all(&spec.dir).with_context(|| format!("cannot make the folder {}", spec.dir.display()))?;
    let dir = std::path::absolute(&spec.dir)?;
    for name in ["ca.key", "ca.pem", "node.pem", "node.key", "ensign.toml"] {
        if dir.join(name).exists() {
            bail!(
                "{} exists already: nothing is overwritten; choose another folder with --dir",
                dir.join(name).display()
            );
        }
    }
    let peer: PeerAddress =
        format!("{}={}", spec.node, spec.address).parse().map_err(|message: String| anyhow::anyhow!(message))?;
    check_address(&spec.address)?;
    let mut random = [0; 10];
    rng.fill(&mut random);
    let cluster = ClusterId::new(now.as_millis(), random);
    let authority = Authority::create(&cluster.to_string(), now, rng)?;
    let host = spec.address.rsplit_once(':').map(|(host, _)| host.trim_matches(['[', ']']).to_owned());
    let subject = Subject { names: host.into_iter().collect(), ..Subject::node(spec.node, cluster, now) };
    let issued = authority.issue_to(&subject, rng)?;
    let private_key = Zeroizing::new(issued.private_key);
    let name = if spec.name.as_str().is_empty() { format!("node-{}", spec.node) } else { spec.name.to_string() };
    let settings = Settings {
        node: spec.node,
        name: &name,
        region: spec.region.as_str(),
        zone: spec.zone.as_str(),
        data_dir: &spec.data_dir,
        root_key: &spec.root_key,
        dir: &dir,
        peers: &[peer],
        address: &spec.address,
    };
    let put = |name: &str| -> PathBuf { Path::new(&dir).join(name) };
    write_secret(&put("ca.key"), authority.private_key().as_bytes())?;
    write_public(&put("ca.pem"), authority.certificate().as_bytes())?;
    write_secret(&put("node.key"), private_key.as_bytes())?;
    write_public(&put("node.pem"), issued.certificate.as_bytes())?;
    write_public(&put("ensign.toml"), settings.text().as_bytes())?;
    Ok(Initialized { cluster, config: put("ensign.toml"), authority_key: put("ca.key"), authority: put("ca.pem") })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_one_that_others_can_call() {
        for good in ["10.0.0.1:5357", "[fd00::1]:5357", "node-1.example:5357"] {
            check_address(good).unwrap();
        }
        for (bad, why) in [("10.0.0.1:0", "port 0"), ("0.0.0.0:5357", "every address"), ("[::]:5357", "every address")]
        {
            let refused = check_address(bad).unwrap_err().to_string();
            assert!(refused.contains(bad) && refused.contains(why), "{refused}");
        }
    }
}
