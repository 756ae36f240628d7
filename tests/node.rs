//! Capture on a node: its hazards, pods that come and go, node proxies that die.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
    thread,
    time::Duration,
};

use mesh_tests::{
    Scene,
    capture::Capture,
    mesh::identity,
    scene::{HTTP, TCP, TUNNEL, web},
    wait::{self, SOON},
};
use serde_json::json;

#[test]
fn requests_go_through_both_nodes_and_keep_their_address() {
    let scene = Scene::start(&[]).unwrap();
    let capture = Capture::start(scene.lab.wire(), &["GET /"]).unwrap();
    for (to, own) in web(80).into_iter().zip([scene.client.v4(), scene.client.v6()]) {
        let said = scene.ask_until(&scene.client, to).unwrap();
        assert_eq!(said["client"], own.to_string());
    }
    let seen = capture.stop().unwrap();
    assert_eq!(seen.objection(), None, "{seen:?}");
    assert!(!seen.tls.is_empty());
}

#[test]
fn a_socket_bound_to_the_device_is_captured_too() {
    let mut scene = Scene::start(&[]).unwrap();
    scene.mesh.strict(&[&scene.server]);
    scene.apply_policy(mesh_tests::mesh::STRICT).unwrap();
    for to in web(80).into_iter().chain(scene.server_at(HTTP)) {
        let url = format!("http://{to}/");
        let bound = ["curl", "-gsS", "--max-time", "8", "--interface", "if!eth0", &url];
        scene.client.run(bound).unwrap().ok().unwrap();
    }
}

#[test]
fn an_application_may_hold_our_ports() {
    let scene = Scene::bare().unwrap();
    let mut held = scene.server.spawn(["tcp-server", "[::]:15008", "[::]:15001"]).unwrap();
    held.says("listening", SOON).unwrap();
    scene.begin(&[]).unwrap();
    scene.ask_until(&scene.client, web(80)[0]).unwrap();
    // What dials its tunnel port from outside gets the node proxy.
    // An alert is all that somebody without TLS can get there; the application would say who asks.
    let got = scene.outsider.tcp(SocketAddr::new(scene.server.v4(), TUNNEL), &["who"]).unwrap();
    assert!(!got.out.contains(&scene.outsider.v4().to_string()), "{}", got.out);
}

#[test]
fn an_application_can_bind_while_a_connection_to_its_port_is_open() {
    let scene = Scene::start(&[]).unwrap();
    let to = web(TCP)[0].to_string();
    let mut open = scene.client.spawn(["tcp", &to, "hold"]).unwrap();
    open.says("open", SOON).unwrap();
    let mut server = scene.client.spawn(["tcp-server", &format!("0.0.0.0:{TCP}")]).unwrap();
    server.says("listening", SOON).unwrap();
}

#[test]
fn somebody_elses_rules_are_a_reason_to_refuse() {
    let scene = Scene::bare().unwrap();
    scene.a.start_proxy(&[]).unwrap();
    let chain = ["iptables", "-t", "nat", "-N", "ISTIO_OUTPUT"];
    scene.client.run(chain).unwrap().ok().unwrap();
    let why = scene.a.enrol(&scene.client, "client").unwrap_err();
    assert!(format!("{why:#}").contains("ISTIO_OUTPUT"), "{why:#}");
    scene.client.run(["iptables", "-t", "nat", "-X", "ISTIO_OUTPUT"]).unwrap().ok().unwrap();
    let route = ["ip", "route", "add", "local", "default", "dev", "lo", "table", "100"];
    scene.outsider.run(route).unwrap().ok().unwrap();
    let why = scene.a.enrol(&scene.outsider, "outsider").unwrap_err();
    assert!(format!("{why:#}").contains("100"), "{why:#}");
    // Readiness waits for what is pending, and names it.
    scene
        .a
        .with_proxy(|proxy| {
            wait::until("not ready", SOON, || {
                let answer = proxy.readiness()?;
                Ok((answer.status == 500 && answer.body.contains("workload proxy manager"))
                    .then_some(()))
            })
        })
        .unwrap();
    // The first is enrolled by the retry.
    scene
        .a
        .with_proxy(|proxy| {
            wait::until("one enrolled", SOON, || {
                let metrics = proxy.metrics()?;
                let one = |name| (metrics.sum(name, &[]) - 1.0).abs() < 0.5;
                let up = one("workload_manager_active_proxy_count");
                let pending = one("workload_manager_pending_proxy_count");
                Ok((up && pending).then_some(()))
            })
        })
        .unwrap();
}

