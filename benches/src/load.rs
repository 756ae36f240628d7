//! The load: what the two ends of every row do.
//!
//! A server answers on five ports, one for each kind of work; a client does one kind of work for some seconds and
//! reports what it did. A thread per connection and blocking calls: nothing to tune, nothing to get wrong.

pub mod client;
pub mod server;

use std::time::Duration;

/// Bytes of a short connection's question and of its answer.
pub const SHORT: usize = 64;
/// Bytes of the body of every HTTP answer.
pub const BODY: usize = 1024;
/// How long one end waits for the other before it calls the run broken.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// The ports on which a server answers, one for each kind of work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ports {
    /// Takes bytes until their end and answers with their count (8 bytes, big endian).
    pub sink: u16,
    /// Echoes.
    pub echo: u16,
    /// HTTP/1.1 with keep-alive: a body of [`BODY`] bytes for every request.
    pub http: u16,
    /// Reads [`SHORT`] bytes, echoes them and closes.
    pub short: u16,
    /// Echoes one byte, then holds the connection until the server ends.
    pub hold: u16,
}

impl Ports {
    /// Five ports from this one upwards.
    #[must_use]
    pub const fn from(first: u16) -> Self {
        Self { sink: first, echo: first + 1, http: first + 2, short: first + 3, hold: first + 4 }
    }
}
