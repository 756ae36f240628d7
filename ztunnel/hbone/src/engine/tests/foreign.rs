//! The crate `h2` as the peer: what it makes of what we send, and we of what it sends.

use crate::{
    Settings, Stream,
    engine::{self, Request},
    server,
    stream::{Duplex, Taken},
    testing::{configs, request, tcp, within},
    tls::TlsStream,
};
use bytes::Bytes;
use std::{future::poll_fn, sync::Arc};
use tokio_rustls::{TlsAcceptor, TlsConnector};

const SEED: u64 = 11;
const TOTAL: usize = 5_000_000;

/// Whether the record layer is ours, or that of rustls.
const LAYERS: [bool; 2] = [true, false];

/// Sends so many random bytes in chunks of random sizes, and the end.
async fn send(stream: &mut Stream, total: usize, seed: u64) {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut sent = 0;
    while sent < total {
        let room = poll_fn(|cx| stream.poll_room(cx)).await.unwrap();
        let count = room.min(total - sent).min(random.usize(1..200_000));
        let chunk = Bytes::from(bytes(sent, count, seed));
        stream.give(chunk.into()).unwrap();
        sent += count;
    }
    stream.finish().unwrap();
}

/// Receives as many, and the end.
async fn receive(stream: &mut Stream, total: usize, seed: u64) {
    let mut got = 0;
    loop {
        poll_fn(|cx| stream.poll_readable(cx)).await.unwrap();
        match poll_fn(|cx| std::task::Poll::Ready(stream.take(cx, usize::MAX))).await.unwrap() {
            Taken::Chunk(chunk) => {
                assert!(chunk == bytes(got, chunk.len(), seed), "at {got}");
                got += chunk.len();
                stream.release(chunk.len());
            }
            Taken::Nothing => {}
            Taken::End => break,
        }
    }
    assert_eq!(got, total);
}

/// The bytes of a long text from there on.
fn bytes(from: usize, count: usize, seed: u64) -> Vec<u8> {
    let byte = |at: usize| (at as u64 / 7).wrapping_mul(seed | 1).to_le_bytes()[at % 7];
    (from..from + count).map(byte).collect()
}

async fn foreign_send(send: &mut h2::SendStream<Bytes>, total: usize, seed: u64) {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut sent = 0;
    while sent < total {
        send.reserve_capacity((total - sent).min(100_000));
        let room = poll_fn(|cx| send.poll_capacity(cx)).await.unwrap().unwrap();
        let count = room.min(random.usize(1..100_000));
        send.send_data(bytes(sent, count, seed).into(), false).unwrap();
        sent += count;
    }
    send.send_data(Bytes::new(), true).unwrap();
}

async fn foreign_receive(body: &mut h2::RecvStream, total: usize, seed: u64) {
    let mut got = 0;
    while let Some(data) = body.data().await {
        let data = data.unwrap();
        assert!(data == bytes(got, data.len(), seed), "at {got}");
        got += data.len();
        body.flow_control().release_capacity(data.len()).unwrap();
    }
    assert_eq!(got, total);
}

/// We are the client.
#[tokio::test]
async fn a_server_of_another_make() {
    for (direct, frame) in LAYERS.into_iter().zip([16_384, 1 << 20]) {
        let (near, far) = tcp().await;
        let served = async {
            let tls = TlsAcceptor::from(Arc::clone(&configs().server)).accept(far).await.unwrap();
            let mut builder = h2::server::Builder::new();
            builder.max_frame_size(frame).max_concurrent_streams(2);
            let mut connection = builder.handshake::<_, Bytes>(tls).await.unwrap();
            let mut streams = Vec::new();
            for _ in 0..2 {
                let (request, mut responder) = connection.accept().await.unwrap().unwrap();
                assert_eq!(request.method(), http::Method::CONNECT);
                assert_eq!(request.uri().authority().unwrap(), "10.0.0.1:80");
                assert!(request.headers().contains_key("traceparent"));
                let mut answer = http::Response::new(());
                answer.headers_mut().insert("baggage", "k8s.pod.name=x".parse().unwrap());
                let send = responder.send_response(answer, false).unwrap();
                streams.push((request.into_body(), send));
            }
            let talk = async {
                for (body, send) in &mut streams {
                    tokio::join!(
                        foreign_receive(body, TOTAL, SEED),
                        foreign_send(send, TOTAL / 2, SEED + 2)
                    );
                }
            };
            let ((), last) = tokio::join!(talk, connection.accept());
            assert!(last.is_none(), "the client leaves when it is done");
        };
        let asked = async {
            let mut config = rustls::ClientConfig::clone(&configs().client);
            config.enable_secret_extraction = direct;
            let tls = TlsStream::connect(near, Arc::new(config)).await.unwrap();
            let (requests, connection) = engine::connect(tls, &Settings::default());
            let talk = async {
                let mut streams = Vec::new();
                for _ in 0..2 {
                    let mut asked = requests.send(request().to_http()).unwrap();
                    let answer = (&mut asked).await.unwrap();
                    assert_eq!(answer.headers.get("baggage").unwrap(), "k8s.pod.name=x");
                    streams.push(Stream::new(asked.into_stream().unwrap(), None));
                }
                assert_eq!(requests.most(), 2);
                for stream in streams {
                    // One task for both, as a relay is.
                    let (mut stream, mut random) = (stream, fastrand::Rng::with_seed(SEED));
                    both(&mut stream, &mut random).await;
                }
                drop(requests);
            };
            let ((), ended) = tokio::join!(talk, connection);
            ended.unwrap();
        };
        within(async { tokio::join!(served, asked) }).await;
    }
}

