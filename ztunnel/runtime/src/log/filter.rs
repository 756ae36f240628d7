//! Which lines are wanted: `info,access=debug`.

use std::error::Error;
use std::fmt;
use std::str::FromStr;

use tracing::level_filters::LevelFilter;

/// A level for everything, and levels for modules, of which the longest that matches counts. Without a level for
/// everything, what no module matches is off.
///
/// A module is a target or its beginning up to `::`, with or without the crate's prefix: `xds`, `mesh_xds` and
/// `ztunnel::xds` are the same. `ztunnel` alone is all of ours.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Filter {
    all: Option<LevelFilter>,
    modules: Vec<(String, LevelFilter)>,
}

/// Text that is no filter.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct InvalidFilter {
    clause: String,
}

impl Filter {
    /// Adds clauses, which replace those for the same module.
    ///
    /// # Errors
    /// When one is not understood; then none is added. A module alone is not: it may be a level misspelt.
    pub fn add(&mut self, clauses: &str) -> Result<(), InvalidFilter> {
        let added = Self::parse(clauses, None)?;
        self.all = added.all.or(self.all);
        for (module, level) in added.modules {
            self.set(module, level);
        }
        Ok(())
    }

    /// `bare` is the level for a module without one, if that may be.
    fn parse(text: &str, bare: Option<LevelFilter>) -> Result<Self, InvalidFilter> {
        let mut filter = Self { all: None, modules: Vec::new() };
        for clause in text.split(',').map(str::trim) {
            let invalid = || InvalidFilter { clause: clause.to_owned() };
            if let Some(level) = level(clause) {
                filter.all = Some(level);
                continue;
            }
            // The colon before a level is the last one, and not half of `::`.
            let by_colon = || clause.rsplit_once(':').filter(|(module, _)| !module.ends_with(':'));
            let (module, level) = match clause.split_once('=').or_else(by_colon) {
                Some((module, name)) => (module, level(name)),
                None => (clause, bare),
            };
            let level = level.filter(|_| is_module(module)).ok_or_else(invalid)?;
            filter.set(module.to_owned(), level);
        }
        Ok(filter)
    }

    fn set(&mut self, module: String, level: LevelFilter) {
        match self.modules.iter_mut().find(|(other, _)| *other == module) {
            Some((_, known)) => *known = level,
            None => self.modules.push((module, level)),
        }
    }

    /// The level for a target.
    #[must_use]
    pub fn level(&self, target: &str) -> LevelFilter {
        let matching = self.modules.iter().filter(|(module, _)| matches(module, target));
        let length = |module: &str| if is_all_ours(module) { 0 } else { scope(module).len() };
        let longest = matching.max_by_key(|(module, _)| length(module));
        longest.map(|(_, level)| *level).or(self.all).unwrap_or(LevelFilter::OFF)
    }

    /// The level above which nothing is wanted of any target.
    #[must_use]
    pub fn max_level(&self) -> LevelFilter {
        let levels = self.modules.iter().map(|(_, level)| *level).chain(self.all);
        levels.max().unwrap_or(LevelFilter::OFF)
    }
}

fn is_all_ours(module: &str) -> bool {
    module == "ztunnel"
}

fn matches(module: &str, target: &str) -> bool {
    if is_all_ours(module) {
        return is_ours(target);
    }
    let rest = scope(target).strip_prefix(scope(module));
    rest.is_some_and(|rest| rest.is_empty() || rest.starts_with("::"))
}

fn is_ours(target: &str) -> bool {
    target.starts_with("mesh_") || target == "ztunnel" || target.starts_with("ztunnel::")
}

/// A target without its crate's prefix: `proxy` for `ztunnel::proxy`, `hbone::pool` for `mesh_hbone::pool`.
pub(super) fn scope(target: &str) -> &str {
    let stripped =
        ["ztunnel::", "waypoint::", "mesh_"].iter().find_map(|prefix| target.strip_prefix(prefix));
    stripped.unwrap_or(target)
}

impl FromStr for Filter {
    type Err = InvalidFilter;

    /// Reads clauses divided by commas: a level, `module=level`, `module:level`, or a module alone, of which then
    /// everything is wanted.
    fn from_str(text: &str) -> Result<Self, InvalidFilter> {
        Self::parse(text, Some(LevelFilter::TRACE))
    }
}

fn level(name: &str) -> Option<LevelFilter> {
    let levels = [
        ("off", LevelFilter::OFF),
        ("error", LevelFilter::ERROR),
        ("warn", LevelFilter::WARN),
        ("warning", LevelFilter::WARN),
        ("info", LevelFilter::INFO),
        ("debug", LevelFilter::DEBUG),
        ("trace", LevelFilter::TRACE),
    ];
    levels.iter().find(|(known, _)| known.eq_ignore_ascii_case(name)).map(|(_, level)| *level)
}

fn is_module(text: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-' | b':');
    // The letter first keeps a number, which some loggers take for a level, from being a module.
    text.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_') && text.bytes().all(allowed)
}

impl fmt::Display for Filter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut separator = "";
        if let Some(level) = self.all {
            write!(f, "{level}")?;
            separator = ",";
        }
        for (module, level) in &self.modules {
            write!(f, "{separator}{module}={level}")?;
            separator = ",";
        }
        Ok(())
    }
}

impl Default for Filter {
    fn default() -> Self {
        Self { all: Some(LevelFilter::INFO), modules: Vec::new() }
    }
}

impl fmt::Display for InvalidFilter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "invalid log level {:?}: write a level (error, warn, info, debug, trace, off), or <module>=<level>",
            self.clause
        )
    }
}

impl Error for InvalidFilter {}
