//! Two processes on one pod, one after the other, both alive.

use super::{
    super::{Settings, diag, program::Program},
    Ebpf, UID, canonical,
    lab::{self, FAMILIES, Family, Lab, accept, close, dial, echo, listen},
};
use crate::redirect::{
    Dns, DnsAddress, DnsSockets, External, ExternalSettings, Inherited, Listeners, Pod, Redirect,
};
use mesh_ebpf_common::cfg;
use std::{
    net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::OwnedFd,
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
    thread,
    time::Duration,
};
use tokio::time::timeout;

const PATIENCE: Duration = Duration::from_secs(60);

fn enrol(lab: &Lab) -> (Ebpf, Pod, Listeners) {
    let settings = Settings { pins: Some(lab.pins()), ..Settings::default() };
    let redirect = Ebpf::new(settings).unwrap();
    let pod = redirect.enrol(UID, &lab.pod).unwrap();
    let listeners = pod.take_listeners().unwrap();
    (redirect, pod, listeners)
}

/// Both ways, in both families: the clients, which nobody has accepted.
fn dial_all(lab: &Lab) -> Vec<TcpStream> {
    let mut clients = Vec::new();
    for Family { pod: own, peer, .. } in FAMILIES {
        clients.push(dial(&lab.pod, None, SocketAddr::new(peer, 8080)).unwrap());
        clients.push(dial(&lab.peer, None, SocketAddr::new(own, 8080)).unwrap());
        clients.push(dial(&lab.peer, None, SocketAddr::new(own, 15008)).unwrap());
    }
    clients
}

/// Whether all of them are here, and work.
fn accept_all(listeners: &Listeners, clients: &[TcpStream]) {
    let mut taken = Vec::new();
    for _ in FAMILIES {
        for listener in [&listeners.outbound, &listeners.inbound, &listeners.hbone] {
            taken.push(accept(listener));
        }
    }
    for client in clients {
        let name = client.local_addr().unwrap();
        let (stream, _) = taken.iter().find(|(_, from)| canonical(*from) == name).unwrap();
        echo(client, stream);
    }
}

#[test]
fn the_old_one_waits_for_its_successor_and_for_who_waits() {
    let lab = Lab::new("tko");
    let (_old, first, old) = enrol(&lab);
    let waiting = dial_all(&lab);
    lab::runtime().block_on(async {
        let mut yielded = Box::pin(first.yielded(PATIENCE));
        // Nobody follows yet.
        assert!(timeout(lab::NEVER, &mut yielded).await.is_err(), "nobody has taken over");
        let (_new, _second, new) = enrol(&lab);
        // What is new is the successor's, and what was queued is still the old one's.
        let fresh = dial_all(&lab);
        assert!(timeout(lab::NEVER, &mut yielded).await.is_err(), "six connections wait");
        accept_all(&old, &waiting);
        yielded.await;
        close(old);
        accept_all(&new, &fresh);
        accept_all(&new, &dial_all(&lab));
    });
}

#[test]
fn half_open_connections_are_the_old_ones_too() {
    let lab = Lab::new("tkh");
    // The last packet of a handshake does not get through.
    let filter = |how: &str| {
        for tables in ["iptables", "ip6tables"] {
            let what = "OUTPUT -p tcp --dport 8080 --tcp-flags SYN,ACK,FIN,RST ACK -j DROP";
            lab.exec("peer", &format!("{tables} {how} {what}"));
        }
    };
    let (_old, first, old) = enrol(&lab);
    filter("-A");
    let dial = |family: Family| dial(&lab.peer, None, SocketAddr::new(family.pod, 8080)).unwrap();
    let clients = FAMILIES.map(dial);
    lab::runtime().block_on(async {
        let mut yielded = Box::pin(first.yielded(PATIENCE));
        let (_new, _second, _listeners) = enrol(&lab);
        assert!(timeout(lab::NEVER, &mut yielded).await.is_err(), "two connections are half open");
        filter("-D");
        // By the next SYN-ACK.
        let mut taken: Vec<_> = FAMILIES.iter().map(|_| accept(&old.inbound)).collect();
        taken.sort_by_key(|(_, from)| from.ip().to_canonical());
        for (client, (stream, _)) in clients.iter().zip(&taken) {
            echo(client, stream);
        }
        yielded.await;
    });
}

#[test]
fn without_a_successor_patience_ends() {
    let lab = Lab::new("tkn");
    let (_redirect, pod, _listeners) = enrol(&lab);
    lab::runtime().block_on(pod.yielded(Duration::ZERO));
    // Nor is one expected where nobody could take over.
    let plain = Ebpf::new(Settings::default()).unwrap();
    let other = Lab::new("tkp");
    let pod = plain.enrol(UID, &other.pod).unwrap();
    lab::runtime().block_on(pod.yielded(PATIENCE));
}

