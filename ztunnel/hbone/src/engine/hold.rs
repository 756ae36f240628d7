//! A stream and a connection, as those who use them hold them.

use super::{
    fields::{Request, Response},
    frame::{By, Error, Reason},
    shared::Shared,
    state::{Half, Head, Inner, listed, want},
};
use crate::parcel::{Chunk, MOST_PAYLOAD};
use std::{
    fmt, io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll},
};

/// What there was to take from a stream.
#[derive(Debug)]
pub(crate) enum Got {
    Chunk(Chunk),
    Nothing,
    End,
}

/// A stream. Dropped, it is forgotten; who wants it cut off says so.
pub(crate) struct Raw {
    shared: Arc<Shared>,
    key: usize,
}

impl fmt::Debug for Raw {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Raw").field("key", &self.key).finish_non_exhaustive()
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        self.shared.with(|inner| inner.let_go(self.key));
    }
}

/// How a stream's end shows: `NO_ERROR` is an end, because who sent it has heard enough. All else is a cut.
fn cut(error: &Error) -> Option<io::Error> {
    match error {
        Error::Reset(Reason::NO_ERROR, By::Peer, _) => None,
        Error::Io(kind, _) => Some(io::Error::new(*kind, error.clone())),
        _ => Some(io::Error::new(io::ErrorKind::ConnectionReset, error.clone())),
    }
}

/// Why nothing can be sent: fine where the peer wants no more.
fn closed(error: Option<&Error>) -> io::Result<()> {
    match error {
        Some(error) => cut(error).map_or(Ok(()), Err),
        None => Err(io::ErrorKind::BrokenPipe.into()),
    }
}

fn wait(inner: &mut Inner, key: usize, what: u8, cx: &Context<'_>) {
    if let Some(entry) = inner.entries.get_mut(key) {
        entry.wants |= what;
        match &mut entry.waker {
            Some(waker) => waker.clone_from(cx.waker()),
            none => *none = Some(cx.waker().clone()),
        }
    }
}

impl Raw {
    /// Waits until there is something to take.
    pub(crate) fn poll_readable(&self, cx: &Context<'_>) -> Poll<()> {
        self.shared.with(|inner| match inner.entries.get(self.key) {
            Some(entry) if entry.received.is_empty() && entry.receiving == Half::Open => {
                wait(inner, self.key, want::READ, cx);
                Poll::Pending
            }
            _ => Poll::Ready(()),
        })
    }

    /// Takes up to so many bytes.
    pub(crate) fn take(&self, room: usize) -> io::Result<Got> {
        self.shared.with(|inner| {
            let Some(entry) = inner.entries.get_mut(self.key) else { return Ok(Got::End) };
            let room = room.min(MOST_PAYLOAD);
            if !entry.received.is_empty() {
                let chunk = match entry.received.take_only(room) {
                    Some(only) => only.into(),
                    None => entry.received.take(room).into(),
                };
                if entry.received.is_empty() {
                    entry.shared = 0;
                }
                return Ok(Got::Chunk(chunk));
            }
            if entry.receiving == Half::Open {
                return Ok(Got::Nothing);
            }
            entry.error.as_deref().and_then(cut).map_or(Ok(Got::End), Err)
        })
    }

    /// So many bytes have been passed on: the peer may send as many again.
    pub(crate) fn release(&self, bytes: usize) {
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
        self.shared.with(|inner| inner.release_stream(self.key, bytes));
    }

