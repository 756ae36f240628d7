//! Messages on a connection: each with its length before it (RFC 1035, section 4.2.2), answered in whatever
//! order the answers come (RFC 7766, section 6.2.1.1).

use std::{io, time::Duration};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    sync::mpsc,
    time::timeout,
};

/// How long a client may be silent, or not read.
const IDLE: Duration = Duration::from_secs(5);
/// Queries of one connection that are being answered, at most: Istio's number. The next is read when one of
/// them is.
const AT_ONCE: usize = 32;

/// Serves a connection until the client has been silent for 5 s with nothing left to answer, or ends it.
/// `answer` gets a message and where to send the one reply to it; dropping that is no reply.
///
/// # Errors
///
/// Fails as the connection does.
///
/// # Cancel safety
///
/// Dropping it ends the connection; what `answer` began ends by itself.
pub async fn serve<S: AsyncRead + AsyncWrite + Send>(
    stream: S,
    mut answer: impl FnMut(Vec<u8>, Reply) + Send,
) -> io::Result<()> {
    let (mut reader, mut writer) = tokio::io::split(stream);
    let (replies, mut replied) = mpsc::channel::<Vec<u8>>(AT_ONCE);
    let read = async {
        loop {
            // Each holds a place until it is answered.
            let Ok(place) = replies.clone().reserve_owned().await else { break };
            let busy = || replies.capacity() + 1 < AT_ONCE;
            let Some(message) = next(&mut reader, busy).await? else { break };
            answer(message, Reply(place));
        }
        drop(replies);
        Ok::<_, io::Error>(())
    };
    let write = async {
        while let Some(reply) = replied.recv().await {
            let Ok(length) = u16::try_from(reply.len()) else { continue };
            let mut framed = length.to_be_bytes().to_vec();
            framed.extend(reply);
            timeout(IDLE, writer.write_all(&framed)).await??;
        }
        writer.shutdown().await
    };
    tokio::try_join!(read, write).map(drop)
}

/// Where the reply to one message goes.
#[derive(Debug)]
pub struct Reply(mpsc::OwnedPermit<Vec<u8>>);

impl Reply {
    /// Sends it. Where the connection is over, nobody wants it.
    pub fn send(self, reply: Vec<u8>) {
        drop(self.0.send(reply));
    }
}

/// The next message, or the end. A client that waits for us is not idle.
async fn next(
    reader: &mut (impl AsyncRead + Unpin),
    busy: impl Fn() -> bool,
) -> io::Result<Option<Vec<u8>>> {
    let mut length = [0; 2];
    loop {
        match timeout(IDLE, reader.read(&mut length[..1])).await {
            Ok(Ok(0)) => return Ok(None),
            Ok(Ok(_)) => break,
            Ok(Err(error)) => return Err(error),
            Err(_elapsed) if busy() => {}
            Err(_elapsed) => return Ok(None),
        }
    }
    let rest = async {
        reader.read_exact(&mut length[1..]).await?;
        let mut message = vec![0; usize::from(u16::from_be_bytes(length))];
        reader.read_exact(&mut message).await?;
        Ok::<_, io::Error>(message)
    };
    timeout(IDLE, rest).await?.map(Some)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::{io::duplex, time::Instant};

    async fn send(stream: &mut (impl AsyncWrite + Unpin), message: &[u8]) {
        stream.write_u16(message.len().try_into().unwrap()).await.unwrap();
        stream.write_all(message).await.unwrap();
    }

    async fn receive(stream: &mut (impl AsyncRead + Unpin)) -> Vec<u8> {
        let mut message = vec![0; stream.read_u16().await.unwrap().into()];
        stream.read_exact(&mut message).await.unwrap();
        message
    }

    #[tokio::test(start_paused = true)]
    async fn answers_come_in_the_order_in_which_they_are_ready() {
        let (mut client, server) = duplex(1024);
        let mut first = None;
        let serve = serve(server, move |message, reply| match first.take() {
            None => first = Some((message, reply)),
            Some((one, later)) => {
                reply.send(message);
                later.send(one);
            }
        });
        let talk = async {
            send(&mut client, b"one").await;
            send(&mut client, b"two").await;
            assert_eq!(receive(&mut client).await, b"two");
            assert_eq!(receive(&mut client).await, b"one");
            client.shutdown().await.unwrap();
            assert_eq!(client.read(&mut [0]).await.unwrap(), 0, "the end");
        };
        let (served, ()) = tokio::join!(serve, talk);
        served.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_client_is_let_go_after_5_s() {
        let (_client, server) = duplex(1024);
        let began = Instant::now();
        serve(server, |_, _| {}).await.unwrap();
        assert_eq!(began.elapsed(), IDLE);
    }

    #[tokio::test(start_paused = true)]
    async fn half_a_message_is_not_waited_for_longer() {
        let (mut client, server) = duplex(1024);
        client.write_all(&[0, 9, 1]).await.unwrap();
        let error = serve(server, |_, _| {}).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }

    #[tokio::test(start_paused = true)]
    async fn who_waits_for_an_answer_is_not_idle() {
        let (mut client, server) = duplex(1024);
        let mut waiting = Vec::new();
        send(&mut client, b"one").await;
        let serve = serve(server, |message, reply| waiting.push((message, reply)));
        let ended = timeout(IDLE * 3, serve).await;
        assert!(ended.is_err(), "it waits for the answer");
        assert_eq!(waiting.len(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn no_more_are_taken_than_can_be_answered() {
        let (mut client, server) = duplex(1 << 16);
        for _ in 0..AT_ONCE * 2 {
            send(&mut client, b"q").await;
        }
        let mut waiting = Vec::new();
        let serve = serve(server, |_, reply| waiting.push(reply));
        let ended = timeout(IDLE, serve).await;
        assert!(ended.is_err());
        assert_eq!(waiting.len(), AT_ONCE);
    }
}
