//! Asking as programs do.

use std::{
    io::{Read, Write},
    net::{IpAddr, SocketAddr, TcpStream, UdpSocket},
    time::Duration,
};

use anyhow::{Result, ensure};
use hickory_proto::{
    op::{Message, MessageType, OpCode, Query},
    rr::{Name, RData, RecordType},
};
use mesh_tests::Pod;

/// How a program asks.
#[derive(Clone, Copy, Debug)]
pub(crate) enum By {
    /// A socket that looks at where replies come from.
    Udp,
    /// One that the kernel lets have no others.
    ConnectedUdp,
    /// A connection.
    Tcp,
}

/// All of them.
pub(crate) const ALL: [By; 3] = [By::Udp, By::ConnectedUdp, By::Tcp];

/// How long a reply may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// A query as stub resolvers send it.
pub(crate) fn query(name: &str, kind: RecordType) -> Message {
    let mut query = Message::new(4711, MessageType::Query, OpCode::Query);
    query.metadata.recursion_desired = true;
    query.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
    query
}

impl By {
    /// Asks this server from the pod; the reply came from where it was asked.
    pub(crate) fn ask(self, pod: &Pod, server: SocketAddr, query: &Message) -> Result<Message> {
        self.ask_for(pod, server, query, PATIENCE)
    }

    /// The same, for no longer than this.
    pub(crate) fn ask_for(
        self,
        pod: &Pod,
        server: SocketAddr,
        query: &Message,
        patience: Duration,
    ) -> Result<Message> {
        let query = query.to_vec()?;
        let any: SocketAddr = if server.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" }.parse()?;
        let reply = pod.namespace().run(|| match self {
            Self::Udp => {
                let socket = UdpSocket::bind(any)?;
                socket.set_read_timeout(Some(patience))?;
                socket.send_to(&query, server)?;
                let mut room = vec![0; 65536];
                let (length, from) = socket.recv_from(&mut room)?;
                ensure!(from == server, "asked {server}, answered by {from}");
                room.truncate(length);
                Ok(room)
            }
            Self::ConnectedUdp => {
                let socket = UdpSocket::bind(any)?;
                socket.set_read_timeout(Some(patience))?;
                socket.connect(server)?;
                socket.send(&query)?;
                let mut room = vec![0; 65536];
                let length = socket.recv(&mut room)?;
                room.truncate(length);
                Ok(room)
            }
            Self::Tcp => {
                let mut stream = TcpStream::connect_timeout(&server, patience)?;
                stream.set_read_timeout(Some(patience))?;
                let length = u16::try_from(query.len())?;
                stream.write_all(&[&length.to_be_bytes()[..], &query].concat())?;
                let mut length = [0; 2];
                stream.read_exact(&mut length)?;
                let mut reply = vec![0; u16::from_be_bytes(length).into()];
                stream.read_exact(&mut reply)?;
                Ok(reply)
            }
        })?;
        Ok(Message::from_vec(&reply)?)
    }
}

/// The addresses in a reply, in order.
pub(crate) fn addresses(reply: &Message) -> Vec<IpAddr> {
    let ip = |data: &RData| match data {
        RData::A(a) => Some(IpAddr::V4(a.0)),
        RData::AAAA(aaaa) => Some(IpAddr::V6(aaaa.0)),
        _ => None,
    };
    let mut ips: Vec<IpAddr> = reply.answers.iter().filter_map(|r| ip(&r.data)).collect();
    ips.sort();
    ips
}
