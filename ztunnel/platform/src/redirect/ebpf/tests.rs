//! Against the kernel, as root: a pod and a peer, in namespaces of their own that a veth joins.

mod lab;
mod pinned;
mod requests;
mod steering;
mod takeover;

use super::{Ebpf, Settings, pins, sys};
use crate::redirect::{CaptureError, External, ExternalSettings, Redirect};
use lab::{
    FAMILIES, Family, Lab, accept, accept_none, dial, dial_in_vain, echo, finish, listen, until,
};
use mesh_core::OriginalDst;
use std::{
    io::{self, Write},
    net::{IpAddr, SocketAddr},
    sync::PoisonError,
};

const UID: &str = "7c1b6f0e-0000-4000-8000-000000000001";

fn plain() -> Ebpf {
    Ebpf::new(Settings::default()).unwrap()
}

fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

#[test]
fn outbound_goes_to_the_proxy_and_on() {
    let lab = Lab::new("out");
    let redirect = plain();
    let pod = redirect.enrol(UID, &lab.pod).unwrap();
    let listeners = pod.take_listeners().unwrap();
    for Family { pod: own, peer, .. } in FAMILIES {
        let server = listen(&lab.peer, SocketAddr::new(peer, 8080));
        for device in [None, Some("eth0")] {
            let app = dial(&lab.pod, device, SocketAddr::new(peer, 8080)).unwrap();
            let (taken, client) = accept(&listeners.outbound);
            assert_eq!(canonical(client), app.local_addr().unwrap(), "{device:?}");
            assert_eq!(client.ip().to_canonical(), own);
            let to = redirect.original_dst(&taken).unwrap();
            assert_eq!(to, OriginalDst::from(SocketAddr::new(peer, 8080)));
            let upstream = finish(redirect.to_network(&pod, to.into()).unwrap()).unwrap();
            let (served, from) = accept(&server);
            assert_eq!(from.ip(), own);
            echo(&app, &taken);
            echo(&taken, &app);
            echo(&upstream, &served);
            echo(&served, &upstream);
        }
        assert!(accept_none(&server), "nothing went past the proxy");
    }
}

#[test]
fn inbound_goes_to_the_proxy_and_on_in_the_clients_name() {
    let lab = Lab::new("in");
    let redirect = plain();
    let pod = redirect.enrol(UID, &lab.pod).unwrap();
    let listeners = pod.take_listeners().unwrap();
    for Family { pod: own, peer, any } in FAMILIES {
        let app = listen(&lab.pod, SocketAddr::new(any, 8080));
        let client = dial(&lab.peer, None, SocketAddr::new(own, 8080)).unwrap();
        let (taken, from) = accept(&listeners.inbound);
        assert_eq!(canonical(from), client.local_addr().unwrap());
        let to = redirect.original_dst(&taken).unwrap();
        assert_eq!(to, OriginalDst::from(SocketAddr::new(own, 8080)));
        assert!(accept_none(&app), "nothing went past the proxy");
        let passed = finish(redirect.to_application(&pod, Some(from), to.into()).unwrap()).unwrap();
        let (served, seen) = accept(&app);
        assert_eq!(seen.ip(), peer, "the application sees the client");
        assert!((10240..=32767).contains(&seen.port()));
        echo(&passed, &served);
        echo(&served, &passed);
        echo(&client, &taken);
        echo(&taken, &client);
        // In the pod's own name, and in nobody's.
        for name in [Some(SocketAddr::new(own, 1)), None] {
            let passed = finish(redirect.to_application(&pod, name, to.into()).unwrap()).unwrap();
            let (served, seen) = accept(&app);
            assert_eq!(seen.ip(), own, "{name:?}");
            echo(&passed, &served);
            echo(&served, &passed);
        }
    }
    assert!(redirect.original_source(&pod));
}

