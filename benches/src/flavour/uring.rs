//! The yardstick: one `io_uring` loop per worker.
//!
//! Accept and receive are multishot, the kernel picks a buffer from a ring of ours when bytes arrive, sends go out
//! as soon as the one before them is done, and one system call submits and waits for everything. Sockets are made
//! by system calls, because a node proxy must make them inside a pod's namespace.
//!
//! A yardstick only: it does not bound what a slow reader makes it hold beyond the one ring of buffers.
#![expect(
    unsafe_code,
    reason = "submitting to a ring and sharing buffers with the kernel are unsafe by nature"
)]

mod buffers;

use std::{
    collections::VecDeque,
    io,
    net::{SocketAddr, TcpListener},
    num::NonZeroUsize,
    os::fd::{AsRawFd as _, IntoRawFd as _, RawFd},
    thread,
};

use io_uring::{IoUring, cqueue, opcode, squeue, types::Fd};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use self::buffers::Buffers;
use super::Route;

/// Entries of the submission queue; more than that at once are submitted in between.
const ENTRIES: u32 = 1024;

pub(super) fn run(routes: &[Route], workers: NonZeroUsize) -> io::Result<()> {
    let mut threads = Vec::new();
    for _ in 0..workers.get() {
        let listeners = routes
            .iter()
            .map(|route| Ok((super::listen(route.from)?, route.to.into(), route.to)))
            .collect::<io::Result<Vec<_>>>()?;
        threads.push(thread::Builder::new().spawn(|| Loop::new(listeners)?.run())?);
    }
    for thread in threads {
        thread.join().unwrap_or_else(|_panic| Err(io::Error::other("a worker panicked")))?;
    }
    Ok(())
}

/// What a completion is about. Packed into the 64 bits that travel with an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Op {
    Accept,
    Connect,
    /// From this end of a pair.
    Receive(usize),
    /// What came from this end of a pair, to the other.
    Send(usize),
    /// Nobody waits for it.
    Nothing,
}

const NOTHING: u64 = u64::MAX;

impl Op {
    fn pack(self, index: usize) -> u64 {
        let code = match self {
            Self::Accept => 0,
            Self::Connect => 1,
            Self::Receive(end) => 2 + end,
            Self::Send(end) => 4 + end,
            Self::Nothing => return NOTHING,
        };
        (index * 8 + code) as u64
    }

    fn unpack(data: u64) -> (Self, usize) {
        if data == NOTHING {
            return (Self::Nothing, 0);
        }
        let op = match data % 8 {
            0 => Self::Accept,
            1 => Self::Connect,
            2 => Self::Receive(0),
            3 => Self::Receive(1),
            4 => Self::Send(0),
            _ => Self::Send(1),
        };
        (op, usize::try_from(data / 8).unwrap_or(usize::MAX))
    }
}

/// Bytes in a buffer of the ring.
#[derive(Clone, Copy, Debug)]
struct Piece {
    buffer: u16,
    offset: usize,
    length: usize,
}

/// What came from one end and where it stands.
#[derive(Debug, Default)]
struct Direction {
    queue: VecDeque<Piece>,
    sending: bool,
    end: End,
}

/// How far the end of a direction has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum End {
    #[default]
    Open,
    Seen,
    Passed,
}

/// A connection and its other half. Freed when nothing of it is left in the ring.
#[derive(Debug)]
struct Pair {
    ends: [RawFd; 2],
    directions: [Direction; 2],
    pending: usize,
    broken: bool,
}

struct Loop {
    ring: IoUring,
    buffers: Buffers,
    listeners: Vec<(TcpListener, SockAddr, SocketAddr)>,
    pairs: Vec<Option<Pair>>,
    free: Vec<usize>,
    /// Ends whose receive stopped because no buffer was left.
    starved: Vec<(usize, usize)>,
}

impl Loop {
    fn new(listeners: Vec<(TcpListener, SockAddr, SocketAddr)>) -> io::Result<Self> {
        let ring = IoUring::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_coop_taskrun()
            .setup_cqsize(ENTRIES * 8)
            .build(ENTRIES)?;
        let buffers = Buffers::new(&ring)?;
        Ok(Self {
            ring,
            buffers,
            listeners,
            pairs: Vec::new(),
            free: Vec::new(),
            starved: Vec::new(),
        })
    }

