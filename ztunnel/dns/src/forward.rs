//! Forwarding: a query goes to a server as it came, but for its id, and its reply comes back.

use crate::message::{HEADER, Query, Transport, outcome, set_id};
use hickory_proto::op::ResponseCode;
use std::{fmt, io, net::SocketAddr, time::Duration};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpStream, UdpSocket},
    time::timeout,
};

/// How long a server has to answer.
const PATIENCE: Duration = Duration::from_secs(5);
/// How often it is asked. A client that asks again is one more query.
const TRIES: usize = 3;

/// Opens sockets in the pod's namespace that skip its capture.
pub trait Dial: Send + Sync {
    /// A UDP socket connected to a server.
    ///
    /// # Errors
    ///
    /// Fails as the kernel does.
    fn udp(&self, to: SocketAddr) -> io::Result<UdpSocket>;

    /// A connection to a server. The time limit is the caller's.
    fn tcp(&self, to: SocketAddr) -> impl Future<Output = io::Result<TcpStream>> + Send;
}

/// No server answered; why the last one did not.
#[derive(Debug)]
pub(crate) enum ForwardError {
    /// There is none to ask.
    Nobody,
    /// In time.
    TimedOut,
    /// The network says.
    Io(io::Error),
}

impl fmt::Display for ForwardError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Nobody => f.write_str("no server is known"),
            Self::TimedOut => write!(f, "no answer within {} s", PATIENCE.as_secs()),
            Self::Io(error) => write!(f, "{error}"),
        }
    }
}

/// Asks the servers in turn, until one answers. The reply is as it came, under an id of ours.
pub(crate) async fn forward(
    query: &Query,
    message: &[u8],
    servers: &[SocketAddr],
    dial: &impl Dial,
) -> Result<Vec<u8>, ForwardError> {
    let mut last = Err(ForwardError::Nobody);
    for (tried, server) in servers.iter().cycle().take(TRIES.max(servers.len())).enumerate() {
        last = match timeout(PATIENCE, ask(query, message, *server, dial)).await {
            Ok(Ok(reply)) => Ok(reply),
            Ok(Err(error)) => Err(ForwardError::Io(error)),
            Err(_elapsed) => Err(ForwardError::TimedOut),
        };
        let others = tried + 1 < servers.len();
        match &last {
            // Another server may be better; the same one was asked and has said.
            Ok(reply) if others && is_failure(reply) => {}
            Ok(_) => break,
            Err(_) => {}
        }
    }
    last
}

fn is_failure(reply: &[u8]) -> bool {
    outcome(reply).is_none_or(|outcome| {
        [ResponseCode::ServFail, ResponseCode::Refused].contains(&outcome.code)
    })
}

async fn ask(
    query: &Query,
    message: &[u8],
    server: SocketAddr,
    dial: &impl Dial,
) -> io::Result<Vec<u8>> {
    let id = fastrand::u16(..);
    let mut message = message.to_vec();
    set_id(&mut message, id);
    match query.transport {
        Transport::Udp => {
            // A socket, and so a port, for each: with the id it is what a forger has to guess.
            let socket = dial.udp(server)?;
            socket.send(&message).await?;
            let mut room = vec![0; usize::from(u16::MAX)];
            loop {
                let length = socket.recv(&mut room).await?;
                let reply = room.get(..length).unwrap_or_default();
                if query.is_answered_by(id, reply) {
                    return Ok(reply.to_vec());
                }
            }
        }
        Transport::Tcp => {
            let mut stream = dial.tcp(server).await?;
            let length = u16::try_from(message.len()).map_err(io::Error::other)?;
            let mut framed = length.to_be_bytes().to_vec();
            framed.append(&mut message);
            stream.write_all(&framed).await?;
            loop {
                let length = usize::from(stream.read_u16().await?);
                let mut reply = vec![0; length];
                stream.read_exact(&mut reply).await?;
                if length >= HEADER && query.is_answered_by(id, &reply) {
                    return Ok(reply);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
