//! What passes: to its end, and as it ended.

use mesh_tests::{
    Node, Program, Scene,
    scene::{TCP, web},
    wait::{self, SOON},
};
use nix::sys::signal::Signal;
use serde_json::json;
use std::{fs, net::SocketAddr};

use crate::start;

/// By tunnel, by the server's plain port, and past both: the client and where it goes.
fn ways(scene: &Scene) -> [(&mesh_tests::Pod, SocketAddr); 5] {
    let [v4, v6] = web(TCP);
    let [_, plain] = scene.server_at(TCP);
    let out = SocketAddr::new(scene.outsider.v4(), TCP);
    [
        (&scene.client, v4),
        (&scene.client, v6),
        (&scene.client, scene.server_at(TCP)[0]),
        (&scene.outsider, plain),
        (&scene.client, out),
    ]
}

#[test]
fn all_that_is_sent_comes_and_either_side_may_end_first() {
    let scene = start(&[]).unwrap();
    scene.ask_until(&scene.client, web(80)[0]).unwrap();
    for (from, to) in ways(&scene) {
        // The client ends its side and then reads; the server ends its side while the client could write.
        from.tcp(to, &["sum", "30000000"]).unwrap().ok().unwrap();
        from.tcp(to, &["send", "30000000"]).unwrap().ok().unwrap();
    }
}

