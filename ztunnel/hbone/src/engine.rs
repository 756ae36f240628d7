//! HTTP/2 as tunnels need it: RFC 9113, written for streams that carry bytes and little else. Private.
//!
//! | module | what |
//! |---|---|
//! | `frame`, `hpack`, `fields` | what is on the wire |
//! | `state`, `shared` | a connection's streams and windows, without its socket; and under their lock |
//! | `receive`, `meaning`, `send` | frames into the state, what they mean to it, and out of it |
//! | `queue` | what waits on a stream |
//! | `drive` | the task that moves a connection |
//! | `hold` | a stream and a connection, as others hold them |
//!
//! Data is decrypted where it was received and passed on from there, and encrypted where it was read to: it is
//! copied by the kernel alone. A DATA frame is passed on as it arrives. Priorities are read and have no effect; there
//! is no push; what we send is not compressed against what was sent before.

mod drive;
mod fields;
mod frame;
mod hold;
mod hpack;
mod meaning;
mod queue;
mod receive;
mod send;
mod shared;
mod state;
#[cfg(test)]
mod tests;

pub(crate) use self::{
    drive::{ClientConnection, ServerConnection},
    fields::{Request, Response},
    frame::{Error, Reason},
    hold::{Asked, Got, Raw, Requests},
    shared::Shared,
};
use crate::{
    error::{Dead, Http2Error},
    tls::TlsStream,
};
use std::{future::poll_fn, sync::Arc, task::Poll, time::Duration};
use tokio::time::{sleep, timeout};

pub(crate) fn failed(error: Error) -> Http2Error {
    Http2Error::new(error)
}

/// Speaks HTTP/2 as the client. Whoever holds the connection has to move it.
pub(crate) fn connect(tls: TlsStream, settings: &crate::Settings) -> (Requests, ClientConnection) {
    ClientConnection::new(tls, settings)
}

/// Speaks HTTP/2 as the server.
pub(crate) async fn accept(
    tls: TlsStream,
    settings: &crate::Settings,
) -> Result<ServerConnection, Http2Error> {
    ServerConnection::accept(tls, settings).await.map_err(failed)
}

/// Pings the peer until it does not answer in time.
pub(crate) async fn keep_alive(
    shared: Arc<Shared>,
    interval: Duration,
    patience: Duration,
) -> Dead {
    loop {
        sleep(interval).await;
        shared.with(state::Inner::ask);
        let answered = poll_fn(|cx| shared.with(|inner| inner.poll_answered(cx)));
        if timeout(patience, answered).await.is_err() {
            return Dead::after(patience);
        }
    }
}

impl state::Inner {
    /// Sends a PING.
    fn ask(&mut self) {
        self.ping = state::Ping::Sent;
        frame::put(&mut self.control, frame::kind::PING, 0, 0, &[0; 8]);
        self.kick();
    }

    /// Waits for its answer; without end where the connection has ended, as whoever drives it sees.
    fn poll_answered(&mut self, cx: &std::task::Context<'_>) -> Poll<()> {
        if self.ping == state::Ping::Answered {
            return Poll::Ready(());
        }
        self.pinger = Some(cx.waker().clone());
        Poll::Pending
    }
}

/// Whether the peer says that it did not look at the request: it may be sent again elsewhere.
pub(crate) const fn was_not_processed(error: &Error) -> bool {
    matches!(
        error,
        Error::Left(Reason::NO_ERROR) | Error::Reset(Reason::REFUSED_STREAM, frame::By::Peer, _)
    )
}

/// Reads this as what a client says first, behind its greeting, in two pieces.
///
/// # Panics
///
/// Panics where a window is out of its bounds after it.
pub(crate) fn fuzz(bytes: &[u8]) {
    let mut inner = state::Inner::new(state::Role::Server, &crate::Settings::default());
    let mut parser = receive::Parser::new(state::Role::Server);
    let mut greeting = frame::PREFACE.to_vec();
    frame::put(&mut greeting, frame::kind::SETTINGS, 0, 0, &[]);
    let (first, second) = bytes.split_at(bytes.len() / 2);
    let mut pieces = Vec::new();
    for part in [&greeting[..], first, second] {
        if parser.read(part, 0, &mut inner, &mut pieces).is_err() {
            break;
        }
    }
    let windows = [inner.receive_window, i64::from(inner.limits.connection_window)];
    assert!(windows.is_sorted(), "more was released than was received: {windows:?}");
    for (_, entry) in &inner.entries {
        let windows = [entry.receive_window, i64::from(inner.limits.stream_window)];
        assert!(windows.is_sorted(), "more was released than was received: {windows:?}");
    }
}

/// Reads this as a block of headers, twice: the second time with the tables of the first.
pub(crate) fn fuzz_headers(bytes: &[u8]) {
    let mut decoder = hpack::Decoder::new();
    for _ in 0..2 {
        let mut fields = fields::Fields::default();
        let read = decoder.decode(bytes, |name, value| fields.add(name, value, 1024));
        if read.is_ok() {
            let _message = fields.request();
        }
    }
}