#[test]
fn tunnels_end_in_the_proxy_and_the_pods_own_calls_do_not() {
    let lab = Lab::new("hb");
    let redirect = plain();
    let pod = redirect.enrol(UID, &lab.pod).unwrap();
    let listeners = pod.take_listeners().unwrap();
    for Family { pod: own, any, .. } in FAMILIES {
        for from in [&lab.peer, &lab.pod] {
            let client = dial(from, None, SocketAddr::new(own, 15008)).unwrap();
            let (taken, seen) = accept(&listeners.hbone);
            assert_eq!(canonical(seen), client.local_addr().unwrap());
            assert_eq!(canonical(taken.local_addr().unwrap()), SocketAddr::new(own, 15008));
        }
        let app = listen(&lab.pod, SocketAddr::new(any, 8080));
        let loopback: IpAddr =
            if own.is_ipv4() { [127, 0, 0, 1].into() } else { "::1".parse().unwrap() };
        for ip in [own, loopback] {
            let client = dial(&lab.pod, None, SocketAddr::new(ip, 8080)).unwrap();
            let (served, _) = accept(&app);
            echo(&client, &served);
            echo(&served, &client);
        }
        // The listeners are nowhere but in the program's slots.
        assert!(dial_in_vain(&lab.pod, SocketAddr::new(loopback, 15001)).is_err());
    }
    for listener in [&listeners.outbound, &listeners.inbound] {
        assert!(accept_none(listener));
    }
}

#[test]
fn probes_go_to_the_application_and_only_such_addresses_may_be_probes() {
    let lab = Lab::new("prb");
    let pod = plain().enrol(UID, &lab.pod).unwrap();
    let listeners = pod.take_listeners().unwrap();
    for (Family { pod: own, any, .. }, probe) in FAMILIES.into_iter().zip(super::PROBES) {
        lab.ip("peer", &format!("addr add {probe} dev eth0 nodad"), probe.is_ipv6());
        lab.ip("pod", &format!("route add {probe} dev eth0"), probe.is_ipv6());
        let app = listen(&lab.pod, SocketAddr::new(any, 8080));
        let client = lab::dial_from(&lab.peer, probe, SocketAddr::new(own, 8080)).unwrap();
        let (served, seen) = accept(&app);
        assert_eq!(seen.ip(), probe);
        echo(&client, &served);
        echo(&served, &client);
    }
    assert!(accept_none(&listeners.inbound));
    for probe in ["10.0.0.1", "fe80::1", "2001:db8::1"] {
        let probes = vec![probe.parse().unwrap()];
        let result = Ebpf::new(Settings { probes, ..Settings::default() });
        assert!(matches!(result, Err(CaptureError::InvalidProbe(_))), "{probe}");
    }
}

#[test]
fn closed_without_a_proxy_and_adopted_by_the_next() {
    let lab = Lab::new("pin");
    let settings = Settings { pins: Some(lab.pins()), ..Settings::default() };
    let attached = || {
        sys::attached(&sys::pinned(&lab.pins().join(UID).join("link")).unwrap()).unwrap().unwrap()
    };
    let mut programs = Vec::new();
    for generation in 1..=3 {
        let redirect = Ebpf::new(settings.clone()).unwrap();
        let pod = redirect.enrol(UID, &lab.pod).unwrap();
        programs.push(attached().program);
        let super::Recipe::Ebpf(captured) = &pod.0.recipe else { panic!("another recipe") };
        assert_eq!(captured.0.generation, generation);
        let listeners = pod.take_listeners().unwrap();
        for Family { pod: own, peer, any } in FAMILIES {
            let server = listen(&lab.peer, SocketAddr::new(peer, 8080));
            let app = listen(&lab.pod, SocketAddr::new(any, 8080));
            let _client = dial(&lab.pod, None, SocketAddr::new(peer, 8080)).unwrap();
            accept(&listeners.outbound);
            let _client = dial(&lab.peer, None, SocketAddr::new(own, 8080)).unwrap();
            accept(&listeners.inbound);
            assert!(accept_none(&server) && accept_none(&app));
        }
        // As a crash does: nothing is withdrawn.
        lab::close((listeners, pod, redirect));
        for Family { pod: own, peer, any } in FAMILIES {
            let server = listen(&lab.peer, SocketAddr::new(peer, 8080));
            let app = listen(&lab.pod, SocketAddr::new(any, 8080));
            let attempts = [
                ("outbound", dial_in_vain(&lab.pod, SocketAddr::new(peer, 8080))),
                ("inbound", dial_in_vain(&lab.peer, SocketAddr::new(own, 8080))),
                ("a tunnel", dial_in_vain(&lab.peer, SocketAddr::new(own, 15008))),
            ];
            // First what must never be; then that nobody answers at all.
            assert!(accept_none(&server), "it got out");
            assert!(accept_none(&app), "it got in");
            for (what, result) in attempts {
                assert!(result.is_err(), "{what}: {result:?}");
            }
            let _client = dial(&lab.pod, None, SocketAddr::new(own, 8080)).unwrap();
            accept(&app);
        }
    }
    assert_eq!(programs[0], programs[1]);
    assert_eq!(programs[1], programs[2]);
}

