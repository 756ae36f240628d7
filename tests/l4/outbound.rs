//! What tunnels are asked, and where plain connections go.

use mesh_tests::{
    hbone::Listener,
    mesh::hostname,
    scene::HTTP,
    wait::{self, SOON},
};
use serde_json::{Value, json};
use std::net::SocketAddr;

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
        // The listener sends everything back, with the command to the server that it is not.
        let all_back = || {
            let got = scene.client.tcp(to, &["echo", "hello"])?;
            anyhow::ensure!(got.err.contains(r"echo\nhello"), "{}", got.err);
            Ok(())
        };
        wait::retry("an echo", SOON, all_back).unwrap();
    }
    let seen = listener.seen();
    let first = &seen[0];
    assert_eq!(first.method, "CONNECT");
    assert_eq!(first.authority, format!("{}:8080", hand.v4()));
    let mut names: Vec<_> = first.headers.keys().map(String::as_str).collect();
    names.sort_unstable();
    assert_eq!(names, ["baggage", "forwarded", "traceparent"]);
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
            Ok(())
        })
        .unwrap();
}
