//! `SOCK_SEQPACKET` over a Unix socket, with at most one descriptor a packet: how the CNI agent hands over
//! network namespaces. Both sides are here; the tests play the agent.

use nix::{
    cmsg_space,
    sys::socket::{
        AddressFamily, Backlog, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType,
        UnixAddr, accept4, bind, connect, listen, recvmsg, sendmsg, socket,
    },
};
use std::{
    io::{self, IoSlice, IoSliceMut},
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
        unix::net::UnixStream as StdStream,
    },
    path::Path,
};
use tokio::{io::Interest, net::UnixStream};

/// The longest packet, in bytes.
pub const MAX_PACKET: usize = 1024;

/// Descriptors that there is room for: more than are allowed, so that all that come are seen and closed.
const ROOM: usize = 16;

/// A connection. Each packet arrives whole, or is refused.
#[derive(Debug)]
pub struct Seqpacket(UnixStream);

/// Waits for connections.
#[derive(Debug)]
pub struct SeqpacketListener(UnixStream);

fn new_socket() -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    Ok(socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)?)
}

/// Tokio watches the socket; what goes over it is ours.
fn watched(fd: OwnedFd) -> io::Result<UnixStream> {
    UnixStream::from_std(StdStream::from(fd))
}

impl Seqpacket {
    /// Connects to whoever listens at this path.
    ///
    /// # Errors
    ///
    /// As `connect(2)`.
    #[expect(clippy::unused_async, reason = "the caller waits, as for any connection")]
    pub async fn connect(path: &Path) -> io::Result<Self> {
        let fd = new_socket()?;
        connect(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
        watched(fd).map(Self)
    }

    /// Sends a packet.
    ///
    /// # Errors
    ///
    /// As `sendmsg(2)`.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: the packet has gone whole or not at all.
    pub async fn send(&self, packet: &[u8]) -> io::Result<()> {
        self.send_with(packet, None).await
    }

    /// Sends a packet and a descriptor.
    ///
    /// # Errors
    ///
    /// As `sendmsg(2)`.
    ///
    /// # Cancel safety
    ///
    /// As [`send`](Self::send).
    pub async fn send_with(&self, packet: &[u8], fd: Option<RawFd>) -> io::Result<()> {
        self.0
            .async_io(Interest::WRITABLE, || {
                let bytes = [IoSlice::new(packet)];
                let fds: Vec<RawFd> = fd.into_iter().collect();
                let rights = [ControlMessage::ScmRights(&fds)];
                let control = if fds.is_empty() { &[][..] } else { &rights[..] };
                let flags = MsgFlags::MSG_NOSIGNAL;
                sendmsg::<UnixAddr>(self.0.as_raw_fd(), &bytes, control, flags, None)?;
                Ok(())
            })
            .await
    }

    /// Receives a packet, and the descriptor that came with it. A length of 0 is the end.
    ///
    /// # Errors
    ///
    /// Fails as `recvmsg(2)`, and where the packet is too long or brings more than one descriptor; those are
    /// closed then.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: no packet is lost.
    pub async fn recv(&self, packet: &mut [u8]) -> io::Result<(usize, Option<OwnedFd>)> {
        self.0.async_io(Interest::READABLE, || receive(&self.0, packet)).await
    }
}

#[expect(unsafe_code, reason = "the kernel hands descriptors over as numbers")]
fn receive(socket: &UnixStream, packet: &mut [u8]) -> io::Result<(usize, Option<OwnedFd>)> {
    let mut bytes = [IoSliceMut::new(packet)];
    let mut room = cmsg_space!([RawFd; ROOM]);
    let message = recvmsg::<UnixAddr>(
        socket.as_raw_fd(),
        &mut bytes,
        Some(&mut room),
        MsgFlags::MSG_CMSG_CLOEXEC,
    )?;
    let mut fds = Vec::new();
    if let Ok(control) = message.cmsgs() {
        for entry in control {
            if let ControlMessageOwned::ScmRights(rights) = entry {
                // SAFETY: the kernel has just made these for us, and nobody else knows them.
                fds.extend(rights.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
            }
        }
    }
    let bad = |what| Err(io::Error::new(io::ErrorKind::InvalidData, what));
    if message.flags.intersects(MsgFlags::MSG_TRUNC | MsgFlags::MSG_CTRUNC) {
        return bad("the packet, or what came with it, is longer than the protocol allows");
    }
    let length = message.bytes;
    let mut fds = fds.into_iter();
    match (fds.next(), fds.next()) {
        (fd, None) => Ok((length, fd)),
        (_, Some(_)) => bad("more than one descriptor came with a packet"),
    }
}

impl SeqpacketListener {
    /// Listens at this path, in the place of what was there.
    ///
    /// # Errors
    ///
    /// As `bind(2)` and `listen(2)`.
    pub fn bind(path: &Path) -> io::Result<Self> {
        let _not_there = std::fs::remove_file(path);
        let fd = new_socket()?;
        bind(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
        listen(&fd, Backlog::new(16)?)?;
        watched(fd).map(Self)
    }

    /// The next connection.
    ///
    /// # Errors
    ///
    /// As `accept(2)`.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe.
    #[expect(unsafe_code, reason = "the kernel hands descriptors over as numbers")]
    pub async fn accept(&self) -> io::Result<Seqpacket> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let accept = || Ok(accept4(self.0.as_raw_fd(), flags)?);
        let fd: RawFd = self.0.async_io(Interest::READABLE, accept).await?;
        // SAFETY: the kernel has just made it for us, and nobody else knows it.
        watched(unsafe { OwnedFd::from_raw_fd(fd) }).map(Seqpacket)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{fs::File, os::unix::fs::MetadataExt};

    async fn pair() -> (Seqpacket, Seqpacket, tempfile::TempDir) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let listener = SeqpacketListener::bind(&path).unwrap();
        let (client, server) = tokio::join!(Seqpacket::connect(&path), listener.accept());
        (client.unwrap(), server.unwrap(), folder)
    }

    #[tokio::test]
    async fn packets_keep_their_borders_and_bring_a_descriptor() {
        let (client, server, _folder) = pair().await;
        client.send(b"one").await.unwrap();
        client.send(b"three").await.unwrap();
        let mut packet = [0; MAX_PACKET];
        assert_eq!(server.recv(&mut packet).await.unwrap().0, 3);
        assert_eq!(server.recv(&mut packet).await.unwrap().0, 5);

        let file = File::open("/proc/self/ns/net").unwrap();
        server.send_with(b"ns", Some(file.as_raw_fd())).await.unwrap();
        let (length, fd) = client.recv(&mut packet).await.unwrap();
        let same = File::from(fd.unwrap()).metadata().unwrap().ino();
        assert_eq!((length, same), (2, file.metadata().unwrap().ino()));
        drop(server);
        assert_eq!(client.recv(&mut packet).await.unwrap().0, 0, "the end");
    }

    #[tokio::test]
    async fn what_is_too_long_is_refused() {
        let (client, server, _folder) = pair().await;
        client.send(&[7; MAX_PACKET + 1]).await.unwrap();
        let mut packet = [0; MAX_PACKET];
        let error = server.recv(&mut packet).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    }
}
