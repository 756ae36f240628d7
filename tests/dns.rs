//! DNS of an enrolled pod at its door: raw queries and a real program's resolver, in a real namespace.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

#[path = "dns/ask.rs"]
mod ask;
#[path = "dns/server.rs"]
mod server;

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use ask::{ALL, By, addresses, query};
use hickory_proto::{
    op::{Edns, ResponseCode},
    rr::RecordType,
};
use mesh_tests::{
    Scene,
    istio_cni::{Backend, Rules},
    mesh::hostname,
    scene::{TCP, vip},
    wait::{self, SOON},
};
use serde_json::json;
use server::{Asked, BIG, FAR, Server};

/// Where nobody is: names of the mesh need no other server.
fn nobody() -> [SocketAddr; 2] {
    ["10.96.0.10:53".parse().unwrap(), "[fd96::a]:53".parse().unwrap()]
}

/// A headless service of the server, and one of many.
fn widen(scene: &mut Scene) {
    scene.mesh.service("db", &[], &[(TCP, TCP)], &[&scene.server]);
    scene.mesh.service("many", &[], &[(TCP, TCP)], &[]);
    let member = json!({ format!("lab/{}", hostname("many")): { TCP.to_string(): TCP } });
    for n in 0..MANY {
        let entry = scene.mesh.workload(&scene.outsider, "many");
        entry.set("workloadIps", json!([format!("10.99.0.{n}")])).set("services", member.clone());
        entry.set("uid", json!(format!("many-{n}"))).set("name", json!(format!("many-{n}")));
    }
    scene.apply().unwrap();
}

/// Endpoints: more than a datagram holds.
const MANY: u8 = 60;

fn scene(settings: &[(&str, &str)]) -> Scene {
    let mut scene = Scene::bare().unwrap();
    widen(&mut scene);
    scene.begin(settings).unwrap();
    scene
}

/// Names of the mesh, by every way, whoever captures.
fn names_of_the_mesh(scene: &Scene) {
    let (vip4, vip6) = vip();
    let (server4, server6) = (scene.server.v4(), scene.server.v6());
    let [web, db] = ["web", "db"].map(|name| hostname(name) + ".");
    let pod = format!("server.{db}");
    let (a, aaaa) = (RecordType::A, RecordType::AAAA);
    for (server, by) in nobody().into_iter().flat_map(|server| ALL.map(|by| (server, by))) {
        for (name, kind, expected) in [
            (web.as_str(), a, vip4),
            (&web, aaaa, vip6),
            ("web.", a, vip4),
            ("web.lab.", aaaa, vip6),
            (&db, a, server4),
            (&db, aaaa, server6),
            (&pod, a, server4),
        ] {
            let reply = by.ask(&scene.client, server, &query(name, kind)).unwrap();
            assert_eq!(addresses(&reply), [expected], "{name} {kind} {by:?} {server}");
            assert!(reply.metadata.authoritative && reply.metadata.recursion_available);
            assert_eq!(reply.metadata.id, 4711);
        }
    }
}

#[test]
fn names_of_the_mesh_come_from_the_server_that_was_asked() {
    let scene = scene(&[]);
    names_of_the_mesh(&scene);
    // As a resolver asks that appends its search list.
    let alias = query("web.lab.lab.svc.cluster.local.", RecordType::A);
    let [server, _] = nobody();
    let reply = By::Udp.ask(&scene.client, server, &alias).unwrap();
    let shown: Vec<String> = reply.answers.iter().map(ToString::to_string).collect();
    assert_eq!(
        shown,
        ["web.lab.lab.svc.cluster.local. 30 IN CNAME web.lab.", "web.lab. 30 IN A 10.96.0.20"]
    );
}

#[test]
fn a_long_answer_is_cut_on_udp_and_whole_on_tcp() {
    let scene = scene(&[]);
    let [server, _] = nobody();
    let mut many = query(&(hostname("many") + "."), RecordType::A);
    let cut = By::Udp.ask(&scene.client, server, &many).unwrap();
    assert!(cut.metadata.truncation && cut.to_vec().unwrap().len() <= 512);
    let whole = By::Tcp.ask(&scene.client, server, &many).unwrap();
    assert!(!whole.metadata.truncation);
    assert_eq!(addresses(&whole).len(), usize::from(MANY));
    let mut edns = Edns::new();
    edns.set_max_payload(4000);
    many.edns = Some(edns);
    let room = By::Udp.ask(&scene.client, server, &many).unwrap();
    assert!(!room.metadata.truncation, "the client takes it");
    assert_eq!(addresses(&room).len(), usize::from(MANY));
}

