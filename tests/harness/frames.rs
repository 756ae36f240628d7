//! HTTP/2 by the frame, over mutual TLS: for what no library would send.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

use anyhow::{Context, Result};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, ReadHalf, WriteHalf},
    net::{TcpListener, TcpStream},
    runtime::{Builder, Runtime},
    task::LocalSet,
    time::timeout,
};
use tokio_rustls::{TlsAcceptor, client::TlsStream};

use crate::{
    ca::Issued,
    hbone::{self, Dial},
    netns::Namespace,
};

const PATIENCE: Duration = Duration::from_secs(20);

/// What begins an HTTP/2 connection.
pub const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Frame types.
pub mod kind {
    /// DATA
    pub const DATA: u8 = 0;
    /// HEADERS
    pub const HEADERS: u8 = 1;
    /// `RST_STREAM`
    pub const RST_STREAM: u8 = 3;
    /// SETTINGS
    pub const SETTINGS: u8 = 4;
    /// PING
    pub const PING: u8 = 6;
    /// GOAWAY
    pub const GOAWAY: u8 = 7;
    /// `WINDOW_UPDATE`
    pub const WINDOW_UPDATE: u8 = 8;
    /// CONTINUATION
    pub const CONTINUATION: u8 = 9;
}

/// Says that a header block ends here.
pub const END_HEADERS: u8 = 4;
/// Says that a stream ends here.
pub const END_STREAM: u8 = 1;

/// A frame, as bytes.
#[must_use]
pub fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap_or(u32::MAX).to_be_bytes();
    let mut bytes = Vec::with_capacity(9 + payload.len());
    bytes.extend(length.iter().skip(1));
    bytes.extend([kind, flags]);
    bytes.extend(stream.to_be_bytes());
    bytes.extend(payload);
    bytes
}

/// The header block of a CONNECT, with nothing compressed.
#[must_use]
pub fn connect(authority: &str) -> Vec<u8> {
    // Literals without indexing; names 2 and 1 of the static table.
    let mut block = vec![2, 7];
    block.extend(b"CONNECT");
    block.extend([1, u8::try_from(authority.len()).unwrap_or(0)]);
    block.extend(authority.bytes());
    block
}

/// A header with a new name, without indexing; both are shorter than 127 bytes.
#[must_use]
pub fn header(name: &str, value: &str) -> Vec<u8> {
    let length = |text: &str| u8::try_from(text.len()).unwrap_or(0) & 0x7f;
    let mut block = vec![0, length(name)];
    block.extend(name.bytes());
    block.push(length(value));
    block.extend(value.bytes());
    block
}

/// A connection to write frames on.
#[derive(Debug)]
pub struct Frames {
    read: ReadHalf<TlsStream<TcpStream>>,
    write: WriteHalf<TlsStream<TcpStream>>,
    runtime: Runtime,
}

impl Frames {
    /// Opens it and sends the preface with empty settings.
    pub fn open(dial: &Dial<'_>) -> Result<Self> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let stream = runtime.block_on(dial.tls())?;
        let (read, write) = tokio::io::split(stream);
        let mut frames = Self { read, write, runtime };
        frames.write(&[PREFACE, &frame(kind::SETTINGS, 0, 0, &[])].concat())?;
        Ok(frames)
    }

    /// Writes; fails where the peer has closed, or takes nothing for long.
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.runtime.block_on(async {
            timeout(PATIENCE, async {
                self.write.write_all(bytes).await?;
                self.write.flush().await
            })
            .await
            .context("it takes nothing")??;
            Ok(())
        })
    }

    /// Reads frames until the peer has closed or nothing comes for a while: their types, and the error
    /// code of a GOAWAY.
    pub fn read(&mut self, silence: Duration) -> Answer {
        let mut bytes = Vec::new();
        let closed = self.runtime.block_on(async {
            let mut buffer = vec![0; 64 << 10];
            loop {
                match timeout(silence, self.read.read(&mut buffer)).await {
                    Ok(Ok(0) | Err(_)) => return true,
                    Ok(Ok(length)) => bytes.extend(buffer.iter().take(length)),
                    Err(_) => return false,
                }
            }
        });
        let mut answer = Answer { closed, ..Answer::default() };
        let mut rest = bytes.as_slice();
        while let [a, b, c, kind, _flags, _, _, _, _, after @ ..] = rest {
            let length = usize::from(*a) << 16 | usize::from(*b) << 8 | usize::from(*c);
            let Some((payload, next)) = after.split_at_checked(length) else { break };
            answer.frames.push(*kind);
            if *kind == kind::GOAWAY {
                answer.goaway = payload.get(7).copied();
            }
            rest = next;
        }
        answer
    }
}

/// What came back.
#[derive(Clone, Debug, Default)]
pub struct Answer {
    /// Types of frames.
    pub frames: Vec<u8>,
    /// The error code of the last GOAWAY.
    pub goaway: Option<u8>,
    /// Whether the connection has ended.
    pub closed: bool,
}

/// A server that answers the first request of its n-th connection with the n-th of these: bytes, and others, so many
/// times. It reads no further. From then on it accepts nobody.
#[derive(Clone, Debug)]
pub struct Flood(Arc<AtomicU64>);

/// Bytes, others, and how often.
pub type Answers = Vec<(Vec<u8>, Vec<u8>, usize)>;

impl Flood {
    /// Listens on the tunnel port of every address in the namespace, as this identity.
    pub fn start(namespace: &Namespace, issued: &Issued, answers: Answers) -> Result<Self> {
        let (listener, acceptor) = hbone::listen(namespace, issued)?;
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let sent = Arc::new(AtomicU64::new(0));
        let written = Arc::clone(&sent);
        thread::Builder::new().name("flood".into()).spawn(move || {
            let served = async move {
                let listener = TcpListener::from_std(listener)?;
                for answer in answers {
                    let (stream, _) = listener.accept().await?;
                    let serve = flood(acceptor.clone(), stream, answer, Arc::clone(&written));
                    let _task = tokio::task::spawn_local(serve);
                }
                std::future::pending::<io::Result<()>>().await
            };
            // An error ends it, which the test notices.
            let _ended = LocalSet::new().block_on(&runtime, served);
        })?;
        Ok(Self(sent))
    }

    /// How many bytes of its floods it has got rid of.
    #[must_use]
    pub fn sent(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

async fn flood(
    acceptor: TlsAcceptor,
    stream: TcpStream,
    (first, piece, times): (Vec<u8>, Vec<u8>, usize),
    sent: Arc<AtomicU64>,
) -> io::Result<()> {
    let mut stream = acceptor.accept(stream).await?;
    stream.read_exact(&mut [0; PREFACE.len()]).await?;
    let mut head = [0; 9];
    loop {
        stream.read_exact(&mut head).await?;
        let [a, b, c, kind, ..] = head;
        let length = usize::from(a) << 16 | usize::from(b) << 8 | usize::from(c);
        stream.read_exact(&mut vec![0; length]).await?;
        if kind == kind::HEADERS {
            break;
        }
    }
    stream.write_all(&[frame(kind::SETTINGS, 0, 0, &[]), first].concat()).await?;
    for _ in 0..times {
        stream.write_all(&piece).await?;
        stream.flush().await?;
        sent.fetch_add(u64::try_from(piece.len()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }
    stream.flush().await?;
    std::future::pending().await
}
