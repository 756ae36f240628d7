//! A TCP server and its client. The first line of a connection says what the server is to do:
//!
//! - `echo`: send everything back, then end;
//! - `sum`: read to the end, answer with the length and the sum;
//! - `send <n>`: send so many bytes and end;
//! - `reset <n>`: send so many bytes and reset;
//! - `stall`: read nothing more, for as long as the server lives;
//! - `who`: say which address the client has.
//!
//! The server says on its output how each connection ended.

use std::{
    io::{self, BufRead, BufReader, ErrorKind, Read, Write},
    net::{Shutdown, SocketAddr, TcpStream},
    time::Duration,
};

use anyhow::{Context, Result, bail};
use serde_json::json;
use socket2::SockRef;
use tokio::time::Instant;

use super::{
    checksum::{Bytes, Sum, expected},
    say, serve_all,
};
use crate::wait;

const CHUNK: usize = 256 << 10;

pub(crate) fn serve(addresses: &[&str]) -> Result<()> {
    serve_all(addresses, |stream| {
        let peer = stream.peer_addr();
        let mut what = String::from("?");
        let end = match obey(stream, &mut what) {
            Ok(()) => "end".to_owned(),
            Err(why) => how(&why),
        };
        let peer = peer.map(|p| p.ip().to_canonical().to_string()).unwrap_or_default();
        say(&format!("{what} from {peer}: {end}"));
    })
}

/// One word for an I/O error.
fn how(why: &io::Error) -> String {
    match why.kind() {
        ErrorKind::ConnectionReset | ErrorKind::BrokenPipe => "reset".to_owned(),
        ErrorKind::ConnectionRefused => "refused".to_owned(),
        ErrorKind::TimedOut | ErrorKind::WouldBlock => "timeout".to_owned(),
        _ => why.to_string(),
    }
}

pub(super) fn obey(stream: TcpStream, what: &mut String) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut input = BufReader::with_capacity(CHUNK, stream.try_clone()?);
    let mut output = stream;
    let mut line = String::new();
    (&mut input).take(64).read_line(&mut line)?;
    line.trim_end().clone_into(what);
    let mut words = line.split_whitespace();
    let (verb, count) = (words.next(), words.next().and_then(|n| n.parse().ok()).unwrap_or(0));
    match verb {
        Some("echo") => {
            io::copy(&mut input, &mut output)?;
        }
        Some("sum") => {
            let sum = read_all(&mut input)?;
            writeln!(output, "{} {:016x}", sum.length(), sum.finish())?;
        }
        Some("send") => {
            send(&mut output, count)?;
            output.shutdown(Shutdown::Write)?;
            io::copy(&mut input, &mut io::sink())?;
        }
        Some("reset") => {
            send(&mut output, count)?;
            // The client says that it has them.
            let _one = input.read(&mut [0])?;
            SockRef::from(&output).set_linger(Some(Duration::ZERO))?;
        }
        Some("stall") => loop {
            std::thread::park();
        },
        Some("who") => writeln!(output, "{}", output.peer_addr()?.ip().to_canonical())?,
        _ => return Err(io::Error::other("did not say what it wants")),
    }
    Ok(())
}

fn send(output: &mut impl Write, mut count: u64) -> io::Result<()> {
    let (mut bytes, mut buffer) = (Bytes::new(), vec![0; CHUNK]);
    while count > 0 {
        let take = usize::try_from(count).unwrap_or(usize::MAX).min(buffer.len());
        bytes.fill(&mut buffer);
        output.write_all(buffer.get(..take).unwrap_or_default())?;
        count -= take as u64;
    }
    Ok(())
}

fn read_all(input: &mut impl Read) -> io::Result<Sum> {
    let (mut sum, mut buffer) = (Sum::default(), vec![0; CHUNK]);
    loop {
        match input.read(&mut buffer)? {
            0 => return Ok(sum),
            length => sum.add(buffer.get(..length).unwrap_or_default()),
        }
    }
}

