//! What frames mean for the state: RFC 9113, sections 5, 6 and 8.

use super::{
    fields::{Fields, Malformed},
    frame::{By, Error, LARGEST_WINDOW, Reason, flag, kind, put, setting},
    receive::{broken, flooded, number},
    state::{Half, Head, Inner, Leaving, Ping, Role, want},
};
use std::sync::atomic::Ordering;

/// Streams that a peer may open and reset before we have seen them (rapid reset, CVE-2023-44487).
const PENDING_RESETS: usize = 20;

/// The payload of the PING behind our farewell; that of others is all zeros.
const FAREWELL: [u8; 8] = *b"farewell";

impl Inner {
    /// Whether nothing was ever heard of the stream, and nobody could have opened it.
    fn is_idle(&self, id: u32) -> bool {
        // Only clients open streams, and theirs are odd.
        id > self.last || id.is_multiple_of(2)
    }

    /// The same, where the peer has not been told that it is not heard any more.
    fn is_unheard(&self, id: u32) -> bool {
        let ignored = self.leaving == Leaving::Final && !id.is_multiple_of(2);
        self.is_idle(id) && !ignored
    }

    /// How a stream that is not open has ended: `Some(true)` if we reset it.
    fn ended_lately(&self, id: u32) -> Option<bool> {
        self.over.iter().rev().find(|(over, _)| *over == id).map(|(_, by_us)| *by_us)
    }

    pub(super) fn data_for_none(&mut self, id: u32) -> Result<(), Error> {
        if self.is_unheard(id) {
            return Err(broken("data of a stream that was never opened"));
        }
        match self.ended_lately(id) {
            Some(false) if self.leaving != Leaving::Final => {
                self.reset_for(id, Reason::STREAM_CLOSED, "data behind the end of a stream")
            }
            // It may not have heard of our reset yet, however long that is ago.
            _ => Ok(()),
        }
    }

    /// The peer sends no more on a stream.
    pub(super) fn heard_end(&mut self, key: usize) {
        if let Some(entry) = self.entries.get_mut(key)
            && entry.receiving == Half::Open
        {
            entry.receiving = Half::Ended;
            self.tell(key, want::READ);
            self.close(key, false);
        }
    }

    pub(super) fn on_request(&mut self, id: u32, fields: Fields, last: bool) -> Result<(), Error> {
        if let Some(key) = self.find(id) {
            return self.on_trailers(key, id, fields, last);
        }
        if id.is_multiple_of(2) {
            return Err(broken("a stream that only a server opens"));
        }
        if id <= self.last {
            return match self.ended_lately(id) {
                Some(true) => Ok(()),
                Some(false) => Err(Error::GoAway(
                    Reason::STREAM_CLOSED,
                    By::Us,
                    "headers behind the end of a stream",
                )),
                None => Err(broken("a stream with a smaller number than the one before")),
            };
        }
        if self.leaving == Leaving::Final {
            // It was told which was the last.
            return Ok(());
        }
        if self.ids.len() >= self.limits.streams {
            self.last = id;
            return self.reset_for(id, Reason::REFUSED_STREAM, "more streams than we take");
        }
        let (request, length) = match fields.request() {
            Ok(request) => request,
            Err(why) => {
                self.last = id;
                return self.reset_for(id, Reason::PROTOCOL_ERROR, why);
            }
        };
        let key = self.add(Head::Request(Box::new(request)));
        self.open(key, id);
        if let Some(entry) = self.entries.get_mut(key) {
            entry.expected = length.map(Box::new);
            if last {
                entry.receiving = Half::Ended;
            }
        }
        if last && length.is_some_and(|length| length > 0) {
            let why = "content that is not as long as it says";
            self.reset_for(id, Reason::PROTOCOL_ERROR, why)?;
            self.let_go(key);
            return Ok(());
        }
        self.incoming.push_back(key);
        Ok(())
    }

