//! A small tree of YAML, enough for a proxy's configuration.

use std::borrow::Cow;

use saphyr_parser::{Event, Marker, Parser, ScalarStyle, Span};

/// Depth at which a document is refused, long before the stack ends.
const DEPTH: usize = 64;

/// A node. Scalars keep their text; what it means is the reader's business.
#[derive(Debug, PartialEq)]
pub(super) enum Yaml {
    Null,
    Scalar(String),
    List(Vec<Yaml>),
    /// In the order of the document.
    Map(Vec<(String, Yaml)>),
}

/// Why a document is not understood, and where.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct Fault {
    /// From 1.
    pub(super) line: usize,
    pub(super) problem: String,
}

impl Yaml {
    /// Reads the first document of a text; an empty text is null.
    pub(super) fn parse(text: &str) -> Result<Self, Fault> {
        let mut parser = Parser::new_from_str(text);
        loop {
            match next(&mut parser)? {
                (Event::StreamEnd, _) => return Ok(Self::Null),
                (Event::StreamStart | Event::DocumentStart(_) | Event::DocumentEnd, _) => {}
                (event, span) => return node(&mut parser, event, span.start, DEPTH),
            }
        }
    }

    pub(super) fn get(&self, name: &str) -> Option<&Self> {
        match self {
            Self::Map(entries) => {
                entries.iter().find(|(key, _)| key == name).map(|(_, value)| value)
            }
            Self::Null | Self::Scalar(_) | Self::List(_) => None,
        }
    }
}

type Source<'a> = Parser<'a, saphyr_parser::StrInput<'a>>;

fn next<'a>(parser: &mut Source<'a>) -> Result<(Event<'a>, Span), Fault> {
    match parser.next_event() {
        Some(Ok(found)) => Ok(found),
        Some(Err(error)) => Err(fault(*error.marker(), error.info())),
        None => Ok((Event::StreamEnd, Span::default())),
    }
}

fn fault(at: Marker, problem: &str) -> Fault {
    Fault { line: at.line(), problem: problem.to_owned() }
}

fn node(
    parser: &mut Source<'_>,
    event: Event<'_>,
    at: Marker,
    depth: usize,
) -> Result<Yaml, Fault> {
    let Some(depth) = depth.checked_sub(1) else { return Err(fault(at, "nested too deeply")) };
    match event {
        Event::Scalar(text, style, ..) => Ok(scalar(text, style)),
        Event::SequenceStart(..) => {
            let mut items = Vec::new();
            loop {
                match next(parser)? {
                    (Event::SequenceEnd, _) => return Ok(Yaml::List(items)),
                    (event, span) => items.push(node(parser, event, span.start, depth)?),
                }
            }
        }
        Event::MappingStart(..) => mapping(parser, depth),
        Event::Alias(_) => Err(fault(at, "aliases are not supported: write the value out")),
        Event::Nothing
        | Event::StreamStart
        | Event::StreamEnd
        | Event::DocumentStart(_)
        | Event::DocumentEnd
        | Event::SequenceEnd
        | Event::MappingEnd => Err(fault(at, "the document ends too early")),
    }
}

fn mapping(parser: &mut Source<'_>, depth: usize) -> Result<Yaml, Fault> {
    let mut entries: Vec<(String, Yaml)> = Vec::new();
    loop {
        let (name, at) = match next(parser)? {
            (Event::MappingEnd, _) => return Ok(Yaml::Map(entries)),
            (Event::Scalar(name, ..), span) => (name.into_owned(), span.start),
            (_, span) => return Err(fault(span.start, "a key must be plain text")),
        };
        if entries.iter().any(|(other, _)| *other == name) {
            return Err(fault(at, &format!("{name:?} is set twice")));
        }
        let (event, span) = next(parser)?;
        entries.push((name, node(parser, event, span.start, depth)?));
    }
}

/// Null as the core schema has it (<https://yaml.org/spec/1.2.2/#103-core-schema>); the rest stays text.
fn scalar(text: Cow<'_, str>, style: ScalarStyle) -> Yaml {
    if style == ScalarStyle::Plain && matches!(&*text, "" | "~" | "null" | "Null" | "NULL") {
        return Yaml::Null;
    }
    Yaml::Scalar(text.into_owned())
}
