//! Values out of tokens: maps, lists, scalars, each with the path of the field in its faults.

use std::str::FromStr;

use super::fault::Fault;
use super::tokens::{Kind, Token, Tokens};

type Result<T> = std::result::Result<T, Box<Fault>>;

/// A map's entries, in order, each key once. Null is an empty map.
pub(super) fn map(
    tokens: &mut Tokens<'_>,
    start: &Token,
    mut entry: impl FnMut(&mut Tokens<'_>, &Token, &str, Token) -> Result<()>,
) -> Result<()> {
    if start.is_null() {
        return Ok(());
    }
    if !matches!(start.kind, Kind::Map) {
        return Err(Fault::new(start.at, "expected a map"));
    }
    let mut seen: Vec<String> = Vec::new();
    loop {
        let key = tokens.next()?;
        let text = match &key.kind {
            Kind::End => return Ok(()),
            Kind::Scalar { text, .. } => text.as_ref(),
            Kind::List | Kind::Map => {
                return Err(Fault::new(key.at, "a key must be text or a number"));
            }
        };
        if seen.iter().any(|before| before == text) {
            return Err(Fault::new(key.at, "the key stands here twice").within(text));
        }
        let value = tokens.next().map_err(|fault| fault.within(text))?;
        entry(tokens, &key, text, value).map_err(|fault| fault.within(text))?;
        seen.push(text.to_owned());
    }
}

/// A list's items, in order. Null is an empty list.
pub(super) fn list(
    tokens: &mut Tokens<'_>,
    start: &Token,
    mut item: impl FnMut(&mut Tokens<'_>, Token) -> Result<()>,
) -> Result<()> {
    if start.is_null() {
        return Ok(());
    }
    if !matches!(start.kind, Kind::List) {
        return Err(Fault::new(start.at, "expected a list"));
    }
    let mut index = 0_usize;
    loop {
        let token = tokens.next().map_err(|fault| fault.within(&format!("[{index}]")))?;
        if matches!(token.kind, Kind::End) {
            return Ok(());
        }
        item(tokens, token).map_err(|fault| fault.within(&format!("[{index}]")))?;
        index += 1;
    }
}

/// A list of what one token holds.
pub(super) fn each<T>(
    tokens: &mut Tokens<'_>,
    start: &Token,
    mut item: impl FnMut(Token) -> Result<T>,
) -> Result<Vec<T>> {
    let mut items = Vec::new();
    list(tokens, start, |_, token| {
        items.push(item(token)?);
        Ok(())
    })?;
    Ok(items)
}

/// Text; null is empty, and a number is its digits.
pub(super) fn text(token: Token) -> Result<String> {
    if token.is_null() {
        return Ok(String::new());
    }
    match token.kind {
        Kind::Scalar { text, .. } => Ok(text.into_owned()),
        Kind::List | Kind::Map | Kind::End => Err(Fault::new(token.at, "expected text")),
    }
}

/// Anything written as one scalar; `what` says what was expected.
pub(super) fn parsed<T: FromStr>(token: &Token, what: &str) -> Result<T> {
    with(token, what, |text| text.parse().ok())
}

/// As [`parsed`], with the parser given.
pub(super) fn with<T>(
    token: &Token,
    what: &str,
    parse: impl FnOnce(&str) -> Option<T>,
) -> Result<T> {
    match &token.kind {
        Kind::Scalar { text, .. } => {
            parse(text).ok_or_else(|| Fault::new(token.at, unexpected(text, what)))
        }
        Kind::List | Kind::Map | Kind::End => Err(Fault::new(token.at, format!("expected {what}"))),
    }
}

/// A map's key, read as something else than text.
pub(super) fn key<T: FromStr>(token: &Token, what: &str) -> Result<T> {
    parsed(token, what)
}

/// `true` or `false`.
pub(super) fn flag(token: &Token) -> Result<bool> {
    with(token, "true or false", |text| match text {
        "true" | "True" | "TRUE" => Some(true),
        "false" | "False" | "FALSE" => Some(false),
        _ => None,
    })
}

/// One of some words, spelt exactly.
pub(super) fn one_of<T: Copy>(token: &Token, words: &[(&str, T)]) -> Result<T> {
    let found = match &token.kind {
        Kind::Scalar { text, .. } => {
            words.iter().find(|(word, _)| word == text).map(|(_, value)| *value)
        }
        Kind::List | Kind::Map | Kind::End => None,
    };
    found.ok_or_else(|| {
        let words: Vec<&str> = words.iter().map(|(word, _)| *word).collect();
        let expected = format!("one of {}", words.join(", "));
        match &token.kind {
            Kind::Scalar { text, .. } => Fault::new(token.at, unexpected(text, &expected)),
            Kind::List | Kind::Map | Kind::End => {
                Fault::new(token.at, format!("expected {expected}"))
            }
        }
    })
}

/// A key that the map does not have.
pub(super) fn unknown(key: &Token) -> Box<Fault> {
    Fault::new(key.at, "no such field here")
}

/// A field that must be there.
pub(super) fn missing(start: &Token, field: &str) -> Box<Fault> {
    Fault::new(start.at, "must be given").within(field)
}

/// Passes over a value of any shape.
pub(super) fn skip(tokens: &mut Tokens<'_>, start: &Token) -> Result<()> {
    let mut depth = usize::from(matches!(start.kind, Kind::List | Kind::Map));
    while depth > 0 {
        match tokens.next()?.kind {
            Kind::List | Kind::Map => depth += 1,
            Kind::End => depth -= 1,
            Kind::Scalar { .. } => {}
        }
    }
    Ok(())
}

fn unexpected(text: &str, expected: &str) -> String {
    // A message is for a line of the log, not for a page of somebody's file.
    const SHOWN: usize = 60;
    let shown: String = text.chars().take(SHOWN).collect();
    let more = if text.chars().nth(SHOWN).is_some() { "…" } else { "" };
    format!("expected {expected}, found `{shown}{more}`")
}
