use super::*;
use crate::testing::ask;
use proptest::{collection::vec, prelude::*};

fn query(message: &[u8], transport: Transport) -> Query {
    match parse(message, transport) {
        Parsed::Query(query) => query,
        Parsed::Refused(_) | Parsed::Noise => panic!("not a query: {message:?}"),
    }
}

fn refusal(message: &[u8]) -> Message {
    match parse(message, Transport::Udp) {
        Parsed::Refused(reply) => Message::from_vec(&reply).unwrap(),
        Parsed::Query(_) | Parsed::Noise => panic!("not refused"),
    }
}

fn flags_of(reply: &[u8]) -> u16 {
    u16::from_be_bytes([reply[2], reply[3]])
}

fn local(ips: &[&str]) -> Local {
    Local { ips: ips.iter().map(|ip| ip.parse().unwrap()).collect(), ..Local::default() }
}

#[test]
fn an_answer_of_ours() {
    let query = query(&ask("Web.NS1.", RecordType::A, None), Transport::Udp);
    assert_eq!((query.name.as_str(), query.family()), ("web.ns1", Some(Family::V4)));
    let bytes = query.local(&local(&["10.9.0.1", "10.9.0.2"]));
    assert_eq!(flags_of(&bytes), 0x8580, "QR AA RD RA");
    let reply = Message::from_vec(&bytes).unwrap();
    assert_eq!(reply.metadata.id, 4711);
    assert_eq!(reply.queries[0].name().to_ascii(), "Web.NS1.", "as it was asked");
    let owners: Vec<_> = reply.answers.iter().map(|r| (r.name.to_ascii(), r.ttl)).collect();
    assert_eq!(owners, [("web.ns1.".to_owned(), 30), ("web.ns1.".to_owned(), 30)]);
    assert!(reply.edns.is_none(), "nobody asked for it");
    assert_eq!(flags_of(&query.empty()), 0x8580);
    assert_eq!(flags_of(&query.failure()), 0x8182);
}

#[test]
fn an_alias_comes_first() {
    let query = query(&ask("x.com.ns1.svc.mesh.test.", RecordType::AAAA, None), Transport::Udp);
    let answer = Local { canonical: Some("x.com".to_owned()), ..local(&["fd00::1"]) };
    let reply = Message::from_vec(&query.local(&answer)).unwrap();
    let shown: Vec<String> = reply.answers.iter().map(ToString::to_string).collect();
    assert_eq!(shown, ["x.com.ns1.svc.mesh.test. 30 IN CNAME x.com.", "x.com. 30 IN AAAA fd00::1"]);
}

#[test]
fn edns_is_mirrored() {
    for (sent, expected) in [(Some(1232), Some(1232)), (Some(9), Some(512)), (None, None)] {
        let query = query(&ask("a.", RecordType::A, sent), Transport::Udp);
        for reply in [query.local(&local(&["10.0.0.1"])), query.failure(), query.truncated()] {
            let edns = Message::from_vec(&reply).unwrap().edns;
            assert_eq!(edns.as_ref().map(Edns::max_payload), expected);
            assert!(edns.is_none_or(|edns| edns.flags().dnssec_ok), "the DO bit");
        }
    }
}

#[test]
fn what_is_not_served_is_told_so() {
    let good = ask("a.b.", RecordType::A, None);
    let with = |at: usize, byte: u8| {
        let mut message = good.clone();
        message[at] = byte;
        message
    };
    for (name, message, code) in [
        ("a response", with(2, 0x81), ResponseCode::FormErr),
        ("an update", with(2, 0x29), ResponseCode::NotImp),
        ("two questions", with(5, 2), ResponseCode::FormErr),
        ("no question", with(5, 0), ResponseCode::FormErr),
        ("cut short", good[..good.len() - 1].to_vec(), ResponseCode::FormErr),
        ("a zone transfer", ask("a.", RecordType::AXFR, None), ResponseCode::NotImp),
    ] {
        let reply = refusal(&message);
        assert_eq!(reply.metadata.response_code, code, "{name}");
        assert_eq!(reply.metadata.id, 4711, "{name}");
    }
    let mut versioned = ask("a.", RecordType::A, Some(1232));
    let at = versioned.len() - 5;
    versioned[at] = 1;
    let reply = refusal(&versioned);
    assert_eq!(u16::from(reply.metadata.response_code), 16, "BADVERS");
    assert_eq!(reply.edns.unwrap().version(), 0, "the one that we speak");
    assert!(matches!(parse(&good[..11], Transport::Udp), Parsed::Noise));
}

