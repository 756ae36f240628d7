//! A connection's state, apart from its socket: its streams, the windows of both directions, and what is to be
//! said. Frames come in by [`receive`](super::receive) and go out by [`send`](super::send).

use super::{
    fields::{Request, Response},
    frame::{By, Error, INITIAL_WINDOW, LARGEST_WINDOW, Reason, flag, kind, put, setting},
    queue::{Queue, Received},
    send::Outgoing,
};
use crate::Settings;
use std::{
    collections::VecDeque,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::Waker,
};

/// The largest list of headers that a client may send, in bytes.
const SERVER_HEADERS: usize = 64 * 1024;
/// The largest list of headers that a server may send, in bytes.
const CLIENT_HEADERS: usize = 16 * 1024;
/// Streams that we may have to reset for a peer's errors before it is cut off.
const LOCAL_RESETS: u32 = 1024;
/// Streams whose end is remembered: what the peer sent before it heard of it is no error.
const REMEMBERED: usize = 64;

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Role {
    Client,
    Server,
}

/// What we allow.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    pub(super) stream_window: u32,
    pub(super) connection_window: u32,
    pub(super) frame: usize,
    pub(super) headers: usize,
    pub(super) send_buffer: usize,
    /// Streams that the peer may open.
    pub(super) streams: usize,
}

/// What the peer allows.
#[derive(Clone, Copy, Debug)]
pub(super) struct Peer {
    pub(super) initial_window: u32,
    pub(super) frame: usize,
}

/// How far one direction of a stream has come.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Half {
    Open,
    /// We have said, or heard, that it is the end; what waits in the queue comes before that.
    Ending,
    Ended,
}

/// What the holder of a stream waits for.
pub(super) mod want {
    pub(in crate::engine) const READ: u8 = 1;
    pub(in crate::engine) const ROOM: u8 = 2;
    pub(in crate::engine) const CUT: u8 = 4;
    pub(in crate::engine) const ANSWER: u8 = 8;
}

/// Where a stream stands in line.
pub(super) mod listed {
    pub(in crate::engine) const READY: u8 = 1;
    pub(in crate::engine) const STARVED: u8 = 2;
}

/// The head that a stream waits for, or was opened with.
#[derive(Debug)]
pub(super) enum Head {
    None,
    /// A request that waits to be sent.
    Unsent(Box<Request>),
    /// A request that waits to be accepted.
    Request(Box<Request>),
    /// An answer that waits to be seen.
    Response(Box<Response>),
}

/// One stream.
#[derive(Debug)]
pub(super) struct Entry {
    /// 0 until it is opened.
    pub(super) id: u32,
    pub(super) receiving: Half,
    pub(super) sending: Half,
    pub(super) wants: u8,
    pub(super) listed: u8,
    /// Somebody holds it.
    pub(super) held: bool,
    /// Batches that pieces in the queue share the memory of.
    pub(super) shared: u8,
    /// The last of those.
    pub(super) batch: u32,
    /// The answer has come: what else comes is the end.
    pub(super) answered: bool,
    pub(super) head: Head,
    pub(super) waker: Option<Waker>,
    pub(super) error: Option<Box<Error>>,
    pub(super) received: Received,
    /// What the peer may still send.
    pub(super) receive_window: i64,
    /// Bytes that were received and are not yet released.
    pub(super) outstanding: u32,
    /// Bytes that were released, which the peer has not been told.
    pub(super) unreleased: u32,
    /// Content that is still to come, where the peer has said how much.
    pub(super) expected: Option<Box<u64>>,
    pub(super) outgoing: Queue<Outgoing>,
    pub(super) queued: u32,
    /// What we may still send. Negative where the peer has made its windows smaller.
    pub(super) send_window: i64,
    /// Room that was promised to the holder, and is taken off both windows.
    pub(super) reserved: u32,
}

/// The peer was asked whether it lives.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Ping {
    None,
    Sent,
    Answered,
}

