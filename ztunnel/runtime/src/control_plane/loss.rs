//! Why a connection was lost. HTTP/2 above it tells its streams only that it broke.

use std::fmt;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Instant;

use super::PING_TIMEOUT;

/// How one connection was lost. Clones are of the same connection.
#[derive(Clone, Debug, Default)]
pub struct Loss(Arc<Mutex<Option<Cause>>>);

/// Why a connection was lost.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Cause {
    /// The peer, or somebody on the way, ended it in the middle.
    Closed,
    /// TCP or TLS failed.
    Failed(String),
    /// The peer has not even answered PING. Since when.
    Silent(Duration),
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Closed => f.write_str("closed in the middle"),
            Self::Failed(why) => f.write_str(why),
            Self::Silent(since) => {
                write!(f, "nothing came for {} s, no answer to PING either", since.as_secs())
            }
        }
    }
}

impl Loss {
    fn state(&self) -> MutexGuard<'_, Option<Cause>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Why the connection was lost; none where it was not, or ended in good order.
    #[must_use]
    pub fn cause(&self) -> Option<Cause> {
        self.state().clone()
    }

    /// Notes how this connection is lost, from now on.
    pub(super) fn note<T>(&self, io: T) -> Noted<T> {
        *self.state() = None;
        Noted { io, loss: self.clone(), heard: Instant::now() }
    }

    /// The first that is known is what caused the rest.
    fn set(&self, cause: Cause) {
        self.state().get_or_insert(cause);
    }
}

/// A connection that notes how it is lost.
#[derive(Debug)]
pub(super) struct Noted<T> {
    io: T,
    loss: Loss,
    /// When something last came.
    heard: Instant,
}

impl<T> Noted<T> {
    fn failed<R>(&self, result: &Poll<io::Result<R>>) {
        if let Poll::Ready(Err(error)) = result {
            self.loss.set(match error.kind() {
                // TLS says when it is over; who does not has been cut off.
                io::ErrorKind::UnexpectedEof => Cause::Closed,
                _ => Cause::Failed(error.to_string()),
            });
        }
    }
}

impl<T> Drop for Noted<T> {
    /// HTTP/2 drops a connection whose PING was not answered. What ends one otherwise, and is asked about, has just
    /// come through it.
    fn drop(&mut self) {
        let silent = self.heard.elapsed();
        if silent >= PING_TIMEOUT {
            self.loss.set(Cause::Silent(silent));
        }
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Noted<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let read = Pin::new(&mut self.io).poll_read(context, buffer);
        if buffer.filled().len() > before {
            self.heard = Instant::now();
        }
        self.failed(&read);
        read
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Noted<T> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.io).poll_write(context, bytes);
        self.failed(&written);
        written
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = Pin::new(&mut self.io).poll_flush(context);
        self.failed(&flushed);
        flushed
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use std::io::ErrorKind;

    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn silence_is_told_from_quiet() {
        let loss = Loss::default();
        let (near, mut far) = tokio::io::duplex(64);
        let mut noted = loss.note(near);
        far.write_all(b"x").await.unwrap();
        tokio::time::advance(Duration::from_secs(60)).await;
        noted.read_u8().await.unwrap();
        // A PING that was answered just in time.
        tokio::time::advance(Duration::from_secs(9)).await;
        drop(noted);
        assert_eq!(loss.cause(), None);

        let (near, _far) = tokio::io::duplex(64);
        let noted = loss.note(near);
        tokio::time::advance(Duration::from_secs(31)).await;
        drop(noted);
        let cause = loss.cause().unwrap();
        assert_eq!(cause.to_string(), "nothing came for 31 s, no answer to PING either");
    }

    #[tokio::test]
    async fn the_first_failure_is_the_cause() {
        let loss = Loss::default();
        let mut noted = loss.note(Fails([ErrorKind::Other, ErrorKind::ConnectionReset].into()));
        for _ in 0..2 {
            noted.read_u8().await.unwrap_err();
        }
        assert_eq!(loss.cause(), Some(Cause::Failed("connection reset".into())));
        let mut noted = loss.note(Fails([ErrorKind::UnexpectedEof].into()));
        noted.read_u8().await.unwrap_err();
        assert_eq!(loss.cause(), Some(Cause::Closed));
    }

    /// Reads fail like this, the last first.
    struct Fails(Vec<ErrorKind>);

    impl AsyncRead for Fails {
        fn poll_read(
            mut self: Pin<&mut Self>,
            _context: &mut Context<'_>,
            _buffer: &mut ReadBuf<'_>,
        ) -> Poll<io::Result<()>> {
            Poll::Ready(Err(self.0.pop().unwrap().into()))
        }
    }
}