    fn run(mut self) -> io::Result<()> {
        for index in 0..self.listeners.len() {
            self.accept(index)?;
        }
        let mut completions: Vec<cqueue::Entry> = Vec::new();
        loop {
            self.ring.submit_and_wait(1)?;
            completions.extend(self.ring.completion());
            for completion in completions.drain(..) {
                self.complete(&completion)?;
            }
            for (index, end) in std::mem::take(&mut self.starved) {
                self.receive(index, end)?;
            }
        }
    }

    fn push(&mut self, entry: squeue::Entry, op: Op, index: usize) -> io::Result<()> {
        let entry = entry.user_data(op.pack(index));
        loop {
            // SAFETY: everything that an entry points to outlives its operation: descriptors and buffers are freed
            // only when their completion has been seen, and the addresses live as long as the loop.
            if unsafe { self.ring.submission().push(&entry) }.is_ok() {
                return Ok(());
            }
            self.ring.submit()?;
        }
    }

    fn accept(&mut self, index: usize) -> io::Result<()> {
        let Some((listener, ..)) = self.listeners.get(index) else { return Ok(()) };
        let entry = opcode::AcceptMulti::new(Fd(listener.as_raw_fd())).build();
        self.push(entry, Op::Accept, index)
    }

    fn receive(&mut self, index: usize, end: usize) -> io::Result<()> {
        let Some(pair) = self.pairs.get_mut(index).and_then(Option::as_mut) else { return Ok(()) };
        let Some(from) = pair.ends.get(end) else { return Ok(()) };
        pair.pending += 1;
        let entry = opcode::RecvMulti::new(Fd(*from), Buffers::GROUP).build();
        self.push(entry, Op::Receive(end), index)
    }

    fn complete(&mut self, completion: &cqueue::Entry) -> io::Result<()> {
        let (op, index) = Op::unpack(completion.user_data());
        let more = cqueue::more(completion.flags());
        match op {
            Op::Nothing => Ok(()),
            Op::Accept => {
                if !more {
                    self.accept(index)?;
                }
                if completion.result() < 0 {
                    Ok(())
                } else {
                    self.connect(index, completion.result())
                }
            }
            Op::Connect => {
                self.settle(index);
                if completion.result() < 0 {
                    return self.abort(index);
                }
                self.receive(index, 0)?;
                self.receive(index, 1)
            }
            Op::Receive(end) => self.received(index, end, completion),
            Op::Send(end) => self.sent(index, end, completion.result()),
        }
    }

    fn connect(&mut self, listener: usize, down: RawFd) -> io::Result<()> {
        let Some((_, address, to)) = self.listeners.get(listener) else { return Ok(()) };
        let up =
            Socket::new(Domain::for_address(*to), Type::STREAM.nonblocking(), Some(Protocol::TCP))?;
        up.set_tcp_nodelay(true)?;
        // SAFETY: the descriptor was just accepted and is open; it is only borrowed for the option.
        let down_borrowed = unsafe { std::os::fd::BorrowedFd::borrow_raw(down) };
        socket2::SockRef::from(&down_borrowed).set_tcp_nodelay(true)?;
        let up = up.into_raw_fd();
        let entry = opcode::Connect::new(Fd(up), address.as_ptr().cast(), address.len()).build();
        let pair =
            Pair { ends: [down, up], directions: Default::default(), pending: 1, broken: false };
        let index = match self.free.pop() {
            Some(index) => index,
            None => {
                self.pairs.push(None);
                self.pairs.len() - 1
            }
        };
        if let Some(slot) = self.pairs.get_mut(index) {
            *slot = Some(pair);
        }
        self.push(entry, Op::Connect, index)
    }

