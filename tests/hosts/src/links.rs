//! The links between nodes, each direction of each on its own.
//!
//! [`Network`] is the face. Behind it is one of two mechanisms, which can do different things:
//!
//! | | cut, also one way | delay, throttle | needs |
//! |---|---|---|---|
//! | [`namespaces`] | packets are dropped, so TCP itself is at a loss | no | root, `ip`, `nft` |
//! | [`proxy`] | bytes of that direction wait, as behind a retransmission | yes | nothing |

pub mod namespaces;
pub mod patterns;
pub mod proxy;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::time::Duration;

pub use self::namespaces::Namespaces;
pub use self::proxy::Proxy;

/// The number of a node.
pub type Node = u64;

/// One direction of a link: what `.0` sends to `.1`.
pub type Way = (Node, Node);

/// What becomes of what is sent one way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Shape {
    /// Nothing arrives.
    pub cut: bool,
    /// How much later it arrives.
    pub delay: Duration,
    /// At most so many bytes a second; `None` is as many as there are.
    pub bytes_per_second: Option<u64>,
}

/// A mechanism that shapes links.
pub trait Links: Send {
    /// Makes one way what `shape` says, from now on, also for connections that are open.
    ///
    /// # Errors
    /// The mechanism cannot do that, or fails.
    fn shape(&mut self, way: Way, shape: Shape) -> anyhow::Result<()>;
}

/// All links of a cluster.
pub struct Network {
    links: Box<dyn Links>,
    nodes: BTreeSet<Node>,
    /// What every way is when nothing is wrong with it.
    sound: BTreeMap<Way, Shape>,
    now: BTreeMap<Way, Shape>,
}

impl fmt::Debug for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Network").field("now", &self.now).finish_non_exhaustive()
    }
}

impl Network {
    /// Links between `nodes`, all sound and without delay.
    pub fn new(nodes: BTreeSet<Node>, links: Box<dyn Links>) -> Self {
        let sound: BTreeMap<Way, Shape> =
            patterns::ways(&nodes).into_iter().map(|way| (way, Shape::default())).collect();
        Self { links, nodes, now: sound.clone(), sound }
    }

    /// The nodes.
    pub fn nodes(&self) -> &BTreeSet<Node> {
        &self.nodes
    }

    fn set(&mut self, way: Way, shape: Shape) -> anyhow::Result<()> {
        if self.now.get(&way) != Some(&shape) {
            self.links.shape(way, shape)?;
            self.now.insert(way, shape);
        }
        Ok(())
    }

    /// Nothing arrives on these ways any more.
    ///
    /// # Errors
    /// See [`Links::shape`].
    pub fn cut(&mut self, ways: impl IntoIterator<Item = Way>) -> anyhow::Result<()> {
        for way in ways {
            let sound = self.sound.get(&way).copied().unwrap_or_default();
            self.set(way, Shape { cut: true, ..sound })?;
        }
        Ok(())
    }

    /// Every way is sound again; delays and throttles stay.
    ///
    /// # Errors
    /// See [`Links::shape`].
    pub fn heal(&mut self) -> anyhow::Result<()> {
        for (way, shape) in self.sound.clone() {
            self.set(way, shape)?;
        }
        Ok(())
    }

    /// From now on, and also once healed, what is sent on these ways arrives so much later.
    ///
    /// # Errors
    /// See [`Links::shape`].
    pub fn delay(&mut self, ways: impl IntoIterator<Item = Way>, delay: Duration) -> anyhow::Result<()> {
        self.change(ways, |shape| shape.delay = delay)
    }

    /// From now on, and also once healed, these ways carry so many bytes a second each.
    ///
    /// # Errors
    /// See [`Links::shape`].
    pub fn throttle(
        &mut self,
        ways: impl IntoIterator<Item = Way>,
        bytes_per_second: Option<u64>,
    ) -> anyhow::Result<()> {
        self.change(ways, |shape| shape.bytes_per_second = bytes_per_second)
    }

    fn change(&mut self, ways: impl IntoIterator<Item = Way>, change: impl Fn(&mut Shape)) -> anyhow::Result<()> {
        for way in ways {
            let (mut sound, mut now) = (self.sound[&way], self.now[&way]);
            change(&mut sound);
            change(&mut now);
            self.sound.insert(way, sound);
            self.set(way, now)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    #[derive(Clone, Default)]
    struct Noted(Arc<Mutex<BTreeMap<Way, Shape>>>);

    impl Links for Noted {
        fn shape(&mut self, way: Way, shape: Shape) -> anyhow::Result<()> {
            self.0.lock().unwrap().insert(way, shape);
            Ok(())
        }
    }

    #[test]
    fn healing_takes_cuts_away_and_leaves_delays() {
        let noted = Noted::default();
        let mut network = Network::new([1, 2, 3].into(), Box::new(noted.clone()));
        let late = Duration::from_millis(80);
        network.cut([(1, 2)]).unwrap();
        network.delay([(1, 2), (2, 1)], late).unwrap();
        assert_eq!(noted.0.lock().unwrap()[&(1, 2)], Shape { cut: true, delay: late, bytes_per_second: None });
        network.heal().unwrap();
        assert_eq!(noted.0.lock().unwrap()[&(1, 2)], Shape { cut: false, delay: late, bytes_per_second: None });
        assert_eq!(noted.0.lock().unwrap().len(), 2, "ways that nothing changed are left alone");
    }
}
