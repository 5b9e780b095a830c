//! From flags, variables and the credentials file to a client.

use std::io::IsTerminal as _;
use std::path::Path;

use ensign_client::{CallError, Client, CredentialsFile, Options};
use ensign_proto::ProjectId;

use super::args::ClientArgs;
use super::exit::{NoAdministrator, UsageError};

/// Clients for the project's key and, where the credentials file has one, the administrator's.
pub(crate) struct Clients {
    pub(crate) project: Client,
    admin: Option<Client>,
}

impl Clients {
    /// The administrator's client.
    ///
    /// # Errors
    /// The credentials file has no such key.
    pub(super) fn admin(&self) -> Result<ensign_client::Admin, NoAdministrator> {
        self.admin.as_ref().map(Client::admin).ok_or(NoAdministrator)
    }

    /// The project that the credentials are for; `None` where their key may not ask.
    ///
    /// # Errors
    /// The cluster cannot be asked.
    pub(super) async fn project_id(&self) -> anyhow::Result<Option<ProjectId>> {
        match self.project.info(&[]).await {
            Ok(info) => Ok(Some(ProjectId::try_from(&info.project_id[..])?)),
            Err(CallError::PermissionDenied { .. }) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Whether there is an administrator's key.
    pub(super) fn has_admin(&self) -> bool {
        self.admin.is_some()
    }
}

/// Reads the credentials and makes clients. Nothing is sent yet.
///
/// # Errors
/// The credentials file is missing or bad, or an address is.
pub(crate) fn connect(args: &ClientArgs) -> anyhow::Result<Clients> {
    if args.verbose {
        log_to_stderr();
    }
    let file = CredentialsFile::read(&args.credentials).map_err(|error| hint(&args.credentials, error))?;
    let (mut project, mut admin) = Options::from_file(file);
    for options in std::iter::once(&mut project).chain(&mut admin) {
        if let Some(list) = &args.endpoint {
            options.set_endpoints(list);
        }
        if let Some(list) = &args.auth_url {
            options.set_auth_urls(list);
        }
        if let Some(insecure) = args.insecure {
            options.insecure = insecure;
        }
        if let Some(file) = &args.ca_file {
            options.ca_file = Some(file.clone());
        }
        concat!("ensign-cli/", env!("CARGO_PKG_VERSION")).clone_into(&mut options.client_id);
    }
    Ok(Clients { project: Client::connect(project)?, admin: admin.map(Client::connect).transpose()? })
}

fn hint(path: &Path, error: ensign_client::CredentialsError) -> anyhow::Error {
    let missing = matches!(&error, ensign_client::CredentialsError::Read { source, .. } if source.kind() == std::io::ErrorKind::NotFound);
    if !missing {
        return error.into();
    }
    UsageError(format!(
        "there is no credentials file {}: name one with --credentials or ENSIGN_CREDENTIALS (`ensign dev` writes ensign-dev.json)",
        path.display()
    ))
    .into()
}

fn log_to_stderr() {
    let filter = tracing_subscriber::EnvFilter::new("warn,ensign_client=info");
    let logs = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .log_internal_errors(false);
    // Set twice only if a command connects twice.
    let _ = logs.try_init();
}