#[test]
fn other_names_are_asked_of_the_server_that_was_asked() {
    let scene = scene(&[("RUST_LOG", "info,dns=debug")]);
    let upstream = Server::start(&scene.outsider).unwrap();
    for (ip, from) in
        [(scene.outsider.v4(), scene.client.v4()), (scene.outsider.v6(), scene.client.v6())]
    {
        let server = SocketAddr::new(ip, 53);
        for by in ALL {
            let reply = by.ask(&scene.client, server, &query("far.example.com.", RecordType::A));
            let reply = reply.unwrap();
            assert_eq!(addresses(&reply), [IpAddr::from(FAR)], "{by:?} {server}");
            assert!(!reply.metadata.authoritative && reply.metadata.recursion_available);
            let by = if matches!(by, By::Tcp) { "tcp" } else { "udp" };
            let what = "far.example.com. A".to_owned();
            assert_eq!(upstream.asked(), [Asked { by, from, what }], "once, from the pod");
        }
    }
    let server = SocketAddr::new(scene.outsider.v4(), 53);
    let big = query("big.example.com.", RecordType::TXT);
    let cut = By::Udp.ask(&scene.client, server, &big).unwrap();
    assert!(cut.metadata.truncation && cut.answers.is_empty());
    let whole = By::Tcp.ask(&scene.client, server, &big).unwrap();
    assert!(whole.to_vec().unwrap().len() > BIG);
    let srv = query("_http._tcp.web.lab.svc.cluster.local.", RecordType::SRV);
    assert_eq!(By::Udp.ask(&scene.client, server, &srv).unwrap().answers.len(), 1);
    let missing = query("missing.example.com.", RecordType::A);
    let reply = By::Udp.ask(&scene.client, server, &missing).unwrap();
    assert_eq!(reply.metadata.response_code, ResponseCode::NXDomain);
    assert_eq!(reply.authorities.len(), 1, "how long it may be remembered");
    let own = query(&(hostname("web") + "."), RecordType::TXT);
    let reply = By::Udp.ask(&scene.client, server, &own).unwrap();
    assert_eq!(reply.metadata.response_code, ResponseCode::NoError, "it has addresses");
    counted(&scene);
    logged(&scene);
}

/// In Istio's words.
fn logged(scene: &Scene) {
    let log = scene.a.with_proxy(|proxy| Ok(proxy.log())).unwrap();
    for name in ["far", "missing"] {
        let start = "\tdebug\tdns\t\tsrc.workload=\"client\" src.namespace=\"lab\" query=\"a\"";
        let end = format!("domain=\"{name}.example.com\" result=\"forwarded\" endpoints=");
        wait::retry("the line of the query", SOON, || {
            let lines = log.since(0);
            let found = lines.iter().any(|line| line.contains(start) && line.contains(&end));
            anyhow::ensure!(found, "{name}: {lines:?}");
            Ok(())
        })
        .unwrap();
    }
}

/// What the six, the two, and the three brought and did not.
fn counted(scene: &Scene) {
    let metrics = scene.a.with_proxy(|proxy| proxy.metrics()).unwrap();
    let labels = |kind, by| {
        [
            ("request_query_type", kind),
            ("request_protocol", by),
            ("source_canonical_service", "client"),
            ("source_canonical_revision", "latest"),
        ]
    };
    for (family, kind, by, expected) in [
        ("istio_dns_requests_total", "a", "udp", 5.0),
        ("istio_dns_requests_total", "a", "tcp", 2.0),
        ("istio_dns_upstream_requests_total", "a", "udp", 5.0),
        ("istio_dns_upstream_requests_total", "srv", "udp", 1.0),
        ("istio_dns_upstream_failures_total", "a", "udp", 1.0),
        ("istio_dns_upstream_failures_total", "a", "tcp", 0.0),
        ("istio_dns_upstream_request_duration_seconds_count", "txt", "tcp", 1.0),
    ] {
        let sum = metrics.sum(family, &labels(kind, by));
        assert!((sum - expected).abs() < 1e-9, "{family} {kind} {by}: {sum}");
    }
}

#[test]
fn a_server_that_is_not_there_is_a_failure_at_once() {
    let scene = scene(&[]);
    let far = query("far.example.com.", RecordType::A);
    for ip in [scene.outsider.v4(), scene.outsider.v6()] {
        for by in ALL {
            let reply = by.ask(&scene.client, SocketAddr::new(ip, 53), &far).unwrap();
            assert_eq!(reply.metadata.response_code, ResponseCode::ServFail, "{by:?} {ip}");
        }
    }
}

#[test]
fn an_application_may_serve_dns_itself() {
    let scene = scene(&[]);
    let own = Server::start(&scene.client).unwrap();
    let web = query(&(hostname("web") + "."), RecordType::A);
    for ip in [scene.client.v4(), scene.client.v6()] {
        for (by, pod) in ALL.into_iter().flat_map(|by| [(by, &scene.client), (by, &scene.outsider)])
        {
            let reply = by.ask(pod, SocketAddr::new(ip, 53), &web).unwrap();
            assert_eq!(reply.metadata.response_code, ResponseCode::NXDomain, "the application's");
            assert_eq!(own.asked().len(), 1, "{by:?} {ip} {}", pod.name());
        }
    }
    let [server, _] = nobody();
    let reply = By::Udp.ask(&scene.client, server, &web).unwrap();
    assert_eq!(addresses(&reply), [vip().0], "others' are still captured");
}

