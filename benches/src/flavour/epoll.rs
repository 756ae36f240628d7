//! The two tokio flavours: the same relay under different runtimes.
#![expect(
    unsafe_code,
    reason = "accepting without registering what is accepted takes a bare descriptor"
)]

use std::{
    cell::RefCell,
    future::pending,
    io,
    net::{Shutdown, SocketAddr},
    num::NonZeroUsize,
    os::fd::OwnedFd,
    sync::mpsc,
    thread,
};

use nix::fcntl::{self, FcntlArg, OFlag, SpliceFFlags};
use tokio::{
    io::{Interest, unix::AsyncFd},
    net::TcpStream,
    runtime::{Builder, Handle},
    sync::mpsc as queue,
};

use super::Route;

/// The most that one read takes.
const READ: usize = 64 * 1024;

thread_local! {
    /// Empty pipes: one is only held while bytes are in it.
    static PIPES: RefCell<Vec<(OwnedFd, OwnedFd)>> = const { RefCell::new(Vec::new()) };
    /// One buffer a worker: it is only held between a read and the write that follows at once.
    static BUFFER: RefCell<Vec<u8>> = RefCell::new(vec![0; READ]);
}

/// How many tasks a connection has.
#[derive(Clone, Copy, Debug)]
pub(super) enum Shape {
    OneTask,
    TwoTasks,
    Splice,
}

/// Chunks that may wait between two tasks.
const QUEUE: usize = 8;

pub(super) fn steal(routes: &[Route], workers: NonZeroUsize, shape: Shape) -> io::Result<()> {
    let runtime = Builder::new_multi_thread().worker_threads(workers.get()).enable_io().build()?;
    for route in routes {
        let listener = super::listen(route.from)?;
        let to = route.to;
        runtime.spawn(async move {
            let own = Handle::current();
            accept(listener, move || own.clone(), to, shape).await
        });
    }
    runtime.block_on(pending::<()>());
    Ok(())
}

pub(super) fn pinned(routes: &[Route], workers: NonZeroUsize, shape: Shape) -> io::Result<()> {
    let handles: Vec<_> = (0..workers.get()).map(|_| worker()).collect::<io::Result<_>>()?;
    for route in routes {
        let listener = super::listen(route.from)?;
        let to = route.to;
        let mut round = handles.clone().into_iter().cycle();
        let Some(first) = handles.first() else { continue };
        let own = first.clone();
        first.spawn(accept(
            listener,
            move || round.next().unwrap_or_else(|| own.clone()),
            to,
            shape,
        ));
    }
    park()
}

pub(super) fn pinned_reuse(routes: &[Route], workers: NonZeroUsize) -> io::Result<()> {
    for _ in 0..workers.get() {
        let handle = worker()?;
        for route in routes {
            let listener = super::listen(route.from)?;
            let own = handle.clone();
            handle.spawn(accept(listener, move || own.clone(), route.to, Shape::OneTask));
        }
    }
    park()
}

fn park() -> ! {
    loop {
        thread::park();
    }
}

/// Starts a thread with a runtime of its own.
fn worker() -> io::Result<Handle> {
    let (tell, told) = mpsc::sync_channel(1);
    thread::Builder::new().spawn(move || {
        let runtime = Builder::new_current_thread().enable_io().build();
        let handle = runtime
            .as_ref()
            .map(|runtime| runtime.handle().clone())
            .map_err(|error| error.kind().into());
        // The other end waits for exactly this.
        drop(tell.send(handle));
        if let Ok(runtime) = runtime {
            runtime.block_on(pending::<()>());
        }
    })?;
    told.recv().unwrap_or_else(|_gone| Err(io::Error::other("a worker did not start")))
}

/// Accepts, and relays each connection on the worker that is next. The stream is registered there, not here.
async fn accept(
    listener: std::net::TcpListener,
    mut next: impl FnMut() -> Handle,
    to: SocketAddr,
    shape: Shape,
) {
    // SAFETY: the listener owns its descriptor, always gives the same one, and lives in here until it is dropped.
    let registered = unsafe { AsyncFd::register_with_interest(listener, Interest::READABLE) };
    let Ok(listener) = registered else { return };
    loop {
        let Ok(mut ready) = listener.readable().await else { return };
        while let Ok(Ok((stream, _))) = ready.try_io(|listener| listener.get_ref().accept()) {
            next().spawn(async move {
                // A broken connection is the load's to report.
                drop(match shape {
                    Shape::OneTask => one(stream, to, false).await,
                    Shape::Splice => one(stream, to, true).await,
                    Shape::TwoTasks => two(stream, to).await,
                });
            });
        }
    }
}

