//! Each row of the contract: what is known, who asks for what, and the plan.

use super::*;
use crate::resources::{self, Sources};
use mesh_core::NetworkId;
use mesh_runtime::admin::Dump;
use mesh_state::{Handle, Writer};

const MESH: &str = r#"
workloads:
- {uid: c//Pod/ns/client, name: client, namespace: ns, serviceAccount: client, workloadIps: [10.0.0.1, "fd00::1"], protocol: HBONE, node: n1, locality: {region: r1, zone: z1}}
- {uid: c//Pod/ns/a, name: a, namespace: ns, serviceAccount: a, workloadIps: [10.0.0.2, "fd00::2"], protocol: HBONE, node: n1, locality: {region: r1, zone: z1}, services: {ns/svc.ns: {80: 8080}, ns/near.ns: {80: 8080}, ns/strict.ns: {80: 8080}}}
- {uid: c//Pod/ns/b, name: b, namespace: ns, serviceAccount: b, workloadIps: [10.0.0.3], protocol: HBONE, node: n2, locality: {region: r1, zone: z2}, services: {ns/near.ns: {80: 9090}}}
- {uid: c//Pod/ns/plain, name: plain, namespace: ns, workloadIps: [10.0.0.4], protocol: TCP, services: {ns/plain.ns: {80: 8080}}}
- {uid: c//Pod/ns/sick, name: sick, namespace: ns, workloadIps: [10.0.0.5], protocol: HBONE, status: Unhealthy, services: {ns/sick.ns: {80: 8080}, ns/all.ns: {80: 8080}}}
- {uid: c//Pod/ns/wp, name: wp, namespace: ns, serviceAccount: wp, workloadIps: [10.0.0.6], protocol: HBONE, services: {ns/wp.ns: {15008: 15008}}}
- {uid: c//Pod/ns/guarded, name: guarded, namespace: ns, workloadIps: [10.0.0.7], protocol: HBONE, waypoint: {destination: ns/wp.ns, hboneMtlsPort: 15008}}
- {uid: c//Pod/ns/named, name: named, namespace: ns, hostname: named.example, protocol: TCP, services: {ns/named.ns: {80: 8080}}}
- {uid: c//Pod/ns/far, name: far, namespace: ns, network: far, protocol: HBONE, networkGateway: {destination: "/10.0.0.8", hboneMtlsPort: 15008}, services: {ns/far.ns: {80: 8080}}}
- {uid: gw, name: gw, namespace: ns, serviceAccount: gw, workloadIps: [10.0.0.8], protocol: HBONE}
- {uid: c//Pod/ns/wp2, name: wp2, namespace: ns, serviceAccount: wp2, workloadIps: [10.0.0.16, "fd00::16"], protocol: HBONE, services: {ns/wp2.ns: {}}, applicationTunnel: {protocol: PROXY, port: 15088}}
- {uid: c//Pod/ns/host, name: host, namespace: ns, workloadIps: [10.0.0.17], protocol: HBONE, networkMode: HostNetwork}
- {uid: c//Pod/ns/lonely, name: lonely, namespace: ns, network: far, workloadIps: [10.0.0.18], protocol: HBONE, services: {ns/lonely.ns: {80: 8080}}}
- {uid: c//Pod/ns/farwp, name: farwp, namespace: ns, network: far, protocol: HBONE, networkGateway: {destination: ns/gw.ns, hboneMtlsPort: 15008}, services: {ns/farwp.ns: {15008: 15008}}}
- {uid: c//Pod/ns/nogw, name: nogw, namespace: ns, network: far, protocol: HBONE, networkGateway: {destination: /10.99.0.1, hboneMtlsPort: 15008}, services: {ns/nogw.ns: {80: 8080}}}
- {uid: gw2, name: gw2, namespace: ns, serviceAccount: gw2, workloadIps: [10.0.0.19], protocol: HBONE, services: {ns/gw.ns: {15008: 15009}}}
- {uid: c//Pod/ns/v4, name: v4, namespace: ns, workloadIps: [10.0.0.20], protocol: HBONE, services: {ns/six.ns: {80: 8080}}}
- {uid: c//Pod/ns/byhost, name: byhost, namespace: ns, hostname: byhost.ns, workloadIps: [10.0.0.21], protocol: HBONE}
services:
- {name: wp2, namespace: ns, hostname: wp2.ns, vips: ["/10.1.0.20", "/fd01::20"], ports: {}, subjectAltNames: ["spiffe://td/ns/x/sa/wp"]}
- {name: weighted, namespace: ns, hostname: weighted.ns, vips: [/10.1.0.21], ports: {80: 8080}, weightedWaypoints: [{destination: {destination: ns/wp.ns, hboneMtlsPort: 15008}, weight: 0}, {destination: {destination: ns/wp2.ns, hboneMtlsPort: 15008}, weight: 5}]}
- {name: zero, namespace: ns, hostname: zero.ns, vips: [/10.1.0.22], ports: {80: 8080}, waypoint: {destination: ns/wp.ns, hboneMtlsPort: 15008}, weightedWaypoints: [{destination: {destination: ns/wp2.ns, hboneMtlsPort: 15008}, weight: 0}]}
- {name: six, namespace: ns, hostname: six.ns, vips: [/10.1.0.23], ports: {80: 8080}, ipFamilies: IPv6}
- {name: lonely, namespace: ns, hostname: lonely.ns, vips: [/10.1.0.24], ports: {80: 8080}}
- {name: nogw, namespace: ns, hostname: nogw.ns, vips: [/10.1.0.25], ports: {80: 8080}}
- {name: gw, namespace: ns, hostname: gw.ns, vips: [/10.1.0.26], ports: {15008: 15008}}
- {name: farwp, namespace: ns, hostname: farwp.ns, vips: [/10.1.0.27], ports: {15008: 15008}, subjectAltNames: ["spiffe://td/ns/far/sa/farwp"]}
- {name: behindfar, namespace: ns, hostname: behindfar.ns, vips: [/10.1.0.28], ports: {80: 8080}, waypoint: {destination: ns/farwp.ns, hboneMtlsPort: 15008}, subjectAltNames: ["spiffe://td/ns/not/sa/this"]}
- {name: six, namespace: ns, hostname: v6wp.ns, vips: ["/fd01::29", /10.1.0.29], ports: {80: 8080}, waypoint: {destination: ns/wp2.ns, hboneMtlsPort: 15008}}
- {name: fixed, namespace: ns, hostname: fixed.ns, vips: ["/fd01::30"], ports: {80: 8080}, waypoint: {destination: /10.1.0.20, hboneMtlsPort: 15008}}
- {name: hosted, namespace: ns, hostname: hosted.ns, vips: [/10.1.0.31], ports: {80: 8080}, waypoint: {destination: ns/byhost.ns, hboneMtlsPort: 15008}}
- {name: own, namespace: ns, hostname: own.ns, vips: [/10.1.0.32], ports: {80: 8080}, visibility: Namespace, loadBalancer: {routingPreferences: [], mode: Passthrough}}
- {name: svc, namespace: ns, hostname: svc.ns, vips: [/10.1.0.1, "/fd01::1"], ports: {80: 8080}, subjectAltNames: ["spiffe://td/ns/x/sa/y"]}
- {name: near, namespace: ns, hostname: near.ns, vips: [/10.1.0.2], ports: {80: 0}, loadBalancer: {routingPreferences: [Region, Zone], mode: Failover}}
- {name: strict, namespace: ns, hostname: strict.ns, vips: [/10.1.0.3], ports: {80: 8080}, loadBalancer: {routingPreferences: [Node, Subzone, Cluster, Network], mode: Strict}}
- {name: plain, namespace: ns, hostname: plain.ns, vips: [/10.1.0.4], ports: {80: 8080}}
- {name: sick, namespace: ns, hostname: sick.ns, vips: [/10.1.0.5], ports: {80: 8080}}
- {name: all, namespace: ns, hostname: all.ns, vips: [/10.1.0.6], ports: {80: 8080}, loadBalancer: {routingPreferences: [], mode: Standard, healthPolicy: AllowAll}}
- {name: wp, namespace: ns, hostname: wp.ns, vips: [/10.1.0.7], ports: {15008: 15008}}
- {name: behind, namespace: ns, hostname: behind.ns, vips: [/10.1.0.8], ports: {80: 8080}, waypoint: {destination: ns/wp.ns, hboneMtlsPort: 15008}}
- {name: byip, namespace: ns, hostname: byip.ns, vips: [/10.1.0.9], ports: {80: 8080}, waypoint: {destination: /10.1.0.7, hboneMtlsPort: 15008}}
- {name: lost, namespace: ns, hostname: lost.ns, vips: [/10.1.0.10], ports: {80: 8080}, waypoint: {destination: ns/none.ns, hboneMtlsPort: 15008}}
- {name: hidden, namespace: other, hostname: hidden.other, vips: [/10.1.0.11], ports: {80: 8080}, visibility: Namespace}
- {name: pass, namespace: ns, hostname: pass.ns, vips: [/10.1.0.12], ports: {80: 8080}, loadBalancer: {routingPreferences: [], mode: Passthrough}}
- {name: named, namespace: ns, hostname: named.ns, vips: [/10.1.0.13], ports: {80: 8080}}
- {name: far, namespace: ns, hostname: far.ns, vips: [/10.1.0.14], ports: {80: 8080}, subjectAltNames: ["spiffe://td/ns/far/sa/far"]}
"#;

fn mesh() -> (Handle, Arc<Workload>) {
    let writer = Writer::new("n1".parse().unwrap());
    let state = writer.handle();
    resources::inline(MESH, Sources::new(writer, &Dump::new())).unwrap();
    let source = state.read(|view| view.workload(&"c//Pod/ns/client".parse().unwrap())).unwrap();
    (state, source)
}

fn decide(state: &Handle, source: &Arc<Workload>, to: &str, seed: u64, names: &Resolved) -> String {
    let config = PlanConfig::new(NetworkId::default());
    let to: SocketAddr = to.parse().unwrap();
    let client = PeerAddr::from(SocketAddr::new(source.ips[0], 40000));
    let flow = Flow { client, to: to.into(), seed };
    match state.read(|view| plan(view, &config, names, source, flow)) {
        Verdict::Go(plan) => plan.to_string(),
        Verdict::Refuse(failure) => format!("refused: {}", failure.source.unwrap()),
        Verdict::Need(need) => format!("{need:?}"),
    }
}

#[test]
fn plans() {
    let (state, source) = mesh();
    for (name, to, expect) in [
        ("unknown", "192.0.2.1:80", "untouched to 192.0.2.1:80"),
        ("ourselves", "127.0.0.1:15001", "refused: attempted recursive call to ourselves"),
        ("loopback", "127.0.0.1:80", "untouched to 127.0.0.1:80"),
        ("workload", "10.0.0.2:7", "tunnel to 10.0.0.2:15008 for 10.0.0.2:7"),
        ("workload, v6", "[fd00::2]:7", "tunnel to [fd00::2]:15008 for [fd00::2]:7"),
        ("workload without tunnel", "10.0.0.4:7", "plain to 10.0.0.4:7"),
        ("service", "10.1.0.1:80", "tunnel to 10.0.0.2:15008 for 10.0.0.2:8080"),
        ("service, v6", "[fd01::1]:80", "tunnel to [fd00::2]:15008 for [fd00::2]:8080"),
        ("undeclared port", "10.1.0.1:81", "refused: no healthy upstream: 10.1.0.1:81"),
        ("nearest", "10.1.0.2:80", "tunnel to 10.0.0.2:15008 for 10.0.0.2:8080"),
        ("strict", "10.1.0.3:80", "tunnel to 10.0.0.2:15008 for 10.0.0.2:8080"),
        ("service without tunnel", "10.1.0.4:80", "plain to 10.0.0.4:8080"),
        ("unhealthy", "10.1.0.5:80", "refused: no healthy upstream: 10.1.0.5:80"),
        ("unhealthy but all allowed", "10.1.0.6:80", "tunnel to 10.0.0.5:15008 for 10.0.0.5:8080"),
        ("waypoint by name", "10.1.0.8:80", "tunnel to 10.0.0.6:15008 for 10.1.0.8:80"),
        ("waypoint by address", "10.1.0.9:80", "tunnel to 10.0.0.6:15008 for 10.1.0.9:80"),
        ("workload's waypoint", "10.0.0.7:80", "tunnel to 10.0.0.6:15008 for 10.0.0.7:80"),
        ("another namespace's own", "10.1.0.11:80", "untouched to 10.1.0.11:80"),
        ("passthrough", "10.1.0.12:80", "untouched to 10.1.0.12:80"),
        ("known by name", "10.1.0.13:80", r#"Name(Hostname("named.example"))"#),
        ("another network", "10.1.0.14:80", "tunnel through 10.0.0.8:15008 for far.ns:80"),
        ("waypoint by weight", "10.1.0.21:80", "tunnel to 10.0.0.16:15008 for 10.1.0.21:80"),
        ("waypoints without weight", "10.1.0.22:80", "tunnel to 10.0.0.6:15008 for 10.1.0.22:80"),
        (
            "waypoint of the client's family",
            "[fd01::29]:80",
            "tunnel to [fd00::16]:15008 for [fd01::29]:80",
        ),
        (
            "waypoint of the reference's family",
            "[fd01::30]:80",
            "tunnel to 10.0.0.16:15008 for [fd01::30]:80",
        ),
        (
            "waypoint by a workload's name",
            "10.1.0.31:80",
            "tunnel to 10.0.0.21:15008 for 10.1.0.31:80",
        ),
        (
            "waypoint of another network",
            "10.1.0.28:80",
            "tunnel through 10.0.0.19:15009 for behindfar.ns:80",
        ),
        ("its node's address", "10.0.0.17:80", "untouched to 10.0.0.17:80"),
        ("its own namespace's", "10.1.0.32:80", "untouched to 10.1.0.32:80"),
        (
            "no address of the family",
            "10.1.0.23:80",
            "refused: workload c//Pod/ns/v4 has no address of a family that the service serves",
        ),
        (
            "no gateway",
            "10.1.0.24:80",
            "refused: workload c//Pod/ns/lonely is on another network, and no gateway leads there",
        ),
        (
            "unknown gateway",
            "10.1.0.25:80",
            "refused: unknown network gateway: /10.99.0.1: it has no healthy endpoint, or the control plane has not sent it",
        ),
        ("another network's address", "10.0.0.18:80", "untouched to 10.0.0.18:80"),
    ] {
        let answer = decide(&state, &source, to, 1, &Resolved::default());
        assert_eq!(answer, expect, "{name}");
    }
    let lost = decide(&state, &source, "10.1.0.10:80", 1, &Resolved::default());
    assert!(lost.starts_with("refused: unknown waypoint: ns/none.ns"), "{lost}");
}

#[test]
fn a_name_that_was_resolved_is_used() {
    let (state, source) = mesh();
    let ips: Arc<[IpAddr]> = ["192.0.2.9".parse().unwrap()].into();
    let names = HashMap::from([("named.example".parse().unwrap(), ips)]);
    let names = Resolved { names, ..Resolved::default() };
    let answer = decide(&state, &source, "10.1.0.13:80", 1, &names);
    assert_eq!(answer, "plain to 192.0.2.9:8080");
}

/// Each row: where to, and what is asked for, one after the other, before the plan.
#[test]
fn on_demand_what_is_not_known_is_asked_for_once() {
    let (state, source) = mesh();
    let mut config = PlanConfig::new(NetworkId::default());
    config.on_demand = true;
    let client = PeerAddr::from(SocketAddr::new(source.ips[0], 40000));
    for (name, to, wanted, expect) in [
        ("known", "10.0.0.2:7", &[][..], "tunnel to 10.0.0.2:15008 for 10.0.0.2:7"),
        ("a service", "10.1.0.1:80", &[], "tunnel to 10.0.0.2:15008 for 10.0.0.2:8080"),
        ("nobody", "192.0.2.1:80", &["/192.0.2.1"], "untouched to 192.0.2.1:80"),
        ("ourselves", "127.0.0.1:15001", &[], "attempted recursive call to ourselves"),
        // Not for this client; but known.
        ("another namespace's own", "10.1.0.11:80", &[], "untouched to 10.1.0.11:80"),
        (
            "its waypoint",
            "10.1.0.10:80",
            &["ns/none.ns"],
            "unknown waypoint: ns/none.ns: it has no healthy endpoint, or the control plane has not sent it",
        ),
        (
            "its gateway",
            "10.1.0.25:80",
            &["/10.99.0.1"],
            "unknown network gateway: /10.99.0.1: it has no healthy endpoint, or the control plane has not sent it",
        ),
        ("without an endpoint", "10.1.0.5:80", &[], "no healthy upstream: 10.1.0.5:80"),
    ] {
        let flow = Flow { client, to: to.parse::<SocketAddr>().unwrap().into(), seed: 1 };
        let (mut told, mut asked) = (Resolved::default(), Vec::new());
        let end = loop {
            match state.read(|view| plan(view, &config, &told, &source, flow)) {
                Verdict::Go(plan) => break plan.to_string(),
                Verdict::Refuse(failure) => break failure.source.unwrap().to_string(),
                Verdict::Need(Need::Key(key)) => {
                    asked.push(key.to_string());
                    assert!(told.answered.insert(key), "{name}: asked again");
                }
                Verdict::Need(need) => panic!("{name}: {need:?}"),
            }
        };
        assert_eq!(
            (asked, end.as_str()),
            (wanted.iter().map(ToString::to_string).collect(), expect),
            "{name}"
        );
    }
}

#[test]
fn the_waypoint_itself_goes_direct() {
    let (state, _) = mesh();
    let waypoint = state.read(|view| view.workload(&"c//Pod/ns/wp".parse().unwrap())).unwrap();
    let answer = decide(&state, &waypoint, "10.0.0.7:80", 1, &Resolved::default());
    assert_eq!(answer, "tunnel to 10.0.0.7:15008 for 10.0.0.7:80");
}

#[test]
fn the_far_end_must_be_who_the_control_plane_says() {
    let (state, source) = mesh();
    let config = PlanConfig::new(NetworkId::default());
    let flow = Flow {
        client: PeerAddr::from(SocketAddr::new(source.ips[0], 40000)),
        to: "10.1.0.1:80".parse::<SocketAddr>().unwrap().into(),
        seed: 1,
    };
    let verdict = state.read(|view| plan(view, &config, &Resolved::default(), &source, flow));
    let Verdict::Go(Plan { via: Via::Hbone(_, tunnel), service, .. }) = verdict else {
        panic!("{verdict:?}");
    };
    let expect: Vec<_> = tunnel.expect.iter().map(ToString::to_string).collect();
    assert_eq!(expect, ["spiffe://td/ns/x/sa/y", "spiffe://cluster.local/ns/ns/sa/a"]);
    assert_eq!(service.unwrap().key.hostname.as_str(), "svc.ns");
}

/// To whom each tunnel may lead, in the order of opening.
fn expected(state: &Handle, source: &Arc<Workload>, to: &str) -> Vec<String> {
    let config = PlanConfig::new(NetworkId::default());
    let flow = Flow {
        client: PeerAddr::from(SocketAddr::new(source.ips[0], 40000)),
        to: to.parse::<SocketAddr>().unwrap().into(),
        seed: 1,
    };
    let verdict = state.read(|view| plan(view, &config, &Resolved::default(), source, flow));
    let Verdict::Go(Plan { via, .. }) = verdict else { panic!("{verdict:?}") };
    let tunnels = match via {
        Via::Passthrough(_) | Via::Tcp(_) => vec![],
        Via::Hbone(_, tunnel) => vec![tunnel],
        Via::DoubleHbone { outer, inner, .. } => vec![outer, inner],
    };
    let names = |tunnel: Tunnel| {
        let names = tunnel.expect.iter().map(|id| id.to_string().replace("spiffe://", ""));
        names.collect::<Vec<_>>().join(" ")
    };
    tunnels.into_iter().map(names).collect()
}

#[test]
fn whom_each_tunnel_leads_to() {
    let (state, source) = mesh();
    for (name, to, expect) in [
        ("workload", "10.0.0.2:80", &["cluster.local/ns/ns/sa/a"][..]),
        ("plain", "10.0.0.4:80", &[]),
        ("waypoint and its service", "10.1.0.21:80", &["td/ns/x/sa/wp cluster.local/ns/ns/sa/wp2"]),
        (
            "gateway, then the service's",
            "10.1.0.14:80",
            &["cluster.local/ns/ns/sa/gw", "td/ns/far/sa/far"],
        ),
        (
            "gateway, then the waypoint's and not the service's",
            "10.1.0.28:80",
            &["cluster.local/ns/ns/sa/gw2", "td/ns/far/sa/farwp"],
        ),
    ] {
        assert_eq!(expected(&state, &source, to), expect, "{name}");
    }
}

#[test]
fn one_seed_makes_one_plan_and_many_seeds_spread() {
    let (state, source) = mesh();
    let at = |seed| decide(&state, &source, "10.1.0.2:80", seed, &Resolved::default());
    assert_eq!(at(7), at(7));
    let items = [("a", 1), ("b", 3), ("c", 0)];
    let mut counts = HashMap::new();
    for seed in 0..4000 {
        *counts.entry(weighted(&items, seed).copied().unwrap()).or_insert(0) += 1;
    }
    assert!((800..1200).contains(&counts["a"]), "{counts:?}");
    assert!(!counts.contains_key("c"), "{counts:?}");
}
