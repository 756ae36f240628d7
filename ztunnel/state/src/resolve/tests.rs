use super::*;
use crate::{
    Handle,
    testing::{ip, key, service, serving, with, workload, writer},
};
use mesh_core::{ApplicationTunnel, Hostname, LoadBalancing, Locality, PortMap};
use proptest::{collection::vec, prelude::*, sample::select};
use std::collections::BTreeMap;

fn place(workload: Workload, region: &str, zone: &str) -> Workload {
    with(workload, |t| {
        t.locality = Arc::new(Locality {
            region: region.parse().unwrap(),
            zone: zone.parse().unwrap(),
            subzone: "".parse().unwrap(),
        });
    })
}

fn balanced(service: Service, preferences: &[Scope], mode: Mode) -> Service {
    let health = HealthPolicy::OnlyHealthy;
    let preferences = preferences.to_vec();
    Service { load_balancing: Some(LoadBalancing { preferences, mode, health }), ..service }
}

fn on_network(workload: Workload, network: &str) -> Workload {
    with(workload, |t| t.network = network.parse().unwrap())
}

fn mesh(service: Service, endpoints: impl IntoIterator<Item = Workload>) -> Handle {
    let mut writer = writer();
    let name = service.key.to_string();
    writer.apply([service.into()]);
    writer.apply(endpoints.into_iter().map(|w| serving(w, &name, &[]).into()));
    writer.handle()
}

fn ask(handle: &Handle, source: &Workload, port: u16, seed: u64) -> Option<String> {
    let query = Query { source, seed, resolution: Resolution::Standard };
    let found =
        handle.read(|view| view.upstream_of(view.service(&key("ns/s.ns")).unwrap(), port, query));
    match found {
        Found::Upstream(upstream) => Some(format!("{}:{}", upstream.workload.name, upstream.port)),
        Found::Passthrough(_) => Some("passthrough".to_owned()),
        Found::NoEndpoint(_) | Found::Nobody => None,
    }
}

/// All that may be chosen, by many seeds.
fn chosen(handle: &Handle, source: &Workload) -> Vec<String> {
    let all: BTreeMap<_, _> =
        (0..200).filter_map(|s| Some((ask(handle, source, 80, s)?, ()))).collect();
    all.into_keys().map(|name| name.trim_end_matches(":8080").to_owned()).collect()
}

/// Each row: the preferences, what they mean, and who may be chosen for a client in r1/z1 on node n1.
#[test]
fn ranks() {
    use Mode::{Failover, Standard, Strict};
    use Scope::{Network, Node, Region, Zone};
    let source = place(workload("client", &["10.0.0.9"]), "r1", "z1");
    let gateway = |w: Workload| on_network(w, "far");
    let endpoints = || {
        let elsewhere = |w: Workload| Workload { node: "n2".parse().unwrap(), ..w };
        [
            place(workload("same", &["10.0.0.1"]), "r1", "z1"),
            elsewhere(place(workload("zone", &["10.0.0.2"]), "r1", "z2")),
            elsewhere(place(workload("region", &["10.0.0.3"]), "r2", "z1")),
            elsewhere(gateway(place(workload("far", &["10.0.0.4"]), "r1", "z1"))),
        ]
    };
    for (name, preferences, mode, without, expect) in [
        ("any", &[][..], Standard, "", "far region same zone"),
        (
            "preferences that mean nothing",
            &[Region, Zone][..],
            Standard,
            "",
            "far region same zone",
        ),
        ("best locality", &[Region, Zone][..], Failover, "", "far same"),
        ("next best", &[Region, Zone][..], Failover, "same far", "zone"),
        ("none matches", &[Region, Zone][..], Failover, "same far zone", "region"),
        (
            "zone counts only in the region",
            &[Region, Zone][..],
            Failover,
            "same far zone",
            "region",
        ),
        ("strict", &[Region, Zone][..], Strict, "", "far same"),
        ("strict, none", &[Node][..], Strict, "same far", ""),
        ("network first", &[Network, Region, Zone][..], Failover, "", "same"),
        (
            "own network before locality",
            &[Network, Region, Zone][..],
            Failover,
            "same zone",
            "region",
        ),
        ("network last", &[Region, Zone, Network][..], Failover, "same", "far"),
        ("strict on network", &[Network, Region][..], Strict, "same zone", ""),
        ("strict on nothing", &[][..], Strict, "", "far region same zone"),
    ] {
        let endpoints = endpoints().into_iter().filter(|w| !without.contains(w.name.as_str()));
        let handle = mesh(balanced(service("ns/s.ns", &[]), preferences, mode), endpoints);
        assert_eq!(chosen(&handle, &source).join(" "), expect, "{name}");
    }
}

