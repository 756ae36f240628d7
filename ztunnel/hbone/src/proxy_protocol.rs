//! The PROXY protocol, version 2, as Istio writes it to applications that terminate tunnels themselves.

use mesh_core::SpiffeId;
use std::net::{IpAddr, SocketAddr};

/// Section 2.2: the signature.
const SIGNATURE: [u8; 12] = *b"\r\n\r\n\0\r\nQUIT\n";
/// Version 2, command PROXY.
const VERSION_COMMAND: u8 = 0x21;
const TCP_V4: u8 = 0x11;
const TCP_V6: u8 = 0x21;
/// Istio's type for the peer's identity.
const IDENTITY: u8 = 0xd0;

/// The header: who connects, what to, and as whom.
#[must_use]
pub fn header(source: SocketAddr, destination: SocketAddr, peer: Option<&SpiffeId>) -> Vec<u8> {
    let mut addresses = Vec::with_capacity(36);
    let family = match (source.ip(), destination.ip()) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            addresses.extend(source.octets());
            addresses.extend(destination.octets());
            TCP_V4
        }
        (source, destination) => {
            for ip in [source, destination] {
                let octets = match ip {
                    IpAddr::V4(ip) => ip.to_ipv6_mapped().octets(),
                    IpAddr::V6(ip) => ip.octets(),
                };
                addresses.extend(octets);
            }
            TCP_V6
        }
    };
    addresses.extend(source.port().to_be_bytes());
    addresses.extend(destination.port().to_be_bytes());
    if let Some(peer) = peer {
        let text = peer.to_string();
        // SPIFFE bounds an identity to 2048 bytes.
        if let Ok(length) = u16::try_from(text.len()) {
            addresses.push(IDENTITY);
            addresses.extend(length.to_be_bytes());
            addresses.extend(text.bytes());
        }
    }
    let mut header = Vec::with_capacity(16 + addresses.len());
    header.extend(SIGNATURE);
    header.extend([VERSION_COMMAND, family]);
    header.extend(u16::try_from(addresses.len()).unwrap_or_default().to_be_bytes());
    header.extend(addresses);
    header
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes() {
        let v4 = header("10.0.0.1:1000".parse().unwrap(), "10.0.0.2:80".parse().unwrap(), None);
        assert_eq!(v4[..16], *b"\r\n\r\n\0\r\nQUIT\n\x21\x11\x00\x0c");
        assert_eq!(v4[16..], [10, 0, 0, 1, 10, 0, 0, 2, 3, 232, 0, 80]);
        let peer = "spiffe://td/ns/a/sa/b".parse().unwrap();
        let v6 =
            header("[fd00::1]:1".parse().unwrap(), "[fd00::2]:2".parse().unwrap(), Some(&peer));
        assert_eq!(v6[13], 0x21);
        assert_eq!(v6[16 + 36..16 + 39], [0xd0, 0, 21]);
        assert_eq!(&v6[16 + 39..], b"spiffe://td/ns/a/sa/b");
        assert_eq!(usize::from(u16::from_be_bytes([v6[14], v6[15]])), v6.len() - 16);
    }
}