#[test]
fn a_dead_node_proxy_lets_nothing_pass_and_its_successor_takes_over() {
    let scene = Scene::start(&[]).unwrap();
    scene.ask_until(&scene.client, web(80)[0]).unwrap();
    scene.a.kill_proxy();
    let capture = Capture::start(scene.lab.wire(), &["in-clear"]).unwrap();
    for to in web(TCP).into_iter().chain(scene.server_at(TCP)) {
        let got = scene.client.tcp(to, &["echo", "in-clear"]).unwrap();
        assert!(!got.is_ok(), "{to}: {}", got.out);
    }
    let seen = capture.stop().unwrap();
    assert_eq!(seen.objection(), None);
    assert!(seen.attempts.is_empty(), "{:?}", seen.attempts);
    let to = web(TCP)[0].to_string();
    let waiting = scene.client.spawn(["tcp", &to, "wait", "patience"]).unwrap();
    scene.a.start_proxy(&[]).unwrap();
    waiting.finish(SOON * 2).unwrap().ok().unwrap();
    for to in web(80) {
        scene.ask(&scene.client, to).unwrap();
    }
}

/// Connections that were answered, and why others were not.
#[derive(Default)]
struct Storm {
    made: AtomicUsize,
    lost: std::sync::Mutex<Vec<String>>,
    ended: AtomicBool,
}

impl Storm {
    /// Dials again and again from the pod, and asks who it is.
    fn blow(&self, from: &mesh_tests::Pod, to: SocketAddr) {
        let ask = || -> std::io::Result<String> {
            let mut stream = TcpStream::connect_timeout(&to, Duration::from_secs(15))?;
            stream.set_read_timeout(Some(Duration::from_secs(15)))?;
            stream.write_all(b"who\n")?;
            let mut said = String::new();
            stream.read_to_string(&mut said)?;
            Ok(said)
        };
        let run = || {
            while !self.ended.load(Ordering::Relaxed) {
                match ask() {
                    Ok(said) if !said.is_empty() => drop(self.made.fetch_add(1, Ordering::Relaxed)),
                    other => self.lost.lock().unwrap().push(format!("{to}: {other:?}")),
                }
            }
            Ok(())
        };
        from.namespace().run(run).unwrap();
    }

    fn goes_on(&self) {
        let before = self.made.load(Ordering::Relaxed);
        let more = || Ok((self.made.load(Ordering::Relaxed) > before + 100).then_some(()));
        wait::until("a hundred more", SOON * 2, more).unwrap();
    }
}

#[test]
fn no_connection_is_lost_when_a_node_proxy_follows_another() {
    let scene = Scene::start(&[]).unwrap();
    scene.ask_until(&scene.client, web(80)[0]).unwrap();
    let storm = Storm::default();
    let paths = [
        (&scene.client, web(TCP)[0]),
        (&scene.client, web(TCP)[1]),
        (&scene.client, SocketAddr::new(scene.outsider.v4(), TCP)),
        (&scene.outsider, scene.server_at(TCP)[1]),
    ];
    thread::scope(|scope| {
        for (from, to) in paths {
            let storm = &storm;
            scope.spawn(move || storm.blow(from, to));
        }
        for _ in 0..2 {
            for node in [&scene.a, &scene.b] {
                storm.goes_on();
                let mut old = node.succeed_proxy(&[]).unwrap();
                storm.goes_on();
                // In order: it goes on accepting until nobody waits for it.
                assert_eq!(old.terminate(SOON).unwrap(), 0);
                storm.goes_on();
            }
        }
        storm.ended.store(true, Ordering::Relaxed);
    });
    let lost = storm.lost.into_inner().unwrap();
    assert!(lost.is_empty(), "{} of {}: {lost:?}", lost.len(), storm.made.into_inner());
}

