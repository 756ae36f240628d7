use std::collections::BTreeMap;

use mesh_proto::envoy::service::discovery::v3::{DeltaDiscoveryResponse, Resource};
use mesh_proto::istio::workload::{Address, NetworkAddress, Service, Workload, address::Type};
use prost::Message as _;
use prost_types::Any;

use super::*;
use crate::{Handler, Update};

/// A session with handlers that refuse what is called `bad…`.
struct Script {
    session: Session,
    handed: Vec<String>,
}

impl Handler<Address> for Script {
    fn handle(&mut self, updates: Vec<Update<Address>>) -> Result<(), Vec<Rejected>> {
        let mut rejected = Vec::new();
        for update in updates {
            let sign = match update {
                Update::Upsert { .. } => '+',
                Update::Unreadable { .. } => '?',
                Update::Remove { .. } => '-',
            };
            self.handed.push(format!("{sign}{}", update.name()));
            if sign == '+' && update.name().starts_with("bad") {
                let reason = "waypoint.destination: missing".to_owned();
                rejected.push(Rejected { name: update.name().to_owned(), reason });
            }
        }
        if rejected.is_empty() { Ok(()) } else { Err(rejected) }
    }
}

impl Script {
    fn new(on_demand: bool) -> Self {
        Self { session: Session::new(Node::default(), on_demand), handed: Vec::new() }
    }

    /// Takes a response; returns what was handed over, and the answer.
    fn take(&mut self, response: DeltaDiscoveryResponse) -> (Vec<String>, Answer) {
        let mut round = self.session.receive(response);
        while let Some(chunk) = self.session.next(&mut round) {
            let result = match chunk {
                Chunk::Addresses(updates) => self.handle(updates),
                Chunk::Policies(updates) => {
                    self.handed.extend(updates.iter().map(|update| format!("*{}", update.name())));
                    Ok(())
                }
            };
            round.handled(result);
        }
        (std::mem::take(&mut self.handed), self.session.finish(round))
    }

    fn versions(&mut self, kind: Kind) -> BTreeMap<String, String> {
        let requests = self.session.connect();
        let request = requests.into_iter().find(|request| request.type_url == kind.url());
        request.unwrap().initial_resource_versions.into_iter().collect()
    }
}

