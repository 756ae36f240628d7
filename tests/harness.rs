//! The harness itself: what the other suites and the lab stand on.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::{
    fs,
    io::{BufRead, BufReader},
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use mesh_tests::{
    Lab, Node, Pod,
    ca::Authority,
    capture::Capture,
    envoy::{self, Route},
    fault_proxy::{Ending, Fault, FaultProxy},
    hbone::{Dial, Listener, Tunnel, refused},
    instance,
    mesh::identity,
    netns::{self, Namespace},
    program::Start,
    rules,
    wait::{self, SOON},
};

struct World {
    a: Node,
    client: Pod,
    server: Pod,
    lab: Lab,
}

fn world() -> World {
    let lab = Lab::new().unwrap();
    let (a, b) = (lab.node("a").unwrap(), lab.node("b").unwrap());
    let (client, server) = (a.pod("client").unwrap(), b.pod("server").unwrap());
    lab.settle(&[&client, &server]).unwrap();
    World { a, client, server, lab }
}

#[test]
fn pods_reach_each_other_with_their_own_addresses() {
    let world = world();
    let _programs = world.server.serve(8080, 9000).unwrap();
    for (server, client) in
        [(world.server.v4(), world.client.v4()), (world.server.v6(), world.client.v6())]
    {
        let url = format!("http://{}/x", SocketAddr::new(server, 8080));
        let said = world.client.fetch(&url).unwrap().ok().unwrap();
        let said: serde_json::Value = serde_json::from_str(&said).unwrap();
        assert_eq!(said["client"], client.to_string());
        assert_eq!(said["name"], "server");
        let tcp = SocketAddr::new(server, 9000);
        for what in [
            &["who"][..],
            &["echo", "hello"],
            &["sum", "1000003"],
            &["send", "1000003"],
            &["cut"],
            &["tick", "3", "1"],
        ] {
            world.client.tcp(tcp, what).unwrap().ok().unwrap();
        }
        let reset = world.client.tcp(tcp, &["reset", "1000"]).unwrap().ok().unwrap();
        assert!(reset.contains(r#""end":"reset""#), "{reset}");
    }
    let from_node = world.a.run(["true"]).unwrap();
    assert!(from_node.is_ok());
}

#[test]
fn our_own_client_can_stand_in_for_curl() {
    let world = world();
    let _programs = world.server.serve(8080, 9000).unwrap();
    let url = format!("http://{}/bytes/3", SocketAddr::new(world.server.v6(), 8080));
    let got = world.client.spawn(["http-get", &url]).unwrap().finish(SOON).unwrap();
    assert_eq!(got.ok().unwrap(), "xxx\n");
    let other = url.replace("/3", "/5");
    assert_eq!(world.client.fetch_all(&[&url, &other]).unwrap().ok().unwrap(), "xxx\nxxxxx\n");
    let from = world.client.v6().to_string();
    let got = world.client.spawn(["http-get-from", &from, &url.replace("/bytes/3", "/")]).unwrap();
    let got = got.finish(SOON).unwrap().ok().unwrap();
    assert!(got.contains(&format!(r#""client":"{from}""#)), "{got}");
    // Nobody has that address here.
    let got = world.client.spawn(["http-get-from", "fd00::1", &url]).unwrap();
    assert!(!got.finish(SOON).unwrap().is_ok());
}

#[test]
fn plain_traffic_is_noticed_on_the_wire() {
    let world = world();
    let _programs = world.server.serve(8080, 9000).unwrap();
    let capture = Capture::start(world.lab.wire(), &["marker-of-mine"]).unwrap();
    let to = SocketAddr::new(world.server.v4(), 9000);
    world.client.tcp(to, &["echo", "marker-of-mine"]).unwrap().ok().unwrap();
    let seen = capture.stop().unwrap();
    assert_eq!(seen.marker.as_deref(), Some("marker-of-mine"));
    assert!(seen.objection().is_some());
    assert!(seen.attempts.contains(&to), "{:?}", seen.attempts);
    assert!(seen.payload[&to] > 30, "{:?}", seen.payload);
    // And silence is silence.
    let seen = Capture::start(world.lab.wire(), &["marker-of-mine"]).unwrap().stop().unwrap();
    assert_eq!(seen.objection(), None);
}

#[test]
fn a_fault_proxy_does_what_it_is_told() {
    let world = world();
    let door = SocketAddr::from(([10, 77, 0, 254], 9000));
    let server = SocketAddr::new(world.a.address().0, 9000);
    let on = |node: &Node, words: &[&str]| {
        Start::ours(node.namespace(), world.lab.folder(), words).spawn().unwrap()
    };
    let mut program = on(&world.a, &["tcp-server", &server.to_string()]);
    program.says("listening", SOON).unwrap();
    let other = &world.lab.nodes()[1];
    let address = door.to_string();
    let begin = |what: &[&str]| on(other, &[&["tcp", &address], what].concat());
    let proxy = FaultProxy::start(world.lab.wire(), door, server).unwrap();
    let tcp = |what: &[&str]| begin(what).finish(SOON).unwrap();
    assert!(tcp(&["sum", "1000003"]).is_ok() && tcp(&["send", "1000003"]).is_ok());
    let mut open = begin(&["hold"]);
    open.says("open", SOON).unwrap();
    for (fault, what, says) in [
        (Fault::Refuse, &["echo", "x"][..], "connect: refused"),
        (Fault::Garbage, &["echo", "x"], "got \"ZZZZ"),
        (Fault::Corrupt, &["send", "1000"], "got 1000 bytes"),
        (Fault::Cut(700, Ending::Close), &["send", "1000"], "got 700 bytes"),
        (Fault::Cut(700, Ending::Reset), &["send", "1000"], "reset by peer"),
    ] {
        proxy.set(fault);
        let tried = || Ok(Some(tcp(what)).filter(|tried| tried.err.contains(says)));
        let tried = wait::until(&format!("{fault:?}"), SOON, tried).unwrap();
        assert!(!tried.is_ok(), "{fault:?}: {tried:?}");
    }
    // Nothing comes while it is a hole, and all of it afterwards, late.
    proxy.set(Fault::Hole);
    let mut late = begin(&["echo", "late"]);
    assert!(late.says("late", Duration::from_millis(300)).is_err());
    proxy.set(Fault::Trickle(5));
    let said = late.says("late", SOON).unwrap();
    let said: serde_json::Value = serde_json::from_str(&said).unwrap();
    assert!(said["ms"].as_u64().unwrap() >= 300, "{said}");
    // What was open all the while is still, until it is cut.
    assert!(open.is_running(), "{}", open.output());
    proxy.cut();
    open.says("closed: reset", SOON).unwrap();
}

#[test]
fn packet_filters_are_noticed() {
    let world = world();
    let namespace = world.client.namespace();
    assert_eq!(rules::packet_filters(namespace).unwrap(), Vec::<String>::new());
    let rule = ["iptables", "-t", "nat", "-A", "OUTPUT", "-p", "tcp", "-j", "ACCEPT"];
    world.client.run(rule).unwrap().ok().unwrap();
    let found = rules::packet_filters(namespace).unwrap();
    assert!(found.iter().any(|table| table.contains("nat")), "{found:?}");
}

#[test]
fn nothing_is_left() {
    let world = world();
    let mut server = world.server.spawn(["tcp-server", "[::]:9000"]).unwrap();
    server.says("listening", SOON).unwrap();
    let (id, pid, name) =
        (world.lab.id().to_owned(), server.id(), world.client.namespace().name().to_owned());
    assert!(instance::running().contains(&id));
    // As if the program had been left by a crash: nobody waits for it.
    let World { a, client, server: pod, lab } = world;
    drop((a, client, pod));
    drop(lab);
    wait::until("the program's end", SOON, || Ok((!server.is_running()).then_some(()))).unwrap();
    assert!(Namespace::open(&name).is_err());
    let gone = || Ok((!instance::running().contains(&id)).then_some(()));
    wait::until("the end of the instance", SOON, gone).unwrap();
    assert!(instance::folder(&id).is_err(), "{pid}");
}

#[test]
fn what_a_crash_left_is_swept() {
    let world = world();
    let id = world.lab.id().to_owned();
    let name = world.client.namespace().name().to_owned();
    // A second owner of the same names, killed: its folder is there and nobody holds the lock.
    let stale = "dead";
    let left = Path::new("/run/ambient-lab").join(stale);
    fs::create_dir_all(&left).unwrap();
    Namespace::create("lab-dead-pod").unwrap();
    let next = Lab::new().unwrap();
    assert!(Namespace::open("lab-dead-pod").is_err());
    assert!(!left.exists());
    // And the living was spared.
    assert!(Namespace::open(&name).is_ok());
    assert!(instance::running().contains(&id));
    drop(next);
}

/// Where the processes' environments name this folder.
fn processes_of(folder: &Path) -> Vec<PathBuf> {
    let name = folder.to_str().unwrap();
    let entries = fs::read_dir("/proc").unwrap().flatten().map(|entry| entry.path());
    let names_it = |path: &PathBuf| {
        let told = fs::read(path.join("environ")).unwrap_or_default();
        String::from_utf8_lossy(&told).contains(&format!("{name}/"))
    };
    entries.filter(names_it).collect()
}

#[test]
fn a_lab_that_is_killed_is_swept_at_the_next_start() {
    let id = format!("crash{}", std::process::id() % 10_000_000);
    let mut lab = Command::new(env!("CARGO_BIN_EXE_lab"));
    lab.args(["--json", "--name", &id]).stdout(Stdio::piped());
    let mut lab = lab.spawn().unwrap();
    let mut first = String::new();
    BufReader::new(lab.stdout.take().unwrap()).read_line(&mut first).unwrap();
    assert!(first.contains("\"nodes\",\"ok\":true"), "{first}");
    let folder = instance::folder(&id).unwrap();
    assert!(!processes_of(&folder).is_empty(), "node proxies run");
    lab.kill().unwrap();
    lab.wait().unwrap();
    let next = Lab::new().unwrap();
    assert_eq!(netns::names(&format!("lab-{id}-")), Vec::<String>::new());
    assert!(!folder.exists());
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains(folder.to_str().unwrap()), "{mounts}");
    assert_eq!(processes_of(&folder), Vec::<PathBuf>::new());
    drop(next);
}

/// Runs `cargo lab`'s program behind this wrapper, and returns what it says where it cannot begin.
fn cannot_begin(wrapper: &str, lab: &str) -> String {
    let script = format!("{wrapper} {lab} < /dev/null");
    let done = Command::new("bash").args(["-c", &script]).output().unwrap();
    let said = String::from_utf8(done.stderr).unwrap();
    assert_eq!((done.status.code(), done.stdout.len()), (Some(1), 0), "{wrapper} {lab}: {said}");
    said
}

#[test]
fn why_the_lab_cannot_begin_is_said_in_a_sentence() {
    let lab = env!("CARGO_BIN_EXE_lab");
    let without = |what: &str| format!("setpriv --bounding-set=-{what} --inh-caps=-{what}");
    for (wrapper, says) in [
        (without("net_admin"), "this root has no CAP_NET_ADMIN"),
        (without("net_raw"), "this root has no CAP_NET_RAW"),
        (without("sys_admin"), "this root has no CAP_SYS_ADMIN"),
        ("setarch --uname-2.6".to_owned(), "use 5.15 or newer"),
    ] {
        let said = cannot_begin(&wrapper, lab);
        assert!(said.starts_with("lab: ") && said.contains(says), "{wrapper}: {said}");
        assert_eq!(said.lines().count(), 1, "{wrapper}: {said}");
    }
    let busy = Lab::new().unwrap();
    let said = cannot_begin("", &format!("{lab} --name {}", busy.id()));
    assert!(said.contains(&format!("a lab named {} is running: stop it", busy.id())), "{said}");
    // Nobody may not look into our folders.
    let copy = std::env::temp_dir().join(format!("lab-of-nobody-{}", busy.id()));
    fs::copy(lab, &copy).unwrap();
    let nobody = "setpriv --reuid=65534 --regid=65534 --clear-groups";
    let said = cannot_begin(nobody, copy.to_str().unwrap());
    fs::remove_file(&copy).unwrap();
    assert!(said.contains("makes network namespaces") && said.contains("as root"), "{said}");
}

#[test]
fn a_program_that_ends_is_told_from_one_that_is_slow() {
    let world = world();
    let mut program = world.client.program(["false"]).spawn().unwrap();
    let why = program.says("anything", Duration::from_secs(5)).unwrap_err();
    assert!(why.to_string().contains("ended"), "{why:#}");
    let failed = world.client.run(["no-such-program"]).unwrap();
    assert!(failed.err.contains("cannot run no-such-program"), "{}", failed.err);
}

#[test]
fn tunnels_are_spoken() {
    let world = world();
    let authority = Authority::stranger().unwrap();
    let [client, server] =
        ["client", "server"].map(|a| authority.issue(Some(&identity(a))).unwrap());
    let listener = Listener::start(world.server.namespace(), &server, 200).unwrap();
    let to = SocketAddr::new(world.server.v6(), 15008);
    let dial = Dial::new(world.client.namespace(), to, &client);
    let mut tunnel = Tunnel::open(&dial).unwrap();
    assert!(tunnel.server_is(&identity("server")));
    let reply = tunnel.connect("10.0.0.1:80", &[("baggage", "a=b")]).unwrap();
    assert_eq!((reply.status, reply.ended), (200, false));
    assert_eq!(tunnel.exchange(reply, b"hello").unwrap(), b"hello");
    let seen = listener.seen();
    assert_eq!((seen[0].method.as_str(), seen[0].authority.as_str()), ("CONNECT", "10.0.0.1:80"));
    assert_eq!(seen[0].headers["baggage"], "a=b");
    assert_eq!(seen[0].client.ip(), world.client.v6());
    let nobody = Authority::stranger().unwrap().issue(Some(&identity("client"))).unwrap();
    for wrong in [
        Dial { certificate: None, ..dial.clone() },
        Dial { certificate: Some(&nobody), ..dial.clone() },
        Dial { old: true, ..dial.clone() },
    ] {
        refused(&wrong).unwrap();
    }
}

#[test]
fn envoy_passes_tunnels_on() {
    let world = world();
    let authority = Authority::stranger().unwrap();
    let issue = |account| authority.issue(Some(&identity(account))).unwrap();
    let listener = Listener::start(world.server.namespace(), &issue("server"), 200).unwrap();
    let waypoint = world.a.pod("waypoint").unwrap();
    world.lab.settle(&[&waypoint]).unwrap();
    let route = Route {
        authority: "10.96.0.12:80".parse().unwrap(),
        to: SocketAddr::new(world.server.v6(), 8080),
        identity: identity("server"),
    };
    let folder = world.lab.folder();
    let _envoy =
        envoy::waypoint(&waypoint, folder, &issue("waypoint"), std::slice::from_ref(&route))
            .unwrap();
    let client = issue("client");
    let to = SocketAddr::new(waypoint.v4(), 15008);
    let mut tunnel = Tunnel::open(&Dial::new(world.client.namespace(), to, &client)).unwrap();
    let reply = tunnel.connect("10.96.0.12:80", &[]).unwrap();
    assert_eq!(reply.status, 200);
    // The listener sends the request back: no answer, but it says what arrived.
    let request = b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
    let _nonsense = tunnel.exchange(reply, request);
    let arrived = || {
        let seen = listener.seen();
        Ok((!seen.is_empty()).then_some(seen))
    };
    let seen = wait::until("the request at the far end", SOON, arrived).unwrap();
    assert_eq!(seen[0].authority, route.to.to_string());
    assert_eq!(seen[0].client.ip(), waypoint.v6());
}
