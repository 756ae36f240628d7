//! What goes out: control first, then the streams in turn.

use super::{
    frame::data,
    state::{Half, Inner, listed, want},
};
use crate::parcel::{Chunk, HEAD, MOST, Parcel, Payload};
use bytes::{Bytes, BytesMut};

/// Small pieces are put together up to this, in bytes.
const TOGETHER: usize = 16 * 1024;

/// Streams whose turns are kept room for.
const READY: usize = 16;

/// Parcels that are put together before they are written.
const PARCELS: usize = 2;

/// A piece that waits to be sent.
#[derive(Debug)]
pub(super) enum Outgoing {
    /// It lies where it is sent from.
    Payload(Payload),
    Bytes(Bytes),
    /// Put together of small ones.
    Together(BytesMut),
}

impl Inner {
    /// Queues what there is room for.
    pub(super) fn queue(&mut self, key: usize, chunk: Chunk) {
        let Some(entry) = self.entries.get_mut(key) else { return };
        let length = u32::try_from(chunk.len()).unwrap_or(u32::MAX);
        // Nobody gives more than the room that was promised.
        let over = length.saturating_sub(entry.reserved);
        entry.reserved -= length - over;
        entry.send_window -= i64::from(over);
        entry.queued += length;
        self.send_window -= i64::from(over);
        match chunk.into_payload() {
            Ok(payload) => entry.outgoing.push(Outgoing::Payload(payload)),
            Err(chunk) => {
                let bytes = chunk.into_bytes();
                match entry.outgoing.last_mut() {
                    Some(Outgoing::Together(last)) if last.len() + bytes.len() <= TOGETHER => {
                        last.extend_from_slice(&bytes);
                    }
                    Some(Outgoing::Bytes(last)) if last.len() + bytes.len() <= TOGETHER / 4 => {
                        let mut together = BytesMut::with_capacity(2 * (last.len() + bytes.len()));
                        together.extend_from_slice(last);
                        together.extend_from_slice(&bytes);
                        if let Some(last) = entry.outgoing.last_mut() {
                            *last = Outgoing::Together(together);
                        }
                    }
                    _ => entry.outgoing.push(Outgoing::Bytes(bytes)),
                }
            }
        }
        self.line_up(key);
    }

    /// Has a stream sent, in its turn.
    pub(super) fn line_up(&mut self, key: usize) {
        let Some(entry) = self.entries.get_mut(key) else { return };
        if entry.listed & listed::READY == 0 {
            entry.listed |= listed::READY;
            self.ready.push_back(key);
        }
        self.kick();
    }

    pub(super) fn has_output(&self) -> bool {
        !self.control.is_empty() || !self.ready.is_empty()
    }

    /// Puts together what is to be written next.
    pub(super) fn collect(&mut self, out: &mut Vec<Parcel>) {
        let mut parcel = Parcel::new();
        let taken = parcel.put(&self.control);
        if taken == self.control.len() {
            // Idle, it holds no memory.
            self.control = Vec::new();
        } else {
            self.control.drain(..taken);
        }
        while out.len() < PARCELS
            && let Some(key) = self.ready.pop_front()
        {
            if parcel.room() <= HEAD {
                out.push(std::mem::replace(&mut parcel, Parcel::new()));
            }
            self.collect_one(key, &mut parcel, out);
        }
        if !parcel.is_empty() {
            out.push(parcel);
        }
        if self.ready.is_empty() && self.ready.capacity() > READY {
            self.ready = std::collections::VecDeque::new();
        }
    }

    /// The next piece of a stream.
    fn collect_one(&mut self, key: usize, parcel: &mut Parcel, out: &mut Vec<Parcel>) {
        let Some(entry) = self.entries.get_mut(key) else { return };
        entry.listed &= !listed::READY;
        let id = entry.id;
        if id == 0 || entry.sending == Half::Ended {
            return;
        }
        let ending = entry.sending == Half::Ending;
        let piece = entry.outgoing.pop();
        let mut last = ending && entry.outgoing.is_empty();
        let sent = match piece {
            Some(Outgoing::Payload(payload)) => {
                let sent = payload.len();
                if !parcel.is_empty() {
                    out.push(std::mem::replace(parcel, Parcel::new()));
                }
                out.push(payload.framed(|length, of_last| data(id, length, last && of_last)));
                sent
            }
            Some(piece) => {
                let mut bytes = match piece {
                    Outgoing::Together(bytes) => bytes.freeze(),
                    Outgoing::Bytes(bytes) => bytes,
                    Outgoing::Payload(_) => Bytes::new(),
                };
                let most = self.peer.frame.min(parcel.room() - HEAD);
                let now = bytes.split_to(bytes.len().min(most));
                if !bytes.is_empty() {
                    entry.outgoing.push_front(Outgoing::Bytes(bytes));
                    last = false;
                }
                parcel.put(&data(id, now.len(), last));
                parcel.put(&now);
                now.len()
            }
            None if last => {
                parcel.put(&data(id, 0, true));
                0
            }
            None => return,
        };
        entry.queued = entry.queued.saturating_sub(u32::try_from(sent).unwrap_or(u32::MAX));
        if last {
            entry.sending = Half::Ended;
        } else if ending || !entry.outgoing.is_empty() {
            entry.listed |= listed::READY;
            self.ready.push_back(key);
        }
        self.tell(key, want::ROOM);
        if last {
            self.close(key, false);
        }
    }
}

const _: () = assert!(MOST > 2 * HEAD);