#[test]
fn who_is_a_candidate() {
    let source = workload("client", &["10.0.0.9"]);
    let sick = |w| Workload { health: Health::Unhealthy, ..w };
    let host = |w| Workload { hostname: Some("h.x".parse::<Hostname>().unwrap()), ..w };
    let behind = |w| {
        let destination = Destination::Address(NetworkAddress {
            network: NetworkId::default(),
            ip: ip("10.0.0.8"),
        });
        let gateway = Box::new(Gateway { destination, hbone_port: 15008 });
        with(w, |t| t.network_gateway = Some(gateway))
    };
    for (name, endpoint, expect) in [
        ("healthy", workload("w", &["10.0.0.1"]), true),
        ("unhealthy", sick(workload("w", &["10.0.0.1"])), false),
        ("nowhere", workload("w", &[]), false),
        ("by name", host(workload("w", &[])), true),
        ("behind a gateway of our own network", behind(workload("w", &[])), false),
        ("behind another network's", on_network(behind(workload("w", &[])), "far"), true),
        ("of another network, without gateway", on_network(workload("w", &[]), "far"), false),
        ("weightless", Workload { capacity: 0, ..workload("w", &["10.0.0.1"]) }, false),
    ] {
        let handle = mesh(service("ns/s.ns", &[]), [endpoint]);
        assert_eq!(ask(&handle, &source, 80, 1).is_some(), expect, "{name}");
    }
}

/// A service may take its unhealthy endpoints back: they are kept.
#[test]
fn the_health_policy_can_change() {
    let mut writer = writer();
    let source = workload("client", &["10.0.0.9"]);
    let sick = Workload { health: Health::Unhealthy, ..workload("w", &["10.0.0.1"]) };
    writer.apply([service("ns/s.ns", &[]).into(), serving(sick, "ns/s.ns", &[]).into()]);
    let handle = writer.handle();
    assert_eq!(ask(&handle, &source, 80, 1), None);
    let health = HealthPolicy::AllowAll;
    let load_balancing = Some(LoadBalancing { preferences: vec![], mode: Mode::Standard, health });
    writer.apply([Service { load_balancing, ..service("ns/s.ns", &[]) }.into()]);
    assert_eq!(ask(&handle, &source, 80, 1).as_deref(), Some("w:8080"));
}

/// Each row: what the service says of port 80, what the endpoint does, its application's tunnel, and the port
/// by either rule.
#[test]
fn ports() {
    let tunnel = |port| Some(ApplicationTunnel { proxy_protocol: true, port });
    for (name, declared, own, tunnel, standard, waypoint) in [
        ("the service's", Some(8080), None, None, Some(8080), Some(8080)),
        ("the endpoint's own", Some(8080), Some(9090), None, Some(9090), Some(9090)),
        ("left to the endpoint", Some(0), Some(9090), None, Some(9090), Some(9090)),
        ("left to nobody", Some(0), None, None, None, None),
        ("undeclared", None, Some(9090), None, None, None),
        ("undeclared, with a tunnel", None, None, tunnel(Some(15088)), None, Some(80)),
        ("left to a tunnel with a port", Some(0), None, tunnel(Some(15088)), None, Some(80)),
        ("a tunnel without a port", None, None, tunnel(None), None, None),
        ("a tunnel, and its own", None, Some(9090), tunnel(None), None, Some(9090)),
    ] {
        let map = |target| PortMap { service: 80, target };
        let svc =
            Service { ports: declared.map(map).into_iter().collect(), ..service("ns/s.ns", &[]) };
        let own: Vec<_> = own.map(|target| (80, target)).into_iter().collect();
        let endpoint = serving(workload("w", &[]), "ns/s.ns", &own);
        let endpoint = with(endpoint, |t| t.application_tunnel = tunnel);
        let port = |resolution| target_port(&svc, &endpoint, 80, resolution);
        assert_eq!(port(Resolution::Standard), standard, "{name}");
        assert_eq!(port(Resolution::Waypoint), waypoint, "{name}, waypoint");
    }
}

