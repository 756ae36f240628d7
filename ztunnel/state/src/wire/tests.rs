use super::*;

fn pod() -> proto::Workload {
    proto::Workload {
        uid: "c//Pod/ns/a".into(),
        name: "a".into(),
        namespace: "ns".into(),
        addresses: vec![vec![10, 0, 0, 1].into()],
        ..proto::Workload::default()
    }
}

fn web() -> proto::Service {
    proto::Service { namespace: "ns".into(), hostname: "web.ns".into(), ..Default::default() }
}

#[test]
fn what_is_not_said_has_a_default() {
    let read = workload(&pod(), &mut Names::default()).unwrap();
    assert_eq!(read.identity.to_string(), "spiffe://cluster.local/ns/ns/sa/default");
    assert_eq!((read.cluster.as_str(), read.capacity), ("Kubernetes", 1));
    assert_eq!((read.protocol, read.health), (TunnelProtocol::None, Health::Healthy));
    assert_eq!(&*read.ips, ["10.0.0.1".parse::<IpAddr>().unwrap()]);
    let zero = proto::Workload { capacity: Some(0), ..pod() };
    assert_eq!(workload(&zero, &mut Names::default()).unwrap().capacity, 0, "said to be 0");
    let unknown = proto::Workload { workload_type: 9, ..pod() };
    let kind = workload(&unknown, &mut Names::default()).unwrap().kind;
    assert_eq!(kind, WorkloadKind::Deployment);
}

/// Half a million pods are some thousand templates.
#[test]
fn replicas_share_what_they_have_in_common() {
    let mut names = Names::default();
    let services = [("ns/web.ns".to_owned(), proto::PortList::default())];
    let first = proto::Workload { services: services.clone().into(), ..pod() };
    let second = proto::Workload { uid: "c//Pod/ns/b".into(), ..first.clone() };
    let third = proto::Workload { service_account: "other".into(), ..second.clone() };
    let [a, b, c] = [first, second, third].map(|w| workload(&w, &mut names).unwrap());
    assert!(Arc::ptr_eq(&a.template, &b.template));
    assert!(!Arc::ptr_eq(&a.template, &c.template));
    assert!(Arc::ptr_eq(&a.locality, &c.locality), "this much they share");
    drop((a, b));
    for i in 0..1000 {
        let gone = proto::Workload { service_account: format!("sa{i}"), ..pod() };
        workload(&gone, &mut names).unwrap();
    }
    assert!(names.templates.values.len() <= 128, "{}", names.templates.values.len());
}

#[test]
fn a_map_in_another_order_is_no_change() {
    let services = |order: [&str; 3]| -> proto::Workload {
        let list = order.map(|s| (format!("ns/{s}"), proto::PortList::default()));
        proto::Workload { services: list.into(), ..pod() }
    };
    let mut names = Names::default();
    let first = workload(&services(["a", "b", "c"]), &mut names).unwrap();
    assert_eq!(first, workload(&services(["c", "a", "b"]), &mut names).unwrap());
}

#[test]
fn a_bad_workload_is_refused_by_its_field() {
    let no_destination =
        Some(proto::GatewayAddress { hbone_mtls_port: 15008, ..Default::default() });
    let tunnel = proto::ApplicationTunnel { protocol: 9, port: 1 };
    for (field, bad) in [
        ("uid", proto::Workload { uid: String::new(), ..pod() }),
        ("namespace", proto::Workload { namespace: "a/b".into(), ..pod() }),
        ("addresses", proto::Workload { addresses: vec![vec![1, 2, 3].into()], ..pod() }),
        ("tunnel_protocol", proto::Workload { tunnel_protocol: 2, ..pod() }),
        ("tunnel_protocol", proto::Workload { tunnel_protocol: 9, ..pod() }),
        ("network_mode", proto::Workload { network_mode: 9, ..pod() }),
        ("status", proto::Workload { status: 9, ..pod() }),
        ("waypoint", proto::Workload { waypoint: no_destination.clone(), ..pod() }),
        ("network_gateway", proto::Workload { network_gateway: no_destination, ..pod() }),
        (
            "services",
            proto::Workload {
                services: [("no-slash".to_owned(), proto::PortList::default())].into(),
                ..pod()
            },
        ),
        (
            "application_tunnel.protocol",
            proto::Workload { application_tunnel: Some(tunnel), ..pod() },
        ),
    ] {
        let error = workload(&bad, &mut Names::default()).unwrap_err();
        assert_eq!(error.field, field, "{error}");
    }
}

#[test]
fn a_bad_service_is_refused_by_its_field() {
    let balancing = |preference: &[i32], mode, health_policy| {
        let routing_preference = preference.to_vec();
        Some(proto::LoadBalancing { routing_preference, mode, health_policy })
    };
    let vip = |length| proto::NetworkAddress {
        network: String::new(),
        address: vec![10, 0, 0, 1].into(),
        length,
    };
    let no_destination = proto::WeightedWaypoint { destination: None, weight: 1 };
    for (field, bad) in [
        ("hostname", proto::Service { hostname: String::new(), ..web() }),
        ("ip_families", proto::Service { ip_families: 9, ..web() }),
        (
            "weighted_waypoints",
            proto::Service { weighted_waypoints: vec![no_destination], ..web() },
        ),
        ("addresses", proto::Service { addresses: vec![vip(Some(33))], ..web() }),
        ("load_balancing.mode", proto::Service { load_balancing: balancing(&[], 9, 0), ..web() }),
        (
            "load_balancing.health_policy",
            proto::Service { load_balancing: balancing(&[], 0, 9), ..web() },
        ),
        (
            "load_balancing.routing_preference",
            proto::Service { load_balancing: balancing(&[1, 0], 1, 0), ..web() },
        ),
    ] {
        let error = service(&bad, &mut Names::default()).unwrap_err();
        assert_eq!(error.field, field, "{error}");
    }
    let good = proto::Service {
        addresses: vec![vip(None), vip(Some(32)), vip(Some(8))],
        visibility: 9,
        ..web()
    };
    let read = service(&good, &mut Names::default()).unwrap();
    let single: Vec<_> = read.vips.iter().map(|vip| vip.block.single().is_some()).collect();
    assert_eq!(single, [true, true, false]);
    assert_eq!(read.visibility, Visibility::Public, "unknown values mean this");
}
