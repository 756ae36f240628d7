//! What is wrong in a file, and where.

use std::fmt::{self, Write as _};

/// A place in a text, both numbers counted from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) line: usize,
    pub(super) column: usize,
}

/// What is wrong in a local file, and where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    line: usize,
    column: usize,
    field: String,
    what: String,
}

impl Fault {
    pub(super) fn new(at: Place, what: impl AsRef<str>) -> Box<Self> {
        let what = one_line(what.as_ref());
        Box::new(Self { line: at.line, column: at.column, field: String::new(), what })
    }

    /// Puts a step before the path of the field: a name, or an index in brackets.
    pub(super) fn within(mut self: Box<Self>, step: &str) -> Box<Self> {
        let joint = if self.field.is_empty() || self.field.starts_with('[') { "" } else { "." };
        self.field = format!("{}{joint}{}", one_line(step), self.field);
        self
    }

    /// The line, counted from 1.
    pub fn line(&self) -> usize {
        self.line
    }

    /// The column, counted from 1.
    pub fn column(&self) -> usize {
        self.column
    }

    /// The path of the field, such as `workloads[3].protocol`; empty where the text is not YAML.
    pub fn field(&self) -> &str {
        &self.field
    }
}

/// A message is a line of the log, whatever somebody's file has in its names.
fn one_line(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { char::REPLACEMENT_CHARACTER } else { c }).collect()
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "line {}, column {}: ", self.line, self.column)?;
        if !self.field.is_empty() {
            write!(f, "{}: ", OneLine(&self.field))?;
        }
        OneLine(&self.what).fmt(f)
    }
}

/// The text of a file in a message: whatever is in it, the message stays one line.
struct OneLine<'a>(&'a str);

impl fmt::Display for OneLine<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for character in self.0.chars() {
            if character.is_control() {
                write!(f, "{}", character.escape_default())?;
            } else {
                f.write_char(character)?;
            }
        }
        Ok(())
    }
}

impl std::error::Error for Fault {}
