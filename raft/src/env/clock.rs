//! Two clocks: one that leases count on, one that people read.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

/// Time since the machine booted, suspend included. Leases count on it; it never steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct BootTime(pub Duration);

/// Nanoseconds since the Unix epoch. May step; nothing that must be safe may rest on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct UnixNanos(pub u64);

impl UnixNanos {
    /// Whole milliseconds since the Unix epoch.
    pub fn as_millis(self) -> u64 {
        self.0 / 1_000_000
    }

    /// Whole seconds since the Unix epoch.
    pub fn as_secs(self) -> u64 {
        self.0 / 1_000_000_000
    }
}

/// Tells the time.
pub trait Clock: Send + Sync + 'static {
    /// Time since boot, suspend included.
    fn boot(&self) -> BootTime;

    /// Wall-clock time.
    fn wall(&self) -> UnixNanos;
}

impl<C: Clock + ?Sized> Clock for Arc<C> {
    fn boot(&self) -> BootTime {
        (**self).boot()
    }

    fn wall(&self) -> UnixNanos {
        (**self).wall()
    }
}

/// The operating system's clocks: `CLOCK_BOOTTIME` on Linux, the monotonic clock elsewhere.
#[derive(Clone, Copy, Default)]
pub struct SystemClock;

impl fmt::Debug for SystemClock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SystemClock")
    }
}

impl Clock for SystemClock {
    fn boot(&self) -> BootTime {
        #[cfg(target_os = "linux")]
        let id = rustix::time::ClockId::Boottime;
        #[cfg(not(target_os = "linux"))]
        let id = rustix::time::ClockId::Monotonic;
        let now = rustix::time::clock_gettime(id);
        BootTime(Duration::new(now.tv_sec as u64, now.tv_nsec as u32))
    }

    fn wall(&self) -> UnixNanos {
        let now = rustix::time::clock_gettime(rustix::time::ClockId::Realtime);
        UnixNanos(now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64)
    }
}
