//! How a tunnel fails, apart from which engine says so.

use std::{error::Error, fmt, time::Duration};

/// The HTTP/2 connection failed. In Istio's words.
#[derive(Debug)]
pub struct Http2Error(Box<dyn Error + Send + Sync>);

impl Http2Error {
    pub(crate) fn new(cause: impl Error + Send + Sync + 'static) -> Self {
        Self(Box::new(cause))
    }
}

impl fmt::Display for Http2Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "h2 failed: {}", self.0)
    }
}

impl Error for Http2Error {}

/// The peer did not answer a PING.
#[derive(Clone, Copy, Debug)]
pub struct Dead(Duration);

impl Dead {
    pub(crate) const fn after(patience: Duration) -> Self {
        Self(patience)
    }
}

impl fmt::Display for Dead {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the peer has not answered a PING for {:?}", self.0)
    }
}

impl Error for Dead {}
