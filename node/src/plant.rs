//! Bugs and broken disks on purpose, for the tests that must find them in a real process.
//!
//! The variable `ENSIGN_PLANT` names one, in a build with the feature `planted-bugs`, which a build for users cannot have:
//! `.ci/run release` looks for the feature in the tree of crates and for the variable's name in the binary.

#[cfg(feature = "planted-bugs")]
pub(crate) use self::planted::{disk, holder, log, newest_version};
#[cfg(not(feature = "planted-bugs"))]
pub(crate) use self::sound::{disk, holder, log, newest_version};

#[cfg(not(feature = "planted-bugs"))]
mod sound {
    #![expect(clippy::unnecessary_wraps, reason = "a planted bug may have a wrong name")]

    use std::sync::Arc;

    use ensign_keyvault::HolderConfig;
    use ensign_proto::ClusterVersion;
    use ensign_storage::{Disk, FileDisk, LogConfig};

    pub(crate) fn disk() -> anyhow::Result<Arc<dyn Disk>> {
        Ok(Arc::new(FileDisk))
    }

    pub(crate) fn log(config: LogConfig) -> anyhow::Result<LogConfig> {
        Ok(config)
    }

    pub(crate) fn holder(config: HolderConfig) -> anyhow::Result<HolderConfig> {
        Ok(config)
    }

    pub(crate) fn newest_version() -> anyhow::Result<ClusterVersion> {
        Ok(ClusterVersion::NEWEST)
    }
}

#[cfg(feature = "planted-bugs")]
mod planted {
    use std::sync::Arc;

    use anyhow::bail;
    use ensign_keyvault::HolderConfig;
    use ensign_proto::ClusterVersion;
    use ensign_storage::fault::{Sync, VolatileDisk};
    use ensign_storage::{Disk, FileDisk, LogConfig, frame};
    use tracing::warn;

    /// What may be planted.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    enum Plant {
        /// No bug: a disk on which `kill -9` is a power cut.
        VolatileDisk,
        /// That disk, with a sync that does nothing.
        LyingDisk,
        /// Commits of the frame log that are not synced.
        UnsyncedCommits,
        /// Batches that are not sealed.
        UnsealedBatches,
        /// No bug to find: batches are neither sealed nor opened, to measure what that costs.
        NullCipher,
        /// No bug: a build that speaks one version more than there is.
        NextVersion,
    }

    fn chosen() -> anyhow::Result<Option<Plant>> {
        let Some(name) = std::env::var_os("ENSIGN_PLANT") else { return Ok(None) };
        let plant = match name.to_str() {
            Some("volatile-disk") => Plant::VolatileDisk,
            Some("lying-disk") => Plant::LyingDisk,
            Some("unsynced-commits") => Plant::UnsyncedCommits,
            Some("unsealed-batches") => Plant::UnsealedBatches,
            Some("null-cipher") => Plant::NullCipher,
            Some("next-version") => Plant::NextVersion,
            _ => bail!("ENSIGN_PLANT names nothing that can be planted: {}", name.display()),
        };
        warn!(?plant, "planted on purpose");
        Ok(Some(plant))
    }

    pub(crate) fn disk() -> anyhow::Result<Arc<dyn Disk>> {
        Ok(match chosen()? {
            Some(Plant::VolatileDisk) => Arc::new(VolatileDisk::new(Sync::Honest)),
            Some(Plant::LyingDisk) => Arc::new(VolatileDisk::new(Sync::Lying)),
            Some(Plant::UnsyncedCommits | Plant::UnsealedBatches | Plant::NullCipher | Plant::NextVersion) | None => {
                Arc::new(FileDisk)
            }
        })
    }

    pub(crate) fn log(config: LogConfig) -> anyhow::Result<LogConfig> {
        let plant = (chosen()? == Some(Plant::UnsyncedCommits)).then_some(frame::Plant::DurabilityNone);
        Ok(LogConfig { plant, ..config })
    }

    pub(crate) fn holder(config: HolderConfig) -> anyhow::Result<HolderConfig> {
        let plant = match chosen()? {
            Some(Plant::UnsealedBatches) => Some(ensign_keyvault::Plant::Unsealed),
            Some(Plant::NullCipher) => Some(ensign_keyvault::Plant::NullCipher),
            _ => None,
        };
        Ok(HolderConfig { plant, ..config })
    }

    pub(crate) fn newest_version() -> anyhow::Result<ClusterVersion> {
        let newest = ClusterVersion::NEWEST;
        Ok(if chosen()? == Some(Plant::NextVersion) { ClusterVersion(newest.0 + 1) } else { newest })
    }
}
