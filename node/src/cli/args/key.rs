//! What `ensign key` takes.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand, ValueEnum};

use super::ClientArgs;

/// `ensign key`.
#[derive(Debug, Subcommand)]
pub enum KeyCommand {
    /// Make a key ring beside the one that a project begins with.
    #[command(after_help = "Example:
  ensign key create payments --algorithm AES256_GCM")]
    Create {
        /// What people call it: 1 to 64 letters, digits, '-', '_' and '.'. No other ring of the project has it.
        name: String,
        /// How data keys seal.
        #[arg(long, value_name = "ALGORITHM", default_value = "AES256_GCM", ignore_case = true)]
        algorithm: Algorithm,
        /// The project's id. Default: the one that the credentials are for.
        #[arg(long, value_name = "ID")]
        project: Option<String>,
        /// Connection.
        #[command(flatten)]
        client: ClientArgs,
    },
    /// Show one key ring: its versions and their states, its settings, and what is scheduled.
    Describe {
        /// The ring.
        #[command(flatten)]
        ring: RingArg,
        /// Connection.
        #[command(flatten)]
        client: ClientArgs,
    },
    /// List key rings and their versions.
    List {
        /// Only those of the project with this id.
        #[arg(long, value_name = "ID")]
        project: Option<String>,
        /// Connection.
        #[command(flatten)]
        client: ClientArgs,
    },
    /// Make a new active version; stored events stay readable.
    Rotate {
        /// The ring.
        #[command(flatten)]
        ring: RingArg,
        /// Connection.
        #[command(flatten)]
        client: ClientArgs,
    },
    /// Take a version or a whole ring out of use, until it is enabled again. Nothing is destroyed.
    #[command(
        after_help = "Waits until no node seals or opens under it any more: usually a moment, at worst the lease wait (about 15 seconds).
While a ring is disabled, whoever reads or publishes under it is told so. With the active version alone disabled, stored events
of other versions stay readable, and publishing is refused until it is enabled or the ring is rotated.

Examples:
  ensign key disable --version 3
  ensign key disable --all --yes
  ensign key enable --all"
    )]
    Disable {
        /// What to disable.
        #[command(flatten)]
        target: TargetArgs,
        /// Do not ask.
        #[arg(long)]
        yes: bool,
        /// Connection.
        #[command(flatten)]
        client: ClientArgs,
    },
    /// Take it back into use, as it was. What is revoked cannot be.
    #[command(
        after_help = "A version that was active is active again, unless the ring was rotated meanwhile: then it is retired, and opens only.
Enabling the ring leaves alone what was disabled in it version by version.

Example:
  ensign key enable --version 3"
    )]
    Enable {
        /// What to enable.
        #[command(flatten)]
        target: TargetArgs,
        /// Connection.
        #[command(flatten)]
        client: ClientArgs,
    },
    /// Destroy versions of a key for ever: nobody reads again what was sealed under them.
    #[command(
        after_help = "Waits until no node can open the data any more: usually a moment, at worst the lease wait (about 15
seconds). That is the stage `revoked`. With --wait erased it also waits until the wrapped key is in no file
of the vault: a few seconds more, while all of the vault's members are there. Erasing cannot reach copies
that somebody made: backups of a vault, snapshots of its volume, and blocks that an SSD or a copy-on-write
file system put aside. With such a copy and the root key the data can be read again.

`ensign key disable` stops reading and publishing as quickly, and can be undone; `ensign key schedule-revoke` leaves time to think.

Examples:
  ensign key revoke --version 3
  ensign key revoke --all --yes --wait erased --receipt revoked.jws
  ensign receipt verify revoked.jws --keys https://auth.example/.well-known/ensign-receipts.json --fingerprint kPrK_q…"
    )]
    Revoke(RevokeArgs),
    /// What the vault signed of a ring: that versions were disabled, revoked, erased. A third party can verify it.
    #[command(
        after_help = "Each receipt is a JWS (RFC 7515) in compact form, signed with Ed25519. `ensign receipt verify` verifies them without a cluster.
A receipt proves what the vault committed, and not that nobody has kept a copy.

