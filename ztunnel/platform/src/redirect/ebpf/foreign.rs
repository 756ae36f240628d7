//! Looks for somebody else's redirection, before the first change (`spec/capture.md` §1.10).

use super::{rules::Rules, sys};
use netlink_sys::{Socket, protocols::NETLINK_NETFILTER};
use socket2::{Domain, Protocol, Type};
use std::io;

/// What Istio's chains and tables begin with.
const NAMES: [&[u8]; 2] = [b"ISTIO_", b"istio-"];

/// Every reason not to touch the namespace of the thread.
pub(super) fn reasons(rules: &mut Rules) -> io::Result<Vec<String>> {
    let mut found = rules.foreign()?;
    found.extend(chains());
    Ok(found)
}

/// Where Istio's chains are, in the namespace of the thread.
pub(in crate::redirect) fn chains() -> Vec<String> {
    let mut found = Vec::new();
    for (domain, list) in [(Domain::IPV4, "ip_tables_names"), (Domain::IPV6, "ip6_tables_names")] {
        // Only tables that exist: to ask for another one would create it.
        let tables =
            std::fs::read_to_string(format!("/proc/thread-self/net/{list}")).unwrap_or_default();
        for table in tables.lines() {
            // The table may go while we look.
            if let Some(chain) = legacy(domain, table).ok().and_then(|bytes| istio(&bytes)) {
                found.push(format!("table {table} of iptables-legacy has {chain}"));
            }
        }
    }
    // Without nftables in the kernel there is nothing to find.
    if let Some(chain) = nftables().ok().and_then(|bytes| istio(&bytes)) {
        found.push(format!("nftables (or iptables-nft) has {chain}"));
    }
    found
}

/// The first name of Istio's in a dump, where names stand as they are.
fn istio(bytes: &[u8]) -> Option<String> {
    let start =
        NAMES.iter().find_map(|name| bytes.windows(name.len()).position(|part| part == *name))?;
    let rest = bytes.get(start..)?.iter();
    Some(rest.take_while(|byte| byte.is_ascii_graphic()).map(|byte| char::from(*byte)).collect())
}

/// A dump of all chains of all families. Names of tables come with their chains.
fn nftables() -> io::Result<Vec<u8>> {
    /// `NLMSG_ERROR` and `NLMSG_DONE`.
    const END: [u16; 2] = [2, 3];
    /// Of a message's header.
    const HEADER: usize = 16;
    let socket = Socket::new(NETLINK_NETFILTER)?;
    let mut request = Vec::with_capacity(20);
    request.extend(20_u32.to_ne_bytes());
    // NFNL_SUBSYS_NFTABLES, NFT_MSG_GETCHAIN.
    request.extend(((10_u16 << 8) | 4).to_ne_bytes());
    // NLM_F_REQUEST, NLM_F_DUMP.
    request.extend(0x301_u16.to_ne_bytes());
    request.extend(1_u32.to_ne_bytes());
    // The port, and `nfgenmsg` with no family.
    request.extend([0; 8]);
    socket.send(&request, 0)?;
    let mut all = Vec::new();
    loop {
        let (datagram, _) = socket.recv_from_full()?;
        let mut rest = datagram.as_slice();
        while let [a, b, c, d, e, f, ..] = *rest {
            if END.contains(&u16::from_ne_bytes([e, f])) {
                return Ok(all);
            }
            let length =
                usize::try_from(u32::from_ne_bytes([a, b, c, d])).map_err(io::Error::other)?;
            let length = length.max(HEADER);
            all.extend(rest.get(..length).unwrap_or(rest));
            rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        }
    }
}

/// `IPT_SO_GET_INFO`, `IPT_SO_GET_ENTRIES`: chains stand in the entries by name.
fn legacy(domain: Domain, table: &str) -> io::Result<Vec<u8>> {
    const GET_INFO: i32 = 64;
    const GET_ENTRIES: i32 = 65;
    let short = || io::Error::from(io::ErrorKind::InvalidData);
    let level = if domain == Domain::IPV4 { libc::SOL_IP } else { libc::SOL_IPV6 };
    let socket = socket2::Socket::new(domain, Type::RAW, Some(Protocol::from(libc::IPPROTO_RAW)))?;
    // `ipt_getinfo`: the name, 32 bytes, and at its end the size of the entries.
    let mut info = [0; 84];
    info.get_mut(..table.len().min(31))
        .ok_or_else(short)?
        .copy_from_slice(table.as_bytes().get(..table.len().min(31)).ok_or_else(short)?);
    sys::socket_option(&socket, level, GET_INFO, &mut info)?;
    let size = *info.last_chunk::<4>().ok_or_else(short)?;
    let length = usize::try_from(u32::from_ne_bytes(size)).map_err(io::Error::other)?;
    // `ipt_get_entries`: the name, the size, padding, the entries.
    let mut entries: Vec<u8> = info.iter().copied().take(32).collect();
    entries.extend(size);
    entries.resize(40 + length, 0);
    sys::socket_option(&socket, level, GET_ENTRIES, &mut entries)?;
    Ok(entries)
}
