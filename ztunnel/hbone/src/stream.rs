//! The two kinds of end that a relay connects: a stream in a tunnel, and a TCP connection.

mod received;

use self::received::Received;
use crate::{buffers::Buffer, engine::Raw};
use bytes::Bytes;
use std::{
    fmt, io,
    io::IoSlice,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll, ready},
};
use tokio::{
    io::{AsyncRead as _, ReadBuf},
    net::TcpStream,
};

/// What a relay takes at a time, in bytes: the payload of a frame of the default size.
pub(crate) const CHUNK: usize = 128 * 1024;

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
    fn give(&mut self, chunk: Bytes) -> io::Result<()>;

    /// The other end takes nothing for now: what small pieces there are to take may be put together, so that
    /// they are held as what they are. The other side may still send no more than before.
    ///
    /// # Errors
    ///
    /// Returns an error where the other side cut its stream off.
    fn gather(&mut self, _: &mut Context<'_>) -> io::Result<()> {
        Ok(())
    }

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
    Chunk(Bytes),
    /// Nothing after all.
    Nothing,
    /// The end.
    End,
}

/// A stream in a tunnel.
pub struct Stream {
    raw: Raw,
    received: Received,
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
    pub(crate) fn new(raw: Raw, count: Option<Counted>) -> Self {
        Self { raw, received: Received::new(), ended: false, finished: false, _count: count }
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
        if self.received.is_empty() && !self.ended {
            match ready!(self.raw.poll_data(cx))? {
                Some(data) => self.received.put(data),
                None => self.ended = true,
            }
        }
        Poll::Ready(Ok(()))
    }

    fn take(&mut self, cx: &mut Context<'_>, room: usize) -> io::Result<Taken> {
        // Small pieces in a row go in one write. An error shows again, once these are taken.
        while self.received.is_small() && !self.ended {
            match self.raw.poll_data(cx) {
                Poll::Ready(Ok(Some(data))) => self.received.put(data),
                Poll::Ready(Ok(None)) => self.ended = true,
                Poll::Ready(Err(_)) | Poll::Pending => break,
            }
        }
        Ok(match self.received.take(room) {
            Some(chunk) if chunk.is_empty() => Taken::Nothing,
            Some(chunk) => Taken::Chunk(chunk),
            None if self.ended => Taken::End,
            None => Taken::Nothing,
        })
    }

    fn gather(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        while !self.ended {
            match self.raw.poll_data(cx) {
                Poll::Ready(Ok(Some(data))) => self.received.put(data),
                Poll::Ready(Ok(None)) => self.ended = true,
                Poll::Ready(Err(error)) => return Err(error),
                Poll::Pending => break,
            }
        }
        Ok(())
    }

    fn release(&mut self, bytes: usize) {
        self.raw.release(bytes);
    }

    fn poll_room(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        self.raw.poll_room(cx, CHUNK)
    }

    fn keep_no_room(&mut self) {
        self.raw.keep_no_room();
    }

    fn give(&mut self, chunk: Bytes) -> io::Result<()> {
        self.raw.send(chunk, false)
    }

    fn poll_flush(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        // The tunnel's task passes it on; the room bounds what it holds.
        Poll::Ready(Ok(()))
    }

    fn finish(&mut self) -> io::Result<()> {
        self.finished = true;
        self.raw.send(Bytes::new(), true)
    }

    fn reset(&mut self) {
        (self.ended, self.finished) = (true, true);
        self.raw.reset();
    }

    fn poll_cut(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.finished {
            return Poll::Pending;
        }
        self.raw.poll_reset(cx)
    }
}

/// A TCP connection.
#[derive(Debug)]
pub struct Tcp {
    io: TcpStream,
    unsent: Option<Bytes>,
    finished: bool,
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
        Self { io, unsent: None, finished: false }
    }
}

impl Duplex for Tcp {
    fn poll_readable(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.io.poll_read_ready(cx)
    }

    fn take(&mut self, cx: &mut Context<'_>, room: usize) -> io::Result<Taken> {
        let mut buffer = Buffer::borrow();
        let room = buffer.bytes_mut().get_mut(..room.min(CHUNK)).unwrap_or_default();
        let mut room = ReadBuf::new(room);
        // Not `try_read`: this one knows that a read that leaves room has emptied the socket, and the next look
        // at it needs no system call.
        let Poll::Ready(read) = Pin::new(&mut self.io).poll_read(cx, &mut room) else {
            return Ok(Taken::Nothing);
        };
        read?;
        match room.filled() {
            [] => Ok(Taken::End),
            few if few.len() < SMALL => Ok(Taken::Chunk(Bytes::copy_from_slice(few))),
            many => {
                let count = many.len();
                Ok(Taken::Chunk(Bytes::from_owner(buffer).slice(..count)))
            }
        }
    }

    fn release(&mut self, _: usize) {}

    fn poll_room(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        ready!(self.poll_flush(cx))?;
        Poll::Ready(Ok(usize::MAX))
    }

    fn keep_no_room(&mut self) {}

    fn give(&mut self, chunk: Bytes) -> io::Result<()> {
        self.unsent = Some(chunk);
        Ok(())
    }

    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while let Some(chunk) = &mut self.unsent {
            match self.io.try_write_vectored(&[IoSlice::new(chunk)]) {
                Ok(count) if count == chunk.len() => self.unsent = None,
                Ok(count) => {
                    let _sent = chunk.split_to(count);
                }
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
