//! The Huffman code of header strings: RFC 7541, section 5.2 and appendix B. It is canonical, so that the lengths of
//! its codes are all there is to say of it.

/// The length of each symbol's code, in bits; the last one is the end of the string, which is never sent.
#[rustfmt::skip]
const LENGTHS: [u8; 257] = [
    13, 23, 28, 28, 28, 28, 28, 28, 28, 24, 30, 28, 28, 30, 28, 28, 28, 28, 28, 28,
    28, 28, 30, 28, 28, 28, 28, 28, 28, 28, 28, 28, 6, 10, 10, 12, 13, 6, 8, 11,
    10, 10, 8, 11, 8, 6, 6, 6, 5, 5, 5, 6, 6, 6, 6, 6, 6, 6, 7, 8,
    15, 6, 12, 10, 13, 6, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7,
    7, 7, 7, 7, 7, 7, 7, 7, 8, 7, 8, 13, 19, 13, 14, 6, 15, 5, 6, 5,
    6, 5, 6, 6, 6, 5, 7, 7, 6, 6, 6, 5, 6, 7, 6, 5, 5, 6, 7, 7,
    7, 7, 7, 15, 11, 14, 13, 28, 20, 22, 20, 20, 22, 22, 22, 23, 22, 23, 23, 23,
    23, 23, 24, 23, 24, 24, 22, 23, 24, 23, 23, 23, 23, 21, 22, 23, 22, 23, 23, 24,
    22, 21, 20, 22, 22, 23, 23, 21, 23, 22, 22, 24, 21, 22, 23, 23, 21, 21, 22, 21,
    23, 22, 23, 23, 20, 22, 22, 22, 23, 22, 22, 23, 26, 26, 20, 19, 22, 23, 22, 25,
    26, 26, 26, 27, 27, 26, 24, 25, 19, 21, 26, 27, 27, 26, 27, 24, 21, 21, 26, 26,
    28, 27, 27, 27, 20, 24, 20, 21, 22, 21, 21, 23, 22, 22, 25, 25, 24, 24, 26, 23,
    26, 27, 26, 26, 27, 27, 27, 27, 27, 28, 27, 27, 27, 27, 27, 26, 30,
];

/// The longest code, in bits.
const LONGEST: usize = 30;
/// The symbol that ends a string.
const END: usize = 256;

/// For each length: its first code, how many there are, and where their symbols begin.
struct Canonical {
    first: [u32; LONGEST + 1],
    count: [u32; LONGEST + 1],
    start: [usize; LONGEST + 1],
    symbols: [u16; LENGTHS.len()],
}

const CODE: Canonical = canonical();

#[expect(clippy::indexing_slicing, clippy::cast_possible_truncation, reason = "at compile time")]
const fn canonical() -> Canonical {
    let mut code = Canonical {
        first: [0; LONGEST + 1],
        count: [0; LONGEST + 1],
        start: [0; LONGEST + 1],
        symbols: [0; LENGTHS.len()],
    };
    let (mut next, mut at, mut length) = (0, 0, 1);
    while length <= LONGEST {
        next <<= 1;
        code.first[length] = next;
        code.start[length] = at;
        let mut symbol = 0;
        while symbol < LENGTHS.len() {
            if LENGTHS[symbol] as usize == length {
                code.symbols[at] = symbol as u16;
                at += 1;
                next += 1;
                code.count[length] += 1;
            }
            symbol += 1;
        }
        length += 1;
    }
    code
}

/// Decodes a whole string; `None` where it is not one.
pub(super) fn decode(from: &[u8], into: &mut Vec<u8>) -> Option<()> {
    let (mut code, mut length) = (0_u32, 0_usize);
    for byte in from {
        for bit in (0..8).rev() {
            code = code << 1 | u32::from(byte >> bit & 1);
            length += 1;
            let nth = code.wrapping_sub(*CODE.first.get(length)?);
            if nth < *CODE.count.get(length)? {
                let at = CODE.start.get(length)? + usize::try_from(nth).ok()?;
                let symbol = usize::from(*CODE.symbols.get(at)?);
                if symbol == END {
                    return None;
                }
                into.push(u8::try_from(symbol).ok()?);
                (code, length) = (0, 0);
            }
        }
    }
    // The rest of the last byte is the beginning of the end: ones.
    (length < 8 && code + 1 == 1 << length).then_some(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::{any, prop_assert_eq, proptest};

    fn encode(text: &[u8]) -> Vec<u8> {
        let (mut bits, mut all) = (Vec::new(), Vec::new());
        for byte in text {
            let symbol = usize::from(*byte);
            let length = usize::from(LENGTHS[symbol]);
            let start = CODE.start[length];
            let nth = (0..).find(|nth| usize::from(CODE.symbols[start + nth]) == symbol).unwrap();
            let code = CODE.first[length] + u32::try_from(nth).unwrap();
            bits.extend((0..length).rev().map(|bit| code >> bit & 1 == 1));
        }
        while bits.len() % 8 != 0 {
            bits.push(true);
        }
        for byte in bits.chunks(8) {
            all.push(byte.iter().fold(0, |all, bit| all << 1 | u8::from(*bit)));
        }
        all
    }

    fn decoded(from: &[u8]) -> Option<Vec<u8>> {
        let mut into = Vec::new();
        decode(from, &mut into).map(|()| into)
    }

    /// RFC 7541, appendix C.4.
    #[test]
    fn the_standards_examples() {
        let www = [0xf1, 0xe3, 0xc2, 0xe5, 0xf2, 0x3a, 0x6b, 0xa0, 0xab, 0x90, 0xf4, 0xff];
        assert_eq!(decoded(&www).unwrap(), b"www.example.com");
        assert_eq!(decoded(&[0xa8, 0xeb, 0x10, 0x64, 0x9c, 0xbf]).unwrap(), b"no-cache");
    }

    #[test]
    fn what_is_no_string() {
        for (bytes, what) in [
            (&[0xff, 0xff, 0xff, 0xff][..], "the end of the string"),
            (
                &[0xf1, 0xe3, 0xc2, 0xe5, 0xf2, 0x3a, 0x6b, 0xa0, 0xab, 0x90, 0xf4, 0xff, 0xff],
                "eight bits behind it",
            ),
            (&[0xa8, 0xeb, 0x10, 0x64, 0x9c, 0xb0], "zeros behind it"),
        ] {
            assert_eq!(decoded(bytes), None, "{what}");
        }
    }

    proptest! {
        #[test]
        fn what_is_encoded_is_decoded(text in proptest::collection::vec(any::<u8>(), 0..200)) {
            prop_assert_eq!(decoded(&encode(&text)), Some(text));
        }
    }
}
