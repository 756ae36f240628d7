//! What a peer with a certificate may try with HTTP/2: each attempt is bounded, and the others are served
//! all the while.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::{fs, net::SocketAddr, time::Duration};

use mesh_tests::{
    Node, Scene,
    ca::Issued,
    frames::{END_HEADERS, Flood, Frames, connect, frame, header, kind},
    hbone::{Dial, Tunnel},
    scene::HTTP,
};

const SILENCE: Duration = Duration::from_secs(2);

/// More than this, and the attempt has cost the node proxy memory: MiB.
const BOUND: u64 = 24;

struct World {
    scene: Scene,
    certificate: Issued,
}

impl World {
    fn new() -> Self {
        let scene = Scene::start(&[]).unwrap();
        let certificate = scene.certificate("client").unwrap();
        let world = Self { scene, certificate };
        world.serves();
        world
    }

    fn open(&self) -> Frames {
        Frames::open(&self.dial()).unwrap()
    }

    fn dial(&self) -> Dial<'_> {
        Dial::new(self.scene.outsider.namespace(), self.scene.tunnel(), &self.certificate)
    }

    fn authority(&self) -> String {
        format!("{}:{HTTP}", self.scene.server.v4())
    }

    /// Another peer is served.
    fn serves(&self) {
        let mut tunnel = Tunnel::open(&self.dial()).unwrap();
        assert_eq!(tunnel.connect(&self.authority(), &[]).unwrap().status, 200);
    }

    /// MiB that the server's node proxy has in memory.
    fn memory(&self) -> u64 {
        memory(&self.scene.b)
    }

    /// Does it, and looks at memory and service after.
    fn bounded(&self, attempt: impl FnOnce(&mut Frames)) {
        let before = self.memory();
        let mut frames = self.open();
        attempt(&mut frames);
        let grown = self.memory().saturating_sub(before);
        assert!(grown <= BOUND, "{grown} MiB more than the {before} before");
        self.serves();
    }
}

/// MiB that a node's proxy has in memory.
fn memory(node: &Node) -> u64 {
    let pid = node.with_proxy(|proxy| Ok(proxy.program().id())).unwrap();
    let pages = fs::read_to_string(format!("/proc/{pid}/statm")).unwrap();
    pages.split(' ').nth(1).unwrap().parse::<u64>().unwrap() * 4 / 1024
}

#[test]
fn endless_continuation() {
    let world = World::new();
    world.bounded(|frames| {
        frames.write(&frame(kind::HEADERS, 0, 1, &connect(&world.authority()))).unwrap();
        let more = frame(kind::CONTINUATION, 0, 1, &header("x", &"y".repeat(100)).repeat(100));
        // 200 MB of header, were it let.
        let cut = (0..20_000).any(|_| frames.write(&more).is_err());
        assert!(cut || frames.read(SILENCE).closed, "it took them all");
    });
}

#[test]
fn tiny_continuations() {
    let world = World::new();
    world.bounded(|frames| {
        frames.write(&frame(kind::HEADERS, 0, 1, &connect(&world.authority()))).unwrap();
        let more = frame(kind::CONTINUATION, 0, 1, &[]).repeat(1000);
        let cut = (0..1000).any(|_| frames.write(&more).is_err());
        assert!(cut || frames.read(SILENCE).closed, "it took a million of them");
    });
}

/// A hundred thousand requests, each with a frame behind it that ends its stream. Served or cut off: what matters is
/// what it costs.
fn opened_and_ended(end: impl Fn(u32) -> Vec<u8>) {
    let world = World::new();
    world.bounded(|frames| {
        let block = connect(&world.authority());
        let cut = (1..200_000).step_by(2).any(|stream| {
            let request = frame(kind::HEADERS, END_HEADERS, stream, &block);
            frames.write(&[request, end(stream)].concat()).is_err()
        });
        let answer = frames.read(SILENCE);
        assert!(cut || answer.closed, "a hundred thousand resets were let pass: {answer:?}");
    });
}

#[test]
fn rapid_reset() {
    opened_and_ended(|stream| frame(kind::RST_STREAM, 0, stream, &8_u32.to_be_bytes()));
}

/// The client resets nothing: each frame is an error of its stream, so that the server does (CVE-2025-8671).
#[test]
fn resets_that_the_server_is_made_to_send() {
    // A window that grows by nothing.
    opened_and_ended(|stream| frame(kind::WINDOW_UPDATE, 0, stream, &[0; 4]));
}

/// A few bytes that stand for many: a header is learnt once, and then named again and again.
#[test]
fn headers_that_unfold() {
    let world = World::new();
    world.bounded(|frames| {
        // With indexing: a name of one byte, and a value of 4000.
        let mut learnt = vec![0x40, 1, b'x', 0x7f, 0xa1, 0x1e];
        learnt.extend(vec![b'y'; 4000]);
        let named = vec![0x80 | 62; 12_000];
        // 48 MB each.
        for stream in (1..40).step_by(2) {
            let block = [connect(&world.authority()), learnt.clone(), named.clone()].concat();
            if frames.write(&frame(kind::HEADERS, END_HEADERS, stream, &block)).is_err() {
                return;
            }
        }
        let answer = frames.read(SILENCE);
        let refused = |kind| answer.frames.iter().filter(|frame| **frame == kind).count();
        let all = refused(kind::RST_STREAM).max(refused(kind::HEADERS));
        assert!(answer.closed || all == 20, "{answer:?}");
    });
}

