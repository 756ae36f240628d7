//! Both directions between two ends, in one task.
//!
//! ```text
//!   open ──end──► half closed ──end of the other direction──► done
//!     └──────────── cut on either side ──► both sides reset
//! ```

mod splice;

use self::splice::{Moved, Pipe};
use crate::stream::{Duplex, Taken};
use mesh_core::{Failure, Reason, Side};
use std::{
    fmt, io,
    pin::Pin,
    task::{Context, Poll, ready},
};
use tokio::net::TcpStream;

/// Chunks that one direction moves before other tasks of the thread get a turn.
const TURN: usize = 32;

/// Counts the bytes that a relay moves, while it moves them.
pub trait Meter: Send + Sync {
    /// Bytes went from the downstream end to the upstream one.
    fn to_upstream(&self, bytes: u64);

    /// Bytes went from the upstream end to the downstream one.
    fn to_downstream(&self, bytes: u64);
}

impl Meter for () {
    fn to_upstream(&self, _: u64) {}

    fn to_downstream(&self, _: u64) {}
}

/// One direction.
#[derive(Debug, Default)]
struct Direction {
    /// Bytes that were given and not yet passed on.
    given: usize,
    ended: bool,
    done: bool,
    /// Bytes that were moved by copying, until they are many.
    copied: u64,
    pipe: Option<Box<Pipe>>,
}

/// Which end failed.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum At {
    Source,
    Sink,
}

impl Direction {
    fn poll(
        &mut self,
        source: &mut impl Duplex,
        sink: &mut impl Duplex,
        cx: &mut Context<'_>,
        count: impl Fn(u64),
    ) -> Poll<Result<(), (At, io::Error)>> {
        if self.done {
            return Poll::Ready(Ok(()));
        }
        for _ in 0..TURN {
            match sink.poll_flush(cx) {
                Poll::Ready(flushed) => flushed.map_err(|error| (At::Sink, error))?,
                Poll::Pending => return Poll::Pending,
            }
            if self.given > 0 {
                source.release(self.given);
                self.given = 0;
            }
            if self.ended {
                sink.finish().map_err(|error| (At::Sink, error))?;
                self.done = true;
                return Poll::Ready(Ok(()));
            }
            if self.copied >= splice::BULK
                && let (Some(from), Some(to)) = (source.socket(), sink.socket())
                && let Some(moved) = self.poll_past(from, to, cx, &count)
            {
                match ready!(moved)? {
                    Moved::Idle => return self.idle(sink, cx),
                    Moved::End => {
                        self.ended = true;
                        continue;
                    }
                    Moved::More => break,
                }
            }
            match source.poll_readable(cx) {
                Poll::Ready(ready) => ready.map_err(|error| (At::Source, error))?,
                Poll::Pending => return self.idle(sink, cx),
            }
            let room = ready!(sink.poll_room(cx)).map_err(|error| (At::Sink, error))?;
            if room == 0 {
                self.done = true;
                return Poll::Ready(Ok(()));
            }
            match source.take(cx, room).map_err(|error| (At::Source, error))? {
                Taken::Chunk(chunk) => {
                    self.given = chunk.len();
                    self.copied = self.copied.saturating_add(chunk.len() as u64);
                    count(chunk.len() as u64);
                    sink.give(chunk).map_err(|error| (At::Sink, error))?;
                }
                Taken::Nothing => sink.keep_no_room(),
                Taken::End => self.ended = true,
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// Moves bytes past us; `None` where no pipe is to be had.
    fn poll_past(
        &mut self,
        from: &TcpStream,
        to: &TcpStream,
        cx: &mut Context<'_>,
        count: impl Fn(u64),
    ) -> Option<Poll<Result<Moved, (At, io::Error)>>> {
        if self.pipe.is_none() {
            // First wait, then borrow.
            match from.poll_read_ready(cx) {
                Poll::Ready(Ok(())) => {}
                Poll::Ready(Err(error)) => return Some(Poll::Ready(Err((At::Source, error)))),
                Poll::Pending => return Some(Poll::Ready(Ok(Moved::Idle))),
            }
            self.pipe = Some(Box::new(Pipe::borrow()?));
        }
        let moved = self.pipe.as_mut()?.poll_move(from, to, cx, count);
        if let Poll::Ready(Ok(Moved::Idle | Moved::End)) = moved {
            self.pipe = None;
        }
        Some(moved)
    }

    /// Nothing to move: all there is to learn is that the sink takes no more. Having heard enough, it ends
    /// the direction, and what the source still says goes nowhere.
    fn idle(
        &mut self,
        sink: &mut impl Duplex,
        cx: &mut Context<'_>,
    ) -> Poll<Result<(), (At, io::Error)>> {
        sink.keep_no_room();
        ready!(sink.poll_cut(cx)).map_err(|error| (At::Sink, error))?;
        self.done = true;
        Poll::Ready(Ok(()))
    }
}

/// A connection was cut off, and so was the other side.
#[derive(Debug)]
pub struct Cut {
    side: Side,
    error: io::Error,
}

impl fmt::Display for Cut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let side = match self.side {
            Side::Downstream => "the client",
            Side::Upstream => "the server",
            Side::Local => "we",
        };
        write!(f, "{side} cut the connection off: {}", self.error)
    }
}

impl std::error::Error for Cut {}

struct Relay<'a, D, U, M> {
    down: D,
    up: U,
    meter: &'a M,
    outward: Direction,
    inward: Direction,
}

impl<D: Duplex + Unpin, U: Duplex + Unpin, M: Meter> Future for Relay<'_, D, U, M> {
    type Output = Result<(), Failure>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let Self { down, up, meter, outward, inward } = &mut *self;
        let sent = outward.poll(down, up, cx, |bytes| meter.to_upstream(bytes));
        let side = match sent {
            Poll::Ready(Err((At::Source, error))) => Err((Side::Downstream, error)),
            Poll::Ready(Err((At::Sink, error))) => Err((Side::Upstream, error)),
            Poll::Ready(Ok(())) | Poll::Pending => {
                match inward.poll(up, down, cx, |bytes| meter.to_downstream(bytes)) {
                    Poll::Ready(Err((At::Source, error))) => Err((Side::Upstream, error)),
                    Poll::Ready(Err((At::Sink, error))) => Err((Side::Downstream, error)),
                    Poll::Ready(Ok(())) | Poll::Pending => Ok(()),
                }
            }
        };
        match side {
            Err((side, error)) => {
                down.reset();
                up.reset();
                let source = Some(Box::new(Cut { side, error }) as Box<_>);
                Poll::Ready(Err(Failure { side, reason: Reason::Reset, source }))
            }
            Ok(()) if outward.done && inward.done => Poll::Ready(Ok(())),
            Ok(()) => Poll::Pending,
        }
    }
}

/// Moves bytes both ways until both directions have ended, or one is cut off: then the other side is cut
/// off as well, so that a truncated stream is never read as a whole one.
///
/// # Errors
///
/// Returns a failure of [`Reason::Reset`] where a side was cut off; it says which.
pub fn relay<'a, D, U, M>(
    down: D,
    up: U,
    meter: &'a M,
) -> impl Future<Output = Result<(), Failure>> + Send + 'a
where
    D: Duplex + Unpin + 'a,
    U: Duplex + Unpin + 'a,
    M: Meter,
{
    Relay { down, up, meter, outward: Direction::default(), inward: Direction::default() }
}

#[cfg(test)]
mod tests;
