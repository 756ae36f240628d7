//! Istio's `ProxyConfig` and mesh config as a source of settings.

use std::collections::BTreeMap;
use std::error::Error;
use std::fmt;

use super::Source;
use super::yaml::Yaml;

/// What the names of `proxyMetadata` begin with as settings.
const METADATA: &str = "ISTIO_META_";

/// The settings that a YAML text holds: each scalar of the `ProxyConfig` by its own name (`discoveryAddress`,
/// `proxyAdminPort`, `statsPort`, `concurrency`, …), and each entry of `proxyMetadata` with `ISTIO_META_` before
/// its name, so that the environment's overrides it.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct FromYaml(BTreeMap<String, String>);

/// The text is not YAML, or not of the shape expected.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct InvalidYaml {
    line: Option<usize>,
    problem: String,
}

impl FromYaml {
    /// Reads a `ProxyConfig`, as `PROXY_CONFIG` holds it.
    ///
    /// # Errors
    /// When it is not YAML, or not a map.
    pub fn proxy_config(text: &str) -> Result<Self, InvalidYaml> {
        Self::from_tree(Some(&parse(text)?), "the text")
    }

    /// Reads a mesh config file, of which `defaultConfig` is a `ProxyConfig`.
    ///
    /// # Errors
    /// As [`proxy_config`](Self::proxy_config).
    pub fn mesh_config(text: &str) -> Result<Self, InvalidYaml> {
        match parse(text)? {
            Yaml::Null => Ok(Self::default()),
            tree @ Yaml::Map(_) => Self::from_tree(tree.get("defaultConfig"), "defaultConfig"),
            Yaml::Scalar(_) | Yaml::List(_) => Err(not_a_map("the text")),
        }
    }

    fn from_tree(tree: Option<&Yaml>, name: &str) -> Result<Self, InvalidYaml> {
        let mut found = BTreeMap::new();
        let entries = match tree {
            None | Some(Yaml::Null) => return Ok(Self::default()),
            Some(Yaml::Map(entries)) => entries,
            Some(Yaml::Scalar(_) | Yaml::List(_)) => return Err(not_a_map(name)),
        };
        for (name, value) in entries {
            match value {
                Yaml::Scalar(_) | Yaml::List(_) if name == "proxyMetadata" => {
                    return Err(not_a_map(name));
                }
                Yaml::Scalar(text) => {
                    found.insert(name.clone(), text.clone());
                }
                Yaml::Map(metadata) if name == "proxyMetadata" => {
                    found.extend(metadata.iter().filter_map(|(name, value)| match value {
                        // Sidecars write the prefix themselves; here it means the same.
                        Yaml::Scalar(text) if name.starts_with(METADATA) => {
                            Some((name.clone(), text.clone()))
                        }
                        Yaml::Scalar(text) => Some((format!("{METADATA}{name}"), text.clone())),
                        Yaml::Null | Yaml::List(_) | Yaml::Map(_) => None,
                    }));
                }
                // Other settings of sidecars, tracing and the like, are not for us.
                Yaml::Null | Yaml::List(_) | Yaml::Map(_) => {}
            }
        }
        Ok(Self(found))
    }
}

fn parse(text: &str) -> Result<Yaml, InvalidYaml> {
    Yaml::parse(text)
        .map_err(|fault| InvalidYaml { line: Some(fault.line), problem: fault.problem })
}

fn not_a_map(name: &str) -> InvalidYaml {
    InvalidYaml { line: None, problem: format!("{name} must be a map of names to values") }
}

impl Source for FromYaml {
    fn get(&self, name: &str) -> Option<String> {
        self.0.get(name).cloned()
    }

    fn prefixed(&self, prefix: &str) -> Vec<(String, String)> {
        self.0.prefixed(prefix)
    }
}

impl fmt::Display for InvalidYaml {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.line {
            Some(line) => write!(f, "not valid YAML: line {line}: {}", self.problem),
            None => write!(f, "not understood: {}", self.problem),
        }
    }
}

impl Error for InvalidYaml {}