#[test]
fn closed_without_a_proxy_and_without_pins() {
    let lab = Lab::new("nop");
    for _ in 0..2 {
        let pod = plain().enrol(UID, &lab.pod).unwrap();
        let listeners = pod.take_listeners().unwrap();
        for Family { peer, .. } in FAMILIES {
            let server = listen(&lab.peer, SocketAddr::new(peer, 8080));
            let _client = dial(&lab.pod, None, SocketAddr::new(peer, 8080)).unwrap();
            accept(&listeners.outbound);
            assert!(accept_none(&server));
        }
        lab::close((listeners, pod));
        for Family { pod: own, peer, any } in FAMILIES {
            let server = listen(&lab.peer, SocketAddr::new(peer, 8080));
            assert!(
                dial_in_vain(&lab.pod, SocketAddr::new(peer, 8080)).is_err(),
                "outbound to {peer}"
            );
            // Without the program, what is led back to the pod may meet a wildcard listener of its own. It
            // is misled then, but it does not get out.
            let app = listen(&lab.pod, SocketAddr::new(any, 8080));
            let _misled = dial_in_vain(&lab.pod, SocketAddr::new(peer, 8080));
            assert!(accept_none(&server), "outbound to {peer}");
            drop(app);
            let app = listen(&lab.pod, SocketAddr::new(any, 8081));
            assert!(
                dial_in_vain(&lab.peer, SocketAddr::new(own, 8081)).is_err(),
                "inbound to {own}"
            );
            assert!(accept_none(&app));
        }
    }
}

#[test]
fn what_lives_survives_enrolment_and_release() {
    let lab = Lab::new("liv");
    let redirect = Ebpf::new(Settings { pins: Some(lab.pins()), ..Settings::default() }).unwrap();
    let (mut before, mut servers, mut apps) = (Vec::new(), Vec::new(), Vec::new());
    for Family { pod: own, peer, any } in FAMILIES {
        let server = listen(&lab.peer, SocketAddr::new(peer, 8080));
        let app = listen(&lab.pod, SocketAddr::new(any, 8080));
        before
            .push((dial(&lab.pod, None, SocketAddr::new(peer, 8080)).unwrap(), accept(&server).0));
        before.push((dial(&lab.peer, None, SocketAddr::new(own, 8080)).unwrap(), accept(&app).0));
        servers.push(server);
        apps.push(app);
    }
    let all_live = |pairs: &[(std::net::TcpStream, std::net::TcpStream)]| {
        for (one, other) in pairs {
            echo(one, other);
            echo(other, one);
        }
    };
    all_live(&before);
    let pod = redirect.enrol(UID, &lab.pod).unwrap();
    let listeners = pod.take_listeners().unwrap();
    all_live(&before);

    let mut through = Vec::new();
    for (Family { pod: own, peer, .. }, app) in FAMILIES.into_iter().zip(&apps) {
        through.push((
            dial(&lab.pod, None, SocketAddr::new(peer, 8080)).unwrap(),
            accept(&listeners.outbound).0,
        ));
        let client = dial(&lab.peer, None, SocketAddr::new(own, 8080)).unwrap();
        let (taken, from) = accept(&listeners.inbound);
        let to = SocketAddr::new(own, 8080);
        let passed = finish(redirect.to_application(&pod, Some(from), to).unwrap()).unwrap();
        through.push((client, taken));
        through.push((passed, accept(app).0));
    }
    redirect.remove(&pod).unwrap();
    redirect.remove(&pod).unwrap();
    assert!(!lab.pins().join(UID).exists());
    all_live(&through);
    all_live(&before);
    // A tunnel that lives may still bring a stream, and what is new goes past the proxy.
    for ((Family { pod: own, peer, .. }, app), server) in
        FAMILIES.into_iter().zip(&apps).zip(&servers)
    {
        let (client, to) = (SocketAddr::new(peer, 1), SocketAddr::new(own, 8080));
        let passed = finish(redirect.to_application(&pod, Some(client), to).unwrap()).unwrap();
        all_live(&[(passed, accept(app).0)]);
        all_live(&[(dial(&lab.pod, None, SocketAddr::new(peer, 8080)).unwrap(), accept(server).0)]);
        all_live(&[(dial(&lab.peer, None, to).unwrap(), accept(app).0)]);
    }
    assert!(!redirect.finish(&pod).unwrap(), "not while a connection lives");
    assert_ne!(lab.traces(), "");
    all_live(&through);
    // Both ends, so that none is left half-closed.
    drop(through);
    until(|| redirect.finish(&pod).unwrap());
    assert_eq!(lab.traces(), "");
    assert_eq!(lab.sysctls(), [0, 0, 0, 0], "as they were");
    all_live(&before);
}

