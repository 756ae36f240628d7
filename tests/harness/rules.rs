//! Whether a namespace has packet filter rules: asked of the kernel, so that no tool is needed, and
//! none makes tables by looking.

use std::fs;

use anyhow::{Context, Result};
use netlink_sys::{Socket, SocketAddr};

use crate::netns::Namespace;

const NETLINK_NETFILTER: isize = 12;
const NFT_GET_TABLE: u16 = 10 << 8 | 1;
const REQUEST_DUMP: u16 = 0x301;
const HEADER: usize = 16;
const NLMSG_ERROR: u16 = 2;

/// What is there: nftables' (and so iptables-nft's) tables, and those of the older iptables.
pub fn packet_filters(namespace: &Namespace) -> Result<Vec<String>> {
    namespace.run(|| {
        let mut found = nftables()?;
        for file in ["ip_tables_names", "ip6_tables_names"] {
            let names = fs::read_to_string(format!("/proc/thread-self/net/{file}"));
            found.extend(names.iter().flat_map(|n| n.lines()).map(|n| format!("iptables {n}")));
        }
        Ok(found)
    })
}

fn nftables() -> Result<Vec<String>> {
    let mut socket = Socket::new(NETLINK_NETFILTER).context("cannot ask for nftables rules")?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    let mut ask = Vec::new();
    // Length, type, flags, sequence, port; then any family, version 0, no resource.
    ask.extend_from_slice(&20_u32.to_ne_bytes());
    ask.extend_from_slice(&NFT_GET_TABLE.to_ne_bytes());
    ask.extend_from_slice(&REQUEST_DUMP.to_ne_bytes());
    ask.extend_from_slice(&[0; 12]);
    socket.send(&ask, 0)?;
    let mut found = Vec::new();
    loop {
        let (answer, _) = socket.recv_from_full()?;
        let mut rest = answer.as_slice();
        while let Some((kind, body, next)) = message(rest) {
            rest = next;
            // "Done" and "no such subsystem" both end it.
            if kind <= 3 && (kind == NLMSG_ERROR || kind == 3) {
                return Ok(found);
            }
            // The first attribute is the table's name, after four bytes of family and version.
            let name = body.get(8..).unwrap_or_default();
            let name: Vec<u8> = name.iter().copied().take_while(|b| *b != 0).collect();
            found.push(format!("nftables {}", String::from_utf8_lossy(&name)));
        }
    }
}

/// The type and the body of the first message, and what follows it.
fn message(bytes: &[u8]) -> Option<(u16, &[u8], &[u8])> {
    let length: [u8; 4] = bytes.get(..4)?.try_into().ok()?;
    let kind: [u8; 2] = bytes.get(4..6)?.try_into().ok()?;
    let length = usize::try_from(u32::from_ne_bytes(length)).ok()?;
    let body = bytes.get(HEADER..length)?;
    Some((u16::from_ne_bytes(kind), body, bytes.get(length.next_multiple_of(4)..)?))
}
