//! The node proxy as a workload: a tunnel port in its own namespace, for who scrapes it through the mesh.

use mesh_tests::{
    Scene,
    capture::Capture,
    hbone::{Dial, Tunnel, refused},
    mesh::{hostname, identity},
    scene::TUNNEL,
    wait::{self, SOON},
};
use serde_json::json;
use std::net::SocketAddr;

const OWN: [(&str, &str); 3] =
    [("POD_NAME", "ztunnel-b"), ("POD_NAMESPACE", "lab"), ("SERVICE_ACCOUNT", "ztunnel")];

/// The node proxy of `b` is a pod of the mesh, at the node's address.
fn start() -> Scene {
    let mut scene = Scene::bare().unwrap();
    let (v4, v6) = scene.b.address();
    let own = scene.mesh.workload(&scene.outsider, "ztunnel");
    own.set("name", json!("ztunnel-b")).set("uid", json!("Kubernetes//Pod/lab/ztunnel-b"));
    own.set("node", json!("b")).set("workloadIps", json!([v4.to_string(), v6.to_string()]));
    scene.apply().unwrap();
    scene.a.start_proxy(&[]).unwrap();
    scene.b.start_proxy(&OWN).unwrap();
    scene.a.enrol(&scene.client, "client").unwrap();
    scene
}

#[test]
fn it_is_scraped_through_the_mesh() {
    let scene = start();
    let (v4, v6) = scene.b.address();
    let capture = Capture::start(scene.lab.wire(), &["istio_build", "GET /metrics"]).unwrap();
    for ip in [v4, v6] {
        let url = format!("http://{}/metrics", SocketAddr::new(ip, 15020));
        let fetch = || scene.client.fetch(&url)?.ok();
        let said = wait::retry("its metrics", SOON, fetch).unwrap();
        assert!(said.ends_with("# EOF\n"), "{said}");
    }
    assert_eq!(capture.stop().unwrap().objection(), None);
    scene
        .b
        .with_proxy(|proxy| {
            let line = proxy.wait_access(0, "its own", |line| {
                line.field("dst.workload") == "ztunnel-b" && line.field("direction") == "inbound"
            })?;
            assert_eq!(line.field("src.identity"), identity("client"));
            let labels = [("reporter", "destination"), ("source_workload", "client")];
            assert!(proxy.metrics()?.sum("istio_tcp_connections_opened_total", &labels) >= 2.0);
            Ok(())
        })
        .unwrap();
}

#[test]
fn it_answers_as_any_workload() {
    let scene = start();
    let (ip, _) = scene.b.address();
    // Any peer of the trust domain.
    let anybody = scene.certificate("anybody").unwrap();
    let dial = Dial::new(scene.outsider.namespace(), SocketAddr::new(ip, TUNNEL), &anybody);
    let mut tunnel = Tunnel::open(&dial).unwrap();
    assert!(tunnel.server_is(&identity("ztunnel")));
    for (authority, status) in [
        (format!("{ip}:15020"), 200),
        (format!("{ip}:15008"), 503),
        (format!("{ip}:9999"), 503),
        (format!("{}:15020", scene.client.v4()), 400),
        (format!("{}:80", hostname("nothing")), 503),
    ] {
        let reply = tunnel.connect(&authority, &[]).unwrap();
        assert_eq!(reply.status, status, "{authority}");
        if status == 200 {
            let baggage = reply.headers["baggage"].to_str().unwrap();
            assert!(baggage.contains("service.name=ztunnel"), "{baggage}");
            // It is connected from its own address: nobody's is borrowed there.
            let request = b"GET /healthz/ready HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
            let answer = tunnel.exchange(reply, request).unwrap();
            assert!(answer.starts_with(b"HTTP/1.1 404"), "{}", String::from_utf8_lossy(&answer));
        }
    }
    assert!(refused(&Dial { certificate: None, ..dial }).is_ok());
}

#[test]
fn without_a_name_it_is_no_workload() {
    let scene = Scene::start(&[("POD_NAME", "ztunnel"), ("POD_NAMESPACE", "lab")]).unwrap();
    let (ip, _) = scene.b.address();
    let got = scene.outsider.tcp(SocketAddr::new(ip, TUNNEL), &["who"]).unwrap();
    assert!(got.err.contains("refused"), "{}", got.err);
}