#[test]
fn a_pod_that_is_back_is_not_finished() {
    let lab = Lab::new("bck");
    let redirect = Ebpf::new(Settings { pins: Some(lab.pins()), ..Settings::default() }).unwrap();
    let first = redirect.enrol(UID, &lab.pod).unwrap();
    redirect.remove(&first).unwrap();
    let second = redirect.enrol(UID, &lab.pod).unwrap();
    redirect.remove(&first).unwrap();
    assert!(redirect.finish(&first).unwrap());
    drop(first);
    let listeners = second.take_listeners().unwrap();
    for Family { peer, .. } in FAMILIES {
        let _client = dial(&lab.pod, None, SocketAddr::new(peer, 8080)).unwrap();
        accept(&listeners.outbound);
    }
    // What the first one left on is not what the second one found.
    redirect.remove(&second).unwrap();
    drop(listeners);
    until(|| redirect.finish(&second).unwrap());
    assert_eq!((lab.traces().as_str(), lab.sysctls()), ("", [0, 0, 0, 0]));
}

/// The last connection of a pod that has left ends while it comes back.
#[test]
fn a_pod_may_come_back_while_what_is_left_of_it_is_taken_away() {
    let lab = Lab::new("bwh");
    let redirect = Ebpf::new(Settings { pins: Some(lab.pins()), ..Settings::default() }).unwrap();
    let mut pod = redirect.enrol(UID, &lab.pod).unwrap();
    let whole = lab.traces();
    for _ in 0..30 {
        redirect.remove(&pod).unwrap();
        drop(pod.take_listeners());
        pod = std::thread::scope(|scope| {
            scope.spawn(|| redirect.finish(&pod).unwrap());
            redirect.enrol(UID, &lab.pod)
        })
        .unwrap();
        assert_eq!(lab.traces(), whole);
    }
}

#[test]
fn release_and_prune_find_the_pods_of_others() {
    for prune in [false, true] {
        let lab = Lab::new(if prune { "prn" } else { "rel" });
        let settings = Settings { pins: Some(lab.pins()), ..Settings::default() };
        drop(Ebpf::new(settings.clone()).unwrap().enrol(UID, &lab.pod).unwrap());
        let redirect = Ebpf::new(settings).unwrap();
        assert!(matches!(redirect.release(Some("other")), Err(CaptureError::UnknownPod)));
        redirect.prune(&[UID.to_owned()]).unwrap();
        assert_eq!(pins::uids(&lab.pins()).unwrap(), [UID]);
        if prune {
            redirect.prune(&[]).unwrap();
        } else {
            assert_eq!(redirect.release(Some(UID)).unwrap(), [UID]);
        }
        assert!(pins::uids(&lab.pins()).unwrap().is_empty());
        assert_eq!((lab.traces().as_str(), lab.sysctls()), ("", [0, 0, 0, 0]));
        for Family { peer, .. } in FAMILIES {
            let server = listen(&lab.peer, SocketAddr::new(peer, 8080));
            let _client = dial(&lab.pod, None, SocketAddr::new(peer, 8080)).unwrap();
            accept(&server);
        }
    }
}

#[test]
fn somebody_elses_redirection_is_left_alone() {
    for (tag, command, six) in [
        ("fr4", "rule add pref 100 lookup 200", false),
        ("fr6", "rule add pref 99 lookup 200", true),
        ("frt", "rule add pref 3000 lookup 100", false),
        ("fro", "route add local default dev lo table 100", false),
    ] {
        let lab = Lab::new(tag);
        lab.ip("pod", command, six);
        let result = plain().enrol(UID, &lab.pod);
        assert!(
            matches!(&result, Err(CaptureError::Foreign(reasons)) if reasons.len() == 1),
            "{tag}: {result:?}"
        );
        assert_eq!(lab.traces(), "", "{tag}");
    }
    for (tag, command) in [
        ("fnf", "iptables -t nat -N ISTIO_OUTPUT"),
        ("fle", "iptables-legacy -t mangle -N ISTIO_PRERT"),
        ("fl6", "ip6tables-legacy -t mangle -N ISTIO_PRERT"),
    ] {
        let lab = Lab::new(tag);
        lab.exec("pod", command);
        let result = plain().enrol(UID, &lab.pod);
        assert!(
            matches!(&result, Err(CaptureError::Foreign(reasons)) if reasons.iter().all(|why| why.contains("ISTIO_"))),
            "{tag}: {result:?}"
        );
        assert_eq!(lab.traces(), "", "{tag}");
    }
}

