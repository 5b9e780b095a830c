//! What publishers, subscribers and readers saw. The only thing that the checker gets to see.

use std::collections::BTreeMap;

/// An event as its publisher names it: `publisher:number` is its payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Name {
    /// Who published it, unique within a run.
    pub publisher: u32,
    /// From 0, in the order of publishing.
    pub number: u64,
}

impl std::fmt::Display for Name {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}", self.publisher, self.number)
    }
}

impl Name {
    /// Reads a payload; none if it is no event of a ledger.
    pub fn parse(payload: &[u8]) -> Option<Self> {
        let (publisher, number) = std::str::from_utf8(payload).ok()?.split_once(':')?;
        Some(Self { publisher: publisher.parse().ok()?, number: number.parse().ok()? })
    }
}

/// A committed event as somebody saw it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Row {
    /// Its place; `None` where the client does not say.
    pub offset: Option<u64>,
    /// Its id.
    pub id: [u8; 10],
    /// What it is.
    pub name: Name,
}

/// What a publisher may do when it does not know what became of an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sending {
    /// Sends again until it knows: in the end everything is there.
    UntilAcked,
    /// Never sends twice: events may be missing, but for those that were acked.
    Once,
}

/// What one publisher saw.
#[derive(Debug, Clone)]
pub struct Published {
    /// How it sends.
    pub sending: Sending,
    /// How many events it has begun to publish: numbers below it.
    pub begun: u64,
    /// Which were acked, and at which offset where the client says.
    pub acked: BTreeMap<u64, Option<u64>>,
    /// Which were refused for certain, and why.
    pub refused: BTreeMap<u64, String>,
    /// What else went wrong, in words.
    pub trouble: Vec<String>,
}

impl Published {
    /// Nothing yet.
    pub fn new(sending: Sending) -> Self {
        Self { sending, begun: 0, acked: BTreeMap::new(), refused: BTreeMap::new(), trouble: Vec::new() }
    }
}

/// What a subscriber may miss.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Following {
    /// Nothing: it began with the first event and followed to the end.
    Everything,
    /// What was committed while it had no stream.
    Live,
}

/// What one subscriber was given, in order.
#[derive(Debug, Clone)]
pub struct Received {
    /// Who.
    pub name: String,
    /// What it may miss.
    pub following: Following,
    /// The events.
    pub rows: Vec<Row>,
}

/// Everything about one topic.
#[derive(Debug, Clone, Default)]
pub struct History {
    /// By publisher.
    pub published: BTreeMap<u32, Published>,
    /// What subscribers got meanwhile.
    pub received: Vec<Received>,
    /// What each node answered at the end when asked for everything.
    pub read: BTreeMap<String, Vec<Row>>,
}
