//! Tunnels that come to us.

use crate::{
    Settings, Stream,
    engine::{self, Raw, Responder, keep_alive},
    error::{Dead, Http2Error},
    request::{BadRequest, ResponseHead, TunnelRequest},
    tls::{HANDSHAKE_TIMEOUT, TlsStream},
};
use http::{Response, StatusCode};
use mesh_core::{Failure, Reason};
use rustls::{ServerConfig, pki_types::CertificateDer};
use std::{fmt, net::TcpStream, pin::Pin, sync::Arc};
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
    let mut inner = timeout(HANDSHAKE_TIMEOUT, Box::pin(engine::accept(io, settings)))
        .await
        .map_err(|_elapsed| crate::HandshakeError::Late.downstream())?
        .map_err(|error| Failure::downstream(Reason::Http2, error))?;
    let pings = inner.ping_pong();
    let alive = keep_alive(pings, settings.ping_interval, settings.ping_timeout);
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
            accepted = self.inner.accept() => {
                Some(match accepted? {
                    Ok((request, responder)) => {
                        let head = TunnelRequest::from_http(&request);
                        Ok(Incoming { request: head, body: request.into_body(), responder })
                    }
                    Err(error) => {
                        Err(Failure::downstream(Reason::Http2, engine::failed(error)))
                    }
                })
            }
            dead = &mut self.alive => {
                self.inner.abrupt_shutdown(engine::NO_ERROR);
                self.alive = Box::pin(std::future::pending());
                Some(Err(Failure::downstream(Reason::Http2, dead)))
            }
        }
    }

    /// Takes no more streams, and ends once those that live are over.
    pub fn shutdown_gracefully(&mut self) {
        self.inner.graceful_shutdown();
    }

    /// Ends at once.
    pub fn shutdown_now(&mut self) {
        self.inner.abrupt_shutdown(engine::NO_ERROR);
    }
}

/// A stream that waits for an answer. Dropped without one, it is reset.
pub struct Incoming {
    /// What it asks for.
    pub request: Result<TunnelRequest, BadRequest>,
    body: engine::Body,
    responder: Responder,
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
        let send = self.responder.send_response(head.to_http(), false).map_err(engine::failed)?;
        Ok(Stream::new(Raw::new(send, self.body), None))
    }

    /// Answers with another status than 200, and ends the stream.
    pub fn refuse(mut self, status: u16) {
        let mut response = Response::new(());
        *response.status_mut() =
            StatusCode::from_u16(status).unwrap_or(StatusCode::SERVICE_UNAVAILABLE);
        // Fails where the stream is gone, and then nobody waits for the answer.
        let _gone = self.responder.send_response(response, true);
    }
}
