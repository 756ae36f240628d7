//! The record layer of TLS 1.3 (RFC 8446, section 5), once rustls has shaken hands.
//!
//! rustls's unbuffered API copies a record twice on its way out and twice on its way in, with an allocation
//! each. Here it is copied once on its way out, into the buffer that is sent, and decrypted where it was
//! received. rustls keeps what is not a matter of bytes: the handshake, the verifiers, the schedule of the
//! keys. Configurations that do not share their secrets (`enable_secret_extraction`), TLS 1.2 and other
//! ciphers than AES-GCM stay with rustls.

use super::{OVERHEAD, RECORD};
use aws_lc_rs::aead::{AES_128_GCM, AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use rustls::{
    AlertDescription, CipherSuite, CommonState, ConnectionTrafficSecrets, Error, ExtractedSecrets,
    InvalidMessage, PeerMisbehaved, ProtocolVersion,
    client::{ClientConnectionData, UnbufferedClientConnection},
    kernel::KernelConnection,
    server::{ServerConnectionData, UnbufferedServerConnection},
};
use std::ops::Range;

/// The header of a record, in bytes: type, version, length.
const HEADER: usize = 5;
/// The authentication tag of a record, in bytes.
const TAG: usize = 16;
/// What a record may be longer than its plaintext (section 5.2), in bytes.
const EXPANSION: usize = 256;

/// Types of content.
const ALERT: u8 = 21;
const HANDSHAKE: u8 = 22;
pub(super) const DATA: u8 = 23;

/// Types of messages after the handshake.
const NEW_SESSION_TICKET: u8 = 4;
const KEY_UPDATE: u8 = 24;

/// Records under one key. AES-GCM allows 2^24.5 of full size (section 5.5).
const RECORDS_A_KEY: u64 = 1 << 23;

/// Messages of a peer in a row that are no data: as many as rustls lets pass.
const NO_DATA: u8 = 32;

/// A message after the handshake that spans records, in bytes.
const MESSAGE: usize = 64 * 1024;

/// The keys of one direction.
struct Keys {
    key: LessSafeKey,
    iv: [u8; 12],
    sequence: u64,
}

impl Keys {
    fn new((sequence, secrets): (u64, ConnectionTrafficSecrets)) -> Result<Self, Error> {
        let (algorithm, key, iv) = match &secrets {
            ConnectionTrafficSecrets::Aes128Gcm { key, iv } => (&AES_128_GCM, key, iv),
            ConnectionTrafficSecrets::Aes256Gcm { key, iv } => (&AES_256_GCM, key, iv),
            _ => return Err(Error::General("no record layer for this cipher".to_owned())),
        };
        let key = UnboundKey::new(algorithm, key.as_ref())
            .map_err(|_opaque| Error::General("not a key of this cipher".to_owned()))?;
        let iv = iv
            .as_ref()
            .try_into()
            .map_err(|_length| Error::General("not an IV of this cipher".to_owned()))?;
        Ok(Self { key: LessSafeKey::new(key), iv, sequence })
    }

    /// The nonce of the next record (section 5.3).
    fn nonce(&mut self) -> Result<Nonce, Error> {
        let mut nonce = self.iv;
        for (byte, of) in nonce.iter_mut().skip(4).zip(self.sequence.to_be_bytes()) {
            *byte ^= of;
        }
        self.sequence = self.sequence.checked_add(1).ok_or(Error::EncryptError)?;
        Ok(Nonce::assume_unique_for_key(nonce))
    }
}

enum Schedule {
    Client(KernelConnection<ClientConnectionData>),
    Server(KernelConnection<ServerConnectionData>),
}

impl Schedule {
    fn next_to_send(&mut self) -> Result<Keys, Error> {
        Keys::new(match self {
            Self::Client(connection) => connection.update_tx_secret(),
            Self::Server(connection) => connection.update_tx_secret(),
        }?)
    }

    fn next_to_receive(&mut self) -> Result<Keys, Error> {
        Keys::new(match self {
            Self::Client(connection) => connection.update_rx_secret(),
            Self::Server(connection) => connection.update_rx_secret(),
        }?)
    }
}

/// What a record held.
pub(super) enum Opened {
    /// Data: this part of the record.
    Data(Range<usize>),
    /// Nothing to pass on.
    Nothing,
    /// The peer sends no more.
    Closed,
}

/// The record layer of a connection.
pub(super) struct Records {
    send: Keys,
    receive: Keys,
    schedule: Schedule,
    /// The peer wants us to change our key before we send more.
    update: bool,
    /// Messages in a row that were no data.
    idle: u8,
    /// The beginning of a message after the handshake.
    message: Vec<u8>,
}

/// Whether the record layer of a connection that has shaken hands can be taken over.
pub(super) fn fits(state: &CommonState) -> bool {
    state.protocol_version() == Some(ProtocolVersion::TLSv1_3)
        && state.negotiated_cipher_suite().is_some_and(|suite| {
            matches!(
                suite.suite(),
                CipherSuite::TLS13_AES_128_GCM_SHA256 | CipherSuite::TLS13_AES_256_GCM_SHA384
            )
        })
}

impl Records {
    pub(super) fn of_client(session: UnbufferedClientConnection) -> Result<Self, Error> {
        let (secrets, schedule) = session.dangerous_into_kernel_connection()?;
        Self::new(secrets, Schedule::Client(schedule))
    }

    pub(super) fn of_server(session: UnbufferedServerConnection) -> Result<Self, Error> {
        let (secrets, schedule) = session.dangerous_into_kernel_connection()?;
        Self::new(secrets, Schedule::Server(schedule))
    }

    fn new(secrets: ExtractedSecrets, schedule: Schedule) -> Result<Self, Error> {
        Ok(Self {
            send: Keys::new(secrets.tx)?,
            receive: Keys::new(secrets.rx)?,
            schedule,
            update: false,
            idle: 0,
            message: Vec::new(),
        })
    }

    /// Encrypts an alert: its level, its description.
    pub(super) fn seal_alert(&mut self, alert: [u8; 2], out: &mut [u8]) -> Result<usize, Error> {
        self.seal_message(ALERT, &alert, out)
    }

    fn seal_message(&mut self, kind: u8, message: &[u8], out: &mut [u8]) -> Result<usize, Error> {
        let Some(record) = out.get_mut(..message.len() + OVERHEAD) else { return Ok(0) };
        record.get_mut(HEADER..HEADER + message.len()).unwrap_or_default().copy_from_slice(message);
        self.seal_record(kind, record)?;
        Ok(record.len())
    }

    /// Whether it is time to change our key.
    pub(super) const fn wants_update(&self) -> bool {
        self.update || self.send.sequence >= RECORDS_A_KEY
    }

    /// Changes our key where it is time to.
    pub(super) fn seal_update(&mut self, out: &mut [u8]) -> Result<usize, Error> {
        if !self.wants_update() {
            return Ok(0);
        }
        // Its length, and that the peer need not change its own.
        let length = self.seal_message(HANDSHAKE, &[KEY_UPDATE, 0, 0, 1, 0], out)?;
        if length > 0 {
            self.send = self.schedule.next_to_send()?;
            self.update = false;
        }
        Ok(length)
    }

    /// Encrypts a record, whose plaintext is in its place.
    pub(super) fn seal_record(&mut self, kind: u8, record: &mut [u8]) -> Result<(), Error> {
        let length = u16::try_from(record.len() - HEADER).map_err(|_long| Error::EncryptError)?;
        let [high, low] = length.to_be_bytes();
        let header = [DATA, 3, 3, high, low];
        let (head, body) = record.split_at_mut_checked(HEADER).ok_or(Error::EncryptError)?;
        head.copy_from_slice(&header);
        let inner = body.len().checked_sub(TAG).ok_or(Error::EncryptError)?;
        let (inner, tag) = body.split_at_mut(inner);
        *inner.last_mut().ok_or(Error::EncryptError)? = kind;
        let nonce = self.send.nonce()?;
        let sealed = self.send.key.seal_in_place_separate_tag(nonce, Aad::from(header), inner);
        tag.copy_from_slice(sealed.map_err(|_opaque| Error::EncryptError)?.as_ref());
        Ok(())
    }

    /// The length of the record that begins here, with its header; `None` where that is not here yet.
    pub(super) fn length(received: &[u8]) -> Result<Option<usize>, Error> {
        let Some((&[kind, _, _, high, low], _)) = received.split_first_chunk() else {
            return Ok(None);
        };
        if kind != DATA {
            return Err(Error::InappropriateMessage {
                expect_types: vec![rustls::ContentType::ApplicationData],
                got_type: kind.into(),
            });
        }
        let length = usize::from(u16::from_be_bytes([high, low]));
        if length > RECORD + EXPANSION {
            return Err(Error::PeerSentOversizedRecord);
        }
        Ok(Some(HEADER + length))
    }

    /// Decrypts a whole record where it lies.
    pub(super) fn open(&mut self, record: &mut [u8]) -> Result<Opened, Error> {
        let nonce = self.receive.nonce()?;
        let (header, body) = record.split_first_chunk_mut().ok_or(Error::DecryptError)?;
        let header: [u8; HEADER] = *header;
        let inner = self
            .receive
            .key
            .open_in_place(nonce, Aad::from(header), body)
            .map_err(|_opaque| Error::DecryptError)?;
        // Behind the content are its type, and padding of zeros (section 5.4).
        let Some(length) = inner.iter().rposition(|byte| *byte != 0) else {
            return Err(PeerMisbehaved::IllegalTlsInnerPlaintext.into());
        };
        if length > RECORD {
            return Err(Error::PeerSentOversizedRecord);
        }
        let kind = inner.get(length).copied().unwrap_or_default();
        let content = inner.get(..length).unwrap_or_default();
        match kind {
            DATA if !self.message.is_empty() => {
                Err(PeerMisbehaved::MessageInterleavedWithHandshakeMessage.into())
            }
            DATA => {
                if length > 0 {
                    self.idle = 0;
                }
                Ok(Opened::Data(HEADER..HEADER + length))
            }
            ALERT => self.alert(content),
            HANDSHAKE => {
                let content = content.to_vec();
                self.messages(&content)
            }
            _ => Err(InvalidMessage::InvalidContentType.into()),
        }
    }

    /// Something that is no data. A peer may not go on like that for ever.
    fn no_data(&mut self) -> Result<Opened, Error> {
        self.idle += 1;
        if self.idle > NO_DATA {
            return Err(PeerMisbehaved::TooManyKeyUpdateRequests.into());
        }
        Ok(Opened::Nothing)
    }

    fn alert(&mut self, content: &[u8]) -> Result<Opened, Error> {
        let &[_level, description] = content else {
            return Err(InvalidMessage::MissingData("AlertMessagePayload").into());
        };
        match AlertDescription::from(description) {
            AlertDescription::CloseNotify => Ok(Opened::Closed),
            // It says that a handshake is given up; close_notify follows.
            AlertDescription::UserCanceled => self.no_data(),
            other => Err(Error::AlertReceived(other)),
        }
    }

    fn messages(&mut self, content: &[u8]) -> Result<Opened, Error> {
        if self.message.len() + content.len() > MESSAGE {
            return Err(InvalidMessage::HandshakePayloadTooLarge.into());
        }
        self.message.extend_from_slice(content);
        loop {
            let Some((&[kind, a, b, c], rest)) = self.message.split_first_chunk() else {
                return self.no_data();
            };
            let length = usize::try_from(u32::from_be_bytes([0, a, b, c])).unwrap_or(usize::MAX);
            if length > MESSAGE {
                return Err(InvalidMessage::HandshakePayloadTooLarge.into());
            }
            let Some((body, after)) = rest.split_at_checked(length) else { return self.no_data() };
            match (kind, body) {
                (KEY_UPDATE, &[want @ (0 | 1)]) => {
                    // "MUST align with a record boundary" (section 5.1).
                    if !after.is_empty() {
                        return Err(PeerMisbehaved::KeyEpochWithPendingFragment.into());
                    }
                    self.update |= want == 1;
                    self.message = Vec::new();
                    self.receive = self.schedule.next_to_receive()?;
                    return self.no_data();
                }
                // Sessions are not resumed.
                (NEW_SESSION_TICKET, _) if matches!(self.schedule, Schedule::Client(_)) => {
                    self.message = after.to_vec();
                }
                _ => {
                    return Err(Error::InappropriateHandshakeMessage {
                        expect_types: vec![rustls::HandshakeType::KeyUpdate],
                        got_type: kind.into(),
                    });
                }
            }
        }
    }
}

/// The alert that tells a peer of an error: fatal, and what.
pub(super) fn alert_of(error: &Error) -> [u8; 2] {
    let description = match error {
        Error::DecryptError => AlertDescription::BadRecordMac,
        Error::PeerSentOversizedRecord => AlertDescription::RecordOverflow,
        Error::EncryptError | Error::General(_) => AlertDescription::InternalError,
        Error::InvalidMessage(_) => AlertDescription::DecodeError,
        _ => AlertDescription::UnexpectedMessage,
    };
    [2, description.into()]
}

#[cfg(test)]
mod tests;
