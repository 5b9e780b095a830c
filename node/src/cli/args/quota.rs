//! What `ensign quota` takes, and how limits are written.

use std::str::FromStr;

use clap::{Args, Subcommand, ValueEnum};

use super::{ClientArgs, WatchArgs};

/// `ensign quota`.
#[derive(Debug, Subcommand)]
pub enum QuotaCommand {
    /// Set limits; those that are not named stay as they are.
    #[command(
        after_help = "A value is a number, or `unlimited`; bytes may have a unit (KB, MB, GB, TB; KiB, MiB, GiB, TiB). 0 allows nothing.
Needs an operator's key. The change holds on every node within a moment.

Examples:
  ensign quota set --project 01HX… --events-per-second 5000 --bytes-per-second 20MB
  ensign quota set --default --topics 100 --stored-bytes 50GB
  ensign quota set --project 01HX… --topics unlimited"
    )]
    Set {
        /// Whose.
        #[command(flatten)]
        whose: Whose,
        /// Events published a second, over all nodes.
        #[arg(long, value_name = "N")]
        events_per_second: Option<QuotaValue>,
        /// Bytes of events published a second, over all nodes.
        #[arg(long, value_name = "BYTES")]
        bytes_per_second: Option<QuotaBytes>,
        /// Bytes of events kept, over all topics.
        #[arg(long, value_name = "BYTES")]
        stored_bytes: Option<QuotaBytes>,
        /// Topics.
        #[arg(long, value_name = "N")]
        topics: Option<QuotaValue>,
        /// Open publish, subscribe and query streams, on each node.
        #[arg(long, value_name = "N")]
        streams: Option<QuotaValue>,
        /// Connection.
        #[command(flatten)]
        client: ClientArgs,
    },
    /// Show limits, and how much of each is used.
    #[command(after_help = "Examples:
  ensign quota show --project 01HX… --output json
  ensign quota show --watch=5s")]
    Show {
        /// The project's id. Default: every project that the credentials may see, and the cluster's default.
        #[arg(long, value_name = "ID")]
        project: Option<String>,
        /// Watching.
        #[command(flatten)]
        watch: WatchArgs,
        /// Connection.
        #[command(flatten)]
        client: ClientArgs,
    },
    /// Forget limits that were set: the cluster's default holds again, or what is built in.
    #[command(after_help = "Examples:
  ensign quota unset --project 01HX… events-per-second
  ensign quota unset --default                           all of them")]
    Unset {
        /// Whose.
        #[command(flatten)]
        whose: Whose,
        /// Which limits. Default: all of them.
        #[arg(value_enum, value_name = "LIMIT")]
        limits: Vec<QuotaLimit>,
        /// Connection.
        #[command(flatten)]
        client: ClientArgs,
    },
}

/// Whose quota is changed.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub struct Whose {
    /// That of the project with this id.
    #[arg(long, value_name = "ID")]
    pub project: Option<String>,
    /// That of every project that has no limit of its own.
    #[arg(long)]
    pub default: bool,
}

/// One of the limits of a quota.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum QuotaLimit {
    /// Events published a second.
    EventsPerSecond,
    /// Bytes published a second.
    BytesPerSecond,
    /// Bytes kept.
    StoredBytes,
    /// Topics.
    Topics,
    /// Open streams on each node.
    Streams,
}

/// A number, or none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QuotaValue(pub Option<u64>);

/// A number of bytes, or none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QuotaBytes(pub Option<u64>);

impl FromStr for QuotaValue {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "unlimited" {
            return Ok(Self(None));
        }
        let number = text.replace(['_', ','], "").parse();
        number.map(|number| Self(Some(number))).map_err(|_| "it is a whole number, or `unlimited`".to_owned())
    }
}

impl FromStr for QuotaBytes {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "unlimited" {
            return Ok(Self(None));
        }
        let wrong = || "it is a number of bytes, such as 1048576, 20MB or 50GiB, or `unlimited`".to_owned();
        let text = text.replace(['_', ','], "");
        let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
        let (number, unit) = text.split_at(digits);
        let factor: u64 = match unit.trim().to_ascii_lowercase().as_str() {
            "" | "b" => 1,
            "kb" => 1_000,
            "mb" => 1_000_000,
            "gb" => 1_000_000_000,
            "tb" => 1_000_000_000_000,
            "kib" => 1 << 10,
            "mib" => 1 << 20,
            "gib" => 1 << 30,
            "tib" => 1 << 40,
            _ => return Err(wrong()),
        };
        let number: u64 = number.parse().map_err(|_| wrong())?;
        number.checked_mul(factor).map(|bytes| Self(Some(bytes))).ok_or_else(wrong)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_numbers_with_or_without_a_unit_or_none() {
        let bytes = |text: &str| text.parse::<QuotaBytes>().map(|bytes| bytes.0);
        assert_eq!(bytes("unlimited"), Ok(None));
        assert_eq!(bytes("1_000"), Ok(Some(1_000)));
        assert_eq!(bytes("20MB"), Ok(Some(20_000_000)));
        assert_eq!(bytes("2 GiB"), Ok(Some(2 << 30)));
        for wrong in ["", "-1", "1.5GB", "GB", "5 bananas", "99999999999TB"] {
            assert!(bytes(wrong).unwrap_err().contains("50GiB"), "{wrong}");
        }
        let value = |text: &str| text.parse::<QuotaValue>().map(|value| value.0);
        assert_eq!((value("5,000"), value("0"), value("unlimited")), (Ok(Some(5_000)), Ok(Some(0)), Ok(None)));
        for wrong in ["", "many", "-1", "5k"] {
            assert!(value(wrong).is_err(), "{wrong}");
        }
    }
}
