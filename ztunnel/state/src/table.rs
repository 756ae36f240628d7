//! A hash table in many small parts: it grows and shrinks in small steps, where a whole one would double, and who
//! wants to see all of it can do so a part at a time.
//!
//! The entries hold their own keys; whoever looks up brings the hash and the comparison.

use hashbrown::HashTable;

/// The table. Equal keys may occur several times.
#[derive(Debug)]
pub(crate) struct Table<T> {
    parts: Box<[HashTable<T>]>,
    len: usize,
}

/// Fewer are not worth moving.
const SMALL: usize = 16;

impl<T> Table<T> {
    /// In so many parts, 32 bytes each when empty.
    pub(crate) fn in_parts(parts: usize) -> Self {
        Self { parts: (0..parts).map(|_| HashTable::new()).collect(), len: 0 }
    }

    /// The part of a hash. Hashbrown places by the lowest bits and tells apart by the highest.
    fn part(&self, hash: u64) -> usize {
        let middle = usize::try_from((hash >> 24) & 0xffff_ffff).unwrap_or_default();
        middle.checked_rem(self.parts.len()).unwrap_or_default()
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Those of one part, for who wants to see all without keeping the writer waiting all the time.
    pub(crate) fn of_part(&self, part: usize) -> Option<impl Iterator<Item = &T>> {
        self.parts.get(part).map(HashTable::iter)
    }

    #[cfg(test)]
    pub(crate) fn iter(&self) -> impl Iterator<Item = &T> {
        self.parts.iter().flat_map(HashTable::iter)
    }

    pub(crate) fn find(&self, hash: u64, is_it: impl FnMut(&T) -> bool) -> Option<&T> {
        self.parts.get(self.part(hash))?.find(hash, is_it)
    }

    pub(crate) fn find_mut(&mut self, hash: u64, is_it: impl FnMut(&T) -> bool) -> Option<&mut T> {
        let part = self.part(hash);
        self.parts.get_mut(part)?.find_mut(hash, is_it)
    }

    /// All that may have this hash: the caller compares.
    pub(crate) fn find_all(&self, hash: u64) -> impl Iterator<Item = &T> {
        self.parts.get(self.part(hash)).into_iter().flat_map(move |part| part.iter_hash(hash))
    }

    pub(crate) fn insert(&mut self, hash: u64, value: T, rehash: impl Fn(&T) -> u64) {
        let part = self.part(hash);
        if let Some(part) = self.parts.get_mut(part) {
            part.insert_unique(hash, value, rehash);
            self.len += 1;
        }
    }

    pub(crate) fn remove(
        &mut self,
        hash: u64,
        is_it: impl FnMut(&T) -> bool,
        rehash: impl Fn(&T) -> u64,
    ) -> Option<T> {
        let part = self.part(hash);
        let part = self.parts.get_mut(part)?;
        let (value, _) = part.find_entry(hash, is_it).ok()?.remove();
        self.len -= 1;
        if part.len() > SMALL && part.len() * 4 < part.capacity() {
            part.shrink_to(part.len() * 2, rehash);
        }
        Some(value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hashbrown::DefaultHashBuilder;
    use proptest::prelude::*;
    use std::{collections::BTreeMap, hash::BuildHasher};

    proptest! {
        /// Against a map of counts: equal keys may occur several times.
        #[test]
        fn holds_what_was_put_in(steps in proptest::collection::vec((any::<bool>(), 0u8..40), 0..400)) {
            let hasher = DefaultHashBuilder::default();
            let hash = |key: &u8| hasher.hash_one(key);
            let mut table = Table::in_parts(4);
            let mut model = BTreeMap::<u8, usize>::new();
            for (insert, key) in steps {
                let count = model.entry(key).or_default();
                if insert {
                    table.insert(hash(&key), key, hash);
                    *count += 1;
                } else {
                    prop_assert_eq!(table.remove(hash(&key), |k| *k == key, hash).is_some(), *count > 0);
                    *count = count.saturating_sub(1);
                }
            }
            for (key, count) in &model {
                let found = table.find_all(hash(key)).filter(|k| *k == key).count();
                prop_assert_eq!(found, *count);
                prop_assert_eq!(table.find(hash(key), |k| k == key).is_some(), *count > 0);
            }
            prop_assert_eq!(table.len(), model.values().sum::<usize>());
            prop_assert_eq!(table.iter().count(), table.len());
            prop_assert_eq!((0..4).filter_map(|p| table.of_part(p)).flatten().count(), table.len());
        }
    }
}
