//! Frames that come: RFC 9113, sections 4 to 6. A frame of DATA is passed on as it arrives, and never held whole.

use super::{
    fields::Fields,
    frame::{By, Error, Head as FrameHead, LARGEST_WINDOW, PREFACE, Reason, flag, kind},
    hpack::Decoder,
    state::{Half, Inner, Role},
};
use crate::parcel::HEAD;
use std::ops::Range;

/// CONTINUATION frames of one block.
const CONTINUATIONS: usize = 32;
/// Frames of DATA without any, in a row.
const EMPTY_FRAMES: usize = 1000;
/// The longest frame of SETTINGS that makes sense, in bytes: every setting there is, many times.
const SETTINGS: usize = 16 * 1024;

/// A part of what was received, and the stream that it is for: its place and its number.
#[derive(Debug)]
pub(super) struct Piece {
    pub(super) key: usize,
    pub(super) id: u32,
    pub(super) range: Range<usize>,
}

/// Where in a frame we are.
#[derive(Debug)]
enum State {
    /// So many bytes of what a client says first are still to come.
    Preface(usize),
    Head,
    /// The length of the padding behind so much is to come.
    Padding(FrameHead),
    /// So much data is to come, and so much padding behind it.
    Data {
        head: FrameHead,
        key: Option<usize>,
        left: usize,
        padding: usize,
    },
    /// The whole frame is wanted.
    Whole(FrameHead),
    /// So much that nobody wants.
    Skip(usize),
}

/// A block of headers that is not yet here in full.
#[derive(Debug)]
struct Block {
    head: FrameHead,
    bytes: Vec<u8>,
    frames: usize,
}

/// What has come of the next frame.
#[derive(Debug)]
pub(super) struct Parser {
    state: State,
    bytes: Vec<u8>,
    head: [u8; HEAD],
    have: usize,
    block: Option<Box<Block>>,
    settled: bool,
    empty: usize,
    decoder: Decoder,
}

pub(super) fn broken(why: &'static str) -> Error {
    Error::GoAway(Reason::PROTOCOL_ERROR, By::Us, why)
}

fn sized(why: &'static str) -> Error {
    Error::GoAway(Reason::FRAME_SIZE_ERROR, By::Us, why)
}

pub(super) fn flooded(why: &'static str) -> Error {
    Error::GoAway(Reason::ENHANCE_YOUR_CALM, By::Us, why)
}

impl Parser {
    pub(super) const fn new(role: Role) -> Self {
        let state = match role {
            Role::Client => State::Head,
            Role::Server => State::Preface(PREFACE.len()),
        };
        Self {
            state,
            bytes: Vec::new(),
            head: [0; HEAD],
            have: 0,
            block: None,
            settled: false,
            empty: 0,
            decoder: Decoder::new(),
        }
    }

    /// Whether the peer has said what comes first.
    pub(super) const fn has_begun(&self) -> bool {
        !matches!(self.state, State::Preface(_))
    }

    /// Reads on. Data is named in `pieces` by where it lies, counted from `base`.
    pub(super) fn read(
        &mut self,
        mut bytes: &[u8],
        mut base: usize,
        inner: &mut Inner,
        pieces: &mut Vec<Piece>,
    ) -> Result<(), Error> {
        while !bytes.is_empty() {
            let taken = match self.state {
                State::Preface(left) => self.preface(left, bytes)?,
                State::Head => self.frame_head(bytes, inner)?,
                State::Padding(head) => self.padding(head, bytes, inner)?,
                State::Data { head, key, left, padding } => {
                    let count = left.min(bytes.len());
                    if let Some(key) = key {
                        pieces.push(Piece { key, id: head.stream, range: base..base + count });
                    }
                    let left = left - count;
                    self.state = State::Data { head, key, left, padding };
                    if left == 0 {
                        self.data_ends(head, padding, inner)?;
                    }
                    count
                }
                State::Whole(head) => self.whole(head, bytes, inner)?,
                State::Skip(left) => {
                    let count = left.min(bytes.len());
                    self.state =
                        if left == count { State::Head } else { State::Skip(left - count) };
                    count
                }
            };
            bytes = bytes.get(taken..).unwrap_or_default();
            base += taken;
        }
        Ok(())
    }

