//! Every metric of this crate. No label names a key, a ring or a tenant.

use std::time::Duration;

use metrics::{Unit, counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram};

use crate::error::KeyError;
use crate::link::Reason;

/// Tells the recorder what the names mean. Call once, after it is installed.
pub fn describe() {
    describe_counter!("ensign_keyvault_seals_total", "Batches sealed");
    describe_counter!("ensign_keyvault_sealed_bytes_total", Unit::Bytes, "Plaintext sealed");
    describe_counter!("ensign_keyvault_seal_failures_total", "Batches that were not sealed, by cause");
    describe_counter!("ensign_keyvault_opens_total", "Batches opened");
    describe_counter!("ensign_keyvault_opened_bytes_total", Unit::Bytes, "Ciphertext opened");
    describe_counter!("ensign_keyvault_open_failures_total", "Batches that were not opened, by cause");
    describe_counter!(
        "ensign_keyvault_renewals_total",
        "Lease calls by outcome: renewed, failed, ignored as out of date"
    );
    describe_gauge!(
        "ensign_keyvault_lease_left_seconds",
        Unit::Seconds,
        "How long the lease on all keys still runs; at 0 this node neither seals nor opens"
    );
    describe_gauge!("ensign_keyvault_held_keys", "Data keys in this node's memory");
    describe_counter!("ensign_keyvault_leases_lost_total", "Leases that ended before they were renewed");
    describe_counter!(
        "ensign_keyvault_surrenders_total",
        "Keys given up at the vault's request, by outcome: done, in_use"
    );
    describe_counter!("ensign_vault_leases_total", "Leases that the vault's leader granted or renewed");
    describe_counter!("ensign_vault_wants_total", "Keys that lease calls asked for");
    describe_counter!("ensign_vault_refusals_total", "Calls that the vault refused, by reason");
    describe_histogram!(
        "ensign_vault_revoke_wait_seconds",
        Unit::Seconds,
        "How long a revocation waited for holders of its keys"
    );
    describe_gauge!(
        "ensign_vault_active_key_age_seconds",
        Unit::Seconds,
        "Age of the oldest key version that seals; on the vault's leader, 0 elsewhere"
    );
    describe_gauge!(
        "ensign_vault_erasures",
        "Revocations whose wrapped keys are still in the file of a member of the vault; on the vault's leader, 0 elsewhere"
    );
    describe_gauge!(
        "ensign_vault_erasure_age_seconds",
        Unit::Seconds,
        "For how long the oldest of them has been complete; on the vault's leader, 0 elsewhere"
    );
    describe_gauge!("ensign_vault_leads", "1 while this node leads the vault");
    describe_gauge!("ensign_vault_sealed", "1 while the vault is sealed on this node");
}

/// What is still to be erased, and since when the oldest of it.
pub(crate) fn vault_erasures(open: usize, oldest: Duration) {
    gauge!("ensign_vault_erasures").set(open as f64);
    gauge!("ensign_vault_erasure_age_seconds").set(oldest.as_secs_f64());
}

/// A batch was sealed, or was not.
pub(crate) fn sealed(outcome: Result<usize, &KeyError>) {
    match outcome {
        Ok(bytes) => {
            counter!("ensign_keyvault_seals_total").increment(1);
            counter!("ensign_keyvault_sealed_bytes_total").increment(bytes as u64);
        }
        Err(error) => counter!("ensign_keyvault_seal_failures_total", "cause" => cause(error)).increment(1),
    }
}

/// A batch was opened, or was not.
pub(crate) fn opened(outcome: Result<usize, &KeyError>) {
    match outcome {
        Ok(bytes) => {
            counter!("ensign_keyvault_opens_total").increment(1);
            counter!("ensign_keyvault_opened_bytes_total").increment(bytes as u64);
        }
        Err(error) => counter!("ensign_keyvault_open_failures_total", "cause" => cause(error)).increment(1),
    }
}

/// A lease call ended: `renewed`, `failed`, or `ignored` as out of date.
pub(crate) fn renewal(outcome: &'static str) {
    counter!("ensign_keyvault_renewals_total", "outcome" => outcome).increment(1);
}

/// How long this node's lease still runs, and how many keys it covers.
pub(crate) fn lease(left: Option<Duration>, held: usize) {
    gauge!("ensign_keyvault_lease_left_seconds").set(left.unwrap_or_default().as_secs_f64());
    gauge!("ensign_keyvault_held_keys").set(held as f64);
}

/// The lease ended before it was renewed.
pub(crate) fn lease_lost() {
    counter!("ensign_keyvault_leases_lost_total").increment(1);
}

/// A surrender ended: `done`, or `in_use`.
pub(crate) fn surrendered(outcome: &'static str) {
    counter!("ensign_keyvault_surrenders_total", "outcome" => outcome).increment(1);
}

fn cause(error: &KeyError) -> &'static str {
    match error {
        KeyError::NoLease => "no_lease",
        KeyError::Revoked { .. } => "revoked",
        KeyError::Disabled { .. } => "disabled",
        KeyError::NoActiveVersion { .. } => "no_active_version",
        KeyError::NotGranted { .. } => "not_granted",
        KeyError::Unknown { .. } => "unknown_key",
        KeyError::Damaged => "damaged",
        KeyError::Newer(_) => "newer_format",
        KeyError::Unsealable { .. } => "unsealable",
        KeyError::Busy { .. } => "busy",
        KeyError::Vault(_) => "vault",
    }
}

/// The vault granted or renewed a lease, with so many keys.
pub(crate) fn vault_lease(wants: usize) {
    counter!("ensign_vault_leases_total").increment(1);
    counter!("ensign_vault_wants_total").increment(wants as u64);
}

/// The vault refused a call.
pub(crate) fn vault_refusal(reason: Reason) {
    let reason = match reason {
        Reason::NotLeader => "not_leader",
        Reason::Unavailable => "unavailable",
        Reason::Sealed => "sealed",
        Reason::NotFound => "not_found",
        Reason::AlreadyExists => "already_exists",
        Reason::Conflict => "conflict",
        Reason::Invalid => "invalid",
        Reason::NotGranted => "not_granted",
        Reason::Revoked => "revoked",
        Reason::NoActiveVersion => "no_active_version",
        Reason::Damaged => "damaged",
        Reason::Exhausted => "exhausted",
        Reason::OutcomeUnknown => "outcome_unknown",
        Reason::Pending => "pending",
        Reason::Disabled => "disabled",
    };
    counter!("ensign_vault_refusals_total", "reason" => reason).increment(1);
}

/// A revocation is complete; this is how long its holders were waited for.
pub(crate) fn vault_revoked(waited: Duration) {
    histogram!("ensign_vault_revoke_wait_seconds").record(waited.as_secs_f64());
}

/// How old the oldest version is that seals.
pub(crate) fn vault_active_age(age: Duration) {
    gauge!("ensign_vault_active_key_age_seconds").set(age.as_secs_f64());
}

/// Whether this voter leads, and whether it is sealed.
pub(crate) fn vault_state(leads: bool, sealed: bool) {
    gauge!("ensign_vault_leads").set(f64::from(leads));
    gauge!("ensign_vault_sealed").set(f64::from(sealed));
}
