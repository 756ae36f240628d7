//! Pins that are not to be adopted, and what pins outlive.

use super::{
    super::{Settings, pins, program::Program, sys},
    Ebpf, UID,
    lab::{FAMILIES, Family, Lab, accept, accept_none, dial, listen},
};
use crate::redirect::{Listeners, Pod, Redirect};
use mesh_ebpf_common::{LAYOUT_VERSION, cfg};
use std::{net::SocketAddr, path::Path};

fn at(pins: &Path) -> Ebpf {
    Ebpf::new(Settings { pins: Some(pins.to_owned()), ..Settings::default() }).unwrap()
}

fn program(pins: &Path) -> sys::Attached {
    sys::attached(&sys::pinned(&pins.join(UID).join("link")).unwrap()).unwrap().unwrap()
}

/// What the pod dials comes to these, in both families.
fn serves(lab: &Lab, listeners: &Listeners) {
    for Family { peer, .. } in FAMILIES {
        let server = listen(&lab.peer, SocketAddr::new(peer, 8080));
        let _client = dial(&lab.pod, None, SocketAddr::new(peer, 8080)).unwrap();
        accept(&listeners.outbound);
        assert!(accept_none(&server));
    }
}

fn enrol(redirect: &Ebpf, lab: &Lab) -> (Pod, Listeners) {
    let pod = redirect.enrol(UID, &lab.pod).unwrap();
    let listeners = pod.take_listeners().unwrap();
    (pod, listeners)
}

#[test]
fn another_layout_is_loaded_anew() {
    let lab = Lab::new("lay");
    let _first = enrol(&at(&lab.pins()), &lab);
    let before = program(&lab.pins());
    let folder = lab.pins().join(UID);
    Program::set_pinned_word(&folder, cfg::LAYOUT, LAYOUT_VERSION + 1);
    let (pod, listeners) = enrol(&at(&lab.pins()), &lab);
    let after = program(&lab.pins());
    assert_ne!(before.program, after.program);
    assert_eq!(before.netns, after.netns);
    serves(&lab, &listeners);
    let super::super::Recipe::Ebpf(captured) = &pod.0.recipe else { panic!("another recipe") };
    assert_eq!(captured.0.generation, 2, "told from the first, which may live");
    // What is adopted is what is there now.
    let (_third, listeners) = enrol(&at(&lab.pins()), &lab);
    assert_eq!(program(&lab.pins()).program, after.program);
    serves(&lab, &listeners);
}

#[test]
fn pins_of_a_namespace_that_is_gone_are_loaded_anew_or_pruned() {
    let lab = Lab::new("gon");
    let pins = lab.pins();
    for prune in [true, false] {
        {
            let gone = Lab::new(if prune { "gn1" } else { "gn2" });
            drop(enrol(&at(&pins), &gone));
        }
        lab_is_gone(&pins);
        if prune {
            at(&pins).prune(&[]).unwrap();
            assert!(pins::uids(&pins).unwrap().is_empty());
        } else {
            let (_pod, listeners) = enrol(&at(&pins), &lab);
            assert_eq!(u64::from(program(&pins).netns), lab.pod.id().ino);
            serves(&lab, &listeners);
        }
    }
}

/// The kernel takes a namespace apart a little after its last descriptor is closed.
fn lab_is_gone(pins: &Path) {
    super::until(|| pins::namespace(&pins.join(UID)) == Some(0));
}

#[test]
fn pins_of_another_pods_namespace_are_not_adopted() {
    let (one, other) = (Lab::new("an1"), Lab::new("an2"));
    let pins = one.pins();
    let (_stays, first) = enrol(&at(&pins), &one);
    let before = program(&pins);
    let (_pod, listeners) = enrol(&at(&pins), &other);
    let after = program(&pins);
    assert_ne!(before.program, after.program);
    assert_eq!(u64::from(after.netns), other.pod.id().ino);
    serves(&other, &listeners);
    // The uid has moved: what it left is closed, and neither the new nor the old listeners get it.
    let Family { peer, .. } = FAMILIES[0];
    let server = listen(&one.peer, SocketAddr::new(peer, 8080));
    assert!(super::dial_in_vain(&one.pod, SocketAddr::new(peer, 8080)).is_err());
    assert!(accept_none(&server) && accept_none(&first.outbound));
}

#[test]
fn sysctls_are_as_they_were_before_the_first_of_several() {
    let lab = Lab::new("fnd");
    let settings = Settings { ingress: true, pins: Some(lab.pins()), ..Settings::default() };
    lab.pod.run(|| sys::sysctl("net/ipv4/fwmark_reflect", "1")).unwrap().unwrap();
    for _ in 0..2 {
        // As a crash does: nothing is withdrawn.
        let redirect = Ebpf::new(settings.clone()).unwrap();
        super::lab::close(redirect.enrol(UID, &lab.pod).unwrap());
        assert_eq!(lab.sysctls(), [1, 1, 1, 1]);
    }
    let redirect = Ebpf::new(settings).unwrap();
    assert_eq!(redirect.release(None).unwrap(), [UID]);
    assert_eq!((lab.traces().as_str(), lab.sysctls()), ("", [0, 1, 0, 0]));
}

#[test]
fn a_live_proxy_notices_that_somebody_released_its_pod() {
    let lab = Lab::new("rlv");
    let redirect = at(&lab.pins());
    let (pod, listeners) = enrol(&redirect, &lab);
    let Family { pod: own, peer, any } = FAMILIES[0];
    let server = listen(&lab.peer, SocketAddr::new(peer, 8080));
    let app = listen(&lab.pod, SocketAddr::new(any, 8080));
    let client = dial(&lab.pod, None, SocketAddr::new(peer, 8080)).unwrap();
    let (taken, _) = accept(&listeners.outbound);
    assert_eq!(at(&lab.pins()).release(Some(UID)).unwrap(), [UID]);
    // What is new goes past it, what lives does not break, and its rules stay.
    let _direct = dial(&lab.pod, None, SocketAddr::new(peer, 8080)).unwrap();
    accept(&server);
    super::echo(&client, &taken);
    assert_ne!(lab.traces(), "");
    let super::super::Recipe::Ebpf(captured) = &pod.0.recipe else { panic!("another recipe") };
    super::lab::runtime().block_on(async {
        tokio::select! {
            () = pod.follow() => panic!("it ended"),
            () = async { while !captured.0.state().withdrawn { tokio::task::yield_now().await } } => (),
        }
    });
    // A tunnel that lives may still bring a stream.
    let to = SocketAddr::new(own, 8080);
    let client_name = Some(SocketAddr::new(peer, 1));
    let passed = super::finish(redirect.to_application(&pod, client_name, to).unwrap()).unwrap();
    super::echo(&passed, &accept(&app).0);
    redirect.remove(&pod).unwrap();
    assert!(!redirect.finish(&pod).unwrap());
    super::lab::close((client, taken, passed, listeners));
    super::until(|| redirect.finish(&pod).unwrap());
    assert_eq!((lab.traces().as_str(), lab.sysctls()), ("", [0, 0, 0, 0]));
}
