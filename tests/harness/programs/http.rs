//! A small HTTP/1.1 server, which says who asked, and a client for where there is no curl.

use std::{
    collections::BTreeMap,
    io::{self, BufRead, BufReader, Read, Write},
    net::{IpAddr, SocketAddr, TcpStream, ToSocketAddrs},
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use serde_json::json;
use socket2::{Domain, Socket, Type};

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

/// Fetches these one after the other on one connection, from this address if one is given, and prints the bodies; fails
/// on any status but 200.
pub(crate) fn get(from: Option<IpAddr>, urls: &[&str]) -> Result<()> {
    let parts = |url: &str| -> Result<(String, String)> {
        let rest = url.strip_prefix("http://").context("only http:// is spoken here")?;
        let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
        Ok((authority.to_owned(), path.to_owned()))
    };
    let (authority, _) = parts(urls.first().context("no URL")?)?;
    let mut output = connect(&authority, from)?;
    let mut input = BufReader::new(output.try_clone()?);
    for url in urls {
        let (other, path) = parts(url)?;
        ensure!(other == authority, "{other} is not on the connection to {authority}");
        write!(output, "GET /{path} HTTP/1.1\r\nhost: {authority}\r\n\r\n")?;
        let (status, headers) = head(&mut input)?.context("closed without an answer")?;
        let length = headers.get("content-length").and_then(|length| length.parse().ok());
        let mut body = vec![0; length.context("an answer of unknown length")?];
        input.read_exact(&mut body)?;
        let body = String::from_utf8_lossy(&body);
        if !status.starts_with("HTTP/1.1 200 ") {
            bail!("{status}: {body}");
        }
        say(body.trim_end());
    }
    Ok(())
}

fn connect(authority: &str, from: Option<IpAddr>) -> Result<TcpStream> {
    let port = if authority.ends_with(']') || !authority.contains(':') { ":80" } else { "" };
    let address = format!("{authority}{port}").to_socket_addrs()?.next().context("no address")?;
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
    if let Some(from) = from {
        socket.bind(&SocketAddr::new(from, 0).into())?;
    }
    socket.connect_timeout(&address.into(), Duration::from_secs(5))?;
    socket.set_read_timeout(Some(Duration::from_secs(10)))?;
    Ok(socket.into())
}