    fn on_trailers(
        &mut self,
        key: usize,
        id: u32,
        fields: Fields,
        last: bool,
    ) -> Result<(), Error> {
        let open = self.entries.get(key).is_some_and(|entry| entry.receiving == Half::Open);
        let missing = self
            .entries
            .get(key)
            .and_then(|entry| entry.expected.as_deref())
            .is_some_and(|left| *left > 0);
        let wrong: Result<(), (Reason, Malformed)> = if !open {
            Err((Reason::STREAM_CLOSED, "headers behind the end of a stream"))
        } else if !last {
            Err((Reason::PROTOCOL_ERROR, "headers in the middle of a stream"))
        } else if missing {
            Err((Reason::PROTOCOL_ERROR, "content that is not as long as it says"))
        } else {
            fields.trailers().map_err(|why| (Reason::PROTOCOL_ERROR, why))
        };
        match wrong {
            Ok(()) => self.heard_end(key),
            Err((reason, why)) => self.reset_for(id, reason, why)?,
        }
        Ok(())
    }

    pub(super) fn on_answer(&mut self, id: u32, fields: Fields, last: bool) -> Result<(), Error> {
        let Some(key) = self.find(id) else {
            return if self.is_idle(id) { Err(broken("an answer to nothing")) } else { Ok(()) };
        };
        if self.entries.get(key).is_some_and(|entry| entry.answered) {
            return self.on_trailers(key, id, fields, last);
        }
        let response = match fields.response() {
            Ok(response) if response.status.is_informational() && last => {
                let why = "an end before the answer";
                return self.reset_for(id, Reason::PROTOCOL_ERROR, why);
            }
            // The answer proper comes behind it.
            Ok(response) if response.status.is_informational() => return Ok(()),
            Ok(response) => response,
            Err(why) => return self.reset_for(id, Reason::PROTOCOL_ERROR, why),
        };
        if let Some(entry) = self.entries.get_mut(key) {
            entry.answered = true;
            entry.head = Head::Response(Box::new(response));
        }
        self.tell(key, want::ANSWER);
        if last {
            self.heard_end(key);
        }
        Ok(())
    }

    pub(super) fn on_priority(&mut self, id: u32, bytes: &[u8]) -> Result<(), Error> {
        if number(bytes, 0) & LARGEST_WINDOW == id {
            let why = "a stream that depends on itself";
            return self.reset_for(id, Reason::PROTOCOL_ERROR, why);
        }
        // Deprecated, and without effect (section 5.3.2).
        Ok(())
    }

    pub(super) fn on_reset(&mut self, id: u32, code: u32) -> Result<(), Error> {
        let Some(key) = self.find(id) else {
            return if self.is_unheard(id) { Err(broken("a reset of nothing")) } else { Ok(()) };
        };
        let reason = Reason(code);
        let unseen =
            self.entries.get(key).is_some_and(|entry| matches!(entry.head, Head::Request(_)));
        self.fail(key, Error::Reset(reason, By::Peer, ""));
        self.close(key, false);
        if unseen {
            self.reset_early += 1;
            if self.reset_early > PENDING_RESETS {
                return Err(flooded("streams that are opened and reset without end"));
            }
        }
        Ok(())
    }

    pub(super) fn on_settings(&mut self, bytes: &[u8]) -> Result<(), Error> {
        let mut most = None;
        let first = !std::mem::replace(&mut self.heard, true);
        for one in bytes.chunks_exact(6) {
            let (&[a, b], rest) = one.split_first_chunk().unwrap_or((&[0, 0], &[]));
            let value = number(rest, 0);
            match u16::from_be_bytes([a, b]) {
                setting::ENABLE_PUSH if value > 1 => {
                    return Err(broken("ENABLE_PUSH that is neither 0 nor 1"));
                }
                setting::MAX_CONCURRENT_STREAMS => {
                    most = Some(usize::try_from(value).unwrap_or(usize::MAX));
                }
                setting::INITIAL_WINDOW_SIZE => self.change_windows(value)?,
                setting::MAX_FRAME_SIZE if !(1 << 14..1 << 24).contains(&value) => {
                    return Err(broken("a MAX_FRAME_SIZE out of its bounds"));
                }
                setting::MAX_FRAME_SIZE => {
                    self.peer.frame = usize::try_from(value).unwrap_or(usize::MAX);
                }
                _ => {}
            }
        }
        // Until it has spoken our own limit stands in for it; without one there is none.
        if let Some(most) = most.or(first.then_some(usize::MAX)) {
            self.most.store(most, Ordering::Release);
        }
        put(&mut self.control, kind::SETTINGS, flag::ACK, 0, &[]);
        self.open_pending();
        Ok(())
    }

