//! One message from a client, and the replies to it.

use crate::resolve::{Family, Local};
use hickory_proto::{
    op::{Edns, Header, Message, MessageType, Metadata, OpCode, Query as Question, ResponseCode},
    rr::{DNSClass, Name, RData, Record, RecordType, rdata},
    serialize::binary::{BinDecodable, BinDecoder, BinEncodable},
};
use std::net::IpAddr;

/// How long clients may use an answer of ours, in seconds. Istio's proxy says the same.
const TTL: u32 = 30;
/// What every client takes over UDP (RFC 1035, section 4.2.1).
const LEAST: usize = 512;
/// What we send over UDP at most, whatever a client takes: what `net.core.wmem_default` and every resolver
/// out there can do.
const MOST: usize = 4096;
/// The header of a message.
pub(crate) const HEADER: usize = 12;

/// How a message came.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Transport {
    /// In a datagram.
    Udp,
    /// On a connection.
    Tcp,
}

impl Transport {
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::Udp => "udp",
            Self::Tcp => "tcp",
        }
    }
}

/// A question to us.
#[derive(Clone, Debug)]
pub(crate) struct Query {
    metadata: Metadata,
    question: Question,
    edns: Option<Edns>,
    pub(crate) transport: Transport,
    /// The name in lower case, without the final dot.
    pub(crate) name: String,
}

/// What a message is.
pub(crate) enum Parsed {
    Query(Query),
    /// Nothing that we serve, and this is what we say to it.
    Refused(Vec<u8>),
    /// Not even a header: there is nobody to answer to.
    Noise,
}

/// Reads what a client sent.
pub(crate) fn parse(message: &[u8], transport: Transport) -> Parsed {
    let Ok(Header { metadata, .. }) = Header::read(&mut BinDecoder::new(message)) else {
        return Parsed::Noise;
    };
    let refuse = |code, question: Option<&Question>| {
        let mut reply = reply_to(&metadata);
        reply.metadata.response_code = code;
        reply.queries.extend(question.cloned());
        Parsed::Refused(reply.to_vec().unwrap_or_default())
    };
    if metadata.message_type == MessageType::Response {
        return refuse(ResponseCode::FormErr, None);
    }
    if metadata.op_code != OpCode::Query {
        return refuse(ResponseCode::NotImp, None);
    }
    let Ok(whole) = Message::from_vec(message) else {
        return refuse(ResponseCode::FormErr, None);
    };
    let [question] = &*whole.queries else { return refuse(ResponseCode::FormErr, None) };
    let name = question.name().to_lowercase().to_ascii();
    let query = Query {
        metadata,
        question: question.clone(),
        edns: whole.edns,
        transport,
        name: name.strip_suffix('.').unwrap_or(&name).to_owned(),
    };
    // RFC 6891, section 6.1.3: what we do not speak is answered with what we do.
    if query.edns.as_ref().is_some_and(|edns| edns.version() > 0) {
        return Parsed::Refused(query.error(ResponseCode::BADVERS));
    }
    match question.query_type() {
        // Answers of several messages.
        RecordType::AXFR | RecordType::IXFR => Parsed::Refused(query.error(ResponseCode::NotImp)),
        _ => Parsed::Query(query),
    }
}

fn reply_to(metadata: &Metadata) -> Message {
    let mut reply = Message::response(metadata.id, metadata.op_code);
    reply.metadata = Metadata::response_from_request(metadata);
    reply.metadata.recursion_available = true;
    reply
}

impl Query {
    /// The family of addresses that is asked for, if any.
    pub(crate) fn family(&self) -> Option<Family> {
        match (self.question.query_class(), self.question.query_type()) {
            (DNSClass::IN, RecordType::A) => Some(Family::V4),
            (DNSClass::IN, RecordType::AAAA) => Some(Family::V6),
            _ => None,
        }
    }

    /// The type in lower case, for people and for metrics: a peer cannot make up one that is not in the books.
    pub(crate) fn kind(&self) -> String {
        <&str>::from(self.question.query_type()).to_ascii_lowercase()
    }

    /// How long a reply may be.
    pub(crate) fn limit(&self) -> usize {
        match self.transport {
            Transport::Tcp => usize::from(u16::MAX),
            Transport::Udp => self
                .edns
                .as_ref()
                .map_or(LEAST, |edns| usize::from(edns.max_payload()).clamp(LEAST, MOST)),
        }
    }

    fn reply(&self) -> Message {
        let mut reply = reply_to(&self.metadata);
        reply.queries.push(self.question.clone());
        if let Some(edns) = &self.edns {
            let mut own = Edns::new();
            own.set_max_payload(edns.max_payload()).set_dnssec_ok(edns.flags().dnssec_ok);
            reply.edns = Some(own);
        }
        reply
    }

    /// A reply that says only this.
    pub(crate) fn error(&self, code: ResponseCode) -> Vec<u8> {
        let mut reply = self.reply();
        reply.metadata.response_code = code;
        reply.to_vec().unwrap_or_default()
    }

    /// SERVFAIL.
    pub(crate) fn failure(&self) -> Vec<u8> {
        self.error(ResponseCode::ServFail)
    }

    /// An answer without records.
    pub(crate) fn empty(&self) -> Vec<u8> {
        self.local(&Local::default())
    }

    /// Nothing but that the answer is too long, so that the client asks again by TCP.
    pub(crate) fn truncated(&self) -> Vec<u8> {
        let mut reply = self.reply();
        reply.metadata.truncation = true;
        reply.to_vec().unwrap_or_default()
    }