/// How far our leaving has come.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Leaving {
    No,
    /// The peer was told, and a PING sent after it: what it sent before it knew is taken.
    Told,
    /// No more streams are taken.
    Final,
}

#[derive(Debug)]
pub(super) struct Inner {
    pub(super) role: Role,
    pub(super) limits: Limits,
    pub(super) peer: Peer,
    pub(super) entries: slab::Slab<Entry>,
    /// The open streams by their number, which grows.
    pub(super) ids: Vec<(u32, usize)>,
    /// Streams with something to send.
    pub(super) ready: VecDeque<usize>,
    /// Streams that wait for the connection's window.
    pub(super) starved: VecDeque<usize>,
    /// Requests that wait until the peer takes more.
    pub(super) pending: VecDeque<usize>,
    /// Requests that wait to be accepted.
    pub(super) incoming: VecDeque<usize>,
    /// Of those, how many the peer has reset.
    pub(super) reset_early: usize,
    /// Streams that have ended lately, and whether we reset them.
    pub(super) over: VecDeque<(u32, bool)>,
    /// Whole frames that come before all data.
    pub(super) control: Vec<u8>,
    pub(super) send_window: i64,
    pub(super) receive_window: i64,
    pub(super) unreleased: u32,
    /// Batches that were delivered.
    pub(super) batch: u32,
    /// The largest number of a stream so far.
    pub(super) last: u32,
    pub(super) local_resets: u32,
    /// We have sent a block of headers.
    pub(super) greeted: bool,
    /// The peer has sent its settings.
    pub(super) heard: bool,
    pub(super) ping: Ping,
    pub(super) pinger: Option<Waker>,
    pub(super) leaving: Leaving,
    /// The peer leaves.
    pub(super) left: Option<Reason>,
    /// Why it is over.
    pub(super) ended: Option<Error>,
    /// How many may still open streams.
    pub(super) holders: usize,
    pub(super) driver: Option<Waker>,
    /// Whom to wake once the lock is given back.
    pub(super) wake: Vec<Waker>,
    /// What the peer takes, for who does not want the lock.
    pub(super) most: Arc<AtomicUsize>,
}

impl Inner {
    pub(super) fn new(role: Role, settings: &Settings) -> Self {
        let (headers, streams) = match role {
            Role::Client => (CLIENT_HEADERS, 0),
            Role::Server => (SERVER_HEADERS, settings.server_streams),
        };
        let limits = Limits {
            stream_window: settings.stream_window.min(LARGEST_WINDOW),
            connection_window: settings.connection_window.clamp(INITIAL_WINDOW, LARGEST_WINDOW),
            frame: usize::try_from(settings.frame_size).unwrap_or(usize::MAX),
            headers,
            send_buffer: settings.send_buffer,
            streams: usize::try_from(streams).unwrap_or(usize::MAX),
        };
        let most = usize::try_from(settings.pool_streams).unwrap_or(usize::MAX);
        let mut this = Self {
            role,
            limits,
            peer: Peer { initial_window: INITIAL_WINDOW, frame: 16 * 1024 },
            entries: slab::Slab::new(),
            ids: Vec::new(),
            ready: VecDeque::new(),
            starved: VecDeque::new(),
            pending: VecDeque::new(),
            incoming: VecDeque::new(),
            reset_early: 0,
            over: VecDeque::new(),
            control: Vec::new(),
            send_window: INITIAL_WINDOW.into(),
            receive_window: limits.connection_window.into(),
            unreleased: 0,
            batch: 0,
            last: 0,
            local_resets: 0,
            greeted: false,
            heard: false,
            ping: Ping::None,
            pinger: None,
            leaving: Leaving::No,
            left: None,
            ended: None,
            holders: usize::from(role == Role::Client),
            driver: None,
            wake: Vec::new(),
            most: Arc::new(AtomicUsize::new(most)),
        };
        this.greet();
        this
    }

