//! A bounded map that forgets what was not used lately.

use std::collections::HashMap;
use std::hash::Hash;

/// At most `capacity` entries in two generations: whatever was not touched while half the capacity came in is forgotten.
///
/// Every operation takes constant time, unlike a scan for the oldest entry, and nothing a client sends makes it grow.
#[derive(Debug)]
pub(super) struct Recent<K, V> {
    young: HashMap<K, V>,
    old: HashMap<K, V>,
    half: usize,
}

impl<K: Eq + Hash, V> Recent<K, V> {
    pub(super) fn new(capacity: usize) -> Self {
        Self { young: HashMap::new(), old: HashMap::new(), half: (capacity / 2).max(1) }
    }

    /// The entry of `key`, which counts as used.
    pub(super) fn get_mut(&mut self, key: &K) -> Option<&mut V> {
        if !self.young.contains_key(key) {
            let (key, value) = self.old.remove_entry(key)?;
            self.insert(key, value);
        }
        self.young.get_mut(key)
    }

    pub(super) fn insert(&mut self, key: K, value: V) {
        self.old.remove(&key);
        if self.young.len() >= self.half && !self.young.contains_key(&key) {
            self.old = std::mem::take(&mut self.young);
        }
        self.young.insert(key, value);
    }

    pub(super) fn remove(&mut self, key: &K) -> Option<V> {
        self.young.remove(key).or_else(|| self.old.remove(key))
    }

    pub(super) fn retain(&mut self, mut keep: impl FnMut(&V) -> bool) {
        self.young.retain(|_, value| keep(value));
        self.old.retain(|_, value| keep(value));
    }

    #[cfg(test)]
    fn len(&self) -> usize {
        self.young.len() + self.old.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_never_grows_past_its_capacity_and_keeps_what_is_used() {
        let mut recent = Recent::new(8);
        recent.insert(0, 'k');
        for n in 1..1_000 {
            recent.insert(n, 'x');
            assert!(recent.len() <= 8);
            assert_eq!(recent.get_mut(&0), Some(&mut 'k'));
        }
        assert_eq!(recent.get_mut(&1), None);
    }

    #[test]
    fn what_is_removed_is_gone() {
        let mut recent = Recent::new(2);
        recent.insert(1, 'a');
        recent.insert(2, 'b');
        assert_eq!(recent.remove(&1), Some('a'));
        assert_eq!(recent.get_mut(&1), None);
        recent.retain(|value| *value != 'b');
        assert_eq!(recent.len(), 0);
    }
}
