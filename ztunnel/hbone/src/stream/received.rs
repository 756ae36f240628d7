//! What was received on a stream and not yet taken.

use bytes::{Bytes, BytesMut};
use std::collections::VecDeque;

/// Pieces shorter than this are put together, in bytes. Kept as they came, a piece of one byte would cost
/// hundreds: the engine counts them, and ends the whole tunnel for too many.
const SMALL: usize = 4 * 1024;

/// What is put together is no longer than this, in bytes.
const LARGE: usize = 64 * 1024;

/// Pieces in their order.
#[derive(Debug)]
pub(super) struct Received {
    whole: VecDeque<Bytes>,
    /// Small pieces behind those, put together.
    small: BytesMut,
}

impl Received {
    pub(super) fn new() -> Self {
        Self { whole: VecDeque::new(), small: BytesMut::new() }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.whole.is_empty() && self.small.is_empty()
    }

    /// Whether the next piece is a small one, which another may join.
    pub(super) fn is_small(&self) -> bool {
        match self.whole.front() {
            Some(first) => self.whole.len() == 1 && first.len() < SMALL && self.small.is_empty(),
            None => self.small.len() < SMALL,
        }
    }

    pub(super) fn put(&mut self, piece: Bytes) {
        if piece.len() >= SMALL {
            self.close();
            self.whole.push_back(piece);
            return;
        }
        // The first of all is most often the only one.
        if self.is_empty() {
            self.whole.push_back(piece);
            return;
        }
        if self.small.is_empty()
            && self.whole.len() == 1
            && let Some(first) = self.whole.pop_front_if(|first| first.len() < SMALL)
        {
            self.small.extend_from_slice(&first);
        }
        self.small.extend_from_slice(&piece);
        if self.small.len() >= LARGE {
            self.close();
        }
    }

    fn close(&mut self) {
        if !self.small.is_empty() {
            // Not `split`, which would leave the rest of its room with us.
            self.whole.push_back(std::mem::take(&mut self.small).freeze());
        }
    }

    /// The next piece, of at most `room` bytes.
    pub(super) fn take(&mut self, room: usize) -> Option<Bytes> {
        if self.whole.is_empty() {
            self.close();
        }
        let mut piece = self.whole.pop_front()?;
        if piece.len() > room {
            self.whole.push_front(piece.split_off(room));
        }
        if self.whole.is_empty() {
            // An idle stream holds nothing.
            self.whole = VecDeque::new();
        }
        Some(piece)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::{prop_assert, prop_assert_eq, proptest};

    #[test]
    fn what_comes_alone_is_passed_on_as_it_came() {
        let mut received = Received::new();
        let piece = Bytes::from_static(b"alone");
        received.put(piece.clone());
        let taken = received.take(usize::MAX).unwrap();
        assert_eq!((taken.as_ptr(), taken.len()), (piece.as_ptr(), piece.len()), "not copied");
        assert!(received.is_empty() && received.whole.capacity() == 0);
    }

    proptest! {
        /// Nothing is lost or out of order, and small pieces are few.
        #[test]
        fn what_goes_in_comes_out(
            pieces in proptest::collection::vec((0..9_usize, 0..6_000_usize), 0..200),
            room in 1..20_000_usize,
        ) {
            let mut received = Received::new();
            let (mut all, mut got) = (Vec::new(), Vec::new());
            for (index, (taken, size)) in pieces.iter().enumerate() {
                let piece = vec![u8::try_from(index).unwrap_or_default(); *size];
                all.extend_from_slice(&piece);
                received.put(piece.into());
                if *taken == 0 && let Some(piece) = received.take(room) {
                    prop_assert!(piece.len() <= room);
                    got.extend_from_slice(&piece);
                }
            }
            let held = all.len() - got.len();
            let large = pieces.iter().filter(|(_, size)| *size >= SMALL).count();
            prop_assert!(received.whole.len() <= 2 * large + held / LARGE + 2, "{} pieces", received.whole.len());
            while let Some(piece) = received.take(room) {
                got.extend_from_slice(&piece);
            }
            prop_assert_eq!(got, all);
            prop_assert!(received.is_empty());
        }
    }
}