    /// Our settings and, as a client, what comes before them.
    fn greet(&mut self) {
        let mut settings = vec![
            (setting::INITIAL_WINDOW_SIZE, self.limits.stream_window),
            (setting::MAX_FRAME_SIZE, u32::try_from(self.limits.frame).unwrap_or(u32::MAX)),
            (setting::MAX_HEADER_LIST_SIZE, u32::try_from(self.limits.headers).unwrap_or(u32::MAX)),
        ];
        match self.role {
            Role::Client => {
                self.control.extend_from_slice(super::frame::PREFACE);
                settings.push((setting::ENABLE_PUSH, 0));
            }
            Role::Server => {
                let most = u32::try_from(self.limits.streams).unwrap_or(u32::MAX);
                settings.push((setting::MAX_CONCURRENT_STREAMS, most));
            }
        }
        let payload: Vec<u8> = settings
            .into_iter()
            .flat_map(|(key, value)| key.to_be_bytes().into_iter().chain(value.to_be_bytes()))
            .collect();
        put(&mut self.control, kind::SETTINGS, 0, 0, &payload);
        let more = self.limits.connection_window - INITIAL_WINDOW;
        if more > 0 {
            put(&mut self.control, kind::WINDOW_UPDATE, 0, 0, &more.to_be_bytes());
        }
    }

    /// Has who drives the connection look at it.
    pub(super) fn kick(&mut self) {
        self.wake.extend(self.driver.take());
    }

    /// Wakes the holder of a stream, if it waits for this.
    pub(super) fn tell(&mut self, key: usize, what: u8) {
        if let Some(entry) = self.entries.get_mut(key)
            && entry.wants & what != 0
        {
            entry.wants = 0;
            self.wake.extend(entry.waker.take());
        }
    }

    pub(super) fn wake_pinger(&mut self) {
        self.wake.extend(self.pinger.take());
    }

    /// An open stream's place.
    pub(super) fn find(&self, id: u32) -> Option<usize> {
        let at = self.ids.binary_search_by_key(&id, |(id, _)| *id).ok()?;
        self.ids.get(at).map(|(_, key)| *key)
    }

    /// Adds a stream that is not opened yet.
    pub(super) fn add(&mut self, head: Head) -> usize {
        self.entries.insert(Entry {
            id: 0,
            receiving: Half::Open,
            sending: Half::Open,
            wants: 0,
            listed: 0,
            held: true,
            shared: 0,
            batch: 0,
            answered: self.role == Role::Server,
            head,
            waker: None,
            error: None,
            received: Received::new(),
            receive_window: self.limits.stream_window.into(),
            outstanding: 0,
            unreleased: 0,
            expected: None,
            outgoing: Queue::Empty,
            queued: 0,
            send_window: self.peer.initial_window.into(),
            reserved: 0,
        })
    }

    /// Gives a stream its number.
    pub(super) fn open(&mut self, key: usize, id: u32) {
        if let Some(entry) = self.entries.get_mut(key) {
            entry.id = id;
            self.last = self.last.max(id);
            self.ids.push((id, key));
        }
    }

    /// Opens the requests that wait, as far as the peer takes them.
    pub(super) fn open_pending(&mut self) {
        while self.ids.len() < self.most.load(Ordering::Relaxed)
            && self.left.is_none()
            && let Some(key) = self.pending.pop_front()
        {
            let Some(entry) = self.entries.get_mut(key) else { continue };
            let Head::Unsent(request) = std::mem::replace(&mut entry.head, Head::None) else {
                continue;
            };
            let id = if self.last == 0 { 1 } else { self.last + 2 };
            self.open(key, id);
            self.send_head(id, false, |block, first| request.encode(block, first));
            self.kick();
        }
        if self.pending.is_empty() {
            self.pending = VecDeque::new();
        }
    }

