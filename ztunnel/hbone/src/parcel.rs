//! What goes to the peer, laid out as TLS records so that it is encrypted where it lies: each record has its
//! header and its tag around it, and, where it carries data, begins with the head of one DATA frame. Bytes that
//! are read from a socket are read to where they are sent from.
//!
//! ```text
//!   |header| frame head | payload …                    |type, tag|header| frame head | payload …
//!    5      9            up to 16375                     17
//! ```

use crate::buffers::{Buffer, SIZE};
use bytes::Bytes;
use std::{
    collections::VecDeque,
    io::{IoSlice, IoSliceMut},
};

/// The plaintext of a full record, in bytes (RFC 8446, section 5.1).
pub(crate) const RECORD: usize = 16 * 1024;
/// The header of a record, in bytes.
pub(crate) const HEADER: usize = 5;
/// What encryption adds behind the plaintext, in bytes: its type, the tag.
pub(crate) const TAIL: usize = 1 + 16;
/// A full record, in bytes.
const STRIDE: usize = HEADER + RECORD + TAIL;
/// Records of a parcel.
const RECORDS: usize = SIZE / STRIDE;
/// The head of a frame, in bytes (RFC 9113, section 4.1).
pub(crate) const HEAD: usize = 9;
/// The payload of a full record, in bytes: what a frame of the smallest limit that a peer may set holds.
pub(crate) const PAYLOAD: usize = RECORD - HEAD;

/// The plaintext that a parcel holds at most, in bytes.
pub(crate) const MOST: usize = RECORDS * RECORD;
/// The payload that a parcel holds at most, in bytes.
pub(crate) const MOST_PAYLOAD: usize = RECORDS * PAYLOAD;

const _: () = assert!(RECORDS == 17, "a buffer holds as many records as it was made for");

/// Plaintext in the places of its records.
#[derive(Debug)]
pub(crate) struct Parcel {
    buffer: Buffer,
    len: usize,
}

impl Parcel {
    pub(crate) fn new() -> Self {
        Self { buffer: Buffer::borrow(), len: 0 }
    }

    pub(crate) const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Bytes that still fit.
    pub(crate) const fn room(&self) -> usize {
        MOST - self.len
    }

    /// Adds what fits, and says how much that was.
    pub(crate) fn put(&mut self, mut data: &[u8]) -> usize {
        let before = self.len;
        while !data.is_empty() && self.len < MOST {
            let (record, within) = (self.len / RECORD, self.len % RECORD);
            let (now, later) = data.split_at(data.len().min(RECORD - within));
            let at = record * STRIDE + HEADER + within;
            if let Some(place) = self.buffer.bytes_mut().get_mut(at..at + now.len()) {
                place.copy_from_slice(now);
            }
            self.len += now.len();
            data = later;
        }
        self.len - before
    }

    /// The plaintext of each record.
    pub(crate) fn plain(&self) -> impl Iterator<Item = &[u8]> {
        records(self.len).map(|(at, len)| {
            self.buffer.bytes().get(at + HEADER..at + HEADER + len).unwrap_or_default()
        })
    }

    /// Encrypts each record in its place, header and tail included; what comes back is to be sent.
    pub(crate) fn sealed<E>(
        mut self,
        mut seal: impl FnMut(&mut [u8]) -> Result<(), E>,
    ) -> Result<(Buffer, usize), E> {
        let mut filled = 0;
        for (at, len) in records(self.len) {
            filled = at + HEADER + len + TAIL;
            seal(self.buffer.bytes_mut().get_mut(at..filled).unwrap_or_default())?;
        }
        Ok((self.buffer, filled))
    }
}

/// Where each record of so much plaintext begins, and how long its plaintext is.
fn records(len: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..len.div_ceil(RECORD)).map(move |nth| (nth * STRIDE, (len - nth * RECORD).min(RECORD)))
}

/// Payload that was read to where it is sent from.
#[derive(Debug)]
pub(crate) struct Payload {
    buffer: Buffer,
    len: usize,
    /// Bytes that were taken off its beginning.
    taken: usize,
}

