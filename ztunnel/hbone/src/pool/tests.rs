mod hostile;
mod wire;

use super::*;
use crate::{
    Duplex, ResponseHead, server,
    stream::Taken,
    testing::{Path, World, configs, dial, key, request, tcp, until, within},
};
use std::{future::poll_fn, io, task::Poll, time::Duration};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
    sync::oneshot,
    task::yield_now,
    time::{advance, pause},
};

fn most(streams: u32) -> Settings {
    Settings { pool_streams: streams, ..Settings::default() }
}

/// What a stream has to say next.
async fn next(stream: &mut Stream) -> io::Result<Taken> {
    within(poll_fn(|cx| stream.poll_readable(cx))).await?;
    within(poll_fn(|cx| Poll::Ready(stream.take(cx, usize::MAX)))).await
}

#[tokio::test]
async fn many_at_once_dial_once() {
    let mut world = World::new().await;
    let mut outcomes = Vec::new();
    for _ in 0..16 {
        let (done, outcome) = oneshot::channel();
        let ask = world.ask();
        world.tasks.spawn(|_| async move {
            let _test_is_over = done.send(ask.await);
        });
        outcomes.push(outcome);
    }
    let mut far = Vec::new();
    for _ in 0..16 {
        let incoming = within(world.streams.recv()).await.unwrap();
        assert_eq!(incoming.request.as_ref().unwrap().authority, request().authority);
        far.push(incoming.accept(&ResponseHead::default()).unwrap());
    }
    for outcome in outcomes {
        assert_eq!(within(outcome).await.unwrap().unwrap().certificates.len(), 1);
    }
    assert_eq!((world.accepted(), world.pool.tunnels()), (1, 1));
}

#[tokio::test]
async fn a_full_tunnel_returns_to_use_when_streams_end() {
    let mut world = World::with(most(2), Settings::default()).await;
    let first = world.open().await;
    let second = world.open().await;
    assert_eq!(world.accepted(), 1);
    let third = world.open().await;
    let fourth = world.open().await;
    assert_eq!((world.accepted(), world.pool.tunnels()), (2, 2));
    drop((first, second));
    let _fifth = world.open().await;
    let _sixth = world.open().await;
    assert_eq!((world.accepted(), world.pool.tunnels()), (2, 2));
    drop((third, fourth));
}

#[tokio::test]
async fn the_peer_may_want_fewer() {
    let server = Settings { server_streams: 1, ..Settings::default() };
    let mut world = World::with(Settings::default(), server).await;
    let _first = world.open().await;
    let _second = world.open().await;
    assert_eq!(world.accepted(), 2);
}

#[tokio::test]
async fn a_tunnel_that_leaves_takes_no_more() {
    let mut world = World::new().await;
    let mut path = Path::through(&mut world).await;
    world.leave.notify_waiters();
    // Until the farewell arrives, streams go the old way, and are served.
    within(async {
        while world.accepted() == 1 {
            world.open().await;
        }
    })
    .await;
    within(async {
        path.client.write_all(b"still here").await.unwrap();
        path.client.shutdown().await.unwrap();
        let mut text = String::new();
        path.server.read_to_string(&mut text).await.unwrap();
        assert_eq!(text, "still here");
    })
    .await;
    drop(path);
    until(|| world.pool.tunnels() == 1).await;
}

#[tokio::test]
async fn what_is_not_asked_for_is_released() {
    let mut world = World::new().await;
    let live = world.open().await;
    pause();
    advance(Duration::from_secs(301)).await;
    for _ in 0..100 {
        yield_now().await;
    }
    assert_eq!(world.pool.tunnels(), 1, "a stream lives on it");
    drop(live);
    advance(Duration::from_secs(299)).await;
    for _ in 0..100 {
        yield_now().await;
    }
    assert_eq!(world.pool.tunnels(), 1, "not yet");
    advance(Duration::from_secs(2)).await;
    until(|| world.pool.is_empty()).await;
    let _next = world.open().await;
    assert_eq!(world.accepted(), 2);
}

