//! What nodes send each other, seen on the wire and judged: only TLS, only to the tunnel port.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{ErrorKind, Read},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use anyhow::{Context, Result, anyhow, bail, ensure};
use socket2::{Domain, Protocol, Socket, Type};

use crate::netns::Namespace;

/// Every protocol, in network byte order.
const ETH_P_ALL: i32 = 0x0300;
const ETHERNET: usize = 14;
const TCP: u8 = 6;
const FIN_SYN_RST: u8 = 0x07;
const SYN: u8 = 0x02;

/// The port that tunnels go to.
pub const TUNNEL: u16 = 15008;

/// A capture that runs.
#[derive(Debug)]
pub struct Capture {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Seen>,
}

/// Whether traffic between two addresses is of interest.
type Wanted = Box<dyn Fn(IpAddr, IpAddr) -> bool + Send>;

/// What was seen.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    /// Bytes of TCP payload by the server's address, each counted once.
    pub payload: BTreeMap<SocketAddr, u64>,
    /// TCP streams (each direction is one) that began with a TLS handshake and held only TLS records.
    pub tls: BTreeSet<(SocketAddr, SocketAddr)>,
    /// The others that carried anything.
    pub other: BTreeSet<(SocketAddr, SocketAddr)>,
    /// Connection attempts (SYN), by where to.
    pub attempts: BTreeSet<SocketAddr>,
    /// Whether a marker was seen, in any packet of any protocol.
    pub marker: Option<String>,
    flows: BTreeMap<(SocketAddr, SocketAddr), Flow>,
}

/// One direction of a connection.
#[derive(Clone, Debug, Default)]
struct Flow {
    /// Its beginning was seen.
    began: bool,
    next: u32,
    /// Bytes that the record in hand still has.
    left: usize,
    header: Vec<u8>,
    records: u64,
    broken: bool,
}

impl Capture {
    /// Looks at all that passes in the namespace, for the markers too.
    pub fn start(namespace: &Namespace, markers: &[&str]) -> Result<Self> {
        Self::begin(namespace, markers, None)
    }

    /// Looks at the TCP segments alone that go from one to the other of such addresses.
    pub fn start_for(
        namespace: &Namespace,
        markers: &[&str],
        wanted: impl Fn(IpAddr, IpAddr) -> bool + Send + 'static,
    ) -> Result<Self> {
        Self::begin(namespace, markers, Some(Box::new(wanted)))
    }

    fn begin(namespace: &Namespace, markers: &[&str], wanted: Option<Wanted>) -> Result<Self> {
        let socket = namespace.run(|| {
            let all = Some(Protocol::from(ETH_P_ALL));
            Socket::new(Domain::PACKET, Type::RAW, all).context("cannot capture packets")
        })?;
        // As large as the machine lets it be: bursts come in while the other threads run.
        socket.set_recv_buffer_size(32 << 20)?;
        socket.set_read_timeout(Some(Duration::from_millis(50)))?;
        let stop = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&stop);
        let markers: Vec<String> = markers.iter().map(|&marker| marker.to_owned()).collect();
        let thread = thread::Builder::new()
            .name("capture".into())
            .spawn(move || listen(socket, &told, &markers, wanted.as_deref()))?;
        Ok(Self { stop, thread })
    }

    /// Ends it, after what is on its way.
    pub fn stop(self) -> Result<Seen> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().map_err(|_panic| anyhow!("the capture broke"))
    }
}

fn listen(
    mut socket: Socket,
    stop: &AtomicBool,
    markers: &[String],
    wanted: Option<&(dyn Fn(IpAddr, IpAddr) -> bool + Send)>,
) -> Seen {
    let (mut seen, mut buffer) = (Seen::default(), vec![0; 1 << 18]);
    loop {
        match socket.read(&mut buffer) {
            Ok(length) => {
                let frame = buffer.get(..length).unwrap_or_default();
                let of = |s: Segment<'_>| wanted.is_some_and(|w| w(s.from.ip(), s.to.ip()));
                if wanted.is_none() || segment(frame).is_some_and(of) {
                    seen.packet(frame, markers);
                }
            }
            // Silence: it is over if we were told so.
            Err(why) if matches!(why.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                if stop.load(Ordering::Relaxed) {
                    return seen;
                }
            }
            Err(why) if why.kind() == ErrorKind::Interrupted => {}
            Err(_) => return seen,
        }
    }
}