    fn received(&mut self, index: usize, end: usize, completion: &cqueue::Entry) -> io::Result<()> {
        let more = cqueue::more(completion.flags());
        if !more {
            self.settle(index);
        }
        let buffer = cqueue::buffer_select(completion.flags());
        let Some(pair) = self.pairs.get_mut(index).and_then(Option::as_mut) else { return Ok(()) };
        let Some(direction) = pair.directions.get_mut(end) else { return Ok(()) };
        match (usize::try_from(completion.result()), buffer) {
            (Ok(length @ 1..), Some(buffer)) => {
                direction.queue.push_back(Piece { buffer, offset: 0, length });
                if !more {
                    self.starved.push((index, end));
                }
                self.forward(index, end)
            }
            (Ok(_), _) => {
                direction.end = End::Seen;
                self.forward(index, end)
            }
            (Err(_), _) if completion.result() == -libc::ENOBUFS && !pair.broken => {
                self.starved.push((index, end));
                Ok(())
            }
            (Err(_), _) => self.abort(index),
        }
    }

    fn sent(&mut self, index: usize, end: usize, result: i32) -> io::Result<()> {
        self.settle(index);
        let Some(pair) = self.pairs.get_mut(index).and_then(Option::as_mut) else { return Ok(()) };
        let Some(direction) = pair.directions.get_mut(end) else { return Ok(()) };
        direction.sending = false;
        let Ok(wrote) = usize::try_from(result) else { return self.abort(index) };
        if let Some(piece) = direction.queue.front_mut() {
            piece.offset += wrote;
            if piece.offset >= piece.length {
                self.buffers.give_back(piece.buffer);
                direction.queue.pop_front();
            }
        }
        self.forward(index, end)
    }

    /// Sends what is next of this direction, or its end, or frees the pair if there is nothing left to do.
    fn forward(&mut self, index: usize, end: usize) -> io::Result<()> {
        let Some(pair) = self.pairs.get_mut(index).and_then(Option::as_mut) else { return Ok(()) };
        let [down, up] = pair.ends;
        let to = if end == 0 { up } else { down };
        let Some(direction) = pair.directions.get_mut(end) else { return Ok(()) };
        if pair.broken {
            return self.finish(index);
        }
        if direction.sending {
            return Ok(());
        }
        if let Some(piece) = direction.queue.front() {
            direction.sending = true;
            pair.pending += 1;
            let (start, length) = self.buffers.part(piece.buffer, piece.offset, piece.length);
            let entry = opcode::Send::new(Fd(to), start, length)
                .flags(libc::MSG_WAITALL | libc::MSG_NOSIGNAL)
                .build();
            return self.push(entry, Op::Send(end), index);
        }
        if direction.end != End::Seen {
            return Ok(());
        }
        direction.end = End::Passed;
        if pair.directions.iter().all(|direction| direction.end == End::Passed) {
            return self.finish(index);
        }
        self.push(opcode::Shutdown::new(Fd(to), libc::SHUT_WR).build(), Op::Nothing, 0)
    }

    /// One operation less of this pair is in the ring.
    fn settle(&mut self, index: usize) {
        if let Some(pair) = self.pairs.get_mut(index).and_then(Option::as_mut) {
            pair.pending -= 1;
        }
    }

    fn abort(&mut self, index: usize) -> io::Result<()> {
        let Some(pair) = self.pairs.get_mut(index).and_then(Option::as_mut) else { return Ok(()) };
        if !pair.broken {
            pair.broken = true;
            for end in pair.ends {
                // What is still in the ring for this end completes at once.
                self.push(opcode::Shutdown::new(Fd(end), libc::SHUT_RDWR).build(), Op::Nothing, 0)?;
            }
        }
        self.finish(index)
    }

    fn finish(&mut self, index: usize) -> io::Result<()> {
        let Some(slot) = self.pairs.get_mut(index) else { return Ok(()) };
        let Some(pair) = slot.take_if(|pair| pair.pending == 0) else { return Ok(()) };
        self.free.push(index);
        for piece in pair.directions.iter().flat_map(|direction| &direction.queue) {
            self.buffers.give_back(piece.buffer);
        }
        for end in pair.ends {
            self.push(opcode::Close::new(Fd(end)).build(), Op::Nothing, 0)?;
        }
        Ok(())
    }
}
