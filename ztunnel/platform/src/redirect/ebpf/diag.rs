//! What TCP sockets a namespace has, as `ss` asks for it (`sock_diag(7)`).

use netlink_sys::{Socket, protocols::NETLINK_SOCK_DIAG};
use std::io;

/// `SOCK_DIAG_BY_FAMILY`.
const BY_FAMILY: u16 = 20;
/// `NLM_F_REQUEST`, `NLM_F_DUMP`.
const DUMP: u16 = 0x301;
/// `NLMSG_ERROR`, `NLMSG_DONE`.
const ERROR: u16 = 2;
const DONE: u16 = 3;
/// Of `nlmsghdr` and of `inet_diag_msg`.
const HEADER: usize = 16;
const MESSAGE: usize = 72;
/// Attributes.
const INET_DIAG_MARK: u16 = 15;
const INET_DIAG_SOCKOPT: u16 = 22;
/// `transparent` of `inet_diag_sockopt`, in its first byte.
const TRANSPARENT: u8 = 1 << 5;
/// States, of `tcp_states.h`.
const SYN_RECV: u8 = 3;
const TIME_WAIT: u8 = 6;
const CLOSE: u8 = 7;
const LISTEN: u8 = 10;
const NEW_SYN_RECV: u8 = 12;

/// A socket, as far as it matters here.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(super) struct Tcp {
    state: u8,
    /// Of a listener: connections that nobody has accepted yet.
    queued: u32,
    mark: u32,
    transparent: bool,
}

impl Tcp {
    /// A connection that the listeners with this mark would lose if they were closed now.
    pub(super) const fn is_waiting_for(&self, mark: u32) -> bool {
        let half_open = matches!(self.state, SYN_RECV | NEW_SYN_RECV);
        self.mark == mark && (half_open || (self.state == LISTEN && self.queued > 0))
    }

    /// A connection that a node proxy holds: what it accepts, and what it opens in a client's name, is
    /// transparent, and next to nobody else's is.
    pub(super) const fn is_held(&self) -> bool {
        self.transparent && !matches!(self.state, LISTEN | TIME_WAIT | CLOSE)
    }
}

/// All TCP sockets of the namespace of the thread.
pub(super) fn tcp() -> io::Result<Vec<Tcp>> {
    let mut found = Vec::new();
    for family in [libc::AF_INET, libc::AF_INET6] {
        dump(family, &mut found)?;
    }
    Ok(found)
}

/// Whether a node proxy, whichever, holds a connection here.
pub(super) fn is_held() -> io::Result<bool> {
    Ok(tcp()?.iter().any(Tcp::is_held))
}

fn dump(family: i32, found: &mut Vec<Tcp>) -> io::Result<()> {
    let socket = Socket::new(NETLINK_SOCK_DIAG)?;
    let invalid = |_| io::Error::from(io::ErrorKind::InvalidInput);
    let mut request = Vec::with_capacity(72);
    request.extend(72_u32.to_ne_bytes());
    request.extend(BY_FAMILY.to_ne_bytes());
    request.extend(DUMP.to_ne_bytes());
    request.extend(1_u32.to_ne_bytes());
    request.extend(0_u32.to_ne_bytes());
    // `inet_diag_req_v2`: the family, TCP, no extensions, padding, all states, and no socket in particular.
    let protocol = u8::try_from(libc::IPPROTO_TCP).map_err(invalid)?;
    request.extend([u8::try_from(family).map_err(invalid)?, protocol, 0, 0]);
    request.extend(u32::MAX.to_ne_bytes());
    request.extend([0; 48]);
    socket.send(&request, 0)?;
    loop {
        let (datagram, _) = socket.recv_from_full()?;
        let mut rest = datagram.as_slice();
        while let [a, b, c, d, e, f, ..] = *rest {
            let length = usize::try_from(u32::from_ne_bytes([a, b, c, d]));
            let length = length.map_err(io::Error::other)?.max(HEADER);
            let body = rest.get(HEADER..length).unwrap_or_default();
            rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
            match u16::from_ne_bytes([e, f]) {
                DONE => return Ok(()),
                ERROR => {
                    let code = body.first_chunk::<4>().map_or(0, |code| i32::from_ne_bytes(*code));
                    return match -code {
                        0 => Ok(()),
                        // A kernel without this family.
                        libc::ENOENT | libc::EAFNOSUPPORT => Ok(()),
                        code => Err(io::Error::from_raw_os_error(code)),
                    };
                }
                _ => found.extend(parse(body)),
            }
        }
    }
}

/// Reads an `inet_diag_msg` and its attributes.
fn parse(body: &[u8]) -> Option<Tcp> {
    let mut socket = Tcp { state: *body.get(1)?, ..Tcp::default() };
    // After the family, state, timers, `inet_diag_sockid` and the expiry.
    socket.queued = word(body.get(56..)?)?;
    let mut rest = body.get(MESSAGE..)?;
    while let [a, b, c, d, ..] = *rest {
        let length = usize::from(u16::from_ne_bytes([a, b])).max(4);
        let value = rest.get(4..length).unwrap_or_default();
        match u16::from_ne_bytes([c, d]) {
            INET_DIAG_MARK => socket.mark = word(value)?,
            INET_DIAG_SOCKOPT => {
                socket.transparent = value.first().is_some_and(|first| first & TRANSPARENT != 0);
            }
            _ => (),
        }
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Some(socket)
}

fn word(bytes: &[u8]) -> Option<u32> {
    bytes.first_chunk::<4>().map(|bytes| u32::from_ne_bytes(*bytes))
}
