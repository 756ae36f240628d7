//! The asking end.

use std::{
    fmt,
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    str::FromStr,
    thread,
    time::Duration,
};

use anyhow::{Context as _, ensure};
use serde_json::{Value, json};
use tokio::time::Instant;

use super::{BODY, PATIENCE, SHORT};

/// One kind of work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// As many bytes as go, one way; an operation is a stream.
    Bulk,
    /// So many bytes there and back on one connection; an operation is a round trip.
    PingPong(usize),
    /// Requests on connections that stay; an operation is a request.
    Http,
    /// Connect, [`SHORT`] bytes there and back, and the server closes; an operation is a connection.
    Short,
    /// As [`Work::Short`], but each address is left alone for so long before it is asked again.
    Rested(Duration),
}

impl fmt::Display for Work {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bulk => f.write_str("bulk"),
            Self::PingPong(size) => write!(f, "ping-pong:{size}"),
            Self::Http => f.write_str("http"),
            Self::Short => f.write_str("short"),
            Self::Rested(rest) => write!(f, "rested:{}", rest.as_millis()),
        }
    }
}

/// A text that is no kind of work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InvalidWork;

impl FromStr for Work {
    type Err = InvalidWork;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (name, number) = text.split_once(':').unwrap_or((text, ""));
        match (name, number.parse::<u32>()) {
            ("bulk", _) => Ok(Self::Bulk),
            ("ping-pong", Ok(size)) => {
                usize::try_from(size).map(Self::PingPong).map_err(|_large| InvalidWork)
            }
            ("http", _) => Ok(Self::Http),
            ("short", _) => Ok(Self::Short),
            ("rested", Ok(rest)) => Ok(Self::Rested(Duration::from_millis(rest.into()))),
            _ => Err(InvalidWork),
        }
    }
}

/// What a run did.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Outcome {
    /// Operations that ended well.
    pub operations: u64,
    /// Payload bytes that the other end received.
    pub bytes: u64,
    /// How long it took.
    pub seconds: f64,
    /// Half of the operations took no longer, in microseconds.
    pub p50: f64,
    /// All but one in a hundred took no longer, in microseconds.
    pub p99: f64,
    /// All but one in a thousand took no longer, in microseconds.
    pub p999: f64,
}

impl Outcome {
    /// As JSON, for the driver at the other end of a pipe.
    #[must_use]
    pub fn to_json(&self) -> Value {
        json!({
            "operations": self.operations, "bytes": self.bytes, "seconds": self.seconds,
            "p50": self.p50, "p99": self.p99, "p999": self.p999,
        })
    }

    /// Back from JSON.
    #[must_use]
    pub fn from_json(value: &Value) -> Option<Self> {
        Some(Self {
            operations: value.get("operations")?.as_u64()?,
            bytes: value.get("bytes")?.as_u64()?,
            seconds: value.get("seconds")?.as_f64()?,
            p50: value.get("p50")?.as_f64()?,
            p99: value.get("p99")?.as_f64()?,
            p999: value.get("p999")?.as_f64()?,
        })
    }
}

/// What one thread did: its payload, and how long each operation took, in nanoseconds.
#[derive(Default)]
struct Share {
    bytes: u64,
    took: Vec<u32>,
}

impl Share {
    fn note(&mut self, began: Instant) {
        self.took.push(u32::try_from(began.elapsed().as_nanos()).unwrap_or(u32::MAX));
    }
}