    fn preface(&mut self, left: usize, bytes: &[u8]) -> Result<usize, Error> {
        let count = left.min(bytes.len());
        let expected = PREFACE.get(PREFACE.len() - left..).unwrap_or_default();
        if bytes.get(..count) != expected.get(..count) {
            return Err(broken("a connection that does not begin as HTTP/2"));
        }
        self.state = if left == count { State::Head } else { State::Preface(left - count) };
        Ok(count)
    }

    fn frame_head(&mut self, bytes: &[u8], inner: &mut Inner) -> Result<usize, Error> {
        let count = (HEAD - self.have).min(bytes.len());
        let (now, _) = bytes.split_at(count);
        if let Some(place) = self.head.get_mut(self.have..self.have + count) {
            place.copy_from_slice(now);
        }
        self.have += count;
        if self.have == HEAD {
            self.have = 0;
            let head = FrameHead::read(self.head);
            self.begin(head, inner)?;
            // A frame without payload is whole already.
            if head.length == 0
                && let State::Whole(head) = self.state
            {
                self.state = State::Head;
                self.frame(head, &[], inner)?;
            }
        }
        Ok(count)
    }

    /// What is to become of a frame.
    fn begin(&mut self, head: FrameHead, inner: &mut Inner) -> Result<(), Error> {
        if head.length > inner.limits.frame {
            return Err(sized("a frame larger than we take"));
        }
        if !self.settled && (head.kind != kind::SETTINGS || head.has(flag::ACK)) {
            return Err(broken("a connection that does not begin with SETTINGS"));
        }
        self.settled = true;
        if let Some(block) = &self.block
            && (head.kind != kind::CONTINUATION || head.stream != block.head.stream)
        {
            return Err(broken("a frame within a block of headers"));
        }
        let on_stream = head.stream != 0;
        let (of_stream, fits) = match head.kind {
            kind::DATA => return self.begin_data(head, inner),
            kind::HEADERS | kind::CONTINUATION => {
                self.bound_block(head, inner)?;
                (true, true)
            }
            kind::PRIORITY if head.length != 5 && on_stream => {
                inner.reset_for(
                    head.stream,
                    Reason::FRAME_SIZE_ERROR,
                    "a PRIORITY of another size",
                )?;
                self.skip(head.length);
                return Ok(());
            }
            kind::PRIORITY => (true, true),
            kind::RST_STREAM => (true, head.length == 4),
            kind::WINDOW_UPDATE => (on_stream, head.length == 4),
            kind::SETTINGS if head.has(flag::ACK) => (false, head.length == 0),
            kind::SETTINGS => (false, head.length.is_multiple_of(6) && head.length <= SETTINGS),
            kind::PING => (false, head.length == 8),
            kind::GOAWAY if head.length > SETTINGS => {
                return Err(flooded("a GOAWAY with a long text"));
            }
            kind::GOAWAY => (false, head.length >= 8),
            kind::PUSH_PROMISE => return Err(broken("a push, which we do not take")),
            _ => {
                // Unknown types say nothing (section 5.5).
                self.skip(head.length);
                return Ok(());
            }
        };
        if of_stream != on_stream {
            return Err(broken("a frame on a stream that it cannot be for"));
        }
        if !fits {
            return Err(sized("a frame of another size than its type has"));
        }
        self.state = State::Whole(head);
        Ok(())
    }

    const fn skip(&mut self, length: usize) {
        self.state = if length == 0 { State::Head } else { State::Skip(length) };
    }

    /// Holds blocks of headers within bounds (CVE-2024-27316 and its like).
    fn bound_block(&self, head: FrameHead, inner: &Inner) -> Result<(), Error> {
        let (bytes, frames) =
            self.block.as_ref().map_or((0, 0), |block| (block.bytes.len(), block.frames));
        if head.kind == kind::CONTINUATION && self.block.is_none() {
            return Err(broken("a CONTINUATION of nothing"));
        }
        if bytes + head.length > 2 * inner.limits.headers || frames > CONTINUATIONS {
            return Err(flooded("a block of headers without end"));
        }
        Ok(())
    }

