//! Frames and what they say: RFC 9113, sections 4, 6 and 7.

use crate::parcel::HEAD;
use std::fmt;

/// Types of frames.
pub(super) mod kind {
    pub(in crate::engine) const DATA: u8 = 0;
    pub(in crate::engine) const HEADERS: u8 = 1;
    pub(in crate::engine) const PRIORITY: u8 = 2;
    pub(in crate::engine) const RST_STREAM: u8 = 3;
    pub(in crate::engine) const SETTINGS: u8 = 4;
    pub(in crate::engine) const PUSH_PROMISE: u8 = 5;
    pub(in crate::engine) const PING: u8 = 6;
    pub(in crate::engine) const GOAWAY: u8 = 7;
    pub(in crate::engine) const WINDOW_UPDATE: u8 = 8;
    pub(in crate::engine) const CONTINUATION: u8 = 9;
}

/// Flags of frames.
pub(super) mod flag {
    pub(in crate::engine) const ACK: u8 = 1;
    pub(in crate::engine) const END_STREAM: u8 = 1;
    pub(in crate::engine) const END_HEADERS: u8 = 4;
    pub(in crate::engine) const PADDED: u8 = 8;
    pub(in crate::engine) const PRIORITY: u8 = 0x20;
}

/// Settings.
pub(super) mod setting {
    pub(in crate::engine) const ENABLE_PUSH: u16 = 2;
    pub(in crate::engine) const MAX_CONCURRENT_STREAMS: u16 = 3;
    pub(in crate::engine) const INITIAL_WINDOW_SIZE: u16 = 4;
    pub(in crate::engine) const MAX_FRAME_SIZE: u16 = 5;
    pub(in crate::engine) const MAX_HEADER_LIST_SIZE: u16 = 6;
}

/// What a client says first (section 3.4).
pub(super) const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// The window of a new connection and, unless settings say otherwise, of a new stream, in bytes.
pub(super) const INITIAL_WINDOW: u32 = 65_535;

/// The largest window (section 6.9.1), in bytes.
pub(super) const LARGEST_WINDOW: u32 = (1 << 31) - 1;

/// The head of a frame.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Head {
    pub(super) length: usize,
    pub(super) kind: u8,
    pub(super) flags: u8,
    /// Without the bit that is reserved.
    pub(super) stream: u32,
}

impl Head {
    pub(super) fn read([a, b, c, kind, flags, stream @ ..]: [u8; HEAD]) -> Self {
        let length = usize::try_from(u32::from_be_bytes([0, a, b, c])).unwrap_or(usize::MAX);
        Self { length, kind, flags, stream: u31(stream) }
    }

    pub(super) fn bytes(self) -> [u8; HEAD] {
        let [_, a, b, c] = u32::try_from(self.length).unwrap_or(u32::MAX).to_be_bytes();
        let [d, e, f, g] = self.stream.to_be_bytes();
        [a, b, c, self.kind, self.flags, d, e, f, g]
    }

    pub(super) const fn has(self, flag: u8) -> bool {
        self.flags & flag != 0
    }
}

/// The head of a DATA frame.
pub(super) fn data(stream: u32, length: usize, last: bool) -> [u8; HEAD] {
    let flags = if last { flag::END_STREAM } else { 0 };
    Head { length, kind: kind::DATA, flags, stream }.bytes()
}

/// A whole frame.
pub(super) fn put(out: &mut Vec<u8>, kind: u8, flags: u8, stream: u32, payload: &[u8]) {
    out.extend(Head { length: payload.len(), kind, flags, stream }.bytes());
    out.extend_from_slice(payload);
}

/// A number of 31 bits: the first one is reserved.
pub(super) fn u31(bytes: [u8; 4]) -> u32 {
    u32::from_be_bytes(bytes) & LARGEST_WINDOW
}

/// Why a stream or a connection ends, as its number (section 7).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Reason(pub(super) u32);

impl Reason {
    pub(crate) const NO_ERROR: Self = Self(0);
    pub(crate) const PROTOCOL_ERROR: Self = Self(1);
    pub(crate) const FLOW_CONTROL_ERROR: Self = Self(3);
    pub(crate) const STREAM_CLOSED: Self = Self(5);
    pub(crate) const FRAME_SIZE_ERROR: Self = Self(6);
    pub(crate) const REFUSED_STREAM: Self = Self(7);
    pub(crate) const CANCEL: Self = Self(8);
    pub(crate) const COMPRESSION_ERROR: Self = Self(9);
    pub(crate) const ENHANCE_YOUR_CALM: Self = Self(11);
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.0 {
            0 => "NO_ERROR",
            1 => "PROTOCOL_ERROR",
            2 => "INTERNAL_ERROR",
            3 => "FLOW_CONTROL_ERROR",
            4 => "SETTINGS_TIMEOUT",
            5 => "STREAM_CLOSED",
            6 => "FRAME_SIZE_ERROR",
            7 => "REFUSED_STREAM",
            8 => "CANCEL",
            9 => "COMPRESSION_ERROR",
            10 => "CONNECT_ERROR",
            11 => "ENHANCE_YOUR_CALM",
            12 => "INADEQUATE_SECURITY",
            13 => "HTTP_1_1_REQUIRED",
            other => return write!(f, "error {other}"),
        })
    }
}

/// Who ended it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum By {
    /// The peer.
    Peer,
    /// We, because of what the peer did.
    Us,
}

/// How a stream, or all of a connection, failed.
#[derive(Clone, Debug)]
pub(crate) enum Error {
    /// This stream alone.
    Reset(Reason, By, &'static str),
    /// The connection.
    GoAway(Reason, By, &'static str),
    /// The peer leaves, and has not looked at this stream.
    Left(Reason),
    /// The connection under it broke.
    Io(std::io::ErrorKind, std::sync::Arc<str>),
    /// The connection is over, or was given up by us.
    Closed,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Reset(reason, By::Peer, _) => write!(f, "the peer reset the stream: {reason}"),
            Self::Reset(reason, By::Us, why) => {
                write!(f, "the stream was reset because of {why}: {reason}")
            }
            Self::GoAway(reason, By::Peer, _) => {
                write!(f, "the peer ended the connection: {reason}")
            }
            Self::GoAway(reason, By::Us, why) => {
                write!(f, "the connection was ended because of {why}: {reason}")
            }
            Self::Left(reason) => write!(f, "the peer takes no more streams: {reason}"),
            Self::Io(_, text) => f.write_str(text),
            Self::Closed => f.write_str("the connection is closed"),
        }
    }
}

impl std::error::Error for Error {}

impl From<std::io::Error> for Error {
    fn from(error: std::io::Error) -> Self {
        Self::Io(error.kind(), error.to_string().into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::{any, prop_assert_eq, proptest};

    proptest! {
        #[test]
        fn what_is_written_is_read(length in 0..1_usize << 24, kind: u8, flags: u8, stream in 0..=LARGEST_WINDOW) {
            let head = Head { length, kind, flags, stream };
            prop_assert_eq!(Head::read(head.bytes()), head);
        }

        #[test]
        fn the_reserved_bit_says_nothing(bytes in any::<[u8; 4]>()) {
            let [first, rest @ ..] = bytes;
            let [a, b, c] = rest;
            prop_assert_eq!(u31([first | 0x80, a, b, c]), u31([first & 0x7f, a, b, c]));
        }
    }
}