#[test]
fn large_headers() {
    let world = World::new();
    world.bounded(|frames| {
        let mut block = connect(&world.authority());
        for n in 0..1000 {
            block.extend(header(&format!("x{n}"), &"y".repeat(100)));
        }
        let mut parts = block.chunks(16 << 10).peekable();
        let first = parts.next().unwrap();
        frames.write(&frame(kind::HEADERS, 0, 1, first)).unwrap();
        while let Some(part) = parts.next() {
            let flags = if parts.peek().is_none() { END_HEADERS } else { 0 };
            if frames.write(&frame(kind::CONTINUATION, flags, 1, part)).is_err() {
                return;
            }
        }
        // Answered by an error on the stream or the end of the connection, and not by a tunnel.
        let answer = frames.read(SILENCE);
        let refused = answer.frames.contains(&kind::RST_STREAM)
            || answer.frames.contains(&kind::HEADERS)
            || answer.closed;
        assert!(refused, "{answer:?}");
    });
}

#[test]
fn pings_without_end() {
    let world = World::new();
    world.bounded(|frames| {
        let pings = frame(kind::PING, 0, 0, &[7; 8]).repeat(1000);
        // Nothing is read back: 34 MB of answers are not kept for us. It may stop reading, or close.
        for _ in 0..2000 {
            if frames.write(&pings).is_err() {
                break;
            }
        }
    });
}

#[test]
fn settings_without_end() {
    let world = World::new();
    world.bounded(|frames| {
        let settings = frame(kind::SETTINGS, 0, 0, &[0, 4, 0, 1, 0, 0]).repeat(1000);
        for _ in 0..2000 {
            if frames.write(&settings).is_err() {
                break;
            }
        }
    });
}

#[test]
fn many_streams() {
    let world = World::new();
    world.bounded(|frames| {
        let block = connect(&world.authority());
        for stream in (1..2000).step_by(2) {
            let request = frame(kind::HEADERS, END_HEADERS, stream, &block);
            if frames.write(&request).is_err() {
                return;
            }
        }
        let answer = frames.read(SILENCE);
        let refused = answer.frames.iter().filter(|kind| **kind == kind::RST_STREAM).count();
        assert!(refused >= 800 || answer.closed, "{refused} of 1000 refused");
    });
}

#[test]
fn nonsense() {
    let world = World::new();
    for bytes in [
        b"GET / HTTP/1.1\r\n\r\n".to_vec(),
        frame(kind::DATA, 0, 1, b"before any stream"),
        frame(kind::CONTINUATION, 0, 1, b"of nothing"),
        frame(kind::HEADERS, END_HEADERS, 2, &connect("10.0.0.1:1")),
        frame(kind::HEADERS, END_HEADERS, 1, &[0xff; 40]),
        vec![0xff; 4096],
    ] {
        world.bounded(|frames| {
            let answer =
                if frames.write(&bytes).is_err() { None } else { Some(frames.read(SILENCE)) };
            let over = answer.is_none_or(|a| a.closed || a.goaway.is_some_and(|code| code != 0));
            assert!(over, "{bytes:?} was borne");
        });
    }
}

/// The other way round: what a server may answer to our node proxy.
#[test]
fn a_server_that_floods() {
    let mut scene = Scene::start(&[]).unwrap();
    let hand = scene.b.pod("hand").unwrap();
    scene.lab.settle(&[&hand]).unwrap();
    scene.mesh.workload(&hand, "hand");
    scene.apply().unwrap();
    scene
        .a
        .with_proxy(|proxy| proxy.wait_dump("hand", |d| d.to_string().contains("/hand")))
        .unwrap();
    let many = |name: &str| header(name, &"y".repeat(100)).repeat(100);
    let answers = vec![
        (frame(kind::HEADERS, 0, 1, &[0x88]), frame(kind::CONTINUATION, 0, 1, &many("x")), 20_000),
        (
            frame(kind::HEADERS, 0, 1, &[0x88]),
            frame(kind::CONTINUATION, 0, 1, &[]).repeat(1000),
            1000,
        ),
        (Vec::new(), frame(kind::HEADERS, END_HEADERS, 1, &[0xff; 40]), 1000),
        (Vec::new(), frame(kind::RST_STREAM, 0, 3, &[0, 0, 0, 8]).repeat(1000), 1000),
        (Vec::new(), frame(kind::GOAWAY, 0, 0, &[0, 0, 0, 0, 0, 0, 0, 11]).repeat(1000), 1000),
    ];
    let attempts = answers.len();
    let issued = scene.certificate("hand").unwrap();
    let flood = Flood::start(hand.namespace(), &issued, answers).unwrap();
    let server = scene.server_at(HTTP)[0];
    scene.ask_until(&scene.client, server).unwrap();
    let before = memory(&scene.a);
    for nth in 1..=attempts {
        let mark = scene.a.with_proxy(|proxy| Ok(proxy.log().mark())).unwrap();
        let got = scene.client.tcp(SocketAddr::new(hand.v4(), 80), &["echo", "x"]).unwrap();
        assert!(!got.is_ok(), "{nth}: {}", got.out);
        let told = |proxy: &mut mesh_tests::Proxy| {
            proxy.wait_access(mark, "the end", |line| line.field("error").contains("h2 failed"))
        };
        scene.a.with_proxy(told).unwrap();
        scene.ask(&scene.client, server).unwrap();
    }
    let flag = [("response_flags", "H2_HANDSHAKE_FAILURE"), ("reporter", "source")];
    let metrics = scene.a.with_proxy(|proxy| proxy.metrics()).unwrap();
    let failed = metrics.sum("istio_tcp_connections_failed_total", &flag);
    assert!(failed + 0.5 > attempts as f64, "{failed} of {attempts}");
    let grown = memory(&scene.a).saturating_sub(before);
    assert!(grown <= BOUND, "{grown} MiB more than the {before} before");
    // Of 200 MB and more.
    assert!(flood.sent() < 32 << 20, "it took {} bytes", flood.sent());
}