fn workload(uid: &str, ip: [u8; 4]) -> Address {
    let workload = Workload {
        uid: uid.to_owned(),
        addresses: vec![ip.to_vec().into()],
        ..Workload::default()
    };
    Address { r#type: Some(Type::Workload(workload)) }
}

fn resource(name: &str, version: &str, address: &Address) -> Resource {
    Resource {
        name: name.to_owned(),
        version: version.to_owned(),
        resource: Some(Any {
            type_url: Kind::Address.url().to_owned(),
            value: address.encode_to_vec(),
        }),
        aliases: Vec::new(),
    }
}

fn simple(name: &str, version: &str) -> Resource {
    resource(name, version, &workload(name, [10, 0, 0, 1]))
}

fn response(nonce: &str, resources: Vec<Resource>, removed: &[&str]) -> DeltaDiscoveryResponse {
    DeltaDiscoveryResponse {
        type_url: Kind::Address.url().to_owned(),
        nonce: nonce.to_owned(),
        resources,
        removed_resources: removed.iter().map(|name| (*name).to_owned()).collect(),
        ..DeltaDiscoveryResponse::default()
    }
}

fn map(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    pairs.iter().map(|(name, version)| ((*name).to_owned(), (*version).to_owned())).collect()
}

#[test]
fn a_connection_opens_with_one_request_per_type() {
    let requests = Script::new(false).session.connect();
    let urls: Vec<&str> = requests.iter().map(|request| request.type_url.as_str()).collect();
    assert_eq!(urls, [Kind::Address.url(), Kind::Authorization.url()]);
    for request in requests {
        assert!(request.node.is_some() && request.response_nonce.is_empty());
        assert!(request.resource_names_subscribe.is_empty());
        assert!(request.resource_names_unsubscribe.is_empty());
        assert!(request.initial_resource_versions.is_empty());
    }
}

#[test]
fn what_is_taken_is_acknowledged_and_claimed_again() {
    let mut script = Script::new(false);
    script.session.connect();
    let two = vec![simple("a", "00ff00ff00ff00ff"), simple("b", "v 1")];
    let (handed, answer) = script.take(response("n1", two, &[]));
    assert_eq!(handed, ["+a", "+b"]);
    assert_eq!(answer.first, Some(Kind::Address));
    let request = answer.request;
    assert_eq!(
        (request.response_nonce.as_str(), request.type_url.as_str()),
        ("n1", Kind::Address.url())
    );
    assert_eq!((request.error_detail, request.node), (None, None));
    assert_eq!(script.versions(Kind::Address), map(&[("a", "00ff00ff00ff00ff"), ("b", "v 1")]));

    let (handed, answer) = script.take(response("n2", vec![simple("c", "")], &["a", "unknown"]));
    assert_eq!(handed, ["-a", "-unknown", "+c"], "removals first");
    assert_eq!(answer.first, None);
    assert_eq!(script.versions(Kind::Address), map(&[("b", "v 1"), ("c", "")]));
}

#[test]
fn what_is_bad_is_named_and_costs_nobody_else() {
    let mut script = Script::new(false);
    let no_any = Resource { name: "empty".to_owned(), ..Resource::default() };
    let mut other = simple("other", "");
    other.resource.as_mut().unwrap().type_url = "x".to_owned();
    let mut broken = simple("broken", "");
    // Field 1, workload; within it field 3, addresses, as a number.
    broken.resource.as_mut().unwrap().value = vec![0x0a, 0x02, 0x18, 0x01];
    let resources = vec![simple("good", "1"), no_any, simple("bad", "1"), other, broken];
    let (handed, answer) = script.take(response("n1", resources, &[]));
    assert_eq!(handed, ["+good", "?empty", "+bad", "?other", "?broken"]);
    assert_eq!(answer.first, None, "not ready by a response that was not taken as a whole");
    let detail = answer.request.error_detail.unwrap();
    assert_eq!(detail.code, 0);
    let said: Vec<&str> = detail.message.split("; ").collect();
    assert_eq!(said.len(), 4, "{said:?}");
    assert!(said.contains(&"empty: resource: is not there"), "{said:?}");
    assert!(said.contains(&"other: resource: is of type x"), "{said:?}");
    assert!(said.contains(&"bad: waypoint.destination: missing"), "{said:?}");
    assert!(
        said.iter().any(|s| s.starts_with("broken: ") && s.contains("Workload.addresses")),
        "{said:?}"
    );
    assert_eq!(
        script.versions(Kind::Address),
        map(&[("good", "1")]),
        "so that the rest is sent again"
    );

    let (_, answer) = script.take(response("n2", vec![], &[]));
    assert_eq!(answer.first, Some(Kind::Address), "an empty one will do");
}

#[test]
fn a_rejected_update_keeps_the_claim_to_what_was_before() {
    let mut script = Script::new(false);
    script.take(response("n1", vec![simple("a", "1")], &[]));
    let mut broken = simple("a", "2");
    broken.resource = None;
    script.take(response("n2", vec![broken], &[]));
    assert_eq!(script.versions(Kind::Address), map(&[("a", "1")]));
    // The first version again: the handler must hear of it, as it did of the bad one.
    let (handed, _) = script.take(response("n3", vec![simple("a", "1")], &[]));
    assert_eq!(handed, ["+a"]);
}

#[test]
fn what_comes_again_unchanged_is_not_handed_over() {
    let mut script = Script::new(false);
    script.take(response("n1", vec![simple("a", ""), simple("b", "")], &[]));
    script.session.connect();
    let changed = resource("b", "", &workload("b", [10, 0, 0, 2]));
    let (handed, answer) = script.take(response("n2", vec![simple("a", ""), changed], &[]));
    assert_eq!(handed, ["+b"]);
    assert_eq!(answer.request.response_nonce, "n2");
    // Removed and sent again within one response, it is new.
    let (handed, _) = script.take(response("n3", vec![simple("a", "")], &["b"]));
    assert_eq!(handed, ["-b"]);
    let (handed, _) = script.take(response("n4", vec![simple("b", "")], &[]));
    assert_eq!(handed, ["+b"]);
}

#[test]
fn removed_and_sent_in_one_response_is_handed_over() {
    let mut script = Script::new(false);
    script.take(response("n1", vec![simple("a", "")], &[]));
    let (handed, _) = script.take(response("n2", vec![simple("a", "")], &["a"]));
    assert_eq!(handed, ["-a", "+a"]);
    assert_eq!(script.session.known(Kind::Address), 1);
}

#[test]
fn an_unknown_type_is_acknowledged_and_nothing_of_it_taken() {
    let mut script = Script::new(false);
    let mut strange = response("n9", vec![simple("a", "")], &["b"]);
    strange.type_url = "type.googleapis.com/strange".to_owned();
    let (handed, answer) = script.take(strange);
    assert!(handed.is_empty());
    assert_eq!(answer.request.type_url, "type.googleapis.com/strange");
    assert_eq!((answer.request.response_nonce.as_str(), answer.request.error_detail), ("n9", None));
    assert_eq!(answer.first, None);
}

#[test]
fn large_responses_come_in_chunks() {
    let mut script = Script::new(false);
    let names: Vec<String> =
        (0..1300).map(|n| if n % 2 == 0 { format!("w{n}") } else { format!("bad{n}") }).collect();
    let resources = names.iter().map(|name| simple(name, "")).collect();
    let mut round = script.session.receive(response("n", resources, &[]));
    let mut sizes = Vec::new();
    while let Some(chunk) = script.session.next(&mut round) {
        let Chunk::Addresses(updates) = chunk else { panic!("{chunk:?}") };
        sizes.push(updates.len());
        let result = script.handle(updates);
        round.handled(result);
    }
    let answer = script.session.finish(round);
    assert_eq!(sizes, [512, 512, 276]);
    assert_eq!((answer.rejected.len(), script.session.known(Kind::Address)), (650, 650));
}

#[test]
fn on_demand_only_what_was_asked_for() {
    let mut script = Script::new(true);
    let [addresses, policies] = script.session.connect().try_into().unwrap();
    let star = ["*".to_owned()];
    assert_eq!(
        (&addresses.resource_names_subscribe[..], &addresses.resource_names_unsubscribe[..]),
        (&star[..], &star[..])
    );
    assert!(policies.resource_names_subscribe.is_empty(), "policies are never on demand");

    let [request] = script.session.demand("/10.0.0.1").try_into().unwrap();
    assert_eq!(request.resource_names_subscribe, ["/10.0.0.1"]);
    assert!(request.node.is_none() && request.response_nonce.is_empty());
    assert!(script.session.demand("/10.0.0.1").is_empty(), "asked already");
    script.session.demand("ns/gone.example");
    // Not answered before the connection breaks: claimed without a version.
    assert_eq!(script.versions(Kind::Address), map(&[("/10.0.0.1", ""), ("ns/gone.example", "")]));

    // The answer has the workload's own name, and no aliases.
    let (_, answer) = script.take(response("n1", vec![simple("uid", "v")], &["ns/gone.example"]));
    assert_eq!(answer.answered, ["/10.0.0.1", "ns/gone.example"]);
    assert_eq!(script.versions(Kind::Address), map(&[("uid", "v")]));
    assert_eq!(script.session.demand("/10.0.0.1").len(), 1, "new to this connection");
    let (handed, answer) = script.take(response("n2", vec![simple("uid", "v")], &[]));
    assert_eq!((handed.len(), answer.answered.as_slice()), (0, &["/10.0.0.1".to_owned()][..]));
    // Asked for again: left first, because istiod answers only what is new.
    let [leave, again] = script.session.demand("/10.0.0.1").try_into().unwrap();
    assert_eq!(leave.resource_names_unsubscribe, ["/10.0.0.1"]);
    assert_eq!(again.resource_names_subscribe, ["/10.0.0.1"]);
}

#[test]
fn a_service_answers_for_its_names() {
    let mut script = Script::new(true);
    for name in ["net/fd00::1", "ns/host", "given", "bad-service"] {
        script.session.demand(name);
    }
    let vip = NetworkAddress {
        network: "net".to_owned(),
        address: "fd00::1".parse::<std::net::Ipv6Addr>().unwrap().octets().to_vec().into(),
        length: None,
    };
    let service = Service {
        namespace: "ns".to_owned(),
        hostname: "host".to_owned(),
        addresses: vec![vip],
        ..Service::default()
    };
    let service = Address { r#type: Some(Type::Service(service)) };
    let mut sent = resource("bad-service", "", &service);
    sent.aliases.push("given".to_owned());
    let (_, answer) = script.take(response("n", vec![sent], &[]));
    assert_eq!(answer.rejected.len(), 1);
    assert_eq!(
        answer.answered,
        ["bad-service", "given", "ns/host", "net/fd00::1"],
        "though it was rejected"
    );
}

#[test]
fn with_everything_subscribed_nothing_is_asked_for() {
    assert!(Script::new(false).session.demand("/10.0.0.1").is_empty());
}

#[test]
fn names_that_were_answered_are_left_when_there_are_many() {
    let mut script = Script::new(true);
    script.session.demand("uid");
    script.take(response("n", vec![simple("uid", "")], &[]));
    let mut left = Vec::new();
    for n in 0..2 * MOST_FOLLOWED {
        let name = format!("/10.0.{}.{}", n / 256, n % 256);
        script.session.demand(&name);
        let (_, answer) = script.take(response("n", Vec::new(), &[&name]));
        assert!(script.session.followed.len() <= MOST_FOLLOWED);
        left.extend(answer.leave.into_iter().flat_map(|leave| leave.resource_names_unsubscribe));
    }
    assert!(left.len() >= MOST_FOLLOWED);
    assert!(!left.contains(&"uid".to_owned()), "changes of a resource are still wanted");
    // A new connection follows nothing yet.
    script.session.connect();
    assert_eq!(script.session.demand("/10.0.0.1").len(), 1);
}
