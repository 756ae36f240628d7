//! Moves a connection: what is received goes to the streams, and what they say goes out. One task for both.

use super::{
    fields::Request,
    frame::{By, Error, Reason},
    hold::{Raw, Requests, next_request},
    receive::{Parser, Piece},
    shared::Shared,
    state::{Entry, Inner, Leaving, Role, want},
};
use crate::{Settings, tls::TlsStream};
use bytes::Bytes;
use std::{
    fmt,
    ops::Range,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

/// Batches that are read before other tasks of the thread get a turn: what was received is passed on while it
/// is in the processor's cache.
const TURN: usize = 4;

/// What waits for a peer that does not read, in bytes, before we read no more of it.
const UNSENT: usize = 64 * 1024;

/// Pieces from this size on are passed on where they lie, in bytes, and keep the whole buffer for as long.
const WHOLE: usize = 8 * 1024;

/// Buffers that pieces of one stream keep like that. Who does not read has its data copied.
const SHARED: u8 = 2;

/// How far it has come.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Phase {
    Open,
    /// The last frames go out, and then the end.
    Closing,
    Over,
}

/// One connection, as its task sees it.
pub(crate) struct Driver {
    shared: Arc<Shared>,
    tls: TlsStream,
    parser: Parser,
    phase: Phase,
    /// Nobody waits for the last frames to go out.
    at_once: bool,
    ranges: Vec<Range<usize>>,
    pieces: Vec<Piece>,
}

impl fmt::Debug for Driver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Driver").field("tls", &self.tls).finish_non_exhaustive()
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        self.shared.with(|inner| inner.end(&Error::Closed));
    }
}

impl Driver {
    fn new(role: Role, tls: TlsStream, settings: &Settings) -> Self {
        Self {
            shared: Shared::new(Inner::new(role, settings)),
            tls,
            parser: Parser::new(role),
            phase: Phase::Open,
            at_once: false,
            ranges: Vec::new(),
            pieces: Vec::new(),
        }
    }

    /// Moves it as far as it goes, until it is over.
    fn poll_drive(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        loop {
            match self.phase {
                Phase::Open => {}
                Phase::Closing => {
                    // Whether it arrives changes nothing.
                    if self.poll_last(cx).is_pending() && !self.at_once {
                        return Poll::Pending;
                    }
                    self.phase = Phase::Over;
                    continue;
                }
                Phase::Over => {
                    let ended = self.shared.with(|inner| inner.ended.clone());
                    return Poll::Ready(match ended {
                        None | Some(Error::Closed) => Ok(()),
                        Some(error) => Err(error),
                    });
                }
            }
            let (read, sent) = (self.poll_read(cx), self.poll_send(cx));
            let error = match (read, sent) {
                (Poll::Ready(Err(error)), _) | (_, Poll::Ready(Err(error))) => error,
                (Poll::Ready(Ok(())), _) => {
                    // There may be more: after the others.
                    cx.waker().wake_by_ref();
                    return Poll::Pending;
                }
                (Poll::Pending, sent) => {
                    let (over, more) = self.shared.with(|inner| {
                        match &mut inner.driver {
                            Some(waker) => waker.clone_from(cx.waker()),
                            none => *none = Some(cx.waker().clone()),
                        }
                        (inner.is_over(), inner.has_output())
                    });
                    if over {
                        self.finish(&Error::Closed, Some(Reason::NO_ERROR));
                        continue;
                    }
                    // All was sent, and something may have come up meanwhile.
                    if sent.is_ready() && more {
                        continue;
                    }
                    return Poll::Pending;
                }
            };
            let goodbye = match &error {
                Error::GoAway(reason, By::Us, _) => Some(*reason),
                _ => None,
            };
            self.finish(&error, goodbye);
        }
    }

    /// It is over; the peer is told why, where it can be.
    fn finish(&mut self, error: &Error, goodbye: Option<Reason>) {
        self.phase = if matches!(error, Error::Io(..)) { Phase::Over } else { Phase::Closing };
        self.shared.with(|inner| {
            if let Some(reason) = goodbye {
                inner.say_goodbye(inner.last, reason);
            }
            inner.end(error);
        });
    }

