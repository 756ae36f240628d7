//! Where settings come from.

use std::collections::{BTreeMap, BTreeSet};

/// Settings by name.
pub trait Source {
    /// The value of one setting.
    fn get(&self, name: &str) -> Option<String>;

    /// All settings whose name begins so, by full name, sorted.
    fn prefixed(&self, prefix: &str) -> Vec<(String, String)>;
}

/// The environment of the process. Values that are not UTF-8 do not exist.
#[derive(Clone, Copy, Debug, Default)]
pub struct Env;

impl Source for Env {
    #[expect(clippy::disallowed_methods, reason = "the one place that reads the environment")]
    fn get(&self, name: &str) -> Option<String> {
        std::env::var(name).ok()
    }

    fn prefixed(&self, prefix: &str) -> Vec<(String, String)> {
        let all = std::env::vars_os();
        let text = all.filter_map(|(name, value)| {
            Some((name.into_string().ok()?, value.into_string().ok()?))
        });
        let mut found: Vec<_> = text.filter(|(name, _)| name.starts_with(prefix)).collect();
        found.sort();
        found
    }
}

/// Settings in memory: for tests, and for what YAML says.
impl Source for BTreeMap<String, String> {
    fn get(&self, name: &str) -> Option<String> {
        Self::get(self, name).cloned()
    }

    fn prefixed(&self, prefix: &str) -> Vec<(String, String)> {
        self.range(prefix.to_owned()..)
            .take_while(|(name, _)| name.starts_with(prefix))
            .map(|(name, value)| (name.clone(), value.clone()))
            .collect()
    }
}

/// Several sources, the strongest first.
#[derive(Default)]
pub struct Layers<'a>(Vec<&'a dyn Source>);

impl<'a> Layers<'a> {
    /// No settings at all.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a source that gives way to those already there.
    #[must_use]
    pub fn then(mut self, weaker: &'a dyn Source) -> Self {
        self.0.push(weaker);
        self
    }
}

impl Source for Layers<'_> {
    fn get(&self, name: &str) -> Option<String> {
        self.0.iter().find_map(|source| source.get(name))
    }

    fn prefixed(&self, prefix: &str) -> Vec<(String, String)> {
        let found = self.0.iter().flat_map(|source| source.prefixed(prefix));
        let names: BTreeSet<String> = found.map(|(name, _)| name).collect();
        names.into_iter().filter_map(|name| self.get(&name).map(|value| (name, value))).collect()
    }
}

impl std::fmt::Debug for Layers<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Layers").field(&self.0.len()).finish()
    }
}