#[test]
fn a_successor_of_another_layout_is_one() {
    let lab = Lab::new("tkl");
    let (_old, first, old) = enrol(&lab);
    Program::set_pinned_word(&lab.pins().join(UID), cfg::LAYOUT, 0);
    let (_new, _second, new) = enrol(&lab);
    lab::runtime().block_on(first.yielded(PATIENCE));
    close(old);
    accept_all(&new, &dial_all(&lab));
}

#[test]
fn what_waits_for_an_old_one_that_dies_goes_to_the_new_one() {
    let lab = Lab::new("tkd");
    let (_old, _first, old) = enrol(&lab);
    let waiting = dial_all(&lab);
    let (_new, _second, new) = enrol(&lab);
    // As a crash does.
    close(old);
    accept_all(&new, &waiting);
    accept_all(&new, &dial_all(&lab));
}

#[test]
fn no_connection_is_lost_over_several_takeovers() {
    let lab = Lab::new("tks");
    let (stop, lost, made) = (AtomicBool::new(false), AtomicUsize::new(0), AtomicUsize::new(0));
    let (mut redirect, mut pod, mut listeners) = enrol(&lab);
    // Each runs until its listeners are closed, and answers with a byte.
    let serve = |listeners: &Listeners| {
        [&listeners.outbound, &listeners.inbound].map(|listener| {
            listener.set_nonblocking(false).unwrap();
            listener.try_clone().unwrap()
        })
    };
    thread::scope(|scope| {
        for (from, to) in
            FAMILIES.iter().flat_map(|family| [(&lab.pod, family.peer), (&lab.peer, family.pod)])
        {
            let (stop, lost, made) = (&stop, &lost, &made);
            scope.spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    let answered = dial(from, None, SocketAddr::new(to, 8080)).and_then(read_byte);
                    let counter = if answered.is_ok() { made } else { lost };
                    counter.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        for _ in 0..5 {
            let (ended, done) = (AtomicBool::new(false), made.load(Ordering::Relaxed));
            let doors = serve(&listeners);
            thread::scope(|turn| {
                for door in &doors {
                    let ended = &ended;
                    turn.spawn(move || answer(door, ended));
                }
                lab::until(|| made.load(Ordering::Relaxed) > done + 100);
                let next = enrol(&lab);
                // Answers what comes to the new one, too, as long as the old one lives.
                let early = serve(&next.2);
                let over = AtomicBool::new(false);
                thread::scope(|both| {
                    for door in &early {
                        let over = &over;
                        both.spawn(move || answer(door, over));
                    }
                    lab::runtime().block_on(pod.yielded(PATIENCE));
                    ended.store(true, Ordering::Relaxed);
                    over.store(true, Ordering::Relaxed);
                });
                (redirect, pod, listeners) = next;
            });
            drop(doors);
        }
        let doors = serve(&listeners);
        let ended = AtomicBool::new(false);
        thread::scope(|last| {
            for door in &doors {
                let ended = &ended;
                last.spawn(move || answer(door, ended));
            }
            let done = made.load(Ordering::Relaxed);
            lab::until(|| made.load(Ordering::Relaxed) > done + 100);
            stop.store(true, Ordering::Relaxed);
            // The clients end by what is answered here.
            let quiet = || lab.pod.run(diag::tcp).unwrap().unwrap();
            lab::until(|| !quiet().iter().any(|socket| socket.is_held()));
            ended.store(true, Ordering::Relaxed);
        });
    });
    drop(redirect);
    assert_eq!(lost.into_inner(), 0, "of {}", made.into_inner());
}

fn read_byte(mut stream: TcpStream) -> std::io::Result<()> {
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    std::io::Read::read_exact(&mut stream, &mut [0])
}

/// Accepts, says a byte and closes, until told to end.
fn answer(listener: &TcpListener, ended: &AtomicBool) {
    socket2::SockRef::from(listener).set_read_timeout(Some(Duration::from_millis(20))).unwrap();
    while !ended.load(Ordering::Relaxed) {
        if let Ok((mut stream, _)) = listener.accept() {
            stream.set_nonblocking(false).unwrap();
            std::io::Write::write_all(&mut stream, b"x").unwrap();
        }
    }
}

/// What a process passes on are numbers: nothing but the descriptors gets to the next.
fn pass_on(listeners: Listeners, dns: Option<Dns>) -> Inherited {
    let listener = |listener: TcpListener| TcpListener::from(OwnedFd::from(listener));
    let Listeners { outbound, inbound, hbone } = listeners;
    let listeners = Listeners {
        outbound: listener(outbound),
        inbound: listener(inbound),
        hbone: listener(hbone),
    };
    let dns = dns.map(Dns::into_sockets).map(|DnsSockets { tcp, udp }| DnsSockets {
        tcp: tcp.into_iter().map(listener).collect(),
        udp: udp.into_iter().map(|udp| UdpSocket::from(OwnedFd::from(udp))).collect(),
    });
    Inherited { listeners, dns }
}

/// Who asks this server for a name, by both ways.
fn ask(lab: &Lab, server: SocketAddr) -> (TcpStream, UdpSocket) {
    let udp = lab.pod.run(|| {
        let any = if server.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
        let socket = UdpSocket::bind(any)?;
        socket.set_read_timeout(Some(Duration::from_secs(10)))?;
        socket.connect(server)?;
        socket.send(b"a name?")?;
        Ok::<_, std::io::Error>(socket)
    });
    (dial(&lab.pod, None, server).unwrap(), udp.unwrap().unwrap())
}

/// Whether who asked is answered, in the name of the server that was asked where that is to be known.
fn answer_all(dns: Dns, asked: &[(TcpStream, UdpSocket)], server_is_known: bool) {
    let Dns { tcp, udp } = dns;
    let mut taken: Vec<_> = Vec::new();
    for (client, _) in asked {
        let v4 = client.local_addr().unwrap().is_ipv4();
        let of_family = |tcp: &&TcpListener| tcp.local_addr().is_ok_and(|own| own.is_ipv4() == v4);
        taken.push(accept(tcp.iter().find(of_family).unwrap_or(&tcp[0])));
    }
    for (client, _) in asked {
        let name = client.local_addr().unwrap();
        echo(client, &taken.iter().find(|(_, from)| canonical(*from) == name).unwrap().0);
    }
    lab::runtime().block_on(async {
        let served: Vec<_> = udp.into_iter().map(|udp| udp.serve().unwrap()).collect();
        for turn in 0..asked.len() {
            let socket = &served[turn % served.len()];
            let mut room = [0; 64];
            let receive = timeout(Duration::from_secs(10), socket.receive(&mut room));
            let (length, asker) = receive.await.unwrap().unwrap();
            assert_eq!(&room[..length], b"a name?");
            assert_eq!(asker.server().is_some(), server_is_known);
            socket.reply(&asker, b"an address").unwrap();
        }
    });
    for (_, client) in asked {
        let mut room = [0; 64];
        let length = client.recv(&mut room).unwrap();
        assert_eq!(&room[..length], b"an address");
    }
}

#[test]
fn a_pod_can_be_served_on_inherited_listeners() {
    let lab = Lab::new("inh");
    let settings = Settings { pins: Some(lab.pins()), dns: Some(15053), ..Settings::default() };
    let old = Ebpf::new(settings.clone()).unwrap().enrol(UID, &lab.pod).unwrap();
    let waiting = dial_all(&lab);
    let asked = FAMILIES.map(|family| ask(&lab, SocketAddr::new(family.peer, 53)));
    let inherited = pass_on(old.take_listeners().unwrap(), old.take_dns());
    let redirect = Ebpf::new(settings).unwrap();
    let pod = redirect.enrol_with(UID, &lab.pod, Some(inherited)).unwrap();
    answer_all(pod.take_dns().unwrap(), &asked, true);
    let listeners = pod.take_listeners().unwrap();
    accept_all(&listeners, &waiting);
    accept_all(&listeners, &dial_all(&lab));
    for Family { peer, .. } in FAMILIES {
        let server = listen(&lab.peer, SocketAddr::new(peer, 8080));
        let to = SocketAddr::new(peer, 8080);
        let upstream = super::finish(redirect.to_network(&pod, to).unwrap()).unwrap();
        echo(&upstream, &accept(&server).0);
    }
}

#[test]
fn so_can_one_that_others_redirect() {
    let lab = Lab::new("ine");
    let settings =
        ExternalSettings { dns: Some(DnsAddress::Localhost(15053)), ..ExternalSettings::default() };
    let old = External::new(settings).enrol(UID, &lab.pod).unwrap();
    let localhost = [Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()];
    let asked = localhost.map(|ip| ask(&lab, SocketAddr::new(ip, 15053)));
    let Family { pod: own, .. } = FAMILIES[1];
    let ports = [15001, 15006, 15008];
    let waiting = ports.map(|port| dial(&lab.peer, None, SocketAddr::new(own, port)).unwrap());
    let next = External::new(settings);
    let inherited = pass_on(old.take_listeners().unwrap(), old.take_dns());
    let pod = next.enrol_with(UID, &lab.pod, Some(inherited)).unwrap();
    answer_all(pod.take_dns().unwrap(), &asked, false);
    let Listeners { outbound, inbound, hbone, .. } = pod.take_listeners().unwrap();
    for (client, listener) in waiting.iter().zip([&outbound, &inbound, &hbone]) {
        let (stream, from) = accept(listener);
        assert_eq!(from, client.local_addr().unwrap());
        echo(client, &stream);
    }
    assert!(next.original_source(&pod));
}
