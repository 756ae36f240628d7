//! What waits on one stream, in order. One piece alone, which is the usual case, needs no memory of its own, and
//! what is empty holds none.

use bytes::{Bytes, BytesMut};
use std::collections::VecDeque;

#[derive(Debug)]
pub(super) enum Queue<T> {
    Empty,
    One(T),
    Many(VecDeque<T>),
}

impl<T> Queue<T> {
    pub(super) const fn is_empty(&self) -> bool {
        matches!(self, Self::Empty)
    }

    pub(super) fn push(&mut self, item: T) {
        *self = match std::mem::replace(self, Self::Empty) {
            Self::Empty => Self::One(item),
            Self::One(first) => Self::Many(VecDeque::from([first, item])),
            Self::Many(mut many) => {
                many.push_back(item);
                Self::Many(many)
            }
        };
    }

    pub(super) fn push_front(&mut self, item: T) {
        *self = match std::mem::replace(self, Self::Empty) {
            Self::Empty => Self::One(item),
            Self::One(second) => Self::Many(VecDeque::from([item, second])),
            Self::Many(mut many) => {
                many.push_front(item);
                Self::Many(many)
            }
        };
    }

    pub(super) fn pop(&mut self) -> Option<T> {
        match self {
            Self::Many(many) if many.len() > 1 => many.pop_front(),
            _ => match std::mem::replace(self, Self::Empty) {
                Self::Empty => None,
                Self::One(only) => Some(only),
                Self::Many(mut many) => many.pop_front(),
            },
        }
    }

    pub(super) fn last_mut(&mut self) -> Option<&mut T> {
        match self {
            Self::Empty => None,
            Self::One(only) => Some(only),
            Self::Many(many) => many.back_mut(),
        }
    }

    pub(super) fn clear(&mut self) {
        *self = Self::Empty;
    }
}

/// Pieces shorter than this are put together, in bytes.
const SMALL: usize = 4 * 1024;

/// What is put together is no longer than this, in bytes.
const LARGE: usize = 64 * 1024;

/// A piece that was received.
#[derive(Debug)]
pub(super) enum Piece {
    /// As it came.
    Whole(Bytes),
    /// Put together of small ones. Kept by itself, a piece of one byte would cost many.
    Together(BytesMut),
}

impl Piece {
    fn into_bytes(self) -> Bytes {
        match self {
            Self::Whole(bytes) => bytes,
            Self::Together(bytes) => bytes.freeze(),
        }
    }
}

/// What was received on a stream and not yet taken.
#[derive(Debug)]
pub(super) struct Received {
    pieces: Queue<Piece>,
    /// Bytes in all.
    held: usize,
}

impl Received {
    pub(super) const fn new() -> Self {
        Self { pieces: Queue::Empty, held: 0 }
    }

    pub(super) const fn is_empty(&self) -> bool {
        self.held == 0
    }

    /// Adds bytes that own their memory, or share it with few.
    pub(super) fn put(&mut self, bytes: Bytes) {
        self.held += bytes.len();
        self.pieces.push(Piece::Whole(bytes));
    }

    /// Adds a copy of these.
    pub(super) fn put_copy(&mut self, bytes: &[u8]) {
        self.held += bytes.len();
        match self.pieces.last_mut() {
            Some(Piece::Together(last)) if last.len() + bytes.len() <= LARGE => {
                last.extend_from_slice(bytes);
            }
            Some(Piece::Whole(last)) if last.len() < SMALL && bytes.len() < SMALL => {
                let mut together = BytesMut::with_capacity(2 * (last.len() + bytes.len()));
                together.extend_from_slice(last);
                together.extend_from_slice(bytes);
                if let Some(last) = self.pieces.last_mut() {
                    *last = Piece::Together(together);
                }
            }
            Some(_) if bytes.len() < SMALL => {
                self.pieces.push(Piece::Together(BytesMut::from(bytes)));
            }
            // The first of all is most often the only one.
            _ => self.pieces.push(Piece::Whole(Bytes::copy_from_slice(bytes))),
        }
    }

    /// Takes up to so many bytes.
    pub(super) fn take(&mut self, room: usize) -> VecDeque<Bytes> {
        let mut taken = VecDeque::new();
        let mut left = room;
        while left > 0
            && let Some(piece) = self.pieces.pop()
        {
            let mut piece = piece.into_bytes();
            if piece.len() > left {
                self.pieces.push_front(Piece::Whole(piece.split_off(left)));
            }
            left -= piece.len();
            taken.push_back(piece);
        }
        self.held -= room - left;
        taken
    }

    /// The only piece, if it is that and this short.
    pub(super) fn take_only(&mut self, room: usize) -> Option<Bytes> {
        if self.held > room || !matches!(self.pieces, Queue::One(_)) {
            return None;
        }
        self.held = 0;
        self.pieces.pop().map(Piece::into_bytes)
    }

    pub(super) fn clear(&mut self) {
        *self = Self::new();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::{any, prop_assert, prop_assert_eq, proptest};

    #[test]
    fn what_is_empty_holds_no_memory() {
        let mut queue = Queue::Empty;
        for count in 1..5 {
            (0..count).for_each(|item| queue.push(item));
            let all: Vec<_> = std::iter::from_fn(|| queue.pop()).collect();
            assert_eq!(all, (0..count).collect::<Vec<_>>());
            assert!(queue.is_empty());
        }
    }

    proptest! {
        /// Nothing is lost or out of order, and small pieces are few.
        #[test]
        fn what_goes_in_comes_out(
            pieces in proptest::collection::vec((0..9_usize, 1..6_000_usize, any::<bool>()), 0..200),
            room in 1..20_000_usize,
        ) {
            let mut received = Received::new();
            let (mut all, mut got) = (Vec::new(), Vec::new());
            let mut large = 0;
            for (index, (taken, size, shared)) in pieces.iter().enumerate() {
                let piece = vec![u8::try_from(index).unwrap_or_default(); *size];
                all.extend_from_slice(&piece);
                large += usize::from(*shared || *size >= SMALL);
                if *shared {
                    received.put(piece.into());
                } else {
                    received.put_copy(&piece);
                }
                if *taken == 0 {
                    let before = received.held;
                    let some = received.take(room);
                    let count: usize = some.iter().map(Bytes::len).sum();
                    prop_assert_eq!(count, room.min(before));
                    some.iter().for_each(|bytes| got.extend_from_slice(bytes));
                }
            }
            prop_assert_eq!(received.held, all.len() - got.len());
            let count = match &received.pieces {
                Queue::Empty => 0,
                Queue::One(_) => 1,
                Queue::Many(many) => many.len(),
            };
            prop_assert!(count <= 2 * large + received.held / LARGE + 2, "{count} pieces");
            received.take(usize::MAX).iter().for_each(|bytes| got.extend_from_slice(bytes));
            prop_assert_eq!(got, all);
            prop_assert!(received.is_empty());
        }
    }
}
