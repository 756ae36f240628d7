//! Devices, addresses and routes, in the calling thread's network namespace.

use std::{
    io,
    net::IpAddr,
    os::fd::{AsRawFd, BorrowedFd},
};

use anyhow::{Context, Result, bail};
use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage,
    NetlinkPayload,
};
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    address::{AddressAttribute, AddressFlags, AddressMessage},
    link::{InfoData, InfoKind, InfoVeth, LinkAttribute, LinkFlags, LinkInfo, LinkMessage},
    route::{
        RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope,
        RouteType,
    },
};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};
use nix::net::if_::if_nametoindex;

const NEW: u16 = NLM_F_CREATE | NLM_F_EXCL;

/// A netlink socket.
pub(crate) struct Netlink(Socket);

impl Netlink {
    pub(crate) fn open() -> Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE).context("cannot open netlink")?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        Ok(Self(socket))
    }

    fn ask(&self, message: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST | NLM_F_ACK | flags;
        let mut message = NetlinkMessage::new(header, NetlinkPayload::from(message));
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        self.0.send(&bytes, 0)?;
        let (answer, _) = self.0.recv_from_full()?;
        let answer = NetlinkMessage::<RouteNetlinkMessage>::deserialize(&answer)
            .map_err(io::Error::other)?;
        match answer.payload {
            NetlinkPayload::Error(error) if error.raw_code() != 0 => Err(error.to_io()),
            _ => Ok(()),
        }
    }

    /// A pair of devices: one here, the other in that namespace.
    pub(crate) fn veth(&self, name: &str, peer: &str, there: BorrowedFd<'_>) -> Result<()> {
        let mut other = LinkMessage::default();
        other.attributes.push(LinkAttribute::IfName(peer.to_owned()));
        other.attributes.push(LinkAttribute::NetNsFd(there.as_raw_fd()));
        let data = InfoData::Veth(InfoVeth::Peer(other));
        self.add_link(name, vec![LinkInfo::Kind(InfoKind::Veth), LinkInfo::Data(data)])
    }

    pub(crate) fn bridge(&self, name: &str) -> Result<()> {
        self.add_link(name, vec![LinkInfo::Kind(InfoKind::Bridge)])
    }

    fn add_link(&self, name: &str, info: Vec<LinkInfo>) -> Result<()> {
        let mut link = LinkMessage::default();
        link.attributes.push(LinkAttribute::IfName(name.to_owned()));
        link.attributes.push(LinkAttribute::LinkInfo(info));
        self.ask(RouteNetlinkMessage::NewLink(link), NEW)
            .with_context(|| format!("cannot add device {name}"))
    }

    pub(crate) fn up(&self, name: &str) -> Result<()> {
        let mut link = LinkMessage::default();
        link.header.index = index(name)?;
        link.header.flags = LinkFlags::Up;
        link.header.change_mask = LinkFlags::Up;
        self.ask(RouteNetlinkMessage::SetLink(link), 0)
            .with_context(|| format!("cannot set device {name} up"))
    }

    /// Makes the device a port of the bridge.
    pub(crate) fn port(&self, name: &str, bridge: &str) -> Result<()> {
        let mut link = LinkMessage::default();
        link.header.index = index(name)?;
        link.attributes.push(LinkAttribute::Controller(index(bridge)?));
        self.ask(RouteNetlinkMessage::SetLink(link), 0)
            .with_context(|| format!("cannot make device {name} a port of {bridge}"))
    }

    pub(crate) fn address(&self, device: &str, ip: IpAddr, prefix: u8) -> Result<()> {
        let mut address = AddressMessage::default();
        address.header.family = family(ip);
        address.header.prefix_len = prefix;
        address.header.index = index(device)?;
        address.attributes.push(AddressAttribute::Local(ip));
        address.attributes.push(AddressAttribute::Address(ip));
        if ip.is_ipv6() {
            address.attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
        }
        self.ask(RouteNetlinkMessage::NewAddress(address), NEW)
            .with_context(|| format!("cannot give {device} address {ip}/{prefix}"))
    }

    /// Has this machine take what is sent to the address, without making it one of its own.
    pub(crate) fn taken(&self, ip: IpAddr) -> Result<()> {
        let mut route = RouteMessage::default();
        route.header.address_family = family(ip);
        route.header.destination_prefix_length = if ip.is_ipv4() { 32 } else { 128 };
        route.header.table = RouteHeader::RT_TABLE_MAIN;
        route.header.protocol = RouteProtocol::Static;
        route.header.kind = RouteType::Local;
        route.header.scope = RouteScope::Host;
        route.attributes.push(RouteAttribute::Oif(index("lo")?));
        route.attributes.push(RouteAttribute::Destination(RouteAddress::from(ip)));
        self.ask(RouteNetlinkMessage::NewRoute(route), NEW)
            .with_context(|| format!("cannot add a local route to {ip}"))
    }

    /// To `prefix` by the gateway or, without, directly on the device.
    pub(crate) fn route(
        &self,
        (to, length): (IpAddr, u8),
        gateway: Option<IpAddr>,
        device: &str,
    ) -> Result<()> {
        let mut route = RouteMessage::default();
        route.header.address_family = family(to);
        route.header.destination_prefix_length = length;
        route.header.table = RouteHeader::RT_TABLE_MAIN;
        route.header.protocol = RouteProtocol::Static;
        route.header.kind = RouteType::Unicast;
        route.header.scope = match gateway {
            None if to.is_ipv4() => RouteScope::Link,
            _ => RouteScope::Universe,
        };
        route.attributes.push(RouteAttribute::Oif(index(device)?));
        if length > 0 {
            route.attributes.push(RouteAttribute::Destination(RouteAddress::from(to)));
        }
        if let Some(gateway) = gateway {
            route.attributes.push(RouteAttribute::Gateway(RouteAddress::from(gateway)));
        }
        self.ask(RouteNetlinkMessage::NewRoute(route), NEW)
            .with_context(|| format!("cannot add a route to {to}/{length}"))
    }
}

fn index(name: &str) -> Result<u32> {
    match if_nametoindex(name) {
        Ok(index) => Ok(index),
        Err(why) => bail!("no device {name}: {why}"),
    }
}

fn family(ip: IpAddr) -> AddressFamily {
    if ip.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 }
}