#[test]
fn a_successor_that_comes_late_is_waited_for() {
    // Half of it, at most 5 s, is how long the old one goes on accepting.
    let scene = Scene::start(&[("CONNECTION_TERMINATION_DEADLINE", "20s")]).unwrap();
    scene.ask_until(&scene.client, web(80)[0]).unwrap();
    // It holds the old one up, until the test is over with it.
    let to = web(TCP)[0].to_string();
    let mut held = scene.client.spawn(["tcp", &to, "hold"]).unwrap();
    held.says("open", SOON).unwrap();
    scene.a.with_proxy(|proxy| proxy.program().signal(nix::sys::signal::Signal::SIGTERM)).unwrap();
    let mut old = scene.a.succeed_proxy(&[]).unwrap();
    assert!(old.program().is_running());
    scene.ask(&scene.client, web(80)[1]).unwrap();
    drop(held);
    assert_eq!(old.program().wait(SOON).unwrap(), 0);
    scene.ask(&scene.client, web(80)[1]).unwrap();
}

/// Anybody with the right to may take away what capture is made of. It is written again, and meanwhile connections are
/// refused: none goes past us, in clear.
#[test]
fn what_somebody_takes_away_is_written_again() {
    let scene = Scene::start(&[]).unwrap();
    let all = || {
        for to in scene.server_at(HTTP) {
            scene.ask_until(&scene.client, to).unwrap();
        }
    };
    all();
    let capture = Capture::start(scene.lab.wire(), &["GET /"]).unwrap();
    for taken in [
        &["route flush table 100"][..],
        &["-6 route flush table 100"],
        &["rule del pref 100 ipproto tcp"],
        &["-6 rule del pref 100 ipproto tcp"],
        &["rule del pref 100 ipproto tcp", "-6 rule del pref 100 ipproto tcp"],
        &["rule del pref 101 ipproto tcp", "route flush table 100"],
        &["rule del pref 99"],
        &["-6 rule del pref 102"],
    ] {
        for _ in 0..3 {
            for words in taken {
                let words = ["ip"].into_iter().chain(words.split(' '));
                scene.client.run(words).unwrap().ok().unwrap();
            }
            for to in scene.server_at(HTTP) {
                let _refused_or_not = scene.ask(&scene.client, to);
            }
            all();
        }
    }
    let seen = capture.stop().unwrap();
    assert_eq!(seen.objection(), None, "{seen:?}");
    assert!(!seen.tls.is_empty());
}

/// Who cannot tell the mesh from the rest leaves the pods to who can.
#[test]
fn a_successor_that_knows_nothing_yet_takes_nothing_over() {
    let scene = Scene::start(&[]).unwrap();
    scene.ask_until(&scene.client, web(80)[0]).unwrap();
    let before = scene.a.zds().connections();
    // No control plane is there.
    let away = [("LOCAL_XDS_PATH", ""), ("XDS_ADDRESS", "http://127.0.0.1:9")];
    let next = scene.a.begin_successor(&away).unwrap();
    wait::until("what it waits for", SOON, || {
        Ok(next.log().tail(20).contains("pods are taken once").then_some(()))
    })
    .unwrap();
    for _ in 0..3 {
        for to in web(80) {
            scene.ask(&scene.client, to).unwrap();
        }
    }
    assert_eq!(scene.a.zds().connections(), before);
    let pending = "not ready, pending: state manager, workload proxy manager\n";
    assert_eq!(next.readiness().unwrap().body, pending);
}

