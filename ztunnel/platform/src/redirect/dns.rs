//! The sockets of a pod's DNS proxy. What is asked by UDP is answered from the address that was asked.

mod conntrack;
mod raw;

use crate::socket;
use conntrack::Conntrack;
use nix::{
    cmsg_space,
    sys::socket::{
        ControlMessageOwned, MsgFlags, SockaddrStorage, recvmsg, setsockopt,
        sockopt::{Ipv4OrigDstAddr, Ipv6OrigDstAddr},
    },
};
use raw::Raw;
use socket2::{Domain, Protocol, SockRef, Socket, Type};
use std::{
    io::{self, IoSliceMut},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6, TcpListener},
    os::fd::{AsRawFd, RawFd},
};
use tokio::{io::Interest, net::UdpSocket};

/// Where the DNS proxy of a pod listens under redirection that is somebody else's.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum DnsAddress {
    /// On the loopback addresses, `::1` where there is one.
    Localhost(u16),
    /// Here and nowhere else.
    At(SocketAddr),
}

impl DnsAddress {
    /// Its port.
    #[must_use]
    pub const fn port(self) -> u16 {
        match self {
            Self::Localhost(port) => port,
            Self::At(address) => address.port(),
        }
    }

    /// The addresses, and whether each must be there.
    fn all(self, ipv6: bool) -> Vec<(SocketAddr, bool)> {
        match self {
            Self::At(address) => vec![(address, true)],
            Self::Localhost(port) => {
                let mut all = vec![((Ipv4Addr::LOCALHOST, port).into(), true)];
                // `lo` has none where IPv6 is off in the pod.
                all.extend(ipv6.then_some(((Ipv6Addr::LOCALHOST, port).into(), false)));
                all
            }
        }
    }
}

/// The DNS sockets of a pod.
#[derive(Debug)]
pub struct Dns {
    /// For connections. Not blocking.
    pub tcp: Vec<TcpListener>,
    /// For datagrams.
    pub udp: Vec<Queries>,
}

impl Dns {
    /// Nothing but the sockets, to be passed on.
    #[must_use]
    pub fn into_sockets(self) -> DnsSockets {
        let udp = self.udp.into_iter().map(|queries| queries.socket).collect();
        DnsSockets { tcp: self.tcp, udp }
    }
}

/// The DNS sockets of a pod, as one process passes them on to the next.
#[derive(Debug)]
pub struct DnsSockets {
    /// For connections.
    pub tcp: Vec<TcpListener>,
    /// For datagrams.
    pub udp: Vec<std::net::UdpSocket>,
}

impl DnsSockets {
    /// As ours from now on, in the namespace of the thread.
    pub(super) fn adopt(
        self,
        prepare: impl Fn(&SockRef<'_>) -> io::Result<()>,
        queries: impl Fn(Socket) -> io::Result<Queries>,
    ) -> io::Result<Dns> {
        let ours = |socket: &SockRef<'_>| {
            socket.set_nonblocking(true)?;
            prepare(socket)
        };
        self.tcp.iter().try_for_each(|tcp| ours(&SockRef::from(tcp)))?;
        self.udp.iter().try_for_each(|udp| ours(&SockRef::from(udp)))?;
        let udp = self.udp.into_iter().map(|udp| queries(udp.into()));
        Ok(Dns { tcp: self.tcp, udp: udp.collect::<io::Result<_>>()? })
    }
}

/// A UDP socket on which clients ask.
#[derive(Debug)]
pub struct Queries {
    socket: std::net::UdpSocket,
    way: Way,
}

/// How it is known whom a datagram was for, and how to answer in that name.
#[derive(Debug)]
enum Way {
    /// The datagram says so itself.
    Steered(Raw),
    /// The namespace's connection tracking does, and gives answers the right name; by the address that the
    /// socket is bound to.
    Redirected(Option<Conntrack>, SocketAddr),
}

/// Who asked.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Asker {
    client: SocketAddr,
    server: Option<SocketAddr>,
}

impl Asker {
    /// Whom the client meant to ask; `None` where redirection has lost it.
    #[must_use]
    pub const fn server(&self) -> Option<SocketAddr> {
        self.server
    }
}

/// [`Queries`] on a runtime.
#[derive(Debug)]
pub struct Served {
    socket: UdpSocket,
    way: Way,
}

impl AsRawFd for Queries {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

impl Queries {
    /// Those of a socket that gets what was sent to others, in the namespace of the thread.
    pub(super) fn steered(socket: Socket, v6: bool) -> io::Result<Self> {
        setsockopt(&socket, Ipv4OrigDstAddr, &true)?;
        if v6 {
            setsockopt(&socket, Ipv6OrigDstAddr, &true)?;
        }
        Ok(Self { socket: socket.into(), way: Way::Steered(Raw::open(v6)?) })
    }

    /// Those of a socket that others' rules redirect to, in the namespace of the thread.
    pub(super) fn redirected(socket: Socket) -> io::Result<Self> {
        let conntrack = Conntrack::open();
        if let Err(error) = &conntrack {
            tracing::debug!(%error, "names are asked of our own servers, not of the pod's");
        }
        let socket = std::net::UdpSocket::from(socket);
        let here = socket.local_addr()?;
        Ok(Self { socket, way: Way::Redirected(conntrack.ok(), here) })
    }

