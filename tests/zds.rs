//! ZDS at the door: a node proxy, and us in the CNI agent's place, byte for byte (`spec/ztunnel.md` §8).

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::{
    fs,
    io::{ErrorKind, IoSlice, Read},
    net::SocketAddr,
    os::fd::{AsRawFd, BorrowedFd, RawFd},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::Duration,
};

use mesh_tests::{
    Lab, Mesh, Node, Pod, Proxy, Scene,
    netns::{self, Namespace},
    scene::{HTTP, TCP, web},
    wait::{self, SOON},
};
use nix::sys::socket::{ControlMessage, MsgFlags, UnixAddr, sendmsg};
use serde_json::Value;
use socket2::{Domain, SockAddr, Socket, Type};

const ACK: [u8; 2] = [0x0a, 0x00];
const SNAPSHOT: [u8; 2] = [0x1a, 0x00];

/// A field of protobuf that has a length: its tag, and what is in it.
fn field(tag: u8, value: &[u8]) -> Vec<u8> {
    let mut bytes = vec![tag];
    let mut length = value.len();
    while length >= 0x80 {
        bytes.push(u8::try_from(length & 0x7f).unwrap() | 0x80);
        length >>= 7;
    }
    bytes.push(u8::try_from(length).unwrap());
    bytes.extend(value);
    bytes
}

fn add(pod: &Pod) -> Vec<u8> {
    let who = [field(0x0a, pod.name().as_bytes()), field(0x12, b"lab"), field(0x1a, b"sa")];
    let info = field(0x12, &who.concat());
    field(0x0a, &[field(0x0a, pod.uid().as_bytes()), info].concat())
}

fn del(uid: &str) -> Vec<u8> {
    field(0x12, &field(0x12, uid.as_bytes()))
}

fn keep(uid: &str) -> Vec<u8> {
    field(0x2a, &field(0x0a, uid.as_bytes()))
}

/// The agent: listens, and does what the test says.
struct Agent {
    listener: Socket,
    path: PathBuf,
}

impl Agent {
    fn listen(path: &Path) -> Self {
        let _not_there = fs::remove_file(path);
        let listener = Socket::new(Domain::UNIX, Type::SEQPACKET, None).unwrap();
        listener.bind(&SockAddr::unix(path).unwrap()).unwrap();
        listener.listen(8).unwrap();
        listener.set_read_timeout(Some(SOON)).unwrap();
        Self { listener, path: path.to_owned() }
    }

    /// The next connection, as far as the hello.
    fn peer(&self) -> Peer {
        let (socket, _) = self.listener.accept().unwrap();
        socket.set_read_timeout(Some(SOON)).unwrap();
        let peer = Peer(socket);
        assert_eq!(peer.receive(), [0x08, 0x01], "the hello");
        peer
    }
}

/// A node proxy.
struct Peer(Socket);

impl Peer {
    /// A packet; nothing at the end.
    fn receive(&self) -> Vec<u8> {
        let mut packet = vec![0; 2048];
        let length = (&self.0).read(&mut packet).unwrap();
        packet.truncate(length);
        packet
    }

    fn send(&self, bytes: &[u8], fds: &[RawFd]) {
        let rights = [ControlMessage::ScmRights(fds)];
        let rights = if fds.is_empty() { &[] } else { rights.as_slice() };
        let (vector, flags) = ([IoSlice::new(bytes)], MsgFlags::MSG_NOSIGNAL);
        sendmsg::<UnixAddr>(self.0.as_raw_fd(), &vector, rights, flags, None).unwrap();
    }

    fn ask(&self, bytes: &[u8], fds: &[RawFd]) -> Vec<u8> {
        self.send(bytes, fds);
        self.receive()
    }

    fn add(&self, pod: &Pod) -> Vec<u8> {
        self.ask(&add(pod), &[pod.namespace().fd().as_raw_fd()])
    }

    fn say(&self, bytes: &[u8]) -> Vec<u8> {
        self.ask(bytes, &[])
    }

    /// Whether nothing but acks has come: the agent takes anything else for the end.
    fn is_silent(&self) -> bool {
        self.0.set_nonblocking(true).unwrap();
        let read = (&self.0).read(&mut [0]);
        self.0.set_nonblocking(false).unwrap();
        read.is_err_and(|why| why.kind() == ErrorKind::WouldBlock)
    }
}

/// The text of a refusal.
fn refusal(packet: &[u8]) -> String {
    let mut expected = field(0x0a, &field(0x0a, b"?"));
    expected.truncate(1);
    assert_eq!(packet.first(), expected.first(), "no ack: {packet:?}");
    let text = String::from_utf8_lossy(packet).into_owned();
    text.get(text.find("failure").unwrap()..).unwrap().to_owned()
}

