//! A DNS server in a pod, which remembers who asked.

use std::{
    io::{Read, Write},
    net::{IpAddr, Ipv6Addr, TcpListener, TcpStream, UdpSocket},
    sync::{Arc, Mutex, PoisonError},
    thread,
};

use anyhow::Result;
use hickory_proto::{
    op::{Message, MessageType, ResponseCode},
    rr::{Name, RData, Record, RecordType, rdata},
};
use mesh_tests::Pod;

/// The address of `far.example.com`.
pub(crate) const FAR: [u8; 4] = [203, 0, 113, 7];
/// The length of the text of `big.example.com`.
pub(crate) const BIG: usize = 2000;

/// What somebody asked.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Asked {
    /// `udp` or `tcp`.
    pub(crate) by: &'static str,
    /// Who.
    pub(crate) from: IpAddr,
    /// The name, and the type.
    pub(crate) what: String,
}

/// It serves until the test ends.
#[derive(Clone, Debug, Default)]
pub(crate) struct Server(Arc<Mutex<Vec<Asked>>>);

impl Server {
    /// On port 53 of all the pod's addresses.
    pub(crate) fn start(pod: &Pod) -> Result<Self> {
        let server = Self::default();
        let (udp, tcp) = pod.namespace().run(|| {
            let at = (Ipv6Addr::UNSPECIFIED, 53);
            Ok((UdpSocket::bind(at)?, TcpListener::bind(at)?))
        })?;
        let this = server.clone();
        thread::Builder::new().spawn(move || this.datagrams(&udp))?;
        let this = server.clone();
        thread::Builder::new().spawn(move || {
            for stream in tcp.incoming().flatten() {
                let _ended = this.connection(stream);
            }
        })?;
        Ok(server)
    }

    /// What was asked since the last time.
    pub(crate) fn asked(&self) -> Vec<Asked> {
        std::mem::take(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn datagrams(&self, socket: &UdpSocket) {
        let mut room = [0; 4096];
        while let Ok((length, from)) = socket.recv_from(&mut room) {
            let message = room.get(..length).unwrap_or_default();
            if let Some(reply) = self.answer("udp", from.ip(), message) {
                let _lost = socket.send_to(&reply, from);
            }
        }
    }

    fn connection(&self, mut stream: TcpStream) -> Result<()> {
        let from = stream.peer_addr()?.ip();
        let mut length = [0; 2];
        while stream.read_exact(&mut length).is_ok() {
            let mut message = vec![0; usize::from(u16::from_be_bytes(length))];
            stream.read_exact(&mut message)?;
            let Some(reply) = self.answer("tcp", from, &message) else { break };
            stream.write_all(&u16::try_from(reply.len())?.to_be_bytes())?;
            stream.write_all(&reply)?;
        }
        Ok(())
    }

    fn answer(&self, by: &'static str, from: IpAddr, message: &[u8]) -> Option<Vec<u8>> {
        let mut reply = Message::from_vec(message).ok()?;
        let question = reply.queries.first()?.clone();
        let (name, kind) = (question.name().to_ascii(), question.query_type());
        let asked = Asked { by, from: from.to_canonical(), what: format!("{name} {kind}") };
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(asked);
        reply.metadata.message_type = MessageType::Response;
        reply.metadata.authoritative = true;
        let mut add = |data| {
            reply.answers.push(Record::from_rdata(question.name().clone(), 60, data));
        };
        match (name.as_str(), kind) {
            ("far.example.com.", RecordType::A) => add(RData::A(rdata::A::from(FAR_IP))),
            ("_http._tcp.web.lab.svc.cluster.local.", RecordType::SRV) => {
                let target = Name::from_ascii("web.lab.svc.cluster.local.").ok()?;
                add(RData::SRV(rdata::SRV::new(0, 100, 80, target)));
            }
            ("big.example.com.", RecordType::TXT) if by == "udp" => {
                reply.metadata.truncation = true;
            }
            ("big.example.com.", RecordType::TXT) => {
                add(RData::TXT(rdata::TXT::new(vec!["x".repeat(200); BIG / 200])));
            }
            _ => {
                reply.metadata.response_code = ResponseCode::NXDomain;
                let name = Name::from_ascii("example.com.").ok()?;
                let soa = rdata::SOA::new(name.clone(), name.clone(), 1, 2, 3, 4, 5);
                reply.authorities.push(Record::from_rdata(name, 60, RData::SOA(soa)));
            }
        }
        reply.to_vec().ok()
    }
}

const FAR_IP: std::net::Ipv4Addr = std::net::Ipv4Addr::new(FAR[0], FAR[1], FAR[2], FAR[3]);