/// Runs the node proxy as it would be on a machine that lacks something, and returns what it says at its end.
fn lacking(scene: &Scene, wrapper: &str) -> String {
    let exe = scene.a.executable().display().to_string();
    let settings = "CAPTURE=ebpf XDS_ADDRESS= INPOD_UDS=/nowhere RUST_LOG=info";
    let pins = scene.lab.folder().join("pins/none");
    let pins = pins.display();
    let script = format!("{wrapper} env {settings} CAPTURE_PIN_DIR={pins} {exe} proxy ztunnel");
    let done = scene.a.run(["bash", "-c", &script]).unwrap();
    assert_eq!(done.code, 1, "{wrapper}: {}{}", done.out, done.err);
    done.out + &done.err
}

#[test]
fn what_the_machine_lacks_is_said_in_one_line_each() {
    let scene = Scene::bare().unwrap();
    let no_btf = "unshare -m bash -c 'mount -t tmpfs none /sys/kernel/btf && exec \"$@\"' -";
    let without = |what: &str| format!("setpriv --bounding-set=-{what} --inh-caps=-{what}");
    for (name, wrapper, expected) in [
        ("no BTF", no_btf.to_owned(), vec!["no BTF", "CONFIG_DEBUG_INFO_BTF"]),
        (
            "an old kernel",
            "setarch --uname-2.6".to_owned(),
            vec!["2.6", "5.15", "CAPTURE=external"],
        ),
        ("no CAP_SYS_ADMIN", without("sys_admin"), vec!["cannot be entered", "CAP_SYS_ADMIN"]),
        ("no CAP_NET_ADMIN", without("net_admin"), vec!["rules and routes", "CAP_NET_ADMIN"]),
    ] {
        let said = lacking(&scene, &wrapper);
        let line = said.lines().find(|line| expected.iter().all(|word| line.contains(word)));
        assert!(line.is_some(), "{name}: {said}");
        assert!(said.contains("this machine lacks"), "{name}: {said}");
        assert!(!said.contains("panicked"), "{name}: {said}");
    }
}

#[test]
fn inbound_waits_for_the_successor() {
    let scene = Scene::start(&[]).unwrap();
    scene.ask_until(&scene.client, web(80)[0]).unwrap();
    scene.b.kill_proxy();
    let plain = SocketAddr::new(scene.server.v4(), TCP).to_string();
    let waiting = scene.outsider.spawn(["tcp", &plain, "wait", "patience"]).unwrap();
    // The application is still reached by itself and by probes.
    scene.ask(&scene.server, SocketAddr::new(scene.server.v4(), HTTP)).unwrap();
    scene.b.start_proxy(&[]).unwrap();
    waiting.finish(SOON * 2).unwrap().ok().unwrap();
    wait::retry("an answer", SOON, || scene.ask(&scene.client, web(80)[0])).unwrap();
}

#[test]
fn stopping_leaves_capture_and_release_withdraws_it() {
    let scene = Scene::start(&[]).unwrap();
    scene.ask_until(&scene.client, web(80)[0]).unwrap();
    let code = scene.a.with_proxy(|proxy| proxy.terminate(SOON)).unwrap();
    assert_eq!(code, 0);
    let direct = SocketAddr::new(scene.outsider.v4(), HTTP);
    assert!(scene.ask(&scene.client, direct).is_err());
    let release = scene.a.proxy_command(&["release", "--all"]).unwrap();
    assert!(release.is_ok(), "{}{}", release.out, release.err);
    let said = scene.ask(&scene.client, direct).unwrap();
    assert_eq!(said["client"], scene.client.v4().to_string());
}

