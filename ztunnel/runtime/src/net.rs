//! Listeners and the loop that accepts from them.

use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::time::Duration;

use socket2::SockRef;
use tokio::io::Interest;

use crate::backoff::Backoff;
use crate::tasks::Draining;

/// Connections taken in a row before the worker's other tasks get a turn.
const BATCH: usize = 64;

/// A listening socket, non-blocking and not yet registered with a runtime.
#[derive(Debug)]
pub struct Listener {
    socket: TcpListener,
}

impl Listener {
    /// Listens on an address.
    ///
    /// # Errors
    /// As `bind(2)` and `listen(2)`.
    pub fn bind(address: SocketAddr) -> io::Result<Self> {
        Self::from_socket(TcpListener::bind(address)?)
    }

    /// Takes over a socket that listens already: opened in another namespace, or inherited.
    ///
    /// # Errors
    /// When it cannot be made non-blocking.
    pub fn from_socket(socket: TcpListener) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        Ok(Self { socket })
    }

    /// Where it listens.
    ///
    /// # Errors
    /// As `getsockname(2)`.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.socket.local_addr()
    }

    /// The socket again.
    #[must_use]
    pub fn into_socket(self) -> TcpListener {
        self.socket
    }
}

/// Accepts until the drain begins, then closes the listener. Streams are non-blocking, not registered with any
/// runtime, and come with the canonical address of their peer (IPv4-mapped addresses as IPv4).
///
/// # Errors
/// When the socket is not a listener (any more). What can pass is retried, with a pause where descriptors or
/// memory ran out.
pub async fn accept_loop(
    listener: Listener,
    draining: Draining,
    take: impl FnMut(TcpStream, SocketAddr),
) -> io::Result<()> {
    accept_until(listener, || draining.stopping(), take).await
}

/// The same, until what `stop` gives is over; it is asked for more than once.
///
/// # Errors
/// As [`accept_loop`].
pub async fn accept_until<F: Future<Output = ()>>(
    listener: Listener,
    stop: impl Fn() -> F,
    mut take: impl FnMut(TcpStream, SocketAddr),
) -> io::Result<()> {
    let Listener { socket } = listener;
    // Only its readiness is wanted. Tokio's own listener would register each stream with this worker, and
    // `AsyncFd` is unsafe to make; the registration of a stream is the same for any socket.
    let socket = tokio::net::TcpStream::from_std(TcpStream::from(OwnedFd::from(socket)))?;
    let mut pause = Backoff::new(Duration::from_millis(5), Duration::from_secs(1), 2.0, 0.2);
    loop {
        tokio::select! {
            biased;
            () = stop() => return Ok(()),
            ready = socket.readable() => ready?,
        }
        match socket.try_io(Interest::READABLE, || accept_batch(&socket, &mut take)) {
            Ok(()) => {
                pause.reset();
                tokio::task::yield_now().await;
            }
            Err(error) => match classify(&error) {
                Trouble::Nothing | Trouble::Connection => pause.reset(),
                Trouble::Exhausted => {
                    let delay = pause.next_delay();
                    tracing::warn!(?delay, %error, "cannot accept connections: pausing");
                    tokio::select! {
                        () = tokio::time::sleep(delay) => {}
                        () = stop() => return Ok(()),
                    }
                }
                Trouble::Listener => return Err(error),
            },
        }
    }
}

