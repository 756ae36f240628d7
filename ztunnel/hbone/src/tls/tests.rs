use super::*;
use crate::{
    buffers,
    testing::{configs, tcp, within},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, split},
    time::pause,
};

async fn shake(near: TcpStream, far: TcpStream) -> (TlsStream, TlsStream) {
    let (near, far) = within(async {
        tokio::join!(
            TlsStream::connect(near, Arc::clone(&configs().client)),
            TlsStream::accept(far, Arc::clone(&configs().server)),
        )
    })
    .await;
    (near.unwrap(), far.unwrap())
}

async fn pair() -> (TlsStream, TlsStream) {
    let (near, far) = tcp().await;
    shake(near, far).await
}

fn text(length: usize) -> Vec<u8> {
    (0..length).map(|at| (at * 31 + at / 251).to_le_bytes()[0]).collect()
}

/// All that is written in this shape arrives, in order, with a clean end; both ways at once.
async fn exchange(near: TlsStream, far: TlsStream, sizes: &[usize]) {
    let total: usize = sizes.iter().sum();
    let text = text(total);
    let send = async |mut to: tokio::io::WriteHalf<TlsStream>| {
        let mut rest = &text[..];
        for size in sizes {
            let (now, later) = rest.split_at(*size);
            to.write_all(now).await.unwrap();
            rest = later;
        }
        to.flush().await.unwrap();
        to.shutdown().await.unwrap();
    };
    let receive = async |mut from: tokio::io::ReadHalf<TlsStream>| {
        let mut got = Vec::new();
        from.read_to_end(&mut got).await.unwrap();
        assert!(got == text, "{} of {total} bytes", got.len());
    };
    let ((near_in, near_out), (far_in, far_out)) = (split(near), split(far));
    within(async {
        tokio::join!(send(near_out), send(far_out), receive(near_in), receive(far_in))
    })
    .await;
}

#[tokio::test]
async fn any_size_passes() {
    for sizes in [
        &[0][..],
        &[1, 2, 3],
        &[1023, 1024, 1025, 4095, 4096, 4097],
        &[RECORD - 1, RECORD, RECORD + 1],
        &[buffers::SIZE - 1, buffers::SIZE, buffers::SIZE + 1],
        &[5_000_000],
    ] {
        let (near, far) = pair().await;
        exchange(near, far, sizes).await;
    }
}

/// Forwards what it gets in pieces of one byte.
async fn dribble(mut from: TcpStream, mut to: TcpStream) {
    let (mut from_in, mut from_out) = from.split();
    let (mut to_in, mut to_out) = to.split();
    let one = async |from: &mut tokio::net::tcp::ReadHalf<'_>,
                     to: &mut tokio::net::tcp::WriteHalf<'_>| {
        let mut byte = [0];
        while from.read_exact(&mut byte).await.is_ok() && to.write_all(&byte).await.is_ok() {
            tokio::task::yield_now().await;
        }
        let _gone = to.shutdown().await;
    };
    tokio::join!(one(&mut from_in, &mut to_out), one(&mut to_in, &mut from_out));
}

#[tokio::test]
async fn records_may_come_in_any_pieces() {
    let ((near, a), (b, far)) = (tcp().await, tcp().await);
    let exchanged = async {
        let (near, far) = shake(near, far).await;
        exchange(near, far, &[1, 20_000, 3]).await;
    };
    tokio::join!(exchanged, dribble(a, b));
}

#[tokio::test]
async fn a_handshake_has_a_deadline() {
    let (near, _silent) = tcp().await;
    let (_silent_too, far) = tcp().await;
    pause();
    let connected = TlsStream::connect(near, Arc::clone(&configs().client)).await;
    assert!(matches!(connected, Err(HandshakeError::Late)));
    let accepted = TlsStream::accept(far, Arc::clone(&configs().server)).await;
    assert!(matches!(accepted, Err(HandshakeError::Late)));
    assert_eq!(accepted.unwrap_err().to_string(), "tls handshake error: not done after 10s");
}

