//! Lines: plain, divided by tabs, or one JSON object each.

use std::cell::Cell;
use std::fmt::{self, Display, Write};
use std::thread::LocalKey;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tracing::Level;

/// How lines look.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Shape {
    /// `time⇥level⇥scope⇥message⇥key=value …`
    #[default]
    Plain,
    /// `{"level":…,"time":…,"scope":…,"message":…,"key":value,…}`
    Json,
}

/// Writes the fields of a line. Names are ours and not escaped; values are, so that no peer can forge a line.
#[derive(Debug)]
pub struct Fields<'a> {
    out: &'a mut String,
    shape: Shape,
    first: bool,
}

impl<'a> Fields<'a> {
    pub(super) const fn new(out: &'a mut String, shape: Shape) -> Self {
        Self { out, shape, first: true }
    }

    /// Text, quoted.
    pub fn str(&mut self, name: &str, value: &str) -> &mut Self {
        self.name(name);
        match self.shape {
            Shape::Plain => quoted(self.out, value),
            Shape::Json => json(self.out, value),
        }
        self
    }

    /// Text made as it is printed, quoted.
    pub fn text(&mut self, name: &str, value: impl Display) -> &mut Self {
        self.name(name);
        let escape = match self.shape {
            Shape::Plain => escape_debug,
            Shape::Json => escape_json,
        };
        self.out.push('"');
        printed(self.out, format_args!("{value}"), escape);
        self.out.push('"');
        self
    }

    /// An address and the like: bare in the plain shape, text in JSON.
    pub fn addr(&mut self, name: &str, value: impl Display) -> &mut Self {
        self.name(name);
        self.bare(format_args!("{value}"));
        self
    }

    /// A number.
    pub fn number(&mut self, name: &str, value: u64) -> &mut Self {
        self.literal(name, format_args!("{value}"))
    }

    /// A duration in whole milliseconds, as `"3ms"`.
    pub fn milliseconds(&mut self, name: &str, value: Duration) -> &mut Self {
        self.name(name);
        write_to(self.out, format_args!("\"{}ms\"", value.as_millis()));
        self
    }

    /// What is the same in both shapes: numbers, `true`, `false`.
    pub(super) fn literal(&mut self, name: &str, value: fmt::Arguments<'_>) -> &mut Self {
        self.name(name);
        write_to(self.out, value);
        self
    }

    pub(super) fn display(&mut self, name: &str, value: fmt::Arguments<'_>) {
        self.name(name);
        self.bare(value);
    }

    fn bare(&mut self, value: fmt::Arguments<'_>) {
        match self.shape {
            Shape::Plain => printed(self.out, value, escape_control),
            Shape::Json => {
                self.out.push('"');
                printed(self.out, value, escape_json);
                self.out.push('"');
            }
        }
    }

    fn name(&mut self, name: &str) {
        let first = std::mem::replace(&mut self.first, false);
        match self.shape {
            Shape::Plain => {
                if !first {
                    self.out.push(' ');
                }
                self.out.push_str(name);
                self.out.push('=');
            }
            Shape::Json => {
                if !first {
                    self.out.push(',');
                }
                self.out.push('"');
                self.out.push_str(name);
                self.out.push_str("\":");
            }
        }
    }
}

/// One line, in the order of its shape.
pub(super) struct Line<'a> {
    pub(super) time: SystemTime,
    pub(super) level: Level,
    pub(super) target: &'a str,
    /// `:span{a=1}…` or `,"span":{"a":1}…`
    pub(super) spans: &'a str,
    pub(super) message: &'a str,
}

impl Line<'_> {
    /// Writes the line, its fields by a closure.
    pub(super) fn write(
        &self,
        out: &mut String,
        shape: Shape,
        fields: impl FnOnce(&mut Fields<'_>),
    ) {
        match shape {
            Shape::Plain => {
                timestamp(out, self.time);
                out.push('\t');
                out.push_str(name(self.level));
                out.push('\t');
                out.push_str(super::filter::scope(self.target));
                out.push_str(self.spans);
                out.push('\t');
                escaped(out, self.message, escape_control);
                out.push('\t');
                fields(&mut Fields::new(out, shape));
                out.push('\n');
            }
            Shape::Json => {
                out.push_str("{\"level\":\"");
                out.push_str(name(self.level));
                out.push_str("\",\"time\":\"");
                timestamp(out, self.time);
                out.push_str("\",\"scope\":");
                json(out, self.target);
                let mut rest = Fields { out, shape, first: false };
                if !self.message.is_empty() {
                    rest.str("message", self.message);
                }
                fields(&mut rest);
                out.push_str(self.spans);
                out.push_str("}\n");
            }
        }
    }
}

const fn name(level: Level) -> &'static str {
    match level {
        Level::ERROR => "error",
        Level::WARN => "warn",
        Level::INFO => "info",
        Level::DEBUG => "debug",
        Level::TRACE => "trace",
    }
}

/// RFC 3339 with microseconds, in UTC.
pub(super) fn timestamp(out: &mut String, time: SystemTime) {
    // A clock before 1970 shows as 1970.
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    let (days, second) = (since.as_secs() / 86_400, since.as_secs() % 86_400);
    // Years begin in March here, so that the leap day is the last: the month then follows from the day by a
    // straight line. 719 468 days lie between 0000-03-01 and 1970-01-01; 146 097 are 400 years.
    let days = days + 719_468;
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1_460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    let year = era * 400 + year + u64::from(month <= 2);
    let (hour, minute, second) = (second / 3_600, second / 60 % 60, second % 60);
    // Not by `format_args!`: that is a quarter of what a whole access line may cost.
    for (number, place, end) in [
        (year, 1000, '-'),
        (month, 10, '-'),
        (day, 10, 'T'),
        (hour, 10, ':'),
        (minute, 10, ':'),
        (second, 10, '.'),
        (u64::from(since.subsec_micros()), 100_000, 'Z'),
    ] {
        digits(out, number, place);
        out.push(end);
    }
}