#[test]
fn enrolling_and_releasing_breaks_no_connection() {
    let mut scene = Scene::start(&[]).unwrap();
    let late = scene.a.pod("late").unwrap();
    scene.lab.settle(&[&late]).unwrap();
    let _programs = late.serve(HTTP, TCP).unwrap();
    scene.mesh.stranger(&late, "late");
    scene.apply().unwrap();
    let live = || {
        let mut live = Vec::new();
        for (from, to) in [(&late, &scene.outsider), (&scene.outsider, &late)] {
            for ip in [to.v4(), to.v6()] {
                let to = SocketAddr::new(ip, TCP).to_string();
                let mut program = from.spawn(["tcp", &to, "tick", "60", "25"]).unwrap();
                program.says("open", SOON).unwrap();
                live.push(program);
            }
        }
        live
    };
    let before = live();
    scene.mesh.workload_of(&late).unwrap().set("protocol", json!("HBONE"));
    scene.apply().unwrap();
    scene.a.enrol(&late, "late").unwrap();
    for program in before {
        program.finish(SOON).unwrap().ok().unwrap();
    }
    let mark = scene.a.with_proxy(|proxy| Ok(proxy.log().mark())).unwrap();
    scene.ask_until(&late, web(80)[1]).unwrap();
    let own = |line: &mesh_tests::log::Line| line.field("src.identity") == identity("late");
    scene.a.with_proxy(|proxy| proxy.wait_access(mark, "late's", own)).unwrap();
    // Now these are captured, and the pod leaves the mesh.
    let after = live();
    scene.a.release(&late).unwrap();
    for program in after {
        program.finish(SOON).unwrap().ok().unwrap();
    }
    let said = scene.ask(&late, SocketAddr::new(scene.outsider.v4(), HTTP)).unwrap();
    assert_eq!(said["client"], late.v4().to_string());
}

#[test]
fn a_pod_without_ipv6_is_served_by_ipv4() {
    let scene = Scene::bare().unwrap();
    scene.client.namespace().sysctl("ipv6/conf/all/disable_ipv6", "1").unwrap();
    scene.client.namespace().sysctl("ipv6/conf/lo/disable_ipv6", "1").unwrap();
    scene.begin(&[]).unwrap();
    let said = scene.ask_until(&scene.client, web(80)[0]).unwrap();
    assert_eq!(said["client"], scene.client.v4().to_string());
}

#[test]
fn a_pod_that_is_gone_takes_nothing_with_it() {
    let scene = Scene::start(&[]).unwrap();
    let other = scene.a.pod("other").unwrap();
    scene.lab.settle(&[&other]).unwrap();
    scene.a.enrol(&other, "other").unwrap();
    let up = |count: f64| {
        scene.a.with_proxy(|proxy| {
            wait::until("the count", SOON, || {
                let is = proxy.metrics()?.sum("workload_manager_active_proxy_count", &[]);
                Ok(((is - count).abs() < 0.5).then_some(()))
            })
        })
    };
    up(2.0).unwrap();
    let name = other.namespace().name().to_owned();
    scene.a.release(&other).unwrap();
    drop(other);
    mesh_tests::netns::remove(&name);
    up(1.0).unwrap();
    scene.ask_until(&scene.client, web(80)[0]).unwrap();
}

#[test]
fn the_agent_may_come_and_go() {
    let scene = Scene::start(&[]).unwrap();
    scene.ask_until(&scene.client, web(80)[0]).unwrap();
    let to = web(TCP)[0].to_string();
    let mut open = scene.client.spawn(["tcp", &to, "tick", "60", "25"]).unwrap();
    open.says("open", SOON).unwrap();
    let before = scene.a.zds().connections();
    scene.a.zds().forget(&scene.client.uid());
    scene.a.zds().hang_up();
    scene.a.zds().wait_connections(before + 1, SOON).unwrap();
    assert_eq!(scene.a.zds().complaint(), None);
    open.finish(SOON).unwrap().ok().unwrap();
    scene.ask_until(&scene.client, web(80)[1]).unwrap();
    scene
        .a
        .with_proxy(|proxy| {
            let ready = || Ok((proxy.readiness()?.status == 200).then_some(()));
            wait::until("readiness", SOON, ready)
        })
        .unwrap();
}