    fn change_windows(&mut self, to: u32) -> Result<(), Error> {
        let overflow = |why| Error::GoAway(Reason::FLOW_CONTROL_ERROR, By::Us, why);
        if to > LARGEST_WINDOW {
            return Err(overflow("an INITIAL_WINDOW_SIZE past all bounds"));
        }
        let change = i64::from(to) - i64::from(self.peer.initial_window);
        self.peer.initial_window = to;
        let keys: Vec<_> = self.entries.iter().map(|(key, _)| key).collect();
        for key in keys {
            let Some(entry) = self.entries.get_mut(key) else { continue };
            entry.send_window += change;
            if entry.send_window > i64::from(LARGEST_WINDOW) {
                return Err(overflow("a window past all bounds"));
            }
            if change > 0 {
                self.tell(key, want::ROOM);
            }
        }
        Ok(())
    }

    pub(super) fn on_ping(&mut self, ack: bool, bytes: &[u8]) {
        if !ack {
            put(&mut self.control, kind::PING, flag::ACK, 0, bytes);
            return;
        }
        if bytes == FAREWELL && self.leaving == Leaving::Told {
            self.say_goodbye(self.last, Reason::NO_ERROR);
            self.leaving = Leaving::Final;
        } else if self.ping == Ping::Sent {
            self.ping = Ping::Answered;
            self.wake_pinger();
        }
    }

    /// Tells the peer that we leave; what it has sent before it hears that is still taken.
    pub(super) fn leave(&mut self) {
        if self.leaving == Leaving::No && self.ended.is_none() {
            self.leaving = Leaving::Told;
            self.say_goodbye(LARGEST_WINDOW, Reason::NO_ERROR);
            put(&mut self.control, kind::PING, 0, 0, &FAREWELL);
            self.kick();
        }
    }

    pub(super) fn say_goodbye(&mut self, last: u32, reason: Reason) {
        // A client has taken no stream of its server's.
        let last = if self.role == Role::Server { last } else { 0 };
        let payload = [last.to_be_bytes(), reason.0.to_be_bytes()].concat();
        put(&mut self.control, kind::GOAWAY, 0, 0, &payload);
    }

    pub(super) fn on_goaway(&mut self, last: u32, code: u32) -> Result<(), Error> {
        let reason = Reason(code);
        if self.role == Role::Server {
            // A client that leaves opens no more streams; those that live go on.
            return Ok(());
        }
        if self.left.is_none() || reason != Reason::NO_ERROR {
            self.left = Some(reason);
        }
        let unopened = std::mem::take(&mut self.pending);
        let unseen: Vec<_> =
            self.ids.iter().filter(|(id, _)| *id > last).map(|(_, key)| *key).collect();
        for key in unopened.into_iter().chain(unseen) {
            if reason == Reason::NO_ERROR {
                self.fail(key, Error::Left(reason));
            } else {
                self.fail(key, Error::GoAway(reason, By::Peer, ""));
            }
            self.close(key, false);
        }
        self.kick();
        Ok(())
    }

    pub(super) fn on_window(&mut self, id: u32, more: u32) -> Result<(), Error> {
        let more = i64::from(more);
        if id == 0 {
            if more == 0 {
                return Err(broken("a WINDOW_UPDATE by nothing"));
            }
            self.send_window += more;
            if self.send_window > i64::from(LARGEST_WINDOW) {
                let why = "a window past all bounds";
                return Err(Error::GoAway(Reason::FLOW_CONTROL_ERROR, By::Us, why));
            }
            self.feed_starved();
            return Ok(());
        }
        let Some(key) = self.find(id) else {
            return if self.is_unheard(id) { Err(broken("a window of nothing")) } else { Ok(()) };
        };
        if more == 0 {
            return self.reset_for(id, Reason::PROTOCOL_ERROR, "a WINDOW_UPDATE by nothing");
        }
        let Some(entry) = self.entries.get_mut(key) else { return Ok(()) };
        entry.send_window += more;
        if entry.send_window > i64::from(LARGEST_WINDOW) {
            let why = "a window past all bounds";
            return self.reset_for(id, Reason::FLOW_CONTROL_ERROR, why);
        }
        self.tell(key, want::ROOM);
        Ok(())
    }
}
