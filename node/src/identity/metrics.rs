//! Metrics of logins and tokens: names, units and help live here and nowhere else.

use std::time::Duration;

use metrics::{Unit, counter, describe_counter, describe_histogram, histogram};

const LOGINS: &str = "ensign_logins_total";
const HASH_TIME: &str = "ensign_login_hash_seconds";
const TOKENS: &str = "ensign_tokens_verified_total";

/// Tells the recorder what the names mean.
pub(super) fn describe() {
    describe_counter!(LOGINS, "Logins and refreshes by outcome: ok, refused, busy, unavailable");
    describe_histogram!(HASH_TIME, Unit::Seconds, "Time that verifying one API key's secret took of a core");
    describe_counter!(
        TOKENS,
        "Tokens whose signature was checked, by outcome: ok, refused; repeated ones are not counted"
    );
}

/// A login or refresh ended.
pub(super) fn login(outcome: &'static str) {
    counter!(LOGINS, "outcome" => outcome).increment(1);
}

/// A secret was hashed.
pub(super) fn hashed(took: Duration) {
    histogram!(HASH_TIME).record(took.as_secs_f64());
}

/// A token that was not seen before was checked.
pub(super) fn token(outcome: &'static str) {
    counter!(TOKENS, "outcome" => outcome).increment(1);
}
