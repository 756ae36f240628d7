//! The access log: the fields of every kind of line in their order, and Istio's words for what went wrong
//! (spec/ztunnel.md §11.4).

use std::{collections::BTreeSet, net::SocketAddr};

use http::{Method, Request};
use mesh_tests::{
    Node,
    hbone::{Dial, Tunnel},
    log::Line,
    mesh::hostname,
    scene::{TCP, web},
    wait::SOON,
};

use serde_json::Value;

use crate::world::{EMPTY, World};

/// A kind of line: what tells it from others, its level, its message, its fields.
struct Kind<'a> {
    node: &'a Node,
    direction: &'a str,
    /// A field and its value.
    find: (&'a str, String),
    level: &'a str,
    message: &'a str,
    fields: &'a str,
    /// The text of `error`, or its beginning; empty where there is none.
    error: String,
}

const COMPLETE: &str = "connection complete";
const FAILED: &str = "connection failed";
const BYTES: &str = "direction bytes_sent bytes_recv duration";

fn check(kind: &Kind<'_>) {
    let (field, value) = &kind.find;
    let what = format!("{} {field}={value} {}", kind.message, kind.error);
    let line = kind.node.with_proxy(|proxy| {
        proxy.wait_access(0, &what, |line| {
            line.field("direction") == kind.direction
                && line.field(field) == value
                && line.message == kind.message
                && line.field("error").starts_with(&kind.error)
                && line.field("error").is_empty() == kind.error.is_empty()
        })
    });
    let line: Line = line.unwrap();
    assert_eq!(line.level, kind.level, "{}", line.text);
    assert_eq!(line.scope, "access", "{}", line.text);
    // Behind Istio's words stand whose side it is on, and what to do.
    let advice = line.field("error").rsplit_once(" (").map(|(_, advice)| advice);
    let sides = ["client side: ", "server side: ", "this side: "];
    let is_advised = advice.is_some_and(|a| sides.iter().any(|s| a.starts_with(s) && a.len() > 30));
    assert_eq!(is_advised, !kind.error.is_empty(), "{}", line.text);
    if line.text.starts_with('{') {
        return json(kind, &line);
    }
    let names: Vec<_> = line.fields.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names.join(" "), kind.fields, "{}", line.text);
    for bare in ["src.addr", "dst.addr", "dst.hbone_addr", "bytes_sent", "bytes_recv"] {
        assert!(!line.text.contains(&format!("{bare}=\"")), "{bare} in {}", line.text);
    }
    for quoted in ["src.workload", "dst.service", "direction", "duration", "error"] {
        let quoted = format!("{quoted}=");
        if let Some((_, after)) = line.text.split_once(&quoted) {
            assert!(after.starts_with('"'), "{quoted} in {}", line.text);
        }
    }
    // The time, the level, the target, the message, the fields.
    assert_eq!(line.text.matches('\t').count(), 4, "{}", line.text);
}

/// The same fields, flat, whose numbers are numbers.
fn json(kind: &Kind<'_>, line: &Line) {
    let value: Value = serde_json::from_str(&line.text).unwrap();
    let fields = value.as_object().unwrap();
    let known = ["level", "time", "scope", "message"];
    let names: BTreeSet<_> = known.into_iter().chain(kind.fields.split(' ')).collect();
    assert_eq!(fields.keys().map(String::as_str).collect::<BTreeSet<_>>(), names, "{value}");
    for (name, value) in fields {
        assert_eq!(value.is_u64(), name.starts_with("bytes_"), "{name} in {}", line.text);
        assert_eq!(value.is_string(), !name.starts_with("bytes_"), "{name} in {}", line.text);
    }
}

#[test]
fn every_kind_of_line_and_what_went_wrong() {
    every_kind(&[("RUST_LOG", "info,access=debug")]);
}

#[test]
fn the_same_in_json() {
    every_kind(&[("RUST_LOG", "info,access=debug"), ("LOG_FORMAT", "json")]);
}

