//! A YAML text as tokens: what a value starts with, and where it ends.

use std::borrow::Cow;
use std::collections::HashMap;
use std::hash::Hasher;
use std::io::Read;
use std::rc::Rc;

use saphyr_parser::{Event, Parser, ScalarStyle, Tag};

use super::fault::{Fault, Place};
use super::text::{Ended, Text, TextFault};

/// Tokens kept for anchors (`&a`), and those given again for aliases (`*a`), in one text. They bound what a few
/// lines of aliases of aliases can cost.
const MAX_ANCHORED: usize = 65_536;
const MAX_REPEATED: usize = 4_194_304;

/// The start of a value, or the end of a list or map.
#[derive(Debug, Clone)]
pub(super) struct Token {
    pub(super) kind: Kind,
    pub(super) at: Place,
    /// A local tag, `!Exact` without its mark: another way to write a variant.
    pub(super) tag: Option<Box<str>>,
}

#[derive(Debug, Clone)]
pub(super) enum Kind {
    Scalar { text: Cow<'static, str>, plain: bool },
    List,
    Map,
    End,
}

impl Token {
    /// No value: `~`, `null`, or nothing behind the colon.
    pub(super) fn is_null(&self) -> bool {
        match &self.kind {
            Kind::Scalar { text, plain: true } => {
                matches!(text.as_ref(), "" | "~" | "null" | "Null" | "NULL")
            }
            Kind::Scalar { plain: false, .. } | Kind::List | Kind::Map | Kind::End => false,
        }
    }
}

/// What an alias stands for, while it is being recorded.
struct Recording {
    anchor: usize,
    depth: usize,
    tokens: Vec<Token>,
}

/// Reads one document, token by token.
pub(super) struct Tokens<'r> {
    parser: Parser<'static, Text<'r>>,
    ended: Ended,
    print: std::hash::DefaultHasher,
    anchors: HashMap<usize, Rc<[Token]>>,
    recording: Vec<Recording>,
    anchored: usize,
    repeating: Option<(Rc<[Token]>, usize)>,
    repeated: usize,
}

impl<'r> Tokens<'r> {
    pub(super) fn new(reader: Box<dyn Read + 'r>) -> Self {
        let ended = Ended::default();
        Self {
            parser: Parser::new(Text::new(reader, ended.clone())),
            ended,
            print: std::hash::DefaultHasher::new(),
            anchors: HashMap::new(),
            recording: Vec::new(),
            anchored: 0,
            repeating: None,
            repeated: 0,
        }
    }

    /// Why the characters ended early, if they did. It goes before any fault found in what was read.
    pub(super) fn ended_early(&self) -> Option<TextFault> {
        self.ended.take()
    }

    /// The first token of the only document; `None` if the text holds nothing.
    pub(super) fn begin(&mut self) -> Result<Option<Token>, Box<Fault>> {
        loop {
            match self.event()? {
                (Event::StreamStart | Event::DocumentStart(_) | Event::Nothing, _) => {}
                (Event::StreamEnd | Event::DocumentEnd, _) => return Ok(None),
                (event, at) => return self.token(event, at).map(Some),
            }
        }
    }

    /// After the document's value: nothing else may follow.
    pub(super) fn finish(&mut self) -> Result<(), Box<Fault>> {
        loop {
            match self.event()? {
                (Event::DocumentEnd | Event::Nothing, _) => {}
                (Event::StreamEnd, _) => return Ok(()),
                (_, at) => return Err(Fault::new(at, "a second document; only one is read")),
            }
        }
    }

    /// The next token within the document.
    pub(super) fn next(&mut self) -> Result<Token, Box<Fault>> {
        let token = match self.repeat() {
            Some(token) => token,
            None => {
                let (event, at) = self.event()?;
                return self.token(event, at);
            }
        };
        self.keep(&token, 0)?;
        Ok(token)
    }

    /// A fingerprint of the tokens since the last call. Stable within this process, layout and comments aside.
    pub(super) fn fingerprint(&mut self) -> u64 {
        std::mem::replace(&mut self.print, std::hash::DefaultHasher::new()).finish()
    }

