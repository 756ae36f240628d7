use super::*;
use crate::testing::{ask, mesh, resolver, service, workload};
use hickory_proto::{
    op::{Message, MessageType},
    rr::RecordType,
};
use mesh_runtime::metrics::Registry;
use std::io;
use tokio::net::{TcpStream, UdpSocket};

fn client() -> Arc<Workload> {
    Arc::new(workload("c//Pod/ns1/client", &["10.0.0.1"], &[]))
}

fn some(registry: &Registry) -> Resolver {
    resolver(mesh(vec![service("ns1/api.example.com", &["240.240.0.1"])], vec![]), registry)
}

/// To a server on this machine.
struct Loopback;

impl Dial for Loopback {
    fn udp(&self, to: SocketAddr) -> io::Result<UdpSocket> {
        let socket = std::net::UdpSocket::bind("127.0.0.1:0")?;
        socket.connect(to)?;
        socket.set_nonblocking(true)?;
        UdpSocket::from_std(socket)
    }

    async fn tcp(&self, to: SocketAddr) -> io::Result<TcpStream> {
        TcpStream::connect(to).await
    }
}

/// Forwards to a server that says this to everything; returns the reply to the client.
async fn forwarded(resolver: &Resolver, message: &[u8], code: u8) -> Message {
    let Step::Forward(unanswered) = resolver.ask(message, Transport::Udp, Some(&client())) else {
        panic!("not forwarded");
    };
    let server = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let address = server.local_addr().unwrap();
    let serve = async {
        let mut room = [0; 512];
        loop {
            let (length, peer) = server.recv_from(&mut room).await.unwrap();
            let mut reply = Message::from_vec(&room[..length]).unwrap();
            reply.metadata.message_type = MessageType::Response;
            reply.metadata.authoritative = true;
            reply.metadata.response_code = ResponseCode::from(0, code);
            server.send_to(&reply.to_vec().unwrap(), peer).await.unwrap();
        }
    };
    let reply = tokio::select! {
        reply = resolver.forward(&unanswered, Some(address), &Loopback) => reply,
        () = serve => unreachable!(),
    };
    Message::from_vec(&reply).unwrap()
}

#[test]
fn a_client_that_nobody_knows_gets_no_answer() {
    let resolver = some(&Registry::new());
    let message = ask("api.example.com.", RecordType::A, None);
    let Step::Reply(reply) = resolver.ask(&message, Transport::Udp, None) else { panic!() };
    let code = Message::from_vec(&reply).unwrap().metadata.response_code;
    assert_eq!(code, ResponseCode::ServFail);
    assert!(matches!(resolver.ask(b"", Transport::Udp, Some(&client())), Step::Ignore));
}

#[test]
fn only_addresses_are_answered_here() {
    let resolver = some(&Registry::new());
    for (kind, here) in [
        (RecordType::A, true),
        (RecordType::AAAA, true),
        (RecordType::TXT, false),
        (RecordType::SRV, false),
        (RecordType::ANY, false),
    ] {
        let message = ask("api.example.com.", kind, None);
        let step = resolver.ask(&message, Transport::Udp, Some(&client()));
        assert_eq!(matches!(step, Step::Reply(_)), here, "{kind}");
    }
}

#[tokio::test]
async fn a_forwarded_reply_is_not_from_an_authority() {
    let resolver = some(&Registry::new());
    let reply = forwarded(&resolver, &ask("far.example.com.", RecordType::A, None), 3).await;
    assert_eq!(reply.metadata.response_code, ResponseCode::NXDomain);
    assert!(!reply.metadata.authoritative && reply.metadata.recursion_available);
    assert_eq!(reply.metadata.id, 4711);
}

#[tokio::test]
async fn a_name_of_ours_exists_for_every_type() {
    let resolver = some(&Registry::new());
    let reply = forwarded(&resolver, &ask("api.example.com.", RecordType::HTTPS, None), 3).await;
    assert_eq!(reply.metadata.response_code, ResponseCode::NoError);
    assert!(reply.answers.is_empty());
}

#[tokio::test]
async fn everything_is_counted() {
    let registry = Registry::new();
    let resolver = some(&registry);
    let message = ask("api.example.com.", RecordType::A, None);
    let _replied = resolver.ask(&message, Transport::Tcp, Some(&client()));
    let _replied = forwarded(&resolver, &ask("far.example.com.", RecordType::SRV, None), 3).await;
    let text = registry.render();
    for line in [
        "istio_dns_requests_total{request_query_type=\"a\",request_protocol=\"tcp\",source_canonical_service=\"client\",source_canonical_revision=\"unknown\"} 1",
        "istio_dns_requests_total{request_query_type=\"srv\",request_protocol=\"udp\",source_canonical_service=\"client\",source_canonical_revision=\"unknown\"} 1",
        "istio_dns_upstream_requests_total{request_query_type=\"srv\",request_protocol=\"udp\",source_canonical_service=\"client\",source_canonical_revision=\"unknown\"} 1",
        "istio_dns_upstream_failures_total{request_query_type=\"srv\",request_protocol=\"udp\",source_canonical_service=\"client\",source_canonical_revision=\"unknown\"} 1",
        "istio_dns_upstream_request_duration_seconds_count{request_query_type=\"srv\",request_protocol=\"udp\",source_canonical_service=\"client\",source_canonical_revision=\"unknown\"} 1",
    ] {
        assert!(text.contains(line), "{line}\nin\n{text}");
    }
}
