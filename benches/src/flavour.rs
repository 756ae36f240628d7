//! Which runtime should carry the relay: one plain TCP relay, in three versions.
//!
//! Each accepts on a few ports and relays to another port of the same address, both directions of a connection in
//! one task, a buffer only while bytes move. They differ in who runs that task:
//!
//! - [`Flavour::Steal`]: tokio's multi-thread runtime, any worker takes any task;
//! - [`Flavour::Pinned`]: one current-thread tokio runtime per worker; the first accepts and hands connections out
//!   as descriptors, as the node proxy does;
//! - [`Flavour::PinnedReuse`]: the same without the hand-over, every worker with a listener of its own;
//! - [`Flavour::StealSplit`] and [`Flavour::PinnedSplit`]: as the first two, but a second task owns the socket to
//!   the other side and chunks pass between the two by bounded queues, as between a relay and its tunnel;
//! - [`Flavour::PinnedSplice`]: as `Pinned`, but bulk moves from socket to socket by way of a pipe, without copies;
//! - [`Flavour::Uring`]: one `io_uring` loop per worker, accept and receive multishot, buffers the kernel picks: the
//!   yardstick, not a candidate.

mod epoll;
mod uring;

use std::{
    io,
    net::{SocketAddr, TcpListener},
    num::NonZeroUsize,
    str::FromStr,
};

use self::epoll::Shape;

/// Connections that may wait to be accepted on each port.
const BACKLOG: i32 = 1024;

/// Who runs the relay's tasks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flavour {
    /// A work-stealing runtime.
    Steal,
    /// A runtime per worker, connections handed out by the first.
    Pinned,
    /// A runtime per worker, each with its own listeners.
    PinnedReuse,
    /// Work stealing, a task for each end of a connection.
    StealSplit,
    /// A runtime per worker, a task for each end of a connection, both on one worker.
    PinnedSplit,
    /// A runtime per worker, and `splice` for bulk.
    PinnedSplice,
    /// An `io_uring` loop per worker, each with its own listeners.
    Uring,
}

impl Flavour {
    /// All of them, in the order of the table.
    pub const ALL: [Self; 7] = [
        Self::Steal,
        Self::Pinned,
        Self::PinnedReuse,
        Self::StealSplit,
        Self::PinnedSplit,
        Self::PinnedSplice,
        Self::Uring,
    ];

    /// The name on the command line and in the table.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Steal => "steal",
            Self::Pinned => "pinned",
            Self::PinnedReuse => "pinned-reuse",
            Self::StealSplit => "steal, 2 tasks",
            Self::PinnedSplit => "pinned, 2 tasks",
            Self::PinnedSplice => "pinned, splice",
            Self::Uring => "uring",
        }
    }
}

/// A name that no flavour has.
#[derive(Debug)]
pub struct UnknownName;

impl FromStr for Flavour {
    type Err = UnknownName;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::ALL.into_iter().find(|flavour| flavour.name() == text).ok_or(UnknownName)
    }
}

/// From where to where a port is relayed.
#[derive(Clone, Copy, Debug)]
pub struct Route {
    /// Where the relay listens.
    pub from: SocketAddr,
    /// Where it connects to.
    pub to: SocketAddr,
}

/// Relays until the process ends.
///
/// # Errors
/// A listener or a runtime cannot be made.
pub fn relay(flavour: Flavour, routes: &[Route], workers: NonZeroUsize) -> io::Result<()> {
    match flavour {
        Flavour::Steal => epoll::steal(routes, workers, Shape::OneTask),
        Flavour::StealSplit => epoll::steal(routes, workers, Shape::TwoTasks),
        Flavour::Pinned => epoll::pinned(routes, workers, Shape::OneTask),
        Flavour::PinnedSplit => epoll::pinned(routes, workers, Shape::TwoTasks),
        Flavour::PinnedSplice => epoll::pinned(routes, workers, Shape::Splice),
        Flavour::PinnedReuse => epoll::pinned_reuse(routes, workers),
        Flavour::Uring => uring::run(routes, workers),
    }
}

/// A listener that several may share an address with.
fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket =
        socket2::Socket::new(socket2::Domain::for_address(address), socket2::Type::STREAM, None)?;
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}
