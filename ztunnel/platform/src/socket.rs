//! Socket options and the beginnings of connections, for `redirect` alone.

use crate::redirect::SocketOptions;
use socket2::{Domain, Protocol, SockAddr, SockRef, Socket, TcpKeepalive, Type};
use std::{io, net::SocketAddr, os::fd::AsFd};
use tokio::net::TcpStream;

/// A connection that has begun. Its socket is in the right namespace, with the right marks and options.
#[derive(Debug)]
pub struct Connecting(std::net::TcpStream);

impl Connecting {
    /// Waits until it is established, on the runtime that the stream is to live on. The time limit is the
    /// caller's.
    ///
    /// # Errors
    ///
    /// Fails as the connection does.
    ///
    /// # Cancel safety
    ///
    /// Dropping it gives the connection up.
    pub async fn established(self) -> io::Result<TcpStream> {
        let stream = TcpStream::from_std(self.0)?;
        stream.writable().await?;
        match stream.take_error()? {
            Some(error) => Err(error),
            None => Ok(stream),
        }
    }

    /// As [`established`](Self::established), for a stream that will live on another runtime.
    ///
    /// # Errors
    ///
    /// Fails as the connection does.
    pub async fn established_std(self) -> io::Result<std::net::TcpStream> {
        self.established().await?.into_std()
    }
}

/// A TCP socket of this namespace.
pub(crate) fn tcp(domain: Domain) -> io::Result<Socket> {
    let socket = Socket::new(domain, Type::STREAM.nonblocking(), Some(Protocol::TCP))?;
    Ok(socket)
}

/// Begins a connection.
pub(crate) fn connect(socket: Socket, to: SocketAddr) -> io::Result<Connecting> {
    match socket.connect(&SockAddr::from(to)) {
        Err(error) if error.raw_os_error() != Some(libc::EINPROGRESS) => Err(error),
        Ok(()) | Err(_) => Ok(Connecting(socket.into())),
    }
}

/// Lets the socket use addresses that are not this machine's.
pub(crate) fn set_transparent(socket: &Socket, domain: Domain) -> io::Result<()> {
    if domain == Domain::IPV6 {
        socket.set_ip_transparent_v6(true)
    } else {
        socket.set_ip_transparent_v4(true)
    }
}

impl SocketOptions {
    /// Sets no delay and, where `keepalive`, the rest.
    pub(crate) fn apply(&self, socket: &impl AsFd, keepalive: bool) -> io::Result<()> {
        let socket = SockRef::from(socket);
        socket.set_tcp_nodelay(true)?;
        let Some(probes) = self.keepalive.filter(|_| keepalive) else { return Ok(()) };
        let values = TcpKeepalive::new()
            .with_time(probes.time)
            .with_interval(probes.interval)
            .with_retries(probes.retries);
        socket.set_tcp_keepalive(&values)?;
        if self.user_timeout {
            let longest =
                probes.time.saturating_add(probes.interval.saturating_mul(probes.retries));
            socket.set_tcp_user_timeout(Some(longest))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{Ipv4Addr, TcpListener};

    #[test]
    fn what_a_listener_accepts_has_its_options() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        SocketOptions { user_timeout: true, ..SocketOptions::default() }
            .apply(&listener, true)
            .unwrap();
        let _client = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (accepted, _) = listener.accept().unwrap();
        let socket = SockRef::from(&accepted);
        assert!(socket.tcp_nodelay().unwrap() && socket.keepalive().unwrap());
        assert_eq!(socket.tcp_keepalive_retries().unwrap(), 9);
        assert_eq!(socket.tcp_keepalive_time().unwrap(), std::time::Duration::from_secs(180));
        assert!(socket.tcp_user_timeout().unwrap().is_some());
    }
}
