//! Our record layer against itself and against that of rustls.

#![expect(clippy::cast_possible_truncation, reason = "patterns of bytes")]

use super::{
    super::{Session, TlsStream},
    *,
};
use crate::testing::{configs, tcp, within};
use proptest::prelude::{any, prop_assert, proptest};
use rustls::{ClientConfig, ServerConfig, unbuffered::ConnectionState};
use std::{io, sync::Arc};
use tokio::io::{AsyncReadExt, AsyncWriteExt, split};

/// Who has a record layer of ours.
#[derive(Clone, Copy, Debug)]
struct Ours {
    near: bool,
    far: bool,
}

async fn pair(ours: Ours) -> (TlsStream, TlsStream) {
    let mut client = ClientConfig::clone(&configs().client);
    client.enable_secret_extraction = ours.near;
    let mut server = ServerConfig::clone(&configs().server);
    server.enable_secret_extraction = ours.far;
    let (near, far) = tcp().await;
    let (near, far) = within(async {
        tokio::join!(
            TlsStream::connect(near, Arc::new(client)),
            TlsStream::accept(far, Arc::new(server))
        )
    })
    .await;
    let (near, far) = (near.unwrap(), far.unwrap());
    assert_eq!(matches!(near.session, Session::Direct(_)), ours.near);
    assert_eq!(matches!(far.session, Session::Direct(_)), ours.far);
    assert_eq!((near.peer_certificates().len(), far.peer_certificates().len()), (1, 1));
    (near, far)
}

const ALL: [Ours; 4] = [
    Ours { near: true, far: true },
    Ours { near: true, far: false },
    Ours { near: false, far: true },
    Ours { near: false, far: false },
];

fn records(stream: &mut TlsStream) -> &mut Records {
    let Session::Direct(records) = &mut stream.session else { panic!("a session of rustls") };
    records
}

async fn one_way(from: &mut TlsStream, to: &mut TlsStream, size: usize) {
    let sent: Vec<u8> = (0..size).map(|at| (at * 7 + at / 253) as u8).collect();
    let mut got = vec![0; size];
    within(async {
        let send = async {
            from.write_all(&sent).await.unwrap();
            from.flush().await.unwrap();
        };
        tokio::join!(send, async { to.read_exact(&mut got).await.unwrap() });
    })
    .await;
    assert!(got == sent, "{size} bytes");
}

#[tokio::test]
async fn it_speaks_with_itself_and_with_rustls() {
    for ours in ALL {
        let (mut near, mut far) = pair(ours).await;
        for size in [1, 2, RECORD - 1, RECORD, RECORD + 1, 1_000_000] {
            one_way(&mut near, &mut far, size).await;
            one_way(&mut far, &mut near, size).await;
        }
        let ((mut near_in, mut near_out), (mut far_in, mut far_out)) = (split(near), split(far));
        within(async {
            near_out.shutdown().await.unwrap();
            assert_eq!(far_in.read(&mut [0]).await.unwrap(), 0, "{ours:?}: a clean end");
            far_out.write_all(b"after it").await.unwrap();
            far_out.shutdown().await.unwrap();
            let mut got = Vec::new();
            near_in.read_to_end(&mut got).await.unwrap();
            assert_eq!(got, b"after it", "{ours:?}: the other direction is open");
        })
        .await;
    }
}

/// Has an end change its key; rustls wants that of the peer changed as well.
fn refresh(stream: &mut TlsStream) {
    match &mut stream.session {
        Session::Direct(records) => records.update = true,
        Session::Client(session) => match session.process_tls_records(&mut []).state.unwrap() {
            ConnectionState::WriteTraffic(traffic) => traffic.refresh_traffic_keys().unwrap(),
            other => panic!("{other:?}"),
        },
        Session::Server(session) => match session.process_tls_records(&mut []).state.unwrap() {
            ConnectionState::WriteTraffic(traffic) => traffic.refresh_traffic_keys().unwrap(),
            other => panic!("{other:?}"),
        },
    }
}

#[tokio::test]
async fn keys_change() {
    for ours in ALL {
        let (mut near, mut far) = pair(ours).await;
        for _ in 0..3 {
            refresh(&mut near);
            one_way(&mut near, &mut far, 40_000).await;
            one_way(&mut far, &mut near, 40_000).await;
            refresh(&mut far);
            one_way(&mut far, &mut near, 40_000).await;
            one_way(&mut near, &mut far, 40_000).await;
        }
        if let Session::Direct(records) = &near.session {
            assert!(records.send.sequence < 20, "{ours:?}: a new key counts anew");
        }
    }
}

/// AES-GCM may not go on with one key for ever.
#[tokio::test]
async fn a_key_that_is_old_changes() {
    let (mut near, mut far) = pair(ALL[0]).await;
    records(&mut near).send.sequence = RECORDS_A_KEY - 1;
    records(&mut far).receive.sequence = RECORDS_A_KEY - 1;
    // It changes between two parcels.
    one_way(&mut near, &mut far, 20 * RECORD).await;
    for sequence in [records(&mut near).send.sequence, records(&mut far).receive.sequence] {
        assert!((1..20).contains(&sequence), "{sequence}");
    }
}

