//! Characters for the YAML scanner, read piece by piece.

use std::cell::RefCell;
use std::io::{self, Read};
use std::rc::Rc;

use saphyr_parser::Input;

/// Bytes read at once. Large enough that the system call is lost in the scanning of what it brought.
const PIECE: usize = 64 * 1024;
/// As far as the scanner is allowed to look ahead in one go; its own inputs use the same number.
const LOOKAHEAD: usize = 16;

/// Where the text tells why it ended before its end: an [`Input`] has no way to fail.
#[derive(Debug, Clone, Default)]
pub(super) struct Ended(Rc<RefCell<Option<TextFault>>>);

/// Why characters could not be had.
#[derive(Debug)]
pub(super) enum TextFault {
    Read(io::Error),
    /// Not UTF-8, or a NUL, which the scanner would take for the end and so drop the rest of the file.
    NotText,
}

impl Ended {
    pub(super) fn take(&self) -> Option<TextFault> {
        self.0.borrow_mut().take()
    }

    fn set(&self, fault: TextFault) {
        self.0.borrow_mut().get_or_insert(fault);
    }
}

/// A reader as the scanner wants it.
///
/// Like the scanner's own input over an iterator, but it decodes in pieces and keeps them in a flat buffer,
/// which is twice as fast.
pub(super) struct Text<'r> {
    reader: Box<dyn Read + 'r>,
    bytes: Vec<u8>,
    /// Bytes at the front of `bytes` that are an unfinished character.
    left: usize,
    chars: Vec<char>,
    at: usize,
    /// How far the scanner has asked to look ahead from `at`.
    asked: usize,
    done: bool,
    ended: Ended,
}

impl<'r> Text<'r> {
    pub(super) fn new(reader: Box<dyn Read + 'r>, ended: Ended) -> Self {
        Self {
            reader,
            bytes: vec![0; PIECE],
            left: 0,
            chars: Vec::with_capacity(PIECE),
            at: 0,
            asked: 0,
            done: false,
            ended,
        }
    }

    fn end(&mut self, fault: Option<TextFault>) {
        self.done = true;
        if let Some(fault) = fault {
            self.ended.set(fault);
        }
    }

    /// Reads one piece behind what is still unread.
    #[cold]
    fn fill(&mut self) {
        self.chars.drain(..self.at);
        self.at = 0;
        let Some(room) = self.bytes.get_mut(self.left..) else { return self.end(None) };
        let read = match self.reader.read(room) {
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return,
            Err(error) => return self.end(Some(TextFault::Read(error))),
        };
        let have = self.left + read;
        let Some(bytes) = self.bytes.get(..have) else { return self.end(None) };
        if read == 0 {
            let fault = (have > 0).then_some(TextFault::NotText);
            return self.end(fault);
        }
        let (valid, broken) = match std::str::from_utf8(bytes) {
            Ok(text) => (text.len(), false),
            Err(error) => (error.valid_up_to(), error.error_len().is_some()),
        };
        let text = bytes
            .get(..valid)
            .and_then(|bytes| std::str::from_utf8(bytes).ok())
            .unwrap_or_default();
        let nul = text.bytes().any(|byte| byte == 0);
        if nul {
            self.chars.extend(text.chars().take_while(|c| *c != '\0'));
        } else if text.is_ascii() {
            self.chars.extend(text.bytes().map(char::from));
        } else {
            self.chars.extend(text.chars());
        }
        self.bytes.copy_within(valid..have, 0);
        self.left = have - valid;
        if nul || broken {
            self.end(Some(TextFault::NotText));
        }
    }

    fn have(&mut self, count: usize) {
        while self.chars.len() - self.at < count && !self.done {
            self.fill();
        }
    }
}

impl Input for Text<'_> {
    #[inline]
    fn lookahead(&mut self, count: usize) {
        if self.asked < count {
            self.have(count);
            self.asked = count;
        }
    }

    #[inline]
    fn buflen(&self) -> usize {
        self.asked
    }

    #[inline]
    fn bufmaxlen(&self) -> usize {
        LOOKAHEAD
    }

    #[inline]
    fn raw_read_ch(&mut self) -> char {
        self.have(1);
        let c = self.peek();
        self.skip();
        c
    }

    #[inline]
    fn raw_read_non_breakz_ch(&mut self) -> Option<char> {
        self.have(1);
        let c = self.chars.get(self.at).copied()?;
        if matches!(c, '\n' | '\r') {
            return None;
        }
        self.skip();
        Some(c)
    }

    #[inline]
    fn skip(&mut self) {
        self.skip_n(1);
    }

    #[inline]
    fn skip_n(&mut self, count: usize) {
        self.at = (self.at + count).min(self.chars.len());
        self.asked = self.asked.saturating_sub(count);
    }

    #[inline]
    fn peek(&self) -> char {
        self.chars.get(self.at).copied().unwrap_or('\0')
    }

    #[inline]
    fn peek_nth(&self, n: usize) -> char {
        self.chars.get(self.at + n).copied().unwrap_or('\0')
    }
}