/// Anybody with the right to may take away what was written in a pod's namespace.
#[test]
fn it_is_seen_that_a_pod_is_not_captured() {
    let lab = Lab::new("unc");
    let redirect = plain();
    let pod = redirect.enrol(UID, &lab.pod).unwrap();
    let why = || redirect.uncaptured(&pod).unwrap().unwrap_or_default();
    assert_eq!(why(), "");
    for (take, six, says) in [
        ("route flush table 100", true, "IPv6 routes of table 100"),
        ("rule del pref 102", true, "IPv6 rule of preference 102"),
        ("route flush table 100", false, "IPv4 routes of table 100"),
        ("rule del pref 99", false, "IPv4 rule of preference 99"),
    ] {
        lab.ip("pod", take, six);
        assert!(why().contains(says), "{take}: {}", why());
    }
    redirect.remove(&pod).unwrap();
    assert!(why().contains("withdrawn"), "{}", why());

    let lab = Lab::new("une");
    let external = External::new(ExternalSettings::default());
    let pod = external.enrol(UID, &lab.pod).unwrap();
    assert!(external.uncaptured(&pod).unwrap().unwrap().contains("istio-cni"));
    lab.exec("pod", "iptables -t nat -N ISTIO_OUTPUT");
    assert_eq!(external.uncaptured(&pod).unwrap(), None);
}

/// Nobody follows the pod here, so that nothing is written again.
#[test]
fn without_our_routes_nothing_goes_out() {
    for taken in ["route flush table 100", "rule del pref 100"] {
        let lab = Lab::new("stop");
        let redirect = plain();
        let pod = redirect.enrol(UID, &lab.pod).unwrap();
        for Family { peer, any, .. } in FAMILIES {
            let server = listen(&lab.peer, SocketAddr::new(any, 8080));
            lab.ip("pod", taken, any.is_ipv6());
            let refused = dial_in_vain(&lab.pod, SocketAddr::new(peer, 8080)).unwrap_err();
            assert_eq!(refused.kind(), io::ErrorKind::PermissionDenied, "{taken}, {peer}");
            assert!(accept_none(&server));
        }
        redirect.remove(&pod).unwrap();
    }
}

#[test]
fn uids_that_are_no_names_are_refused() {
    let lab = Lab::new("uid");
    for uid in ["", "..", "a/b", "a.b", "\u{e4}"] {
        assert!(matches!(plain().enrol(uid, &lab.pod), Err(CaptureError::InvalidUid)), "{uid:?}");
    }
}

#[test]
fn the_applications_own_ports_are_no_obstacle() {
    let lab = Lab::new("prt");
    let apps: Vec<_> = [15001, 15006]
        .map(|port| listen(&lab.pod, SocketAddr::new("::".parse().unwrap(), port)))
        .into();
    let pod = plain().enrol(UID, &lab.pod).unwrap();
    let listeners = pod.take_listeners().unwrap();
    for Family { peer, .. } in FAMILIES {
        let _client = dial(&lab.pod, None, SocketAddr::new(peer, 8080)).unwrap();
        accept(&listeners.outbound);
    }
    drop(apps);
}

