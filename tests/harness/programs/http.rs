//! A small HTTP/1.1 server, which says who asked, and a client for where there is no curl.

use std::{
    collections::BTreeMap,
    io::{self, BufRead, BufReader, Read, Write},
    net::{TcpStream, ToSocketAddrs},
    time::Duration,
};

use anyhow::{Context, Result, bail};
use serde_json::json;

use super::{say, serve_all};

/// Serves: `/bytes/<n>` gives so many bytes, all else a JSON object that says who answers to whom.
pub(crate) fn serve(name: &str, addresses: &[&str]) -> Result<()> {
    let name = name.to_owned();
    serve_all(addresses, move |stream| {
        // The connection is the client's to break.
        let _broken = converse(&name, stream);
    })
}

fn converse(name: &str, stream: TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let (client, local) = (stream.peer_addr()?, stream.local_addr()?);
    let mut input = BufReader::new(stream.try_clone()?);
    let mut output = stream;
    while let Some((request, headers)) = head(&mut input)? {
        let length = headers.get("content-length").and_then(|v| v.parse().ok()).unwrap_or(0);
        let body = io::copy(&mut (&mut input).take(length), &mut io::sink())?;
        let path = request.split(' ').nth(1).unwrap_or("/");
        let close = headers.get("connection").is_some_and(|v| v.eq_ignore_ascii_case("close"));
        let answer = match path.strip_prefix("/bytes/").and_then(|n| n.parse().ok()) {
            Some(length) => vec![b'x'; length],
            None => {
                let said = json!({
                    "name": name, "client": client.ip().to_canonical().to_string(),
                    "local": local.ip().to_canonical().to_string(), "path": path,
                    "headers": headers, "body": body,
                });
                format!("{said}\n").into_bytes()
            }
        };
        let connection = if close { "close" } else { "keep-alive" };
        let head = format!(
            "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\
             connection: {connection}\r\n\r\n",
            answer.len()
        );
        output.write_all(&[head.as_bytes(), &answer].concat())?;
        if close {
            break;
        }
    }
    Ok(())
}

type Head = (String, BTreeMap<String, String>);

fn head(input: &mut impl BufRead) -> io::Result<Option<Head>> {
    let mut line = || -> io::Result<String> {
        let mut line = String::new();
        input.take(16 << 10).read_line(&mut line)?;
        Ok(line.trim_end().to_owned())
    };
    let first = line()?;
    if first.is_empty() {
        return Ok(None);
    }
    let mut headers = BTreeMap::new();
    loop {
        let header = line()?;
        let Some((name, value)) = header.split_once(':') else { break };
        headers.insert(name.to_ascii_lowercase(), value.trim().to_owned());
    }
    Ok(Some((first, headers)))
}

/// Prints the body; fails on any status but 200.
pub(crate) fn get(url: &str) -> Result<()> {
    let rest = url.strip_prefix("http://").context("only http:// is spoken here")?;
    let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
    let port = if authority.ends_with(']') || !authority.contains(':') { ":80" } else { "" };
    let address = format!("{authority}{port}").to_socket_addrs()?.next().context("no address")?;
    let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(5))?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    write!(stream, "GET /{path} HTTP/1.1\r\nhost: {authority}\r\nconnection: close\r\n\r\n")?;
    let mut input = BufReader::new(stream);
    let (status, _) = head(&mut input)?.context("closed without an answer")?;
    let mut body = String::new();
    input.read_to_string(&mut body)?;
    if !status.starts_with("HTTP/1.1 200 ") {
        bail!("{status}");
    }
    say(body.trim_end());
    Ok(())
}