    /// Waits for room to send; none where the peer wants no more.
    pub(crate) fn poll_room(&self, cx: &Context<'_>) -> Poll<io::Result<usize>> {
        self.shared.with(|inner| {
            let Some(entry) = inner.entries.get_mut(self.key) else {
                return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
            };
            if entry.sending != Half::Open {
                return Poll::Ready(closed(entry.error.as_deref()).map(|()| 0));
            }
            let queued = usize::try_from(entry.queued).unwrap_or(usize::MAX);
            let reserved = i64::from(entry.reserved);
            let room = inner.limits.send_buffer.saturating_sub(queued).min(MOST_PAYLOAD);
            let room = i64::try_from(room).unwrap_or(i64::MAX);
            // What was promised before counts as free.
            let mine = entry.send_window + reserved;
            let all = inner.send_window + reserved;
            let room = room.min(mine).min(all).max(0);
            entry.send_window = mine - room;
            inner.send_window = all - room;
            entry.reserved = u32::try_from(room).unwrap_or_default();
            if room > 0 {
                return Poll::Ready(Ok(usize::try_from(room).unwrap_or_default()));
            }
            if all <= 0 && entry.listed & listed::STARVED == 0 {
                entry.listed |= listed::STARVED;
                inner.starved.push_back(self.key);
            }
            wait(inner, self.key, want::ROOM, cx);
            Poll::Pending
        })
    }

    /// Gives back room that was asked for and is not used: others of the connection have need of it.
    pub(crate) fn keep_no_room(&self) {
        self.shared.with(|inner| inner.unreserve(self.key));
    }

    /// Sends what there is room for. What is sent to who wants no more is dropped.
    pub(crate) fn give(&self, chunk: Chunk) -> io::Result<()> {
        self.shared.with(|inner| {
            let Some(entry) = inner.entries.get(self.key) else {
                return Err(io::ErrorKind::BrokenPipe.into());
            };
            if entry.sending == Half::Open {
                inner.queue(self.key, chunk);
                return Ok(());
            }
            closed(entry.error.as_deref())
        })
    }

    /// Says that this was all.
    pub(crate) fn finish(&self) -> io::Result<()> {
        self.shared.with(|inner| {
            inner.unreserve(self.key);
            let Some(entry) = inner.entries.get_mut(self.key) else { return Ok(()) };
            if entry.sending == Half::Open {
                entry.sending = Half::Ending;
                inner.line_up(self.key);
                return Ok(());
            }
            entry.error.as_deref().and_then(cut).map_or(Ok(()), Err)
        })
    }

    /// Ready once the peer takes no more: having heard enough, or cut off.
    pub(crate) fn poll_cut(&self, cx: &Context<'_>) -> Poll<io::Result<()>> {
        self.shared.with(|inner| {
            let error = inner.entries.get(self.key).map(|entry| entry.error.as_deref());
            match error {
                Some(None) => {
                    wait(inner, self.key, want::CUT, cx);
                    Poll::Pending
                }
                Some(Some(error)) => Poll::Ready(cut(error).map_or(Ok(()), Err)),
                None => Poll::Ready(Ok(())),
            }
        })
    }

    /// Cuts the stream off.
    pub(crate) fn reset(&self) {
        self.shared.with(|inner| inner.reset(self.key, Reason::CANCEL, Error::Closed));
    }

    /// Answers a request that was accepted.
    pub(crate) fn respond(&self, response: &Response, last: bool) -> Result<(), Error> {
        self.shared.with(|inner| {
            let entry = inner.entries.get_mut(self.key).ok_or(Error::Closed)?;
            if entry.sending != Half::Open {
                return Err(entry.error.as_deref().cloned().unwrap_or(Error::Closed));
            }
            let id = entry.id;
            if last {
                entry.sending = Half::Ended;
            }
            inner.send_head(id, last, |block, first| response.encode(block, first));
            inner.kick();
            if last {
                // Who has answered in full has heard enough (RFC 9113, section 8.1).
                let open = inner.entries.get(self.key).map(|entry| entry.receiving);
                if open == Some(Half::Open) {
                    inner.reset(self.key, Reason::NO_ERROR, Error::Closed);
                }
                inner.close(self.key, false);
            }
            Ok(())
        })
    }
}

/// A request that was sent, and waits for its answer. Dropped before, it is cancelled.
#[derive(Debug)]
pub(crate) struct Asked(Option<Raw>);

