//! Two namespaces, a veth, and sockets that block, but not for ever.

use super::super::sysctls::Found;
use crate::{netns::Netns, socket::Connecting};
use nix::mount::{MntFlags, umount2};
use socket2::{Domain, SockRef, Socket, Type};
use std::{
    io::{self, Read, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream},
    path::PathBuf,
    process::{Command, Stdio},
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

/// What should happen happens by then.
const SOON: Duration = Duration::from_secs(5);
/// What should not has not happened by then.
pub(super) const NEVER: Duration = Duration::from_millis(300);

/// The addresses of a family.
#[derive(Clone, Copy, Debug)]
pub(super) struct Family {
    pub(super) pod: IpAddr,
    pub(super) peer: IpAddr,
    pub(super) any: IpAddr,
}

pub(super) const FAMILIES: [Family; 2] = [
    Family {
        pod: IpAddr::V4(Ipv4Addr::new(10, 1, 0, 2)),
        peer: IpAddr::V4(Ipv4Addr::new(10, 1, 0, 1)),
        any: IpAddr::V4(Ipv4Addr::UNSPECIFIED),
    },
    Family {
        pod: IpAddr::V6(Ipv6Addr::new(0xfd01, 0, 0, 0, 0, 0, 0, 2)),
        peer: IpAddr::V6(Ipv6Addr::new(0xfd01, 0, 0, 0, 0, 0, 0, 1)),
        any: IpAddr::V6(Ipv6Addr::UNSPECIFIED),
    },
];

/// A pod and a peer. Gone when dropped.
pub(super) struct Lab {
    pub(super) pod: Netns,
    pub(super) peer: Netns,
    tag: String,
    folder: tempfile::TempDir,
}

impl Lab {
    pub(super) fn new(tag: &str) -> Self {
        let tag = format!("plt-{tag}-{}", std::process::id());
        for side in ["pod", "peer"] {
            run(&format!("ip netns add {tag}-{side}"));
            run(&format!("ip -n {tag}-{side} link set lo up"));
        }
        let open = |side: &str| Netns::open(format!("/run/netns/{tag}-{side}")).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let lab = Self { pod: open("pod"), peer: open("peer"), tag, folder };
        lab.join("eth0");
        for Family { pod, peer, .. } in FAMILIES {
            let length = if pod.is_ipv4() { 24 } else { 64 };
            lab.ip("pod", &format!("addr add {pod}/{length} dev eth0 nodad"), pod.is_ipv6());
            lab.ip("peer", &format!("addr add {peer}/{length} dev eth0 nodad"), pod.is_ipv6());
        }
        lab
    }

    /// One more veth between them.
    pub(super) fn join(&self, device: &str) {
        let tag = &self.tag;
        run(&format!(
            "ip -n {tag}-pod link add {device} type veth peer name {device} netns {tag}-peer"
        ));
        for side in ["pod", "peer"] {
            run(&format!("ip -n {tag}-{side} link set {device} up"));
        }
    }

    /// Runs `ip` in a namespace.
    pub(super) fn ip(&self, side: &str, command: &str, six: bool) {
        let family = if six { "-6" } else { "-4" };
        // Of IPv6 addresses only.
        let command = if six { command.to_owned() } else { command.replace(" nodad", "") };
        run(&format!("ip {family} -n {}-{side} {command}", self.tag));
    }

    /// Runs a command in a namespace.
    pub(super) fn exec(&self, side: &str, command: &str) {
        run(&format!("ip netns exec {}-{side} {command}", self.tag));
    }

    /// A folder for pins.
    pub(super) fn pins(&self) -> PathBuf {
        self.folder.path().join("pins")
    }

    /// What of ours is left in the pod.
    pub(super) fn traces(&self) -> String {
        let tag = &self.tag;
        let mut left = String::new();
        for family in ["-4", "-6"] {
            for list in ["rule show", "route show table all"] {
                let all = run(&format!("ip -N {family} -n {tag}-pod {list}"));
                left.extend(
                    all.lines()
                        .filter(|line| line.contains("proto 137"))
                        .map(|line| format!("{line}\n")),
                );
            }
        }
        left
    }
}

impl Lab {
    /// What capture may change of the pod, as it is now.
    pub(super) fn sysctls(&self) -> [u32; 4] {
        let word = self.pod.run(Found::here).unwrap().word();
        [0, 1, 2, 3].map(|bit| word >> bit & 1)
    }
}

/// Waits for it.
pub(super) fn until(mut is: impl FnMut() -> bool) {
    let began = tokio::time::Instant::now();
    while !is() {
        assert!(began.elapsed() < SOON, "waited in vain");
        std::thread::yield_now();
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        // Fails where nothing was mounted.
        let _ = umount2(&self.pins(), MntFlags::MNT_DETACH);
        for side in ["pod", "peer"] {
            run(&format!("ip netns del {}-{side}", self.tag));
        }
    }
}

/// Held while a process is made: until it runs its program it holds all that this process has open.
fn forking() -> MutexGuard<'static, ()> {
    static FORKING: Mutex<()> = Mutex::new(());
    FORKING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Drops it, so that it is really closed: no child of another test holds it a moment longer.
pub(super) fn close<T>(it: T) {
    let _guard = forking();
    drop(it);
}

fn run(command: &str) -> String {
    let mut words = command.split_whitespace();
    let mut program = Command::new(words.next().unwrap());
    program.args(words).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let guard = forking();
    let child = program.spawn().unwrap();
    drop(guard);
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

pub(super) fn listen(netns: &Netns, at: SocketAddr) -> TcpListener {
    let open = || {
        let socket = Socket::new(Domain::for_address(at), Type::STREAM, None)?;
        socket.set_reuse_address(true)?;
        if at.is_ipv6() {
            // Beside one of the other family, unless that is what the test is about.
            socket.set_only_v6(at.port() < 15000)?;
        }
        socket.bind(&at.into())?;
        socket.listen(16)?;
        Ok::<_, io::Error>(socket.into())
    };
    netns.run(open).unwrap().unwrap()
}

/// Connects from a namespace, from a device if one is given.
pub(super) fn dial(netns: &Netns, device: Option<&str>, to: SocketAddr) -> io::Result<TcpStream> {
    // Longer than it takes to send a lost SYN again: a new veth may lose the first.
    connect(netns, device, None, to, SOON)
}

/// As [`dial`], where nobody is expected to answer.
pub(super) fn dial_in_vain(netns: &Netns, to: SocketAddr) -> io::Result<TcpStream> {
    connect(netns, None, None, to, Duration::from_millis(900))
}

/// Connects from an address.
pub(super) fn dial_from(netns: &Netns, from: IpAddr, to: SocketAddr) -> io::Result<TcpStream> {
    connect(netns, None, Some(from), to, SOON)
}

fn connect(
    netns: &Netns,
    device: Option<&str>,
    from: Option<IpAddr>,
    to: SocketAddr,
    limit: Duration,
) -> io::Result<TcpStream> {
    let open = || {
        let socket = Socket::new(Domain::for_address(to), Type::STREAM, None)?;
        socket.bind_device(device.map(str::as_bytes))?;
        if let Some(from) = from {
            socket.bind(&SocketAddr::new(from, 0).into())?;
        }
        socket.connect_timeout(&to.into(), limit)?;
        Ok(socket.into())
    };
    netns.run(open)?
}

pub(super) fn accept(listener: &TcpListener) -> (TcpStream, SocketAddr) {
    listener.set_nonblocking(false).unwrap();
    SockRef::from(listener).set_read_timeout(Some(SOON)).unwrap();
    listener.accept().unwrap()
}

/// Whether nobody has come.
pub(super) fn accept_none(listener: &TcpListener) -> bool {
    listener.set_nonblocking(false).unwrap();
    SockRef::from(listener).set_read_timeout(Some(NEVER)).unwrap();
    listener.accept().is_err()
}

/// What one end writes the other reads.
pub(super) fn echo(mut from: &TcpStream, mut to: &TcpStream) {
    from.write_all(b"mesh").unwrap();
    to.set_read_timeout(Some(SOON)).unwrap();
    let mut read = [0; 4];
    to.read_exact(&mut read).unwrap();
    assert_eq!(&read, b"mesh");
}

pub(super) fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

/// Waits until it is established.
pub(super) fn finish(connecting: Connecting) -> io::Result<TcpStream> {
    let limit = async { tokio::time::timeout(SOON, connecting.established_std()).await };
    let stream = runtime().block_on(limit)??;
    stream.set_nonblocking(false)?;
    Ok(stream)
}
