//! TLS over TCP, on rustls's unbuffered API: whole buffers are read and decrypted where they lie, a whole
//! flush is encrypted into one buffer, and an idle stream holds no buffer.
//!
//! Once hands are shaken, rustls keeps the keys' schedule alone and the record layer is ours
//! ([`records`]), where the configuration lets it.

mod direct;
mod error;
#[cfg(test)]
mod io_traits;
mod plain;
mod records;

pub use self::error::HandshakeError;
use self::records::Records;
use crate::{
    buffers::Buffer,
    parcel::{HEADER, RECORD, TAIL},
};
use rustls::{
    ClientConfig, ServerConfig,
    client::{ClientConnectionData, UnbufferedClientConnection},
    pki_types::{CertificateDer, ServerName},
    server::{ServerConnectionData, UnbufferedServerConnection},
    unbuffered::{ConnectionState, EncodeError, EncryptError, UnbufferedStatus, WriteTraffic},
};
use std::{
    collections::VecDeque,
    error::Error,
    fmt,
    io::{self, IoSlice},
    net::Ipv4Addr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};
use tokio::{
    io::{AsyncRead as _, ReadBuf},
    net::TcpStream,
    time::timeout,
};

/// How long a handshake may take. Istio's proxy waits for ever, and so do those who flood it.
pub(crate) const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// What encryption adds to a record, at most: header, type, tag.
const OVERHEAD: usize = HEADER + TAIL;

/// Buffers that one write takes.
const AT_ONCE: usize = 4;

/// What the session may put before our data unasked, in bytes: a `KeyUpdate` and alerts.
const UNASKED: usize = 256;

enum Session {
    Client(UnbufferedClientConnection),
    Server(UnbufferedServerConnection),
    /// The handshake is over, and the record layer is ours.
    Direct(Box<Records>),
}

/// A TLS connection.
pub(crate) struct TlsStream {
    io: TcpStream,
    session: Session,
    /// Received and not decrypted: `at..end` of the buffer. What is before `at` is decrypted.
    incoming: Option<Buffer>,
    at: usize,
    end: usize,
    /// Decrypted by rustls, and not taken: the plaintext of a record each.
    plain: VecDeque<Vec<u8>>,
    /// The one of those that was taken last.
    apart: Option<Vec<u8>>,
    /// Encrypted, and being added to.
    outgoing: Option<Buffer>,
    filled: usize,
    /// Encrypted and not sent: buffers, and how far each is filled.
    queue: VecDeque<(Buffer, usize)>,
    /// What was sent of the first.
    sent: usize,
    /// What is wrong with a record behind data that is passed on first.
    failed: Option<rustls::Error>,
    peer_closed: bool,
    close_sent: bool,
    certificates: Vec<CertificateDer<'static>>,
    #[cfg(test)]
    unread: io_traits::Unread,
}

/// What became of one look at the session.
enum Step {
    /// Look again.
    Again,
    /// There is plaintext.
    Plain,
    /// Nothing without more from the peer, and no data may be sent yet.
    Blocked,
    /// Data may be sent.
    Open,
    /// The peer sends no more.
    PeerClosed,
}

impl fmt::Debug for TlsStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TlsStream").field("io", &self.io).finish_non_exhaustive()
    }
}

