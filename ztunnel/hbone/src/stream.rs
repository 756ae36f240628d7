//! The two kinds of end that a relay connects: a stream in a tunnel, and a TCP connection.

use crate::{
    buffers::Buffer,
    engine::{Got, Raw},
    parcel::{Chunk, MOST_PAYLOAD, PAYLOAD, Payload, SLICES},
};
use nix::sys::uio::readv;
use std::{
    fmt, io,
    io::IoSlice,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll, ready},
};
use tokio::{io::Interest, net::TcpStream};

/// Reads shorter than this are copied out of their buffer, so that few bytes never hold a big one.
const SMALL: usize = 16 * 1024;

/// One end of a relay: chunks come out of it, and go into it. Waiting comes before taking, so that what
/// is idle holds no buffer.
pub trait Duplex: Send {
    /// Waits until [`take`](Self::take) has something to say.
    fn poll_readable(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>>;

    /// Takes a chunk of at most `room` bytes.
    ///
    /// # Errors
    ///
    /// Returns an error where the other side cut its stream off.
    fn take(&mut self, cx: &mut Context<'_>, room: usize) -> io::Result<Taken>;

    /// The chunk that was taken last has gone to the other side: its sender may send as much again.
    fn release(&mut self, bytes: usize);

    /// Waits until [`give`](Self::give) may be called, and for how many bytes; none where the other side has
    /// heard enough.
    fn poll_room(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>>;

    /// Room that was waited for is not needed any more.
    fn keep_no_room(&mut self);

    /// Sends a chunk that there is room for.
    ///
    /// # Errors
    ///
    /// Returns an error where the other side does not listen any more.
    fn give(&mut self, chunk: Chunk) -> io::Result<()>;

    /// Waits until what was given has been passed on.
    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>>;

    /// Says that no more will be given.
    ///
    /// # Errors
    ///
    /// Returns an error where the other side does not listen any more.
    fn finish(&mut self) -> io::Result<()>;

    /// Cuts both directions off, so that the other side sees no clean end.
    fn reset(&mut self);

    /// The socket, where this is a socket and nothing else: between two of them, bulk goes past us.
    fn socket(&self) -> Option<&TcpStream> {
        None
    }

    /// Ready where the other side takes no more: an error where it has cut off, else it has heard enough.
    fn poll_cut(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>>;
}

/// What there was to take.
#[derive(Debug)]
pub enum Taken {
    /// Bytes.
    Chunk(Chunk),
    /// Nothing after all.
    Nothing,
    /// The end.
    End,
}

/// A stream in a tunnel.
pub struct Stream {
    raw: Raw,
    ended: bool,
    finished: bool,
    /// Counts the stream among those of its tunnel.
    _count: Option<Counted>,
}

/// Counts a stream for as long as it lives.
#[derive(Debug)]
pub(crate) struct Counted(Arc<AtomicUsize>);

impl Counted {
    pub(crate) fn new(count: &Arc<AtomicUsize>) -> Self {
        count.fetch_add(1, Ordering::AcqRel);
        Self(Arc::clone(count))
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

impl fmt::Debug for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Stream").field("ended", &self.ended).finish_non_exhaustive()
    }
}

impl Stream {
    pub(crate) const fn new(raw: Raw, count: Option<Counted>) -> Self {
        Self { raw, ended: false, finished: false, _count: count }
    }
}

impl Drop for Stream {
    /// A stream that is dropped before its end was cut off.
    fn drop(&mut self) {
        if !self.ended || !self.finished {
            self.raw.reset();
        }
    }
}

impl Duplex for Stream {
    fn poll_readable(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.ended {
            return Poll::Ready(Ok(()));
        }
        self.raw.poll_readable(cx).map(Ok)
    }

    fn take(&mut self, _: &mut Context<'_>, room: usize) -> io::Result<Taken> {
        Ok(match self.raw.take(room)? {
            Got::Chunk(chunk) => Taken::Chunk(chunk),
            Got::Nothing => Taken::Nothing,
            Got::End => {
                self.ended = true;
                Taken::End
            }
        })
    }

    fn release(&mut self, bytes: usize) {
        self.raw.release(bytes);
    }

    fn poll_room(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        self.raw.poll_room(cx)
    }

    fn keep_no_room(&mut self) {
        self.raw.keep_no_room();
    }

    fn give(&mut self, chunk: Chunk) -> io::Result<()> {
        self.raw.give(chunk)
    }

    fn poll_flush(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        // The tunnel's task passes it on; the room bounds what it holds.
        Poll::Ready(Ok(()))
    }

    fn finish(&mut self) -> io::Result<()> {
        self.finished = true;
        self.raw.finish()
    }

    fn reset(&mut self) {
        (self.ended, self.finished) = (true, true);
        self.raw.reset();
    }

    fn poll_cut(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.finished {
            return Poll::Pending;
        }
        self.raw.poll_cut(cx)
    }
}

/// A TCP connection.
#[derive(Debug)]
pub struct Tcp {
    io: TcpStream,
    unsent: Option<Chunk>,
    finished: bool,
    /// The last read filled all that it was given: the next one is given more.
    bulk: bool,
}

impl Tcp {
    /// Takes a connection onto the runtime that runs this.
    ///
    /// # Errors
    ///
    /// Fails where the runtime cannot watch the socket.
    pub fn new(stream: std::net::TcpStream) -> io::Result<Self> {
        TcpStream::from_std(stream).map(Self::from)
    }

    /// Sends a few bytes before all else.
    ///
    /// # Errors
    ///
    /// Fails as the socket does.
    pub async fn preface(&mut self, bytes: &[u8]) -> io::Result<()> {
        tokio::io::AsyncWriteExt::write_all(&mut self.io, bytes).await
    }
}

impl From<TcpStream> for Tcp {
    fn from(io: TcpStream) -> Self {
        Self { io, unsent: None, finished: false, bulk: false }
    }
}

impl Duplex for Tcp {
    fn poll_readable(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.io.poll_read_ready(cx)
    }

    fn take(&mut self, _: &mut Context<'_>, room: usize) -> io::Result<Taken> {
        let most = if self.bulk { MOST_PAYLOAD } else { PAYLOAD };
        let room = room.min(most);
        let mut payload = None;
        let read = self.io.try_io(Interest::READABLE, || {
            let read = Payload::read(Buffer::borrow(), room, |places| {
                readv(&self.io, places).map_err(io::Error::from)
            })?;
            let emptied = read.len() < room && read.len() > 0;
            payload = Some(read);
            // A read that leaves room has emptied the socket: the next look at it needs no system call.
            if emptied { Err(io::ErrorKind::WouldBlock.into()) } else { Ok(()) }
        });
        let Some(payload) = payload else {
            return match read {
                Err(error) if error.kind() != io::ErrorKind::WouldBlock => Err(error),
                Ok(()) | Err(_) => Ok(Taken::Nothing),
            };
        };
        self.bulk = payload.len() == room;
        Ok(match payload.len() {
            0 => Taken::End,
            few if few < SMALL => Taken::Chunk(Chunk::from(payload).into_bytes().into()),
            _ => Taken::Chunk(payload.into()),
        })
    }

    fn release(&mut self, _: usize) {}

    fn poll_room(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        ready!(self.poll_flush(cx))?;
        Poll::Ready(Ok(usize::MAX))
    }

    fn keep_no_room(&mut self) {}

    fn give(&mut self, chunk: Chunk) -> io::Result<()> {
        self.unsent = Some(chunk);
        Ok(())
    }

    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while let Some(chunk) = &mut self.unsent {
            let mut slices = [IoSlice::new(&[]); SLICES];
            let count = chunk.slices(&mut slices);
            match self.io.try_write_vectored(slices.get(..count).unwrap_or_default()) {
                Ok(count) if count == chunk.len() => self.unsent = None,
                Ok(count) => chunk.advance(count),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    ready!(self.io.poll_write_ready(cx))?;
                }
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
        Poll::Ready(Ok(()))
    }

    fn finish(&mut self) -> io::Result<()> {
        self.finished = true;
        match socket2::SockRef::from(&self.io).shutdown(std::net::Shutdown::Write) {
            // The peer has closed already.
            Err(error) if error.kind() == io::ErrorKind::NotConnected => Ok(()),
            other => other,
        }
    }

    fn reset(&mut self) {
        // Closing it now sends RST.
        let zero = Some(std::time::Duration::ZERO);
        let _closed_already = socket2::SockRef::from(&self.io).set_linger(zero);
    }

    fn socket(&self) -> Option<&TcpStream> {
        Some(&self.io)
    }

    fn poll_cut(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        // A reset shows as an error of reading.
        Poll::Pending
    }
}