#[test]
fn types_that_are_not_in_the_books_share_a_word() {
    let kind = |kind| query(&ask("a.", kind, None), Transport::Udp).kind();
    assert_eq!(kind(RecordType::AAAA), "aaaa");
    assert_eq!(kind(RecordType::Unknown(4000)), "unknown");
    assert_eq!(kind(RecordType::Unknown(65000)), "unknown");
}

#[test]
fn a_long_answer_is_cut_and_says_so() {
    let many = Local { ips: vec![IpAddr::from([10, 0, 0, 1]); 6000], ..Local::default() };
    let six = Local { ips: vec!["fd00::1".parse().unwrap(); 6000], ..Local::default() };
    for (name, payload, transport, limit) in [
        ("plain", None, Transport::Udp, 512),
        ("EDNS", Some(1232), Transport::Udp, 1232),
        ("EDNS, much", Some(65000), Transport::Udp, 4096),
        ("a connection", None, Transport::Tcp, 65535),
    ] {
        for answer in [&many, &six] {
            let query = query(&ask("a.Example.com.", RecordType::A, payload), transport);
            let bytes = query.local(answer);
            assert!((limit - 60..=limit).contains(&bytes.len()), "{name}: {}", bytes.len());
            let reply = Message::from_vec(&bytes).unwrap();
            assert_eq!(reply.metadata.truncation, transport == Transport::Udp, "{name}");
            assert_eq!(reply.edns.is_some(), payload.is_some(), "{name}");
            let owner = |record: &Record| record.name.to_ascii() == "a.example.com.";
            assert!(reply.answers.iter().all(owner), "{name}");
        }
    }
}

#[test]
fn a_server_s_reply_passes_as_it_is() {
    let query = query(&ask("a.", RecordType::TXT, None), Transport::Udp);
    let mut reply = Message::from_vec(&ask("A.", RecordType::TXT, None)).unwrap();
    reply.metadata.message_type = MessageType::Response;
    reply.metadata.authoritative = true;
    reply.metadata.id = 5;
    let bytes = reply.to_vec().unwrap();
    assert!(query.is_answered_by(5, &bytes));
    assert!(!query.is_answered_by(6, &bytes), "another id");
    let forwarded = query.forwarded(bytes.clone());
    assert_eq!(flags_of(&forwarded), 0x8180);
    assert_eq!(forwarded[..2], 4711_u16.to_be_bytes());
    assert_eq!(forwarded[4..], bytes[4..]);
    let other = Message::from_vec(&ask("b.", RecordType::TXT, None)).unwrap();
    reply.queries = other.queries;
    assert!(!query.is_answered_by(5, &reply.to_vec().unwrap()), "another question");
    let long = [bytes, vec![0; 600]].concat();
    let cut = Message::from_vec(&query.forwarded(long)).unwrap();
    assert!(cut.metadata.truncation, "longer than the client takes");
}

proptest! {
    #[test]
    fn whatever_is_sent_the_reply_fits(bytes in vec(any::<u8>(), 0..600)) {
        crate::fuzz::query(&bytes);
    }

    #[test]
    fn whatever_is_asked_the_reply_fits(
        labels in vec("[a-zA-Z0-9_][a-zA-Z0-9_-]{0,19}", 1..10),
        kind in any::<u16>(),
        payload in proptest::option::of(any::<u16>()),
    ) {
        let name = labels.join(".") + ".";
        crate::fuzz::query(&ask(&name, RecordType::from(kind), payload));
    }
}
