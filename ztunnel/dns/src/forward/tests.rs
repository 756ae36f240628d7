use super::*;
use crate::{
    message::{Parsed, parse},
    testing::ask as question,
};
use hickory_proto::rr::RecordType;
use std::{
    net::Ipv4Addr,
    sync::atomic::{AtomicU32, Ordering},
};
use tokio::net::TcpListener;

/// The network of this machine; counts what is opened.
#[derive(Default)]
struct Loopback(AtomicU32);

impl Dial for Loopback {
    fn udp(&self, to: SocketAddr) -> io::Result<UdpSocket> {
        self.0.fetch_add(1, Ordering::Relaxed);
        let socket = std::net::UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
        socket.connect(to)?;
        socket.set_nonblocking(true)?;
        UdpSocket::from_std(socket)
    }

    async fn tcp(&self, to: SocketAddr) -> io::Result<TcpStream> {
        self.0.fetch_add(1, Ordering::Relaxed);
        TcpStream::connect(to).await
    }
}

fn query(transport: Transport) -> (Query, Vec<u8>) {
    let message = question("far.example.com.", RecordType::TXT, None);
    match parse(&message, transport) {
        Parsed::Query(query) => (query, message),
        Parsed::Refused(_) | Parsed::Noise => panic!("not a query"),
    }
}

/// As a server says it, with this response code.
fn answer(message: &[u8], code: u8) -> Vec<u8> {
    let mut reply = message.to_vec();
    reply[2] |= 0x80;
    reply[3] = code;
    reply
}

async fn server() -> (UdpSocket, SocketAddr) {
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let address = socket.local_addr().unwrap();
    (socket, address)
}

/// Answers each datagram with what `say` makes of it.
async fn serve(socket: UdpSocket, mut say: impl FnMut(&[u8]) -> Vec<Vec<u8>>) {
    let mut room = [0; 512];
    loop {
        let (length, peer) = socket.recv_from(&mut room).await.unwrap();
        for reply in say(&room[..length]) {
            socket.send_to(&reply, peer).await.unwrap();
        }
    }
}

#[tokio::test]
async fn what_is_not_the_answer_is_passed_over() {
    let (socket, address) = server().await;
    let (query, message) = query(Transport::Udp);
    let say = |sent: &[u8]| {
        let mut forged = answer(sent, 0);
        forged[0] ^= 1;
        let mut other = answer(sent, 0);
        other[13] ^= 1;
        vec![forged, other, b"x".to_vec(), sent.to_vec(), answer(sent, 3)]
    };
    let (servers, dial) = ([address], Loopback::default());
    let reply = tokio::select! {
        reply = forward(&query, &message, &servers, &dial) => reply.unwrap(),
        () = serve(socket, say) => unreachable!(),
    };
    assert_eq!(reply[3], 3);
    assert_eq!(reply[4..], message[4..]);
}

#[tokio::test]
async fn another_server_is_asked_where_one_fails() {
    let ((bad, first), (good, second)) = (server().await, server().await);
    let (query, message) = query(Transport::Udp);
    let servers = [first, second];
    let dial = Loopback::default();
    let reply = tokio::select! {
        reply = forward(&query, &message, &servers, &dial) => reply.unwrap(),
        () = serve(bad, |sent| vec![answer(sent, 2)]) => unreachable!(),
        () = serve(good, |sent| vec![answer(sent, 0)]) => unreachable!(),
    };
    assert_eq!((reply[3], dial.0.into_inner()), (0, 2));
}

#[tokio::test]
async fn a_lone_server_s_failure_is_the_answer() {
    let (socket, address) = server().await;
    let (query, message) = query(Transport::Udp);
    let (servers, dial) = ([address], Loopback::default());
    let reply = tokio::select! {
        reply = forward(&query, &message, &servers, &dial) => reply.unwrap(),
        () = serve(socket, |sent| vec![answer(sent, 2)]) => unreachable!(),
    };
    assert_eq!((reply[3], dial.0.into_inner()), (2, 1), "asked once");
}

#[tokio::test(start_paused = true)]
async fn a_silent_server_is_asked_three_times_in_15_s() {
    let (_socket, address) = server().await;
    let (query, message) = query(Transport::Udp);
    let (dial, began) = (Loopback::default(), tokio::time::Instant::now());
    let error = forward(&query, &message, &[address], &dial).await.unwrap_err();
    assert!(matches!(error, ForwardError::TimedOut), "{error}");
    assert_eq!(dial.0.into_inner(), 3);
    assert_eq!(began.elapsed().as_secs(), 15);
    let error = forward(&query, &message, &[], &Loopback::default()).await.unwrap_err();
    assert!(matches!(error, ForwardError::Nobody), "{error}");
}

#[tokio::test]
async fn what_came_on_a_connection_is_forwarded_on_one() {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    let (query, message) = query(Transport::Tcp);
    let serve = async {
        let (mut stream, _) = listener.accept().await.unwrap();
        let length = stream.read_u16().await.unwrap();
        let mut sent = vec![0; length.into()];
        stream.read_exact(&mut sent).await.unwrap();
        let mut reply = answer(&sent, 0);
        reply.resize(20_000, 0);
        stream.write_u16(20_000).await.unwrap();
        stream.write_all(&reply).await.unwrap();
        stream
    };
    let (servers, dial) = ([address], Loopback::default());
    let (reply, _stream) = tokio::join!(forward(&query, &message, &servers, &dial), serve);
    assert_eq!(reply.unwrap().len(), 20_000);
}