    fn event(&mut self) -> Result<(Event<'static>, Place), Box<Fault>> {
        match self.parser.next_event() {
            Some(Ok((event, span))) => {
                Ok((event, Place { line: span.start.line(), column: span.start.col() + 1 }))
            }
            Some(Err(error)) => {
                let at = Place { line: error.marker().line(), column: error.marker().col() + 1 };
                Err(Fault::new(at, format!("not YAML: {}", error.info())))
            }
            None => Err(Fault::new(Place { line: 1, column: 1 }, "the text ends early")),
        }
    }

    fn token(&mut self, event: Event<'static>, at: Place) -> Result<Token, Box<Fault>> {
        let (kind, anchor, tag) = match event {
            Event::Scalar(text, style, anchor, tag) => {
                (Kind::Scalar { text, plain: style == ScalarStyle::Plain }, anchor, tag)
            }
            Event::SequenceStart(anchor, tag) => (Kind::List, anchor, tag),
            Event::MappingStart(anchor, tag) => (Kind::Map, anchor, tag),
            Event::SequenceEnd | Event::MappingEnd => (Kind::End, 0, None),
            Event::Alias(anchor) => return self.alias(anchor, at),
            Event::Nothing
            | Event::StreamStart
            | Event::StreamEnd
            | Event::DocumentStart(_)
            | Event::DocumentEnd => return Err(Fault::new(at, "the document ends early")),
        };
        let token = Token { kind, at, tag: tag.and_then(|tag| local(&tag)) };
        self.keep(&token, anchor)?;
        Ok(token)
    }

    fn alias(&mut self, anchor: usize, at: Place) -> Result<Token, Box<Fault>> {
        let tokens = self.anchors.get(&anchor).map(Rc::clone);
        let tokens =
            tokens.ok_or_else(|| Fault::new(at, "an alias of what is not complete yet"))?;
        self.repeated = self.repeated.saturating_add(tokens.len());
        if self.repeated > MAX_REPEATED {
            return Err(Fault::new(at, "aliases repeat too much"));
        }
        self.repeating = Some((tokens, 0));
        self.next()
    }

    fn repeat(&mut self) -> Option<Token> {
        let (tokens, at) = self.repeating.as_mut()?;
        let token = tokens.get(*at).cloned();
        *at += 1;
        if token.is_none() {
            self.repeating = None;
        }
        token
    }

    /// Adds a token to the fingerprint, and to every anchored value that is still open.
    fn keep(&mut self, token: &Token, anchor: usize) -> Result<(), Box<Fault>> {
        match &token.kind {
            Kind::Scalar { text, .. } => {
                self.print.write(text.as_bytes());
                self.print.write_u8(0xff); // never within UTF-8: it ends the text
            }
            Kind::List => self.print.write_u8(0xfc),
            Kind::Map => self.print.write_u8(0xfd),
            Kind::End => self.print.write_u8(0xfe),
        }
        if let Some(tag) = &token.tag {
            self.print.write(tag.as_bytes());
        }
        if anchor != 0 {
            self.recording.push(Recording { anchor, depth: 0, tokens: Vec::new() });
        }
        if self.recording.is_empty() {
            return Ok(());
        }
        self.anchored = self.anchored.saturating_add(self.recording.len());
        if self.anchored > MAX_ANCHORED {
            return Err(Fault::new(token.at, "anchored values are too large"));
        }
        for recording in &mut self.recording {
            recording.tokens.push(token.clone());
            match token.kind {
                Kind::List | Kind::Map => recording.depth += 1,
                Kind::End => recording.depth = recording.depth.saturating_sub(1),
                Kind::Scalar { .. } => {}
            }
        }
        // The innermost closes first, and several can close with one token only if they began with it.
        while let Some(done) = self.recording.pop_if(|recording| recording.depth == 0) {
            self.anchors.insert(done.anchor, done.tokens.into());
        }
        Ok(())
    }
}

/// The name in a local tag; the core schema's (`!!str`) say nothing here, where the field has the type.
fn local(tag: &Tag) -> Option<Box<str>> {
    (!tag.is_yaml_core_schema() && !tag.suffix.is_empty()).then(|| tag.suffix.as_str().into())
}
