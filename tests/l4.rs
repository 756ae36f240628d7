//! The node proxy at its door: paths, refusals, policy. Real namespaces, real processes.

use std::net::SocketAddr;

use http::Request;
use mesh_tests::{
    Scene,
    ca::Authority,
    hbone::{Dial, Listener, Reply, Tunnel, refused},
    mesh::{STRICT, hostname, identity, principal},
    scene::{HTTP, TCP, TUNNEL, web},
    topology::NAMESPACE,
    wait::{self, SOON},
};
use serde_json::{Value, json};

/// As an empty tunnel answers: with this status and nothing else.
fn is_refusal(reply: &Reply, status: u16) -> bool {
    reply.status == status && reply.ended && reply.headers.is_empty()
}

#[test]
fn every_status() {
    let scene = Scene::start(&[]).unwrap();
    let client = scene.certificate("client").unwrap();
    let dial = Dial::new(scene.outsider.namespace(), scene.tunnel(), &client);
    let mut tunnel = Tunnel::open(&dial).unwrap();
    assert!(tunnel.server_is(&identity("server")));
    let ip = scene.server.v4();
    let name = hostname("web");
    for (authority, status) in [
        (format!("{ip}:{HTTP}"), 200),
        // The service's port is the pod's 8080.
        (format!("{name}:80"), 200),
        // No port; not this pod; not this pod in the other family.
        (format!("{ip}"), 400),
        (format!("{}:{HTTP}", scene.client.v4()), 400),
        (format!("[{}]:{HTTP}", scene.server.v6()), 400),
        // No such service; a port that it has not; our own ports; nobody listens.
        (format!("{}:80", hostname("nothing")), 503),
        (format!("{name}:81"), 503),
        (format!("{ip}:15001"), 503),
        (format!("{ip}:15006"), 503),
        (format!("{ip}:15008"), 503),
        (format!("{ip}:9999"), 503),
    ] {
        let reply = tunnel.connect(&authority, &[]).unwrap();
        if status == 200 {
            assert_eq!((reply.status, reply.ended), (200, false), "{authority}");
            let names: Vec<_> = reply.headers.keys().map(|name| name.as_str()).collect();
            assert_eq!(names, ["baggage"], "{authority}");
            let request = b"GET /x HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
            let answer = tunnel.exchange(reply, request).unwrap();
            let answer = String::from_utf8_lossy(&answer).into_owned();
            let from = scene.outsider.v4().to_string();
            assert!(answer.contains(&format!(r#""client":"{from}""#)), "{answer}");
        } else {
            assert!(is_refusal(&reply, status), "{authority}: {reply:?}");
        }
    }
    let get = Request::get(format!("https://{ip}:{HTTP}/")).body(()).unwrap();
    let reply = tunnel.request(get).unwrap();
    assert!(is_refusal(&reply, 400), "{reply:?}");
}

#[test]
fn early_refusals_are_counted_apart_and_say_why() {
    let scene = Scene::start(&[]).unwrap();
    let client = scene.certificate("client").unwrap();
    let dial = Dial::new(scene.outsider.namespace(), scene.tunnel(), &client);
    let mut tunnel = Tunnel::open(&dial).unwrap();
    let ip = scene.server.v4();
    for (authority, why) in [
        (format!("{}:{HTTP}", scene.client.v4()), "mismatch"),
        (format!("{ip}:15008"), "recursive"),
        (format!("{}:80", hostname("nothing")), "nothing"),
    ] {
        scene
            .b
            .with_proxy(|proxy| {
                let mark = proxy.log().mark();
                tunnel.connect(&authority, &[])?;
                let line =
                    proxy.wait_access(mark, why, |line| line.message == "connection failed")?;
                assert_eq!(line.level, "warn", "{}", line.text);
                assert_eq!(line.field("direction"), "inbound", "{}", line.text);
                assert!(line.field("error").contains(why), "{}", line.text);
                let names = ["direction", "dst.addr", "error", "src.addr"];
                assert_eq!(line.all().keys().copied().collect::<Vec<_>>(), names, "{}", line.text);
                Ok(())
            })
            .unwrap();
    }
    let metrics = scene.b.with_proxy(|proxy| proxy.metrics()).unwrap();
    for name in ["opened", "closed", "failed"] {
        assert_eq!(metrics.find(&format!("istio_tcp_connections_{name}_total"), &[]).count(), 0);
    }
    let refused = metrics.sum("istio_tcp_connections_refused_total", &[]);
    assert!(refused >= 3.0, "{refused} refusals counted");
}

#[test]
fn a_denial_is_401_and_logged_whole() {
    let mut scene = Scene::start(&[]).unwrap();
    let rules = json!([[[{ "principals": [{ "Exact": principal("client") }] }]]]);
    scene.mesh.policy("no-client", "Deny", &rules);
    scene.apply_policy("no-client").unwrap();
    let client = scene.certificate("client").unwrap();
    let dial = Dial::new(scene.outsider.namespace(), scene.tunnel(), &client);
    let mut tunnel = Tunnel::open(&dial).unwrap();
    let authority = format!("{}:{HTTP}", scene.server.v4());
    let reply = tunnel.connect(&authority, &[]).unwrap();
    assert!(is_refusal(&reply, 401), "{reply:?}");
    scene
        .b
        .with_proxy(|proxy| {
            let line = proxy.wait_access(0, "401", |line| line.message == "connection complete")?;
            assert_eq!(line.level, "error");
            assert_eq!(line.field("src.identity"), identity("client"));
            assert_eq!(line.field("dst.hbone_addr"), authority);
            assert!(line.field("error").contains("explicitly denied by: lab/no-client"));
            let flags = [("response_flags", "DENY"), ("reporter", "destination")];
            wait::until("the metric", SOON, || {
                let failed = proxy.metrics()?.sum("istio_tcp_connections_failed_total", &flags);
                Ok((failed >= 1.0).then_some(()))
            })
        })
        .unwrap();
    // Others are let in on the same tunnel port.
    let other = scene.certificate("other").unwrap();
    let dial = Dial::new(scene.outsider.namespace(), scene.tunnel(), &other);
    assert_eq!(Tunnel::open(&dial).unwrap().connect(&authority, &[]).unwrap().status, 200);
}

#[test]
fn who_is_not_of_the_mesh_gets_no_tunnel() {
    let scene = Scene::start(&[]).unwrap();
    let authority = Authority::load(&scene.lab.ca_folder()).unwrap();
    let client = scene.certificate("client").unwrap();
    let dial = Dial::new(scene.outsider.namespace(), scene.tunnel(), &client);
    Tunnel::open(&dial).unwrap();
    let stranger = Authority::stranger().unwrap().issue(Some(&identity("client"))).unwrap();
    let foreign = authority.issue(Some("spiffe://elsewhere/ns/lab/sa/client")).unwrap();
    let nameless = authority.issue(None).unwrap();
    for (what, wrong) in [
        ("no certificate", Dial { certificate: None, ..dial.clone() }),
        ("another authority", Dial { certificate: Some(&stranger), ..dial.clone() }),
        ("another trust domain", Dial { certificate: Some(&foreign), ..dial.clone() }),
        ("no identity", Dial { certificate: Some(&nameless), ..dial.clone() }),
        ("TLS 1.2", Dial { old: true, ..dial.clone() }),
        ("not h2", Dial { alpn: "http/1.1", ..dial.clone() }),
    ] {
        assert!(refused(&wrong).is_ok(), "{what} was let in");
    }
    // And its tunnel port still works.
    Tunnel::open(&dial).unwrap();
}

#[test]
fn a_request_as_others_expect_it() {
    let mut scene = Scene::start(&[]).unwrap();
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
    let mut scene = Scene::start(&[]).unwrap();
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
            assert_eq!(line.field("error"), "http status: 503 Service Unavailable");
            let labels = [("response_flags", "CONNECT"), ("reporter", "source")];
            let failed = proxy.metrics()?.sum("istio_tcp_connections_failed_total", &labels);
            assert!(failed >= 1.0);
            Ok(())
        })
        .unwrap();
}

#[test]
fn a_server_with_another_identity_is_not_talked_to() {
    let mut scene = Scene::start(&[]).unwrap();
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
fn plain_text_meets_strict() {
    let mut scene = Scene::start(&[]).unwrap();
    let own = [scene.outsider.v4(), scene.outsider.v6()];
    for (to, own) in scene.server_at(HTTP).into_iter().zip(own) {
        let said = scene.ask_until(&scene.outsider, to).unwrap();
        assert_eq!(said["client"], own.to_string());
    }
    scene.mesh.strict(&[&scene.server]);
    scene.apply_policy(STRICT).unwrap();
    for to in scene.server_at(HTTP) {
        assert!(scene.ask(&scene.outsider, to).is_err(), "{to} answered");
        scene.ask(&scene.client, to).unwrap();
    }
    scene.mesh.permissive();
    scene.apply().unwrap();
    for to in scene.server_at(HTTP) {
        scene.ask_until(&scene.outsider, to).unwrap();
    }
}

#[test]
fn policies_decide_by_port_identity_and_address() {
    let mut scene = Scene::start(&[]).unwrap();
    let client = &scene.client;
    let http = web(80)[0];
    let tcp = web(TCP)[0];
    let answered = |scene: &Scene| scene.ask(&scene.client, http).is_ok();
    let echoed =
        |scene: &Scene| scene.client.tcp(tcp, &["echo", "x"]).is_ok_and(|echo| echo.is_ok());
    let (v4, v6) = (format!("{}/32", client.v4()), format!("{}/128", client.v6()));
    let table: [(&str, &str, Value, bool, bool); 6] = [
        ("port", "Deny", json!([[[{ "destinationPorts": [HTTP] }]]]), false, true),
        ("address", "Allow", json!([[[{ "sourceIps": [v4, v6] }]]]), true, true),
        ("other-address", "Allow", json!([[[{ "sourceIps": ["192.0.2.0/24"] }]]]), false, false),
        ("namespace", "Allow", json!([[[{ "namespaces": [{ "Prefix": "la" }] }]]]), true, true),
        ("nobody", "Allow", json!([]), false, false),
        (
            "both-clauses",
            "Deny",
            json!([[[{ "destinationPorts": [TCP] }],
                    [{ "principals": [{ "Suffix": "/sa/client" }] }]]]),
            true,
            false,
        ),
    ];
    for (name, action, rules, http_may, tcp_may) in table {
        scene.mesh.policy(name, action, &rules);
        scene.apply_policy(name).unwrap();
        assert_eq!((answered(&scene), echoed(&scene)), (http_may, tcp_may), "{name}");
        // A dry run decides nothing.
        scene.mesh.policy(name, action, &rules).set("dryRun", json!(true));
        scene.apply().unwrap();
        wait::until("dry run", SOON, || Ok((answered(&scene) && echoed(&scene)).then_some(())))
            .unwrap();
        scene.mesh.remove_policy(name);
        scene.apply().unwrap();
        scene.b.with_proxy(|proxy| proxy.wait_policy(name, false)).unwrap();
    }
}

#[test]
fn a_policy_that_has_not_come_denies_after_a_while() {
    let mut scene = Scene::start(&[]).unwrap();
    scene.ask_until(&scene.client, web(80)[0]).unwrap();
    scene.mesh.select("not-yet", NAMESPACE, &[&scene.server]);
    scene.apply().unwrap();
    let waits = |dump: &Value| dump.to_string().contains("lab/not-yet");
    scene.b.with_proxy(|proxy| proxy.wait_dump("the reference", waits)).unwrap();
    let mark = scene.b.with_proxy(|proxy| Ok(proxy.log().mark())).unwrap();
    assert!(scene.ask(&scene.client, web(80)[0]).is_err());
    let named = |line: &mesh_tests::log::Line| line.field("error").contains("lab/not-yet");
    scene.b.with_proxy(|proxy| proxy.wait_access(mark, "it", named)).unwrap();
    // It comes while a connection waits for it.
    let to = web(TCP)[0].to_string();
    let waiting = scene.client.spawn(["tcp", &to, "wait", "patience"]).unwrap();
    let rules = json!([[[{ "namespaces": [{ "Exact": NAMESPACE }] }]]]);
    let policy = scene.mesh.policy("not-yet", "Allow", &rules);
    policy.set("scope", json!("WorkloadSelector"));
    scene.apply_policy("not-yet").unwrap();
    waiting.finish(SOON).unwrap().ok().unwrap();
}

#[test]
fn what_is_not_in_the_mesh_is_reached_as_it_is() {
    let scene = Scene::start(&[]).unwrap();
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
    let mut scene = Scene::start(&[]).unwrap();
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

#[test]
fn our_own_ports_are_nobodys_to_call() {
    let scene = Scene::start(&[]).unwrap();
    for port in [15001, 15006] {
        for from in [&scene.client, &scene.outsider] {
            let got = from.tcp(SocketAddr::new(scene.server.v4(), port), &["who"]).unwrap();
            assert!(!got.is_ok(), "{port} answered {}", got.out);
        }
    }
    // At most a TLS alert: nobody who says who came.
    let got = scene.client.tcp(SocketAddr::new(scene.server.v4(), TUNNEL), &["who"]).unwrap();
    assert!(!got.out.contains(&scene.client.v4().to_string()), "{}", got.out);
    // And nothing spins.
    scene.ask(&scene.client, web(80)[0]).unwrap();
}

#[test]
fn a_node_proxy_that_is_told_to_stop_lets_streams_finish() {
    let scene = Scene::start(&[("TERMINATION_GRACE_PERIOD_SECONDS", "20")]).unwrap();
    let to = web(TCP)[0].to_string();
    scene.ask_until(&scene.client, web(80)[0]).unwrap();
    let mut ticking = scene.client.spawn(["tcp", &to, "tick", "40", "50"]).unwrap();
    ticking.says("open", SOON).unwrap();
    // The server's side is told; the stream has two seconds to go.
    let code = scene.b.with_proxy(|proxy| proxy.terminate(SOON)).unwrap();
    assert_eq!(code, 0);
    let ticked = ticking.finish(SOON).unwrap();
    let log = scene.b.with_proxy(|proxy| Ok(proxy.log().tail(8))).unwrap();
    assert!(ticked.is_ok(), "{}\n{log}", ticked.err);
}
