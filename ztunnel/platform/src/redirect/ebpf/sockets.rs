//! The sockets of a captured pod (`spec/capture.md` §1.2 and §1.4), in the namespace of the thread.

use crate::{
    redirect::{Door, Listeners, SocketOptions},
    socket::{self, Connecting},
};
use mesh_ebpf_common::{MARK, MARK_LEAVING};
use socket2::{Domain, SockRef, Socket};
use std::{
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener},
    ops::RangeInclusive,
    sync::atomic::{AtomicU16, Ordering},
};

const BACKLOG: i32 = 4096;
/// Ports of connections in a client's name: outside every usual range of ephemeral ports. A client that
/// later picked the same port could not connect.
const PORTS: RangeInclusive<u16> = 10240..=32767;
const TRIES: usize = 64;

/// The packet mark of a process of this generation.
pub(super) const fn mark(generation: u32) -> u32 {
    MARK | (generation << 12)
}

/// All three listeners.
pub(super) fn listeners(options: &SocketOptions, generation: u32) -> io::Result<Listeners> {
    let open = |door: Door| {
        let listener = listener(generation, door.port())?;
        options.apply(&listener, door.is_probed())?;
        Ok::<_, io::Error>(listener)
    };
    Ok(Listeners {
        outbound: open(Door::Outbound)?,
        inbound: open(Door::Inbound)?,
        hbone: open(Door::Hbone)?,
    })
}

/// Another process's listeners, as ours from now on: what they accept bears our generation.
pub(super) fn inherit(listeners: Listeners, generation: u32) -> io::Result<Listeners> {
    for listener in [&listeners.outbound, &listeners.inbound, &listeners.hbone] {
        SockRef::from(listener).set_mark(mark(generation))?;
        listener.set_nonblocking(true)?;
    }
    Ok(listeners)
}

/// Nobody's address (TEST-NET-1): only the program leads to a listener there. One for all generations, so that
/// they are one `SO_REUSEPORT` group: where one dies, the kernel hands what waits for it to the next
/// (`tcp_migrate_req`). The program names the very socket that it means, whatever the group.
pub(super) const PHANTOM: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);

/// A listener for both families. Its address is IPv4-mapped: an IPv6 address would make it IPv6 only.
pub(super) fn listener(generation: u32, port: u16) -> io::Result<TcpListener> {
    let (socket, ip) = match socket::tcp(Domain::IPV6) {
        Ok(socket) => {
            socket.set_only_v6(false)?;
            socket::set_transparent(&socket, Domain::IPV6)?;
            (socket, IpAddr::from(PHANTOM.to_ipv6_mapped()))
        }
        Err(error) if error.raw_os_error() == Some(libc::EAFNOSUPPORT) => {
            let socket = socket::tcp(Domain::IPV4)?;
            socket::set_transparent(&socket, Domain::IPV4)?;
            (socket, PHANTOM.into())
        }
        Err(error) => return Err(error),
    };
    // Accepted sockets have it from here: an application may bind the port of a connection's destination.
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(true)?;
    socket.set_mark(mark(generation))?;
    match socket.bind(&SocketAddr::new(ip, port).into()) {
        // The application's own. The port means nothing to the program.
        Err(error) if error.raw_os_error() == Some(libc::EADDRINUSE) => {
            socket.bind(&SocketAddr::new(ip, 0).into())?;
        }
        result => result?,
    }
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

/// Begins a connection that skips capture, from `source` if one is given.
pub(super) fn marked(
    options: &SocketOptions,
    mark: u32,
    source: Option<IpAddr>,
    to: SocketAddr,
) -> io::Result<Connecting> {
    let socket = socket::tcp(Domain::for_address(to))?;
    socket.set_mark(mark)?;
    options.apply(&socket, true)?;
    if let Some(source) = source {
        socket.bind(&SocketAddr::new(source, 0).into())?;
    }
    socket::connect(socket, to)
}

/// Begins a connection to the application in a client's name.
pub(super) fn spoofed(
    options: &SocketOptions,
    leaving: bool,
    client: IpAddr,
    to: SocketAddr,
) -> io::Result<Connecting> {
    let mut outcome = Err(io::Error::from_raw_os_error(libc::EADDRNOTAVAIL));
    for _ in 0..TRIES {
        let socket = in_the_name_of(options, leaving, client, to);
        outcome = socket.and_then(|socket| socket::connect(socket, to));
        match &outcome {
            Err(error) if is_taken(error) => (),
            _ => break,
        }
    }
    outcome
}

/// The port is in use, alone or together with this destination.
fn is_taken(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EADDRINUSE | libc::EADDRNOTAVAIL))
}

fn in_the_name_of(
    options: &SocketOptions,
    leaving: bool,
    client: IpAddr,
    to: SocketAddr,
) -> io::Result<Socket> {
    let domain = Domain::for_address(to);
    let socket = socket::tcp(domain)?;
    // Without probes: it is on this machine, and cannot vanish without a word.
    options.apply(&socket, false)?;
    socket.set_reuse_address(true)?;
    socket::set_transparent(&socket, domain)?;
    // So that the program sees it arrive by lo. Unmarked: a marked one would skip the route there.
    socket.bind_device(Some(b"lo"))?;
    if leaving {
        // The application's socket is born with it, and stays with us by rule 97 when rule 100 is gone.
        socket.set_mark(MARK_LEAVING)?;
    }
    socket.bind(&SocketAddr::new(client, next_port()).into())?;
    Ok(socket)
}

/// Of all pods: a port is only short where one pod's connections meet.
fn next_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    // 2^16 is no multiple of the range's length: a wrap skips some ports, which is no harm.
    let step = NEXT.fetch_add(1, Ordering::Relaxed);
    let length = PORTS.end() - PORTS.start() + 1;
    PORTS.start() + step % length
}
