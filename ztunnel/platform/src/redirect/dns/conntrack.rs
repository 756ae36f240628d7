//! Where a redirected datagram was meant to go: a socket cannot tell, but the namespace's connection tracking
//! knows (`linux/netfilter/nfnetlink_conntrack.h`).

use netlink_sys::{Socket, SocketAddr as NetlinkAddr, protocols::NETLINK_NETFILTER};
use std::{
    io,
    net::{IpAddr, SocketAddr},
};

/// `NFNL_SUBSYS_CTNETLINK` and `IPCTNL_MSG_CT_GET`.
const GET: u16 = 1 << 8 | 1;
/// `IPCTNL_MSG_CT_NEW`: an entry.
const ENTRY: u16 = 1 << 8;
/// `NLM_F_REQUEST`.
const REQUEST: u16 = 1;
/// Length, type, flags, sequence and port.
const HEADER: usize = 16;
/// Family, version and resource.
const FAMILY: usize = 4;
/// `CTA_TUPLE_ORIG`, `CTA_TUPLE_REPLY`.
const ORIGINAL: u16 = 1;
const REPLY: u16 = 2;
/// In a tuple: `CTA_TUPLE_IP`, `CTA_TUPLE_PROTO`.
const IP: u16 = 1;
const PROTO: u16 = 2;
/// In the latter: `CTA_PROTO_NUM`, `CTA_PROTO_SRC_PORT`, `CTA_PROTO_DST_PORT`.
const NUMBER: u16 = 1;
const SOURCE_PORT: u16 = 2;
const DESTINATION_PORT: u16 = 3;
/// `NLA_F_NESTED`, and what is left of a type without flags.
const NESTED: u16 = 1 << 15;
const TYPE: u16 = 0x3fff;
const UDP: u8 = 17;

/// A way to ask about one namespace.
#[derive(Debug)]
pub(super) struct Conntrack(Socket);

impl Conntrack {
    /// In the namespace of the thread.
    pub(super) fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_NETFILTER)?;
        socket.bind_auto()?;
        socket.connect(&NetlinkAddr::new(0, 0))?;
        // The kernel has answered when `send` returns.
        socket.set_non_blocking(true)?;
        Ok(Self(socket))
    }

    /// Where a datagram from `client` that came to `here` was sent; `None` where it was not redirected, or that
    /// is not known any more.
    pub(super) fn original_dst(&self, client: SocketAddr, here: SocketAddr) -> Option<SocketAddr> {
        // An answer to an earlier question that nobody waited for.
        while self.0.recv_from_full().is_ok() {}
        self.0.send(&question(client, here)?, 0).ok()?;
        let (answer, _) = self.0.recv_from_full().ok()?;
        parse(&answer).filter(|to| *to != here)
    }
}

/// The entry whose replies go from `here` to `client`.
fn question(client: SocketAddr, here: SocketAddr) -> Option<Vec<u8>> {
    let (family, ips) = match (here.ip(), client.ip()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            (libc::AF_INET, [attribute(1, &from.octets()), attribute(2, &to.octets())].concat())
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            (libc::AF_INET6, [attribute(3, &from.octets()), attribute(4, &to.octets())].concat())
        }
        (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => return None,
    };
    let ports = [
        attribute(NUMBER, &[UDP]),
        attribute(SOURCE_PORT, &here.port().to_be_bytes()),
        attribute(DESTINATION_PORT, &client.port().to_be_bytes()),
    ]
    .concat();
    let tuple = [attribute(IP | NESTED, &ips), attribute(PROTO | NESTED, &ports)].concat();
    let tuple = attribute(REPLY | NESTED, &tuple);
    let length = u32::try_from(HEADER + FAMILY + tuple.len()).ok()?;
    let mut message = length.to_ne_bytes().to_vec();
    message.extend(GET.to_ne_bytes());
    message.extend(REQUEST.to_ne_bytes());
    // Sequence and port: there is one question at a time.
    message.extend([0; 8]);
    message.extend([u8::try_from(family).ok()?, 0, 0, 0]);
    message.extend(tuple);
    Some(message)
}

/// With its padding.
fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let length = u16::try_from(4 + value.len()).unwrap_or(4);
    let mut attribute = [length.to_ne_bytes(), kind.to_ne_bytes()].concat();
    attribute.extend(value);
    attribute.resize(attribute.len().next_multiple_of(4), 0);
    attribute
}

/// The original destination in an entry.
fn parse(answer: &[u8]) -> Option<SocketAddr> {
    let kind = u16::from_ne_bytes(*answer.get(4..)?.first_chunk()?);
    if kind != ENTRY {
        return None;
    }
    let tuple = find(answer.get(HEADER + FAMILY..)?, ORIGINAL)?;
    let (ips, ports) = (find(tuple, IP)?, find(tuple, PROTO)?);
    let ip = match (find(ips, 2), find(ips, 4)) {
        (Some(v4), _) => IpAddr::from(*v4.first_chunk::<4>()?),
        (None, v6) => IpAddr::from(*v6?.first_chunk::<16>()?),
    };
    let port = u16::from_be_bytes(*find(ports, DESTINATION_PORT)?.first_chunk()?);
    Some(SocketAddr::new(ip, port))
}

/// The first attribute of this kind.
fn find(mut attributes: &[u8], kind: u16) -> Option<&[u8]> {
    loop {
        let length = usize::from(u16::from_ne_bytes(*attributes.first_chunk()?));
        let found = u16::from_ne_bytes(*attributes.get(2..)?.first_chunk()?) & TYPE;
        let value = attributes.get(4..length)?;
        if found == kind {
            return Some(value);
        }
        attributes = attributes.get(length.next_multiple_of(4)..)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_read() {
        let entry = |tuple: Vec<u8>| {
            let mut answer = vec![0; 4];
            answer.extend(ENTRY.to_ne_bytes());
            answer.resize(HEADER + FAMILY, 0);
            answer.extend(attribute(9, b"other"));
            answer.extend(attribute(ORIGINAL | NESTED, &tuple));
            answer
        };
        let ports = [attribute(NUMBER, &[UDP]), attribute(DESTINATION_PORT, &53_u16.to_be_bytes())]
            .concat();
        let tuple = |kind, ip: &[u8]| {
            let ip = attribute(IP | NESTED, &attribute(kind, ip));
            [ip, attribute(PROTO | NESTED, &ports)].concat()
        };
        let v4 = entry(tuple(2, &[10, 96, 0, 10]));
        assert_eq!(parse(&v4), Some("10.96.0.10:53".parse().unwrap()));
        let v6 = entry(tuple(4, &[0xfd; 16]));
        assert!(parse(&v6).unwrap().is_ipv6());
        for end in 0..v4.len() {
            assert_eq!(parse(&v4[..end]), None, "cut at {end}");
        }
        assert_eq!(parse(&entry(attribute(0, &[]))), None);
    }

    #[test]
    fn a_question_is_of_one_family() {
        let (v4, v6) = ("1.1.1.1:1".parse().unwrap(), "[::1]:1".parse().unwrap());
        assert_eq!(question(v4, v6), None);
        assert_eq!(question(v4, v4).unwrap().len(), 20 + 4 + (4 + 16) + (4 + 24));
    }
}