#[tokio::test]
async fn who_gives_up_mid_way_leaves_it_to_the_next() {
    let mut world = World::new().await;
    let (key, request) = (key(world.to), request());
    let pool = Arc::clone(&world.pool);
    let mut stuck = Box::pin(pool.open(&key, &request, || Box::pin(std::future::pending())));
    poll_fn(|cx| {
        assert!(stuck.as_mut().poll(cx).is_pending());
        Poll::Ready(())
    })
    .await;
    let mut waiting = Box::pin(world.open());
    poll_fn(|cx| {
        assert!(waiting.as_mut().poll(cx).is_pending());
        Poll::Ready(())
    })
    .await;
    drop(stuck);
    let _opened = within(waiting).await;
    assert_eq!((world.accepted(), world.pool.tunnels()), (1, 1));
}

#[tokio::test]
async fn no_slot_stays_behind_who_gives_up() {
    let world = World::new().await;
    let (key, request) = (key(world.to), request());
    let mut stuck = Box::pin(world.pool.open(&key, &request, || Box::pin(std::future::pending())));
    poll_fn(|cx| {
        assert!(stuck.as_mut().poll(cx).is_pending());
        Poll::Ready(())
    })
    .await;
    assert!(!world.pool.is_empty());
    drop(stuck);
    assert!(world.pool.is_empty());
}

#[tokio::test]
async fn those_who_wait_share_a_failure() {
    let world = World::new().await;
    let dials = Arc::new(AtomicUsize::new(0));
    let mut outcomes = Vec::new();
    for _ in 0..8 {
        let (pool, dials) = (Arc::clone(&world.pool), Arc::clone(&dials));
        let (done, outcome) = oneshot::channel();
        world.tasks.spawn(|_| async move {
            let (key, request) = (key("10.0.0.1:15008".parse().unwrap()), request());
            let failed = pool.open(&key, &request, || {
                dials.fetch_add(1, Ordering::Relaxed);
                Box::pin(async {
                    for _ in 0..10 {
                        yield_now().await;
                    }
                    Err(Failure::upstream(Reason::Unreachable, io::Error::other("no way")))
                })
            });
            let _test_is_over = done.send(failed.await);
        });
        outcomes.push(outcome);
    }
    for outcome in outcomes {
        let failure = within(outcome).await.unwrap().unwrap_err();
        assert_eq!((failure.side, failure.reason), (Side::Upstream, Reason::Unreachable));
        assert_eq!(failure.source.unwrap().to_string(), "no way");
    }
    assert_eq!(dials.load(Ordering::Relaxed), 1);
    assert!(world.pool.is_empty());
}

#[tokio::test]
async fn a_peer_that_cannot_shake_hands_is_a_failure() {
    let world = World::new().await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let to = listener.local_addr().unwrap();
    let (key, request) = (key(to), request());
    let (failed, ()) = within(async {
        tokio::join!(world.pool.open(&key, &request, || dial(to)), async {
            let (mut stream, _) = listener.accept().await.unwrap();
            stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").await.unwrap();
        })
    })
    .await;
    let failure = failed.unwrap_err();
    assert_eq!((failure.side, failure.reason), (Side::Upstream, Reason::Tls));
    assert!(failure.source.unwrap().to_string().starts_with("tls handshake error: "));
    assert!(world.pool.is_empty());
}

#[tokio::test]
async fn a_drain_ends_idle_tunnels_and_lets_others_finish() {
    let mut world = World::new().await;
    let (mut opened, mut far) = world.open().await;
    world.pod.stop();
    until(|| world.pool.is_empty()).await;
    within(poll_fn(|cx| far.poll_room(cx))).await.unwrap();
    far.give(bytes::Bytes::from_static(b"late").into()).unwrap();
    assert!(matches!(next(&mut opened.stream).await, Ok(Taken::Chunk(chunk)) if chunk == "late"));
    drop(opened);
    assert!(next(&mut far).await.is_err(), "dropped before its end");
}

#[tokio::test]
async fn a_pool_that_goes_takes_its_tunnels() {
    let mut world = World::new().await;
    let (mut opened, mut far) = world.open().await;
    let tasks = Tasks::new();
    drop(std::mem::replace(&mut world.pool, Arc::new(Pool::new(Settings::default(), tasks))));
    assert!(next(&mut opened.stream).await.is_err());
    assert!(next(&mut far).await.is_err());
}

