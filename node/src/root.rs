//! What keeps the root key, as the settings choose it; and what a bootstrap makes of it.

mod command;
mod outside;
mod transit;

use std::path::Path;
use std::sync::Arc;

use anyhow::bail;
use ensign_keyvault::{Cost, Entropy, FileRoot, PASSPHRASE_BYTES, Passphrase, PassphraseRoot, RootKey, RootProvider};
use tracing::warn;
use zeroize::Zeroizing;

use command::CommandRoot;
use transit::TransitRoot;

use crate::config::{Config, Provider};
use crate::files::{read_secret, write_secret};

/// What the settings choose. Nothing is read or called yet.
pub(crate) fn provider(config: &Config) -> Arc<dyn RootProvider> {
    match config.root.provider {
        Provider::File => Arc::new(FileRoot::new(config.node.root_key.clone())),
        Provider::Passphrase => Arc::new(PassphraseRoot::new(Cost::of_this_machine())),
        Provider::Command => Arc::new(CommandRoot::new(config.root.command.clone())),
        Provider::Transit => Arc::new(TransitRoot {
            address: config.root.transit_address.clone(),
            mount: config.root.transit_mount.clone(),
            key: config.root.transit_key.clone(),
            token: config.root.transit_token.clone(),
            authority: config.root.transit_authority.clone(),
        }),
    }
}

/// Makes what the cluster's root key will be, unless an earlier attempt did. The passphrase that the vault is to be made with is
/// the one in `phrase`, or a new one, which is then written there.
///
/// # Errors
/// A file cannot be written, or what is there cannot be used.
pub(crate) fn make(config: &Config, phrase: &Path) -> anyhow::Result<Option<Passphrase>> {
    match config.root.provider {
        Provider::File => make_key(&config.node.root_key).map(|()| None),
        Provider::Passphrase => make_phrase(phrase).map(Some),
        // What keeps it has made it, or is asked to when the vault is made.
        Provider::Command | Provider::Transit => Ok(None),
    }
}

/// Makes the root key, unless an earlier attempt did.
///
/// # Errors
/// The file cannot be written, or what is there is no root key.
pub(crate) fn make_key(path: &Path) -> anyhow::Result<()> {
    if path.exists() {
        RootKey::load(path)?;
        return Ok(());
    }
    RootKey::create(path)?;
    warn!(
        root_key = %path.display(),
        "made the root key: copy it off this machine now, and to every other node of the cluster; without it all data is lost"
    );
    Ok(())
}

fn make_phrase(path: &Path) -> anyhow::Result<Passphrase> {
    if path.exists() {
        return read_phrase(path);
    }
    let phrase = Passphrase::generate(&Entropy::kernel());
    let line = Zeroizing::new([phrase.expose(), b"\n"].concat());
    // Before the vault is made with it: a crash in between is repaired with the same phrase.
    write_secret(path, &line)?;
    warn!(
        passphrase = %path.display(),
        "made the passphrase of the root key: write it down, keep it off this machine and delete the file; without it all data is lost"
    );
    Ok(phrase)
}

fn read_phrase(path: &Path) -> anyhow::Result<Passphrase> {
    let text = read_secret(path, PASSPHRASE_BYTES + 2)?;
    let named = || format!("{} holds no passphrase", path.display());
    match Passphrase::new(text) {
        Ok(phrase) => Ok(phrase),
        Err(error) => bail!(anyhow::Error::new(error).context(named())),
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, Permissions};
    use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};

    use super::*;

    #[test]
    fn a_passphrase_is_made_once_and_never_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("passphrase");
        let made = make_phrase(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o600);
        assert_eq!(make_phrase(&path).unwrap().expose(), made.expose());
        fs::write(&path, "a phrase of our own\n").unwrap();
        assert_eq!(make_phrase(&path).unwrap().expose(), b"a phrase of our own");

        let refused = || format!("{:#}", make_phrase(&path).unwrap_err());
        fs::write(&path, "two\nlines\n").unwrap();
        assert!(refused().contains("more than one line"), "{}", refused());
        fs::write(&path, "x".repeat(2_000)).unwrap();
        assert!(refused().contains("longer than 1026 bytes"), "{}", refused());
        fs::set_permissions(&path, Permissions::from_mode(0o640)).unwrap();
        assert!(refused().contains("chmod 600"), "{}", refused());
    }
}
