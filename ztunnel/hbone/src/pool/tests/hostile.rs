//! Against a server that means harm: what it costs us is bounded, its tunnel ends with a reason, and the tunnels to
//! others go on.

use super::{
    wire::{GOAWAY, HEADERS, PING, RST_STREAM, SETTINGS, Wire, frame, next_frame},
    *,
};

const DATA: u8 = 0;
const PUSH_PROMISE: u8 = 5;
const WINDOW_UPDATE: u8 = 8;
const CONTINUATION: u8 = 9;
const END_HEADERS: u8 = 4;

/// `:status: 200`, of the static table.
const OK: &[u8] = &[0x88];

/// What an attempt may send us at most before it is cut or we stop reading: the rest is in the kernel's buffers.
const BOUND: usize = 32 << 20;

/// A header without indexing, of names and values shorter than 127 bytes.
fn header(name: &str, value: &str) -> Vec<u8> {
    let length = |text: &str| u8::try_from(text.len()).unwrap();
    [&[0, length(name)], name.as_bytes(), &[length(value)], value.as_bytes()].concat()
}

fn answer() -> Vec<u8> {
    frame(HEADERS, END_HEADERS, 1, OK)
}

/// Many times the same.
#[derive(Clone)]
struct Flood(Vec<u8>, usize);

const NONE: Flood = Flood(Vec::new(), 0);

/// A hostile server and a good one, and a connection that lives in a tunnel to the latter.
struct Bout {
    world: World,
    path: Path,
    to: SocketAddr,
    dials: Arc<AtomicUsize>,
    sent: Arc<AtomicUsize>,
}

impl Bout {
    /// What the hostile one says to its first request; after that it does not read on.
    async fn new(first: Vec<u8>, flood: Flood) -> Self {
        let mut world = World::new().await;
        let path = Path::through(&mut world).await;
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let to = listener.local_addr().unwrap();
        let (dials, sent) = (Arc::<AtomicUsize>::default(), Arc::<AtomicUsize>::default());
        let served = world.tasks.child();
        let (dialled, written) = (Arc::clone(&dials), Arc::clone(&sent));
        world.tasks.spawn(|_| async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                dialled.fetch_add(1, Ordering::Relaxed);
                let (first, flood, written) = (first.clone(), flood.clone(), Arc::clone(&written));
                served.spawn(move |_| async move {
                    // The stream lives on where it was not cut.
                    let _held = Box::pin(harm(stream, &first, flood, &written)).await;
                });
            }
        });
        Self { world, path, to, dials, sent }
    }

    async fn open(&self) -> Result<Opened, Failure> {
        within(self.world.pool.open(&key(self.to), &request(), || dial(self.to))).await
    }

    fn dials(&self) -> usize {
        self.dials.load(Ordering::Relaxed)
    }

    /// The other tunnel still works, and the hostile one's is gone.
    async fn over(mut self) {
        until(|| self.world.pool.tunnels() == 1).await;
        within(async {
            self.path.client.write_all(b"unharmed").await.unwrap();
            self.path.server.read_exact(&mut [0; 8]).await.unwrap();
        })
        .await;
        let sent = self.sent.load(Ordering::Relaxed);
        assert!(sent < BOUND, "we took {sent} bytes");
        assert_eq!(self.dials(), 1);
    }
}

async fn harm(
    stream: tokio::net::TcpStream,
    first: &[u8],
    Flood(piece, times): Flood,
    sent: &AtomicUsize,
) -> io::Result<()> {
    let tls = Arc::clone(&configs().server);
    let mut io = tokio_rustls::TlsAcceptor::from(tls).accept(stream).await?;
    io.read_exact(&mut [0; 24]).await?;
    let (mut inbox, mut buffer) = (Vec::new(), vec![0; 4096]);
    loop {
        match next_frame(0, &mut inbox) {
            Some(frame) if frame.kind == HEADERS => break,
            Some(_) => {}
            None => {
                let read = io.read(&mut buffer).await?;
                inbox.extend_from_slice(&buffer[..read]);
            }
        }
    }
    io.write_all(&[&frame(SETTINGS, 0, 0, &[]), first].concat()).await?;
    io.flush().await?;
    for _ in 0..times {
        io.write_all(&piece).await?;
        io.flush().await?;
        sent.fetch_add(piece.len(), Ordering::Relaxed);
    }
    std::future::pending().await
}

