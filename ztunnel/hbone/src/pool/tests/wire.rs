//! Against a peer that is spoken for by the frame: what the engine's own server would not do.

use super::*;
use tokio::sync::mpsc;

pub(super) const HEADERS: u8 = 1;
pub(super) const RST_STREAM: u8 = 3;
pub(super) const SETTINGS: u8 = 4;
pub(super) const PING: u8 = 6;
pub(super) const GOAWAY: u8 = 7;
const ACK: u8 = 1;
const REFUSED_STREAM: [u8; 4] = [0, 0, 0, 7];
const CANCEL: [u8; 4] = [0, 0, 0, 8];
const MAX_CONCURRENT_STREAMS: u16 = 3;

#[derive(Debug)]
pub(super) struct Frame {
    /// Which connection it came by.
    connection: usize,
    pub(super) kind: u8,
    flags: u8,
    pub(super) stream: u32,
    payload: Vec<u8>,
}

pub(super) fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
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

#[derive(Clone)]
enum Answers {
    /// 200 to every request.
    All,
    /// These to the first ones of a connection, and none to others.
    These(Vec<Vec<u8>>),
}

/// Answers requests, and every PING; tells the test of each frame, and sends what it is given on
/// its first connection.
pub(super) struct Wire {
    world: World,
    to: SocketAddr,
    frames: mpsc::Receiver<Frame>,
    orders: mpsc::Sender<Vec<u8>>,
    connections: Arc<AtomicUsize>,
}

impl Wire {
    async fn new(first: Vec<u8>) -> Self {
        Self::with(Settings::default(), first, Answers::All).await
    }

    /// One that gives its first requests these answers.
    pub(super) async fn answering(answers: Vec<Vec<u8>>) -> Self {
        let first = frame(SETTINGS, 0, 0, &[]);
        Self::with(Settings::default(), first, Answers::These(answers)).await
    }