    /// Serves them on the runtime of the caller.
    ///
    /// # Errors
    ///
    /// Fails outside a runtime, or without descriptors.
    pub fn serve(self) -> io::Result<Served> {
        Ok(Served { socket: UdpSocket::from_std(self.socket)?, way: self.way })
    }
}

impl Served {
    /// The next query: its length, and who asked. What is longer than the room is cut.
    ///
    /// # Errors
    ///
    /// Fails as the socket does; it may go on afterwards.
    ///
    /// # Cancel safety
    ///
    /// Dropping it loses nothing.
    pub async fn receive(&self, room: &mut [u8]) -> io::Result<(usize, Asker)> {
        loop {
            self.socket.readable().await?;
            match self.socket.try_io(Interest::READABLE, || receive(&self.socket, room)) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                result => return result.map(|(length, asker)| (length, self.complete(asker))),
            }
        }
    }

    fn complete(&self, asker: Asker) -> Asker {
        match &self.way {
            Way::Redirected(Some(conntrack), here) => {
                Asker { server: conntrack.original_dst(asker.client, *here), ..asker }
            }
            Way::Redirected(None, _) | Way::Steered(_) => asker,
        }
    }

    /// Answers. Like every datagram it may be lost, where the client does not read.
    ///
    /// # Errors
    ///
    /// Fails with the kernel's error where it cannot be sent.
    pub fn reply(&self, asker: &Asker, message: &[u8]) -> io::Result<()> {
        match (&self.way, asker.server) {
            (Way::Steered(raw), Some(server)) => raw.send(server, asker.client, message),
            (Way::Steered(_), None) | (Way::Redirected(..), _) => {
                self.socket.try_send_to(message, asker.client).map(drop)
            }
        }
    }
}

fn receive(socket: &UdpSocket, room: &mut [u8]) -> io::Result<(usize, Asker)> {
    let mut space = cmsg_space!(libc::sockaddr_in, libc::sockaddr_in6);
    let mut parts = [IoSliceMut::new(room)];
    let flags = MsgFlags::MSG_DONTWAIT;
    let message =
        recvmsg::<SockaddrStorage>(socket.as_raw_fd(), &mut parts, Some(&mut space), flags)?;
    let mut server = None;
    for control in message.cmsgs()? {
        server = match control {
            ControlMessageOwned::Ipv4OrigDstAddr(address) => {
                let ip = Ipv4Addr::from(u32::from_be(address.sin_addr.s_addr));
                Some(SocketAddrV4::new(ip, u16::from_be(address.sin_port)).into())
            }
            // Of an IPv4 packet both may come; this one is mapped then.
            ControlMessageOwned::Ipv6OrigDstAddr(address) if server.is_none() => {
                let ip = Ipv6Addr::from(address.sin6_addr.s6_addr);
                let port = u16::from_be(address.sin6_port);
                Some(SocketAddrV6::new(ip, port, 0, address.sin6_scope_id).into())
            }
            _ => server,
        };
    }
    let from = message.address.as_ref().and_then(address);
    let client = from.ok_or_else(|| io::Error::other("a datagram without a source"))?;
    let asker = Asker { client: canonical(client), server: server.map(canonical) };
    Ok((message.bytes, asker))
}

fn address(storage: &SockaddrStorage) -> Option<SocketAddr> {
    let v4 = storage.as_sockaddr_in().map(|v4| SocketAddrV4::from(*v4).into());
    v4.or_else(|| storage.as_sockaddr_in6().map(|v6| SocketAddrV6::from(*v6).into()))
}

/// With its scope, if it has one.
fn canonical(address: SocketAddr) -> SocketAddr {
    match address.ip().to_canonical() {
        ip @ IpAddr::V4(_) => SocketAddr::new(ip, address.port()),
        IpAddr::V6(_) => address,
    }
}

/// A UDP socket of this namespace.
pub(super) fn udp(domain: Domain) -> io::Result<Socket> {
    Socket::new(domain, Type::DGRAM.nonblocking(), Some(Protocol::UDP))
}

/// A UDP socket of this namespace that is connected to a server.
pub(super) fn to_server(mark: Option<u32>, to: SocketAddr) -> io::Result<std::net::UdpSocket> {
    let socket = udp(Domain::for_address(to))?;
    if let Some(mark) = mark {
        socket.set_mark(mark)?;
    }
    socket.connect(&to.into())?;
    Ok(socket.into())
}

/// Plain sockets on these addresses, in the namespace of the thread.
pub(super) fn open(
    address: DnsAddress,
    ipv6: bool,
    prepare: impl Fn(&Socket) -> io::Result<()>,
) -> io::Result<Dns> {
    let mut dns = Dns { tcp: Vec::new(), udp: Vec::new() };
    for (address, required) in address.all(ipv6) {
        let bind = |socket: io::Result<Socket>| {
            let socket = socket?;
            if address.is_ipv6() {
                socket.set_only_v6(true)?;
            }
            prepare(&socket)?;
            socket.bind(&address.into())?;
            Ok::<_, io::Error>(socket)
        };
        let domain = Domain::for_address(address);
        match bind(socket::tcp(domain)).and_then(|tcp| Ok((tcp, bind(udp(domain))?))) {
            Ok((tcp, udp)) => {
                tcp.listen(BACKLOG)?;
                dns.tcp.push(tcp.into());
                dns.udp.push(Queries::redirected(udp)?);
            }
            Err(error) if !required && is_missing(&error) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(dns)
}

/// What Istio's node proxy uses for in-pod listeners.
const BACKLOG: i32 = 128;

/// The kernel, or `lo`, is without IPv6.
fn is_missing(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EAFNOSUPPORT | libc::EADDRNOTAVAIL))
}