struct Segment<'a> {
    from: SocketAddr,
    to: SocketAddr,
    sequence: u32,
    flags: u8,
    payload: &'a [u8],
}

impl Seen {
    /// Why this is not a mesh's traffic, if it is not.
    #[must_use]
    pub fn objection(&self) -> Option<String> {
        if let Some(marker) = &self.marker {
            return Some(format!("{marker} went over the wire in clear text"));
        }
        if let Some((from, to)) = self.other.first() {
            return Some(format!("{from} sent {to} what is not TLS"));
        }
        let port = |to: &&SocketAddr| to.port() != TUNNEL;
        if let Some(to) = self.payload.keys().find(port).or(self.attempts.iter().find(port)) {
            return Some(format!("there was a connection to {to}, which is no tunnel"));
        }
        None
    }

    /// What there was, in a few words; fails unless it was something, and all of it a mesh's traffic.
    pub fn only_tunnels(&self) -> Result<String> {
        if let Some(objection) = self.objection() {
            bail!(objection);
        }
        ensure!(!self.tls.is_empty(), "nothing was seen on the wire");
        Ok(self.summary())
    }

    /// In a few words.
    #[must_use]
    pub fn summary(&self) -> String {
        let ports: BTreeSet<_> = self.payload.keys().map(SocketAddr::port).collect();
        let bytes: u64 = self.payload.values().sum();
        let streams = self.tls.len();
        format!("{streams} TLS streams, {bytes} bytes, to ports {ports:?}")
    }

    fn packet(&mut self, frame: &[u8], markers: &[String]) {
        for marker in markers {
            if contains(frame, marker.as_bytes()) {
                self.marker = Some(marker.clone());
            }
        }
        let Some(segment) = segment(frame) else { return };
        if segment.flags & FIN_SYN_RST == SYN && segment.flags & 0x10 == 0 {
            self.attempts.insert(segment.to);
        }
        if segment.payload.is_empty() && segment.flags & SYN == 0 {
            return;
        }
        let key = (segment.from, segment.to);
        let flow = self.flows.entry(key).or_default();
        if segment.flags & SYN != 0 {
            let next = segment.sequence.wrapping_add(1);
            *flow = Flow { next, began: true, ..Flow::default() };
            return;
        }
        // The same packet passes several devices; a flow that began before us starts here.
        if flow.next == 0 {
            flow.next = segment.sequence;
        }
        if flow.next != segment.sequence {
            return;
        }
        let length = segment.payload.len();
        flow.next = flow.next.wrapping_add(u32::try_from(length).unwrap_or_default());
        flow.records(segment.payload);
        let server = if segment.from.port() == TUNNEL || segment.from.port() < segment.to.port() {
            segment.from
        } else {
            segment.to
        };
        *self.payload.entry(server).or_default() += length as u64;
        let of = if flow.broken { &mut self.other } else { &mut self.tls };
        of.insert(key);
        if flow.broken {
            self.tls.remove(&key);
        }
    }
}

impl Flow {
    /// Follows the records; the first is to be a handshake.
    fn records(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() && !self.broken {
            let skip = self.left.min(bytes.len());
            self.left -= skip;
            bytes = bytes.get(skip..).unwrap_or_default();
            while self.left == 0 && self.header.len() < 5 {
                let Some((byte, rest)) = bytes.split_first() else { return };
                self.header.push(*byte);
                bytes = rest;
            }
            if let &[kind, 3, minor, high, low] = self.header.as_slice() {
                let length = usize::from(u16::from_be_bytes([high, low]));
                // A tunnel that was there before us shows no handshake.
                let first = self.records > 0 || kind == 22 || !self.began;
                self.broken = !(20..=23).contains(&kind)
                    || !(1..=3).contains(&minor)
                    || length > (16 << 10) + 256
                    || !first;
                self.left = length;
                self.records += 1;
                self.header.clear();
            } else if self.header.len() == 5 {
                self.broken = true;
            }
        }
    }
}

fn contains(hay: &[u8], needle: &[u8]) -> bool {
    let Some(first) = needle.first() else { return false };
    let starts = hay.iter().enumerate().filter(|(_, byte)| *byte == first);
    starts.into_iter().any(|(at, _)| hay.get(at..).is_some_and(|rest| rest.starts_with(needle)))
}

