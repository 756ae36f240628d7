//! Bulk between two sockets, past us: by way of a pipe, so that the bytes are never copied here.
//!
//! It costs two descriptors, which are scarce, and so it is for those who have moved much already, and for
//! as long as they have more to move. A pipe without bytes goes back to its thread's spare ones.

use super::At;
use nix::{
    errno::Errno,
    fcntl::{FcntlArg, OFlag, SpliceFFlags, fcntl, splice},
    unistd::pipe2,
};
use std::{
    cell::RefCell,
    io,
    os::fd::OwnedFd,
    sync::atomic::{AtomicUsize, Ordering},
    task::{Context, Poll, ready},
};
use tokio::{io::Interest, net::TcpStream};

/// What a direction has moved before it is bulk, in bytes.
pub(super) const BULK: u64 = 1024 * 1024;

/// What a pipe holds, and all that a stalled reader can make us hold of its direction, in bytes.
const SIZE: usize = 512 * 1024;

/// Pipes of the process at most: with two descriptors each, a tenth of a hard limit of 20 000.
const MOST: usize = 1000;

/// Pipes that a thread keeps at hand.
const KEPT: usize = 8;

/// Moves that one direction makes before other tasks of the thread get a turn.
const TURN: usize = 8;

/// The pipes there are.
static PIPES: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    static SPARE: RefCell<Vec<Ends>> = const { RefCell::new(Vec::new()) };
}

/// An empty pipe, counted.
#[derive(Debug)]
struct Ends {
    into: OwnedFd,
    out: OwnedFd,
}

impl Ends {
    fn open() -> Option<Self> {
        if PIPES.fetch_add(1, Ordering::Relaxed) < MOST
            && let Ok((out, into)) = pipe2(OFlag::O_NONBLOCK | OFlag::O_CLOEXEC)
        {
            // Where the kernel grants less, less is moved at a time.
            let _less =
                fcntl(&into, FcntlArg::F_SETPIPE_SZ(i32::try_from(SIZE).unwrap_or(i32::MAX)));
            return Some(Self { into, out });
        }
        PIPES.fetch_sub(1, Ordering::Relaxed);
        None
    }
}

impl Drop for Ends {
    fn drop(&mut self) {
        PIPES.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A pipe, with what is on its way.
#[derive(Debug)]
pub(super) struct Pipe {
    ends: Option<Ends>,
    held: usize,
}

/// How a turn ended.
pub(super) enum Moved {
    /// There is nothing to move for now, and nothing on its way.
    Idle,
    /// There will be no more, and nothing is on its way.
    End,
    /// There is more.
    More,
}

impl Pipe {
    /// A pipe, if one is to be had.
    pub(super) fn borrow() -> Option<Self> {
        let ends = SPARE.with_borrow_mut(Vec::pop).or_else(Ends::open)?;
        Some(Self { ends: Some(ends), held: 0 })
    }

    /// Moves what there is.
    pub(super) fn poll_move(
        &mut self,
        source: &TcpStream,
        sink: &TcpStream,
        cx: &mut Context<'_>,
        count: impl Fn(u64),
    ) -> Poll<Result<Moved, (At, io::Error)>> {
        let Some(ends) = &self.ends else { return Poll::Ready(Ok(Moved::Idle)) };
        let flags = SpliceFFlags::SPLICE_F_NONBLOCK | SpliceFFlags::SPLICE_F_MOVE;
        for _ in 0..TURN {
            while self.held > 0 {
                let gone = sink.try_io(Interest::WRITABLE, || {
                    splice(&ends.out, None, sink, None, self.held, flags).map_err(io::Error::from)
                });
                match gone {
                    Ok(0) => return Poll::Ready(Err((At::Sink, io::ErrorKind::WriteZero.into()))),
                    Ok(gone) => self.held = self.held.saturating_sub(gone),
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                        ready!(sink.poll_write_ready(cx)).map_err(|error| (At::Sink, error))?;
                    }
                    Err(error) => return Poll::Ready(Err((At::Sink, error))),
                }
            }
            match source.poll_read_ready(cx) {
                Poll::Ready(ready) => ready.map_err(|error| (At::Source, error))?,
                Poll::Pending => return Poll::Ready(Ok(Moved::Idle)),
            }
            // The pipe is empty: who would block is the source.
            let come = source.try_io(Interest::READABLE, || {
                splice(source, None, &ends.into, None, SIZE, flags).map_err(io::Error::from)
            });
            match come {
                Ok(0) => return Poll::Ready(Ok(Moved::End)),
                Ok(come) => {
                    self.held = come;
                    count(come as u64);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) if error.raw_os_error() == Some(Errno::EINTR as i32) => {}
                Err(error) => return Poll::Ready(Err((At::Source, error))),
            }
        }
        Poll::Ready(Ok(Moved::More))
    }
}

impl Drop for Pipe {
    fn drop(&mut self) {
        // With bytes in it, it is of no use to anybody else.
        let Some(ends) = self.ends.take().filter(|_| self.held == 0) else { return };
        // At the end of a thread there is nowhere to put it.
        let _gone = SPARE.try_with(|spare| {
            let mut spare = spare.borrow_mut();
            if spare.len() < KEPT {
                spare.push(ends);
            }
        });
    }
}