#[tokio::test]
async fn a_stranger_is_told_why() {
    let (near, far) = tcp().await;
    let mut nobody = ClientConfig::clone(&configs().client);
    nobody.client_auth_cert_resolver = Arc::new(NoCertificate);
    let (near, far) = within(async {
        tokio::join!(
            async {
                let mut near = TlsStream::connect(near, Arc::new(nobody)).await.unwrap();
                near.read(&mut [0]).await.unwrap_err()
            },
            TlsStream::accept(far, Arc::clone(&configs().server)),
        )
    })
    .await;
    assert!(matches!(far, Err(HandshakeError::Tls(rustls::Error::NoCertificatesPresented))));
    assert!(near.to_string().contains("CertificateRequired"), "{near}");
}

#[derive(Debug)]
struct NoCertificate;

impl rustls::client::ResolvesClientCert for NoCertificate {
    fn resolve(
        &self,
        _: &[&[u8]],
        _: &[rustls::SignatureScheme],
    ) -> Option<Arc<rustls::sign::CertifiedKey>> {
        None
    }

    fn has_certs(&self) -> bool {
        false
    }
}

#[tokio::test]
async fn a_cut_is_no_end() {
    let (mut near, mut far) = pair().await;
    near.write_all(b"half of it").await.unwrap();
    near.flush().await.unwrap();
    near.io.shutdown().await.unwrap();
    let mut got = Vec::new();
    let error = within(far.read_to_end(&mut got)).await.unwrap_err();
    assert_eq!((error.kind(), &got[..]), (io::ErrorKind::UnexpectedEof, &b"half of it"[..]));
}

#[tokio::test]
async fn a_broken_record_is_an_error() {
    let (mut near, mut far) = pair().await;
    near.io.write_all(&[23, 3, 3, 0, 32]).await.unwrap();
    near.io.write_all(&[0; 32]).await.unwrap();
    let error = within(far.read(&mut [0])).await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    let error = within(near.read(&mut [0])).await.unwrap_err();
    assert!(error.to_string().contains("BadRecordMac"), "told so: {error}");
}

/// What is found on the way to writing is kept for who reads: data in its order, and then the end.
#[tokio::test]
async fn writing_loses_nothing_that_was_received() {
    let (mut near, mut far) = pair().await;
    let text = text(3 * RECORD);
    near.write_all(&text).await.unwrap();
    near.shutdown().await.unwrap();
    let mut got = vec![0; 1];
    within(far.read_exact(&mut got)).await.unwrap();
    far.write_all(b"answer").await.unwrap();
    far.shutdown().await.unwrap();
    assert_eq!(far.write(b"more").await.unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    within(far.read_to_end(&mut got)).await.unwrap();
    assert!(got == text, "{} bytes", got.len());
    let mut answer = Vec::new();
    within(near.read_to_end(&mut answer)).await.unwrap();
    assert_eq!(answer, b"answer");
}

#[tokio::test]
async fn what_is_idle_holds_no_buffer() {
    let (mut near, mut far) = pair().await;
    for size in [1, 1000, 300_000] {
        let sent = text(size);
        let mut got = vec![0; size];
        within(async {
            let send = async {
                near.write_all(&sent).await.unwrap();
                near.flush().await.unwrap();
            };
            tokio::join!(send, async { far.read_exact(&mut got).await.unwrap() });
        })
        .await;
        assert!(got == sent);
        let next = std::future::poll_fn(|cx| {
            Poll::Ready(far.poll_plain(cx, &mut Vec::new()).is_pending())
        });
        assert!(next.await);
        for end in [&near, &far] {
            assert!(end.incoming.is_none() && end.outgoing.is_none() && end.queue.is_empty());
            assert!(end.plain.is_empty() && end.apart.is_none());
        }
    }
}
