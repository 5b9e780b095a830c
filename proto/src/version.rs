//! The version of a cluster: which commands, records and messages its nodes may use among themselves.

use std::fmt;

/// What all nodes of a cluster can read, by number. A build speaks every version up to its newest; the cluster's active version only
/// ever rises, once every node speaks it, and nothing newer is written before (ADR 28).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ClusterVersion(pub u32);

impl ClusterVersion {
    /// The foundation: what a node speaks that says nothing about it.
    pub const V1: Self = Self(1);
    /// Nodes with names, places and lives; joining by token; topics made in batches; quotas; placement; members that change;
    /// liveness of nodes and groups that sleep.
    pub const V2: Self = Self(2);
    /// The newest that this build speaks.
    pub const NEWEST: Self = Self::V2;

    /// The version of a field that may be absent in what was written before there were versions.
    pub fn or_first(number: u32) -> Self {
        Self(number.max(Self::V1.0))
    }
}

impl fmt::Display for ClusterVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl Default for ClusterVersion {
    fn default() -> Self {
        Self::V1
    }
}
