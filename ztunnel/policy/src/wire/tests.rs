//! The evaluator against a naive one, which is written from Istio's rules on the message itself and knows
//! nothing of predicates.

use super::*;
use crate::{Attributes, Denial, Entry, PolicySet, decide};
use mesh_core::SpiffeId;
use proptest::{collection::vec, option, prelude::*, sample::select};
use serde_json::{Map, Value, json};

#[derive(Clone, Debug)]
struct Flow {
    source: Option<SpiffeId>,
    principal: Option<String>,
    from: IpAddr,
    to: IpAddr,
    port: u16,
}

impl Attributes for Flow {
    fn source(&self) -> Option<&SpiffeId> {
        self.source.as_ref()
    }
    fn principal(&self) -> Option<&str> {
        self.principal.as_deref()
    }
    fn source_ip(&self) -> IpAddr {
        self.from
    }
    fn destination_ip(&self) -> IpAddr {
        self.to
    }
    fn destination_port(&self) -> u16 {
        self.port
    }
}

/// Any rule; all clauses; any match; all families.
fn naive(message: &Message, flow: &Flow) -> bool {
    let is_deny = message.action == ProtoAction::Deny as i32;
    message.rules.iter().any(|rule| {
        rule.clauses.iter().all(|clause| {
            clause.matches.is_empty()
                || clause.matches.iter().any(|m| naive_match(m, flow, is_deny))
        })
    })
}

/// In a family: a hit in the positive list if it has any, and none in the negative one.
fn family<T>(positive: Vec<T>, negative: Vec<T>, hit: impl Fn(&T) -> bool) -> Option<bool> {
    if positive.is_empty() && negative.is_empty() {
        return None;
    }
    Some((positive.is_empty() || positive.iter().any(&hit)) && !negative.iter().any(&hit))
}

fn naive_match(m: &Match, flow: &Flow, is_deny: bool) -> bool {
    let texts = |list: &[proto::StringMatch]| {
        list.iter().filter_map(|m| m.match_type.clone()).collect::<Vec<_>>()
    };
    let text_hit = |m: &MatchType, text: &str| match m {
        MatchType::Exact(s) => s == text,
        MatchType::Prefix(s) => text.starts_with(s),
        MatchType::Suffix(s) => text.ends_with(s),
        MatchType::Presence(()) => !text.is_empty(),
    };
    let blocks = |list: &[proto::Address]| {
        let valid = |a: &&proto::Address| match a.address.len() {
            4 => a.length <= 32,
            16 => a.length <= 128,
            _ => false,
        };
        list.iter().filter(valid).cloned().collect::<Vec<_>>()
    };
    let block_hit = |block: &proto::Address, ip: IpAddr| {
        let ip = match ip {
            IpAddr::V4(ip) => ip.octets().to_vec(),
            IpAddr::V6(ip) => ip.octets().to_vec(),
        };
        let bit = |bytes: &[u8], at: usize| bytes[at / 8] >> (7 - at % 8) & 1;
        ip.len() == block.address.len()
            && (0..block.length as usize).all(|at| bit(&ip, at) == bit(&block.address, at))
    };
    let port_hit = |port: &u32| (*port & 0xffff) == u32::from(flow.port);
    let id = flow.source.as_ref();
    let account_hit = |account: &ServiceAccountMatch| {
        id.is_some_and(|id| {
            id.namespace.as_str() == account.namespace
                && id.service_account.as_str() == account.service_account
        })
    };
    let families = [
        family(texts(&m.namespaces), texts(&m.not_namespaces), |t| {
            text_hit(t, id.map_or("", |id| id.namespace.as_str()))
        }),
        family(texts(&m.principals), texts(&m.not_principals), |t| {
            flow.principal.as_ref().is_some_and(|principal| text_hit(t, principal))
        }),
        family(m.service_accounts.clone(), m.not_service_accounts.clone(), account_hit),
        family(blocks(&m.source_ips), blocks(&m.not_source_ips), |b| block_hit(b, flow.from)),
        family(blocks(&m.destination_ips), blocks(&m.not_destination_ips), |b| {
            block_hit(b, flow.to)
        }),
        family(m.destination_ports.clone(), m.not_destination_ports.clone(), port_hit),
    ];
    match families.iter().flatten().count() {
        0 => is_deny,
        _ => families.iter().flatten().all(|holds| *holds),
    }
}

fn text() -> impl Strategy<Value = proto::StringMatch> {
    let words = ["", "a", "b", "td", "td/ns/a/sa/x", "td/ns/", "sa/x", "x"];
    (select(words.to_vec()), 0..5).prop_map(|(word, kind)| proto::StringMatch {
        match_type: match kind {
            0 => Some(MatchType::Exact(word.to_owned())),
            1 => Some(MatchType::Prefix(word.to_owned())),
            2 => Some(MatchType::Suffix(word.to_owned())),
            3 => Some(MatchType::Presence(())),
            _ => None,
        },
    })
}