/// Does this work against these addresses with so many connections at once, for about so long.
///
/// Connections that stay are opened before the clock starts. Address `i` belongs to thread `i` modulo `parallel`.
///
/// # Errors
/// A connection failed, or an answer was not the one expected: the run does not count.
pub fn run(
    work: Work,
    to: &[SocketAddr],
    parallel: usize,
    length: Duration,
) -> anyhow::Result<Outcome> {
    ensure!(!to.is_empty() && parallel > 0, "nothing to do");
    let staying = !matches!(work, Work::Short | Work::Rested(_));
    let mut jobs = Vec::new();
    for thread in 0..parallel {
        let targets: Vec<_> =
            to.iter().copied().skip(thread % to.len()).step_by(parallel).collect();
        let stream = match targets.first() {
            Some(target) if staying => Some(connect(*target)?),
            _ => None,
        };
        jobs.push((targets, stream));
    }
    let began = Instant::now();
    let until = began + length;
    let threads: Vec<_> = jobs
        .into_iter()
        .map(|(targets, stream)| {
            thread::spawn(move || match (work, stream) {
                (Work::Bulk, Some(stream)) => bulk(stream, until),
                (Work::PingPong(size), Some(stream)) => ping_pong(stream, size, until),
                (Work::Http, Some(stream)) => http(stream, until),
                (Work::Rested(rest), _) => short(&targets, rest, until),
                (_, _) => short(&targets, Duration::ZERO, until),
            })
        })
        .collect();
    let mut all = Share::default();
    for thread in threads {
        let share =
            thread.join().map_err(|_panic| anyhow::anyhow!("a client thread panicked"))??;
        all.bytes += share.bytes;
        all.took.extend(share.took);
    }
    let seconds = began.elapsed().as_secs_f64();
    all.took.sort_unstable();
    Ok(Outcome {
        operations: all.took.len() as u64,
        bytes: all.bytes,
        seconds,
        p50: quantile(&all.took, 500),
        p99: quantile(&all.took, 990),
        p999: quantile(&all.took, 999),
    })
}

/// Opens so many connections one after the other, each proved by one byte there and back, and gives them.
///
/// # Errors
/// One of them failed.
pub fn hold(to: SocketAddr, count: usize) -> anyhow::Result<Vec<TcpStream>> {
    (0..count)
        .map(|index| {
            let mut stream = connect(to).with_context(|| format!("connection {index}"))?;
            stream.write_all(b"h")?;
            stream.read_exact(&mut [0]).with_context(|| format!("answer {index}"))?;
            Ok(stream)
        })
        .collect()
}

fn connect(to: SocketAddr) -> anyhow::Result<TcpStream> {
    let stream =
        TcpStream::connect_timeout(&to, PATIENCE).with_context(|| format!("connecting to {to}"))?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    Ok(stream)
}

/// The value below which so many in a thousand of these sorted nanoseconds are, in microseconds.
fn quantile(sorted: &[u32], in_thousand: usize) -> f64 {
    let index = (sorted.len() * in_thousand / 1000).min(sorted.len().saturating_sub(1));
    sorted.get(index).map_or(0.0, |nanoseconds| f64::from(*nanoseconds) / 1000.0)
}

fn bulk(mut stream: TcpStream, until: Instant) -> anyhow::Result<Share> {
    let began = Instant::now();
    let chunk = vec![0x5a; 128 * 1024];
    let mut sent: u64 = 0;
    while Instant::now() < until {
        stream.write_all(&chunk).context("sending in bulk")?;
        sent += chunk.len() as u64;
    }
    stream.shutdown(std::net::Shutdown::Write)?;
    let mut count = [0; 8];
    stream.read_exact(&mut count).context("waiting for the count of a bulk stream")?;
    let received = u64::from_be_bytes(count);
    ensure!(received == sent, "of {sent} bytes {received} arrived");
    let mut share = Share { bytes: received, took: Vec::new() };
    share.note(began);
    Ok(share)
}

fn ping_pong(mut stream: TcpStream, size: usize, until: Instant) -> anyhow::Result<Share> {
    let question = vec![b'p'; size];
    let mut answer = vec![0; size];
    let mut share = Share::default();
    loop {
        let began = Instant::now();
        if began >= until {
            return Ok(share);
        }
        stream.write_all(&question).context("asking")?;
        stream.read_exact(&mut answer).context("waiting for an echo")?;
        share.bytes += size as u64;
        share.note(began);
    }
}

