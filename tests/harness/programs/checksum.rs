//! A stream of bytes that anyone can make, and a sum that notices any change, loss or reordering.

const MULTIPLIER: u64 = 0x9e37_79b9_7f4a_7c15;

/// The bytes, always the same.
pub(crate) struct Bytes(u64);

impl Bytes {
    pub(crate) fn new() -> Self {
        Self(MULTIPLIER)
    }

    /// The next ones; the length is to be a multiple of eight, except for the last time.
    pub(crate) fn fill(&mut self, buffer: &mut [u8]) {
        for chunk in buffer.chunks_mut(8) {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            let word = self.0.to_le_bytes();
            for (to, from) in chunk.iter_mut().zip(word) {
                *to = from;
            }
        }
    }
}

/// The sum of a stream, whatever pieces it came in.
#[derive(Default)]
pub(crate) struct Sum {
    hash: u64,
    /// What did not fill a word yet, from the low end up.
    carry: u64,
    carried: u32,
    length: u64,
}

impl Sum {
    pub(crate) fn add(&mut self, mut bytes: &[u8]) {
        self.length += bytes.len() as u64;
        while self.carried > 0 {
            let Some((first, rest)) = bytes.split_first() else { return };
            bytes = rest;
            self.push(*first);
        }
        let words = bytes.chunks_exact(8);
        let rest = words.remainder();
        for word in words {
            if let Ok(word) = word.try_into() {
                self.mix(u64::from_le_bytes(word));
            }
        }
        for byte in rest {
            self.push(*byte);
        }
    }

    fn push(&mut self, byte: u8) {
        self.carry |= u64::from(byte) << (8 * self.carried);
        self.carried += 1;
        if self.carried == 8 {
            let word = self.carry;
            (self.carry, self.carried) = (0, 0);
            self.mix(word);
        }
    }

    fn mix(&mut self, word: u64) {
        self.hash = (self.hash.rotate_left(5) ^ word).wrapping_mul(MULTIPLIER);
    }

    pub(crate) fn length(&self) -> u64 {
        self.length
    }

    pub(crate) fn finish(mut self) -> u64 {
        let word = self.carry;
        self.mix(word);
        self.mix(self.length);
        self.hash
    }
}

/// The sum of the first so many bytes.
pub(crate) fn expected(mut length: u64) -> u64 {
    let (mut bytes, mut sum) = (Bytes::new(), Sum::default());
    let mut buffer = vec![0; 1 << 16];
    while length > 0 {
        let take = usize::try_from(length).unwrap_or(usize::MAX).min(buffer.len());
        bytes.fill(&mut buffer);
        sum.add(buffer.get(..take).unwrap_or_default());
        length -= take as u64;
    }
    sum.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(pieces: &[&[u8]]) -> u64 {
        let mut sum = Sum::default();
        pieces.iter().for_each(|piece| sum.add(piece));
        sum.finish()
    }

    #[test]
    fn pieces_do_not_matter() {
        let whole = b"one two three four five six";
        let (a, b) = whole.split_at(3);
        let (b, c) = b.split_at(14);
        assert_eq!(sum(&[whole]), sum(&[a, b, c]));
    }

    #[test]
    fn order_and_length_matter() {
        assert_ne!(sum(&[b"12345678abcdefgh"]), sum(&[b"abcdefgh12345678"]));
        assert_ne!(sum(&[b"1234567"]), sum(&[b"1234567\0"]));
        assert_ne!(expected(1 << 16), expected((1 << 16) + 8));
    }

    #[test]
    fn the_stream_is_what_is_expected() {
        let (mut bytes, mut sum) = (Bytes::new(), Sum::default());
        for length in [8, 1 << 16, 24] {
            let mut buffer = vec![0; length];
            bytes.fill(&mut buffer);
            sum.add(&buffer);
        }
        assert_eq!(sum.finish(), expected(8 + (1 << 16) + 24));
    }
}
