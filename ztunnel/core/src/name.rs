//! Names. One type per meaning, so that a namespace cannot be passed for a hostname.
//!
//! A name is made by a validated parse, in one of two ways: `FromStr`, for text from peers and
//! from settings, allocates; `interned`, for text from the control plane, shares one copy. The
//! [`Interner`] belongs to the one writer of the state, so that peers cannot grow it.
//!
//! The checks are as wide as Kubernetes, SPIFFE and the control plane's contract together, because
//! a name that is refused is a workload that cannot talk. Comparison is exact, case included.

use std::{collections::HashSet, fmt, str::FromStr, sync::Arc};

/// The text is not a valid name of this kind.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct InvalidName;

impl fmt::Display for InvalidName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("invalid name")
    }
}

impl std::error::Error for InvalidName {}

/// One copy of each text in use. Forgets, as it grows, the texts that nobody else holds.
#[derive(Debug, Default)]
pub struct Interner {
    texts: HashSet<Arc<str>>,
    sweep_at: usize,
}

impl Interner {
    fn share(&mut self, text: &str) -> Arc<str> {
        if let Some(known) = self.texts.get(text) {
            return Arc::clone(known);
        }
        if self.texts.len() >= self.sweep_at {
            self.texts.retain(|text| Arc::strong_count(text) > 1);
            // Twice what is left, so that the cost of a sweep is paid by what came since.
            self.sweep_at = self.texts.len().saturating_mul(2).max(64);
        }
        let new: Arc<str> = text.into();
        self.texts.insert(Arc::clone(&new));
        new
    }

    /// The number of texts.
    #[must_use]
    pub fn len(&self) -> usize {
        self.texts.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.texts.is_empty()
    }
}

macro_rules! name {
    ($(#[$meta:meta])* $name:ident, $valid:expr) => {
        $(#[$meta])*
        #[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
        pub struct $name(Arc<str>);

        impl $name {
            fn check(text: &str) -> Result<(), InvalidName> {
                let valid: fn(&str) -> bool = $valid;
                if valid(text) { Ok(()) } else { Err(InvalidName) }
            }

            /// Makes a name that shares its text with all equal ones from the same interner.
            ///
            /// # Errors
            ///
            /// Returns [`InvalidName`], and interns nothing, where `FromStr` would.
            pub fn interned(text: &str, names: &mut Interner) -> Result<Self, InvalidName> {
                Self::check(text)?;
                Ok(Self(names.share(text)))
            }

            /// The text of the name.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = InvalidName;

            fn from_str(text: &str) -> Result<Self, InvalidName> {
                Self::check(text)?;
                Ok(Self(text.into()))
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

/// A path segment of a URI (RFC 3986, section 3.3), not empty. Kubernetes allows less: labels of 63
/// bytes for a namespace, 253 bytes for a service account. SPIFFE bounds the whole identity.
fn is_segment(s: &str) -> bool {
    !s.is_empty() && s.bytes().all(|b| b.is_ascii_graphic() && !b"/?#".contains(&b))
}

/// SPIFFE-ID, section 2.1, bounds a trust domain to 255 bytes and wants lower case; Istio takes both.
fn is_trust_domain(s: &str) -> bool {
    s.len() <= 255 && is_segment(s)
}

/// A DNS name, or `*.` before one; underscores occur.
fn is_hostname(s: &str) -> bool {
    (1..=255).contains(&s.len())
        && s.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._*".contains(&b))
}

name!(/** A Kubernetes namespace. */ Namespace, is_segment);
name!(/** A Kubernetes service account. */ ServiceAccount, is_segment);
name!(/** A SPIFFE trust domain. */ TrustDomain, is_trust_domain);
name!(/** The host of a service or of a workload, perhaps with a wildcard. */ Hostname, is_hostname);
name!(/** The flat L3 network that an address belongs to; may be empty. */ NetworkId, |_| true);
name!(/** The control plane's unique key of a workload; opaque. */ WorkloadUid, |s| !s.is_empty());
name!(/** The `namespace/name` of a policy. */ PolicyName, |s| s.contains('/'));
name!(/** Text that is shown or compared and means nothing else: a pod's name, a node, a cluster, a region, a canonical service. May be empty. */ Text, |_| true);

macro_rules! empty_by_default {
    ($($name:ident),*) => {$(
        impl Default for $name {
            fn default() -> Self {
                static EMPTY: std::sync::LazyLock<Arc<str>> = std::sync::LazyLock::new(|| "".into());
                Self(Arc::clone(&EMPTY))
            }
        }
    )*};
}

empty_by_default!(NetworkId, Text);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accepts_what_kubernetes_and_istio_accept() {
        let long = ["a".repeat(63), "b".repeat(100), "c".repeat(88)].join(".");
        assert_eq!(long.len(), 253);
        assert!(long.parse::<ServiceAccount>().is_ok(), "longest service account");
        assert!("a".repeat(63).parse::<Namespace>().is_ok(), "longest namespace");
        assert!("Corp.Example".parse::<TrustDomain>().is_ok(), "upper-case trust domain");
        assert!("*.example.com".parse::<Hostname>().is_ok(), "wildcard host");
        assert!("".parse::<NetworkId>().is_ok(), "default network");
    }

    #[test]
    fn rejects_what_would_break_a_key_or_a_log() {
        for text in ["", "a/b", "a b", "a\n", "é", "a?b", "a#b"] {
            assert_eq!(text.parse::<Namespace>(), Err(InvalidName), "{text:?}");
        }
        assert_eq!("t".repeat(256).parse::<TrustDomain>(), Err(InvalidName));
    }

    #[test]
    fn interner_keeps_one_copy_and_forgets() {
        let mut names = Interner::default();
        let one = Namespace::interned("prod", &mut names).unwrap();
        let two = ServiceAccount::interned("prod", &mut names).unwrap();
        assert!(std::ptr::eq(one.as_str(), two.as_str()), "same text, same memory");
        assert_eq!(one, "prod".parse().unwrap(), "equal however it was made");
        assert_eq!(Namespace::interned("a/b", &mut names), Err(InvalidName));
        for i in 0..1000 {
            Namespace::interned(&format!("gone-{i}"), &mut names).unwrap();
        }
        assert!(names.len() <= 64, "{}", names.len());
        let again = Namespace::interned("prod", &mut names).unwrap();
        assert!(std::ptr::eq(one.as_str(), again.as_str()), "still held, still the same memory");
    }
}