impl Payload {
    /// Has `read` fill places for up to `room` bytes, which says how many it filled.
    pub(crate) fn read<E>(
        mut buffer: Buffer,
        room: usize,
        read: impl FnOnce(&mut [IoSliceMut<'_>]) -> Result<usize, E>,
    ) -> Result<Self, E> {
        let mut rest = buffer.bytes_mut();
        let mut left = room.min(MOST_PAYLOAD);
        let mut places: [IoSliceMut<'_>; RECORDS] =
            std::array::from_fn(|_| IoSliceMut::new(&mut []));
        let mut count = 0;
        for place in &mut places {
            if left == 0 {
                break;
            }
            let (record, later) = rest.split_at_mut_checked(STRIDE).unwrap_or_default();
            rest = later;
            let now = left.min(PAYLOAD);
            let payload = record.get_mut(HEADER + HEAD..HEADER + HEAD + now).unwrap_or_default();
            *place = IoSliceMut::new(payload);
            (left, count) = (left - now, count + 1);
        }
        let len = read(places.get_mut(..count).unwrap_or_default())?;
        Ok(Self { buffer, len: len.min(MOST_PAYLOAD), taken: 0 })
    }

    pub(crate) const fn len(&self) -> usize {
        self.len - self.taken
    }

    /// The payload of each record.
    pub(crate) fn slices(&self) -> impl Iterator<Item = &[u8]> {
        let first = self.taken / PAYLOAD;
        (first..self.len.div_ceil(PAYLOAD)).map(move |nth| {
            let begin = self.taken.saturating_sub(nth * PAYLOAD);
            let end = (self.len - nth * PAYLOAD).min(PAYLOAD);
            let at = nth * STRIDE + HEADER + HEAD;
            self.buffer.bytes().get(at + begin..at + end).unwrap_or_default()
        })
    }

    /// With a head before the payload of each record: that of this length, of the last record or not.
    pub(crate) fn framed(mut self, head: impl Fn(usize, bool) -> [u8; HEAD]) -> Parcel {
        let count = self.len.div_ceil(PAYLOAD);
        for nth in 0..count {
            let len = (self.len - nth * PAYLOAD).min(PAYLOAD);
            let at = nth * STRIDE + HEADER;
            if let Some(place) = self.buffer.bytes_mut().get_mut(at..at + HEAD) {
                place.copy_from_slice(&head(len, nth + 1 == count));
            }
        }
        Parcel { buffer: self.buffer, len: self.len + count * HEAD }
    }
}

/// Bytes on their way through a relay.
#[derive(Debug)]
pub struct Chunk(Content);

#[derive(Debug)]
enum Content {
    One(Bytes),
    Many(VecDeque<Bytes>),
    Payload(Payload),
}

/// Slices that one write takes at most.
pub(crate) const SLICES: usize = 20;

impl From<Bytes> for Chunk {
    fn from(bytes: Bytes) -> Self {
        Self(Content::One(bytes))
    }
}

impl From<VecDeque<Bytes>> for Chunk {
    fn from(many: VecDeque<Bytes>) -> Self {
        Self(Content::Many(many))
    }
}

impl From<Payload> for Chunk {
    fn from(payload: Payload) -> Self {
        Self(Content::Payload(payload))
    }
}

impl Chunk {
    /// How many bytes these are.
    #[must_use]
    pub fn len(&self) -> usize {
        match &self.0 {
            Content::One(bytes) => bytes.len(),
            Content::Many(many) => many.iter().map(Bytes::len).sum(),
            Content::Payload(payload) => payload.len(),
        }
    }

    /// Whether these are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The first slices, as many as fit; how many these are.
    pub(crate) fn slices<'a>(&'a self, into: &mut [IoSlice<'a>; SLICES]) -> usize {
        fn fill<'a>(
            from: impl Iterator<Item = &'a [u8]>,
            into: &mut [IoSlice<'a>; SLICES],
        ) -> usize {
            into.iter_mut().zip(from).map(|(place, slice)| *place = IoSlice::new(slice)).count()
        }
        match &self.0 {
            Content::One(bytes) => fill(std::iter::once(&**bytes), into),
            Content::Many(many) => fill(many.iter().map(|bytes| &**bytes), into),
            Content::Payload(payload) => fill(payload.slices(), into),
        }
    }

    /// Takes so many bytes off the beginning.
    pub(crate) fn advance(&mut self, mut count: usize) {
        match &mut self.0 {
            Content::One(bytes) => drop(bytes.split_to(count.min(bytes.len()))),
            Content::Payload(payload) => payload.taken = (payload.taken + count).min(payload.len),
            Content::Many(many) => {
                while let Some(first) = many.front_mut() {
                    if first.len() > count {
                        let _gone = first.split_to(count);
                        return;
                    }
                    count -= first.len();
                    many.pop_front();
                }
            }
        }
    }

    /// The payload in its places, if it lies there and is whole.
    pub(crate) fn into_payload(self) -> Result<Payload, Self> {
        match self.0 {
            Content::Payload(payload) if payload.taken == 0 => Ok(payload),
            content => Err(Self(content)),
        }
    }

    /// All of it, one after the other.
    #[must_use]
    pub fn into_bytes(self) -> Bytes {
        let mut all = Vec::with_capacity(self.len());
        match self.0 {
            Content::One(bytes) => return bytes,
            Content::Many(many) => many.iter().for_each(|bytes| all.extend_from_slice(bytes)),
            Content::Payload(payload) => {
                payload.slices().for_each(|one| all.extend_from_slice(one))
            }
        }
        all.into()
    }
}

impl<T: AsRef<[u8]> + ?Sized> PartialEq<T> for Chunk {
    fn eq(&self, other: &T) -> bool {
        let mut rest = other.as_ref();
        let mut same = |slice: &[u8]| match rest.strip_prefix(slice) {
            Some(after) => {
                rest = after;
                true
            }
            None => false,
        };
        let all = match &self.0 {
            Content::One(bytes) => same(bytes),
            Content::Many(many) => many.iter().all(|bytes| same(bytes)),
            Content::Payload(payload) => payload.slices().all(same),
        };
        all && rest.is_empty()
    }
}
