//! Frames in any pieces, and bytes that are none.

use crate::{
    Settings,
    engine::{
        frame::{Head, PREFACE, flag, kind, put},
        receive::Parser,
        state::{Inner, Role},
    },
    fuzz::frames,
};
use proptest::prelude::{any, prop_assert, prop_assert_eq, proptest};

/// `:method: CONNECT`, `:authority: a:1`.
const CONNECT: &[u8] = b"\x02\x07CONNECT\x01\x03a:1";

/// Data, and the stream that it is of.
type Data = (u32, Vec<u8>);

/// What is read of this, cut in pieces of these sizes: what is said in return, and the data.
fn read(bytes: &[u8], sizes: &[usize]) -> (Vec<u8>, Vec<Data>, Option<String>) {
    let mut inner = Inner::new(Role::Server, &Settings::default());
    let mut parser = Parser::new(Role::Server);
    let mut data: Vec<Data> = Vec::new();
    let (mut at, mut sizes) = (0, sizes.iter().cycle());
    while at < bytes.len() {
        let size = sizes.next().map_or(bytes.len(), |size| *size).min(bytes.len() - at);
        let mut pieces = Vec::new();
        let read = parser.read(&bytes[at..at + size], at, &mut inner, &mut pieces);
        for piece in pieces {
            let part = &bytes[piece.range];
            match data.last_mut() {
                Some((id, before)) if *id == piece.id => before.extend_from_slice(part),
                _ => data.push((piece.id, part.to_vec())),
            }
        }
        if let Err(error) = read {
            return (inner.control, data, Some(error.to_string()));
        }
        at += size;
    }
    (inner.control, data, None)
}

/// A conversation with much in it.
fn conversation(payload: &[u8]) -> Vec<u8> {
    let mut bytes = PREFACE.to_vec();
    put(&mut bytes, kind::SETTINGS, 0, 0, &[0, 4, 0, 2, 0, 0]);
    put(&mut bytes, kind::HEADERS, 0, 1, &CONNECT[..4]);
    put(&mut bytes, kind::CONTINUATION, flag::END_HEADERS, 1, &CONNECT[4..]);
    put(&mut bytes, kind::DATA, 0, 1, payload);
    put(&mut bytes, kind::PING, 0, 0, b"12345678");
    put(&mut bytes, 99, 7, 0, payload);
    put(&mut bytes, kind::HEADERS, flag::END_HEADERS, 3, CONNECT);
    let padded = [&[3], payload, &[0; 3]].concat();
    put(&mut bytes, kind::DATA, flag::PADDED, 3, &padded);
    put(&mut bytes, kind::WINDOW_UPDATE, 0, 1, &[0, 0, 1, 0]);
    put(&mut bytes, kind::DATA, flag::END_STREAM, 1, payload);
    put(&mut bytes, kind::RST_STREAM, 0, 3, &[0, 0, 0, 8]);
    bytes
}

proptest! {
    #[test]
    fn it_is_all_the_same_in_how_many_pieces_they_come(
        payload in proptest::collection::vec(any::<u8>(), 1..300),
        sizes in proptest::collection::vec(1..40_usize, 1..10),
    ) {
        let bytes = conversation(&payload);
        let (said, data, error) = read(&bytes, &[bytes.len()]);
        prop_assert_eq!(&error, &None);
        let twice = [&payload[..], &payload[..]].concat();
        let of = |id: u32| -> Vec<u8> {
            data.iter().filter(|(of, _)| *of == id).flat_map(|(_, data)| data.clone()).collect()
        };
        prop_assert_eq!((of(1), of(3)), (twice, payload));
        prop_assert_eq!(read(&bytes, &sizes), (said, data, error));
    }

    /// A conversation that was changed at some places ends in an error or none, and in nothing else.
    #[test]
    fn what_is_garbled_is_borne(
        payload in proptest::collection::vec(any::<u8>(), 1..60),
        changes in proptest::collection::vec((any::<usize>(), any::<u8>()), 1..6),
        sizes in proptest::collection::vec(1..400_usize, 1..4),
    ) {
        let mut bytes = conversation(&payload);
        for (at, to) in changes {
            let at = 24 + at % (bytes.len() - 24);
            bytes[at] = to;
        }
        let (_, data, _) = read(&bytes, &sizes);
        let count: usize = data.iter().map(|(_, data)| data.len()).sum();
        prop_assert!(count <= bytes.len());
    }

    #[test]
    fn any_bytes_are_borne(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        frames(&bytes);
    }
}

/// Each by the section that asks for it.
#[test]
fn what_ends_the_connection_and_why() {
    let begun = || {
        let mut bytes = PREFACE.to_vec();
        put(&mut bytes, kind::SETTINGS, 0, 0, &[]);
        bytes
    };
    let opened = || {
        let mut bytes = begun();
        put(&mut bytes, kind::HEADERS, flag::END_HEADERS, 1, CONNECT);
        bytes
    };
    let with = |mut bytes: Vec<u8>, kind, flags, stream, payload: &[u8]| {
        put(&mut bytes, kind, flags, stream, payload);
        bytes
    };
    let large = Head { length: 200_000, kind: kind::DATA, flags: 0, stream: 1 };
    for (bytes, why) in [
        (b"GET / HTTP/1.1\r\n".to_vec(), "does not begin as HTTP/2"),
        (with(PREFACE.to_vec(), kind::PING, 0, 0, &[0; 8]), "does not begin with SETTINGS"),
        ([begun(), large.bytes().to_vec()].concat(), "FRAME_SIZE_ERROR"),
        (with(begun(), kind::PING, 0, 0, &[0; 7]), "FRAME_SIZE_ERROR"),
        (with(begun(), kind::PING, 0, 1, &[0; 8]), "cannot be for"),
        (with(begun(), kind::SETTINGS, 0, 0, &[0, 2, 0, 0, 0, 2]), "ENABLE_PUSH"),
        (with(begun(), kind::SETTINGS, 0, 0, &[0, 4, 255, 0, 0, 0]), "FLOW_CONTROL_ERROR"),
        (with(begun(), kind::SETTINGS, 0, 0, &[0, 5, 0, 0, 0, 1]), "MAX_FRAME_SIZE"),
        (with(begun(), kind::SETTINGS, flag::ACK, 0, &[0; 6]), "FRAME_SIZE_ERROR"),
        (with(begun(), kind::PUSH_PROMISE, 4, 1, &[0; 5]), "a push"),
        (with(begun(), kind::DATA, 0, 0, b"x"), "DATA on no stream"),
        (with(begun(), kind::DATA, 0, 1, b"x"), "never opened"),
        (with(begun(), kind::RST_STREAM, 0, 1, &[0; 4]), "a reset of nothing"),
        (with(begun(), kind::WINDOW_UPDATE, 0, 0, &[0; 4]), "by nothing"),
        (with(begun(), kind::WINDOW_UPDATE, 0, 0, &[127, 255, 255, 255]), "past all bounds"),
        (with(begun(), kind::HEADERS, flag::END_HEADERS, 2, CONNECT), "only a server opens"),
        (with(begun(), kind::HEADERS, flag::END_HEADERS, 1, &[0xff; 9]), "COMPRESSION_ERROR"),
        (with(opened(), kind::DATA, flag::PADDED, 1, &[9, 0]), "padding longer"),
        (
            with(with(opened(), kind::HEADERS, 0, 3, CONNECT), kind::PING, 0, 0, &[0; 8]),
            "within a block",
        ),
    ] {
        let (_, _, error) = read(&bytes, &[bytes.len()]);
        let error = error.expect(why);
        assert!(error.contains(why), "{why}: {error}");
    }
}
