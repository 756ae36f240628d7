use super::*;
use crate::testing::{mesh, service, settings, unready, workload};
use mesh_core::Visibility;
use mesh_state::Handle;

const CLIENT: &str = "c//Pod/ns1/client";

fn with(mut service: Service, change: impl FnOnce(&mut Service)) -> Service {
    change(&mut service);
    service
}

/// `forward`, or the addresses in order, with the name that they belong to before them.
fn look_up(handle: &Handle, settings: &Settings, name: &str, family: Family) -> String {
    let client = workload(CLIENT, &["10.0.0.1"], &[]);
    match handle.read(|view| resolve(view, &client, settings, (name, family), 7)) {
        Answer::Forward => "forward".to_owned(),
        Answer::Local(Local { canonical, mut ips, unsupported }) => {
            ips.sort();
            let mut words: Vec<String> =
                canonical.map(|name| format!("{name}:")).into_iter().collect();
            words.extend(ips.iter().map(ToString::to_string));
            words.extend(unsupported.then(|| "unsupported".to_owned()));
            words.join(" ")
        }
    }
}

fn some_mesh() -> Handle {
    let headless = |name| with(service(name, &[]), |_| ());
    mesh(
        vec![
            service("ns1/web.ns1.svc.mesh.test", &["10.9.0.1", "fd00:9::1", "far@10.8.0.1"]),
            service("ns2/web.ns2.svc.mesh.test", &["10.9.0.2"]),
            service("ns1/api.example.com", &["240.240.0.1"]),
            service("ns2/dual.example.com", &["240.240.0.2", "240.240.0.3", "2001:2::2"]),
            service("ns1/*.wild.example.com", &["240.240.0.4"]),
            service("ns1/*.deep.wild.example.com", &["240.240.0.5"]),
            service("ns1/block.example.com", &["10.200.0.0/16"]),
            service("ns1/far.example.com", &["far@240.240.0.6"]),
            headless("ns1/outside.example.com"),
            headless("ns1/db.ns1.svc.mesh.test"),
            headless("ns1/nobody.ns1.svc.mesh.test"),
            with(headless("ns1/early.ns1.svc.mesh.test"), |s| s.load_balancing = Some(unready())),
            with(service("ns1/four.example.com", &["240.240.0.7", "2001:2::7"]), |s| {
                s.ip_families = IpFamilies::V4;
            }),
            with(service("ns1/six.example.com", &["240.240.0.8", "2001:2::8"]), |s| {
                s.ip_families = IpFamilies::V6;
            }),
            with(service("ns2/private.example.com", &["240.240.0.9"]), |s| {
                s.visibility = Visibility::Namespace;
            }),
        ],
        vec![
            workload("c//Pod/ns1/db-0", &["10.0.1.1", "fd00::1:1"], &["ns1/db.ns1.svc.mesh.test"]),
            workload("c//Pod/ns1/db-1", &["10.0.1.2"], &["ns1/db.ns1.svc.mesh.test"]),
            Workload {
                health: Health::Unhealthy,
                ..workload(
                    "c//Pod/ns1/db-2",
                    &["10.0.1.3"],
                    &["ns1/db.ns1.svc.mesh.test", "ns1/early.ns1.svc.mesh.test"],
                )
            },
            Workload {
                hostname: Some("named".parse().unwrap()),
                ..workload("c//Pod/ns1/db-3", &["10.0.1.4"], &["ns1/db.ns1.svc.mesh.test"])
            },
        ],
    )
}

#[test]
fn names_and_what_they_stand_for() {
    let (handle, settings) = (some_mesh(), settings());
    let table = [
        ("a name of Kubernetes", "web.ns1.svc.mesh.test", "10.9.0.1"),
        ("short", "web", "10.9.0.1"),
        ("with its namespace", "web.ns2", "10.9.0.2"),
        ("with svc", "web.ns2.svc", "10.9.0.2"),
        ("another cluster's domain", "web.ns1.svc.cluster.local", "forward"),
        ("a name from outside", "api.example.com", "240.240.0.1"),
        ("several VIPs", "dual.example.com", "240.240.0.2 240.240.0.3"),
        (
            "a name from outside, completed by the client",
            "api.example.com.ns1.svc.mesh.test",
            "api.example.com: 240.240.0.1",
        ),
        (
            "by the second search domain",
            "api.example.com.svc.mesh.test",
            "api.example.com: 240.240.0.1",
        ),
        ("by the third", "api.example.com.mesh.test", "api.example.com: 240.240.0.1"),
        ("a short name that was completed", "web.ns2.ns1.svc.mesh.test", "web.ns2: 10.9.0.2"),
        ("a wildcard", "a.wild.example.com", "240.240.0.4"),
        ("a wildcard, deeper", "a.b.wild.example.com", "240.240.0.4"),
        ("the more specific wildcard", "a.deep.wild.example.com", "240.240.0.5"),
        ("a wildcard does not hold itself", "wild.example.com", "forward"),
        ("a wildcard has no alias", "a.wild.example.com.mesh.test", "240.240.0.4"),
        ("a block is no address", "block.example.com", ""),
        ("another network's VIP", "far.example.com", ""),
        ("headless", "db.ns1.svc.mesh.test", "10.0.1.1 10.0.1.2 10.0.1.4"),
        ("headless without anybody", "nobody.ns1.svc.mesh.test", ""),
        ("headless, not ready, but published", "early.ns1.svc.mesh.test", "10.0.1.3"),
        ("headless, not of Kubernetes", "outside.example.com", "forward"),
        ("a pod of a headless service", "db-1.db.ns1.svc.mesh.test", "10.0.1.2"),
        ("the same, short", "db-1.db", "10.0.1.2"),
        ("a pod that is not ready", "db-2.db.ns1.svc.mesh.test", "forward"),
        ("a pod by its hostname", "named.db.ns1.svc.mesh.test", "10.0.1.4"),
        ("a pod that has another hostname", "db-3.db.ns1.svc.mesh.test", "forward"),
        ("no pod of a service with a VIP", "x.web.ns1.svc.mesh.test", "forward"),
        ("IPv6 only", "six.example.com", "unsupported"),
        ("somebody else's", "private.example.com", "forward"),
        ("nobody's", "nobody.example.com", "forward"),
        ("the root", "", "forward"),
    ];
    for (case, name, expected) in table {
        assert_eq!(look_up(&handle, &settings, name, Family::V4), expected, "{case}");
    }
}