/// Sends and receives in turn, as there is room and data.
async fn both(stream: &mut Stream, random: &mut fastrand::Rng) {
    let (mut sent, mut got, mut ended) = (0, 0, false);
    while sent < TOTAL || !ended {
        poll_fn(|cx| {
            let mut moved = false;
            if sent < TOTAL
                && let std::task::Poll::Ready(room) = stream.poll_room(cx)
            {
                let count = room.unwrap().min(TOTAL - sent).min(random.usize(1..200_000));
                stream.give(Bytes::from(bytes(sent, count, SEED)).into()).unwrap();
                (sent, moved) = (sent + count, true);
                if sent == TOTAL {
                    stream.finish().unwrap();
                }
            }
            if !ended && stream.poll_readable(cx).is_ready() {
                match stream.take(cx, usize::MAX).unwrap() {
                    Taken::Chunk(chunk) => {
                        assert!(chunk == bytes(got, chunk.len(), SEED + 2), "at {got}");
                        got += chunk.len();
                        stream.release(chunk.len());
                    }
                    Taken::Nothing => {}
                    Taken::End => ended = true,
                }
                moved = true;
            }
            if moved { std::task::Poll::Ready(()) } else { std::task::Poll::Pending }
        })
        .await;
    }
    assert_eq!(got, TOTAL / 2);
}

/// We are the server.
#[tokio::test]
async fn a_client_of_another_make() {
    for direct in LAYERS {
        let (near, far) = tcp().await;
        let served = async {
            let mut config = rustls::ServerConfig::clone(&configs().server);
            config.enable_secret_extraction = direct;
            let far = far.into_std().unwrap();
            let settings = Settings::default();
            let mut connection = server::handshake(far, Arc::new(config), &settings).await.unwrap();
            let incoming = connection.next().await.unwrap().unwrap();
            assert_eq!(incoming.request.as_ref().unwrap().authority.to_string(), "10.0.0.1:80");
            let mut stream = incoming.accept(&crate::ResponseHead::default()).unwrap();
            let talk = async {
                receive(&mut stream, TOTAL, SEED).await;
                send(&mut stream, TOTAL / 2, SEED + 2).await;
            };
            let ((), next) = tokio::join!(talk, connection.next());
            assert!(next.is_none_or(|next| next.is_err()));
        };
        let asked = async {
            let name = rustls::pki_types::ServerName::from(std::net::IpAddr::from([0, 0, 0, 0]));
            let connector = TlsConnector::from(Arc::clone(&configs().client));
            let tls = connector.connect(name, near).await.unwrap();
            let (mut requests, connection) = h2::client::handshake(tls).await.unwrap();
            let talk = async {
                let Request { method, authority, .. } = request().to_http();
                let asked =
                    http::Request::builder().method(method).uri(authority).body(()).unwrap();
                let (answer, mut send) = requests.send_request(asked, false).unwrap();
                let mut body = answer.await.unwrap().into_body();
                foreign_send(&mut send, TOTAL, SEED).await;
                foreign_receive(&mut body, TOTAL / 2, SEED + 2).await;
                drop((requests, send, body));
            };
            let ((), ended) = tokio::join!(talk, connection);
            ended.unwrap();
        };
        within(async { tokio::join!(served, asked) }).await;
    }
}