/// Sends this as it is, and says what became of who reads it.
async fn sends(write: impl Fn(&mut Records, &mut [u8]) -> usize) -> io::Result<usize> {
    let (mut near, mut far) = pair(ALL[0]).await;
    let mut out = vec![0; 4 * (RECORD + EXPANSION)];
    let count = write(records(&mut near), &mut out);
    near.io.write_all(&out[..count]).await.unwrap();
    within(far.read(&mut [0; 64])).await
}

/// A record with an inner plaintext of this, type and padding included.
fn inner(records: &mut Records, plain: &[u8], out: &mut [u8]) -> usize {
    let (kind, content) = plain.split_last().unwrap();
    records.seal_message(*kind, content, out).unwrap()
}

#[tokio::test]
async fn padding_is_taken_off() {
    let padded = [b'd', b'a', b't', b'a', DATA, 0, 0, 0];
    assert_eq!(sends(|records, out| inner(records, &padded, out)).await.unwrap(), 4);
}

#[tokio::test]
async fn what_a_peer_may_not_send() {
    for (name, plain, words) in [
        ("nothing but padding", &[0, 0, 0][..], "IllegalTlsInnerPlaintext"),
        ("another type", &[1, 2, 3, 77], "InvalidContentType"),
        ("another handshake", &[1, 0, 0, 1, 0, HANDSHAKE], "unexpected handshake message"),
        ("half an alert", &[2, ALERT], "AlertMessagePayload"),
        ("an alert", &[2, 40, ALERT], "received fatal alert: HandshakeFailure"),
        ("more behind a new key", &[24, 0, 0, 1, 0, 24, HANDSHAKE], "KeyEpoch"),
        ("a strange new key", &[24, 0, 0, 1, 7, HANDSHAKE], "unexpected handshake message"),
        ("a ticket for a server", &[4, 0, 0, 0, HANDSHAKE], "unexpected handshake message"),
        ("a long message", &[24, 255, 0, 0, HANDSHAKE], "HandshakePayloadTooLarge"),
    ] {
        let error = sends(|records, out| inner(records, plain, out)).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData, "{name}");
        assert!(error.to_string().contains(words), "{name}: {error}");
    }
    for (name, bytes, words) in [
        ("a record that is too long", &[DATA, 3, 3, 0x41, 0x01][..], "excess record size"),
        ("a record in clear", &[HANDSHAKE, 3, 3, 0, 1, 0], "unexpected message"),
        ("a record without a tag", &[DATA, 3, 3, 0, 1, 0], "decrypt"),
    ] {
        let raw = |_: &mut Records, out: &mut [u8]| {
            out[..bytes.len()].copy_from_slice(bytes);
            bytes.len()
        };
        let error = sends(raw).await.unwrap_err();
        assert!(error.to_string().contains(words), "{name}: {error}");
    }
}

/// Each new key costs us some work: a peer may not have us change it for ever, and data calls that off.
#[tokio::test]
async fn a_flood_of_new_keys_ends() {
    let updates = |data_between: bool| {
        move |records: &mut Records, out: &mut [u8]| {
            let mut at = 0;
            for index in 0..=NO_DATA {
                if data_between && index == NO_DATA / 2 {
                    at += records.seal_message(DATA, b"data", &mut out[at..]).unwrap();
                }
                records.update = true;
                at += records.seal_update(&mut out[at..]).unwrap();
            }
            at
        }
    };
    let error = sends(updates(false)).await.unwrap_err();
    assert!(error.to_string().contains("TooManyKeyUpdateRequests"), "{error}");
    assert_eq!(sends(updates(true)).await.unwrap(), 4);
}

#[tokio::test]
async fn tickets_are_let_pass_by_a_client() {
    let (mut near, mut far) = pair(ALL[0]).await;
    let mut out = vec![0; 1024];
    // One and a half, and the rest with what follows it.
    let ticket = [4, 0, 0, 2, 1, 2];
    let [first, second] = [[&ticket[..], &ticket[..3]].concat(), ticket[3..].to_vec()];
    let mut at = 0;
    for part in [first, second] {
        at += records(&mut far).seal_message(HANDSHAKE, &part, &mut out[at..]).unwrap();
    }
    far.io.write_all(&out[..at]).await.unwrap();
    one_way(&mut far, &mut near, 5).await;
}

fn keys() -> Keys {
    let key = UnboundKey::new(&AES_128_GCM, &[7; 16]).unwrap();
    Keys { key: LessSafeKey::new(key), iv: [3; 12], sequence: 0 }
}

#[test]
fn no_nonce_comes_twice() {
    let mut keys = keys();
    let mut seen = std::collections::HashSet::new();
    for sequence in [0, 254, 256, u64::from(u32::MAX), u64::MAX - 2] {
        keys.sequence = sequence;
        for _ in 0..2 {
            assert!(seen.insert(*keys.nonce().unwrap().as_ref()), "{sequence}");
        }
    }
    assert!(keys.nonce().is_err(), "the last of all");
}

proptest! {
    /// No bytes of a peer are more than an error.
    #[test]
    fn lengths_of_anything(bytes in proptest::collection::vec(any::<u8>(), 0..20)) {
        if let Ok(Some(length)) = Records::length(&bytes) {
            prop_assert!((HEADER..=HEADER + RECORD + EXPANSION).contains(&length));
        }
    }
}
