//! For tests: bytes in and out by tokio's traits, of which the engine has no need.

use super::TlsStream;
use crate::parcel::Parcel;
use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// What was decrypted and not read, of a stream that the traits are used on.
#[derive(Debug, Default)]
pub(super) struct Unread {
    bytes: Vec<u8>,
    taken: usize,
}

impl AsyncRead for TlsStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if this.unread.taken == this.unread.bytes.len() {
            let mut ranges = Vec::new();
            if !ready!(this.poll_plain(cx, &mut ranges))? {
                return Poll::Ready(Ok(()));
            }
            let plain = this.plain();
            let bytes = ranges.into_iter().flat_map(|range| plain[range].to_vec()).collect();
            this.unread = Unread { bytes, taken: 0 };
            this.done();
        }
        let unread = &mut this.unread;
        let rest = &unread.bytes[unread.taken..];
        let count = rest.len().min(into.remaining());
        into.put_slice(&rest[..count]);
        unread.taken += count;
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for TlsStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        data: &[u8],
    ) -> Poll<io::Result<usize>> {
        if self.close_sent {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        ready!(self.poll_send(cx))?;
        let mut parcel = Parcel::new();
        let count = parcel.put(data);
        self.queue(parcel)?;
        Poll::Ready(Ok(count))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_send(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_close(cx)
    }
}