/// A node, two pods on it, an agent, and a node proxy that has connected to it.
struct Door {
    agent: Agent,
    proxy: Proxy,
    one: Pod,
    two: Pod,
    node: Node,
    lab: Lab,
}

impl Door {
    fn open() -> (Self, Peer) {
        let lab = Lab::new().unwrap();
        lab.apply(&Mesh::default()).unwrap();
        let node = lab.node("a").unwrap();
        let (one, two) = (node.pod("one").unwrap(), node.pod("two").unwrap());
        let agent = Agent::listen(&lab.folder().join("agent.sock"));
        let proxy = begin(&node, &agent.path);
        let peer = agent.peer();
        (Self { agent, proxy, one, two, node, lab }, peer)
    }

    fn state(&self, pod: &Pod) -> Option<String> {
        let dump = self.proxy.config_dump().unwrap();
        let state = dump.get("workloadState")?.get(pod.uid())?.get("state")?.as_str()?.to_owned();
        Some(state)
    }

    fn count(&self, name: &str) -> f64 {
        self.proxy.metrics().unwrap().sum(name, &[])
    }

    fn is(&self, name: &str, expected: f64) {
        let is = || Ok(((self.count(name) - expected).abs() < 0.5).then_some(()));
        wait::until(&format!("{name} {expected}"), SOON, is).unwrap();
    }

    fn ready(&self, expected: bool) {
        let what = if expected { "ready" } else { "not ready" };
        wait::until(what, SOON, || {
            let answer = self.proxy.readiness()?;
            let says = answer.body.contains("workload proxy manager");
            Ok((if expected { answer.status == 200 } else { answer.status == 500 && says })
                .then_some(()))
        })
        .unwrap();
    }

    fn pins(&self, pod: &Pod) -> PathBuf {
        self.lab.folder().join("pins/a").join(pod.uid())
    }
}

fn begin(node: &Node, agent: &Path) -> Proxy {
    node.begin_proxy(&[("INPOD_UDS", agent.to_str().unwrap())]).unwrap()
}

const STARTED: &str = "workload_manager_proxies_started_total";
const STOPPED: &str = "workload_manager_proxies_stopped_total";
const PENDING: &str = "workload_manager_pending_proxy_count";