fn invalid(error: impl Error + Send + Sync + 'static) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

impl TlsStream {
    /// Shakes hands as the client.
    pub(crate) async fn connect(
        io: TcpStream,
        config: Arc<ClientConfig>,
    ) -> Result<Self, HandshakeError> {
        // The name is neither sent nor verified: identities are.
        let name = ServerName::from(std::net::IpAddr::V4(Ipv4Addr::UNSPECIFIED));
        let direct = config.enable_secret_extraction;
        let session = UnbufferedClientConnection::new(config, name).map_err(HandshakeError::Tls)?;
        Self::shake(io, Session::Client(session), direct).await
    }

    /// Shakes hands as the server.
    pub(crate) async fn accept(
        io: TcpStream,
        config: Arc<ServerConfig>,
    ) -> Result<Self, HandshakeError> {
        let direct = config.enable_secret_extraction;
        let session = UnbufferedServerConnection::new(config).map_err(HandshakeError::Tls)?;
        Self::shake(io, Session::Server(session), direct).await
    }

    async fn shake(io: TcpStream, session: Session, direct: bool) -> Result<Self, HandshakeError> {
        let mut this = Self {
            io,
            session,
            incoming: None,
            at: 0,
            end: 0,
            plain: VecDeque::new(),
            apart: None,
            outgoing: None,
            filled: 0,
            queue: VecDeque::new(),
            sent: 0,
            failed: None,
            peer_closed: false,
            close_sent: false,
            certificates: Vec::new(),
            #[cfg(test)]
            unread: io_traits::Unread::default(),
        };
        let shake = std::future::poll_fn(|cx| this.poll_shake(cx));
        match timeout(HANDSHAKE_TIMEOUT, shake).await {
            Ok(Ok(())) => this.shaken(direct).map_err(HandshakeError::Tls),
            Ok(Err(error)) => Err(error),
            Err(_elapsed) => Err(HandshakeError::Late),
        }
    }

    fn poll_shake(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), HandshakeError>> {
        loop {
            match self.step() {
                // Data may come with the last flight of the peer's handshake.
                Ok(Step::Again | Step::Plain) => {}
                Ok(Step::Open) => {
                    return self.poll_send(cx).map_err(HandshakeError::Io);
                }
                Ok(Step::Blocked) => {
                    ready!(self.poll_send(cx)).map_err(HandshakeError::Io)?;
                    if !ready!(self.poll_receive(cx)).map_err(HandshakeError::Io)? {
                        let eof = io::ErrorKind::UnexpectedEof.into();
                        return Poll::Ready(Err(HandshakeError::Io(eof)));
                    }
                }
                Ok(Step::PeerClosed) => {
                    let eof = io::ErrorKind::UnexpectedEof.into();
                    return Poll::Ready(Err(HandshakeError::Io(eof)));
                }
                Err(error) => {
                    self.send_alert(&error, cx);
                    return Poll::Ready(Err(HandshakeError::Tls(error)));
                }
            }
        }
    }

    /// The peer's certificates, its own first.
    pub(crate) fn peer_certificates(&self) -> &[CertificateDer<'static>] {
        &self.certificates
    }

    /// Says why the session failed; whether that arrives changes nothing.
    fn send_alert(&mut self, error: &rustls::Error, cx: &mut Context<'_>) {
        if !matches!(error, rustls::Error::AlertReceived(_)) {
            self.alert_direct(records::alert_of(error));
        }
        while let Ok(Step::Again) = self.step() {}
        let _best_effort = self.poll_send(cx);
    }

    /// Has the session look at what was received.
    fn step(&mut self) -> Result<Step, rustls::Error> {
        let Self { session, incoming, at, end, plain, outgoing, filled, .. } = self;
        let received = incoming
            .as_mut()
            .and_then(|buffer| buffer.bytes_mut().get_mut(*at..*end))
            .unwrap_or_default();
        let (discard, step) = match session {
            Session::Direct(_) => (0, Ok(Step::Blocked)),
            Session::Client(session) => {
                let UnbufferedStatus { discard, state, .. } = session.process_tls_records(received);
                (discard, state.and_then(|state| take(state, plain, outgoing, filled)))
            }
            Session::Server(session) => {
                let UnbufferedStatus { discard, state, .. } = session.process_tls_records(received);
                (discard, state.and_then(|state| take(state, plain, outgoing, filled)))
            }
        };
        *at += discard;
        if at >= end {
            (*at, *end) = (0, 0);
            *incoming = None;
        }
        step
    }

    /// Receives what there is; false at the end of the stream.
    fn poll_receive(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<bool>> {
        loop {
            // First wait, then borrow.
            ready!(self.io.poll_read_ready(cx))?;
            let buffer = self.incoming.get_or_insert_with(Buffer::borrow);
            if self.at > 0 {
                // What is left is less than a record.
                buffer.bytes_mut().copy_within(self.at..self.end, 0);
                self.end -= self.at;
                self.at = 0;
            }
            let room = buffer.bytes_mut().get_mut(self.end..).unwrap_or_default();
            if room.is_empty() {
                return Poll::Ready(Err(invalid(rustls::Error::General(
                    "a record is longer than TLS allows".to_owned(),
                ))));
            }
            let mut room = ReadBuf::new(room);
            // Not `try_read`: this one knows that a read that leaves room has emptied the socket, and the next
            // look at it needs no system call.
            match Pin::new(&mut self.io).poll_read(cx, &mut room) {
                Poll::Ready(Ok(())) => {
                    let count = room.filled().len();
                    self.end += count;
                    return Poll::Ready(Ok(count > 0));
                }
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                Poll::Pending => {
                    if self.end == 0 {
                        self.incoming = None;
                    }
                }
            }
        }
    }

    /// Sends what is encrypted, all of it.
    pub(crate) fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.enqueue();
        while !self.queue.is_empty() {
            let mut slices = [IoSlice::new(&[]); AT_ONCE];
            let mut skip = self.sent;
            let mut count = 0;
            for (slice, (buffer, filled)) in slices.iter_mut().zip(&self.queue) {
                *slice = IoSlice::new(buffer.bytes().get(skip..*filled).unwrap_or_default());
                (skip, count) = (0, count + 1);
            }
            match self.io.try_write_vectored(slices.get(..count).unwrap_or_default()) {
                Ok(0) => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                Ok(count) => self.advance(count),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    ready!(self.io.poll_write_ready(cx))?;
                }
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
        Poll::Ready(Ok(()))
    }

    /// So many bytes were sent.
    fn advance(&mut self, count: usize) {
        self.sent += count;
        while let Some((_, filled)) = self.queue.front()
            && self.sent >= *filled
        {
            self.sent -= filled;
            self.queue.pop_front();
        }
        if self.queue.is_empty() && self.queue.capacity() > AT_ONCE {
            self.queue = VecDeque::new();
        }
    }

    /// What is encrypted goes behind what waits to be sent.
    fn enqueue(&mut self) {
        if let Some(buffer) = self.outgoing.take()
            && self.filled > 0
        {
            self.queue.push_back((buffer, self.filled));
        }
        self.filled = 0;
    }

    /// Room for plaintext in the outgoing buffer, in bytes.
    fn room(&self) -> usize {
        let free = crate::buffers::SIZE.saturating_sub(self.filled + UNASKED);
        let records = free / (RECORD + OVERHEAD);
        let rest = (free % (RECORD + OVERHEAD)).saturating_sub(OVERHEAD);
        records * RECORD + rest
    }

    /// Encrypts into the outgoing buffer, which has room for it.
    fn encrypt(&mut self, data: &[u8]) -> io::Result<()> {
        self.open(|traffic, out| traffic.encrypt(data, out))
    }

    /// Says that we send no more; where the session cannot, the end of the stream says less.
    fn close_notify(&mut self) {
        if let Session::Direct(_) = self.session {
            // A warning, and that we close.
            return self.alert_direct([1, 0]);
        }
        let _less = self.open(|traffic, out| traffic.close_notify(out));
    }

    /// Does something in the state in which data may be sent. What was received comes first: it is kept,
    /// and is no more than the buffer that it was received into.
    fn open(
        &mut self,
        write: impl Fn(&mut Open<'_, '_>, &mut [u8]) -> Result<usize, EncryptError>,
    ) -> io::Result<()> {
        loop {
            match self.try_open(&write)? {
                Step::Open => return Ok(()),
                Step::Again | Step::Plain => {}
                Step::PeerClosed if self.peer_closed => {
                    return Err(io::ErrorKind::BrokenPipe.into());
                }
                // It is said once: whoever reads next has to know. We may still send.
                Step::PeerClosed => self.peer_closed = true,
                Step::Blocked => return Err(io::ErrorKind::NotConnected.into()),
            }
        }
    }

    fn try_open(
        &mut self,
        write: impl Fn(&mut Open<'_, '_>, &mut [u8]) -> Result<usize, EncryptError>,
    ) -> io::Result<Step> {
        let Self { session, incoming, at, end, plain, outgoing, filled, .. } = self;
        let received = incoming
            .as_mut()
            .and_then(|buffer| buffer.bytes_mut().get_mut(*at..*end))
            .unwrap_or_default();
        let step;
        macro_rules! look {
            ($session:expr, $open:path) => {{
                let UnbufferedStatus { discard, state, .. } =
                    $session.process_tls_records(received);
                match state.map_err(invalid)? {
                    ConnectionState::WriteTraffic(mut traffic) => {
                        let out = outgoing.get_or_insert_with(Buffer::borrow);
                        let out = out.bytes_mut().get_mut(*filled..).unwrap_or_default();
                        *filled +=
                            write(&mut $open(&mut traffic), out).map_err(io::Error::other)?;
                        step = Step::Open;
                    }
                    state => {
                        step = take(state, plain, outgoing, filled).map_err(invalid)?;
                    }
                }
                discard
            }};
        }
        *at += match session {
            Session::Client(session) => look!(session, Open::Client),
            Session::Server(session) => look!(session, Open::Server),
            Session::Direct(_) => return Err(io::ErrorKind::NotConnected.into()),
        };
        if at >= end {
            (*at, *end) = (0, 0);
            *incoming = None;
        }
        Ok(step)
    }
}

/// The state in which data may be sent, of either side.
enum Open<'a, 'c> {
    Client(&'a mut WriteTraffic<'c, ClientConnectionData>),
    Server(&'a mut WriteTraffic<'c, ServerConnectionData>),
}

impl Open<'_, '_> {
    fn encrypt(&mut self, data: &[u8], out: &mut [u8]) -> Result<usize, EncryptError> {
        match self {
            Self::Client(traffic) => traffic.encrypt(data, out),
            Self::Server(traffic) => traffic.encrypt(data, out),
        }
    }

    fn close_notify(&mut self, out: &mut [u8]) -> Result<usize, EncryptError> {
        match self {
            Self::Client(traffic) => traffic.queue_close_notify(out),
            Self::Server(traffic) => traffic.queue_close_notify(out),
        }
    }
}

/// Does what the session asks for.
fn take<Data>(
    state: ConnectionState<'_, '_, Data>,
    plain: &mut VecDeque<Vec<u8>>,
    outgoing: &mut Option<Buffer>,
    filled: &mut usize,
) -> Result<Step, rustls::Error> {
    Ok(match state {
        ConnectionState::ReadTraffic(mut traffic) => {
            while let Some(Ok(record)) = traffic.next_record() {
                if !record.payload.is_empty() {
                    plain.push_back(record.payload.to_vec());
                }
            }
            Step::Plain
        }
        ConnectionState::EncodeTlsData(mut data) => {
            let buffer = outgoing.get_or_insert_with(Buffer::borrow);
            let out = buffer.bytes_mut().get_mut(*filled..).unwrap_or_default();
            match data.encode(out) {
                Ok(count) => *filled += count,
                // A flight of a handshake is far smaller than a buffer, and later alerts have their own
                // room. The session has forgotten what did not fit: it is of no more use.
                Err(error @ (EncodeError::InsufficientSize(_) | EncodeError::AlreadyEncoded)) => {
                    return Err(rustls::Error::General(error.to_string()));
                }
            }
            Step::Again
        }
        ConnectionState::TransmitTlsData(data) => {
            // It is in the outgoing buffer, before all that follows.
            data.done();
            Step::Again
        }
        ConnectionState::WriteTraffic(_) => Step::Open,
        ConnectionState::PeerClosed | ConnectionState::Closed => Step::PeerClosed,
        // Early data is never offered nor taken.
        _ => Step::Blocked,
    })
}

#[cfg(test)]
mod tests;
