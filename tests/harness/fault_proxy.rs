//! A relay of TCP that does to connections what networks and broken machines do.

use std::{
    net::{SocketAddr, TcpListener as StdListener},
    thread,
    time::Duration,
};

use anyhow::{Context, Result};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{
        TcpListener, TcpStream,
        tcp::{ReadHalf, WriteHalf},
    },
    runtime::Builder,
    sync::watch,
    task::JoinSet,
};

use crate::netns::Namespace;

/// Bytes that mean nothing to anybody.
const NOISE: [u8; 64] = [0x5a; 64];
/// How often a trickle flows.
const BEAT: Duration = Duration::from_millis(100);

/// What becomes of connections, those that are open and those that come.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Fault {
    /// All passes.
    None,
    /// Nobody listens. What is open goes on.
    Refuse,
    /// Whoever comes is taken, and nobody says anything. What is open goes on.
    Silent,
    /// Whoever comes gets bytes that mean nothing. What is open goes on.
    Garbage,
    /// Nothing passes, either way, and everything stays open.
    Hole,
    /// What the server sends comes altered.
    Corrupt,
    /// So many bytes of the server pass on each connection, those that are open counted from now; then it ends.
    Cut(usize, Ending),
    /// So many bytes pass in a tenth of a second, either way.
    Trickle(usize),
}

/// How a connection ends.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Ending {
    /// By RST.
    Reset,
    /// By FIN, as if all had been said.
    Close,
}

/// What goes on now.
#[derive(Clone, Copy, Debug)]
struct Now {
    fault: Fault,
    /// Counts up when all that is open is to be reset.
    cut: usize,
}

/// The relay. It ends when this is dropped, and with it its connections.
#[derive(Debug)]
pub struct FaultProxy {
    now: watch::Sender<Now>,
    address: SocketAddr,
}

impl FaultProxy {
    /// Listens there, in this namespace, and connects from it to the server for each that comes.
    pub fn start(namespace: &Namespace, listen: SocketAddr, server: SocketAddr) -> Result<Self> {
        let bind = || StdListener::bind(listen).with_context(|| format!("cannot bind {listen}"));
        let listener = namespace.run(bind)?;
        let address = listener.local_addr()?;
        let (now, told) = watch::channel(Now { fault: Fault::None, cut: 0 });
        let (namespace, runtime) =
            (namespace.clone(), Builder::new_current_thread().enable_all().build()?);
        thread::Builder::new().name("fault proxy".into()).spawn(move || {
            // An error ends it, which the test notices.
            let _ended = namespace.enter().and_then(|()| {
                runtime.block_on(serve(listener, (address, server), told))?;
                Ok(())
            });
        })?;
        Ok(Self { now, address })
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// What becomes of connections from now on.
    pub fn set(&self, fault: Fault) {
        self.now.send_modify(|now| now.fault = fault);
    }

    /// Resets what is open.
    pub fn cut(&self) {
        self.now.send_modify(|now| now.cut += 1);
    }
}

/// Serves until the sender is gone, which every wait for a change tells.
async fn serve(
    listener: StdListener,
    (address, server): (SocketAddr, SocketAddr),
    mut now: watch::Receiver<Now>,
) -> Result<()> {
    listener.set_nonblocking(true)?;
    let mut listener = Some(TcpListener::from_std(listener)?);
    let mut connections = JoinSet::new();
    loop {
        if now.borrow_and_update().fault == Fault::Refuse {
            listener = None;
        } else if listener.is_none() {
            listener = Some(TcpListener::bind(address).await?);
        }
        let accept = async {
            match &listener {
                Some(listener) => listener.accept().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            changed = now.changed() => {
                if changed.is_err() {
                    return Ok(());
                }
            }
            accepted = accept => {
                connections.spawn(connection(accepted?.0, server, now.clone()));
            }
            Some(_) = connections.join_next(), if !connections.is_empty() => {}
        }
    }
}

/// One connection, until it ends, or is cut.
async fn connection(mut client: TcpStream, server: SocketAddr, mut now: watch::Receiver<Now>) {
    let begun = *now.borrow_and_update();
    let served = async {
        match begun.fault {
            Fault::Silent => std::future::pending().await,
            Fault::Garbage => {
                let _gone = client.write_all(&NOISE).await;
                close(&mut client).await;
            }
            _ => relay(&mut client, server, &now).await,
        }
    };
    let mut watching = now.clone();
    let cut = tokio::select! {
        () = served => false,
        _ = watching.wait_for(|now| now.cut != begun.cut) => true,
    };
    if cut {
        reset(&client);
    }
}

/// To the server and back, until both sides have ended, or the connection breaks.
async fn relay(client: &mut TcpStream, server: SocketAddr, now: &watch::Receiver<Now>) {
    // Where there is no server, the client sees what it would have seen itself.
    let Ok(mut server) = TcpStream::connect(server).await else { return reset(client) };
    let broken = {
        let ((from_client, to_client), (from_server, to_server)) = (client.split(), server.split());
        tokio::try_join!(
            pump((from_client, to_server), now.clone(), false),
            pump((from_server, to_client), now.clone(), true),
        )
    };
    match broken {
        Ok(_) => {}
        Err(Ending::Close) => {
            reset(&server);
            drop(server);
            close(client).await;
        }
        Err(Ending::Reset) => {
            reset(&server);
            reset(client);
        }
    }
}

/// One direction, until it ends; or why the connection is not to go on.
async fn pump(
    (mut from, mut to): (ReadHalf<'_>, WriteHalf<'_>),
    mut now: watch::Receiver<Now>,
    of_server: bool,
) -> Result<(), Ending> {
    let mut buffer = vec![0; 16 << 10];
    let mut left = None;
    loop {
        let fault = now.borrow_and_update().fault;
        let room = match fault {
            Fault::Hole => 0,
            Fault::Trickle(bytes) => bytes,
            Fault::Cut(bytes, _) if of_server => *left.get_or_insert(bytes),
            _ => buffer.len(),
        };
        if let (0, Fault::Cut(_, ending)) = (room, fault) {
            return Err(ending);
        }
        let chunk = buffer.get_mut(..room.min(16 << 10)).unwrap_or_default();
        let read = tokio::select! {
            biased;
            changed = now.changed() => {
                changed.map_err(|_dropped| Ending::Reset)?;
                left = None;
                continue;
            }
            read = from.read(chunk), if room > 0 => read.map_err(|_broken| Ending::Reset)?,
        };
        if read == 0 {
            let _gone = to.shutdown().await;
            return Ok(());
        }
        let bytes = chunk.get_mut(..read).unwrap_or_default();
        match (fault, bytes.last_mut()) {
            (Fault::Corrupt, Some(last)) if of_server => *last ^= 0xff,
            _ => {}
        }
        to.write_all(bytes).await.map_err(|_broken| Ending::Reset)?;
        left = left.map(|left| left.saturating_sub(read));
        if matches!(fault, Fault::Trickle(_)) {
            tokio::time::sleep(BEAT).await;
        }
    }
}

/// Has the end be a reset: it is sent when the socket is closed.
fn reset(socket: &TcpStream) {
    let _gone = socket.set_zero_linger();
}

/// Says that all was said, and takes what comes until the other side ends as well: else the end would be a reset.
async fn close(socket: &mut TcpStream) {
    let _gone = socket.shutdown().await;
    let mut rest = vec![0; 4096];
    while socket.read(&mut rest).await.is_ok_and(|read| read > 0) {}
}
