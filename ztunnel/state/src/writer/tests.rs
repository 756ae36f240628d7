use super::*;
use crate::testing::{ip, key, policy, service, serving, with, workload, writer};
use mesh_core::{Hostname, NetworkAddress, NetworkId, NetworkMode, TunnelProtocol, Visibility};
use proptest::{collection::vec, prelude::*};
use std::{
    collections::{BTreeMap, BTreeSet},
    thread,
};

fn at(text: &str) -> NetworkAddress {
    NetworkAddress { network: NetworkId::default(), ip: ip(text) }
}

fn uid_at(handle: &Handle, text: &str) -> Option<String> {
    handle.read(|view| view.workload_at(&at(text))).map(|w| w.uid.to_string())
}

fn service_at(handle: &Handle, text: &str, client: &str) -> Option<String> {
    let client = client.parse().unwrap();
    handle.read(|view| view.service_at(&at(text), &client)).map(|s| s.key.to_string())
}

fn endpoints(handle: &Handle, name: &str) -> Vec<String> {
    let of = |view: &View| {
        view.endpoints(&key(name)).iter().map(|w| w.uid.to_string()).collect::<BTreeSet<_>>()
    };
    handle.read(of).into_iter().collect()
}

#[test]
fn readers_take_owned_values_out() {
    let mut writer = writer();
    let handle = writer.handle();
    let pods = (0..CHUNK * 2 + 1).map(|i| workload(&format!("c//Pod/ns/{i}"), &[]).into());
    writer.apply(pods);
    let last: WorkloadUid = format!("c//Pod/ns/{}", CHUNK * 2).parse().unwrap();
    let held = handle.read(|view| view.workload(&last)).unwrap();

    writer.apply([Update::RemoveWorkload(last.clone())]);
    assert_eq!(held.uid, last, "a reader keeps what it took");
    assert!(handle.read(|view| view.workload(&last)).is_none());
    assert_eq!(handle.read(View::workload_count), CHUNK * 2);
}

/// Pod with a tunnel, pod, tunnel, other; whoever came first.
#[test]
fn one_of_several_with_an_address_is_meant() {
    let plain = |w| with(w, |t| t.protocol = TunnelProtocol::None);
    let address = &["10.0.0.1", "fd00::1"];
    let ranked = [
        workload("c//Pod/ns/best", address),
        plain(workload("c//Pod/ns/pod", address)),
        workload("entry", address),
        plain(workload("other", address)),
    ];
    for order in [[0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]] {
        let mut writer = writer();
        let handle = writer.handle();
        writer.apply(order.map(|i: usize| ranked[i].clone().into()));
        for best in &ranked {
            assert_eq!(uid_at(&handle, "10.0.0.1").as_deref(), Some(best.uid.as_str()));
            assert_eq!(uid_at(&handle, "fd00::1").as_deref(), Some(best.uid.as_str()));
            writer.apply([Update::RemoveWorkload(best.uid.clone())]);
        }
        assert_eq!(uid_at(&handle, "10.0.0.1"), None);
    }
}

#[test]
fn addresses_follow_the_workload() {
    let mut writer = writer();
    let handle = writer.handle();
    writer.apply([workload("a", &["10.0.0.1", "10.0.0.2"]).into()]);
    writer.apply([workload("a", &["10.0.0.2"]).into()]);
    assert_eq!(uid_at(&handle, "10.0.0.1"), None, "it left");
    assert_eq!(uid_at(&handle, "10.0.0.2").as_deref(), Some("a"));
    writer
        .apply([with(workload("a", &["10.0.0.2"]), |t| t.network = "far".parse().unwrap()).into()]);
    assert_eq!(uid_at(&handle, "10.0.0.2"), None, "on another network now");
    let host = |t: &mut mesh_core::Template| t.network_mode = NetworkMode::HostNetwork;
    writer.apply([with(workload("a", &["10.0.0.2"]), host).into()]);
    assert_eq!(uid_at(&handle, "10.0.0.2"), None, "the address is its node's");
    assert!(handle.read(|view| view.workload(&"a".parse().unwrap())).is_some());
}