fn ip() -> impl Strategy<Value = IpAddr> {
    select(vec!["10.0.0.1", "10.0.0.2", "10.1.0.1", "fd00::1", "fd00::2", "0.0.0.0"])
        .prop_map(|ip| ip.parse().unwrap())
}

fn address() -> impl Strategy<Value = proto::Address> {
    let length = select(vec![0u32, 8, 15, 16, 31, 32, 33, 64, 127, 128, 129]);
    (ip(), length, 0..8).prop_map(|(ip, length, spoil)| {
        let mut address = match ip {
            IpAddr::V4(ip) => ip.octets().to_vec(),
            IpAddr::V6(ip) => ip.octets().to_vec(),
        };
        if spoil == 0 {
            address.pop();
        }
        proto::Address { address, length }
    })
}

fn account() -> impl Strategy<Value = ServiceAccountMatch> {
    // The last is no name: it matches nobody.
    (select(vec!["a", "b"]), select(vec!["x", "y", "no name"])).prop_map(|(namespace, account)| {
        ServiceAccountMatch { namespace: namespace.to_owned(), service_account: account.to_owned() }
    })
}

/// Mostly empty, so that the other fields decide as well.
fn few<T: fmt::Debug + Clone>(
    of: impl Strategy<Value = T> + 'static,
) -> impl Strategy<Value = Vec<T>> {
    option::weighted(0.25, vec(of, 1..3)).prop_map(Option::unwrap_or_default)
}

prop_compose! {
    fn one_match()(
        (namespaces, not_namespaces) in (few(text()), few(text())),
        (principals, not_principals) in (few(text()), few(text())),
        (source_ips, not_source_ips) in (few(address()), few(address())),
        (destination_ips, not_destination_ips) in (few(address()), few(address())),
        (destination_ports, not_destination_ports) in (few(port()), few(port())),
        (service_accounts, not_service_accounts) in (few(account()), few(account())),
    ) -> Match {
        Match {
            namespaces, not_namespaces, principals, not_principals, source_ips, not_source_ips,
            destination_ips, not_destination_ips, destination_ports, not_destination_ports,
            service_accounts, not_service_accounts, extensions: vec![],
        }
    }
}

/// 65616 is 80 in its low 16 bits.
fn port() -> impl Strategy<Value = u32> {
    select(vec![0u32, 80, 443, 65616])
}

fn message() -> impl Strategy<Value = Message> {
    let clause = vec(one_match(), 0..3).prop_map(|matches| Clause { matches });
    let rule = vec(clause, 0..3).prop_map(|clauses| Rule { clauses });
    (vec(rule, 0..3), any::<bool>(), any::<bool>()).prop_map(|(rules, deny, dry_run)| Message {
        name: "p".to_owned(),
        namespace: "ns".to_owned(),
        action: i32::from(deny),
        rules,
        dry_run,
        ..Message::default()
    })
}

fn flow() -> impl Strategy<Value = Flow> {
    let ids = ["spiffe://td/ns/a/sa/x", "spiffe://td/ns/b/sa/x", "spiffe://other/ns/a/sa/y"];
    let id = option::of(select(ids.to_vec()));
    (id, ip(), ip(), select(vec![80u16, 443, 81])).prop_map(|(id, from, to, port)| Flow {
        source: id.map(|id| id.parse().unwrap()),
        principal: id.map(|id| id.trim_start_matches("spiffe://").to_owned()),
        from,
        to,
        port,
    })
}

fn read(message: &Message) -> Authorization {
    Authorization::read(message.clone(), &mut Interner::default()).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]

    #[test]
    fn a_policy_matches_as_naively(message in message(), flow in flow()) {
        prop_assert_eq!(read(&message).policy.when.holds(&flow), naive(&message, &flow));
    }

    #[test]
    fn a_set_decides_as_naively(messages in vec(message(), 0..5), flow in flow()) {
        let entries = messages.iter().map(|m| Entry::Known(read(m).policy)).collect();
        let enforced = |deny: bool| {
            messages.iter().filter(move |m| !m.dry_run && (m.action == 1) == deny)
        };
        let expect = if enforced(true).any(|m| naive(m, &flow)) {
            Some(Denial::Denied("ns/p".parse().unwrap()))
        } else if enforced(false).next().is_none() || enforced(false).any(|m| naive(m, &flow)) {
            None
        } else {
            Some(Denial::NotAllowed)
        };
        prop_assert_eq!(decide(&PolicySet::new(1, entries), &flow).err(), expect);
    }

    /// The rules are not kept: what is dumped is read back from the compiled condition.
    #[test]
    fn the_dump_says_what_was_sent(message in message()) {
        let rules: Value = message
            .rules
            .iter()
            .map(|rule| -> Value {
                rule.clauses.iter().map(|c| c.matches.iter().map(dumped).collect::<Value>()).collect()
            })
            .collect();
        let dump = read(&message).dump();
        prop_assert_eq!(&dump["rules"], &rules);
        prop_assert_eq!(&dump["name"], "p");
    }
}

