//! How it ends.

use mesh_tests::{
    hbone::{Dial, Tunnel},
    scene::{TCP, web},
    wait::{self, SOON},
};
use nix::sys::signal::Signal;
use std::time::Duration;

use crate::start;

#[test]
fn a_node_proxy_that_is_told_to_stop_lets_streams_finish() {
    let scene = start(&[("TERMINATION_GRACE_PERIOD_SECONDS", "20")]).unwrap();
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

/// What a peer of a tunnel sees: no more streams, and those that live go on to their end.
#[test]
fn a_tunnel_is_told_to_take_no_more_and_lets_its_streams_finish() {
    let scene = start(&[("TERMINATION_GRACE_PERIOD_SECONDS", "25")]).unwrap();
    let client = scene.certificate("client").unwrap();
    let dial = Dial::new(scene.outsider.namespace(), scene.tunnel(), &client);
    let mut tunnel = Tunnel::open(&dial).unwrap();
    let authority = format!("{}:{TCP}", scene.server.v4());
    let mut live = tunnel.connect(&authority, &[]).unwrap();
    tunnel.send(&mut live, b"echo\none").unwrap();
    assert_eq!(tunnel.receive(&mut live).unwrap(), "one");
    scene.b.with_proxy(|proxy| proxy.program().signal(Signal::SIGTERM)).unwrap();
    wait::until("no more streams", SOON, || {
        Ok(tunnel.connect(&authority, &[]).is_err().then_some(()))
    })
    .unwrap();
    tunnel.send(&mut live, b"two").unwrap();
    assert_eq!(tunnel.receive(&mut live).unwrap(), "two");
    assert_eq!(tunnel.exchange(live, b"three").unwrap(), b"three");
    // It ends with the last stream, long before the deadline.
    let code = scene.b.with_proxy(|proxy| proxy.program().wait(Duration::from_secs(10))).unwrap();
    assert_eq!(code, 0);
}

#[test]
fn at_the_deadline_what_is_left_is_cut() {
    // A second less than this.
    let scene = start(&[("TERMINATION_GRACE_PERIOD_SECONDS", "3")]).unwrap();
    scene.ask_until(&scene.client, web(80)[0]).unwrap();
    let to = web(TCP)[0].to_string();
    let mut held = scene.client.spawn(["tcp", &to, "hold"]).unwrap();
    held.says("open", SOON).unwrap();
    let code = scene.b.with_proxy(|proxy| proxy.terminate(Duration::from_secs(10))).unwrap();
    assert_eq!(code, 0);
    // A cut, and not an end.
    let said = held.says("closed", SOON).unwrap();
    assert_eq!(said, "closed: reset");
    scene
        .b
        .with_proxy(|proxy| {
            let log = proxy.log().tail(20);
            assert!(log.contains("graceful=false"), "{log}");
            Ok(())
        })
        .unwrap();
}

/// The client's side goes first: its streams may finish, and nothing new comes.
#[test]
fn the_clients_side_lets_streams_finish_too() {
    let scene = start(&[("TERMINATION_GRACE_PERIOD_SECONDS", "25")]).unwrap();
    scene.ask_until(&scene.client, web(80)[0]).unwrap();
    let to = web(TCP)[0].to_string();
    let mut ticking = scene.client.spawn(["tcp", &to, "tick", "40", "50"]).unwrap();
    ticking.says("open", SOON).unwrap();
    let code = scene.a.with_proxy(|proxy| proxy.terminate(SOON)).unwrap();
    assert_eq!(code, 0);
    ticking.finish(SOON).unwrap().ok().unwrap();
}

/// The first is a request to stop, as SIGTERM is; whoever cannot wait says so.
#[test]
fn a_second_interrupt_ends_it_at_once() {
    let scene = start(&[("TERMINATION_GRACE_PERIOD_SECONDS", "60")]).unwrap();
    scene.ask_until(&scene.client, web(80)[0]).unwrap();
    let to = web(TCP)[0].to_string();
    let mut held = scene.client.spawn(["tcp", &to, "hold"]).unwrap();
    held.says("open", SOON).unwrap();
    scene
        .b
        .with_proxy(|proxy| {
            proxy.program().signal(Signal::SIGINT)?;
            let stopping = || Ok(proxy.log().tail(20).contains("stopping").then_some(()));
            wait::until("the stop to begin", SOON, stopping)?;
            assert!(proxy.program().is_running(), "it waits for what is open");
            proxy.program().signal(Signal::SIGINT)?;
            assert_eq!(proxy.program().wait(SOON)?, 0);
            Ok(())
        })
        .unwrap();
}