    /// Whether there is no number left for another stream (section 5.1.1): a new connection has them all.
    pub(super) fn has_used_up_its_numbers(&self) -> bool {
        let waiting = u32::try_from(self.pending.len()).unwrap_or(u32::MAX);
        self.last.saturating_add(waiting.saturating_mul(2)) > LARGEST_WINDOW - 4
    }

    /// A HEADERS frame and, where the peer wants no such large frames, what continues it.
    pub(super) fn send_head(
        &mut self,
        id: u32,
        last: bool,
        encode: impl FnOnce(&mut Vec<u8>, bool),
    ) {
        let mut block = Vec::with_capacity(512);
        encode(&mut block, !self.greeted);
        self.greeted = true;
        let mut parts = block.chunks(self.peer.frame).peekable();
        let mut kind = kind::HEADERS;
        let mut flags = if last { flag::END_STREAM } else { 0 };
        while let Some(part) = parts.next() {
            if parts.peek().is_none() {
                flags |= flag::END_HEADERS;
            }
            put(&mut self.control, kind, flags, id, part);
            (kind, flags) = (kind::CONTINUATION, 0);
        }
    }

    /// Gives back room that a stream does not use.
    pub(super) fn unreserve(&mut self, key: usize) {
        let Some(entry) = self.entries.get_mut(key) else { return };
        let room = std::mem::take(&mut entry.reserved);
        if room > 0 {
            entry.send_window += i64::from(room);
            self.send_window += i64::from(room);
            self.feed_starved();
        }
    }

    /// There is room in the connection's window again.
    pub(super) fn feed_starved(&mut self) {
        if self.send_window <= 0 {
            return;
        }
        for key in std::mem::take(&mut self.starved) {
            if let Some(entry) = self.entries.get_mut(key) {
                entry.listed &= !listed::STARVED;
            }
            self.tell(key, want::ROOM);
        }
    }

    /// Bytes of the connection's window that nobody holds any more.
    pub(super) fn release(&mut self, bytes: u32) {
        self.unreleased = self.unreleased.saturating_add(bytes);
        if self.unreleased >= self.limits.connection_window / 2 {
            let bytes = std::mem::take(&mut self.unreleased);
            self.receive_window += i64::from(bytes);
            put(&mut self.control, kind::WINDOW_UPDATE, 0, 0, &bytes.to_be_bytes());
            self.kick();
        }
    }

    /// Bytes of a stream's window that its holder has passed on.
    pub(super) fn release_stream(&mut self, key: usize, bytes: u32) {
        let Some(entry) = self.entries.get_mut(key) else { return };
        let bytes = bytes.min(entry.outstanding);
        entry.outstanding -= bytes;
        entry.unreleased = entry.unreleased.saturating_add(bytes);
        if entry.receiving == Half::Open && entry.unreleased >= self.limits.stream_window / 2 {
            let bytes = std::mem::take(&mut entry.unreleased);
            entry.receive_window += i64::from(bytes);
            put(&mut self.control, kind::WINDOW_UPDATE, 0, entry.id, &bytes.to_be_bytes());
            self.kick();
        }
        self.release(bytes);
    }

    /// A stream of the peer's is reset because of what the peer did.
    pub(super) fn reset_for(
        &mut self,
        id: u32,
        reason: Reason,
        why: &'static str,
    ) -> Result<(), Error> {
        self.local_resets += 1;
        if self.local_resets > LOCAL_RESETS {
            let why = "streams that had to be reset without end";
            return Err(Error::GoAway(Reason::ENHANCE_YOUR_CALM, By::Us, why));
        }
        match self.find(id) {
            Some(key) => self.reset(key, reason, Error::Reset(reason, By::Us, why)),
            None => {
                put(&mut self.control, kind::RST_STREAM, 0, id, &reason.0.to_be_bytes());
                self.remember(id, true);
                self.kick();
            }
        }
        Ok(())
    }

