//! Why a handshake failed.

use super::HANDSHAKE_TIMEOUT;
use mesh_core::{Failure, Reason};
use std::{error::Error, fmt, io};

/// The handshake failed. In Istio's words, with ours behind them.
#[derive(Debug)]
pub enum HandshakeError {
    /// The peer broke the rules of TLS, or is not who it should be.
    Tls(rustls::Error),
    /// The connection broke.
    Io(io::Error),
    /// It took too long.
    Late,
}

impl fmt::Display for HandshakeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tls(error) => write!(f, "tls handshake error: {error}"),
            Self::Io(error) => write!(f, "tls handshake error: {error}"),
            Self::Late => write!(f, "tls handshake error: not done after {HANDSHAKE_TIMEOUT:?}"),
        }
    }
}

impl Error for HandshakeError {}

impl HandshakeError {
    /// The failure, where the peer is whom we connected to.
    #[must_use]
    pub fn upstream(self) -> Failure {
        match self {
            Self::Tls(_) => Failure::upstream(Reason::Tls, self),
            Self::Io(_) | Self::Late => Failure::upstream(Reason::Connect, self),
        }
    }

    /// The failure, where the peer connected to us.
    #[must_use]
    pub fn downstream(self) -> Failure {
        Failure::downstream(Reason::Tls, self)
    }
}
