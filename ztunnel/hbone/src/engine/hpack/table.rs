//! The tables, and how a block is read with them.

use super::{Garbled, huffman};
use std::{borrow::Cow, collections::VecDeque};

/// What the peer's encoder may keep with us (section 4.2), in bytes: the default, which we never change.
const MOST: usize = 4096;

/// What an entry counts besides its text (section 4.1), in bytes.
const OVERHEAD: usize = 32;

/// Appendix A.
#[rustfmt::skip]
const STATIC: [(&str, &str); 61] = [
    (":authority", ""), (":method", "GET"), (":method", "POST"), (":path", "/"), (":path", "/index.html"),
    (":scheme", "http"), (":scheme", "https"), (":status", "200"), (":status", "204"), (":status", "206"),
    (":status", "304"), (":status", "400"), (":status", "404"), (":status", "500"), ("accept-charset", ""),
    ("accept-encoding", "gzip, deflate"), ("accept-language", ""), ("accept-ranges", ""), ("accept", ""),
    ("access-control-allow-origin", ""), ("age", ""), ("allow", ""), ("authorization", ""), ("cache-control", ""),
    ("content-disposition", ""), ("content-encoding", ""), ("content-language", ""), ("content-length", ""),
    ("content-location", ""), ("content-range", ""), ("content-type", ""), ("cookie", ""), ("date", ""), ("etag", ""),
    ("expect", ""), ("expires", ""), ("from", ""), ("host", ""), ("if-match", ""), ("if-modified-since", ""),
    ("if-none-match", ""), ("if-range", ""), ("if-unmodified-since", ""), ("last-modified", ""), ("link", ""),
    ("location", ""), ("max-forwards", ""), ("proxy-authenticate", ""), ("proxy-authorization", ""), ("range", ""),
    ("referer", ""), ("refresh", ""), ("retry-after", ""), ("server", ""), ("set-cookie", ""),
    ("strict-transport-security", ""), ("transfer-encoding", ""), ("user-agent", ""), ("vary", ""), ("via", ""),
    ("www-authenticate", ""),
];

/// A field that a table keeps.
type Entry = (Box<[u8]>, Box<[u8]>);

/// A field, where it lies or decoded.
type Field<'a> = (Cow<'a, [u8]>, Cow<'a, [u8]>);

/// The state of a decoder.
#[derive(Debug)]
pub(crate) struct Decoder {
    /// The newest first.
    entries: VecDeque<Entry>,
    size: usize,
    most: usize,
}

impl Decoder {
    pub(crate) const fn new() -> Self {
        Self { entries: VecDeque::new(), size: 0, most: MOST }
    }

    /// Reads a whole block, field by field.
    pub(crate) fn decode(
        &mut self,
        mut block: &[u8],
        mut field: impl FnMut(&[u8], &[u8]),
    ) -> Result<(), Garbled> {
        // Changes of the table's size come first (section 4.2).
        while let Some((&first, _)) = block.split_first()
            && first & 0xe0 == 0x20
        {
            let most = number(&mut block, 0x1f)?;
            if most > MOST {
                return Err(Garbled);
            }
            self.most = most;
            self.evict(0);
        }
        while let Some(&first) = block.first() {
            if first & 0x80 != 0 {
                let index = number(&mut block, 0x7f)?;
                let (name, value) = self.get(index).ok_or(Garbled)?;
                field(name, value);
            } else if first & 0x40 != 0 {
                let (name, value) = self.literal(&mut block, 0x3f)?;
                field(&name, &value);
                let (name, value) = (Box::from(name), Box::from(value));
                self.insert(name, value);
            } else if first & 0x20 != 0 {
                return Err(Garbled);
            } else {
                let (name, value) = self.literal(&mut block, 0x0f)?;
                field(&name, &value);
            }
        }
        Ok(())
    }

    /// A literal field, whose name may be in a table.
    #[expect(
        single_use_lifetimes,
        reason = "the block outlives the borrow of the table, and is not it"
    )]
    fn literal<'a, 'b: 'a>(
        &'a self,
        block: &mut &'b [u8],
        prefix: u8,
    ) -> Result<Field<'a>, Garbled> {
        let name = match number(block, prefix)? {
            0 => text(block)?,
            index => Cow::Borrowed(self.get(index).ok_or(Garbled)?.0),
        };
        Ok((name, text(block)?))
    }

    fn get(&self, index: usize) -> Option<(&[u8], &[u8])> {
        let at = index.checked_sub(1)?;
        if let Some((name, value)) = STATIC.get(at) {
            return Some((name.as_bytes(), value.as_bytes()));
        }
        let (name, value) = self.entries.get(at - STATIC.len())?;
        Some((name, value))
    }

    fn insert(&mut self, name: Box<[u8]>, value: Box<[u8]>) {
        let size = name.len() + value.len() + OVERHEAD;
        self.evict(size);
        // What is larger than the table empties it (section 4.4).
        if size <= self.most {
            self.size += size;
            self.entries.push_front((name, value));
        }
    }

    /// Makes room.
    fn evict(&mut self, room: usize) {
        while self.size + room > self.most
            && let Some((name, value)) = self.entries.pop_back()
        {
            self.size -= name.len() + value.len() + OVERHEAD;
        }
        if self.entries.is_empty() {
            self.entries = VecDeque::new();
        }
    }
}

/// A number (section 5.1), with this largest one that fits into its first byte.
fn number(block: &mut &[u8], prefix: u8) -> Result<usize, Garbled> {
    let mut next = || {
        let (first, rest) = block.split_first().ok_or(Garbled)?;
        *block = rest;
        Ok(*first)
    };
    let first = next()? & prefix;
    let mut number = usize::from(first);
    if first < prefix {
        return Ok(number);
    }
    // Nothing that makes sense is longer.
    for shift in [0, 7, 14, 21] {
        let byte = next()?;
        number += usize::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Ok(number);
        }
    }
    Err(Garbled)
}

/// A string (section 5.2).
fn text<'a>(block: &mut &'a [u8]) -> Result<Cow<'a, [u8]>, Garbled> {
    let coded = block.first().ok_or(Garbled)? & 0x80 != 0;
    let length = number(block, 0x7f)?;
    let (text, rest) = block.split_at_checked(length).ok_or(Garbled)?;
    *block = rest;
    if !coded {
        return Ok(Cow::Borrowed(text));
    }
    let mut decoded = Vec::with_capacity(length * 8 / 5);
    huffman::decode(text, &mut decoded).ok_or(Garbled)?;
    Ok(Cow::Owned(decoded))
}
