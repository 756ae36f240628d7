//! Tunnels that come to us.

use crate::{
    Settings, Stream,
    engine::{self, Raw, Response, keep_alive},
    error::{Dead, Http2Error},
    request::{BadRequest, ResponseHead, TunnelRequest},
    tls::{HANDSHAKE_TIMEOUT, TlsStream},
};
use http::{HeaderMap, StatusCode};
use mesh_core::{Failure, Reason};
use rustls::{ServerConfig, pki_types::CertificateDer};
use std::{fmt, future::poll_fn, net::TcpStream, pin::Pin, sync::Arc};
use tokio::time::timeout;

/// A tunnel that came to us. It moves only while somebody waits for its next stream.
pub struct Connection {
    // Boxed: it is large, and moves through many hands before it stays.
    inner: Box<engine::ServerConnection>,
    certificates: Vec<CertificateDer<'static>>,
    alive: Pin<Box<dyn Future<Output = Dead> + Send>>,
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection").finish_non_exhaustive()
    }
}

/// Shakes hands with whoever connected.
///
/// # Errors
///
/// Returns a failure of the downstream side.
pub async fn handshake(
    stream: TcpStream,
    tls: Arc<ServerConfig>,
    settings: &Settings,
) -> Result<Connection, Failure> {
    let io = tokio::net::TcpStream::from_std(stream)
        .map_err(|error| Failure::downstream(Reason::Reset, error))?;
    let io = TlsStream::accept(io, tls).await.map_err(crate::HandshakeError::downstream)?;
    let certificates = io.peer_certificates().to_vec();
    // Who shakes hands and then says nothing is not waited for either.
    let inner = timeout(HANDSHAKE_TIMEOUT, Box::pin(engine::accept(io, settings)))
        .await
        .map_err(|_elapsed| crate::HandshakeError::Late.downstream())?
        .map_err(|error| Failure::downstream(Reason::Http2, error))?;
    let alive =
        keep_alive(Arc::clone(inner.shared()), settings.ping_interval, settings.ping_timeout);
    Ok(Connection { inner: Box::new(inner), certificates, alive: Box::pin(alive) })
}

impl Connection {
    /// The peer's certificates, its own first.
    #[must_use]
    pub fn peer_certificates(&self) -> &[CertificateDer<'static>] {
        &self.certificates
    }

    /// The next stream; `None` once the peer has closed the tunnel.
    ///
    /// # Errors
    ///
    /// Returns how the tunnel broke.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: no stream is lost.
    pub async fn next(&mut self) -> Option<Result<Incoming, Failure>> {
        tokio::select! {
            next = poll_fn(|cx| self.inner.poll_next(cx)) => Some(match next? {
                Ok((head, raw)) => {
                    Ok(Incoming { request: TunnelRequest::from_http(&head), raw: Some(raw) })
                }
                Err(error) => Err(Failure::downstream(Reason::Http2, engine::failed(error))),
            }),
            dead = &mut self.alive => {
                self.inner.end();
                self.alive = Box::pin(std::future::pending());
                Some(Err(Failure::downstream(Reason::Http2, dead)))
            }
        }
    }

    /// Takes no more streams, and ends once those that live are over.
    pub fn shutdown_gracefully(&mut self) {
        self.inner.leave();
    }

    /// Ends at once.
    pub fn shutdown_now(&mut self) {
        self.inner.end();
    }
}

/// A stream that waits for an answer. Dropped without one, it is reset.
pub struct Incoming {
    /// What it asks for.
    pub request: Result<TunnelRequest, BadRequest>,
    raw: Option<Raw>,
}

impl fmt::Debug for Incoming {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Incoming").field("request", &self.request).finish_non_exhaustive()
    }
}

impl Incoming {
    /// Answers 200.
    ///
    /// # Errors
    ///
    /// Returns an error where the stream is gone.
    pub fn accept(mut self, head: &ResponseHead) -> Result<Stream, Http2Error> {
        let raw = self.raw.take().ok_or_else(|| engine::failed(engine::Error::Closed))?;
        match raw.respond(&head.to_http(), false) {
            Ok(()) => Ok(Stream::new(raw, None)),
            Err(error) => Err(engine::failed(error)),
        }
    }

    /// Answers with another status than 200, and ends the stream.
    pub fn refuse(mut self, status: u16) {
        let status = StatusCode::from_u16(status).unwrap_or(StatusCode::SERVICE_UNAVAILABLE);
        if let Some(raw) = self.raw.take() {
            // Fails where the stream is gone, and then nobody waits for the answer.
            let _gone = raw.respond(&Response { status, headers: HeaderMap::new() }, true);
        }
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        if let Some(raw) = &self.raw {
            raw.reset();
        }
    }
}
