//! What is remembered of a file between two readings: which resources it had, and how each looked.

use std::collections::{HashMap, HashSet};
use std::hash::Hasher;

/// A fingerprint that no resource has: what is kept with it counts as changed next time.
pub(super) const UNKNOWN: u64 = 0;

/// A name's 64-bit hash. Two of 500 000 names collide once in 10^8 files, and the file would then be refused
/// for a name that seems to stand there twice.
pub(super) fn hash(name: &str) -> u64 {
    let mut hasher = std::hash::DefaultHasher::new();
    hasher.write(name.as_bytes());
    hasher.finish()
}

/// Names in the file's order with their fingerprints. Neighbours in a file share most of their names, so each is
/// stored as what differs from the one before: about 25 bytes a resource in all.
#[derive(Debug, Default)]
pub(super) struct Kept {
    packed: Vec<u8>,
    last: String,
    prints: Vec<u64>,
}

impl Kept {
    pub(super) fn push(&mut self, name: &str, print: u64) {
        let shared = self.last.bytes().zip(name.bytes()).take_while(|(a, b)| a == b).count();
        let rest = name.as_bytes().get(shared..).unwrap_or_default();
        put(&mut self.packed, shared);
        put(&mut self.packed, rest.len());
        self.packed.extend_from_slice(rest);
        self.last.clear();
        self.last.push_str(name);
        self.prints.push(print);
    }

    /// Forgets how some resources looked, by their position.
    pub(super) fn forget(&mut self, positions: impl IntoIterator<Item = usize>) {
        for position in positions {
            if let Some(print) = self.prints.get_mut(position) {
                *print = UNKNOWN;
            }
        }
    }

    pub(super) fn len(&self) -> usize {
        self.prints.len()
    }

    pub(super) fn shrink(&mut self) {
        self.packed.shrink_to_fit();
        self.prints.shrink_to_fit();
    }

    /// Hash of name to fingerprint, for comparing against a new reading.
    pub(super) fn index(&self) -> HashMap<u64, u64> {
        self.iter().map(|(name, print)| (hash(&name), print)).collect()
    }

    /// Names that are not among these hashes.
    pub(super) fn missing_from<'k>(
        &'k self,
        present: &'k HashSet<u64>,
    ) -> impl Iterator<Item = String> + 'k {
        self.iter().map(|(name, _)| name).filter(|name| !present.contains(&hash(name)))
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (String, u64)> + '_ {
        let mut packed = self.packed.as_slice();
        let mut name: Vec<u8> = Vec::new();
        self.prints.iter().map(move |print| {
            let shared = take(&mut packed);
            let length = take(&mut packed);
            let (rest, after) = packed.split_at_checked(length).unwrap_or((packed, &[]));
            packed = after;
            name.truncate(shared);
            name.extend_from_slice(rest);
            (String::from_utf8_lossy(&name).into_owned(), *print)
        })
    }
}

/// Seven bits to a byte, least first.
fn put(bytes: &mut Vec<u8>, mut number: usize) {
    loop {
        let low = u8::try_from(number & 0x7f).unwrap_or(0);
        number >>= 7;
        if number == 0 {
            return bytes.push(low);
        }
        bytes.push(low | 0x80);
    }
}

fn take(bytes: &mut &[u8]) -> usize {
    let mut number = 0_usize;
    let mut shift = 0_u32;
    while let Some((byte, rest)) = bytes.split_first() {
        *bytes = rest;
        number |= usize::from(byte & 0x7f).checked_shl(shift).unwrap_or(0);
        shift += 7;
        if byte & 0x80 == 0 {
            break;
        }
    }
    number
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn names_come_back(names in proptest::collection::vec("[aé/.]{0,300}", 0..20)) {
            let mut kept = Kept::default();
            for (print, name) in (1..).zip(&names) {
                kept.push(name, print);
            }
            let back: Vec<(String, u64)> = kept.iter().collect();
            let expected: Vec<(String, u64)> = names.into_iter().zip(1..).collect();
            prop_assert_eq!(back, expected);
        }
    }

    #[test]
    fn missing_are_those_of_the_old_file_only() {
        let mut kept = Kept::default();
        for name in ["a//Pod/x", "a//Pod/y", "b"] {
            kept.push(name, 7);
        }
        let present = HashSet::from([hash("a//Pod/y"), hash("new")]);
        assert_eq!(kept.missing_from(&present).collect::<Vec<_>>(), ["a//Pod/x", "b"]);
    }
}