/// Our rules in a pod.
fn rules(namespace: &Namespace) -> usize {
    let listed = |family| {
        let words = ["-n", namespace.name(), "-N", family, "rule", "show"];
        let output = std::process::Command::new("ip").args(words).output().unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    let all = listed("-4") + &listed("-6");
    all.lines().filter(|line| line.contains("proto 137")).count()
}

fn unruled(namespace: &Namespace) {
    wait::until("no rules of ours", SOON, || Ok((rules(namespace) == 0).then_some(()))).unwrap();
}

#[test]
fn a_snapshot_and_what_follows() {
    let (door, peer) = Door::open();
    door.ready(false);
    assert_eq!(peer.add(&door.one), ACK);
    assert_eq!(peer.say(&keep("00000000-0000-4000-8000-00000000000f")), ACK);
    door.ready(false);
    assert_eq!(peer.say(&SNAPSHOT), ACK);
    door.ready(true);
    assert_eq!(peer.add(&door.two), ACK);
    assert_eq!(door.state(&door.two).as_deref(), Some("Up"));
    // Again, and nothing is started anew; nor is what nobody knows a fault.
    assert_eq!(peer.add(&door.two), ACK);
    assert_eq!(peer.say(&del("00000000-0000-4000-8000-00000000000e")), ACK);
    door.is(STARTED, 2.0);
    // The uid is in field 2 of Del, and in field 1 of Keep. In another place it is not there.
    let wrong = field(0x12, &field(0x0a, door.one.uid().as_bytes()));
    assert_eq!(peer.say(&wrong), ACK);
    assert_eq!(door.state(&door.one).as_deref(), Some("Up"));
    assert_eq!(peer.say(&del(&door.one.uid())), ACK);
    assert_eq!(door.state(&door.one), None);
    door.is(STOPPED, 1.0);
    unruled(door.one.namespace());
    assert!(!door.pins(&door.one).exists());
    // Opted in again.
    assert_eq!(peer.add(&door.one), ACK);
    assert_eq!(door.state(&door.one).as_deref(), Some("Up"));
    assert!(peer.is_silent());
}

#[test]
fn what_cannot_be_read_is_refused_and_the_connection_made_anew() {
    let (mut door, peer) = Door::open();
    assert_eq!((peer.add(&door.one), peer.say(&SNAPSHOT)), (ACK.into(), ACK.into()));
    let fds = |door: &mut Door| {
        let all = door.proxy.program().descriptors().unwrap();
        all.iter().filter(|target| target.starts_with("net:")).count()
    };
    let before = fds(&mut door);
    let netns = door.two.namespace().fd().as_raw_fd();
    let (known, long) = (add(&door.two), field(0x0a, &field(0x0a, &[b'u'; 1100])));
    let mut cut = known.clone();
    cut.truncate(known.len() - 4);
    let table: [(&str, &[u8], Vec<RawFd>); 9] = [
        ("garbage", &[0xff; 9], vec![]),
        ("garbage with a descriptor", &[0xff; 9], vec![netns]),
        ("a message cut short", &cut, vec![netns]),
        ("an unknown type", &[0x52, 0x00], vec![]),
        ("no descriptor", &known, vec![]),
        ("two descriptors", &known, vec![netns, netns]),
        ("forty descriptors", &known, vec![netns; 40]),
        ("a descriptor with the end of the snapshot", &SNAPSHOT, vec![netns]),
        ("a packet that is too long", &long, vec![]),
    ];
    let mut peer = peer;
    for (name, bytes, fds) in table {
        let answer = refusal(&peer.ask(bytes, &fds));
        assert!(answer.starts_with("failure to read message : "), "{name}: {answer}");
        assert!(peer.receive().is_empty(), "{name}: the end");
        peer = door.agent.peer();
        door.ready(false);
        assert_eq!(peer.say(&keep(&door.one.uid())), ACK, "{name}");
        assert_eq!(peer.say(&SNAPSHOT), ACK, "{name}");
        door.ready(true);
        assert_eq!(door.state(&door.one).as_deref(), Some("Up"), "{name}");
        assert_eq!(door.state(&door.two), None, "{name}");
    }
    wait::until("every descriptor closed", SOON, || Ok((fds(&mut door) <= before).then_some(())))
        .unwrap();
    // None of it has touched the pod.
    door.is(STARTED, 1.0);
    door.is(STOPPED, 0.0);
}

#[test]
fn what_breaks_the_protocol_ends_the_process_and_not_the_capture() {
    let (mut door, mut peer) = Door::open();
    let anonymous = field(0x0a, &field(0x0a, door.two.uid().as_bytes()));
    let netns = door.two.namespace().fd().as_raw_fd();
    let table: [(&str, Vec<u8>, Vec<RawFd>); 3] = [
        ("an Add without its pod", anonymous, vec![netns]),
        ("Keep after the snapshot", keep(&door.one.uid()), vec![]),
        ("two snapshots", SNAPSHOT.into(), vec![]),
    ];
    for (name, bytes, fds) in table {
        assert_eq!((peer.add(&door.one), peer.say(&SNAPSHOT)), (ACK.into(), ACK.into()), "{name}");
        let answer = refusal(&peer.ask(&bytes, &fds));
        assert!(answer.starts_with("failure to process message : "), "{name}: {answer}");
        assert!(peer.receive().is_empty(), "{name}: the end");
        assert_eq!(door.proxy.program().wait(SOON).unwrap(), 1, "{name}");
        assert!(door.pins(&door.one).exists() && rules(door.one.namespace()) > 0, "{name}");
        door.proxy = begin(&door.node, &door.agent.path);
        peer = door.agent.peer();
    }
}

#[test]
fn what_cannot_be_served_for_ever_is_refused_and_not_pending() {
    let (door, peer) = Door::open();
    assert_eq!(peer.say(&SNAPSHOT), ACK);
    let file = fs::File::open("/proc/self/status").unwrap();
    let mount = fs::File::open("/proc/self/ns/mnt").unwrap();
    for fd in [file.as_raw_fd(), mount.as_raw_fd()] {
        let answer = refusal(&peer.ask(&add(&door.one), &[fd]));
        assert!(answer.starts_with("failure to start proxy : "), "{answer}");
    }
    // A pod that nobody could name.
    let who = [field(0x0a, b"p"), field(0x12, b"not a namespace"), field(0x1a, b"sa")].concat();
    let nobody = field(0x0a, &[field(0x0a, b"u"), field(0x12, &who)].concat());
    let answer = refusal(&peer.ask(&nobody, &[door.one.namespace().fd().as_raw_fd()]));
    assert!(answer.starts_with("failure to start proxy : "), "{answer}");
    door.ready(true);
    door.is(PENDING, 0.0);
    assert_eq!(peer.add(&door.one), ACK, "the connection is as it was");
    assert!(peer.is_silent());
}

#[test]
fn what_cannot_be_served_yet_is_tried_again_until_it_is_deleted() {
    let (door, peer) = Door::open();
    let chain = |pod: &Pod, how: &str| {
        pod.run(["iptables", "-t", "nat", how, "ISTIO_OUTPUT"]).unwrap().ok().unwrap();
    };
    for pod in [&door.one, &door.two] {
        chain(pod, "-N");
        let answer = refusal(&peer.add(pod));
        assert!(answer.starts_with("failure to start proxy : "), "{answer}");
        assert!(answer.contains("ISTIO_OUTPUT"), "{answer}");
    }
    assert_eq!(peer.say(&SNAPSHOT), ACK);
    door.ready(false);
    door.is(PENDING, 2.0);
    assert_eq!(peer.say(&del(&door.one.uid())), ACK);
    door.is(PENDING, 1.0);
    assert_eq!(door.state(&door.one), None);
    for pod in [&door.one, &door.two] {
        chain(pod, "-X");
    }
    // The retry takes what is pending, without a word to the agent, and not what was deleted.
    door.ready(true);
    assert_eq!(door.state(&door.two).as_deref(), Some("Up"));
    assert_eq!((door.state(&door.one), rules(door.one.namespace())), (None, 0));
    door.is(STARTED, 1.0);
    assert!(peer.is_silent());
}

#[test]
fn a_pod_in_another_namespace_is_started_anew() {
    let (door, peer) = Door::open();
    assert_eq!((peer.add(&door.one), peer.say(&SNAPSHOT)), (ACK.into(), ACK.into()));
    // Its sandbox was made anew: the same uid, elsewhere.
    assert_eq!(peer.ask(&add(&door.one), &[door.two.namespace().fd().as_raw_fd()]), ACK);
    door.is(STARTED, 2.0);
    door.is(STOPPED, 1.0);
    unruled(door.one.namespace());
    assert!(rules(door.two.namespace()) > 0);
    assert!(door.pins(&door.one).exists());
}

#[test]
fn a_number_of_a_namespace_that_is_used_again_is_another_namespace() {
    let (mut door, mut peer) = Door::open();
    assert_eq!(peer.say(&SNAPSHOT), ACK);
    let pod = door.node.pod("reused").unwrap();
    let (name, uid) = (pod.namespace().name().to_owned(), pod.uid());
    let inode = |namespace: BorrowedFd<'_>| {
        fs::metadata(format!("/proc/self/fd/{}", namespace.as_raw_fd())).unwrap().ino()
    };
    let first = inode(pod.namespace().fd());
    assert_eq!(peer.add(&pod), ACK);
    let packet = add(&pod);
    // The proxy dies, and then the pod; what it pinned knows the number.
    drop(door.proxy);
    drop(peer);
    netns::remove(&name);
    drop(pod);
    // The kernel hands out the lowest number that is free, to whoever asks: to us, if nobody else is quicker.
    let mut others = Vec::new();
    let again = loop {
        let again = Namespace::create(&name).unwrap();
        if inode(again.fd()) == first || others.len() == 40 {
            break again;
        }
        netns::remove(&name);
        others.push(again);
        // It takes a namespace apart on a thread of its own.
        wait::pause(Duration::from_millis(50));
    };
    door.proxy = begin(&door.node, &door.agent.path);
    peer = door.agent.peer();
    assert_eq!(peer.ask(&packet, &[again.fd().as_raw_fd()]), ACK);
    assert_eq!(peer.say(&SNAPSHOT), ACK);
    assert!(rules(&again) > 0);
    // Captured by a program that is attached here: what it dials is taken, and not let go.
    let link = door.lab.folder().join("pins/a").join(&uid).join("link");
    assert!(link.exists());
    assert_eq!(peer.say(&del(&uid)), ACK);
    unruled(&again);
    assert!(!link.exists());
}

