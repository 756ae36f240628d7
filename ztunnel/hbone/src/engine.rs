//! HTTP/2 framing. Private, and the only module that names the crate that does it, so that another can
//! take its place.

use crate::{
    Settings,
    error::{Dead, Http2Error},
    tls::TlsStream,
};
use bytes::Bytes;
use std::{
    io,
    task::{Context, Poll, Waker, ready},
    time::Duration,
};
use tokio::time::{sleep, timeout};

pub(crate) type ClientConnection = h2::client::Connection<TlsStream, Bytes>;
pub(crate) type ServerConnection = h2::server::Connection<TlsStream, Bytes>;
pub(crate) type Requests = h2::client::SendRequest<Bytes>;
pub(crate) type Answer = h2::client::ResponseFuture;
pub(crate) type Answered = Result<http::Response<Body>, h2::Error>;
pub(crate) type Responder = h2::server::SendResponse<Bytes>;
pub(crate) type Body = h2::RecvStream;

/// The largest list of headers that a client may send, in bytes.
const SERVER_HEADERS: u32 = 64 * 1024;
/// The largest list of headers that a server may send, in bytes.
const CLIENT_HEADERS: u32 = 16 * 1024;
/// Streams that a peer may open and reset before we have seen them (rapid reset, CVE-2023-44487).
const PENDING_RESETS: usize = 20;
/// Streams that we may have to reset for a peer's errors before it is cut off.
const LOCAL_RESETS: usize = 1024;
/// Reset streams that are remembered.
const REMEMBERED_RESETS: usize = 50;

pub(crate) fn failed(error: h2::Error) -> Http2Error {
    Http2Error::new(error)
}

pub(crate) async fn connect(
    io: TlsStream,
    settings: &Settings,
) -> Result<(Requests, ClientConnection), Http2Error> {
    crate::buffers::prepare();
    let streams = usize::try_from(settings.pool_streams).unwrap_or(usize::MAX);
    h2::client::Builder::new()
        .initial_window_size(settings.stream_window)
        .initial_connection_window_size(settings.connection_window)
        .max_frame_size(settings.frame_size)
        .max_header_list_size(CLIENT_HEADERS)
        .initial_max_send_streams(streams)
        .max_send_buffer_size(settings.send_buffer)
        .max_concurrent_reset_streams(REMEMBERED_RESETS)
        .enable_push(false)
        .handshake(io)
        .await
        .map_err(failed)
}

pub(crate) async fn accept(
    io: TlsStream,
    settings: &Settings,
) -> Result<ServerConnection, Http2Error> {
    crate::buffers::prepare();
    h2::server::Builder::new()
        .initial_window_size(settings.stream_window)
        .initial_connection_window_size(settings.connection_window)
        .max_frame_size(settings.frame_size)
        .max_header_list_size(SERVER_HEADERS)
        .max_concurrent_streams(settings.server_streams)
        .max_send_buffer_size(settings.send_buffer)
        .max_pending_accept_reset_streams(PENDING_RESETS)
        .max_local_error_reset_streams(Some(LOCAL_RESETS))
        .max_concurrent_reset_streams(REMEMBERED_RESETS)
        .handshake(io)
        .await
        .map_err(failed)
}

/// Pings the peer until it does not answer in time.
pub(crate) async fn keep_alive(
    pings: Option<h2::PingPong>,
    interval: Duration,
    patience: Duration,
) -> Dead {
    let Some(mut pings) = pings else { return std::future::pending().await };
    loop {
        sleep(interval).await;
        match timeout(patience, pings.ping(h2::Ping::opaque())).await {
            Ok(Ok(_pong)) => {}
            // The connection has ended, as whoever drives it sees.
            Ok(Err(_)) => return std::future::pending().await,
            Err(_elapsed) => return Dead::after(patience),
        }
    }
}

/// What a stream's end means.
pub(crate) enum End {
    /// All was sent.
    Clean,
    /// It was cut off.
    Reset(io::Error),
}

/// `NO_ERROR` is an end: who sent it has heard enough. All else before `END_STREAM` is a cut.
pub(crate) fn end_of(error: h2::Error) -> End {
    if error.is_reset() && error.reason() == Some(h2::Reason::NO_ERROR) {
        return End::Clean;
    }
    if error.is_io() {
        return match error.into_io() {
            Some(io) => End::Reset(io),
            None => End::Reset(io::ErrorKind::ConnectionReset.into()),
        };
    }
    End::Reset(io::Error::new(io::ErrorKind::ConnectionReset, failed(error)))
}

