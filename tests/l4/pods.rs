//! What a pod may be: without IPv4, unknown, its own peer, an application that terminates tunnels itself, a
//! waypoint that stands before another.

use mesh_tests::{
    Pod, Program, Scene,
    hbone::{Dial, Listener, Tunnel},
    mesh::{STRICT, hostname, identity},
    scene::{HTTP, TCP, TUNNEL, web},
    topology::PROBE,
    wait::{self, SOON},
};
use serde_json::{Value, json};
use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use super::is_refusal;
use crate::start;

#[test]
fn a_pod_and_itself() {
    let scene = start(&[]).unwrap();
    let server = &scene.server;
    let direct = [server.v4(), server.v6(), [127, 0, 0, 1].into(), Ipv6Addr::LOCALHOST.into()];
    for ip in direct {
        let said = scene.ask(server, SocketAddr::new(ip, HTTP)).unwrap();
        assert_eq!(said["local"], ip.to_string());
    }
    for (to, own) in web(80).into_iter().zip([server.v4(), server.v6()]) {
        let said = scene.ask_until(server, to).unwrap();
        assert_eq!(said["name"], "server");
        assert_eq!(said["client"], own.to_string());
    }
}

/// An IPv4 address in IPv6's clothes is the IPv4 address, wherever it turns up.
#[test]
fn one_socket_for_both_families() {
    let scene = start(&[]).unwrap();
    let mapped = |to: SocketAddr| match to.ip() {
        IpAddr::V4(ip) => SocketAddr::new(ip.to_ipv6_mapped().into(), to.port()),
        IpAddr::V6(_) => to,
    };
    let own = scene.client.v4().to_string();
    assert_eq!(scene.seen_as(&scene.client, mapped(web(80)[0])).unwrap(), own);
    assert_eq!(scene.seen_as(&scene.client, mapped(scene.server_at(HTTP)[0])).unwrap(), own);
    for node in [&scene.a, &scene.b] {
        let tunnelled = |line: &mesh_tests::log::Line| !line.field("dst.hbone_addr").is_empty();
        node.with_proxy(|proxy| {
            let line = proxy.wait_access(0, "a tunnel", tunnelled)?;
            assert!(!line.text.contains("ffff"), "{}", line.text);
            Ok(())
        })
        .unwrap();
    }
}

#[test]
fn probes_pass_and_the_node_does_not() {
    let mut scene = start(&[]).unwrap();
    scene.mesh.strict(&[&scene.server]);
    scene.apply_policy(STRICT).unwrap();
    for (to, source) in scene.server_at(HTTP).into_iter().zip([PROBE.0, PROBE.1]) {
        let (url, source) = (format!("http://{to}/"), source.to_string());
        let curl = ["curl", "-gsS", "--max-time", "5"];
        let as_probe = ["--interface", &source, &url];
        scene.b.run(curl.iter().chain(&as_probe)).unwrap().ok().unwrap();
        // The node itself is as good as anybody.
        assert!(!scene.b.run(curl.iter().chain(&[url.as_str()])).unwrap().is_ok());
    }
}

#[test]
fn tunnels_belong_to_one_pod() {
    let mut scene = start(&[]).unwrap();
    let (hand, second) = (scene.b.pod("hand").unwrap(), scene.a.pod("second").unwrap());
    scene.lab.settle(&[&hand, &second]).unwrap();
    scene.mesh.workload(&hand, "hand");
    // The same account on the same node: the same certificate, and yet not the same tunnel.
    scene.mesh.workload(&second, "client");
    scene.apply().unwrap();
    crate::enrol(&scene.a, &second, "client").unwrap();
    let issued = scene.certificate("hand").unwrap();
    let listener = Listener::start(hand.namespace(), &issued, 200).unwrap();
    let to = SocketAddr::new(hand.v4(), 80);
    for pod in [&scene.client, &second] {
        wait::retry("an echo", SOON, || Listener::answers(pod, to)).unwrap();
    }
    for pod in [&scene.client, &second] {
        assert!(listener.seen().iter().any(|seen| seen.client.ip() == pod.v4()), "{}", pod.name());
    }
}

