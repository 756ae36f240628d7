//! What tunnels are asked, and where plain connections go.

use mesh_tests::{
    Scene,
    hbone::Listener,
    mesh::hostname,
    scene::{HTTP, TCP},
    wait::{self, SOON},
};
use serde_json::{Value, json};
use std::{collections::BTreeSet, net::SocketAddr};

use crate::start;

#[test]
fn a_request_as_others_expect_it() {
    let mut scene = start(&[]).unwrap();
    // A peer of ours plays the server: the pod `hand` is in the mesh and has no node proxy.
    let hand = scene.b.pod("hand").unwrap();
    scene.lab.settle(&[&hand]).unwrap();
    let workload = scene.mesh.workload(&hand, "hand");
    workload.set("locality", json!({ "region": "r1", "zone": "z1" }));
    scene.mesh.service("hand", &["10.96.0.21".parse().unwrap()], &[(80, 8080)], &[&hand]);
    scene.apply().unwrap();
    let listener =
        Listener::start(hand.namespace(), &scene.certificate("hand").unwrap(), 200).unwrap();
    let to = SocketAddr::from(([10, 96, 0, 21], 80));
    for _ in 0..3 {
        wait::retry("an echo", SOON, || Listener::answers(&scene.client, to)).unwrap();
    }
    let seen = listener.seen();
    let first = &seen[0];
    assert_eq!(first.method, "CONNECT");
    assert_eq!(first.authority, format!("{}:8080", hand.v4()));
    assert_eq!(first.order, ["baggage", "forwarded", "traceparent"]);
    let baggage = "k8s.cluster.name=Kubernetes,k8s.namespace.name=lab,\
                   k8s.deployment.name=client,service.name=client,service.version=latest";
    assert_eq!(first.headers["baggage"], baggage);
    let forwarded = &first.headers["forwarded"];
    let client = scene.client.v4();
    assert!(forwarded.starts_with(&format!("for=\"{client}:")), "{forwarded}");
    assert!(forwarded.ends_with(&format!("\";host={}", hostname("hand"))), "{forwarded}");
    assert_eq!(first.headers["traceparent"].len(), 55);
    assert!(first.headers["traceparent"].starts_with("00-"));
    // One tunnel for all, from the client's own address.
    assert!(seen.len() >= 3, "{}", seen.len());
    assert!(seen.iter().all(|s| s.client == first.client && s.client.ip() == client), "{seen:?}");
}

#[test]
fn what_the_other_side_refuses_is_told() {
    let mut scene = start(&[]).unwrap();
    let hand = scene.b.pod("hand").unwrap();
    scene.lab.settle(&[&hand]).unwrap();
    scene.mesh.workload(&hand, "hand");
    scene.apply().unwrap();
    let issued = scene.certificate("hand").unwrap();
    let _listener = Listener::start(hand.namespace(), &issued, 503).unwrap();
    scene
        .a
        .with_proxy(|proxy| proxy.wait_dump("hand", |d| d.to_string().contains("/hand")))
        .unwrap();
    let mark = scene.a.with_proxy(|proxy| Ok(proxy.log().mark())).unwrap();
    let got = scene.client.tcp(SocketAddr::new(hand.v4(), 80), &["echo", "x"]).unwrap();
    assert!(!got.is_ok(), "{}", got.out);
    scene
        .a
        .with_proxy(|proxy| {
            let line =
                proxy.wait_access(mark, "503", |line| line.field("error").contains("503"))?;
            assert_eq!(
                line.field("error"),
                "http status: 503 Service Unavailable (server side: the log of the node proxy there says why)"
            );
            let labels = [("response_flags", "CONNECT"), ("reporter", "source")];
            let failed = proxy.metrics()?.sum("istio_tcp_connections_failed_total", &labels);
            assert!(failed >= 1.0);
            Ok(())
        })
        .unwrap();
}