#[tokio::test]
async fn a_server_that_is_dead_is_given_up() {
    let world = World::new().await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let to = listener.local_addr().unwrap();
    let served = async {
        let (stream, _) = listener.accept().await.unwrap();
        let (stream, tls) = (stream.into_std().unwrap(), Arc::clone(&configs().server));
        let mut connection = server::handshake(stream, tls, &Settings::default()).await.unwrap();
        let incoming = connection.next().await.unwrap().unwrap();
        let far = incoming.accept(&ResponseHead::default()).unwrap();
        // It moves until its answer is out, and then no more.
        (connection, far)
    };
    let (key, request) = (key(to), request());
    let mut asked = Box::pin(world.pool.open(&key, &request, || dial(to)));
    let (mut connection, _far) = within(async {
        tokio::select! {
            _ = &mut asked => panic!("not yet"),
            served = served => served,
        }
    })
    .await;
    let mut opened = within(async {
        tokio::select! {
            opened = &mut asked => opened.unwrap(),
            _ = connection.next() => panic!("there is but one stream"),
        }
    })
    .await;
    pause();
    for _ in 0..35 {
        advance(Duration::from_secs(1)).await;
        yield_now().await;
    }
    until(|| world.pool.tunnels() == 0).await;
    assert!(next(&mut opened.stream).await.is_err());
}

#[tokio::test]
async fn a_client_that_is_dead_is_given_up() {
    let (near, far) = tcp().await;
    let settings = Settings::default();
    let tls = Arc::clone(&configs().server);
    let mut shake = Box::pin(server::handshake(far.into_std().unwrap(), tls, &settings));
    let asks = async {
        let tls = TlsStream::connect(near, Arc::clone(&configs().client)).await.unwrap();
        engine::connect(tls, &settings)
    };
    // It moves until the server has its preface, and then no more.
    let (_requests, mut dead) = within(async {
        tokio::select! {
            _ = &mut shake => panic!("not yet"),
            asked = asks => asked,
        }
    })
    .await;
    let connection = within(async {
        tokio::select! {
            connection = &mut shake => connection,
            _ = &mut dead => panic!("it ended"),
        }
    })
    .await;
    let mut connection = connection.unwrap();
    pause();
    // Idle, the clock jumps from timer to timer.
    let failure = connection.next().await.unwrap().unwrap_err();
    assert_eq!((failure.side, failure.reason), (Side::Downstream, Reason::Http2));
    assert_eq!(failure.source.unwrap().to_string(), "the peer has not answered a PING for 20s");
    assert!(!matches!(connection.next().await, Some(Ok(_))), "and that is the end of it");
}

#[tokio::test]
async fn a_tunnel_ends_when_whoever_watches_it_says_so() {
    let mut world = World::new().await;
    let (end, ending) = oneshot::channel::<()>();
    let ending = Mutex::new(Some(ending));
    let dial = || -> Dialing<'_> {
        Box::pin(async {
            let ending = lock(&ending).take().unwrap();
            let shaken: Shaken = Box::new(move |outcome| {
                assert_eq!(outcome.unwrap().len(), 1, "the peer's certificate");
                Ok(Box::pin(async { drop(ending.await) }))
            });
            Ok(dial(world.to).await?.watched(shaken))
        })
    };
    let (key, request) = (key(world.to), request());
    let (opened, _far) = tokio::join!(world.pool.open(&key, &request, dial), async {
        world.streams.recv().await.unwrap().accept(&ResponseHead::default()).unwrap()
    });
    let mut opened = opened.unwrap();
    assert!(!opened.ended.is_set());
    end.send(()).unwrap();
    next(&mut opened.stream).await.unwrap_err();
    assert!(opened.ended.is_set());
    until(|| world.pool.is_empty()).await;
}

#[tokio::test]
async fn whoever_watches_says_why_hands_were_not_shaken() {
    let (near, far) = tcp().await;
    drop(far);
    let shaken = || -> Shaken {
        Box::new(|outcome| match outcome.unwrap_err() {
            HandshakeError::Io(_) => Err(Failure::local(Reason::Revoked)),
            other => panic!("{other}"),
        })
    };
    let near = Mutex::new(Some(near.into_std().unwrap()));
    let dial = || -> Dialing<'_> {
        let stream = lock(&near).take().unwrap();
        let dialed = Dialed::new(stream, Arc::clone(&configs().client)).watched(shaken());
        Box::pin(async { Ok(dialed) })
    };
    let pool = Pool::new(Settings::default(), Tasks::new());
    let to = "127.0.0.1:1".parse().unwrap();
    let failure = within(pool.open(&key(to), &request(), dial)).await.unwrap_err();
    assert_eq!(failure.reason, Reason::Revoked);
}