/// The client: `lab internal tcp <address> <what> …`.
pub(crate) fn client(address: &str, what: &[&str]) -> Result<()> {
    let address: SocketAddr = address.parse().context("no address")?;
    let number = |n: &str| n.parse::<u64>().with_context(|| format!("{n}: no number"));
    let patience = if what.first() == Some(&"wait") { 60 } else { 8 };
    let start = Instant::now();
    let stream = TcpStream::connect_timeout(&address, Duration::from_secs(patience));
    let stream = match stream {
        Ok(stream) => stream,
        Err(why) => bail!("connect: {}", how(&why)),
    };
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(Duration::from_secs(60)))?;
    let spent = || start.elapsed().as_millis();
    match what {
        ["who"] => {
            writeln!(&stream, "who")?;
            let mut said = String::new();
            (&stream).read_to_string(&mut said)?;
            anyhow::ensure!(!said.is_empty(), "closed without an answer");
            say(said.trim());
        }
        ["echo" | "wait", text] => {
            writeln!(&stream, "echo\n{text}")?;
            stream.shutdown(Shutdown::Write)?;
            let mut said = String::new();
            (&stream).read_to_string(&mut said)?;
            anyhow::ensure!(said.trim() == *text, "got {said:?} back");
            say(&json!({ "echo": text, "ms": spent() }).to_string());
        }
        ["sum", count] => {
            let count = number(count)?;
            writeln!(&stream, "sum")?;
            send(&mut &stream, count)?;
            stream.shutdown(Shutdown::Write)?;
            let mut said = String::new();
            (&stream).read_to_string(&mut said)?;
            let sum = format!("{:016x}", expected(count));
            anyhow::ensure!(said.trim() == format!("{count} {sum}"), "{said} is not {sum}");
            say(&json!({ "bytes": count, "sum": sum, "ms": spent() }).to_string());
        }
        ["send", count] => {
            let count = number(count)?;
            writeln!(&stream, "send {count}")?;
            let sum = read_all(&mut &stream)?;
            let (length, sum) = (sum.length(), sum.finish());
            anyhow::ensure!(length == count && sum == expected(count), "got {length} bytes");
            say(&json!({ "bytes": count, "sum": format!("{sum:016x}"), "ms": spent() }).to_string());
        }
        ["reset", count] => {
            let count = usize::try_from(number(count)?)?;
            writeln!(&stream, "reset {count}")?;
            let mut buffer = vec![0; count];
            (&stream).read_exact(&mut buffer)?;
            (&stream).write_all(b".")?;
            let end = (&stream).read(&mut [0]);
            say(&json!({ "bytes": count, "end": end_of(&end) }).to_string());
        }
        ["cut"] => {
            echo_once(&stream)?;
            SockRef::from(&stream).set_linger(Some(Duration::ZERO))?;
            say("cut");
        }
        ["flood"] => flood(&stream)?,
        ["deaf", count] => {
            writeln!(&stream, "send {count}")?;
            // Something has come, and is not taken.
            stream.peek(&mut [0])?;
            say("deaf");
            loop {
                std::thread::park();
            }
        }
        ["hold"] => {
            echo_once(&stream)?;
            say("open");
            let end = (&stream).read(&mut [0]);
            say(&format!("closed: {}", end_of(&end)));
        }
        ["tick", count, pause] => tick(&stream, number(count)?, number(pause)?)?,
        _ => bail!("tcp: {what:?}?"),
    }
    Ok(())
}

fn end_of(end: &io::Result<usize>) -> String {
    match end {
        Ok(0) => "end".to_owned(),
        Ok(_) => "data".to_owned(),
        Err(why) => how(why),
    }
}

fn echo_once(mut stream: &TcpStream) -> Result<()> {
    let mut back = [0];
    stream.write_all(b"echo\n1")?;
    stream.read_exact(&mut back).context("nothing came back")?;
    anyhow::ensure!(back == *b"1", "something else came back");
    Ok(())
}

/// Writes to who does not read, until nothing more is taken; then keeps the connection.
fn flood(mut stream: &TcpStream) -> Result<()> {
    writeln!(stream, "stall")?;
    stream.set_write_timeout(Some(Duration::from_millis(500)))?;
    let (mut written, chunk) = (0_u64, vec![7; CHUNK]);
    let why = loop {
        match stream.write(&chunk) {
            Ok(length) => written += length as u64,
            Err(why) => break why,
        }
    };
    anyhow::ensure!(how(&why) == "timeout", "after {written} bytes: {why}");
    say(&format!("stalled {written}"));
    let end = stream.read(&mut [0]);
    say(&format!("closed: {}", end_of(&end)));
    Ok(())
}

/// A round trip every so many milliseconds; says how far it is, now and then.
fn tick(stream: &TcpStream, count: u64, pause: u64) -> Result<()> {
    let mut input = BufReader::new(stream);
    let mut output = stream;
    output.write_all(b"echo\n")?;
    for n in 0..count {
        let mut line = String::new();
        writeln!(output, "{n}").with_context(|| format!("broke at {n}"))?;
        input.read_line(&mut line).with_context(|| format!("broke at {n}"))?;
        anyhow::ensure!(line.trim() == n.to_string(), "got {line:?} back at {n}");
        if n == 0 {
            say("open");
        } else if n % 20 == 0 {
            say(&format!("at {n}"));
        }
        wait::pause(Duration::from_millis(pause));
    }
    say(&format!("done {count}"));
    Ok(())
}