    /// We cut a stream off. What was received and not taken is dropped.
    pub(super) fn reset(&mut self, key: usize, reason: Reason, error: Error) {
        let Some(id) = self.entries.get(key).map(|entry| entry.id) else { return };
        if self.find(id).is_some() {
            put(&mut self.control, kind::RST_STREAM, 0, id, &reason.0.to_be_bytes());
        }
        if let Some(entry) = self.entries.get_mut(key) {
            entry.received.clear();
        }
        self.fail(key, error);
        self.close(key, true);
        self.kick();
    }

    /// A stream is over for its holder, with this error.
    pub(super) fn fail(&mut self, key: usize, error: Error) {
        self.unreserve(key);
        let Some(entry) = self.entries.get_mut(key) else { return };
        if entry.error.is_none() {
            entry.error = Some(Box::new(error));
        }
        (entry.receiving, entry.sending) = (Half::Ended, Half::Ended);
        entry.outgoing.clear();
        // What was never sent has taken nothing of the connection's window.
        let unsent = std::mem::take(&mut entry.queued);
        self.send_window += i64::from(unsent);
        self.feed_starved();
        self.tell(key, u8::MAX);
    }

    /// Takes a stream off the open ones once both of its directions have ended, and lets go of it once nobody holds
    /// it.
    pub(super) fn close(&mut self, key: usize, by_us: bool) {
        let Some(entry) = self.entries.get(key) else { return };
        if entry.receiving != Half::Ended || entry.sending != Half::Ended {
            return;
        }
        let (id, held) = (entry.id, entry.held);
        if let Ok(at) = self.ids.binary_search_by_key(&id, |(id, _)| *id) {
            self.ids.remove(at);
            self.remember(id, by_us);
            if self.role == Role::Client {
                self.open_pending();
            }
            // Who leaves, or is left, ends with its last stream.
            if self.ids.is_empty() {
                self.kick();
            }
        }
        if !held {
            self.remove(key);
        }
    }

    fn remember(&mut self, id: u32, by_us: bool) {
        if self.over.len() >= REMEMBERED {
            self.over.pop_front();
        }
        self.over.push_back((id, by_us));
    }

    fn remove(&mut self, key: usize) {
        if let Some(entry) = self.entries.try_remove(key) {
            self.send_window += i64::from(entry.reserved);
            self.release(entry.outstanding);
            self.ready.retain(|one| *one != key);
            self.starved.retain(|one| *one != key);
            self.pending.retain(|one| *one != key);
            if self.entries.is_empty() {
                // An idle tunnel keeps no room for the streams that it once had.
                self.entries = slab::Slab::new();
                self.ids = Vec::new();
                self.ready = VecDeque::new();
            }
        }
    }

    /// Nobody holds the stream any more.
    pub(super) fn let_go(&mut self, key: usize) {
        self.unreserve(key);
        let Some(entry) = self.entries.get_mut(key) else { return };
        entry.held = false;
        entry.waker = None;
        entry.wants = 0;
        entry.received.clear();
        let bytes = std::mem::take(&mut entry.outstanding);
        let unsent = matches!(entry.head, Head::Unsent(_));
        self.release(bytes);
        if unsent {
            self.remove(key);
        } else {
            self.close(key, false);
        }
        if self.entries.is_empty() {
            self.kick();
        }
    }

    /// The connection is over, and all of its streams.
    pub(super) fn end(&mut self, error: &Error) {
        if self.ended.is_none() {
            self.ended = Some(error.clone());
        }
        let keys: Vec<_> = self.entries.iter().map(|(key, _)| key).collect();
        for key in keys {
            let live = self
                .entries
                .get(key)
                .is_some_and(|e| e.receiving != Half::Ended || e.sending != Half::Ended);
            if live {
                self.fail(key, error.clone());
            }
            self.close(key, false);
        }
        self.incoming.clear();
        self.wake_pinger();
        self.kick();
    }
}