    /// An answer of ours, with as much of it as the client takes.
    pub(crate) fn local(&self, local: &Local) -> Vec<u8> {
        let mut reply = self.reply();
        reply.metadata.authoritative = true;
        let asked = self.question.name().to_lowercase();
        let canonical = local.canonical.as_deref().and_then(absolute);
        let owner = canonical.clone().unwrap_or_else(|| asked.clone());
        if let Some(canonical) = canonical {
            let data = RData::CNAME(rdata::CNAME(canonical));
            reply.answers.push(Record::from_rdata(asked, TTL, data));
        }
        let edns = reply.edns.take().and_then(|edns| edns.to_bytes().ok());
        let head = length(&reply);
        if let Some(ip) = local.ips.first() {
            reply.answers.push(Record::from_rdata(owner, TTL, RData::from(*ip)));
        }
        let mut bytes = reply.to_vec().unwrap_or_default();
        let room = self.limit().checked_sub(bytes.len() + edns.as_ref().map_or(0, Vec::len));
        let Some(room) = room else { return self.truncated() };
        let rest = local.ips.get(1..).unwrap_or_default();
        let written = more(&mut bytes, head, rest, room);
        let answers = reply.answers.len() + written;
        put(&mut bytes, ANSWERS, u16::try_from(answers).unwrap_or_default());
        // On a connection nobody could ask for more.
        if written < rest.len() && self.transport == Transport::Udp {
            flags(&mut bytes, TRUNCATED, 0);
        }
        if let Some(edns) = edns {
            put(&mut bytes, ADDITIONALS, 1);
            bytes.extend(edns);
        }
        bytes
    }

    /// Whether this is the server's reply to what we sent under this id.
    pub(crate) fn is_answered_by(&self, id: u16, reply: &[u8]) -> bool {
        let mut decoder = BinDecoder::new(reply);
        let Ok(Header { metadata, counts }) = Header::read(&mut decoder) else { return false };
        let expected = metadata.id == id && metadata.message_type == MessageType::Response;
        let same = match counts.queries {
            // Some servers do not repeat a question that they refuse.
            0 => metadata.response_code != ResponseCode::NoError,
            1 => Question::read(&mut decoder).is_ok_and(|question| question == self.question),
            _ => false,
        };
        expected && same
    }

    /// What a server's reply is to the client: under its own id, not from an authority, and no longer than it
    /// takes.
    pub(crate) fn forwarded(&self, mut reply: Vec<u8>) -> Vec<u8> {
        if reply.len() > self.limit() {
            return self.truncated();
        }
        put(&mut reply, ID, self.metadata.id);
        flags(&mut reply, RECURSION_AVAILABLE, AUTHORITATIVE);
        reply
    }
}

/// Places in the header.
const ID: usize = 0;
const FLAGS: usize = 2;
const ANSWERS: usize = 6;
const ADDITIONALS: usize = 10;
/// Bits of the flags.
const AUTHORITATIVE: u16 = 0x0400;
const TRUNCATED: u16 = 0x0200;
const RECURSION_AVAILABLE: u16 = 0x0080;
/// What a length byte begins with that is a pointer.
const POINTER: u8 = 0xc0;

fn put(message: &mut [u8], at: usize, value: u16) {
    if let Some(place) = message.get_mut(at..).and_then(|rest| rest.first_chunk_mut()) {
        *place = value.to_be_bytes();
    }
}

fn flags(message: &mut [u8], set: u16, clear: u16) {
    if let Some(place) = message.get_mut(FLAGS..).and_then(|rest| rest.first_chunk_mut()) {
        *place = ((u16::from_be_bytes(*place) | set) & !clear).to_be_bytes();
    }
}

/// Puts an id into a message.
pub(crate) fn set_id(message: &mut [u8], id: u16) {
    put(message, ID, id);
}

/// Writes address records like the one that begins at `first`, as far as there is room, and returns how many.
/// By hand, because hickory stops compressing names after some, and thousands are to fit.
fn more(message: &mut Vec<u8>, first: usize, ips: &[IpAddr], room: usize) -> usize {
    let written_out = u16::try_from(first).unwrap_or_default().to_be_bytes();
    let owner = match message.get(first..).and_then(|rest| rest.first_chunk::<2>()) {
        Some([high, low]) if high & POINTER == POINTER => [*high, *low],
        Some(_) | None => [written_out[0] | POINTER, written_out[1]],
    };
    let mut left = room;
    let mut count = 0;
    for ip in ips {
        let (kind, data) = match ip {
            IpAddr::V4(ip) => (RecordType::A, ip.octets().to_vec()),
            IpAddr::V6(ip) => (RecordType::AAAA, ip.octets().to_vec()),
        };
        let Some(after) = left.checked_sub(12 + data.len()) else { break };
        left = after;
        count += 1;
        message.extend(owner);
        message.extend(u16::from(kind).to_be_bytes());
        message.extend(u16::from(DNSClass::IN).to_be_bytes());
        message.extend(TTL.to_be_bytes());
        message.extend(u16::try_from(data.len()).unwrap_or_default().to_be_bytes());
        message.extend(data);
    }
    count
}

fn length(message: &Message) -> usize {
    message.to_vec().map_or(0, |bytes| bytes.len())
}

/// What a reply says, in short.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Outcome {
    pub(crate) code: ResponseCode,
    pub(crate) answers: u16,
}

pub(crate) fn outcome(reply: &[u8]) -> Option<Outcome> {
    let Header { metadata, counts } = Header::read(&mut BinDecoder::new(reply)).ok()?;
    Some(Outcome { code: metadata.response_code, answers: counts.answers })
}

fn absolute(text: &str) -> Option<Name> {
    let mut name = Name::from_labels(text.split('.').map(str::as_bytes)).ok()?;
    name.set_fqdn(true);
    Some(name)
}

#[cfg(test)]
mod tests;