#[test]
fn families() {
    let (handle, both) = (some_mesh(), settings());
    let without = Settings { ipv6: false, ..both.clone() };
    for (case, settings, name, expected) in [
        ("a VIP", &both, "web", "fd00:9::1"),
        ("no VIP of it", &both, "api.example.com", ""),
        ("no alias for nothing", &both, "api.example.com.mesh.test", ""),
        ("one a pod", &both, "db.ns1.svc.mesh.test", "fd00::1:1"),
        ("a pod without", &both, "db-1.db", ""),
        ("IPv4 only", &both, "four.example.com", "unsupported"),
        ("IPv6 only", &both, "six.example.com", "2001:2::8"),
        ("IPv6 is off here", &without, "web", "unsupported"),
        ("nobody's", &without, "nobody.example.com", "forward"),
    ] {
        assert_eq!(look_up(&handle, settings, name, Family::V6), expected, "{case}");
    }
}

#[test]
fn of_several_services_one_is_meant() {
    let own = || service("ns1/x.example.com", &["240.0.0.1"]);
    let canonical = || with(service("ns2/x.example.com", &["240.0.0.2"]), |s| s.canonical = true);
    let first = || service("ns3/x.example.com", &["240.0.0.3"]);
    let empty = || service("ns1/x.example.com", &[]);
    for (case, services, expected) in [
        ("the client's own", vec![first(), canonical(), own()], "240.0.0.1"),
        ("the canonical one", vec![first(), canonical()], "240.0.0.2"),
        (
            "whoever came first",
            vec![first(), service("ns4/x.example.com", &["240.0.0.4"])],
            "240.0.0.3",
        ),
        ("not one without a VIP", vec![empty(), first()], "240.0.0.3"),
    ] {
        let handle = mesh(services, vec![]);
        assert_eq!(look_up(&handle, &settings(), "x.example.com", Family::V4), expected, "{case}");
    }
}

#[test]
fn the_order_changes_with_chance_and_the_answer_is_bounded() {
    let pods = (0..ADDRESSES + 100).map(|i| {
        let ip = format!("10.{}.{}.{}", 1 + (i >> 16), (i >> 8) & 255, i & 255);
        workload(&format!("c//Pod/ns1/p{i}"), &[&ip], &["ns1/big.ns1.svc.mesh.test"])
    });
    let handle = mesh(vec![service("ns1/big.ns1.svc.mesh.test", &[])], pods.collect());
    let client = workload(CLIENT, &[], &[]);
    let ips = |seed| {
        let asked = ("big.ns1.svc.mesh.test", Family::V4);
        match handle.read(|view| resolve(view, &client, &settings(), asked, seed)) {
            Answer::Local(local) => local.ips,
            Answer::Forward => Vec::new(),
        }
    };
    let (one, two) = (ips(1), ips(2));
    assert_eq!(one.len(), ADDRESSES);
    assert_ne!(one, two);
    assert_eq!(one, ips(1));
}

#[test]
fn a_name_exists_whatever_is_asked_of_it() {
    let (handle, settings) = (some_mesh(), settings());
    let client = workload(CLIENT, &[], &[]);
    for (name, expected) in [
        ("api.example.com", true),
        ("api.example.com.ns1.svc.mesh.test", true),
        ("db-0.db.ns1.svc.mesh.test", true),
        ("_http._tcp.web.ns1.svc.mesh.test", false),
        ("a.wild.example.com", false),
        ("nobody.example.com", false),
    ] {
        let known = handle.read(|view| is_known(view, &client, &settings, name));
        assert_eq!(known, expected, "{name}");
    }
}
