//! What a node remembers of its peers from life to life: `peers.json` beside the data.
//!
//! After a start the catalog cannot be read before it has a leader, and until then nobody would know which lives of a peer are over,
//! who was removed, or where a peer has moved to. Losing the file costs that, and nothing else.

use std::path::{Path, PathBuf};

use ensign_proto::NodeId;
use serde::{Deserialize, Serialize};
use tracing::warn;

use super::{Life, PeerEntry};
use crate::files::write_secret;

/// The version of `peers.json` that this program writes.
const FORMAT: u32 = 1;

#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
struct PeersFile {
    format: u32,
    peers: Vec<Remembered>,
    removed: Vec<u64>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Remembered {
    id: u64,
    addresses: Vec<String>,
    incarnation: u64,
    process: u64,
}

/// The file, and what it says.
#[derive(Debug)]
pub struct PeerMemory {
    path: PathBuf,
    file: PeersFile,
}

impl PeerMemory {
    /// What is remembered in `data_dir`; nothing where there is no file, or one that cannot be read.
    pub fn open(data_dir: &Path) -> Self {
        let path = data_dir.join("peers.json");
        let file = match std::fs::read(&path) {
            Ok(bytes) => match serde_json::from_slice::<PeersFile>(&bytes) {
                Ok(file) if file.format <= FORMAT => file,
                read => {
                    warn!(path = %path.display(), error = ?read.err(), "what was remembered of the peers cannot be read; the catalog will tell it anew");
                    PeersFile::default()
                }
            },
            Err(_) => PeersFile::default(),
        };
        Self { path, file }
    }

    /// The peers, as they were last known.
    pub(super) fn peers(&self) -> impl Iterator<Item = PeerEntry> + '_ {
        self.file.peers.iter().map(|peer| {
            let life = Life { incarnation: peer.incarnation, process: peer.process };
            let life = (life.incarnation > 0).then_some(life);
            PeerEntry { id: NodeId(peer.id), addresses: peer.addresses.clone(), life }
        })
    }

    /// Whether it is remembered that this node was removed.
    pub fn has_removed(&self, node: NodeId) -> bool {
        self.file.removed.contains(&node.0)
    }

    /// Nodes that were removed.
    pub(super) fn removed(&self) -> impl Iterator<Item = NodeId> + '_ {
        self.file.removed.iter().copied().map(NodeId)
    }

    /// Remembers this, durably when it returns. What cannot be written is complained about: the catalog has it, too.
    pub(super) fn keep(&mut self, peers: &[PeerEntry], removed: &[NodeId]) {
        let remembered = |peer: &PeerEntry| Remembered {
            id: peer.id.0,
            addresses: peer.addresses.clone(),
            incarnation: peer.life.map_or(0, |life| life.incarnation),
            process: peer.life.map_or(0, |life| life.process),
        };
        let removed = removed.iter().map(|node| node.0).collect();
        let file = PeersFile { format: FORMAT, peers: peers.iter().map(remembered).collect(), removed };
        if file == self.file {
            return;
        }
        let text = serde_json::to_string_pretty(&file).unwrap_or_default() + "\n";
        if let Err(error) = write_secret(&self.path, text.as_bytes()) {
            warn!(%error, "what is known of the peers cannot be remembered");
        }
        self.file = file;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn peers_are_remembered_and_a_bad_file_is_as_good_as_none() {
        let dir = tempfile::tempdir().unwrap();
        let life = Some(Life { incarnation: 4, process: u64::MAX });
        let peers = [
            PeerEntry { id: NodeId(2), addresses: vec!["a:1".to_owned(), "b:2".to_owned()], life },
            PeerEntry { id: NodeId(3), addresses: Vec::new(), life: None },
        ];
        PeerMemory::open(dir.path()).keep(&peers, &[NodeId(9)]);
        let memory = PeerMemory::open(dir.path());
        assert_eq!(memory.peers().collect::<Vec<_>>(), peers);
        assert_eq!(memory.removed().collect::<Vec<_>>(), [NodeId(9)]);
        assert_eq!([2, 9].map(|id| memory.has_removed(NodeId(id))), [false, true]);
        for bad in ["{", "{\"format\": 2, \"peers\": [], \"removed\": [1]}"] {
            std::fs::write(dir.path().join("peers.json"), bad).unwrap();
            assert_eq!(PeerMemory::open(dir.path()).removed().count(), 0, "{bad}");
        }
    }
}
