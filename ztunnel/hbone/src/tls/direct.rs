//! The stream where the record layer is ours.

use super::{
    Session, Step, TlsStream,
    records::{self, Opened, Records},
};
use crate::buffers::Buffer;
use rustls::CommonState;
use std::io::{self, IoSlice};
use tokio::io::ReadBuf;

impl TlsStream {
    /// What is left of the handshake, once it is over.
    pub(super) fn shaken(mut self, direct: bool) -> Result<Self, rustls::Error> {
        let state: &CommonState = match &self.session {
            Session::Client(session) => session,
            Session::Server(session) => session,
            Session::Direct(_) => return Ok(self),
        };
        self.certificates = state.peer_certificates().unwrap_or_default().to_vec();
        if !direct || !records::fits(state) {
            return Ok(self);
        }
        let records = match self.session {
            Session::Client(session) => Box::new(Records::of_client(session)?),
            Session::Server(session) => Box::new(Records::of_server(session)?),
            Session::Direct(records) => records,
        };
        Ok(Self { session: Session::Direct(records), ..self })
    }

    /// Decrypts the next record where it lies. Only where the one before has been taken.
    pub(super) fn step_direct(&mut self) -> Result<Step, rustls::Error> {
        let Self { session: Session::Direct(records), incoming, at, end, clear, .. } = self else {
            return Ok(Step::Blocked);
        };
        let received = incoming
            .as_mut()
            .and_then(|buffer| buffer.bytes_mut().get_mut(*at..*end))
            .unwrap_or_default();
        let length = Records::length(received)?;
        let Some(record) = length.and_then(|length| received.get_mut(..length)) else {
            return Ok(Step::Open);
        };
        let length = record.len();
        let step = match records.open(record)? {
            Opened::Data(data) => {
                *clear = *at + data.start..*at + data.end;
                Step::Plain
            }
            Opened::Nothing => Step::Again,
            Opened::Closed => Step::PeerClosed,
        };
        *at += length;
        self.release();
        Ok(step)
    }

    /// An idle stream holds no buffer.
    pub(super) fn release(&mut self) {
        if self.at >= self.end && self.clear.is_empty() {
            (self.at, self.end) = (0, 0);
            self.incoming = None;
        }
    }

    /// Takes what was decrypted where it lies, as far as it fits.
    pub(super) fn take_clear(&mut self, into: &mut ReadBuf<'_>) {
        if self.clear.is_empty() {
            return;
        }
        let clear = self.incoming.as_ref().and_then(|all| all.bytes().get(self.clear.clone()));
        let clear = clear.unwrap_or_default();
        let (now, _) = clear.split_at(clear.len().min(into.remaining()));
        into.put_slice(now);
        self.clear.start += now.len();
        self.release();
    }

    /// Encrypts what fits into the outgoing buffer, and says how much that was.
    pub(super) fn write_direct(&mut self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        let Self { session: Session::Direct(records), outgoing, filled, .. } = self else {
            return Err(io::ErrorKind::NotConnected.into());
        };
        let out = outgoing.get_or_insert_with(Buffer::borrow);
        let out = out.bytes_mut().get_mut(*filled..).unwrap_or_default();
        let (taken, length) = records.seal(slices, out).map_err(io::Error::other)?;
        *filled += length;
        Ok(taken)
    }

    pub(super) fn alert_direct(&mut self, alert: [u8; 2]) {
        let Self { session: Session::Direct(records), outgoing, filled, .. } = self else { return };
        let out = outgoing.get_or_insert_with(Buffer::borrow);
        let out = out.bytes_mut().get_mut(*filled..).unwrap_or_default();
        // Where it does not fit, the end of the stream says less.
        *filled += records.seal_alert(alert, out).unwrap_or_default();
    }
}
