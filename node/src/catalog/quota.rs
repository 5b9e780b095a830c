//! How much a project may use: what an administrator has set, for the project or for the whole cluster.

use std::fmt;

/// A limit that was set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Limit {
    /// There is none, whatever the cluster's default is.
    Unlimited,
    /// So much and no more; 0 allows nothing.
    At(u64),
}

impl Limit {
    /// The number, if there is one.
    pub fn at(self) -> Option<u64> {
        match self {
            Self::Unlimited => None,
            Self::At(limit) => Some(limit),
        }
    }
}

impl fmt::Display for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unlimited => f.write_str("unlimited"),
            Self::At(limit) => limit.fmt(f),
        }
    }
}

/// What is limited.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Resource {
    /// Events that are published, a second, over all nodes.
    EventsPerSecond,
    /// Their bytes as they are stored, a second, over all nodes.
    BytesPerSecond,
    /// Bytes of events that are kept, over all topics.
    StoredBytes,
    /// Topics, until they are destroyed for good.
    Topics,
    /// Open publish, subscribe and query streams on one node.
    Streams,
}

impl Resource {
    /// All of them, in the order in which they are shown.
    pub const ALL: [Self; 5] =
        [Self::EventsPerSecond, Self::BytesPerSecond, Self::StoredBytes, Self::Topics, Self::Streams];

    /// As flags, labels and statuses name it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::EventsPerSecond => "events-per-second",
            Self::BytesPerSecond => "bytes-per-second",
            Self::StoredBytes => "stored-bytes",
            Self::Topics => "topics",
            Self::Streams => "streams",
        }
    }
}

/// A value for each resource.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PerResource<T> {
    /// [`Resource::EventsPerSecond`].
    pub events_per_second: T,
    /// [`Resource::BytesPerSecond`].
    pub bytes_per_second: T,
    /// [`Resource::StoredBytes`].
    pub stored_bytes: T,
    /// [`Resource::Topics`].
    pub topics: T,
    /// [`Resource::Streams`].
    pub streams: T,
}

impl<T> PerResource<T> {
    /// The value for one.
    pub fn of(&self, resource: Resource) -> &T {
        match resource {
            Resource::EventsPerSecond => &self.events_per_second,
            Resource::BytesPerSecond => &self.bytes_per_second,
            Resource::StoredBytes => &self.stored_bytes,
            Resource::Topics => &self.topics,
            Resource::Streams => &self.streams,
        }
    }

    /// A value made for each.
    pub fn each(mut make: impl FnMut(Resource) -> T) -> Self {
        Self {
            events_per_second: make(Resource::EventsPerSecond),
            bytes_per_second: make(Resource::BytesPerSecond),
            stored_bytes: make(Resource::StoredBytes),
            topics: make(Resource::Topics),
            streams: make(Resource::Streams),
        }
    }
}

/// The limits that were set for a project, or for every project that has none of its own.
pub type Quota = PerResource<Option<Limit>>;

/// What to do with each limit of a quota.
pub type QuotaChange = PerResource<Change>;

/// What to do with a limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Change {
    /// Leave it as it is.
    #[default]
    Keep,
    /// Forget it: the cluster's default holds, or what is built in.
    Unset,
    /// Set it.
    Set(Limit),
}

/// What holds where nobody has set anything: a flood of streams is kept from the other tenants, and nothing else is limited.
/// Only streams, which no replica of the catalog judges: what is built in may differ between versions.
pub const BUILT_IN: PerResource<Limit> = PerResource {
    events_per_second: Limit::Unlimited,
    bytes_per_second: Limit::Unlimited,
    stored_bytes: Limit::Unlimited,
    topics: Limit::Unlimited,
    streams: Limit::At(2_000),
};

impl Quota {
    /// The quota after a change.
    #[must_use]
    pub fn changed(&self, change: &QuotaChange) -> Self {
        Self::each(|resource| match change.of(resource) {
            Change::Keep => *self.of(resource),
            Change::Unset => None,
            Change::Set(limit) => Some(*limit),
        })
    }

    /// Whether nothing is set.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// What holds for a project with these limits of its own.
    pub fn or(&self, default: &Self) -> PerResource<Limit> {
        PerResource::each(|resource| {
            self.of(resource).or(*default.of(resource)).unwrap_or_else(|| *BUILT_IN.of(resource))
        })
    }
}