fn segment(frame: &[u8]) -> Option<Segment<'_>> {
    let ip = frame.get(ETHERNET..)?;
    let (from, to, tcp) = match ip.first()? >> 4 {
        4 => {
            let header = usize::from(ip.first()? & 15) * 4;
            let total = usize::from(u16::from_be_bytes([*ip.get(2)?, *ip.get(3)?]));
            // A packet that the kernel will cut up itself may have no length.
            let total = if total == 0 { ip.len() } else { total };
            if *ip.get(9)? != TCP {
                return None;
            }
            let address = |at: usize| -> Option<IpAddr> {
                let octets: [u8; 4] = ip.get(at..at + 4)?.try_into().ok()?;
                Some(Ipv4Addr::from(octets).into())
            };
            (address(12)?, address(16)?, ip.get(header..total)?)
        }
        6 => {
            let length = usize::from(u16::from_be_bytes([*ip.get(4)?, *ip.get(5)?]));
            let end = if length == 0 { ip.len() } else { 40 + length };
            if *ip.get(6)? != TCP {
                return None;
            }
            let address = |at: usize| -> Option<IpAddr> {
                let octets: [u8; 16] = ip.get(at..at + 16)?.try_into().ok()?;
                Some(Ipv6Addr::from(octets).into())
            };
            (address(8)?, address(24)?, ip.get(40..end)?)
        }
        _ => return None,
    };
    let port = |at: usize| Some(u16::from_be_bytes([*tcp.get(at)?, *tcp.get(at + 1)?]));
    let header = usize::from(*tcp.get(12)? >> 4) * 4;
    Some(Segment {
        from: SocketAddr::new(from, port(0)?),
        to: SocketAddr::new(to, port(2)?),
        sequence: u32::from_be_bytes(tcp.get(4..8)?.try_into().ok()?),
        flags: *tcp.get(13)?,
        payload: tcp.get(header..)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const HELLO: &[u8] = &[22, 3, 1, 0, 2, 1, 1];
    const DATA: &[u8] = &[23, 3, 3, 0, 3, 9, 9, 9];

    /// One TCP segment over IPv4 from port 40000, behind an Ethernet header.
    fn frame(port: u16, sequence: u32, flags: u8, payload: &[u8]) -> Vec<u8> {
        let total = u16::try_from(40 + payload.len()).unwrap();
        let mut frame = vec![0; ETHERNET];
        frame.extend([0x45, 0]);
        frame.extend(total.to_be_bytes());
        frame.extend([0, 0, 0, 0, 64, TCP, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
        frame.extend(40000_u16.to_be_bytes());
        frame.extend(port.to_be_bytes());
        frame.extend(sequence.to_be_bytes());
        frame.extend([0, 0, 0, 0, 5 << 4, flags, 0, 0, 0, 0, 0, 0]);
        frame.extend(payload);
        frame
    }

    fn seen(port: u16, payloads: &[&[u8]]) -> Seen {
        let mut seen = Seen::default();
        let markers = ["secret".to_owned()];
        let mut sequence = 1;
        seen.packet(&frame(port, 0, SYN, b""), &markers);
        for payload in payloads {
            // Twice, as it passes two devices.
            seen.packet(&frame(port, sequence, 0x10, payload), &markers);
            seen.packet(&frame(port, sequence, 0x10, payload), &markers);
            sequence += u32::try_from(payload.len()).unwrap();
        }
        seen
    }

    #[test]
    fn judges() {
        for (name, port, payloads, objects) in [
            ("tls", 15008, vec![HELLO, DATA], false),
            ("records cut anywhere", 15008, vec![&HELLO[..3], &HELLO[3..], DATA], false),
            ("data first", 15008, vec![DATA], true),
            ("http", 15008, vec![b"GET / HTTP/1.1\r\n".as_slice()], true),
            ("then something else", 15008, vec![HELLO, b"hello".as_slice()], true),
            ("another port", 8080, vec![HELLO, DATA], true),
            ("marker", 15008, vec![HELLO, &[23, 3, 3, 0, 6], b"secret".as_slice()], true),
            ("attempt alone", 8080, vec![], true),
        ] {
            assert_eq!(seen(port, &payloads).objection().is_some(), objects, "{name}");
        }
        assert_eq!(seen(15008, &[HELLO, DATA]).payload.values().sum::<u64>(), 15);
    }
}
