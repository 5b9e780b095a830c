//! What can be typed after `ensign receipt`.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::Output;

/// `ensign receipt`.
#[derive(Debug, Subcommand)]
pub enum ReceiptCommand {
    /// Verify receipts of the key vault.
    Verify(VerifyArgs),
}

/// `ensign receipt verify`.
#[derive(Debug, Args)]
#[command(
    after_help = "Needs no cluster and no credentials. Give it the fingerprint that `ensign serve --bootstrap` logged when the
cluster was made, and that was kept since, outside the cluster. Keys that were made later vouch for each
other, back to that one.

A receipt that is verified proves what the cluster's vault committed, when, and on which basis. It does not
prove that nobody kept a copy: of the data before it was destroyed, of a vault, or of a root key.

Compare `kek_id` with what `ensign key describe` showed before, and `audit` with the cluster's record of key events.

Examples:
  ensign receipt verify revoked.jws --keys https://auth.example/.well-known/ensign-receipts.json --fingerprint kPrK_qmxVWaYVA9wwBF6Iuo3vVzz7TxHCTwXBygrS4k
  ensign receipt verify revoked.jws --keys ensign-receipts.json --fingerprint kPrK_qmxVWaYVA9wwBF6Iuo3vVzz7TxHCTwXBygrS4k --output json"
)]
pub struct VerifyArgs {
    /// The file with the receipts, one a line; `-` is the standard input.
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
    /// The cluster's receipt keys: a file, or the address of /.well-known/ensign-receipts.json.
    #[arg(long, value_name = "FILE-OR-URL")]
    pub keys: String,
    /// The fingerprint of the key to trust.
    #[arg(long, value_name = "FINGERPRINT")]
    pub fingerprint: String,
    /// A PEM file of certificate authorities to trust besides the system's, where the keys are fetched.
    #[arg(long, value_name = "FILE")]
    pub ca_file: Option<PathBuf>,
    /// How to print.
    #[arg(long, value_enum, default_value_t = Output::Human)]
    pub output: Output,
}