impl Drop for Asked {
    fn drop(&mut self) {
        if let Some(raw) = &self.0 {
            raw.reset();
        }
    }
}

impl Future for Asked {
    type Output = Result<Response, Error>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let Some(raw) = &self.0 else { return Poll::Ready(Err(Error::Closed)) };
        raw.shared.with(|inner| {
            let Some(entry) = inner.entries.get_mut(raw.key) else {
                return Poll::Ready(Err(Error::Closed));
            };
            if let Head::Response(_) = entry.head
                && let Head::Response(response) = std::mem::replace(&mut entry.head, Head::None)
            {
                return Poll::Ready(Ok(*response));
            }
            if let Some(error) = entry.error.as_deref() {
                return Poll::Ready(Err(error.clone()));
            }
            wait(inner, raw.key, want::ANSWER, cx);
            Poll::Pending
        })
    }
}

impl Asked {
    /// The stream, once it was answered.
    pub(crate) fn into_stream(mut self) -> Option<Raw> {
        self.0.take()
    }
}

/// Opens streams on a connection. Once nobody does, it ends with its last stream.
pub(crate) struct Requests {
    shared: Arc<Shared>,
    most: Arc<AtomicUsize>,
}

impl Requests {
    pub(super) fn of(shared: &Arc<Shared>) -> Self {
        let most = shared.with(|inner| Arc::clone(&inner.most));
        Self { shared: Arc::clone(shared), most }
    }

    /// Sends a request, now or when the peer takes more.
    pub(crate) fn send(&self, request: Request) -> Result<Asked, Error> {
        self.shared.with(|inner| {
            if let Some(error) = &inner.ended {
                return Err(error.clone());
            }
            if let Some(reason) = inner.left {
                return Err(Error::Left(reason));
            }
            if inner.has_used_up_its_numbers() {
                return Err(Error::Left(Reason::NO_ERROR));
            }
            let key = inner.add(Head::Unsent(Box::new(request)));
            inner.pending.push_back(key);
            inner.open_pending();
            Ok(Asked(Some(Raw { shared: Arc::clone(&self.shared), key })))
        })
    }

    /// How many streams the peer takes. Before it has said so, what we want.
    pub(crate) fn most(&self) -> usize {
        self.most.load(Ordering::Acquire)
    }

    /// Whether the connection takes no more requests: it is over, or the peer has said that it leaves.
    pub(crate) fn is_leaving(&self) -> bool {
        self.shared.with(|inner| {
            inner.ended.is_some() || inner.left.is_some() || inner.has_used_up_its_numbers()
        })
    }
}

impl Clone for Requests {
    fn clone(&self) -> Self {
        self.shared.with(|inner| inner.holders += 1);
        Self { shared: Arc::clone(&self.shared), most: Arc::clone(&self.most) }
    }
}

impl Drop for Requests {
    fn drop(&mut self) {
        self.shared.with(|inner| {
            inner.holders -= 1;
            if inner.holders == 0 {
                inner.kick();
            }
        });
    }
}

impl fmt::Debug for Requests {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Requests").finish_non_exhaustive()
    }
}

/// A request that came, and its stream.
pub(super) fn next_request(shared: &Arc<Shared>) -> Option<(Request, Raw)> {
    shared.with(|inner| {
        while let Some(key) = inner.incoming.pop_front() {
            let Some(entry) = inner.entries.get_mut(key) else { continue };
            let reset = entry.error.is_some();
            let Head::Request(request) = std::mem::replace(&mut entry.head, Head::None) else {
                continue;
            };
            if reset {
                // It was gone before anybody saw it.
                inner.reset_early = inner.reset_early.saturating_sub(1);
                inner.let_go(key);
                continue;
            }
            return Some((*request, Raw { shared: Arc::clone(shared), key }));
        }
        None
    })
}