async fn one(down: std::net::TcpStream, to: SocketAddr, splice: bool) -> io::Result<()> {
    down.set_nonblocking(true)?;
    let down = TcpStream::from_std(down)?;
    down.set_nodelay(true)?;
    let up = TcpStream::connect(to).await?;
    up.set_nodelay(true)?;
    tokio::try_join!(copy(&down, &up, splice), copy(&up, &down, splice))?;
    Ok(())
}

/// The same with a task for each end and a queue for each direction.
async fn two(down: std::net::TcpStream, to: SocketAddr) -> io::Result<()> {
    down.set_nonblocking(true)?;
    let down = TcpStream::from_std(down)?;
    down.set_nodelay(true)?;
    let up = TcpStream::connect(to).await?;
    up.set_nodelay(true)?;
    let (to_up, from_down) = queue::channel(QUEUE);
    let (to_down, from_up) = queue::channel(QUEUE);
    Handle::current().spawn(async move {
        drop(tokio::try_join!(fill(&up, to_down), empty(from_down, &up)));
    });
    tokio::try_join!(fill(&down, to_up), empty(from_up, &down))?;
    Ok(())
}

/// From a socket into a queue, until the end of either.
async fn fill(from: &TcpStream, queue: queue::Sender<Vec<u8>>) -> io::Result<()> {
    loop {
        from.readable().await?;
        let chunk = BUFFER.with_borrow_mut(|buffer| match from.try_read(buffer) {
            Ok(read) => Ok(Some(buffer.get(..read).unwrap_or_default().to_vec())),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error),
        })?;
        let Some(chunk) = chunk else { continue };
        if chunk.is_empty() || queue.send(chunk).await.is_err() {
            return Ok(());
        }
    }
}

/// From a queue into a socket, until the end of either.
async fn empty(mut queue: queue::Receiver<Vec<u8>>, to: &TcpStream) -> io::Result<()> {
    while let Some(chunk) = queue.recv().await {
        write_all(&chunk, to).await?;
    }
    socket2::SockRef::from(to).shutdown(Shutdown::Write)
}

/// One direction. Nothing is held while it waits for bytes; what the writer does not take at once is kept until it
/// does.
async fn copy(from: &TcpStream, to: &TcpStream, splice: bool) -> io::Result<()> {
    let mut bulk = false;
    loop {
        if bulk && splice {
            spliced(from, to).await?;
        }
        from.readable().await?;
        let left = BUFFER.with_borrow_mut(|buffer| match from.try_read(buffer) {
            Ok(0) => Ok(None),
            Ok(read) => {
                bulk = read == READ;
                let got = buffer.get(..read).unwrap_or_default();
                match to.try_write(got) {
                    Ok(wrote) => Ok(Some(got.get(wrote..).unwrap_or_default().to_vec())),
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                        Ok(Some(got.to_vec()))
                    }
                    Err(error) => Err(error),
                }
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(Some(Vec::new())),
            Err(error) => Err(error),
        })?;
        let Some(left) = left else { return socket2::SockRef::from(to).shutdown(Shutdown::Write) };
        write_all(&left, to).await?;
    }
}

async fn write_all(mut left: &[u8], to: &TcpStream) -> io::Result<()> {
    while !left.is_empty() {
        match to.try_write(left) {
            Ok(wrote) => left = left.get(wrote..).unwrap_or_default(),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => to.writable().await?,
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// What a pipe can hold.
const PIPE: i32 = 1 << 20;

/// Moves bytes by way of a pipe until none are left to be read for now.
async fn spliced(from: &TcpStream, to: &TcpStream) -> io::Result<()> {
    let (drain, fill) = PIPES.with_borrow_mut(Vec::pop).map_or_else(pipe, Ok)?;
    let flags = SpliceFFlags::SPLICE_F_MOVE | SpliceFFlags::SPLICE_F_NONBLOCK;
    let most = usize::try_from(PIPE).unwrap_or(0);
    loop {
        let taken = from.try_io(Interest::READABLE, || {
            Ok(fcntl::splice(from, None, &fill, None, most, flags)?)
        });
        let mut left = match taken {
            Ok(0) => break,
            Ok(taken) => taken,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
            Err(error) => return Err(error),
        };
        while left > 0 {
            let moved = to.try_io(Interest::WRITABLE, || {
                Ok(fcntl::splice(&drain, None, to, None, left, flags)?)
            });
            match moved {
                Ok(moved) => left -= moved,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => to.writable().await?,
                Err(error) => return Err(error),
            }
        }
    }
    PIPES.with_borrow_mut(|pipes| pipes.push((drain, fill)));
    Ok(())
}

fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    let ends = nix::unistd::pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?;
    fcntl::fcntl(&ends.1, FcntlArg::F_SETPIPE_SZ(PIPE))?;
    Ok(ends)
}