/// The two directions of a stream.
pub(crate) struct Raw {
    send: h2::SendStream<Bytes>,
    recv: Body,
    /// Room was asked for, which is then missing from the connection's window.
    asked: bool,
}

impl Raw {
    pub(crate) const fn new(send: h2::SendStream<Bytes>, recv: Body) -> Self {
        Self { send, recv, asked: false }
    }

    /// Waits for room to send, of up to `want` bytes; none where the peer wants no more.
    pub(crate) fn poll_room(
        &mut self,
        cx: &mut Context<'_>,
        want: usize,
    ) -> Poll<io::Result<usize>> {
        self.send.reserve_capacity(want);
        self.asked = true;
        loop {
            let room = self.send.capacity();
            if room > 0 {
                return Poll::Ready(Ok(room));
            }
            match ready!(self.send.poll_capacity(cx)) {
                Some(Ok(_)) => {}
                Some(Err(error)) => return Poll::Ready(Err(cut(error))),
                None => return Poll::Ready(self.closed().map(|()| 0)),
            }
        }
    }

    /// What is sent to who wants no more is dropped.
    pub(crate) fn send(&mut self, data: Bytes, last: bool) -> io::Result<()> {
        self.send.send_data(data, last).or_else(|_| self.closed())
    }

    /// Why nothing can be sent: fine where the peer wants no more.
    fn closed(&mut self) -> io::Result<()> {
        match self.poll_reset(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(why) => why,
            Poll::Pending => Err(io::ErrorKind::BrokenPipe.into()),
        }
    }

    /// Gives back room that was asked for and is not used: others of the connection have need of it.
    pub(crate) fn keep_no_room(&mut self) {
        if self.asked {
            self.asked = false;
            self.send.reserve_capacity(0);
        }
    }

    /// Ready once the peer takes no more: having heard enough, or cut off.
    pub(crate) fn poll_reset(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(match ready!(self.send.poll_reset(cx)) {
            Ok(h2::Reason::NO_ERROR) => Ok(()),
            Ok(reason) => Err(cut(reason.into())),
            Err(error) => Err(cut(error)),
        })
    }

    pub(crate) fn reset(&mut self) {
        self.send.send_reset(h2::Reason::CANCEL);
    }

    pub(crate) fn poll_data(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Result<Option<Bytes>, io::Error>> {
        match ready!(self.recv.poll_data(cx)) {
            Some(Ok(data)) => Poll::Ready(Ok(Some(data))),
            None => Poll::Ready(Ok(None)),
            Some(Err(error)) => match end_of(error) {
                End::Clean => Poll::Ready(Ok(None)),
                End::Reset(error) => Poll::Ready(Err(error)),
            },
        }
    }

    pub(crate) fn release(&mut self, bytes: usize) {
        // Fails only where the stream is over, and then there is nothing to release.
        let _over = self.recv.flow_control().release_capacity(bytes);
    }
}

fn cut(error: h2::Error) -> io::Error {
    match end_of(error) {
        End::Clean => io::ErrorKind::BrokenPipe.into(),
        End::Reset(error) => error,
    }
}

/// The sending half of a request that waits for its answer.
pub(crate) type Send = h2::SendStream<Bytes>;

/// Says why a connection ends, where nothing is wrong.
pub(crate) const NO_ERROR: h2::Reason = h2::Reason::NO_ERROR;

/// Cancels a request.
pub(crate) fn cancel(send: &mut Send) {
    send.send_reset(h2::Reason::CANCEL);
}

/// Whether the connection takes no more requests: it is over, or the peer has said that it leaves.
pub(crate) fn is_leaving(requests: &Requests) -> bool {
    let ready = requests.clone().poll_ready(&mut Context::from_waker(Waker::noop()));
    matches!(ready, Poll::Ready(Err(_)))
}

/// Whether the peer says that it did not look at the request: it may be sent again elsewhere.
pub(crate) fn was_not_processed(error: &h2::Error) -> bool {
    let said_so = (error.is_go_away() && error.reason() == Some(NO_ERROR))
        || (error.is_reset() && error.reason() == Some(h2::Reason::REFUSED_STREAM));
    said_so && error.is_remote()
}