#[test]
fn found_by_hostname_in_its_namespace() {
    let mut writer = writer();
    let handle = writer.handle();
    let host: Hostname = "db.example".parse().unwrap();
    writer.apply([Workload { hostname: Some(host.clone()), ..workload("a", &[]) }.into()]);
    let find = |ns: &str| handle.read(|view| view.workload_of_host(&ns.parse().unwrap(), &host));
    assert_eq!(find("ns").unwrap().uid.as_str(), "a");
    assert!(find("other").is_none());
    writer.apply([workload("a", &[]).into()]);
    assert!(find("ns").is_none(), "it has none any more");
}

#[test]
fn endpoints_wait_for_their_service() {
    let mut writer = writer();
    let handle = writer.handle();
    let known = || handle.read(|view| view.service(&key("ns/a.ns"))).is_some();
    writer.apply([
        serving(workload("w1", &[]), "ns/a.ns", &[]).into(),
        serving(workload("w2", &[]), "ns/a.ns", &[]).into(),
    ]);
    assert!(!known());
    writer.apply([service("ns/a.ns", &[]).into()]);
    assert!(known());
    assert_eq!(endpoints(&handle, "ns/a.ns"), ["w1", "w2"]);
    writer.apply([Update::RemoveWorkload("w1".parse().unwrap())]);
    assert_eq!(endpoints(&handle, "ns/a.ns"), ["w2"]);
    writer.apply([Update::RemoveService(key("ns/a.ns"))]);
    assert!(!known());
    writer.apply([service("ns/a.ns", &[]).into()]);
    assert_eq!(endpoints(&handle, "ns/a.ns"), ["w2"], "it came back to those that name it");
    writer.apply([workload("w2", &[]).into()]);
    assert!(endpoints(&handle, "ns/a.ns").is_empty());
    writer.apply([Update::RemoveService(key("ns/a.ns"))]);
    let groups = |view: &View| (0..).map_while(|p| view.services.of_part(p)).flatten().count();
    assert_eq!(handle.read(groups), 0, "nothing is left behind");
}

/// Each row: who asks for what, and the service that is meant.
#[test]
fn a_vip_means_one_service_to_a_client() {
    let mut writer = writer();
    let handle = writer.handle();
    let canonical = |s| Service { canonical: true, ..s };
    let hidden = |s| Service { visibility: Visibility::Namespace, ..s };
    writer.apply([
        service("first/s.x", &["10.1.0.1"]).into(),
        canonical(service("canon/s.x", &["10.1.0.1"])).into(),
        service("own/s.x", &["10.1.0.1"]).into(),
        hidden(service("hid/h.x", &["10.1.0.2", "10.9.0.0/16"])).into(),
        service("wide/w.x", &["10.0.0.0/8", "10.1.0.3"]).into(),
        service("narrow/n.x", &["10.9.9.0/24"]).into(),
        canonical(service("twin/t.x", &["10.9.9.0/24"])).into(),
        service("six/s6.x", &["fd00::/16"]).into(),
    ]);
    for (name, to, client, expect) in [
        ("its own namespace's", "10.1.0.1", "own", Some("own/s.x")),
        ("the canonical one", "10.1.0.1", "elsewhere", Some("canon/s.x")),
        ("hidden from others", "10.1.0.2", "elsewhere", Some("wide/w.x")),
        ("seen by its own", "10.1.0.2", "hid", Some("hid/h.x")),
        ("exact before block", "10.1.0.3", "narrow", Some("wide/w.x")),
        ("longest block, canonical", "10.9.9.9", "elsewhere", Some("twin/t.x")),
        ("own block before longer ones", "10.9.9.9", "wide", Some("wide/w.x")),
        ("own hidden block", "10.9.9.9", "hid", Some("hid/h.x")),
        ("v6 block", "fd00::1", "own", Some("six/s6.x")),
        ("nobody's", "192.0.2.1", "own", None),
    ] {
        assert_eq!(service_at(&handle, to, client).as_deref(), expect, "{name}");
    }
    writer.apply([Update::RemoveService(key("canon/s.x"))]);
    assert_eq!(service_at(&handle, "10.1.0.1", "else").as_deref(), Some("first/s.x"), "first seen");
    let first = Service { name: "new".parse().unwrap(), ..service("first/s.x", &["10.1.0.1"]) };
    writer.apply([first.into()]);
    assert_eq!(
        service_at(&handle, "10.1.0.1", "else").as_deref(),
        Some("first/s.x"),
        "still first"
    );
    writer.apply([service("wide/w.x", &[]).into()]);
    assert_eq!(service_at(&handle, "10.77.0.1", "own"), None, "the block is gone");
    let host = "s.x".parse().unwrap();
    let of_host = |ns: &str| handle.read(|view| view.service_of_host(&host, &ns.parse().unwrap()));
    assert_eq!(of_host("own").unwrap().key.to_string(), "own/s.x");
    assert_eq!(of_host("elsewhere").unwrap().key.to_string(), "first/s.x");
}