/// Among many endpoints not all are weighed; their weights count all the same.
#[test]
fn draws_are_as_likely_as_weights() {
    let source = workload("client", &["10.0.0.9"]);
    let endpoint = |i: u32| Workload {
        // Every fourth has three times the weight, every tenth cannot be used.
        capacity: if i.is_multiple_of(4) { 3 } else { 1 },
        health: if i.is_multiple_of(10) { Health::Unhealthy } else { Health::Healthy },
        ..workload(&format!("w{i}"), &["10.0.0.1"])
    };
    let handle = mesh(service("ns/s.ns", &[]), (0..200).map(endpoint));
    let mut hits = BTreeMap::<String, u32>::new();
    for seed in 0..40_000 {
        *hits.entry(ask(&handle, &source, 80, seed).unwrap()).or_default() += 1;
    }
    let share = |of: &dyn Fn(u32) -> bool| {
        (0..200).filter(|i| of(*i)).filter_map(|i| hits.get(&format!("w{i}:8080"))).sum::<u32>()
    };
    assert_eq!(share(&|i| i.is_multiple_of(10)), 0, "unusable");
    // 40 heavy ones that can be used, and 140 light ones: 120 to 140.
    let heavy = f64::from(share(&|i| i.is_multiple_of(4))) / 40_000.0;
    assert!((heavy - 120.0 / 260.0).abs() < 0.02, "{heavy}");
    let most = hits.values().max().unwrap();
    assert!(*most < 650, "one in 87 at most, of 40 000: {most}");
}

/// Where hardly anybody can be used, that one is found nevertheless.
#[test]
fn the_last_one_left_is_found() {
    let source = workload("client", &["10.0.0.9"]);
    let endpoint = |i: u32| Workload {
        health: if i == 77 { Health::Healthy } else { Health::Unhealthy },
        ..workload(&format!("w{i}"), &["10.0.0.1"])
    };
    let handle = mesh(service("ns/s.ns", &[]), (0..5000).map(endpoint));
    for seed in 0..20 {
        assert_eq!(ask(&handle, &source, 80, seed).as_deref(), Some("w77:8080"));
    }
}

#[test]
fn addresses_by_family() {
    let both = workload("w", &["10.0.0.1", "10.0.0.2", "fd00::1"]);
    let v4 = workload("w", &["10.0.0.1"]);
    let families = |ip_families| Service { ip_families, ..service("ns/s.ns", &[]) };
    for (name, workload, service, asked, expect) in [
        ("its own", &both, None, "10.0.0.2", Some("10.0.0.2")),
        ("same family", &both, None, "fd01::1", Some("fd00::1")),
        ("same family, v4", &both, None, "10.9.9.9", Some("10.0.0.1")),
        ("the other family", &v4, None, "fd01::1", Some("10.0.0.1")),
        ("the service's only", &both, Some(IpFamilies::V6), "10.9.9.9", Some("fd00::1")),
        ("none of the service's", &v4, Some(IpFamilies::V6), "10.9.9.9", None),
        (
            "own address, whatever the service says",
            &v4,
            Some(IpFamilies::V6),
            "10.0.0.1",
            Some("10.0.0.1"),
        ),
        ("dual", &both, Some(IpFamilies::Dual), "fd01::1", Some("fd00::1")),
    ] {
        let service = service.map(families);
        let found = choose_ip(workload, service.as_ref(), ip(asked));
        assert_eq!(found, expect.map(ip), "{name}");
    }
}

proptest! {
    /// The rank of an endpoint: a naive reading of the rule, compared as an order.
    #[test]
    fn no_endpoint_that_is_passed_over_is_nearer(
        preferences in vec(select(vec![
            Scope::Network, Scope::Region, Scope::Zone, Scope::Node, Scope::Cluster,
        ]), 0..5),
        endpoints in vec((any::<bool>(), any::<bool>(), any::<bool>(), any::<bool>(), any::<bool>()), 1..6),
        seed in any::<u64>(),
    ) {
        let source = place(workload("client", &["10.0.0.9"]), "r", "z");
        let make = |(i, &(network, region, zone, node, cluster)): (usize, &(bool, bool, bool, bool, bool))| {
            let word = |same, text: &'static str| if same { text } else { "other" };
            let w = place(workload(&format!("w{i}"), &["10.0.0.1"]), word(region, "r"), word(zone, "z"));
            let w = on_network(w, if network { "" } else { "far" });
            let w = with(w, |t| t.cluster = if cluster { "" } else { "other" }.parse().unwrap());
            Workload { node: word(node, "n1").parse().unwrap(), ..w }
        };
        let all: Vec<_> = endpoints.iter().enumerate().map(make).collect();
        // (own network if that is the first preference, matches before the first mismatch of the rest)
        let near = |w: &Workload| {
            let rest = match preferences.split_first() {
                Some((Scope::Network, rest)) => rest,
                _ => &preferences,
            };
            let count = rest.iter().take_while(|scope| matches(**scope, &source, w)).count();
            let network = rest.len() < preferences.len() && w.network == source.network;
            (network, count)
        };
        let svc = balanced(service("ns/s.ns", &[]), &preferences, Mode::Failover);
        let handle = mesh(svc, all.clone());
        let name = ask(&handle, &source, 80, seed).unwrap();
        let taken = all.iter().find(|w| format!("{}:8080", w.name) == name).unwrap();
        for other in &all {
            prop_assert!(near(taken) >= near(other), "{} before {}", name, other.name);
        }
    }
}
