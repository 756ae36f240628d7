//! Requests to the routing side of the kernel, in the namespace of the thread.

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkBuffer, NetlinkHeader, NetlinkMessage,
    NetlinkPayload,
};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};
use std::io;

/// A socket of the namespace that the thread was in when it was opened.
pub(super) struct Netlink {
    socket: Socket,
    sequence: u32,
}

impl Netlink {
    pub(super) fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        Ok(Self { socket, sequence: 0 })
    }

    /// Asks for a change, and waits for the answer.
    pub(super) fn change(&mut self, message: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
        self.batch(vec![(message, flags)])?.pop().unwrap_or(Ok(()))
    }

    /// Asks for changes in one packet, which the kernel works off without a pause between them. Returns the
    /// answers, in their order: one that fails does not keep the next from being made.
    pub(super) fn batch(
        &mut self,
        messages: Vec<(RouteNetlinkMessage, u16)>,
    ) -> io::Result<Vec<io::Result<()>>> {
        let first = self.sequence.wrapping_add(1);
        let mut packet = Vec::new();
        let mut answers = Vec::new();
        for (message, flags) in messages {
            self.append(&mut packet, message, flags | NLM_F_ACK);
            answers.push(None);
        }
        if answers.is_empty() {
            return Ok(Vec::new());
        }
        self.socket.send(&packet, 0)?;
        while answers.iter().any(Option::is_none) {
            for message in self.receive()? {
                let index = message.header.sequence_number.wrapping_sub(first);
                let slot = usize::try_from(index).ok().and_then(|at| answers.get_mut(at));
                if let (NetlinkPayload::Error(error), Some(slot)) = (message.payload, slot) {
                    *slot = Some(error.code.map_or(Ok(()), |_| Err(error.to_io())));
                }
            }
        }
        Ok(answers.into_iter().flatten().collect())
    }

    /// Everything of a kind.
    pub(super) fn dump(
        &mut self,
        message: RouteNetlinkMessage,
    ) -> io::Result<Vec<RouteNetlinkMessage>> {
        let mut packet = Vec::new();
        self.append(&mut packet, message, NLM_F_DUMP);
        self.socket.send(&packet, 0)?;
        let mut found = Vec::new();
        loop {
            for message in self.receive()? {
                if message.header.sequence_number != self.sequence {
                    continue;
                }
                match message.payload {
                    NetlinkPayload::Done(_) => return Ok(found),
                    NetlinkPayload::Error(error) if error.code.is_none() => return Ok(found),
                    NetlinkPayload::Error(error) => return Err(error.to_io()),
                    NetlinkPayload::InnerMessage(inner) => found.push(inner),
                    _ => (),
                }
            }
        }
    }

    fn append(&mut self, packet: &mut Vec<u8>, message: RouteNetlinkMessage, flags: u16) {
        self.sequence = self.sequence.wrapping_add(1);
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST | flags;
        header.sequence_number = self.sequence;
        let mut message = NetlinkMessage::new(header, NetlinkPayload::InnerMessage(message));
        message.finalize();
        let start = packet.len();
        packet.resize(start + message.buffer_len().next_multiple_of(4), 0);
        if let Some(place) = packet.get_mut(start..) {
            message.serialize(place);
        }
    }

    /// The messages of one datagram.
    fn receive(&self) -> io::Result<Vec<NetlinkMessage<RouteNetlinkMessage>>> {
        let (datagram, _) = self.socket.recv_from_full()?;
        let mut rest = datagram.as_slice();
        let mut found = Vec::new();
        while !rest.is_empty() {
            // Length first: a message that this crate's types cannot read must not hide the next one.
            let length = NetlinkBuffer::new_checked(rest).map_err(io::Error::other)?.length();
            let length = usize::try_from(length).map_err(io::Error::other)?;
            found.push(NetlinkMessage::deserialize(rest).map_err(io::Error::other)?);
            rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        }
        Ok(found)
    }
}
