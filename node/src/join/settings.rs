//! The settings file of a new node.

use std::path::Path;

use ensign_proto::NodeId;

use crate::config::PeerAddress;

/// What is known of a node before it starts.
pub(super) struct Settings<'a> {
    pub(super) node: NodeId,
    pub(super) name: &'a str,
    pub(super) region: &'a str,
    pub(super) zone: &'a str,
    pub(super) data_dir: &'a Path,
    pub(super) root_key: &'a Path,
    /// Where its certificate, its key and the authority's certificate are.
    pub(super) dir: &'a Path,
    /// This node and those to begin with.
    pub(super) peers: &'a [PeerAddress],
    /// Where the others reach its peer listener.
    pub(super) address: &'a str,
}

/// What a file of ours begins with.
pub(super) const HEADLINE: &str = "# Written by `ensign cluster";

impl Settings<'_> {
    /// The file, for `ensign serve --config`.
    pub(super) fn text(&self) -> String {
        let port = self.address.rsplit_once(':').map_or("5357", |(_, port)| port);
        let peers: Vec<String> = self.peers.iter().map(|peer| quoted(&peer.to_string())).collect();
        // From wherever it is started: a path that depends on that would find an empty directory, and lose the node its number.
        let path = |path: &Path| {
            let absolute = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
            quoted(&absolute.display().to_string())
        };
        format!(
            "{HEADLINE}`. Every other setting is at its default; see the ensign.toml of the distribution.\n\n\
             [node]\nid = {}\nname = {}\nregion = {}\nzone = {}\ndata_dir = {}\nroot_key = {}\n\n\
             [listen]\npeers = \"0.0.0.0:{port}\"\n\n\
             [cluster]\n# To begin with: the catalog knows better as soon as it can be read.\npeers = [{}]\n\
             certificate = {}\nprivate_key = {}\nauthority = {}\n",
            self.node,
            quoted(self.name),
            quoted(self.region),
            quoted(self.zone),
            path(self.data_dir),
            path(self.root_key),
            peers.join(", "),
            path(&self.dir.join("node.pem")),
            path(&self.dir.join("node.key")),
            path(&self.dir.join("ca.pem")),
        )
    }
}

/// A TOML string.
fn quoted(value: &str) -> String {
    toml::Value::String(value.to_owned()).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    #[test]
    fn what_is_written_is_read_as_it_was_meant() {
        let peers = ["1=a:5357".parse().unwrap(), "4=[::1]:6000".parse().unwrap()];
        let settings = Settings {
            node: NodeId(4),
            name: "d",
            region: "eu",
            zone: "eu-1",
            data_dir: Path::new("/data/with \"quotes\""),
            root_key: Path::new("/keys/root.key"),
            dir: Path::new("/etc/ensign"),
            peers: &peers,
            address: "[::1]:6000",
        };
        let config = Config::parse(&settings.text()).unwrap();
        assert_eq!((config.node.id, config.node_name()), (4, "d".to_owned()));
        assert_eq!((config.node.region.as_str(), config.node.zone.as_str()), ("eu", "eu-1"));
        assert_eq!(config.node.data_dir, Path::new("/data/with \"quotes\""));
        assert_eq!(config.cluster.peers, peers);
        assert_eq!((config.listen.peers.port(), config.cluster.authority), (6000, "/etc/ensign/ca.pem".into()));
    }
}