/// Takes up to a batch. "Would block" goes to the caller, who clears the readiness.
fn accept_batch(
    socket: &tokio::net::TcpStream,
    take: &mut impl FnMut(TcpStream, SocketAddr),
) -> io::Result<()> {
    let socket = SockRef::from(socket);
    for _ in 0..BATCH {
        match socket.accept() {
            Ok((stream, peer)) => {
                // One system call; socket2 would take two.
                let stream = TcpStream::from(stream);
                // Neither fails on a TCP socket; a stream that stayed blocking would stall its worker.
                if let (Some(peer), Ok(())) = (peer.as_socket(), stream.set_nonblocking(true)) {
                    take(stream, SocketAddr::new(peer.ip().to_canonical(), peer.port()));
                }
            }
            Err(error) if classify(&error) == Trouble::Connection => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

#[derive(Debug, Eq, PartialEq)]
enum Trouble {
    /// Nothing waits.
    Nothing,
    /// The connection is gone, or its network has an error pending (`accept(2)`, "Error handling").
    Connection,
    /// Out of descriptors or memory: passes when others end.
    Exhausted,
    /// The socket does not listen.
    Listener,
}

// Numbers of errno(3), the same on every Linux architecture that we build for.
const EBADF: i32 = 9;
const ENOMEM: i32 = 12;
const EINVAL: i32 = 22;
const ENFILE: i32 = 23;
const EMFILE: i32 = 24;
const ENOTSOCK: i32 = 88;
const ENOBUFS: i32 = 105;

fn classify(error: &io::Error) -> Trouble {
    match error.raw_os_error() {
        Some(EMFILE | ENFILE | ENOMEM | ENOBUFS) => Trouble::Exhausted,
        Some(EBADF | EINVAL | ENOTSOCK) => Trouble::Listener,
        _ if error.kind() == io::ErrorKind::WouldBlock => Trouble::Nothing,
        _ => Trouble::Connection,
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::net::{Ipv4Addr, Ipv6Addr, Shutdown};

    use tokio::sync::mpsc;

    use super::*;
    use crate::tasks::Tasks;

    #[tokio::test]
    async fn accepts_non_blocking_streams_until_the_drain() {
        let socket = TcpListener::bind((Ipv6Addr::UNSPECIFIED, 0)).unwrap();
        let listener = Listener::from_socket(socket).unwrap();
        let port = listener.local_addr().unwrap().port();
        let tasks = Tasks::new();
        let (tell, mut told) = mpsc::channel(BATCH * 2);
        tasks.spawn(|draining| async move {
            let accepted = accept_loop(listener, draining, |stream, peer| {
                tell.try_send((stream, peer)).unwrap()
            });
            accepted.await.unwrap();
        });
        let connect = || TcpStream::connect((Ipv4Addr::LOCALHOST, port));
        // More than a batch, so that the loop has to go round.
        let clients: Vec<_> = (0..BATCH + 3).map(|_| connect().unwrap()).collect();
        for _ in &clients {
            let (mut stream, peer) = told.recv().await.unwrap();
            assert_eq!(peer.ip(), Ipv4Addr::LOCALHOST, "mapped addresses are canonical");
            assert_eq!(stream.read(&mut [0]).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        }
        assert!(tasks.drain(Duration::from_secs(10)).await);
        assert_eq!(connect().unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
    }

    /// What every server here takes is a [`Listener`], so that any of them can be handed to the next process.
    #[tokio::test]
    async fn an_inherited_descriptor_listens_on_and_has_its_queue() {
        let first = Listener::bind((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
        let client = TcpStream::connect(first.local_addr().unwrap()).unwrap();
        let descriptor = OwnedFd::from(first.into_socket());
        let next = Listener::from_socket(TcpListener::from(descriptor)).unwrap();
        let (tell, mut told) = mpsc::channel(1);
        let stop = std::future::pending::<()>;
        let accepting =
            accept_until(next, stop, |stream, peer| tell.try_send((stream, peer)).unwrap());
        tokio::select! {
            ended = accepting => panic!("{ended:?}"),
            queued = told.recv() => {
                assert_eq!(queued.unwrap().1, client.local_addr().unwrap());
            }
        }
    }

    #[tokio::test]
    async fn a_socket_that_does_not_listen_is_an_error() {
        let listener = Listener::bind((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        client.shutdown(Shutdown::Both).unwrap();
        let listener = Listener::from_socket(TcpListener::from(OwnedFd::from(client))).unwrap();
        let error = accept_loop(listener, Draining::never(), |_, _| {}).await.unwrap_err();
        assert_eq!(error.raw_os_error(), Some(EINVAL));
    }

    #[test]
    fn errors_are_told_apart() {
        const ECONNABORTED: i32 = 103;
        const EAGAIN: i32 = 11;
        const EINTR: i32 = 4;
        for (errno, expected) in [
            (EAGAIN, Trouble::Nothing),
            (EINTR, Trouble::Connection),
            (ECONNABORTED, Trouble::Connection),
            (EMFILE, Trouble::Exhausted),
            (ENFILE, Trouble::Exhausted),
            (ENOMEM, Trouble::Exhausted),
            (EBADF, Trouble::Listener),
        ] {
            assert_eq!(classify(&io::Error::from_raw_os_error(errno)), expected, "errno {errno}");
        }
    }
}