    fn begin_data(&mut self, head: FrameHead, inner: &mut Inner) -> Result<(), Error> {
        if head.stream == 0 {
            return Err(broken("DATA on no stream"));
        }
        if head.length == 0 && !head.has(flag::END_STREAM) {
            self.empty += 1;
            if self.empty > EMPTY_FRAMES {
                return Err(flooded("empty frames without end"));
            }
        } else {
            self.empty = 0;
        }
        let length = i64::try_from(head.length).unwrap_or(i64::MAX);
        if length > inner.receive_window {
            let why = "more data than the connection's window";
            return Err(Error::GoAway(Reason::FLOW_CONTROL_ERROR, By::Us, why));
        }
        inner.receive_window -= length;
        self.state = State::Data { head, key: None, left: head.length, padding: 0 };
        if let Some(key) = inner.find(head.stream) {
            self.admit(key, head, length, inner)?;
        } else {
            inner.release(u32::try_from(head.length).unwrap_or(u32::MAX));
            inner.data_for_none(head.stream)?;
        }
        if head.has(flag::PADDED) {
            if head.length == 0 {
                return Err(sized("padding without its length"));
            }
            self.state = State::Padding(head);
        } else if head.length == 0 {
            self.data_ends(head, 0, inner)?;
        }
        Ok(())
    }

    /// Data of an open stream.
    fn admit(
        &mut self,
        key: usize,
        head: FrameHead,
        length: i64,
        inner: &mut Inner,
    ) -> Result<(), Error> {
        let bytes = u32::try_from(length).unwrap_or(u32::MAX);
        let Some(entry) = inner.entries.get_mut(key) else { return Ok(()) };
        let (reason, why) = if entry.receiving != Half::Open {
            (Reason::STREAM_CLOSED, "data behind the end of a stream")
        } else if !entry.answered {
            (Reason::PROTOCOL_ERROR, "data before the answer")
        } else if length > entry.receive_window {
            (Reason::FLOW_CONTROL_ERROR, "more data than the stream's window")
        } else {
            entry.receive_window -= length;
            if entry.held {
                entry.outstanding += bytes;
                self.state = State::Data { head, key: Some(key), left: head.length, padding: 0 };
            } else {
                inner.release(bytes);
            }
            return Ok(());
        };
        inner.release(bytes);
        inner.reset_for(head.stream, reason, why)
    }

    fn padding(
        &mut self,
        head: FrameHead,
        bytes: &[u8],
        inner: &mut Inner,
    ) -> Result<usize, Error> {
        let Some(&padding) = bytes.first() else { return Ok(0) };
        let padding = usize::from(padding);
        let Some(left) = (head.length - 1).checked_sub(padding) else {
            return Err(broken("padding longer than its frame"));
        };
        let key = inner.find(head.stream).filter(|key| {
            inner.entries.get(*key).is_some_and(|e| e.held && e.receiving == Half::Open)
        });
        if let Some(key) = key {
            // Nobody passes padding on.
            inner.release_stream(key, u32::try_from(padding + 1).unwrap_or(u32::MAX));
        }
        self.state = State::Data { head, key, left, padding };
        if left == 0 {
            self.data_ends(head, padding, inner)?;
        }
        Ok(1)
    }

    fn data_ends(
        &mut self,
        head: FrameHead,
        padding: usize,
        inner: &mut Inner,
    ) -> Result<(), Error> {
        let length = head.length - padding - usize::from(head.has(flag::PADDED));
        self.skip(padding);
        let Some(key) = inner.find(head.stream) else { return Ok(()) };
        let last = head.has(flag::END_STREAM);
        if let Some(entry) = inner.entries.get_mut(key)
            && entry.receiving == Half::Open
            && let Some(expected) = &mut entry.expected
        {
            let left = expected.checked_sub(u64::try_from(length).unwrap_or(u64::MAX));
            match left {
                Some(left) if left == 0 || !last => **expected = left,
                _ => {
                    let why = "content that is not as long as it says";
                    return inner.reset_for(head.stream, Reason::PROTOCOL_ERROR, why);
                }
            }
        }
        if last {
            inner.heard_end(key);
        }
        Ok(())
    }