/// Each of these ends the tunnel, and the opener hears why.
#[tokio::test]
async fn what_breaks_the_protocol_ends_the_tunnel() {
    let filler = header("x", &"y".repeat(100)).repeat(100);
    let begin = || frame(HEADERS, 0, 1, OK);
    for (what, first, flood) in [
        ("200 MB of CONTINUATION", begin(), Flood(frame(CONTINUATION, 0, 1, &filler), 20_000)),
        (
            "a million empty CONTINUATIONs",
            begin(),
            Flood(frame(CONTINUATION, 0, 1, &[]).repeat(1000), 1000),
        ),
        ("no HPACK", frame(HEADERS, END_HEADERS, 1, &[0xff; 40]), NONE),
        ("no HTTP/2", b"HTTP/1.1 200 OK\r\n\r\n".repeat(2), NONE),
        ("a frame too large", vec![0xff; 4096], NONE),
        ("DATA of nothing", frame(DATA, 0, 3, b"x"), NONE),
        ("a reset of nothing", frame(RST_STREAM, 0, 3, &[0, 0, 0, 8]), NONE),
        ("a stream of its own", frame(HEADERS, END_HEADERS, 2, OK), NONE),
        ("a push", frame(PUSH_PROMISE, 4, 1, &[0, 0, 0, 2, 0x82]), NONE),
        ("a window past all bounds", frame(WINDOW_UPDATE, 0, 0, &[0x7f, 0xff, 0xff, 0xff]), NONE),
        ("a GOAWAY in anger", frame(GOAWAY, 0, 0, &[0, 0, 0, 0, 0, 0, 0, 11]), NONE),
    ] {
        let bout = Bout::new(first, flood).await;
        let failure = bout.open().await.expect_err(what);
        assert_eq!((failure.side, failure.reason), (Side::Upstream, Reason::Http2), "{what}");
        let why = failure.source.unwrap().to_string();
        assert!(why.starts_with("h2 failed: "), "{what}: {why}");
        bout.over().await;
    }
}

/// What is wrong with one answer costs that stream, and the peer is not asked again: it has seen the request.
#[tokio::test]
async fn an_answer_that_is_none_costs_its_stream_alone() {
    let filler = header("x", &"y".repeat(100)).repeat(100);
    let upper = [OK, &header("X-Y", "z")].concat();
    let long = [
        frame(HEADERS, 0, 3, OK),
        frame(CONTINUATION, 0, 3, &filler),
        frame(CONTINUATION, END_HEADERS, 3, &filler),
    ];
    for (what, second) in [
        ("20 KB of headers", long.concat()),
        ("an upper-case name", frame(HEADERS, END_HEADERS, 3, &upper)),
        ("no status", frame(HEADERS, END_HEADERS, 3, &header("x", "y"))),
        ("an end before its time", frame(HEADERS, END_HEADERS | 1, 3, &header("x", "y"))),
    ] {
        let mut world = World::new().await;
        let path = Path::through(&mut world).await;
        let wire = Wire::answering(vec![answer(), second]).await;
        let mut first = wire.open().await;
        let failure = within(wire.ask(1).pop().unwrap()).await.unwrap().expect_err(what);
        assert_eq!((failure.side, failure.reason), (Side::Upstream, Reason::Http2), "{what}");
        assert_eq!(wire.connections(), 1, "{what}: it was asked twice");
        wire.send(frame(DATA, 1, 1, b"still")).await;
        assert!(
            matches!(next(&mut first.stream).await, Ok(Taken::Chunk(chunk)) if chunk == "still"),
            "{what}"
        );
        drop(path);
    }
}

/// Nothing of this is read back: we stop reading, and give the peer up when it answers no PING.
#[tokio::test]
async fn floods_that_want_answers_are_not_answered_without_end() {
    for (what, piece) in [
        ("PING", frame(PING, 0, 0, &[7; 8])),
        ("SETTINGS", frame(SETTINGS, 0, 0, &[0, 4, 0, 1, 0, 0])),
    ] {
        // 340 MB, were it let.
        let bout = Bout::new(answer(), Flood(piece.repeat(1000), 20_000)).await;
        let mut opened = bout.open().await.expect(what);
        pause();
        // Idle, the clock jumps from timer to timer.
        let cut = poll_fn(|cx| opened.stream.poll_readable(cx)).await.is_err()
            || poll_fn(|cx| Poll::Ready(opened.stream.take(cx, usize::MAX))).await.is_err();
        assert!(cut, "{what}");
        tokio::time::resume();
        drop(opened);
        bout.over().await;
    }
}

/// Resets, farewells and answers before the answer, without end: they cost us nothing that stays.
#[tokio::test]
async fn floods_that_want_nothing_are_read_and_forgotten() {
    let reset = frame(RST_STREAM, 0, 1, &[0, 0, 0, 8]);
    let farewell = frame(GOAWAY, 0, 0, &[0, 0, 0, 1, 0, 0, 0, 0]);
    let early = frame(HEADERS, END_HEADERS, 1, &[8, 3, b'1', b'0', b'3']);
    for (what, first, piece, last) in [
        ("RST_STREAM", answer(), reset, Vec::new()),
        ("GOAWAY", answer(), farewell, frame(DATA, 1, 1, b"still")),
        ("103 Early Hints", Vec::new(), early, [answer(), frame(DATA, 1, 1, b"still")].concat()),
    ] {
        let first = [first, piece.repeat(100_000), last.clone()].concat();
        let bout = Bout::new(first, NONE).await;
        match bout.open().await {
            Ok(mut opened) if !last.is_empty() => {
                let said = next(&mut opened.stream).await;
                assert!(matches!(said, Ok(Taken::Chunk(chunk)) if chunk == "still"), "{what}");
            }
            Ok(mut opened) => assert!(next(&mut opened.stream).await.is_err(), "{what}"),
            Err(failure) => assert_eq!(failure.reason, Reason::Http2, "{what}: {failure:?}"),
        }
        assert_eq!(bout.dials(), 1, "{what}");
    }
}
