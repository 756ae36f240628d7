//! Against a peer that is spoken for by the frame: what the engine's own server would not do.

use super::*;
use tokio::sync::mpsc;

const HEADERS: u8 = 1;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
const ACK: u8 = 1;
const MAX_CONCURRENT_STREAMS: u16 = 3;

#[derive(Debug)]
struct Frame {
    /// Which connection it came by.
    connection: usize,
    kind: u8,
    flags: u8,
    stream: u32,
    payload: Vec<u8>,
}

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = u32::try_from(payload.len()).unwrap().to_be_bytes()[1..].to_vec();
    bytes.extend([kind, flags]);
    bytes.extend(stream.to_be_bytes());
    bytes.extend(payload);
    bytes
}

fn limit(streams: u32) -> Vec<u8> {
    let mut setting = MAX_CONCURRENT_STREAMS.to_be_bytes().to_vec();
    setting.extend(streams.to_be_bytes());
    frame(SETTINGS, 0, 0, &setting)
}

/// Answers every request with 200 and every PING; tells the test of each frame, and sends what it is given on
/// its first connection.
struct Wire {
    world: World,
    to: SocketAddr,
    frames: mpsc::Receiver<Frame>,
    orders: mpsc::Sender<Vec<u8>>,
    connections: Arc<AtomicUsize>,
}

impl Wire {
    async fn new(first: Vec<u8>) -> Self {
        let world = World::new().await;
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let to = listener.local_addr().unwrap();
        let (told, frames) = mpsc::channel(256);
        let (orders, taken) = mpsc::channel(16);
        let connections = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&connections);
        let served = world.tasks.child();
        let mut taken = Some(taken);
        world.tasks.spawn(|_| async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let connection = count.fetch_add(1, Ordering::Relaxed);
                let orders = taken.take().unwrap_or_else(|| mpsc::channel(1).1);
                let (told, first) = (told.clone(), first.clone());
                served.spawn(move |_| async move {
                    // The test may be over.
                    let _end = Box::pin(speak(connection, stream, &first, &told, orders)).await;
                });
            }
        });
        Self { world, to, frames, orders, connections }
    }

    async fn open(&self) -> Opened {
        let (key, request) = (key(self.to), request());
        within(self.world.pool.open(&key, &request, || dial(self.to))).await.unwrap()
    }

    fn connections(&self) -> usize {
        self.connections.load(Ordering::Relaxed)
    }

    /// Gives others their turn until such a frame has come, whatever the clock does.
    async fn seen(&mut self, is: impl Fn(&Frame) -> bool) -> Frame {
        for _ in 0..1_000_000 {
            match self.frames.try_recv() {
                Ok(frame) if is(&frame) => return frame,
                Ok(_) => {}
                Err(_) => yield_now().await,
            }
        }
        panic!("no such frame came");
    }

    /// Has the peer change its mind, and the client take notice.
    async fn limit(&mut self, streams: u32) {
        self.orders.send(limit(streams)).await.unwrap();
        self.noticed().await;
    }

    async fn noticed(&mut self) {
        self.seen(|f| f.connection == 0 && f.kind == SETTINGS && f.flags == ACK).await;
    }
}

