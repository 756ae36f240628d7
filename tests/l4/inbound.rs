//! What tunnels are answered.

use http::Request;
use mesh_tests::{
    ca::Authority,
    frames::{END_HEADERS, END_STREAM, Frames, connect, frame, kind},
    hbone::{Dial, Tunnel, refused},
    mesh::{hostname, identity, principal},
    scene::{HTTP, TCP, TUNNEL, web},
    wait::{self, SOON},
};
use serde_json::json;
use std::{net::SocketAddr, time::Duration};

use super::is_refusal;
use crate::start;

#[test]
fn every_status() {
    let scene = start(&[]).unwrap();
    let client = scene.certificate("client").unwrap();
    let dial = Dial::new(scene.outsider.namespace(), scene.tunnel(), &client);
    let mut tunnel = Tunnel::open(&dial).unwrap();
    assert!(tunnel.server_is(&identity("server")));
    let ip = scene.server.v4();
    let name = hostname("web");
    for (authority, status) in [
        (format!("{ip}:{HTTP}"), 200),
        // The same, as a socket of the other family has it.
        (format!("[::ffff:{ip}]:{HTTP}"), 200),
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

/// In a tunnel and in plain text, whoever captures.
#[test]
fn an_application_need_not_see_its_clients() {
    let scene = start(&[("ENABLE_ORIG_SRC", "false")]).unwrap();
    let own = [scene.server.v4(), scene.server.v6()];
    for (to, own) in web(80).into_iter().zip(own) {
        let said = scene.ask_until(&scene.client, to).unwrap();
        assert_eq!(said["client"], own.to_string(), "{to}");
    }
    for (to, own) in scene.server_at(HTTP).into_iter().zip(own) {
        let said = scene.ask_until(&scene.outsider, to).unwrap();
        assert_eq!(said["client"], own.to_string(), "{to}");
    }
}

#[test]
fn early_refusals_are_counted_apart_and_say_why() {
    let scene = start(&[]).unwrap();
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
    let mut scene = start(&[]).unwrap();
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

/// What is sent behind a CONNECT, before its answer, goes where the CONNECT goes, and nowhere if it is refused.
#[test]
fn what_is_sent_before_the_answer_waits_for_it() {
    let mut scene = start(&[]).unwrap();
    let rules = json!([[[{ "principals": [{ "Exact": principal("client") }] }]]]);
    scene.mesh.policy("no-client", "Deny", &rules);
    scene.apply_policy("no-client").unwrap();
    let authority = format!("{}:{TCP}", scene.server.v4());
    for (account, word) in [("client", "refused"), ("other", "let-in")] {
        let certificate = scene.certificate(account).unwrap();
        let dial = Dial::new(scene.outsider.namespace(), scene.tunnel(), &certificate);
        let mut frames = Frames::open(&dial).unwrap();
        let request = frame(kind::HEADERS, END_HEADERS, 1, &connect(&authority));
        let early = frame(kind::DATA, END_STREAM, 1, format!("echo-{word}\n").as_bytes());
        frames.write(&[request, early].concat()).unwrap();
        let answer = frames.read(Duration::from_secs(1));
        assert!(answer.frames.contains(&kind::HEADERS), "{account}: {answer:?}");
    }
    // Of the second it has heard, and so of all that it was to hear of.
    let heard = || Ok(scene.tcp.output().contains("echo-let-in").then_some(()));
    wait::until("the application to hear of it", SOON, heard).unwrap();
    let output = scene.tcp.output();
    assert!(!output.contains("echo-refused"), "{output}");
    assert_eq!(output.matches(" from ").count(), 1, "{output}");
}

#[test]
fn answers_need_not_say_who_answers() {
    let scene = start(&[("ENABLE_RESPONSE_BAGGAGE", "false")]).unwrap();
    let client = scene.certificate("client").unwrap();
    let dial = Dial::new(scene.outsider.namespace(), scene.tunnel(), &client);
    let authority = format!("{}:{HTTP}", scene.server.v4());
    let reply = Tunnel::open(&dial).unwrap().connect(&authority, &[]).unwrap();
    assert_eq!((reply.status, reply.headers.len()), (200, 0));
}

#[test]
fn who_is_not_of_the_mesh_gets_no_tunnel() {
    let scene = start(&[]).unwrap();
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
fn our_own_ports_are_nobodys_to_call() {
    let scene = start(&[]).unwrap();
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
