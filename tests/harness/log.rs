//! The node proxy's log, plain or JSON, read back.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{Read, Seek, SeekFrom},
    path::{Path, PathBuf},
};

use serde_json::Value;

/// A log file that grows.
#[derive(Clone, Debug)]
pub struct Log(PathBuf);

/// A line of it.
#[derive(Clone, Debug, Default)]
pub struct Line {
    /// Lower case.
    pub level: String,
    /// The target, or scope.
    pub scope: String,
    /// What it says.
    pub message: String,
    /// `key=value`, unquoted, in their order (JSON: sorted).
    pub fields: Vec<(String, String)>,
    /// As it was written.
    pub text: String,
}

impl Line {
    /// A field's value; the empty string where it is not there.
    #[must_use]
    pub fn field(&self, name: &str) -> &str {
        self.fields.iter().find(|(key, _)| key == name).map_or("", |(_, value)| value)
    }

    /// All fields by name.
    #[must_use]
    pub fn all(&self) -> BTreeMap<&str, &str> {
        self.fields.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect()
    }

    /// Reads a line of either shape.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        if text.starts_with('{') { Self::json(text) } else { Self::plain(text) }
    }

    fn plain(text: &str) -> Option<Self> {
        let mut parts = text.splitn(5, '\t');
        let (_time, level, scope) = (parts.next()?, parts.next()?, parts.next()?);
        let (message, fields) = (parts.next()?, parts.next().unwrap_or_default());
        Some(Self {
            level: level.to_owned(),
            scope: scope.to_owned(),
            message: message.to_owned(),
            fields: plain_fields(fields),
            text: text.to_owned(),
        })
    }

    fn json(text: &str) -> Option<Self> {
        let value: Value = serde_json::from_str(text).ok()?;
        let text_of = |value: &Value| match value {
            Value::String(text) => text.clone(),
            other => other.to_string(),
        };
        let named = |name: &str| value.get(name).map(text_of);
        let known = ["level", "time", "scope", "message"];
        let fields = value.as_object()?.iter().filter(|(key, _)| !known.contains(&key.as_str()));
        Some(Self {
            level: named("level")?,
            scope: named("scope")?,
            message: named("message").unwrap_or_default(),
            fields: fields.map(|(key, value)| (key.clone(), text_of(value))).collect(),
            text: text.to_owned(),
        })
    }
}

/// Without what a container runtime begins a line with: the time, the stream, and that the line is whole.
fn bare(line: &str) -> &str {
    let mut parts = line.splitn(4, ' ');
    match (parts.next(), parts.next(), parts.next(), parts.next()) {
        (Some(_time), Some("stdout" | "stderr"), Some("F"), Some(rest)) => rest,
        _ => line,
    }
}

/// `a=1 b="x y"`; a backslash escapes within quotes.
fn plain_fields(mut text: &str) -> Vec<(String, String)> {
    let mut fields = Vec::new();
    while let Some((key, rest)) = text.trim_start().split_once('=') {
        let (value, after) = match rest.strip_prefix('"') {
            Some(quoted) => {
                let mut value = String::new();
                let mut characters = quoted.char_indices();
                let mut end = quoted.len();
                while let Some((at, character)) = characters.next() {
                    match character {
                        '"' => {
                            end = at + 1;
                            break;
                        }
                        '\\' => value.extend(characters.next().map(|(_, c)| c)),
                        other => value.push(other),
                    }
                }
                (value, quoted.get(end..).unwrap_or_default())
            }
            None => {
                let (value, after) = rest.split_once(' ').unwrap_or((rest, ""));
                (value.to_owned(), after)
            }
        };
        fields.push((key.to_owned(), value));
        text = after;
    }
    fields
}

impl Log {
    pub(crate) fn new(path: &Path) -> Self {
        Self(path.to_owned())
    }

    /// Where it ends now: what comes later is after the mark.
    #[must_use]
    pub fn mark(&self) -> u64 {
        fs::metadata(&self.0).map(|file| file.len()).unwrap_or(0)
    }

    /// All whole lines after the mark.
    #[must_use]
    pub fn since(&self, mark: u64) -> Vec<String> {
        let mut bytes = Vec::new();
        let read = File::open(&self.0).and_then(|mut file| {
            file.seek(SeekFrom::Start(mark))?;
            file.read_to_end(&mut bytes)
        });
        if read.is_err() {
            return Vec::new();
        }
        let text = String::from_utf8_lossy(&bytes);
        let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
        whole.lines().map(|line| bare(line).to_owned()).collect()
    }

    /// The access log's lines after the mark.
    #[must_use]
    pub fn access_since(&self, mark: u64) -> Vec<Line> {
        let lines = self.since(mark);
        let lines = lines.iter().filter_map(|line| Line::parse(line));
        lines.filter(|line| line.scope.rsplit("::").next() == Some("access")).collect()
    }

    /// The last lines.
    #[must_use]
    pub fn tail(&self, count: usize) -> String {
        let lines = self.since(0);
        let from = lines.len().saturating_sub(count);
        lines.get(from..).unwrap_or_default().join("\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_and_json_say_the_same() {
        let plain = "2026-11-22T02:51:39.947229Z\tinfo\taccess\tconnection complete\t\
                     src.addr=10.1.0.2:53080 dst.service=\"web \\\"x\\\"\" bytes_sent=77";
        let json = r#"{"level":"info","time":"t","scope":"ztunnel::access",
            "message":"connection complete","bytes_sent":77,"dst.service":"web \"x\"",
            "src.addr":"10.1.0.2:53080"}"#
            .replace('\n', "");
        let (plain, json) = (Line::parse(plain).unwrap(), Line::parse(&json).unwrap());
        assert_eq!(plain.message, json.message);
        assert_eq!(plain.all(), json.all());
        assert_eq!(plain.field("dst.service"), "web \"x\"");
        assert_eq!(plain.field("none"), "");
    }

    #[test]
    fn a_container_runtimes_prefix_is_no_part_of_a_line() {
        let line = "2026-11-22T02:51:39.9Z\tinfo\taccess\tconnection complete\ta=\"stdout F x\"";
        assert_eq!(bare(line), line);
        assert_eq!(bare(&format!("2026-11-22T02:51:39.947229000Z stdout F {line}")), line);
    }

    #[test]
    fn other_text_is_no_line() {
        assert!(Line::parse("thread 'main' panicked").is_none());
        assert!(Line::parse("{").is_none());
    }
}
