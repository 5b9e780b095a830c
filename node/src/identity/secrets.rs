//! Where secrets rest: the vault, seen through a small face, and a double of it for tests.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Mutex, PoisonError};

use futures::FutureExt as _;
use futures::future::BoxFuture;
use thiserror::Error;
use zeroize::Zeroizing;

/// Bytes that nobody may print; overwritten when dropped.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(Zeroizing<Vec<u8>>);

impl Secret {
    /// Takes the bytes over.
    pub fn new(bytes: Vec<u8>) -> Self {
        Self(Zeroizing::new(bytes))
    }

    /// The bytes, for the one who needs them.
    pub fn expose(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

/// What a secret is for; the vault binds it to its place with this number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum SecretKind {
    /// A private token-signing key, PKCS#8 DER, under its `kid`.
    TokenSigning = 1,
    /// The Argon2id hash of an API key's secret, as a PHC string, under the key's id.
    ApiKey = 2,
    /// The private key of the cluster's certificate authority, PKCS#8 PEM, under the cluster's id.
    Authority = 4,
}

/// Why the vault gave no answer.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum SecretError {
    /// No vault leader in reach, or it is sealed. Try again.
    #[error("the vault is unavailable: {cause}")]
    Unavailable {
        /// What it said. No secret, no key.
        cause: String,
    },
    /// A secret of this kind and id exists already.
    #[error("the vault has another secret in this place")]
    Exists,
    /// It refused for good.
    #[error("the vault refused: {cause}")]
    Refused {
        /// What it said. No secret, no key.
        cause: String,
    },
}

/// Keeps secrets, sealed, for the whole cluster.
pub trait SecretStore: Send + Sync + 'static {
    /// Keeps a secret in a place that has none. Durable when it returns.
    fn put(&self, kind: SecretKind, id: [u8; 16], secret: Secret) -> BoxFuture<'static, Result<(), SecretError>>;

    /// The secret of this place, if there is one.
    fn get(&self, kind: SecretKind, id: [u8; 16]) -> BoxFuture<'static, Result<Option<Secret>, SecretError>>;

    /// Destroys the secret of this place; none is no error.
    fn delete(&self, kind: SecretKind, id: [u8; 16]) -> BoxFuture<'static, Result<(), SecretError>>;
}

/// Keeps secrets in memory, for tests; can be switched off to see what happens without a vault.
#[derive(Default)]
pub struct MemorySecrets {
    state: Mutex<MemoryState>,
}

#[derive(Default)]
struct MemoryState {
    secrets: BTreeMap<(SecretKind, [u8; 16]), Secret>,
    reads: usize,
    down: bool,
}

impl fmt::Debug for MemorySecrets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("MemorySecrets")
    }
}

impl MemorySecrets {
    /// Takes the vault away, or gives it back.
    pub fn set_down(&self, down: bool) {
        self.lock().down = down;
    }

    /// How often a secret was given out.
    pub fn reads(&self) -> usize {
        self.lock().reads
    }

    /// How many secrets there are.
    pub fn len(&self) -> usize {
        self.lock().secrets.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, MemoryState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn with<T>(&self, act: impl FnOnce(&mut MemoryState) -> Result<T, SecretError>) -> Result<T, SecretError> {
        let mut state = self.lock();
        if state.down {
            return Err(SecretError::Unavailable { cause: "switched off".to_owned() });
        }
        act(&mut state)
    }
}

impl SecretStore for MemorySecrets {
    fn put(&self, kind: SecretKind, id: [u8; 16], secret: Secret) -> BoxFuture<'static, Result<(), SecretError>> {
        let result = self.with(|state| match state.secrets.entry((kind, id)) {
            std::collections::btree_map::Entry::Occupied(_) => Err(SecretError::Exists),
            std::collections::btree_map::Entry::Vacant(place) => {
                place.insert(secret);
                Ok(())
            }
        });
        futures::future::ready(result).boxed()
    }

    fn get(&self, kind: SecretKind, id: [u8; 16]) -> BoxFuture<'static, Result<Option<Secret>, SecretError>> {
        let result = self.with(|state| {
            let found = state.secrets.get(&(kind, id)).cloned();
            state.reads += usize::from(found.is_some());
            Ok(found)
        });
        futures::future::ready(result).boxed()
    }

    fn delete(&self, kind: SecretKind, id: [u8; 16]) -> BoxFuture<'static, Result<(), SecretError>> {
        let result = self.with(|state| {
            state.secrets.remove(&(kind, id));
            Ok(())
        });
        futures::future::ready(result).boxed()
    }
}