    /// A frame that is wanted whole: from where it lies, if it is there.
    fn whole(&mut self, head: FrameHead, bytes: &[u8], inner: &mut Inner) -> Result<usize, Error> {
        if self.bytes.is_empty()
            && let Some((now, _)) = bytes.split_at_checked(head.length)
        {
            self.state = State::Head;
            self.frame(head, now, inner)?;
            return Ok(head.length);
        }
        let count = (head.length - self.bytes.len()).min(bytes.len());
        self.bytes.extend_from_slice(bytes.get(..count).unwrap_or_default());
        if self.bytes.len() == head.length {
            self.state = State::Head;
            let bytes = std::mem::take(&mut self.bytes);
            self.frame(head, &bytes, inner)?;
        }
        Ok(count)
    }

    fn frame(&mut self, head: FrameHead, bytes: &[u8], inner: &mut Inner) -> Result<(), Error> {
        match head.kind {
            kind::HEADERS => self.headers(head, bytes, inner),
            kind::CONTINUATION => self.continuation(head, bytes, inner),
            kind::PRIORITY => inner.on_priority(head.stream, bytes),
            kind::RST_STREAM => inner.on_reset(head.stream, number(bytes, 0)),
            kind::SETTINGS if head.has(flag::ACK) => Ok(()),
            kind::SETTINGS => inner.on_settings(bytes),
            kind::PING => {
                inner.on_ping(head.has(flag::ACK), bytes);
                Ok(())
            }
            kind::GOAWAY => inner.on_goaway(number(bytes, 0) & LARGEST_WINDOW, number(bytes, 4)),
            kind::WINDOW_UPDATE => inner.on_window(head.stream, number(bytes, 0) & LARGEST_WINDOW),
            _ => Ok(()),
        }
    }

    fn headers(&mut self, head: FrameHead, bytes: &[u8], inner: &mut Inner) -> Result<(), Error> {
        let mut block = bytes;
        let mut padding = 0;
        if head.has(flag::PADDED) {
            let (first, rest) = block.split_first().ok_or(sized("padding without its length"))?;
            (padding, block) = (usize::from(*first), rest);
        }
        if head.has(flag::PRIORITY) {
            let (priority, rest) =
                block.split_at_checked(5).ok_or(sized("a priority that breaks off"))?;
            block = rest;
            if number(priority, 0) & LARGEST_WINDOW == head.stream {
                let why = "a stream that depends on itself";
                return Err(broken(why));
            }
        }
        let Some(length) = block.len().checked_sub(padding) else {
            return Err(broken("padding longer than its frame"));
        };
        let block = block.get(..length).unwrap_or_default();
        if head.has(flag::END_HEADERS) {
            return self.message(head, block, inner);
        }
        self.block = Some(Box::new(Block { head, bytes: block.to_vec(), frames: 0 }));
        Ok(())
    }

    fn continuation(
        &mut self,
        head: FrameHead,
        bytes: &[u8],
        inner: &mut Inner,
    ) -> Result<(), Error> {
        let Some(mut block) = self.block.take() else {
            return Err(broken("a CONTINUATION of nothing"));
        };
        block.bytes.extend_from_slice(bytes);
        block.frames += 1;
        if head.has(flag::END_HEADERS) {
            return self.message(block.head, &block.bytes, inner);
        }
        self.block = Some(block);
        Ok(())
    }

    /// A block that is here in full. It is read in any case: the tables have to stay the same on both sides.
    fn message(&mut self, head: FrameHead, block: &[u8], inner: &mut Inner) -> Result<(), Error> {
        let mut fields = Fields::default();
        let most = inner.limits.headers;
        self.decoder.decode(block, |name, value| fields.add(name, value, most)).map_err(
            |_garbled| {
                let why = "headers that cannot be read";
                Error::GoAway(Reason::COMPRESSION_ERROR, By::Us, why)
            },
        )?;
        let last = head.has(flag::END_STREAM);
        match inner.role {
            Role::Server => inner.on_request(head.stream, fields, last),
            Role::Client => inner.on_answer(head.stream, fields, last),
        }
    }
}

pub(super) fn number(bytes: &[u8], at: usize) -> u32 {
    let four = bytes.get(at..at + 4).and_then(|four| four.try_into().ok());
    u32::from_be_bytes(four.unwrap_or_default())
}
