//! The same rules by each tool that istio-cni may use.

use mesh_tests::{
    Scene,
    capture::Capture,
    istio_cni::Backend,
    mesh::STRICT,
    scene::{HTTP, TCP, web},
    topology::PROBE,
    wait::SOON,
};
use std::net::SocketAddr;

/// In and out, in both families, by tunnel and in plain text, with the client's address; the pod and itself;
/// probes; STRICT.
fn serves(backend: Backend) {
    let mut scene = Scene::external(backend, &[]).unwrap();
    let capture = Capture::start(scene.lab.wire(), &["GET /"]).unwrap();
    for (to, own) in web(80).into_iter().zip([scene.client.v4(), scene.client.v6()]) {
        assert_eq!(scene.seen_as(&scene.client, to).unwrap(), own.to_string());
    }
    assert_eq!(capture.stop().unwrap().objection(), None);
    let own = [scene.outsider.v4(), scene.outsider.v6()];
    for (to, own) in scene.server_at(HTTP).into_iter().zip(own) {
        assert_eq!(scene.seen_as(&scene.outsider, to).unwrap(), own.to_string());
    }
    scene.mesh.strict(&[&scene.server]);
    scene.apply_policy(STRICT).unwrap();
    for (to, source) in scene.server_at(HTTP).into_iter().zip([PROBE.0, PROBE.1]) {
        assert!(scene.ask(&scene.outsider, to).is_err(), "{to} answered");
        let (url, source) = (format!("http://{to}/"), source.to_string());
        let curl = ["curl", "-gsS", "--max-time", "5", "--interface", &source, &url];
        scene.b.run(curl).unwrap().ok().unwrap();
    }
    for to in web(80) {
        scene.ask(&scene.client, to).unwrap();
    }
}

#[test]
fn iptables() {
    serves(Backend::Iptables);
}

#[test]
fn iptables_of_old() {
    serves(Backend::Legacy);
}

#[test]
fn nftables() {
    serves(Backend::Nftables);
}

/// Its rules are gone before the node proxy is told, so that what it has open cannot go on: it ends at once, and is
/// no failure.
#[test]
fn a_pod_that_leaves_ends_what_it_has_open() {
    let scene = Scene::external(Backend::Iptables, &[]).unwrap();
    scene.ask_until(&scene.client, web(80)[0]).unwrap();
    let to = web(TCP)[0].to_string();
    let mut held = scene.client.spawn(["tcp", &to, "hold"]).unwrap();
    held.says("open", SOON).unwrap();
    let mark = scene.a.with_proxy(|proxy| Ok(proxy.log().mark())).unwrap();
    scene.a.release(&scene.client).unwrap();
    held.says("closed", SOON).unwrap();
    scene
        .a
        .with_proxy(|proxy| {
            let drained = "connection closed due to connection drain";
            let line = proxy.wait_access(mark, "its end", |line| {
                line.message == "connection complete" && line.field("error").starts_with(drained)
            })?;
            assert_eq!((line.level.as_str(), line.field("direction")), ("error", "outbound"));
            let metrics = proxy.metrics()?;
            let labels = [("reporter", "source"), ("response_flags", "-")];
            let count = |name: &str| metrics.sum(name, &labels);
            let opened = count("istio_tcp_connections_opened_total");
            let closed = count("istio_tcp_connections_closed_total");
            assert!((opened - closed).abs() < 0.5, "{opened} opened, {closed} closed");
            assert!(metrics.sum("istio_tcp_connections_failed_total", &[]) < 0.5);
            Ok(())
        })
        .unwrap();
}

/// A node proxy that takes a pod whose rules nobody wrote serves it in vain, and says so.
#[test]
fn a_pod_that_nobody_redirects_is_noticed() {
    let scene = Scene::external(Backend::Iptables, &[]).unwrap();
    scene.ask_until(&scene.client, web(80)[0]).unwrap();
    let uid = scene.client.uid();
    let is = |state: &'static str| {
        scene.a.with_proxy(|proxy| {
            proxy.wait_dump(state, |dump| dump["workloadState"][&uid]["capture"]["state"] == state)
        })
    };
    is("Captured").unwrap();
    for tool in ["iptables", "ip6tables"] {
        for table in ["nat", "mangle", "raw", "filter"] {
            for how in ["-F", "-X"] {
                scene.client.run([tool, "-t", table, how]).unwrap().ok().unwrap();
            }
        }
    }
    is("NotCaptured").unwrap();
    scene
        .a
        .with_proxy(|proxy| {
            let count = proxy.metrics()?.sum("workload_manager_uncaptured_proxy_count", &[]);
            assert!((count - 1.0).abs() < 0.5, "{count}");
            Ok(())
        })
        .unwrap();
}

/// The node proxy's doors are IPv4's alone: what the rules lead to the others is refused, and goes out nowhere.
#[test]
fn ipv6_may_be_off() {
    let scene = Scene::external(Backend::Iptables, &[("IPV6_ENABLED", "false")]).unwrap();
    scene.ask_until(&scene.client, web(80)[0]).unwrap();
    let capture = Capture::start(scene.lab.wire(), &["in-clear"]).unwrap();
    for to in [web(TCP)[1], scene.server_at(TCP)[1], SocketAddr::new(scene.outsider.v6(), TCP)] {
        let got = scene.client.tcp(to, &["echo", "in-clear"]).unwrap();
        assert!(!got.is_ok(), "{to}: {}", got.out);
    }
    let seen = capture.stop().unwrap();
    assert_eq!(seen.objection(), None);
    assert!(seen.attempts.is_empty(), "{:?}", seen.attempts);
}

/// The rules lead to a port that nobody has: refused, and never let pass.
#[test]
fn a_dead_node_proxy_lets_nothing_pass_and_its_successor_takes_over() {
    let settings = [("CAPTURE", "external")];
    let scene = Scene::external(Backend::Iptables, &[]).unwrap();
    scene.ask_until(&scene.client, web(80)[0]).unwrap();
    scene.a.kill_proxy();
    scene.b.kill_proxy();
    let capture = Capture::start(scene.lab.wire(), &["in-clear"]).unwrap();
    for to in web(TCP).into_iter().chain(scene.server_at(TCP)) {
        for from in [&scene.client, &scene.server] {
            // A pod reaches its own address without anybody's help.
            if from.name() == "server" && scene.server_at(TCP).contains(&to) {
                continue;
            }
            let got = from.tcp(to, &["echo", "in-clear"]).unwrap();
            assert!(!got.is_ok(), "{to}: {}", got.out);
        }
    }
    let seen = capture.stop().unwrap();
    assert_eq!(seen.objection(), None);
    assert!(seen.attempts.is_empty(), "{:?}", seen.attempts);
    let plain = scene.outsider.tcp(SocketAddr::new(scene.server.v4(), TCP), &["who"]).unwrap();
    assert!(!plain.is_ok(), "{}", plain.out);
    scene.a.start_proxy(&settings).unwrap();
    scene.b.start_proxy(&settings).unwrap();
    for to in web(80) {
        scene.ask_until(&scene.client, to).unwrap();
    }
    scene.a.with_proxy(|proxy| proxy.wait_ready(SOON)).unwrap();
}
