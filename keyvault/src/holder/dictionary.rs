//! Short names that a partition keeps beside its batches: type names, sealed under the key of the batches they describe.

use ensign_proto::{DekId, PartitionContext};
use zeroize::Zeroizing;

use super::{Held, Holder};
use crate::error::KeyError;
use crate::seal::{self, Purpose};
use crate::wrap::DekUse;

impl Holder {
    /// Seals the name that `handle` stands for in the partition.
    ///
    /// # Errors
    /// As [`Holder::seal`].
    pub fn seal_name(&self, ctx: &PartitionContext, dek: DekId, handle: u32, name: &[u8]) -> Result<Vec<u8>, KeyError> {
        let using = self.begin_use(dek)?;
        let held = &using.held;
        check_place(held, ctx)?;
        let seal = |key: &[u8; 32]| {
            let aad = aad(ctx, handle);
            seal::seal_box(key, Purpose::Dictionary, held.wrapped.alg, &aad, name, &self.0.config.entropy)
        };
        held.slot.with(seal).ok_or(KeyError::NoLease)
    }

    /// Opens what [`Holder::seal_name`] sealed for the same place and handle.
    ///
    /// # Errors
    /// As [`Holder::open`].
    pub fn open_name(
        &self,
        ctx: &PartitionContext,
        dek: DekId,
        handle: u32,
        sealed: &[u8],
    ) -> Result<Zeroizing<Vec<u8>>, KeyError> {
        let using = self.begin_use(dek)?;
        let held = &using.held;
        check_place(held, ctx)?;
        let open =
            |key: &[u8; 32]| seal::open_box(key, Purpose::Dictionary, held.wrapped.alg, &aad(ctx, handle), sealed);
        held.slot.with(open).ok_or(KeyError::NoLease)?.map_err(|_| KeyError::Damaged)
    }
}

fn check_place(held: &Held, ctx: &PartitionContext) -> Result<(), KeyError> {
    if held.ctx == *ctx && held.wrapped.usage == DekUse::Batches { Ok(()) } else { Err(KeyError::Damaged) }
}

/// `context ‖ handle`.
fn aad(ctx: &PartitionContext, handle: u32) -> Vec<u8> {
    [&ctx.to_bytes()[..], &handle.to_be_bytes()].concat()
}