#[test]
fn a_hostname_means_the_preferred_namespace_where_nothing_else_decides() {
    let mut writer = writer().preferring("liked".parse().unwrap());
    let handle = writer.handle();
    let host = "s.x".parse().unwrap();
    let of_host = |ns: &str| {
        let found = handle.read(|view| view.service_of_host(&host, &ns.parse().unwrap()));
        found.unwrap().key.namespace.to_string()
    };
    for name in ["first/s.x", "liked/s.x", "own/s.x"] {
        writer.apply([service(name, &["10.1.0.1"]).into()]);
    }
    assert_eq!((of_host("else").as_str(), of_host("own").as_str()), ("liked", "own"));
    assert_eq!(service_at(&handle, "10.1.0.1", "else").as_deref(), Some("first/s.x"), "by VIP");
    writer.apply([Service { canonical: true, ..service("canon/s.x", &[]) }.into()]);
    assert_eq!(of_host("else"), "canon");
}

#[test]
fn what_is_known_already_changes_nothing() {
    let mut writer = writer();
    let handle = writer.handle();
    let (pod, svc) = (workload("w", &["10.0.0.1"]), service("ns/a.ns", &[]));
    writer.apply([pod.clone().into(), svc.clone().into()]);
    let held =
        || handle.read(|view| (view.workload(&pod.uid).unwrap(), view.service(&svc.key).unwrap()));
    let before = held();
    writer.apply([pod.clone().into(), svc.clone().into()]);
    let after = held();
    assert!(Arc::ptr_eq(&before.0, &after.0) && Arc::ptr_eq(&before.1, &after.1));
}

#[test]
fn removal_is_by_uid_or_by_service() {
    let mut writer = writer();
    writer.apply([workload("c/x", &[]).into(), service("c/y", &[]).into()]);
    let is = |name: &str| match writer.removal(name) {
        Some(Update::RemoveWorkload(uid)) => format!("workload {uid}"),
        Some(Update::RemoveService(key)) => format!("service {key}"),
        _ => "nothing".to_owned(),
    };
    assert_eq!(is("c/x"), "workload c/x");
    assert_eq!(is("c/y"), "service c/y");
    assert_eq!(is("a/b/c"), "nothing");
}

/// What a mesh says of itself, in a form that can be compared.
fn summary(handle: &Handle) -> impl PartialEq + std::fmt::Debug + use<> {
    handle.read(|view| {
        let mut uids: Vec<_> = view.workloads.iter().map(|w| w.uid.to_string()).collect();
        uids.sort();
        let at = |ip: u8| {
            view.workload_at(&at(&format!("10.0.0.{ip}"))).map(|w| (w.uid.to_string(), w.capacity))
        };
        let members = |s: u8| {
            let all = view.endpoints(&key(&format!("ns/{s}"))).iter();
            let mut all: Vec<_> = all.map(|w| (w.uid.to_string(), w.capacity)).collect();
            all.sort();
            all
        };
        let found = (0..4).map(at).collect::<Vec<_>>();
        (uids, found, (0..3).map(members).collect::<Vec<_>>())
    })
}

proptest! {
    /// However the state came about, it says what a fresh one says that was told the outcome alone.
    #[test]
    fn history_leaves_no_trace(
        steps in vec((0u8..5, any::<bool>(), vec(0u8..4, 0..3), vec(0u8..3, 0..3), 0u32..3), 0..60),
    ) {
        let mut writer = writer();
        let mut model = BTreeMap::<u8, Workload>::new();
        for (id, remove, ips, services, capacity) in steps {
            let uid = format!("c//Pod/ns/{id}");
            if remove {
                model.remove(&id);
                writer.apply([Update::RemoveWorkload(uid.parse().unwrap())]);
                continue;
            }
            let ips: BTreeSet<_> = ips.iter().map(|ip| format!("10.0.0.{ip}")).collect();
            let ips: Vec<_> = ips.iter().map(String::as_str).collect();
            let services: BTreeSet<_> = services.into_iter().collect();
            let pod = services.iter().fold(workload(&uid, &ips), |pod, service| {
                serving(pod, &format!("ns/{service}"), &[])
            });
            let pod = Workload { capacity, ..pod };
            model.insert(id, pod.clone());
            writer.apply([pod.into()]);
        }
        let mut fresh = crate::testing::writer();
        fresh.apply(model.into_values().map(Update::from));
        prop_assert_eq!(summary(&writer.handle()), summary(&fresh.handle()));
    }

    /// The copy that is shown and, once nothing is changed any more, the other: all tables, in their order.
    #[test]
    fn both_copies_say_the_same(
        steps in vec(vec(any_update(), 0..6), 0..40),
    ) {
        let mut writer = writer().preferring("liked".parse().unwrap());
        let handle = writer.handle();
        for updates in steps {
            writer.apply(updates);
            let mut said = Vec::new();
            handle.change(|view| said.push(format!("{view:?}")));
            prop_assert_eq!(&said[0], &said[1]);
        }
    }
}

