//! How often one address, or one client id from one address, may fail to log in, and how often one API key may be given tokens:
//! so often that a fleet that restarts passes, and a loop that logs in for every call does not cost a core.

use std::net::{IpAddr, Ipv6Addr};
use std::time::Duration;

use ensign_raft::env::BootTime;

use super::cache::Recent;

/// Addresses, and client ids, that are remembered; beyond, the least recent are forgiven.
const REMEMBERED: usize = 16_384;

/// A failure costs one of `burst` tokens; one comes back every `refill`.
#[derive(Debug, Clone, Copy)]
struct Allowance {
    burst: u32,
    refill: Duration,
}

/// Behind one address there may be a whole site, and one client whose key was revoked fails three times a second for ever. Such
/// failures cost nothing, so this only stops a flood; what costs a hash is held back below.
const PER_ADDRESS: Allowance = Allowance { burst: 300, refill: Duration::from_millis(50) };
/// One client id with a wrong secret costs a hash each time, so it may fail less.
const PER_CLIENT: Allowance = Allowance { burst: 20, refill: Duration::from_secs(3) };

/// An SDK asks for tokens once an hour. A thousand of one key at once are a fleet that restarts; twenty a second for ever are a
/// mistake, and two signatures each.
const PER_KEY: Allowance = Allowance { burst: 1_000, refill: Duration::from_millis(50) };

/// Counts failed logins, and tokens.
#[derive(Debug)]
pub(crate) struct FailureLimits {
    addresses: Recent<IpAddr, Bucket>,
    clients: Recent<[u8; 32], Bucket>,
    issued: Recent<[u8; 16], Bucket>,
}

#[derive(Debug, Clone, Copy)]
struct Bucket {
    spent: u32,
    since: BootTime,
}

impl Bucket {
    /// Gives back what time has earned.
    fn settle(&mut self, allowance: Allowance, now: BootTime) {
        let earned = now.0.saturating_sub(self.since.0).as_nanos() / allowance.refill.as_nanos();
        let earned = u32::try_from(earned).unwrap_or(u32::MAX).min(self.spent);
        self.spent -= earned;
        self.since = if self.spent == 0 { now } else { BootTime(self.since.0 + allowance.refill * earned) };
    }
}

impl FailureLimits {
    pub(crate) fn new() -> Self {
        Self { addresses: Recent::new(REMEMBERED), clients: Recent::new(REMEMBERED), issued: Recent::new(REMEMBERED) }
    }

    /// How long the caller has to wait before it may try again; `None` for not at all.
    pub(crate) fn wait(&mut self, from: Option<IpAddr>, client: &[u8; 32], now: BootTime) -> Option<Duration> {
        let address = from.and_then(|from| left(&mut self.addresses, &site(from), PER_ADDRESS, now));
        let client = left(&mut self.clients, client, PER_CLIENT, now);
        address.max(client)
    }

    /// Takes a pair of tokens for an API key, or says how long to wait for the next.
    pub(super) fn issue(&mut self, key: [u8; 16], now: BootTime) -> Result<(), Duration> {
        if let Some(wait) = left(&mut self.issued, &key, PER_KEY, now) {
            return Err(wait);
        }
        spend(&mut self.issued, key, PER_KEY, now);
        Ok(())
    }

    /// Notes a failure.
    pub(crate) fn failed(&mut self, from: Option<IpAddr>, client: [u8; 32], now: BootTime) {
        if let Some(from) = from {
            spend(&mut self.addresses, site(from), PER_ADDRESS, now);
        }
        spend(&mut self.clients, client, PER_CLIENT, now);
    }
}

fn left<K: Eq + std::hash::Hash>(
    buckets: &mut Recent<K, Bucket>,
    key: &K,
    allowance: Allowance,
    now: BootTime,
) -> Option<Duration> {
    let bucket = buckets.get_mut(key)?;
    bucket.settle(allowance, now);
    (bucket.spent >= allowance.burst).then(|| (bucket.since.0 + allowance.refill).saturating_sub(now.0))
}

fn spend<K: Eq + std::hash::Hash>(buckets: &mut Recent<K, Bucket>, key: K, allowance: Allowance, now: BootTime) {
    if let Some(bucket) = buckets.get_mut(&key) {
        bucket.settle(allowance, now);
        // Never beyond the burst, so that the way back is never longer than one refill.
        bucket.spent = allowance.burst.min(bucket.spent + 1);
    } else {
        buckets.insert(key, Bucket { spent: 1, since: now });
    }
}

/// One IPv6 customer has 2^64 addresses, so what is counted is the network.
pub(super) fn site(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V4(address) => IpAddr::V4(address),
        IpAddr::V6(address) => {
            let [a, b, c, d, ..] = address.segments();
            IpAddr::V6(Ipv6Addr::new(a, b, c, d, 0, 0, 0, 0))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> BootTime {
        BootTime(Duration::from_secs(1_000 + seconds))
    }

    #[test]
    fn a_client_id_that_fails_too_often_has_to_wait_and_is_forgiven() {
        let mut limits = FailureLimits::new();
        for _ in 0..20 {
            assert_eq!(limits.wait(None, &[1; 32], at(0)), None);
            limits.failed(None, [1; 32], at(0));
        }
        assert_eq!(limits.wait(None, &[1; 32], at(1)), Some(Duration::from_secs(2)));
        assert_eq!(limits.wait(None, &[1; 32], at(3)), None);
        assert_eq!(limits.wait(None, &[2; 32], at(1)), None);
    }

    #[test]
    fn a_fleet_may_log_in_at_once_and_a_loop_may_not_go_on() {
        let mut limits = FailureLimits::new();
        for _ in 0..1_000 {
            assert_eq!(limits.issue([1; 16], at(0)), Ok(()));
        }
        assert_eq!(limits.issue([1; 16], at(0)), Err(PER_KEY.refill));
        assert_eq!(limits.issue([2; 16], at(0)), Ok(()), "keys are counted apart");
        for _ in 0..20 {
            assert_eq!(limits.issue([1; 16], at(1)), Ok(()));
        }
        assert_eq!(limits.issue([1; 16], at(1)), Err(PER_KEY.refill));
    }

    #[test]
    fn addresses_of_one_network_count_together() {
        let mut limits = FailureLimits::new();
        let address = |n: u16| Some(IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, n)));
        for n in 0..300 {
            let client = [n as u8; 32];
            assert_eq!(limits.wait(address(n), &client, at(0)), None);
            limits.failed(address(n), client, at(0));
        }
        assert_eq!(limits.wait(address(999), &[200; 32], at(0)), Some(PER_ADDRESS.refill));
        assert_eq!(limits.wait(None, &[200; 32], at(0)), None);
    }
}