#[test]
fn an_agent_that_comes_back_finds_what_it_left() {
    let (mut door, peer) = Door::open();
    let three = door.node.pod("three").unwrap();
    for pod in [&door.one, &door.two, &three] {
        assert_eq!(peer.add(pod), ACK);
    }
    assert_eq!(peer.say(&SNAPSHOT), ACK);
    door.ready(true);
    // It goes, with its socket, and is away for some attempts.
    drop(peer);
    let path = door.agent.path.clone();
    door.agent = Agent::listen(&path.with_extension("elsewhere"));
    fs::remove_file(&path).unwrap();
    door.ready(false);
    assert_eq!(door.state(&door.one).as_deref(), Some("Up"));
    wait::until("attempts", SOON, || {
        let log = fs::read_to_string(door.lab.folder().join("a.log")).unwrap_or_default();
        Ok((log.matches("no connection to the CNI agent").count() >= 3).then_some(()))
    })
    .unwrap();
    door.agent = Agent::listen(&path);
    let peer = door.agent.peer();
    assert_eq!(peer.add(&door.one), ACK);
    assert_eq!(peer.say(&keep(&door.two.uid())), ACK);
    // Named, and taken back before the end.
    assert_eq!(peer.add(&three), ACK);
    assert_eq!(peer.say(&del(&three.uid())), ACK);
    assert_eq!(door.state(&three).as_deref(), Some("Up"), "until the snapshot is complete");
    assert_eq!(peer.say(&SNAPSHOT), ACK);
    door.ready(true);
    assert_eq!(door.state(&door.one).as_deref(), Some("Up"));
    assert_eq!(door.state(&door.two).as_deref(), Some("Up"));
    assert_eq!(door.state(&three), None);
    unruled(three.namespace());
    door.is(STARTED, 3.0);
    door.is(STOPPED, 1.0);
}

