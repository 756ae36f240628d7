//! What was accepted: names, versions, and how it looked.

use std::collections::HashMap;

use super::Versions;

/// The fingerprint of what is to be handed over whatever it looks like.
const UNKNOWN: u64 = 0;

/// Half a million of these stay in memory: 16 digits of hexadecimal, which is what istiod sends, fit in one word.
#[derive(Debug, PartialEq, Eq)]
enum Version {
    None,
    Hash(u64),
    Text(Box<str>),
}

impl Version {
    fn new(text: &str) -> Self {
        let lower = |byte: u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
        match u64::from_str_radix(text, 16) {
            _ if text.is_empty() => Self::None,
            Ok(hash) if text.len() == 16 && text.bytes().all(lower) => Self::Hash(hash),
            _ => Self::Text(text.into()),
        }
    }

    fn text(&self) -> String {
        match self {
            Self::None => String::new(),
            Self::Hash(hash) => format!("{hash:016x}"),
            Self::Text(text) => text.to_string(),
        }
    }
}

/// What was accepted, by name.
#[derive(Debug, Default)]
pub(super) struct Known(HashMap<Box<str>, (Version, u64)>);

impl Known {
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    pub(super) fn has(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }

    /// Whether exactly this is in effect.
    pub(super) fn is(&self, name: &str, print: u64) -> bool {
        print != UNKNOWN && self.0.get(name).is_some_and(|(_, known)| *known == print)
    }

    pub(super) fn accept(&mut self, name: String, version: &str, print: u64) {
        self.0.insert(name.into(), (Version::new(version), print));
    }

    /// The version before it stays claimed, so that its removal is still told. When that version comes again it
    /// must be handed over, because the handler was told about the bad one in between.
    pub(super) fn reject(&mut self, name: &str) {
        if let Some((_, print)) = self.0.get_mut(name) {
            *print = UNKNOWN;
        }
    }

    pub(super) fn remove(&mut self, name: &str) {
        self.0.remove(name);
    }

    pub(super) fn versions(&self) -> Versions {
        self.0.iter().map(|(name, (version, _))| (name.to_string(), version.text())).collect()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn versions_come_back_as_they_came(text in "[0-9a-fA-F]{16}|.{0,20}|\\+[0-9a-f]{15}") {
            prop_assert_eq!(Version::new(&text).text(), text);
        }
    }
}
