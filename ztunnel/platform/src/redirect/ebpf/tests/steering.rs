//! `steer` and `mark_in`, run by the kernel on made-up contexts (`BPF_PROG_TEST_RUN`): every branch of the table in
//! `spec/capture.md` §1.3 that the kernel lets one reach so. Its test run knows no device, so that what comes over
//! lo (`looped`) is shown with real packets, here and in the other tests.

use super::{
    super::{
        PROBES,
        program::{self, Contents, Program},
        rules::Surroundings,
        sockets, sys,
        sysctls::Found,
    },
    lab::{self, FAMILIES, Lab, dial_in_vain},
};
use crate::redirect::{Listeners, SocketOptions};
use mesh_ebpf_common::{HBONE_PORT, MARK, cfg, flag, slot, stat};
use socket2::SockRef;
use std::net::{IpAddr, SocketAddr};

const TCP: u32 = 6;
const UDP: u32 = 17;

/// What comes of a lookup.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Fate {
    /// Left to the kernel.
    Passed,
    /// To the listener in this slot.
    To(u32),
    Dropped,
}
use Fate::{Dropped, Passed, To};

/// `struct bpf_sk_lookup`, as the test run takes it.
fn context(protocol: u32, from: IpAddr, to: SocketAddr) -> Vec<u8> {
    let mut bytes = vec![0; 72];
    let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
    let family: u32 = if from.is_ipv4() { 2 } else { 10 };
    put(8, &family.to_ne_bytes());
    put(12, &protocol.to_ne_bytes());
    match (from, to.ip()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            put(16, &from.octets());
            put(40, &to.octets());
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            put(20, &from.octets());
            put(44, &to.octets());
        }
        _ => panic!("two families"),
    }
    put(36, &40000_u16.to_be_bytes());
    put(60, &u32::from(to.port()).to_ne_bytes());
    bytes
}

struct Bench {
    lab: Lab,
    program: Program,
    listeners: Listeners,
}

impl Bench {
    fn new(tag: &str) -> Self {
        let lab = Lab::new(tag);
        let (program, listeners) = lab.pod.run(|| attach(&lab)).unwrap();
        Self { lab, program, listeners }
    }

    fn run(&self, context: &[u8]) -> Fate {
        let mut context = context.to_vec();
        let verdict = self.lab.pod.run(|| sys::test_run(self.program.id(), &mut context));
        let cookie = u64::from_ne_bytes(context[..8].try_into().unwrap());
        let Listeners { outbound, inbound, hbone, .. } = &self.listeners;
        let found = [(slot::OUTBOUND, outbound), (slot::INBOUND, inbound), (slot::HBONE, hbone)]
            .into_iter()
            .find(|(_, listener)| SockRef::from(*listener).cookie().unwrap() == cookie);
        match (verdict.unwrap().unwrap(), found) {
            (0, None) => Dropped,
            (1, None) => Passed,
            (1, Some((slot, _))) => To(slot),
            other => panic!("{other:?}"),
        }
    }
}

fn attach(lab: &Lab) -> (Program, Listeners) {
    let listeners = sockets::listeners(&SocketOptions::default(), 1).unwrap();
    let here = Surroundings::look().unwrap();
    let contents = Contents {
        dns: None,
        listeners: &listeners,
        here: &here,
        probes: &PROBES,
        ingress: false,
        generation: 1,
        found: Found::here(),
    };
    (Program::attach(None, &lab.pod, &contents).unwrap(), listeners)
}