#[test]
fn what_an_earlier_process_captured_goes_by_the_snapshot_or_by_del() {
    let (mut door, peer) = Door::open();
    let three = door.node.pod("three").unwrap();
    for pod in [&door.one, &door.two, &three] {
        assert_eq!(peer.add(pod), ACK);
    }
    assert_eq!(peer.say(&SNAPSHOT), ACK);
    drop((door.proxy, peer));
    door.proxy = begin(&door.node, &door.agent.path);
    let peer = door.agent.peer();
    assert_eq!(peer.add(&door.one), ACK);
    assert_eq!(peer.say(&keep(&door.two.uid())), ACK);
    assert_eq!(peer.say(&SNAPSHOT), ACK);
    door.ready(true);
    assert!(door.pins(&door.one).exists());
    // Nobody serves it, and it is closed, and not open.
    assert!(door.pins(&door.two).exists() && rules(door.two.namespace()) > 0);
    assert!(!door.pins(&three).exists());
    unruled(three.namespace());
    assert_eq!(peer.say(&del(&door.two.uid())), ACK);
    assert!(!door.pins(&door.two).exists());
    unruled(door.two.namespace());
}

/// The state of a pod in a dump.
fn state(dump: &Value, pod: &Pod) -> Option<String> {
    Some(dump.get("workloadState")?.get(pod.uid())?.get("state")?.as_str()?.to_owned())
}

#[test]
fn two_node_proxies_during_an_upgrade() {
    let scene = Scene::start(&[]).unwrap();
    scene.ask_until(&scene.client, web(80)[0]).unwrap();
    let mut old = scene.a.succeed_proxy(&[]).unwrap();
    assert_eq!(scene.a.zds().complaint(), None);
    let up = |proxy: &Proxy, pod: &Pod| {
        state(&proxy.config_dump().unwrap(), pod).as_deref() == Some("Up")
    };
    let new_up = |pod: &Pod| scene.a.with_proxy(|new| Ok(up(new, pod))).unwrap();
    assert!(up(&old, &scene.client) && new_up(&scene.client));
    // What is new is the newest's.
    let late = scene.a.pod("late").unwrap();
    scene.a.enrol(&late, "late").unwrap();
    assert!(new_up(&late) && !up(&old, &late));
    // What goes, goes from both, and the one that does not have the capture leaves it alone.
    scene.a.release(&late).unwrap();
    assert!(!new_up(&late));
    unruled(late.namespace());
    scene.a.release(&scene.client).unwrap();
    assert!(!up(&old, &scene.client) && !new_up(&scene.client));
    let direct = SocketAddr::new(scene.outsider.v4(), HTTP);
    wait::retry("a direct connection", SOON, || scene.ask(&scene.client, direct)).unwrap();
    // Back in, by the new one alone; the old one goes without a trace.
    scene.a.enrol(&scene.client, "client").unwrap();
    assert!(!up(&old, &scene.client) && new_up(&scene.client));
    assert_eq!(old.terminate(SOON).unwrap(), 0);
    scene.ask_until(&scene.client, web(80)[1]).unwrap();
    let open = scene.client.tcp(web(TCP)[0], &["echo", "still"]).unwrap();
    assert!(open.is_ok(), "{}{}", open.out, open.err);
}
