//! How tunnels are set up.

use std::time::Duration;

/// How tunnels are set up. The defaults bound what a stalled reader can make us hold: a stream's window and two
/// buffers; a connection's window holds 64 streams that are stalled like that before a further one is slowed.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Settings {
    /// The receive window of a stream, in bytes. Istio's default is 4 MiB. Default 1 MiB.
    pub stream_window: u32,
    /// The receive window of a connection, in bytes. Istio's default is 16 MiB, which four stalled streams
    /// fill. Default 64 MiB.
    pub connection_window: u32,
    /// The largest frame to be received, in bytes. Data is passed on as it arrives, and never held for the rest of its
    /// frame. Istio's default is 1 MiB. Default 128 KiB.
    pub frame_size: u32,
    /// What is held for sending on a stream, in bytes. Default 256 KiB.
    pub send_buffer: usize,
    /// Streams that a peer may open. Default 200, as Istio's.
    pub server_streams: u32,
    /// Streams that we open on a tunnel at most. Default 100, as Istio's.
    pub pool_streams: u32,
    /// Tunnels to one place at most, whatever few streams its peer takes on each. Default 1024.
    pub pool_tunnels: usize,
    /// How long a stream waits for room where the peer takes no more. The answer to its CONNECT, behind which an
    /// application may be slow, is waited for six times as long. Default 10 s.
    pub pool_patience: Duration,
    /// How long a tunnel without use is kept. Default 5 min, as Istio's.
    pub pool_idle: Duration,
    /// The time before the first PING and after each answer. Default 10 s, as Istio's.
    pub ping_interval: Duration,
    /// How long the answer to a PING may take. Default 20 s, as Istio's.
    pub ping_timeout: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            stream_window: 1024 * 1024,
            connection_window: 64 * 1024 * 1024,
            frame_size: 128 * 1024,
            send_buffer: 256 * 1024,
            server_streams: 200,
            pool_streams: 100,
            pool_tunnels: 1024,
            pool_patience: Duration::from_secs(10),
            pool_idle: Duration::from_secs(5 * 60),
            ping_interval: Duration::from_secs(10),
            ping_timeout: Duration::from_secs(20),
        }
    }
}