#[test]
fn every_branch_of_the_table() {
    let mut bench = Bench::new("tab");
    let loopback: [IpAddr; 2] = [[127, 9, 0, 1].into(), "::1".parse().unwrap()];
    let strangers: [IpAddr; 2] = [[203, 0, 113, 9].into(), "2001:db8::9".parse().unwrap()];
    let (open, dns) = (flag::EXACT, flag::EXACT | flag::DNS);
    let bypass = flag::EXACT | flag::BYPASS_INBOUND;
    for (at, lab::Family { pod: own, peer, .. }) in FAMILIES.into_iter().enumerate() {
        let (loopback, stranger, probe) = (loopback[at], strangers[at], PROBES[at]);
        // A name, the flags, the protocol, from, to, its port, and the fate.
        let table = [
            ("loopback", open, TCP, own, loopback, 80, Passed),
            ("loopback's tunnel port", open, TCP, own, loopback, HBONE_PORT, Passed),
            ("UDP to the pod", open, UDP, peer, own, 53, Passed),
            ("from outside", open, TCP, peer, own, 80, To(slot::INBOUND)),
            ("from outside to 53", dns, TCP, peer, own, 53, To(slot::INBOUND)),
            ("a tunnel", open, TCP, peer, own, HBONE_PORT, To(slot::HBONE)),
            ("a tunnel, bypassed", bypass, TCP, peer, own, HBONE_PORT, To(slot::HBONE)),
            ("a tunnel to itself", open, TCP, own, own, HBONE_PORT, To(slot::HBONE)),
            ("a tunnel of a probe's", open, TCP, probe, own, HBONE_PORT, To(slot::HBONE)),
            ("from outside, bypassed", bypass, TCP, peer, own, 80, Passed),
            ("itself", open, TCP, own, own, 80, Passed),
            ("a probe", open, TCP, probe, own, 80, Passed),
            ("outbound", open, TCP, own, peer, 80, To(slot::OUTBOUND)),
            ("outbound to 15008", open, TCP, own, peer, HBONE_PORT, To(slot::OUTBOUND)),
            ("outbound, bypassed", bypass, TCP, own, peer, 80, To(slot::OUTBOUND)),
            ("outbound to a probe address", open, TCP, own, probe, 80, To(slot::OUTBOUND)),
            ("TCP 53 without DNS", open, TCP, own, peer, 53, To(slot::OUTBOUND)),
            ("TCP 53, nobody in the slot", dns, TCP, own, peer, 53, Dropped),
            ("UDP 53, nobody in the slot", dns, UDP, own, peer, 53, Dropped),
            ("UDP 53 without DNS", open, UDP, own, peer, 53, Passed),
            ("other UDP", dns, UDP, own, peer, 80, Passed),
            ("an unknown address", open, TCP, peer, stranger, 80, To(slot::INBOUND)),
            ("its tunnel port", open, TCP, peer, stranger, HBONE_PORT, To(slot::HBONE)),
            ("it, bypassed", bypass, TCP, peer, stranger, 80, Passed),
            ("its tunnel, bypassed", bypass, TCP, peer, stranger, HBONE_PORT, To(slot::HBONE)),
            ("UDP to it", open, UDP, peer, stranger, 53, Dropped),
        ];
        for (name, flags, protocol, from, to, port, expected) in table {
            bench.program.set_word(cfg::FLAGS, flags);
            let fate = bench.run(&context(protocol, from, SocketAddr::new(to, port)));
            assert_eq!(fate, expected, "{name}, {own}");
        }
    }
}

#[test]
fn what_comes_over_lo() {
    let bench = Bench::new("lop");
    // Routed as capture does it: what is sent from here to anywhere arrives by lo.
    bench.lab.exec("pod", "ip -4 route add local default dev lo table 100");
    bench.lab.exec("pod", "ip -4 rule add pref 100 iif lo ipproto tcp lookup 100");
    let before = bench.program.counters();
    // From an address that is not the pod's to one that is not: somebody's mistake, and no outbound.
    let from = [203, 0, 113, 7].into();
    let connect = || {
        let to = SocketAddr::from(([203, 0, 113, 9], 80));
        sockets::spoofed(&SocketOptions::default(), false, from, to)
    };
    let _dropped = bench.lab.pod.run(connect).unwrap().unwrap();
    lab::until(|| {
        bench.program.counters()[stat::UNKNOWN as usize] > before[stat::UNKNOWN as usize]
    });
    // From there to the pod, a tunnel's port included: the proxy's own, to the application.
    for port in [80, HBONE_PORT] {
        let before = bench.program.counters();
        let to = SocketAddr::new(FAMILIES[0].pod, port);
        let connect = || sockets::spoofed(&SocketOptions::default(), false, from, to);
        // Nobody listens, which the kernel says at once, or when the connection is looked at.
        let _refused = bench.lab.pod.run(connect).unwrap();
        let passed = stat::PASSED as usize;
        lab::until(|| bench.program.counters()[passed] > before[passed]);
        assert_eq!(bench.program.counters()[slot::HBONE as usize], 0);
    }
}

#[test]
fn an_empty_slot_and_a_family_that_the_listener_lacks_drop() {
    let mut bench = Bench::new("emp");
    let own = FAMILIES[0].pod;
    let tunnel = context(TCP, FAMILIES[0].peer, SocketAddr::new(own, HBONE_PORT));
    bench.program.clear(slot::HBONE);
    let before = bench.program.counters();
    assert_eq!(bench.run(&tunnel), Dropped);
    let after = bench.program.counters();
    let at = stat::NO_LISTENER as usize;
    assert_eq!(after[at], before[at] + 1);
    // A listener of IPv6 alone.
    let only = lab::listen(&bench.lab.pod, "[::]:7".parse().unwrap());
    bench.program.put(slot::HBONE, &only);
    assert_eq!(bench.run(&tunnel), Dropped);
    let at = stat::ASSIGN as usize;
    assert_eq!(bench.program.counters()[at], before[at] + 1);
    assert!(dial_in_vain(&bench.lab.peer, SocketAddr::new(own, HBONE_PORT)).is_err());
}

#[test]
fn what_arrives_unmarked_is_marked() {
    for (name, before, after) in [
        ("unmarked", 0, MARK),
        ("somebody's upper bits", 0x7000, 0x7000 | MARK),
        ("ours", MARK, MARK),
        ("leaving", 0x111, 0x111),
        ("somebody's", 0x1, 0x1),
    ] {
        // `struct __sk_buff`: the mark is its third word.
        let mut context = vec![0_u8; 192];
        context[8..12].copy_from_slice(&u32::to_ne_bytes(before));
        let verdict = program::test_mark_in(&mut context);
        assert_eq!(verdict, u32::MAX, "{name}: the next program");
        assert_eq!(context[8..12], u32::to_ne_bytes(after), "{name}");
    }
}
