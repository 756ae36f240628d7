//! What readers that do not read can do to others, and to us.

use super::*;
use crate::{Duplex, testing::until};
use std::sync::atomic::{AtomicU64, Ordering};
use tokio::io::AsyncWrite;

#[derive(Default)]
struct Count {
    up: AtomicU64,
    down: AtomicU64,
}

impl Meter for Count {
    fn to_upstream(&self, bytes: u64) {
        self.up.fetch_add(bytes, Ordering::Relaxed);
    }

    fn to_downstream(&self, bytes: u64) {
        self.down.fetch_add(bytes, Ordering::Relaxed);
    }
}

/// Writes for as long as the other side lets it.
async fn flood(mut to: TcpStream) {
    let chunk = vec![7; 64 * 1024];
    while to.write_all(&chunk).await.is_ok() {}
}

/// A client that writes for ever, to a stream that nobody reads.
async fn stall(world: &mut World) -> (Arc<Count>, Stream) {
    let (opened, far) = world.open().await;
    let (client, down) = tcp().await;
    let count = Arc::new(Count::default());
    let counts = Arc::clone(&count);
    world.tasks.spawn(|_| async move {
        let _cut = relay(Tcp::from(down), opened.stream, &*counts).await;
    });
    world.tasks.spawn(|_| flood(client));
    (count, far)
}

async fn bulk_passes(world: &mut World) {
    const TOTAL: usize = 32 << 20;
    let path = Path::through(world).await;
    let (_client_in, client_out) = path.client.into_split();
    let (server_in, _server_out) = path.server.into_split();
    let random = fastrand::Rng::with_seed(9);
    within(async {
        tokio::join!(
            send(client_out, TOTAL, 3, random.clone()),
            receive(server_in, TOTAL, 3, random)
        )
    })
    .await;
}

#[tokio::test]
async fn eight_that_stall_do_not_slow_a_ninth_and_are_bounded() {
    let mut world = World::new().await;
    let mut stalled = Vec::new();
    for _ in 0..8 {
        stalled.push(stall(&mut world).await);
    }
    let window = u64::from(Settings::default().stream_window);
    let moved = |(count, _): &(Arc<Count>, Stream)| count.up.load(Ordering::Relaxed);
    until(|| stalled.iter().all(|one| moved(one) >= window)).await;
    bulk_passes(&mut world).await;
    for one in &stalled {
        assert_eq!(moved(one), window, "the sender may push a window, and no byte more");
    }
    assert_eq!(world.accepted(), 1, "all in one tunnel");
}

/// The far relay holds what the window let through until its program reads: a program that does not read
/// stops the one that writes.
#[tokio::test]
async fn eight_programs_that_do_not_read_do_not_slow_a_ninth() {
    let mut world = World::new().await;
    let mut held = Vec::new();
    for _ in 0..8 {
        let path = Path::through(&mut world).await;
        world.tasks.spawn(|_| flood(path.client));
        held.push((path.server, path.near, path.far));
    }
    bulk_passes(&mut world).await;
    bulk_passes(&mut world).await;
    assert_eq!(world.accepted(), 1);
}

/// Streams that once sent a little keep nothing of a small window for themselves.
#[tokio::test]
async fn idle_streams_do_not_starve_others() {
    let server = Settings { connection_window: 256 * 1024, ..Settings::default() };
    let mut world = World::with(Settings::default(), server).await;
    let mut idle = Vec::new();
    for _ in 0..16 {
        let mut path = Path::through(&mut world).await;
        within(async {
            path.client.write_all(b"?").await.unwrap();
            path.server.read_exact(&mut [0]).await.unwrap();
        })
        .await;
        idle.push(path);
    }
    bulk_passes(&mut world).await;
    assert_eq!(world.accepted(), 1);
}