#[test]
fn ingress_is_left_alone_but_for_tunnels() {
    let lab = Lab::new("ing");
    let redirect = Ebpf::new(Settings { ingress: true, ..Settings::default() }).unwrap();
    let pod = redirect.enrol(UID, &lab.pod).unwrap();
    let listeners = pod.take_listeners().unwrap();
    for Family { pod: own, peer, any } in FAMILIES {
        let app = listen(&lab.pod, SocketAddr::new(any, 8080));
        let client = dial(&lab.peer, None, SocketAddr::new(own, 8080)).unwrap();
        let (served, seen) = accept(&app);
        assert_eq!(seen, client.local_addr().unwrap());
        echo(&client, &served);
        echo(&served, &client);
        let refused = dial(&lab.peer, None, SocketAddr::new(own, 8081)).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
        let _client = dial(&lab.peer, None, SocketAddr::new(own, 15008)).unwrap();
        let (_, from) = accept(&listeners.hbone);
        let to = SocketAddr::new(own, 8080);
        let passed = finish(redirect.to_application(&pod, Some(from), to).unwrap()).unwrap();
        let (served, seen) = accept(&app);
        assert_eq!(seen.ip(), peer);
        echo(&served, &passed);
        let _client = dial(&lab.pod, None, SocketAddr::new(peer, 8080)).unwrap();
        accept(&listeners.outbound);
    }
    assert!(accept_none(&listeners.inbound));
    redirect.remove(&pod).unwrap();
    lab::close(listeners);
    until(|| redirect.finish(&pod).unwrap());
    assert_eq!((lab.traces().as_str(), lab.sysctls()), ("", [0, 0, 0, 0]));
}

#[test]
fn ipv6_may_be_off_and_come_back() {
    let lab = Lab::new("six");
    lab.pod.run(|| sys::sysctl("net/ipv6/conf/all/disable_ipv6", "1")).unwrap().unwrap();
    let redirect = plain();
    let pod = redirect.enrol(UID, &lab.pod).unwrap();
    let listeners = pod.take_listeners().unwrap();
    let [four, six] = FAMILIES;
    let _client = dial(&lab.pod, None, SocketAddr::new(four.peer, 8080)).unwrap();
    accept(&listeners.outbound);
    lab.pod.run(|| sys::sysctl("net/ipv6/conf/all/disable_ipv6", "0")).unwrap().unwrap();
    lab.ip("pod", &format!("addr add {}/64 dev eth0 nodad", six.pod), true);
    let server = listen(&lab.peer, SocketAddr::new(six.peer, 8080));
    let to = SocketAddr::new(six.peer, 8080);
    assert!(dial_in_vain(&lab.pod, to).is_err(), "closed until somebody follows");
    assert!(accept_none(&server));
    follow(&pod, six.pod);
    let _client = dial(&lab.pod, None, to).unwrap();
    assert_eq!(redirect.original_dst(&accept(&listeners.outbound).0).unwrap(), to.into());
    assert!(accept_none(&server));
}

#[test]
fn new_addresses_and_devices_are_followed() {
    let lab = Lab::new("flw");
    let redirect = plain();
    let pod = redirect.enrol(UID, &lab.pod).unwrap();
    let listeners = pod.take_listeners().unwrap();
    for (own, peer) in [("10.2.0.2", "10.2.0.1"), ("fd02::2", "fd02::1")] {
        let (own, peer): (IpAddr, IpAddr) = (own.parse().unwrap(), peer.parse().unwrap());
        let length = if own.is_ipv4() { 24 } else { 64 };
        if own.is_ipv4() {
            lab.join("eth1");
        }
        lab.ip("peer", &format!("addr add {peer}/{length} dev eth1 nodad"), own.is_ipv6());
        lab.ip("pod", &format!("addr add {own}/{length} dev eth1 nodad"), own.is_ipv6());
        follow(&pod, own);
        let server = listen(&lab.peer, SocketAddr::new(peer, 8080));
        let _client = dial(&lab.pod, Some("eth1"), SocketAddr::new(peer, 8080)).unwrap();
        accept(&listeners.outbound);
        assert!(accept_none(&server));
        let app = listen(&lab.pod, SocketAddr::new(own, 8080));
        let _client = dial(&lab.peer, None, SocketAddr::new(own, 8080)).unwrap();
        let (_, from) = accept(&listeners.inbound);
        let passed =
            finish(redirect.to_application(&pod, Some(from), SocketAddr::new(own, 8080)).unwrap());
        passed.unwrap().write_all(b"x").unwrap();
        assert_eq!(accept(&app).1.ip(), peer);
    }
}

/// Lets the pod's follower run until it knows the address.
fn follow(pod: &crate::redirect::Pod, ip: IpAddr) {
    let super::Recipe::Ebpf(captured) = &pod.0.recipe else { panic!("another recipe") };
    let knows = || captured.0.own.read().unwrap_or_else(PoisonError::into_inner).contains(&ip);
    lab::runtime().block_on(async {
        tokio::select! {
            () = pod.follow() => panic!("it ended"),
            () = async { while !knows() { tokio::task::yield_now().await } } => (),
        }
    });
}
