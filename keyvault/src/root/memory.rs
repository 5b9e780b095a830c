//! How much memory this process may count on: the machine's, or less where a control group says so.

use std::fs;
use std::path::Path;

const MIB: u64 = 1 << 20;

/// Memory in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Memory {
    /// What there is in all.
    pub(super) total: u64,
    /// What could be had now.
    pub(super) free: u64,
}

impl Memory {
    /// As the kernel tells it; where it does not, as much as the smaller choice of parameters needs.
    pub(super) fn now() -> Self {
        let machine = fs::read_to_string("/proc/meminfo").ok().and_then(|text| of_meminfo(&text));
        let machine = machine.unwrap_or(Self { total: 4096 * MIB, free: 4096 * MIB });
        let groups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        let limits = limits(&groups, Path::new("/sys/fs/cgroup"));
        limits.into_iter().fold(machine, |least, (limit, used)| Self {
            total: least.total.min(limit),
            free: least.free.min(limit.saturating_sub(used)),
        })
    }
}

fn of_meminfo(text: &str) -> Option<Memory> {
    let kib = |name: &str| -> Option<u64> {
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
        line.trim().strip_suffix("kB")?.trim().parse().ok()
    };
    Some(Memory { total: kib("MemTotal")? * 1024, free: kib("MemAvailable")? * 1024 })
}

/// Limit and use of the process's control group (version 2) and of every one above it.
fn limits(groups: &str, mount: &Path) -> Vec<(u64, u64)> {
    let Some(path) = groups.lines().find_map(|line| line.strip_prefix("0::/")) else { return Vec::new() };
    let number = |path: &Path| fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
    let mut found = Vec::new();
    let mut folder = mount.join(path);
    loop {
        if let Some(limit) = number(&folder.join("memory.max")) {
            found.push((limit, number(&folder.join("memory.current")).unwrap_or(0)));
        }
        if folder == mount || !folder.pop() {
            return found;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_machine_tells_its_memory() {
        let text = "MemTotal:       16384000 kB\nMemFree:          200 kB\nMemAvailable:    8192000 kB\n";
        assert_eq!(of_meminfo(text), Some(Memory { total: 16_384_000 * 1024, free: 8_192_000 * 1024 }));
        assert_eq!(of_meminfo("MemTotal: 12 kB"), None);
        let now = Memory::now();
        assert!(now.total > 0 && now.free <= now.total, "{now:?}");
    }

    #[test]
    fn the_tightest_of_all_groups_counts() {
        let mount = tempfile::tempdir().unwrap();
        let inner = mount.path().join("system.slice/ensign.service");
        fs::create_dir_all(&inner).unwrap();
        fs::write(inner.join("memory.max"), "max\n").unwrap();
        fs::write(mount.path().join("system.slice/memory.max"), "1000\n").unwrap();
        fs::write(mount.path().join("system.slice/memory.current"), "400\n").unwrap();
        assert_eq!(limits("0::/system.slice/ensign.service\n", mount.path()), [(1000, 400)]);
        assert_eq!(limits("1:name=systemd:/\n", mount.path()), []);
        fs::write(mount.path().join("memory.max"), "700\n").unwrap();
        assert_eq!(limits("0::/system.slice/ensign.service\n", mount.path()), [(1000, 400), (700, 0)]);
    }
}
