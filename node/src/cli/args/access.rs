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
    #[command(after_help = "Example:
  ensign apikey create reader --permission subscriber --permission topics:read --save reader.json")]
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
    /// Revoke an API key: its tokens and streams end, for ever.
    Revoke {
        /// Its id or client id.
        key: String,
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