#[test]
fn a_server_with_another_identity_is_not_talked_to() {
    let mut scene = start(&[]).unwrap();
    let hand = scene.b.pod("hand").unwrap();
    scene.lab.settle(&[&hand]).unwrap();
    scene.mesh.workload(&hand, "hand");
    scene.apply().unwrap();
    let issued = scene.certificate("somebody-else").unwrap();
    let listener = Listener::start(hand.namespace(), &issued, 200).unwrap();
    scene
        .a
        .with_proxy(|proxy| proxy.wait_dump("hand", |d| d.to_string().contains("/hand")))
        .unwrap();
    let got = scene.client.tcp(SocketAddr::new(hand.v4(), 80), &["echo", "x"]).unwrap();
    assert!(!got.is_ok(), "{}", got.out);
    assert_eq!(listener.seen().len(), 0);
}

/// By which endpoints a service answers, in many connections: what the control plane says of the service and of its
/// endpoints decides.
#[test]
fn services_lead_where_they_should() {
    let mut scene = start(&[]).unwrap();
    // On the client's own node, and in its zone.
    let near = scene.a.pod("near").unwrap();
    scene.lab.settle(&[&near]).unwrap();
    let _programs = near.serve(HTTP, TCP).unwrap();
    let place = |zone: &str| json!({ "region": "r", "zone": zone });
    scene.mesh.workload(&near, "near").set("locality", place("near"));
    for (pod, zone) in [(&scene.client, "near"), (&scene.server, "far")] {
        scene.mesh.workload_of(pod).unwrap().set("locality", place(zone));
    }
    let balance = |mode: &str, preferences: &[&str], health: &str| json!({ "mode": mode, "routingPreferences": preferences, "healthPolicy": health });
    let healthy = "OnlyHealthy";
    let (both, none): (&[_], &[&str]) = (&["near", "server"], &[]);
    // A service, what is said of it, and who answers.
    let cases = [
        ("any", json!(null), both),
        ("zone", balance("Failover", &["Network", "Region", "Zone"], healthy), &["near"]),
        ("node", balance("Strict", &["Node"], healthy), &["near"]),
        ("cluster", balance("Strict", &["Cluster"], healthy), both),
        ("subzone", balance("Failover", &["Region", "Zone", "Subzone"], healthy), &["near"]),
        ("unready", balance("Standard", none, "AllowAll"), both),
    ];
    let vip = |n: usize| SocketAddr::from(([10, 96, 1, u8::try_from(n).unwrap()], 80));
    for (n, (name, balance, _)) in cases.iter().enumerate() {
        let service =
            scene.mesh.service(name, &[vip(n).ip()], &[(80, HTTP)], &[&near, &scene.server]);
        service.set("loadBalancer", balance.clone());
    }
    scene.apply().unwrap();
    crate::enrol(&scene.a, &near, "near").unwrap();
    let answers = |scene: &Scene, n: usize| -> BTreeSet<String> {
        scene.ask_until(&scene.client, vip(n)).unwrap();
        let ask =
            |_| scene.ask(&scene.client, vip(n)).unwrap()["name"].as_str().unwrap().to_owned();
        (0..20).map(ask).collect()
    };
    for (n, (name, _, who)) in cases.iter().enumerate() {
        assert_eq!(answers(&scene, n), who.iter().copied().map(str::to_owned).collect(), "{name}");
    }
    // The near one is not ready any more: the next rank serves, or nobody where the rank is strict.
    scene.mesh.workload_of(&near).unwrap().set("status", json!("Unhealthy"));
    scene.apply().unwrap();
    let unhealthy = |dump: &Value| dump["workloads"].to_string().contains("Unhealthy");
    scene.a.with_proxy(|proxy| proxy.wait_dump("it is not ready", unhealthy)).unwrap();
    for (n, (name, ..)) in cases.iter().enumerate() {
        match *name {
            "node" => assert!(scene.ask(&scene.client, vip(n)).is_err(), "{name}"),
            "unready" => assert_eq!(answers(&scene, n).len(), 2, "{name}"),
            _ => assert_eq!(answers(&scene, n), ["server".to_owned()].into(), "{name}"),
        }
    }
}

