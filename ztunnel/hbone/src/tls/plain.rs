//! Plaintext in whole buffers: decrypted where it was received, and encrypted where it lies.

use super::{
    Session, Step, TlsStream, invalid,
    records::{DATA, Opened, Records},
};
use crate::{
    buffers::Buffer,
    parcel::{Parcel, RECORD},
};
use bytes::Bytes;
use std::{
    io,
    ops::Range,
    task::{Context, Poll, ready},
};
use tokio::io::AsyncWriteExt as _;

impl TlsStream {
    /// Receives and decrypts, and says where in [`plain`](Self::plain) the plaintext of each record lies. False at
    /// the end of the stream.
    pub(crate) fn poll_plain(
        &mut self,
        cx: &mut Context<'_>,
        ranges: &mut Vec<Range<usize>>,
    ) -> Poll<io::Result<bool>> {
        // What came with the end of the handshake was decrypted by rustls.
        if !matches!(self.session, Session::Direct(_)) || !self.plain.is_empty() {
            return self.poll_apart(cx, ranges);
        }
        loop {
            if self.failed.is_none() {
                self.failed = self.open_all(ranges).err();
            }
            if !ranges.is_empty() {
                return Poll::Ready(Ok(true));
            }
            if let Some(error) = self.failed.take() {
                self.send_alert(&error, cx);
                return Poll::Ready(Err(invalid(error)));
            }
            if self.peer_closed {
                return Poll::Ready(Ok(false));
            }
            self.done();
            if !ready!(self.poll_receive(cx))? {
                // Without close_notify this is a cut, and not an end.
                return Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into()));
            }
        }
    }

    /// Decrypts every whole record that was received, where it lies.
    fn open_all(&mut self, ranges: &mut Vec<Range<usize>>) -> Result<(), rustls::Error> {
        let Self { session: Session::Direct(records), incoming, at, end, peer_closed, .. } = self
        else {
            return Ok(());
        };
        let Some(buffer) = incoming else { return Ok(()) };
        while !*peer_closed {
            let received = buffer.bytes_mut().get_mut(*at..*end).unwrap_or_default();
            let length = Records::length(received)?;
            let Some(record) = length.and_then(|length| received.get_mut(..length)) else { break };
            let length = record.len();
            match records.open(record)? {
                Opened::Data(data) if data.is_empty() => {}
                Opened::Data(data) => ranges.push(*at + data.start..*at + data.end),
                Opened::Nothing => {}
                Opened::Closed => *peer_closed = true,
            }
            *at += length;
        }
        Ok(())
    }

    /// The same where the record layer is that of rustls.
    fn poll_apart(
        &mut self,
        cx: &mut Context<'_>,
        ranges: &mut Vec<Range<usize>>,
    ) -> Poll<io::Result<bool>> {
        loop {
            if let Some(plain) = self.plain.pop_front() {
                ranges.push(0..plain.len());
                self.apart = Some(plain);
                return Poll::Ready(Ok(true));
            }
            if self.peer_closed {
                return Poll::Ready(Ok(false));
            }
            match self.step() {
                Ok(Step::Again | Step::Plain) => {}
                Ok(Step::PeerClosed) => self.peer_closed = true,
                Ok(Step::Blocked | Step::Open) => {
                    if !ready!(self.poll_receive(cx))? {
                        // Without close_notify this is a cut, and not an end.
                        return Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into()));
                    }
                }
                Err(error) => {
                    self.send_alert(&error, cx);
                    return Poll::Ready(Err(invalid(error)));
                }
            }
        }
    }

    /// What was decrypted, until [`done`](Self::done).
    pub(crate) fn plain(&self) -> &[u8] {
        match &self.apart {
            Some(apart) => apart,
            None => self.incoming.as_ref().map(Buffer::bytes).unwrap_or_default(),
        }
    }

    /// What was decrypted, for good: we receive into another buffer from now on.
    pub(crate) fn freeze(&mut self) -> Bytes {
        if let Some(apart) = self.apart.take() {
            return Bytes::from(apart);
        }
        let Some(buffer) = self.incoming.take() else { return Bytes::new() };
        let rest = buffer.bytes().get(self.at..self.end).unwrap_or_default();
        if !rest.is_empty() {
            let mut next = Buffer::borrow();
            if let Some(place) = next.bytes_mut().get_mut(..rest.len()) {
                place.copy_from_slice(rest);
            }
            self.incoming = Some(next);
        }
        (self.at, self.end) = (0, rest.len());
        Bytes::from_owner(buffer)
    }

    /// What was decrypted has been seen: an idle stream holds no buffer.
    pub(crate) fn done(&mut self) {
        self.apart = None;
        if self.at >= self.end {
            (self.at, self.end) = (0, 0);
            self.incoming = None;
        }
    }

    /// Encrypts a parcel, to be sent.
    pub(crate) fn queue(&mut self, parcel: Parcel) -> io::Result<()> {
        if matches!(self.session, Session::Direct(_)) {
            return self.queue_direct(parcel);
        }
        for plain in parcel.plain() {
            if self.room() < RECORD {
                self.enqueue();
            }
            self.encrypt(plain)?;
        }
        self.enqueue();
        Ok(())
    }

    fn queue_direct(&mut self, parcel: Parcel) -> io::Result<()> {
        self.enqueue();
        let Session::Direct(records) = &mut self.session else { return Ok(()) };
        if records.wants_update() {
            let mut buffer = Buffer::borrow();
            let length = records.seal_update(buffer.bytes_mut()).map_err(io::Error::other)?;
            self.queue.push_back((buffer, length));
        }
        let sealed = parcel.sealed(|record| records.seal_record(DATA, record));
        self.queue.push_back(sealed.map_err(io::Error::other)?);
        Ok(())
    }

    /// Sends what there is, says that this was all, and closes our half of the connection.
    pub(crate) fn poll_close(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_send(cx))?;
        if !self.close_sent {
            self.close_sent = true;
            self.close_notify();
            ready!(self.poll_send(cx))?;
        }
        let mut closing = std::pin::pin!(self.io.shutdown());
        closing.as_mut().poll(cx)
    }
}