#[test]
fn a_reset_arrives_as_a_reset() {
    let scene = start(&[]).unwrap();
    scene.ask_until(&scene.client, web(80)[0]).unwrap();
    for (from, to) in ways(&scene) {
        let said = from.tcp(to, &["reset", "100000"]).unwrap().ok().unwrap();
        assert!(said.contains(r#""end":"reset""#), "{} to {to}: {said}", from.name());
    }
    // The outsider's own server is not asked what it saw.
    for (from, to) in ways(&scene).into_iter().take(4) {
        let ends = || -> Vec<String> {
            let output = scene.tcp.output();
            let lines = output.lines().filter(|line| line.starts_with("echo from"));
            lines.map(str::to_owned).collect()
        };
        let before = ends().len();
        from.tcp(to, &["cut"]).unwrap().ok().unwrap();
        let seen = || Ok(ends().get(before).cloned());
        let seen = wait::until("the server to see its end", SOON, seen).unwrap();
        assert!(seen.ends_with(": reset"), "{} to {to}: {seen}", from.name());
    }
}

/// What a node's proxy has open. A thread of it keeps eight pipes at most: those are looked at, and left out.
fn descriptors(node: &Node) -> Vec<String> {
    let (pid, all) = node
        .with_proxy(|proxy| Ok((proxy.program().id(), proxy.program().descriptors()?)))
        .unwrap();
    let threads = fs::read_dir(format!("/proc/{pid}/task")).unwrap().count();
    let (pipes, rest): (Vec<_>, Vec<_>) = all.into_iter().partition(|one| one.starts_with("pipe:"));
    assert!(pipes.len() <= threads * 16, "{} pipes and {threads} threads", pipes.len());
    rest
}

/// What a socket is, by the tables of all namespaces: for who reads why a test failed.
fn described(descriptor: &str) -> String {
    let inode = descriptor.trim_start_matches("socket:[").trim_end_matches(']');
    for process in fs::read_dir("/proc").unwrap() {
        for table in ["tcp", "tcp6", "udp", "udp6", "unix", "netlink"] {
            let path = process.as_ref().unwrap().path().join("net").join(table);
            let Ok(rows) = fs::read_to_string(path) else { continue };
            if let Some(row) =
                rows.lines().find(|row| row.split_whitespace().any(|word| word == inode))
            {
                return format!("{descriptor} {table} {row}");
            }
        }
    }
    descriptor.to_owned()
}

/// Programs that are killed in the middle of what they do, that reset, that end one side and go: none of them leaves
/// anything behind, and all that was opened is closed.
#[test]
fn nothing_is_left_of_who_goes_without_a_word() {
    let scene = start(&[]).unwrap();
    for (from, to) in ways(&scene) {
        wait::retry("an echo", SOON, || from.tcp(to, &["echo", "x"])?.ok()).unwrap();
    }
    let before = [&scene.a, &scene.b].map(descriptors);
    for (from, to) in ways(&scene) {
        let to = to.to_string();
        let begin = |what: &[&str], says: &str| {
            let words: Vec<_> = ["tcp", &to].into_iter().chain(what.iter().copied()).collect();
            let mut program = from.spawn(words).unwrap();
            program.says(says, SOON).unwrap();
            program
        };
        for _ in 0..3 {
            for (what, says) in [
                (&["hold"][..], "open"),
                (&["deaf", "100000000"], "deaf"),
                (&["tick", "1000", "5"], "open"),
            ] {
                let mut program = begin(what, says);
                program.signal(Signal::SIGKILL).unwrap();
                program.wait(SOON).unwrap();
            }
        }
        for _ in 0..5 {
            from.tcp(to.parse().unwrap(), &["cut"]).unwrap().ok().unwrap();
            from.tcp(to.parse().unwrap(), &["reset", "1000"]).unwrap().ok().unwrap();
        }
    }
    for (node, before) in [&scene.a, &scene.b].into_iter().zip(before) {
        let sums = || {
            node.with_proxy(|proxy| {
                let metrics = proxy.metrics()?;
                let sum = |name: &str| metrics.sum(name, &[]);
                let opened = sum("istio_tcp_connections_opened_total");
                let closed = sum("istio_tcp_connections_closed_total");
                Ok((opened, closed, sum("istio_tcp_sockets_open")))
            })
        };
        let all_closed = || {
            let (opened, closed, open) = sums()?;
            anyhow::ensure!((opened - closed).abs() < 0.5, "{opened} opened, {closed} closed");
            anyhow::ensure!(open.abs() < 0.5, "{open} sockets are open");
            let now = descriptors(node);
            if now.len() > before.len() {
                let new = now.iter().filter(|one| !before.contains(one));
                let new: Vec<_> = new.map(|one| described(one)).collect();
                anyhow::bail!("{} descriptors and not {}: {new:#?}", now.len(), before.len());
            }
            Ok(())
        };
        wait::retry(node.name(), SOON, all_closed).unwrap();
        let dump = node.with_proxy(|proxy| Ok(proxy.config_dump()?["workloadState"].take()));
        let dump = dump.unwrap();
        for pod in dump.as_object().unwrap().values() {
            assert_eq!(pod["connections"], json!({ "inbound": [], "outbound": [] }), "{dump}");
        }
    }
}

/// MiB that a node's proxy has in memory.
fn memory(node: &Node) -> u64 {
    let pid = node.with_proxy(|proxy| Ok(proxy.program().id())).unwrap();
    let pages = fs::read_to_string(format!("/proc/{pid}/statm")).unwrap();
    pages.split(' ').nth(1).unwrap().parse::<u64>().unwrap() * 4 / 1024
}

/// MiB that eight stalled streams may cost a node proxy: for each the stream's window of 1 MiB, or a send
/// buffer of 256 KiB, and what chunks and the allocator add to them.
const BOUND: u64 = 24;

/// Eight connections whose reader does not read cost a bounded amount, and a ninth does not notice them.
fn stalled(scene: &Scene, stall: impl Fn() -> Program) {
    scene.ask_until(&scene.client, web(80)[0]).unwrap();
    scene.client.tcp(web(TCP)[0], &["sum", "50000000"]).unwrap().ok().unwrap();
    let before = [memory(&scene.a), memory(&scene.b)];
    let _stalled: Vec<_> = (0..8).map(|_| stall()).collect();
    for what in ["sum", "send"] {
        scene.client.tcp(web(TCP)[0], &[what, "50000000"]).unwrap().ok().unwrap();
    }
    for (node, before) in [&scene.a, &scene.b].into_iter().zip(before) {
        let grown = memory(node).saturating_sub(before);
        assert!(grown <= BOUND, "{grown} MiB more on {}", node.name());
    }
}

#[test]
fn a_server_that_does_not_read_slows_nobody_else() {
    let scene = start(&[]).unwrap();
    let to = web(TCP)[0].to_string();
    stalled(&scene, || {
        let mut program = scene.client.spawn(["tcp", &to, "flood"]).unwrap();
        program.says("stalled", SOON).unwrap();
        program
    });
}

#[test]
fn a_client_that_does_not_read_slows_nobody_else() {
    let scene = start(&[]).unwrap();
    let to = web(TCP)[0].to_string();
    stalled(&scene, || {
        let mut program = scene.client.spawn(["tcp", &to, "deaf", "100000000"]).unwrap();
        program.says("deaf", SOON).unwrap();
        program
    });
}