    async fn with(settings: Settings, first: Vec<u8>, answers: Answers) -> Self {
        let world = World::with(settings, Settings::default()).await;
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
                let (told, first, answers) = (told.clone(), first.clone(), answers.clone());
                served.spawn(move |_| async move {
                    // The test may be over.
                    let _end =
                        Box::pin(speak((connection, answers), stream, &first, &told, orders)).await;
                });
            }
        });
        Self { world, to, frames, orders, connections }
    }

    pub(super) async fn open(&self) -> Opened {
        let (key, request) = (key(self.to), request());
        within(self.world.pool.open(&key, &request, || dial(self.to))).await.unwrap()
    }

    /// Asks for so many streams, each on its own.
    pub(super) fn ask(&self, streams: usize) -> Vec<oneshot::Receiver<Result<Opened, Failure>>> {
        let ask = |_| {
            let (done, outcome) = oneshot::channel();
            let (pool, to) = (Arc::clone(&self.world.pool), self.to);
            self.world.tasks.spawn(|_| async move {
                let _test_is_over = done.send(pool.open(&key(to), &request(), || dial(to)).await);
            });
            outcome
        };
        (0..streams).map(ask).collect()
    }

    pub(super) fn connections(&self) -> usize {
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

    pub(super) async fn send(&self, bytes: Vec<u8>) {
        self.orders.send(bytes).await.unwrap();
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
    (connection, answers): (usize, Answers),
    stream: tokio::net::TcpStream,
    first: &[u8],
    told: &mpsc::Sender<Frame>,
    mut orders: mpsc::Receiver<Vec<u8>>,
) -> io::Result<()> {
    let tls = Arc::clone(&configs().server);
    let mut io = tokio_rustls::TlsAcceptor::from(tls).accept(stream).await?;
    io.read_exact(&mut [0; 24]).await?;
    io.write_all(first).await?;
    io.flush().await?;
    let mut answers = match answers {
        Answers::All => None,
        Answers::These(these) => Some(these.into_iter()),
    };
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
                (HEADERS, _) if answers.is_some() => {
                    answers.as_mut().and_then(Iterator::next).unwrap_or_default()
                }
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

pub(super) fn next_frame(connection: usize, inbox: &mut Vec<u8>) -> Option<Frame> {
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

/// Gives others their turn, for so many seconds of a clock that stands.
async fn pass(seconds: u64) {
    for _ in 0..seconds {
        advance(Duration::from_secs(1)).await;
        for _ in 0..1000 {
            yield_now().await;
        }
    }
}

fn over<T>(outcomes: &mut [oneshot::Receiver<T>]) -> Vec<T> {
    outcomes.iter_mut().filter_map(|outcome| outcome.try_recv().ok()).collect()
}

/// It may have opened one before it heard so: that one is as lost as those that come later.
#[tokio::test]
async fn who_takes_no_streams_is_not_dialled_for_each_and_not_waited_for() {
    let mut wire = Wire::with(Settings::default(), limit(0), Answers::These(Vec::new())).await;
    let mut outcomes = wire.ask(1);
    wire.noticed().await;
    pause();
    outcomes.extend(wire.ask(31));
    pass(9).await;
    assert!(over(&mut outcomes).is_empty(), "it may yet take them");
    pass(2).await;
    let failures: Vec<_> = over(&mut outcomes).into_iter().map(Result::unwrap_err).collect();
    assert_eq!((failures.len(), wire.connections()), (32, 1));
    for failure in failures {
        assert_eq!((failure.side, failure.reason), (Side::Upstream, Reason::Http2));
        assert_eq!(
            failure.source.unwrap().to_string(),
            "the far end takes no more streams: its SETTINGS_MAX_CONCURRENT_STREAMS is 0, and there was no \
             room for 10s"
        );
    }
    until(|| wire.world.pool.is_empty()).await;
    let mut next = wire.ask(1);
    wire.seen(|f| f.connection == 1 && f.kind == SETTINGS && f.flags == ACK).await;
    pass(11).await;
    assert!(over(&mut next).pop().unwrap().is_err());
    assert_eq!(wire.connections(), 2, "another day, another try");
}

#[tokio::test]
async fn who_takes_streams_again_in_time_is_given_them() {
    let mut wire = Wire::new(limit(0)).await;
    let _first = wire.open().await;
    wire.noticed().await;
    let mut waiting = wire.ask(1);
    wire.limit(2).await;
    let opened = within(waiting.pop().unwrap()).await.unwrap();
    assert!(opened.is_ok());
    assert_eq!(wire.connections(), 1);
}

#[tokio::test]
async fn who_takes_no_streams_because_it_leaves_is_dialled_again() {
    let mut wire = Wire::new(limit(0)).await;
    let _first = wire.open().await;
    wire.noticed().await;
    wire.send(frame(GOAWAY, 0, 0, &[0, 0, 0, 1, 0, 0, 0, 0])).await;
    let _second = wire.open().await;
    assert_eq!(wire.connections(), 2);
}

#[tokio::test]
async fn there_are_not_more_tunnels_to_one_place_than_we_want() {
    let settings = Settings { pool_tunnels: 3, ..Settings::default() };
    let mut wire = Wire::with(settings, limit(1), Answers::All).await;
    let mut held = Vec::new();
    for _ in 0..3 {
        held.push(wire.open().await);
        wire.seen(|f| f.kind == SETTINGS && f.flags == ACK).await;
    }
    pause();
    let mut late = wire.ask(8);
    pass(11).await;
    let failures: Vec<_> = over(&mut late).into_iter().map(Result::unwrap_err).collect();
    assert_eq!(failures.len(), 8);
    for failure in failures {
        assert_eq!(
            failure.source.unwrap().to_string(),
            "all 3 tunnels to the far end are full, and there was no room for 10s"
        );
    }
    let mut next = wire.ask(1);
    pass(1).await;
    assert!(over(&mut next).is_empty());
    drop(held.pop());
    pass(1).await;
    assert!(over(&mut next).pop().unwrap().is_ok(), "one of them has room again");
    assert_eq!(wire.connections(), 3);
}

#[tokio::test]
async fn who_does_not_answer_is_not_waited_for_without_end() {
    let mut wire =
        Wire::with(Settings::default(), frame(SETTINGS, 0, 0, &[]), Answers::These(Vec::new()))
            .await;
    let mut outcomes = wire.ask(4);
    wire.noticed().await;
    pause();
    pass(59).await;
    assert!(over(&mut outcomes).is_empty(), "the application behind it may be slow");
    pass(2).await;
    let failures: Vec<_> = over(&mut outcomes).into_iter().map(Result::unwrap_err).collect();
    assert_eq!((failures.len(), wire.connections()), (4, 1));
    for failure in failures {
        assert_eq!((failure.side, failure.reason), (Side::Upstream, Reason::Connect));
        let why = "the far end has not answered the CONNECT for 60s";
        assert_eq!(failure.source.unwrap().to_string(), why);
    }
    assert_eq!(wire.world.pool.tunnels(), 1, "it lives, and may answer others");
}

/// Another status than 200 ends its stream and nothing else: the peer has decided, and is not asked again.
#[tokio::test]
async fn a_refusal_is_final_and_keeps_the_tunnel() {
    // `:status: 503`, with END_STREAM.
    let refusal = frame(HEADERS, 4 | 1, 1, &[8, 3, b'5', b'0', b'3']);
    let second = frame(HEADERS, 4, 3, &[0x88]);
    let mut wire = Wire::answering(vec![refusal, second]).await;
    let failure = within(wire.ask(1).pop().unwrap()).await.unwrap().unwrap_err();
    assert_eq!((failure.side, failure.reason), (Side::Upstream, Reason::Refused));
    assert_eq!(failure.source.unwrap().to_string(), "http status: 503 Service Unavailable");
    let reset = wire.seen(|f| f.kind == RST_STREAM).await;
    assert_eq!((reset.stream, reset.payload.as_slice()), (1, &CANCEL[..]));
    let _second = wire.open().await;
    assert_eq!((wire.connections(), wire.world.pool.tunnels()), (1, 1));
}

/// `REFUSED_STREAM` alone says that the peer has not looked at the request.
#[tokio::test]
async fn what_was_not_looked_at_is_asked_for_once_more_elsewhere() {
    for (code, connections) in [(REFUSED_STREAM, 2), (CANCEL, 1), ([0, 0, 0, 2], 1)] {
        let answers = vec![frame(HEADERS, 4, 1, &[0x88]), frame(RST_STREAM, 0, 3, &code)];
        let wire = Wire::answering(answers).await;
        let mut first = wire.open().await;
        let second = within(wire.ask(1).pop().unwrap()).await.unwrap();
        assert_eq!((second.is_ok(), wire.connections()), (connections == 2, connections));
        wire.send(frame(0, 1, 1, b"still")).await;
        assert!(
            matches!(next(&mut first.stream).await, Ok(Taken::Chunk(chunk)) if chunk == "still")
        );
    }
    // And not for ever: on a tunnel of its own the answer stands.
    let wire = Wire::answering(vec![frame(RST_STREAM, 0, 1, &REFUSED_STREAM)]).await;
    let failure = within(wire.ask(1).pop().unwrap()).await.unwrap().unwrap_err();
    assert_eq!((failure.reason, wire.connections()), (Reason::Http2, 1));
}
