//! Process settings: where they come from, how they are read, and how they are described.
//!
//! A setting is declared once, as a [`Key`]. Its value is looked up in a [`Source`], read by a [`Reader`] that
//! collects every mistake, and listed in the README by [`markdown`]. Settings layer from weak to strong: mesh
//! config file, `PROXY_CONFIG`, environment ([`Layers`]).

mod proxy_config;
mod reader;
mod source;
mod value;
mod yaml;

pub use self::proxy_config::{FromYaml, InvalidYaml};
#[expect(clippy::module_name_repetitions, reason = "used without its module")]
pub use self::reader::ConfigErrors;
pub use self::reader::{Invalid, Reader};
pub use self::source::{Env, Layers, Source};
pub use self::value::{Amount, parse_duration};

/// One setting, declared once.
#[derive(Clone, Copy, Debug)]
pub struct Key {
    /// The variable, spelt as Istio spells it.
    pub name: &'static str,
    /// What its value is: `duration`, `bytes`, `true or false`.
    pub unit: &'static str,
    /// The default as one would write it; empty if the setting is absent by default.
    pub default: &'static str,
    /// One sentence.
    pub doc: &'static str,
}

/// The table of settings for the README.
#[must_use]
pub fn markdown(keys: &[&Key]) -> String {
    let mut table = "| Variable | Value | Default | Meaning |\n|---|---|---|---|\n".to_owned();
    for Key { name, unit, default, doc } in keys {
        let default = if default.is_empty() { "–".to_owned() } else { format!("`{default}`") };
        let row = [format!("`{name}`"), (*unit).to_owned(), default, (*doc).to_owned()];
        for cell in row {
            table.push_str("| ");
            table.push_str(&cell.replace('|', "\\|"));
            table.push(' ');
        }
        table.push_str("|\n");
    }
    table
}

#[cfg(test)]
mod tests;
