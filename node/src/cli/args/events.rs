//! What `ensign publish`, `subscribe` and `query` take.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::ClientArgs;

/// `ensign publish`.
#[derive(Debug, Args)]
#[command(
    after_help = "Each line of the input is one event; empty lines are skipped. The command ends when every event is stored
on a majority of the replicas, and fails if one is not.

Examples:
  ensign publish orders --file events.jsonl
  tail -f access.log | ensign publish access --mimetype text/plain
  ensign publish pictures --whole --file cat.png --mimetype application/octet-stream --key-value name=cat"
)]
pub struct PublishArgs {
    /// The topic's name or id.
    pub topic: String,
    /// The file to read; - is standard input.
    #[arg(long, value_name = "FILE", default_value = "-")]
    pub file: PathBuf,
    /// The format of every event, as a media type.
    #[arg(long, value_name = "TYPE", default_value = "application/json")]
    pub mimetype: String,
    /// Attach a pair of metadata to every event. May be repeated.
    #[arg(long, value_name = "KEY=VALUE")]
    pub key_value: Vec<String>,
    /// Take the whole input as one event.
    #[arg(long)]
    pub whole: bool,
    /// How many events may wait for their acknowledgement.
    #[arg(long, value_name = "N", default_value_t = 4096, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub window: u32,
    /// Connection.
    #[command(flatten)]
    pub client: ClientArgs,
}

/// `ensign subscribe`.
#[derive(Debug, Args)]
#[command(
    after_help = "Prints one event a line; with --output json, one JSON object a line. If the connection breaks it goes on where it
was, without a gap or a repeat.

Examples:
  ensign subscribe orders                             what is published from now on
  ensign subscribe orders --from earliest --count 10
  ensign subscribe orders --from 1042                 from an offset
  ensign subscribe orders --from 2026-01-31T12:00:00Z from a time
  ensign subscribe orders --from 15m                  from fifteen minutes ago"
)]
pub struct SubscribeArgs {
    /// The topic's name or id.
    pub topic: String,
    /// Where to begin: latest, earliest, an offset, a time (RFC 3339), how long ago (15m), or the id of the event before.
    #[arg(long, value_name = "PLACE", default_value = "latest")]
    pub from: String,
    /// Stop after this many events.
    #[arg(long, value_name = "N")]
    pub count: Option<u64>,
    /// How fresh the place must be where `--from latest` begins. Default: what the node knows.
    #[arg(long, value_enum, value_name = "HOW")]
    pub consistency: Option<ConsistencyArg>,
    /// Connection.
    #[command(flatten)]
    pub client: ClientArgs,
}

/// How fresh what is read must be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ConsistencyArg {
    /// Everything that was acknowledged before; asks a majority first.
    Latest,
    /// What the nearest replica has, at most five seconds old; usually asks nobody.
    Local,
}

/// `ensign query`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  ensign query \"SELECT * FROM orders\"
  ensign query \"SELECT * FROM orders OFFSET 100 LIMIT 10\" --output json
  ensign query \"SELECT * FROM orders\" --consistency local   from the nearest replica, at most five seconds old")]
pub struct QueryArgs {
    /// The query: SELECT * FROM topic [OFFSET n] [LIMIT n].
    pub query: String,
    /// How fresh the answer must be. Default: latest.
    #[arg(long, value_enum, value_name = "HOW")]
    pub consistency: Option<ConsistencyArg>,
    /// Connection.
    #[command(flatten)]
    pub client: ClientArgs,
}
