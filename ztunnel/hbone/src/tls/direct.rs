//! The stream where the record layer is ours.

use super::{
    Session, TlsStream,
    records::{self, Records},
};
use crate::buffers::Buffer;
use rustls::CommonState;

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

    pub(super) fn alert_direct(&mut self, alert: [u8; 2]) {
        let Self { session: Session::Direct(records), outgoing, filled, .. } = self else { return };
        let out = outgoing.get_or_insert_with(Buffer::borrow);
        let out = out.bytes_mut().get_mut(*filled..).unwrap_or_default();
        // Where it does not fit, the end of the stream says less.
        *filled += records.seal_alert(alert, out).unwrap_or_default();
    }
}