Examples:
  ensign key receipts
  ensign key receipts --ring payments --receipt payments.jws"
    )]
    Receipts {
        /// The ring.
        #[command(flatten)]
        ring: RingArg,
        /// Write them to this file, one a line.
        #[arg(long, value_name = "FILE")]
        receipt: Option<PathBuf>,
        /// Connection.
        #[command(flatten)]
        client: ClientArgs,
    },
    /// Have it be destroyed later, unless that is cancelled.
    #[command(
        after_help = "Until then the key is used as before: disable it as well if it should not be. Only time in which the cluster's vault has a
leader counts, so the key may live longer than was asked for, and never shorter.

Examples:
  ensign key schedule-revoke --version 3 --after 30d
  ensign key cancel-revoke --version 3"
    )]
    ScheduleRevoke {
        /// What to destroy.
        #[command(flatten)]
        target: TargetArgs,
        /// How long it cools off: from 1m to 365d.
        #[arg(long, value_name = "TIME", default_value = "7d", value_parser = humantime::parse_duration)]
        after: Duration,
        /// Do not ask.
        #[arg(long)]
        yes: bool,
        /// Connection.
        #[command(flatten)]
        client: ClientArgs,
    },
    /// Cancel a scheduled revocation.
    CancelRevoke {
        /// What was scheduled.
        #[command(flatten)]
        target: TargetArgs,
        /// Connection.
        #[command(flatten)]
        client: ClientArgs,
    },
    /// Set how often a ring is rotated, and how new data keys seal.
    #[command(
        after_help = "The cluster rotates a ring by itself when its active version is as old as the rotation period: 90 days unless it is set here.
An algorithm counts for data keys that are made from then on; `ensign key rotate` has all partitions make new ones.

Examples:
  ensign key set --rotation 30d
  ensign key set --ring payments --algorithm AES128_GCM"
    )]
    Set {
        /// The ring.
        #[command(flatten)]
        ring: RingArg,
        /// How old the active version is when the next one is made: from 1d to 730d.
        #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration, required_unless_present = "algorithm")]
        rotation: Option<Duration>,
        /// How data keys that are made from now on seal.
        #[arg(long, value_name = "ALGORITHM", ignore_case = true)]
        algorithm: Option<Algorithm>,
        /// Connection.
        #[command(flatten)]
        client: ClientArgs,
    },
}

/// `ensign key revoke`.
#[derive(Debug, Args)]
pub struct RevokeArgs {
    /// What to destroy.
    #[command(flatten)]
    pub target: TargetArgs,
    /// Do not ask.
    #[arg(long)]
    pub yes: bool,
    /// How far to wait: `revoked`: no node opens it; `erased`: its key is in no file of the vault either; `unrecoverable`: the root
    /// key that wrapped it is destroyed, which is not built yet.
    #[arg(long, value_name = "STAGE", value_enum, default_value_t = Stage::Revoked)]
    pub wait: Stage,
    /// With --wait erased: how long at most. What was begun goes on, and the exit code is 9. Default: as long as it takes.
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
    pub timeout: Option<Duration>,
    /// Write the receipts to this file, one a line; it must not exist yet.
    #[arg(long, value_name = "FILE")]
    pub receipt: Option<PathBuf>,
    /// Connection.
    #[command(flatten)]
    pub client: ClientArgs,
}

/// What a revocation is waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Stage {
    /// No node opens what was sealed.
    Revoked,
    /// The wrapped key is in no file of the vault.
    Erased,
    /// The root key that wrapped it is destroyed.
    Unrecoverable,
}

/// Which key ring.
#[derive(Debug, Clone, Args)]
pub struct RingArg {
    /// The ring's id, or its name in the project. Default: the project's own ring.
    #[arg(long, value_name = "RING")]
    pub ring: Option<String>,
}

/// A version of a ring, or all of it.
#[derive(Debug, Args)]
pub struct TargetArgs {
    /// The ring.
    #[command(flatten)]
    pub ring: RingArg,
    /// One version.
    #[arg(long, value_name = "N", required_unless_present = "all", value_parser = clap::value_parser!(u32).range(1..))]
    pub version: Option<u32>,
    /// The whole ring, with every version.
    #[arg(long, conflicts_with = "version")]
    pub all: bool,
}

/// How events are sealed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Algorithm {
    /// AES-GCM with keys of 256 bits.
    #[value(name = "AES256_GCM")]
    Aes256,
    /// AES-GCM with keys of 192 bits.
    #[value(name = "AES192_GCM")]
    Aes192,
    /// AES-GCM with keys of 128 bits.
    #[value(name = "AES128_GCM")]
    Aes128,
}