#[test]
fn a_program_s_resolver_finds_its_way() {
    let scene = scene(&[]);
    let upstream = Server::start(&scene.outsider).unwrap();
    let folder = scene.lab.folder();
    let list = "search lab.svc.cluster.local svc.cluster.local cluster.local\noptions ndots:5\n";
    std::fs::write(
        folder.join("resolv.conf"),
        format!("nameserver {}\n{list}", scene.outsider.v4()),
    )
    .unwrap();
    let look_up = |database: &str, name: &str| {
        let script = format!(
            "mount --bind {}/resolv.conf /etc/resolv.conf && getent {database} {name}",
            folder.display()
        );
        let found = scene.client.run(["unshare", "--mount", "sh", "-c", &script]).unwrap();
        let found = found.ok().unwrap_or_default();
        let ips = found.lines().filter_map(|line| line.split_whitespace().next()?.parse().ok());
        ips.collect::<BTreeSet<IpAddr>>()
    };
    let (vip4, vip6) = vip();
    assert_eq!(look_up("ahostsv4", "web"), [vip4].into());
    assert_eq!(look_up("ahostsv6", "web.lab"), [vip6].into());
    assert_eq!(upstream.asked(), [], "nobody else had to be asked");
    assert_eq!(look_up("ahostsv4", "many").len(), usize::from(MANY), "cut, then by TCP");
    assert_eq!(look_up("ahostsv4", "far.example.com"), [FAR.into()].into());
    assert_eq!(look_up("ahostsv4", "missing.example.com"), BTreeSet::new());
}

#[test]
fn dns_is_captured_while_it_is_wanted_and_closed_without_a_proxy() {
    let scene = scene(&[("ISTIO_META_DNS_CAPTURE", "false")]);
    let upstream = Server::start(&scene.outsider).unwrap();
    let server = SocketAddr::new(scene.outsider.v4(), 53);
    let web = query(&(hostname("web") + "."), RecordType::A);
    let direct = |what: &str| {
        for by in [By::Udp, By::ConnectedUdp] {
            let reply = by.ask(&scene.client, server, &web).unwrap();
            assert_eq!(reply.metadata.response_code, ResponseCode::NXDomain, "{what}");
            assert_eq!(upstream.asked().len(), 1, "{what}");
        }
    };
    direct("not wanted");

    // The next process takes over what the first has pinned.
    scene.a.kill_proxy();
    scene.a.start_proxy(&[]).unwrap();
    wait::retry("an answer of ours", SOON, || {
        let reply = By::Udp.ask(&scene.client, server, &web)?;
        anyhow::ensure!(addresses(&reply) == [vip().0], "{reply}");
        Ok(())
    })
    .unwrap();
    upstream.asked();
    By::Tcp.ask(&scene.client, server, &web).unwrap();

    scene.a.kill_proxy();
    for by in [By::Udp, By::Tcp] {
        by.ask_for(&scene.client, server, &web, Duration::from_millis(300)).unwrap_err();
    }
    assert_eq!(upstream.asked(), [], "closed");

    scene.a.start_proxy(&[]).unwrap();
    By::Udp.ask(&scene.client, server, &web).unwrap();
    scene.a.release(&scene.client).unwrap();
    direct("released");
}

#[test]
fn names_are_answered_under_istio_cni_s_rules() {
    for backend in [Backend::Iptables, Backend::Nftables] {
        let mut scene = Scene::bare().unwrap();
        widen(&mut scene);
        let rules = Rules { dns: true, ..Rules::new(backend) };
        for pod in [&scene.client, &scene.server] {
            rules.write(pod).unwrap();
        }
        scene.begin(&[("CAPTURE", "external")]).unwrap();
        names_of_the_mesh(&scene);
        let upstream = Server::start(&scene.outsider).unwrap();
        for (ip, from) in
            [(scene.outsider.v4(), scene.client.v4()), (scene.outsider.v6(), scene.client.v6())]
        {
            let server = SocketAddr::new(ip, 53);
            for by in ALL {
                let far = query("far.example.com.", RecordType::A);
                let reply = by.ask(&scene.client, server, &far).unwrap();
                assert_eq!(addresses(&reply), [IpAddr::from(FAR)], "{backend:?} {by:?} {server}");
                let asked = upstream.asked();
                assert!(asked.iter().all(|asked| asked.from == from), "{asked:?}");
                assert_eq!(asked.len(), 1, "{asked:?}");
            }
        }
    }
}
