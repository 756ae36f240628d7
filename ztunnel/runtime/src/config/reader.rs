//! Reading settings, with every mistake collected.

use std::fmt;
use std::time::Duration;

use super::value::{
    AMOUNT, Amount, BYTES, CPU, DURATION, parse_amount, parse_bytes, parse_count, parse_cpu,
    parse_duration,
};
use super::{Key, Source};

/// Reads settings from a source. A bad value is remembered and its default used, so that
/// [`finish`](Self::finish) can name all of them.
///
/// A setting that is present but empty counts as absent, except as text, where empty is a value
/// (`XDS_ADDRESS=""` turns it off). The getters called `optional_…` are for settings without a default.
pub struct Reader<'a> {
    source: &'a dyn Source,
    errors: Vec<Invalid>,
}

/// One setting that cannot be used.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Invalid {
    /// Its name.
    pub name: String,
    /// What was written, or empty.
    pub value: String,
    /// What to do about it: "write a port, 1 to 65535".
    pub advice: String,
}

/// All settings that cannot be used.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct ConfigErrors(Vec<Invalid>);

impl<'a> Reader<'a> {
    /// Reads from a source.
    #[must_use]
    pub fn new(source: &'a dyn Source) -> Self {
        Self { source, errors: Vec::new() }
    }

    /// Where it reads from, for what has no key of its own (prefixes).
    #[must_use]
    pub fn source(&self) -> &'a dyn Source {
        self.source
    }

    /// Text, empty included.
    pub fn text(&mut self, key: &Key) -> String {
        self.source.get(key.name).unwrap_or_else(|| key.default.to_owned())
    }

    /// Text, or None when absent; the empty text is present.
    pub fn optional_text(&mut self, key: &Key) -> Option<String> {
        self.source
            .get(key.name)
            .or_else(|| (!key.default.is_empty()).then(|| key.default.to_owned()))
    }

    /// True if it is exactly `true`; anything else is false, as upstream has it for some settings.
    pub fn flag(&mut self, key: &Key) -> bool {
        self.text(key) == "true"
    }

    /// `true` or `false`, nothing else.
    pub fn toggle(&mut self, key: &Key) -> bool {
        self.optional_toggle(key).unwrap_or_default()
    }

    /// `true`, `false`, or absent.
    pub fn optional_toggle(&mut self, key: &Key) -> Option<bool> {
        self.choice(key, &[("true", true), ("false", false)])
    }

    /// One of a few words.
    pub fn choice<T: Copy>(&mut self, key: &Key, choices: &[(&str, T)]) -> Option<T> {
        let find =
            |text: &str| choices.iter().find(|(word, _)| *word == text).map(|(_, value)| *value);
        let words: Vec<&str> = choices.iter().map(|(word, _)| *word).collect();
        self.value(key, &words.join(" or "), find)
    }

    /// A duration.
    pub fn duration(&mut self, key: &Key) -> Duration {
        self.optional_duration(key).unwrap_or_default()
    }

    /// A duration, or None when absent.
    pub fn optional_duration(&mut self, key: &Key) -> Option<Duration> {
        self.value(key, DURATION, parse_duration)
    }

    /// A number of bytes.
    pub fn bytes(&mut self, key: &Key) -> u64 {
        self.value(key, BYTES, parse_bytes).unwrap_or_default()
    }

    /// A TCP or UDP port, never 0.
    pub fn port(&mut self, key: &Key) -> u16 {
        let port =
            |text: &str| parse_count(text).and_then(|n| u16::try_from(n).ok()).filter(|n| *n > 0);
        self.value(key, "a port, 1 to 65535", port).unwrap_or_default()
    }

    /// A whole number.
    pub fn count(&mut self, key: &Key) -> u64 {
        self.optional_count(key).unwrap_or_default()
    }

    /// A whole number, or None when absent.
    pub fn optional_count(&mut self, key: &Key) -> Option<u64> {
        self.value(key, "a whole number", parse_count)
    }

    /// A Kubernetes CPU quantity in whole cores, rounded up.
    pub fn cpu_quantity(&mut self, key: &Key) -> Option<u64> {
        self.value(key, CPU, parse_cpu)
    }

    /// A number or a percentage.
    pub fn percent_or_count(&mut self, key: &Key) -> Option<Amount> {
        self.value(key, AMOUNT, parse_amount)
    }

    /// A value of any other type; `expected` completes "write …".
    pub fn value<T>(
        &mut self,
        key: &Key,
        expected: &str,
        parse: impl Fn(&str) -> Option<T>,
    ) -> Option<T> {
        if let Some(text) = self.source.get(key.name).filter(|text| !text.is_empty()) {
            if let Some(value) = parse(&text) {
                return Some(value);
            }
            self.reject(key, text, format!("write {expected}"));
        }
        let value = parse(key.default);
        if value.is_none() && !key.default.is_empty() {
            self.reject(key, key.default.to_owned(), "its default is wrong: report it".to_owned());
        }
        value
    }

    /// Remembers a mistake that only the caller can see, such as two settings that exclude each other. `advice`
    /// says what to write.
    pub fn invalid(&mut self, key: &Key, advice: impl Into<String>) {
        let value = self.source.get(key.name).unwrap_or_default();
        self.reject(key, value, advice.into());
    }

    fn reject(&mut self, key: &Key, value: String, advice: String) {
        self.errors.push(Invalid { name: key.name.to_owned(), value, advice });
    }

    /// Remembers mistakes found elsewhere.
    pub fn extend(&mut self, errors: impl IntoIterator<Item = Invalid>) {
        self.errors.extend(errors);
    }

    /// Ends the reading.
    ///
    /// # Errors
    /// All settings that cannot be used.
    pub fn finish(self) -> Result<(), ConfigErrors> {
        if self.errors.is_empty() { Ok(()) } else { Err(ConfigErrors(self.errors)) }
    }
}

impl ConfigErrors {
    /// One by one.
    pub fn iter(&self) -> impl Iterator<Item = &Invalid> {
        self.0.iter()
    }
}

impl fmt::Display for Invalid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.value.is_empty() {
            write!(f, "{}: {}", self.name, self.advice)
        } else {
            write!(f, "{}={:?}: {}", self.name, self.value, self.advice)
        }
    }
}

impl fmt::Display for ConfigErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let settings = if self.0.len() == 1 { "setting" } else { "settings" };
        write!(f, "{} invalid {settings}", self.0.len())?;
        self.0.iter().try_for_each(|error| write!(f, "\n  {error}"))
    }
}

impl std::error::Error for ConfigErrors {}

impl fmt::Debug for Reader<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reader").field("errors", &self.errors).finish_non_exhaustive()
    }
}
