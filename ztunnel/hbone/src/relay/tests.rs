//! Whole tunnels: TCP, relay, HTTP/2, TLS, HTTP/2, relay, TCP.

mod plain;
mod pressure;

use super::*;
use crate::{
    Settings, Tcp, engine,
    stream::Stream,
    testing::{Path, World, configs, dial, key, request, tcp, within},
    tls::TlsStream,
};
use bytes::Bytes;
use socket2::SockRef;
use std::{sync::Arc, time::Duration};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
};

/// The byte at a place in a direction.
fn pattern(at: usize, direction: u8) -> u8 {
    at.wrapping_mul(2_654_435_761).to_le_bytes()[3] ^ direction
}

async fn send(mut to: OwnedWriteHalf, total: usize, direction: u8, mut random: fastrand::Rng) {
    let mut sent = 0;
    while sent < total {
        let count = random.usize(1..=200 * 1024).min(total - sent);
        let chunk: Vec<u8> = (sent..sent + count).map(|at| pattern(at, direction)).collect();
        to.write_all(&chunk).await.unwrap();
        sent += count;
    }
    to.shutdown().await.unwrap();
}

async fn receive(mut from: OwnedReadHalf, total: usize, direction: u8, mut random: fastrand::Rng) {
    let mut got = 0;
    let mut buffer = vec![0; 200 * 1024];
    loop {
        let room = random.usize(1..=buffer.len());
        let count = from.read(&mut buffer[..room]).await.unwrap();
        if count == 0 {
            break;
        }
        for (place, byte) in buffer[..count].iter().enumerate() {
            assert_eq!(*byte, pattern(got + place, direction), "at {}", got + place);
        }
        got += count;
    }
    assert_eq!(got, total);
}

#[tokio::test]
async fn nothing_is_lost_or_reordered() {
    let mut world = World::new().await;
    for (seed, total) in (0..).zip([0, 1, 3_000_000, 12_000_000]) {
        let path = Path::through(&mut world).await;
        let (client_in, client_out) = path.client.into_split();
        let (server_in, server_out) = path.server.into_split();
        let mut random = fastrand::Rng::with_seed(seed);
        within(async {
            tokio::join!(
                send(client_out, total, 1, random.fork()),
                receive(server_in, total, 1, random.fork()),
                send(server_out, total / 2, 2, random.fork()),
                receive(client_in, total / 2, 2, random.fork()),
            )
        })
        .await;
        assert!(within(path.near).await.unwrap().is_ok());
        assert!(within(path.far).await.unwrap().is_ok());
    }
    assert_eq!((world.accepted(), world.pool.tunnels()), (1, 1), "one tunnel took them all");
}

/// One says all it has and ends; the other hears the end, and answers after it.
async fn half_close(asks: &mut TcpStream, answers: &mut TcpStream) {
    let mut text = Vec::new();
    asks.write_all(b"question").await.unwrap();
    asks.shutdown().await.unwrap();
    answers.read_to_end(&mut text).await.unwrap();
    assert_eq!(text, b"question");
    answers.write_all(b"answer").await.unwrap();
    answers.shutdown().await.unwrap();
    asks.read_to_end(&mut text).await.unwrap();
    assert_eq!(text, b"questionanswer");
}

#[tokio::test]
async fn either_side_may_end_first() {
    let mut world = World::new().await;
    let mut path = Path::through(&mut world).await;
    within(half_close(&mut path.client, &mut path.server)).await;
    assert!(within(path.near).await.unwrap().is_ok());
    let mut path = Path::through(&mut world).await;
    within(half_close(&mut path.server, &mut path.client)).await;
    assert!(within(path.far).await.unwrap().is_ok());
}

