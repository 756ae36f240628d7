//! The DNS sockets of a captured pod, which the program steers to (`spec/capture.md` §1.7), in the namespace of
//! the thread.

use super::sockets;
use crate::{
    redirect::{Dns, DnsSockets, Queries, SocketOptions, dns::udp},
    socket,
};
use socket2::{Domain, SockRef, Socket};
use std::{
    io,
    net::{IpAddr, SocketAddr},
};

/// One for connections and one for datagrams, for both families.
pub(super) fn open(options: &SocketOptions, generation: u32, port: u16) -> io::Result<Dns> {
    let tcp = sockets::listener(generation, port)?;
    options.apply(&tcp, true)?;
    let (socket, v6) = match udp(Domain::IPV6) {
        Ok(socket) => {
            socket.set_only_v6(false)?;
            (socket, true)
        }
        Err(error) if error.raw_os_error() == Some(libc::EAFNOSUPPORT) => {
            (udp(Domain::IPV4)?, false)
        }
        Err(error) => return Err(error),
    };
    bind(&socket, v6, generation, port)?;
    Ok(Dns { tcp: vec![tcp], udp: vec![Queries::steered(socket, v6)?] })
}

/// Another process's, as ours from now on: what they accept and send bears our generation.
pub(super) fn inherit(sockets: DnsSockets, generation: u32) -> io::Result<Dns> {
    let mark = |socket: &SockRef<'_>| socket.set_mark(sockets::mark(generation));
    let steered = |socket: Socket| {
        let v6 = socket.domain()? == Domain::IPV6;
        Queries::steered(socket, v6)
    };
    sockets.adopt(mark, steered)
}

/// As [`sockets::listener`] does.
fn bind(socket: &Socket, v6: bool, generation: u32, port: u16) -> io::Result<()> {
    let domain = if v6 { Domain::IPV6 } else { Domain::IPV4 };
    socket::set_transparent(socket, domain)?;
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(true)?;
    socket.set_mark(sockets::mark(generation))?;
    let ip: IpAddr =
        if v6 { sockets::PHANTOM.to_ipv6_mapped().into() } else { sockets::PHANTOM.into() };
    match socket.bind(&SocketAddr::new(ip, port).into()) {
        Err(error) if error.raw_os_error() == Some(libc::EADDRINUSE) => {
            socket.bind(&SocketAddr::new(ip, 0).into())
        }
        result => result,
    }
}
