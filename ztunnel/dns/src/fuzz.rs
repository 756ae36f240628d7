//! Invariants of the parser of what clients and servers send. Plain functions: the tests drive them.

use crate::{
    Transport,
    message::{HEADER, Parsed, Query, parse},
    resolve::Local,
};
use hickory_proto::op::{Message, MessageType};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Whatever a client sends, a reply to it is a message with its id, as long as the client takes at most.
///
/// # Panics
///
/// Panics where that does not hold.
pub fn query(bytes: &[u8]) {
    for transport in [Transport::Udp, Transport::Tcp] {
        match parse(bytes, transport) {
            Parsed::Noise => assert!(bytes.len() < HEADER, "a header is a header"),
            Parsed::Refused(reply) => check(bytes, &reply, 512),
            Parsed::Query(query) => replies(bytes, &query),
        }
    }
}

fn replies(bytes: &[u8], query: &Query) {
    let many = |ip: IpAddr, count: usize| Local { ips: vec![ip; count], ..Local::default() };
    for count in [0, 1, 40, 5000] {
        check(bytes, &query.local(&many(Ipv4Addr::LOCALHOST.into(), count)), query.limit());
        check(bytes, &query.local(&many(Ipv6Addr::LOCALHOST.into(), count)), query.limit());
    }
    check(bytes, &query.failure(), query.limit());
    check(bytes, &query.truncated(), query.limit());
    // What came, as if it were a server's reply.
    let _decided = query.is_answered_by(0, bytes);
    let forwarded = query.forwarded(bytes.to_vec());
    assert!(forwarded.len() <= query.limit(), "{} bytes", forwarded.len());
    assert_eq!(forwarded.get(..2), bytes.get(..2), "the id");
}

fn check(query: &[u8], reply: &[u8], limit: usize) {
    assert!(reply.len() <= limit, "{} bytes where {limit} are allowed", reply.len());
    assert_eq!(reply.get(..2), query.get(..2), "the id");
    let parsed = Message::from_vec(reply);
    let parsed = parsed.unwrap_or_else(|error| unreachable!("our reply does not parse: {error}"));
    assert_eq!(parsed.metadata.message_type, MessageType::Response);
}