/// Tunnels that begin in a pod, by the kernel's table.
fn tunnels_from(pod: &Pod) -> usize {
    let table = pod.run(["cat", "/proc/net/tcp", "/proc/net/tcp6"]).unwrap().ok().unwrap();
    let to = format!(":{TUNNEL:04X}");
    let is_one = |row: &&str| {
        let words: Vec<_> = row.split_whitespace().collect();
        // The peer, and `TCP_ESTABLISHED`.
        words.get(2).is_some_and(|peer| peer.ends_with(&to)) && words.get(3) == Some(&"01")
    };
    table.lines().filter(is_one).count()
}

#[test]
fn a_tunnel_carries_so_many_streams_and_goes_when_unused() {
    let scene =
        start(&[("POOL_MAX_STREAMS_PER_CONNECTION", "2"), ("POOL_UNUSED_RELEASE_TIMEOUT", "1s")])
            .unwrap();
    scene.ask_until(&scene.client, scene.server_at(HTTP)[0]).unwrap();
    let to = scene.server_at(TCP)[0].to_string();
    let mut held: Vec<Program> = Vec::new();
    for _ in 0..5 {
        let mut program = scene.client.spawn(["tcp", &to, "hold"]).unwrap();
        program.says("open", SOON).unwrap();
        held.push(program);
    }
    assert_eq!(tunnels_from(&scene.client), 3);
    drop(held);
    let none = || {
        let left = tunnels_from(&scene.client);
        anyhow::ensure!(left == 0, "{left} tunnels");
        Ok(())
    };
    wait::retry("unused tunnels to go", SOON, none).unwrap();
}

#[test]
fn a_pod_that_the_control_plane_does_not_know_waits_and_is_told() {
    let scene = start(&[]).unwrap();
    let unknown = scene.a.pod("unknown").unwrap();
    scene.lab.settle(&[&unknown]).unwrap();
    let _programs = unknown.serve(HTTP, TCP).unwrap();
    crate::enrol(&scene.a, &unknown, "unknown").unwrap();
    let mark = scene.a.with_proxy(|proxy| Ok(proxy.log().mark())).unwrap();
    let out = unknown.tcp(SocketAddr::new(scene.outsider.v4(), TCP), &["who"]).unwrap();
    assert!(!out.is_ok(), "{}", out.out);
    let plain = scene.outsider.tcp(SocketAddr::new(unknown.v4(), TCP), &["who"]).unwrap();
    assert!(!plain.is_ok(), "{}", plain.out);
    let client = scene.certificate("client").unwrap();
    let to = SocketAddr::new(unknown.v4(), TUNNEL);
    assert!(Tunnel::open(&Dial::new(scene.outsider.namespace(), to, &client)).is_err());
    for direction in ["outbound", "inbound"] {
        let why = "the control plane has not sent the workload of this pod (lab/unknown";
        let told = |line: &mesh_tests::log::Line| {
            line.field("direction") == direction && line.field("error").contains(why)
        };
        scene.a.with_proxy(|proxy| proxy.wait_access(mark, direction, told)).unwrap();
    }
}

#[test]
fn a_workload_that_comes_late_is_waited_for() {
    let mut scene = start(&[]).unwrap();
    let late = scene.a.pod("late").unwrap();
    scene.lab.settle(&[&late]).unwrap();
    crate::enrol(&scene.a, &late, "late").unwrap();
    let to = web(TCP)[0].to_string();
    let waiting = late.spawn(["tcp", &to, "wait", "patience"]).unwrap();
    scene.mesh.workload(&late, "late");
    scene.apply().unwrap();
    waiting.finish(SOON).unwrap().ok().unwrap();
}