/// A service that is another namespace's alone is a stranger's address, and one that is to be passed through is left
/// alone; a port that an endpoint maps itself is that endpoint's, and one that nobody has is refused.
#[test]
fn what_a_service_hides_passes_through_and_maps() {
    let mut scene = start(&[]).unwrap();
    let (hidden, passed, mapped) = ("10.96.1.31", "10.96.1.32", "10.96.1.33");
    let vip = |ip: &str| ip.parse().unwrap();
    let server = &scene.server;
    let hide = scene.mesh.service("hidden", &[vip(hidden)], &[(80, HTTP)], &[server]);
    hide.set("namespace", json!("elsewhere")).set("visibility", json!("Namespace"));
    let pass = scene.mesh.service("passed", &[vip(passed)], &[(80, HTTP)], &[server]);
    pass.set("loadBalancer", json!({ "mode": "Passthrough", "routingPreferences": [] }));
    scene.mesh.service("mapped", &[vip(mapped)], &[(80, HTTP)], &[server]).set(
        // The endpoint says 8080 itself.
        "ports",
        json!({ "80": 1, "81": 0 }),
    );
    scene.apply().unwrap();
    let there = |dump: &Value| dump["services"].to_string().contains("mapped.lab");
    scene.a.with_proxy(|proxy| proxy.wait_dump("the services", there)).unwrap();
    let at = |ip: &str, port| SocketAddr::new(ip.parse().unwrap(), port);
    scene.ask_until(&scene.client, at(mapped, 80)).unwrap();
    for port in [81, 82] {
        assert!(scene.ask(&scene.client, at(mapped, port)).is_err(), "{port}");
        let to = at(mapped, port).to_string();
        let refused = |line: &mesh_tests::log::Line| {
            line.message == "connection failed" && line.field("dst.addr") == to
        };
        scene.a.with_proxy(|proxy| proxy.wait_access(0, &to, refused)).unwrap();
    }
    // Nobody has these addresses: that they were tried as they are is in the log.
    for ip in [hidden, passed] {
        let to = at(ip, 80);
        let _nobody = scene.client.tcp(to, &["who"]).unwrap();
        let tried = |line: &mesh_tests::log::Line| {
            line.message == "connection complete" && line.field("dst.addr") == to.to_string()
        };
        let line = scene.a.with_proxy(|proxy| proxy.wait_access(0, ip, tried)).unwrap();
        assert_eq!(line.field("dst.hbone_addr"), "", "{}", line.text);
    }
}

#[test]
fn what_is_not_in_the_mesh_is_reached_as_it_is() {
    let scene = start(&[]).unwrap();
    for (to, own) in
        [(scene.outsider.v4(), scene.client.v4()), (scene.outsider.v6(), scene.client.v6())]
    {
        let said = scene.ask_until(&scene.client, SocketAddr::new(to, HTTP)).unwrap();
        assert_eq!(said["client"], own.to_string());
    }
    scene
        .a
        .with_proxy(|proxy| {
            let line = proxy.wait_access(0, "passthrough", |line| {
                line.message == "connection complete" && line.field("dst.hbone_addr").is_empty()
            })?;
            assert_eq!(line.field("src.workload"), "client");
            assert_eq!(line.field("src.identity"), "");
            Ok(())
        })
        .unwrap();
}

#[test]
fn a_service_without_endpoints_is_refused() {
    let mut scene = start(&[]).unwrap();
    scene.mesh.service("nobody", &["10.96.0.22".parse().unwrap()], &[(80, 80)], &[]);
    scene.apply().unwrap();
    let there = |dump: &Value| dump.to_string().contains("nobody.lab");
    scene.a.with_proxy(|proxy| proxy.wait_dump("the service", there)).unwrap();
    let got = scene.client.tcp(SocketAddr::from(([10, 96, 0, 22], 80)), &["who"]).unwrap();
    assert!(!got.is_ok());
    scene
        .a
        .with_proxy(|proxy| {
            let line = proxy.wait_access(0, "it", |line| line.message == "connection failed")?;
            assert!(line.field("error").contains("no healthy upstream"), "{}", line.text);
            let labels = [("reporter", "source"), ("reason", "no_upstream")];
            let metrics = proxy.metrics()?;
            assert!(metrics.sum("istio_tcp_connections_refused_total", &labels) > 0.5);
            for name in ["opened", "closed", "failed"] {
                let name = format!("istio_tcp_connections_{name}_total");
                assert_eq!(metrics.find(&name, &[("reporter", "source")]).count(), 0, "{name}");
            }
            Ok(())
        })
        .unwrap();
}
