//! Where connections to the scripted control plane come in, and what can go wrong there.

use std::{
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll},
};

use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf},
    net::TcpStream,
};

/// What becomes of those who connect.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Fault {
    /// They are served.
    #[default]
    None,
    /// They are turned away at once.
    Gone,
    /// They are taken, and nobody says anything.
    Silent,
    /// They get bytes that are not TLS.
    Garbage,
    /// They get TLS, and in it bytes that are not HTTP/2.
    GarbageInside,
}

/// Bytes that mean nothing to anybody.
const NOISE: [u8; 64] = [0x5a; 64];

/// Serves one that is not to be served.
pub(super) async fn fail(fault: Fault, mut tcp: TcpStream, tls: &tokio_rustls::TlsAcceptor) {
    match fault {
        Fault::None | Fault::Gone => {}
        Fault::Silent => std::future::pending().await,
        Fault::Garbage => {
            let _gone = tcp.write_all(&NOISE).await;
            let _gone = tcp.shutdown().await;
        }
        Fault::GarbageInside => {
            let Ok(mut tls) = tls.accept(tcp).await else { return };
            let _gone = tls.write_all(&NOISE).await;
            let _gone = tls.shutdown().await;
        }
    }
}

/// How many bytes may still be sent on all connections together. Once they are over, every connection breaks.
#[derive(Clone, Debug)]
pub(super) struct Budget(Arc<AtomicUsize>);

impl Default for Budget {
    fn default() -> Self {
        Self(Arc::new(AtomicUsize::new(usize::MAX)))
    }
}

impl Budget {
    pub(super) fn set(&self, bytes: usize) {
        self.0.store(bytes, Ordering::SeqCst);
    }
}

/// A connection that breaks with its budget.
#[derive(Debug)]
pub(super) struct Bounded {
    pub(super) tcp: TcpStream,
    pub(super) budget: Budget,
}

impl AsyncRead for Bounded {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tcp).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Bounded {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let left = self.budget.0.load(Ordering::SeqCst);
        if left == 0 {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        let some = bytes.get(..bytes.len().min(left)).unwrap_or(bytes);
        let written = Pin::new(&mut self.tcp).poll_write(cx, some);
        if let Poll::Ready(Ok(written)) = &written
            && left != usize::MAX
        {
            self.budget.0.store(left.saturating_sub(*written), Ordering::SeqCst);
        }
        written
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tcp).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tcp).poll_shutdown(cx)
    }
}
