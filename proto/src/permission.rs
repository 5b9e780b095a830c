//! What a token allows. The strings are part of the wire contract.

use std::fmt;
use std::str::FromStr;

use thiserror::Error;

macro_rules! permissions {
    ($($(#[$doc:meta])* $name:ident = $text:literal,)*) => {
        /// One thing that a token may allow.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum Permission {
            $($(#[$doc])* $name,)*
        }

        impl Permission {
            /// Every permission, in the order of the wire contract.
            pub const ALL: &'static [Self] = &[$(Self::$name),*];

            /// The permission as tokens carry it.
            pub const fn as_str(self) -> &'static str {
                match self {
                    $(Self::$name => $text,)*
                }
            }
        }
    };
}

permissions! {
    /// Change the organization.
    OrganizationsEdit = "organizations:edit",
    /// Delete the organization.
    OrganizationsDelete = "organizations:delete",
    /// See the organization.
    OrganizationsRead = "organizations:read",
    /// Invite people.
    CollaboratorsAdd = "collaborators:add",
    /// Remove people.
    CollaboratorsRemove = "collaborators:remove",
    /// Change what people may do.
    CollaboratorsEdit = "collaborators:edit",
    /// See who belongs to the organization.
    CollaboratorsRead = "collaborators:read",
    /// Create and change projects.
    ProjectsEdit = "projects:edit",
    /// Delete projects.
    ProjectsDelete = "projects:delete",
    /// See projects.
    ProjectsRead = "projects:read",
    /// Create and change API keys.
    ApiKeysEdit = "apikeys:edit",
    /// Revoke API keys.
    ApiKeysDelete = "apikeys:delete",
    /// See API keys (never their secrets).
    ApiKeysRead = "apikeys:read",
    /// Create topics.
    TopicsCreate = "topics:create",
    /// Archive topics and change their policies.
    TopicsEdit = "topics:edit",
    /// Destroy topics.
    TopicsDestroy = "topics:destroy",
    /// See topics, and query them.
    TopicsRead = "topics:read",
    /// See counters.
    MetricsRead = "metrics:read",
    /// Publish events.
    Publisher = "publisher",
    /// Subscribe to events, and query them.
    Subscriber = "subscriber",
}

/// Text that names no permission.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{0:?} is not a permission")]
pub struct UnknownPermission(pub String);

impl Permission {
    /// The seven that an API key can have, sorted by their text. The others are for people.
    pub const API_KEY: [Self; 7] = [
        Self::MetricsRead,
        Self::Publisher,
        Self::Subscriber,
        Self::TopicsCreate,
        Self::TopicsDestroy,
        Self::TopicsEdit,
        Self::TopicsRead,
    ];

    /// Whether an API key can have it.
    pub fn is_for_api_keys(self) -> bool {
        Self::API_KEY.contains(&self)
    }
}

impl fmt::Display for Permission {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl FromStr for Permission {
    type Err = UnknownPermission;

    fn from_str(text: &str) -> Result<Self, UnknownPermission> {
        let found = Self::ALL.iter().find(|permission| permission.as_str() == text);
        found.copied().ok_or_else(|| UnknownPermission(text.chars().take(64).collect()))
    }
}

/// A set of permissions.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct PermissionSet(u32);

impl PermissionSet {
    /// No permission.
    pub const EMPTY: Self = Self(0);

    /// Everything an API key can have.
    pub fn api_key() -> Self {
        Permission::API_KEY.into_iter().collect()
    }

    /// Everything.
    pub fn all() -> Self {
        Permission::ALL.iter().copied().collect()
    }

    /// The permissions of `texts` that we know. A token may carry others, which allow nothing here.
    pub fn from_known<'a>(texts: impl IntoIterator<Item = &'a str>) -> Self {
        texts.into_iter().filter_map(|text| text.parse::<Permission>().ok()).collect()
    }

    /// Whether `permission` is in the set.
    pub fn contains(self, permission: Permission) -> bool {
        self.0 & Self::bit(permission) != 0
    }

    /// Whether everything in `other` is in the set too.
    pub fn contains_all(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// Whether anything in `other` is in the set too.
    pub fn contains_any(self, other: Self) -> bool {
        self.0 & other.0 != 0
    }

    /// Adds `permission`.
    pub fn insert(&mut self, permission: Permission) {
        self.0 |= Self::bit(permission);
    }

    /// Whether the set has nothing in it.
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// The permissions, in the order of the wire contract.
    pub fn iter(self) -> impl Iterator<Item = Permission> {
        Permission::ALL.iter().copied().filter(move |permission| self.contains(*permission))
    }

    /// The permissions as texts, sorted: the form in tokens and replies.
    pub fn to_texts(self) -> Vec<&'static str> {
        let mut texts: Vec<_> = self.iter().map(Permission::as_str).collect();
        texts.sort_unstable();
        texts
    }

    fn bit(permission: Permission) -> u32 {
        1 << permission as u32
    }
}

impl FromIterator<Permission> for PermissionSet {
    fn from_iter<I: IntoIterator<Item = Permission>>(permissions: I) -> Self {
        let mut set = Self::EMPTY;
        for permission in permissions {
            set.insert(permission);
        }
        set
    }
}

impl fmt::Debug for PermissionSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.to_texts()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_permission_survives_its_text() {
        assert_eq!(Permission::ALL.len(), 20);
        for permission in Permission::ALL {
            assert_eq!(permission.as_str().parse(), Ok(*permission));
        }
        assert_eq!("Publisher".parse::<Permission>(), Err(UnknownPermission("Publisher".into())));
    }

    #[test]
    fn full_access_of_an_api_key_is_seven_texts_in_order() {
        assert_eq!(
            PermissionSet::api_key().to_texts(),
            [
                "metrics:read",
                "publisher",
                "subscriber",
                "topics:create",
                "topics:destroy",
                "topics:edit",
                "topics:read"
            ]
        );
        assert!(!Permission::ApiKeysEdit.is_for_api_keys());
    }

    #[test]
    fn an_unknown_text_allows_nothing() {
        let set = PermissionSet::from_known(["publisher", "everything", "topics:read"]);
        assert_eq!(set, [Permission::Publisher, Permission::TopicsRead].into_iter().collect());
        assert!(set.contains(Permission::Publisher) && !set.contains(Permission::Subscriber));
        assert!(PermissionSet::all().contains_all(set) && !set.contains_all(PermissionSet::api_key()));
        assert!(set.contains_any(PermissionSet::api_key()) && !PermissionSet::EMPTY.contains_any(PermissionSet::all()));
    }
}