/// The decimal digits of a number from a place on, zeros included.
fn digits(out: &mut String, number: u64, mut place: u64) {
    while place > 0 {
        // One digit, as eight bits.
        out.push(char::from(b'0' + (number / place % 10).to_le_bytes()[0]));
        place /= 10;
    }
}

fn quoted(out: &mut String, value: &str) {
    out.push('"');
    escaped(out, value, escape_debug);
    out.push('"');
}

fn json(out: &mut String, value: &str) {
    out.push('"');
    escaped(out, value, escape_json);
    out.push('"');
}

type Escape = fn(&mut String, char);

/// Nearly all values are plain: that is found out in one pass over their bytes.
fn is_plain(value: &[u8]) -> bool {
    value.iter().all(|byte| matches!(byte, b' '..=b'~') && !matches!(byte, b'"' | b'\\'))
}

/// Prints in place, and once more if that has to be escaped.
fn printed(out: &mut String, value: fmt::Arguments<'_>, escape: Escape) {
    let start = out.len();
    write_to(out, value);
    if !out.as_bytes().get(start..).is_none_or(is_plain) {
        let value = out.split_off(start);
        value.chars().for_each(|char| escape(out, char));
    }
}

fn escaped(out: &mut String, value: &str, escape: Escape) {
    if is_plain(value.as_bytes()) {
        out.push_str(value);
    } else {
        value.chars().for_each(|char| escape(out, char));
    }
}

/// As Rust's own `{:?}` does: quotes, backslashes and whatever does not print.
fn escape_debug(out: &mut String, char: char) {
    match char {
        '\'' => out.push('\''),
        char => out.extend(char.escape_debug()),
    }
}

/// What could end a line, divide it, or drive a terminal.
fn escape_control(out: &mut String, char: char) {
    if char.is_control() {
        out.extend(char.escape_default());
    } else {
        out.push(char);
    }
}

/// RFC 8259 §7.
fn escape_json(out: &mut String, char: char) {
    match char {
        '"' => out.push_str("\\\""),
        '\\' => out.push_str("\\\\"),
        '\n' => out.push_str("\\n"),
        '\r' => out.push_str("\\r"),
        '\t' => out.push_str("\\t"),
        char if char.is_control() => write_to(out, format_args!("\\u{:04x}", u32::from(char))),
        char => out.push(char),
    }
}

/// Writes to memory, which cannot fail; a `Display` that fails leaves what it wrote.
pub(super) fn write_to(out: &mut impl Write, value: fmt::Arguments<'_>) {
    let _ = out.write_fmt(value);
}

/// Lends a buffer of the thread, empty. A value that logs while it is printed gets another.
pub(crate) fn with_buffer<T>(
    buffer: &'static LocalKey<Cell<String>>,
    f: impl FnOnce(&mut String) -> T,
) -> T {
    // A thread that ends has none left.
    let mut text = buffer.try_with(Cell::take).unwrap_or_default();
    let result = f(&mut text);
    // One long line must not hold its memory on every thread for ever.
    if text.capacity() <= 16 * 1024 {
        text.clear();
        let _ = buffer.try_with(|slot| slot.set(text));
    }
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timestamps() {
        for (seconds, micros, expected) in [
            (0, 0, "1970-01-01T00:00:00.000000Z"),
            (951_782_399, 1, "2000-02-28T23:59:59.000001Z"),
            (951_782_400, 0, "2000-02-29T00:00:00.000000Z"),
            (1_795_315_899, 947_229, "2026-11-22T02:51:39.947229Z"),
            (4_107_542_400, 0, "2100-03-01T00:00:00.000000Z"),
            (4_107_542_399, 0, "2100-02-28T23:59:59.000000Z"),
            (1_735_689_599, 999_999, "2024-12-31T23:59:59.999999Z"),
        ] {
            let mut text = String::new();
            timestamp(&mut text, UNIX_EPOCH + Duration::new(seconds, micros * 1000));
            assert_eq!(text, expected);
        }
    }

    #[test]
    fn values_cannot_forge_a_line() {
        let evil = "a\"b\\c\nd\te\u{1b}[2J é\u{85}";
        let mut plain = String::new();
        Fields::new(&mut plain, Shape::Plain).str("s", evil).text("t", evil).addr("a", evil);
        assert_eq!(
            plain,
            r#"s="a\"b\\c\nd\te\u{1b}[2J é\u{85}" t="a\"b\\c\nd\te\u{1b}[2J é\u{85}" a=a"b\c\nd\te\u{1b}[2J é\u{85}"#
        );
        let mut json = "{".to_owned();
        Fields::new(&mut json, Shape::Json)
            .str("s", evil)
            .text("t", evil)
            .addr("a", evil)
            .number("n", 7);
        json.push('}');
        let parsed: serde_json::Value = serde_json::from_str(&json).unwrap();
        assert_eq!(parsed, serde_json::json!({"s": evil, "t": evil, "a": evil, "n": 7}));
    }
}