/// Of few names, so that they meet; some of our own node, some in several tables.
fn any_update() -> impl Strategy<Value = Update> {
    let pod = (0u8..6, vec(0u8..4, 0..3), vec(0u8..3, 0..3), 0u32..3, any::<bool>());
    let workload = pod.prop_map(|(id, ips, services, capacity, is_local)| {
        let ips: Vec<_> = ips.iter().map(|ip| format!("10.0.0.{ip}")).collect();
        let ips: Vec<_> = ips.iter().map(String::as_str).collect();
        let pod = services.iter().fold(workload(&uid(id), &ips), |pod, service| {
            serving(pod, &format!("ns/{service}"), &[])
        });
        let node = if is_local { "n1" } else { "n2" }.parse().unwrap();
        let hostname = is_local.then(|| "pod.host".parse().unwrap());
        Workload { capacity, node, hostname, ..pod }.into()
    });
    let vips = ["10.9.0.1", "10.9.0.0/16", "10.9.0.2"];
    let service = (0u8..3, proptest::sample::subsequence(vips.to_vec(), 0..=3))
        .prop_map(|(id, vips)| service(&format!("ns/{id}"), &vips).into());
    let scope =
        || prop_oneof![Just(Scope::Global), Just(Scope::Namespace), Just(Scope::WorkloadSelector)];
    let name = || (0u8..3).prop_map(|id| format!("ns/p{id}").parse::<PolicyName>().unwrap());
    prop_oneof![
        4 => workload,
        2 => service,
        2 => (0u8..6).prop_map(|id| Update::RemoveWorkload(uid(id).parse().unwrap())),
        1 => (0u8..3).prop_map(|id| Update::RemoveService(key(&format!("ns/{id}")))),
        1 => (name(), scope()).prop_map(|(name, scope)| policy(name, scope)),
        1 => (name(), proptest::option::of(scope()))
            .prop_map(|(name, scope)| Update::RejectPolicy(name, scope)),
        1 => name().prop_map(Update::RemovePolicy),
    ]
}

fn uid(id: u8) -> String {
    format!("c//Pod/ns/{id}")
}

/// One workload is in several tables; its capacity says which update it is of.
#[test]
fn readers_see_whole_updates_in_order() {
    const LAST: u32 = 3000;
    let mut writer = writer();
    let pod = serving(workload(&uid(0), &["10.0.0.1", "10.0.0.2"]), "ns/a", &[]);
    let update = |capacity| Workload { capacity, ..pod.clone() }.into();
    writer.apply([update(0)]);
    thread::scope(|scope| {
        for _ in 0..2 {
            let handle = writer.handle();
            scope.spawn(move || {
                let (uid, mut before) = (uid(0).parse().unwrap(), 0);
                while before < LAST {
                    let seen = handle.read(|view| {
                        let capacity = |found: Option<Arc<Workload>>| found.unwrap().capacity;
                        [
                            capacity(view.workload(&uid)),
                            capacity(view.workload_at(&at("10.0.0.1"))),
                            capacity(view.workload_at(&at("10.0.0.2"))),
                            capacity(view.endpoints(&key("ns/a")).first().cloned()),
                        ]
                    });
                    assert_eq!(seen, [seen[0]; 4]);
                    assert!(seen[0] >= before, "{} after {before}", seen[0]);
                    before = seen[0];
                }
            });
        }
        (1..=LAST).for_each(|capacity| writer.apply([update(capacity)]));
    });
}