/// What was queued on a stream that is cut off, and never sent, leaves the connection's window to others.
#[tokio::test]
async fn who_is_cut_off_takes_no_window_along() {
    let server = Settings { connection_window: 256 * 1024, ..Settings::default() };
    let mut world = World::with(Settings::default(), server).await;
    for _ in 0..16 {
        let (mut opened, far) = world.open().await;
        let room = within(std::future::poll_fn(|cx| opened.stream.poll_room(cx))).await.unwrap();
        opened.stream.give(Bytes::from(vec![7; room]).into()).unwrap();
        // The tunnel's task has had no turn since.
        drop((opened, far));
    }
    bulk_passes(&mut world).await;
    assert_eq!(world.accepted(), 1);
}

/// A TCP end that takes nothing stops its source: one chunk is taken from it, and no more.
#[tokio::test]
async fn a_full_socket_stops_the_relay() {
    let mut world = World::new().await;
    let (mut opened, far) = world.open().await;
    let (_deaf, up) = tcp().await;
    // Full before the relay begins.
    let chunk = vec![7; 64 * 1024];
    let mut up = up;
    poll_until_pending(&mut up, &chunk).await;
    let count = Arc::new(Count::default());
    let counts = Arc::clone(&count);
    world.tasks.spawn(|_| async move {
        let _cut = relay(far, Tcp::from(up), &*counts).await;
    });
    let mut given = 0;
    let window = Settings::default().stream_window as usize;
    while given < window {
        let room = within(std::future::poll_fn(|cx| opened.stream.poll_room(cx))).await.unwrap();
        let chunk = Bytes::from(vec![7; room.min(window - given)]);
        given += chunk.len();
        opened.stream.give(chunk.into()).unwrap();
    }
    until(|| count.up.load(Ordering::Relaxed) > 0).await;
    bulk_passes(&mut world).await;
    let taken = count.up.load(Ordering::Relaxed);
    assert!(taken <= crate::parcel::MOST_PAYLOAD as u64, "{taken} bytes");
}

async fn poll_until_pending(to: &mut TcpStream, chunk: &[u8]) {
    std::future::poll_fn(|cx| {
        while Pin::new(&mut *to).poll_write(cx, chunk).is_ready() {}
        Poll::Ready(())
    })
    .await;
}

/// A program that says little at a time to one that does not read: the tunnel holds what was said, and not
/// a hundred times as much, and goes on for others.
#[tokio::test]
async fn many_small_pieces_to_who_does_not_read_do_not_end_the_tunnel() {
    const PIECES: usize = 400_000;
    let mut world = World::new().await;
    let (opened, stream) = world.open().await;
    let (up, mut server) = tcp().await;
    // Else the kernel makes them larger, and the relay does not wait.
    SockRef::from(&up).set_send_buffer_size(64 * 1024).unwrap();
    SockRef::from(&server).set_recv_buffer_size(64 * 1024).unwrap();
    world.tasks.spawn(|_| async move {
        let _cut = relay(stream, Tcp::from(up), &()).await;
    });
    let mut near = opened.stream;
    // Fills the sockets first, so that the relay waits.
    let chunk = Bytes::from(vec![1; 64 * 1024]);
    let (mut sent, mut waited) = (0, 0);
    while waited < 5000 {
        let room = std::future::poll_fn(|cx| Poll::Ready(near.poll_room(cx).is_ready())).await;
        if room {
            near.give(chunk.clone().into()).unwrap();
            (sent, waited) = (sent + chunk.len(), 0);
        } else {
            tokio::task::yield_now().await;
            waited += 1;
        }
    }
    let mut buffer = vec![0; 900 * 1024];
    within(server.read_exact(&mut buffer)).await.unwrap();
    for piece in 0..PIECES {
        within(std::future::poll_fn(|cx| near.poll_room(cx))).await.unwrap();
        near.give(Bytes::from_static(b"x").into()).unwrap();
        if piece % 64 == 0 {
            tokio::task::yield_now().await;
        }
    }
    bulk_passes(&mut world).await;
    assert_eq!(world.accepted(), 1, "the tunnel is the same");
    near.finish().unwrap();
    let mut rest = Vec::new();
    within(server.read_to_end(&mut rest)).await.unwrap();
    assert_eq!(buffer.len() + rest.len(), sent + PIECES);
}