fn every_kind(settings: &[(&str, &str)]) {
    let mut world = World::start(settings).unwrap();
    let deny = serde_json::json!([[[{ "destinationPorts": [9] }]]]);
    world.scene.mesh.policy("deny", "Deny", &deny);
    world.scene.apply_policy("deny").unwrap();
    let scene = &world.scene;
    let outside = |port| SocketAddr::new(scene.outsider.v4(), port);
    let dial = |to| scene.client.tcp(to, &["echo", "x"]);
    for to in [web(TCP)[0], outside(TCP)] {
        mesh_tests::wait::retry("an echo", SOON, || dial(to)?.ok()).unwrap();
    }
    for to in [
        scene.server_at(9)[0],
        scene.server_at(7)[0],
        outside(7),
        (EMPTY, 80).into(),
        scene.server_at(15001)[0],
    ] {
        let _refused = dial(to);
    }
    let _plain = scene.outsider.tcp(scene.server_at(TCP)[0], &["echo", "x"]).unwrap();
    let _denied = scene.outsider.tcp(scene.server_at(9)[0], &["echo", "x"]);
    let server = |port| scene.server_at(port)[0].to_string();
    let both = "src.addr src.workload src.namespace src.identity src.cluster dst.addr dst.hbone_addr \
                dst.service dst.workload dst.namespace dst.identity dst.cluster ";
    let tunnel = both.replace("dst.service ", "");
    let plain = "src.addr src.workload src.namespace src.cluster dst.addr ";
    let stranger = "src.addr dst.addr dst.service dst.workload dst.namespace dst.cluster ";
    let unnamed = stranger.replace("dst.service ", "");
    let at = |of: SocketAddr| ("dst.addr", of.to_string());
    let authority = |port| ("dst.hbone_addr", server(port));
    let with = |fields: &str, error: &str| {
        let error = if error.is_empty() { "" } else { " error" };
        format!("{fields}{BYTES}{error}")
    };
    let policy = "connection closed due to policy rejection: explicitly denied by: lab/deny";
    let (a, b) = (&scene.a, &scene.b);
    for (node, direction, find, level, fields, error) in [
        (a, "outbound", authority(TCP), "info", both, ""),
        (b, "inbound", authority(TCP), "info", both, ""),
        (a, "outbound", at(outside(TCP)), "info", plain, ""),
        (b, "inbound", at(scene.server_at(TCP)[0]), "info", stranger, ""),
        (a, "outbound", authority(9), "error", &tunnel, "http status: 401 Unauthorized"),
        (b, "inbound", authority(9), "error", &tunnel, policy),
        (b, "inbound", at(scene.server_at(9)[0]), "error", &unnamed, policy),
        (a, "outbound", authority(7), "error", &tunnel, "http status: 503 Service Unavailable"),
        (
            b,
            "inbound",
            authority(7),
            "error",
            &tunnel,
            "connection failed: Connection refused (os error 111)",
        ),
        (
            a,
            "outbound",
            at(outside(7)),
            "error",
            plain,
            "io error: Connection refused (os error 111)",
        ),
    ] {
        let fields = with(fields, error);
        let error = error.to_owned();
        check(&Kind { node, direction, find, level, message: COMPLETE, fields: &fields, error });
    }
    let opened = format!("{both}{BYTES}");
    for (node, direction) in [(a, "outbound"), (b, "inbound")] {
        let find = authority(TCP);
        let (level, message, error) = ("debug", "connection opened", String::new());
        check(&Kind { node, direction, find, level, message, fields: &opened, error });
    }
    let empty = SocketAddr::from((EMPTY, 80));
    early(a, "outbound", at(empty), format!("no healthy upstream: {empty}"));
    // It went through a tunnel, and the far side refused it.
    let recursive = "attempted recursive call to ourselves".to_owned();
    early(b, "inbound", at(scene.tunnel()), recursive);
    refused_tunnels(&world);
}

/// Refused before it was counted: four fields.
fn early(node: &Node, direction: &str, find: (&str, String), error: String) {
    let fields = "src.addr dst.addr direction error";
    check(&Kind { node, direction, find, level: "warn", message: FAILED, fields, error });
}

/// What a peer can ask of the tunnel port and not get.
fn refused_tunnels(world: &World) {
    let scene = &world.scene;
    let certificate = scene.certificate("client").unwrap();
    let outsider = Dial::new(scene.outsider.namespace(), scene.tunnel(), &certificate);
    let mut tunnel = Tunnel::open(&outsider).unwrap();
    let own = scene.server.v4();
    let web = hostname("web");
    for (authority, status, error) in [
        (format!("{own}:15008"), 503, "attempted recursive call to ourselves".to_owned()),
        ("10.9.9.9:80".to_owned(), 400, format!("ip mismatch: {own} != 10.9.9.9")),
        (
            format!("{web}:81"),
            503,
            format!("requested service {web}:81 found, but cannot resolve port"),
        ),
        (
            "nobody.example:80".to_owned(),
            503,
            "no service or workload for hostname: nobody.example".to_owned(),
        ),
    ] {
        let reply = tunnel.connect(&authority, &[]).unwrap();
        assert_eq!(reply.status, status, "{authority}");
        early(&scene.b, "inbound", ("dst.addr", scene.tunnel().to_string()), error);
    }
    let get = Request::builder().method(Method::GET).uri("https://x/").body(()).unwrap();
    let reply = tunnel.request(get).unwrap();
    assert_eq!(reply.status, 400, "a method that is not CONNECT");
    let method = "expected method CONNECT, got GET".to_owned();
    early(&scene.b, "inbound", ("dst.addr", scene.tunnel().to_string()), method);
    // No TLS at all.
    let outside = outsider.from.run(|| {
        use std::io::{Read, Write};
        let mut stream = std::net::TcpStream::connect(scene.tunnel())?;
        stream.write_all(b"GET / HTTP/1.1\r\n\r\n")?;
        let _cut = stream.read(&mut [0; 16]);
        Ok(())
    });
    outside.unwrap();
    let tls = "tls handshake error: ".to_owned();
    early(&scene.b, "inbound", ("dst.addr", scene.tunnel().to_string()), tls);
}
