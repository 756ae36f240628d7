//! UDP from an address that is not ours, without binding it: a socket on port 53 would be in the way of an
//! application that serves DNS itself.

use socket2::{Domain, Protocol, Socket, Type};
use std::{
    io,
    net::{IpAddr, SocketAddr},
};

const UDP: u8 = 17;
const UDP_HEADER: usize = 8;
const HOPS: u8 = 64;

/// A raw socket of each family, in the namespace in which they were opened.
#[derive(Debug)]
pub(super) struct Raw {
    v4: Socket,
    v6: Option<Socket>,
}

impl Raw {
    /// In the namespace of the thread.
    pub(super) fn open(v6: bool) -> io::Result<Self> {
        // Of this protocol they take packets with their headers, and receive nothing.
        let raw = |domain| {
            let protocol = Protocol::from(libc::IPPROTO_RAW);
            Socket::new(domain, Type::RAW.nonblocking(), Some(protocol))
        };
        let v6 = v6.then(|| raw(Domain::IPV6)).transpose()?;
        Ok(Self { v4: raw(Domain::IPV4)?, v6 })
    }

    pub(super) fn send(&self, from: SocketAddr, to: SocketAddr, data: &[u8]) -> io::Result<()> {
        let unsuited = || io::Error::from(io::ErrorKind::InvalidInput);
        let socket = if to.is_ipv4() { Some(&self.v4) } else { self.v6.as_ref() };
        let packet = packet(from, to, data).ok_or_else(unsuited)?;
        let mut to = to;
        // A port means a protocol to these.
        to.set_port(0);
        socket.ok_or_else(unsuited)?.send_to(&packet, &to.into()).map(drop)
    }
}

fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

/// The packet with its IP and UDP headers. Of an IPv4 header the kernel fills in the checksum and the id.
fn packet(from: SocketAddr, to: SocketAddr, data: &[u8]) -> Option<Vec<u8>> {
    if from.is_ipv4() != to.is_ipv4() {
        return None;
    }
    let length = u16::try_from(UDP_HEADER + data.len()).ok()?;
    let addresses = [octets(from.ip()), octets(to.ip())].concat();
    let mut packet = if from.is_ipv4() {
        let [high, low] = length.checked_add(20)?.to_be_bytes();
        vec![0x45, 0, high, low, 0, 0, 0, 0, HOPS, UDP, 0, 0]
    } else {
        let [high, low] = length.to_be_bytes();
        vec![0x60, 0, 0, 0, high, low, UDP, HOPS]
    };
    packet.extend(&addresses);
    let header = [from.port(), to.port(), length].map(u16::to_be_bytes).concat();
    // RFC 768, and RFC 8200, section 8.1: over the addresses, the protocol and the length as well.
    let pseudo = [&*addresses, &[0, UDP], &length.to_be_bytes()].concat();
    let sum = match checksum(&[&pseudo, &header, data]) {
        0 => u16::MAX,
        sum => sum,
    };
    packet.extend(header);
    packet.extend(sum.to_be_bytes());
    packet.extend(data);
    Some(packet)
}

/// The Internet checksum (RFC 1071). All parts but the last are of even length.
fn checksum(parts: &[&[u8]]) -> u16 {
    let mut sum = 0_u64;
    for part in parts {
        let (pairs, rest) = part.as_chunks::<2>();
        sum += pairs.iter().map(|pair| u64::from(u16::from_be_bytes(*pair))).sum::<u64>();
        sum += rest.first().map_or(0, |last| u64::from(*last) << 8);
    }
    while sum > u64::from(u16::MAX) {
        sum = (sum >> 16) + (sum & u64::from(u16::MAX));
    }
    !u16::try_from(sum).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksums_are_those_of_the_standard() {
        // RFC 1071, section 3.
        let data = [0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7];
        assert_eq!(checksum(&[&data]), !0xddf2);
        assert_eq!(checksum(&[&data, &[0x01]]), checksum(&[&data, &[0x01, 0x00]]), "odd");
    }

    #[test]
    fn a_packet_s_checksum_over_itself_is_zero() {
        for (from, to) in [("10.9.0.10:53", "10.0.0.1:4000"), ("[fd00::a]:53", "[fd00::1]:4000")] {
            let (from, to): (SocketAddr, SocketAddr) = (from.parse().unwrap(), to.parse().unwrap());
            let packet = packet(from, to, b"odd").unwrap();
            let (ip, udp) = packet.split_at(packet.len() - UDP_HEADER - 3);
            let addresses = &ip[ip.len() - if from.is_ipv4() { 8 } else { 32 }..];
            assert_eq!(checksum(&[addresses, &[0, UDP, 0, 11], udp]), 0);
            assert_eq!(udp[..4], [0, 53, 0x0f, 0xa0]);
        }
        assert!(packet("10.9.0.10:53".parse().unwrap(), "[::1]:1".parse().unwrap(), b"").is_none());
        assert!(
            packet("1.1.1.1:53".parse().unwrap(), "1.1.1.1:1".parse().unwrap(), &[0; 65535])
                .is_none()
        );
    }
}
