//! Secrets of others, sealed: credential hashes, private keys.

use bytes::Bytes;
use ensign_proto::LogIndex;
use ensign_proto::pb::vault::v1 as pb;
use ensign_storage::EntryId;

use super::command::{self, Command};
use super::state::{Done, Outcome, State, refuse};
use crate::link::{Reason, Refusal};
use crate::wire;

const SECRETS_MAX: usize = 1_000_000;

#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Secret {
    pub(crate) revision: u64,
    pub(crate) boxed: Bytes,
    pub(crate) master_epoch: u64,
    pub(crate) changed_ms: u64,
}

impl State {
    pub(super) fn put_secret(&mut self, at: EntryId, command: &Command, change: command::PutSecret) -> Outcome {
        let key = secret_key(change.kind, &change.id)?;
        let current = self.secrets.get(&key).map_or(0, |secret| secret.revision);
        if change.revision != current + 1 {
            return refuse(Reason::Conflict, format!("the secret is at revision {current}"));
        }
        if self.secrets.len() >= SECRETS_MAX && current == 0 {
            return refuse(Reason::Exhausted, format!("there are {SECRETS_MAX} secrets"));
        }
        let secret = Secret {
            revision: change.revision,
            boxed: change.boxed,
            master_epoch: change.master_epoch,
            changed_ms: command.ms,
        };
        let meta = secret.meta(key, at.index);
        self.secrets.insert(key, secret);
        self.record(at, command, "put secret", &key.1, u32::from(key.0));
        Ok(Done::Secret(meta))
    }

    pub(super) fn delete_secret(&mut self, at: EntryId, command: &Command, change: &command::DeleteSecret) -> Outcome {
        let key = secret_key(change.kind, &change.id)?;
        let current = self.secrets.get(&key).map_or(0, |secret| secret.revision);
        if change.expected != 0 && change.expected != current && current != 0 {
            return refuse(Reason::Conflict, format!("the secret is at revision {current}"));
        }
        if self.secrets.remove(&key).is_some() {
            self.record(at, command, "delete secret", &key.1, u32::from(key.0));
        }
        let id = wire::bytes(&key.1);
        Ok(Done::Secret(pb::SecretMeta {
            kind: u32::from(key.0),
            id,
            revision: 0,
            changed_ms: command.ms,
            index: at.index.0,
        }))
    }
}

fn secret_key(kind: u32, id: &[u8]) -> Result<(u8, [u8; 16]), Refusal> {
    let kind = u8::try_from(kind).ok().filter(|kind| *kind != 0).ok_or_else(|| wire::malformed("kind"))?;
    Ok((kind, id.try_into().map_err(|_| wire::malformed("id"))?))
}

impl Secret {
    pub(crate) fn meta(&self, key: (u8, [u8; 16]), index: LogIndex) -> pb::SecretMeta {
        pb::SecretMeta {
            kind: u32::from(key.0),
            id: wire::bytes(&key.1),
            revision: self.revision,
            changed_ms: self.changed_ms,
            index: index.0,
        }
    }
}
