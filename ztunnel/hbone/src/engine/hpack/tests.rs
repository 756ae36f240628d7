use super::*;
use proptest::prelude::{any, prop_assert_eq, proptest};

fn decoded(decoder: &mut Decoder, block: &[u8]) -> Result<Vec<(String, String)>, Garbled> {
    let mut fields = Vec::new();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    decoder.decode(block, |name, value| fields.push((text(name), text(value))))?;
    Ok(fields)
}

fn fields(of: &[(&str, &str)]) -> Vec<(String, String)> {
    of.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

/// RFC 7541, appendix C.3: three requests of a connection, without the Huffman code.
#[test]
fn the_standards_requests() {
    let mut decoder = Decoder::new();
    let first = [&[0x82, 0x86, 0x84, 0x41, 0x0f][..], b"www.example.com"].concat();
    let of_first = [(":method", "GET"), (":scheme", "http"), (":path", "/")];
    let of_first = [&of_first[..], &[(":authority", "www.example.com")]].concat();
    assert_eq!(decoded(&mut decoder, &first), Ok(fields(&of_first)));
    let second = [&[0x82, 0x86, 0x84, 0xbe, 0x58, 0x08][..], b"no-cache"].concat();
    let of_second = [&of_first[..], &[("cache-control", "no-cache")]].concat();
    assert_eq!(decoded(&mut decoder, &second), Ok(fields(&of_second)));
    let third =
        [&[0x82, 0x87, 0x85, 0xbf, 0x40, 0x0a][..], b"custom-key", &[0x0c], b"custom-value"]
            .concat();
    let of_third = [
        (":method", "GET"),
        (":scheme", "https"),
        (":path", "/index.html"),
        (":authority", "www.example.com"),
        ("custom-key", "custom-value"),
    ];
    assert_eq!(decoded(&mut decoder, &third), Ok(fields(&of_third)));
}

#[test]
fn what_leaves_the_table_is_not_to_be_had_any_more() {
    let mut decoder = Decoder::new();
    // Two entries, of which a table of 60 bytes holds one.
    let block = [0x3f, 29, 0x40, 1, b'a', 1, b'b', 0x40, 1, b'c', 1, b'd'];
    assert_eq!(decoded(&mut decoder, &block), Ok(fields(&[("a", "b"), ("c", "d")])));
    assert_eq!(decoded(&mut decoder, &[0xbe]), Ok(fields(&[("c", "d")])));
    assert_eq!(decoded(&mut decoder, &[0xbf]), Err(Garbled));
    assert_eq!(decoded(&mut decoder, &[0x20]), Ok(Vec::new()));
    assert_eq!(decoded(&mut decoder, &[0xbe]), Err(Garbled));
}

#[test]
fn what_is_no_block() {
    for (block, what) in [
        (&[0x80][..], "index 0"),
        (&[0xff], "a number that breaks off"),
        (&[0xff, 0x80, 0x80, 0x80, 0x80, 0x01], "a number without end"),
        (&[0x3f, 0xe2, 0x1f], "a table that is too large"),
        (&[0x82, 0x20], "a change of size behind a field"),
        (&[0x00, 0x05, b'a'], "a string that breaks off"),
        (&[0x00, 0x00], "no value"),
    ] {
        assert_eq!(decoded(&mut Decoder::new(), block), Err(Garbled), "{what}");
    }
}

proptest! {
    #[test]
    fn what_is_encoded_is_decoded(of in proptest::collection::vec((".{0,40}", ".{0,300}"), 0..8)) {
        let mut block = Vec::new();
        let mut encoder = Encoder::new(&mut block, true);
        for (name, value) in &of {
            encoder.literal(name.as_bytes(), value.as_bytes());
        }
        encoder.indexed(STATUS, b"207");
        let mut expected = of.clone();
        expected.push((":status".to_owned(), "207".to_owned()));
        prop_assert_eq!(decoded(&mut Decoder::new(), &block), Ok(expected));
    }

    #[test]
    fn any_bytes_are_borne(blocks in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..100), 0..8)) {
        let mut decoder = Decoder::new();
        for block in blocks {
            let _read = decoded(&mut decoder, &block);
        }
    }
}