    /// Ready with `Ok` after its turn, where there may be more.
    fn poll_read(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        for _ in 0..TURN {
            // Who sends us what wants an answer, and does not read it, is not read either.
            if self.shared.with(|inner| inner.control.len()) > UNSENT {
                match self.poll_send(cx) {
                    Poll::Ready(sent) => sent?,
                    Poll::Pending => return Poll::Pending,
                }
            }
            self.ranges.clear();
            match self.tls.poll_plain(cx, &mut self.ranges) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error.into())),
                Poll::Ready(Ok(false)) => {
                    let clean = self
                        .shared
                        .with(|inner| inner.ids.is_empty() || inner.role == Role::Server);
                    let error = if clean {
                        Error::Closed
                    } else {
                        let eof = std::io::ErrorKind::UnexpectedEof;
                        Error::Io(eof, "the peer closed the connection".into())
                    };
                    return Poll::Ready(Err(error));
                }
                Poll::Ready(Ok(true)) => self.process()?,
            }
        }
        Poll::Ready(Ok(()))
    }

    /// Has the streams have what was received.
    fn process(&mut self) -> Result<(), Error> {
        let Self { shared, tls, parser, ranges, pieces, .. } = self;
        pieces.clear();
        let read = shared.with(|inner| {
            let plain = tls.plain();
            let mut read = Ok(());
            for range in &*ranges {
                let bytes = plain.get(range.clone()).unwrap_or_default();
                read = parser.read(bytes, range.start, inner, pieces);
                if read.is_err() {
                    break;
                }
            }
            let whole = inner.may_share_any(pieces).then(|| tls.freeze());
            let plain = whole.as_deref().unwrap_or_else(|| tls.plain());
            inner.deliver(pieces, whole.as_ref(), plain);
            read
        });
        tls.done();
        if self.pieces.capacity() > TURN * 8 {
            self.pieces = Vec::new();
        }
        read
    }

    /// Ready once all is sent.
    fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        loop {
            match self.tls.poll_send(cx) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(sent) => sent.map_err(Error::from)?,
            }
            let mut parcels = Vec::new();
            self.shared.with(|inner| {
                if inner.has_output() {
                    inner.collect(&mut parcels);
                }
            });
            if parcels.is_empty() {
                return Poll::Ready(Ok(()));
            }
            for parcel in parcels {
                self.tls.queue(parcel)?;
            }
        }
    }

    fn poll_last(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        match self.poll_send(cx) {
            Poll::Ready(Ok(())) => self.tls.poll_close(cx).map_err(Error::from),
            other => other,
        }
    }
}

impl Inner {
    /// Whether there is nothing left to do for it.
    fn is_over(&self) -> bool {
        if self.has_output() || !self.ids.is_empty() {
            return false;
        }
        match self.role {
            Role::Client => {
                self.left.is_some()
                    || (self.holders == 0 && self.pending.is_empty() && self.entries.is_empty())
            }
            Role::Server => self.leaving == Leaving::Final,
        }
    }

    /// Whether one of these pieces may keep the buffer that they lie in.
    pub(super) fn may_share_any(&self, pieces: &[Piece]) -> bool {
        pieces.iter().any(|piece| {
            let entry = self.entries.get(piece.key).filter(|entry| entry.takes(piece));
            piece.range.len() >= WHOLE && entry.is_some_and(|entry| entry.shared < SHARED)
        })
    }

    /// Adds what was received, which lies in `plain`, to its streams; `whole` is the buffer, where it may be shared.
    pub(super) fn deliver(&mut self, pieces: &[Piece], whole: Option<&Bytes>, plain: &[u8]) {
        self.batch = self.batch.wrapping_add(1);
        for piece in pieces {
            let bytes = plain.get(piece.range.clone()).unwrap_or_default();
            let entry = self.entries.get_mut(piece.key).filter(|entry| entry.takes(piece));
            let Some(entry) = entry else { continue };
            let first = entry.batch != self.batch;
            let shares = bytes.len() >= WHOLE && (!first || entry.shared < SHARED);
            match whole.filter(|_| shares) {
                Some(whole) => {
                    if first {
                        entry.batch = self.batch;
                        entry.shared += 1;
                    }
                    entry.received.put(whole.slice_ref(bytes));
                }
                None => entry.received.put_copy(bytes),
            }
            self.tell(piece.key, want::READ);
        }
    }
}

impl Entry {
    /// Whether a piece is for this stream: it may be over since, or its place another's.
    const fn takes(&self, piece: &Piece) -> bool {
        self.id == piece.id && self.held
    }
}

/// A connection that we opened. It completes once it is over.
#[derive(Debug)]
pub(crate) struct ClientConnection(Driver);

impl ClientConnection {
    pub(crate) fn new(tls: TlsStream, settings: &Settings) -> (Requests, Self) {
        let driver = Driver::new(Role::Client, tls, settings);
        (Requests::of(&driver.shared), Self(driver))
    }

    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.0.shared
    }
}

impl Future for ClientConnection {
    type Output = Result<(), Error>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        self.0.poll_drive(cx)
    }
}

/// A connection that came to us.
#[derive(Debug)]
pub(crate) struct ServerConnection(Driver);

impl ServerConnection {
    /// Waits until the client has begun to speak HTTP/2.
    pub(crate) async fn accept(tls: TlsStream, settings: &Settings) -> Result<Self, Error> {
        let mut this = Self(Driver::new(Role::Server, tls, settings));
        std::future::poll_fn(|cx| match this.0.poll_drive(cx) {
            Poll::Ready(ended) => Poll::Ready(ended.and(Err(Error::Closed))),
            Poll::Pending if this.0.parser.has_begun() => Poll::Ready(Ok(())),
            Poll::Pending => Poll::Pending,
        })
        .await?;
        Ok(this)
    }

    /// The next request; `None` once the connection is over.
    pub(crate) fn poll_next(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<(Request, Raw), Error>>> {
        let driven = self.0.poll_drive(cx);
        if let Some(next) = next_request(&self.0.shared) {
            return Poll::Ready(Some(Ok(next)));
        }
        driven.map(|ended| ended.err().map(Err))
    }

    /// Takes no more streams, and ends once those that live are over.
    pub(crate) fn leave(&self) {
        self.0.shared.with(Inner::leave);
    }

    /// Ends at once.
    pub(crate) fn end(&mut self) {
        self.0.at_once = true;
        if self.0.phase == Phase::Open {
            self.0.finish(&Error::Closed, Some(Reason::NO_ERROR));
        }
    }

    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.0.shared
    }
}
