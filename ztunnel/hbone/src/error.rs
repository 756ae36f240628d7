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

/// The peer takes no more streams, and did not for so long.
#[derive(Clone, Copy, Debug)]
pub(crate) enum NoRoom {
    /// It takes no more than these.
    Few(usize, Duration),
    /// It has as many as it takes, on as many tunnels as we want.
    Full(usize, Duration),
}

impl fmt::Display for NoRoom {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Few(streams, patience) => write!(
                f,
                "the far end takes no more streams: its SETTINGS_MAX_CONCURRENT_STREAMS is {streams}, and \
                 there was no room for {patience:?}"
            ),
            Self::Full(tunnels, patience) => {
                write!(
                    f,
                    "all {tunnels} tunnels to the far end are full, and there was no room for {patience:?}"
                )
            }
        }
    }
}

impl Error for NoRoom {}

/// The peer has not answered a CONNECT.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Unanswered(pub(crate) Duration);

impl fmt::Display for Unanswered {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the far end has not answered the CONNECT for {:?}", self.0)
    }
}

impl Error for Unanswered {}
