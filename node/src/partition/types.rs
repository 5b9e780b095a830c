//! The sealed names of the types that a partition counts.

use bytes::Bytes;
use ensign_proto::PartitionContext;

use super::keys::{Keys, KeysError};
use super::machine::{DekRow, TypeCount};

/// The name of a type: an encoded `EventKind`. None if its key cannot be had.
pub(super) async fn open_name(
    keys: &dyn Keys,
    context: &PartitionContext,
    deks: &[DekRow],
    counted: &TypeCount,
) -> Option<Bytes> {
    let open = || keys.open_type(context, counted.dek, counted.handle, &counted.sealed);
    match open() {
        Ok(name) => Some(name),
        Err(KeysError::NotHeld(_) | KeysError::Unavailable(_)) => {
            let wrapped = deks.iter().find(|row| row.dek == counted.dek)?.wrapped.clone();
            keys.ensure(*context, wrapped).await.ok()?;
            open().ok()
        }
        Err(_) => None,
    }
}
