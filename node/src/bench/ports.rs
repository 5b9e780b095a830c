//! Ports for clusters that come and go.

use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::Context as _;

/// Below the ports that the system gives to outgoing connections (32768 and up). A cluster opens those by the hundred, and one that
/// is free at this moment may carry a connection when the server gets to it.
const PORTS: Range<u32> = 15_000..32_000;

/// Ports given out so far.
static GIVEN: AtomicU32 = AtomicU32::new(0);

/// An address on loopback that nobody listens on now, and that this process gives out once.
///
/// # Errors
/// Every port of the range is taken.
pub fn free_port() -> anyhow::Result<SocketAddr> {
    // Processes that run side by side begin in different places.
    let first = std::process::id().wrapping_mul(61);
    PORTS
        .map(|_| {
            let port =
                PORTS.start + first.wrapping_add(GIVEN.fetch_add(1, Ordering::Relaxed)) % (PORTS.end - PORTS.start);
            SocketAddr::from((Ipv4Addr::LOCALHOST, u16::try_from(port).unwrap_or(u16::MAX)))
        })
        .find(|address| TcpListener::bind(address).is_ok())
        .with_context(|| format!("no port between {} and {} is free", PORTS.start, PORTS.end))
}
