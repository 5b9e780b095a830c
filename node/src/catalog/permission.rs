//! What a key may do: twenty permissions, of which seven may be given to an ordinary API key.

use std::fmt;

/// One permission. The wire strings are fixed: SDKs and tokens carry them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(missing_docs, reason = "each variant is its wire string, see `name`")]
pub enum Permission {
    ApiKeysDelete,
    ApiKeysEdit,
    ApiKeysRead,
    CollaboratorsAdd,
    CollaboratorsEdit,
    CollaboratorsRead,
    CollaboratorsRemove,
    MetricsRead,
    OrganizationsDelete,
    OrganizationsEdit,
    OrganizationsRead,
    ProjectsDelete,
    ProjectsEdit,
    ProjectsRead,
    Publisher,
    Subscriber,
    TopicsCreate,
    TopicsDestroy,
    TopicsEdit,
    TopicsRead,
}

impl Permission {
    /// All of them, in the order of their names.
    pub const ALL: [Self; 20] = [
        Self::ApiKeysDelete,
        Self::ApiKeysEdit,
        Self::ApiKeysRead,
        Self::CollaboratorsAdd,
        Self::CollaboratorsEdit,
        Self::CollaboratorsRead,
        Self::CollaboratorsRemove,
        Self::MetricsRead,
        Self::OrganizationsDelete,
        Self::OrganizationsEdit,
        Self::OrganizationsRead,
        Self::ProjectsDelete,
        Self::ProjectsEdit,
        Self::ProjectsRead,
        Self::Publisher,
        Self::Subscriber,
        Self::TopicsCreate,
        Self::TopicsDestroy,
        Self::TopicsEdit,
        Self::TopicsRead,
    ];

    /// The wire string.
    pub const fn name(self) -> &'static str {
        match self {
            Self::ApiKeysDelete => "apikeys:delete",
            Self::ApiKeysEdit => "apikeys:edit",
            Self::ApiKeysRead => "apikeys:read",
            Self::CollaboratorsAdd => "collaborators:add",
            Self::CollaboratorsEdit => "collaborators:edit",
            Self::CollaboratorsRead => "collaborators:read",
            Self::CollaboratorsRemove => "collaborators:remove",
            Self::MetricsRead => "metrics:read",
            Self::OrganizationsDelete => "organizations:delete",
            Self::OrganizationsEdit => "organizations:edit",
            Self::OrganizationsRead => "organizations:read",
            Self::ProjectsDelete => "projects:delete",
            Self::ProjectsEdit => "projects:edit",
            Self::ProjectsRead => "projects:read",
            Self::Publisher => "publisher",
            Self::Subscriber => "subscriber",
            Self::TopicsCreate => "topics:create",
            Self::TopicsDestroy => "topics:destroy",
            Self::TopicsEdit => "topics:edit",
            Self::TopicsRead => "topics:read",
        }
    }

    /// The permission of a wire string.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|permission| permission.name() == name)
    }

    const fn bit(self) -> u32 {
        1 << self as u32
    }
}

impl fmt::Display for Permission {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// A set of permissions.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Permissions(u32);

impl Permissions {
    /// None.
    pub const NONE: Self = Self(0);
    /// The seven that an ordinary API key may carry: "full access".
    pub const API_KEY: Self = Self::of(&[
        Permission::MetricsRead,
        Permission::Publisher,
        Permission::Subscriber,
        Permission::TopicsCreate,
        Permission::TopicsDestroy,
        Permission::TopicsEdit,
        Permission::TopicsRead,
    ]);
    /// All that an operator's key carries; it never publishes or subscribes.
    pub const OPERATOR: Self =
        Self(((1 << Permission::ALL.len()) - 1) & !(Permission::Publisher.bit() | Permission::Subscriber.bit()));

    /// The set of these.
    pub const fn of(permissions: &[Permission]) -> Self {
        let mut bits = 0;
        let mut i = 0;
        while i < permissions.len() {
            bits |= permissions[i].bit();
            i += 1;
        }
        Self(bits)
    }

    /// The set of these wire strings.
    ///
    /// # Errors
    /// The first string that is no permission.
    pub fn from_names<S: AsRef<str>>(names: impl IntoIterator<Item = S>) -> Result<Self, String> {
        names.into_iter().try_fold(Self::NONE, |set, name| {
            let name = name.as_ref();
            Permission::from_name(name).map(|p| set.with(p)).ok_or_else(|| name.chars().take(64).collect())
        })
    }

    /// This set and `permission`.
    #[must_use]
    pub const fn with(self, permission: Permission) -> Self {
        Self(self.0 | permission.bit())
    }

    /// Whether `permission` is in the set.
    pub fn contains(self, permission: impl Into<Permission>) -> bool {
        self.0 & permission.into().bit() != 0
    }

    /// Whether every permission of this set is in `other`.
    pub const fn is_subset(self, other: Self) -> bool {
        self.0 & !other.0 == 0
    }

    /// Whether there is none.
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// The permissions, sorted by name.
    pub fn iter(self) -> impl Iterator<Item = Permission> {
        Permission::ALL.into_iter().filter(move |permission| self.contains(*permission))
    }

    /// The wire strings, sorted.
    pub fn names(self) -> Vec<&'static str> {
        self.iter().map(Permission::name).collect()
    }
}

impl fmt::Debug for Permissions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.names()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_order_of_variants_is_the_order_of_names() {
        assert!(Permission::ALL.windows(2).all(|pair| pair[0] < pair[1] && pair[0].name() < pair[1].name()));
    }

    #[test]
    fn an_api_key_may_carry_exactly_the_seven() {
        let seven = [
            "metrics:read",
            "publisher",
            "subscriber",
            "topics:create",
            "topics:destroy",
            "topics:edit",
            "topics:read",
        ];
        assert_eq!(Permissions::API_KEY.names(), seven);
        assert_eq!(Permissions::from_names(seven), Ok(Permissions::API_KEY));
        assert_eq!(Permissions::OPERATOR.names().len(), 18);
        assert!(!Permissions::OPERATOR.contains(Permission::Publisher));
    }

    #[test]
    fn an_unknown_name_is_refused_by_name() {
        assert_eq!(Permissions::from_names(["publisher", "root"]), Err("root".to_owned()));
    }
}