#[test]
fn pods_without_ipv4() {
    let mut scene = start(&[]).unwrap();
    let (near, far) = (scene.a.pod("near6").unwrap(), scene.b.pod("far6").unwrap());
    scene.lab.settle(&[&near, &far]).unwrap();
    for pod in [&near, &far] {
        pod.run(["ip", "-4", "address", "flush", "dev", "eth0"]).unwrap().ok().unwrap();
        let own = json!([pod.v6().to_string()]);
        scene.mesh.workload(pod, pod.name()).set("workloadIps", own);
    }
    let _programs = far.serve(HTTP, TCP).unwrap();
    let vip: IpAddr = "fd96::60".parse().unwrap();
    scene.mesh.service("six", &[vip], &[(80, HTTP)], &[&far]).set("ipFamilies", json!("IPv6"));
    scene.apply().unwrap();
    crate::enrol(&scene.a, &near, "near6").unwrap();
    crate::enrol(&scene.b, &far, "far6").unwrap();
    for to in [SocketAddr::new(vip, 80), SocketAddr::new(far.v6(), HTTP)] {
        for from in [&near, &scene.client, &far] {
            let said = scene.ask_until(from, to).unwrap();
            assert_eq!(said["client"], from.v6().to_string(), "{} to {to}", from.name());
        }
    }
    let [_, web6] = web(80);
    scene.ask_until(&near, web6).unwrap();
    let mtls = |line: &mesh_tests::log::Line| line.field("src.identity") == identity("near6");
    scene.b.with_proxy(|proxy| proxy.wait_access(0, "a tunnel", mtls)).unwrap();
}

/// With `server`'s application behind a tunnel of its own on this port.
fn app_tunnel(scene: &mut Scene, tunnel: Value, listen: &str) -> Program {
    let mut program = scene.server.spawn(["announced-server", listen]).unwrap();
    program.says("listening", SOON).unwrap();
    scene.mesh.workload_of(&scene.server).unwrap().set("applicationTunnel", tunnel);
    scene.apply().unwrap();
    let there = |dump: &Value| dump.to_string().contains("pplicationTunnel\":{");
    scene.b.with_proxy(|proxy| proxy.wait_dump("the tunnel", there)).unwrap();
    program
}

/// CONNECTs as `client` from `from` to the server's tunnel port of that family, and has its greeting echoed.
fn greet(scene: &Scene, from: &Pod, to: IpAddr, authority: &str) {
    let client = scene.certificate("client").unwrap();
    let dial = Dial::new(from.namespace(), SocketAddr::new(to, TUNNEL), &client);
    let mut tunnel = Tunnel::open(&dial).unwrap();
    let reply = tunnel.connect(authority, &[]).unwrap();
    assert_eq!(reply.status, 200, "{authority}");
    assert_eq!(tunnel.exchange(reply, b"echo\nhello").unwrap(), b"hello", "{authority}");
}

#[test]
fn an_application_with_a_tunnel_is_told_who_comes_and_whither() {
    let mut scene = start(&[]).unwrap();
    let loopback = ["127.0.0.1", "::1"];
    let tunnel = json!({ "protocol": "PROXY", "port": 15088 });
    let program = app_tunnel(&mut scene, tunnel, "[::]:15088");
    let (v4, v6) = (scene.server.v4(), scene.server.v6());
    let from = &scene.outsider;
    // Whatever is asked for: the application decides. A service is announced by its VIP.
    let table = [
        (v4, format!("{v4}:80"), format!("{v4}:80"), from.v4(), loopback[0]),
        (v4, "192.0.2.7:443".to_owned(), "192.0.2.7:443".to_owned(), from.v4(), loopback[0]),
        (
            v4,
            format!("{}:80", hostname("web")),
            format!("{}:80", web(80)[0].ip()),
            from.v4(),
            loopback[0],
        ),
        (v6, format!("[{v6}]:80"), format!("[{v6}]:80"), from.v6(), loopback[1]),
    ];
    for (n, (to, authority, destination, source, peer)) in table.into_iter().enumerate() {
        greet(&scene, from, to, &authority);
        let line = wait::until("what it was told", SOON, || {
            let output = program.output();
            Ok(output.lines().filter(|line| line.starts_with('{')).nth(n).map(str::to_owned))
        });
        let line: Value = serde_json::from_str(&line.unwrap()).unwrap();
        assert_eq!(line["destination"], destination);
        assert!(line["source"].as_str().unwrap().contains(&source.to_string()), "{line}");
        assert_eq!(line["values"], json!({ "d0": identity("client") }));
        assert_eq!(line["peer"], peer, "{authority}");
    }
    assert!(!program.output().contains("no header"), "{}", program.output());
}