/// One sends a little and cuts off: the other must not take that for the end.
async fn cut_off(mut cuts: TcpStream, sees: &mut TcpStream) {
    let mut text = [0; 8];
    cuts.write_all(b"part one").await.unwrap();
    sees.read_exact(&mut text).await.unwrap();
    SockRef::from(&cuts).set_linger(Some(Duration::ZERO)).unwrap();
    drop(cuts);
    let end = sees.read(&mut text).await;
    assert_eq!(end.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
}

fn reset_by(outcome: Result<(), Failure>) -> Side {
    let failure = outcome.unwrap_err();
    assert_eq!(failure.reason, Reason::Reset);
    assert!(failure.source.unwrap().to_string().contains("cut the connection off"));
    failure.side
}

#[tokio::test]
async fn a_reset_arrives_as_a_reset() {
    let mut world = World::new().await;
    let mut path = Path::through(&mut world).await;
    within(cut_off(path.client, &mut path.server)).await;
    assert_eq!(reset_by(within(path.near).await.unwrap()), Side::Downstream);
    assert_eq!(reset_by(within(path.far).await.unwrap()), Side::Downstream);
    let mut path = Path::through(&mut world).await;
    within(cut_off(path.server, &mut path.client)).await;
    assert_eq!(reset_by(within(path.near).await.unwrap()), Side::Upstream);
    assert_eq!(reset_by(within(path.far).await.unwrap()), Side::Upstream);
    assert_eq!(world.pool.tunnels(), 1, "the tunnel is none the worse");
}

#[tokio::test]
async fn a_reset_after_a_half_close_arrives_as_a_reset() {
    let mut world = World::new().await;
    let mut path = Path::through(&mut world).await;
    within(async {
        path.client.shutdown().await.unwrap();
        assert_eq!(path.server.read(&mut [0; 8]).await.unwrap(), 0);
        cut_off(path.server, &mut path.client).await;
    })
    .await;
}

#[tokio::test]
async fn the_end_of_the_tunnel_is_no_end_of_the_stream() {
    let mut world = World::new().await;
    let mut path = Path::through(&mut world).await;
    world.tasks.cancel();
    // The relays were tasks too, dropped with what they held.
    let end = within(path.client.read(&mut [0; 8])).await;
    drop(end);
    let mut world = World::new().await;
    let (opened, _stream) = world.open().await;
    let (mut client, down) = tcp().await;
    let relayed = relay(Tcp::from(down), opened.stream, &());
    let (outcome, ()) =
        within(async { tokio::join!(relayed, async { world.tasks.cancel() }) }).await;
    assert_eq!(reset_by(outcome), Side::Upstream);
    let end = within(client.read(&mut [0; 8])).await;
    assert_eq!(end.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
}

#[tokio::test]
async fn a_refusal_is_told_in_istios_words_and_keeps_the_tunnel() {
    let mut world = World::new().await;
    let (refused, ()) = tokio::join!(world.ask(), async {
        world.streams.recv().await.unwrap().refuse(503);
    });
    let failure = refused.unwrap_err();
    assert_eq!((failure.side, failure.reason), (Side::Upstream, Reason::Refused));
    assert_eq!(failure.source.unwrap().to_string(), "http status: 503 Service Unavailable");
    world.open().await;
    assert_eq!(world.accepted(), 1);
}

#[tokio::test]
async fn an_unanswered_stream_is_a_failure() {
    let mut world = World::new().await;
    let (failed, ()) = tokio::join!(world.ask(), async {
        drop(world.streams.recv().await.unwrap());
    });
    assert_eq!(failed.unwrap_err().reason, Reason::Http2);
    world.open().await;
    assert_eq!(world.accepted(), 1);
}

#[tokio::test]
async fn heads_that_are_too_large_are_refused() {
    let mut world = World::new().await;
    let mut asked = request();
    asked.baggage =
        Some(crate::Baggage { cluster: Some("x".repeat(70_000)), ..crate::Baggage::default() });
    let (pool, to) = (Arc::clone(&world.pool), world.to);
    let failure = within(pool.open(&key(to), &asked, || dial(to))).await.unwrap_err();
    assert_eq!(failure.side, Side::Upstream);
    world.open().await;
}

/// A peer that has heard enough says `RST_STREAM(NO_ERROR)` behind its `END_STREAM`: what it said is whole.
#[tokio::test]
async fn who_has_heard_enough_has_not_cut_off() {
    let (near, far) = tcp().await;
    let settings = Settings::default();
    // Another implementation, which says so by itself.
    let served = async {
        let tls = tokio_rustls::TlsAcceptor::from(Arc::clone(&configs().server));
        let tls = tls.accept(far).await.unwrap();
        let mut connection = h2::server::handshake(tls).await.unwrap();
        let (request, mut responder) = connection.accept().await.unwrap().unwrap();
        let mut send = responder.send_response(http::Response::new(()), false).unwrap();
        send.send_data(Bytes::from_static(b"all of it"), true).unwrap();
        drop((request, responder, send));
        while let Some(Ok(_)) = connection.accept().await {}
    };
    let asked = async {
        let tls = TlsStream::connect(near, Arc::clone(&configs().client)).await.unwrap();
        let (requests, connection) = engine::connect(tls, &settings);
        let (client, down) = tcp().await;
        let relayed = async move {
            let (mut client, mut text) = (client, Vec::new());
            let mut asked = requests.send(request().to_http()).unwrap();
            (&mut asked).await.unwrap();
            let stream = Stream::new(asked.into_stream().unwrap(), None);
            let (outcome, ()) = tokio::join!(relay(Tcp::from(down), stream, &()), async {
                client.read_to_end(&mut text).await.unwrap();
            });
            assert_eq!(text, b"all of it");
            outcome.unwrap();
        };
        tokio::select! {
            ended = connection => panic!("{ended:?}"),
            () = relayed => {}
        }
    };
    within(async {
        tokio::select! {
            () = served => {}
            () = asked => {}
        }
    })
    .await;
}

/// A held connection costs two of these, and a task each.
#[tokio::test]
async fn a_relay_is_small() {
    let mut world = World::new().await;
    let (opened, _stream) = world.open().await;
    let (_client, down) = tcp().await;
    let relayed = relay(Tcp::from(down), opened.stream, &());
    let size = size_of_val(&world.ask());
    assert!(size <= 1280, "{size} bytes to open a stream, with key and request");
    let size = size_of_val(&relayed);
    assert!(size <= 400, "{size} bytes");
}