fn dumped(m: &Match) -> Value {
    let text = |m: &proto::StringMatch| match m.match_type.as_ref()? {
        MatchType::Exact(text) => Some(json!({ "Exact": text })),
        MatchType::Prefix(text) => Some(json!({ "Prefix": text })),
        MatchType::Suffix(text) => Some(json!({ "Suffix": text })),
        MatchType::Presence(()) => Some(json!({ "Presence": [] })),
    };
    let texts = |list: &[proto::StringMatch]| list.iter().filter_map(text).collect::<Vec<_>>();
    let blocks = |list: &[proto::Address]| {
        list.iter().filter_map(block).map(|b| Value::from(b.to_string())).collect::<Vec<_>>()
    };
    let ports = |list: &[u32]| list.iter().map(|port| Value::from(port & 0xffff)).collect();
    let accounts = |list: &[ServiceAccountMatch]| {
        let named = list.iter().filter(|a| a.service_account != "no name");
        named
            .map(|a| json!({ "namespace": a.namespace, "serviceAccount": a.service_account }))
            .collect::<Vec<_>>()
    };
    let lists = [
        ("namespaces", texts(&m.namespaces)),
        ("notNamespaces", texts(&m.not_namespaces)),
        ("principals", texts(&m.principals)),
        ("notPrincipals", texts(&m.not_principals)),
        ("serviceAccounts", accounts(&m.service_accounts)),
        ("notServiceAccounts", accounts(&m.not_service_accounts)),
        ("sourceIps", blocks(&m.source_ips)),
        ("notSourceIps", blocks(&m.not_source_ips)),
        ("destinationIps", blocks(&m.destination_ips)),
        ("notDestinationIps", blocks(&m.not_destination_ips)),
        ("destinationPorts", ports(&m.destination_ports)),
        ("notDestinationPorts", ports(&m.not_destination_ports)),
    ];
    let filled = lists.into_iter().filter(|(_, list)| !list.is_empty());
    filled.map(|(key, list)| (key.to_owned(), Value::from(list))).collect::<Map<_, _>>().into()
}

/// `DENY` of GET from namespace `x`, as istiod sends it: the HTTP part is a match without a field.
#[test]
fn a_deny_rule_on_http_denies_without_its_http_part() {
    let exact = MatchType::Exact("a".to_owned());
    let from_a = Match {
        namespaces: vec![proto::StringMatch { match_type: Some(exact) }],
        ..Match::default()
    };
    let clauses = [Match::default(), from_a].map(|m| Clause { matches: vec![m] }).to_vec();
    let flow = Flow {
        source: Some("spiffe://td/ns/a/sa/x".parse().unwrap()),
        principal: Some("td/ns/a/sa/x".to_owned()),
        from: [10, 0, 0, 1].into(),
        to: [10, 0, 0, 2].into(),
        port: 80,
    };
    let other = Flow { source: None, principal: None, ..flow.clone() };
    for (action, same, another) in
        [(ProtoAction::Deny, true, false), (ProtoAction::Allow, false, false)]
    {
        let rules = vec![Rule { clauses: clauses.clone() }];
        let message = Message {
            name: "p".into(),
            namespace: "ns".into(),
            action: action.into(),
            rules,
            ..Message::default()
        };
        let when = &read(&message).policy.when;
        assert_eq!((when.holds(&flow), when.holds(&other)), (same, another), "{action:?}");
        assert!(has_empty_match(when) == (action == ProtoAction::Deny));
    }
}

#[test]
fn unknown_values_are_refused() {
    let message = |scope, action| Message {
        name: "p".into(),
        namespace: "ns".into(),
        scope,
        action,
        ..Message::default()
    };
    let read = |message| Authorization::read(message, &mut Interner::default());
    assert_eq!(read(message(9, 0)), Err(InvalidAuthorization::Scope(9)));
    let error = read(message(1, 9)).unwrap_err();
    assert_eq!(error, InvalidAuthorization::Action(9, Scope::Namespace));
    assert_eq!(
        (error.scope(), error.to_string()),
        (Some(Scope::Namespace), "action: unknown value 9".into())
    );
}

/// The scope is told from what can be read; the rules need not be right.
#[test]
fn the_scope_of_what_cannot_be_read() {
    let bytes = |scope: i32, rest: &[u8]| {
        let message = Message { name: "a".to_owned(), scope, ..Message::default() };
        [prost::Message::encode_to_vec(&message).as_slice(), rest].concat()
    };
    // A list of rules: cut, and with a rule that is none.
    let (cut, odd): (&[u8], &[u8]) = (&[0x2a, 0x7f], &[0x2a, 0x02, 0x08, 0x01]);
    for (bytes, is) in [
        (bytes(1, cut), Some(Scope::Namespace)),
        (bytes(2, odd), Some(Scope::WorkloadSelector)),
        (bytes(0, odd), Some(Scope::Global)),
        (bytes(0, cut), None),
        (bytes(9, odd), None),
        (Vec::new(), None),
        // The scope itself, as a text: the widest.
        (vec![0x1a, 0x01, 0x31], Some(Scope::Global)),
    ] {
        assert_eq!(scope_of_unreadable(&bytes), is, "{bytes:x?}");
    }
}