#[test]
fn an_application_with_a_tunnel_may_want_to_be_reached_by_its_address() {
    let mut scene = start(&[("LOCALHOST_APP_TUNNEL", "false")]).unwrap();
    let tunnel = json!({ "protocol": "PROXY", "port": 15088 });
    let program = app_tunnel(&mut scene, tunnel, "[::]:15088");
    let (to, from) = (scene.server.v4(), &scene.outsider);
    greet(&scene, from, to, &format!("{to}:80"));
    let own = format!(r#""peer":"{}""#, from.v4());
    assert!(program.output().contains(&own), "{}", program.output());
}

#[test]
fn an_application_with_a_tunnel_of_no_protocol_only_moves_the_port() {
    let mut scene = start(&[]).unwrap();
    let tunnel = json!({ "protocol": "NONE", "port": TCP });
    let _program = app_tunnel(&mut scene, tunnel, "[::]:15088");
    let (to, from) = (scene.server.v4(), &scene.outsider);
    // Anybody's address; our own ports are still nobody's.
    for authority in [format!("{to}:80"), "192.0.2.7:443".to_owned()] {
        greet(&scene, from, to, &authority);
    }
    let seen =
        || Ok(scene.tcp.output().contains(&format!("echo from {}", from.v4())).then_some(()));
    wait::until("the client's address", SOON, seen).unwrap();
    let client = scene.certificate("client").unwrap();
    let mut tunnel = Tunnel::open(&Dial::new(from.namespace(), scene.tunnel(), &client)).unwrap();
    let reply = tunnel.connect(&format!("{to}:15006"), &[]).unwrap();
    assert!(is_refusal(&reply, 503), "{reply:?}");
}

/// A tunnel to a waypoint that is captured itself asks for what is behind it.
#[test]
fn a_waypoint_in_the_mesh_takes_what_is_meant_for_those_behind_it() {
    let mut scene = start(&[]).unwrap();
    let (near, far) = (scene.b.pod("near").unwrap(), scene.b.pod("far").unwrap());
    let gateway =
        json!({ "destination": format!("lab/{}", hostname("gateway")), "hboneMtlsPort": 15008 });
    let address =
        json!({ "destination": format!("/{}", scene.server.v4()), "hboneMtlsPort": 15008 });
    let other = json!({ "destination": format!("/{}", scene.client.v4()), "hboneMtlsPort": 15008 });
    let vip = |n: u8| IpAddr::from([10, 96, 0, n]);
    let mesh = &mut scene.mesh;
    mesh.workload(&near, "near").set("waypoint", address.clone());
    mesh.workload(&far, "far").set("waypoint", other.clone());
    mesh.service("gateway", &[vip(40)], &[(15008, 15008)], &[&scene.server]);
    mesh.service("by-name", &[vip(41)], &[(80, HTTP)], &[&far]).set("waypoint", gateway);
    mesh.service("by-address", &[vip(42)], &[(80, HTTP)], &[&far]).set("waypoint", address);
    mesh.service("others", &[vip(43)], &[(80, HTTP)], &[&near]).set("waypoint", other);
    mesh.service("none", &[vip(44)], &[(80, HTTP)], &[&near]);
    scene.apply().unwrap();
    let there = |dump: &Value| dump.to_string().contains("none.lab");
    scene.b.with_proxy(|proxy| proxy.wait_dump("the services", there)).unwrap();
    let client = scene.certificate("client").unwrap();
    let dial = Dial::new(scene.outsider.namespace(), scene.tunnel(), &client);
    let mut tunnel = Tunnel::open(&dial).unwrap();
    for (ip, taken) in [
        (near.v4(), true),
        (near.v6(), true),
        (vip(41), true),
        (vip(42), true),
        // Another's: the workload's waypoint says nothing of the service, nor the other way round.
        (far.v4(), false),
        (vip(43), false),
        (vip(44), false),
        (vip(40), false),
        (IpAddr::from([192, 0, 2, 7]), false),
    ] {
        let reply = tunnel.connect(&SocketAddr::new(ip, HTTP).to_string(), &[]).unwrap();
        if taken {
            assert_eq!(reply.status, 200, "{ip}");
            let request = b"GET /x HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
            let answer = tunnel.exchange(reply, request).unwrap();
            // By the local pod, whatever was asked for.
            assert!(String::from_utf8_lossy(&answer).contains(r#""name":"server""#));
        } else {
            assert!(is_refusal(&reply, 400), "{ip}: {reply:?}");
        }
    }
}
