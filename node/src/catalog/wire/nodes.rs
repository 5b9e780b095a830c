//! Rows of nodes, and of how machines become nodes.

use bytes::Bytes;
use ensign_proto::{ClusterVersion, NodeId};
use ensign_raft::env::UnixNanos;
use prost::Message;

use super::DecodeError;
use super::moves::{node_state_number, node_state_of};
use super::rows::raw;
use super::tenants::kid;
use crate::catalog::command::Join;
use crate::catalog::records::{ClusterAuthority, JoinToken, NodeRecord};

#[derive(Clone, PartialEq, Message)]
pub(super) struct NodeRow {
    #[prost(uint64, tag = "1")]
    pub(super) id: u64,
    #[prost(string, tag = "2")]
    pub(super) peer: String,
    #[prost(string, tag = "3")]
    pub(super) grpc: String,
    #[prost(string, tag = "4")]
    pub(super) http: String,
    // 0 active, 1 draining, 2 removed; 0 in a command.
    #[prost(uint32, tag = "20")]
    pub(super) state: u32,
    // Empty or zero, all six, in what was written before nodes had names and lives.
    #[prost(string, tag = "40")]
    pub(super) name: String,
    #[prost(string, tag = "41")]
    pub(super) region: String,
    #[prost(string, tag = "42")]
    pub(super) zone: String,
    #[prost(uint64, tag = "43")]
    pub(super) incarnation: u64,
    #[prost(uint64, tag = "44")]
    pub(super) process: u64,
    // Empty, or 32 bytes.
    #[prost(bytes = "bytes", tag = "45")]
    pub(super) key: Bytes,
    // 0 in what was written before nodes told it.
    #[prost(uint32, tag = "90")]
    version: u32,
    // False in what was written before nodes said so.
    #[prost(bool, tag = "30")]
    pub(super) vault: bool,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct AuthorityRow {
    #[prost(string, tag = "1")]
    certificate: String,
    #[prost(uint64, tag = "2")]
    created: u64,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct JoinTokenRow {
    #[prost(bytes = "bytes", tag = "1")]
    id: Bytes,
    #[prost(bytes = "bytes", tag = "2")]
    hash: Bytes,
    #[prost(uint64, tag = "3")]
    created: u64,
    #[prost(uint64, tag = "4")]
    expires: u64,
    #[prost(uint32, tag = "5")]
    uses: u32,
    #[prost(uint32, tag = "6")]
    used: u32,
    #[prost(uint64, optional, tag = "7")]
    revoked_at: Option<u64>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct JoinRow {
    #[prost(bytes = "bytes", tag = "1")]
    token: Bytes,
    #[prost(bytes = "bytes", tag = "2")]
    key: Bytes,
    #[prost(string, tag = "3")]
    name: String,
    #[prost(string, tag = "4")]
    region: String,
    #[prost(string, tag = "5")]
    zone: String,
    #[prost(string, tag = "6")]
    peer: String,
    #[prost(uint64, tag = "7")]
    above: u64,
    #[prost(uint64, tag = "8")]
    at: u64,
    #[prost(uint32, tag = "90")]
    version: u32,
}

/// A node that is none any more.
#[derive(Clone, PartialEq, Message)]
pub(super) struct RevokedNodeRow {
    #[prost(uint64, tag = "1")]
    pub(super) node: u64,
    #[prost(uint64, tag = "2")]
    pub(super) at: u64,
}

impl From<&NodeRecord> for NodeRow {
    fn from(node: &NodeRecord) -> Self {
        Self {
            id: node.id.0,
            peer: node.peer.clone(),
            grpc: node.grpc.clone(),
            http: node.http.clone(),
            name: node.name.clone(),
            region: node.region.clone(),
            zone: node.zone.clone(),
            incarnation: node.incarnation,
            process: node.process,
            key: node.key.clone(),
            version: number(node.version),
            vault: node.vault,
            state: node_state_number(node.state),
        }
    }
}

impl TryFrom<NodeRow> for NodeRecord {
    type Error = DecodeError;

    fn try_from(row: NodeRow) -> Result<Self, DecodeError> {
        Ok(Self {
            id: NodeId(row.id),
            peer: row.peer,
            grpc: row.grpc,
            http: row.http,
            name: row.name,
            region: row.region,
            zone: row.zone,
            incarnation: row.incarnation,
            process: row.process,
            key: Bytes::copy_from_slice(&row.key),
            version: ClusterVersion::or_first(row.version),
            vault: row.vault,
            state: node_state_of(row.state)?,
        })
    }
}

/// As it is stored: the first version is not, as it never was.
pub(super) fn number(version: ClusterVersion) -> u32 {
    if version == ClusterVersion::V1 { 0 } else { version.0 }
}

impl From<&ClusterAuthority> for AuthorityRow {
    fn from(authority: &ClusterAuthority) -> Self {
        Self { certificate: authority.certificate.clone(), created: authority.created.0 }
    }
}

impl From<AuthorityRow> for ClusterAuthority {
    fn from(row: AuthorityRow) -> Self {
        Self { certificate: row.certificate, created: UnixNanos(row.created) }
    }
}

impl From<&JoinToken> for JoinTokenRow {
    fn from(token: &JoinToken) -> Self {
        Self {
            id: raw(&token.id),
            hash: Bytes::copy_from_slice(&token.hash),
            created: token.created.0,
            expires: token.expires.0,
            uses: token.uses,
            used: token.used,
            revoked_at: token.revoked_at.map(|at| at.0),
        }
    }
}

impl TryFrom<JoinTokenRow> for JoinToken {
    type Error = DecodeError;

    fn try_from(row: JoinTokenRow) -> Result<Self, DecodeError> {
        Ok(Self {
            id: kid(&row.id)?,
            hash: digest(&row.hash)?,
            created: UnixNanos(row.created),
            expires: UnixNanos(row.expires),
            uses: row.uses,
            used: row.used,
            revoked_at: row.revoked_at.map(UnixNanos),
        })
    }
}

impl From<&Join> for JoinRow {
    fn from(join: &Join) -> Self {
        Self {
            token: raw(&join.token),
            key: Bytes::copy_from_slice(&join.key),
            name: join.name.clone(),
            region: join.region.clone(),
            zone: join.zone.clone(),
            peer: join.peer.clone(),
            above: join.above.0,
            at: join.at.0,
            version: number(join.version),
        }
    }
}

impl TryFrom<JoinRow> for Join {
    type Error = DecodeError;

    fn try_from(row: JoinRow) -> Result<Self, DecodeError> {
        Ok(Self {
            token: kid(&row.token)?,
            key: digest(&row.key)?,
            name: row.name,
            region: row.region,
            zone: row.zone,
            peer: row.peer,
            above: NodeId(row.above),
            at: UnixNanos(row.at),
            version: ClusterVersion::or_first(row.version),
        })
    }
}

fn digest(bytes: &Bytes) -> Result<[u8; 32], DecodeError> {
    <[u8; 32]>::try_from(&bytes[..]).map_err(|_| DecodeError::Invalid("digest"))
}
