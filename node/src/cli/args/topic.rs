//! What `ensign topic` takes.

use std::path::PathBuf;

use clap::Subcommand;

use super::ClientArgs;

/// `ensign topic`.
#[derive(Debug, Subcommand)]
pub enum TopicCommand {
    /// Create topics.
    #[command(
        after_help = "A name begins with a letter and has letters, digits, dots, dashes and underscores, at most 512.
Of many topics each is decided for itself: those that can be made are, and the command says which could not and fails.
A thousand are made in a few commits; the command shows how far it is.

Examples:
  ensign topic create shop.orders
  ensign topic create shop.orders shop.returns shop.stock
  ensign topic create --from topics.txt --if-missing      one name a line; # begins a comment
  ensign topic create shop.orders --replication 5
  ensign topic create shop.orders --region eu-west,eu-north --leader-region eu-west
  ensign topic create shop.payments --key payments        under a ring that `ensign key create` made"
    )]
    Create {
        /// Their names.
        #[arg(value_name = "NAME", required_unless_present = "from")]
        names: Vec<String>,
        /// Read names from this file too, one a line; - is standard input.
        #[arg(long, value_name = "FILE")]
        from: Option<PathBuf>,
        /// Take a topic that exists already for made.
        #[arg(long)]
        if_missing: bool,
        /// How many replicas it has, 1 to 9. Default: three, or as many as there are nodes. One topic at a time.
        #[arg(long, value_name = "N")]
        replication: Option<u32>,
        /// The regions that its replicas never leave; several separated by commas. Default: any. One topic at a time.
        #[arg(long = "region", value_name = "REGION", value_delimiter = ',')]
        regions: Vec<String>,
        /// The region that should lead, where a replica is. One topic at a time.
        #[arg(long, value_name = "REGION", default_value = "", hide_default_value = true)]
        leader_region: String,
        /// The key ring that their events are sealed under, by its id or its name in the project. Default: the project's own.
        #[arg(long, value_name = "RING")]
        key: Option<String>,
        /// Connection.
        #[command(flatten)]
        client: ClientArgs,
    },
    /// List the topics of the project.
    List {
        /// Connection.
        #[command(flatten)]
        client: ClientArgs,
    },
    /// Show one topic: its state, events and bytes.
    Describe {
        /// Its name or id.
        topic: String,
        /// Connection.
        #[command(flatten)]
        client: ClientArgs,
    },
    /// Change where a topic's replicas are, how many, and what seals it. Needs an operator's key.
    #[command(
        after_help = "Replicas that do not fit any more are moved in the background; publishers and subscribers notice nothing but a pause.
Another key ring seals what is published from then on; what is stored stays under the ring of before.
The topic's leader may need a moment to hear of it: wait some seconds before you destroy that ring, and look
at what it seals (`ensign key describe`).

Examples:
  ensign topic alter orders --key orders-2027
  ensign topic alter orders --replication 5
  ensign topic alter orders --region eu-west,eu-north
  ensign topic alter orders --any-region --leader-region us-east"
    )]
    Alter {
        /// Its name or id.
        topic: String,
        /// How many replicas it shall have, 1 to 9.
        #[arg(long, value_name = "N")]
        replication: Option<u32>,
        /// The regions that its replicas shall never leave; several separated by commas.
        #[arg(long = "region", value_name = "REGION", value_delimiter = ',')]
        regions: Vec<String>,
        /// Let its replicas be in any region.
        #[arg(long, conflicts_with = "regions")]
        any_region: bool,
        /// The region that should lead.
        #[arg(long, value_name = "REGION")]
        leader_region: Option<String>,
        /// Let any region lead.
        #[arg(long, conflicts_with = "leader_region")]
        no_leader_region: bool,
        /// The key ring that seals what is published from now on, by its id or its name in the topic's project.
        #[arg(long, value_name = "RING")]
        key: Option<String>,
        /// Connection.
        #[command(flatten)]
        client: ClientArgs,
    },
    /// Make a topic read-only, for ever.
    Archive {
        /// Its name or id.
        topic: String,
        /// Do not ask.
        #[arg(long)]
        yes: bool,
        /// Connection.
        #[command(flatten)]
        client: ClientArgs,
    },
    /// Destroy a topic and every event in it, for ever.
    Destroy {
        /// Its name or id.
        topic: String,
        /// Do not ask.
        #[arg(long)]
        yes: bool,
        /// Connection.
        #[command(flatten)]
        client: ClientArgs,
    },
}
