//! What `ensign project`, `apikey` and `status` take.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::ClientArgs;

/// `ensign project`.
#[derive(Debug, Subcommand)]
pub enum ProjectCommand {
    /// Create a project.
    #[command(after_help = "Example:\n  ensign project create \"web shop\"")]
    Create {
        /// What people call it.
        name: String,
        /// The organization's id. Default: the administrator's own.
        #[arg(long, value_name = "ID")]
        organization: Option<String>,
        /// Connection.
        #[command(flatten)]
        client: ClientArgs,
    },
    /// List projects.
    List {
        /// Only those of the organization with this id.
        #[arg(long, value_name = "ID")]
        organization: Option<String>,
        /// Connection.
        #[command(flatten)]
        client: ClientArgs,
    },
}

/// `ensign apikey`.
#[derive(Debug, Subcommand)]
pub enum ApiKeyCommand {
    /// Create an API key. Its secret is written to a file and never shown again.
    #[command(
        after_help = "With a key ring of its own, what is published with an API key can be destroyed together with it, in whichever
topics it is: see `ensign apikey revoke --shred`. Readers of those topics then come to batches that do not
open, and are told where to go on.

Examples:
  ensign apikey create reader --permission subscriber --permission topics:read --save reader.json
  ensign apikey create device-17 --permission publisher --own-ring"
    )]
    Create {
        /// What people call it.
        name: String,
        /// What it may do: metrics:read, publisher, subscriber, topics:create, topics:destroy, topics:edit, topics:read.
        /// May be repeated. Default: all seven.
        #[arg(long = "permission", value_name = "PERMISSION")]
        permissions: Vec<String>,
        /// The project's id. Default: the one that the credentials are for.
        #[arg(long, value_name = "ID")]
        project: Option<String>,
        /// The key ring that its events are sealed under, whichever topic they go to; by its id or its name in the project. Default: that of
        /// the topic.
        #[arg(long, value_name = "RING")]
        ring: Option<String>,
        /// Make a key ring that belongs to this API key alone, and seal its events under that.
        #[arg(long, conflicts_with = "ring")]
        own_ring: bool,
        /// Where to write its credentials (mode 0600; must not exist yet); - prints them. Default: apikey-NAME.json.
        #[arg(long, value_name = "FILE")]
        save: Option<PathBuf>,
        /// Connection.
        #[command(flatten)]
        client: ClientArgs,
    },
    /// List API keys.
    List {
        /// Only those of the project with this id.
        #[arg(long, value_name = "ID")]
        project: Option<String>,
        /// Connection.
        #[command(flatten)]
        client: ClientArgs,
    },
    /// Show an API key, the key ring that its events are sealed under, and where they are.
    Describe {
        /// Its id or client id.
        key: String,
        /// Connection.
        #[command(flatten)]
        client: ClientArgs,
    },
    /// Revoke an API key: its tokens and streams end, for ever.
    #[command(
        after_help = "With --shred the key ring goes, too, if it is the API key's alone: everything that was published with the API
key becomes unreadable, for everybody and for ever, in whichever topics it is. It takes a moment, at worst
the lease wait (about 15 seconds); a command that was cut off is given again. An API key without a ring of its
own, or with one that seals something else as well, is refused.

Examples:
  ensign apikey revoke 01J9ZK3V5Q8M2N4P6R7S9T1V3X
  ensign apikey revoke 01J9ZK3V5Q8M2N4P6R7S9T1V3X --shred"
    )]
    Revoke {
        /// Its id or client id.
        key: String,
        /// Also destroy everything that was published with it, by destroying its key ring.
        #[arg(long)]
        shred: bool,
        /// Do not ask.
        #[arg(long)]
        yes: bool,
        /// Connection.
        #[command(flatten)]
        client: ClientArgs,
    },
}

/// `ensign status`.
#[derive(Debug, Args)]
#[command(
    after_help = "With an administrator's key in the credentials file it shows nodes and groups, otherwise only the node that answers."
)]
pub struct StatusArgs {
    /// Connection.
    #[command(flatten)]
    pub client: ClientArgs,
}