async fn speak(
    connection: usize,
    stream: tokio::net::TcpStream,
    first: &[u8],
    told: &mpsc::Sender<Frame>,
    mut orders: mpsc::Receiver<Vec<u8>>,
) -> io::Result<()> {
    let tls = Arc::clone(&configs().server);
    let mut io = TlsStream::accept(stream, tls).await.map_err(io::Error::other)?;
    io.read_exact(&mut [0; 24]).await?;
    io.write_all(first).await?;
    io.flush().await?;
    let mut inbox = Vec::new();
    let mut buffer = vec![0; 64 << 10];
    loop {
        let (read, order) = tokio::select! {
            read = io.read(&mut buffer) => (read?, None),
            order = orders.recv(), if !orders.is_closed() || !orders.is_empty() => (0, order),
        };
        if let Some(order) = order {
            io.write_all(&order).await?;
            io.flush().await?;
            continue;
        }
        if read == 0 {
            return Ok(());
        }
        inbox.extend_from_slice(&buffer[..read]);
        while let Some(frame) = next_frame(connection, &mut inbox) {
            let answer = match (frame.kind, frame.flags & ACK) {
                // `:status: 200`, of the static table.
                (HEADERS, _) => self::frame(HEADERS, 4, frame.stream, &[0x88]),
                (SETTINGS, 0) => self::frame(SETTINGS, ACK, 0, &[]),
                (PING, 0) => self::frame(PING, ACK, 0, &frame.payload),
                _ => Vec::new(),
            };
            let _test_is_over = told.send(frame).await;
            io.write_all(&answer).await?;
            io.flush().await?;
        }
    }
}

fn next_frame(connection: usize, inbox: &mut Vec<u8>) -> Option<Frame> {
    let head: [u8; 9] = inbox.get(..9)?.try_into().unwrap();
    let length = usize::try_from(u32::from_be_bytes([0, head[0], head[1], head[2]])).unwrap();
    let payload = inbox.get(9..9 + length)?.to_vec();
    inbox.drain(..9 + length);
    let stream = u32::from_be_bytes([head[5], head[6], head[7], head[8]]);
    Some(Frame { connection, kind: head[3], flags: head[4], stream, payload })
}

#[tokio::test]
async fn the_peers_limit_is_followed_as_it_changes() {
    let mut wire = Wire::new(limit(1)).await;
    let _first = wire.open().await;
    wire.noticed().await;
    wire.limit(2).await;
    let second = wire.open().await;
    assert_eq!(wire.connections(), 1, "it takes two by now");
    wire.limit(1).await;
    drop(second);
    let _third = wire.open().await;
    assert_eq!(wire.connections(), 2, "it takes one again, and has one");
}

#[tokio::test]
async fn who_is_asked_for_nothing_is_asked_whether_it_lives() {
    let mut wire = Wire::new(frame(SETTINGS, 0, 0, &[])).await;
    let opened = wire.open().await;
    pause();
    for _ in 0..5 {
        for _ in 0..11 {
            advance(Duration::from_secs(1)).await;
            yield_now().await;
        }
        let ping = wire.seen(|f| f.kind == PING && f.flags == 0).await;
        assert_eq!(ping.payload.len(), 8);
        // The answer arrives.
        for _ in 0..1000 {
            yield_now().await;
        }
    }
    assert_eq!(wire.world.pool.tunnels(), 1, "it answers, and is kept");
    // And it may ask in turn.
    wire.orders.send(frame(PING, 0, 0, b"are you?")).await.unwrap();
    let answer = wire.seen(|f| f.kind == PING && f.flags == ACK).await;
    assert_eq!(answer.payload, b"are you?");
    drop(opened);
}

/// Streams that the peer says it has not looked at are asked for again, elsewhere; those that it has taken go
/// on.
#[tokio::test]
async fn what_a_leaving_peer_has_not_taken_goes_elsewhere() {
    let wire = Wire::new(frame(SETTINGS, 0, 0, &[])).await;
    let mut first = wire.open().await;
    // Last stream 1, NO_ERROR.
    let farewell = frame(GOAWAY, 0, 0, &[0, 0, 0, 1, 0, 0, 0, 0]);
    wire.orders.send(farewell).await.unwrap();
    within(async {
        while wire.connections() == 1 {
            let _next = wire.open().await;
        }
    })
    .await;
    // DATA on the old one, and its end.
    wire.orders.send(frame(0, 1, 1, b"still")).await.unwrap();
    assert!(matches!(next(&mut first.stream).await, Ok(Taken::Chunk(chunk)) if chunk == "still"));
}