fn http(mut stream: TcpStream, until: Instant) -> anyhow::Result<Share> {
    let request =
        b"GET /bench HTTP/1.1\r\nhost: bench\r\nuser-agent: mesh-bench\r\naccept: */*\r\n\r\n";
    let mut share = Share::default();
    let mut buffer = vec![0; 8 * 1024];
    // The first answer tells how long the head is: the server's never changes.
    let mut whole = None;
    loop {
        let began = Instant::now();
        if began >= until {
            return Ok(share);
        }
        stream.write_all(request).context("sending a request")?;
        let mut read = 0;
        while whole.is_none_or(|length| read < length) {
            let got = stream
                .read(buffer.get_mut(read..).unwrap_or_default())
                .context("reading an answer")?;
            ensure!(got > 0, "the answer ended early");
            read += got;
            if whole.is_none() {
                let head = buffer.windows(4).position(|end| end == b"\r\n\r\n");
                whole = head.map(|end| end + 4 + BODY);
            }
        }
        ensure!(
            whole == Some(read) && buffer.starts_with(b"HTTP/1.1 200"),
            "an answer of another shape"
        );
        share.bytes += BODY as u64;
        share.note(began);
    }
}

fn short(targets: &[SocketAddr], rest: Duration, until: Instant) -> anyhow::Result<Share> {
    let mut share = Share::default();
    let mut left = vec![None; targets.len()];
    loop {
        for (target, left) in targets.iter().zip(&mut left) {
            if let Some(rested) = left.map(|at: Instant| at.elapsed())
                && let Some(wait) = rest.checked_sub(rested)
            {
                // A thread of the load's own, and the wait is the work.
                thread::park_timeout(wait);
            }
            let began = Instant::now();
            if began >= until {
                return Ok(share);
            }
            let mut stream = connect(*target)?;
            stream.write_all(&[b's'; SHORT]).context("asking on a short connection")?;
            let mut answer = [0; SHORT + 1];
            let mut read = 0;
            loop {
                match stream
                    .read(answer.get_mut(read..).unwrap_or_default())
                    .context("reading on a short connection")?
                {
                    0 => break,
                    got => read += got,
                }
            }
            ensure!(read == SHORT, "{read} bytes on a short connection");
            drop(stream);
            share.bytes += SHORT as u64;
            share.note(began);
            *left = Some(Instant::now());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;
    use crate::load::{Ports, server};

    #[test]
    fn every_kind_of_work_is_done_against_the_server() {
        let ip = Ipv4Addr::LOCALHOST;
        let ports = Ports::from(29_710);
        server::serve(ip.into(), ports).unwrap();
        let length = Duration::from_millis(50);
        for (work, port, parallel) in [
            (Work::Bulk, ports.sink, 2),
            (Work::PingPong(1), ports.echo, 1),
            (Work::PingPong(1024), ports.echo, 2),
            (Work::Http, ports.http, 3),
            (Work::Short, ports.short, 4),
            (Work::Rested(Duration::from_millis(1)), ports.short, 1),
        ] {
            let outcome = run(work, &[(ip, port).into()], parallel, length).unwrap();
            assert!(outcome.operations > 0 && outcome.bytes > 0, "{work:?}: {outcome:?}");
            assert!(outcome.p50 <= outcome.p99, "{work:?}: {outcome:?}");
            assert_eq!(Outcome::from_json(&outcome.to_json()), Some(outcome));
            assert_eq!(work.to_string().parse(), Ok(work));
        }
        assert_eq!(hold((ip, ports.hold).into(), 3).unwrap().len(), 3);
    }

    #[test]
    fn quantiles_are_of_the_sorted_values() {
        let values: Vec<u32> = (1..=100).map(|value| value * 1000).collect();
        assert!((quantile(&values, 500) - 51.0).abs() < f64::EPSILON);
        assert!((quantile(&values, 990) - 100.0).abs() < f64::EPSILON);
        assert!(quantile(&[], 500).abs() < f64::EPSILON);
    }
}
